"""What a fault has cost and whether it broke a promise: rules without clocks, over what was seen of the pods.

``chaos_system`` and ``chaos_watch`` make the trace, ``chaos_report`` prints the findings. The promises:

* steps: no learner's counter falls while it lives, and the survivors of a learner go on from where it was,
  but for the one update that only the dead had finished;
* versions: the parameter server's never falls in one life, and after a restart comes back to where it was;
* pods: nobody exits who was not killed; a learner may that says it cannot leave its group, and is counted;
* ranks: learners of one generation have the same parameters at the same version, and none finds that they do
  not, which it would heal;
* the end: all is whole again within ``WHOLE_S``; after the last fault nobody ends before it is asked to, all
  end with 0, and the learners with the same parameters.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LIFE = "process_start_time_seconds"
STEPS = "impala_learner_steps"
GENERATION = "impala_learner_generation"
WORLD_SIZE = "impala_learner_world_size"
HOLDS = "impala_learner_holds_state"
CHECKSUM = "impala_learner_parameters_checksum"
CHECKSUM_VERSION = "impala_learner_parameters_checksum_version"
VERSION = "impala_paramserver_version"
SEATS = "impala_paramserver_seats"
DIFFERED = 'impala_learner_regroups_total{reason="differed"}'
SENT = "impala_actor_rollouts_sent_total"
FIGURES = frozenset(
    {LIFE, STEPS, GENERATION, WORLD_SIZE, HOLDS, CHECKSUM, CHECKSUM_VERSION, DIFFERED, VERSION, SEATS, SENT}
)
"""What is kept of each look at a pod; most pods have only some of them."""

WHOLE_S = 60.0
SETTLED_S = 0.25
"""A stall this long is seen at every survivor, however the looks at them fell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One pod's figures at one moment."""

    time_s: float
    """On the monotonic clock."""
    pod: str
    figures: Mapping[str, float]

    @property
    def life(self) -> float:
        """Differs from that of the pod's other lives."""
        return self.figures.get(LIFE, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """A process has ended."""

    time_s: float
    pod: str
    code: int
    """As of `subprocess`: minus the signal's number."""
    ours: bool
    """Whether we did it."""
    gave_up: bool
    """Whether this life's log says that it cannot leave its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Of a learner that was asked to stop: what its last words say."""

    learner: str
    policy_version: str
    parameters: str
    """A checksum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """A fault that is over."""

    round: int
    fault: str
    """`kill`, `freeze` or `cut`."""
    target: str
    """What the victim was: `state holder`, `other learner`, `parameter server`, `actor`."""
    victim: str
    begun_s: float
    ended_s: float
    """When it was started again, thawed or mended."""
    whole_s: float | None
    """When all was whole again; None if not within ``WHOLE_S``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """About one injection. Times in seconds."""

    round: int
    fault: str
    target: str
    victim: str
    training_s: float
    """The survivors' longest time without a step from the fault on, beyond the normal one."""
    weights_s: float
    """The same of new versions at the parameter server."""
    whole_s: float | None
    """From the end of the fault until all was as before."""
    normal_s: float
    """Between two steps before the fault: the median."""
    gave_up: tuple[str, ...]
    """Learners that could not leave their group, ended by themselves and were started again."""
    violations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Who there is."""

    learners: tuple[str, ...]
    actors: tuple[str, ...]
    paramserver: str
    steps_per_update: int
    """Of all learners together."""

    @property
    def pods(self) -> tuple[str, ...]:
        """In the order of starting."""
        return (self.paramserver, *self.learners, *self.actors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What was reached when a fault ended."""

    since_s: float
    steps: float
    version: float
    actors: Mapping[str, Seen]


def finding(injection: Injection, crew: Crew, trace: Sequence[Seen], exits: Sequence[Exit]) -> Finding:
    """``trace`` begins in the quiet time before the fault and ends when all was whole again, or given up."""
    survivors = [pod for pod in crew.learners if pod != injection.victim]
    end_s = max((seen.time_s for seen in trace), default=injection.ended_s)
    steps = advances(trace, STEPS, survivors)
    versions = advances(trace, VERSION, [crew.paramserver])
    gave_up = [each for each in exits if each.gave_up and not each.ours and each.pod in crew.learners]
    violations = [
        *falls(trace, STEPS, crew.learners),
        *falls(trace, VERSION, [crew.paramserver]),
        *unequal_ranks(trace, crew.learners),
        *(
            f"{pod}: found other weights in its group than its own"
            for pod in rises(trace, DIFFERED, crew.learners)
        ),
        *_gone_back(injection, crew, trace),
        *_not_back_at(injection, crew, trace),
        *(_words(each) for each in exits if not each.ours and each not in gave_up),
    ]
    if injection.whole_s is None:
        violations.append(f"not whole again within {WHOLE_S:g} s")
    before = [time_s for time_s in steps if time_s <= injection.begun_s]
    normal_s = normal_gap(before)
    versions_s = normal_gap([time_s for time_s in versions if time_s <= injection.begun_s])
    return Finding(
        round=injection.round,
        fault=injection.fault,
        target=injection.target,
        victim=injection.victim,
        training_s=max(0.0, longest_gap(steps, injection.begun_s, end_s)[1] - normal_s),
        weights_s=max(0.0, longest_gap(versions, injection.begun_s, end_s)[1] - versions_s),
        whole_s=None if injection.whole_s is None else injection.whole_s - injection.ended_s,
        normal_s=normal_s,
        gave_up=tuple(map(_words, gave_up)),
        violations=tuple(violations),
    )


def wrong_at_the_end(
    crew: Crew, codes: Mapping[str, int | None], exits: Iterable[Exit], ends: Sequence[End]
) -> list[str]:
    """After the last fault. ``codes`` are of all who were asked to stop, None of who did not end in time."""
    wrong = [_words(each) for each in exits if not each.ours]
    for pod, code in codes.items():
        if code != 0:
            did = "has not ended" if code is None else f"exited with {code}"
            wrong.append(f"{pod} was asked to stop and {did}")
    if len(ends) < len(crew.learners):
        wrong.append("a learner has not told its parameters at its end")
    elif len({(end.policy_version, end.parameters) for end in ends}) > 1:
        told = ", ".join(f"{end.learner} {end.policy_version} {end.parameters}" for end in ends)
        wrong.append(f"learners ended with different parameters: {told}")
    return wrong


def _words(each: Exit) -> str:
    return f"{each.pod} exited with {each.code}"


def advances(trace: Iterable[Seen], name: str, pods: Sequence[str]) -> list[float]:
    """When the highest value of these pods rose above all that it had been."""
    most, times = None, []
    for seen in trace:
        value = seen.figures.get(name) if seen.pod in pods else None
        if value is not None and (most is None or value > most):
            if most is not None:
                times.append(seen.time_s)
            most = value
    return times


def longest_gap(times: Sequence[float], begin_s: float, end_s: float) -> tuple[float, float]:
    """(when it began, how long it was), of the time between ``begin_s`` and ``end_s``."""
    inside = [time_s for time_s in times if begin_s < time_s < end_s]
    gaps = itertools.pairwise([begin_s, *inside, end_s])
    return max(((first, second - first) for first, second in gaps), key=lambda gap: gap[1])


def normal_gap(times: Sequence[float]) -> float:
    """The median; 0 if there are not two."""
    gaps = [second - first for first, second in itertools.pairwise(times)]
    return statistics.median(gaps) if gaps else 0.0


def falls(trace: Iterable[Seen], name: str, pods: Sequence[str]) -> list[str]:
    """Every time that this figure of one life of a pod was less than it had been."""
    last: dict[tuple[str, float], float] = {}
    found = []
    for seen in trace:
        value = seen.figures.get(name) if seen.pod in pods else None
        if value is None:
            continue
        life = (seen.pod, seen.life)
        if value < last.get(life, value):
            found.append(f"{seen.pod}: {name} fell from {last[life]:,.0f} to {value:,.0f}")
        last[life] = value
    return found


def rises(trace: Iterable[Seen], name: str, pods: Sequence[str]) -> list[str]:
    """The pod, for every look that found more of this counter than before; a new life begins at nothing."""
    last: dict[str, tuple[float, float]] = {}
    found = []
    for seen in trace:
        value = seen.figures.get(name) if seen.pod in pods else None
        if value is None:
            continue
        life, before = last.get(seen.pod, (seen.life, value))
        if value > (before if life == seen.life else 0.0):
            found.append(seen.pod)
        last[seen.pod] = (seen.life, value)
    return found


def unequal_ranks(trace: Iterable[Seen], learners: Sequence[str]) -> list[str]:
    """Versions of a generation at which two learners had different parameters.

    A page of metrics is not read in one instant: what stands on two in a row belongs together. And a checksum
    stays on it when its generation is over, so it counts only where it was seen to come: in the generation of
    the page before it.
    """
    pages: dict[str, list[tuple[float, ...]]] = {}
    names = (LIFE, GENERATION, CHECKSUM_VERSION, CHECKSUM)
    for seen in trace:
        if seen.pod in learners and all(name in seen.figures for name in names):
            pages.setdefault(seen.pod, []).append(tuple(seen.figures[name] for name in names))
    known: dict[tuple[float, float], dict[str, float]] = {}
    for pod, shown in pages.items():
        changes = [shown[0], *(now for last, now in itertools.pairwise(shown) if now != last)]
        stable = {now for last, now in itertools.pairwise(shown) if now == last}
        for last, (life, generation, version, checksum) in itertools.pairwise(changes):
            is_of_generation = last[:2] == (life, generation)
            if is_of_generation and (life, generation, version, checksum) in stable:
                known.setdefault((generation, version), {})[pod] = checksum
    return [
        f"generation {generation:.0f}, version {version:.0f}: not equal are {', '.join(sorted(sums))}"
        for (generation, version), sums in sorted(known.items())
        if len(set(sums.values())) > 1
    ]


def holder(crew: Crew, latest: Mapping[str, Seen]) -> str | None:
    """The learner whose state the others took over when they met; None while there is no group."""
    learners = {pod: latest[pod].figures for pod in crew.learners if pod in latest}
    # Who has left the newest group, or is dead, may be seen with an older one, in which it held the state.
    newest = max((each.get(GENERATION, 0.0) for each in learners.values()), default=0.0)
    holding = [
        pod for pod, each in learners.items() if each.get(HOLDS) == 1 and each.get(GENERATION) == newest
    ]
    return holding[0] if len(holding) == 1 else None


def goal_of(crew: Crew, trace: Sequence[Seen], since_s: float) -> Goal:
    """What has to be surpassed, by all that was seen until ``since_s``, the end of the fault."""
    seen_by_then = [seen for seen in trace if seen.time_s <= since_s]
    return Goal(
        since_s=since_s,
        steps=highest(seen_by_then, STEPS, crew.learners, since_s),
        version=highest(seen_by_then, VERSION, [crew.paramserver], since_s),
        actors={seen.pod: seen for seen in seen_by_then if seen.pod in crew.actors},
    )


def is_whole(crew: Crew, latest: Mapping[str, Seen], goal: Goal) -> bool:
    """Everybody was seen since then, all learners train together, and what they learn reaches the actors."""
    if any(pod not in latest or latest[pod].time_s < goal.since_s for pod in crew.pods):
        return False
    learners = [latest[pod].figures for pod in crew.learners]
    groups = {(each.get(GENERATION), each.get(WORLD_SIZE)) for each in learners}
    server = latest[crew.paramserver].figures
    return (
        len(groups) == 1
        and holder(crew, latest) is not None
        and learners[0].get(WORLD_SIZE) == len(crew.learners)
        and all(each.get(STEPS, 0.0) > goal.steps for each in learners)
        and server.get(VERSION, -1.0) > goal.version
        and server.get(SEATS) == len(crew.actors)
        and all(_sends(latest[pod], goal.actors.get(pod)) for pod in crew.actors)
    )


def _sends(now: Seen, before: Seen | None) -> bool:
    """This actor, since."""
    sent_before = before.figures.get(SENT, 0.0) if before is not None and before.life == now.life else 0.0
    return now.figures.get(SENT, 0.0) > sent_before


def _gone_back(injection: Injection, crew: Crew, trace: Sequence[Seen]) -> list[str]:
    """Did those who survived a learner go on from where they all were?"""
    if injection.victim not in crew.learners:
        return []  # then all survive, and ``falls`` says it
    survivors = [pod for pod in crew.learners if pod != injection.victim]
    end_s = max((seen.time_s for seen in trace), default=injection.ended_s)
    stalled_s, gap_s = longest_gap(advances(trace, STEPS, survivors), injection.begun_s, end_s)
    if gap_s < SETTLED_S:
        return []
    reached = highest(trace, STEPS, crew.learners, injection.begun_s)
    # What is seen at the very moment of a step counts as before it: it is what they went on from.
    resumed = highest(trace, STEPS, survivors, stalled_s + gap_s - SETTLED_S / 2)
    if reached - resumed <= crew.steps_per_update:
        return []
    return [f"training went on from {resumed:,.0f} steps, and had been at {reached:,.0f}"]


def _not_back_at(injection: Injection, crew: Crew, trace: Sequence[Seen]) -> list[str]:
    """Has the parameter server, at the end, at least what it had before?"""
    server = [seen for seen in trace if seen.pod == crew.paramserver]
    if injection.whole_s is None or not server:
        return []  # which is said already
    before = highest(server, VERSION, [crew.paramserver], injection.begun_s)
    now = server[-1].figures.get(VERSION, -1.0)
    return [f"{crew.paramserver}: version {now:.0f} after {before:.0f}"] if now < before else []


def highest(trace: Iterable[Seen], name: str, pods: Sequence[str], until_s: float) -> float:
    """Of these pods until then; 0 if nothing was seen."""
    values = [s.figures[name] for s in trace if s.pod in pods and s.time_s <= until_s and name in s.figures]
    return max(values, default=0.0)
