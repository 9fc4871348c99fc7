"""Who trains with whom: views are formed, end, and outlive the server, whatever learners do."""

import math
from dataclasses import replace

import pytest

from services.paramserver.absent import AWAY_S, Absent
from services.paramserver.clock import LONGEST_TURN_S
from services.paramserver.quarantine import FAILURES_ALONE, FIRST_WAIT_S, LONGEST_WAIT_S, PROVEN_S
from services.paramserver.views import (
    ADOPT_S,
    GATHER_S,
    LARGEST_LEAP,
    LATE_S,
    QUIET_S,
    RETURN_S,
    Views,
)
from services.wire.codec import MAX_LEARNERS
from services.wire.messages import NO_GENERATION, NO_VERSION, Attend, Phase
from tests.unit.paramserver.harness import attend, client

BEAT_S = 0.25
LEASE_S = 5.0
INSTANT_S = 2**-20
"""Less than anything here takes, and exact in all sums."""


class Room:
    """Views with a clock, and learners that go on saying what they said last."""

    def __init__(
        self,
        *,
        generation: int = NO_GENERATION,
        min_learners: int = 1,
        remembers: bool = True,
        lease_s: float = LEASE_S,
    ) -> None:
        self.views = Views(
            generation=generation, lease_s=lease_s, min_learners=min_learners, remembers=remembers
        )
        self.now_s = 100.0
        self._says: dict[str, Attend] = {}

    def say(self, *attends: Attend) -> None:
        """Once now, one after the other, and again at every beat."""
        for message in attends:
            self._says[message.sender.client_id] = message
            self.hear(message)

    def hear(self, message: Attend) -> bool:
        """Once; False if it is refused."""
        return self.views.attend(message, self.now_s)

    def silence(self, *names: str) -> None:
        """Killed, frozen or cut off: it has just spoken for the last time."""
        for name in names:
            del self._says[name]

    def empty(self) -> None:
        """All are silent from now on."""
        self._says.clear()

    def pass_time(self, seconds: float) -> None:
        """Beat by beat; the server looks at the clock between any two."""
        end_s = self.now_s + seconds
        while self.now_s + BEAT_S <= end_s:
            self.now_s += BEAT_S
            for message in self._says.values():
                self.hear(message)
            self.views.tick(self.now_s)
        self.now_s = end_s
        self.views.tick(self.now_s)

    @property
    def names(self) -> list[str]:
        return [member.client_id for member in self.views.members]

    @property
    def view(self) -> tuple[int, list[str]]:
        return self.views.generation, self.names


def trains(name: str, generation: int, rank: int = 0, world_size: int = 1, since: int = 1) -> Attend:
    return attend(
        name,
        "training",
        generation=generation,
        has_trained=True,
        rank=rank,
        world_size=world_size,
        since=since,
    )


def stands(
    name: str, generation: int = NO_GENERATION, version: int | None = None, incarnation: int = 1
) -> Attend:
    """Who has been in a view has made a version."""
    if version is None:
        version = int(generation != NO_GENERATION)
    return attend(name, generation=generation, version=version, incarnation=incarnation)


def leaves(name: str, generation: int = NO_GENERATION) -> Attend:
    return attend(name, "leaving", generation=generation)


def room_of(*names: str, min_learners: int = 1) -> Room:
    """In which they train; the room has been through one generation for each of them."""
    room = Room(min_learners=min_learners)
    for count in range(1, len(names) + 1):
        room.say(*(stands(name, room.views.generation) for name in reversed(names[:count])))
    train(room)
    return room


def train(room: Room) -> None:
    """All members hear of the view, and say so, and make steps."""
    enter(room)
    step(room)


def enter(room: Room) -> None:
    """All members hear of the view, and say so."""
    generation, names = room.view
    for rank, member in enumerate(room.views.members):
        room.say(trains(member.client_id, generation, rank, len(names), member.since))


def step(room: Room) -> None:
    """Their first one publishes a new version."""
    room.views.held_version = max(room.views.held_version, 1) + 1
    room.views.tick(room.now_s)


# --- joining and leaving ----------------------------------------------------------------------------------


def test_the_first_learner_of_a_new_run_is_its_first_group_at_once() -> None:
    room = Room()
    assert room.view == (NO_GENERATION, [])
    room.say(stands("learner-0"))
    assert room.view == (1, ["learner-0"])
    (member,) = room.views.members
    assert (member.incarnation, member.endpoint, member.store, member.since) == (
        1,
        "tcp://learner-0:5555",
        "learner-0:1",
        1,
    )


def test_a_newcomer_ends_the_view_and_the_next_one_begins_when_all_stand() -> None:
    room = room_of("learner-0", "learner-1")
    room.say(stands("learner-2"))
    assert room.view == (2, [])
    room.say(stands("learner-1", 2))
    assert room.view == (2, [])
    room.say(stands("learner-0", 2))
    assert room.view == (3, ["learner-0", "learner-1", "learner-2"])


def test_a_member_that_leaves_ends_the_view_and_is_not_waited_for() -> None:
    room = room_of("learner-0", "learner-1")
    room.hear(leaves("learner-0", 2))
    assert room.view == (2, [])
    assert len(room.views) == 1
    room.say(stands("learner-1", 2))
    assert room.view == (3, ["learner-1"])


def test_a_learner_that_leaves_while_others_wait_for_it_lets_them_go_on() -> None:
    room = room_of("learner-0", "learner-1")
    room.say(stands("learner-0", 2))
    assert room.view == (2, [])
    room.hear(leaves("learner-1", 2))
    assert room.view == (3, ["learner-0"])


def test_the_goodbye_of_somebody_who_is_no_member_changes_nothing() -> None:
    room = room_of("learner-0")
    room.hear(leaves("learner-7"))
    room.hear(leaves("learner-0", 1))
    room.hear(leaves("learner-0", 1))
    assert room.view == (1, [])
    assert len(room.views) == 0
    room.say(stands("learner-1", version=1))
    assert room.view == (2, ["learner-1"])


def test_a_group_that_broke_stands_and_goes_on_as_the_next_generation() -> None:
    room = room_of("learner-0", "learner-1")
    room.say(stands("learner-1", 2))
    assert room.view == (2, [])
    room.say(stands("learner-0", 2))
    assert room.view == (3, ["learner-0", "learner-1"])


@pytest.mark.parametrize("phase", ["standing", "training"])
def test_who_has_not_heard_of_the_view_yet_does_not_end_it(phase: str) -> None:
    room = room_of("learner-0", "learner-1")
    room.say(stands("learner-1", 1) if phase == "standing" else trains("learner-1", 1))
    room.pass_time(20.0)
    assert room.view == (2, ["learner-0", "learner-1"])


def test_who_trains_in_an_earlier_generation_and_was_left_behind_changes_nothing_until_it_stands() -> None:
    room = room_of("learner-0")
    room.say(trains("learner-9", 0))
    assert room.view == (1, ["learner-0"])
    room.say(stands("learner-9", 1))
    assert room.view == (1, [])


