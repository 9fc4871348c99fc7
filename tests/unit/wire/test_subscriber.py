"""Whoever plays always has the newest weights, and an actor its seat, whatever the parameter server does."""

from __future__ import annotations

import errno
import math
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.wire import subscriber as subscriber_module
from services.wire.codec import MAX_COUNT, encode
from services.wire.messages import (
    NO_GENERATION,
    NO_SEAT,
    NO_VERSION,
    Buffer,
    Client,
    Destination,
    Goodbye,
    Published,
    Pull,
    Refusal,
    RunState,
    Weights,
)
from services.wire.sockets import Requester
from services.wire.subscriber import Subscriber
from tests.unit.learner.fake_server import DEADLINE_S, EXPECTED, LIMIT, RUN, FakeServer
from tests.unit.learner.waiting import until

ACTOR = Client(client_id="actor-3", incarnation=11)
HOLD_S = 0.25
BEHIND_S = 0.6


def decode(payload: bytes) -> int:
    """The tests' weights are a number in words."""
    if not payload.startswith(b"weights "):
        raise ValueError("no weights")
    return int(payload.removeprefix(b"weights "))


class Clock:
    """The client's, which tests put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


class Stopping(threading.Event):
    """Knows for how long it was waited for, time after time."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        if timeout:
            self.pauses_s.append(timeout)
        return super().wait(timeout)


class Scene:
    """A client in its thread, and the server that it talks to."""

    def __init__(
        self,
        directory: Path,
        hold_s: float = 30.0,
        interval_s: float = 0.0,
        wants_seat: bool = True,
        connect: Callable[[], Requester] | None = None,
    ) -> None:
        self.server = FakeServer(directory)
        self.stopping = Stopping()
        self.client = Subscriber(
            connect=connect or self.server.connect,
            client=ACTOR,
            expected=EXPECTED,
            decode=decode,
            wants_seat=wants_seat,
            hold_s=hold_s,
            interval_s=interval_s,
            stopping=self.stopping,
        )
        self.thread = threading.Thread(target=self.client.run, daemon=True)

    def answer(
        self,
        version: int,
        *,
        seats: tuple[int, ...] = (4,),
        with_payload: bool = True,
        state: RunState = "training",
        generation: int = NO_GENERATION,
        learners: tuple[Destination, ...] = (),
        request: int = 0,
    ) -> None:
        """The weights are ten times their version's number."""
        self.server.answer(
            Weights(
                run_id=RUN,
                server_incarnation=1,
                state=state,
                version=version,
                steps=max(0, version) * 640,
                seats=seats,
                payload=b"weights %d" % (10 * version) if with_payload else None,
                generation=generation,
                learners=learners,
                request=request,
            )
        )

    def newest(self) -> tuple[int, int] | None:
        """(version, its weights)."""
        snapshot = self.client.newest
        return None if snapshot is None else (snapshot.version, snapshot.weights)

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


Make = Callable[..., Scene]


@pytest.fixture
def make() -> Iterator[Make]:
    """Builds scenes whose server and client are not running yet."""
    scenes: list[Scene] = []
    with tempfile.TemporaryDirectory(prefix="impala-", dir="/tmp") as directory:  # sockets need short paths

        def make(**settings: Any) -> Scene:
            scenes.append(Scene(Path(directory), **settings))
            return scenes[-1]

        yield make
        for scene in scenes:
            if scene.thread.is_alive():
                scene.stop()
            scene.server.stop()


@pytest.fixture
def scene(make: Make) -> Scene:
    scene = make()
    scene.server.start()
    scene.thread.start()
    return scene


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber_module, "POLL_S", 0.01)  # how long stopping takes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(subscriber_module, "time", clock)
    return clock


@pytest.fixture
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber_module, "REFUSED_PAUSE_S", 0.01)


# --- seat and weights --------------------------------------------------------------------------------


def test_the_first_request_asks_for_anything_and_for_a_seat(scene: Scene) -> None:
    pull = scene.server.next(Pull)
    assert (pull.run_id, pull.sender, pull.have_version) == (RUN, ACTOR, NO_VERSION)
    assert pull.seats_for == (ACTOR,)
    assert ACTOR.seat == NO_SEAT


