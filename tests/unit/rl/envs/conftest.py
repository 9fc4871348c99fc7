"""What the suites need around them: DeepMind Lab's stand-in, and a place for what emulators leave behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FAKE_LAB = str(Path(__file__).parent / "fake_lab")


@pytest.fixture(scope="module")
def fake_lab() -> Iterator[None]:
    """`import deepmind_lab` finds the stand-in, here and in the processes of environments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAKE_LAB)
        yield
    sys.modules.pop("deepmind_lab", None)


@pytest.fixture(scope="module")
def scratch_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, because ViZDoom leaves a folder there."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("working")
        patch.chdir(path)
        yield path
