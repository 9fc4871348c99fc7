"""Pods on one machine share its cores: each starts as many threads as it is given, and none spins."""

from __future__ import annotations

import os

import pytest

from services.config import LearnerConfig, NetworkConfig, RunConfig
from services.ops import threads
from services.ops.threads import VARIABLES, learner_threads, limit_threads


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)


def test_libraries_are_told_how_many_threads_and_not_to_spin() -> None:
    limit_threads(3)
    assert {os.environ[name] for name in VARIABLES} == {"3"}
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_who_wants_threads_that_spin_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    limit_threads(1)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    ("network", "learners", "given", "expected"),
    [
        ("deep", 1, None, 4),
        ("deep", 3, None, 1),
        ("deep", 9, None, 1),
        ("shallow", 1, None, 1),
        ("deep", 1, 7, 7),
    ],
)
def test_learners_of_a_deep_network_share_the_cores(
    network: str, learners: int, given: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "num_cores", lambda most: min(4, most))
    config = RunConfig(
        network=NetworkConfig.model_validate({"name": network}),
        learners=learners,
        learner=LearnerConfig(num_threads=given),
    )
    assert learner_threads(config) == expected