def test_a_member_that_has_just_been_sent_into_the_view_is_not_taken_for_one_that_stands() -> None:
    """It is on its way into a group whose store would be dealt a second time."""
    room = Room()
    room.say(stands("learner-0"))
    room.say(stands("learner-1"))
    assert room.view == (1, [])  # what learner-0 said last is that it stands, but it trains by now
    room.say(trains("learner-0", 1))
    assert room.view == (1, [])
    room.say(stands("learner-0", 1))
    assert room.view == (2, ["learner-0", "learner-1"])


def test_a_member_whose_answer_was_lost_stands_when_it_says_so_again() -> None:
    room = Room()
    room.say(stands("learner-0"))
    room.say(stands("learner-1"))
    room.hear(stands("learner-0"))  # after no generation: it has not heard of the first one
    assert room.view == (2, ["learner-0", "learner-1"])


# --- silence ----------------------------------------------------------------------------------------------


def test_a_member_may_be_silent_for_less_than_the_lease_and_not_for_longer() -> None:
    room = room_of("learner-0", "learner-1")
    room.silence("learner-1")
    room.pass_time(LEASE_S - INSTANT_S)
    assert room.view == (2, ["learner-0", "learner-1"])
    room.pass_time(INSTANT_S)
    assert room.view == (2, [])
    room.say(stands("learner-0", 2))
    assert room.view == (3, ["learner-0"])


def test_any_word_of_a_member_renews_its_lease() -> None:
    room = room_of("learner-0", "learner-1")
    room.pass_time(100 * LEASE_S)
    assert room.view == (2, ["learner-0", "learner-1"])


def test_the_silence_of_somebody_who_is_no_member_ends_no_view() -> None:
    room = room_of("learner-0")
    room.hear(trains("learner-9", 0))
    assert len(room.views) == 2
    room.pass_time(2 * LEASE_S)
    assert len(room.views) == 1
    assert room.view == (1, ["learner-0"])


def test_a_group_does_not_wait_longer_for_a_killed_member_than_it_takes_to_tell() -> None:
    room = room_of("learner-0", "learner-1", "learner-2")
    room.silence("learner-2")
    room.say(stands("learner-0", 3), stands("learner-1", 3))  # their connections to it have broken
    room.pass_time(QUIET_S - INSTANT_S)
    assert room.view == (3, [])
    room.pass_time(INSTANT_S)
    assert room.view == (4, ["learner-0", "learner-1"])


def test_a_group_does_not_wait_longer_than_this_for_a_member_that_attends_but_hangs() -> None:
    room = room_of("learner-0", "learner-1", "learner-2")
    room.say(stands("learner-0", 3), stands("learner-1", 3))
    room.pass_time(GATHER_S - INSTANT_S)
    assert room.view == (3, [])
    room.pass_time(INSTANT_S)
    assert room.view == (4, ["learner-0", "learner-1"])
    train(room)
    room.pass_time(GATHER_S)
    assert room.view == (4, ["learner-0", "learner-1"])
    room.say(stands("learner-2", 4))  # it has come to its senses
    assert room.view == (4, [])


def test_who_stands_but_has_fallen_silent_is_not_taken_into_the_next_view() -> None:
    room = room_of("learner-0", "learner-1")
    room.say(stands("learner-1", 2))
    room.silence("learner-1")
    room.pass_time(QUIET_S)
    room.say(stands("learner-0", 2))
    assert room.view == (3, ["learner-0"])


def test_a_frozen_member_that_comes_back_joins_again() -> None:
    room = room_of("learner-0", "learner-1")
    room.silence("learner-0")
    room.pass_time(LEASE_S)
    room.say(stands("learner-1", 2))
    train(room)
    room.say(trains("learner-0", 2, rank=0, world_size=2))
    assert room.view == (3, ["learner-1"])  # which tells it that its group is over
    room.say(stands("learner-0", 3), stands("learner-1", 3))
    assert room.view == (4, ["learner-0", "learner-1"])


def test_the_time_in_which_the_server_was_frozen_is_nobodys_silence() -> None:
    room = room_of("learner-0", "learner-1")
    room.now_s += 1000.0
    room.views.tick(room.now_s)
    assert room.view == (2, ["learner-0", "learner-1"])
    room.silence("learner-1")
    room.pass_time(LEASE_S - LONGEST_TURN_S - INSTANT_S)
    assert room.view == (2, ["learner-0", "learner-1"])
    room.pass_time(INSTANT_S)
    assert room.view == (2, [])


# --- lives of a learner -----------------------------------------------------------------------------------


def test_a_restarted_member_ends_the_view_and_is_taken_into_the_next_one_as_its_new_self() -> None:
    room = room_of("learner-0", "learner-1")
    room.say(stands("learner-1", incarnation=2))
    assert room.view == (2, [])
    room.say(stands("learner-0", 2))
    assert room.view == (3, ["learner-0", "learner-1"])
    assert [member.incarnation for member in room.views.members] == [1, 2]


@pytest.mark.parametrize("phase", ["standing", "training", "leaving"])
def test_a_life_that_was_given_up_for_dead_changes_nothing(phase: Phase) -> None:
    room = Room()
    room.say(stands("learner-0", incarnation=2))
    room.hear(attend("learner-0", phase, generation=9, incarnation=1))
    assert room.view == (1, ["learner-0"])
    assert room.views.members[0].incarnation == 2


def test_a_life_that_was_given_up_for_dead_renews_no_lease() -> None:
    room = Room()
    room.hear(stands("learner-0", incarnation=2))
    for _ in range(20):
        room.hear(stands("learner-0", incarnation=1))
        room.pass_time(BEAT_S)
    assert room.view == (1, [])


def test_a_learner_attends_while_its_lease_lasts_and_only_as_the_life_that_was_heard() -> None:
    room = Room()
    assert not room.views.attends(client("learner-0", 2))
    room.hear(stands("learner-0", incarnation=2))
    assert room.views.attends(client("learner-0", 2))
    assert not room.views.attends(client("learner-0", 1))
    assert not room.views.attends(client("learner-0", 3))
    room.pass_time(LEASE_S)
    assert not room.views.attends(client("learner-0", 2))


# --- the order of members, and what they bring ------------------------------------------------------------


def test_ranks_follow_the_numbers_in_the_names() -> None:
    names = ["learner-10", "learner-2", "learner-0", "a-2-10", "a-2-9", "a", "learner", "2", "learner-02"]
    room = Room(min_learners=len(names))
    room.say(*map(stands, names))
    assert room.names == [
        "2",
        "a",
        "a-2-9",
        "a-2-10",
        "learner",
        "learner-0",
        "learner-02",
        "learner-2",
        "learner-10",
    ]


@pytest.mark.parametrize(
    ("states", "holder"),
    [
        ([(True, 5), (True, 6), (True, 5)], 1),
        ([(True, 5), (False, 900), (False, 0)], 1),
        ([(False, 5), (True, 5), (True, 5)], 1),
        ([(False, 5), (False, 900), (False, 900)], 1),
        ([(False, 0), (False, 0), (True, 0)], 2),
        ([(True, 0), (False, 1_000_000), (False, 0)], 1),
        ([(True, 7), (True, 7), (True, 7)], 0),
    ],
)
def test_the_state_is_held_by_the_newest_version_then_by_who_trained_then_by_the_lowest_rank(
    states: list[tuple[bool, int]], holder: int
) -> None:
    room = Room(min_learners=3)
    for number, (has_trained, version) in enumerate(states):
        room.say(attend(f"learner-{number}", has_trained=has_trained, version=version))
    room.pass_time(RETURN_S)  # of others who may have trained it
    assert room.views.holder == holder


