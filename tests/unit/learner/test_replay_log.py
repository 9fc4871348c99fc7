"""What was appended comes back after a restart, in order and undamaged, and no disk holds up the training."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from services.learner.replay_log import MAGIC, MAX_WAITING, SEGMENT_BYTES, ReplayLog
from tests.unit.learner.disk import full_disk
from tests.unit.learner.waiting import until

CAPACITY = 320
PER_SEGMENT = 10
"""A 32nd of it."""


def item(number: int, size: int = 100) -> bytes:
    """One that can be told from all others, of about ``size`` bytes."""
    return number.to_bytes(4, "big") + np.random.default_rng(number).bytes(size - 4 + number % 7)


def numbers(items: Iterable[bytes], size: int = 100) -> list[int]:
    """Which items these are; they must be whole."""
    found = []
    for one in items:
        number = int.from_bytes(one[:4], "big")
        assert one == item(number, size), f"item {number} is not what was appended"
        found.append(number)
    return found


class Scene:
    """One life of a learner after another, with the same directory."""

    def __init__(self, directory: Path, capacity: int = CAPACITY) -> None:
        self.directory = directory
        self.capacity = capacity
        self.restart()

    def restart(self) -> None:
        """Without ``close``: what is in hand is lost, as when a process is killed."""
        self.log = ReplayLog(self.directory, self.capacity)

    def append(self, which: Iterable[int], size: int = 100) -> None:
        """At a pace that the disk can keep."""
        for number in which:
            self.log.append(item(number, size))
            if len(self.log._waiting) == MAX_WAITING:
                self.settle()

    def settle(self) -> None:
        until(lambda: self.log._writer is None, "all that waits is written", 60.0)

    def restored(self) -> list[int]:
        return numbers(ReplayLog(self.directory, self.capacity).restore().items)

    @property
    def segments(self) -> list[Path]:
        return sorted(self.directory.glob("*.replay"))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "run" / "replay")


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, object]]:
    records = [record for record in caplog.records if record.getMessage() == event]
    return [record.__dict__["fields"] for record in records]


# --- restarts -------------------------------------------------------------------------------------


def test_without_a_directory_there_is_nothing_to_restore(scene: Scene) -> None:
    assert list(scene.log.restore().items) == []
    assert not scene.directory.exists()


@pytest.mark.parametrize("num_items", [1, 9, 10, 11, 25, 319, 320])
def test_everything_comes_back_after_a_close_oldest_first(scene: Scene, num_items: int) -> None:
    scene.append(range(num_items))
    scene.log.close()
    assert scene.restored() == list(range(num_items))
    assert scene.log.num_lost == 0


@pytest.mark.parametrize("num_items", [321, 325, 330, 335, 1000])
def test_no_more_than_the_capacity_comes_back_and_that_is_the_newest(scene: Scene, num_items: int) -> None:
    scene.append(range(num_items))
    scene.log.close()
    assert scene.restored() == list(range(num_items - CAPACITY, num_items))


def test_a_close_without_anything_in_hand_writes_nothing(scene: Scene) -> None:
    scene.log.close()
    assert not scene.directory.exists()
    scene.append(range(PER_SEGMENT))
    scene.log.close()
    scene.log.close()
    assert len(scene.segments) == 1


def test_many_lives_are_one_after_the_other(scene: Scene) -> None:
    begin = 0
    for length in (3, 50, 1, 0, 127, 10, 200):
        scene.restart()
        scene.append(range(begin, begin + length))
        scene.log.close()
        begin += length
        assert scene.restored() == list(range(max(0, begin - CAPACITY), begin))


def test_what_was_restored_is_not_written_again(scene: Scene) -> None:
    scene.append(range(100))
    scene.log.close()
    before = {path: path.stat().st_mtime_ns for path in scene.segments}
    scene.restart()
    assert numbers(scene.log.restore().items) == list(range(100))
    scene.append(range(100, 110))
    scene.log.close()
    after = {path: path.stat().st_mtime_ns for path in scene.segments}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1


def test_who_is_killed_loses_the_segment_in_hand_and_no_more(scene: Scene) -> None:
    scene.append(range(59))
    scene.settle()
    assert scene.restored() == list(range(50))


def test_a_smaller_capacity_restores_and_then_keeps_less(scene: Scene) -> None:
    scene.append(range(CAPACITY))
    scene.log.close()
    smaller = Scene(scene.directory, capacity=64)
    assert smaller.restored() == list(range(CAPACITY - 64, CAPACITY))
    smaller.append(range(CAPACITY, CAPACITY + 2))
    smaller.settle()
    assert smaller.restored() == list(range(CAPACITY - 62, CAPACITY + 2))
    assert len(smaller.segments) <= 8


def test_large_items_make_segments_of_a_bounded_size(tmp_path: Path) -> None:
    scene = Scene(tmp_path, capacity=100_000)
    size = SEGMENT_BYTES // 4
    scene.append(range(9), size)
    scene.log.close()
    assert [path.name for path in scene.segments] == [
        "segment-00000000-000004.replay",
        "segment-00000001-000004.replay",
        "segment-00000002-000001.replay",
    ]
    assert numbers(scene.log.restore().items, size) == list(range(9))


def test_an_empty_item_is_an_item(scene: Scene) -> None:
    for one in (b"", b"a", b""):
        scene.log.append(one)
    scene.log.close()
    assert list(scene.log.restore().items) == [b"", b"a", b""]


CHILD = """
import sys
from pathlib import Path
from services.learner.replay_log import ReplayLog

