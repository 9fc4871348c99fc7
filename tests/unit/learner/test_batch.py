"""The road of a rollout from the actor's arrays to the learner's batch, and the two buffers it ends in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from services.config import EnvConfig
from services.learner import batch as batch_module
from services.learner.batch import NUM_SLOTS, Batch, Batcher, message_bytes, rollout_schema
from services.learner.intake import Freshness, RolloutQueue
from services.rl.actions import Discrete
from services.rl.envs import env_spec
from services.wire.codec import Codec, Expected, Packer, WireError, decode, encode, size_bytes
from services.wire.messages import Episode, Rollout
from tests.unit.learner.rollouts import ARRAYS, RUN, SCHEMA, Counts, corrupt, play, rollout

DEADLINE_S = 10.0


class Scene:
    """A batcher, not yet running, behind a queue."""

    def __init__(
        self,
        *,
        schema: dict[str, Any] | None = None,
        batch_size: int = 2,
        capacity: int = 100,
        max_policy_lag: int = 20,
    ) -> None:
        self.version = 0
        self.counts = Counts()
        self.queue = RolloutQueue(capacity)
        self.refused: list[WireError] = []
        self.stopping = threading.Event()
        self.batcher = Batcher(
            rollouts=self.queue,
            schema=schema or SCHEMA,
            batch_size=batch_size,
            pinned=False,
            freshness=Freshness(lambda: self.version, lambda: max_policy_lag),
            refuse=self.refused.append,
            metrics=self.counts.metrics,
            stopping=self.stopping,
        )
        self.thread = threading.Thread(target=self.batcher.run, daemon=True)

    def put(self, *rollouts: Rollout) -> None:
        for each in rollouts:
            assert self.queue.put(each, 0.0)

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


def numbers(batch: Batch) -> list[float]:
    """Which rollouts are in the batch: each fills its rewards with its sequence number."""
    return [float(column[0]) for column in batch.reward]


# --- from the actor's memory to the learner's ------------------------------------------------------


PIXELS: dict[str, str | int | float | bool | None] = {"pixels": True}
ENVS = {
    "vectors": EnvConfig(id="catch"),
    "images": EnvConfig(id="catch", kwargs=PIXELS),
    "small images, deep stack": EnvConfig(
        id="catch", kwargs=PIXELS, frame_height=16, frame_width=20, frame_stack=6
    ),
    "memory": EnvConfig(id="recall"),
}


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("unroll_length", [1, 20])
@pytest.mark.parametrize("env", ENVS)
def test_what_the_actor_packs_is_what_the_learner_trains_on_bit_for_bit(
    env: str, unroll_length: int, codec: Codec
) -> None:
    config = ENVS[env]
    spec = env_spec(config)
    schema = rollout_schema(spec, Discrete(spec.num_actions), unroll_length)
    expected = Expected(run_id=RUN, max_message_bytes=message_bytes(schema), schema=schema)
    unrolls = play(config, unroll_length, num_unrolls=3, codec=codec)
    scene = Scene(schema=schema, batch_size=len(unrolls))
    for sequence, unroll in enumerate(unrolls):
        message = Rollout(
            run_id=RUN,
            actor_id="actor-0",
            incarnation=1,
            sequence=sequence,
            policy_version=0,
            task=0,
            episodes=unroll.episodes,
            arrays=unroll.packed,
        )
        arrived = decode([bytes(frame) for frame in encode(message)], expected)
        assert isinstance(arrived, Rollout)
        assert arrived.episodes == unroll.episodes
        scene.put(arrived)
    scene.thread.start()
    batch = scene.next()
    for column, unroll in enumerate(unrolls):
        for name in ARRAYS:
            trained = getattr(batch, name)[column].numpy()
            sent = unroll.arrays[name]
            assert (trained.dtype, trained.shape) == (sent.dtype, sent.shape)
            assert trained.tobytes() == sent.tobytes(), f"{name} of rollout {column}"
    scene.stop()


def test_the_schema_lists_exactly_the_arrays_of_a_batch() -> None:
    assert tuple(SCHEMA) == ARRAYS


@pytest.mark.parametrize(("action", "allowed"), [(-1, False), (0, True), (2, True), (3, False)])
def test_actions_outside_the_environments_range_are_not_let_in(action: int, allowed: bool) -> None:
    expected = Expected(run_id=RUN, max_message_bytes=message_bytes(SCHEMA), schema=SCHEMA)
    message = rollout(0)
    actions = Packer("none").pack(np.full(SCHEMA["action"].shape, action, np.int32))
    frames = encode(replace(message, arrays={**message.arrays, "action": actions}))
    if allowed:
        assert isinstance(decode(frames, expected), Rollout)
    else:
        with pytest.raises(WireError, match="action holds"):
            decode(frames, expected)


def test_the_largest_message_of_a_run_fits_its_bound() -> None:
    # Incompressible frames grow a little under compression; episodes and names go into the header.
    message = rollout(0, actor="a" * 256, episodes=[Episode(episode_return=1.5, length=10)] * 500)
    assert size_bytes(encode(message)) < message_bytes(SCHEMA)


# --- which rollouts get into a batch ---------------------------------------------------------------


def test_batches_hold_the_oldest_rollouts_in_their_order(scene: Scene) -> None:
    scene.put(*(rollout(sequence) for sequence in range(4)))
    assert numbers(scene.next()) == [0, 1]
    assert numbers(scene.next()) == [2, 3]


def test_there_is_no_batch_until_it_is_whole(scene: Scene) -> None:
    scene.put(rollout(0))
    assert scene.batcher.next(0.0) is None
    scene.put(rollout(1))
    assert numbers(scene.next()) == [0, 1]


def test_a_corrupt_rollout_is_refused_and_replaced_by_the_next_one(scene: Scene) -> None:
    scene.put(corrupt(7), rollout(1), rollout(2), rollout(3))
    batch = scene.next()
    assert numbers(batch) == [1, 2]
    assert [error.reason for error in scene.refused] == ["corrupt"]
    for column, sequence in enumerate((1, 2)):
        original = play_back(rollout(sequence))
        assert batch.observation[column].numpy().tobytes() == original.tobytes()


def test_any_number_of_corrupt_rollouts_is_replaced(scene: Scene) -> None:
    scene.put(rollout(0), *(corrupt(sequence) for sequence in range(1, 20)), rollout(20))
    assert numbers(scene.next()) == [0, 20]
    assert len(scene.refused) == 19


def play_back(message: Rollout) -> NDArray[Any]:
    """Its observations, by the other road: a decompressor of the test's own."""
    packed = message.arrays["observation"]
    data = zstandard.ZstdDecompressor().decompress(bytes(packed.data))
    return np.frombuffer(data, packed.dtype).reshape(packed.shape)


