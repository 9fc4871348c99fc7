"""The end of a training: saved before it is called complete, and never called complete unsaved."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from services.learner.batch import Batcher
from services.learner.checkpoint import CheckpointStore
from services.learner.episodes import Episodes
from services.learner.group import Group
from services.learner.loop import LearnerLoop
from services.learner.publisher import Publisher
from services.learner.report import Reporter
from services.learner.trainer import Figures, Trainer
from services.ops.health import Heartbeat
from services.ops.metrics import ReplayMetrics
from tests.unit.learner.rollouts import Counts

T = 5
FIGURES = Figures(
    updates=0,
    loss_total=0.0,
    loss_policy=0.0,
    loss_baseline=0.0,
    loss_entropy=0.0,
    entropy=0.0,
    rho_clipped_ratio=0.0,
    grad_norm=0.0,
    nonfinite_updates=0,
    replay_rejected_ratio=math.nan,
    popart_mean=(),
    popart_sigma=(),
    task_steps=(0,),
)


class FinishedTrainer:
    """All steps are trained."""

    version = 10
    steps = 6400
    learning_rate = 0.0
    complete = True

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def read_figures(self) -> Figures:
        return FIGURES


class Disk:
    """Fails as often as it is told to."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.attempts = 0
        self.busy = False
        self.saved_steps = -1

    def save(self, *, trainer: dict[str, Any], **_: object) -> bool:
        self.attempts += 1
        if self.attempts > self.failures:
            self.saved_steps = trainer["steps"]
        return True


class Server:
    """Remembers what was offered, and whether it was on the disk by then."""

    held_version = 10
    trouble = None

    def __init__(self, disk: Disk, stopping: threading.Event) -> None:
        self.disk = disk
        self.stopping = stopping
        self.offers: list[tuple[int, str, int]] = []

    def offer(self, version: int, steps: int, state: str, wait_s: float = 0.0) -> bool:
        self.offers.append((version, state, self.disk.saved_steps))
        return True

    def wait_until_confirmed(self, version: int, state: str, timeout_s: float) -> bool:
        self.stopping.set()  # the pod is stopped as soon as it is complete
        return True


class NoBatches:
    """None arrives, and after a few questions the pod is stopped."""

    def __init__(self, stopping: threading.Event) -> None:
        self.stopping = stopping
        self.questions = 0

    def next(self, timeout_s: float) -> None:
        self.questions += 1
        if self.questions == 3:
            self.stopping.set()


class OneBatch:
    """One arrives, and then the pod is stopped."""

    def __init__(self, stopping: threading.Event, **parts: Any) -> None:
        self.stopping = stopping
        self.released = False
        self.batch: Any = SimpleNamespace(**parts, action=torch.zeros(8, T), release=self.release)

    def release(self) -> None:
        self.released = True

    def next(self, timeout_s: float) -> Any:
        batch, self.batch = self.batch, None
        if batch is None:
            self.stopping.set()
        return batch


class Training(FinishedTrainer):
    """Only counts."""

    complete = False

    def to_device(self, batch: Any) -> Any:
        return batch

    def update(self, batch: Any) -> None:
        self.version += 1
        self.steps += batch.num_fresh * T


class Scene:
    """A loop that has nothing more to train."""

    def __init__(self, directory: Path, failures: int = 0, group: Group | None = None) -> None:
        self.counts = Counts()
        self.stopping = threading.Event()
        self.disk = Disk(failures)
        self.server = Server(self.disk, self.stopping)
        self.now_s = 0.0
        self.directory = directory
        self.group = group or Group()
        self.loop = self.make(FinishedTrainer(), None)

    def make(
        self,
        trainer: FinishedTrainer,
        batcher: NoBatches | OneBatch | None,
        replay_metrics: ReplayMetrics | None = None,
    ) -> LearnerLoop:
        return LearnerLoop(
            trainer=cast(Trainer, trainer),
            batcher=cast(Batcher, batcher),
            group=self.group,
            publisher=cast(Publisher, self.server),
            checkpoints=cast(CheckpointStore, self.disk),
            checkpoint_interval_s=60.0,
            reporter=Reporter(run_dir=self.directory, tasks=["x"], frame_skip=1, metrics=self.counts.metrics),
            log_interval_s=5.0,
            episodes=Episodes(["x"]),
            config={},
            frame_skip=1,
            metrics=self.counts.metrics,
            replay_metrics=replay_metrics,
            heartbeat=Heartbeat(),
            stopping=self.stopping,
            clock=self.clock,
        )

    def clock(self) -> float:
        self.now_s += 1.0
        return self.now_s


