"""What ``fleet`` reports, from the clients' records and the /metrics of the servers. No sockets, no clock."""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.options import row
from benchmarks.swarm import Record

Figures = dict[str, float]
Curves = dict[str, list[tuple[float, float]]]
"""By role, what it held when: (seconds since the window began, MB)."""
SHARES = {"50": 0.5, "99": 0.99, "100": 1.0}
RSS = "process_resident_memory_bytes"
TAIL_S = 1.0
"""Versions that are newer than this at the end are left out: they had no time to reach everybody."""


@dataclass(frozen=True, slots=True)
class Sample:
    """All series of the pods at one moment, by role."""

    time_s: float
    series: Mapping[str, Mapping[str, float]]

    def get(self, role: str, name: str) -> float:
        """0 where there is none."""
        return self.series.get(role, {}).get(name, 0.0)

    def total(self, role: str, name: str) -> float:
        """Over all labels."""
        return sum(
            value for series, value in self.series.get(role, {}).items() if series.partition("{")[0] == name
        )


def told_together(series: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """By role: the series of all relays are summed, as if they were one."""
    told = {name: each for name, each in series.items() if not name.startswith("relay-")}
    relays = [each for name, each in series.items() if name.startswith("relay-")]
    if relays:
        told["relays"] = {name: sum(each.get(name, 0.0) for each in relays) for name in relays[0]}
    return told


def figures_of(
    *,
    samples: Sequence[Sample],
    records: Sequence[Record],
    published: Mapping[int, float] | None,
    connected_s: float,
    window_s: tuple[float, float],
    clients_cpu_s: float,
) -> Figures:
    """``samples`` begin before anybody connects and end when all have left; the window lies between."""
    during = [each for each in samples if window_s[0] <= each.time_s <= window_s[1]]
    first, last, after = samples[0], during[-1], samples[-1]
    ready_s = sorted(each.ready_s - connected_s for each in records)
    figures: Figures = {
        "clients": len(records),
        "answered": sum(math.isfinite(each.answered_s) for each in records),
        "served": sum(each.ready_s <= window_s[0] for each in records),
        "seats_held": last.get("paramserver", "impala_paramserver_seats"),
        "seats_after_goodbyes": after.get("paramserver", "impala_paramserver_seats"),
        "seats_lost": sum(each.seats_lost for each in records),
        "reconnects": sum(each.reconnects for each in records),
        "ready_50_s": ready_s[math.ceil(len(ready_s) / 2) - 1],
        "ready_100_s": ready_s[-1],
    }
    for share, seconds in spread(records, published, window_s).items():
        figures[f"new_version_{share}_s"] = seconds
    figures["versions"] = len({version for each in records for _, version in each.versions})
    figures |= _of_paramserver(first, during, after)
    if "learner" in first.series:
        figures |= _of_learner(first, during, after)
        figures["sending"] = sum(math.isfinite(each.sent_s) for each in records)
        figures["sending_100_s"] = max(each.sent_s for each in records) - connected_s
        figures["sent"] = sum(each.sent for each in records)
    for role in first.series:
        figures |= _of_process(role, samples, during)
        figures[f"{role}_rss_mb_per_minute"] = growth(memory_of(samples, window_s)[role])
    figures["clients_cpu_s"] = clients_cpu_s
    return figures


def spread(
    records: Sequence[Record], published: Mapping[int, float] | None, window_s: tuple[float, float]
) -> dict[str, float]:
    """From a version's publication until 50, 99 and 100 % of the clients held it, or a newer one.

    Medians over the versions. Where nobody knows when a version was published, the clock starts when the
    first client has it.
    """
    begun_s, ended_s = window_s
    known = published if published is not None else _first_seen(records)
    durations: dict[str, list[float]] = {share: [] for share in SHARES}
    arrivals = [([version for _, version in each.versions], each.versions) for each in records]
    for version, start_s in known.items():
        if not begun_s <= start_s <= ended_s - TAIL_S:
            continue
        held_s = []
        for versions, times in arrivals:
            at = bisect_left(versions, version)
            held_s.append(times[at][0] if at < len(times) else math.inf)
        held_s.sort()
        for share, part in SHARES.items():
            durations[share].append(held_s[math.ceil(part * len(held_s)) - 1] - start_s)
    return {share: statistics.median(each) if each else math.nan for share, each in durations.items()}


def memory_of(samples: Sequence[Sample], window_s: tuple[float, float]) -> Curves:
    """Of each role, over the window; moments at which it did not answer are left out."""
    begun_s, ended_s = window_s
    during = [each for each in samples if begun_s <= each.time_s <= ended_s]
    return {
        role: [
            (round(each.time_s - begun_s, 2), each.get(role, RSS) / 1e6)
            for each in during
            if each.get(role, RSS)
        ]
        for role in samples[0].series
    }


def growth(curve: Sequence[tuple[float, float]]) -> float:
    """MB a minute, by least squares over the second half: what is allocated once is allocated by then."""
    late = [(time_s / 60, mb) for time_s, mb in curve if time_s >= curve[-1][0] / 2]
    if len({minute for minute, _ in late}) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*late, strict=True)).slope


