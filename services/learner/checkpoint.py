"""Checkpoints: what a stopped run continues from.

    consumes   the trainer's state, copied to the host
    produces   ``checkpoints/step-000000123456.pt`` and ``checkpoints/best.pt``
    waits for  the disk, in a thread of its own: a slow, full or read-only one never stops the training

A checkpoint is written beside its place, synced and renamed, so a file with the right name is whole; and yet
each is checked when it is read, and one that is damaged or foreign is refused by name in favour of the one
before it. The files hold tensors and plain values only and are read with ``weights_only=True``. Several
learners may share the directory: each has temporary files of its own, and touches no other's.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
    written_s: float
    """When, in Unix time, as its file says."""
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
        written_s = path.stat().st_mtime
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
        written_s=written_s,
        trainer=content["trainer"],
        episodes=content["episodes"],
        config=content["config"],
        complete=content["complete"],
    )


class CheckpointStore:
    """The checkpoints of one run, as one of its learners reads and writes them."""

    def __init__(self, directory: Path, keep: int, metrics: LearnerMetrics, writer: str) -> None:
        """``writer`` is the learner's id: no two that live share one."""
        self._directory = directory
        self._keep = keep
        self._metrics = metrics
        self._temporary = f".{quote(writer, safe='')}.tmp"
        """How names of this learner's files end while they are being written."""
        self._writing: threading.Thread | None = None
        self._best = _Best(directory / "best.pt")
        self._refused: set[Path] = set()
        self.saved_steps = -1
        """Steps of the newest checkpoint that this process has written."""

    def latest(self, accept: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """The newest usable checkpoint; ``accept`` raises ValueError for one that does not fit.

        None if there are no checkpoints. CheckpointError if there are some and not one is usable: to begin
        again from nothing is for a person to decide.
        """
        self._remove_leftovers()
        self._refused.clear()
        reasons = []
        while (path := max(self._usable(), default=None)) is not None:
            try:
                checkpoint = read(path)
                accept(checkpoint)
            except ValueError as error:
                if not path.exists():
                    continue  # deleted at this moment by the learner that leads, which has a newer one
                _log.error("checkpoint_refused", reason=error)
                reasons.append(str(error))
                self._refused.add(path)
            else:
                self._metrics.checkpoint_timestamp_seconds.set(checkpoint.written_s)
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
        self._writing = threading.Thread(target=self._write, args=(content,), name="checkpoint", daemon=True)
        self._writing.start()
        return True

    @property
    def busy(self) -> bool:
        """One is being written."""
        return self._writing is not None and self._writing.is_alive()

    def _usable(self) -> set[Path]:
        """A refused file is neither counted nor deleted; with keep = 1 it would push out the good one."""
        return {*self._directory.glob("step-*.pt")} - self._refused

    def _remove_leftovers(self) -> None:
        """Of our last life, if it was killed, or of a disk that has let itself only be read for a while.

        Others may be writing theirs at this moment.
        """
        for path in self._directory.glob("*.tmp"):
            if path.name.partition(".")[2] == self._temporary.removeprefix("."):
                with contextlib.suppress(OSError):  # from a disk that can only be read one can begin as well
                    path.unlink(missing_ok=True)

    def _write(self, content: dict[str, Any]) -> None:
        steps = content["trainer"]["steps"]
        path = self._directory / f"step-{steps:012d}.pt"
        started_s = time.monotonic()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, self._temporary, content)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            self._failed(path, error)
            self._clear_up()  # a disk that has become too small for all of them gets room for the next
            return
        self._refused.discard(path)
        self.saved_steps = steps
        self._metrics.checkpoint_timestamp_seconds.set(time.time())
        _log.info("checkpoint_written", path=path, steps=steps, seconds=time.monotonic() - started_s)
        self._clear_up()
        mean_return = content["episodes"]["mean_return"]
        try:
            if mean_return is not None and mean_return > self._best.mean_return():
                _write_atomically(self._best.path, self._temporary, content)
        except (OSError, RuntimeError) as error:
            self._failed(self._best.path, error)

    def _failed(self, path: Path, error: Exception) -> None:
        self._metrics.checkpoint_failures.inc()
        _log.error("checkpoint_failed", path=path, error=error)

    def _clear_up(self) -> None:
        """Delete what nobody needs any more; who led before us may be doing the same."""
        try:
            self._remove_leftovers()
            for old in sorted(self._usable())[: -self._keep]:
                old.unlink(missing_ok=True)
        except OSError as error:
            self._failed(self._directory, error)


def to_host(value: Any) -> Any:
    """A deep copy with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(item) for item in value)
    return value


def _write_atomically(path: Path, suffix: str, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(suffix)
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


class _Best:
    """The best checkpoint, which is read again whenever it is another one: the leader before us wrote it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._mean_return = float("-inf")

    def mean_return(self) -> float:
        """Of the one on the disk; minus infinity if there is none, or none that can be used."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return float("-inf")
        if (status.st_ino, status.st_mtime_ns) != self._seen:
            self._mean_return = self._read()
            self._seen = (status.st_ino, status.st_mtime_ns)
        return self._mean_return

    def _read(self) -> float:
        try:
            mean_return = read(self.path).episodes["mean_return"]
        except CheckpointError as error:
            _log.error("checkpoint_refused", reason=error)
            return float("-inf")
        return float("-inf") if mean_return is None else float(mean_return)
