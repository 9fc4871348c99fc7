"""A learning gate: `impala train` as a user starts it, watched until it has learned enough.

The pods are the real ones, over real sockets. The curve comes from the run's own metrics.jsonl and is always
printed, so that a slow decline is seen long before a gate fails. Progress is measured in agent steps, which
do not depend on the machine; the timeout is only there for a run that hangs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BARS = "▁▂▃▄▅▆▇█"
ENOUGH_EPISODES = 100
LOG_INTERVAL_S = 0.5
POLL_S = 0.2
STOP_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One line of metrics.jsonl."""

    seconds: float
    steps: int
    mean_return: float
    """Of all episodes of the interval, or of the latest 100 if those are more."""
    tasks: Mapping[str, float] = field(default_factory=dict)
    """Of each task, as a share of the return that counts as 1."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What has to be reached."""

    name: str
    flags: Sequence[str]
    target: float
    tasks: Mapping[str, float] = field(default_factory=dict)
    """Several tasks, each with the return that counts as 1; the curve is then the worst of them."""
    max_steps: int
    """Agent steps. About twice what it takes."""
    timeout_s: float = 300.0


@dataclass(kw_only=True)
class Result:
    """How it went."""

    gate: Gate
    curve: list[Point] = field(default_factory=list)
    steps: int = 0
    """Of the whole run."""
    exit_code: int | None = None
    output: str = ""
    """What `impala train` wrote."""

    @property
    def reached(self) -> bool:
        """The target, within the steps."""
        return bool(self.curve) and self.curve[-1].mean_return >= self.gate.target

    def __str__(self) -> str:
        returns = [point.mean_return for point in self.curve]
        if not returns:
            return f"{self.gate.name}: no episode was reported"
        low, high = min(*returns, 0.0), max(*returns, self.gate.target)
        scale = (len(BARS) - 1) / (high - low)
        line = "".join(BARS[round((value - low) * scale)] for value in thinned(returns, 60))
        last = self.curve[-1]
        verb = "reached" if self.reached else "did NOT reach"
        rows = [
            f"    {point.steps:>10,} steps {point.seconds:>6.1f} s   return {point.mean_return:8.2f}"
            + "".join(f"   {task.rpartition(':')[2]} {share:.2f}" for task, share in point.tasks.items())
            for point in thinned(self.curve, 8)
        ]
        outcome = (
            f"{self.gate.name}: {verb} {self.gate.target:g} with {last.mean_return:.2f} "
            f"at {last.steps:,} steps, {last.seconds:.0f} s after its start"
        )
        return "\n".join([outcome, f"    {line}  {low:.2f} to {high:.2f}", *rows])


def thinned(values: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the values, evenly, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]


def train(gate: Gate, run_dir: Path) -> Result:
    """Train until the target is reached, or the steps are used up; stop the run; return its curve."""
    command = [sys.executable, "-m", "services.cli", "train", "--plain", "--run-dir", str(run_dir)]
    fixed = ["--learner.log_interval_s", str(LOG_INTERVAL_S), "--ops.port", "0"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("IMPALA__")}
    output = run_dir.with_suffix(".out")
    started_s = time.time()
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*command, *fixed, *gate.flags], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    result = Result(gate=gate)
    try:
        watch(run_dir / "metrics.jsonl", result, started_s, lambda: process.poll() is not None)
        process.send_signal(signal.SIGINT)
        result.exit_code = process.wait(STOP_S)
    finally:
        process.kill()  # its pods notice, and stop too
        process.wait()
    result.output = output.read_text(encoding="utf-8")
    return result


def watch(lines: Path, result: Result, started_s: float, ended: Callable[[], bool]) -> None:
    """Follow the file, adding to the curve, until there is nothing more to wait for."""
    read = 0
    while not ended():
        time.sleep(POLL_S)
        complete = lines.read_text().splitlines(keepends=True) if lines.exists() else []
        for line in complete[read:]:
            if not line.endswith("\n"):
                break
            read += 1
            values = json.loads(line)
            result.steps = values["steps"]
            point = point_of(values, started_s, result.gate.tasks)
            if point is not None:
                result.curve.append(point)
            if result.reached or values["steps"] >= result.gate.max_steps:
                return
        if time.time() - started_s > result.gate.timeout_s:
            return


def point_of(values: dict[str, Any], started_s: float, full: Mapping[str, float]) -> Point | None:
    """A line as a point of the curve, or None as long as fewer than 100 episodes (of a task) have ended."""
    if any(values["tasks"][task]["episodes"] < ENOUGH_EPISODES for task in full):
        return None
    if values["episodes"] < ENOUGH_EPISODES:
        return None
    if full:
        shares = {task: values["tasks"][task]["episode_return"] / most for task, most in full.items()}
        return Point(
            seconds=values["time"] - started_s,
            steps=values["steps"],
            mean_return=min(shares.values()),
            tasks=shares,
        )
    many = values["interval_episodes"] >= ENOUGH_EPISODES
    return Point(
        seconds=values["time"] - started_s,
        steps=values["steps"],
        mean_return=values["interval_return"] if many else values["episode_return"],
    )
