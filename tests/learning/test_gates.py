"""Does it learn? Shape checks prove nothing about that. See gate.py for how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.learning.gate import Gate, train

pytestmark = pytest.mark.learning

Show = Callable[[str], None]


def pass_gate(gate: Gate, tmp_path: Path, show: Show) -> None:
    result = train(gate, tmp_path / "run")
    show(str(result))
    assert result.reached, f"{result}\n{result.output}"
    assert result.exit_code == 0, f"the run did not stop cleanly\n{result.output}"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_catch_is_learned_with_the_defaults(seed: int, tmp_path: Path, show: Show) -> None:
    gate = Gate(
        name=f"catch, seed {seed}",
        flags=["--env", "catch", "--seed", str(seed)],
        target=0.9,
        max_steps=400_000,
    )
    pass_gate(gate, tmp_path, show)


def test_catch_is_learned_in_unrolls_that_begin_anywhere_in_an_episode(tmp_path: Path, show: Show) -> None:
    """A cycle of Catch is 10 transitions, so unrolls of 20 always begin at a reset. Those of 7 do not."""
    gate = Gate(
        name="catch, unrolls of 7",
        flags=["--env", "catch", "--seed", "1", "--unroll_length", "7"],
        target=0.9,
        max_steps=400_000,
    )
    pass_gate(gate, tmp_path, show)


def test_catch_drawn_as_an_image_is_learned_through_a_convolutional_network(
    tmp_path: Path, show: Show
) -> None:
    """84 x 84 pixels, four frames deep: the whole road of an Atari game."""
    gate = Gate(
        name="catch, drawn",
        flags=["--env", "catch", "--env.kwargs", "{pixels: true}", "--network", "shallow", "--seed", "1"],
        target=0.9,
        max_steps=200_000,
    )
    pass_gate(gate, tmp_path, show)


def test_cartpole_is_learned_with_the_defaults(tmp_path: Path, show: Show) -> None:
    """Returns near 500 end by the clock: who takes that for a failure never gets there."""
    gate = Gate(
        name="CartPole-v1",
        flags=["--env", "CartPole-v1", "--seed", "1"],
        target=400.0,
        max_steps=4_000_000,
    )
    pass_gate(gate, tmp_path, show)
