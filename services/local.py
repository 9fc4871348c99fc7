"""A whole run on this machine: parameter server, learner and actors as processes that talk over ipc.

``train`` prepares the run directory, starts the pods as the cluster would, restarts those that die, shows
how it goes and stops them in the order that loses nothing. It knows the pods only from outside: command
line, exit code, /metrics. Before it comes ``cli``; the pictures are ``display``'s.

Exit codes: 0 complete, or stopped by one Ctrl-C or SIGTERM; 1 the run gave up; 2 the user must mend
something; 130 a second Ctrl-C.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from services import config as configuration
from services.config import ConfigError, RunConfig
from services.display import LiveProgress, PlainProgress, Progress
from services.ops import logging
from services.ops.figures import History, PodPhase, PodStatus, RunInfo, take_snapshot
from services.ops.scrape import Scrape, Scraper
from services.ops.threads import VARIABLES as THREAD_VARIABLES

BAD_CONFIG = 2
GAVE_UP = 3
"""A learner's exit code for a training that has diverged: starting again would change nothing."""
KILLED = 128 + signal.SIGINT

STOP_TIMEOUTS_S: Mapping[str, float] = {"actor": 10.0, "learner": 30.0, "paramserver": 10.0}
"""In the order of stopping: who sends goes before who receives, so that the learner's last checkpoint has
nothing left to wait for. Whoever takes longer is killed."""

LAST_PODS_S = 40.0
"""How long a resumed run waits for pods that have just lost their launcher: they are saving."""

POLL_S = 0.1
SCRAPE_INTERVAL_S = 1.0
SILENT_AFTER_S = 5.0
"""A pod whose latest scrape is older counts as silent. It is not restarted: it may be paused on purpose."""

Command = Callable[[str, Sequence[str]], list[str]]
"""(role, flags) -> the command line of a pod."""


def pod_command(role: str, flags: Sequence[str]) -> list[str]:
    """A pod in this very Python."""
    return [sys.executable, "-m", f"services.{role}", *flags]


# ------------------------------------------------------------------------------------- run directory


def with_new_run_dir(config: RunConfig, now: datetime) -> RunConfig:
    """``config`` with a directory of its own: runs/<time>-<env>."""
    env = re.sub(r"[^A-Za-z0-9.]+", "-", config.env.id.rpartition("/")[2]).strip("-.")
    first = Path("runs") / f"{now:%Y%m%d-%H%M%S}-{env}"
    names = [first, *(first.with_name(f"{first.name}-{number}") for number in range(2, 100))]
    free = next((name for name in names if not name.exists()), first)
    return config.model_copy(update={"run_dir": free})


def resumed_config(run_dir: Path, environment: Mapping[str, str], flags: Sequence[str]) -> RunConfig:
    """The configuration of the run in ``run_dir``, overridden by ``environment`` and ``flags``."""
    if not (run_dir / "config.json").is_file():
        raise ConfigError(f"--resume {run_dir}: holds no run; allowed is a directory with a config.json")
    before = configuration.load(run_dir / "config.json")
    config = configuration.load(run_dir / "config.json", environment, flags)
    if config.preset != before.preset:
        raise ConfigError(f"preset = {config.preset!r}: the run in {run_dir} began as {before.preset!r}")
    return config.model_copy(update={"run_dir": run_dir})


@contextlib.contextmanager
def open_run_dir(config: RunConfig, resume: bool) -> Iterator[int]:
    """Prepare ``config.run_dir`` and hold its lock, whose file descriptor is for the pods to inherit.

    They hold it too, so that nobody resumes a run whose pods are still writing, even if its launcher is dead.
    """
    run_dir = config.run_dir
    if not resume and (run_dir / "config.json").exists():
        raise ConfigError(f"run_dir = {run_dir}: already holds a run; continue it with --resume {run_dir}")
    if not resume and run_dir.is_dir() and any(run_dir.iterdir()) and not (run_dir / ".lock").exists():
        raise ConfigError(f"run_dir = {run_dir}: is not empty; allowed is a new or an empty directory")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run_dir = {run_dir}: cannot be written ({error.strerror})") from None
    try:
        _wait_for_lock(lock, run_dir)
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        for name in ("logs", "checkpoints"):
            (run_dir / name).mkdir(exist_ok=True)
        if resume:  # the checkpoint is the truth; newer weights that were never saved would contradict it
            shutil.rmtree(run_dir / "paramserver", ignore_errors=True)
        _write_json(run_dir / "config.json", configuration.dump(config))
        yield lock
    finally:
        os.close(lock)


