"""Which faults happen to whom and when, and how each is done to a running system and undone.

The plan follows from a seed. Before every fault the system is whole and left alone for a random while, in
which the normal time between two steps is seen; after it, it has ``WHOLE_S`` to be whole again. Who holds the
learners' state may change with every group: a victim is chosen when the fault happens, by what is seen then.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.chaos_findings import WHOLE_S, Crew, Goal, Injection, Seen, goal_of, holder, is_whole
from benchmarks.chaos_system import System
from benchmarks.chaos_watch import Watch

POLL_S = 0.05
QUIET_S = (1.5, 4.5)
RUNNING_S = 15.0
"""Until a killed process runs again, which takes one second."""

HOLDER, LEARNER, SERVER, ACTOR = "state holder", "other learner", "parameter server", "actor"
KINDS = (
    *(("kill", target) for target in (HOLDER, LEARNER, SERVER, ACTOR)),
    *(("freeze", target) for target in (HOLDER, LEARNER, SERVER)),
    *(("cut", target) for target in (HOLDER, LEARNER, SERVER)),
)
"""(fault, target). A frozen or cut off actor is nobody's trouble but its own, and has a test of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A fault to come."""

    round: int
    fault: str
    target: str
    quiet_s: float
    """After which it happens."""
    chance: float
    """From 0 to 1: to whom of those to whom it may happen."""


def plans(rounds: int, seed: int) -> Iterator[Plan]:
    """Every kind once a round, in another order each time. A round does not depend on how many there are."""
    for number in range(1, rounds + 1):
        chance = random.Random(f"{seed}/{number}")
        for fault, target in chance.sample(KINDS, len(KINDS)):
            yield Plan(
                round=number,
                fault=fault,
                target=target,
                quiet_s=chance.uniform(*QUIET_S),
                chance=chance.random(),
            )


def victim_of(plan: Plan, crew: Crew, latest: Mapping[str, Seen]) -> str | None:
    """By what was seen last; None while there is nobody, as of learners between two groups."""
    held_by = holder(crew, latest)
    others = [pod for pod in crew.learners if pod != held_by]
    candidates = {
        HOLDER: [] if held_by is None else [held_by],
        LEARNER: [] if held_by is None else others,
        SERVER: [crew.paramserver],
        ACTOR: crew.actors,
    }[plan.target]
    return candidates[int(plan.chance * len(candidates))] if candidates else None


def inject(system: System, watch: Watch, plan: Plan, hold_s: float) -> Injection | None:
    """The fault, its end after ``hold_s``, and the wait until all is whole, which the watch sees whole.

    None if there is nobody to whom it could happen, for as long as the system has to be whole again.
    """
    watch.forget()
    time.sleep(plan.quiet_s)
    deadline_s = time.monotonic() + WHOLE_S
    while (victim := victim_of(plan, system.crew, watch.latest())) is None:
        if time.monotonic() > deadline_s:
            return None
        time.sleep(POLL_S)
    begun_s = time.monotonic()
    if plan.fault == "kill":
        system.kill(victim)
        deadline_s = begun_s + RUNNING_S
        while system.lives(victim, since_s=begun_s) == 0 and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    elif plan.fault == "freeze":
        system.freeze(victim)
        time.sleep(hold_s)
        system.thaw(victim)
    else:
        system.network.cut(victim)
        time.sleep(hold_s)
        system.network.mend(victim)
    ended_s = time.monotonic()
    goal = goal_of(system.crew, watch.trace(), ended_s)
    return Injection(
        round=plan.round,
        fault=plan.fault,
        target=plan.target,
        victim=victim,
        begun_s=begun_s,
        ended_s=ended_s,
        whole_s=wait_until_whole(system.crew, watch, goal, WHOLE_S),
    )


def wait_until_whole(crew: Crew, watch: Watch, goal: Goal, timeout_s: float) -> float | None:
    """When it was, or None."""
    deadline_s = time.monotonic() + timeout_s
    while not is_whole(crew, watch.latest(), goal):
        if time.monotonic() > deadline_s:
            return None
        time.sleep(POLL_S)
    return time.monotonic()