def _first_seen(records: Sequence[Record]) -> dict[int, float]:
    first: dict[int, float] = {}
    for each in records:
        for time_s, version in each.versions:
            first[version] = min(first.get(version, math.inf), time_s)
    return first


def _rate(during: Sequence[Sample], role: str, name: str) -> float:
    """The mean over the window, of what comes in bursts."""
    first, last = during[0], during[-1]
    return (last.get(role, name) - first.get(role, name)) / (last.time_s - first.time_s)


def _per_second(during: Sequence[Sample], role: str, name: str) -> float:
    """The median over the seconds of the window."""
    rates = [
        (after.get(role, name) - before.get(role, name)) / (after.time_s - before.time_s)
        for before, after in itertools.pairwise(during)
        if after.series[role] and before.series[role] and after.time_s > before.time_s + 0.1
    ]
    return statistics.median(rates) if rates else math.nan


def _of_paramserver(first: Sample, during: Sequence[Sample], after: Sample) -> Figures:
    role = "paramserver"
    full = 'impala_paramserver_pulls_total{result="full"}'
    return {
        "paramserver_weights_per_s": _rate(during, role, full),
        "paramserver_mb_per_s": _rate(during, role, "impala_paramserver_sent_bytes_total") / 1e6,
        "paramserver_refused": _grown(first, after, role, "impala_paramserver_refused_requests_total"),
        "paramserver_auth_failures": _grown(first, after, role, "impala_auth_failures_total"),
    }


def _of_learner(first: Sample, during: Sequence[Sample], after: Sample) -> Figures:
    role = "learner"
    rate = _per_second(during, role, 'impala_learner_rollouts_total{result="ok"}')
    cpu = _per_second(during, role, "process_cpu_seconds_total")
    figures = {
        "rollouts_per_s": rate,
        "rollouts_mb_per_s": _per_second(during, role, "impala_learner_received_bytes_total") / 1e6,
        "updates_per_s": _per_second(during, role, "impala_learner_updates_total"),
        "learner_cpu_us_per_rollout": cpu / rate * 1e6 if rate else math.nan,
        "learner_auth_failures": _grown(first, after, role, "impala_auth_failures_total"),
        "sequence_gaps": _grown(first, after, role, "impala_learner_sequence_gaps_total"),
    }
    for result in ("ok", "stale", "invalid"):
        series = f'impala_learner_rollouts_total{{result="{result}"}}'
        figures[f"rollouts_{result}"] = after.get(role, series) - first.get(role, series)
    return figures


def _grown(first: Sample, after: Sample, role: str, name: str) -> float:
    return after.total(role, name) - first.total(role, name)


def _of_process(role: str, samples: Sequence[Sample], during: Sequence[Sample]) -> Figures:
    def peak(name: str) -> float:
        return max(each.get(role, name) for each in samples)

    used_s = during[-1].get(role, "process_cpu_seconds_total") - during[0].get(
        role, "process_cpu_seconds_total"
    )
    return {
        f"{role}_cpu_s": used_s,
        f"{role}_cores": used_s / (during[-1].time_s - during[0].time_s),
        f"{role}_rss_mb_before": samples[0].get(role, RSS) / 1e6,
        f"{role}_rss_mb_peak": peak(RSS) / 1e6,
        f"{role}_files_peak": peak("process_open_fds"),
        f"{role}_files_allowed": samples[0].get(role, "process_max_fds"),
    }


def table(columns: Mapping[str, Figures]) -> None:
    """A line a figure; after each column but the first, what share of the first one it is."""
    head = [name if at == 0 else f"{name} (ratio)" for at, name in enumerate(columns)]
    row("", *head)
    names = dict.fromkeys(itertools.chain.from_iterable(columns.values()))  # in their order
    for name in names:
        first, *others = (figures.get(name, math.nan) for figures in columns.values())
        row(name, f"{first:,.6g}", *(f"{value:,.6g} ({_ratio(value, first)})" for value in others))


def _ratio(value: float, first: float) -> str:
    return f"{value / first:.2f}" if first else "-"
