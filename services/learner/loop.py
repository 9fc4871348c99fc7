"""The learner's main loop: batches -> updates -> published versions, reports, checkpoints.

    consumes   ``batch.Batch`` from the batcher
    produces   versions for the publisher; checkpoints; reports
    waits for  a group to train in (``gathering``); a batch, counted as the stage ``wait``; the others, until
               they have one too, as ``agree``; their gradients, as ``allreduce``
    may drop   a step whose group broke; its batch is used for the next one

A group ends for all members after the same step: before each, they agree that everybody has a batch and that
nobody stops or knows of another view. Only who leads the group publishes, saves and writes reports.
When all steps are trained the leader writes the last checkpoint, publishes the last weights with the state
``complete``, and all idle until they are stopped: a pod that exits would be started again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from services.learner.attendance import Attendance
from services.learner.batch import Batch, Batcher
from services.learner.checkpoint import CheckpointStore
from services.learner.episodes import Episodes
from services.learner.gathering import Gathering
from services.learner.group import Group, PeerLostError, WeightsDifferError
from services.learner.publisher import Publisher
from services.learner.report import Reporter
from services.learner.trainer import Trainer
from services.ops.health import Heartbeat
from services.ops.logging import get_logger
from services.ops.metrics import LearnerMetrics, ReplayMetrics
from services.wire.messages import NO_VERSION

POLL_S = 0.25
PUBLISH_LAST_S = 5.0
SAVE_LAST_S = 15.0
"""How long a slow disk may hold up the end of the pod; a launcher or kubelet gives 30 s."""
SAVE_RETRY_S = 10.0
SAVE_POLL_S = 0.02
COMPARE_EVERY = 100
"""Updates, after which the learners of a group compare their weights."""

_log = get_logger("loop")


class LearnerLoop:
    """Runs until the pod stops."""

    def __init__(
        self,
        *,
        trainer: Trainer,
        batcher: Batcher,
        attendance: Attendance,
        gathering: Gathering,
        publisher: Publisher,
        checkpoints: CheckpointStore,
        checkpoint_interval_s: float,
        reporter: Reporter,
        log_interval_s: float,
        episodes: Episodes,
        config: Mapping[str, Any],
        max_policy_lag: Callable[[], int],
        frame_skip: int,
        metrics: LearnerMetrics,
        replay_metrics: ReplayMetrics | None,
        heartbeat: Heartbeat,
        stopping: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._batcher = batcher
        self._attendance = attendance
        self._gathering = gathering
        self._publisher = publisher
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._episodes = episodes
        self._config = config
        self._max_policy_lag = max_policy_lag
        self._frame_skip = frame_skip
        self._metrics = metrics
        self._replay_metrics = replay_metrics
        self._heartbeat = heartbeat
        self._stopping = stopping
        self._clock = clock
        self._checkpoint_interval_s = checkpoint_interval_s
        self._log_interval_s = log_interval_s
        self._offered = NO_VERSION
        self._stage = {
            stage: metrics.stage_seconds.labels(stage)
            for stage in ("wait", "agree", "h2d", "forward_backward", "allreduce", "publish")
        }
        self._batch: Batch | None = None
        """In hand, until a step with it is complete."""
        self._checkpoint_due_s = self._report_due_s = math.inf

    def run(self) -> bool:
        """Train until all steps are done or the pod stops; returns whether the last state was saved."""
        self._checkpoint_due_s = self._clock() + self._checkpoint_interval_s
        lost: PeerLostError | None = None
        group = None
        others_save = True
        try:
            while (joined := self._join(lost, others_save=others_save)) is not None:
                group, lost = joined, None
                self._trainer.group = group
                try:
                    self._train(group)
                    self._idle(group)
                except PeerLostError as error:
                    lost = error
                    _log.warning("group_lost", generation=group.generation, reason=error)
                finally:
                    group.leave()
                follows = lost is None and not group.is_leader
                # Who stops in an intact group leaves a leader behind. Who is to meet others again may meet
                # nobody any more, and have what nobody else has.
                others_save = self._stopping.is_set() and follows
                if follows:  # until now the leader has saved
                    self._checkpoint_due_s = self._clock() + self._checkpoint_interval_s
        finally:
            self._attendance.leave(self._trainer.version)  # the others go on while we save
        return others_save or self._save_last()

    def _join(self, lost: PeerLostError | None, *, others_save: bool) -> Group | None:
        """The next group after this one."""
        self._publisher.retire()  # who leads next publishes

        def while_waiting() -> None:
            if not others_save:
                self._checkpoint_if_due()

        joined = self._gathering.join(lost, while_waiting)
        self._drop_what_is_stale()
        return joined

    def _drop_what_is_stale(self) -> None:
        """A batch in hand while the versions went on without us."""
        batch = self._batch
        if batch is None:
            return
        oldest = min(batch.policy_versions[: batch.num_fresh], default=self._trainer.version)
        if self._trainer.version - oldest > self._max_policy_lag():
            self._metrics.rollouts.labels("stale").inc(batch.num_fresh)
            batch.release()
            self._batch = None

    def _train(self, group: Group) -> None:
        """Until the group is over, all steps are trained or the pod stops."""
        self._offered = NO_VERSION
        if not self._trainer.complete:
            self._publish(group)
        self._report(group.is_leader)
        while not self._trainer.complete and self._agree(group):
            self._heartbeat.beat()
            if self._clock() >= self._report_due_s:
                self._report(group.is_leader)
            if group.is_leader:
                self._checkpoint_if_due()
        if self._stopping.is_set():
            self._report(group.is_leader)

    def _idle(self, group: Group) -> None:
        """After the last step, until the group is over or the pod stops."""
        if not self._trainer.complete or self._stopping.is_set():
            return
        self._report(group.is_leader)
        if group.is_leader and not self._save_last(group):
            return
        is_announced = self._announce_completion(group)
        while not self._stopping.wait(POLL_S) and not self._attendance.is_over(group.generation):
            self._heartbeat.beat()
            is_announced = is_announced or self._offer_completion()

    def _agree(self, group: Group) -> bool:
        """One turn: train, if all learners can. False once one of them ends the group."""
        waiting_s = time.perf_counter()
        if self._batch is None:
            self._batch = self._batcher.next(POLL_S)
            self._drop_what_is_stale()
        agreeing_s = time.perf_counter()
        waited_s = agreeing_s - waiting_s
        self._stage["wait"].observe(waited_s)
        checksum = self._checksum(group)
        ready, stopping, over, checksums = group.sum_counts(
            [
                self._batch is not None,
                self._stopping.is_set(),
                self._attendance.is_over(group.generation) or self._is_behind(group),
                checksum,
            ]
        )
        self._stage["agree"].observe(time.perf_counter() - agreeing_s)
        if checksums != checksum * group.world_size:
            _log.error("weights_differ", generation=group.generation, policy_version=self._trainer.version)
            raise WeightsDifferError(f"the learners' weights differ at version {self._trainer.version}")
        if stopping or over:
            return False
        if ready < group.world_size or self._batch is None:
            self._reporter.waited(waited_s)
            self._publish(group)  # what was skipped while another version was on its way
            return True
        self._step(group, self._batch, waited_s)
        self._batch = None
        return True

    def _is_behind(self, group: Group) -> bool:
        """The server has a newer version than we who lead: its actors act by that, so it has to be ours."""
        return group.is_leader and self._publisher.held_version > self._trainer.version

    def _checksum(self, group: Group) -> int:
        """Of the weights, now and then; 0 in between, and where there is nobody to compare with."""
        version = self._trainer.version
        if group.world_size == 1 or version % COMPARE_EVERY:
            return 0
        checksum = self._trainer.checksum()
        self._metrics.parameters_checksum.set(checksum)
        self._metrics.parameters_checksum_version.set(version)
        return checksum

    def _save_last(self, group: Group | None = None) -> bool:
        """Whether the last state is on the disk.

        In ``group`` it is tried until it is, the group is over or the pod stops; by a pod that stops, once.
        """
        retry_at_s, deadline_s = 0.0, self._clock() + SAVE_LAST_S
        while True:
            self._heartbeat.beat()
            if group is not None and (self._stopping.is_set() or self._attendance.is_over(group.generation)):
                return False
            now_s = self._clock()
            busy = self._checkpoints.busy  # asked before what it has written, or that could be missed
            is_late = group is None and (now_s >= deadline_s or (retry_at_s > 0.0 and not busy))
            if self._checkpoints.saved_steps == self._trainer.steps and (group or is_late or not busy):
                return True  # a pod does not end while a copy of it is being written
            if is_late:
                _log.error("last_checkpoint_missing", steps=self._trainer.steps)
                return False
            if not busy and now_s >= retry_at_s:
                self._checkpoint()
                retry_at_s = now_s + SAVE_RETRY_S
            time.sleep(SAVE_POLL_S)

    def _announce_completion(self, group: Group) -> bool:
        """False if the leader could not say it yet."""
        version, steps = self._trainer.version, self._trainer.steps
        is_offered = not group.is_leader or self._offer_completion(PUBLISH_LAST_S)
        if group.is_leader:
            # Should the server be away for longer, the publisher goes on telling it.
            self._publisher.wait_until_confirmed(version, "complete", PUBLISH_LAST_S if is_offered else 0.0)
            self._metrics.training_complete.set(1)  # not by those who follow: they do not know if it is saved
        _log.info("training_complete", steps=steps, policy_version=version)
        return is_offered

    def _offer_completion(self, wait_s: float = 0.0) -> bool:
        return self._publisher.offer(self._trainer.version, self._trainer.steps, "complete", wait_s=wait_s)

    def _step(self, group: Group, batch: Batch, waited_s: float) -> None:
        version = self._trainer.version
        ages = [max(0, version - acted) for acted in batch.policy_versions]
        self._update(batch)
        lags, replayed = ages[: batch.num_fresh], ages[batch.num_fresh :]
        self._reporter.batch(lags, waited_s)
        for lag in lags:
            self._metrics.policy_lag_versions.observe(lag)
        publishing_s = time.perf_counter()
        self._publish(group)
        self._stage["publish"].observe(time.perf_counter() - publishing_s)
        length = batch.action.shape[1]
        self._metrics.updates.inc()
        self._metrics.rollouts.labels("ok").inc(batch.num_fresh)
        self._metrics.samples.inc(batch.num_fresh * length)
        self._metrics.frames.inc(batch.num_fresh * length * self._frame_skip)
        if self._replay_metrics is not None and replayed:
            self._replay_metrics.age_versions.set(sum(replayed) / len(replayed))
            self._replay_metrics.replayed_samples.inc(len(replayed) * length)
        self._metrics.policy_version.set(self._trainer.version)
        self._metrics.steps.set(self._trainer.steps)

    def _update(self, batch: Batch) -> None:
        copying_s = time.perf_counter()
        on_device = self._trainer.to_device(batch)
        training_s = time.perf_counter()
        self._stage["h2d"].observe(training_s - copying_s)
        self._trainer.update(on_device)
        on_device.release()
        trained_s = time.perf_counter() - training_s
        self._stage["allreduce"].observe(self._trainer.allreduce_s)
        self._stage["forward_backward"].observe(trained_s - self._trainer.allreduce_s)

    def _publish(self, group: Group) -> None:
        version = self._trainer.version
        if not group.is_leader:
            return
        if version > self._offered and self._publisher.offer(version, self._trainer.steps, "training"):
            self._offered = version

    def _report(self, leads: bool) -> None:
        self._report_due_s = self._clock() + self._log_interval_s
        self._reporter.report(
            figures=self._trainer.read_figures(),
            episodes=self._episodes,
            version=self._trainer.version,
            steps=self._trainer.steps,
            learning_rate=self._trainer.learning_rate,
            leads=leads,
        )

    def _checkpoint_if_due(self) -> None:
        if self._clock() >= self._checkpoint_due_s:
            self._checkpoint_due_s = self._clock() + self._checkpoint_interval_s
            self._checkpoint()

    def _checkpoint(self) -> None:
        self._checkpoints.save(
            trainer=self._trainer.state_dict(),
            episodes=self._episodes.state_dict(),
            config=self._config,
            complete=self._trainer.complete,
        )