def since(room: Room) -> dict[str, int]:
    return {member.client_id: member.since for member in room.views.members}


def test_since_is_kept_by_who_stays_and_begins_anew_with_every_other_life_or_break() -> None:
    room = room_of("learner-0", "learner-1", "learner-2")
    assert since(room) == {"learner-0": 1, "learner-1": 2, "learner-2": 3}
    room.silence("learner-2")
    room.pass_time(LEASE_S)
    room.say(stands("learner-0", 3), stands("learner-1", incarnation=2))
    assert since(room) == {"learner-0": 1, "learner-1": 4}
    room.say(stands("learner-2"), stands("learner-1", 4, incarnation=2), stands("learner-0", 4))
    assert since(room) == {"learner-0": 1, "learner-1": 4, "learner-2": 5}


def test_an_address_is_the_one_that_was_said_last() -> None:
    room = Room()
    room.say(stands("learner-0"))
    room.say(trains("learner-0", 1))
    room.say(stands("learner-0", 1))
    assert room.view == (2, ["learner-0"])
    assert room.views.members[0].store == "learner-0:1"


# --- min_learners -----------------------------------------------------------------------------------------


def test_training_begins_with_as_many_learners_as_are_wanted_and_not_before() -> None:
    room = Room(min_learners=3)
    room.say(stands("learner-0"), stands("learner-1"))
    room.pass_time(10 * GATHER_S)
    assert room.view == (0, [])
    room.say(stands("learner-2"))
    assert room.view == (1, ["learner-0", "learner-1", "learner-2"])


def test_training_pauses_below_that_number_and_resumes_above_it() -> None:
    room = Room(min_learners=2)
    room.say(stands("learner-0"), stands("learner-1"))
    train(room)
    room.silence("learner-1")
    room.say(stands("learner-0", 1))
    room.pass_time(10 * GATHER_S)
    assert room.view == (1, [])
    room.say(stands("learner-1", incarnation=2))
    assert room.view == (2, ["learner-0", "learner-1"])


# --- a checkpoint that may still come ---------------------------------------------------------------------


def blank(name: str) -> Attend:
    """From a learner that has not found a checkpoint."""
    return attend(name, version=0)


def test_those_without_a_checkpoint_wait_a_while_for_one_if_the_server_holds_weights() -> None:
    room = Room()
    room.views.restored_version = room.views.held_version = 1
    room.pass_time(1000.0)
    room.say(blank("learner-1"))
    room.pass_time(1.0)
    room.say(blank("learner-2"))
    room.pass_time(RETURN_S - 1.0 - INSTANT_S)
    assert room.view == (0, [])
    assert room.views.next_deadline_s() == pytest.approx(room.now_s + INSTANT_S)
    room.pass_time(INSTANT_S)
    assert room.view == (1, ["learner-1", "learner-2"])


def test_a_checkpoint_that_comes_ends_the_wait_and_is_what_all_take_over() -> None:
    room = Room()
    room.views.restored_version = room.views.held_version = 9
    room.say(blank("learner-0"))
    assert room.view == (0, [])
    room.say(stands("learner-1", version=1))
    assert room.view == (1, ["learner-0", "learner-1"])
    assert room.views.holder == 1


@pytest.mark.parametrize(
    ("held_version", "first"),
    [
        (-1, attend(version=0)),
        (0, attend(version=0)),
        (9, attend(version=1)),
        (9, attend(version=0, has_trained=True)),
    ],
)
def test_a_fresh_run_or_a_checkpoint_or_a_state_that_was_trained_waits_for_nothing(
    held_version: int, first: Attend
) -> None:
    room = Room()
    room.views.restored_version = room.views.held_version = held_version
    room.say(first)
    assert room.view == (1, ["learner-0"])


def test_every_gathering_waits_anew_for_a_checkpoint() -> None:
    room = Room()
    room.views.restored_version = room.views.held_version = 1
    room.say(blank("learner-0"))
    room.pass_time(RETURN_S)
    assert room.view == (1, ["learner-0"])
    room.hear(leaves("learner-0", 1))
    room.silence("learner-0")
    room.pass_time(1000.0)
    room.say(blank("learner-1"))
    room.pass_time(RETURN_S - INSTANT_S)
    assert room.view == (1, [])
    room.pass_time(INSTANT_S)
    assert room.view == (2, ["learner-1"])


# --- a newer state that may come back ---------------------------------------------------------------------


def newest(incarnation: int = 1, version: int = 9) -> Attend:
    """Of the learner that was trained longest; its next life has it from a checkpoint."""
    is_first_life = incarnation == 1
    return attend(
        "learner-0",
        generation=7 if is_first_life else NO_GENERATION,
        version=version,
        has_trained=is_first_life,
        incarnation=incarnation,
    )


def room_without_the_newest() -> Room:
    """A server without a disk was replaced, and heard of a state that left it before it had any weights."""
    room = Room()
    room.say(newest())
    room.hear(replace(newest(), phase="leaving"))
    room.silence("learner-0")
    room.say(stands("learner-1", version=4))
    return room


def test_a_rolling_upgrade_waits_for_the_newest_state_to_be_started_again() -> None:
    """Learner-1 was refused, so it was ready, and the next one to be replaced left before it published."""
    room = Room()
    room.say(newest())
    assert not room.hear(other(stands("learner-1", version=4)))
    room.hear(replace(newest(), phase="leaving"))
    room.silence("learner-0")
    room.say(other(stands("learner-1", version=4)))
    room.pass_time(AWAY_S - 1.0)
    assert room.view == (7, [])
    room.say(other(newest(incarnation=2)))
    assert room.view == (8, ["learner-0", "learner-1"])
    assert room.views.holder == 0


def test_it_waits_so_long_and_the_deadline_says_so() -> None:
    room = room_without_the_newest()
    left_s = room.now_s
    room.pass_time(AWAY_S - INSTANT_S)
    assert room.view == (7, [])
    deadlines_s = {room.views.next_deadline_s()}
    room.hear(stands("learner-1", version=4))
    deadlines_s.add(room.views.next_deadline_s())
    assert deadlines_s == {left_s + AWAY_S}
    room.pass_time(INSTANT_S)
    assert room.view == (8, ["learner-1"])


def test_one_that_was_killed_is_waited_for_like_one_that_left() -> None:
    room = Room()
    room.say(newest(), stands("learner-1", version=4))
    room.silence("learner-0")
    room.pass_time(LEASE_S)
    silent_s = room.now_s
    room.pass_time(AWAY_S - LEASE_S - INSTANT_S)
    assert room.view == (7, [])
    room.say(newest(incarnation=2))
    assert room.view == (8, ["learner-0", "learner-1"])
    assert room.now_s < silent_s + AWAY_S


def test_all_that_come_and_go_together_make_nobody_wait_for_longer() -> None:
    room = room_without_the_newest()
    began_s = room.now_s + RETURN_S  # so long it waits for those who train
    for turn in range(3):
        room.pass_time(AWAY_S / 4)
        room.hear(attend(f"guest-{turn}", "leaving", version=20 + turn))
        assert room.view == (7, [])
    room.pass_time(began_s + AWAY_S - INSTANT_S - room.now_s)
    assert room.view == (7, [])
    assert room.views.next_deadline_s() == began_s + AWAY_S
    room.pass_time(INSTANT_S)
    assert room.view == (8, ["learner-1"])


