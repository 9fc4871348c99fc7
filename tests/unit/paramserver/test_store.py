"""The newest snapshot wins, and its copy on disk is whole or refused."""

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from services.paramserver.store import (
    DIGEST_BYTES,
    EMPTY,
    MAGIC,
    Snapshot,
    SnapshotError,
    SnapshotWriter,
    Store,
    read,
    write,
)
from services.wire.messages import NO_GENERATION, Destination
from tests.unit.learner.disk import full_disk

LIMIT = 1 << 20
LEARNERS = (
    Destination(endpoint="tcp://10.0.0.7:5555", since=2),
    Destination(endpoint="tcp://10.0.0.8:5555", since=3),
)
SNAPSHOT = Snapshot(version=7, steps=4480, state="training", payload=b"weights" * 100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "paramserver" / "snapshot"


def test_an_empty_store_waits() -> None:
    assert Store().snapshot == EMPTY
    assert (EMPTY.version, EMPTY.state, EMPTY.payload) == (-1, "waiting", None)


def test_a_newer_version_replaces_everything() -> None:
    store = Store(SNAPSHOT)
    newer = Snapshot(version=8, steps=5120, state="complete", payload=b"new")
    assert store.offer(newer)
    assert store.snapshot == newer


def test_the_first_version_may_be_zero() -> None:
    store = Store()
    assert store.offer(replace(SNAPSHOT, version=0))
    assert store.snapshot.version == 0


def test_an_older_version_has_no_say_in_weights_or_state() -> None:
    store = Store(SNAPSHOT)
    assert not store.offer(Snapshot(version=6, steps=0, state="complete", payload=b"old"))
    assert not store.offer(Snapshot(version=6, steps=0, state="complete", payload=None))
    assert store.snapshot is SNAPSHOT


def test_the_same_version_again_is_nothing_new() -> None:
    store = Store(SNAPSHOT)
    assert not store.offer(replace(SNAPSHOT, payload=b"other"))
    assert store.snapshot is SNAPSHOT


@pytest.mark.parametrize("payload", [None, b"sent again"])
def test_the_same_version_may_change_the_state_and_keeps_the_payload(payload: bytes | None) -> None:
    store = Store(SNAPSHOT)
    assert store.offer(replace(SNAPSHOT, state="complete", payload=payload))
    assert store.snapshot == replace(SNAPSHOT, state="complete")


def test_an_announcement_of_a_newer_version_changes_the_state_but_not_the_version() -> None:
    store = Store(SNAPSHOT)
    assert store.offer(Snapshot(version=9, steps=9999, state="complete", payload=None))
    assert store.snapshot == replace(SNAPSHOT, state="complete")


def test_an_announcement_to_an_empty_store_changes_nothing() -> None:
    store = Store()
    assert not store.offer(Snapshot(version=9, steps=9999, state="training", payload=None))
    assert store.snapshot is EMPTY


def test_learners_are_taken_whatever_the_version_and_stay_when_others_come_without() -> None:
    store = Store(SNAPSHOT)
    assert store.offer(replace(EMPTY, generation=3, learners=LEARNERS))
    assert store.snapshot == replace(SNAPSHOT, generation=3, learners=LEARNERS)
    assert store.offer(replace(SNAPSHOT, version=8))
    assert store.snapshot == replace(SNAPSHOT, version=8, generation=3, learners=LEARNERS)
    assert store.offer(replace(SNAPSHOT, version=8, payload=None, state="complete"))
    assert (store.snapshot.generation, store.snapshot.learners) == (3, LEARNERS)


def test_an_older_version_that_is_gone_back_to_replaces_the_held_one() -> None:
    store = Store(replace(SNAPSHOT, generation=3, learners=LEARNERS))
    older = Snapshot(version=5, steps=3200, state="waiting", payload=b"older")
    store.go_back(older)
    assert store.snapshot == replace(older, generation=3, learners=LEARNERS)
    store.go_back(replace(older, version=4, generation=1, learners=LEARNERS[:1]))
    assert store.snapshot == replace(older, version=4, generation=1, learners=LEARNERS[:1])
    assert store.offer(replace(older, version=5))


def test_the_same_learners_again_are_nothing_new() -> None:
    store = Store()
    assert store.offer(replace(EMPTY, generation=3, learners=LEARNERS))
    assert not store.offer(replace(EMPTY, generation=3, learners=LEARNERS))


def test_learners_come_with_weights_in_one_piece() -> None:
    store = Store(replace(SNAPSHOT, generation=3, learners=LEARNERS))
    newer = replace(SNAPSHOT, version=8, generation=4, learners=LEARNERS[:1])
    assert store.offer(newer)
    assert store.snapshot == newer


@pytest.mark.parametrize("generation", [2, 3])
def test_other_learners_are_taken_even_if_their_number_is_not_a_newer_one(generation: int) -> None:
    """Upstream has lost its notes and counts anew."""
    store = Store(replace(SNAPSHOT, generation=3, learners=LEARNERS))
    assert store.offer(replace(EMPTY, generation=generation, learners=LEARNERS[:1]))
    assert (store.snapshot.generation, store.snapshot.learners) == (generation, LEARNERS[:1])


@pytest.mark.parametrize("generation", [NO_GENERATION, 9])
def test_who_names_no_learners_takes_none_away(generation: int) -> None:
    store = Store(replace(SNAPSHOT, generation=3, learners=LEARNERS))
    assert not store.offer(replace(EMPTY, generation=generation))
    assert store.snapshot.learners == LEARNERS


def test_a_generation_is_told_together_with_its_learners_only() -> None:
    assert replace(SNAPSHOT, generation=3, learners=LEARNERS).told_generation == 3
    assert replace(SNAPSHOT, generation=3).told_generation == NO_GENERATION


def test_the_generation_is_written_and_the_learners_are_not(path: Path) -> None:
    """They may be gone when the file is read, and others may listen where they did."""
    write(path, replace(SNAPSHOT, generation=7, learners=LEARNERS), "run")
    assert read(path, "run", LIMIT) == replace(SNAPSHOT, generation=7)


def test_a_generation_is_kept_before_there_are_weights(path: Path) -> None:
    write(path, replace(EMPTY, generation=1, learners=LEARNERS), "run")
    assert read(path, "run", LIMIT) == replace(EMPTY, generation=1)


def test_a_file_of_an_older_server_holds_no_generation_and_is_read_all_the_same(path: Path) -> None:
    header = b'{"run_id": "run", "version": 7, "steps": 4480, "state": "training"}'
    body = len(header).to_bytes(4, "big") + header + b"weights" * 100
    path.parent.mkdir()
    path.write_bytes(MAGIC + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest() + body)
    assert read(path, "run", LIMIT) == SNAPSHOT


def test_what_is_written_is_read_back(path: Path) -> None:
    write(path, SNAPSHOT, "run")
    assert read(path, "run", LIMIT) == SNAPSHOT


def test_an_empty_payload_is_a_payload(path: Path) -> None:
    snapshot = replace(SNAPSHOT, payload=b"")
    write(path, snapshot, "run")
    assert read(path, "run", LIMIT) == snapshot


def test_a_newer_snapshot_replaces_the_file_and_leaves_nothing_beside_it(path: Path) -> None:
    write(path, SNAPSHOT, "run")
    write(path, replace(SNAPSHOT, version=8, payload=b"shorter"), "run")
    assert read(path, "run", LIMIT).version == 8
    assert [entry.name for entry in path.parent.iterdir()] == ["snapshot"]


def test_no_file_is_an_empty_snapshot(path: Path) -> None:
    assert read(path, "run", LIMIT) is EMPTY


def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    write(path, replace(SNAPSHOT, payload=b"0123456789"), "run")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SnapshotError, match=r"not a parameter server|truncated"):
            read(path, "run", LIMIT)


