"""The rules of the parameter server, without sockets: who is answered when, and with what."""

import logging
import math
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from services.paramserver.clock import LONGEST_TURN_S
from services.paramserver.server import MAX_REFUSED_PEERS, REFUSAL_INTERVAL_S
from services.paramserver.store import Snapshot
from services.paramserver.views import QUIET_S
from services.paramserver.window import LEAST_SLOTS, WINDOW_BYTES
from services.wire.codec import REASONS, decode, encode
from services.wire.messages import (
    NO_GENERATION,
    PROTOCOL_VERSION,
    Client,
    Goodbye,
    Message,
    PackedArray,
    Pull,
    Refusal,
    Rollout,
    View,
    Weights,
)
from tests.unit.paramserver.harness import (
    EXPECTED,
    HOLD_S,
    LEARNER_LEASE_S,
    LEASE_S,
    LIMIT,
    Node,
    attend,
    client,
    only,
    publish,
    pull,
    root,
)

V5 = Snapshot(version=5, steps=3200, state="training", payload=b"five")
A, B, C = client("a"), client("b"), client("c")
SEATED_A = client("a", seat=0)


@pytest.fixture
def node() -> Node:
    """A server with version 5, and actor ``a`` in seat 0."""
    server = root(V5)
    assert server.pull(b"A", pull(A, 5)) is not None
    return server


# --- pull -------------------------------------------------------------------------------------------------


def test_an_actor_is_told_its_seat_at_once_before_there_are_weights() -> None:
    answer = root().pull(b"A", pull(A, request=9))
    assert answer == Weights(
        run_id="run",
        server_incarnation=77,
        state="waiting",
        version=-1,
        steps=0,
        seats=(0,),
        payload=None,
        request=9,
    )


def test_a_late_joiner_gets_the_newest_weights_at_once() -> None:
    answer = root(V5).pull(b"A", pull(A))
    assert answer is not None
    assert (answer.version, answer.steps, answer.state, answer.seats) == (5, 3200, "training", (0,))
    assert answer.payload == b"five"


def test_a_request_without_news_is_held_and_answered_without_payload_when_the_hold_ends(node: Node) -> None:
    assert node.pull(b"A", pull(SEATED_A, 5)) is None
    node.pass_time(math.nextafter(HOLD_S, 0) - 1e-9)
    assert node.take(b"A") == []
    node.pass_time(1e-6)
    answer = only(Weights, node.take(b"A"))
    assert (answer.version, answer.payload, answer.seats) == (5, None, (0,))
    node.pass_time(10 * HOLD_S)
    assert node.take(b"A") == []


def test_a_new_version_answers_all_held_requests_with_the_very_same_buffer(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5))
    node.pull(b"B", pull(client("eval"), 5, wants_seat=False))
    node.replies.clear()
    node.publish(publish(6))
    answers = [reply for reply in node.replies if reply.result == "full"]
    assert [reply.peer for reply in answers] == [b"A", b"B"]
    assert all(reply.frames[1] is node.store.snapshot.payload for reply in answers)
    assert only(Weights, node.take(b"A")).seats == (0,)
    assert only(Weights, node.take(b"B")).seats == ()


def test_whoever_has_a_version_from_the_future_is_held_until_there_is_a_newer_one(node: Node) -> None:
    """The server lost its memory, or its snapshot is old: clients keep what they have."""
    assert node.pull(b"A", pull(SEATED_A, 7)) is None
    node.publish(publish(6))
    node.publish(publish(7))
    assert node.take(b"A") == []
    node.publish(publish(8))
    assert only(Weights, node.take(b"A")).version == 8


def test_a_slow_client_skips_the_versions_it_missed(node: Node) -> None:
    for version in (6, 7, 8):
        node.publish(publish(version))
    answer = node.pull(b"A", pull(SEATED_A, 5))
    assert answer is not None
    assert answer.version == 8


def test_a_changed_run_state_answers_held_requests_without_payload(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5))
    node.publish(publish(5, payload=None, state="complete"))
    answer = only(Weights, node.take(b"A"))
    assert (answer.state, answer.version, answer.payload) == ("complete", 5, None)
    assert node.pull(b"A", pull(SEATED_A, 5)) is None


