"""Learners that would make different steps have different fingerprints, and only those."""

from __future__ import annotations

import pytest

from services import config as configuration
from services.learner.fingerprint import SHARED, fingerprint

USUAL = fingerprint(configuration.load(flags=[]), "cpu")


CASES = (
    ("env", ("--env", "catch")),
    ("tasks", ("--tasks", "catch,recall")),
    ("network", ("--network", "deep")),
    ("loss", ("--loss.discount", "0.9")),
    ("loss", ("--loss.reduction", "mean")),
    ("popart", ("--popart",)),
    ("replay", ("--replay.capacity", "12345")),
    ("optimiser", ("--optimiser.learning_rate", "0.001")),
    ("optimiser", ("--optimiser.schedule", "constant")),
    ("optimiser", ("--optimiser.max_grad_norm", "1")),
    ("unroll_length", ("--unroll_length", "10")),
    ("batch_size", ("--batch_size", "16")),
    ("total_steps", ("--total_steps", "1000000")),
)


def test_every_key_that_learners_must_share_has_a_case() -> None:
    assert {key for key, _ in CASES} == set(SHARED)


@pytest.mark.parametrize(("key", "flags"), CASES)
def test_what_changes_a_step_changes_it(key: str, flags: tuple[str, ...]) -> None:
    config = configuration.load(flags=[*flags])
    usual, dumped = configuration.dump(configuration.load(flags=[])), configuration.dump(config)
    assert [name for name in dumped if dumped[name] != usual[name]] == [key], "and nothing else does"
    assert fingerprint(config, "cpu") != USUAL


@pytest.mark.parametrize(
    "flags",
    [
        ("--run_dir", "elsewhere"),
        ("--seed", "7"),
        ("--ops.port", "1234"),
        ("--learner.num_threads", "4"),
        ("--wire.learner_host", "10.0.0.7"),
        ("--actors", "9"),
        ("--checkpoint.keep", "1"),
    ],
)
def test_what_is_a_learners_own_does_not(flags: tuple[str, ...]) -> None:
    assert fingerprint(configuration.load(flags=[*flags]), "cpu") == USUAL


def test_a_gpu_does() -> None:
    assert fingerprint(configuration.load(flags=[]), "cuda") != USUAL
