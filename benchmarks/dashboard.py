"""The dashboard of the chart without Grafana: its panels, what they ask, and a picture of the answers.

python -m benchmarks.dashboard URL docs/dashboard.png [--minutes 10] [--namespace ml --release pong]

URL is a Prometheus with the recording rules that has watched a run. The tests read the panels here too.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[1] / "helm" / "dashboards" / "impala.json"
COLUMNS = 24
"""Of Grafana's grid."""
POINTS = 240
UNNAMED = ""
"""What Grafana inserts where there is nothing to choose. It fits a run on one machine: no such labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture of the dashboard."""

    title: str
    kind: str
    unit: str
    stacked: bool
    at: tuple[int, int, int, int]
    """x, y, width and height on the grid."""
    queries: Sequence[tuple[str, str]]
    """(expression, legend)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series of an answer."""

    legend: str
    points: Sequence[tuple[float, float]]
    """(Unix time, value); none that is not a number."""


def panels(path: Path = DASHBOARD) -> list[Panel]:
    """All but the headings."""
    found = []
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            continue
        defaults, at = panel["fieldConfig"]["defaults"], panel["gridPos"]
        found.append(
            Panel(
                title=panel["title"],
                kind=panel["type"],
                unit=defaults["unit"],
                stacked="stacking" in defaults.get("custom", {}),
                at=(at["x"], at["y"], at["w"], at["h"]),
                queries=[(target["expr"], target["legendFormat"]) for target in panel["targets"]],
            )
        )
    return found


def expanded(
    expression: str, *, scrape_s: float, step_s: float, namespace: str = UNNAMED, release: str = UNNAMED
) -> str:
    """``expression`` with its variables replaced as Grafana does it."""
    interval_ms = round(1000 * max(step_s + scrape_s, 4 * scrape_s))
    values = {"namespace": namespace, "release": release, "__rate_interval": f"{interval_ms}ms"}
    text = re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], expression)
    assert "$" not in text, text
    return text


def ask(url: str, expression: str, legend: str, start_s: float, end_s: float, step_s: float) -> list[Line]:
    """What Prometheus answers to a range query, without what is not a number; empty lines are left out."""
    asked = {"query": expression, "start": f"{start_s}", "end": f"{end_s}", "step": f"{step_s}"}
    address = f"{url.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
    with urllib.request.urlopen(address, timeout=30) as response:
        result = json.load(response)["data"]["result"]
    lines = []
    for series in result:
        points = [(float(at), float(value)) for at, value in series["values"]]
        known = [(at, value) for at, value in points if math.isfinite(value)]
        if known:
            lines.append(Line(legend=_legend(legend, series["metric"]), points=known))
    return lines


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template)


# ------------------------------------------------------------------------------------------- the picture


def draw(url: str, out: Path, minutes: float, scrape_s: float, namespace: str, release: str) -> None:
    """All panels in their places."""
    from matplotlib import pyplot

    end_s = time.time()
    start_s, step_s = end_s - 60 * minutes, max(1.0, 60 * minutes / POINTS)
    shown = panels()
    height = max(y + h for _, y, _, h in (panel.at for panel in shown))
    figure = pyplot.figure(figsize=(19, 0.25 * height), layout="constrained")
    grid = figure.add_gridspec(height, COLUMNS)
    for panel in shown:
        x, y, width, tall = panel.at
        axes = figure.add_subplot(grid[y : y + tall, x : x + width])
        axes.set_title(panel.title, fontsize=9, loc="left")
        answers = [
            ask(
                url,
                expanded(expression, scrape_s=scrape_s, step_s=step_s, namespace=namespace, release=release),
                legend,
                *(start_s, end_s, step_s),
            )
            for expression, legend in panel.queries
        ]
        _draw(axes, panel, answers, start_s)
    figure.supxlabel("minutes", fontsize=8)
    figure.savefig(out, dpi=75)
    print(f"{out}: {len(shown)} panels over {minutes:g} minutes")