@pytest.mark.parametrize(("restored_version", "held_version"), [(-1, 0), (8, 9), (2, 3)])
def test_once_anything_is_published_nobody_is_waited_for(restored_version: int, held_version: int) -> None:
    room = room_without_the_newest()
    room.views.restored_version = room.views.held_version = restored_version
    room.pass_time(RETURN_S + 1.0)
    assert room.names == []
    room.views.held_version = held_version
    room.pass_time(BEAT_S)
    assert room.names == ["learner-1"]


def test_what_the_server_began_with_is_as_good_as_what_somebody_has() -> None:
    room = room_without_the_newest()
    room.views.restored_version = room.views.held_version = 9
    room.pass_time(RETURN_S)
    assert room.names == ["learner-1"]


def test_who_was_displaced_or_refused_is_alive_and_not_waited_for() -> None:
    room = Room()
    room.hear(other(stands("learner-1", version=20)))
    room.say(newest())
    room.pass_time(RETURN_S)
    assert room.names == ["learner-0"]
    room = room_without_the_newest()
    room.pass_time(RETURN_S + 1.0)
    assert room.names == []
    assert not room.hear(other(newest(incarnation=2)))
    room.pass_time(BEAT_S)
    assert room.names == ["learner-1"]


def test_others_with_as_much_need_not_wait() -> None:
    room = room_without_the_newest()
    room.say(stands("learner-2", version=9))
    room.pass_time(RETURN_S)
    assert room.names == ["learner-1", "learner-2"]
    assert room.views.holder == 1


def test_of_several_that_are_gone_the_newest_is_waited_for() -> None:
    room = Room(min_learners=2)
    room.say(newest(), stands("learner-1", version=4), stands("learner-2", version=6))
    first = (8, ["learner-0", "learner-1", "learner-2"])
    room.pass_time(RETURN_S)
    assert room.view == first
    for name, version in (("learner-0", 9), ("learner-2", 6)):
        room.hear(attend(name, "leaving", generation=8, version=version))
        room.silence(name)
    room.say(stands("learner-1", version=4))
    room.pass_time(1.0)
    room.say(attend("learner-2", version=6, incarnation=2))
    room.pass_time(AWAY_S / 2)
    assert room.names == []
    room.say(newest(incarnation=2))
    assert room.names == ["learner-0", "learner-1", "learner-2"]


def away(*versions: int) -> Absent:
    """Learner-0 and so on have left with these, one after the other, a second each."""
    absent = Absent()
    for number, version in enumerate(versions):
        absent.left(attend(f"learner-{number}", "leaving", version=version), float(number))
    return absent


def awaited(absent: Absent, version: int, now_s: float) -> tuple[str, int, float] | None:
    """Who is waited for, with which version, until when."""
    away = absent.newest(version, now_s)
    if away is None:
        return None
    return away.attend.sender.client_id, away.attend.version, away.until_s


def test_whoever_has_the_newest_state_is_named() -> None:
    absent = away(5, 9, 6)
    assert awaited(absent, 4, 3.0) == awaited(absent, 8, 3.0) == ("learner-1", 9, 1.0 + AWAY_S)
    assert awaited(absent, 9, 3.0) is None
    absent.came(attend("learner-1", incarnation=2, version=0))
    assert awaited(absent, 0, 3.0) == ("learner-2", 6, 2.0 + AWAY_S)


def test_only_so_many_are_remembered_and_none_for_longer_than_it_is_waited_for() -> None:
    absent = Absent()
    for number in range(MAX_LEARNERS):
        absent.left(attend(f"learner-{number}", "leaving", version=5), 0.0)
    one_more = attend("one more", "leaving", version=9)
    absent.left(one_more, AWAY_S - INSTANT_S)
    assert awaited(absent, 5, AWAY_S - INSTANT_S) is None
    absent.left(one_more, AWAY_S)
    assert awaited(absent, 0, AWAY_S) == ("one more", 9, 2 * AWAY_S)


def test_who_comes_back_for_less_makes_others_not_wait_again_for_more() -> None:
    absent = away(9, 5)
    for number in (0, 1):
        absent.came(attend(f"learner-{number}", incarnation=2))
    absent.left(attend("learner-2", "leaving", version=9), 10.0)
    assert awaited(absent, 0, 10.0) is None
    absent.left(attend("learner-2", "leaving", version=10), 10.0)
    assert awaited(absent, 0, 10.0) == ("learner-2", 10, 10.0 + AWAY_S)


def test_who_comes_back_with_less_has_no_more() -> None:
    room = room_without_the_newest()
    room.pass_time(1.0)
    room.say(newest(incarnation=2, version=3))
    room.pass_time(RETURN_S)
    assert room.view == (8, ["learner-0", "learner-1"])
    assert room.views.holder == 1


@pytest.mark.parametrize("is_restarted", [False, True])
def test_who_dies_again_with_the_same_state_is_not_waited_for_again_but_who_was_only_silent_is(
    is_restarted: bool,
) -> None:
    room = room_without_the_newest()
    life = newest(incarnation=1 + is_restarted)
    room.silence("learner-1")
    room.hear(life)
    room.hear(replace(life, phase="leaving"))
    room.pass_time(LEASE_S)
    room.say(stands("learner-1", version=4))
    room.pass_time(RETURN_S + QUIET_S)
    assert bool(room.names) == is_restarted


# --- newcomers that cannot be reached ---------------------------------------------------------------------


def fail(room: Room) -> None:
    """All enter the view, wait for each other in vain, and stand again."""
    enter(room)
    room.pass_time(1.0)
    stand(room)


def stand(room: Room) -> None:
    generation, names = room.view
    room.say(*(stands(name, generation) for name in names))


def let_in(room: Room, newcomer: str) -> None:
    """It stands, and so do the members."""
    generation, names = room.view
    room.say(stands(newcomer, generation), *(stands(name, generation) for name in names))


def test_a_group_that_breaks_before_a_step_goes_on_without_its_newcomers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "impala.views")
    room = room_of("learner-0", "learner-1")
    let_in(room, "learner-2")
    assert room.view == (3, ["learner-0", "learner-1", "learner-2"])
    fail(room)
    assert room.view == (4, ["learner-0", "learner-1"])
    (record,) = caplog.records
    assert (record.message, vars(record)["fields"]) == (
        "quarantined",
        {"learner": "learner-2", "for_s": FIRST_WAIT_S},
    )


def test_a_newcomer_waits_longer_each_time_that_the_group_breaks_with_it() -> None:
    room = room_of("learner-0", "learner-1")
    let_in(room, "learner-2")
    wait_s = FIRST_WAIT_S
    for _ in range(8):
        fail(room)
        train(room)
        generation, names = room.view
        assert names == ["learner-0", "learner-1"]
        room.say(stands("learner-2", generation))
        room.pass_time(wait_s - BEAT_S)
        assert room.view == (generation, names)
        room.pass_time(BEAT_S)
        assert room.view == (generation, [])
        room.say(stands("learner-0", generation), stands("learner-1", generation))
        assert room.view == (generation + 1, ["learner-0", "learner-1", "learner-2"])
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
    assert wait_s == LONGEST_WAIT_S


