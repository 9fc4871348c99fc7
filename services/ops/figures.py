"""A run in figures: what a person wants to know of it, worked out from scrapes of one learner.

``take_snapshot`` is pure: two scrapes in, one ``Snapshot`` out; ``History`` keeps the scrapes it needs.
``learners`` puts several learners together; the live display and the log lines of ``impala train`` come
after that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.ops.metrics import SUITE_LABELS
from services.ops.scrape import Increase, Scrape, increases

RATE_WINDOW_S = 10.0
"""Rates are means over this time: long enough for calm digits, short enough to see a change."""

SUITE_SCORES = ("mean", "median", "mean_capped")
"""Those that people report."""

PodPhase = Literal["starting", "up", "silent", "restarting", "stopped"]
"""starting: has not answered yet; silent: has stopped to; restarting: waits for its next start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What does not change while a run goes on."""

    env_id: str
    total_steps: int
    frame_skip: int
    run_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PodStatus:
    """One process, as its launcher and its metrics know it."""

    name: str
    role: str
    phase: PodPhase
    restarts: int
    memory_bytes: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The replay memory of a run that has one."""

    steps: int
    """Agent steps held."""
    capacity: int | None
    size_bytes: float
    age_versions: float | None
    """Mean, of what was last replayed."""
    rejected_ratio: float | None
    """Share of trained steps outside of the trust region."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All figures of a run at one moment. None: not known (yet)."""

    run: RunInfo
    elapsed_s: float
    pods: tuple[PodStatus, ...]
    steps: int | None = None
    steps_per_s: float | None = None
    eta_s: float | None = None
    episode_return: float | None = None
    """Mean over tasks of the mean return of recent episodes."""
    returns: tuple[float, ...] = ()
    """Its course since the launcher started."""
    task_returns: Mapping[str, float | None] = field(default_factory=dict)
    """Of each task by itself; None before its first episode has ended."""
    task_scores: Mapping[str, float] = field(default_factory=dict)
    """The same in percent from random to human, where both are known."""
    suite_scores: Mapping[str, float] = field(default_factory=dict)
    """Over several tasks: `mean`, `median` and, no task counting for more than 100, `mean_capped`."""
    lag_mean: float | None = None
    lag_max: float | None = None
    wait_ratio: float | None = None
    """Share of its time that the learner waited for rollouts."""
    queue_depth: int | None = None
    queue_capacity: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    entropy: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    replay: Replay | None = None
    policy_version: int | None = None
    world_size: int | None = None
    """Learners in the group."""
    generation: int | None = None
    """Of that group."""
    leader: str | None = None
    """The name of the learner whose word counts for the run."""
    checkpoint_age_s: float | None = None
    troubles: Mapping[str, int] = field(default_factory=dict)
    """What was lost since the pods started, by kind; only what happened."""

    @property
    def frames_per_s(self) -> float | None:
        """Environment frames, which are what papers count."""
        return None if self.steps_per_s is None else self.steps_per_s * self.run.frame_skip

    @property
    def num_learners(self) -> int:
        """That should be in the group."""
        return sum(pod.role == "learner" for pod in self.pods)

    @property
    def done_ratio(self) -> float:
        """Between 0 and 1."""
        return min(1.0, (self.steps or 0) / self.run.total_steps)