def _wait_for_lock(lock: int, run_dir: Path) -> None:
    """Take the lock; if only the last pods of a dead launcher hold it, wait for them to stop."""
    deadline_s = time.monotonic() + LAST_PODS_S
    told = False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace")
            if not holder.isdigit() or Path("/proc", holder).exists() or time.monotonic() > deadline_s:
                raise ConfigError(
                    f"run_dir = {run_dir}: in use by another launcher (process {holder}) or its last pods"
                ) from None
        if not told:
            print(
                f"impala: the last pods of a killed launcher are still in {run_dir}; waiting", file=sys.stderr
            )
            told = True
        time.sleep(POLL_S)


def _write_json(path: Path, values: object) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSpec:
    """Everything that is needed to start one pod, again and again."""

    name: str
    role: str
    port: int
    """Of its /metrics on 127.0.0.1."""
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path


def plan_pods(
    config: RunConfig,
    ports: Sequence[int],
    socket_dir: Path,
    environment: Mapping[str, str],
    command: Command,
) -> list[PodSpec]:
    """The pods of a run, in the order of starting. Who is early waits for the others."""
    wire = {
        "learner_bind": f"ipc://{socket_dir}/learner",
        "learner_endpoints": f"ipc://{socket_dir}/learner",
        "paramserver_bind": f"ipc://{socket_dir}/paramserver",
        "paramserver_endpoint": f"ipc://{socket_dir}/paramserver",
    }
    threads = {
        "paramserver": 1,
        "learner": config.learner.num_threads,
        "actor": config.actor.inference_threads,
    }
    # config.json already holds what these say, and a pod would let them override it.
    inherited = {
        name: value
        for name, value in environment.items()
        if not name.startswith(configuration.ENVIRONMENT_PREFIX)
    }
    pods = []
    names = ["paramserver", "learner", *(f"actor-{number}" for number in range(config.actors))]
    for name, port in zip(names, ports, strict=True):
        role = name.partition("-")[0]
        flags = ["--config", str(config.run_dir / "config.json"), "--parent-pid", str(os.getpid())]
        if role in ("actor", "learner"):
            flags += [f"--{role}-id", name]
        flags += ["--run_dir", str(config.run_dir), "--ops.host", "127.0.0.1", "--ops.port", str(port)]
        for key, value in wire.items():
            flags += [f"--wire.{key}", value]
        pods.append(
            PodSpec(
                name=name,
                role=role,
                port=port,
                command=command(role, flags),
                environment=inherited | dict.fromkeys(THREAD_VARIABLES, str(threads[role])),
                log=config.run_dir / "logs" / f"{name}.log",
            )
        )
    return pods


@contextlib.contextmanager
def private_socket_dir() -> Iterator[Path]:
    """A short path that only this user can enter: the path of a Unix socket has at most 107 bytes."""
    short = len(os.fsencode(tempfile.gettempdir())) + len("/impala-12345678/paramserver") <= 100
    with tempfile.TemporaryDirectory(prefix="impala-", dir=None if short else "/tmp") as path:
        yield Path(path)


@contextlib.contextmanager
def reserved_ports(first: int, count: int) -> Iterator[list[int]]:
    """Free ports of 127.0.0.1 from ``first`` upwards; with 0, or when 1000 are not enough, any free ones.

    They are kept bound, though not listening, which lets the pods have them and nobody else: not another
    launcher that starts at the same time, nor a stranger while a pod restarts.
    """
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        candidates = iter(range(first, min(first + 1000, 65536)) if first else ())
        while len(ports) < count:
            reservation = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                reservation.bind(("127.0.0.1", next(candidates, 0)))
            except OSError:
                continue
            ports.append(int(reservation.getsockname()[1]))
            if sys.platform == "linux":
                reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:  # elsewhere a bound port is nobody else's
                reservation.close()
        yield ports


