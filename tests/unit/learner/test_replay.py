"""Replay between the queue and the trainer: what a batch is made of, and what outlives a learner."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from services import config as configuration
from services.config import NetworkConfig
from services.learner import batch as batch_module
from services.learner.__main__ import make_replay
from services.learner.batch import Batch, Batcher, message_bytes, rollout_schema
from services.learner.intake import Freshness, RolloutQueue
from services.learner.replay import Replay
from services.learner.replay_log import MAX_WAITING, ReplayLog
from services.ops.metrics import ReplayMetrics
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.replay import ReplayMemory
from services.wire import codec
from services.wire.codec import Expected, WireError
from services.wire.messages import ArraySpec, Episode, PackedArray, Rollout
from tests.unit.learner.disk import full_disk
from tests.unit.learner.rollouts import RUN, Counts
from tests.unit.learner.waiting import until

DEADLINE_S = 60.0
T = 5
SPEC = EnvSpec(
    id="talking",
    observation_shape=(4, 6),
    observation_dtype="uint8",
    frame_stack=2,
    num_actions=3,
    frame_skip=1,
    instruction_length=4,
)
SCHEMA = rollout_schema(SPEC, Discrete(3), T, NetworkConfig(lstm=True, lstm_size=7))
"""With everything that a rollout can hold."""
NUM_TASKS = 4


def expected(schema: Mapping[str, ArraySpec] = SCHEMA, *, run: str = RUN, tasks: int = NUM_TASKS) -> Expected:
    return Expected(run_id=run, max_message_bytes=message_bytes(schema), schema=schema, num_tasks=tasks)


def arrays_of(number: int, schema: Mapping[str, ArraySpec] = SCHEMA) -> dict[str, np.ndarray[Any, Any]]:
    """Noise that only ``number`` decides, with the number itself as every reward."""
    rng = np.random.default_rng(number)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, spec in schema.items():
        if spec.dtype == "float32":
            arrays[name] = rng.standard_normal(spec.shape, np.float32)
        else:
            high = {"bool": 1, "uint8": 255}.get(spec.dtype, spec.high)
            assert high is not None
            arrays[name] = rng.integers(0, high + 1, spec.shape).astype(spec.dtype)
    arrays["reward"][:] = number
    return arrays


def rollout(number: int, *, version: int = 0, damaged: bool = False, tasks: int = NUM_TASKS) -> Rollout:
    packer = codec.Packer("zstd")
    arrays = {name: packer.pack(array) for name, array in arrays_of(number).items()}
    if damaged:  # passes the decoder, which never decompresses
        shape = arrays["observation"].shape
        arrays["observation"] = PackedArray(dtype="uint8", shape=shape, codec="zstd", data=b"not zstd")
    return Rollout(
        run_id=RUN,
        actor_id="actor-0",
        incarnation=1,
        sequence=number,
        policy_version=version,
        task=number % tasks,
        episodes=(Episode(episode_return=1.0, length=3),),
        arrays=arrays,
    )


class Scene:
    """A batcher with a replay memory behind it, not yet running."""

    def __init__(
        self,
        *,
        batch_size: int = 8,
        ratio: int = 3,
        capacity: int = 100,
        queue: int = 1000,
        log: ReplayLog | None = None,
        make: Callable[..., Replay] = Replay,
    ) -> None:
        self.version = 0
        self.counts = Counts()
        self.queue = RolloutQueue(queue)
        self.refused: list[WireError] = []
        self.stopping = threading.Event()
        self.memory = ReplayMemory(capacity, np.random.default_rng(1))
        self.replay = make(
            memory=self.memory,
            log=log,
            ratio=ratio,
            unroll_length=T,
            expected=expected(),
            metrics=ReplayMetrics(self.counts.registry),
        )
        self.batcher = Batcher(
            rollouts=self.queue,
            schema=SCHEMA,
            batch_size=batch_size,
            pinned=False,
            freshness=Freshness(lambda: self.version, lambda: 20),
            refuse=self.refused.append,
            metrics=self.counts.metrics,
            stopping=self.stopping,
            replay=self.replay,
        )
        self.thread = threading.Thread(target=self.batcher.run, daemon=True)

    def put(self, *rollouts: Rollout) -> None:
        for each in rollouts:
            assert self.queue.put(each, DEADLINE_S)

    def next(self) -> Batch:
        batch = self.batcher.next(DEADLINE_S)
        assert batch is not None, "no batch in time"
        return batch

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "POLL_S", 0.01)  # how long stopping takes


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    scene.thread.start()
    yield scene
    scene.stop()


def numbers(batch: Batch) -> list[int]:
    """Which rollouts are in it."""
    return [int(column[0]) for column in batch.reward]


# --- what a batch is made of ------------------------------------------------------------------------


def test_batches_are_fresh_until_enough_is_held_and_then_hold_the_configured_share(scene: Scene) -> None:
    scene.put(*(rollout(number) for number in range(12)))
    first = scene.next()
    assert numbers(first) == list(range(8))
    assert first.num_fresh == 8
    first.release()
    second = scene.next()
    assert second.num_fresh == 2
    assert numbers(second)[:2] == [8, 9], "fresh ones come first"
    assert len(set(numbers(second)[2:])) == 6
    assert set(numbers(second)[2:]) <= set(range(8))
    second.release()
    third = scene.next()
    assert numbers(third)[:2] == [10, 11]
    assert set(numbers(third)[2:]) <= set(range(10))


@pytest.mark.parametrize(("num_held", "num_fresh"), [(1, 8), (5, 8), (6, 2), (7, 2)])
def test_nothing_is_replayed_while_fewer_are_held_than_a_batch_replays(num_held: int, num_fresh: int) -> None:
    """As after a restart that found little on the disk."""
    scene = Scene()
    for number in range(num_held):
        scene.replay.remember(rollout(number))
    scene.put(*(rollout(number) for number in range(10, 18)))
    scene.thread.start()
    batch = scene.next()
    assert batch.num_fresh == num_fresh
    assert numbers(batch)[:num_fresh] == list(range(10, 10 + num_fresh))
    scene.stop()


@pytest.mark.parametrize(("batch_size", "ratio", "fresh"), [(8, 1, 4), (8, 7, 1), (32, 7, 4), (6, 2, 2)])
def test_of_each_batch_one_part_is_fresh_and_as_many_as_the_ratio_says_are_replayed(
    batch_size: int, ratio: int, fresh: int
) -> None:
    scene = Scene(batch_size=batch_size, ratio=ratio)
    scene.put(*(rollout(number) for number in range(batch_size + 3 * fresh)))
    scene.thread.start()
    first = scene.next()
    assert numbers(first) == list(range(batch_size))
    first.release()
    first_fresh = batch_size
    for _ in range(3):
        batch = scene.next()
        assert batch.num_fresh == fresh
        assert numbers(batch)[:fresh] == list(range(first_fresh, first_fresh + fresh))
        assert len(numbers(batch)) == batch_size
        batch.release()
        first_fresh += fresh
    scene.stop()


def test_a_batch_never_replays_what_is_fresh_in_it() -> None:
    """The memory holds just as many as a batch replays, so every one of them is in each batch."""
    scene = Scene(batch_size=4, ratio=1, capacity=4)
    scene.put(*(rollout(number) for number in range(4 + 2 * 50)))
    scene.thread.start()
    scene.next().release()
    replayed: set[int] = set()
    for batch_number in range(50):
        batch = scene.next()
        first = 4 + 2 * batch_number
        assert numbers(batch)[:2] == [first, first + 1]
        assert set(numbers(batch)[2:]) < set(range(first - 4, first)), "the newest four before it"
        replayed |= set(numbers(batch)[2:])
        batch.release()
    scene.stop()
    assert len(replayed) > 75, "nearly all are replayed while they are held"


def test_a_first_batch_that_is_larger_than_the_queue_fills_all_the_same() -> None:
    scene = Scene(queue=4)
    scene.thread.start()
    for number in range(8):
        scene.put(rollout(number))
    assert numbers(scene.next()) == list(range(8))
    scene.stop()


def test_rollouts_come_back_bit_for_bit_with_their_task_and_version(scene: Scene) -> None:
    assert {"initial_state", "last_action", "last_reward", "instruction"} < SCHEMA.keys()
    scene.put(*(rollout(number, version=number) for number in range(8)))
    scene.version = 8
    scene.put(*(rollout(number, version=8) for number in (8, 9)))
    scene.next().release()
    batch = scene.next()
    for column, number in enumerate(numbers(batch)):
        for name, original in arrays_of(number).items():
            trained = getattr(batch, name)[column].numpy()
            assert (trained.dtype, trained.shape) == (original.dtype, original.shape), name
            assert trained.tobytes() == original.tobytes(), f"{name} of rollout {number}"
        assert batch.tasks[column] == int(batch.task[column]) == number % NUM_TASKS
        assert batch.policy_versions[column] == min(number, 8)
    assert len({*batch.tasks}) > 1


def test_the_starts_of_replayed_columns_cut_the_batch_too(scene: Scene) -> None:
    scene.put(*(rollout(number) for number in range(10)))
    scene.next().release()
    batch = scene.next()
    starts = np.stack([arrays_of(number)["episode_start"] for number in numbers(batch)])
    first = SPEC.frame_stack - 1
    assert batch.cuts == tuple(t for t in range(1, T + 1) if starts[:, first + t].any())


def test_the_limit_of_the_policy_lag_is_not_for_replayed_rollouts(scene: Scene) -> None:
    scene.put(*(rollout(number, version=0) for number in range(8)))
    scene.next().release()
    scene.version = 1000
    scene.put(rollout(8, version=0), rollout(9, version=990), rollout(10, version=1000))
    batch = scene.next()
    assert numbers(batch)[:2] == [9, 10]
    assert batch.policy_versions == (990, 1000, 0, 0, 0, 0, 0, 0)
    assert scene.counts("rollouts_total", result="stale") == 1, "the fresh one"


def test_an_episode_is_not_told_again_when_its_rollout_is_replayed(scene: Scene) -> None:
    scene.put(*(rollout(number) for number in range(8)))
    scene.next()
    assert rollout(0).episodes
    assert [drawn.episodes for drawn in scene.replay.draw(8)] == [()] * 8


def test_what_is_held_is_counted_in_steps_and_bytes() -> None:
    scene = Scene(batch_size=2, ratio=1, capacity=5)
    for number in range(3):
        scene.replay.remember(rollout(number))
    assert scene.counts("replay_steps") == 3 * T
    size_bytes = scene.counts("replay_bytes")
    assert (
        size_bytes == scene.memory.size_bytes > 3 * codec.size_bytes([rollout(0).arrays["observation"].data])
    )
    for number in range(3, 9):
        scene.replay.remember(rollout(number))
    assert scene.counts("replay_steps") == 5 * T


def test_a_held_rollout_that_is_damaged_is_refused_and_another_one_replayed() -> None:
    scene = Scene(batch_size=4, ratio=3)
    for number in range(4):
        scene.replay.remember(rollout(number, damaged=number == 0))
    scene.put(*(rollout(number) for number in range(10, 20)))
    scene.thread.start()
    seen: set[int] = set()
    for number in range(10, 20):
        batch = scene.next()
        assert numbers(batch)[0] == number
        seen |= set(numbers(batch))
        batch.release()
    scene.stop()
    assert 0 not in seen
    assert {error.reason for error in scene.refused} == {"corrupt"}


def test_a_batcher_that_finds_nothing_but_damage_still_stops() -> None:
    scene = Scene(batch_size=4, ratio=3)
    for number in range(3):
        scene.replay.remember(rollout(number, damaged=True))
    scene.put(rollout(3))
    scene.thread.start()
    until(lambda: len(scene.refused) > 10, "it tries again and again")
    scene.stop()
    assert scene.batcher.next(0.0) is None


# --- its end ----------------------------------------------------------------------------------------


class Watched(Replay):
    """Writes down which thread called what."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.calls: list[tuple[str, int]] = []

    def remember(self, rollout: Rollout) -> None:
        self.calls.append(("remember", threading.get_ident()))
        super().remember(rollout)

    def draw(self, count: int) -> list[Rollout]:
        self.calls.append(("draw", threading.get_ident()))
        return super().draw(count)

    def close(self) -> None:
        self.calls.append(("close", threading.get_ident()))
        super().close()


