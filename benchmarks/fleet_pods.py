"""For ``fleet``: parameter server, relays and learner of our own, as processes over TCP; what pods report."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.local.plan import reserved_ports
from services.ops.scrape import NoMetricsError, parse_metrics, read_metrics
from services.wire import keygen

START_S = 90.0
END_S = 20.0
SCRAPE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """Where they are. Where there is no learner, weights come from ``fleet`` itself."""

    paramserver: str
    relays: Sequence[str] = ()
    """Which clients ask in its place, if there are any."""
    metrics: Mapping[str, str]
    """Name -> host:port: paramserver, learner, relay-0, ..."""
    keys: Path | None
    run_id: str


def make_keys(directory: Path) -> Path:
    """A directory for ``wire.keys``."""
    keygen.write_keys(directory, keygen.new_keys(seed=True))
    return directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What is to be started."""

    env: str
    keys: Path | None = None
    learner: str | None = "learner"
    """Or one of ``stand_in.KINDS`` in its place, or nobody."""
    relays: int = 0
    actors: int = 1
    """From the beginning allowed to be so many unrolls behind; more are believed once they are seated."""


@contextlib.contextmanager
def own_pods(own: Own) -> Iterator[Pods]:
    """Started, with weights to give away if there is a learner; ended with the block."""
    relays = [f"relay-{number}" for number in range(own.relays)]
    names = ["paramserver", *(["learner"] if own.learner else []), *relays]
    with contextlib.ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="impala-fleet-")))
        ports = iter(held.enter_context(reserved_ports(0, 2 * len(names))))
        endpoints = {name: f"tcp://127.0.0.1:{next(ports)}" for name in names}
        metrics = {name: f"127.0.0.1:{next(ports)}" for name in names}
        flags = ["--env", own.env, "--run_id", "fleet", "--run_dir", str(directory / "run")]
        flags += ["--parent-pid", str(os.getpid()), "--ops.host", "127.0.0.1"]
        flags += ["--actors", str(own.actors)]
        flags += ["--wire.keys", str(own.keys)] if own.keys else []
        flags += ["--wire.paramserver_endpoint", endpoints["paramserver"]]
        for name in names:
            log = held.enter_context((directory / f"{name}.log").open("ab"))
            bind = "learner_bind" if name == "learner" else "paramserver_bind"
            command = [*_program(name, own), *flags, f"--wire.{bind}", endpoints[name]]
            if name in relays:
                command += ["--paramserver.upstream", endpoints["paramserver"]]
            process = subprocess.Popen(
                [sys.executable, "-m", *command, "--ops.port", metrics[name].rpartition(":")[2]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us
            )
            held.callback(_end, process)
            _await_ready(name, metrics[name], process, directory / f"{name}.log")
        yield Pods(
            paramserver=endpoints["paramserver"],
            relays=[endpoints[name] for name in relays],
            metrics=metrics,
            keys=own.keys,
            run_id="fleet",
        )


def _program(name: str, own: Own) -> list[str]:
    if name != "learner":
        return ["services.paramserver", "--paramserver-id", name]
    assert own.learner is not None
    if own.learner == "learner":
        return ["services.learner", "--learner-id", "learner-0"]
    return ["benchmarks.stand_in", own.learner, "--learner-id", "learner-0"]


def scrape(address: str, path: str = "/metrics") -> dict[str, float]:
    """All series of the pod at host:port; none if it does not answer."""
    host, _, port = address.rpartition(":")
    try:
        return parse_metrics(read_metrics(host, int(port), SCRAPE_S, path))
    except NoMetricsError:
        return {}


def _await_ready(name: str, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, _, port = address.rpartition(":")
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            read_metrics(host, int(port), path="/readyz")
        except NoMetricsError as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                words = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the {name} is not ready: {error}; its log:\n{words}") from None
            time.sleep(0.1)
        else:
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
