"""`make chaos`: learners, actors and a parameter server that are killed, frozen and cut off, one by one.

    make chaos                                  20 rounds of all ten kinds: more than an hour
    make chaos ARGS="--rounds 2 --hold 6"       what CI does
    make chaos ARGS="--only 'cut state holder'" one kind; --docs writes the table into docs/chaos.md
    make chaos ARGS="--report FILE"             only the table of results, finished or not

The pods are real processes on hosts of their own (network namespaces), started again as by a kubelet. Every
fault is measured and judged as soon as it is over and added to the file of results, with which a run that was
broken off goes on where it was. At the end all pods are asked to stop, and must end with 0, the learners with
the same parameters. It takes all cores: never run it where others measure.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from benchmarks import chaos_report as report
from benchmarks.chaos_faults import KINDS, Plan, inject, plans, wait_until_whole
from benchmarks.chaos_findings import STEPS, Finding, Goal, finding, wrong_at_the_end
from benchmarks.chaos_network import Network, NetworkError, privileged
from benchmarks.chaos_system import OPS_PORT, System
from benchmarks.chaos_watch import Watch
from services.local.signals import unwound_by_signals

START_S = 180.0
LOOK_S, LOOK_AT_ACTORS_S = 0.05, 0.25
STILL_S = 1.0
"""Without rollouts the learners are at rest when they have not made a step for this long."""
ROOT = Path(__file__).parents[1]
NOT_PERMITTED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all kept, 1 something broken or too slow, 2 not possible, 130 SIGINT, 143 SIGTERM."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(words)
    if arguments.report is not None:
        found = report.read(arguments.report)
        if found is None:
            print(f"--report {arguments.report}: has no results", file=sys.stderr)
            return NOT_PERMITTED
        return _tell(arguments, *found, [])
    if os.geteuid() != 0:
        return _as_root(words)
    try:
        Network({}).close()
    except NetworkError as error:
        return _not_here(str(error))
    directory = arguments.directory or ROOT / "runs" / f"chaos-{time.strftime('%Y%m%d-%H%M%S')}"
    file = arguments.results or directory / "results.jsonl"
    seed = report.seed_of(file) if arguments.seed is None else arguments.seed
    seed = secrets.randbelow(10_000) if seed is None else seed
    settings = report.Settings(
        learners=arguments.learners,
        actors=arguments.actors,
        seed=seed,
        hold_s=arguments.hold,
        flags=tuple(arguments.flags),
        commit=_commit(),
    )
    try:
        results = report.Results(file, settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return NOT_PERMITTED
    print(f"seed {seed}, {directory}", flush=True)
    with unwound_by_signals():
        try:
            differences = run(results, settings, directory, arguments.rounds, arguments.only)
        except KeyboardInterrupt:
            _print_table(settings, results.findings)
            print("interrupted", file=sys.stderr)
            return 130
        except BaseException:
            _print_table(settings, results.findings)
            raise
    return _tell(arguments, settings, results.findings, differences)


def run(
    results: report.Results, settings: report.Settings, directory: Path, rounds: int, only: Sequence[str]
) -> list[str]:
    """All faults that have not happened yet; what was wrong at the end."""
    system = System(directory, settings.learners, settings.actors, settings.flags)
    with closing(system):
        crew = system.crew
        intervals = {pod: LOOK_AT_ACTORS_S if pod in crew.actors else LOOK_S for pod in crew.pods}
        system.start()
        with closing(Watch(system.network.enter, OPS_PORT, intervals)) as watch:
            nothing = Goal(since_s=time.monotonic(), steps=0.0, version=-1.0, actors={})
            if wait_until_whole(crew, watch, nothing, START_S) is None:
                return [f"the system was not whole {START_S:g} s after its start; see {directory}/logs"]
            for plan in plans(rounds, settings.seed):
                if results.has(plan) or (only and f"{plan.fault} {plan.target}" not in only):
                    continue
                trouble = _one(system, watch, plan, results, settings.hold_s, rounds)
                if trouble is not None:
                    return [f"given up: {trouble}; see {directory}/logs"]
            return _rest_and_compare(system, watch)


def _one(
    system: System, watch: Watch, plan: Plan, results: report.Results, hold_s: float, rounds: int
) -> str | None:
    """Inject, judge, tell; why nothing can follow, if the system does not come back at all."""
    begun_s = time.monotonic()
    injection = inject(system, watch, plan, hold_s)
    if injection is None:
        return f"there was nobody for {plan.fault} {plan.target}"
    found = finding(injection, system.crew, watch.trace(), system.exits(begun_s))
    results.add(found)
    print(f"{time.strftime('%H:%M:%S')} {plan.round:2}/{rounds} {report.line(found)}", flush=True)
    if injection.whole_s is not None:
        return None
    goal = Goal(since_s=time.monotonic(), steps=0.0, version=-1.0, actors={})
    if wait_until_whole(system.crew, watch, goal, START_S) is not None:
        return None
    return f"not whole again after {injection.fault} {injection.victim}"


def _rest_and_compare(system: System, watch: Watch, still_s: float = STILL_S) -> list[str]:
    """Stop the actors, let the learners come to rest, stop them and the server; what was wrong with that."""
    crew, begun_s = system.crew, time.monotonic()
    codes = system.stop(crew.actors)
    last, since_s = -1.0, time.monotonic()
    while time.monotonic() < since_s + still_s:
        steps = sum(seen.figures.get(STEPS, 0.0) for seen in watch.latest().values())
        if steps != last:
            last, since_s = steps, time.monotonic()
        time.sleep(LOOK_S)
    codes |= system.stop(crew.learners)
    codes |= system.stop([crew.paramserver])
    ends = system.ends()
    told = ", ".join(f"{end.learner} {end.policy_version} {end.parameters}" for end in ends)
    print(f"at the end: {told}", flush=True)
    return wrong_at_the_end(crew, codes, system.exits(begun_s), ends)


def _print_table(settings: report.Settings, findings: Sequence[Finding]) -> None:
    print(f"\n{report.table(findings, settings.hold_s)}\n{report.summary(findings)}", flush=True)


def _tell(
    arguments: argparse.Namespace,
    settings: report.Settings,
    findings: Sequence[Finding],
    differences: Sequence[str],
) -> int:
    """The table, what was broken, and the files that are asked for; the exit code."""
    slow = report.too_slow(findings, settings.hold_s)
    _print_table(settings, findings)
    for each in (*slow, *differences):
        print(f"VIOLATION {each}", flush=True)
    if arguments.json:
        everything = {
            "settings": asdict(settings),
            "findings": [asdict(each) for each in findings],
            "slow": slow,
            "end": list(differences),
        }
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    if arguments.docs:
        picture = ROOT / "docs" / "chaos.png"
        how = f"Seed {settings.seed}, commit {settings.commit}, {os.cpu_count()} cores. "
        text = f"{report.table(findings, settings.hold_s)}\n{how}{report.summary(findings)}.\n"
        text += f"\n![Time without a step, of every fault]({picture.name})\n"
        report.write_into(picture.with_suffix(".md"), text)
        report.draw(findings, settings.hold_s, picture)
    return 1 if slow or differences or any(each.violations for each in findings) else 0


def _as_root(words: Sequence[str]) -> int:
    """The same once more, as root of a user namespace, in place of this process if that is permitted."""
    try:
        allowed = subprocess.run(privileged(["true"]), capture_output=True, text=True, check=False)
    except OSError as error:
        return _not_here(str(error))
    if allowed.returncode:
        return _not_here(" ".join(allowed.stderr.split()))
    command = privileged([sys.executable, "-m", "benchmarks.chaos", *words])
    return os.execvp(command[0], command)


def _not_here(reason: str) -> int:
    print(f"make chaos: needs network namespaces, and {reason}", file=sys.stderr)
    return NOT_PERMITTED


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _parser() -> argparse.ArgumentParser:
    kinds = [f"{fault} {target}" for fault, target in KINDS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=20, help="of all kinds (default 20)")
    parser.add_argument(
        "--seed", type=int, help="of the order, the victims and the moments; printed if not given"
    )
    parser.add_argument(
        "--hold",
        type=float,
        default=10.0,
        metavar="S",
        help="how long a pod is frozen or cut off (default 10)",
    )
    parser.add_argument(
        "--only", action="append", default=[], choices=kinds, metavar="KIND", help=f"of {', '.join(kinds)}"
    )
    parser.add_argument("--learners", type=int, default=3)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="for logs and checkpoints (default runs/chaos-<time>)")
    parser.add_argument("--results", type=Path, help="go on with this file (default results.jsonl in there)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="only tell what is in this file of results"
    )
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--docs", action="store_true", help="write the table and the picture into docs/")
    parser.add_argument("flags", nargs="*", help="after --: keys of the configuration, for all pods")
    return parser


if __name__ == "__main__":
    sys.exit(main())
