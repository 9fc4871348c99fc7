"""Rollouts of a tiny run, as bytes and as objects, and the counters that tell what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from services.actor.loop import Half
from services.config import EnvConfig
from services.learner.batch import rollout_schema
from services.learner.intake import RolloutQueue
from services.ops.metrics import LearnerMetrics
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec, env_spec, make_vector_env
from services.rl.policy import Policy
from services.wire.codec import Codec, Expected, Packer, encode
from services.wire.messages import Buffer, Episode, PackedArray, Rollout

RUN = "run"
ARRAYS = ("observation", "episode_start", "action", "behaviour_logits", "reward", "terminated")
SPEC = EnvSpec(
    id="tiny",
    observation_shape=(4, 6),
    observation_dtype="uint8",
    frame_stack=2,
    num_actions=3,
    frame_skip=1,
)
UNROLL_LENGTH = 5
FRAMES = SPEC.frame_stack - 1 + UNROLL_LENGTH + 1
SCHEMA = rollout_schema(SPEC, Discrete(SPEC.num_actions), UNROLL_LENGTH)
EXPECTED = Expected(run_id=RUN, max_message_bytes=1 << 16, schema=SCHEMA)


def rollout(
    sequence: int = 0,
    *,
    version: int = 0,
    actor: str = "actor-0",
    incarnation: int = 1,
    episodes: Sequence[Episode] = (),
    observation: PackedArray | None = None,
) -> Rollout:
    """Every array is filled from ``sequence``, so that one rollout can be told from the next."""
    packer = Packer("zstd")
    rng = np.random.default_rng(sequence)
    pixels = rng.integers(0, 256, (FRAMES, *SPEC.observation_shape), np.uint8)
    arrays = {
        "observation": observation or packer.pack(pixels),
        "episode_start": packer.pack(rng.random(FRAMES) < 0.3),
        "action": packer.pack(rng.integers(0, 3, UNROLL_LENGTH, np.int32)),
        "behaviour_logits": packer.pack(rng.standard_normal((UNROLL_LENGTH, 3), np.float32)),
        "reward": packer.pack(np.full(UNROLL_LENGTH, sequence, np.float32)),
        "terminated": packer.pack(rng.random(UNROLL_LENGTH) < 0.3),
    }
    return Rollout(
        run_id=RUN,
        actor_id=actor,
        incarnation=incarnation,
        sequence=sequence,
        policy_version=version,
        task=0,
        episodes=tuple(episodes),
        arrays=arrays,
    )


def corrupt(sequence: int) -> Rollout:
    """Passes the decoder, which never decompresses, and does not decompress."""
    shape = (FRAMES, *SPEC.observation_shape)
    noise = PackedArray(dtype="uint8", shape=shape, codec="zstd", data=b"\x28\xb5\x2f\xfd not a zstd frame")
    return rollout(sequence, observation=noise)


def sent(message: Rollout) -> list[Buffer]:
    """What arrives: the same bytes in other memory."""
    return [bytes(frame) for frame in encode(message)]


def sequences(queue: RolloutQueue) -> list[int]:
    """Empty the queue, oldest first."""
    return [taken.sequence for taken in queue.take(len(queue), 0.0)]


class Counts:
    """The learner's metrics, and a short way to read them: ``counts("rollouts_total", result="stale")``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = LearnerMetrics(self.registry)

    def __call__(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"impala_learner_{name}", labels)
        assert value is not None, f"no metric impala_learner_{name} {labels}"
        return value


# --- played, not made up -------------------------------------------------------------------------


class RandomPolicy:
    """Acts without a network."""

    version = 0

    def __init__(self, num_actions: int) -> None:
        self._rng = np.random.default_rng(1)
        self._num_actions = num_actions

    def act(
        self, frames_NF: NDArray[Any], episode_start_NF: NDArray[np.bool_], *_unused: object
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        num_envs = len(frames_NF)
        logits = self._rng.standard_normal((num_envs, self._num_actions)).astype(np.float32)
        return self._rng.integers(self._num_actions, size=num_envs), logits


@dataclass
class Unroll:
    """What an actor had in its hands when it packed a rollout."""

    packed: dict[str, PackedArray]
    arrays: dict[str, NDArray[Any]]
    episodes: tuple[Episode, ...]


def play(config: EnvConfig, unroll_length: int, num_unrolls: int, codec: Codec) -> list[Unroll]:
    """What the actor's loop does with one half of its environments."""
    spec = env_spec(config)
    half = Half(make_vector_env(config, 2), spec, unroll_length, spec.num_actions, seed=3)
    policy = cast(Policy, RandomPolicy(spec.num_actions))
    packer = Packer(codec)
    unrolls = []
    for _ in range(num_unrolls):
        while not half.full:
            half.act(policy)
            half.record(half.env.recv())
        for n in range(half.env.num_envs):
            arrays = {name: getattr(half, name)[n].copy() for name in ARRAYS}
            unrolls.append(Unroll(half.pack(n, packer), arrays, tuple(half.episodes[n])))
        half.begin_unroll()
    half.env.close()
    return unrolls