def watched(scene: Scene) -> list[tuple[str, int]]:
    assert isinstance(scene.replay, Watched)
    return scene.replay.calls


def test_the_thread_that_owns_the_memory_closes_it_and_nobody_does_anything_with_it_after_that() -> None:
    scene = Scene(make=Watched)
    scene.put(*(rollout(number) for number in range(12)))
    scene.thread.start()
    for _ in range(3):
        scene.next().release()
    assert "close" not in dict(watched(scene))
    scene.stop()
    assert [name for name, _ in watched(scene)].count("close") == 1
    assert watched(scene)[-1][0] == "close"
    assert {thread for _, thread in watched(scene)} == {scene.thread.ident}


def test_a_batcher_that_fails_closes_it_too() -> None:
    class Broken(Watched):
        def share(self, batch_size: int) -> int:
            raise OSError("the end of the world")

    scene = Scene(make=Broken)
    with pytest.raises(OSError, match="end of the world"):
        scene.batcher.run()
    assert [name for name, _ in watched(scene)] == ["close"]


def test_everything_that_was_remembered_is_on_the_disk_once_the_batcher_has_stopped(tmp_path: Path) -> None:
    scene = Scene(log=ReplayLog(tmp_path, 100))
    scene.put(*(rollout(number) for number in range(10)))
    scene.thread.start()
    scene.next().release()
    scene.next()
    until(lambda: len(scene.memory) == 10)
    scene.stop()
    restored = Scene(log=ReplayLog(tmp_path, 100))
    restored.replay.restore()
    assert held(restored) == list(range(10))