def write_targets(path: Path, pods: Iterable[PodSpec]) -> None:
    """For Prometheus: ``file_sd_configs: [{files: [<path>]}]``."""
    targets = [
        {"targets": [f"127.0.0.1:{pod.port}"], "labels": {"role": pod.role, "pod": pod.name}} for pod in pods
    ]
    _write_json(path, targets)


# ---------------------------------------------------------------------------------------------- pods


class Backoff:
    """How long to wait before a pod starts again: 0.2 s, doubling to 10 s; anew after 60 s of life.

    A pod that dies five times within a minute will not come right by itself, and a user who is looking
    elsewhere wants to find an error message, not a loop.
    """

    FIRST_S = 0.2
    LONGEST_S = 10.0
    WINDOW_S = 60.0
    MOST_DEATHS = 5

    def __init__(self) -> None:
        self._delay_s = self.FIRST_S
        self._deaths_s: deque[float] = deque()

    def after_death(self, alive_s: float, now_s: float) -> float | None:
        """The delay before the next start; None if there should be no next start."""
        self._deaths_s.append(now_s)
        while now_s - self._deaths_s[0] > self.WINDOW_S:
            self._deaths_s.popleft()
        if len(self._deaths_s) >= self.MOST_DEATHS:
            return None
        if alive_s >= self.WINDOW_S:
            self._delay_s = self.FIRST_S
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, self.LONGEST_S)
        return delay_s


class Pod:
    """One process of the run, over all its lives."""

    def __init__(self, spec: PodSpec, lock: int) -> None:
        self.spec = spec
        self.restarts = 0
        self.started_s = 0.0
        self.start_at_s: float | None = None
        """When to start it again; None while it lives."""
        self.backoff = Backoff()
        self._lock = lock
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0

    @property
    def alive(self) -> bool:
        """Started and not yet gone."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of the latest life; a signal's number, negated, if that ended it."""
        return self._process.poll() if self._process else None

    def start(self, now_s: float) -> None:
        """A new life, in a session of its own, so that a Ctrl-C in the terminal reaches only the launcher."""
        with self.spec.log.open("ab") as log:
            self._log_offset = log.tell()
            self._process = subprocess.Popen(
                self.spec.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.spec.environment),
                start_new_session=True,
                pass_fds=(self._lock,),
            )
        self.started_s, self.start_at_s = now_s, None

    def terminate(self) -> None:
        """Ask it to stop."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End it and whatever it has started, dead or alive."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_words(self) -> str:
        """The last error that this life has logged, or else its last line."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(max(self._log_offset, log.seek(0, os.SEEK_END) - 2**16))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        lines = [line.strip() for line in lines if line.strip()]
        errors = [line for line in lines if line.startswith("impala ") or re.match(r"\S+Z error ", line)]
        return (errors or lines or [""])[-1]


# ------------------------------------------------------------------------------------------ launcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Why the run ended, or has to."""

    exit_code: int
    reason: str
    details: tuple[str, ...] = field(default=())


