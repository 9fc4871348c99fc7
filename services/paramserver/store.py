"""The newest weights: one frozen snapshot, swapped whole, and its copy on disk.

Whoever reads ``Store.snapshot`` holds a consistent value for as long as it likes, in any thread, without a
lock; only the server's loop writes. The copy on disk is written from a thread of its own, so that a slow disk
never delays a reply, and lets a restarted server serve at once instead of waiting for the learner. It is
replaced atomically and carries a checksum: a reader sees the old one, the new one, or a refusal, never
half of one. Nothing that goes wrong with a disk stops the server.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from prometheus_client import Counter

from services.ops.logging import get_logger
from services.wire.messages import NO_GENERATION, NO_VERSION, Buffer, Destination, RunState

MAGIC = b"impala parameter server snapshot 1\n"
DIGEST_BYTES = 32
LENGTH_BYTES = 4
LOOK_S = 0.25
"""How soon a new generation begins its way to disk."""

_log = get_logger("store")


class SnapshotError(ValueError):
    """A file that cannot be trusted. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What clients are told."""

    version: int
    steps: int
    """Agent steps trained when this version was made."""
    state: RunState
    payload: Buffer | None
    """None without a version; or, when offered to a store, not sent along."""
    generation: int = NO_GENERATION
    """The newest group of learners. It outlives a restart, so that no number is given twice."""
    learners: tuple[Destination, ...] = ()
    """Who is in it; none are known after a restart."""

    @property
    def told_generation(self) -> int:
        """A number without learners is told to nobody, so clients keep those that they know."""
        return self.generation if self.learners else NO_GENERATION


EMPTY = Snapshot(version=NO_VERSION, steps=0, state="waiting", payload=None)


class Store:
    """Holds the newest snapshot. Only ``go_back`` lets its version fall, and learners are not forgotten."""

    def __init__(self, snapshot: Snapshot = EMPTY) -> None:
        self.snapshot = snapshot

    def offer(self, offered: Snapshot) -> bool:
        """Take what is new in ``offered``; False if nothing is.

        A newer version with its payload replaces everything. Without a payload, or with the version that is
        already held (one version is one payload), only the run's state can be new. An older version has
        no say: neither its weights nor its state. Learners are taken whatever the version, if any are named.
        """
        held = self.snapshot
        new = held
        if offered.version > held.version and offered.payload is not None:
            new = replace(offered, generation=held.generation, learners=held.learners)
        elif offered.version >= held.version and held.payload is not None and offered.state != held.state:
            new = replace(held, state=offered.state)
        named = (offered.generation, offered.learners)
        if offered.learners and named != (held.generation, held.learners):
            new = replace(new, generation=offered.generation, learners=offered.learners)
        self.snapshot = new
        return new is not held

    def go_back(self, offered: Snapshot) -> None:
        """Take the older version in ``offered`` in place of the held one. Who calls this knows that the run
        itself has gone back. Learners are taken as ever.
        """
        assert offered.payload is not None
        assert offered.version < self.snapshot.version
        named = offered if offered.learners else self.snapshot
        self.snapshot = replace(offered, generation=named.generation, learners=named.learners)


def write(path: Path, snapshot: Snapshot, run_id: str) -> None:
    """Replace the file at ``path`` by ``snapshot``; OSError leaves the old one as it was."""
    fields = {
        "run_id": run_id,
        "version": snapshot.version,
        "steps": snapshot.steps,
        "state": snapshot.state,
        "generation": snapshot.generation,
    }
    header = json.dumps(fields).encode()
    payload = b"" if snapshot.payload is None else snapshot.payload
    body = [len(header).to_bytes(LENGTH_BYTES, "big"), header, payload]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        try:
            file.write(MAGIC)
            file.write(_digest(body))
            for part in body:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            temporary.unlink()  # half of it is of use to nobody, and takes what room there is
            raise
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read(path: Path, run_id: str, max_payload_bytes: int) -> Snapshot:
    """The snapshot at ``path``, EMPTY if there is no file; OSError or SnapshotError if it is of no use."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
            if start != MAGIC:
                raise SnapshotError("it is not a parameter server's snapshot")
            size = os.fstat(file.fileno()).st_size
            if size > max_payload_bytes + 4096:
                raise SnapshotError(f"it has {size} bytes; wire.max_message_bytes is {max_payload_bytes}")
            digest = file.read(DIGEST_BYTES)
            body = memoryview(file.read())
    except FileNotFoundError:
        return EMPTY
    if digest != _digest([body]):
        raise SnapshotError("its checksum is wrong: it is truncated or damaged")
    # The checksum holds, so the rest is what ``write`` wrote.
    end = LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "big")
    fields = json.loads(bytes(body[LENGTH_BYTES:end]))
    if fields["run_id"] != run_id:
        raise SnapshotError(f"it belongs to run {fields['run_id']!r}; this is run {run_id!r}")
    version = int(fields["version"])
    return Snapshot(
        version=version,
        steps=int(fields["steps"]),
        state=cast(RunState, fields["state"]),
        payload=None if version == NO_VERSION else body[end:],
        generation=int(fields.get("generation", NO_GENERATION)),  # older files have none
    )


def _digest(parts: list[bytes | Buffer]) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


class SnapshotWriter:
    """Brings what is new in the store to disk: once per interval, and once more at the end.

    A new generation does not wait for the interval: who restarts with an old one might give a number twice.
    """

    def __init__(
        self,
        store: Store,
        write: Callable[[Snapshot], None],
        interval_s: float,
        failures: Counter,
    ) -> None:
        self._store = store
        self._write = write
        self._interval_s = interval_s
        self._failures = failures
        self._written = store.snapshot
        self._tried_generation = store.snapshot.generation
        self._finish = threading.Event()

    def run(self) -> None:
        """Until ``finish``; the body of a thread."""
        waited_s = 0.0
        while not self._finish.wait(min(self._interval_s, LOOK_S)):
            waited_s += min(self._interval_s, LOOK_S)
            if self.is_due(waited_s):
                self.write_if_new()
                waited_s = 0.0
        self.write_if_new()

    def is_due(self, waited_s: float) -> bool:
        """So long after the last write, or the last try."""
        return waited_s >= self._interval_s or self._store.snapshot.generation != self._tried_generation

    def finish(self) -> None:
        """Let ``run`` write once more and return. The store must not change any more."""
        self._finish.set()

    def write_if_new(self) -> None:
        """A failure is counted and logged, and tried again at the next call."""
        snapshot = self._store.snapshot
        if snapshot is self._written:
            return
        self._tried_generation = snapshot.generation  # a full disk is not asked again before the interval
        try:
            self._write(snapshot)
        except OSError as error:
            self._failures.inc()
            _log.warning("snapshot_failed", policy_version=snapshot.version, error=error)
        else:
            self._written = snapshot
            _log.debug("snapshot_written", policy_version=snapshot.version)
