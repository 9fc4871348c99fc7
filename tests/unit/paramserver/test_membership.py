"""Seats: who gets which, for how long, and what survives restarts on either side."""

import math

from services.paramserver.membership import RelayedSeats, Seats
from services.wire.messages import NO_SEAT, Client

LEASE_S = 30.0


def client(name: str, incarnation: int = 1, seat: int = NO_SEAT) -> Client:
    return Client(client_id=name, incarnation=incarnation, seat=seat)


def seated(*names: str, num_seats: int = 100) -> Seats:
    seats = Seats(LEASE_S, num_seats)
    for name in names:
        seats.renew(client(name), 0.0)
    return seats


def test_newcomers_get_the_smallest_free_seats_in_order() -> None:
    seats = seated("a", "b", "c")
    assert [seats.seat_of(client(name)) for name in "abc"] == [0, 1, 2]
    assert len(seats) == 3


def test_renewing_keeps_the_seat() -> None:
    seats = seated("a", "b")
    seats.renew(client("b"), 1.0)
    assert seats.seat_of(client("b")) == 1
    assert len(seats) == 2


def test_a_stranger_has_no_seat() -> None:
    assert seated("a").seat_of(client("b")) == NO_SEAT


def test_a_lease_ends_at_its_last_moment_and_not_before() -> None:
    seats = seated("a")
    seats.expire(math.nextafter(LEASE_S, 0.0))
    assert seats.seat_of(client("a")) == 0
    seats.expire(LEASE_S)
    assert seats.seat_of(client("a")) == NO_SEAT
    assert len(seats) == 0


def test_only_silent_clients_lose_their_seats_and_the_smallest_one_is_reused_first() -> None:
    seats = seated("a", "b", "c")
    seats.renew(client("c"), 1.0)
    seats.expire(LEASE_S)
    for name in "de":
        seats.renew(client(name), LEASE_S)
    assert [seats.seat_of(client(name)) for name in "dec"] == [0, 1, 2]


def test_the_next_expiry_is_that_of_the_client_that_was_silent_longest() -> None:
    seats = seated("a", "b")
    seats.renew(client("a"), 5.0)
    assert seats.next_expiry_s() == LEASE_S
    seats.expire(LEASE_S)
    assert seats.next_expiry_s() == LEASE_S + 5.0
    seats.expire(LEASE_S + 5.0)
    assert seats.next_expiry_s() == math.inf


def test_goodbye_frees_the_seat_at_once() -> None:
    seats = seated("a", "b")
    seats.release(client("a"))
    seats.renew(client("c"), 1.0)
    assert seats.seat_of(client("c")) == 0


def test_goodbye_of_a_stranger_changes_nothing() -> None:
    seats = seated("a")
    seats.release(client("b"))
    assert len(seats) == 1


def test_a_newer_incarnation_inherits_the_seat() -> None:
    seats = seated("a", "b")
    seats.renew(client("a", incarnation=2), 1.0)
    assert seats.seat_of(client("a", incarnation=2)) == 0
    assert len(seats) == 2


def test_an_older_incarnation_neither_renews_nor_says_goodbye_nor_is_told_a_seat() -> None:
    seats = Seats(LEASE_S)
    seats.renew(client("a", incarnation=2), 0.0)
    seats.renew(client("a", incarnation=1), 20.0)
    assert seats.seat_of(client("a", incarnation=1)) == NO_SEAT
    seats.release(client("a", incarnation=1))
    assert seats.seat_of(client("a", incarnation=2)) == 0
    seats.expire(LEASE_S)
    assert seats.seat_of(client("a", incarnation=2)) == NO_SEAT


def test_after_a_restart_clients_get_the_seats_that_they_claim_in_whatever_order_they_come() -> None:
    seats = Seats(LEASE_S)
    for name, seat in [("c", 2), ("a", 0), ("b", 1)]:
        seats.renew(client(name, seat=seat), 0.0)
    assert [seats.seat_of(client(name)) for name in "abc"] == [0, 1, 2]


def test_of_two_who_claim_one_seat_the_first_gets_it_and_the_other_a_new_one() -> None:
    seats = Seats(LEASE_S)
    seats.renew(client("newcomer"), 0.0)
    seats.renew(client("a", seat=0), 0.0)
    assert seats.seat_of(client("newcomer")) == 0
    assert seats.seat_of(client("a", seat=0)) == 1


def test_a_claim_does_not_move_who_already_sits() -> None:
    seats = seated("a", "b")
    seats.renew(client("a", seat=7), 1.0)
    assert seats.seat_of(client("a", seat=7)) == 0


def test_a_claim_leaves_the_smaller_seats_to_newcomers() -> None:
    seats = Seats(LEASE_S)
    seats.renew(client("a", seat=1), 0.0)
    for name in "bc":
        seats.renew(client(name), 0.0)
    assert [seats.seat_of(client(name)) for name in "bc"] == [0, 2]


def test_a_claim_beyond_the_last_seat_gets_the_smallest_free_one() -> None:
    seats = Seats(LEASE_S, num_seats=2)
    seats.renew(client("a", seat=2), 0.0)
    assert seats.seat_of(client("a")) == 0


def test_in_a_full_house_a_client_stands_until_a_seat_is_free() -> None:
    seats = seated("a", "b", num_seats=2)
    seats.renew(client("c"), 1.0)
    assert seats.seat_of(client("c")) == NO_SEAT
    assert len(seats) == 2
    seats.release(client("a"))
    seats.renew(client("c"), 2.0)
    assert seats.seat_of(client("c")) == 0


