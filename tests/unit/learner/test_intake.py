"""What the intake lets in, what it refuses and counts, and how it pushes back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import msgpack
import pytest

from services.learner.intake import MAX_TRACKED_ACTORS, Freshness, Intake, RolloutQueue, SequenceTracker
from services.ops.metrics import INVALID_REASONS
from services.wire.codec import encode
from services.wire.messages import PROTOCOL_VERSION, Buffer, Client, Episode, Goodbye, Rollout
from services.wire.sockets import RolloutReceiver
from tests.unit.learner.rollouts import EXPECTED, RUN, Counts, rollout, sent, sequences

DEADLINE_S = 10.0
NUM_TASKS = 3


class FakeReceiver:
    """A socket that holds these messages; says when it was asked in vain."""

    def __init__(self, messages: Sequence[list[Buffer]]) -> None:
        self.waiting: queue.SimpleQueue[list[Buffer]] = queue.SimpleQueue()
        for message in messages:
            self.waiting.put(message)
        self.empty = threading.Event()

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        try:
            return self.waiting.get(timeout=0.001)
        except queue.Empty:
            self.empty.set()
            return None


class SmallQueue(RolloutQueue):
    """Says when somebody found it full."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.found_full = threading.Event()

    def put(self, rollout: Rollout, timeout_s: float) -> bool:
        accepted = super().put(rollout, 0.001)
        if not accepted:
            self.found_full.set()
        return accepted


class Scene:
    """An intake between a fake socket and a queue."""

    def __init__(
        self, messages: Sequence[list[Buffer]] = (), *, capacity: int = 100, max_policy_lag: int = 20
    ) -> None:
        self.version = 0
        self.counts = Counts()
        self.receiver = FakeReceiver(messages)
        self.queue = SmallQueue(capacity)
        self.episodes: list[tuple[int, Episode]] = []
        """With the task of each."""
        self.stopping = threading.Event()
        self.freshness = Freshness(lambda: self.version, lambda: max_policy_lag)
        self.intake = Intake(
            receiver=cast(RolloutReceiver, self.receiver),
            expected=replace(EXPECTED, num_tasks=NUM_TASKS),
            queue=self.queue,
            freshness=self.freshness,
            on_episode=lambda task, episode: self.episodes.append((task, episode)),
            metrics=self.counts.metrics,
            stopping=self.stopping,
        )

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self.intake.run, daemon=True)
        thread.start()
        return thread

    def stop(self, thread: threading.Thread) -> None:
        self.stopping.set()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


# --- the queue ------------------------------------------------------------------------------------


def test_the_queue_gives_back_the_oldest_first() -> None:
    waiting = RolloutQueue(4)
    for sequence in range(4):
        assert waiting.put(rollout(sequence), 0.0)
    assert [taken.sequence for taken in waiting.take(3, 0.0)] == [0, 1, 2]
    assert sequences(waiting) == [3]


def test_the_queue_takes_as_many_as_its_capacity_and_not_one_more() -> None:
    waiting = RolloutQueue(2)
    assert waiting.put(rollout(0), 0.0)
    assert waiting.put(rollout(1), 0.0)
    assert not waiting.put(rollout(2), 0.0)
    assert sequences(waiting) == [0, 1]


def test_the_queue_gives_a_whole_batch_or_nothing() -> None:
    waiting = RolloutQueue(4)
    waiting.put(rollout(0), 0.0)
    waiting.put(rollout(1), 0.0)
    assert waiting.take(3, 0.0) == []
    assert len(waiting) == 2
    waiting.put(rollout(2), 0.0)
    assert len(waiting.take(3, 0.0)) == 3


def test_who_waits_for_a_batch_is_woken_by_its_last_rollout() -> None:
    waiting = RolloutQueue(4)
    taken: list[Rollout] = []
    thread = threading.Thread(target=lambda: taken.extend(waiting.take(2, DEADLINE_S)))
    thread.start()
    waiting.put(rollout(0), 0.0)
    waiting.put(rollout(1), 0.0)
    thread.join(DEADLINE_S)
    assert [each.sequence for each in taken] == [0, 1]


