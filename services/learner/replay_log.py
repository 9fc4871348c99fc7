"""The replay memory's copy on disk, from which a restarted learner fills it again.

    consumes   every item that the memory takes in, from the thread that owns it, and the state of its draws
    produces   ``segment-00000012-000313.replay``: some consecutive items, each with its length and checksum,
               and in the same way, as the last of its records, the state of the draws after these items
    waits for  the disk, in a thread of its own: ``append`` never does
    may drop   what a slow, full or read-only disk does not take; counted and logged

Items collect in memory up to a 32nd of the capacity, or 4 MB if that is less, and then go to disk, once:
written beside their place, synced and renamed, so that a segment with the right name is whole. A learner that
is killed loses the segment in hand, at most 3 percent of the memory, and those that a slow disk kept waiting.
A segment that is damaged nevertheless is good up to the first item whose checksum is wrong. The default
capacity takes 22 MB (10,000 rollouts of Pong).
"""

from __future__ import annotations

import os
import re
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from services.ops.logging import get_logger

MAGIC = b"impala replay segment 1\n"
HEADER = struct.Struct("<II")
"""Before each record: its length, and the CRC-32 of length and record."""
SEGMENTS = 32
SEGMENT_BYTES = 4 << 20
MAX_WAITING = 4
"""Segments that may wait for the disk, the one that is being written among them."""
CLOSE_S = 2.0

_NAME = re.compile(r"segment-(\d+)-(\d+)\.replay")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a log has kept."""

    items: Iterator[bytes]
    """Oldest first."""
    draws: bytes
    """The state of the draws after the newest of them; empty if that is damaged or was never there."""


class ReplayLog:
    """Of one learner: nobody else may write to its directory. ``append`` and ``close`` are one thread's."""

    def __init__(self, directory: Path, capacity: int) -> None:
        assert capacity >= 1
        self._directory = directory
        self._capacity = capacity
        self._items: list[bytes] = []
        self._items_bytes = 0
        self._draws: Callable[[], bytes] = bytes
        self._lock = threading.Lock()  # of what the writer's thread shares: the next three
        self._waiting: deque[_Content] = deque()
        self._writer: threading.Thread | None = None
        self.num_lost = 0
        """Items that the disk did not take."""
        self._log = get_logger("replay_log").limited(10.0)

    def restore(self) -> Restored:
        """The newest items, at most ``capacity``; what is damaged is left out."""
        newest_first: list[list[bytes]] = []
        draws: list[bytes] = []
        room = self._capacity
        damaged: list[str] = []
        for segment in reversed(_segments(self._directory)):
            try:
                content = _read(segment)
            except OSError as error:
                damaged.append(f"{segment.path.name} ({error.strerror})")
                continue
            if len(content.items) < segment.num_items:
                damaged.append(f"{segment.path.name} (from item {len(content.items)} of {segment.num_items})")
            newest_first.append([*content.items[-room:]])
            draws.append(content.draws)
            room -= len(newest_first[-1])
            if not room:
                break
        tell = self._log.warning if damaged else self._log.info
        tell("replay_restored", items=self._capacity - room, damaged=", ".join(damaged) or None)
        items = chain.from_iterable(reversed(newest_first))
        return Restored(items=items, draws=draws[0] if draws else b"")

    def append(self, item: bytes, draws: Callable[[], bytes] = bytes) -> None:
        """Keep ``item``, and what ``draws`` says when its segment is complete. Returns at once."""
        self._draws = draws
        self._items.append(item)
        self._items_bytes += len(item)
        if len(self._items) * SEGMENTS >= self._capacity or self._items_bytes >= SEGMENT_BYTES:
            self._hand_over()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what is in hand; what the disk has not taken after ``timeout_s`` counts as lost."""
        if self._items:
            self._hand_over()
        writer = self._writer
        if writer is not None:
            writer.join(timeout_s)
        with self._lock:
            late = sum(len(content.items) for content in self._waiting)
        if late:
            self._lose(late, f"not written within {timeout_s:g} s")

    def _hand_over(self) -> None:
        items, self._items, self._items_bytes = self._items, [], 0
        with self._lock:
            taken = len(self._waiting) < MAX_WAITING
            if taken:
                self._waiting.append(_Content(items=items, draws=self._draws()))
                if self._writer is None:
                    self._writer = threading.Thread(target=self._write_all, name="replay-log", daemon=True)
                    self._writer.start()
        if not taken:
            self._lose(len(items), "the disk is too slow")

    def _lose(self, num_items: int, reason: object) -> None:
        with self._lock:
            self.num_lost += num_items
        self._log.warning("replay_log_failed", lost=num_items, directory=self._directory, reason=reason)

    # --- the writer's thread, which lives for as long as there is something to write ---

    def _write_all(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._writer = None
                    return
                content = self._waiting[0]
            try:
                self._write(content)
            except OSError as error:
                self._lose(len(content.items), error)
            with self._lock:
                self._waiting.popleft()

    def _write(self, content: _Content) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        segments = _segments(self._directory)
        number = segments[-1].number + 1 if segments else 0
        newer = len(content.items)
        for segment in reversed(segments):
            if newer >= self._capacity:
                segment.path.unlink(missing_ok=True)
            newer += segment.num_items
        temporary = self._directory / "segment.tmp"
        try:
            with temporary.open("wb") as file:
                records = ((_header(record), record) for record in (*content.items, content.draws))
                file.write(b"".join([MAGIC, *chain.from_iterable(records)]))
                file.flush()
                os.fsync(file.fileno())  # where some file systems first tell that there is no room
            temporary.replace(self._directory / f"segment-{number:08d}-{len(content.items):06d}.replay")
        finally:
            temporary.unlink(missing_ok=True)


# --- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """Of one segment."""

    items: Sequence[bytes]
    draws: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """What its name tells."""

    path: Path
    number: int
    num_items: int


def _segments(directory: Path) -> list[_Segment]:
    """Oldest first. Whatever else lies in the directory is left alone."""
    matches = ((path, _NAME.fullmatch(path.name)) for path in directory.glob("segment-*"))
    segments = [_Segment(path=p, number=int(m[1]), num_items=int(m[2])) for p, m in matches if m]
    return sorted(segments, key=lambda segment: segment.number)


def _read(segment: _Segment) -> _Content:
    """Its items, up to the first damaged one, and the state that follows the last."""
    records = [*islice(_records(segment.path.read_bytes()), segment.num_items + 1)]
    return _Content(items=records[: segment.num_items], draws=b"".join(records[segment.num_items :]))


def _records(data: bytes) -> Iterator[bytes]:
    """Up to the first damaged one."""
    start = len(MAGIC) if data.startswith(MAGIC) else len(data)
    while start + HEADER.size <= len(data):
        header = data[start : start + HEADER.size]
        start += HEADER.size
        record = data[start : start + HEADER.unpack(header)[0]]
        if _header(record) != header:
            return
        yield record
        start += len(record)


def _header(record: bytes) -> bytes:
    length = len(record)
    # Of the length too, or zeros, as a power cut may leave them, would be items without a byte.
    return HEADER.pack(length, zlib.crc32(record, zlib.crc32(length.to_bytes(4, "little"))))
