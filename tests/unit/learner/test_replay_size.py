"""What 200,000 steps of Atari take, which is the capacity that the documentation speaks of."""

from __future__ import annotations

import tracemalloc

import numpy as np
from prometheus_client import CollectorRegistry

from services.config import EnvConfig
from services.learner.batch import message_bytes, rollout_schema
from services.learner.replay import Replay
from services.ops.metrics import ReplayMetrics
from services.rl.actions import Discrete
from services.rl.envs import env_spec
from services.rl.replay import ReplayMemory
from services.wire.codec import Expected
from services.wire.messages import Rollout
from tests.unit.learner.rollouts import RUN, play

PONG = EnvConfig(id="ALE/Pong-v5")
UNROLL_LENGTH, CAPACITY = 20, 200_000
NUM_ROLLOUTS = CAPACITY // UNROLL_LENGTH
BYTES_PER_ROLLOUT = 3000
"""All that may be held for one, that is 30 MB altogether. Decoded, one takes 9 kB."""


def test_200_000_steps_of_pong_are_held_in_30_mb() -> None:
    spec = env_spec(PONG)
    schema = rollout_schema(spec, Discrete(spec.num_actions), UNROLL_LENGTH)
    memory = ReplayMemory(NUM_ROLLOUTS, np.random.default_rng(1))
    registry = CollectorRegistry()
    replay = Replay(
        memory=memory,
        log=None,
        ratio=7,
        unroll_length=UNROLL_LENGTH,
        expected=Expected(run_id=RUN, max_message_bytes=message_bytes(schema), schema=schema),
        metrics=ReplayMetrics(registry),
    )
    unrolls = play(PONG, UNROLL_LENGTH, num_unrolls=20, codec="zstd")
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(NUM_ROLLOUTS + len(unrolls)):  # so many that some fall out again
        replay.remember(
            Rollout(
                run_id=RUN,
                actor_id="actor-0",
                incarnation=1,
                sequence=number,
                policy_version=number,
                task=0,
                episodes=(),
                arrays=unrolls[number % len(unrolls)].packed,
            )
        )
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(memory) == NUM_ROLLOUTS
    held = after - before
    told = registry.get_sample_value("impala_learner_replay_bytes")
    assert told is not None
    assert told <= held <= 1.1 * told, "what is told is what there is"
    assert NUM_ROLLOUTS * 1000 < held < NUM_ROLLOUTS * BYTES_PER_ROLLOUT, f"{held / NUM_ROLLOUTS:.0f} each"
