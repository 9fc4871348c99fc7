"""Checkpoints: what a stopped run continues from.

    consumes   the trainer's state, copied to the host
    produces   ``checkpoints/step-000000123456.pt`` and ``checkpoints/best.pt``
    waits for  the disk, in a thread of its own: a slow or full one never stops the training

A checkpoint is written beside its place, synced and renamed, so a file with the right name is whole; and yet
each is checked when it is read, and one that is damaged or foreign is refused by name in favour of the one
before it. The files hold tensors and plain values only and are read with ``weights_only=True``.
"""

from __future__ import annotations

import os
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.ops.logging import get_logger
from services.ops.metrics import LearnerMetrics

FORMAT = "impala-checkpoint"
FORMAT_VERSION = 2

_log = get_logger("checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One file's content."""

    path: Path
    trainer: Mapping[str, Any]
    episodes: Mapping[str, Any]
    """Recent returns, so that the reported mean does not start anew."""
    config: Mapping[str, Any]
    complete: bool


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the text names it."""


def read(path: Path) -> Checkpoint:
    """The checkpoint in this file, on the CPU; CheckpointError if it is not a whole one of ours."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch's format, but torch does not look at the checksums
            damaged_part = archive.testzip()
        content = None if damaged_part else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (a damaged file makes its readers raise almost anything)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path}: damaged or not a checkpoint ({first_line})") from None
    if damaged_part:
        raise CheckpointError(f"checkpoint {path}: damaged (the checksum of {damaged_part} is wrong)")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}: not written by this program")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path}: format {content.get('format_version')}; allowed is {FORMAT_VERSION}"
        )
    missing = {"trainer", "episodes", "config", "complete"} - content.keys()
    if missing:
        raise CheckpointError(f"checkpoint {path}: has no {', '.join(sorted(missing))}")
    return Checkpoint(
        path=path,
        trainer=content["trainer"],
        episodes=content["episodes"],
        config=content["config"],
        complete=content["complete"],
    )


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, keep: int, metrics: LearnerMetrics) -> None:
        self._directory = directory
        self._keep = keep
        self._metrics = metrics
        self._writer: threading.Thread | None = None
        self._best_return = float("-inf")
        self._refused: set[Path] = set()
        self.saved_steps = -1
        """Steps of the newest checkpoint that this process has written."""

    def latest(self, accept: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """The newest usable checkpoint; ``accept`` raises ValueError for one that does not fit.

        None if there are no checkpoints. CheckpointError if there are some and not one is usable: to begin
        again from nothing is for a person to decide.
        """
        for leftover in self._directory.glob("*.tmp"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        best = self._directory / "best.pt"
        if best.exists():
            self._best_return = _mean_return_or_worst(best)
        reasons = []
        for path in sorted(self._directory.glob("step-*.pt"), reverse=True):
            try:
                checkpoint = read(path)
                accept(checkpoint)
            except ValueError as error:
                _log.error("checkpoint_refused", reason=error)
                reasons.append(str(error))
                self._refused.add(path)
            else:
                self._metrics.checkpoint_timestamp_seconds.set(path.stat().st_mtime)
                return checkpoint
        if reasons:
            raise CheckpointError(
                f"{reasons[0]}; no other in {self._directory} is usable either. Mend that, or move them away "
                "to begin from nothing"
            )
        return None

    def save(
        self,
        *,
        trainer: Mapping[str, Any],
        episodes: Mapping[str, Any],
        config: Mapping[str, Any],
        complete: bool,
    ) -> bool:
        """Begin to write a checkpoint in the background; False, and nothing, while one is being written.

        The state is copied before this returns, so that the training may go on.
        """
        if self.busy:
            return False
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "trainer": to_host(trainer),
            "episodes": dict(episodes),
            "config": dict(config),
            "complete": complete,
        }
        self._writer = threading.Thread(target=self._write, args=(content,), name="checkpoint", daemon=True)
        self._writer.start()
        return True

    @property
    def busy(self) -> bool:
        """One is being written."""
        return self._writer is not None and self._writer.is_alive()

    def _write(self, content: dict[str, Any]) -> None:
        steps, mean_return = content["trainer"]["steps"], content["episodes"]["mean_return"]
        path = self._directory / f"step-{steps:012d}.pt"
        started_s = time.monotonic()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, content)
            self._refused.discard(path)
            if mean_return is not None and mean_return > self._best_return:
                _write_atomically(self._directory / "best.pt", content)
                self._best_return = mean_return
            # A refused file is neither counted nor deleted; with keep = 1 it would push out the good one.
            usable = {*self._directory.glob("step-*.pt")} - self._refused
            for old in sorted(usable)[: -self._keep]:
                old.unlink()
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            self._metrics.checkpoint_failures.inc()
            _log.error("checkpoint_failed", path=path, error=error)
            return
        self.saved_steps = steps
        self._metrics.checkpoint_timestamp_seconds.set(time.time())
        _log.info("checkpoint_written", path=path, steps=steps, seconds=time.monotonic() - started_s)


def to_host(value: Any) -> Any:
    """A deep copy with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(item) for item in value)
    return value


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _mean_return_or_worst(path: Path) -> float:
    try:
        mean_return = read(path).episodes["mean_return"]
    except CheckpointError as error:
        _log.error("checkpoint_refused", reason=error)
        return float("-inf")
    return float("-inf") if mean_return is None else float(mean_return)
