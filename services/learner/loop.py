"""The learner's main loop: batches -> updates -> published versions, reports, checkpoints.

    consumes   ``batch.Batch`` from the batcher
    produces   versions for the publisher; checkpoints; reports
    waits for  a batch, counted as the stage ``wait``; nothing else
    may drop   nothing

When all steps are trained it writes the last checkpoint, publishes the last weights with the state
``complete``, and idles until the pod is stopped: a pod that exits would be started again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from services.learner.batch import Batch, Batcher
from services.learner.checkpoint import CheckpointStore
from services.learner.episodes import Episodes
from services.learner.group import Group
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

_log = get_logger("loop")


class LearnerLoop:
    """Runs until the pod stops."""

    def __init__(
        self,
        *,
        trainer: Trainer,
        batcher: Batcher,
        group: Group,
        publisher: Publisher,
        checkpoints: CheckpointStore,
        checkpoint_interval_s: float,
        reporter: Reporter,
        log_interval_s: float,
        episodes: Episodes,
        config: Mapping[str, Any],
        frame_skip: int,
        metrics: LearnerMetrics,
        replay_metrics: ReplayMetrics | None,
        heartbeat: Heartbeat,
        stopping: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._batcher = batcher
        self._group = group
        self._publisher = publisher
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._episodes = episodes
        self._config = config
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
            for stage in ("wait", "h2d", "forward_backward", "publish")
        }

    def run(self) -> bool:
        """Train until all steps are done or the pod stops; returns whether the last state was saved."""
        self._publish()
        checkpoint_due_s = self._clock() + self._checkpoint_interval_s
        report_due_s = self._clock() + self._log_interval_s
        self._report()
        while not self._stopping.is_set() and not self._trainer.complete:
            self._heartbeat.beat()
            self._turn()
            if self._clock() >= report_due_s:
                report_due_s = self._clock() + self._log_interval_s
                self._report()
            if self._group.is_leader and self._clock() >= checkpoint_due_s:
                checkpoint_due_s = self._clock() + self._checkpoint_interval_s
                self._checkpoint()
        self._report()
        saved = self._save_last() if self._group.is_leader else True
        if self._trainer.complete and saved and not self._stopping.is_set():
            self._announce_completion()
            while not self._stopping.wait(POLL_S):
                self._heartbeat.beat()
        return saved

    def _save_last(self) -> bool:
        """Whether the last state is on the disk: tried until it is, or once if the pod has to stop."""
        retry_at_s, deadline_s, is_last_try = 0.0, float("inf"), False
        while True:
            self._heartbeat.beat()
            now_s, stopping = self._clock(), self._stopping.is_set()
            busy = self._checkpoints.busy  # asked before what it has written, or that could be missed
            if self._checkpoints.saved_steps == self._trainer.steps:
                return True
            if stopping:
                deadline_s = min(deadline_s, now_s + SAVE_LAST_S)
                if now_s >= deadline_s or (is_last_try and not busy):
                    _log.error("last_checkpoint_missing", steps=self._trainer.steps)
                    return False
            if not busy and (stopping or now_s >= retry_at_s):
                self._checkpoint()
                retry_at_s, is_last_try = now_s + SAVE_RETRY_S, stopping
            time.sleep(SAVE_POLL_S)

    def _announce_completion(self) -> None:
        version, steps = self._trainer.version, self._trainer.steps
        if self._group.is_leader:
            # Should the server be away for longer, the publisher goes on telling it.
            self._publisher.offer(version, steps, "complete", wait_s=PUBLISH_LAST_S)
            self._publisher.wait_until_confirmed(version, "complete", PUBLISH_LAST_S)
        self._metrics.training_complete.set(1)
        _log.info("training_complete", steps=steps, policy_version=version)

    def _turn(self) -> None:
        # The server never goes back. If it is ahead, because it could not be asked when this learner went
        # back to a checkpoint, its actors act by weights that are newer than ours: go on from the number
        # that it holds, or all that they send would look as if it came from the future.
        self._trainer.version = max(self._trainer.version, self._publisher.held_version)
        waiting_s = time.perf_counter()
        batch = self._batcher.next(POLL_S)
        waited_s = time.perf_counter() - waiting_s
        self._stage["wait"].observe(waited_s)
        if batch is None:
            self._reporter.waited(waited_s)
            self._publish()  # nothing is newer than what was skipped while another version was on its way
            return
        version = self._trainer.version
        ages = [max(0, version - acted) for acted in batch.policy_versions]
        lags, replayed = ages[: batch.num_fresh], ages[batch.num_fresh :]
        self._reporter.batch(lags, waited_s)
        for lag in lags:
            self._metrics.policy_lag_versions.observe(lag)
        if self._replay_metrics is not None and replayed:
            self._replay_metrics.age_versions.set(sum(replayed) / len(replayed))
        self._update(batch)
        if self._replay_metrics is not None:
            self._replay_metrics.replayed_samples.inc(len(replayed) * batch.action.shape[1])

    def _update(self, batch: Batch) -> None:
        copying_s = time.perf_counter()
        on_device = self._trainer.to_device(batch)
        training_s = time.perf_counter()
        self._stage["h2d"].observe(training_s - copying_s)
        steps_before = self._trainer.steps
        self._trainer.update(on_device)
        on_device.release()
        publishing_s = time.perf_counter()
        self._stage["forward_backward"].observe(publishing_s - training_s)
        self._publish()
        self._stage["publish"].observe(time.perf_counter() - publishing_s)
        new_steps = self._trainer.steps - steps_before
        self._metrics.updates.inc()
        self._metrics.samples.inc(new_steps)
        self._metrics.frames.inc(new_steps * self._frame_skip)
        self._metrics.policy_version.set(self._trainer.version)
        self._metrics.steps.set(self._trainer.steps)

    def _publish(self) -> None:
        version = self._trainer.version
        if not self._group.is_leader:
            return
        if version > self._offered and self._publisher.offer(version, self._trainer.steps, "training"):
            self._offered = version

    def _report(self) -> None:
        self._reporter.report(
            figures=self._trainer.read_figures(),
            episodes=self._episodes,
            version=self._trainer.version,
            steps=self._trainer.steps,
            learning_rate=self._trainer.learning_rate,
        )

    def _checkpoint(self) -> None:
        self._checkpoints.save(
            trainer=self._trainer.state_dict(),
            episodes=self._episodes.state_dict(),
            config=self._config,
            complete=self._trainer.complete,
        )