def test_a_newer_request_of_a_peer_replaces_its_older_one(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5, request=1))
    node.pass_time(2.0)
    node.pull(b"A", pull(SEATED_A, 5, request=2))
    node.pass_time(2.0)
    assert node.take(b"A") == []
    node.publish(publish(6))
    assert only(Weights, node.take(b"A")).request == 2


def test_a_replaced_request_does_not_hold_up_those_that_came_in_between(node: Node) -> None:
    evaluator = pull(client("eval"), 5, wants_seat=False)
    node.pull(b"A", pull(SEATED_A, 5))
    node.pass_time(1.0)
    node.pull(b"E", evaluator)
    node.pass_time(1.0)
    node.pull(b"A", pull(SEATED_A, 5))
    node.pass_time(HOLD_S - 1.0)
    assert node.take(b"A") == []
    assert only(Weights, node.take(b"E")).payload is None


def test_a_request_that_is_answered_at_once_ends_the_one_held_before_it(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5))
    assert node.pull(b"A", pull(SEATED_A, 4)) is not None
    node.pass_time(HOLD_S)
    assert node.take(b"A") == []


def test_a_seat_other_than_the_one_held_is_told_at_once(node: Node) -> None:
    answer = node.pull(b"A", pull(client("a", seat=3), 5))
    assert answer is not None
    assert (answer.seats, answer.payload) == ((0,), None)


def test_a_lost_first_answer_is_repeated_to_whoever_asks_again(node: Node) -> None:
    again = node.pull(b"A2", pull(A, 5))
    assert again is not None
    assert again.seats == (0,)


def test_after_a_restart_actors_keep_the_seats_they_claim_and_are_held(node: Node) -> None:
    restarted = root(V5, incarnation=78)
    assert restarted.pull(b"B", pull(client("b", seat=1), 5)) is None
    assert restarted.pull(b"A", pull(SEATED_A, 5)) is None
    late = restarted.pull(b"C", pull(client("c"), 5))
    assert late is not None
    assert (late.seats, late.server_incarnation) == ((2,), 78)


def test_who_claims_a_seat_that_is_taken_is_told_another_one_at_once(node: Node) -> None:
    answer = node.pull(b"B", pull(client("b", seat=0), 5))
    assert answer is not None
    assert answer.seats == (1,)


def test_in_a_full_house_a_seatless_client_gets_weights_and_is_held_for_its_seat() -> None:
    node = root(V5, num_seats=1)
    node.pull(b"A", pull(A))
    first = node.pull(b"B", pull(B))
    assert first is not None
    assert (first.seats, first.payload) == ((-1,), b"five")
    assert node.pull(b"B", pull(B, 5)) is None
    node.goodbye(b"A", A)
    assert node.pull(b"B", pull(B, 5)) == replace(first, seats=(0,), payload=None)


def test_a_superseded_actor_that_insists_on_its_seat_is_held_and_not_answered_again_and_again(
    node: Node,
) -> None:
    node.pull(b"A2", pull(client("a", incarnation=2, seat=0), 5))
    assert node.pull(b"A", pull(SEATED_A, 5)) is None
    node.pass_time(HOLD_S)
    assert only(Weights, node.take(b"A")).seats == (-1,)


def test_a_silent_actors_seat_goes_to_the_next_newcomer(node: Node) -> None:
    node.pass_time(LEASE_S)
    assert node.count("seats") == 0
    answer = node.pull(b"B", pull(B, 5))
    assert answer is not None
    assert answer.seats == (0,)


def test_the_time_in_which_the_server_was_frozen_ends_no_seat(node: Node) -> None:
    node.pass_time(LEASE_S - 2 * LONGEST_TURN_S)
    node.freeze(40.0)
    newcomer = node.pull(b"B", pull(B, 5))  # it asked meanwhile, and is heard before the holder
    assert newcomer is not None
    assert newcomer.seats == (1,)
    assert node.pull(b"A", pull(SEATED_A, 5)) is None, "nothing is new for it"
    node.pass_time(HOLD_S)
    assert only(Weights, node.take(b"A")).seats == (0,)


