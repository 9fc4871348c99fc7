"""The whole of `impala train` on this machine, as a user would run it, against the bound of its parts.

Memory is the largest sum, over one sample a second, of the proportional set sizes of the launcher and all
pods: shared pages count once. A replay memory is not full after so short a run; what it would take then is
told beside it, as what it takes per step times its capacity.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import parts
from benchmarks.options import Options, heading, row
from services.ops.scrape import parse_metrics

WARM_UP_S = 15.0
SAMPLE_S = 1.0


def measure(options: Options) -> dict[str, dict[str, float]]:
    """Per variant: steps/s after a warm-up, and what it cost."""
    bounds = parts.measure(options)
    heading(f"impala train --env {options.env}, {os.cpu_count()} cores, {options.seconds:.0f} s each")
    row("variant", "steps/s", "of bound", "peak memory MB", "bytes/step", "learner waits", "mean lag")
    results = {}
    for variant in options.variants:
        figures = run(options.flags(variant), options.seconds)
        best_bound = max(bounds[key] for key in bounds if key.startswith(f"{variant} ") and "bound" in key)
        figures["of_bound"] = figures["steps_per_second"] / best_bound
        results[variant] = figures
        row(
            variant,
            f"{figures['steps_per_second']:,.0f}",
            f"{figures['of_bound']:.2f}",
            f"{figures['peak_memory_mb']:,.0f}",
            f"{figures['bytes_per_step']:,.0f}",
            f"{figures['wait_ratio']:.0%}",
            f"{figures['lag']:.1f}",
        )
        if "replay_mb" in figures:
            held, full = figures["replay_mb"], figures["replay_full_mb_extrapolated"]
            row("  of which replay", f"{held:,.1f} MB held", f"{full:,.1f} MB full")
    return results


def run(flags: Sequence[str], seconds: float) -> dict[str, float]:
    """One run of ``seconds`` after the warm-up; medians over its reports."""
    directory = Path(tempfile.mkdtemp(prefix="impala-bench-"))
    run_dir = directory / "run"
    command = [sys.executable, "-m", "services.cli", "train", "--plain", *flags]
    launcher = subprocess.Popen(
        [*command, "--run-dir", str(run_dir)], stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for(run_dir / "metrics.jsonl", launcher)
        time.sleep(WARM_UP_S)
        first = len(lines(run_dir))
        peak = peak_memory_bytes(launcher.pid, seconds)
        reports = lines(run_dir)[first:]
        actors, (learner,) = scrape(run_dir, "actor"), scrape(run_dir, "learner")
    finally:
        launcher.send_signal(signal.SIGINT)
        launcher.wait(60)
        shutil.rmtree(directory, ignore_errors=True)
    if not reports:
        raise RuntimeError(f"no report within {seconds:.0f} s; use a larger --seconds")
    sent, steps = (
        sum(actor[f"impala_actor_{name}_total"] for actor in actors) for name in ("sent_bytes", "env_steps")
    )
    figures = {
        "steps_per_second": statistics.median(report["steps_per_second"] for report in reports),
        "peak_memory_mb": peak / 1e6,
        "bytes_per_step": sent / steps,
        "wait_ratio": statistics.median(report["wait_ratio"] for report in reports),
        "lag": statistics.median(report["policy_lag_mean"] for report in reports),
    }
    return figures | replay_figures(learner)


def wait_for(path: Path, launcher: subprocess.Popen[bytes]) -> None:
    """Until the learner reports."""
    while not path.exists():
        if launcher.poll() is not None:
            raise RuntimeError(f"impala train ended with exit code {launcher.returncode}")
        time.sleep(0.2)


def lines(run_dir: Path) -> list[dict[str, float]]:
    """The reports so far."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scrape(run_dir: Path, role: str) -> list[dict[str, float]]:
    """The metrics of all pods of that role."""
    pages = []
    for group in json.loads((run_dir / "targets.json").read_text()):
        if group["labels"]["role"] == role:
            with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=5) as answer:
                pages.append(parse_metrics(answer.read().decode()))
    return pages


def replay_figures(learner: Mapping[str, float]) -> dict[str, float]:
    """What the replay memory takes now and would take when full; nothing for a learner without one."""
    steps = learner.get("impala_learner_replay_steps", 0.0)
    if not steps:
        return {}
    held = learner["impala_learner_replay_bytes"]
    full = held / steps * learner["impala_learner_replay_capacity"]
    return {"replay_mb": held / 1e6, "replay_full_mb_extrapolated": full / 1e6}


def peak_memory_bytes(pid: int, seconds: float) -> int:
    """The most that was seen in that time."""
    peak, end_s = 0, time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        peak = max(peak, memory_bytes(pid))
        time.sleep(min(SAMPLE_S, left_s))
    return peak


def memory_bytes(pid: int) -> int:
    """Proportional set size of a process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended in the meantime
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    total, waiting = 0, [pid]
    while waiting:
        current = waiting.pop()
        waiting.extend(children.get(current, []))
        try:
            rollup = Path(f"/proc/{current}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total
