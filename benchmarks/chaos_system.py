"""The system that faults happen to: real pods as processes, each on a host of its own.

``chaos_network`` has the hosts. Every pod has a thread that stays on the pod's host and does what a kubelet
would: starts its process, waits for its end, writes that down, and starts it again after ``RESTART_S`` with
the same id and address. So no fault has to repair what it did, and a pod that ends by itself is seen. Nothing
here judges.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos_findings import Crew, End, Exit
from benchmarks.chaos_network import Network
from services import config as configuration
from services.local.run_dir import write_json

OPS_PORT = 9400
RESTART_S = 1.0
STOP_S = 30.0
GAVE_UP = b" error learner cannot_leave"
TOTAL_STEPS = "1000000000000"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class System:
    """Runs from ``start`` to ``close``."""

    def __init__(self, directory: Path, num_learners: int, num_actors: int, flags: Sequence[str]) -> None:
        learners = [f"learner-{n}" for n in range(num_learners)]
        actors = [f"actor-{n}" for n in range(num_actors)]
        self._directory = directory
        self._addresses = (
            {"paramserver": "10.77.0.2"}
            | {name: f"10.77.0.{11 + n}" for n, name in enumerate(learners)}
            | {name: f"10.77.0.{101 + n}" for n, name in enumerate(actors)}
        )
        defaults = ["--env", "catch", "--network.hidden_size", "32", "--total_steps", TOTAL_STEPS]
        counts = ["--learners", str(num_learners), "--actors", str(num_actors)]
        config = configuration.load(flags=[*defaults, *counts, *flags])
        self._config = directory / "config.json"
        directory.mkdir(parents=True, exist_ok=True)
        write_json(self._config, configuration.dump(config))
        self.crew = Crew(
            learners=tuple(learners),
            actors=tuple(actors),
            paramserver="paramserver",
            steps_per_update=num_learners * config.steps_per_update,
        )
        self._exits: list[Exit] = []  # appended to by many threads, which a list takes well
        self._stopping = threading.Event()
        self._killed: set[int] = set()
        self.network = Network(self._addresses)
        self._pods = {name: _Pod(name) for name in self.crew.pods}

    def start(self) -> None:
        """All pods, at once."""
        for pod in self._pods.values():
            pod.thread = threading.Thread(
                target=self._keep, args=(pod,), name=f"kubelet-{pod.name}", daemon=True
            )
            pod.thread.start()

    def exits(self, since_s: float) -> list[Exit]:
        """Processes that have ended since then."""
        return [each for each in self._exits if each.time_s >= since_s]

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self._pods[name].process
        if process is not None:
            self._killed.add(process.pid)
            process.kill()

    def freeze(self, name: str) -> None:
        """It stands still, its connections stay, its host answers for it."""
        self._signal(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """It goes on, and does not know that time has passed."""
        self._signal(name, signal.SIGCONT)

    def lives(self, name: str, since_s: float) -> int:
        """How often its process was started since then."""
        return sum(started_s >= since_s for started_s in self._pods[name].started_s)

    def stop(self, names: Sequence[str]) -> dict[str, int | None]:
        """SIGTERM to all of these at once, and their exit codes; None of who has not ended in time."""
        processes = {name: self._pods[name].process for name in names}
        for name, process in processes.items():
            self._pods[name].wanted = False
            if process is not None:
                self._killed.add(process.pid)
                process.terminate()
        deadline_s = time.monotonic() + STOP_S
        for name in names:
            thread = self._pods[name].thread
            if thread is not None:
                thread.join(max(0.0, deadline_s - time.monotonic()))
        return {name: None if each is None else each.returncode for name, each in processes.items()}

    def ends(self) -> list[End]:
        """What the learners that have stopped said of their parameters."""
        return [end for name in self.crew.learners if (end := self._end_of(name)) is not None]

    def log(self, name: str) -> Path:
        """Of all lives of a pod."""
        return self._directory / "logs" / f"{name}.log"

    def close(self) -> None:
        """kill -9 of whatever lives, frozen or not, and the end of the network."""
        self._stopping.set()
        for pod in self._pods.values():
            if pod.process is not None:
                pod.process.kill()
        for pod in self._pods.values():
            if pod.thread is not None:
                pod.thread.join(STOP_S)
        self.network.close()

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._pods[name].process
        if process is not None:
            process.send_signal(number)

    def _keep(self, pod: _Pod) -> None:
        self.network.enter(pod.name)
        log = self.log(pod.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        while pod.wanted and not self._stopping.is_set():
            with log.open("ab") as output:
                begun = output.tell()
                pod.process = subprocess.Popen(
                    self._command(pod.name),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is for us
                )
            pod.started_s.append(time.monotonic())
            if self._stopping.is_set():  # `close` may have looked before there was a process to kill
                pod.process.kill()
            code = pod.process.wait()
            ours = pod.process.pid in self._killed or self._stopping.is_set()
            gave_up = GAVE_UP in log.read_bytes()[begun:]
            self._exits.append(
                Exit(time_s=time.monotonic(), pod=pod.name, code=code, ours=ours, gave_up=gave_up)
            )
            self._stopping.wait(RESTART_S)

    def _command(self, name: str) -> list[str]:
        role = name.partition("-")[0]
        flags = ["--config", str(self._config), "--parent-pid", str(os.getpid())]
        if role != "paramserver":
            flags += [f"--{role}-id", name]
        flags += ["--run_dir", str(self._directory), "--ops.port", str(OPS_PORT)]
        flags += ["--wire.paramserver_endpoint", f"tcp://{self._addresses['paramserver']}:5556"]
        return [sys.executable, "-P", "-m", f"services.{role}", *flags]

    def _end_of(self, name: str) -> End | None:
        words = re.findall(r"Z info learner stopped (.*)", self.log(name).read_text(errors="replace"))
        found = dict(word.split("=", 1) for word in words[-1].split()) if words else {}
        if "parameters" not in found:
            return None
        return End(learner=name, policy_version=found["policy_version"], parameters=found["parameters"])


class _Pod:
    """One that is kept running."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.wanted = True
        self.started_s: list[float] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.thread: threading.Thread | None = None


def _environment() -> dict[str, str]:
    """Without settings of whoever runs this, one thread each (there are more pods than cores), and with what
    the interpreter can say of a crash."""
    root = Path(configuration.__file__).parents[2]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(configuration.ENVIRONMENT_PREFIX)}
    return inherited | {"PYTHONPATH": str(root), "PYTHONFAULTHANDLER": "1"} | dict.fromkeys(THREADS, "1")