def test_a_seat_that_nobody_renews_ends_after_a_freeze_when_it_is_said_to(node: Node) -> None:
    node.freeze(40.0)
    left_s = node.server.next_deadline_s() - node.now_s
    assert left_s == LEASE_S - LONGEST_TURN_S
    node.pass_time(left_s - 0.25)
    assert node.count("seats") == 1
    node.pass_time(0.25)
    assert node.count("seats") == 0


def test_a_request_names_many_clients_and_each_gets_its_seat() -> None:
    clients = tuple(client(f"a{i}") for i in range(50))
    answer = root().pull(b"R", replace(pull(client("relay")), seats_for=clients))
    assert answer is not None
    assert answer.seats == tuple(range(50))


# --- publish ----------------------------------------------------------------------------------------------


def test_a_publish_is_answered_with_the_version_now_held_and_counted(node: Node) -> None:
    answer = node.publish(publish(6))
    assert (answer.version, answer.server_incarnation) == (6, 77)
    assert (node.count("publishes_total"), node.count("version")) == (1, 6)


def test_the_learner_is_answered_before_the_payload_goes_out_to_everybody(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5))
    node.replies.clear()
    node.publish(publish(6))
    assert [reply.peer for reply in node.replies] == [b"learner", b"A"]


def test_an_announcement_learns_that_a_restarted_server_needs_the_payload() -> None:
    node = root()
    assert node.publish(publish(6, payload=None)).version == -1
    assert node.store.snapshot.state == "waiting"
    assert node.publish(publish(6)).version == 6


def test_a_version_older_than_the_one_held_changes_nothing_and_is_told_and_counted(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5))
    for payload in (b"rolled back", None):
        assert node.publish(publish(4, payload, state="complete")).version == 5
    assert node.store.snapshot is not None
    assert (node.store.snapshot.version, node.store.snapshot.state) == (5, "training")
    assert node.count("refused_requests_total", reason="stale") == 2
    assert node.count("publishes_total") == 0
    assert node.take(b"A") == []


def test_a_learner_that_was_rolled_back_goes_on_above_the_version_held(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5))
    held = node.publish(publish(2)).version
    assert node.publish(publish(held + 1, b"rolled back")).version == 6
    assert only(Weights, node.take(b"A")).payload == b"rolled back"


def test_the_same_version_twice_is_published_once(node: Node) -> None:
    node.publish(publish(6))
    node.pull(b"A", pull(SEATED_A, 6))
    assert node.publish(publish(6)).version == 6
    assert node.count("publishes_total") == 1
    assert node.take(b"A") == []


def test_the_log_names_the_learner_that_publishes_and_no_former_one_that_lags_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "impala.server")
    node = root(V5)
    node.publish(replace(publish(3), sender=client("learner-0")))
    assert caplog.messages == ["request_refused"]
    for version in (6, 7):
        node.publish(replace(publish(version), sender=client("learner-1")))
        node.publish(replace(publish(version, payload=None), sender=client("learner-1")))
    assert caplog.messages == ["request_refused", "publisher"]


@pytest.mark.parametrize("sender", [client("learner-1"), client("learner-0", 2), client("learner-9")])
@pytest.mark.parametrize("payload", [b"of another", None])
def test_while_there_is_a_group_only_its_first_member_publishes(
    node: Node, sender: Client, payload: bytes | None
) -> None:
    node.attend(attend("learner-0"))
    node.attend(attend("learner-1"))
    assert node.publish(replace(publish(6), sender=sender)).version == 6  # while they gather
    node.attend(attend("learner-0", generation=1))
    assert node.publish(replace(publish(9, payload, state="complete"), sender=sender)).version == 6
    assert (node.store.snapshot.version, node.store.snapshot.state) == (6, "training")
    assert node.count("refused_requests_total", reason="not_leader") == 1
    assert node.publish(publish(7)).version == 7
    assert node.count("refused_requests_total", reason="stale") == 0


