"""The pictures in the documentation, drawn from real runs.

python -m benchmarks.pictures curve RUN_DIR docs/pong.png      return over agent steps, beside a peer's
python -m benchmarks.pictures display RUN_DIR docs/display.svg the live display of a run that is going on
python -m benchmarks.pictures memory FLEET.json docs/fleet-rss.png  of pods under a fleet, from its --json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from services import config as configuration
from services.local.display import render
from services.local.train import frame_skip_of
from services.ops.figures import PodStatus, RunInfo, take_snapshot
from services.ops.scrape import Scraper

PEER = Path(__file__).parent / "data" / "pong_monobeast.json"
BIN_STEPS = 100_000
WATCH_S = 12.0


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pictures = {"curve": curve, "display": display, "memory": memory}
    parser.add_argument("picture", choices=pictures)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(argv)
    pictures[arguments.picture](arguments.source, arguments.out)
    return 0


def curve(run_dir: Path, out: Path) -> None:
    """Mean return of the episodes of each 100,000 agent steps, and the speed of the run."""
    from matplotlib import pyplot

    reports = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    config = configuration.load(run_dir / "config.json")
    peer = json.loads(PEER.read_text())
    steps, returns = binned(reports)
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 5.4), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    top.plot([s / 1e6 for s in steps], returns, color="#0b7a75", linewidth=2, label="ours")
    if config.env.id == "ALE/Pong-v5":
        top.plot(
            [row[0] / 1e6 for row in peer["rows"]],
            [row[1] for row in peer["rows"]],
            color="#9aa0a6",
            linewidth=1.5,
            label="MonoBeast, same hyperparameters and kind of machine, nature network",
        )
    top.set_ylabel("episode return")
    top.set_title(
        f"{config.env.id}, preset {config.preset}, network {config.network.name}, seed {config.seed}",
        loc="left",
        fontsize=10,
    )
    top.legend(frameon=False, loc="upper left")
    speed = [report for report in reports if report["steps_per_second"] > 0]
    bottom.plot(
        [report["steps"] / 1e6 for report in speed],
        rolling_median([report["steps_per_second"] for report in speed]),
        color="#d97706",
        linewidth=1.2,
    )
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("steps/s")
    bottom.set_xlabel("million agent steps (× 4 = frames)")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(out, dpi=130)
    print(f"{out}: {steps[-1]:,} steps, return {returns[0]:.2f} -> {returns[-1]:.2f}")


def memory(figures: Path, out: Path) -> None:
    """Resident memory of each pod over the window, of every measurement in the file."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    colours = {"learner": "#0b7a75", "paramserver": "#d97706", "relays": "#9aa0a6"}
    styles = ("-", "--", ":")
    for load, columns in json.loads(figures.read_text()).items():
        for style, (column, figures_of_it) in zip(styles, columns.items(), strict=False):
            for role, curve in figures_of_it["memory"].items():
                minutes, megabytes = [s / 60 for s, _ in curve], [mb for _, mb in curve]
                label = f"{role}, {column}, {figures_of_it['clients']:g} clients"
                axis.plot(minutes, megabytes, style, color=colours[role], linewidth=1.5, label=label)
                print(f"{load}, {label}: {min(megabytes):.1f} to {max(megabytes):.1f} MB")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("minutes")
    axis.set_ylabel("resident memory, MB")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    figure.savefig(out, dpi=130)


def binned(reports: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """(first step, mean return) of every bin in which episodes ended."""
    sums: dict[int, tuple[float, int]] = {}
    for report in reports:
        if report["interval_episodes"]:
            start = report["steps"] // BIN_STEPS * BIN_STEPS
            total, count = sums.get(start, (0.0, 0))
            new = report["interval_episodes"]
            sums[start] = (total + report["interval_return"] * new, count + new)
    starts = sorted(sums)
    return starts, [sums[start][0] / sums[start][1] for start in starts]


def rolling_median(values: Sequence[float], width: int = 13) -> list[float]:
    """Calm enough to read."""
    return [
        statistics.median(values[max(0, i - width // 2) : i + width // 2 + 1]) for i in range(len(values))
    ]


def display(run_dir: Path, out: Path) -> None:
    """Watch a run for a few seconds and take a picture of its display."""
    config = configuration.load(run_dir / "config.json")
    targets = json.loads((run_dir / "targets.json").read_text())
    ports = {t["labels"]["pod"]: int(t["targets"][0].rpartition(":")[2]) for t in targets}
    scraper = Scraper(ports, interval_s=1.0)
    time.sleep(2.0)
    before = scraper.latest()["learner-0"]
    time.sleep(WATCH_S)
    latest = scraper.latest()
    scraper.close()
    reports = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    returns = [report["episode_return"] for report in reports if report["episode_return"] is not None]
    stride = max(1, len(returns) // 200)
    snapshot = take_snapshot(
        RunInfo(
            env_id=config.env.id,
            total_steps=config.total_steps,
            frame_skip=frame_skip_of(config),
            run_dir=Path("runs") / run_dir.name,
        ),
        before,
        latest["learner-0"],
        pods=tuple(
            PodStatus(
                name=target["labels"]["pod"],
                role=target["labels"]["role"],
                phase="up",
                restarts=0,
                memory_bytes=latest[target["labels"]["pod"]].get("process_resident_memory_bytes"),
            )
            for target in targets
        ),
        elapsed_s=reports[-1]["time"] - reports[0]["time"],
        unix_time_s=time.time(),
        returns=tuple(returns[::stride]),
    )
    console = Console(record=True, width=92, file=Path("/dev/null").open("w"), force_terminal=True)  # noqa: SIM115
    console.print(render(snapshot, 92))
    # rich names a web font in it; the picture must not load anything from anywhere
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="impala train"), flags=re.DOTALL)
    out.write_text(svg, encoding="utf-8")
    print(out)


if __name__ == "__main__":
    sys.exit(main())