def _draw(axes: Any, panel: Panel, answers: Sequence[Sequence[Line]], start_s: float) -> None:
    lines = [line for answer in answers for line in answer]
    if not lines:
        axes.text(0.5, 0.5, "No data", ha="center", transform=axes.transAxes, color="#9aa0a6")
    if panel.kind == "stat":
        axes.axis("off")
        for line in lines[:1]:
            text = _readable(line.points[-1][1], panel.unit)
            axes.text(0.0, 0.35, text, fontsize=20, color="#0b7a75", transform=axes.transAxes)
        return
    axes.tick_params(labelsize=7)
    axes.yaxis.set_major_formatter(lambda value, _: _readable(value, panel.unit))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.kind == "heatmap":
        _heatmap(axes, lines, start_s)
        return
    if panel.kind == "xychart":
        _against(axes, answers)
    elif panel.stacked:
        _stack(axes, lines, start_s)
    else:
        for line in lines:
            axes.plot(*_minutes(line, start_s), linewidth=1.1, label=line.legend)
    if lines:
        axes.legend(fontsize=6, frameon=False, loc="best", ncols=1 + len(lines) // 5)
    if panel.kind != "xychart" and all(value >= 0 for line in lines for _, value in line.points):
        axes.set_ylim(bottom=0)


def _minutes(line: Line, start_s: float) -> tuple[list[float], list[float]]:
    return [(at - start_s) / 60 for at, _ in line.points], [value for _, value in line.points]


def _stack(axes: Any, lines: Sequence[Line], start_s: float) -> None:
    times = sorted({at for line in lines for at, _ in line.points})
    values = [[dict(line.points).get(at, 0.0) for at in times] for line in lines]
    labels = [line.legend for line in lines]
    axes.stackplot([(at - start_s) / 60 for at in times], *values, labels=labels, alpha=0.8)


def _against(axes: Any, answers: Sequence[Sequence[Line]]) -> None:
    """The first answer is the x axis of all others."""
    for (frames,) in answers[:1]:
        at_x = dict(frames.points)
        for line in (line for answer in answers[1:] for line in answer):
            points = [(at_x[at], value) for at, value in line.points if at in at_x]
            axes.plot(*zip(*points, strict=True), linewidth=1.1, label=line.legend)
            axes.xaxis.set_major_formatter(lambda value, _: _readable(value, "none"))


def _heatmap(axes: Any, lines: Sequence[Line], start_s: float) -> None:
    """Cumulative buckets become shares of each."""
    ordered = sorted((line for line in lines if line.legend != "+Inf"), key=lambda line: float(line.legend))
    times = sorted({at for line in ordered for at, _ in line.points})
    rows, below = [], [0.0] * len(times)
    for line in ordered:
        values = [dict(line.points).get(at, 0.0) for at in times]
        rows.append([max(0.0, value - under) for value, under in zip(values, below, strict=True)])
        below = values
    if times:
        axes.pcolormesh([(at - start_s) / 60 for at in times], range(len(rows)), rows, cmap="Oranges")
        axes.set_yticks(range(len(ordered)), [f"{float(line.legend):g}" for line in ordered], fontsize=5)


def _readable(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.0%}"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            value, suffix = value / factor, prefix
            break
    else:
        suffix = ""
    return f"{value:.3g} {suffix}".strip() + {
        "s": " s",
        "bytes": "B",
        "Bps": "B/s",
        "cps": "/s",
        "percent": " %",
    }.get(unit, "")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dashboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--scrape-interval-s", type=float, default=5.0)
    parser.add_argument("--namespace", default=UNNAMED)
    parser.add_argument("--release", default=UNNAMED)
    arguments = parser.parse_args(argv)
    draw(
        *(arguments.url, arguments.out, arguments.minutes, arguments.scrape_interval_s),
        *(arguments.namespace, arguments.release),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