# --- after a restart --------------------------------------------------------------------------------


def held(scene: Scene) -> list[int]:
    return sorted(drawn.sequence for drawn in scene.replay.draw(len(scene.memory)))


def written(directory: Path, *rollouts: Rollout, capacity: int = 100) -> None:
    """A life of a learner that takes these and stops in order."""
    log = ReplayLog(directory, capacity)
    scene = Scene(log=log, capacity=capacity)
    for each in rollouts:
        until(lambda: len(log._waiting) < MAX_WAITING, "the disk keeps up")
        scene.replay.remember(each)
    scene.replay.close()


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, object]]:
    records = [record for record in caplog.records if record.getMessage() == event]
    return [record.__dict__["fields"] for record in records]


def test_a_restarted_learner_replays_from_its_first_batch_on_bit_for_bit(tmp_path: Path) -> None:
    written(tmp_path, *(rollout(number, version=number) for number in range(20)))
    scene = Scene(log=ReplayLog(tmp_path, 100))
    scene.replay.restore()
    assert scene.counts("replay_steps") == 20 * T
    assert scene.counts("replay_bytes") == scene.memory.size_bytes
    scene.version = 30
    scene.put(rollout(30, version=30), rollout(31, version=30))
    scene.thread.start()
    batch = scene.next()
    assert batch.num_fresh == 2
    for column, number in enumerate(numbers(batch)):
        assert number in (30, 31) if column < 2 else number < 20
        for name, original in arrays_of(number).items():
            assert getattr(batch, name)[column].numpy().tobytes() == original.tobytes()
    scene.stop()


