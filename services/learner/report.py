"""What a run says about itself: Prometheus gauges, one JSON line per interval, TensorBoard events.

Steps are agent steps; frames are steps x frame_skip. Returns are raw and of whole episodes. Files grow by
whole lines and whole events or not at all: a disk that is full for a while costs these lines and no others,
and never holds up the training.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from services.learner.trainer import Figures
from services.ops.logging import get_logger
from services.ops.metrics import LearnerMetrics
from services.wire.messages import Episode

RECENT_EPISODES = 100

_log = get_logger("report")


class Episodes:
    """Episodes as they arrive with the rollouts. Written by the intake's thread, read by the reporter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: deque[Episode] = deque(maxlen=RECENT_EPISODES)
        self._since_report: list[Episode] = []
        self._total = 0

    def add(self, episode: Episode) -> None:
        """One more."""
        with self._lock:
            self._recent.append(episode)
            self._since_report.append(episode)
            self._total += 1

    def take(self) -> tuple[list[Episode], list[Episode], int]:
        """(the most recent ones, those since the last call, how many there were in all)."""
        with self._lock:
            new, self._since_report = self._since_report, []
            return list(self._recent), new, self._total

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        with self._lock:
            return {
                "recent": [[e.episode_return, e.length] for e in self._recent],
                "total": self._total,
                "mean_return": _mean([e.episode_return for e in self._recent]),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        with self._lock:
            self._recent.extend(Episode(episode_return=r, length=n) for r, n in state["recent"])
            self._total = state["total"]


class Reporter:
    """Called by the learner's loop every ``learner.log_interval_s``."""

    def __init__(
        self,
        *,
        run_dir: Path,
        task: str,
        frame_skip: int,
        metrics: LearnerMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lines = run_dir / "metrics.jsonl"
        self._events = run_dir / "tensorboard" / _event_file_name()
        self._task = task
        self._frame_skip = frame_skip
        self._metrics = metrics
        self._clock = clock
        self._since_s = clock()
        self._steps_before: int | None = None
        self._lags: list[int] = []
        self._waited_s = 0.0

    def waited(self, seconds: float) -> None:
        """The learner waited for a batch."""
        self._waited_s += seconds

    def batch(self, lags: Sequence[int], waited_s: float) -> None:
        """A batch arrived, after some waiting; how far behind its rollouts were."""
        self._lags.extend(lags)
        self._waited_s += waited_s

    def report(
        self, *, figures: Figures, episodes: Episodes, version: int, steps: int, learning_rate: float
    ) -> None:
        """Write one line about the interval that ends now."""
        now_s = self._clock()
        seconds = max(now_s - self._since_s, 1e-9)
        new_steps = steps - (steps if self._steps_before is None else self._steps_before)
        recent, new, total = episodes.take()
        line: dict[str, float | int | None] = {
            "time": round(time.time(), 3),
            "steps": steps,
            "frames": steps * self._frame_skip,
            "version": version,
            "steps_per_second": new_steps / seconds,
            "episodes": total,
            "episode_return": _mean([e.episode_return for e in recent]),
            "episode_length": _mean([e.length for e in recent]),
            "interval_episodes": len(new),
            "interval_return": _mean([e.episode_return for e in new]),
            "interval_return_max": max((e.episode_return for e in new), default=None),
            "policy_lag_mean": _mean(self._lags),
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
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        self._since_s, self._steps_before, self._lags, self._waited_s = now_s, steps, [], 0.0
        self._to_prometheus(line)
        try:
            _append(self._lines, json.dumps(line, allow_nan=False).encode() + b"\n")
            _append(self._events, _event(line), header=_record(Event(file_version="brain.Event:2")))
        except OSError as error:  # a full disk must not end the training
            _log.warning("report_not_written", error=error)

    def _to_prometheus(self, line: Mapping[str, float | int | None]) -> None:
        gauges = {
            self._metrics.loss.labels("total"): "loss_total",
            self._metrics.loss.labels("policy"): "loss_policy",
            self._metrics.loss.labels("baseline"): "loss_baseline",
            self._metrics.loss.labels("entropy"): "loss_entropy",
            self._metrics.entropy: "entropy",
            self._metrics.grad_norm: "grad_norm",
            self._metrics.rho_clipped_ratio: "rho_clipped_ratio",
            self._metrics.learning_rate: "learning_rate",
        }
        if line["episode_return"] is not None:
            gauges[self._metrics.episode_return.labels(self._task)] = "episode_return"
            gauges[self._metrics.episode_length.labels(self._task)] = "episode_length"
        for gauge, key in gauges.items():
            value = line[key]
            if value is not None:
                gauge.set(value)
        self._metrics.nonfinite_updates.inc(line["nonfinite_updates"] or 0)


def _mean(values: list[float] | list[int]) -> float | None:
    return sum(values) / len(values) if values else None


def _append(path: Path, data: bytes, header: bytes = b"") -> None:
    """Add ``data`` to the file, in a new one after ``header``; or, with an OSError, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        data = data if end else header + data
        written = 0
        try:
            written = file.write(data)
        finally:
            if written < len(data):
                file.truncate(end)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _event_file_name() -> str:
    """As TensorBoard looks for it; another one for every life of the learner."""
    return f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"


def _event(line: Mapping[str, float | int | None]) -> bytes:
    values = [
        Summary.Value(tag=key, simple_value=value)
        for key, value in line.items()
        if value is not None and key not in ("time", "steps")
    ]
    return _record(Event(wall_time=line["time"], step=line["steps"], summary=Summary(value=values)))


def _record(event: Event) -> bytes:
    """TensorBoard's framing. Not tensorboardX's writer: its thread dies of a full disk, and then its callers
    wait for ever for room in its queue."""
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(
        (length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data)))
    )