log = ReplayLog(Path(sys.argv[1]), 3200)
begin = max((int.from_bytes(item[:4], "big") for item in log.restore().items), default=-1) + 1
for number in range(begin, 1 << 30):
    log.append(number.to_bytes(4, "big") * 50)
    while len(log._waiting) == 4:
        pass
"""


def test_processes_that_are_killed_while_they_write_leave_whole_items_without_a_gap(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    end = 0

    def newest() -> int:
        return max((int(path.stem.split("-")[1]) for path in tmp_path.glob("*.replay")), default=-1)

    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], cwd=root)
        try:
            until(lambda: newest() >= end // 100 + 4, "its fifth segment", 60.0)  # noqa: B023
        finally:
            child.kill()
            child.wait()
        restored = list(ReplayLog(tmp_path, 3200).restore().items)
        begin = int.from_bytes(restored[0][:4], "big")
        assert restored == [n.to_bytes(4, "big") * 50 for n in range(begin, begin + len(restored))]
        assert begin + len(restored) >= end + 500
        end = begin + len(restored)


# --- the state of the draws -------------------------------------------------------------------------


def drawn(scene: Scene, which: Iterable[int]) -> None:
    """As a memory does whose state changes with every item."""
    for number in which:
        scene.log.append(item(number), lambda: b"after %d" % number)  # noqa: B023
    scene.settle()


def state(scene: Scene) -> bytes:
    return ReplayLog(scene.directory, scene.capacity).restore().draws


@pytest.mark.parametrize("num_items", [1, 9, 10, 11, 35])
def test_the_state_of_the_draws_is_that_of_the_newest_item(scene: Scene, num_items: int) -> None:
    drawn(scene, range(num_items))
    scene.log.close()
    assert state(scene) == b"after %d" % (num_items - 1)
    assert scene.restored() == list(range(num_items))


def test_after_a_kill_the_state_is_that_of_the_newest_item_on_the_disk(scene: Scene) -> None:
    drawn(scene, range(25))
    assert (scene.restored()[-1], state(scene)) == (19, b"after 19")


def test_without_anything_on_the_disk_there_is_no_state(scene: Scene) -> None:
    assert state(scene) == b""
    drawn(scene, range(9))
    assert state(scene) == b""


def test_a_state_that_is_cut_off_is_none_and_costs_no_item(scene: Scene) -> None:
    drawn(scene, range(20))
    newest = scene.segments[-1]
    whole = newest.read_bytes()
    for length in range(len(whole) - len(b"after 19") - 8, len(whole)):
        newest.write_bytes(whole[:length])
        assert (scene.restored(), state(scene)) == (list(range(20)), b"")


def test_segments_from_before_there_was_a_state_are_read_all_the_same(scene: Scene) -> None:
    scene.append(range(20))
    scene.settle()
    for path in scene.segments:
        path.write_bytes(path.read_bytes()[:-8])
    assert (scene.restored(), state(scene)) == (list(range(20)), b"")


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def three_segments(scene: Scene) -> Scene:
    scene.append(range(3 * PER_SEGMENT))
    scene.log.close()
    assert len(scene.segments) == 3
    return scene


def test_damage_to_any_byte_costs_the_rest_of_its_segment_and_nothing_else(three_segments: Scene) -> None:
    scene = three_segments
    path = scene.segments[1]
    whole = path.read_bytes()
    starts = [len(MAGIC)]
    for number in range(10, 20):
        starts.append(starts[-1] + 8 + len(item(number)))
    assert starts[-1] + 8 == len(whole), "after its items comes the state of the draws, which is empty"
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        good = max(0, sum(start <= at for start in starts) - 1)
        expected = [*range(10), *range(10, 10 + good), *range(20, 30)]
        assert scene.restored() == expected, f"byte {at} of {len(whole)}"


def test_a_segment_cut_off_anywhere_is_good_up_to_there(three_segments: Scene) -> None:
    scene = three_segments
    path = scene.segments[2]
    whole = path.read_bytes()
    ends = np.cumsum([8 + len(item(number)) for number in range(20, 30)]) + len(MAGIC)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        good = int((ends <= length).sum())
        assert scene.restored() == [*range(20), *range(20, 20 + good)], f"{length} of {len(whole)} bytes"


@pytest.mark.parametrize("kept", [0, len(MAGIC), len(MAGIC) + 2 * 108 + 1])
def test_zeros_in_place_of_a_segments_end_are_no_items(three_segments: Scene, kept: int) -> None:
    path = three_segments.segments[2]
    whole = path.read_bytes()
    path.write_bytes(whole[:kept] + bytes(len(whole) - kept))
    restored = three_segments.restored()
    assert restored[:20] == list(range(20))
    assert len(restored) <= 22


def test_the_log_says_in_one_line_how_much_came_back_and_what_is_damaged(
    three_segments: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _, second, third = three_segments.segments
    three_segments.restored()
    assert told(caplog, "replay_restored") == [{"items": 30, "damaged": None}]
    caplog.clear()
    third.write_bytes(third.read_bytes()[:-9])
    second.unlink()
    second.mkdir()
    assert three_segments.restored() == [*range(10), *range(20, 29)]
    (line,) = told(caplog, "replay_restored")
    assert line == {
        "items": 19,
        "damaged": f"{third.name} (from item 9 of 10), {second.name} (Is a directory)",
    }
    assert caplog.records[-1].levelno == logging.WARNING


def test_a_missing_segment_is_not_missed(three_segments: Scene) -> None:
    three_segments.segments[1].unlink()
    assert three_segments.restored() == [*range(10), *range(20, 30)]
    three_segments.restart()
    three_segments.append(range(30, 40))
    three_segments.settle()
    assert three_segments.restored() == [*range(10), *range(20, 40)]


def test_items_before_a_damaged_segment_fill_up_what_it_lacks(scene: Scene) -> None:
    scene.append(range(CAPACITY + 5))
    scene.log.close()
    newest = scene.segments[-2]
    newest.write_bytes(newest.read_bytes()[: len(MAGIC)])
    assert scene.restored() == [*range(310), *range(320, 325)]


def test_foreign_files_are_neither_read_nor_deleted(scene: Scene) -> None:
    scene.directory.mkdir(parents=True)
    foreign = {
        scene.directory / name: content
        for name, content in {
            "notes.txt": b"mine",
            "segment-.replay": b"x",
            "segment-00000000-000010.replay.bak": b"y",
            "segment-00000099-000010 (copy).replay": b"z",
            "step-000000000640.pt": b"",
        }.items()
    }
    for path, content in foreign.items():
        path.write_bytes(content)
    scene.append(range(3 * CAPACITY))
    scene.log.close()
    assert scene.restored() == list(range(2 * CAPACITY, 3 * CAPACITY))
    assert {path: path.read_bytes() for path in foreign} == foreign


@pytest.mark.parametrize("content", [b"", b"impala replay segment 2\n" + bytes(100), bytes(5000)])
def test_a_file_of_another_format_with_a_segments_name_holds_no_items(
    three_segments: Scene, content: bytes
) -> None:
    (three_segments.directory / "segment-00000003-000010.replay").write_bytes(content)
    assert three_segments.restored() == list(range(30))


# --- room on the disk -----------------------------------------------------------------------------


def directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


@pytest.mark.parametrize("capacity", [1, 33, 320])
def test_the_directory_stays_bounded_over_many_capacities(tmp_path: Path, capacity: int) -> None:
    scene = Scene(tmp_path, capacity)
    per_segment = -(-capacity // 32)
    most_items, most_bytes = capacity + per_segment, 0
    for number in range(10 * capacity):
        scene.append([number])
        if number % per_segment == 0:
            scene.settle()
            most_bytes = max(most_bytes, directory_bytes(tmp_path))
    scene.settle()
    assert most_bytes <= most_items * (8 + 106) + len(scene.segments) * len(MAGIC) + len(MAGIC)
    assert sum(int(path.stem.split("-")[2]) for path in scene.segments) < most_items
    scene.log.close()
    assert scene.restored() == list(range(9 * capacity, 10 * capacity))


def test_lives_too_short_for_a_segment_do_not_pile_up_files(tmp_path: Path) -> None:
    scene = Scene(tmp_path, capacity=32)
    for number in range(200):
        scene.restart()
        scene.append([number])
        scene.log.close()
    assert len(scene.segments) == 32
    assert scene.restored() == list(range(168, 200))


def test_every_byte_is_written_once_with_little_besides(scene: Scene) -> None:
    scene.append(range(CAPACITY), size=2000)
    scene.log.close()
    payload = sum(len(item(number, 2000)) for number in range(CAPACITY))
    assert payload < directory_bytes(scene.directory) < 1.01 * payload


# --- disks that are no help -----------------------------------------------------------------------


def test_a_full_disk_is_counted_and_told_and_when_there_is_room_again_it_goes_on(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.append(range(20))
    scene.settle()
    with full_disk(room_bytes=500):
        scene.append(range(20, 45))
        scene.settle()
    assert scene.log.num_lost == 20
    (line, *_) = told(caplog, "replay_log_failed")
    assert line["lost"] == 10
    assert "File too large" in str(line["reason"])
    assert [path.name for path in scene.directory.iterdir() if path.suffix != ".replay"] == []
    scene.append(range(45, 50))
    scene.log.close()
    assert scene.log.num_lost == 20
    assert scene.restored() == [*range(20), *range(40, 50)]


def test_a_directory_that_cannot_be_made_is_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("a file where a directory should be")
    scene = Scene(tmp_path / "run" / "replay")
    assert list(scene.log.restore().items) == []
    scene.append(range(10))
    scene.settle()
    assert scene.log.num_lost == 10
    assert "Not a directory" in str(told(caplog, "replay_log_failed")[0]["reason"])
    (tmp_path / "run").unlink()
    scene.append(range(10, 20))
    scene.log.close()
    assert scene.restored() == list(range(10, 20))


def test_a_read_only_directory_is_counted_and_what_it_holds_still_comes_back(scene: Scene) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is read-only for root")
    scene.append(range(10))
    scene.settle()
    scene.directory.chmod(0o555)
    try:
        scene.restart()
        scene.append(range(10, 20))
        scene.settle()
        assert scene.log.num_lost == 10
        assert scene.restored() == list(range(10))
    finally:
        scene.directory.chmod(0o755)


def test_a_directory_that_disappears_is_made_again(scene: Scene) -> None:
    scene.append(range(10))
    scene.settle()
    shutil.rmtree(scene.directory)
    scene.append(range(10, 20))
    scene.log.close()
    assert scene.restored() == list(range(10, 20))


class StuckDisk:
    """A pipe in place of the temporary file: its writer waits until somebody reads, and then fails."""

    def __init__(self, scene: Scene) -> None:
        scene.directory.mkdir(parents=True)
        self._path = scene.directory / "segment.tmp"
        os.mkfifo(self._path)

    def release(self) -> None:
        self._path.open("rb").close()


def test_a_slow_disk_never_holds_up_who_appends_and_takes_bounded_memory(scene: Scene) -> None:
    disk = StuckDisk(scene)
    for number in range(10 * CAPACITY):
        scene.log.append(item(number))  # would never return if it waited
    kept = MAX_WAITING * PER_SEGMENT
    assert scene.log.num_lost == 10 * CAPACITY - kept
    disk.release()
    scene.settle()
    scene.append(range(10 * CAPACITY, 10 * CAPACITY + 10))
    scene.log.close()
    # The first one ran into the pipe. The others waited behind it.
    assert scene.log.num_lost == 10 * CAPACITY - kept + PER_SEGMENT
    assert scene.restored() == [*range(10, 40), *range(10 * CAPACITY, 10 * CAPACITY + 10)]


def test_a_close_does_not_wait_for_a_stuck_disk_and_counts_what_it_leaves_behind(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    disk = StuckDisk(scene)
    for number in range(25):
        scene.log.append(item(number))
    closed = threading.Event()

    def close() -> None:
        scene.log.close(timeout_s=0.05)
        closed.set()

    threading.Thread(target=close, daemon=True).start()
    assert closed.wait(5.0)
    assert scene.log.num_lost == 25
    assert told(caplog, "replay_log_failed")[0]["reason"] == "not written within 0.05 s"
    disk.release()
    scene.settle()
