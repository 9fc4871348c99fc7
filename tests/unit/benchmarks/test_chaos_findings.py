"""What a fault has cost, and the promises it broke, in traces that are written down here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from benchmarks.chaos import _rest_and_compare
from benchmarks.chaos_findings import (
    CHECKSUM,
    CHECKSUM_VERSION,
    DIFFERED,
    GENERATION,
    HOLDS,
    LIFE,
    SEATS,
    SENT,
    STEPS,
    VERSION,
    WORLD_SIZE,
    Crew,
    End,
    Exit,
    Finding,
    Injection,
    Seen,
    advances,
    falls,
    finding,
    goal_of,
    holder,
    is_whole,
    longest_gap,
    normal_gap,
    rises,
    unequal_ranks,
)
from benchmarks.chaos_system import System
from benchmarks.chaos_watch import Watch

UPDATE = 100
CREW = Crew(
    learners=("learner-0", "learner-1", "learner-2"),
    actors=("actor-0",),
    paramserver="paramserver",
    steps_per_update=UPDATE,
)
KILLED_S, STARTED_S, WHOLE_S = 10.0, 11.0, 18.0


def seen(time_s: float, pod: str, life: float = 1.0, **figures: float) -> Seen:
    names = {"steps": STEPS, "version": VERSION, "generation": GENERATION, "world": WORLD_SIZE}
    names |= {
        "seats": SEATS,
        "sent": SENT,
        "checksum": CHECKSUM,
        "at": CHECKSUM_VERSION,
        "differed": DIFFERED,
        "holds": HOLDS,
    }
    return Seen(time_s=time_s, pod=pod, figures={LIFE: life} | {names[k]: v for k, v in figures.items()})


def a_kill() -> list[Seen]:
    """Of learner-0 at 10 s: one update a second before; the survivors go on at 13 s; it is back at 17 s."""
    trace = []
    for second in range(21):
        alive = second <= KILLED_S
        # Until its death and after its return all are level; in between the survivors lost three seconds.
        steps = UPDATE * (second if alive else max(10, second - 2))
        trace += [seen(second, pod, steps=steps) for pod in CREW.learners[1:]]
        if alive or second >= 17:
            trace.append(seen(second, "learner-0", life=1.0 if alive else 2.0, steps=steps))
        trace.append(seen(second, "paramserver", version=steps / UPDATE))
    return trace


KILL = Injection(
    round=1,
    fault="kill",
    target="state holder",
    victim="learner-0",
    begun_s=KILLED_S + 0.5,
    ended_s=STARTED_S,
    whole_s=WHOLE_S,
)


def judge(
    trace: list[Seen], injection: Injection = KILL, exits: tuple[Exit, ...] = (), crew: Crew = CREW
) -> Finding:
    return finding(injection, crew, trace, exits)


def test_training_stood_still_from_the_fault_to_the_survivors_next_step_but_for_the_normal_time() -> None:
    found = judge(a_kill())
    assert found.training_s == pytest.approx(13.0 - 10.5 - 1.0)
    assert found.normal_s == 1.0
    assert found.weights_s == pytest.approx(13.0 - 10.5 - 1.0)
    assert found.whole_s == pytest.approx(7.0)
    assert found.violations == ()


def test_a_longer_gap_when_the_victim_comes_back_counts_as_well() -> None:
    trace = [each for each in a_kill() if not 14 <= each.time_s <= 19 or STEPS not in each.figures]
    assert judge(trace).training_s == pytest.approx(20.0 - 13.0 - 1.0)


def test_training_that_never_goes_on_is_as_long_as_it_was_watched() -> None:
    trace = [each for each in a_kill() if each.time_s <= KILLED_S] + [seen(70.5, "actor-0", sent=1)]
    found = judge(trace, replace(KILL, whole_s=None))
    assert found.training_s == pytest.approx(60.0 - 1.0)
    assert found.whole_s is None
    assert found.violations == ("not whole again within 60 s",)


def test_a_gap_is_measured_between_the_moments_asked_for() -> None:
    assert longest_gap([1.0, 2.0, 5.0, 6.0, 30.0], 4.0, 8.0) == (6.0, 2.0)
    assert longest_gap([1.0, 2.0, 5.0], 1.5, 5.5) == (2.0, 3.0)
    assert longest_gap([], 3.0, 7.0) == (3.0, 4.0)
    assert longest_gap([3.0, 7.0], 3.0, 7.0) == (3.0, 4.0)


def test_the_normal_gap_is_the_median_and_nothing_without_two_steps() -> None:
    assert normal_gap([0.0, 1.0, 2.0, 9.0]) == 1.0
    assert normal_gap([5.0]) == 0.0
    assert normal_gap([]) == 0.0


def test_only_what_is_more_than_ever_before_is_an_advance() -> None:
    trace = [
        seen(0.0, "learner-1", steps=100),
        seen(1.0, "learner-2", steps=100),
        seen(2.0, "learner-1", steps=200),
        seen(3.0, "learner-2", steps=200),
        seen(4.0, "learner-0", steps=900),
        seen(5.0, "learner-2", steps=300),
    ]
    assert advances(trace, STEPS, ["learner-1", "learner-2"]) == [2.0, 5.0]


# --- promises ---------------------------------------------------------------------------------------------


def test_a_step_back_in_one_life_of_a_survivor_is_a_violation() -> None:
    trace = [*a_kill(), seen(20.5, "learner-2", steps=0)]
    assert judge(trace).violations == (f"learner-2: {STEPS} fell from 1,800 to 0",)


def test_a_new_life_may_begin_further_back_until_it_has_joined() -> None:
    trace = [*a_kill(), seen(16.0, "learner-0", life=2.0, steps=0)]
    assert judge(sorted(trace, key=lambda each: each.time_s)).violations == ()


def test_every_fall_is_told_and_standing_still_is_none() -> None:
    values = (5, 5, 4, 4, 6, 3)
    trace = [seen(n, "paramserver", version=value) for n, value in enumerate(values)]
    found = falls(trace, VERSION, ["paramserver"])
    assert found == [f"paramserver: {VERSION} fell from 5 to 4", f"paramserver: {VERSION} fell from 6 to 3"]


def test_survivors_may_lose_the_one_update_that_only_the_dead_had_finished() -> None:
    ahead = seen(KILLED_S + 0.25, "learner-0", steps=11 * UPDATE)
    assert judge(sorted([*a_kill(), ahead], key=lambda each: each.time_s)).violations == ()


def test_survivors_that_go_on_from_further_behind_are_a_violation() -> None:
    ahead = seen(KILLED_S + 0.25, "learner-0", steps=11 * UPDATE + 1)
    found = judge(sorted([*a_kill(), ahead], key=lambda each: each.time_s))
    assert found.violations == ("training went on from 1,000 steps, and had been at 1,101",)


def test_a_parameter_server_that_restarts_with_an_older_version_must_have_caught_up_at_the_end() -> None:
    injection = replace(KILL, target="parameter server", victim="paramserver")
    behind = [seen(20.5, "paramserver", life=2.0, version=9)]
    assert judge([*a_kill(), *behind], injection).violations == ("paramserver: version 9 after 10",)
    assert judge([*a_kill(), *behind, seen(20.75, "paramserver", life=2.0, version=10)]).violations == ()


def exit_of(pod: str, code: int = 1, ours: bool = False, gave_up: bool = False) -> Exit:
    return Exit(time_s=12.0, pod=pod, code=code, ours=ours, gave_up=gave_up)


def test_an_actor_or_a_server_that_ends_by_itself_is_a_violation_and_what_we_killed_is_none() -> None:
    exits = (exit_of("actor-0"), exit_of("paramserver", 3), exit_of("learner-0", -9, ours=True))
    found = judge(a_kill(), exits=exits)
    assert found.violations == ("actor-0 exited with 1", "paramserver exited with 3")
    assert found.gave_up == ()


def test_a_learner_that_gives_up_is_told_and_breaks_no_promise() -> None:
    found = judge(a_kill(), exits=(exit_of("learner-0", gave_up=True),))
    assert found.violations == ()
    assert found.gave_up == ("learner-0 exited with 1",)


@pytest.mark.parametrize("code", [0, 1, 2, 3, -6, -9])
def test_a_learner_that_ends_and_does_not_say_that_it_gives_up_breaks_a_promise(code: int) -> None:
    found = judge(a_kill(), exits=(exit_of("learner-2", code),))
    assert found.violations == (f"learner-2 exited with {code}",)
    assert found.gave_up == ()


def test_a_learner_that_was_killed_while_it_gave_up_was_killed() -> None:
    found = judge(a_kill(), exits=(exit_of("learner-2", -9, ours=True, gave_up=True),))
    assert (found.violations, found.gave_up) == ((), ())


def test_ranks_that_found_themselves_different_and_healed_it_are_a_violation() -> None:
    counted = [seen(n, "learner-1", differed=differed) for n, differed in enumerate((0, 0, 1, 1))]
    found = judge(sorted([*a_kill(), *counted], key=lambda each: each.time_s))
    assert found.violations == ("learner-1: found other weights in its group than its own",)


def test_a_counter_that_rose_before_is_not_told_again_and_begins_anew_in_the_next_life() -> None:
    counts = ((1.0, 2), (1.0, 2), (2.0, 0), (2.0, 1), (3.0, 1), (4.0, 0))
    trace = [seen(n, "learner-1", life=life, differed=count) for n, (life, count) in enumerate(counts)]
    assert rises(trace, DIFFERED, CREW.learners) == ["learner-1", "learner-1"]
    assert rises(trace, DIFFERED, CREW.actors) == []


def checksums(*pages: tuple[str, float, float, float]) -> list[Seen]:
    """(pod, generation, version, checksum), one a second."""
    return [
        seen(second, pod, generation=generation, at=at, checksum=checksum)
        for second, (pod, generation, at, checksum) in enumerate(pages)
    ]


def settled(pod: str, generation: float, at: float, checksum: float) -> list[tuple[str, float, float, float]]:
    """It joins a generation, computes a checksum in it, and shows that for a while."""
    return [(pod, generation, 0, 0), *[(pod, generation, at, checksum)] * 2]


def test_ranks_that_differ_at_a_version_of_a_generation_are_a_violation() -> None:
    same = checksums(*settled("learner-0", 2, 100, 7), *settled("learner-1", 2, 100, 7))
    assert unequal_ranks(same, CREW.learners) == []
    other = checksums(*settled("learner-0", 2, 100, 7), *settled("learner-1", 2, 100, 8))
    assert unequal_ranks(other, CREW.learners) == [
        "generation 2, version 100: not equal are learner-0, learner-1"
    ]


def test_ranks_may_differ_at_the_same_version_of_two_generations() -> None:
    trace = checksums(*settled("learner-0", 2, 100, 7), *settled("learner-1", 3, 100, 8))
    assert unequal_ranks(trace, CREW.learners) == []


def test_what_is_seen_once_may_be_half_of_the_old_and_half_of_the_new() -> None:
    half = [("learner-1", 2, 100, 9)]
    trace = checksums(*settled("learner-0", 2, 200, 7), *settled("learner-1", 2, 100, 5), *half)
    assert unequal_ranks([*trace, *checksums(*settled("learner-2", 2, 100, 5))], CREW.learners) == []


def test_a_checksum_that_is_left_of_an_earlier_generation_says_nothing_about_this_one() -> None:
    left = [*settled("learner-0", 2, 100, 7), *[("learner-0", 4, 100, 7)] * 2]
    trace = checksums(*left, *settled("learner-1", 4, 100, 8))
    assert unequal_ranks(trace, CREW.learners) == []


# --- who holds the state ----------------------------------------------------------------------------------


def learners(*pages: tuple[float, float]) -> dict[str, Seen]:
    """(generation, holds) of each learner."""
    return {
        pod: seen(1.0, pod, generation=generation, holds=holds)
        for pod, (generation, holds) in zip(CREW.learners, pages, strict=True)
    }


def test_the_holder_is_whose_state_was_taken_over_and_not_the_first_learner() -> None:
    assert holder(CREW, learners((4, 0), (4, 1), (4, 0))) == "learner-1"
    assert holder(CREW, learners((4, 1), (4, 0), (4, 0))) == "learner-0"


def test_who_held_the_state_of_an_older_group_is_not_the_holder() -> None:
    assert holder(CREW, learners((3, 1), (4, 1), (4, 0))) == "learner-1"
    assert holder(CREW, learners((3, 1), (4, 0), (4, 0))) is None


def test_between_two_groups_and_before_the_first_nobody_holds_the_state() -> None:
    assert holder(CREW, learners((4, 0), (4, 0), (4, 0))) is None
    assert holder(CREW, {"paramserver": seen(1.0, "paramserver", version=3)}) is None


# --- the end ----------------------------------------------------------------------------------------------


class Stopping:
    """A system, and the watch of it, whose pods end as they are told to."""

    def __init__(self, *, codes: dict[str, int | None], ends: list[End], exits: list[Exit]) -> None:
        self.crew = CREW
        self.stopped: list[str] = []
        self._codes = {pod: codes.get(pod, 0) for pod in CREW.pods}
        self._ends = ends
        self._exits = exits

    def stop(self, names: Sequence[str]) -> dict[str, int | None]:
        self.stopped += names
        return {name: self._codes[name] for name in names}

    def ends(self) -> list[End]:
        return self._ends

    def exits(self, since_s: float) -> list[Exit]:
        return self._exits

    def latest(self) -> dict[str, Seen]:
        return {}


SAME = [End(learner=pod, policy_version="90", parameters="a1") for pod in CREW.learners]


def wrong_with(
    codes: dict[str, int | None] | None = None, ends: list[End] = SAME, exits: Sequence[Exit] = ()
) -> list[str]:
    system = Stopping(codes=codes or {}, ends=ends, exits=[*exits])
    wrong = _rest_and_compare(cast(System, system), cast(Watch, system), still_s=0.0)
    assert system.stopped == [*CREW.actors, *CREW.learners, CREW.paramserver]
    return wrong


def test_an_end_with_the_same_parameters_and_without_complaint_is_a_good_one() -> None:
    assert wrong_with(exits=[exit_of("learner-0", 0, ours=True)]) == []


@pytest.mark.parametrize("pod", CREW.pods)
@pytest.mark.parametrize(
    ("code", "told"), [(1, "exited with 1"), (-6, "exited with -6"), (None, "has not ended")]
)
def test_who_is_asked_to_stop_has_to_end_with_0_whatever_it_said(
    pod: str, code: int | None, told: str
) -> None:
    assert wrong_with({pod: code}) == [f"{pod} was asked to stop and {told}"]


def test_who_ends_before_it_is_asked_to_is_told_even_if_it_was_started_again() -> None:
    assert wrong_with(exits=[exit_of("learner-2", -11)]) == ["learner-2 exited with -11"]


def test_learners_that_differ_or_are_silent_at_the_end_are_told() -> None:
    other = replace(SAME[2], parameters="b2")
    assert wrong_with(ends=[*SAME[:2], other]) == [
        "learners ended with different parameters: learner-0 90 a1, learner-1 90 a1, learner-2 90 b2"
    ]
    newer = replace(SAME[2], policy_version="91")
    assert len(wrong_with(ends=[*SAME[:2], newer])) == 1
    assert wrong_with({"learner-2": 1}, ends=SAME[:2]) == [
        "learner-2 was asked to stop and exited with 1",
        "a learner has not told its parameters at its end",
    ]


# --- whole again ------------------------------------------------------------------------------------------


def whole(**changes: Seen) -> dict[str, Seen]:
    latest = {
        pod: seen(20.0, pod, steps=1900, generation=4, world=3, holds=pod == "learner-1")
        for pod in CREW.learners
    }
    latest["paramserver"] = seen(20.0, "paramserver", version=19, seats=1)
    latest["actor-0"] = seen(20.0, "actor-0", sent=31)
    return latest | {each.pod: each for each in changes.values()}


BEFORE = [
    seen(9.0, "learner-1", steps=1800),
    seen(9.0, "paramserver", version=18),
    seen(9.0, "actor-0", sent=30),
]
GOAL = goal_of(CREW, [*BEFORE, seen(12.0, "learner-1", steps=1890)], since_s=11.0)


def test_all_is_whole_when_all_train_together_and_every_actor_sends() -> None:
    assert is_whole(CREW, whole(), GOAL)


@pytest.mark.parametrize(
    "changed",
    [
        seen(10.9, "learner-2", steps=1900, generation=4, world=3),
        seen(20.0, "learner-2", steps=1900, generation=3, world=3),
        seen(20.0, "learner-2", steps=1900, generation=4, world=2),
        seen(20.0, "learner-2", steps=1800, generation=4, world=3),
        seen(20.0, "learner-1", steps=1900, generation=4, world=3, holds=0),
        seen(20.0, "paramserver", version=18, seats=1),
        seen(20.0, "paramserver", version=19, seats=0),
        seen(20.0, "actor-0", sent=30),
        seen(20.0, "actor-0", life=2.0, sent=0),
    ],
    ids=[
        *("not seen", "other group", "too few", "no step", "no holder"),
        *("no version", "no seat", "sends nothing", "anew"),
    ],
)
def test_all_is_not_whole_while(changed: Seen) -> None:
    assert not is_whole(CREW, whole(changed=changed), GOAL)


def test_a_pod_that_was_never_seen_is_missing_and_a_new_life_of_an_actor_begins_at_nothing() -> None:
    latest = whole()
    del latest["learner-1"]
    assert not is_whole(CREW, latest, GOAL)
    assert is_whole(CREW, whole(changed=seen(20.0, "actor-0", life=2.0, sent=1)), GOAL)


def test_a_group_of_two_who_agree_is_not_the_whole_group() -> None:
    pods = {
        pod: seen(20.0, pod, steps=1900, generation=4, world=2, holds=pod == "learner-1")
        for pod in CREW.learners
    }
    assert not is_whole(CREW, whole() | pods, GOAL)
