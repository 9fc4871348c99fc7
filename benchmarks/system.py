"""The whole of `impala train` on this machine, as a user would run it, against the bound of its parts.

Memory is the sum of the proportional set sizes of the launcher and all pods: shared pages count once.
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
from collections.abc import Sequence
from pathlib import Path

from benchmarks import parts
from benchmarks.options import Options, heading, row

WARM_UP_S = 15.0


def measure(options: Options) -> dict[str, dict[str, float]]:
    """Per variant: steps/s after a warm-up, and what it cost."""
    bounds = parts.measure(options)
    heading(f"impala train --env {options.env}, {os.cpu_count()} cores, {options.seconds:.0f} s each")
    row("variant", "steps/s", "of bound", "memory MB", "bytes/step", "learner waits", "mean lag")
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
            f"{figures['memory_mb']:,.0f}",
            f"{figures['bytes_per_step']:,.0f}",
            f"{figures['wait_ratio']:.0%}",
            f"{figures['lag']:.1f}",
        )
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
        time.sleep(seconds)
        reports = lines(run_dir)[first:]
        memory = memory_bytes(launcher.pid)
        sent, steps = scrape_actors(run_dir)
    finally:
        launcher.send_signal(signal.SIGINT)
        launcher.wait(60)
        shutil.rmtree(directory, ignore_errors=True)
    if not reports:
        raise RuntimeError(f"no report within {seconds:.0f} s; use a larger --seconds")
    return {
        "steps_per_second": statistics.median(report["steps_per_second"] for report in reports),
        "memory_mb": memory / 1e6,
        "bytes_per_step": sent / steps,
        "wait_ratio": statistics.median(report["wait_ratio"] for report in reports),
        "lag": statistics.median(report["policy_lag_mean"] for report in reports),
    }


def wait_for(path: Path, launcher: subprocess.Popen[bytes]) -> None:
    """Until the learner reports."""
    while not path.exists():
        if launcher.poll() is not None:
            raise RuntimeError(f"impala train ended with exit code {launcher.returncode}")
        time.sleep(0.2)


def lines(run_dir: Path) -> list[dict[str, float]]:
    """The reports so far."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scrape_actors(run_dir: Path) -> tuple[float, float]:
    """(bytes sent, agent steps played) of all actors."""
    totals = {"impala_actor_sent_bytes_total": 0.0, "impala_actor_env_steps_total": 0.0}
    for group in json.loads((run_dir / "targets.json").read_text()):
        if group["labels"]["role"] == "actor":
            with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=5) as answer:
                for line in answer.read().decode().splitlines():
                    name, _, value = line.partition(" ")
                    if name in totals:
                        totals[name] += float(value)
    return totals["impala_actor_sent_bytes_total"], totals["impala_actor_env_steps_total"]


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
        rollup = Path(f"/proc/{current}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total
