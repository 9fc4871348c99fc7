"""Several learners as one run: their scrapes -> one ``Snapshot``, led by whoever leads the group.

``figures`` works out what a single learner has to say; here figures that belong to the run are the leader's,
and what each learner does on its own is added up. Nothing here asks a pod for anything, or knows who started
it: `impala train` and `impala status` both come after it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from services.ops.figures import History, PodStatus, Replay, RunInfo, Snapshot, take_snapshot
from services.ops.scrape import Increase, Scrape, increases


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one pod says, and what it said some time ago."""

    before: Scrape | None
    now: Scrape

    @property
    def increase(self) -> Increase:
        """Of its counters, in between."""
        return increases(self.before, self.now)


class Learners:
    """The little that figures need of the past of all learners."""

    def __init__(self) -> None:
        self._histories: dict[str, History] = {}
        self._led = History()

    def add(self, answering: Mapping[str, Scrape]) -> None:
        """Those that answer now, by name, with their latest scrapes. While nobody does, nothing changes."""
        if not answering:
            return
        self._histories = {name: self._histories.get(name, History()) for name in answering}
        for name, scrape in answering.items():
            self._histories[name].add(scrape)
        self._led.add(self.leader)

    @property
    def readings(self) -> dict[str, Reading]:
        """Of those that answered last, by name."""
        return {
            name: Reading(before=history.before, now=history.now)
            for name, history in self._histories.items()
            if history.now is not None
        }

    @property
    def leader(self) -> Scrape | None:
        """What the learner that leads has said last."""
        readings = self.readings
        return readings[leading(readings)].now if readings else None

    @property
    def returns(self) -> tuple[float, ...]:
        """The course of the return, whoever led at the time."""
        return self._led.returns


def leading(learners: Mapping[str, Reading]) -> str:
    """The name of the one that leads. Between two groups, and while one that was lost does not know it yet,
    the newest word counts: that of the highest generation, and then of the most steps."""

    def claim(name: str) -> tuple[bool, float, float]:
        now = learners[name].now
        return (
            now.get("impala_learner_leads") == 1,
            _number(now.get("impala_learner_generation")),
            _number(now.get("impala_learner_steps")),
        )

    return max(learners, key=claim)


def snapshot_of(
    run: RunInfo,
    learners: Mapping[str, Reading],
    *,
    pods: tuple[PodStatus, ...] = (),
    elapsed_s: float = 0.0,
    unix_time_s: float = 0.0,
    returns: tuple[float, ...] = (),
) -> Snapshot:
    """The run's figures, from the latest readings of its learners."""

    def alone(reading: Reading | None) -> Snapshot:
        return take_snapshot(
            run,
            reading.before if reading else None,
            reading.now if reading else None,
            pods=pods,
            elapsed_s=elapsed_s,
            unix_time_s=unix_time_s,
            returns=returns,
        )

    if not learners:
        return alone(None)
    first = leading(learners)
    led = alone(learners[first])
    others = [alone(reading) for name, reading in learners.items() if name != first]
    return replace(_together(led, [led, *others]), leader=first) if others else replace(led, leader=first)


def _together(led: Snapshot, each: Sequence[Snapshot]) -> Snapshot:
    """Steps are the run's, and all learners count the same ones; rollouts and samples are each one's own."""
    steps = max((one.steps for one in each if one.steps is not None), default=None)
    steps_per_s = _sum(one.steps_per_s for one in each)
    left = None if steps is None else max(0, led.run.total_steps - steps)
    troubles: Counter[str] = Counter()
    for one in each:
        troubles.update({kind: count for kind, count in one.troubles.items() if kind != "skipped updates"})
    skipped = max(one.troubles.get("skipped updates", 0) for one in each)  # an update is one of all learners
    return replace(
        led,
        steps=steps,
        steps_per_s=steps_per_s,
        eta_s=left / steps_per_s if left is not None and steps_per_s else None,
        wait_ratio=_mean(one.wait_ratio for one in each),
        lag_mean=_mean(one.lag_mean for one in each),
        lag_max=max((one.lag_max for one in each if one.lag_max is not None), default=None),
        queue_depth=_whole(_sum(one.queue_depth for one in each)),
        queue_capacity=_whole(_sum(one.queue_capacity for one in each)),
        checkpoint_age_s=min(
            (one.checkpoint_age_s for one in each if one.checkpoint_age_s is not None), default=None
        ),
        replay=_replay([one.replay for one in each if one.replay is not None]),
        troubles={**troubles, **({"skipped updates": skipped} if skipped else {})},
    )


def _replay(each: Sequence[Replay]) -> Replay | None:
    if not each:
        return None
    return Replay(
        steps=sum(one.steps for one in each),
        capacity=_whole(_sum(one.capacity for one in each)),
        size_bytes=sum(one.size_bytes for one in each),
        age_versions=_mean(one.age_versions for one in each),
        rejected_ratio=_mean(one.rejected_ratio for one in each),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _number(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value
