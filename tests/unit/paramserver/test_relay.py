"""Relays, without sockets: seats and weights come from further up, and survive its absence."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.paramserver.relay import CONNECT_S, REFUSED_S
from services.paramserver.store import EMPTY
from services.wire.codec import decode, encode
from services.wire.messages import NO_VERSION, Destination, Goodbye, Pull, Refusal, Weights
from services.wire.subscriber import BEHIND_S
from tests.unit.paramserver.harness import (
    EXPECTED,
    HOLD_S,
    LEASE_S,
    Node,
    attend,
    client,
    connect,
    cross,
    only,
    publish,
    pull,
    relay,
    requests_of,
    root,
)

A, B = client("a"), client("b")
TURN_S = 0.5


def pass_time(seconds: float, *nodes: Node) -> None:
    for node in nodes:
        node.pass_time(seconds)


def carry(above: Node, relays: Sequence[Node]) -> None:
    """Between each of ``relays`` and the one before it, the first of which asks ``above``."""
    for upstream, node in zip([above, *relays], relays, strict=False):
        connect(node, upstream)


def sent_up(node: Node) -> list[Pull | Goodbye]:
    """What the relay wants to send upstream now."""
    messages = [decode(cross(frames), EXPECTED) for frames in requests_of(node)]
    return [message for message in messages if isinstance(message, Pull | Goodbye)]


def pulled(node: Node) -> Pull:
    (message,) = sent_up(node)
    assert isinstance(message, Pull)
    return message


def answer(
    node: Node, request: Pull, version: int = 1, seats: tuple[int, ...] = (), run_id: str = "run"
) -> None:
    """Upstream answers ``request``."""
    assert node.relay is not None
    weights = Weights(
        run_id=run_id,
        server_incarnation=1,
        state="training",
        version=version,
        steps=max(version, 0) * 640,
        seats=seats,
        payload=b"weights" if version > request.have_version else None,
        request=request.request,
    )
    node.note(node.relay.handle(cross(encode(weights)), node.now_s))


def refuse(node: Node) -> None:
    assert node.relay is not None
    frames = encode(Refusal(reason="protocol", text="the peer speaks protocol 1, this is protocol 2"))
    node.note(node.relay.handle(cross(frames), node.now_s))


def test_weights_state_and_steps_reach_the_relays_clients_the_moment_they_are_published() -> None:
    above, below = root(), relay()
    connect(below, above)
    assert below.pull(b"E", pull(client("eval"), wants_seat=False)) is None
    above.publish(publish(1, b"one"))
    connect(below, above)
    weights = only(Weights, below.take(b"E"))
    assert (weights.version, weights.steps, weights.state) == (1, 640, "training")
    assert (weights.payload, weights.server_incarnation) == (b"one", 88)
    below.pull(b"E", pull(client("eval"), 1, wants_seat=False))
    above.publish(publish(1, None, state="complete"))
    connect(below, above)
    assert only(Weights, below.take(b"E")).state == "complete"


def test_a_newcomer_gets_its_seat_when_upstream_has_answered_and_not_before() -> None:
    above, below = root(), relay()
    above.pull(b"other", pull(client("other")))
    connect(below, above)
    assert below.pull(b"A", pull(A)) is None
    connect(below, above)
    assert only(Weights, below.take(b"A")).seats == (1,)


def test_seats_are_unique_across_relays() -> None:
    above, left, right = root(), relay("left"), relay("right")
    for node, peer, who in [(left, b"L", A), (right, b"R", B)]:
        node.pull(b"1", pull(who))
        connect(node, above, peer)
    assert only(Weights, left.take(b"1")).seats == (0,)
    assert only(Weights, right.take(b"1")).seats == (1,)


def test_a_newcomer_who_finds_weights_gets_them_at_once_and_its_seat_later() -> None:
    above, below = root(), relay()
    above.publish(publish(1))
    connect(below, above)
    first = below.pull(b"A", pull(A))
    assert first is not None
    assert (first.seats, first.payload) == ((-1,), b"weights")
    assert below.pull(b"A", pull(A, 1)) is None
    connect(below, above)
    assert only(Weights, below.take(b"A")).seats == (0,)


def test_many_who_arrive_while_upstream_is_asked_share_the_next_request() -> None:
    below = relay()
    answer(below, pulled(below))
    below.pull(b"A", pull(A, 1))
    first = pulled(below)
    for i in range(50):
        below.pull(f"{i}".encode(), pull(client(f"c{i}"), 1))
    assert sent_up(below) == []
    answer(below, first, seats=(0,))
    second = pulled(below)
    assert len(second.seats_for) == 51
    assert second.seats_for[0] == client("a", seat=0)


def test_a_newcomer_does_not_wait_for_the_open_long_poll_to_end() -> None:
    below = relay()
    answer(below, pulled(below))
    open_request = pulled(below)
    below.pull(b"A", pull(A, 1))
    newer = pulled(below)
    assert newer.request == open_request.request + 1
    assert newer.seats_for == (A,)


def test_the_answer_to_a_replaced_request_brings_weights_but_its_seats_are_not_misread() -> None:
    below = relay()
    below.pull(b"A", pull(A))
    first = pulled(below)
    answer(below, first, version=-1, seats=(0,))
    assert only(Weights, below.take(b"A")).seats == (0,)
    replaced = pulled(below)
    below.goodbye(b"A", A)
    below.pull(b"B", pull(B))
    newer, goodbye = sent_up(below)
    assert isinstance(goodbye, Goodbye)
    assert isinstance(newer, Pull)
    answer(below, replaced, version=1, seats=(0,))  # a's seat, which must not become b's
    weights = only(Weights, below.take(b"B"))
    assert (weights.version, weights.seats) == (1, (-1,))
    assert below.pull(b"B", pull(B, 1)) is None
    answer(below, newer, version=1, seats=(4,))
    assert only(Weights, below.take(b"B")).seats == (4,)


def test_the_relays_requests_keep_its_clients_leases_alive_upstream() -> None:
    above, below = root(), relay()
    below.pull(b"A", pull(A))
    connect(below, above)
    below.take(b"A")
    for _ in range(40):
        below.pull(b"A", pull(client("a", seat=0)))
        pass_time(HOLD_S, above, below)
        connect(below, above)
        assert only(Weights, below.take(b"A")).seats == (0,)
    assert above.count("seats") == 1


def test_a_goodbye_at_a_relay_frees_the_seat_upstream_at_once() -> None:
    above, below = root(), relay()
    below.pull(b"A", pull(A))
    connect(below, above)
    below.take(b"A")
    below.goodbye(b"A", client("a", seat=0))
    connect(below, above)
    pass_time(0.0, above, below)
    assert (above.count("seats"), below.count("seats")) == (0, 0)
    newcomer = above.pull(b"B", pull(B))
    assert newcomer is not None
    assert newcomer.seats == (0,)


def test_a_silent_clients_seat_ends_upstream_one_lease_after_it_ended_at_the_relay() -> None:
    above, below = root(), relay()
    below.pull(b"A", pull(A))
    connect(below, above)
    for _ in range(2 * int(LEASE_S / HOLD_S) + 2):
        pass_time(HOLD_S, above, below)
        connect(below, above)
    assert above.count("seats") == 0


def test_after_upstreams_restart_clients_keep_their_seats_and_newcomers_get_others() -> None:
    above, below = root(), relay()
    for name in "ab":
        below.pull(name.encode(), pull(client(name)))
    connect(below, above)
    restarted = root(incarnation=78)
    below.pass_time(2 * HOLD_S)
    assert connect(below, restarted) == 1
    newcomer = restarted.pull(b"C", pull(client("c")))
    assert newcomer is not None
    assert newcomer.seats == (2,)


def test_after_the_relays_restart_clients_keep_their_seats() -> None:
    above, below = root(), relay()
    below.pull(b"A", pull(A))
    connect(below, above)
    restarted = relay(incarnation=89)
    above.pull(b"B", pull(B))
    assert restarted.pull(b"A", pull(client("a", seat=0))) is None
    connect(restarted, above, b"relay again")
    assert restarted.take(b"A") == []  # nothing new for it
    restarted.pass_time(HOLD_S)
    assert only(Weights, restarted.take(b"A")).seats == (0,)


def test_a_seat_that_somebody_else_got_upstream_is_replaced() -> None:
    above, below = root(), relay()
    above.pull(b"thief", pull(client("thief")))
    assert below.pull(b"A", pull(client("a", seat=0))) is None
    connect(below, above)
    assert only(Weights, below.take(b"A")).seats == (1,)


def test_without_upstream_a_relay_serves_what_it_has() -> None:
    above, below = root(), relay()
    above.publish(publish(1))
    connect(below, above)
    below.pass_time(1000.0)
    weights = below.pull(b"A", pull(A))
    assert weights is not None
    assert weights.version == 1
    assert below.pull(b"A", pull(A, 1)) is None
    below.pass_time(HOLD_S)
    assert only(Weights, below.take(b"A")).payload is None


def test_an_upstream_that_lost_its_weights_does_not_take_away_the_relays() -> None:
    above, below = root(), relay()
    above.publish(publish(3))
    connect(below, above)
    below.pass_time(2 * HOLD_S)
    restarted = root(incarnation=78)
    connect(below, restarted)
    restarted.pass_time(HOLD_S)
    connect(below, restarted)
    assert (below.store.snapshot.version, below.store.snapshot.state) == (3, "training")


def fall_behind(below: Node) -> None:
    """It holds 500, upstream 300, and the next request asks for that."""
    answer(below, pulled(below), 500)
    answer(below, pulled(below), 300)
    for seconds in (HOLD_S,) * (int(BEHIND_S / HOLD_S) + 1):
        request = pulled(below)
        below.pass_time(seconds)
        answer(below, request, 300)


def test_an_upstream_that_has_held_less_for_long_is_asked_for_what_it_holds_and_that_is_taken() -> None:
    below = relay()
    answer(below, pulled(below), 500)
    answer(below, pulled(below), 300)
    for seconds in (BEHIND_S / 2, BEHIND_S / 2, 0.5):
        request = pulled(below)
        assert request.have_version == 500
        below.pass_time(seconds)
        answer(below, request, 302)
    request = pulled(below)
    assert request.have_version == NO_VERSION
    assert below.store.snapshot.version == 500
    answer(below, request, 303)
    assert (below.store.snapshot.version, below.store.snapshot.steps) == (303, 303 * 640)
    assert (below.count("version"), below.count("publishes_total")) == (303, 1)
    later = pulled(below)
    assert later.have_version == 303
    answer(below, later, 304)
    assert below.store.snapshot.version == 304


@pytest.mark.parametrize("version", [NO_VERSION, 500, 501])
def test_an_upstream_that_held_less_only_now_and_then_is_not_followed_back(version: int) -> None:
    below = relay()
    answer(below, pulled(below), 500)
    for told in (300, version, 300):
        answer(below, pulled(below), told)
        request = pulled(below)
        below.pass_time(BEHIND_S / 2 + 0.5)
        answer(below, request, told)
    assert pulled(below).have_version == below.store.snapshot.version == max(version, 500)


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_a_time_without_upstream_is_none_in_which_it_held_less(how: str) -> None:
    below = relay()
    assert below.relay is not None
    answer(below, pulled(below), 500)
    answer(below, pulled(below), 300)
    pulled(below)
    if how == "gone":
        below.relay.unsent(below.now_s)
    below.pass_time(BEHIND_S + 0.5)
    answer(below, pulled(below), 300)
    assert pulled(below).have_version == below.store.snapshot.version == 500


def test_an_upstream_that_has_caught_up_when_it_is_asked_is_followed_as_ever() -> None:
    below = relay()
    fall_behind(below)
    answer(below, pulled(below), 501)
    assert below.store.snapshot.version == 501
    assert pulled(below).have_version == 501


def test_a_relay_that_goes_back_tells_all_at_once_whose_requests_it_holds() -> None:
    below = relay()
    fall_behind(below)
    for name in (b"A", b"B"):
        assert below.pull(name, pull(client(name.decode()), 500, wants_seat=False)) is None
    answer(below, pulled(below), 300)
    for name in (b"A", b"B"):
        told = only(Weights, below.take(name))
        assert (told.version, told.payload) == (300, None)
    assert below.pull(b"A", pull(A, 500, wants_seat=False)) is None, "once"
    given = below.pull(b"B", pull(B, wants_seat=False))
    assert given is not None
    assert (given.version, given.payload) == (300, b"weights")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_relays_below_each_other_and_their_clients_go_back_with_the_run(depth: int) -> None:
    above, relays = root(), [relay(f"relay-{number}") for number in range(depth)]
    above.attend(attend("learner-0", version=0))
    above.publish(publish(500, b"lost"))
    carry(above, relays)
    assert [each.store.snapshot.payload for each in relays] == [b"lost"] * depth
    restarted = root(incarnation=78)
    restarted.attend(attend("learner-1", version=0))
    restarted.publish(replace(publish(300, b"saved"), sender=client("learner-1")))
    relays[0].pass_time(2 * HOLD_S)  # what was asked of the former one is lost
    for _ in range(depth * int((BEHIND_S + 2 * HOLD_S) / TURN_S)):
        pass_time(TURN_S, restarted, *relays)
        carry(restarted, relays)
    assert restarted.store.snapshot.learners == (Destination(endpoint="tcp://learner-1:5555", since=1),)
    assert [each.store.snapshot for each in relays] == [restarted.store.snapshot] * depth
    restarted.publish(replace(publish(301, b"new"), sender=client("learner-1")))
    carry(restarted, relays)
    weights = relays[-1].pull(b"A", pull(A))
    assert weights is not None
    assert (weights.version, weights.payload, weights.learners) == (
        301,
        b"new",
        restarted.store.snapshot.learners,
    )


def test_an_unanswered_request_is_sent_again_after_twice_the_hold() -> None:
    below = relay()
    first = pulled(below)
    assert below.relay is not None
    assert below.relay.next_deadline_s() == below.now_s + 2 * HOLD_S
    below.pass_time(2 * HOLD_S - 0.001)
    assert sent_up(below) == []
    assert not below.relay.is_overdue(below.now_s)
    below.pass_time(0.001)
    assert below.relay.is_overdue(below.now_s)  # so the loop takes a new connection
    assert pulled(below).request == first.request + 1


def test_a_relay_whose_upstream_is_not_there_tries_again_without_spinning() -> None:
    below = relay()
    assert below.relay is not None
    below.pull(b"A", pull(A))
    pulled(below)
    below.relay.unsent(below.now_s)
    below.pull(b"B", pull(B))
    assert sent_up(below) == []
    assert below.relay.next_deadline_s() == below.now_s + CONNECT_S
    below.pass_time(CONNECT_S)
    assert pulled(below).seats_for == (A, B)
    assert not below.relay.has_answered


@pytest.mark.parametrize("kind", ["refusal", "garbage", "wrong run", "wrong seats"])
def test_a_relay_asks_an_upstream_that_answers_wrongly_again_without_spinning(kind: str) -> None:
    below = relay()
    assert below.relay is not None
    below.pull(b"A", pull(A))
    request = pulled(below)
    if kind == "refusal":
        refuse(below)
    elif kind == "garbage":
        below.note(below.relay.handle([b"\xc1", b"garbage"], below.now_s))
    elif kind == "wrong run":
        answer(below, request, seats=(0,), run_id="other")
    else:
        answer(below, request, seats=(0, 1, 2))
    assert below.take(b"A") == []
    assert below.store.snapshot.version == -1
    assert sent_up(below) == []
    below.pass_time(REFUSED_S)
    assert pulled(below).seats_for == (A,)


def test_a_relay_is_ready_once_upstream_has_answered_even_without_weights() -> None:
    above, below = root(), relay()
    assert below.relay is not None
    below.pull(b"A", pull(A))
    assert not below.relay.has_answered
    connect(below, above)
    assert below.relay.has_answered


def test_a_publish_to_a_relay_is_refused_with_the_reason() -> None:
    below = relay()
    refusal = only(Refusal, below.ask(b"L", publish(1)))
    assert (refusal.reason, refusal.text) == ("relay", "publish to the parameter server, not to a relay")
    assert below.count("refused_requests_total", reason="relay") == 1
    assert below.store.snapshot.version == -1


def test_learners_do_not_attend_at_a_relay_and_are_told_where() -> None:
    below = relay()
    refusal = only(Refusal, below.ask(b"L", attend()))
    assert (refusal.reason, refusal.text) == ("relay", "attend at the parameter server, not at a relay")
    assert below.count("refused_requests_total", reason="relay") == 1
    assert below.count("learners") == 0


def test_where_rollouts_go_reaches_a_relays_clients_the_moment_it_changes() -> None:
    above, below = root(), relay()
    above.attend(attend("learner-0", version=0))
    below.pull(b"A", pull(A))
    connect(below, above)
    assert only(Weights, below.take(b"A")).learners == (
        Destination(endpoint="tcp://learner-0:5555", since=1),
    )
    assert below.pull(b"A", pull(client("a", seat=0), generation=1)) is None
    above.attend(attend("learner-1", version=0))
    above.attend(attend("learner-0", version=0, generation=1))
    assert connect(below, above) == 1
    news = only(Weights, below.take(b"A"))
    assert (news.generation, [learner.since for learner in news.learners], news.seats) == (2, [1, 2], (0,))


def test_a_restarted_upstream_that_does_not_know_the_learners_yet_takes_none_from_the_relays_clients() -> (
    None
):
    above, below = root(), relay()
    above.attend(attend("learner-0", version=0))
    above.publish(publish(3))
    connect(below, above)
    below.pass_time(2 * HOLD_S)
    restarted = root(replace(above.store.snapshot, learners=()), incarnation=78)
    connect(below, restarted)
    restarted.pass_time(HOLD_S)
    connect(below, restarted)
    weights = below.pull(b"A", pull(A))
    assert weights is not None
    assert (weights.generation, len(weights.learners)) == (1, 1)


def test_an_upstream_that_counts_anew_is_followed_and_not_asked_without_end() -> None:
    above, below = root(replace(EMPTY, generation=7)), relay()
    for _ in range(2):
        above.attend(attend("learner-0", "training", generation=7, since=7))
    connect(below, above)
    below.pass_time(2 * HOLD_S)
    restarted = root(incarnation=78)
    restarted.attend(attend("learner-0", version=0, incarnation=2))
    assert connect(below, restarted) == 2
    assert below.store.snapshot.generation == 1
    assert below.store.snapshot.learners == (Destination(endpoint="tcp://learner-0:5555", since=1),)


def test_a_relay_of_a_relay_works() -> None:
    above, middle, below = root(), relay("middle"), relay("below")
    above.attend(attend("learner-0", version=0))
    above.pull(b"other", pull(client("other")))
    assert below.pull(b"A", pull(A)) is None
    for _ in range(2):
        connect(below, middle)
        connect(middle, above)
        connect(below, middle)
    assert only(Weights, below.take(b"A")).seats == (1,)
    assert below.pull(b"A", pull(client("a", seat=1), generation=1)) is None
    above.publish(publish(1, b"one"))
    connect(middle, above)
    connect(below, middle)
    weights = only(Weights, below.take(b"A"))
    assert (weights.payload, weights.seats, weights.steps) == (b"one", (1,), 640)
    assert (weights.generation, weights.learners) == (1, above.store.snapshot.learners)
    below.goodbye(b"A", client("a", seat=1))
    connect(below, middle)
    connect(middle, above)
    above.pass_time(0.0)
    assert above.count("seats") == 1  # the other one's