@pytest.mark.parametrize("proof", ["published", "stood with", "time"])
def test_a_newcomer_that_took_part_in_a_step_is_a_member_like_the_others(proof: str) -> None:
    room = room_of("learner-0", "learner-1")
    let_in(room, "learner-2")
    fail(room)
    room.say(stands("learner-2", 4))
    enter(room)
    room.pass_time(PROVEN_S)
    room.say(stands("learner-0", 4), stands("learner-1", 4))
    assert room.view == (5, ["learner-0", "learner-1", "learner-2"])
    enter(room)
    version = room.views.held_version
    if proof == "published":
        step(room)
    elif proof == "time":
        room.pass_time(PROVEN_S)
    room.say(*(stands(name, 5, version + (proof == "stood with")) for name in room.names))
    assert room.view == (6, ["learner-0", "learner-1", "learner-2"])
    fail(room)  # once more, and nobody is a newcomer
    assert room.view == (7, ["learner-0", "learner-1", "learner-2"])


def test_what_the_newcomers_took_over_without_a_step_is_no_step() -> None:
    room = room_of("learner-0")
    room.say(stands("learner-1"), stands("learner-0", 1, version=9))
    enter(room)
    room.say(stands("learner-1", 2, version=9), stands("learner-0", 2, version=9))
    assert room.view == (3, ["learner-0"])


def test_who_comes_while_a_newcomer_fails_is_not_taken_for_it() -> None:
    room = room_of("learner-0")
    let_in(room, "learner-1")
    enter(room)
    let_in(room, "learner-2")
    assert room.view == (3, ["learner-0", "learner-1", "learner-2"])


def test_the_newcomers_of_a_group_that_broke_are_let_in_again_one_by_one() -> None:
    room = room_of("learner-0")
    room.say(stands("learner-1"), stands("learner-2"), stands("learner-0", 1))
    fail(room)
    assert room.view == (3, ["learner-0"])
    enter(room)
    room.say(stands("learner-1", 3), stands("learner-2", 3))
    step(room)
    room.pass_time(FIRST_WAIT_S)
    assert room.view == (3, [])
    room.say(stands("learner-0", 3))
    assert room.view == (4, ["learner-0", "learner-1"])
    enter(room)
    room.pass_time(FIRST_WAIT_S)
    assert room.view == (4, ["learner-0", "learner-1"])  # which has not made a step yet
    step(room)
    room.pass_time(BEAT_S)
    assert room.view == (4, [])
    room.say(stands("learner-0", 4), stands("learner-1", 4))
    assert room.view == (5, ["learner-0", "learner-1", "learner-2"])


def test_if_all_are_newcomers_the_one_with_the_newest_state_goes_on_alone() -> None:
    room = Room()
    room.say(stands("learner-0"))
    room.say(stands("learner-1", version=7), stands("learner-2"), stands("learner-0"))
    assert room.view == (2, ["learner-0", "learner-1", "learner-2"])
    enter(room)
    room.say(*(stands(name, 2, version=7 if name == "learner-1" else 1) for name in room.names))
    assert room.view == (3, ["learner-1"])
    room.pass_time(FIRST_WAIT_S - BEAT_S)
    assert room.view == (3, ["learner-1"])


def test_nobody_waits_without_whom_there_would_be_too_few() -> None:
    room = Room(min_learners=2)
    room.say(stands("learner-0"), stands("learner-1"))
    fail(room)
    assert room.view == (2, ["learner-0", "learner-1"])
    let_in(room, "learner-2")
    fail(room)
    assert len(room.names) == 2


def test_who_waits_trains_at_once_when_nobody_else_is_left() -> None:
    room = room_of("learner-0")
    let_in(room, "learner-1")
    fail(room)
    enter(room)
    room.say(stands("learner-1", 3))
    room.hear(leaves("learner-0", 3))
    room.silence("learner-0")
    assert room.view == (4, ["learner-1"])


def test_a_view_that_ends_because_somebody_joins_leaves_or_falls_silent_quarantines_nobody() -> None:
    room = room_of("learner-0")
    let_in(room, "learner-1")
    enter(room)
    let_in(room, "learner-2")
    enter(room)
    room.hear(leaves("learner-2", 3))
    room.silence("learner-2")
    room.say(stands("learner-0", 3), stands("learner-1", 3))
    assert room.view == (4, ["learner-0", "learner-1"])
    enter(room)
    room.silence("learner-0")
    room.pass_time(LEASE_S)
    room.say(stands("learner-1", 4))
    assert room.view == (5, ["learner-1"])
    let_in(room, "learner-0")
    assert room.view == (6, ["learner-0", "learner-1"])


def test_one_that_nobody_can_join_is_the_one_that_waits_in_the_end() -> None:
    room = room_of("bad")
    room.say(stands("learner-0"), stands("learner-1"), stands("bad", 1))
    fail(room)
    assert room.names == ["bad"]
    enter(room)
    step(room)
    while room.names:
        room.pass_time(BEAT_S)
    room.say(stands("bad", 3))
    for failures, names in enumerate((["bad", "learner-0"], ["bad", "learner-1"]), 1):
        assert room.names == names
        assert failures < FAILURES_ALONE
        fail(room)
    assert room.names == ["learner-0", "learner-1"]


# --- configurations ---------------------------------------------------------------------------------------


def other(message: Attend) -> Attend:
    """From a learner that was started with another configuration."""
    return replace(message, config="other")


def test_a_newcomer_with_another_configuration_is_refused_and_disturbs_nobody() -> None:
    room = room_of("learner-0", "learner-1")
    for phase in ("standing", "training", "leaving"):
        assert not room.hear(other(attend("learner-9", phase, generation=1, has_trained=True)))
    assert room.view == (2, ["learner-0", "learner-1"])
    assert len(room.views) == 2
    assert not room.views.attends(client("learner-9"))
    assert room.hear(stands("learner-9"))
    assert room.view == (2, [])


def test_a_member_that_is_restarted_with_another_configuration_is_refused_by_those_who_stay() -> None:
    room = room_of("learner-0", "learner-1")
    assert not room.hear(other(stands("learner-1", incarnation=2)))
    assert room.view == (2, ["learner-0", "learner-1"])
    room.silence("learner-1")
    room.pass_time(LEASE_S)
    room.say(stands("learner-0", 2))
    assert room.view == (3, ["learner-0"])


def test_a_learner_alone_may_be_restarted_with_another_configuration() -> None:
    room = room_of("learner-0")
    assert room.hear(other(stands("learner-0", version=1, incarnation=2)))
    assert room.view == (2, ["learner-0"])
    assert not room.hear(stands("learner-1"))


@pytest.mark.parametrize("are_gathering", [False, True])
def test_a_group_that_is_gone_does_not_decide_what_others_train_and_one_that_may_return_does(
    are_gathering: bool,
) -> None:
    room = room_of("learner-0", "learner-1")
    if are_gathering:
        room.say(stands("learner-0", 2))
    room.silence("learner-0", "learner-1")
    room.now_s += LONGEST_TURN_S
    for _ in range(4):
        assert not room.hear(other(stands("learner-9", version=1)))
        room.now_s += LONGEST_TURN_S
    assert room.hear(other(stands("learner-9", version=1)))
    assert room.view == (3, ["learner-9"])
    assert not room.hear(stands("learner-0", 2))


