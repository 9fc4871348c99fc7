"""What a run says about itself: Prometheus gauges, one JSON line per interval, TensorBoard events.

Steps are agent steps; frames are steps x frame_skip. Returns are raw and of whole episodes; of several tasks,
the mean over those that have had an episode, each of which counts alike. Files grow by whole lines and whole
events or not at all: a disk that is full for a while costs these lines and no others, and never holds up the
training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from prometheus_client import Gauge

from services.learner.episodes import Episodes, TaskEpisodes, mean
from services.learner.event_file import event, event_file_name, file_header
from services.learner.trainer import Figures
from services.ops.append import append, finite
from services.ops.logging import get_logger
from services.ops.metrics import SUITE_LABELS, LearnerMetrics, ReplayMetrics
from services.rl.scores import summarise

Value = float | int | None

ONLY_TASK = ("human_normalised", "popart_mean", "popart_sigma")
"""What the line says of an only task, beside its episodes; of several, ``tasks`` says it for each."""

LOSS_TERMS = ("total", "policy", "baseline", "entropy")

_log = get_logger("report")


class Reporter:
    """Called by the learner's loop every ``learner.log_interval_s``."""

    def __init__(
        self,
        *,
        run_dir: Path,
        tasks: Sequence[str],
        frame_skip: int,
        metrics: LearnerMetrics,
        replay_metrics: ReplayMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``tasks`` are their names."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lines = run_dir / "metrics.jsonl"
        self._events = run_dir / "tensorboard" / event_file_name()
        self._tasks = tuple(tasks)
        self._frame_skip = frame_skip
        self._metrics = metrics
        self._replay_metrics = replay_metrics
        self._clock = clock
        self._since_s = clock()
        self._steps_before: int | None = None
        self._lags: list[int] = []
        self._waited_s = 0.0
        for task in self._tasks:  # there from the start, so that a task that is never played is seen
            metrics.task_steps.labels(task)

    def waited(self, seconds: float) -> None:
        """The learner waited for a batch."""
        self._waited_s += seconds

    def batch(self, lags: Sequence[int], waited_s: float) -> None:
        """A batch arrived, after some waiting; how far behind its rollouts were."""
        self._lags.extend(lags)
        self._waited_s += waited_s

    def report(
        self,
        *,
        figures: Figures,
        episodes: Episodes,
        version: int,
        steps: int,
        learning_rate: float,
        leads: bool = True,
    ) -> None:
        """Write one line about the interval that ends now, if this learner leads: there is one line a run."""
        now_s = self._clock()
        seconds = max(now_s - self._since_s, 1e-9)
        new_steps = steps - (steps if self._steps_before is None else self._steps_before)
        tasks = episodes.take()
        new = [task.new for task in tasks]
        line: dict[str, Value] = {
            "time": round(time.time(), 3),
            "steps": steps,
            "frames": steps * self._frame_skip,
            "version": version,
            "steps_per_second": new_steps / seconds,
            "episodes": sum(task.total for task in tasks),
            "episode_return": mean([task.mean_return for task in tasks]),
            "episode_length": mean([task.mean_length for task in tasks]),
            "interval_episodes": sum(map(len, new)),
            "interval_return": mean([mean([e.episode_return for e in ended]) for ended in new]),
            "interval_return_max": max((e.episode_return for ended in new for e in ended), default=None),
            "policy_lag_mean": mean(self._lags),
            "policy_lag_max": max(self._lags, default=None),
            "wait_ratio": self._waited_s / seconds,
            "learning_rate": learning_rate,
            "loss_total": figures.loss_total,
            "loss_policy": figures.loss_policy,
            "loss_baseline": figures.loss_baseline,
            "loss_entropy": figures.loss_entropy,
            "entropy": figures.entropy,
            "grad_norm": figures.grad_norm,
            "rho_clipped_ratio": figures.rho_clipped_ratio,
            "nonfinite_updates": figures.nonfinite_updates,
        }
        if self._replay_metrics is not None:
            line["replay_rejected_ratio"] = figures.replay_rejected_ratio
        by_task = {
            name: _all_finite(_of_task(task, figures.total_task_steps[number]) | _popart(figures, number))
            for number, (name, task) in enumerate(zip(self._tasks, tasks, strict=True))
        }
        if len(tasks) == 1:
            (only,) = by_task.values()
            line |= {key: only[key] for key in ONLY_TASK if key in only}
        line = _all_finite(line | _of_suite(tasks))
        self._since_s, self._steps_before, self._lags, self._waited_s = now_s, steps, [], 0.0
        self._to_prometheus(line, by_task)
        if not leads:
            return
        for task, more in zip(self._tasks, figures.task_steps, strict=True):
            self._metrics.task_steps.labels(task).inc(more)
        try:
            self._write(line, by_task if len(by_task) > 1 else {})
        except OSError as error:  # a full disk must not end the training
            _log.warning("report_not_written", error=error)

    def _to_prometheus(self, line: Mapping[str, Value], by_task: Mapping[str, Mapping[str, Value]]) -> None:
        """A gauge keeps its last value where there is no new one, and has no series before its first."""
        metrics = self._metrics
        per_task = {
            "episode_return": metrics.episode_return,
            "episode_length": metrics.episode_length,
            "human_normalised": metrics.human_normalised_score,
            "popart_mean": metrics.popart_mean,
            "popart_sigma": metrics.popart_sigma,
        }
        found: list[tuple[Gauge, tuple[str, ...], Value]] = [
            *((metrics.loss, (term,), line[f"loss_{term}"]) for term in LOSS_TERMS),
            (metrics.entropy, (), line["entropy"]),
            (metrics.grad_norm, (), line["grad_norm"]),
            (metrics.rho_clipped_ratio, (), line["rho_clipped_ratio"]),
            (metrics.learning_rate, (), line["learning_rate"]),
            *(
                (gauge, (task,), values.get(key))
                for task, values in by_task.items()
                for key, gauge in per_task.items()
            ),
            *(
                (metrics.suite_human_normalised_score, labels, line.get(f"human_normalised_{statistic}"))
                for statistic, labels in SUITE_LABELS.items()
            ),
        ]
        if self._replay_metrics is not None:
            found.append((self._replay_metrics.rejected_ratio, (), line["replay_rejected_ratio"]))
        for gauge, labels, value in found:
            if value is not None:
                (gauge.labels(*labels) if labels else gauge).set(value)
        metrics.nonfinite_updates.inc(line["nonfinite_updates"] or 0)

    def _write(self, line: Mapping[str, Value], by_task: Mapping[str, Mapping[str, Value]]) -> None:
        """``by_task`` is empty where there is only one."""
        content = {**line, "tasks": by_task} if by_task else line
        append(self._lines, json.dumps(content, allow_nan=False).encode() + b"\n")
        tagged = {key: value for key, value in line.items() if key not in ("time", "steps")}
        for task, values in by_task.items():
            tagged |= {f"task/{task}/{key}": value for key, value in values.items()}
        known = {tag: value for tag, value in tagged.items() if value is not None}
        append(self._events, event(line["time"] or 0.0, int(line["steps"] or 0), known), header=file_header())


def _of_task(task: TaskEpisodes, steps: int) -> dict[str, Value]:
    """One task's figures; a human-normalised score only where there is such a thing."""
    values: dict[str, Value] = {
        "episode_return": task.mean_return,
        "episode_length": task.mean_length,
        "episodes": task.total,
        "steps": steps,
    }
    return values | ({"human_normalised": task.human_normalised} if task.has_score else {})


def _popart(figures: Figures, task: int) -> dict[str, Value]:
    """One task's statistics, if there are any."""
    if not figures.popart_mean:
        return {}
    return {"popart_mean": figures.popart_mean[task], "popart_sigma": figures.popart_sigma[task]}


def _of_suite(tasks: Sequence[TaskEpisodes]) -> dict[str, Value]:
    """Scores over several tasks that all have one; unknown until each has ended an episode."""
    if len(tasks) == 1 or not all(task.has_score for task in tasks):
        return {}
    summary = summarise([task.human_normalised for task in tasks])
    values: Mapping[str, Value] = asdict(summary) if summary else {}
    return {f"human_normalised_{statistic}": values.get(statistic) for statistic in SUITE_LABELS}


def _all_finite(values: Mapping[str, Value]) -> dict[str, Value]:
    return {key: finite(value) for key, value in values.items()}
