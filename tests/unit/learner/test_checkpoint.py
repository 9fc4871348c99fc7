"""Checkpoints are whole or refused, the right ones are kept, and no disk stops the training."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from services.learner.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    read,
    to_host,
)
from tests.unit.learner.disk import full_disk
from tests.unit.learner.rollouts import Counts
from tests.unit.learner.waiting import until

DEADLINE_S = 10.0
WRITER = "learner-0"
LARGE = 50_000
"""Numbers in a state that no disk of a test has room for."""


def state(steps: int, size: int = 10) -> dict[str, Any]:
    """Like a trainer's: nested, with tensors and plain values."""
    return {
        "network": {"weight": torch.full((size,), float(steps)), "bias": torch.arange(3.0)},
        "optimiser": {"state": {0: {"square_avg": torch.full((size,), 0.5)}}, "param_groups": [{"lr": 0.1}]},
        "version": steps // 640,
        "steps": steps,
        "rng": torch.get_rng_state(),
    }


class Scene:
    """A store, and what it counts."""

    def __init__(self, directory: Path, keep: int = 3, writer: str = WRITER) -> None:
        self.directory = directory
        self.counts = Counts()
        self.store = CheckpointStore(directory, keep, self.counts.metrics, writer)

    def save(
        self, steps: int, *, mean_return: float | None = None, size: int = 10, wait: bool = True
    ) -> bool:
        begun = self.store.save(
            trainer=state(steps, size),
            episodes={"recent": [[1.0, 9]], "total": 1, "mean_return": mean_return},
            config={"seed": 1, "run_dir": "runs/x"},
            complete=False,
        )
        if wait:
            until(lambda: not self.store.busy)
        return begun

    def latest(self) -> Checkpoint | None:
        return self.store.latest(lambda checkpoint: None)

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def path(self, steps: int) -> Path:
        return self.directory / f"step-{steps:012d}.pt"

    def temporary(self, steps: int, writer: str = WRITER) -> Path:
        """Where a writer has what it has written so far."""
        return self.path(steps).with_suffix(f".{writer}.tmp")

    def best_steps(self) -> int:
        steps = read(self.directory / "best.pt").trainer["steps"]
        assert isinstance(steps, int)
        return steps

    def metric(self, name: str) -> float:
        value = self.counts.registry.get_sample_value(f"impala_checkpoint_{name}")
        assert value is not None
        return value


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "checkpoints")


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.getMessage() == "checkpoint_refused"]
    assert all(record.levelno == logging.ERROR for record in records)
    return [str(record.__dict__["fields"]["reason"]) for record in records]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


# --- writing and reading back ----------------------------------------------------------------------


def test_what_is_saved_is_read_back_exactly(scene: Scene) -> None:
    scene.save(1280, mean_return=2.5)
    checkpoint = scene.latest()
    assert checkpoint is not None
    assert checkpoint.path == scene.path(1280)
    assert same(dict(checkpoint.trainer), state(1280))
    assert checkpoint.episodes == {"recent": [[1.0, 9]], "total": 1, "mean_return": 2.5}
    assert checkpoint.config == {"seed": 1, "run_dir": "runs/x"}
    assert checkpoint.complete is False


def test_a_checkpoint_holds_nothing_that_runs_when_it_is_loaded(scene: Scene) -> None:
    scene.save(640)
    assert torch.load(scene.path(640), weights_only=True)["format"] == FORMAT


def test_without_checkpoints_there_is_nothing_to_continue_from(scene: Scene) -> None:
    assert scene.latest() is None
    scene.directory.mkdir()
    assert scene.latest() is None


def test_the_newest_is_the_one_with_the_most_steps(scene: Scene) -> None:
    for steps in (900, 1_000_000, 90_000):
        scene.save(steps)
    checkpoint = scene.latest()
    assert checkpoint is not None
    assert checkpoint.trainer["steps"] == 1_000_000


def test_the_time_of_the_newest_checkpoint_is_a_metric(scene: Scene) -> None:
    assert scene.metric("timestamp_seconds") == 0
    scene.save(640)
    written = scene.path(640).stat().st_mtime
    assert scene.metric("timestamp_seconds") == pytest.approx(written, abs=5)
    restarted = Scene(scene.directory)
    restarted.latest()
    assert restarted.metric("timestamp_seconds") == written