def test_a_group_that_has_left_does_not_decide_what_others_train() -> None:
    room = room_of("learner-0")
    room.hear(leaves("learner-0", 1))
    assert room.hear(other(stands("learner-9", version=1)))
    assert room.view == (2, ["learner-9"])


@pytest.mark.parametrize("has_trained", [False, True])
def test_while_they_gather_the_first_one_decides_unless_another_has_trained(has_trained: bool) -> None:
    room = Room(min_learners=2)
    room.say(stands("learner-1"))
    late = other(attend("learner-0", has_trained=has_trained))
    assert room.hear(late) == has_trained
    assert len(room.views) == 1
    assert room.views.attends(client("learner-0")) == has_trained
    assert room.hear(stands("learner-2")) != has_trained
    assert room.hear(late) == has_trained


def test_a_newcomer_that_finds_the_restarted_server_first_does_not_decide_for_those_who_train() -> None:
    room = Room(generation=7)
    assert room.hear(other(stands("learner-9")))
    room.say(trains("learner-0", 7, 0, 2), trains("learner-1", 7, 1, 2))
    assert room.view == (7, ["learner-0", "learner-1"])
    assert not room.hear(other(stands("learner-9")))
    assert room.view == (7, ["learner-0", "learner-1"])


def test_a_server_without_a_memory_does_not_take_the_first_who_comes_for_a_new_run() -> None:
    """A rolling upgrade has replaced it together with learner-1, which has no checkpoint of its own."""
    room = Room(remembers=False)
    newcomer = other(stands("learner-1"))
    room.say(newcomer)
    room.pass_time(LEASE_S - BEAT_S)
    assert room.view == (NO_GENERATION, [])
    late = replace(trains("learner-0", 19), version=10_749)
    room.say(late)
    assert room.view == (19, ["learner-0"])
    assert not room.hear(newcomer), "so it is ready, and learner-0 is the next to be replaced"
    room.silence("learner-0")
    room.hear(replace(leaves("learner-0", 19), version=10_749))
    room.pass_time(AWAY_S / 2)
    assert room.view == (19, []), "nobody begins again from nothing"
    room.say(other(stands("learner-0", 19, version=10_749, incarnation=2)))
    assert room.view == (20, ["learner-0", "learner-1"])
    assert room.views.holder == 0


def test_a_server_is_about_to_be_given_more_until_those_who_train_have_published_to_it() -> None:
    room = Room(remembers=False)
    observed = [room.views.is_about_to_be_given_more]
    room.say(stands("learner-1"))  # with nothing
    observed.append(room.views.is_about_to_be_given_more)
    room.say(stands("learner-0", 19, version=10_749))
    observed.append(room.views.is_about_to_be_given_more)  # while it is collecting
    room.pass_time(LEASE_S)
    assert room.view == (20, ["learner-0", "learner-1"])
    for rank in (0, 1):
        room.say(replace(trains(f"learner-{rank}", 20, rank, 2), version=10_749))
    observed.append(room.views.is_about_to_be_given_more)
    room.views.held_version = 10_748
    observed.append(room.views.is_about_to_be_given_more)
    room.views.held_version = 10_749
    observed.append(room.views.is_about_to_be_given_more)
    assert observed == [False, False, True, True, True, False]


def test_who_trains_has_more_than_it_had_when_it_stood() -> None:
    room = Room(remembers=False)
    room.say(replace(trains("learner-0", 19), version=0))
    observed = [room.views.is_about_to_be_given_more]
    room.views.held_version = 10_749
    observed.append(room.views.is_about_to_be_given_more)
    assert observed == [True, False]


def test_nobody_is_kept_waiting_for_more_than_a_minute_for_what_is_not_published() -> None:
    room = Room(remembers=False)
    room.say(replace(trains("learner-0", 19), version=10_749))
    room.pass_time(LATE_S - BEAT_S)
    observed = [room.views.is_about_to_be_given_more]
    room.pass_time(BEAT_S)
    observed.append(room.views.is_about_to_be_given_more)
    assert observed == [True, False]


def test_learners_that_are_too_few_to_train_are_not_about_to_give_it_anything() -> None:
    room = Room(min_learners=2)
    room.say(stands("learner-0", 19, version=10_749))
    observed = [room.views.is_about_to_be_given_more]
    room.say(stands("learner-1", 19, version=10_749))
    observed.append(room.views.is_about_to_be_given_more)
    room.silence("learner-0", "learner-1")
    room.pass_time(LEASE_S)
    observed.append(room.views.is_about_to_be_given_more)
    assert observed == [False, True, False]


def test_where_nobody_comes_back_to_a_server_without_a_memory_a_run_begins_after_a_short_wait() -> None:
    room = Room(remembers=False)
    room.say(stands("learner-0"), stands("learner-1"))
    assert room.views.next_deadline_s() == room.now_s + LEASE_S
    room.pass_time(LEASE_S - INSTANT_S)
    assert room.view == (NO_GENERATION, [])
    room.pass_time(INSTANT_S)
    assert room.view == (1, ["learner-0", "learner-1"])


def new_run_of(newcomer: Attend) -> Room:
    """A server without a disk has been replaced, and one with another configuration was there first."""
    room = Room()
    room.say(newcomer)
    assert room.view == (1, ["learner-1"])
    room.say(in_its_own_view(newcomer))
    return room


def in_its_own_view(newcomer: Attend) -> Attend:
    return replace(newcomer, phase="training", generation=1, store="", since=1)


@pytest.mark.parametrize("generation", [1, 2, 7])
@pytest.mark.parametrize("has_trained", [False, True])
def test_those_who_train_are_late_and_end_what_was_taken_for_a_new_run(
    generation: int, has_trained: bool
) -> None:
    newcomer = other(stands("learner-1"))
    room = new_run_of(newcomer)
    late = replace(trains("learner-0", generation), has_trained=has_trained)
    assert room.hear(late)
    assert room.view == (generation, [])
    assert not room.hear(in_its_own_view(newcomer))  # it was on its way
    room.say(attend("learner-0", generation=generation, has_trained=True))
    assert room.view == (generation + 1, ["learner-0"])
    for phase in ("training", "standing"):
        assert not room.hear(other(attend("learner-1", phase, generation=1, has_trained=True)))
    room.say(trains("learner-0", generation + 1))
    assert room.view == (generation + 1, ["learner-0"])
    room.silence("learner-0", "learner-1")
    room.hear(leaves("learner-0", generation + 1))
    room.say(other(attend("learner-1", generation=1, has_trained=True)))
    assert room.view == (generation + 2, ["learner-1"])


def test_a_survivor_whose_group_broke_with_the_server_is_believed_too() -> None:
    newcomer = other(stands("learner-1"))
    room = new_run_of(newcomer)
    room.say(attend("learner-0", generation=7, has_trained=True))
    assert room.view == (8, ["learner-0"])
    assert not room.hear(in_its_own_view(newcomer))


