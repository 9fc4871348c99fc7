"""An actor's sender deals to whoever has room, follows the learners, and numbers what it sends to each."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import zmq

from services.config import RunConfig
from services.wire import sockets
from services.wire.codec import size_bytes
from services.wire.keys import Keys, Role, public_of, secret_of
from services.wire.messages import Destination
from services.wire.security import Doorkeeper, Refused
from services.wire.sockets import LearnerConnection, Replier, Requester, RolloutReceiver, RolloutSender, wait
from tests.unit.learner.waiting import until
from tests.unit.wire.sending import stranger_to

LIMIT = 1 << 24
DEADLINE_S = 15.0
LARGE = bytes(1_000_000)
"""Of which no kernel buffer holds several."""
SEED = b"0123456789abcdef" * 3
STRANGE = b"fedcba9876543210" * 3


class Learners:
    """Receivers that read only when they are told to, and a sender that is to follow them."""

    def __init__(self, opened: ExitStack) -> None:
        self._opened = opened
        self.sender = opened.enter_context(RolloutSender(2, LIMIT))

    def start(self, endpoint: str = "tcp://127.0.0.1:*") -> RolloutReceiver:
        return self._opened.enter_context(RolloutReceiver(endpoint, 2, LIMIT))

    def follow(self, *receivers: RolloutReceiver, since: int = 1) -> None:
        self.sender.follow([to(receiver, since) for receiver in receivers])

    def with_room(self, patience_s: float) -> LearnerConnection | None:
        """None if nobody has room, twice in a row: once may be a machine that stands still."""
        return self.sender.choose(patience_s) or self.sender.choose(patience_s)

    def fill(self, patience_s: float = 1.5) -> int:
        """Send until nobody has had room for a while; how many were taken."""
        count = 0
        while (learner := self.with_room(patience_s)) is not None:
            count += number(learner)
            assert count < 100, "nothing holds the sender back"
        return count

    def sent_to(self, receiver: RolloutReceiver) -> int:
        """How many rollouts, while it is followed."""
        (sequence,) = (
            connection.sequence
            for connection in self.sender._connections
            if connection.destination.endpoint == receiver.endpoint
        )
        return sequence


def to(receiver: RolloutReceiver, since: int = 1) -> Destination:
    return Destination(endpoint=receiver.endpoint, since=since)


def number(learner: LearnerConnection) -> bool:
    """Send a large message that names its sequence number."""
    return learner.send([b"%d" % learner.sequence, LARGE])


def read(receiver: RolloutReceiver, timeout_s: float = DEADLINE_S) -> int | None:
    """The number of the next message."""
    frames = receiver.receive(timeout_s)
    return None if frames is None else int(bytes(frames[0]))


def read_all(receiver: RolloutReceiver, count: int) -> list[int | None]:
    """So many numbers, after which nothing more may come."""
    numbers = [read(receiver) for _ in range(count)]
    assert read(receiver, 0.2) is None
    return numbers


@pytest.fixture
def learners() -> Iterator[Learners]:
    with ExitStack() as opened:
        yield Learners(opened)


# --- dealing -----------------------------------------------------------------------------------------


def chosen(sender: RolloutSender) -> LearnerConnection:
    """Within the deadline."""
    learner = sender.choose(DEADLINE_S)
    assert learner is not None
    return learner


def all_connected(sender: RolloutSender, count: int) -> None:
    """Each of them is chosen, as long as nothing is sent."""
    until(lambda: len({chosen(sender) for _ in range(count)}) == count, "a connection to each")


def test_learners_with_room_take_turns(learners: Learners) -> None:
    receivers = [learners.start() for _ in range(3)]
    learners.follow(*receivers)
    all_connected(learners.sender, 3)
    endpoints = []
    for _ in range(6):  # as many as there is room for, however late it is that one leaves
        learner = chosen(learners.sender)
        assert learner.send([b"%d" % learner.sequence])
        endpoints.append(learner.destination.endpoint)
    assert endpoints[:3] == endpoints[3:]
    assert set(endpoints) == {receiver.endpoint for receiver in receivers}
    assert [[read(receiver) for _ in range(2)] for receiver in receivers] == [[0, 1]] * 3


def test_a_learner_without_room_is_passed_over(learners: Learners) -> None:
    full, free = learners.start(), learners.start()
    learners.follow(full)
    taken = learners.fill()
    learners.follow(full, free)
    for sequence in range(10):
        learner = chosen(learners.sender)
        assert learner.destination == to(free)
        assert number(learner)
        assert read(free) == sequence
    assert read_all(full, taken) == list(range(taken))


def test_without_learners_nothing_has_room(learners: Learners) -> None:
    assert learners.sender.choose(0.0) is None
    assert learners.sender.choose(0.05) is None
    assert learners.sender.trouble is None


def test_a_learner_that_is_not_there_has_no_room(learners: Learners, tmp_path: Path) -> None:
    learners.sender.follow([Destination(endpoint=f"ipc://{tmp_path}/nobody", since=1)])
    assert learners.sender.choose(0.1) is None


def test_who_waits_is_woken_by_the_first_learner_that_has_room(learners: Learners) -> None:
    receivers = [learners.start() for _ in range(3)]
    learners.follow(*receivers)
    learners.fill()
    found: list[LearnerConnection | None] = []
    waiting = threading.Thread(target=lambda: found.append(learners.sender.choose(60.0)))
    waiting.start()
    while waiting.is_alive():  # libzmq tells of room after some of them
        assert read(receivers[1]) is not None or not waiting.is_alive()
        waiting.join(0.1)
    assert found[0] is not None
    assert found[0].destination == to(receivers[1])


def test_a_rollout_is_not_numbered_until_it_is_sent(learners: Learners) -> None:
    receiver = learners.start()
    learners.follow(receiver)
    learner = chosen(learners.sender)
    assert chosen(learners.sender).sequence == learner.sequence == 0
    assert number(learner)
    assert learner.sequence == 1
    receiver.close()
    until(lambda: not learner.send([b"1"]), "the learner is gone")
    before = learner.sequence
    assert not learner.send([b"1"])
    assert learner.sequence == before


# --- following ---------------------------------------------------------------------------------------


def test_following_the_same_learners_changes_nothing(learners: Learners) -> None:
    receivers = [learners.start() for _ in range(2)]
    learners.follow(*receivers)
    taken = learners.fill()
    learners.follow(*receivers)
    learners.follow(*reversed(receivers))  # another rank is not another learner
    assert learners.sender.choose(0.2) is None
    counts = [learners.sent_to(receiver) for receiver in receivers]
    assert sum(counts) == taken
    for receiver, count in zip(receivers, counts, strict=True):
        assert read_all(receiver, count) == list(range(count))


def test_a_learner_that_comes_or_goes_disturbs_no_other(learners: Learners) -> None:
    stays, goes, comes = (learners.start() for _ in range(3))
    learners.follow(stays, goes)
    learners.fill(0.25)
    for others in ([goes, comes], [comes], [], [goes]):
        learners.follow(*others, stays)
        learners.fill(0.25)
    count = learners.sent_to(stays)
    assert read_all(stays, count) == list(range(count))
    assert count >= 2


def test_a_learner_that_is_gone_takes_nothing_any_more(learners: Learners) -> None:
    gone, there = learners.start(), learners.start()
    learners.follow(gone, there)
    all_connected(learners.sender, 2)
    learners.follow(there)
    for _ in range(4):
        learner = chosen(learners.sender)
        assert learner.destination == to(there)
        assert number(learner)
        assert read(there) is not None
    learners.follow()
    assert learners.sender.choose(0.1) is None
    assert read(gone, 0.2) is None


def test_what_is_lost_with_a_connection_shows_as_a_gap_at_the_learner(learners: Learners) -> None:
    receiver = learners.start()
    learners.follow(receiver)
    taken = learners.fill()
    learners.follow(receiver, since=2)
    learner = chosen(learners.sender)
    assert learner.sequence == taken
    assert number(learner)
    numbers: list[int] = []
    while taken not in numbers:
        sequence = read(receiver)
        assert sequence is not None
        numbers.append(sequence)
    while (sequence := read(receiver, 0.5)) is not None:
        numbers.append(sequence)
    before = sorted(set(numbers) - {taken})
    assert before == list(range(len(before))), "of the old connection the first ones arrive"
    assert len(before) <= taken, "and the last ones may still have been waiting here"


def test_each_learner_has_numbers_of_its_own_also_when_it_comes_back(learners: Learners) -> None:
    first, second = learners.start(), learners.start()
    for since, receiver, expected in ((1, first, [0, 1, 2]), (2, second, [0, 1]), (3, first, [3, 4])):
        learners.follow(receiver, since=since)
        for sequence in expected:
            assert number(chosen(learners.sender))
            assert read(receiver) == sequence


def test_the_newest_word_on_an_endpoint_counts(learners: Learners) -> None:
    receiver = learners.start()
    learners.sender.follow([to(receiver, 1), to(receiver, 2)])
    assert {chosen(learners.sender).destination for _ in range(3)} == {to(receiver, 2)}


@pytest.mark.parametrize(
    "unusable", ["", "tcp://no-port", "nonsense", "ipc://" + "x" * 300, "udp://127.0.0.1:1"]
)
def test_an_address_that_is_of_no_use_costs_only_its_learner(learners: Learners, unusable: str) -> None:
    receiver = learners.start()
    learners.sender.follow([Destination(endpoint=unusable, since=1), to(receiver)])
    assert number(chosen(learners.sender))
    assert read(receiver) == 0


def test_a_socket_that_could_not_be_had_is_asked_for_again(learners: Learners) -> None:
    receiver = learners.start()
    taken: list[zmq.Socket[bytes]] = []
    try:
        with contextlib.suppress(zmq.ZMQError):
            while True:
                taken.append(zmq.Context.instance().socket(zmq.PAIR))
        learners.follow(receiver)
        assert learners.sender.choose(0.0) is None
        with pytest.raises(OSError, match="Too many open files"):
            sockets.Requester("tcp://127.0.0.1:1", LIMIT)
    finally:
        for socket in taken:
            socket.close()

    def again() -> LearnerConnection | None:  # libzmq takes its time to take sockets apart
        learners.follow(receiver)
        return learners.sender.choose(0.1)

    assert number(until(again, "a socket"))
    assert read(receiver) == 0


def keys(role: Role, seed: bytes = SEED) -> Keys:
    public = {each: public_of(secret_of(seed, each)) for each in ("actor", "learner")}
    return Keys(role=role, secret=secret_of(seed, role), public=public)  # type: ignore[arg-type]


def test_a_learner_that_refuses_us_disturbs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "RECONNECT_MAX_MS", 100)  # how long before we try again
    refused: Counter[Refused] = Counter()
    stopping = threading.Event()
    with ExitStack() as opened:
        door = opened.enter_context(closing(Doorkeeper(keys("learner"), lambda why: refused.update([why]))))
        strict = opened.enter_context(RolloutReceiver("tcp://127.0.0.1:*", 2, LIMIT, door))
        thread = threading.Thread(target=door.run, args=(stopping,))
        thread.start()
        opened.callback(thread.join)
        opened.callback(stopping.set)
        friend = opened.enter_context(RolloutReceiver("tcp://127.0.0.1:*", 2, LIMIT))
        sender = opened.enter_context(RolloutSender(2, LIMIT))
        sender.follow([to(strict), to(friend)])  # without keys only the friend lets us in
        sent = 0
        while refused["handshake"] < 3:
            learner = sender.choose(0.1)
            if learner is not None:
                assert learner.destination == to(friend)
                sent += number(learner)
        assert sender.trouble is not None
        assert strict.endpoint in sender.trouble
        assert read_all(friend, sent) == list(range(sent))


# --- one frame --------------------------------------------------------------------------------------


def test_a_message_of_many_frames_arrives_as_it_was_sent(learners: Learners) -> None:
    receiver = learners.start()
    learners.follow(receiver)
    frames = [b"header", b"", LARGE, b"\0\1\2"]
    assert chosen(learners.sender).send(frames)
    received = receiver.receive(DEADLINE_S)
    assert received is not None
    assert [bytes(frame) for frame in received] == frames


def test_a_message_as_large_as_is_allowed_arrives_whole(learners: Learners) -> None:
    receiver = learners.start()
    learners.follow(receiver)
    frames = [bytes(LIMIT - 7), *[b"x"] * 7]
    assert chosen(learners.sender).send(frames)
    received = receiver.receive(DEADLINE_S)
    assert received is not None
    assert size_bytes(received) == LIMIT


@pytest.mark.parametrize(
    "strange", [[b""], [b"\0"], [b"garbage"], [b"\2\1\0\0\0\1\0\0\0x"], [b"several", b"frames"]]
)
def test_what_is_no_message_of_ours_is_given_to_the_decoder_as_it_came(
    learners: Learners, strange: list[bytes]
) -> None:
    receiver = learners.start()
    with stranger_to(receiver.endpoint) as stranger:
        stranger.send_multipart(strange)
        received = receiver.receive(DEADLINE_S)
    assert received is not None
    assert [bytes(frame) for frame in received] == strange


# --- waiting for one of several ----------------------------------------------------------------------


def test_who_has_more_to_send_is_woken_when_there_is_room_for_it(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    with Replier(endpoint, LIMIT) as server, Requester(endpoint, LIMIT) as client:
        assert client.send([LARGE], DEADLINE_S)
        while client.send([LARGE], 1.0):
            pass
        wait([client], 0.2)  # and nothing comes
        assert not client.send([LARGE], 0.0)
        reads = threading.Thread(target=lambda: all(iter(lambda: server.receive(1.0), None)))
        reads.start()
        began_s = time.monotonic()
        wait([client], DEADLINE_S, [client])
        assert time.monotonic() - began_s < DEADLINE_S
        assert client.send([LARGE], 0.0)
        reads.join()


# --- how much there may be under way ----------------------------------------------------------------


@pytest.mark.parametrize("num_learners", [1, 3])
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
@pytest.mark.parametrize(("size_bytes", "of_the_bound"), [(20_000, 0.2), (2_000, 1.0), (800, 2.0)])
def test_a_sender_whose_learners_read_nothing_is_held_back_where_the_lag_bound_says(
    learners: Learners,
    num_learners: int,
    transport: str,
    size_bytes: int,
    of_the_bound: float,
    tmp_path: Path,
) -> None:
    frames = [bytes(200), *[bytes((size_bytes - 200) // 6)] * 6]
    wire = RunConfig().wire
    endpoints = [
        f"ipc://{tmp_path}/{n}" if transport == "ipc" else "tcp://127.0.0.1:*" for n in range(num_learners)
    ]
    receivers = [learners.start(endpoint) for endpoint in endpoints]
    learners.follow(*receivers)
    all_connected(learners.sender, num_learners)
    sent: Counter[str] = Counter()
    while (learner := learners.with_room(0.3)) is not None:
        sent[learner.destination.endpoint] += learner.send(frames)
    assert len(sent) == num_learners
    for count in sent.values():
        assert wire.send_queue + wire.receive_queue <= count <= of_the_bound * wire.rollouts_per_connection
