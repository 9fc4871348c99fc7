"""The end of a training: saved before it is called complete, and never called complete unsaved."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from services.learner.attendance import Attendance
from services.learner.batch import Batcher
from services.learner.checkpoint import CheckpointStore
from services.learner.episodes import Episodes
from services.learner.gathering import Gathering
from services.learner.group import Group, PeerLostError, WeightsDifferError
from services.learner.loop import SAVE_LAST_S, LearnerLoop
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
    total_task_steps=(0,),
)


class FinishedTrainer:
    """All steps are trained."""

    version = 10
    steps = 6400
    learning_rate = 0.0
    complete = True
    group = Group()
    allreduce_s = 0.0

    def checksum(self) -> int:
        return 77

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
        if self.busy:
            return False
        self.attempts += 1
        if self.attempts > self.failures:
            self.saved_steps = trainer["steps"]
        return True


class Server:
    """Remembers what was offered, and whether it was on the disk by then."""

    trouble = None
    held_version = -1

    def __init__(self, disk: Disk, stopping: threading.Event) -> None:
        self.disk = disk
        self.stopping = stopping
        self.offers: list[tuple[int, str, int]] = []
        self.retirements = 0

    def retire(self) -> None:
        self.retirements += 1

    def offer(self, version: int, steps: int, state: str, wait_s: float = 0.0) -> bool:
        self.offers.append((version, state, self.disk.saved_steps))
        return True

    def wait_until_confirmed(self, version: int, state: str, timeout_s: float) -> bool:
        self.stopping.set()  # the pod is stopped as soon as it is complete
        return True


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


class Company:
    """Both what brings a learner into its groups and what tells that one is over."""

    def __init__(self, groups: list[Group], stopping: threading.Event) -> None:
        self.groups = groups
        self.stopping = stopping
        self.losses: list[PeerLostError | None] = []
        self.over: set[int] = set()
        self.left_with: int | None = None
        """The version that was said then."""

    def join(self, lost: PeerLostError | None, while_waiting: Callable[[], None]) -> Group | None:
        while_waiting()
        self.losses.append(lost)
        return self.groups.pop(0) if self.groups else None

    def is_over(self, generation: int) -> bool:
        return generation in self.over

    def leave(self, version: int) -> None:
        self.left_with = version


class Pair(Group):
    """A group of two, of which the test is the other one."""

    def __init__(self, others: list[list[int]], rank: int = 0, generation: int = 1) -> None:
        super().__init__(rank=rank, world_size=2, generation=generation)
        self.others = others
        self.said: list[list[int]] = []
        self.has_left = False

    def sum_counts(self, counts: Any) -> list[int]:
        self.said.append(list(counts))
        if not self.others:
            raise PeerLostError("gone")
        return [mine + yours for mine, yours in zip(counts, self.others.pop(0), strict=True)]

    def leave(self) -> None:
        self.has_left = True


READY, NOT_READY = [1, 0, 0, 0], [0, 0, 0, 0]
STOPPING, OVER = [0, 1, 0, 0], [0, 0, 1, 0]


class Scene:
    """A loop that has nothing more to train."""

    def __init__(self, directory: Path, failures: int = 0, groups: list[Group] | None = None) -> None:
        self.counts = Counts()
        self.stopping = threading.Event()
        self.disk = Disk(failures)
        self.server = Server(self.disk, self.stopping)
        self.now_s = 0.0
        self.directory = directory
        self.company = Company([Group()] if groups is None else groups, self.stopping)
        self.loop = self.make(FinishedTrainer(), None)

    def make(
        self,
        trainer: FinishedTrainer,
        batcher: OneBatch | None,
        replay_metrics: ReplayMetrics | None = None,
    ) -> LearnerLoop:
        return LearnerLoop(
            trainer=cast(Trainer, trainer),
            batcher=cast(Batcher, batcher),
            attendance=cast(Attendance, self.company),
            gathering=cast(Gathering, self.company),
            publisher=cast(Publisher, self.server),
            checkpoints=cast(CheckpointStore, self.disk),
            checkpoint_interval_s=60.0,
            reporter=Reporter(run_dir=self.directory, tasks=["x"], frame_skip=1, metrics=self.counts.metrics),
            log_interval_s=5.0,
            episodes=Episodes(["x"]),
            config={},
            max_policy_lag=lambda: 20,
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


def test_completion_that_could_not_be_offered_yet_is_offered_until_it_is(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    answers = [False, False, True]

    def offer(version: int, steps: int, state: str, wait_s: float = 0.0) -> bool:
        answer = answers.pop(0)
        if not answers:
            scene.stopping.set()
        return answer

    scene.server.offer = offer  # type: ignore[method-assign]
    scene.server.wait_until_confirmed = lambda *_: False  # type: ignore[method-assign]
    assert scene.loop.run()
    assert answers == []


def test_a_pod_that_is_stopped_while_it_tries_to_save_the_last_state_tries_once_more(tmp_path: Path) -> None:
    scene = Scene(tmp_path, failures=1000)
    tried_s: list[float] = []
    save = scene.disk.save

    def save_and_be_stopped(**content: Any) -> bool:
        scene.stopping.set()
        tried_s.append(scene.now_s)
        return save(**content)

    scene.disk.save = save_and_be_stopped  # type: ignore[method-assign]
    assert not scene.loop.run()
    assert scene.disk.attempts == 2
    assert tried_s[1] - tried_s[0] < SAVE_LAST_S


def test_a_pod_whose_disk_is_stuck_ends_in_time(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.disk.busy = True
    stopped_s: list[float] = []

    def is_over(generation: int) -> bool:
        if scene.now_s > 100.0 and not stopped_s:
            stopped_s.append(scene.now_s)
            scene.stopping.set()
        return False

    scene.company.is_over = is_over  # type: ignore[method-assign]
    assert not scene.loop.run()
    assert scene.now_s - stopped_s[0] < SAVE_LAST_S + 5.0


def test_a_pod_does_not_end_while_a_copy_of_the_last_checkpoint_is_being_written(tmp_path: Path) -> None:
    class Copying(Disk):
        """Has the last state, and is busy with best.pt for a while."""

        looks = 0

        @property
        def busy(self) -> bool:
            self.looks += self.saved_steps == 6400
            return 0 < self.looks < 5

        @busy.setter
        def busy(self, value: bool) -> None:
            pass

    scene = Scene(tmp_path)
    scene.disk = Copying(0)
    scene.loop = scene.make(FinishedTrainer(), None)
    scene.stopping.set()
    assert scene.loop.run()
    assert scene.disk.looks == 5
    assert scene.disk.attempts == 1


def test_a_follower_that_leaves_a_group_in_order_has_nothing_to_save_for_a_while(tmp_path: Path) -> None:
    scene = Scene(tmp_path, groups=[Pair([READY, OVER], rank=1)])
    batches = one_batch(scene)
    batches.stopping = threading.Event()
    scene.loop = scene.make(Training(), batches)
    attempts: list[int] = []

    def join(lost: PeerLostError | None, while_waiting: Callable[[], None]) -> Group | None:
        if not scene.company.groups:
            for wait_s in (0.0, 50.0, 20.0):  # a checkpoint is due every 60 s
                scene.now_s += wait_s
                while_waiting()
                attempts.append(scene.disk.attempts)
        else:
            scene.now_s += 1000.0
        return Company.join(scene.company, lost, lambda: None)

    scene.company.join = join  # type: ignore[method-assign]
    assert scene.loop.run()
    assert attempts == [0, 0, 1]


@pytest.mark.parametrize("failures", [1, 1000])
def test_a_pod_that_is_stopped_saves_once_and_says_if_that_failed(tmp_path: Path, failures: int) -> None:
    scene = Scene(tmp_path, failures=failures)
    scene.stopping.set()
    assert not scene.loop.run()
    assert scene.disk.attempts == 1
    assert "complete" not in [state for _, state, _ in scene.server.offers]
    assert scene.counts.registry.get_sample_value("impala_training_complete") == 0


def test_a_pod_that_never_was_in_a_group_has_nothing_to_save(tmp_path: Path) -> None:
    scene = Scene(tmp_path, groups=[])
    scene.stopping.set()
    assert scene.loop.run()
    assert scene.disk.attempts == 0
    assert scene.company.left_with is not None


# --- groups ----------------------------------------------------------------------------------------


def test_only_the_leader_publishes_reports_and_saves(tmp_path: Path) -> None:
    scene = Scene(tmp_path, groups=[Pair([], rank=1)])
    threading.Timer(0.2, scene.stopping.set).start()
    assert scene.loop.run()
    assert scene.server.offers == []
    assert scene.disk.attempts == 0
    assert not (tmp_path / "metrics.jsonl").exists()


def one_batch(scene: Scene, version: int = 9) -> OneBatch:
    return OneBatch(scene.stopping, num_fresh=8, policy_versions=(version,) * 8)


def test_nobody_trains_before_everybody_has_a_batch_and_then_with_the_batch_in_hand(tmp_path: Path) -> None:
    pair = Pair([NOT_READY, NOT_READY, READY, STOPPING])
    scene = Scene(tmp_path, groups=[pair])
    trainer, batches = Training(), one_batch(scene)
    scene.loop = scene.make(trainer, batches)
    versions = [trainer.version]
    assert scene.loop.run()
    assert [said[0] for said in pair.said] == [1, 1, 1, 0]
    assert (versions, trainer.version) == ([10], 11)
    assert batches.released


@pytest.mark.parametrize("end", [STOPPING, OVER])
def test_a_group_ends_for_all_before_the_same_step(tmp_path: Path, end: list[int]) -> None:
    pair = Pair([[1, *end[1:]]])  # the other one has a batch, and yet
    scene = Scene(tmp_path, groups=[pair])
    trainer, batches = Training(), one_batch(scene)
    scene.loop = scene.make(trainer, batches)
    assert scene.loop.run()
    assert trainer.version == 10
    assert pair.has_left
    assert scene.company.losses == [None, None]


def test_who_knows_of_another_view_says_so(tmp_path: Path) -> None:
    pair = Pair([READY])
    scene = Scene(tmp_path, groups=[pair])
    scene.company.over.add(1)
    scene.loop = scene.make(Training(), one_batch(scene))
    assert scene.loop.run()
    assert pair.said == [[1, 0, 1, 0]]


def test_after_a_loss_the_next_group_trains_on_the_batch_in_hand(tmp_path: Path) -> None:
    class Broken(Training):
        def update(self, batch: Any) -> None:
            if self.group.generation == 1:
                raise PeerLostError("gone")
            super().update(batch)

    first, second = Pair([READY]), Group(generation=2)
    scene = Scene(tmp_path, groups=[first, second])
    trainer, batches = Broken(), one_batch(scene)
    scene.loop = scene.make(trainer, batches)
    assert scene.loop.run()
    assert first.has_left
    assert [str(lost) for lost in scene.company.losses] == ["None", "gone", "None"]
    assert (trainer.version, trainer.steps) == (11, 6400 + 8 * T)
    assert batches.released


def test_a_new_leader_publishes_at_once(tmp_path: Path) -> None:
    scene = Scene(tmp_path, groups=[Pair([], rank=1), Group(generation=2)])
    scene.loop = scene.make(Training(), OneBatch(scene.stopping, num_fresh=0, policy_versions=()))
    scene.loop.run()
    assert scene.server.offers[0][:2] == (10, "training")
    assert scene.server.retirements == 3, "before each group, whoever leads it"


def test_weights_that_differ_end_the_group(tmp_path: Path) -> None:
    pair = Pair([[1, 0, 0, 76]])
    scene = Scene(tmp_path, groups=[pair])
    trainer = Training()
    trainer.version = 300
    scene.loop = scene.make(trainer, one_batch(scene, 299))
    assert scene.loop.run()
    assert pair.said == [[1, 0, 0, 77]]
    assert trainer.version == 300
    assert isinstance(scene.company.losses[1], WeightsDifferError)


def test_weights_are_compared_now_and_then(tmp_path: Path) -> None:
    pair = Pair([[1, 0, 0, 77], STOPPING])
    scene = Scene(tmp_path, groups=[pair])
    trainer = Training()
    trainer.version = 300
    scene.loop = scene.make(trainer, one_batch(scene, 299))
    assert scene.loop.run()
    assert [said[3] for said in pair.said] == [77, 0]
    assert trainer.version == 301
    assert scene.counts("parameters_checksum") == 77
    assert scene.counts("parameters_checksum_version") == 300


def test_a_survivor_that_is_stopped_while_it_waits_saves_what_it_has(tmp_path: Path) -> None:
    # Its leader died, and perhaps nobody else will ever have these updates.
    scene = Scene(tmp_path, groups=[Pair([READY], rank=1)])
    trainer = Training()
    scene.loop = scene.make(trainer, one_batch(scene))
    assert scene.loop.run()
    assert isinstance(scene.company.losses[1], PeerLostError)
    assert scene.disk.saved_steps == trainer.steps == 6400 + 8 * T
    assert scene.company.left_with == trainer.version


def test_who_leaves_others_behind_leaves_the_saving_to_their_leader(tmp_path: Path) -> None:
    scene = Scene(tmp_path, groups=[Pair([NOT_READY], rank=1)])
    scene.loop = scene.make(Training(), one_batch(scene))
    scene.stopping.set()
    assert scene.loop.run()
    assert scene.disk.attempts == 0


@pytest.mark.parametrize("end", [STOPPING, OVER])
def test_who_is_stopped_before_it_meets_the_others_again_saves_what_it_has(
    tmp_path: Path, end: list[int]
) -> None:
    # Their leader may have gone meanwhile, without having saved these steps.
    scene = Scene(tmp_path, groups=[Pair([READY, end], rank=1)])
    trainer, batches = Training(), one_batch(scene)
    batches.stopping = threading.Event()  # the pod itself is stopped later
    scene.loop = scene.make(trainer, batches)
    assert scene.loop.run()
    assert scene.company.losses == [None, None]
    assert scene.disk.saved_steps == trainer.steps == 6400 + 8 * T


def test_a_survivor_that_waits_for_long_saves_meanwhile(tmp_path: Path) -> None:
    scene = Scene(tmp_path, groups=[Pair([READY], rank=1)])
    trainer = Training()
    scene.loop = scene.make(trainer, one_batch(scene))
    scene.now_s += 1000.0

    def join(lost: PeerLostError | None, while_waiting: Callable[[], None]) -> Group | None:
        scene.now_s += 1000.0
        while_waiting()
        scene.company.attempts_then = scene.disk.attempts  # type: ignore[attr-defined]
        return Company.join(scene.company, lost, lambda: None)

    scene.company.join = join  # type: ignore[method-assign]
    assert scene.loop.run()
    assert scene.company.attempts_then == 1  # type: ignore[attr-defined]


def test_a_batch_from_before_a_long_absence_is_dropped_and_counted(tmp_path: Path) -> None:
    class Overtaken(Training):
        def update(self, batch: Any) -> None:
            if self.group.generation == 1:
                self.version = 5000  # the others', taken over on the way into the next group
                raise PeerLostError("gone")
            raise AssertionError("acted 4,991 versions ago")

    scene = Scene(tmp_path, groups=[Pair([READY]), Group(generation=2)])
    batches = one_batch(scene)
    scene.loop = scene.make(Overtaken(), batches)
    assert scene.loop.run()
    assert batches.released
    assert scene.counts("rollouts_total", result="stale") == 8


def test_a_leader_that_is_behind_the_server_ends_the_group_to_catch_up(tmp_path: Path) -> None:
    pair = Pair([READY])
    scene = Scene(tmp_path, groups=[pair])
    scene.server.held_version = 11
    scene.loop = scene.make(Training(), one_batch(scene))
    assert scene.loop.run()
    assert pair.said == [[1, 0, 1, 0]]


def test_a_disk_that_is_full_holds_up_no_group_that_somebody_wants_to_join(tmp_path: Path) -> None:
    scene = Scene(tmp_path, failures=1000, groups=[Group(generation=1)])
    scene.company.over.add(1)
    threading.Timer(5.0, scene.stopping.set).start()
    assert not scene.loop.run(), "the last attempt failed too"
    assert "complete" not in [state for _, state, _ in scene.server.offers]


def test_who_is_done_joins_the_next_group_to_share_what_it_has(tmp_path: Path) -> None:
    scene = Scene(tmp_path, groups=[Pair([], rank=1), Pair([], rank=1, generation=2)])
    scene.company.over.add(1)
    threading.Timer(0.5, scene.stopping.set).start()
    assert scene.loop.run()
    assert len(scene.company.losses) == 3
    complete = scene.counts.registry.get_sample_value("impala_training_complete")
    assert complete == 0, "who follows does not know whether it is saved"


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
    assert scene.counts("rollouts_total", result="ok") == 2
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