@pytest.mark.parametrize(
    "stranger",
    [attend("learner-0", generation=1, has_trained=True), attend("learner-0", generation=7)],
    ids=["of no later view", "not trained"],
)
def test_who_only_stands_needs_more_to_be_believed(stranger: Attend) -> None:
    room = new_run_of(other(stands("learner-1")))
    assert not room.hear(stranger)
    assert room.view == (1, ["learner-1"])


def test_who_comes_later_than_a_while_after_the_restart_finds_what_others_have_made_meanwhile() -> None:
    room = new_run_of(other(stands("learner-1")))
    room.pass_time(LATE_S - BEAT_S)
    assert room.hear(trains("learner-0", 7))
    room = new_run_of(other(stands("learner-1")))
    room.pass_time(LATE_S)
    assert not room.hear(trains("learner-0", 7))
    assert room.view == (1, ["learner-1"])


def test_a_member_that_was_frozen_while_others_took_over_is_a_stranger_to_them() -> None:
    room = room_of("learner-0")
    room.silence("learner-0")
    room.pass_time(LEASE_S)
    room.say(other(stands("learner-1", version=1)))
    assert room.view == (2, ["learner-1"])
    assert not room.hear(trains("learner-0", 1))
    assert room.view == (2, ["learner-1"])


def test_a_member_that_was_frozen_while_others_gather_is_a_stranger_to_them() -> None:
    room = Room(min_learners=2)
    room.say(stands("learner-0"), stands("learner-2"))
    train(room)
    room.silence("learner-0", "learner-2")
    room.pass_time(LEASE_S)
    room.say(other(attend("learner-1", has_trained=True)))
    assert room.view == (1, [])
    assert not room.hear(trains("learner-0", 1))


# --- restarts of the server -------------------------------------------------------------------------------


def test_a_restarted_server_takes_over_the_view_once_all_ranks_have_attended() -> None:
    room = Room(generation=7)
    ranks = [trains("learner-10", 7, 1, 3, since=4), trains("learner-2", 7, 0, 3, since=2)]
    room.say(*ranks)
    assert room.view == (NO_GENERATION, [])  # which nobody obeys
    room.say(trains("learner-11", 7, 2, 3, since=7))
    assert room.view == (7, ["learner-2", "learner-10", "learner-11"])
    assert [member.since for member in room.views.members] == [2, 4, 7]
    room.pass_time(10 * GATHER_S)
    assert room.view == (7, ["learner-2", "learner-10", "learner-11"])


@pytest.mark.parametrize("noted", [NO_GENERATION, 5])
def test_a_server_with_an_old_note_or_none_takes_the_view_over_too(noted: int) -> None:
    room = Room(generation=noted)
    room.say(trains("learner-1", 7, 1, 2), trains("learner-0", 7, 0, 2))
    assert room.view == (7, ["learner-0", "learner-1"])


@pytest.mark.parametrize("config", ["", "another"])
def test_a_server_that_remembers_nothing_waits_if_somebody_brings_what_it_does_not_hold(config: str) -> None:
    """With others who have trained on since that checkpoint was made: it must not take their place."""
    room = Room()
    old = replace(stands("learner-1", version=4), config=config)
    room.hear(old)
    room.now_s += RETURN_S - INSTANT_S
    room.say(trains("learner-0", 7))
    assert room.view == (7, ["learner-0"])
    assert room.hear(old) == (config == "")


@pytest.mark.parametrize(
    ("restored", "held", "brought", "waits"),
    [
        (NO_VERSION, NO_VERSION, 0, False),
        (NO_VERSION, NO_VERSION, 4, True),
        (NO_VERSION, 400, 300, True),  # somebody publishes, and so trains
        (NO_VERSION, 400, 0, True),
        (3, 3, 4, True),
        (4, 4, 4, False),
        (5, 5, 4, False),
    ],
)
def test_a_server_that_remembers_no_generation_waits_if_more_was_trained_than_it_began_with(
    restored: int, held: int, brought: int, waits: bool
) -> None:
    room = Room()
    room.views.restored_version, room.views.held_version = restored, held
    room.say(stands("learner-1", version=brought))
    assert (room.views.generation == NO_GENERATION) == waits
    room.pass_time(2 * RETURN_S)
    assert room.view == (1, ["learner-1"])


def test_a_view_that_was_taken_over_ends_like_any_other() -> None:
    room = Room(generation=7)
    room.say(trains("learner-0", 7, 0, 2, since=3), trains("learner-1", 7, 1, 2, since=6))
    room.silence("learner-0")
    room.say(stands("learner-1", 7))
    room.pass_time(QUIET_S)
    assert room.view == (8, ["learner-1"])
    assert since(room) == {"learner-1": 6}


def test_a_newcomer_waits_until_the_view_has_been_taken_over_and_joins_it() -> None:
    room = Room(generation=7)
    room.say(stands("learner-2"), trains("learner-0", 7, 0, 2))
    room.pass_time(LEASE_S - BEAT_S)
    assert room.view == (NO_GENERATION, [])
    room.say(trains("learner-1", 7, 1, 2))
    assert room.view == (7, ["learner-0", "learner-1"])
    room.pass_time(BEAT_S)
    assert room.view == (7, [])


@pytest.mark.parametrize("lease_s", [LEASE_S, 2 * ADOPT_S])
def test_if_not_all_ranks_come_back_in_time_the_others_gather_above_all_numbers_heard_of(
    lease_s: float,
) -> None:
    room = Room(generation=5, lease_s=lease_s)
    room.say(trains("learner-0", 7, 0, 2, since=3))
    room.pass_time(max(ADOPT_S, lease_s) - INSTANT_S)
    assert room.view == (NO_GENERATION, [])
    room.pass_time(INSTANT_S)
    assert room.view == (7, [])
    room.say(stands("learner-0", 7))
    assert room.view == (8, ["learner-0"])
    assert since(room) == {"learner-0": 3}


def test_who_trains_is_not_stopped_because_others_of_its_group_need_longer_to_find_the_server() -> None:
    room = Room(generation=7)
    room.say(trains("learner-0", 7, 0, 3))
    room.pass_time(LEASE_S)
    room.say(trains("learner-1", 7, 1, 3))
    room.pass_time(ADOPT_S - LEASE_S - INSTANT_S)
    room.say(trains("learner-2", 7, 2, 3))
    assert room.view == (7, ["learner-0", "learner-1", "learner-2"])


def test_nobody_waits_so_long_for_a_group_that_has_broken() -> None:
    room = Room(generation=7)
    room.say(trains("learner-0", 7, 0, 3))
    room.pass_time(RETURN_S)
    room.say(stands("learner-1", 7))
    room.pass_time(LEASE_S - RETURN_S - INSTANT_S)
    assert room.view == (NO_GENERATION, [])
    room.pass_time(INSTANT_S)
    assert room.view == (7, [])


def test_if_nobody_trains_it_waits_only_until_everybody_could_have_come_back() -> None:
    room = Room(generation=5)
    room.say(stands("learner-0"), stands("learner-1", 4))
    room.pass_time(RETURN_S - INSTANT_S)
    assert room.view == (NO_GENERATION, [])
    room.pass_time(INSTANT_S)
    assert room.view == (6, ["learner-0", "learner-1"])


