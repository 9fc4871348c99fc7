"""Runs and pods as real processes, seen as Prometheus, the kubelet and a user see them: from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.ops.scrape import parse_metrics
from tests.unit.learner.waiting import until

REPOSITORY = Path(__file__).parents[2]
START_S = 90.0
"""Until a pod must be up: importing torch takes seconds, and much longer where all cores are busy."""

ANSWER_S = 10.0
"""Later than that, a pod does not answer."""

QUICK = ("--network.hidden_size", "32", "--learner.log_interval_s", "0.5")
CATCH = ("--env", "catch", *QUICK)
STEPS_PER_UPDATE = 640


def environment() -> dict[str, str]:
    """Without settings of whoever runs the tests, and with the repository to import from wherever we run."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IMPALA__")}
    return clean | {"PYTHONPATH": str(REPOSITORY)}


def get(port: int, path: str) -> tuple[int, str]:
    """(status, body) of a pod's HTTP endpoint; (0, "") while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=ANSWER_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def scrape(port: int) -> dict[str, float]:
    """Series -> value; empty while the pod does not answer."""
    return parse_metrics(get(port, "/metrics")[1])


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processes(*words: str) -> dict[int, list[str]]:
    """The living processes, with their command lines, that have all of ``words`` as arguments."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                arguments = (entry / "cmdline").read_text(errors="replace").split("\0")
                if set(words) <= set(arguments):
                    found[int(entry.name)] = arguments
    return found


def processes_in(directory: Path) -> list[int]:
    """The living processes whose working directory this is: the pods of a launcher have their launcher's."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink() == directory:
                found.append(int(entry.name))
    return found


class Process:
    """A program that a test has started, and all that it writes."""

    def __init__(self, command: Sequence[str], log: Path, cwd: Path | None = None) -> None:
        self._log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def lines(self, event: str) -> list[str]:
        """The lines of its log that report ``event``."""
        return events(self._log, event)

    def exit_code(self, timeout_s: float) -> int:
        """That of its end, which must come within ``timeout_s``."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still alive after {timeout_s:g} s; its log:\n{self.log()}") from None

    def end(self) -> None:
        """Whatever state it is in."""
        if self.alive:
            self.popen.kill()
        self.popen.wait()


def events(log: Path, event: str) -> list[str]:
    """Lines of one event in a pod's log; they look like ``time level role event key=value ...``."""
    if not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if re.match(rf"\S+Z \w+ \w+ {event}( |$)", line)]


def field(line: str, name: str) -> str:
    """The value of ``name=value`` in a line of a log."""
    match = re.search(rf' {name}=("(?:[^"\\]|\\.)*"|\S*)', line)
    assert match, f"no {name} in {line!r}"
    return str(json.loads(match[1])) if match[1].startswith('"') else match[1]


# --- pods on their own -------------------------------------------------------------------------------


class Pod(Process):
    """One pod, started as a container would start it."""

    def __init__(self, role: str, port: int, flags: Sequence[str], log: Path) -> None:
        self.port = port
        ops = ["--ops.host", "127.0.0.1", "--ops.port", str(port)]
        super().__init__([sys.executable, "-m", f"services.{role}", *flags, *ops], log)

    def value(self, name: str, **labels: str) -> float:
        """One of its metrics, 0 while it has none; fails at once if the pod has ended."""
        assert self.alive, f"exit code {self.popen.returncode}; its log:\n{self.log()}"
        inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
        return scrape(self.port).get(f"impala_{name}{{{inside}}}" if inside else f"impala_{name}", 0.0)

    def ready(self) -> bool:
        return get(self.port, "/readyz")[0] == 200

    def terminate(self) -> None:
        """What the kubelet does first."""
        self.popen.terminate()


# --- whole runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunningPod:
    """A pod of a run at one moment of its lives."""

    pid: int
    arguments: list[str]

    def flag(self, name: str) -> str:
        return self.arguments[self.arguments.index(name) + 1]


class Run(Process):
    """`impala train` as a user starts it."""

    def __init__(self, run_dir: Path, log: Path, flags: Sequence[str]) -> None:
        self.run_dir = run_dir
        super().__init__([sys.executable, "-m", "services.cli", "train", "--plain", *flags], log)

    def pod(self, name: str) -> RunningPod | None:
        """`paramserver`, `learner-0`, `actor-0`, ...; None between its lives."""
        role = name.partition("-")[0]
        words = ["-m", f"services.{role}", str(self.run_dir), *([] if role == "paramserver" else [name])]
        found = processes(*words)
        assert len(found) <= 1, found
        return next((RunningPod(pid, arguments) for pid, arguments in found.items()), None)

    def pids(self) -> list[int]:
        """Of all of its pods that live."""
        return [pid for pid, words in processes(str(self.run_dir)).items() if "train" not in words]

    def kill(self, name: str) -> int:
        """kill -9; returns the process that died."""
        pod = until(lambda: self.pod(name), f"{name} lives", START_S)
        os.kill(pod.pid, signal.SIGKILL)
        until(lambda: self.pod(name) is None or self.pod(name) != pod, f"{name} is dead")
        return pod.pid

    def ports(self) -> dict[str, int]:
        targets = json.loads((self.run_dir / "targets.json").read_text())
        return {each["labels"]["pod"]: int(each["targets"][0].rpartition(":")[2]) for each in targets}

    def value(self, pod: str, name: str) -> float | None:
        """One of the metrics of a pod, or None while it does not answer."""
        return scrape(self.ports()[pod]).get(f"impala_{name}") if self.has_begun else None

    @property
    def has_begun(self) -> bool:
        """Whether it has said where its pods answer."""
        return (self.run_dir / "targets.json").exists()

    def steps(self) -> int:
        """Agent steps trained, as the learner knows that has most; 0 while none answers."""
        names = [name for name in self.ports() if name.startswith("learner-")] if self.has_begun else []
        return max((int(self.value(name, "learner_steps") or 0) for name in names), default=0)

    def train_until(self, steps: int, timeout_s: float = START_S) -> int:
        """Wait until more than ``steps`` are trained, which fails at once if the run has ended."""

        def trained() -> int | None:
            assert self.alive, f"the run has ended:\n{self.log()}"
            now = self.steps()
            return now if now > steps else None

        return until(trained, f"more than {steps} steps", timeout_s)

    def pod_events(self, pod: str, event: str) -> list[str]:
        return events(self.run_dir / "logs" / f"{pod}.log", event)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.popen.send_signal(signal.SIGINT)

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.run_dir / "checkpoints").glob("step-*.pt"))

    def end(self) -> None:
        """Nothing outlives a test, whatever it has done to the launcher."""
        super().end()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