def test_a_former_first_member_that_was_cut_off_does_not_publish_over_the_others(node: Node) -> None:
    node.attend(attend("learner-0"))
    node.publish(publish(6))
    node.pass_time(LONGEST_TURN_S)
    for _ in range(10):
        node.attend(attend("learner-1", generation=1))
        node.pass_time(LONGEST_TURN_S)
    assert [member.client_id for member in node.attend(attend("learner-1")).members] == ["learner-1"]
    assert node.publish(publish(600)).version == 6
    assert node.publish(replace(publish(7), sender=client("learner-1"))).version == 7


@pytest.mark.parametrize("payload", [b"weights", None])
def test_what_is_complete_is_taken_back_by_a_newer_version_or_by_the_first_member_alone(
    node: Node, payload: bytes | None
) -> None:
    node.publish(publish(5, payload, state="complete"))
    node.publish(publish(5, payload))
    states = [node.store.snapshot.state]
    node.attend(attend("learner-0"))
    node.publish(publish(5, payload))  # it was given more steps
    states.append(node.store.snapshot.state)
    assert states == ["complete", "training"]


def test_a_newer_version_than_the_complete_one_is_trained(node: Node) -> None:
    node.publish(publish(5, None, state="complete"))
    node.publish(publish(6))
    assert (node.store.snapshot.version, node.store.snapshot.state) == (6, "training")


# --- attend -----------------------------------------------------------------------------------------------


def learners_of(weights: Weights) -> tuple[int, list[tuple[str, int]]]:
    return weights.generation, [(learner.endpoint, learner.since) for learner in weights.learners]


L0, L1 = "tcp://learner-0:5555", "tcp://learner-1:5555"


def test_a_learner_with_another_configuration_is_refused_and_told_why_and_counted(node: Node) -> None:
    node.attend(attend("learner-0"))
    refusal = only(Refusal, node.ask(b"learner-1", attend("learner-1", config="other")))
    assert refusal.reason == "config"
    assert "configuration is not the one that the others train with" in refusal.text
    assert node.count("refused_requests_total", reason="config") == 1
    assert node.count("learners") == 1
    assert node.attend(attend("learner-0")).generation == 1
    assert node.attend(attend("learner-1")).members == ()


def test_it_may_not_take_their_place_until_this_server_holds_what_they_have(node: Node) -> None:
    node.attend(attend("learner-0", version=7))
    newcomer = attend("learner-1", config="other")
    assert only(Refusal, node.ask(b"learner-1", newcomer)).reason == "config_wait"
    node.publish(publish(7))
    node.pass_time(REFUSAL_INTERVAL_S)
    assert only(Refusal, node.ask(b"learner-1", newcomer)).reason == "config"


def test_a_learner_is_told_the_view_at_once_with_what_the_server_holds_and_how_many_actors_there_are(
    node: Node,
) -> None:
    view = node.attend(attend("learner-0", version=4))
    (member,) = view.members
    assert view == View(
        run_id="run",
        server_incarnation=77,
        generation=1,
        members=(member,),
        holder=0,
        version=5,
        num_seats=1,
    )
    assert (member.client_id, member.endpoint, member.since) == ("learner-0", L0, 1)
    assert root().attend(attend()).version == -1


def test_learners_that_attend_are_counted(node: Node) -> None:
    assert node.count("learners") == 0
    node.attend(attend("learner-0"))
    node.attend(attend("learner-1"))
    assert node.count("learners") == 2
    for _ in range(int(LEARNER_LEASE_S / LONGEST_TURN_S)):
        node.pass_time(LONGEST_TURN_S)
    assert node.count("learners") == 0


def test_a_pull_is_told_where_rollouts_go(node: Node) -> None:
    node.attend(attend("learner-0"))
    answer = node.pull(b"A", pull(SEATED_A, 4))
    assert answer is not None
    assert learners_of(answer) == (1, [(L0, 1)])


def test_before_there_are_learners_nothing_is_said_of_them_and_that_is_no_news(node: Node) -> None:
    answer = node.pull(b"A", pull(SEATED_A, 4))
    assert answer is not None
    assert learners_of(answer) == (NO_GENERATION, [])
    assert node.pull(b"A", pull(SEATED_A, 5, generation=3)) is None


