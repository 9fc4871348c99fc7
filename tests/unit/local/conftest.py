"""A small run, and fake pods for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services import config as configuration
from services.config import RunConfig
from tests.unit.local.fake_pods import Pods


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    pods = Pods(tmp_path)
    yield pods
    pods.reader.close()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return configuration.load(
        flags=[
            "--env",
            "catch",
            "--total_steps",
            "1000",
            "--ops.port",
            "0",
            "--run_dir",
            str(tmp_path / "run"),
        ]
    )
