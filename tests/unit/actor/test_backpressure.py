"""The actor's loop over real sockets: it plays while its learners read, and stands still when they do not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from services.actor.loop import Half
from services.config import EnvConfig, NetworkConfig, RunConfig
from services.ops.metrics import ActorMetrics
from services.rl.actions import Discrete
from services.rl.envs import env_spec, make_vector_env
from services.rl.networks import make_network
from services.rl.policy import Policy
from services.wire.messages import Destination
from services.wire.sockets import LearnerConnection, RolloutReceiver, RolloutSender
from tests.unit.learner.waiting import until
from tests.unit.rl.roundtrip import HeldWeights, actor_loop

LIMIT = 1 << 24
DEADLINE_S = 120.0
NUM_ENVS = 8
ENV = EnvConfig(id="catch")
WIRE = RunConfig().wire


class Watched(RolloutSender):
    """Says when it found nobody with room so many times in a row."""

    def __init__(self) -> None:
        super().__init__(WIRE.send_queue, LIMIT)
        self.misses = 0

    def choose(self, timeout_s: float) -> LearnerConnection | None:
        learner = super().choose(timeout_s)
        self.misses = 0 if learner is not None else self.misses + 1
        return learner


class Scene:
    """An actor of Catch in a thread, and its learners."""

    def __init__(self, opened: ExitStack, directory: Path) -> None:
        self._opened = opened
        self._directory = directory
        self.registry = CollectorRegistry()
        self.held = HeldWeights()
        self.stopping = threading.Event()
        self.sender = opened.enter_context(Watched())
        self.receivers: list[RolloutReceiver] = []
        spec = env_spec(ENV)
        actions = Discrete(spec.num_actions)
        network = make_network(spec, NetworkConfig())
        policy = Policy(
            network=network, actions=actions, frame_stack=spec.frame_stack, dtype=torch.float32, seed=1
        )
        policy.version = 0
        halves = [
            Half(make_vector_env(ENV, NUM_ENVS // 2), spec, 20, actions.num_outputs, seed) for seed in (1, 2)
        ]
        self.made_s = time.perf_counter()
        metrics = ActorMetrics(self.registry)
        self._loop = actor_loop(halves, policy, self.sender, self.stopping, self.held, metrics)
        self._thread = threading.Thread(target=self._run)
        self.took_s = 0.0

    def add_learner(self, transport: str = "tcp") -> RolloutReceiver:
        """Before the actor knows it."""
        number = len(self.receivers)
        endpoint = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{self._directory}/{number}"
        self.receivers.append(
            self._opened.enter_context(RolloutReceiver(endpoint, WIRE.receive_queue, LIMIT))
        )
        return self.receivers[-1]

    def make_known(self) -> None:
        """All learners that there are."""
        self.held.learners = tuple(
            Destination(endpoint=receiver.endpoint, since=1) for receiver in self.receivers
        )

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        started_s = time.perf_counter()
        self._loop.run()
        self.took_s = time.perf_counter() - started_s

    def is_blocked(self) -> bool:
        """For two seconds by now."""
        return self.sender.misses >= 8

    def stop(self) -> None:
        self.stopping.set()
        if self._thread.is_alive():
            self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def count(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"impala_actor_{name}_total", labels)
        assert value is not None
        return value


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as opened:
        made = Scene(opened, tmp_path)
        opened.callback(made.stop)
        yield made


@pytest.mark.parametrize("num_learners", [1, 3])
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_an_actor_whose_learners_read_nothing_has_no_more_under_way_than_the_lag_bound_counts(
    scene: Scene, transport: str, num_learners: int
) -> None:
    for _ in range(num_learners):
        scene.add_learner(transport)
    scene.make_known()
    scene.start()
    until(scene.is_blocked, "nobody has room", DEADLINE_S)
    sent, steps = scene.count("rollouts_sent"), scene.count("env_steps")
    # The bound has this factor: what a connection takes is up to the kernel, and another one may take more.
    assert sent <= 2 * num_learners * WIRE.rollouts_per_connection
    played = steps / 20
    assert played - sent <= 2 * NUM_ENVS, "one unroll is played and one waits"
    until(lambda: scene.sender.misses >= 10, "it is still blocked", DEADLINE_S)
    assert (scene.count("rollouts_sent"), scene.count("env_steps")) == (sent, steps)
    scene.stop()
    received = [0 for _ in scene.receivers]

    def has_come() -> bool:
        for number, receiver in enumerate(scene.receivers):
            while receiver.receive(0.01) is not None:
                received[number] += 1
        return sum(received) >= sent

    until(has_come, "all that was sent", DEADLINE_S)
    assert [receiver.receive(0.2) for receiver in scene.receivers] == [None] * num_learners
    assert sum(received) == sent
    assert min(received) >= WIRE.send_queue + WIRE.receive_queue


def test_an_actor_without_learners_plays_one_unroll_and_gives_the_first_that_comes_all_of_it(
    scene: Scene,
) -> None:
    scene.start()
    until(scene.is_blocked, "nobody has room", DEADLINE_S)
    assert scene.count("rollouts_sent") == 0
    receiver = scene.add_learner()
    scene.make_known()
    for _ in range(2 * NUM_ENVS):
        assert receiver.receive(DEADLINE_S) is not None


def test_all_of_an_actors_time_is_told_while_it_plays_and_while_it_waits(scene: Scene) -> None:
    receiver = scene.add_learner()
    scene.make_known()
    scene.start()
    for _ in range(20 * NUM_ENVS):
        assert receiver.receive(DEADLINE_S) is not None
    until(scene.is_blocked, "nobody has room", DEADLINE_S)
    scene.stop()
    seconds = {stage: scene.count("seconds", stage=stage) for stage in ActorMetrics.STAGES}
    assert 0.98 * scene.took_s <= sum(seconds.values()) <= time.perf_counter() - scene.made_s
    assert seconds["send_blocked"] >= 1.9
    assert min(seconds[stage] for stage in ("env", "inference", "pack")) > 0
    assert seconds["idle"] == seconds["start"] == 0
