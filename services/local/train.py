"""``impala train``: builds a run out of its parts, lets it run, and says how it ended.

The parts and their order: ``run_dir``, ``plan``, ``pod``, ``launcher``, with ``display`` or log lines to show
it. Before it comes ``cli``, which has read the configuration.

Exit codes: 0 complete, or stopped by one Ctrl-C or SIGTERM; 1 the run gave up; 2 the user must mend
something; 130 a second Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from services.config import ConfigError, RunConfig
from services.local.display import LiveProgress, PlainProgress, Progress
from services.local.launcher import Launcher, Outcome
from services.local.plan import (
    Command,
    plan_pods,
    pod_command,
    pod_names,
    private_socket_dir,
    reserved_ports,
    write_targets,
)
from services.local.pod import Pod
from services.local.run_dir import open_run_dir
from services.ops import logging
from services.ops.figures import RunInfo
from services.ops.pod import BAD_CONFIG
from services.ops.scrape import Scraper

SCRAPE_INTERVAL_S = 1.0


def frame_skip_of(config: RunConfig) -> int:
    """Frames per agent step. Opens the environment, so that a wrong name is found before anything starts."""
    from services.rl.tasks import tasks_of, tasks_spec

    try:
        return tasks_spec(tasks_of(config)).frame_skip
    except ValueError as error:
        raise ConfigError(str(error)) from None


def refuse_too_few_learners(config: RunConfig) -> None:
    """ConfigError for a run that would wait for ever. In a cluster learners come, and it may well wait."""
    least = config.learner.min_learners
    if least > config.learners:
        raise ConfigError(
            f"learner.min_learners = {least}: training would wait for more learners than are started; "
            f"allowed is at most learners = {config.learners}"
        )


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    plain: bool = False,
    command: Command = pod_command,
    find_frame_skip: Callable[[RunConfig], int] = frame_skip_of,
) -> int:
    """Run to the end; returns the exit code."""
    refuse_too_few_learners(config)
    run = RunInfo(
        env_id=config.title,
        total_steps=config.total_steps,
        frame_skip=find_frame_skip(config),
        run_dir=config.run_dir,
    )
    is_new = not config.run_dir.exists()
    with contextlib.ExitStack() as opened:
        lock = opened.enter_context(open_run_dir(config, resume))
        ports = opened.enter_context(reserved_ports(config.ops.port, len(pod_names(config))))
        socket_dir = opened.enter_context(private_socket_dir())
        specs = plan_pods(config, ports, socket_dir, os.environ, command)
        write_targets(config.run_dir / "targets.json", specs)
        scraper = Scraper({spec.name: spec.port for spec in specs}, SCRAPE_INTERVAL_S)
        opened.callback(scraper.close)
        pods = [Pod(spec, lock) for spec in specs]
        launcher = Launcher(pods, run, make_progress(plain), scraper.latest)
        opened.enter_context(_signals_call(launcher.interrupt))
        outcome = launcher.run()
        never_began = not resume and not any((config.run_dir / "checkpoints").iterdir())
        if outcome.exit_code == BAD_CONFIG and never_began:  # the same command, mended, is not to be refused
            if is_new and outcome.log is None:
                shutil.rmtree(config.run_dir, ignore_errors=True)
            else:
                (config.run_dir / "config.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the terminal is closed, or the pipe: nobody reads this
        report(outcome, run, steps_reached(config.run_dir, launcher.steps))
    return outcome.exit_code


def make_progress(plain: bool) -> Progress:
    """A live display where there is a terminal that can draw it, log lines elsewhere."""
    draws = (
        sys.stdout.isatty() and sys.stdout.encoding.lower() == "utf-8" and os.environ.get("TERM") != "dumb"
    )
    if plain or not draws:
        logging.setup("train", stream=sys.stdout)
        return PlainProgress(logging.get_logger("train"))
    logging.setup("train")
    return LiveProgress()


def steps_reached(run_dir: Path, told: int) -> int:
    """Where the run goes on: the learner trained on after it was last asked, as its last checkpoint says."""
    names = (path.stem.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*.pt"))
    return max((told, *(int(name) for name in names if name.isdecimal())))


def report(outcome: Outcome, run: RunInfo, steps: int) -> None:
    """The last lines: what happened, where it is, how it goes on."""
    where = (f"all of it: {outcome.log}",) if outcome.log else ()
    lines: tuple[str, ...] = ()
    if outcome.exit_code == BAD_CONFIG:
        lines = (*outcome.details, *where)  # the pod has said it best
    elif outcome.exit_code == 1:
        lines = (f"stopped: {outcome.reason}", *filter(None, outcome.details), *where)
    for line in lines:
        print(f"impala: {line}", file=sys.stderr)
    sys.stderr.flush()
    if outcome.exit_code == BAD_CONFIG:
        return
    state = "complete" if outcome.reason == "complete" else "stopped"
    print(f"{state} at {steps:,} of {run.total_steps:,} steps; the run is in {run.run_dir}")
    longer = f" --total_steps {2 * run.total_steps}" if outcome.reason == "complete" else ""
    resume = f"{this_program()} train --resume {shlex.quote(str(run.run_dir))}{longer}"
    print(f"{'train longer' if longer else 'continue'} with: {resume}")


def this_program() -> str:
    """How the user can call ``impala`` again: the environment it is installed in need not be active."""
    if shutil.which("impala"):
        return "impala"
    beside_python = Path(sys.executable).with_name("impala")
    script = next(
        (path for path in (Path(sys.argv[0]), beside_python) if path.name == "impala"), beside_python
    )
    if not script.is_file():  # a checkout that is not installed
        return f"{shlex.quote(sys.executable)} -m services.cli"
    absolute, relative = str(script.absolute()), os.path.relpath(script)
    return shlex.quote(min(absolute, relative, key=len))


@contextlib.contextmanager
def _signals_call(handler: Callable[[], None]) -> Iterator[None]:
    """SIGINT, SIGTERM and a closed terminal call ``handler``; afterwards everything is as before."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda _number, _frame: handler()) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