def test_who_has_given_up_on_a_large_batch_is_woken_by_a_smaller_one() -> None:
    queue = RolloutQueue(100)
    assert queue.take(10, 0.0) == []
    taken: list[list[Rollout]] = []
    taker = threading.Thread(target=lambda: taken.append(queue.take(2, DEADLINE_S)))
    taker.start()
    for sequence in (1, 2):
        queue.put(rollout(sequence), DEADLINE_S)
    taker.join(DEADLINE_S)
    assert [each.sequence for each in taken[0]] == [1, 2]
    assert queue.take(1, 0.0) == []


def test_who_waits_for_room_is_woken_by_a_taken_batch() -> None:
    waiting = RolloutQueue(1)
    waiting.put(rollout(0), 0.0)
    accepted: list[bool] = []
    thread = threading.Thread(target=lambda: accepted.append(waiting.put(rollout(1), DEADLINE_S)))
    thread.start()
    assert len(waiting.take(1, DEADLINE_S)) == 1
    thread.join(DEADLINE_S)
    assert accepted == [True]
    assert sequences(waiting) == [1]


# --- what gets in ---------------------------------------------------------------------------------


def test_a_good_rollout_is_queued_and_its_fate_is_not_counted_yet() -> None:
    scene = Scene()
    frames = sent(rollout(3))
    scene.intake.take_in(frames)
    assert [scene.counts("rollouts_total", result=result) for result in ("ok", "stale", "invalid")] == [0] * 3
    assert scene.counts("queue_depth") == 1
    assert scene.counts("received_bytes_total") == sum(len(bytes(frame)) for frame in frames)
    assert sequences(scene.queue) == [3]


def test_rollouts_stay_compressed_in_the_queue() -> None:
    scene = Scene()
    message = rollout(0)
    scene.intake.take_in(sent(message))
    (taken,) = scene.queue.take(1, 0.0)
    assert bytes(taken.arrays["observation"].data) == bytes(message.arrays["observation"].data)


def test_episodes_are_passed_on_in_their_order() -> None:
    scene = Scene()
    ended = [Episode(episode_return=-1.0, length=9), Episode(episode_return=2.5, length=1)]
    scene.intake.take_in(sent(rollout(0, episodes=ended)))
    assert scene.episodes == [(0, ended[0]), (0, ended[1])]


def test_episodes_are_passed_on_with_the_task_of_their_rollout() -> None:
    scene = Scene()
    ended = Episode(episode_return=1.0, length=9)
    for task in (2, 0):
        scene.intake.take_in(sent(replace(rollout(0, episodes=[ended]), task=task)))
    assert scene.episodes == [(2, ended), (0, ended)]


def test_episodes_of_a_task_that_the_run_does_not_have_go_nowhere() -> None:
    scene = Scene()
    ended = Episode(episode_return=1.0, length=9)
    scene.intake.take_in(sent(replace(rollout(0, episodes=[ended]), task=NUM_TASKS)))
    assert scene.counts("invalid_rollouts_total", reason="schema") == 1
    assert (len(scene.queue), scene.episodes) == (0, [])


def test_episodes_of_a_stale_rollout_still_count() -> None:
    scene = Scene(max_policy_lag=1)
    scene.version = 9
    ended = [Episode(episode_return=1.0, length=9)]
    scene.intake.take_in(sent(rollout(0, version=0, episodes=ended)))
    assert (len(scene.queue), scene.episodes) == (0, [(0, ended[0])])


# --- what is refused ------------------------------------------------------------------------------


def _other_protocol(frames: list[Buffer]) -> list[Buffer]:
    header = msgpack.unpackb(frames[0])
    return [msgpack.packb([PROTOCOL_VERSION + 1, *header[1:]]), *frames[1:]]