def test_the_wait_begins_anew_when_all_who_were_heard_are_gone() -> None:
    room = Room(generation=5)
    room.hear(leaves("learner-0"))
    room.pass_time(1000.0)
    room.say(stands("learner-0", incarnation=2))
    room.pass_time(RETURN_S - INSTANT_S)
    assert room.view == (NO_GENERATION, [])
    room.pass_time(INSTANT_S)
    assert room.view == (6, ["learner-0"])


def test_the_wait_begins_with_the_first_learner() -> None:
    room = Room(generation=5)
    room.pass_time(1000.0)
    room.say(stands("learner-0"))
    assert room.view == (NO_GENERATION, [])
    room.pass_time(RETURN_S)
    assert room.view == (6, ["learner-0"])


def test_a_view_older_than_the_one_noted_is_not_taken_over() -> None:
    """The next one was issued, and the server died before anybody had heard of it."""
    room = Room(generation=8)
    room.say(trains("learner-0", 7, 0, 1))
    room.pass_time(LEASE_S)
    assert room.view == (8, [])
    room.say(stands("learner-0", 8))
    assert room.view == (9, ["learner-0"])


@pytest.mark.parametrize(
    "other",
    [
        trains("learner-1", 7, 0, 2),  # of the same rank
        trains("learner-1", 7, 1, 3),  # of another size
        trains("learner-1", 6, 1, 2),  # of another generation
        stands("learner-1", 7),
    ],
)
def test_ranks_that_do_not_make_one_view_are_not_taken_over(other: Attend) -> None:
    room = Room(generation=7)
    room.say(trains("learner-0", 7, 0, 2), other)
    room.pass_time(LEASE_S - INSTANT_S)
    assert room.view == (NO_GENERATION, [])
    room.pass_time(INSTANT_S)
    assert room.view == (7, [])


def test_a_generation_above_our_own_ends_what_we_issued_and_is_never_issued_again() -> None:
    """Notes and memory were lost, and a newcomer was faster than those who train."""
    room = Room()
    room.say(stands("newcomer"))
    assert room.view == (1, ["newcomer"])
    room.say(trains("learner-0", 7, 0, 1))
    assert room.view == (7, [])
    room.say(stands("learner-0", 7), stands("newcomer", 7))
    assert room.view == (8, ["learner-0", "newcomer"])


def test_a_number_that_was_given_twice_is_given_up() -> None:
    room = room_of("learner-0")
    room.say(trains("learner-9", 1))  # of a life of this server whose note was lost
    assert room.view == (1, [])
    room.say(stands("learner-0", 1), stands("learner-9", 1))
    assert room.view == (2, ["learner-0", "learner-9"])


# --- bounds and deadlines ---------------------------------------------------------------------------------


def test_there_are_as_many_learners_as_a_view_can_name_and_not_more() -> None:
    room = Room(min_learners=MAX_LEARNERS)
    for number in range(MAX_LEARNERS - 1):
        room.hear(stands(f"learner-{number}"))
    assert room.view == (0, [])
    room.hear(stands("the last"))
    room.hear(stands("one too many"))
    assert len(room.views) == MAX_LEARNERS
    assert room.views.generation == 1
    assert "the last" in room.names


def test_a_generation_that_cannot_be_is_not_heard_of() -> None:
    room = room_of("learner-0")
    room.hear(stands("learner-1", 1 + LARGEST_LEAP + 1))
    assert room.view == (1, ["learner-0"])
    assert len(room.views) == 1
    room.hear(stands("learner-1", 1 + LARGEST_LEAP))
    assert room.view == (1 + LARGEST_LEAP, [])


def test_who_waits_for_each_deadline_misses_nothing() -> None:
    room = Room()
    assert room.views.next_deadline_s() == math.inf
    room.hear(stands("learner-0"))
    room.now_s += 1.0
    room.hear(stands("learner-1"))
    room.hear(trains("learner-0", 1))
    room.now_s += 0.5
    room.hear(stands("learner-1", 1))
    assert room.views.next_deadline_s() == room.now_s - 0.5 + QUIET_S  # learner-0 may have been killed
    room.now_s += 0.5
    room.hear(trains("learner-0", 1))
    assert room.views.next_deadline_s() == room.now_s + QUIET_S
    # Nobody says anything any more.
    assert next_change(room) == (102.0 + QUIET_S, 2)
    assert next_change(room) == (101.5 + LEASE_S, 1)
    assert next_change(room) == (102.0 + LEASE_S, 0)


def next_change(room: Room) -> tuple[float, int]:
    """The clock, and how many attend, after the next deadline, which the loop approaches turn by turn."""
    deadline_s = room.views.next_deadline_s()
    while room.now_s < deadline_s:
        room.now_s = min(room.now_s + LONGEST_TURN_S, deadline_s)
        assert room.views.next_deadline_s() == deadline_s
        room.views.tick(room.now_s)
    return room.now_s, len(room.views)


def test_the_deadline_of_a_gathering_is_when_it_waits_no_longer_and_then_there_is_none_but_the_lease() -> (
    None
):
    room = room_of("learner-0", "learner-1", min_learners=2)
    room.say(stands("learner-0", 2))
    begin_s = room.now_s
    room.pass_time(GATHER_S - 1.0)
    assert room.views.next_deadline_s() == begin_s + GATHER_S
    room.pass_time(1.0)
    assert room.view == (2, [])  # there are not enough of them
    assert room.views.next_deadline_s() == room.now_s + QUIET_S


def pasts() -> list[Room]:
    """Rooms that everybody has left, in every way."""
    heard = Room()
    heard.hear(leaves("learner-0"))
    collecting = Room(generation=7)
    collecting.hear(leaves("learner-0", 7))
    silent = Room(generation=7)
    silent.hear(trains("learner-0", 7, 0, 2))
    left, killed, broken, refused = (room_of("learner-0", "learner-1") for _ in range(4))
    left.hear(leaves("learner-0", 2))
    left.hear(leaves("learner-1", 2))
    broken.hear(stands("learner-0", 2))
    refused.hear(other(stands("learner-0")))
    without_checkpoint = Room(min_learners=2)
    without_checkpoint.views.restored_version = without_checkpoint.views.held_version = 9
    without_checkpoint.hear(blank("learner-0"))
    without_checkpoint.hear(blank("learner-1"))
    quarantined = room_of("learner-0")
    let_in(quarantined, "learner-1")
    fail(quarantined)
    rooms = [
        heard,
        collecting,
        silent,
        left,
        killed,
        broken,
        refused,
        without_checkpoint,
        quarantined,
    ]
    for room in rooms:
        room.empty()
    return rooms


@pytest.mark.parametrize("number", range(9))
def test_no_deadline_stays_in_the_past_and_in_an_empty_room_there_is_none(number: int) -> None:
    room = pasts()[number]
    for _ in range(40):
        room.now_s = min(room.now_s + LONGEST_TURN_S, room.views.next_deadline_s())
        room.views.tick(room.now_s)
        assert room.views.next_deadline_s() > room.now_s
    assert (len(room.views), room.names) == (0, [])
    assert room.views.next_deadline_s() == math.inf


def test_the_deadline_after_a_restart_is_the_end_of_the_wait() -> None:
    room = Room(generation=7)
    room.say(stands("learner-0"))
    assert room.views.next_deadline_s() == room.now_s + RETURN_S
    room.say(trains("learner-1", 7, 0, 2))
    assert room.views.next_deadline_s() == room.now_s + LEASE_S