def test_a_pull_of_another_generation_is_answered_at_once_and_one_of_this_is_held(node: Node) -> None:
    node.attend(attend("learner-0"))
    for other in (NO_GENERATION, 2):
        answer = node.pull(b"A", pull(SEATED_A, 5, generation=other))
        assert answer is not None
        assert (answer.payload, learners_of(answer)) == (None, (1, [(L0, 1)]))
    assert node.pull(b"A", pull(SEATED_A, 5, generation=1)) is None


def test_a_new_group_answers_held_requests_with_the_learners_and_without_payload(node: Node) -> None:
    node.attend(attend("learner-0"))
    assert node.pull(b"A", pull(SEATED_A, 5, generation=1)) is None
    node.attend(attend("learner-1"))
    assert node.take(b"A") == []  # while they gather, the old ones are the ones to send to
    late = node.pull(b"B", pull(B, 5, generation=NO_GENERATION))
    assert late is not None
    assert learners_of(late) == (1, [(L0, 1)])
    node.attend(attend("learner-0", generation=1))
    answer = only(Weights, node.take(b"A"))
    assert (answer.payload, learners_of(answer)) == (None, (2, [(L0, 1), (L1, 2)]))


def test_the_learner_is_answered_before_all_who_are_to_send_it_their_rollouts(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5))
    node.replies.clear()
    node.attend(attend("learner-0"))
    assert [reply.peer for reply in node.replies] == [b"learner-0", b"A"]


def test_a_group_that_comes_about_by_the_clock_answers_held_requests_too(node: Node) -> None:
    node.attend(attend("learner-0"))
    node.attend(attend("learner-1"))
    node.pull(b"A", pull(SEATED_A, 5, generation=1))
    while not node.sent.get(b"A"):  # learner-0 has been killed
        assert node.now_s < 100.0 + QUIET_S
        node.now_s = min(node.now_s + LONGEST_TURN_S, node.server.next_deadline_s())
        node.attend(attend("learner-1"))
        node.pass_time(0.0)
    assert node.now_s == 100.0 + QUIET_S
    assert learners_of(only(Weights, node.take(b"A"))) == (2, [(L1, 2)])


def test_learners_and_weights_that_are_news_come_in_one_answer(node: Node) -> None:
    node.attend(attend("learner-0"))
    answer = node.pull(b"A", pull(SEATED_A, 4))
    assert answer is not None
    assert (answer.payload, answer.generation) == (b"five", 1)
    assert node.pull(b"A", pull(SEATED_A, 5, generation=1)) is None


def test_a_restarted_server_takes_over_the_view_and_meanwhile_takes_no_learner_away() -> None:
    node = root(replace(V5, generation=7), incarnation=78)
    first = node.attend(attend("learner-1", "training", generation=7, rank=1, world_size=2, since=4))
    assert (first.generation, first.members) == (NO_GENERATION, ())
    assert node.pull(b"A", pull(SEATED_A, 5, generation=7)) is None
    newcomer = node.pull(b"B", pull(B))
    assert newcomer is not None
    assert (newcomer.payload, learners_of(newcomer)) == (b"five", (NO_GENERATION, []))
    assert node.pull(b"B", pull(client("b", seat=1), 5)) is None
    view = node.attend(attend("learner-0", "training", generation=7, rank=0, world_size=2, since=2))
    assert (view.generation, [m.client_id for m in view.members]) == (7, ["learner-0", "learner-1"])
    assert node.take(b"A") == []  # it knows them
    assert learners_of(only(Weights, node.take(b"B"))) == (7, [(L0, 2), (L1, 4)])
    assert node.store.snapshot.generation == 7


def test_the_newest_generation_is_in_the_store_for_the_next_life_of_the_server(node: Node) -> None:
    assert node.store.snapshot.generation == NO_GENERATION
    node.attend(attend("learner-0"))
    node.publish(publish(6))
    assert (node.store.snapshot.version, node.store.snapshot.generation) == (6, 1)
    node.attend(attend("learner-0", generation=1))
    assert node.store.snapshot.generation == 2


@pytest.mark.parametrize("role", ["actor", "evaluator", "paramserver", ""])
def test_who_has_proved_another_role_than_a_learners_does_not_attend(node: Node, role: str) -> None:
    (reply,) = node.server.handle(b"X", encode(attend()), node.now_s, role)
    refusal = decode(reply.frames, EXPECTED)
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.text) == (
        "role",
        f"only a learner may attend, and this is the key of role {role}",
    )
    assert node.count("learners") == 0