def test_no_seat_is_lost_or_dealt_twice_whatever_happens() -> None:
    """Against a slow reference: the set of seats taken is always as large as the number of holders."""
    seats = Seats(LEASE_S, num_seats=8)
    now_s, state = 0.0, 12345
    for _ in range(5000):
        state = (state * 1103515245 + 12345) % 2**31  # a generator small enough to stand here
        who = client(f"c{state % 11}", incarnation=state // 11 % 3, seat=state // 37 % 10 - 1)
        if state % 5 == 0:
            seats.release(who)
        else:
            seats.renew(who, now_s)
        now_s += state % 7
        seats.expire(now_s)
        told = [seats.seat_of(client(f"c{i}", incarnation=9)) for i in range(11)]
        taken = [seat for seat in told if seat != NO_SEAT]
        assert len(taken) == len(set(taken)) == len(seats)
        assert all(0 <= seat < 8 for seat in taken)
    seats.expire(now_s + LEASE_S)
    for i in range(8):
        seats.renew(client(f"d{i}"), now_s + LEASE_S)
    assert [seats.seat_of(client(f"d{i}")) for i in range(8)] == list(range(8))


def test_a_relay_believes_its_clients_until_upstream_has_spoken() -> None:
    seats = RelayedSeats(LEASE_S)
    seats.renew(client("a", seat=5), 0.0)
    seats.renew(client("b"), 0.0)
    assert seats.seat_of(client("a", seat=5)) == 5
    assert seats.seat_of(client("b")) == NO_SEAT
    seats.learn(seats.ask(), (6, 7))
    assert seats.seat_of(client("a", seat=5)) == 6
    assert seats.seat_of(client("b")) == 7


def test_a_relay_names_every_client_with_the_seat_it_was_given() -> None:
    seats = RelayedSeats(LEASE_S)
    seats.renew(client("a"), 0.0)
    seats.learn(seats.ask(), (3,))
    seats.renew(client("a"), 1.0)
    assert seats.ask() == (client("a", seat=3),)


def test_a_relay_knows_whether_somebody_is_new_to_upstream() -> None:
    seats = RelayedSeats(LEASE_S)
    observed = [seats.has_unasked]
    seats.renew(client("a"), 0.0)
    observed.append(seats.has_unasked)
    seats.ask()
    seats.renew(client("a"), 1.0)
    observed.append(seats.has_unasked)
    seats.renew(client("b"), 1.0)
    observed.append(seats.has_unasked)
    seats.release(client("b"))
    observed.append(seats.has_unasked)
    assert observed == [False, True, False, True, False]


def passed_on(seats: RelayedSeats) -> list[Client]:
    """All goodbyes that wait for it."""
    departed = []
    while (who := seats.departed()) is not None:
        departed.append(who)
        seats.passed_on(who)
    return departed


def test_a_relay_passes_each_goodbye_on_once_but_not_the_end_of_a_lease() -> None:
    seats = RelayedSeats(LEASE_S)
    for name in "ab":
        seats.renew(client(name), 0.0)
    seats.release(client("a", incarnation=2))
    seats.release(client("stranger"))
    assert [seats.departed() for _ in range(2)] == [client("a", incarnation=2)] * 2
    assert passed_on(seats) == [client("a", incarnation=2)]
    seats.expire(LEASE_S)
    assert passed_on(seats) == []
    assert len(seats) == 0


def test_a_goodbye_waits_for_as_long_as_it_must_but_not_for_one_that_has_come_back() -> None:
    seats = RelayedSeats(LEASE_S)
    for name in "ab":
        seats.renew(client(name), 0.0)
        seats.release(client(name))
    seats.expire(1000 * LEASE_S)
    seats.renew(client("a"), 1000 * LEASE_S)
    assert passed_on(seats) == [client("b")]


def test_a_relay_remembers_no_more_goodbyes_than_there_are_seats() -> None:
    seats = RelayedSeats(LEASE_S, num_seats=2)
    for name in "abc":
        seats.renew(client(name), 0.0)
        seats.release(client(name))
    assert passed_on(seats) == [client("a"), client("b")]


def test_a_relay_ignores_older_incarnations_and_answers_for_clients_that_have_left() -> None:
    seats = RelayedSeats(LEASE_S)
    seats.renew(client("a", incarnation=2), 0.0)
    seats.renew(client("b"), 0.0)
    asked = seats.ask()
    seats.renew(client("a", incarnation=1), 20.0)
    seats.release(client("a", incarnation=1))
    seats.release(client("b"))
    seats.learn(asked, (4, 5))
    assert seats.seat_of(client("a", incarnation=1)) == NO_SEAT
    assert seats.seat_of(client("a", incarnation=2)) == 4
    assert seats.seat_of(client("b")) == NO_SEAT
    assert seats.next_expiry_s() == LEASE_S


def test_a_newer_incarnation_at_a_relay_keeps_the_seat_that_upstream_gave() -> None:
    seats = RelayedSeats(LEASE_S)
    seats.renew(client("a"), 0.0)
    seats.learn(seats.ask(), (4,))
    seats.renew(client("a", incarnation=2), 1.0)
    assert seats.ask() == (client("a", incarnation=2, seat=4),)


def test_a_relay_takes_no_more_clients_than_there_are_seats() -> None:
    seats = RelayedSeats(LEASE_S, num_seats=1)
    seats.renew(client("a"), 0.0)
    seats.renew(client("b"), 0.0)
    assert seats.ask() == (client("a"),)
    assert seats.seat_of(client("b")) == NO_SEAT