def take_snapshot(
    run: RunInfo,
    before: Scrape | None,
    now: Scrape | None,
    *,
    pods: tuple[PodStatus, ...] = (),
    elapsed_s: float = 0.0,
    unix_time_s: float = 0.0,
    returns: tuple[float, ...] = (),
) -> Snapshot:
    """The run's figures, from an earlier and the latest scrape of the learner."""
    if now is None:
        return Snapshot(run=run, elapsed_s=elapsed_s, pods=pods, returns=returns)
    steps = now.get("impala_learner_steps") or now.get("impala_learner_samples_total")
    increase = increases(before, now)
    steps_per_s = increase("impala_learner_samples_total", per_second=True)
    wait_ratio = increase("impala_learner_stage_seconds_sum", per_second=True, stage="wait")
    lag_mean, lag_max = _lag(now, increase)
    task_returns = now.by_label("impala_episode_return", "task")
    saved_at_s = now.get("impala_checkpoint_timestamp_seconds")
    version = _whole(now.get("impala_learner_policy_version"))
    return Snapshot(
        run=run,
        elapsed_s=elapsed_s,
        pods=pods,
        steps=_whole(steps),
        steps_per_s=steps_per_s,
        eta_s=max(0.0, run.total_steps - steps) / steps_per_s if steps is not None and steps_per_s else None,
        episode_return=sum(task_returns.values()) / len(task_returns) if task_returns else None,
        returns=returns,
        task_returns=dict.fromkeys(now.by_label("impala_learner_task_steps_total", "task")) | task_returns,
        task_scores=now.by_label("impala_human_normalised_score", "task"),
        suite_scores=_suite_scores(now),
        lag_mean=lag_mean,
        lag_max=lag_max,
        wait_ratio=None if wait_ratio is None else min(1.0, wait_ratio),
        queue_depth=_whole(now.get("impala_learner_queue_depth")),
        queue_capacity=_whole(now.get("impala_learner_queue_capacity")),
        losses={
            term: loss
            for term, loss in now.by_label("impala_learner_loss", "term").items()
            if not math.isnan(loss)
        },
        entropy=_known(now.get("impala_learner_entropy")),
        grad_norm=_known(now.get("impala_learner_grad_norm")),
        learning_rate=_known(now.get("impala_learner_learning_rate")),
        replay=_replay(now),
        policy_version=None if version is None or version < 0 else version,
        world_size=_whole(now.get("impala_learner_world_size")),
        generation=_whole(now.get("impala_learner_generation")),
        checkpoint_age_s=max(0.0, unix_time_s - saved_at_s) if saved_at_s else None,
        troubles=_troubles(now),
    )


def _lag(now: Scrape, increase: Increase) -> tuple[float | None, float | None]:
    """Mean, and the upper edge of the highest bucket that grew."""
    name = "impala_learner_policy_lag_versions"
    count, total = increase(f"{name}_count"), increase(f"{name}_sum")
    if not count or total is None:
        return None, None
    edges = sorted(now.by_label(f"{name}_bucket", "le"), key=float)
    reached = (edge for edge in edges if (increase(f"{name}_bucket", le=edge) or 0.0) >= count)
    return total / count, float(next(reached, "inf"))


def _suite_scores(now: Scrape) -> dict[str, float]:
    scores = {}
    for kind in SUITE_SCORES:
        statistic, capped = SUITE_LABELS[kind]
        scores[kind] = now.get("impala_suite_human_normalised_score", statistic=statistic, capped=capped)
    return {kind: score for kind, score in scores.items() if score is not None}


def _replay(now: Scrape) -> Replay | None:
    steps = now.get("impala_learner_replay_steps")
    if steps is None:
        return None
    return Replay(
        steps=int(steps),
        capacity=_whole(now.get("impala_learner_replay_capacity")),
        size_bytes=now.get("impala_learner_replay_bytes") or 0.0,
        age_versions=_known(now.get("impala_learner_replay_age_versions")),
        rejected_ratio=_known(now.get("impala_learner_replay_rejected_ratio")),
    )


def _troubles(now: Scrape) -> dict[str, int]:
    counts = {
        "stale rollouts": now.get("impala_learner_rollouts_total", result="stale"),
        "invalid rollouts": now.get("impala_learner_rollouts_total", result="invalid"),
        "lost rollouts": now.get("impala_learner_sequence_gaps_total"),
        "skipped updates": now.get("impala_learner_nonfinite_updates_total"),
        "failed checkpoints": now.get("impala_checkpoint_failures_total"),
    }
    return {kind: int(count) for kind, count in counts.items() if count}