@pytest.mark.parametrize("role", ["learner", None])
def test_a_learner_attends_and_so_does_anybody_where_there_are_no_keys(node: Node, role: str | None) -> None:
    (reply,) = node.server.handle(b"X", encode(attend()), node.now_s, role)
    assert isinstance(decode(reply.frames, EXPECTED), View)
    assert node.count("learners") == 1


def waits_for_its_turn(node: Node, who: Client) -> bool:
    """Whether ``who`` gets no weights while as many as there is room for are on their way to others."""
    node.store.offer(replace(V5, version=6, payload=bytes(WINDOW_BYTES)))
    for number in range(LEAST_SLOTS):
        answer = node.server.handle(bytes([number]), encode(pull(client(f"c{number}"))), node.now_s)
        assert answer[0].result == "full"
    replies = node.server.handle(b"W", encode(pull(who, 5, wants_seat=False)), node.now_s)
    return [reply.result for reply in replies] != ["full"]


def test_a_learner_that_attends_gets_weights_out_of_turn(node: Node) -> None:
    node.attend(attend("learner-1", incarnation=3))
    assert not waits_for_its_turn(node, client("learner-1", incarnation=3))


@pytest.mark.parametrize("who", [client("learner-1", incarnation=2), client("learner-2", incarnation=3)])
def test_who_does_not_attend_waits_for_its_turn(node: Node, who: Client) -> None:
    node.attend(attend("learner-1", incarnation=3))
    assert waits_for_its_turn(node, who)


# --- goodbye ----------------------------------------------------------------------------------------------


def test_goodbye_frees_the_seat_and_drops_the_held_request_without_an_answer(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5))
    node.goodbye(b"A", A)
    node.publish(publish(6))
    node.pass_time(HOLD_S)
    assert node.take(b"A") == []
    answer = node.pull(b"B", pull(B))
    assert answer is not None
    assert answer.seats == (0,)


def test_a_goodbye_that_a_relay_passes_on_leaves_the_relays_own_request_open(node: Node) -> None:
    node.pull(b"R", replace(pull(client("relay"), 5), seats_for=(SEATED_A,)))
    node.goodbye(b"R", A)
    node.publish(publish(6))
    assert only(Weights, node.take(b"R")).payload == b"weights"


# --- time -------------------------------------------------------------------------------------------------


def test_the_next_deadline_is_the_nearest_of_holds_and_leases() -> None:
    node = root(V5)
    assert node.server.next_deadline_s() == math.inf
    node.pull(b"A", pull(A, 5))
    assert node.server.next_deadline_s() == node.now_s + LEASE_S
    node.pull(b"A", pull(SEATED_A, 5))
    assert node.server.next_deadline_s() == node.now_s + HOLD_S
    node.now_s += 1.0
    node.pull(b"B", pull(client("eval"), 5, wants_seat=False))
    assert node.server.next_deadline_s() == node.now_s - 1.0 + HOLD_S
    node.attend(attend("learner-0"))
    node.attend(attend("learner-1"))
    assert node.server.next_deadline_s() == node.now_s + QUIET_S


def test_immediate_and_released_answers_are_timed_but_the_end_of_a_hold_is_not(node: Node) -> None:
    node.replies.clear()
    node.pull(b"A", pull(SEATED_A, 4))
    node.pull(b"A", pull(SEATED_A, 5))
    node.now_s += 1.0
    node.publish(publish(6))
    node.pull(b"A", pull(SEATED_A, 6))
    node.pass_time(HOLD_S)
    timed = [(reply.result, reply.since_s) for reply in node.replies if reply.peer == b"A"]
    assert timed == [("full", 100.0), ("full", 101.0), ("not_modified", None)]


# --- refusals ---------------------------------------------------------------------------------------------


def test_a_peer_of_another_run_is_refused_and_told_which_run_this_is(node: Node) -> None:
    refusal = only(Refusal, node.ask(b"X", replace(pull(A), run_id="other")))
    assert refusal.reason == "run"
    assert "'other'" in refusal.text
    assert "'run'" in refusal.text
    assert node.count("refused_requests_total", reason="run") == 1