def test_rollouts_that_became_stale_in_the_queue_are_dropped_and_counted() -> None:
    scene = Scene(max_policy_lag=5)
    scene.put(*(rollout(sequence, version=sequence) for sequence in range(10)))
    scene.version = 10  # when they arrived it was 0
    scene.thread.start()
    batch = scene.next()
    assert numbers(batch) == [5, 6]
    assert batch.policy_versions == (5, 6)
    assert scene.counts("rollouts_total", result="stale") == 5
    # That batch will be trained on before the next one, which version 11 then uses: 11 - 6 is the limit.
    assert numbers(scene.next()) == [7, 8]
    scene.put(rollout(20, version=5), rollout(21, version=6))
    batch.release()
    assert numbers(scene.next()) == [9, 21]
    assert scene.counts("rollouts_total", result="stale") == 6
    scene.stop()


def test_a_batch_knows_which_version_acted_in_each_of_its_rollouts() -> None:
    scene = Scene()
    scene.version = 7
    scene.put(rollout(0, version=7), rollout(1, version=3))
    scene.thread.start()
    assert scene.next().policy_versions == (7, 3)
    scene.stop()


# --- whose memory it is ----------------------------------------------------------------------------


def test_the_batcher_waits_while_all_buffers_are_in_the_trainers_hands(scene: Scene) -> None:
    assert NUM_SLOTS == 2
    scene.put(*(rollout(sequence) for sequence in range(8)))
    first, second = scene.next(), scene.next()
    before = [[tensor.clone() for tensor in tensors(batch)] for batch in (first, second)]
    assert scene.batcher.next(0.1) is None  # longer than the batcher's own patience
    assert len(scene.queue) == 4
    for batch, copies in zip((first, second), before, strict=True):
        for tensor, copy in zip(tensors(batch), copies, strict=True):
            assert tensor.equal(copy)
    first.release()
    third = scene.next()
    assert numbers(third) == [4, 5]
    assert numbers(second) == [2, 3]
    second.release()
    assert numbers(scene.next()) == [6, 7]


def test_released_buffers_are_used_again(scene: Scene) -> None:
    scene.put(*(rollout(sequence) for sequence in range(12)))
    used = set()
    for _ in range(6):
        batch = scene.next()
        used.add(tuple(tensor.data_ptr() for tensor in tensors(batch)))
        batch.release()
    assert len(used) == NUM_SLOTS


def tensors(batch: Batch) -> list[Any]:
    return [getattr(batch, name) for name in ARRAYS]


# --- stopping --------------------------------------------------------------------------------------


def test_stopping_with_a_batch_half_full_returns_without_a_batch() -> None:
    scene = Scene()
    scene.put(rollout(0))
    scene.thread.start()
    scene.stop()
    assert scene.batcher.next(0.0) is None


def test_stopping_while_all_buffers_are_out_returns(scene: Scene) -> None:
    scene.put(*(rollout(sequence) for sequence in range(6)))
    scene.next()
    scene.next()
    scene.stop()
