"""The evaluator's loop: weights -> rounds, in each of which all tasks are played with one version of them.

    consumes   weights (the newest that ``wire.subscriber`` holds), read once per round
    produces   the gauges of a task when it has been played; those of all together and a line of
               ``evaluations.jsonl`` once per round
    waits for  weights that it has not played yet; ``evaluator.interval_s`` since its last round began
    may drop   versions between two rounds, never the last of a run; the round in hand, when the pod stops

A version is played once: again, it would play the same games. When the run is complete its last weights are
played without waiting, and then the loop idles until the pod is stopped, or the run goes on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from services.evaluator.games import Games
from services.evaluator.results import Results, TaskResult
from services.ops.append import append
from services.ops.health import Heartbeat
from services.ops.logging import get_logger
from services.ops.metrics import SUITE_LABELS, EvaluatorMetrics
from services.wire.messages import Episode
from services.wire.subscriber import Snapshot, Subscriber

IDLE_S = 0.25

Weights = Mapping[str, Tensor]

_log = get_logger("loop")


class EvaluatorLoop:
    """Runs until the pod stops."""

    def __init__(
        self,
        *,
        weights: Subscriber[Weights],
        games: Games,
        interval_s: float,
        report: Path,
        metrics: EvaluatorMetrics,
        heartbeat: Heartbeat,
        stopping: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._weights = weights
        self._games = games
        self._interval_s = interval_s
        self._report = report
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._stopping = stopping
        self._clock = clock
        self._played: int | None = None
        self._next_s = clock()
        metrics.weights_age_seconds.set_function(weights.age_s)

    def run(self) -> None:
        """Play round after round."""
        while not self._stopping.is_set():
            self._heartbeat.beat()
            snapshot = self._due()
            if snapshot is None:
                self._stopping.wait(IDLE_S)
            else:
                self._round(snapshot)

    def _due(self) -> Snapshot[Weights] | None:
        """What to play now."""
        complete = self._weights.state == "complete"  # asked first: the weights that follow are the last
        newest = self._weights.newest
        if newest is None or newest.version == self._played:
            return None
        return newest if complete or self._clock() >= self._next_s else None

    def _round(self, snapshot: Snapshot[Weights]) -> None:
        began_s = self._clock()
        tasks = []
        for number in range(len(self._games.tasks)):
            result = self._games.play(
                number,
                snapshot.version,
                snapshot.weights,
                stopping=self._stopping,
                on_step=self._heartbeat.beat,
                on_episode=self._count,
            )
            if result is None:
                return
            tasks.append(result)
            self._export_task(result)
            if result.num_capped:
                _log.warning("episodes_capped", task=result.name, episodes=result.num_capped)
        results = Results(version=snapshot.version, steps=snapshot.steps, tasks=tuple(tasks))
        seconds = self._clock() - began_s
        self._played = snapshot.version
        self._next_s = began_s + self._interval_s
        self._export(results, seconds)
        line = {"time": round(time.time(), 3), "seconds": round(seconds, 3), **results.plain()}
        try:
            append(self._report, json.dumps(line, allow_nan=False).encode() + b"\n")
        except OSError as error:  # a full disk must not end the evaluation
            _log.warning("report_not_written", error=error)
        _log.info(
            "round",
            policy_version=results.version,
            steps=results.steps,
            seconds=seconds,
            tasks=len(tasks),
            episodes=sum(len(task.episodes) for task in tasks),
            mean_return=results.mean,
        )

    def _count(self, _: Episode) -> None:
        self._metrics.episodes.inc()

    def _export_task(self, task: TaskResult) -> None:
        """At once: a round of a whole suite may take hours."""
        for statistic, value in (("mean", task.mean), ("median", task.median), ("std", task.std)):
            self._metrics.episode_return.labels(task.name, statistic).set(value)
        if task.human_normalised is not None:
            self._metrics.human_normalised_score.labels(task.name).set(task.human_normalised)

    def _export(self, results: Results, seconds: float) -> None:
        metrics = self._metrics
        if (suite := results.human_normalised) is not None:
            for statistic, value in asdict(suite).items():
                metrics.suite_human_normalised_score.labels(*SUITE_LABELS[statistic]).set(value)
        metrics.policy_version.set(results.version)
        metrics.steps.set(results.steps)
        metrics.round_seconds.set(seconds)
        metrics.rounds.inc()
