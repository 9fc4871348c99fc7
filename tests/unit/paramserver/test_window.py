"""Large weights go to a few at a time: everybody's turn comes, and nothing but weights waits for a turn."""

import math

import pytest

from services.paramserver import window
from services.paramserver.store import Snapshot
from services.paramserver.window import LEAST_SLOTS, UNDER_WAY_S, Window
from services.wire.codec import encode
from services.wire.messages import NO_GENERATION, Weights
from tests.unit.paramserver.harness import (
    HOLD_S,
    LEARNER,
    Node,
    attend,
    client,
    connect,
    only,
    publish,
    pull,
    relay,
    root,
)

SLOTS = 5
SIZE = 10


@pytest.fixture(autouse=True)
def _room_for_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a test's weights of ten bytes are large."""
    monkeypatch.setattr(window, "WINDOW_BYTES", SLOTS * SIZE + SIZE // 2)


class Crowd:
    """Guests of a server: each has one request open, and asks again when it was answered."""

    def __init__(self, node: Node, size: int, version: int = 0) -> None:
        self.node = node
        self.have = {b"%03d" % number: version for number in range(size)}
        self.copies = dict.fromkeys(self.have, 0)
        self.generation = NO_GENERATION

    def ask(self, *peers: bytes) -> None:
        """These do."""
        for peer in peers:
            message = pull(
                client(peer.decode()), self.have[peer], wants_seat=False, generation=self.generation
            )
            self.node.receive(peer, encode(message))

    def hear(self) -> list[bytes]:
        """Who was sent weights since the last time, in this order; all who were answered ask again later."""
        served = [r.peer for r in self.node.replies if r.peer in self.have and r.result == "full"]
        self.node.replies.clear()
        for peer in self.have:
            for answer in self.node.take(peer):
                assert isinstance(answer, Weights)
                self.generation = answer.generation
                if answer.payload is not None:
                    assert answer.version > self.have[peer]
                    self.have[peer] = answer.version
                    self.copies[peer] += 1
        return served


def peers(*numbers: int) -> list[bytes]:
    return [b"%03d" % number for number in numbers]


def large(version: int) -> bytes:
    return b"%010d" % version


@pytest.fixture
def node() -> Node:
    return root(Snapshot(version=0, steps=0, state="training", payload=large(0)))


@pytest.fixture
def crowd(node: Node) -> Crowd:
    """Twelve that wait for version 1."""
    crowd = Crowd(node, 12)
    crowd.ask(*crowd.have)
    assert crowd.hear() == []
    return crowd


# --- who gets weights, and when -----------------------------------------------------------------------


def test_no_more_than_fit_into_the_window_are_sent_at_a_time_and_whoever_asked_first_is_first(
    node: Node, crowd: Crowd
) -> None:
    node.publish(publish(1, large(1)))
    assert crowd.hear() == peers(0, 1, 2, 3, 4)
    node.pass_time(1.0)
    assert crowd.hear() == []


def test_whoever_asks_again_makes_room_for_the_next_one(node: Node, crowd: Crowd) -> None:
    node.publish(publish(1, large(1)))
    crowd.hear()
    crowd.ask(*peers(3))
    assert crowd.hear() == peers(5)
    crowd.ask(*peers(0, 5, 1))
    assert crowd.hear() == peers(6, 7, 8)


def test_late_joiners_share_the_window_too(node: Node) -> None:
    newcomers = Crowd(node, 12, version=-1)
    newcomers.ask(*newcomers.have)
    assert newcomers.hear() == peers(0, 1, 2, 3, 4)


def test_small_weights_reach_everybody_at_once(node: Node) -> None:
    crowd = Crowd(node, 60)
    crowd.ask(*crowd.have)
    node.publish(publish(1, b""))
    assert len(crowd.hear()) == 60


def test_weights_larger_than_the_window_still_go_to_a_few(node: Node, crowd: Crowd) -> None:
    node.publish(publish(1, bytes(1000 * SIZE)))
    assert len(crowd.hear()) == LEAST_SLOTS


def test_a_thousand_actors_need_no_more_room_than_64_mebibytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    window = Window()
    sent = 0
    while window.has_room(6_500_000):
        window.begin(b"%d" % sent, 6_500_000, 0.0)
        sent += 1
    assert sent == 10  # 65 MB; 67.1 MB fit


# --- news while the window is full --------------------------------------------------------------------


def test_who_waits_while_versions_follow_each_other_gets_only_the_newest(node: Node, crowd: Crowd) -> None:
    node.publish(publish(1, large(1)))
    crowd.hear()
    node.publish(publish(2, large(2)))
    assert crowd.hear() == []
    crowd.ask(*peers(0, 1, 2, 3, 4))
    assert crowd.hear() == peers(5, 6, 7, 8, 9)
    assert {crowd.have[peer] for peer in peers(5, 6, 7, 8, 9)} == {2}
    assert {crowd.copies[peer] for peer in peers(5, 6, 7, 8, 9)} == {1}


def test_nobody_is_served_twice_before_everybody_else_was_served_once(node: Node, crowd: Crowd) -> None:
    """Versions follow each other faster than copies arrive, and ``hold_s`` cuts off all who wait."""
    arriving: list[list[bytes]] = [[], []]  # what is sent now arrives in two seconds
    for version in range(1, 25):
        node.publish(publish(version, large(version)))
        arriving.append(crowd.hear())
        node.pass_time(1.0)
        cut_off = [reply.peer for reply in node.replies if reply.result == "not_modified"]
        arriving[-1] += crowd.hear()
        crowd.ask(*cut_off)
        arrived = arriving.pop(0)
        crowd.ask(*arrived)
        arriving[-1] += crowd.hear()
        assert max(crowd.copies.values()) - min(crowd.copies.values()) <= 1
    assert min(crowd.copies.values()) >= 3


def test_who_waits_is_answered_without_weights_after_the_hold_and_keeps_its_turn(
    node: Node, crowd: Crowd
) -> None:
    node.publish(publish(1, large(1)))
    crowd.hear()
    node.pass_time(HOLD_S)
    empty = [reply for reply in node.replies if reply.result == "not_modified"]
    assert [reply.peer for reply in empty] == peers(5, 6, 7, 8, 9, 10, 11)
    assert {reply.since_s for reply in empty} == {None}
    assert crowd.hear() == []
    crowd.ask(*peers(0, 1, 5, 6))
    assert crowd.hear() == peers(5, 6)


def test_the_end_of_a_run_reaches_everybody_at_once(node: Node, crowd: Crowd) -> None:
    node.publish(publish(1, large(1)))
    crowd.hear()
    node.publish(publish(1, None, state="complete"))
    told = [only(Weights, node.take(peer)) for peer in peers(5, 6, 7, 8, 9, 10, 11)]
    assert {(weights.state, weights.payload) for weights in told} == {("complete", None)}


def test_a_newcomers_seat_does_not_wait_for_its_weights(node: Node, crowd: Crowd) -> None:
    node.publish(publish(1, large(1)))
    answer = node.pull(b"actor", pull(client("actor")))
    assert answer is not None
    assert (answer.seats, answer.payload) == ((0,), None)
    assert node.pull(b"actor", pull(client("actor", seat=0))) is None
    crowd.ask(*peers(0))
    assert only(Weights, node.take(b"actor")).payload == large(1)


def test_a_learner_does_not_wait_for_its_weights(node: Node, crowd: Crowd) -> None:
    node.attend(attend(LEARNER.client_id))
    crowd.hear()
    crowd.ask(*crowd.have)
    node.publish(publish(7, large(7)))
    assert crowd.hear() == peers(0, 1, 2, 3, 4)
    answer = node.pull(b"new life", pull(LEARNER, 0, wants_seat=False))
    assert answer is not None
    assert answer.payload == large(7)
    crowd.ask(*peers(0))
    assert crowd.hear() == peers(5)  # its copy has no slot, which nobody would end


def test_the_clients_of_a_relay_share_the_relays_window() -> None:
    above, below = root(), relay()
    above.publish(publish(0, large(0)))
    connect(below, above)
    crowd = Crowd(below, 12)
    crowd.ask(*crowd.have)
    above.publish(publish(1, large(1)))
    connect(below, above)
    assert crowd.hear() == peers(0, 1, 2, 3, 4)
    crowd.ask(*peers(0))
    assert crowd.hear() == peers(5)


# --- peers that are gone --------------------------------------------------------------------------------


def test_the_slot_of_a_peer_that_is_never_heard_of_again_ends(node: Node, crowd: Crowd) -> None:
    node.publish(publish(1, large(1)))
    crowd.hear()
    begun_s = node.now_s
    node.pass_time(UNDER_WAY_S - 0.5)
    crowd.hear()
    crowd.ask(*peers(5, 6, 7, 8, 9, 10, 11))
    assert crowd.hear() == []
    assert node.server.next_deadline_s() == begun_s + UNDER_WAY_S
    node.pass_time(0.5)
    assert crowd.hear() == peers(5, 6, 7, 8, 9)


def test_an_answer_that_cannot_be_handed_over_is_the_next_ones_turn(node: Node, crowd: Crowd) -> None:
    node.publish(publish(1, large(1)))
    crowd.hear()
    node.note(node.server.lost(b"002", node.now_s))
    assert crowd.hear() == peers(5)


def test_a_goodbye_ends_the_slot(node: Node, crowd: Crowd) -> None:
    node.publish(publish(1, large(1)))
    crowd.hear()
    node.goodbye(b"002", client("002"))
    node.pass_time(0.0)
    assert crowd.hear() == peers(5)


def test_the_end_of_slots_is_a_deadline_only_while_there_are_any(node: Node) -> None:
    assert node.server.next_deadline_s() == math.inf
    node.pull(b"A", pull(client("a"), wants_seat=False))
    assert node.server.next_deadline_s() == node.now_s + UNDER_WAY_S
    node.pass_time(UNDER_WAY_S)
    assert node.server.next_deadline_s() == math.inf


# --- what is measured -----------------------------------------------------------------------------------


def test_the_time_in_the_queue_counts_from_the_version_or_the_request_whichever_is_later(
    node: Node, crowd: Crowd
) -> None:
    node.pass_time(1.0)
    node.publish(publish(1, large(1)))
    published_s = node.now_s
    node.pass_time(1.0)
    node.replies.clear()
    crowd.hear()
    node.pull(b"late", pull(client("late"), 0, wants_seat=False))
    asked_s = node.now_s
    node.pass_time(0.5)
    for peer in peers(0, 1, 2, 3, 4):
        crowd.have[peer] = 1
    crowd.ask(*peers(0, 1, 2, 3, 4))
    crowd.ask(*peers(5, 6, 7))
    waits = {reply.peer: reply.since_s for reply in node.replies if reply.result == "full"}
    assert waits == {
        **dict.fromkeys(peers(5, 6, 7, 8, 9, 10, 11), published_s),
        b"late": asked_s,
    }
