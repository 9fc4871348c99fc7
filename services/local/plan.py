"""What a run starts: its pods with their command lines, and the ports and sockets they meet at.

After ``run_dir`` has made room for the run, before ``launcher`` starts it. The flags are those that a pod
takes anywhere; only the addresses are local. Nothing here starts a process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services import config as configuration
from services.config import RunConfig
from services.local.run_dir import write_json
from services.ops.threads import VARIABLES as THREAD_VARIABLES
from services.ops.threads import learner_threads

Command = Callable[[str, Sequence[str]], list[str]]
"""(role, flags) -> the command line of a pod."""


def pod_command(role: str, flags: Sequence[str]) -> list[str]:
    """A pod in this very Python. A folder called services where the user is must not pass for ours: -P."""
    return [sys.executable, "-P", "-m", f"services.{role}", *flags]


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


def pod_names(config: RunConfig) -> list[str]:
    """Of the run, in the order of starting: who is early waits for the others."""
    learners = (f"learner-{number}" for number in range(config.learners))
    return ["paramserver", *learners, *(f"actor-{number}" for number in range(config.actors))]


def _here() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it has been deleted
        return None


def plan_pods(
    config: RunConfig,
    ports: Sequence[int],
    socket_dir: Path,
    environment: Mapping[str, str],
    command: Command,
) -> list[PodSpec]:
    """The pods of a run, each with one of ``ports``."""
    wire = {
        "paramserver_bind": f"ipc://{socket_dir}/paramserver",
        "paramserver_endpoint": f"ipc://{socket_dir}/paramserver",
    }
    threads = {
        "paramserver": 1,
        "learner": learner_threads(config),
        "actor": config.actor.inference_threads,
    }
    # config.json already holds what these say, and a pod would let them override it.
    inherited = {
        name: value
        for name, value in environment.items()
        if not name.startswith(configuration.ENVIRONMENT_PREFIX)
    }
    root = Path(configuration.__file__).parents[2]
    if root == _here():  # perhaps a checkout that is not installed, which -P keeps the pods from finding
        paths = filter(None, (str(root), inherited.get("PYTHONPATH")))
        inherited["PYTHONPATH"] = os.pathsep.join(paths)
    pods = []
    for name, port in zip(pod_names(config), ports, strict=True):
        role = name.partition("-")[0]
        flags = ["--config", str(config.run_dir / "config.json"), "--parent-pid", str(os.getpid())]
        if role in ("actor", "learner"):
            flags += [f"--{role}-id", name]
        flags += ["--run_dir", str(config.run_dir), "--ops.host", "127.0.0.1", "--ops.port", str(port)]
        # A learner's own socket; the parameter server tells the actors where it is.
        own = {"learner_bind": f"ipc://{socket_dir}/{name}", "learner_host": "127.0.0.1"}
        for key, value in (wire | own if role == "learner" else wire).items():
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
    """A short path that only this user can enter: the path of a Unix socket has at most 107 bytes.

    A launcher that is killed leaves it behind, with sockets that nobody listens to. Finding out whose a
    directory is would take a lock of its own, and a mistake would cost a live run; so there it stays.
    """
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
    write_json(path, targets)