def test_the_first_answer_brings_seat_and_weights(scene: Scene) -> None:
    scene.server.next(Pull)
    assert scene.client.wait(0.0) is None
    scene.answer(5)
    snapshot = scene.client.wait(DEADLINE_S)
    assert snapshot is not None
    assert (snapshot.version, snapshot.steps, snapshot.weights) == (5, 3200, 50)
    assert scene.client.seat == 4
    until(lambda: scene.client.state == "training")
    assert 0 <= scene.client.age_s() < DEADLINE_S


def test_later_requests_name_the_seat_and_the_version_that_the_actor_has(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(5)
    pull = scene.server.next(Pull)
    assert (pull.have_version, pull.sender.seat, pull.seats_for[0].seat) == (5, 4, 4)
    scene.answer(5, with_payload=False)
    assert scene.server.next(Pull) == pull


def test_newer_weights_replace_older_ones_and_no_news_replaces_nothing(scene: Scene) -> None:
    for version, with_payload in ((1, True), (1, False), (2, True), (9, True), (9, False)):
        scene.server.next(Pull)
        scene.answer(version, with_payload=with_payload)
        until(lambda: scene.newest() == (version, 10 * version))  # noqa: B023


def test_weights_without_a_seat_are_not_enough_to_play(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(5, seats=(NO_SEAT,))
    pull = scene.server.next(Pull)
    assert (pull.have_version, pull.sender.seat) == (5, NO_SEAT)
    assert scene.client.wait(0.01) is None
    assert scene.client.missing() == "no seat is free"
    scene.answer(5, seats=(7,), with_payload=False)
    assert scene.client.wait(DEADLINE_S) is not None
    assert scene.client.missing() is None


def test_a_seat_without_weights_is_not_enough_to_play(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(NO_VERSION, with_payload=False, state="waiting")
    scene.server.next(Pull)
    assert scene.client.wait(0.01) is None
    assert scene.client.missing() == "no weights have been published yet"
    scene.answer(0)
    assert scene.client.wait(DEADLINE_S) is not None
    assert scene.client.missing() is None


def test_a_seat_once_leased_is_kept_until_the_server_gives_another(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(1, seats=(4,))
    scene.server.next(Pull)
    scene.answer(2, seats=(NO_SEAT,))  # a relay that has not heard from upstream
    assert scene.server.next(Pull).sender.seat == 4
    scene.answer(3, seats=(6,))
    assert scene.server.next(Pull).sender.seat == 6
    assert scene.client.seat == 6


def test_the_state_of_the_run_is_passed_on(scene: Scene) -> None:
    assert scene.client.state == "waiting"
    scene.server.next(Pull)
    scene.answer(1, state="complete")
    until(lambda: scene.client.state == "complete")


@pytest.fixture
def leisurely(make: Make, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Asks no more often than three times a second, and gives thanks however short the pause."""
    monkeypatch.setattr(subscriber_module, "THANKS_S", -math.inf)
    scene = make(interval_s=0.3)
    scene.server.start()
    scene.thread.start()
    return scene


def test_requests_are_at_least_an_interval_apart(leisurely: Scene) -> None:
    arrivals_s = []
    for version in (1, 1, 1):
        leisurely.server.next(Pull)
        arrivals_s.append(time.monotonic())
        leisurely.answer(version, with_payload=False)
    # From the first arrival to the last: what one request was late, the next one is not early.
    assert arrivals_s[2] - arrivals_s[0] > 0.3


def test_who_pauses_after_weights_says_first_that_they_have_arrived(leisurely: Scene) -> None:
    leisurely.server.next(Pull)
    leisurely.answer(5)
    thanks = leisurely.server.next(Pull)
    assert (thanks.have_version, thanks.request) == (MAX_COUNT - 1, 1)  # so no weights are the answer
    assert thanks.seats_for[0].seat == 4
    request = leisurely.server.next(Pull)
    assert (request.have_version, request.request) == (5, 0)
    leisurely.answer(5, with_payload=False)
    assert leisurely.server.next(Pull) == request  # without weights there is nothing to be thanked for


def test_the_answer_to_thanks_is_news_but_not_taken_for_the_answer_to_the_request(leisurely: Scene) -> None:
    leisurely.server.next(Pull)
    leisurely.answer(5)
    leisurely.server.next(Pull)
    leisurely.answer(5, seats=(9,), with_payload=False, request=1)
    request = leisurely.server.next(Pull)
    until(lambda: leisurely.client.seat == 9)
    assert leisurely.server.next_or_none(0.6) is None  # it waits on
    leisurely.answer(6)
    until(lambda: leisurely.newest() == (6, 60))
    assert request.have_version == 5


# --- where rollouts go --------------------------------------------------------------------------------

FIRST = Destination(endpoint="tcp://10.0.0.1:5555", since=3)
SECOND = Destination(endpoint="tcp://10.0.0.2:5555", since=4)


def test_an_actor_learns_who_the_learners_are_and_says_which_it_knows(scene: Scene) -> None:
    assert scene.server.next(Pull).generation == NO_GENERATION
    assert not scene.client.learners
    scene.answer(1, generation=3, learners=(FIRST,))
    assert scene.server.next(Pull).generation == 3
    assert list(scene.client.learners) == [FIRST]
    scene.answer(1, with_payload=False, generation=4, learners=(FIRST, SECOND))
    assert scene.server.next(Pull).generation == 4
    assert list(scene.client.learners) == [FIRST, SECOND]


def test_an_actor_needs_no_learner_to_begin(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(1)
    assert scene.client.wait(DEADLINE_S) is not None
    assert scene.client.missing() is None
    assert not scene.client.learners


def test_a_server_that_knows_no_learners_yet_takes_none_away(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(1, generation=3, learners=(FIRST, SECOND))
    scene.server.next(Pull)
    scene.answer(1, with_payload=False, generation=NO_GENERATION)
    assert scene.server.next(Pull).generation == 3
    assert list(scene.client.learners) == [FIRST, SECOND]


def test_a_run_that_begins_anew_has_its_first_generation_again(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(1, generation=9, learners=(FIRST, SECOND))
    scene.server.next(Pull)
    scene.answer(1, with_payload=False, generation=1, learners=(SECOND,))
    assert scene.server.next(Pull).generation == 1
    assert list(scene.client.learners) == [SECOND]


@pytest.mark.usefixtures("_short_pauses")
def test_learners_are_taken_over_from_an_answer_whose_weights_are_of_no_use(scene: Scene) -> None:
    scene.server.next(Pull)
    reply = Weights(
        run_id=RUN,
        server_incarnation=1,
        state="training",
        version=1,
        steps=0,
        seats=(4,),
        payload=b"something else",
        generation=3,
        learners=(FIRST,),
    )
    scene.server.answer(reply)
    assert scene.server.next(Pull).generation == 3  # or else it would be news again, at once
    assert list(scene.client.learners) == [FIRST]


# --- whoever wants no seat ----------------------------------------------------------------------------


@pytest.fixture
def guest(make: Make) -> Scene:
    scene = make(wants_seat=False)
    scene.server.start()
    scene.thread.start()
    return scene


def test_who_wants_no_seat_asks_for_none_and_waits_for_none(guest: Scene) -> None:
    pull = guest.server.next(Pull)
    assert (pull.sender, pull.have_version, pull.seats_for) == (ACTOR, NO_VERSION, ())
    assert guest.client.missing() is not None
    guest.answer(5, seats=())
    snapshot = guest.client.wait(DEADLINE_S)
    assert snapshot is not None
    assert (snapshot.version, snapshot.weights) == (5, 50)
    assert guest.client.missing() is None
    assert guest.client.seat == NO_SEAT
    assert guest.server.next(Pull).seats_for == ()


def test_who_has_no_seat_says_no_goodbye_that_could_cost_a_namesake_its_own(guest: Scene) -> None:
    guest.server.next(Pull)
    guest.answer(1, seats=())
    guest.server.next(Pull)
    guest.stop()
    assert guest.server.next_or_none(2 * HOLD_S) is None


# --- servers that refuse, babble, fall silent ---------------------------------------------------------


@pytest.mark.usefixtures("_short_pauses")
def test_a_refusal_is_trouble_in_the_servers_own_words_and_no_end(scene: Scene) -> None:
    text = "protocol: the peer speaks protocol 1, this is protocol 2"
    scene.server.next(Pull)
    scene.server.answer(Refusal(reason="protocol", text=text))
    until(lambda: scene.client.trouble == f"parameter server refuses: {text}")
    assert scene.client.missing() == scene.client.trouble
    scene.server.next(Pull)
    scene.answer(1)
    until(lambda: scene.client.trouble is None)
    assert scene.client.missing() is None


def test_after_a_refusal_the_server_is_given_a_pause(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber_module, "REFUSED_PAUSE_S", 0.5)
    scene.server.next(Pull)
    refused_s = time.monotonic()
    scene.server.answer(Refusal(reason="run", text="another run"))
    scene.server.next(Pull)
    assert time.monotonic() - refused_s > 0.4 * subscriber_module.REFUSED_PAUSE_S


def _babble() -> dict[str, list[Buffer]]:
    """By what is wrong, answers that are of no use."""

    def weights(payload: bytes) -> list[Buffer]:
        return encode(
            Weights(
                run_id=RUN,
                server_incarnation=1,
                state="training",
                version=3,
                steps=0,
                seats=(4,),
                payload=payload,
            )
        )

    return {
        "empty": [b""],
        "not msgpack": [b"\xc1\xc1\xc1"],
        "another kind": encode(Published(run_id=RUN, server_incarnation=1, version=1)),
        "another run": encode(Published(run_id="other", server_incarnation=1, version=1)),
        "not acceptable": weights(b"something else"),
        "nothing": weights(b""),
    }


@pytest.mark.usefixtures("_short_pauses")
@pytest.mark.parametrize("babble", _babble())
def test_garbage_in_place_of_an_answer_is_trouble_and_survived(scene: Scene, babble: str) -> None:
    scene.server.next(Pull)
    scene.answer(1)
    scene.server.next(Pull)
    scene.server.answer_frames(_babble()[babble])
    until(lambda: "unusable reply" in (scene.client.trouble or ""))
    assert scene.newest() == (1, 10)
    assert scene.client.missing() is None  # it still can play
    scene.server.next(Pull)
    scene.answer(2)
    until(lambda: scene.newest() == (2, 20) and scene.client.trouble is None)


def test_an_unanswered_request_is_asked_again_after_twice_the_servers_patience(make: Make) -> None:
    there = make()
    connected_s: list[float] = []

    def connect() -> Requester:
        connected_s.append(time.monotonic())
        return there.server.connect()

    scene = make(hold_s=HOLD_S, connect=connect)
    there.server.start()
    scene.thread.start()
    first = there.server.next(Pull)
    peer = there.server.peer
    until(lambda: scene.client.trouble == "parameter server does not answer")
    assert there.server.next(Pull) == first
    assert connected_s[1] - connected_s[0] > 2 * HOLD_S
    assert there.server.peer != peer  # the old connection may lead nowhere


def test_within_the_servers_patience_nothing_is_asked_twice(scene: Scene) -> None:
    scene.server.next(Pull)
    assert scene.server.next_or_none(4 * HOLD_S) is None


def test_a_server_that_is_not_there_is_waited_for(make: Make) -> None:
    scene = make()
    scene.thread.start()
    until(lambda: scene.client.trouble == "parameter server not reachable")
    assert scene.client.missing() == "parameter server not reachable"
    scene.server.start()
    scene.server.next(Pull)
    scene.answer(1)
    assert scene.client.wait(DEADLINE_S) is not None


def test_an_actor_without_a_file_descriptor_for_the_server_waits_for_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber_module, "BACK_OFF_S", 0.05)
    exhausted = [True, True, False]
    there = make()
    there.server.start()

    def connect() -> Requester:
        if exhausted.pop(0):
            raise OSError(errno.EMFILE, "no socket (Too many open files)")
        return there.server.connect()

    scene = make(connect=connect)
    scene.thread.start()
    until(lambda: "Too many open files" in (scene.client.missing() or ""))
    there.server.next(Pull)
    there.answer(1)
    assert scene.client.wait(DEADLINE_S) is not None
    until(lambda: scene.client.trouble is None)
    assert not exhausted


def test_a_handshake_that_takes_longer_than_the_servers_patience_is_not_begun_anew(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:  # accepts, and has no time to say anything yet
        endpoint = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
        scene = make(hold_s=0.05, connect=lambda: Requester(endpoint, LIMIT))
        scene.thread.start()
        busy.settimeout(DEADLINE_S)
        with busy.accept()[0]:
            until(lambda: scene.client.trouble == "parameter server not reachable")
            busy.settimeout(1.0)  # ten times its patience
            with pytest.raises(TimeoutError):
                busy.accept()
        scene.stop()


def test_patience_counts_from_when_the_request_has_left(
    make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber_module, "LOST_S", math.inf)
    monkeypatch.setattr(subscriber_module, "BACK_OFF_S", 0.01)  # who has lost patience comes back at once
    scene = make(hold_s=30.0)
    scene.thread.start()
    until(lambda: scene.client.trouble == "parameter server not reachable")
    clock.ahead_s = 61.0  # longer than its patience
    scene.server.start()
    scene.server.next(Pull)
    peer = scene.server.peer
    assert scene.server.next_or_none(0.5) is None
    scene.answer(1)
    until(lambda: scene.newest() == (1, 10))
    scene.server.next(Pull)
    assert scene.server.peer == peer


def test_whom_one_silence_met_together_does_not_come_back_together(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber_module, "random", random.Random(1))
    hold_s = 1.0
    first = make(hold_s=hold_s)
    first.server.start()
    crowd = [first, *(make(hold_s=hold_s, connect=first.server.connect) for _ in range(7))]
    for scene in crowd:
        scene.thread.start()
    first_peers: set[bytes] = set()
    while len(first_peers) < len(crowd):
        first.server.next(Pull)
        first_peers.add(first.server.peer)
    until(lambda: all(scene.stopping.pauses_s for scene in crowd))
    for _ in crowd:
        first.server.next(Pull)
        assert first.server.peer not in first_peers
    # How long they mean to stay away: when they come is for the machine to say too.
    pauses_s = [scene.stopping.pauses_s[0] for scene in crowd]
    assert max(pauses_s) <= hold_s
    # Eight of an even distribution over a second: closer together once in 10,000 times, but not of these.
    assert max(pauses_s) - min(pauses_s) > 0.2 * hold_s


def test_a_restarted_server_is_asked_with_the_seat_and_version_that_the_actor_has(make: Make) -> None:
    scene = make()
    scene.server.start()
    scene.thread.start()
    scene.server.next(Pull)
    scene.answer(5)
    until(lambda: scene.newest() is not None)
    scene.server.stop()
    scene.server.start()
    pull = scene.server.next(Pull)
    assert (pull.have_version, pull.sender) == (5, Client(client_id="actor-3", incarnation=11, seat=4))


def test_a_request_that_a_server_took_with_it_is_sent_again_as_soon_as_there_is_one(make: Make) -> None:
    scene = make(hold_s=10 * DEADLINE_S)  # it has all the time of this test to answer
    scene.server.start()
    scene.thread.start()
    asked = scene.server.next(Pull)
    scene.server.stop()
    until(lambda: scene.client.trouble in {"parameter server has gone", "parameter server not reachable"})
    scene.server.start()
    assert scene.server.next(Pull) == asked
    scene.answer(1)
    until(lambda: scene.newest() == (1, 10) and scene.client.trouble is None)


def test_an_answer_that_is_larger_than_allowed_costs_the_socket_and_not_the_client(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # libzmq gives up such a connection for good.
    monkeypatch.setattr(subscriber_module, "RENEW_S", 0.2)
    monkeypatch.setattr(subscriber_module, "BACK_OFF_S", 0.05)
    scene = make(hold_s=10 * DEADLINE_S)
    scene.server.start()
    scene.thread.start()
    asked = scene.server.next(Pull)
    scene.server.answer_frames([bytes(LIMIT + 1)])
    assert scene.server.next(Pull) == asked
    scene.answer(1)
    until(lambda: scene.newest() == (1, 10))


def test_a_socket_that_reaches_nobody_for_long_is_exchanged(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber_module, "LOST_S", 0.2)
    monkeypatch.setattr(subscriber_module, "BACK_OFF_S", 0.05)
    there = make()
    sockets: list[Requester] = []

    def connect() -> Requester:
        if sockets:  # the next one has the time that it needs
            monkeypatch.setattr(subscriber_module, "LOST_S", 60.0)
        sockets.append(Requester("tcp://127.0.0.1:1", LIMIT) if not sockets else there.server.connect())
        return sockets[-1]

    there.server.start()
    scene = make(connect=connect)
    scene.thread.start()
    there.server.next(Pull)
    assert len(sockets) == 2


# --- a run that has gone back --------------------------------------------------------------------------


@pytest.fixture
def _quick_to_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber_module, "BEHIND_S", BEHIND_S)


def behind(scene: Scene, version: int) -> Pull:
    """The server says that it holds no more than ``version``; the request after that."""
    scene.answer(version, with_payload=False)
    return scene.server.next(Pull)


def test_a_server_that_is_behind_for_a_moment_changes_nothing(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(5)
    scene.server.next(Pull)
    for _ in range(5):
        assert behind(scene, 3).have_version == 5
    assert scene.newest() == (5, 50)


@pytest.mark.usefixtures("_quick_to_go_back")
def test_a_server_that_stays_behind_has_lost_what_the_actor_has_and_the_actor_goes_back(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(5)
    pull = scene.server.next(Pull)
    since_s = time.monotonic()
    while pull.have_version == 5:
        assert time.monotonic() - since_s < DEADLINE_S
        pull = behind(scene, 3)
    assert time.monotonic() - since_s > 0.9 * BEHIND_S
    assert pull.have_version == NO_VERSION
    scene.answer(3)
    assert scene.server.next(Pull).have_version == 3
    assert scene.newest() == (3, 30)
    assert behind(scene, 3).have_version == 3


def test_a_server_that_catches_up_in_time_is_not_behind(
    make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber_module, "BEHIND_S", 1000.0)
    scene = make(hold_s=10_000.0)  # or else it would lose patience when the clock is put forward
    scene.server.start()
    scene.thread.start()
    scene.server.next(Pull)
    scene.answer(5)
    scene.server.next(Pull)
    for _ in range(10):  # never behind for long, though behind all the time
        assert behind(scene, 3).have_version == 5
        clock.ahead_s += 600.0
        assert behind(scene, 3).have_version == 5
        assert behind(scene, 5).have_version == 5
    assert scene.newest() == (5, 50)


# --- stopping ----------------------------------------------------------------------------------------


def next_goodbye(scene: Scene) -> Goodbye:
    """The farewell; a request may come before it."""
    message = scene.server.next_or_none(DEADLINE_S)
    return message if isinstance(message, Goodbye) else scene.server.next(Goodbye)


def test_an_actor_that_stops_says_goodbye_with_its_seat(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.answer(1)
    scene.server.next(Pull)  # which stays open
    scene.stop()
    goodbye = scene.server.next(Goodbye)
    assert goodbye.sender == Client(client_id="actor-3", incarnation=11, seat=4)


def test_an_actor_that_stops_before_it_has_a_seat_says_goodbye_too(scene: Scene) -> None:
    scene.server.next(Pull)
    scene.stop()
    assert scene.server.next(Goodbye).sender == ACTOR


def test_an_actor_that_stops_while_it_is_refused_does_not_wait_and_says_goodbye(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber_module, "REFUSED_PAUSE_S", 8 * DEADLINE_S)
    scene.server.next(Pull)
    scene.server.answer(Refusal(reason="run", text="another run"))
    until(lambda: "refuses" in (scene.client.trouble or ""))
    scene.stop()  # within the deadline, of which the pause is four times as long or more
    assert next_goodbye(scene).sender == ACTOR


def test_stopping_while_the_server_is_not_there_returns(make: Make) -> None:
    scene = make()
    scene.thread.start()
    until(lambda: scene.client.trouble == "parameter server not reachable")
    scene.stop()