@pytest.mark.parametrize("version", [PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1])
def test_a_peer_of_another_protocol_is_told_both_versions(node: Node, version: int) -> None:
    node.receive(b"X", [msgpack.packb([version, "pull", ["anything", {"new": 1}]])])
    refusal = only(Refusal, node.take(b"X"))
    assert refusal.reason == "protocol"
    assert f"protocol {version}," in refusal.text
    assert f"this is protocol {PROTOCOL_VERSION}" in refusal.text


def test_each_reason_is_counted_under_its_name(node: Node) -> None:
    node.receive(b"1", [b"\xc1"])
    node.receive(b"2", [msgpack.packb([99, "pull", []])])
    node.receive(b"3", encode(replace(pull(A), run_id="x")))
    node.receive(b"4", [*encode(publish(6, payload=None)), bytes(LIMIT)])
    counts = {reason: node.count("refused_requests_total", reason=reason) for reason in REASONS}
    assert counts == {"malformed": 1, "protocol": 1, "run": 1, "oversized": 1, "schema": 0, "corrupt": 0}


@pytest.mark.parametrize("role", ["actor", "evaluator", "paramserver", "", "Learner"])
def test_who_has_proved_another_role_than_a_learners_publishes_nothing(node: Node, role: str) -> None:
    node.pull(b"A", pull(A, have_version=5))
    replies = node.server.handle(b"X", encode(publish(9)), node.now_s, role)
    assert [reply.peer for reply in replies] == [b"X"]
    refusal = decode(replies[0].frames, EXPECTED)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "role"
    assert refusal.text == f"only a learner may publish, and this is the key of role {role}"
    assert node.store.snapshot.version == 5
    assert node.count("refused_requests_total", reason="role") == 1
    assert node.count("publishes_total") == 0


@pytest.mark.parametrize("role", ["learner", None])
def test_a_learner_publishes_and_so_does_anybody_where_there_are_no_keys(
    node: Node, role: str | None
) -> None:
    node.server.handle(b"X", encode(publish(9)), node.now_s, role)
    assert node.store.snapshot.version == 9


@pytest.mark.parametrize("role", ["actor", "learner", "evaluator", "paramserver"])
def test_every_role_may_ask_for_weights(node: Node, role: str) -> None:
    (reply,) = node.server.handle(b"X", encode(pull(A, wants_seat=False)), node.now_s, role)
    answer = decode(reply.frames, EXPECTED)
    assert isinstance(answer, Weights)
    assert answer.payload is not None


def num_seats_of(node: Node) -> int:
    """As learners are told."""
    return node.attend(attend()).num_seats


def asks_for(sender: Client, *others: Client) -> Pull:
    return replace(pull(sender), seats_for=(sender, *others))


@pytest.mark.parametrize(
    ("role", "message", "why"),
    [
        ("actor", asks_for(A, B), "only a relay may ask for the seats of others"),
        ("actor", replace(pull(A), seats_for=(B,)), "only a relay may ask for the seats of others"),
        ("learner", pull(A), "only an actor or a relay may ask for seats"),
        ("evaluator", pull(A), "only an actor or a relay may ask for seats"),
        ("learner", Goodbye(run_id="run", sender=A), "only an actor or a relay may give seats back"),
        ("evaluator", Goodbye(run_id="run", sender=A), "only an actor or a relay may give seats back"),
    ],
)
def test_who_has_proved_another_role_takes_and_ends_no_seat_of_an_actor(
    node: Node, role: str, message: Message, why: str
) -> None:
    (reply,) = node.server.handle(b"X", encode(message), node.now_s, role)
    refusal = decode(reply.frames, EXPECTED)
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.text) == ("role", f"{why}, and this is the key of role {role}")
    assert num_seats_of(node) == 1
    assert node.count("refused_requests_total", reason="role") == 1


