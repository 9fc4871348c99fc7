"""A policy is shown the same whether it plays in an actor or is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.actor.loop import Half
from services.config import PopArtConfig
from services.rl.actions import Discrete
from services.rl.networks import ActorCritic
from services.rl.player import Player
from services.rl.policy import Memory, Policy
from tests.unit.rl.talking import SPEC, Flat, Talking

NUM_ENVS = 3
NUM_STEPS = 20
T = 4


@dataclass(frozen=True)
class Shown:
    """One call of ``Policy.act``, and what it chose."""

    frames: list[Any]
    starts: list[Any]
    memory: tuple[list[Any], ...]
    words: list[Any]
    actions: list[int]


@dataclass
class Witness:
    """A policy that writes down what it is shown."""

    policy: Policy
    version: int = 3
    shown: list[Shown] = field(default_factory=list)

    @property
    def reads_instructions(self) -> bool:
        return self.policy.reads_instructions

    def new_memory(self, num_envs: int) -> Memory | None:
        return self.policy.new_memory(num_envs)

    def act(
        self,
        frames: NDArray[Any],
        starts: NDArray[np.bool_],
        memory: Memory | None = None,
        words: NDArray[np.int32] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert words is not None and memory is not None
        remembered = (memory.state_2NH, memory.last_action_N, memory.last_reward_N)
        before = tuple(array.tolist() for array in remembered)
        actions, logits = self.policy.act(frames, starts, memory, words)
        self.shown.append(Shown(frames.tolist(), starts.tolist(), before, words.tolist(), actions.tolist()))
        return actions, logits


def witness(seed: int = 11) -> Witness:
    """Recurrent, and it reads."""
    torch.manual_seed(2)
    network = ActorCritic(
        Flat(),
        Discrete(SPEC.num_actions),
        lstm_size=6,
        reads_instructions=True,
        num_tasks=1,
        popart=PopArtConfig(),
    )
    return Witness(
        Policy(
            network=network,
            actions=Discrete(SPEC.num_actions),
            frame_stack=SPEC.frame_stack,
            dtype=torch.float32,
            seed=seed,
        )
    )


def shown_to_an_actor() -> list[Shown]:
    policy, env = witness(), Talking(NUM_ENVS)
    acting = cast(Policy, policy)
    half = Half(
        env,
        SPEC,
        T,
        SPEC.num_actions,
        seed=5,
        memory=policy.new_memory(env.num_envs),
        reads_instructions=True,
    )
    for _ in range(NUM_STEPS):
        if half.full:
            half.begin_unroll()
        half.act(acting)
        half.record(env.recv())
    return policy.shown


def shown_to_a_player() -> list[Shown]:
    policy = witness()
    player = Player(Talking(NUM_ENVS), cast(Policy, policy), seed=5)
    for _ in range(NUM_STEPS):
        player.step()
    return policy.shown


@pytest.fixture(scope="module")
def shown() -> list[Shown]:
    return shown_to_a_player()


def test_a_player_shows_its_policy_what_an_actor_shows_it(shown: list[Shown]) -> None:
    in_actor = shown_to_an_actor()
    assert len(shown) == len(in_actor) == NUM_STEPS
    for step, (here, there) in enumerate(zip(shown, in_actor, strict=True)):
        assert here == there, f"step {step}"


def test_the_newest_frames_are_shown_with_zeros_before_the_first(shown: list[Shown]) -> None:
    first, second = shown[:2]
    nothing = [[0, 0, 0], [0, 0, 0]]
    assert first.frames[0] == [nothing, nothing, [[85, 86, 87], [88, 89, 90]]]
    assert first.starts == [[False, False, True]] * 3
    assert second.frames[0][:2] == [nothing, first.frames[0][2]]
    assert second.starts == [[False, True, False]] * 3


def test_an_episode_starts_after_the_transition_that_nobody_acted(shown: list[Shown]) -> None:
    """Final observation at step L, reset observation at L + 1. L is 3, 7, 1, 4; 7, 1, 4, 11; 1, 4, 11."""
    starts = np.array([each.starts for each in shown])[:, :, -1]
    assert [np.flatnonzero(starts[:, n]).tolist() for n in range(3)] == [
        [0, 4, 12, 14, 19],
        [0, 8, 10, 15],
        [0, 2, 7, 19],
    ]


def test_memory_moves_on_with_every_step_and_holds_what_was_done_and_paid(shown: list[Shown]) -> None:
    first, second = shown[:2]
    state, last_action, last_reward = first.memory
    assert (np.array(state) == 0).all()
    assert (last_action, last_reward) == ([0, 0, 0], [0, 0, 0])
    state, last_action, last_reward = second.memory
    assert (np.array(state) != 0).any()
    assert last_action == first.actions
    paid = [(31 * (85 + 5 * n) + 7 * action + 1) % 251 / 50 - 2 for n, action in enumerate(first.actions)]
    assert last_reward == pytest.approx(paid)
    assert len(set(paid)) == NUM_ENVS


def test_the_same_seed_plays_the_same_and_another_one_does_not(shown: list[Shown]) -> None:
    assert shown_to_a_player() == shown
    policy = witness(seed=12)
    player = Player(Talking(NUM_ENVS), cast(Policy, policy), seed=5)
    for _ in range(NUM_STEPS):
        player.step()
    assert [each.actions for each in policy.shown] != [each.actions for each in shown]


def test_a_restart_shows_nothing_of_what_was_before_and_has_another_seed() -> None:
    """As a player that begins with the next seed."""
    policy, fresh = witness(), witness()
    player = Player(Talking(NUM_ENVS), cast(Policy, policy), seed=5)
    for _ in range(2):
        player.step()
    player.restart()
    player.step()
    Player(Talking(NUM_ENVS), cast(Policy, fresh), seed=6).step()
    restarted, first = policy.shown[-1], fresh.shown[0]
    for what in ("frames", "starts", "memory", "words"):
        assert getattr(restarted, what) == getattr(first, what), what