@pytest.mark.parametrize("num_rollouts", [10, 100, 130])
def test_a_restarted_learner_draws_what_it_would_have_drawn(tmp_path: Path, num_rollouts: int) -> None:
    """Also where the ring of the first one has begun its second round."""
    first = Scene(log=ReplayLog(tmp_path, 100))
    for number in range(num_rollouts):
        until(lambda: first.replay._replay_log and len(first.replay._replay_log._waiting) < MAX_WAITING)
        first.replay.draw(min(number, 3))
        first.replay.remember(rollout(number))
    first.replay.close()
    restarted = Scene(log=ReplayLog(tmp_path, 100))
    restarted.replay.restore()
    wanted = [drawn.sequence for _ in range(20) for drawn in first.replay.draw(5)]
    assert [drawn.sequence for _ in range(20) for drawn in restarted.replay.draw(5)] == wanted


def test_a_restarted_learner_that_finds_no_state_draws_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(
        tmp_path, *(rollout(number) for number in range(12)), capacity=320
    )  # one segment of ten and of two
    newest = sorted(tmp_path.glob("*.replay"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    restarted, fresh = Scene(log=ReplayLog(tmp_path, 320)), Scene()
    with caplog.at_level(logging.WARNING):
        restarted.replay.restore()
    assert len(told(caplog, "replay_draws_anew")) == 1
    for number in range(12):
        fresh.replay.remember(rollout(number))
    assert [d.sequence for d in restarted.replay.draw(12)] == [d.sequence for d in fresh.replay.draw(12)]


def test_a_damaged_segment_costs_what_is_damaged_and_the_learner_goes_on(tmp_path: Path) -> None:
    written(tmp_path, *(rollout(number) for number in range(12)), capacity=128)  # three segments of 4
    segments = sorted(tmp_path.glob("*.replay"))
    assert len(segments) == 3
    segments[1].write_bytes(b"x" * segments[1].stat().st_size)
    state = ReplayLog(tmp_path, 128).restore().draws
    segments[2].write_bytes(segments[2].read_bytes()[: -len(state) - 8 - 10])
    scene = Scene(log=ReplayLog(tmp_path, 128))
    scene.replay.restore()
    assert held(scene) == [0, 1, 2, 3, 8, 9, 10]
    scene.put(rollout(20), rollout(21))
    scene.thread.start()
    assert numbers(scene.next())[:2] == [20, 21]
    scene.stop()


OTHER_SHAPES = rollout_schema(SPEC, Discrete(3), T + 1, NetworkConfig(lstm=True, lstm_size=7))
FEED_FORWARD = rollout_schema(SPEC, Discrete(3), T)


@pytest.mark.parametrize(
    "now",
    [
        pytest.param(expected(OTHER_SHAPES), id="another unroll length"),
        pytest.param(expected(FEED_FORWARD), id="no memory"),
        pytest.param(expected(run="another"), id="another run"),
    ],
)
def test_a_log_of_something_else_is_left_out_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, now: Expected
) -> None:
    written(tmp_path, *(rollout(number) for number in range(12)))
    scene = Scene(log=ReplayLog(tmp_path, 100))
    scene.replay._expected = now
    with caplog.at_level(logging.WARNING):
        scene.replay.restore()
    assert len(scene.memory) == 0
    (line,) = told(caplog, "replay_left_out")
    assert line["rollouts"] == 12
    assert len(caplog.records) == 1
    assert scene.replay.share(8) == 0


def test_rollouts_of_tasks_that_the_run_has_no_more_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, *(rollout(number) for number in range(12)))
    scene = Scene(log=ReplayLog(tmp_path, 100))
    scene.replay._expected = expected(tasks=3)
    with caplog.at_level(logging.WARNING):
        scene.replay.restore()
    assert held(scene) == [number for number in range(12) if number % 4 < 3]
    assert [line["rollouts"] for line in told(caplog, "replay_left_out")] == [3]


