"""A policy is shown the same whether it plays in an actor or is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.actor.loop import Half
from services.config import PopArtConfig
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec, Transition
from services.rl.envs.base import VectorEnv
from services.rl.networks import ActorCritic
from services.rl.networks.torso import Torso
from services.rl.player import Player
from services.rl.policy import Memory, Policy

SPEC = EnvSpec(
    id="talking",
    observation_shape=(2, 3),
    observation_dtype="uint8",
    frame_stack=3,
    num_actions=4,
    frame_skip=1,
    instruction_length=5,
)
EPISODE_LENGTHS = (1, 3, 7)
NUM_STEPS = 20
T = 4


class Talking(VectorEnv):
    """Environment n ends after ``EPISODE_LENGTHS[n]`` steps; what it shows and says tells what was done."""

    def __init__(self) -> None:
        self.spec = SPEC
        self.num_envs = len(EPISODE_LENGTHS)
        self._history = np.zeros(self.num_envs, np.int64)
        self._step = np.zeros(self.num_envs, np.int64)
        self._over = np.zeros(self.num_envs, np.bool_)
        self._actions = np.zeros(self.num_envs, np.int64)

    def reset(self, seed: int) -> NDArray[Any]:
        self._history[:] = seed + np.arange(self.num_envs)
        return self._show()

    def send(self, actions: NDArray[np.int64]) -> None:
        self._actions = actions.copy()

    def recv(self) -> Transition:
        resetting, actions = self._over, self._actions
        self._history = (31 * self._history + 7 * np.where(resetting, 0, actions) + 1) % 251
        self._step = np.where(resetting, 0, self._step + 1)
        self._over = ~resetting & (self._step == np.array(EPISODE_LENGTHS))
        return Transition(
            observation=self._show(),
            reward=np.where(resetting, 0, actions - 1.5).astype(np.float32),
            terminated=self._over.copy(),
            truncated=np.zeros(self.num_envs, np.bool_),
            episode_over=self._over.copy(),
        )

    def instructions(self) -> NDArray[np.int32]:
        words: NDArray[np.int64] = self._history[:, None] // np.array([1, 2, 3, 4, 5]) % 100 + 1
        return words.astype(np.int32)

    def close(self) -> None:
        pass

    def _show(self) -> NDArray[np.uint8]:
        pixels = self._history[:, None, None] + np.arange(6).reshape(2, 3)
        return (pixels % 256).astype(np.uint8)


class Flat(Torso):
    """All pixels as they are."""

    num_features = 2 * 3 * 3

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255


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
    policy, env = witness(), Talking()
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
    player = Player(Talking(), cast(Policy, policy), seed=5)
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
    assert first.frames[0] == [nothing, nothing, [[5, 6, 7], [8, 9, 10]]]
    assert first.starts == [[False, False, True]] * 3
    assert second.frames[0][:2] == [nothing, first.frames[0][2]]
    assert second.starts == [[False, True, False]] * 3


def test_an_episode_starts_after_the_transition_that_nobody_acted(shown: list[Shown]) -> None:
    """Lengths 1, 3 and 7: final observation at step L, reset observation at L + 1, and so on from there."""
    starts = np.array([each.starts for each in shown])[:, :, -1]
    assert [np.flatnonzero(starts[:, n]).tolist() for n in range(3)] == [
        [0, 2, 4, 6, 8, 10, 12, 14, 16, 18],
        [0, 4, 8, 12, 16],
        [0, 8, 16],
    ]


def test_memory_moves_on_with_every_step_and_holds_what_was_done_and_paid(shown: list[Shown]) -> None:
    first, second = shown[:2]
    state, last_action, last_reward = first.memory
    assert (np.array(state) == 0).all()
    assert (last_action, last_reward) == ([0, 0, 0], [0, 0, 0])
    state, last_action, last_reward = second.memory
    assert (np.array(state) != 0).any()
    assert last_action == first.actions
    assert last_reward == [action - 1.5 for action in first.actions]


def test_the_same_seed_plays_the_same_and_another_one_does_not(shown: list[Shown]) -> None:
    assert shown_to_a_player() == shown
    policy = witness(seed=12)
    player = Player(Talking(), cast(Policy, policy), seed=5)
    for _ in range(NUM_STEPS):
        player.step()
    assert [each.actions for each in policy.shown] != [each.actions for each in shown]