def test_completion_is_announced_once_the_last_state_is_saved(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert scene.loop.run()
    assert scene.server.offers[-1] == (10, "complete", 6400)
    assert scene.counts.registry.get_sample_value("impala_training_complete") == 1


def test_a_disk_that_fails_for_a_while_delays_completion(tmp_path: Path) -> None:
    scene = Scene(tmp_path, failures=2)
    assert scene.loop.run()
    assert scene.disk.attempts == 3
    assert scene.server.offers[-1][1:] == ("complete", 6400)


@pytest.mark.parametrize("failures", [1, 1000])
def test_a_pod_that_is_stopped_saves_once_and_says_if_that_failed(tmp_path: Path, failures: int) -> None:
    scene = Scene(tmp_path, failures=failures)
    scene.stopping.set()
    assert not scene.loop.run()
    assert scene.disk.attempts == 1
    assert "complete" not in [state for _, state, _ in scene.server.offers]
    assert scene.counts.registry.get_sample_value("impala_training_complete") == 0


def test_a_server_that_is_ahead_is_caught_up_with_before_any_batch_arrives(tmp_path: Path) -> None:
    # Its actors act by version 30: until this learner says 30 too, all that they send is too new to be used.
    scene = Scene(tmp_path)
    trainer, server = FinishedTrainer(), scene.server
    trainer.complete, server.held_version = False, 30
    scene.loop = scene.make(trainer, NoBatches(scene.stopping))
    assert scene.loop.run()
    assert trainer.version == 30
    assert ("training", 30) in [(state, version) for version, state, _ in server.offers]


def test_only_the_leader_publishes_and_saves(tmp_path: Path) -> None:
    scene = Scene(tmp_path, group=Group(rank=1, world_size=2))
    threading.Timer(0.2, scene.stopping.set).start()
    assert scene.loop.run()
    assert scene.server.offers == []
    assert scene.disk.attempts == 0


# --- fresh and replayed ----------------------------------------------------------------------------


def test_lag_samples_and_steps_are_of_fresh_rollouts_and_age_is_of_replayed_ones(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    batches = OneBatch(scene.stopping, num_fresh=2, policy_versions=(9, 7, 4, 0, 2, 10, 11, 0))
    replay_metrics = ReplayMetrics(scene.counts.registry)
    trainer = Training()
    scene.loop = scene.make(trainer, batches, replay_metrics)
    assert scene.loop.run()
    assert batches.released
    assert scene.counts("policy_lag_versions_count") == 2
    assert scene.counts("policy_lag_versions_sum") == 1 + 3
    assert scene.counts("samples_total") == 2 * T
    assert scene.counts("steps") == trainer.steps == 6400 + 2 * T
    assert scene.counts("replayed_samples_total") == 6 * T
    # At version 10; what is from after the checkpoint that this learner went back to is of no age.
    assert scene.counts("replay_age_versions") == (6 + 10 + 8 + 0 + 0 + 10) / 6


def test_while_there_is_nothing_to_replay_there_is_no_age(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    batches = OneBatch(scene.stopping, num_fresh=8, policy_versions=(9,) * 8)
    scene.loop = scene.make(Training(), batches, ReplayMetrics(scene.counts.registry))
    assert scene.loop.run()
    assert scene.counts("policy_lag_versions_count") == 8
    assert scene.counts("replayed_samples_total") == 0
    assert math.isnan(scene.counts("replay_age_versions"))


def test_without_replay_there_are_no_such_series(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    batches = OneBatch(scene.stopping, num_fresh=8, policy_versions=(9,) * 8)
    scene.loop = scene.make(Training(), batches)
    assert scene.loop.run()
    assert scene.counts("samples_total") == 8 * T
    assert not [name for name in scene.counts.registry._names_to_collectors if "replay" in name]
