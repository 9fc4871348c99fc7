"""What is told of the faults: a file that grows by one finding at a time, a table, and a picture.

The file's first line says under which settings all the others were found; a run that was broken off goes on
with it, and one with other settings refuses it. A last line that was only half written is no finding.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.chaos_faults import KINDS, SERVER, Plan
from benchmarks.chaos_findings import Finding

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
FAULTS = {"kill": "kill -9", "freeze": "SIGSTOP", "cut": "partition"}
BOUND_S = 10.0
"""What the median of every kind has to stay under."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What findings have to have in common to be in one table."""

    learners: int
    actors: int
    seed: int
    hold_s: float
    flags: tuple[str, ...]
    commit: str


class Results:
    """The file."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """ValueError if there is one with other settings."""
        self._path = path
        ours = json.loads(json.dumps(asdict(settings)))
        self.findings: list[Finding] = []
        if not _whole_lines(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(ours) + "\n", encoding="utf-8")
            return
        lines = _whole_lines(path)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        theirs = json.loads(lines[0])
        different = [name for name in ours if ours[name] != theirs.get(name)]
        if different:
            changes = ", ".join(
                f"{name} was {theirs.get(name)!r} and is {ours[name]!r}" for name in different
            )
            raise ValueError(f"--results {path}: {changes}; allowed is another file, or none")
        self.findings = [_finding(json.loads(line)) for line in lines[1:]]

    def add(self, finding: Finding) -> None:
        """At the end of the file, at once."""
        self.findings.append(finding)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(finding)) + "\n")

    def has(self, plan: Plan) -> bool:
        """Whether this fault has happened, perhaps in an earlier call."""
        done = {(each.round, each.fault, each.target) for each in self.findings}
        return (plan.round, plan.fault, plan.target) in done


def seed_of(path: Path) -> int | None:
    """That of an earlier call, to go on with; None if there is no such file."""
    found = read(path)
    return None if found is None else found[0].seed


def read(path: Path) -> tuple[Settings, list[Finding]] | None:
    """What is in such a file, finished or not; None if there is none."""
    lines = _whole_lines(path)
    if not lines:
        return None
    values = json.loads(lines[0])
    settings = Settings(**{**values, "flags": tuple(values["flags"])})
    return settings, [_finding(json.loads(line)) for line in lines[1:]]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _finding(values: Mapping[str, object]) -> Finding:
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Finding(**{**values, **lists})  # type: ignore[arg-type]


def by_kind(findings: Sequence[Finding]) -> dict[tuple[str, str], list[Finding]]:
    """(fault, target) -> its findings, in the order of ``KINDS``, without those that never happened."""
    groups = {kind: [each for each in findings if (each.fault, each.target) == kind] for kind in KINDS}
    return {kind: group for kind, group in groups.items() if group}


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that is not less than a share ``q`` of all."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def judged_s(finding: Finding, hold_s: float) -> float:
    """What the bound is about: how long training stood still and might have gone on.

    While the parameter server is away, training stops once the actors' weights are too old. That is as it
    should be, and what counts is by how much it takes longer than the server was away.
    """
    return max(0.0, finding.training_s - hold_s) if _takes_weights_away(finding) else finding.training_s


def too_slow(findings: Sequence[Finding], hold_s: float) -> list[str]:
    """Kinds whose median is not under ``BOUND_S``."""
    medians = {
        kind: statistics.median(judged_s(each, hold_s) for each in group)
        for kind, group in by_kind(findings).items()
    }
    return [
        f"{FAULTS[fault]}, {target}: training goes on after {median:.1f} s; allowed is under {BOUND_S:g} s"
        for (fault, target), median in medians.items()
        if median >= BOUND_S
    ]


def _takes_weights_away(finding: Finding) -> bool:
    return finding.target == SERVER and finding.fault != "kill"


def table(findings: Sequence[Finding], hold_s: float) -> str:
    """In Markdown: one row for each kind of fault."""
    head = [
        *("fault", "victim", "times", "training goes on: median", "p90", "max"),
        *("after its end: median", "max", "new weights: median", "max"),
        *("all whole again: median", "max", "gave up", "violations"),
    ]
    rows = [head, ["---"] * len(head)]
    for (fault, target), group in by_kind(findings).items():
        training = [each.training_s for each in group]
        after = [judged_s(each, hold_s) for each in group if _takes_weights_away(each)]
        weights = [each.weights_s for each in group]
        whole = [math.inf if each.whole_s is None else each.whole_s for each in group]
        rows.append(
            [
                *(FAULTS[fault], target, str(len(group))),
                *map(_seconds, (statistics.median(training), quantile(training, 0.9), max(training))),
                *(map(_seconds, (statistics.median(after), max(after))) if after else ("-", "-")),
                *map(_seconds, (statistics.median(weights), max(weights))),
                *map(_seconds, (statistics.median(whole), max(whole))),
                str(sum(len(each.gave_up) for each in group)),
                str(sum(len(each.violations) for each in group)),
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary(findings: Sequence[Finding]) -> str:
    """One line."""
    if not findings:
        return "no fault yet"
    training = [each.training_s for each in findings]
    broken = sum(bool(each.violations) for each in findings)
    return (
        f"{len(findings)} faults: training goes on after {_seconds(statistics.median(training))} (median), "
        f"{_seconds(quantile(training, 0.9))} (p90), {_seconds(max(training))} (max); "
        f"{broken} broke a promise"
    )


def line(finding: Finding) -> str:
    """About one, as it happened."""
    whole = "never" if finding.whole_s is None else _seconds(finding.whole_s)
    text = (
        f"{finding.fault:6} {finding.victim:11} ({finding.target}): training {_seconds(finding.training_s)}, "
        f"weights {_seconds(finding.weights_s)}, whole {whole} after its end"
    )
    text += "".join(f"; {each}" for each in finding.gave_up)
    return text + "".join(f"\n    VIOLATION {each}" for each in finding.violations)


def write_into(document: Path, text: str) -> None:
    """Between the markers of ``document``; ValueError if it has none."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document}: has no {BEGIN} ... {END}")
    document.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def draw(findings: Sequence[Finding], hold_s: float, path: Path) -> None:
    """Every fault as a dot: how long training stood still, by kind, as it is judged."""
    from matplotlib import pyplot

    groups = by_kind(findings)
    figure, axis = pyplot.subplots(figsize=(8, 0.42 * len(groups) + 1.2), layout="constrained")
    for row, group in enumerate(groups.values()):
        values = sorted(judged_s(each, hold_s) for each in group)
        middle = [row + 0.5 * (n / max(1, len(values) - 1) - 0.5) for n in range(len(values))]
        axis.scatter(values, middle, s=14, color="#0b7a75", alpha=0.6, linewidths=0)
        median = statistics.median(values)
        axis.plot([median, median], [row - 0.35, row + 0.35], color="#d97706", linewidth=2)
    axis.axvline(BOUND_S, color="#9aa0a6", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(groups)), [f"{FAULTS[fault]}: {target}" for fault, target in groups])
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("seconds without a step; parameter server away: after its return (line: median)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _seconds(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.1f} s"