class Launcher:
    """The loop: consumes exits of pods and their scrapes; waits for nothing longer than ``POLL_S``."""

    def __init__(
        self,
        pods: Sequence[Pod],
        run: RunInfo,
        progress: Progress,
        latest: Callable[[], Mapping[str, Scrape]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pods = pods
        self._run = run
        self._progress = progress
        self._latest = latest
        self._clock = clock
        self._started_s = clock()
        self._shown_s = -float("inf")
        self._history = History()
        self._interrupts = 0
        self._stopping = False

    @property
    def steps(self) -> int:
        """Agent steps trained, as far as the learner has told."""
        return take_snapshot(self._run, None, self._history.now).steps or 0

    def interrupt(self) -> None:
        """Once: stop cleanly. Twice: end everything at once. Safe to call from a signal handler."""
        self._interrupts += 1

    def run(self) -> Outcome:
        """Start the pods; return when they have all stopped."""
        try:
            for pod in self._pods:
                pod.start(self._clock())
            while (outcome := self._look()) is None:
                self._show()
                time.sleep(POLL_S)
            return self._stop(outcome)
        finally:  # nothing outlives the launcher, whatever happens to it
            for pod in self._pods:
                pod.kill()

    def _look(self) -> Outcome | None:
        """Start whatever is due; say when the run has to end."""
        if self._interrupts:
            return Outcome(exit_code=0, reason="interrupted")
        self._history.add(self._latest().get("learner"))
        now_s = self._clock()
        for pod in self._pods:
            if pod.start_at_s is not None:
                if now_s >= pod.start_at_s:
                    pod.start(now_s)
            elif not pod.alive and (outcome := self._bury(pod, now_s)):
                return outcome
        learner = self._history.now
        if learner is not None and learner.get("impala_training_complete") == 1:
            return Outcome(exit_code=0, reason="complete")
        return None

    def _bury(self, pod: Pod, now_s: float) -> Outcome | None:
        """``pod`` is dead: plan its next life, or say why there is none."""
        pod.kill()  # what it had started itself
        name, code, words = pod.spec.name, pod.exit_code, pod.last_words()
        details = (words, f"all of it: {pod.spec.log}")
        if code == BAD_CONFIG:
            return Outcome(exit_code=BAD_CONFIG, reason=f"{name} refused its configuration", details=details)
        if code == GAVE_UP and pod.spec.role == "learner":
            return Outcome(exit_code=1, reason=f"{name} gave up", details=details)
        delay_s = pod.backoff.after_death(now_s - pod.started_s, now_s)
        if delay_s is None:
            often = f"{name} died {Backoff.MOST_DEATHS} times within {Backoff.WINDOW_S:g} s"
            return Outcome(exit_code=1, reason=often, details=details)
        pod.restarts += 1
        pod.start_at_s = now_s + delay_s
        self._progress.trouble(
            "pod_died", pod=name, exit_code=code, restart=pod.restarts, restart_in_s=delay_s, last_words=words
        )
        return None

    def _stop(self, outcome: Outcome) -> Outcome:
        """Stop role after role. The learner's own trouble with stopping is the run's."""
        self._stopping = True
        if outcome.reason == "interrupted":
            self._progress.event("stopping", hint="press Ctrl-C again to end everything at once")
        for role, timeout_s in STOP_TIMEOUTS_S.items():
            pods = [pod for pod in self._pods if pod.spec.role == role]
            alive = [pod for pod in pods if pod.alive]
            for pod in alive:
                pod.terminate()
            deadline_s = self._clock() + timeout_s
            while any(pod.alive for pod in alive) and self._clock() < deadline_s:
                if self._interrupts > 1:
                    return Outcome(exit_code=KILLED, reason="killed")
                self._history.add(self._latest().get("learner"))
                self._show()
                time.sleep(POLL_S)
            for pod in alive:
                # -SIGTERM: it was still starting, with nothing to save and no handler yet.
                failed = pod.alive or pod.exit_code not in (0, -signal.SIGTERM)
                if failed:
                    self._progress.trouble(
                        "pod_killed" if pod.alive else "pod_failed",
                        pod=pod.spec.name,
                        last_words=pod.last_words(),
                    )
                if failed and role == "learner" and outcome.exit_code == 0:
                    outcome = Outcome(
                        exit_code=1,
                        reason=f"{pod.spec.name} did not stop cleanly",
                        details=(pod.last_words(), f"all of it: {pod.spec.log}"),
                    )
            for pod in pods:
                pod.kill()
        self._shown_s = -float("inf")
        self._show()
        return outcome

    def _show(self) -> None:
        now_s = self._clock()
        if now_s - self._shown_s < self._progress.interval_s:
            return
        self._shown_s = now_s
        scrapes = self._latest()
        self._progress.update(
            take_snapshot(
                self._run,
                self._history.before,
                self._history.now,
                pods=tuple(self._status(pod, scrapes.get(pod.spec.name), now_s) for pod in self._pods),
                elapsed_s=now_s - self._started_s,
                unix_time_s=time.time(),
                returns=self._history.returns,
            )
        )

    def _status(self, pod: Pod, scrape: Scrape | None, now_s: float) -> PodStatus:
        phase: PodPhase
        if not pod.alive:
            phase = "stopped" if self._stopping else "restarting"
        elif scrape is None or scrape.time_s < pod.started_s:
            phase = "starting"
        else:
            phase = "up" if now_s - scrape.time_s < SILENT_AFTER_S else "silent"
        memory_bytes = scrape.get("process_resident_memory_bytes") if scrape and phase == "up" else None
        return PodStatus(
            name=pod.spec.name,
            role=pod.spec.role,
            phase=phase,
            restarts=pod.restarts,
            memory_bytes=memory_bytes,
        )


# --------------------------------------------------------------------------------------------- train


def frame_skip_of(config: RunConfig) -> int:
    """Frames per agent step. Opens the environment, so that a wrong name is found before anything starts."""
    from services.rl.envs import env_spec

    try:
        return env_spec(config.env).frame_skip
    except ValueError as error:
        raise ConfigError(str(error)) from None


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    plain: bool = False,
    command: Command = pod_command,
    find_frame_skip: Callable[[RunConfig], int] = frame_skip_of,
) -> int:
    """Run to the end; returns the exit code."""
    run = RunInfo(
        env_id=config.env.id,
        total_steps=config.total_steps,
        frame_skip=find_frame_skip(config),
        run_dir=config.run_dir,
    )
    with contextlib.ExitStack() as opened:
        lock = opened.enter_context(open_run_dir(config, resume))
        ports = opened.enter_context(reserved_ports(config.ops.port, 2 + config.actors))
        socket_dir = opened.enter_context(private_socket_dir())
        specs = plan_pods(config, ports, socket_dir, os.environ, command)
        write_targets(config.run_dir / "targets.json", specs)
        scraper = Scraper({spec.name: spec.port for spec in specs}, SCRAPE_INTERVAL_S)
        opened.callback(scraper.close)
        progress = make_progress(plain)
        launcher = Launcher([Pod(spec, lock) for spec in specs], run, progress, scraper.latest)
        opened.enter_context(_signals_call(launcher.interrupt))
        try:
            outcome = launcher.run()
        finally:
            progress.close()
        never_began = not any((config.run_dir / "checkpoints").iterdir())
        if outcome.exit_code == BAD_CONFIG and not resume and never_began:
            (config.run_dir / "config.json").unlink()  # so that the same command, mended, is not refused
    report(outcome, run, launcher.steps)
    return outcome.exit_code


def make_progress(plain: bool) -> Progress:
    """A live display where there is a terminal, log lines elsewhere."""
    if plain or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        logging.setup("train", stream=sys.stdout)
        return PlainProgress(logging.get_logger("train"))
    logging.setup("train")
    return LiveProgress()


def report(outcome: Outcome, run: RunInfo, steps: int) -> None:
    """The last lines: what happened, where it is, how it goes on."""
    if outcome.exit_code == BAD_CONFIG:
        for line in (outcome.reason, *filter(None, outcome.details)):
            print(f"impala: {line}", file=sys.stderr)
        return
    if outcome.exit_code == 1:
        for line in (f"stopped: {outcome.reason}", *filter(None, outcome.details)):
            print(f"impala: {line}", file=sys.stderr)
    sys.stderr.flush()
    state = "complete" if outcome.reason == "complete" else "stopped"
    print(f"{state} at {steps:,} of {run.total_steps:,} steps; the run is in {run.run_dir}")
    longer = f" --total_steps {2 * run.total_steps}" if outcome.reason == "complete" else ""
    print(f"{'train longer' if longer else 'continue'} with: impala train --resume {run.run_dir}{longer}")


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
