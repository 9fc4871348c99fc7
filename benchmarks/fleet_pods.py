"""For ``fleet``: a parameter server and a learner of our own, as processes over TCP; what pods report."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
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
    """Where they are. ``learner`` and its metrics are None where weights come from ``fleet`` itself."""

    paramserver: str
    learner: str | None
    metrics: Mapping[str, str]
    """Role -> host:port."""
    keys: Path | None
    run_id: str


def make_keys(directory: Path) -> Path:
    """A directory for ``wire.keys``."""
    keygen.write_keys(directory, keygen.new_keys(seed=True))
    return directory


@contextlib.contextmanager
def own_pods(env: str, keys: Path | None, with_learner: bool) -> Iterator[Pods]:
    """Started, with weights to give away if there is a learner; ended with the block."""
    roles = ("paramserver", "learner") if with_learner else ("paramserver",)
    with contextlib.ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="impala-fleet-")))
        ports = iter(held.enter_context(reserved_ports(0, 2 * len(roles))))
        endpoints = {role: f"tcp://127.0.0.1:{next(ports)}" for role in roles}
        metrics = {role: f"127.0.0.1:{next(ports)}" for role in roles}
        flags = ["--env", env, "--run_id", "fleet", "--run_dir", str(directory / "run")]
        flags += ["--parent-pid", str(os.getpid()), "--ops.host", "127.0.0.1"]
        flags += ["--wire.keys", str(keys)] if keys else []
        flags += ["--wire.paramserver_bind", endpoints["paramserver"]]
        flags += ["--wire.paramserver_endpoint", endpoints["paramserver"]]
        if with_learner:
            flags += ["--wire.learner_bind", endpoints["learner"]]
        for role in roles:
            log = held.enter_context((directory / f"{role}.log").open("ab"))
            command = [sys.executable, "-m", f"services.{role}", *flags]
            process = subprocess.Popen(
                [*command, "--ops.port", metrics[role].rpartition(":")[2]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us
            )
            held.callback(_end, process)
            _await_ready(role, metrics[role], process, directory / f"{role}.log")
        yield Pods(
            paramserver=endpoints["paramserver"],
            learner=endpoints.get("learner"),
            metrics=metrics,
            keys=keys,
            run_id="fleet",
        )


def scrape(address: str, path: str = "/metrics") -> dict[str, float]:
    """All series of the pod at host:port; none if it does not answer."""
    host, _, port = address.rpartition(":")
    try:
        return parse_metrics(read_metrics(host, int(port), SCRAPE_S, path))
    except NoMetricsError:
        return {}


def _await_ready(role: str, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, _, port = address.rpartition(":")
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            read_metrics(host, int(port), path="/readyz")
        except NoMetricsError as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                words = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the {role} is not ready: {error}; its log:\n{words}") from None
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