def _other_run(frames: list[Buffer]) -> list[Buffer]:
    version, kind, fields = msgpack.unpackb(frames[0])
    return [msgpack.packb([version, kind, ["another", *fields[1:]]]), *frames[1:]]


BAD: dict[str, Callable[[list[Buffer]], list[Buffer]]] = {
    "malformed": lambda frames: [b"\xc1 not msgpack", *frames[1:]],
    "protocol": _other_protocol,
    "run": _other_run,
    "oversized": lambda frames: [*frames, bytes(EXPECTED.max_message_bytes)],
    "schema": lambda frames: frames[:-1],
    "corrupt": lambda frames: [*frames[:-1], bytes(frames[-1])[:-1]],
}


def test_there_is_an_example_of_every_reason() -> None:
    assert set(BAD) == set(INVALID_REASONS)


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_message_is_counted_by_its_reason_and_goes_nowhere(reason: str) -> None:
    scene = Scene()
    scene.intake.take_in(BAD[reason](sent(rollout(0))))
    assert {r: scene.counts("invalid_rollouts_total", reason=r) for r in INVALID_REASONS} == {
        r: float(r == reason) for r in INVALID_REASONS
    }
    assert scene.counts("rollouts_total", result="invalid") == 1
    assert (len(scene.queue), scene.episodes) == (0, [])


def test_a_valid_message_of_another_kind_is_malformed_here() -> None:
    scene = Scene()
    scene.intake.take_in(encode(Goodbye(run_id=RUN, sender=Client(client_id="x", incarnation=1))))
    assert scene.counts("invalid_rollouts_total", reason="malformed") == 1


def test_an_empty_message_is_malformed() -> None:
    scene = Scene()
    scene.intake.take_in([])
    assert scene.counts("invalid_rollouts_total", reason="malformed") == 1


def test_good_rollouts_get_in_between_bad_ones() -> None:
    scene = Scene([message for bad in BAD.values() for message in (bad(sent(rollout(0))), sent(rollout(1)))])
    thread = scene.start()
    assert scene.receiver.empty.wait(DEADLINE_S)
    scene.stop(thread)
    assert scene.counts("rollouts_total", result="invalid") == len(BAD)
    assert len(scene.queue) == len(BAD)


# --- how old is too old ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lag", "stale"), [(0, False), (19, False), (20, False), (21, True), (1000, True), (-1, True)]
)
def test_a_rollout_too_old_or_of_a_lost_version_is_dropped_and_counted(lag: int, stale: bool) -> None:
    scene = Scene(max_policy_lag=20)
    scene.version = 1000
    scene.intake.take_in(sent(rollout(0, version=1000 - lag)))
    assert scene.counts("rollouts_total", result="stale") == stale
    assert len(scene.queue) == (not stale)
    assert scene.counts("rollouts_total", result="invalid") == 0


# --- what was lost --------------------------------------------------------------------------------


def _gaps(*arrivals: Rollout) -> list[int]:
    tracker = SequenceTracker()
    return [tracker.gap(arrival) for arrival in arrivals]


def test_nothing_is_missing_from_an_unbroken_sequence() -> None:
    assert _gaps(*(rollout(sequence) for sequence in range(5))) == [0] * 5


def test_a_gap_is_as_large_as_what_is_missing() -> None:
    assert _gaps(rollout(0), rollout(1), rollout(3), rollout(4), rollout(14)) == [0, 0, 1, 0, 9]


def test_the_first_rollout_that_a_learner_sees_is_no_gap() -> None:
    # A restarted learner meets actors in the midst of their sequences.
    assert _gaps(rollout(1000), rollout(1001)) == [0, 0]


def test_each_actor_has_its_own_sequence() -> None:
    assert _gaps(rollout(7, actor="a"), rollout(0, actor="b"), rollout(8, actor="a")) == [0, 0, 0]


def test_a_restarted_actor_begins_anew() -> None:
    assert _gaps(rollout(500), rollout(0, incarnation=2), rollout(1, incarnation=2)) == [0, 0, 0]