# --- which ones are kept ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_k_are_kept(tmp_path: Path, keep: int) -> None:
    scene = Scene(tmp_path, keep)
    for steps in (640, 1280, 1920, 2560, 3200):
        scene.save(steps)
    assert scene.names == [scene.path(steps).name for steps in (640, 1280, 1920, 2560, 3200)][-keep:]


def test_the_best_one_is_kept_beside_them_and_only_a_better_one_replaces_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path, keep=1)
    best = []
    for steps, mean_return in ((640, None), (1280, -5.0), (1920, 3.0), (2560, 3.0), (3200, 1.0)):
        scene.save(steps, mean_return=mean_return)
        path = scene.directory / "best.pt"
        best.append(read(path).trainer["steps"] if path.exists() else None)
    assert best == [None, 1280, 1920, 1920, 1920]


def test_a_restarted_learner_remembers_how_good_the_best_one_is(scene: Scene) -> None:
    scene.save(640, mean_return=7.0)
    restarted = Scene(scene.directory)
    restarted.latest()
    restarted.save(1280, mean_return=6.0)
    assert read(scene.directory / "best.pt").trainer["steps"] == 640
    restarted.save(1920, mean_return=8.0)
    assert read(scene.directory / "best.pt").trainer["steps"] == 1920


def test_a_damaged_best_one_is_refused_and_replaced(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.save(640, mean_return=7.0)
    best = scene.directory / "best.pt"
    best.write_bytes(best.read_bytes()[:-100])
    restarted = Scene(scene.directory)
    assert restarted.latest() is not None
    restarted.save(1280, mean_return=-1.0)
    (refusal,) = refusals(caplog)
    assert str(best) in refusal
    assert restarted.best_steps() == 1280


# --- files that cannot be trusted -------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_refused_by_name_and_the_one_before_it_is_used(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.save(640)
    scene.save(1280)
    newest = scene.path(1280)
    whole = newest.read_bytes()
    lengths = sorted({0, 1, 2, 4, 100, len(whole) // 2, *range(len(whole) - 30, len(whole))})
    for length in lengths:
        newest.write_bytes(whole[:length])
        caplog.clear()
        checkpoint = Scene(scene.directory).latest()
        assert checkpoint is not None, f"cut off at {length} of {len(whole)} bytes"
        assert checkpoint.path == scene.path(640)
        (reason,) = refusals(caplog)
        assert str(newest) in reason


def test_damage_anywhere_in_the_tensors_is_refused(scene: Scene) -> None:
    scene.save(640, size=1000)
    path = scene.path(640)
    whole = path.read_bytes()
    weights = torch.full((1000,), 640.0).numpy().tobytes()
    start = whole.index(weights)
    for at in range(start, start + len(weights), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            read(path)


def test_damage_anywhere_in_the_file_is_refused_or_without_effect(scene: Scene) -> None:
    scene.save(640)
    path = scene.path(640)
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(len(whole), size=rng.integers(1, 5)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            checkpoint = read(path)
        except CheckpointError:
            num_refused += 1
        else:
            assert same(dict(checkpoint.trainer), state(640))
    assert num_refused > 200


def test_garbage_is_refused(scene: Scene) -> None:
    scene.directory.mkdir()
    path = scene.path(640)
    rng = np.random.default_rng(6)
    for start in (b"", b"\x80\x02", b"PK\x03\x04", b"\x80\x02]q\x00."):  # pickles and zip files begin so
        for length in (0, 1, 10, 100, 5000):
            path.write_bytes(start + rng.bytes(length))
            with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
                read(path)


def test_a_directory_in_place_of_a_file_is_refused(scene: Scene) -> None:
    scene.path(640).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        read(scene.path(640))


class Dangerous:
    """What an attacker would put into a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_file_that_runs_code_when_it_is_loaded_is_refused_and_does_not_run(
    scene: Scene, tmp_path: Path
) -> None:
    scene.directory.mkdir()
    torch.save({"format": FORMAT, "payload": Dangerous(tmp_path / "ran")}, scene.path(640))
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        read(scene.path(640))
    assert not (tmp_path / "ran").exists()


WHOLE: dict[str, Any] = {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "trainer": {"steps": 1280},
    "episodes": {"mean_return": None},
    "config": {},
    "complete": False,
}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (torch.zeros(3), "not written by this program"),
        ({"model": {"weight": torch.zeros(3)}}, "not written by this program"),
        ([WHOLE], "not written by this program"),
        (WHOLE | {"format_version": FORMAT_VERSION + 1}, f"format {FORMAT_VERSION + 1}; allowed is"),
        (WHOLE | {"format_version": FORMAT_VERSION - 1}, f"format {FORMAT_VERSION - 1}; allowed is"),
        ({"format": FORMAT}, "format None; allowed is"),
        ({key: value for key, value in WHOLE.items() if key != "trainer"}, "has no trainer"),
        ({key: value for key, value in WHOLE.items() if key != "complete"}, "has no complete"),
    ],
)
def test_another_programs_or_formats_file_is_refused_by_name_and_the_one_before_it_is_used(
    scene: Scene, caplog: pytest.LogCaptureFixture, content: Any, why: str
) -> None:
    scene.save(640)
    torch.save(content, scene.path(1280))
    checkpoint = scene.latest()
    assert checkpoint is not None
    assert checkpoint.path == scene.path(640)
    (reason,) = refusals(caplog)
    assert str(scene.path(1280)) in reason
    assert why in reason


def test_what_the_trainer_does_not_accept_is_refused_and_the_one_before_it_is_used(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.save(640, size=10)
    scene.save(1280, size=11)
    network = torch.nn.Module()
    network.weight, network.bias = (torch.nn.Parameter(torch.zeros(size)) for size in (10, 3))

    def accept(checkpoint: Checkpoint) -> None:
        try:
            network.load_state_dict(checkpoint.trainer["network"])
        except RuntimeError as error:
            raise ValueError(f"checkpoint {checkpoint.path}: does not fit ({error})") from None

    checkpoint = scene.store.latest(accept)
    assert checkpoint is not None
    assert checkpoint.path == scene.path(640)
    assert str(scene.path(1280)) in refusals(caplog)[0]
    assert network.weight[0].item() == 640


def test_if_there_are_checkpoints_and_none_is_usable_a_person_has_to_decide(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for steps in (640, 1280):
        scene.save(steps)
        scene.path(steps).write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"step-000000001280\.pt.*no other.*move them away"):
        scene.latest()
    assert len(refusals(caplog)) == 2
    assert len(scene.names) == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_refused_files_are_not_deleted_and_push_no_good_one_out(tmp_path: Path, keep: int) -> None:
    scene = Scene(tmp_path, keep=3)
    for steps in (640, 12800, 19200):
        scene.save(steps)
    for steps in (12800, 19200):
        scene.path(steps).write_bytes(b"garbage")
    restarted = Scene(tmp_path, keep)
    assert restarted.latest() is not None
    restarted.save(1280)
    restarted.save(1920)
    good = [scene.path(steps).name for steps in (1280, 1920)][-keep:]
    assert restarted.names == [*good, scene.path(12800).name, scene.path(19200).name]


def test_a_refused_file_that_is_written_again_counts_like_any_other(tmp_path: Path) -> None:
    scene = Scene(tmp_path, keep=1)
    scene.save(640)
    scene.path(1280).write_bytes(b"garbage")
    scene.latest()
    scene.save(1280)
    assert scene.names == [scene.path(1280).name]
    scene.save(1920)
    assert scene.names == [scene.path(1920).name]


# --- disks that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("room_bytes", [0, 1, 4096, 100_000])
def test_a_full_disk_is_counted_and_leaves_the_old_checkpoint_and_nothing_else(
    scene: Scene, caplog: pytest.LogCaptureFixture, room_bytes: int
) -> None:
    scene.save(640, mean_return=1.0)
    before = {name: (scene.directory / name).read_bytes() for name in scene.names}
    with full_disk(room_bytes):
        assert scene.save(1280, mean_return=2.0, size=LARGE)
    assert scene.metric("failures_total") == 1
    assert {name: (scene.directory / name).read_bytes() for name in scene.names} == before
    failure = next(record for record in caplog.records if record.getMessage() == "checkpoint_failed")
    assert str(scene.path(1280)) in str(failure.__dict__["fields"])
    scene.save(1280, mean_return=2.0, size=LARGE)
    assert scene.metric("failures_total") == 1
    assert read(scene.path(1280)).trainer["network"]["weight"].shape == (LARGE,)
    assert read(scene.directory / "best.pt").trainer["steps"] == 1280


def test_a_disk_without_room_for_the_best_one_too_goes_on_taking_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path, keep=2)
    for steps in (640, 1280):
        scene.save(steps, mean_return=None)
    (tmp_path / f"best.{WRITER}.tmp").mkdir()  # nothing can be written there
    for steps in (1920, 2560):
        scene.save(steps, mean_return=5.0)
        assert (scene.store.saved_steps, scene.metric("timestamp_seconds") > 0) == (steps, True)
    assert [name for name in scene.names if name.startswith("step")] == [
        scene.path(steps).name for steps in (1920, 2560)
    ]
    assert scene.metric("failures_total") == 2, "and it is told that the best one is missing"
    failures = [record for record in caplog.records if record.getMessage() == "checkpoint_failed"]
    assert all(str(tmp_path / "best.pt") in str(record.__dict__["fields"]) for record in failures)
    (tmp_path / f"best.{WRITER}.tmp").rmdir()
    scene.save(3200, mean_return=5.0)
    assert scene.best_steps() == 3200


def test_who_keeps_fewer_than_before_makes_room_on_a_full_disk(tmp_path: Path) -> None:
    for steps in (640, 1280, 1920):
        Scene(tmp_path, keep=3).save(steps)
    fewer = Scene(tmp_path, keep=1)
    with full_disk(4096):
        fewer.save(2560, size=LARGE)
    assert fewer.names == [fewer.path(1920).name]
    assert fewer.metric("failures_total") == 1


def test_a_failure_in_the_background_is_counted_too(scene: Scene) -> None:
    with full_disk(4096):
        scene.save(640, size=LARGE, wait=False)
        until(lambda: not scene.store.busy)
        scene.save(1280, size=LARGE)
    assert scene.metric("failures_total") == 2
    assert scene.names == []


def test_a_directory_that_cannot_be_made_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    scene = Scene(tmp_path / "file" / "checkpoints")
    scene.save(640)
    assert scene.metric("failures_total") == 1


# --- several learners, one directory ----------------------------------------------------------------


def test_what_a_killed_learner_left_behind_is_removed_by_itself_and_by_nobody_else(scene: Scene) -> None:
    scene.save(640)
    scene.temporary(1280).write_bytes(b"half of it")
    scene.temporary(1280, "learner-10").write_bytes(b"half of it")
    (scene.directory / f"best.{WRITER}.tmp").write_bytes(b"half of it")
    for other in ("learner-1", "0", "tmp"):
        assert Scene(scene.directory, writer=other).latest() is not None
        assert len(scene.names) == 4
    assert Scene(scene.directory).latest() is not None
    assert scene.names == [scene.path(640).name, scene.temporary(1280, "learner-10").name]


def test_what_could_not_be_removed_is_removed_when_the_disk_takes_a_checkpoint_again(scene: Scene) -> None:
    scene.directory.mkdir()
    scene.temporary(640).write_bytes(b"half of it")
    scene.temporary(640, "learner-1").write_bytes(b"half of it")
    scene.save(1280)
    assert scene.names == [scene.temporary(640, "learner-1").name, scene.path(1280).name]


def test_a_learner_that_starts_leaves_alone_what_another_one_is_writing(scene: Scene) -> None:
    disk = SlowDisk(scene, 640)
    scene.save(640, wait=False)
    starting = Scene(scene.directory, writer="learner-1")
    assert starting.latest() is None
    starting.save(640)
    assert starting.metric("failures_total") == 0
    assert scene.names == [scene.temporary(640).name, scene.path(640).name]
    disk.read_all()
    until(lambda: not scene.store.busy)


@pytest.mark.parametrize("writer", ["a/b", "..", "a.b", "*"])
def test_any_name_of_a_learner_will_do(tmp_path: Path, writer: str) -> None:
    scene = Scene(tmp_path, writer=writer)
    scene.save(640)
    assert scene.names == [scene.path(640).name]
    assert scene.metric("failures_total") == 0


def test_a_checkpoint_that_the_leader_deletes_while_it_is_read_makes_room_for_a_newer_one(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    leader = Scene(scene.directory, keep=1)
    leader.save(640)
    tried = []

    def accept(checkpoint: Checkpoint) -> None:
        tried.append(checkpoint.trainer["steps"])
        if len(tried) == 1:
            leader.save(1280)
            raise ValueError("its file ended in the middle")

    checkpoint = scene.store.latest(accept)
    assert checkpoint is not None
    assert tried == [640, 1280]
    assert refusals(caplog) == []


def test_a_new_leader_knows_how_good_the_best_one_of_the_leader_before_it_is(scene: Scene) -> None:
    follower = Scene(scene.directory, writer="learner-1")
    follower.latest()
    scene.save(640, mean_return=7.0)
    follower.save(1280, mean_return=6.0)
    assert scene.best_steps() == 640
    follower.save(1920, mean_return=8.0)
    assert scene.best_steps() == 1920
    scene.save(2560, mean_return=7.5)
    assert scene.best_steps() == 1920


def test_leaders_that_delete_the_same_old_ones_have_not_failed(scene: Scene) -> None:
    class Forgetful(CheckpointStore):
        """Believes in a checkpoint that another one has just deleted."""

        def _usable(self) -> set[Path]:
            return super()._usable() | {scene.path(1)}

    store = Forgetful(scene.directory, 1, scene.counts.metrics, WRITER)
    store.save(trainer=state(640), episodes={"mean_return": None}, config={}, complete=False)
    until(lambda: not store.busy)
    assert (scene.metric("failures_total"), store.saved_steps) == (0, 640)


# --- beside the training ---------------------------------------------------------------------------


class SlowDisk:
    """A pipe in place of the temporary file: its writer waits until somebody reads."""

    def __init__(self, scene: Scene, steps: int) -> None:
        scene.directory.mkdir(exist_ok=True)
        self._path = scene.temporary(steps)
        os.mkfifo(self._path)

    def read_all(self) -> bytes:
        with self._path.open("rb") as pipe:
            return pipe.read()


def test_later_changes_of_the_weights_do_not_get_into_a_checkpoint_that_is_being_written(
    scene: Scene,
) -> None:
    disk = SlowDisk(scene, 640)
    training = state(640)
    scene.store.save(trainer=training, episodes={"mean_return": None}, config={}, complete=False)
    training["network"]["weight"].zero_()
    training["optimiser"]["state"][0]["square_avg"].zero_()
    training["version"] = 999
    written = torch.load(io.BytesIO(disk.read_all()), weights_only=True)["trainer"]
    assert same(written, state(640) | {"rng": training["rng"]})


def test_a_slow_disk_skips_checkpoints_instead_of_holding_up_the_training(scene: Scene) -> None:
    disk = SlowDisk(scene, 640)
    assert scene.save(640, wait=False)
    assert not scene.save(1280, wait=False)
    assert not scene.save(1920, wait=False)
    disk.read_all()
    until(lambda: not scene.store.busy)
    assert scene.save(2560)
    assert scene.names == [scene.path(2560).name]


def test_the_copy_is_deep_and_keeps_every_value() -> None:
    original: dict[str, Any] = {
        "a": torch.ones(2),
        "b": [torch.zeros(1), (torch.ones(1), 3)],
        "c": {"d": None, "e": "text"},
    }
    copy = to_host(original)
    assert copy["a"].equal(original["a"])
    assert copy["a"].data_ptr() != original["a"].data_ptr()
    assert isinstance(copy["b"][1], tuple)
    assert (copy["b"][1][1], copy["c"]) == (3, {"d": None, "e": "text"})
    assert copy["b"][1][0].data_ptr() != original["b"][1][0].data_ptr()