@pytest.mark.parametrize(("role", "num_seats"), [("actor", 1), ("paramserver", 3), (None, 3)])
def test_an_actor_takes_and_ends_its_own_seat_and_a_relay_those_of_all(
    node: Node, role: str | None, num_seats: int
) -> None:
    message = asks_for(A) if role == "actor" else asks_for(A, B, C)
    (reply,) = node.server.handle(b"X", encode(message), node.now_s, role)
    answer = decode(reply.frames, EXPECTED)
    assert isinstance(answer, Weights)
    assert answer.seats == tuple(range(num_seats))
    assert num_seats_of(node) == num_seats
    node.server.handle(b"X", encode(Goodbye(run_id="run", sender=A)), node.now_s, role)
    assert num_seats_of(node) == num_seats - 1
    assert node.count("refused_requests_total", reason="role") == 0


def test_messages_that_are_no_requests_are_refused(node: Node) -> None:
    weights = Weights(
        run_id="run", server_incarnation=1, state="training", version=9, steps=1, seats=(), payload=b"x"
    )
    assert only(Refusal, node.ask(b"X", weights)).text == "Weights is not a request"
    rollout = Rollout(
        run_id="run",
        actor_id="a",
        incarnation=1,
        sequence=0,
        policy_version=0,
        task=0,
        episodes=(),
        arrays={"x": PackedArray(dtype="uint8", shape=(1,), codec="none", data=b"1")},
    )
    assert only(Refusal, node.ask(b"Y", rollout)).reason == "malformed"
    assert node.store.snapshot.version == 5


def test_a_refusal_is_counted_but_never_answered(node: Node) -> None:
    assert node.ask(b"X", Refusal(reason="run", text="go away")) == []
    assert node.count("refused_requests_total", reason="malformed") == 1


def test_a_peer_is_refused_at_most_once_per_second_but_always_counted(node: Node) -> None:
    for _ in range(5):
        node.receive(b"X", [b"garbage"])
    assert len(node.take(b"X")) == 1
    node.receive(b"Y", [b"garbage"])
    assert len(node.take(b"Y")) == 1
    node.now_s += REFUSAL_INTERVAL_S
    node.receive(b"X", [b"garbage"])
    assert len(node.take(b"X")) == 1
    assert node.count("refused_requests_total", reason="malformed") == 7


def test_the_memory_of_refused_peers_is_bounded(node: Node) -> None:
    for i in range(MAX_REFUSED_PEERS + 1):
        node.receive(i.to_bytes(4, "big"), [b"garbage"])
    first, last = (0).to_bytes(4, "big"), MAX_REFUSED_PEERS.to_bytes(4, "big")
    node.take(first), node.take(last)
    node.receive(first, [b"garbage"])
    node.receive(last, [b"garbage"])
    assert len(node.take(first)) == 1  # forgotten, so refused once more
    assert node.take(last) == []


def test_garbage_from_a_peer_leaves_its_held_request_alone(node: Node) -> None:
    node.pull(b"A", pull(SEATED_A, 5))
    node.receive(b"A", [b"garbage"])
    node.take(b"A")
    node.publish(publish(6))
    assert only(Weights, node.take(b"A")).version == 6


def test_nothing_that_arrives_raises_or_stops_the_answers(node: Node) -> None:
    rng = np.random.default_rng(7)
    valid = [
        encode(m)
        for m in (pull(A, 5), publish(4), publish(5, None), attend(), replace(pull(A), seats_for=(A, B) * 9))
    ]
    for step in range(20_000):
        frames = [bytearray(frame) for frame in valid[step % len(valid)]]
        for _ in range(rng.integers(1, 4)):
            frame = frames[rng.integers(len(frames))]
            if frame:
                frame[rng.integers(len(frame))] = rng.integers(256)
        if step % 3 == 0:
            frames = frames[: rng.integers(len(frames) + 1)]
        if step % 5 == 0:
            frames.append(bytearray(rng.bytes(int(rng.integers(40)))))
        node.note(node.server.handle(rng.bytes(1), frames, node.now_s))
        node.now_s += 0.001
        node.note(node.server.tick(node.now_s))
    assert node.count("refused_requests_total", reason="malformed") > 1000
    assert node.count("refused_requests_total", reason="internal") == 0
    answer = node.pull(b"late", pull(client("late"), -1))
    assert answer is not None
    assert answer.payload is not None