def test_what_a_restarted_actor_loses_is_counted() -> None:
    assert _gaps(rollout(500), rollout(0, incarnation=2), rollout(2, incarnation=2)) == [0, 0, 1]


def test_a_late_rollout_of_a_former_life_disturbs_nothing() -> None:
    arrivals = [rollout(0, incarnation=2), rollout(77, incarnation=1), rollout(1, incarnation=2)]
    assert _gaps(*arrivals) == [0, 0, 0]


def test_what_comes_late_over_an_old_connection_counts_nothing_twice() -> None:
    old, new = [rollout(5), rollout(6)], [rollout(9), rollout(10), rollout(11)]
    assert _gaps(rollout(4), new[0], old[0], new[1], old[1], new[2]) == [0, 4, 0, 0, 0, 0]


def test_the_tracker_forgets_the_actor_that_was_silent_longest_and_no_other() -> None:
    tracker = SequenceTracker()
    for number in range(MAX_TRACKED_ACTORS + 1):
        tracker.gap(_bare(f"actor-{number}", sequence=0))
    assert len(tracker._next) == MAX_TRACKED_ACTORS
    assert tracker.gap(_bare("actor-1", sequence=5)) == 4
    assert tracker.gap(_bare("actor-0", sequence=5)) == 0


def test_an_actor_that_is_heard_again_is_not_forgotten() -> None:
    tracker = SequenceTracker()
    for number in range(MAX_TRACKED_ACTORS):
        tracker.gap(_bare(f"actor-{number}", sequence=0))
    tracker.gap(_bare("actor-0", sequence=1))
    tracker.gap(_bare("newcomer", sequence=0))
    assert tracker.gap(_bare("actor-0", sequence=3)) == 1


def _bare(actor: str, sequence: int) -> Rollout:
    return Rollout(
        run_id=RUN,
        actor_id=actor,
        incarnation=1,
        sequence=sequence,
        policy_version=0,
        task=0,
        episodes=(),
        arrays={},
    )


def test_the_intake_counts_gaps_also_before_stale_rollouts() -> None:
    scene = Scene(max_policy_lag=1)
    scene.version = 100
    for sequence in (0, 3, 4):
        scene.intake.take_in(sent(rollout(sequence, version=0)))
    assert scene.counts("sequence_gaps_total") == 2


def test_what_was_lost_with_a_closed_connection_is_missing() -> None:
    # An actor that connects anew goes on with its numbers: see `wire.sockets.RolloutSender`.
    scene = Scene()
    for sequence in (10, 11, 15, 16):
        scene.intake.take_in(sent(rollout(sequence)))
    assert scene.counts("sequence_gaps_total") == 3


# --- backpressure and stopping --------------------------------------------------------------------


def test_a_full_queue_stops_the_reading_until_there_is_room() -> None:
    scene = Scene([sent(rollout(sequence)) for sequence in range(6)], capacity=2)
    thread = scene.start()
    assert scene.queue.found_full.wait(DEADLINE_S)
    # Two are queued and the third is in the intake's hand; the others are left where the actors feel them.
    assert scene.receiver.waiting.qsize() == 3
    assert len(scene.queue) == 2
    taken = [scene.queue.take(1, DEADLINE_S)[0].sequence for _ in range(6)]
    assert taken == [0, 1, 2, 3, 4, 5]
    scene.stop(thread)


def test_stopping_while_blocked_returns() -> None:
    scene = Scene([sent(rollout(sequence)) for sequence in range(3)], capacity=1)
    thread = scene.start()
    assert scene.queue.found_full.wait(DEADLINE_S)
    scene.stop(thread)
    assert sequences(scene.queue) == [0]


def test_stopping_while_nothing_arrives_returns() -> None:
    scene = Scene()
    thread = scene.start()
    assert scene.receiver.empty.wait(DEADLINE_S)
    scene.stop(thread)