def test_a_file_with_any_byte_changed_is_refused(path: Path) -> None:
    write(path, replace(SNAPSHOT, payload=b"0123456789"), "run")
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        with pytest.raises(SnapshotError, match=r"not a parameter server|checksum"):
            read(path, "run", LIMIT)


def test_a_file_with_bytes_appended_is_refused(path: Path) -> None:
    write(path, SNAPSHOT, "run")
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(SnapshotError, match="checksum"):
        read(path, "run", LIMIT)


def test_a_foreign_file_is_refused_without_reading_it_all(path: Path) -> None:
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room, and reading it would take all memory
    with pytest.raises(SnapshotError, match="not a parameter server's snapshot"):
        read(path, "run", LIMIT)


def test_a_file_over_the_message_limit_is_refused_without_reading_it_all(path: Path) -> None:
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(MAGIC + bytes(DIGEST_BYTES))
        file.truncate(1 << 40)
    with pytest.raises(SnapshotError, match=r"wire.max_message_bytes is 1048576"):
        read(path, "run", LIMIT)


def test_the_largest_payload_that_may_travel_may_be_kept(path: Path) -> None:
    snapshot = replace(SNAPSHOT, payload=bytes(LIMIT))
    write(path, snapshot, "run")
    assert read(path, "run", LIMIT) == snapshot


