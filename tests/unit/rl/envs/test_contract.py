"""What every suite promises, played on the examples that each suite brings along."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from services.config import EnvConfig
from services.rl.envs import (
    SUITES,
    Transition,
    VectorEnv,
    env_spec,
    make_mixed_env,
    make_vector_env,
    union_spec,
)
from tests.conftest import needs_package

pytestmark = pytest.mark.usefixtures("fake_lab", "scratch_dir")

NUM_ENVS = 4
MAX_STEPS = 300
EXTRAS = {"vizdoom": "vizdoom"}
"""Suites that need a package which the project may be installed without."""


def marks(suite: str) -> list[pytest.MarkDecorator]:
    return [needs_package(EXTRAS[suite])] if suite in EXTRAS else []


EXAMPLES = [
    pytest.param((config,), id=f"{name}-{index}", marks=marks(name))
    for name, suite in SUITES.items()
    for index, config in enumerate(suite.EXAMPLES)
]
CATCHES = [EnvConfig(id="catch", kwargs={"pixels": True, "rows": rows}) for rows in (5, 10)]
GAMES = [
    EnvConfig(id=env_id, full_action_set=True, max_episode_frames=200)
    for env_id in ("ALE/Pong-v5", "ALE/Breakout-v5", "ALE/Freeway-v5")
]
LEVELS = [EnvConfig(id=f"dmlab/{level}") for level in ("rooms_watermaze", "language_execute_random_task")]
MIXES = [
    pytest.param((CATCHES[0], CATCHES[1]), id="two-catches"),
    pytest.param(tuple(GAMES), id="three-games"),
    pytest.param(tuple(LEVELS), id="two-levels"),
]
of_every_suite_and_mix = pytest.mark.parametrize("tasks", [*EXAMPLES, *MIXES])


@dataclass(frozen=True, kw_only=True)
class Game:
    """A reset and the transitions after it, over NUM_ENVS environments."""

    reset: npt.NDArray[np.generic]
    transitions: list[Transition]
    instructions: list[npt.NDArray[np.int32] | None]
    """After the reset and after each transition."""

    def bytes(self) -> list[bytes]:
        """Everything that was returned, once for each environment."""
        return [
            b"".join(
                [self.reset[i].tobytes()]
                + [
                    field[i].tobytes()
                    for transition in self.transitions
                    for field in vars(transition).values()
                ]
                + [said[i].tobytes() for said in self.instructions if said is not None]
            )
            for i in range(NUM_ENVS)
        ]


def play(env: VectorEnv, seed: int = 1, at_reset: int = 0, num_steps: int | None = None) -> Game:
    """Random actions, the same for all environments, but `at_reset` where the action must not count.

    Without `num_steps`, until each environment has ended an episode and begun another one."""
    rng = np.random.default_rng(7)
    game = Game(reset=env.reset(seed), transitions=[], instructions=[env.instructions()])
    over = np.zeros(NUM_ENVS, np.bool_)
    ended = np.zeros(NUM_ENVS, np.bool_)
    for _ in range(num_steps or MAX_STEPS):
        actions = np.full(NUM_ENVS, rng.integers(env.spec.num_actions))
        env.send(np.where(over, at_reset, actions))
        game.transitions.append(env.recv())
        game.instructions.append(env.instructions())
        if num_steps is None and ended.all():
            break
        over = game.transitions[-1].episode_over
        ended |= over
    return game


def open_envs(tasks: Sequence[EnvConfig], num_threads: int = 1) -> VectorEnv:
    """NUM_ENVS environments of one task or of several, more of the first one than of the others."""
    others = len(tasks) - 1
    return make_mixed_env(tasks, [NUM_ENVS - others, *[1] * others], num_threads)


@pytest.fixture(scope="module", params=[*EXAMPLES, *MIXES])
def env(request: pytest.FixtureRequest, fake_lab: None, scratch_dir: Path) -> Iterator[VectorEnv]:
    """The environments of one example, opened once for all tests, because emulators take their time."""
    env = open_envs(request.param)
    yield env
    env.close()


@pytest.fixture(scope="module")
def game(env: VectorEnv) -> Game:
    return play(env)


@pytest.mark.parametrize("name", SUITES)
def test_an_example_is_played_by_the_suite_that_brings_it(name: str) -> None:
    for config in SUITES[name].EXAMPLES:
        first = next(suite for suite in SUITES.values() if suite.plays(config.id))
        assert first is SUITES[name]


def test_all_that_is_returned_has_the_shape_and_dtype_of_the_spec(env: VectorEnv, game: Game) -> None:
    for observation in [game.reset, *(transition.observation for transition in game.transitions)]:
        assert observation.shape == (NUM_ENVS, *env.spec.observation_shape)
        assert observation.dtype == env.spec.observation_dtype
        assert observation.flags.c_contiguous
    for transition in game.transitions:
        assert transition.reward.shape == (NUM_ENVS,)
        assert transition.reward.dtype == np.float32
        for flags in (transition.terminated, transition.truncated, transition.episode_over):
            assert flags.shape == (NUM_ENVS,)
            assert flags.dtype == np.bool_


def test_instructions_come_with_every_observation_or_with_none(env: VectorEnv, game: Game) -> None:
    for said in game.instructions:
        if env.spec.instruction_length == 0:
            assert said is None
        else:
            assert said is not None
            assert said.shape == (NUM_ENVS, env.spec.instruction_length)
            assert said.dtype == np.int32


def test_every_environment_ends_an_episode_and_says_why(game: Game) -> None:
    assert np.any([t.episode_over for t in game.transitions], axis=0).all()
    for t in game.transitions:
        assert not np.any(t.terminated & t.truncated)
        assert np.all((t.terminated | t.truncated)[t.episode_over])
        assert np.all(t.episode_over[t.truncated])


def test_the_transition_after_the_end_of_an_episode_is_a_reset(game: Game) -> None:
    for last, reset in pairwise(game.transitions):
        over = last.episode_over
        assert not np.any(reset.reward[over])
        assert not np.any((reset.terminated | reset.truncated | reset.episode_over)[over])


def test_the_reset_transition_ignores_its_action(env: VectorEnv, game: Game) -> None:
    assert play(env, at_reset=1).bytes() == game.bytes()


def test_another_seed_plays_another_game(env: VectorEnv, game: Game) -> None:
    assert play(env, seed=2, num_steps=len(game.transitions)).bytes() != game.bytes()


def test_environments_of_one_vector_differ_under_the_same_actions(game: Game) -> None:
    assert len(set(game.bytes())) > 1


@of_every_suite_and_mix
def test_a_second_vector_plays_the_same_on_any_number_of_threads(tasks: Sequence[EnvConfig]) -> None:
    threads = [open_envs(tasks, num_threads) for num_threads in (1, 2)]
    one, two = (play(env, num_steps=30).bytes() for env in threads)
    for env in threads:
        env.close()
    assert one == two
    assert threads[0].spec == union_spec([env_spec(task) for task in tasks])


def test_what_was_returned_never_changes_later(env: VectorEnv) -> None:
    game = play(env, num_steps=5)
    before = game.bytes()
    play(env, seed=2, num_steps=5)
    assert game.bytes() == before


@of_every_suite_and_mix
def test_close_may_come_between_send_and_recv_and_twice(tasks: Sequence[EnvConfig]) -> None:
    env = open_envs(tasks)
    observation = env.reset(1)
    copy = observation.copy()
    env.send(np.zeros(NUM_ENVS, np.int64))
    env.close()
    env.close()
    np.testing.assert_array_equal(observation, copy)
    with pytest.raises(AssertionError, match="where nothing"):
        env.reset(1)


def test_calls_out_of_order_are_bugs() -> None:
    actions = np.zeros(NUM_ENVS, np.int64)
    env = make_vector_env(EnvConfig(id="catch"), NUM_ENVS)
    with pytest.raises(AssertionError, match=r"send\(\) called where reset\(\) is due"):
        env.send(actions)
    env.reset(1)
    with pytest.raises(AssertionError, match=r"recv\(\) called where send\(\) is due"):
        env.recv()
    env.send(actions)
    wrongs: list[Callable[[], object]] = [lambda: env.send(actions), lambda: env.reset(1), env.instructions]
    for wrong in wrongs:
        with pytest.raises(AssertionError, match=r"called where recv\(\) is due"):
            wrong()
    env.recv()
    env.reset(1)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.full(NUM_ENVS, 3), "expected 0 to 2"),
        (np.full(NUM_ENVS, -1), "expected 0 to 2"),
        (np.zeros(NUM_ENVS, np.int32), "expected int64"),
        (np.zeros(NUM_ENVS - 1, np.int64), r"expected \(4,\)"),
    ],
)
def test_actions_that_the_spec_does_not_allow_are_bugs(actions: npt.NDArray[np.int64], message: str) -> None:
    env = make_vector_env(EnvConfig(id="catch"), NUM_ENVS)
    env.reset(1)
    with pytest.raises(AssertionError, match=message):
        env.send(actions)


@pytest.mark.parametrize(
    ("wrong", "suggested"),
    [
        ("cath", "did you mean catch"),
        ("Recal", "recall"),
        ("cartpole", "CartPole-v1"),
        ("CartPole", "CartPole-v1"),
        ("ALE/Pomg-v5", "unknown Atari game; did you mean ALE/Pong-v5"),
        ("BreakuotNoFrameskip-v4", "unknown Atari game; did you mean ALE/Breakout-v5"),
        ("ALE/MontezumasRevenge-v5", "did you mean ALE/MontezumaRevenge-v5"),
        ("Pomg", "ALE/Pong-v5"),
        ("xyzzy-1234567", "Allowed are ids of the suites catch, recall, atari, vizdoom, dmlab, gymnasium"),
    ],
)
def test_an_unknown_id_is_refused_with_the_closest_ones(wrong: str, suggested: str) -> None:
    with pytest.raises(ValueError, match=f"^env.id = '{wrong}'") as refusal:
        env_spec(EnvConfig(id=wrong))
    assert suggested in str(refusal.value)


def test_importing_the_suites_loads_no_emulator_that_is_not_needed() -> None:
    heavy = "vizdoom", "deepmind_lab", "pygame", "cv2", "torch"
    code = f"import sys, services.rl.envs; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == "[]"
