"""Every second of an actor belongs to one stage, whatever it does and whatever it waits for."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor

from services.actor import loop as loop_module
from services.actor.loop import ActorLoop, Half
from services.actor.stages import Stages
from services.ops.metrics import ActorMetrics
from services.rl.envs import Transition
from services.wire.codec import Packer
from services.wire.messages import Buffer, PackedArray
from services.wire.subscriber import Snapshot
from tests.unit.rl.roundtrip import (
    ACTIONS,
    HeldWeights,
    Outbox,
    Script,
    ScriptedEnv,
    actor_loop,
    go,
    state_spec,
)

SPEC = state_spec(frame_stack=1)
T = 4
ENV_S, INFERENCE_S, PACK_S, SEND_S, LOAD_S = 0.5, 0.25, 0.0625, 0.03125, 2.0
"""Of one call each: powers of two, so that sums are exact."""
ROOM_S = 8.0


class Clock:
    """Moves on only when somebody works or waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


class SlowEnv(ScriptedEnv):
    """Each step takes its time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(SPEC, [Script(first=0, steps=[go(t, 1.0) for t in range(1000)])] * 2)
        self._clock = clock

    def recv(self) -> Transition:
        self._clock.pass_(ENV_S)
        return super().recv()


class SlowPolicy:
    """Chooses, and takes over weights, in its own time."""

    version = 0

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def load(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        self.version = version
        self._clock.pass_(LOAD_S)

    def act(self, frames_NF: NDArray[Any], *_unused: object) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        self._clock.pass_(INFERENCE_S)
        return np.zeros(len(frames_NF), np.int64), np.zeros((len(frames_NF), 2), np.float32)


class SlowPacker(Packer):
    """Compresses slowly."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("none")
        self._clock = clock

    def pack(self, array: NDArray[Any]) -> PackedArray:
        self._clock.pass_(PACK_S)
        return super().pack(array)


class SlowOutbox(Outbox):
    """Has room after a while, if at all, and newer weights with every message."""

    def __init__(
        self,
        clock: Clock,
        stop_after: int,
        stopping: threading.Event,
        held: HeldWeights,
        has_room: bool = True,
    ) -> None:
        super().__init__(stop_after, stopping)
        self.asked = 0
        self._clock = clock
        self._held = held
        self._has_room = has_room

    def choose(self, timeout_s: float) -> Outbox | None:
        self.asked += 1
        self._clock.pass_(ROOM_S)
        if self._has_room:
            return self
        if self.asked == self._stop_after:
            self._stopping.set()
        return None

    def send(self, frames: Sequence[Buffer]) -> bool:
        self._clock.pass_(SEND_S)
        self._held.newest = Snapshot(version=len(self.messages) + 1, steps=0, weights={}, received_s=0.0)
        return super().send(frames)


class Stopping(threading.Event):
    """Waiting for it takes time of the fake clock; set after so many waits."""

    def __init__(self, clock: Clock, waits: int = 1) -> None:
        super().__init__()
        self._clock = clock
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.pass_(timeout)
        self._waits -= 1
        if self._waits == 0:
            self.set()
        return self.is_set()


class Scene:
    """A loop all of whose neighbours take time of one clock, and what its stages say."""

    def __init__(self, clock: Clock, outbox: Outbox, stopping: threading.Event, held: HeldWeights) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        halves = [Half(SlowEnv(clock), SPEC, T, ACTIONS.num_outputs, seed=seed) for seed in (1, 2)]
        self.loop: ActorLoop = actor_loop(
            halves,
            SlowPolicy(clock),
            outbox,
            stopping,
            held,
            ActorMetrics(self.registry),
            clock=clock,
            packer=SlowPacker(clock),
        )

    def run(self) -> float:
        """How long it took."""
        started_s = self.clock()
        self.loop.run()
        return self.clock() - started_s

    def seconds(self) -> dict[str, float]:
        """By stage, without those that took none."""
        found = {
            stage: self.registry.get_sample_value("impala_actor_seconds_total", {"stage": stage})
            for stage in ActorMetrics.STAGES
        }
        return {stage: spent_s for stage, spent_s in found.items() if spent_s}


def test_the_stages_of_an_actor_that_plays_are_what_its_neighbours_took() -> None:
    clock, stopping, held = Clock(), threading.Event(), HeldWeights()
    num_rollouts = 12  # three unrolls of two halves with two environments each
    scene = Scene(clock, SlowOutbox(clock, num_rollouts, stopping, held), stopping, held)
    took_s = scene.run()
    seconds = scene.seconds()
    assert seconds == {
        "env": 3 * 2 * T * ENV_S,
        "inference": (2 + 3 * 2 * T) * INFERENCE_S,
        "pack": num_rollouts * (6 * PACK_S + SEND_S),
        "send_blocked": num_rollouts * ROOM_S,
        "weights": 3 * LOAD_S,
    }
    assert sum(seconds.values()) == took_s


def test_an_actor_that_nobody_takes_anything_from_is_blocked_all_the_time() -> None:
    clock, stopping, held = Clock(), threading.Event(), HeldWeights()
    scene = Scene(clock, SlowOutbox(clock, 1000, stopping, held, has_room=False), stopping, held)
    took_s = scene.run()
    seconds = scene.seconds()
    assert seconds["send_blocked"] == 1000 * ROOM_S
    assert sum(seconds.values()) == took_s


def test_an_actor_is_idle_while_training_is_complete() -> None:
    clock, held = Clock(), HeldWeights(state="complete")
    stopping = Stopping(clock, waits=100)
    scene = Scene(clock, SlowOutbox(clock, 1, stopping, held), stopping, held)
    took_s = scene.run()
    assert scene.seconds() == {"inference": 2 * INFERENCE_S, "idle": 100 * loop_module.IDLE_S}
    assert sum(scene.seconds().values()) == took_s


def test_an_actor_that_waits_for_room_after_the_end_of_training_is_idle_too() -> None:
    clock, stopping, held = Clock(), threading.Event(), HeldWeights()

    class Completing(SlowOutbox):
        def choose(self, timeout_s: float) -> Outbox | None:
            if self.asked == 3:
                held.state = "complete"
            return super().choose(timeout_s)

    scene = Scene(clock, Completing(clock, 10, stopping, held, has_room=False), stopping, held)
    took_s = scene.run()
    seconds = scene.seconds()
    assert (seconds["send_blocked"], seconds["idle"]) == (3 * ROOM_S, 7 * ROOM_S)
    assert sum(seconds.values()) == took_s


def test_time_runs_from_the_beginning_and_no_moment_counts_twice() -> None:
    clock, registry = Clock(), CollectorRegistry()
    stages = Stages(ActorMetrics(registry), clock)
    for stage, spent_s in (("weights", 3.0), ("start", 5.0), ("weights", 1.0), ("env", 0.0)):
        clock.pass_(spent_s)
        stages.end(stage)
    for stage, total_s in (("weights", 4.0), ("start", 5.0), ("env", 0.0), ("idle", 0.0)):
        assert registry.get_sample_value("impala_actor_seconds_total", {"stage": stage}) == total_s


def test_a_stage_that_is_none_is_our_own_bug() -> None:
    with pytest.raises(KeyError):
        Stages(ActorMetrics(CollectorRegistry()), Clock()).end("lunch")