def test_a_snapshot_of_another_run_is_refused(path: Path) -> None:
    write(path, SNAPSHOT, "run")
    with pytest.raises(SnapshotError, match="belongs to run 'run'; this is run 'other'"):
        read(path, "other", LIMIT)


def test_a_directory_in_place_of_the_file_is_an_os_error(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        read(path, "run", LIMIT)


def test_a_failed_write_leaves_the_old_snapshot(path: Path) -> None:
    write(path, SNAPSHOT, "run")
    path.with_suffix(".tmp").mkdir()  # the temporary file cannot be opened
    with pytest.raises(OSError, match="directory"):
        write(path, replace(SNAPSHOT, version=8), "run")
    assert read(path, "run", LIMIT) == SNAPSHOT


def test_a_full_disk_leaves_the_old_snapshot_and_nothing_else(path: Path) -> None:
    write(path, SNAPSHOT, "run")
    with full_disk(4096), pytest.raises(OSError, match="large"):
        write(path, replace(SNAPSHOT, version=8, payload=bytes(100_000)), "run")
    assert [*path.parent.iterdir()] == [path]
    assert read(path, "run", LIMIT) == SNAPSHOT
    write(path, replace(SNAPSHOT, version=8, payload=bytes(100_000)), "run")
    assert read(path, "run", LIMIT).version == 8


def test_what_a_killed_writer_left_behind_is_overwritten(path: Path) -> None:
    path.parent.mkdir()
    path.with_suffix(".tmp").write_bytes(os.urandom(10_000))
    write(path, SNAPSHOT, "run")
    assert read(path, "run", LIMIT) == SNAPSHOT


class FakeDisk:
    """Remembers what is written; may fail, and may be as slow as a test wants."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.error: OSError | None = None
        self.entered = threading.Event()
        self.may_return = threading.Event()
        self.may_return.set()

    def write(self, snapshot: Snapshot) -> None:
        self.entered.set()
        assert self.may_return.wait(10)
        if self.error:
            raise self.error
        self.written.append(snapshot.version)


Build = Callable[[Store, float], SnapshotWriter]


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


@pytest.fixture
def failures() -> Counter:
    return Counter("failures", "Snapshots that failed", registry=CollectorRegistry())


@pytest.fixture
def build(disk: FakeDisk, failures: Counter) -> Build:
    return lambda store, interval_s: SnapshotWriter(store, disk.write, interval_s, failures)


def count(counter: Counter) -> float:
    return next(s.value for m in counter.collect() for s in m.samples if s.name.endswith("_total"))


def test_the_writer_writes_what_is_new_once(build: Build, disk: FakeDisk) -> None:
    store = Store()
    writer = build(store, 1.0)
    writer.write_if_new()
    assert disk.written == []
    store.offer(SNAPSHOT)
    writer.write_if_new()
    writer.write_if_new()
    assert disk.written == [7]


def test_the_writer_does_not_write_back_what_was_restored(build: Build, disk: FakeDisk) -> None:
    build(Store(SNAPSHOT), 1.0).write_if_new()
    assert disk.written == []


def test_a_new_state_alone_is_written_too(build: Build, disk: FakeDisk) -> None:
    store = Store(SNAPSHOT)
    writer = build(store, 1.0)
    store.offer(replace(SNAPSHOT, state="complete", payload=None))
    writer.write_if_new()
    assert disk.written == [7]


def test_a_failed_write_is_counted_and_tried_again(build: Build, disk: FakeDisk, failures: Counter) -> None:
    store = Store()
    writer = build(store, 1.0)
    store.offer(SNAPSHOT)
    disk.error = OSError(28, "No space left on device")
    writer.write_if_new()
    writer.write_if_new()
    assert (disk.written, count(failures)) == ([], 2)
    disk.error = None
    writer.write_if_new()
    assert (disk.written, count(failures)) == ([7], 2)


def test_the_writers_thread_writes_by_itself_and_ends_when_asked(build: Build, disk: FakeDisk) -> None:
    store = Store()
    writer = build(store, 0.001)
    thread = threading.Thread(target=writer.run)
    thread.start()
    store.offer(SNAPSHOT)
    assert disk.entered.wait(10)
    writer.finish()
    thread.join(10)
    assert not thread.is_alive()
    assert disk.written == [7]


def test_a_new_generation_does_not_wait_for_the_interval(build: Build, disk: FakeDisk) -> None:
    store = Store(SNAPSHOT)
    writer = build(store, 1e6)
    thread = threading.Thread(target=writer.run)
    thread.start()
    store.offer(replace(EMPTY, generation=3, learners=LEARNERS))
    assert disk.entered.wait(10)
    writer.finish()
    thread.join(10)
    assert disk.written == [7]


def test_a_generation_that_could_not_be_written_waits_for_the_interval_like_everything_else(
    build: Build, disk: FakeDisk
) -> None:
    store = Store(SNAPSHOT)
    writer = build(store, 10.0)
    store.offer(replace(SNAPSHOT, version=8))
    assert not writer.is_due(9.9)
    assert writer.is_due(10.0)
    store.offer(replace(EMPTY, generation=3, learners=LEARNERS))
    assert writer.is_due(0.25)
    disk.error = OSError(28, "No space left on device")
    writer.write_if_new()
    assert not writer.is_due(0.25)
    assert writer.is_due(10.0)


def test_the_last_snapshot_is_written_at_the_end_however_long_the_interval(
    build: Build, disk: FakeDisk
) -> None:
    store = Store()
    writer = build(store, 1e6)
    thread = threading.Thread(target=writer.run)
    thread.start()
    store.offer(SNAPSHOT)
    writer.finish()
    thread.join(10)
    assert disk.written == [7]


def test_a_slow_disk_holds_up_neither_the_store_nor_the_versions_after_it(
    build: Build, disk: FakeDisk
) -> None:
    store = Store()
    writer = build(store, 0.001)
    disk.may_return.clear()
    store.offer(SNAPSHOT)
    thread = threading.Thread(target=writer.run)
    thread.start()
    assert disk.entered.wait(10)
    for version in range(8, 20):
        assert store.offer(replace(SNAPSHOT, version=version))
    writer.finish()
    disk.may_return.set()
    thread.join(10)
    assert disk.written == [7, 19]