def test_what_the_disk_does_not_take_is_counted(tmp_path: Path) -> None:
    log = ReplayLog(tmp_path, 32)  # one to a segment
    scene = Scene(log=log, capacity=32)
    assert scene.counts("replay_log_lost_total") == 0
    with full_disk(room_bytes=0):
        scene.replay.remember(rollout(0))
        until(lambda: log.num_lost == 1 and log._writer is None)
        scene.replay._count()  # the next one may be lost before it is remembered
        assert scene.counts("replay_log_lost_total") == 1
        scene.replay.remember(rollout(1))
        until(lambda: log.num_lost == 2 and log._writer is None)
    for number in (2, 3):
        scene.replay.remember(rollout(number))
        until(lambda: log._writer is None)
    assert scene.counts("replay_log_lost_total") == 2
    assert len(scene.memory) == 4, "the memory has them all the same"


# --- as the pod builds it ---------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_pod_counts_its_capacity_in_steps_and_writes_only_if_asked_to(
    tmp_path: Path, checkpoint: bool
) -> None:
    config = configuration.validate(
        {
            "run_dir": str(tmp_path / "run"),
            "unroll_length": T,
            "batch_size": 8,
            "replay": {"ratio": 3, "capacity": 64, "checkpoint": checkpoint},
        }
    )
    registry = CollectorRegistry()
    for life in range(2):
        metrics = ReplayMetrics(registry if life == 0 else CollectorRegistry())
        replay = make_replay(config, "learner-3", expected(), metrics)
        for number in range(20 * life, 20 * life + 20):
            replay.remember(rollout(number))
        replay.close()
    assert registry.get_sample_value("impala_learner_replay_capacity") == 60, "twelve whole rollouts"
    assert registry.get_sample_value("impala_learner_replay_steps") == 60
    segments = list((tmp_path / "run").rglob("*.replay"))
    assert {segment.parent for segment in segments} == (
        {tmp_path / "run" / "replay" / "learner-3"} if checkpoint else set()
    )
    again = make_replay(config, "learner-3", expected(), ReplayMetrics(CollectorRegistry()))
    assert again.share(8) == (6 if checkpoint else 0)