def _known(value: float | None) -> float | None:
    """A gauge that was never set is NaN."""
    return None if value is None or math.isnan(value) else value


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else int(value)


class History:
    """The little that figures need of the past: a window of scrapes, and the course of the return."""

    LONGEST = 256

    def __init__(self) -> None:
        self._window: deque[Scrape] = deque()
        self._returns: list[float] = []
        self._stride = 1
        self._seen = 0

    def add(self, learner: Scrape | None) -> None:
        """Remember the learner's latest scrape, unless it is the one already known."""
        if learner is None or (self._window and self._window[-1].time_s == learner.time_s):
            return
        started = "process_start_time_seconds"
        if self._window and self._window[-1].get(started) != learner.get(started):
            self._window.clear()  # a restarted learner counts from 0: what it did before says nothing
        self._window.append(learner)
        while len(self._window) > 2 and learner.time_s - self._window[1].time_s >= RATE_WINDOW_S:
            self._window.popleft()
        returns = learner.by_label("impala_episode_return", "task")
        if returns:
            self._add_return(sum(returns.values()) / len(returns))

    def _add_return(self, value: float) -> None:
        self._seen += 1
        if self._seen % self._stride == 0 and math.isfinite(value):
            self._returns.append(value)
        if len(self._returns) > self.LONGEST:  # keep every second one, and take every second one from now on
            self._returns = self._returns[1::2]
            self._stride *= 2

    @property
    def before(self) -> Scrape | None:
        """The scrape that rates are measured from."""
        return self._window[0] if len(self._window) > 1 else None

    @property
    def now(self) -> Scrape | None:
        """The latest."""
        return self._window[-1] if self._window else None

    @property
    def returns(self) -> tuple[float, ...]:
        """At most ``LONGEST`` points, evenly spread over the time since the start."""
        return tuple(self._returns)


def plain_fields(snapshot: Snapshot) -> dict[str, object]:
    """The figures of a log line; what is not known is left out."""
    is_single, replay = len(snapshot.task_returns) == 1, snapshot.replay
    fields: dict[str, object] = {
        "steps": snapshot.steps,
        "total_steps": snapshot.run.total_steps,
        "steps_per_s": _rounded(snapshot.steps_per_s),
        "frames_per_s": _rounded(snapshot.frames_per_s),
        "eta_s": _rounded(snapshot.eta_s),
        "episode_return": snapshot.episode_return,
        "human_normalised": next(iter(snapshot.task_scores.values()), None) if is_single else None,
        **{f"human_normalised_{statistic}": score for statistic, score in snapshot.suite_scores.items()},
        "lag_mean": snapshot.lag_mean,
        "lag_max": snapshot.lag_max,
        "learner_wait_ratio": snapshot.wait_ratio,
        "queue_depth": snapshot.queue_depth,
        "queue_capacity": snapshot.queue_capacity,
        **{f"loss_{term}": value for term, value in snapshot.losses.items()},
        "entropy": snapshot.entropy,
        "grad_norm": snapshot.grad_norm,
        "replay_steps": replay and replay.steps,
        "replay_age_versions": replay and replay.age_versions,
        "replay_rejected_ratio": replay and replay.rejected_ratio,
        "replay_mb": replay and _rounded(replay.size_bytes / 1e6),
        "policy_version": snapshot.policy_version,
        "world_size": snapshot.world_size if snapshot.num_learners > 1 else None,
        "checkpoint_age_s": _rounded(snapshot.checkpoint_age_s),
        **{kind.replace(" ", "_"): count for kind, count in snapshot.troubles.items()},
        "pods_up": f"{sum(pod.phase == 'up' for pod in snapshot.pods)}/{len(snapshot.pods)}",
        "restarts": sum(pod.restarts for pod in snapshot.pods) or None,
        "memory_mb": _rounded(sum(pod.memory_bytes or 0.0 for pod in snapshot.pods) / 1e6),
    }
    return {key: value for key, value in fields.items() if value is not None}


def _rounded(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else round(value)
