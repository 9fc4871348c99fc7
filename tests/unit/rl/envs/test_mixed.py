"""Several tasks in one vector: what the parts return arrives untouched; what cannot be mixed is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from services.config import EnvConfig
from services.rl.envs import (
    EnvSpec,
    Transition,
    VectorEnv,
    env_spec,
    make_mixed_env,
    make_vector_env,
    union_spec,
)
from services.rl.envs.base import Actions, Instructions, Observations, env_seeds
from services.rl.envs.mixed import Mixed

HOMEMADE = "tests.unit.rl.envs.homemade"
CATCHES = [EnvConfig(id="catch", kwargs={"pixels": True, "rows": rows}) for rows in (3, 5, 10)]


class Echo(VectorEnv):
    """Returns what it was told, marked with its number, and writes down the order of all calls."""

    def __init__(self, number: int, num_envs: int, num_actions: int, calls: list[str]) -> None:
        self.spec = EnvSpec(
            id=f"echo-{number}",
            observation_shape=(2,),
            observation_dtype="float32",
            frame_stack=1,
            num_actions=num_actions,
            frame_skip=1,
            instruction_length=3,
        )
        self.num_envs = num_envs
        self.seed = -1
        self.num_closed = 0
        self._number = number
        self._calls = calls
        self._actions = np.zeros(num_envs, np.int64)

    def _observe(self) -> Observations:
        columns = np.full(self.num_envs, self._number), self._actions
        return np.stack(columns, axis=1).astype(np.float32)

    def reset(self, seed: int) -> Observations:
        self.seed = seed
        return self._observe()

    def send(self, actions: Actions) -> None:
        self._calls.append(f"send {self._number}")
        self._actions = actions

    def recv(self) -> Transition:
        self._calls.append(f"recv {self._number}")
        flags = self._actions == 1
        return Transition(
            observation=self._observe(),
            reward=10.0 * self._actions.astype(np.float32) + self._number,
            terminated=flags,
            truncated=~flags,
            episode_over=np.full(self.num_envs, self._number == 2),
        )

    def instructions(self) -> Instructions:
        return np.full((self.num_envs, 3), self._number, np.int32)

    def close(self) -> None:
        self.num_closed += 1


def echoes() -> tuple[Mixed, list[Echo], list[str]]:
    """A mix of 2, 1 and 3 environments with 3, 2 and 4 actions, and its parts, and the calls they get."""
    calls: list[str] = []
    parts = [Echo(1, 2, 3, calls), Echo(2, 1, 2, calls), Echo(3, 3, 4, calls)]
    return Mixed(union_spec([part.spec for part in parts]), parts), parts, calls


def test_everything_arrives_in_the_order_of_the_parts() -> None:
    mix, _, _ = echoes()
    assert mix.num_envs == 6
    np.testing.assert_array_equal(mix.reset(1), [[1, 0], [1, 0], [2, 0], [3, 0], [3, 0], [3, 0]])
    mix.send(np.array([0, 1, 1, 2, 3, 0]))
    seen = mix.recv()
    np.testing.assert_array_equal(seen.observation, [[1, 0], [1, 1], [2, 1], [3, 2], [3, 3], [3, 0]])
    np.testing.assert_array_equal(seen.reward, [1, 11, 12, 23, 33, 3])
    np.testing.assert_array_equal(seen.terminated, [False, True, True, False, False, False])
    np.testing.assert_array_equal(seen.truncated, ~seen.terminated)
    np.testing.assert_array_equal(seen.episode_over, [False, False, True, False, False, False])
    np.testing.assert_array_equal(mix.instructions(), [[n] * 3 for n in (1, 1, 2, 3, 3, 3)])


def test_an_action_that_a_part_does_not_have_acts_as_its_first_one() -> None:
    mix, _, _ = echoes()
    mix.reset(1)
    mix.send(np.array([2, 3, 3, 3, 2, 1]))
    np.testing.assert_array_equal(mix.recv().observation[:, 1], [2, 0, 0, 3, 2, 1])


def test_all_parts_step_before_any_is_waited_for() -> None:
    mix, _, calls = echoes()
    mix.reset(1)
    mix.send(np.zeros(6, np.int64))
    mix.recv()
    assert calls == ["send 1", "send 2", "send 3", "recv 1", "recv 2", "recv 3"]


def test_every_part_has_a_seed_of_its_own_and_is_closed() -> None:
    mix, parts, _ = echoes()
    seeds = []
    for seed in (1, 1, 2):
        mix.reset(seed)
        seeds.append([part.seed for part in parts])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0] + seeds[2])) == 6
    mix.close()
    assert [part.num_closed for part in parts] == [1, 1, 1]


def test_a_part_plays_in_a_mix_exactly_as_it_plays_alone() -> None:
    counts = [2, 1, 3]
    mix = make_mixed_env(CATCHES, counts)
    alone = [make_vector_env(task, count) for task, count in zip(CATCHES, counts, strict=True)]
    resets = [env.reset(seed) for env, seed in zip(alone, env_seeds(4, 3), strict=True)]
    np.testing.assert_array_equal(mix.reset(4), np.concatenate(resets))
    rng = np.random.default_rng(1)
    ends = np.zeros(6, np.int64)
    for _ in range(60):
        actions = rng.integers(3, size=6)
        mix.send(actions)
        seen = mix.recv()
        first = 0
        for env in alone:
            mine = slice(first, first + env.num_envs)
            env.send(actions[mine])
            for name, expected in vars(env.recv()).items():
                np.testing.assert_array_equal(getattr(seen, name)[mine], expected)
            first = mine.stop
        ends += seen.episode_over
    np.testing.assert_array_equal(ends, [20, 20, 12, 6, 6, 6])  # an episode is rows - 1 steps and a reset


def test_one_task_is_not_a_mix() -> None:
    mix, alone = make_mixed_env(CATCHES[:1], [4], 2), make_vector_env(CATCHES[0], 4, num_threads=2)
    assert mix.spec == alone.spec
    np.testing.assert_array_equal(mix.reset(3), alone.reset(3))


@pytest.mark.parametrize("tasks", [CATCHES[:1], CATCHES])
def test_a_policy_may_know_more_actions_than_any_task_of_this_mix(tasks: list[EnvConfig]) -> None:
    mix = make_mixed_env(tasks, [2] * len(tasks), num_actions=7)
    assert mix.spec.num_actions == 7
    before = mix.reset(1)
    mix.send(np.full(mix.num_envs, 6))
    surplus = mix.recv().observation
    np.testing.assert_array_equal(mix.reset(1), before)
    mix.send(np.zeros(mix.num_envs, np.int64))
    np.testing.assert_array_equal(mix.recv().observation, surplus)


def test_the_union_has_the_actions_of_the_task_with_the_most() -> None:
    pong, breakout = (env_spec(EnvConfig(id=f"ALE/{game}-v5")) for game in ("Pong", "Breakout"))
    assert (pong.num_actions, breakout.num_actions) == (6, 4)
    union = union_spec([breakout, pong, breakout])
    assert union == replace(breakout, num_actions=6, id="ALE/Breakout-v5 and 2 more")
    assert union_spec([pong]) == pong


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (EnvConfig(id="catch"), r"observation_shape of pong is \(84, 84\) and of catch is \(50,\)"),
        (
            EnvConfig(id="ALE/Alien-v5", color=True),
            r"of pong is \(84, 84\) and of ALE/Alien-v5 is \(84, 84, 3\)",
        ),
        (EnvConfig(id="ALE/Alien-v5", frame_stack=2), "frame_stack of pong is 4 and of ALE/Alien-v5 is 2"),
        (EnvConfig(id="ALE/Alien-v5", frame_skip=3), "frame_skip of pong is 4 and of ALE/Alien-v5 is 3"),
        (EnvConfig(id="rooms_watermaze"), "instruction_length of pong is 0 and of rooms_watermaze is 16"),
    ],
)
@pytest.mark.usefixtures("fake_lab")
def test_tasks_that_no_policy_can_play_together_are_refused_by_name(other: EnvConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mixed_env([EnvConfig(id="pong"), EnvConfig(id="pong"), other], [1, 1, 1])


def test_observations_of_another_type_are_refused() -> None:
    spec = env_spec(EnvConfig(id="catch"))
    with pytest.raises(ValueError, match="observation_dtype of catch is float32 and of b is uint8"):
        union_spec([spec, replace(spec, id="b", observation_dtype="uint8")])
