"""The cluster of KUBECONFIG through kubectl, and one namespace of it.

Everything has a deadline. Metrics come through the API server's proxy and code runs in pods by
`kubectl exec`, so that nothing but KUBECONFIG is needed: no path of the node, no container engine.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from services.ops.scrape import parse_metrics

T = TypeVar("T")

POLL_S = 0.25
COMMAND_S = 60.0
ANSWER_S = 30.0
LOG_LINES = 25
MAX_LOGS = 6
METRICS_PORT = 9400
TERMINATE = """
until grep -Eq '^SigCgt.*[4-7c-f].{3}$' /proc/1/status; do sleep 0.05; done  # the kernel spares process 1
echo $(($(date +%s) + 1))
sleep 1  # in which the word arrives: a container that ends takes its shells with it
kill -TERM 1
"""
REPEATABLE = {"get", "logs", "rollout", "scale"}
"""Commands that may be given again by somebody who does not know whether the first one arrived."""
TRIES = 3
BUSY = re.compile(
    "Unable to connect|TLS handshake|connection refused|connection reset|i/o timeout|request timed out"
    "|unexpected EOF|etcdserver|ServiceUnavailable|TooManyRequests",
    re.IGNORECASE,
)
"""What kubectl says where the API server has not answered."""
UNREACHABLE = re.compile("Kubernetes cluster unreachable")
"""What helm says where it has not even begun."""


class KubectlError(AssertionError):
    """kubectl has failed, because it was asked for what is not there or because the API server is busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What the tests ask about a pod."""

    name: str
    uid: str
    role: str
    """Its label app.kubernetes.io/component."""
    node: str
    image: str
    phase: str
    is_running: bool
    is_ready: bool
    is_ending: bool
    restarts: int
    trouble: str
    """Why its container waits or has ended, if it does."""

    @staticmethod
    def read(manifest: dict[str, Any]) -> Pod:
        """Of one item of `kubectl get pods -o json`; all our pods have one container."""
        metadata, status = manifest["metadata"], manifest["status"]
        container = (status.get("containerStatuses") or [{}])[0]
        state = container.get("state", {})
        conditions = {each["type"]: each["status"] for each in status.get("conditions", [])}
        return Pod(
            name=metadata["name"],
            uid=metadata["uid"],
            role=metadata.get("labels", {}).get("app.kubernetes.io/component", ""),
            node=manifest["spec"].get("nodeName", ""),
            image=manifest["spec"]["containers"][0]["image"],
            phase=status["phase"],
            is_running="running" in state,
            is_ready=conditions.get("Ready") == "True",
            is_ending="deletionTimestamp" in metadata,
            restarts=container.get("restartCount", 0),
            trouble=json.dumps({key: value for key, value in state.items() if key != "running"}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a container came to its end."""

    exit_code: int
    seconds: float
    """Since it was asked to, by the node's clock, in whole seconds."""


def run(
    command: Sequence[str], stdin: str | None = None, timeout_s: float = COMMAND_S
) -> subprocess.CompletedProcess[str]:
    """A program's end, whatever its exit code."""
    return subprocess.run(
        list(command), input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def insist(
    command: Sequence[str],
    stdin: str | None = None,
    timeout_s: float = COMMAND_S,
    busy: re.Pattern[str] = BUSY,
) -> subprocess.CompletedProcess[str]:
    """The same, and again where the API server was too ``busy`` to answer."""
    for _ in range(TRIES - 1):
        ended = run(command, stdin, timeout_s)
        if ended.returncode == 0 or not busy.search(ended.stderr):
            return ended
        threading.Event().wait(1.0)
    return run(command, stdin, timeout_s)


def kubectl(*arguments: str, stdin: str | None = None, timeout_s: float = COMMAND_S) -> str:
    """What kubectl prints; KubectlError if it fails or takes too long."""
    command = f"kubectl {' '.join(arguments)}"
    is_repeatable = REPEATABLE.intersection(arguments[:3])  # after --namespace and its name
    is_raw = "--raw" in arguments  # and then it may be a pod that does not answer
    give = insist if is_repeatable and not is_raw else run
    try:
        ended = give(["kubectl", *arguments], stdin, timeout_s)
    except subprocess.TimeoutExpired:
        raise KubectlError(f"{command}: not within {timeout_s:g} s") from None
    if ended.returncode != 0:
        raise KubectlError(f"{command}: {ended.stderr.strip()}\n{ended.stdout}")
    return ended.stdout


class Namespace:
    """All that a test run has on the cluster."""

    def __init__(self, name: str) -> None:
        self.name = name

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = COMMAND_S) -> str:
        return kubectl("--namespace", self.name, *arguments, stdin=stdin, timeout_s=timeout_s)

    def get(self, *arguments: str) -> list[dict[str, Any]]:
        """The items of `kubectl get`."""
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", *arguments, "--output=json"))["items"]
        return items

    def pods(self, selector: str = "") -> list[Pod]:
        return [Pod.read(item) for item in self.get("pods", f"--selector={selector}")]

    def metrics(self, pod: str) -> dict[str, float]:
        """Series -> value; empty while the pod does not answer."""
        path = f"/api/v1/namespaces/{self.name}/pods/{pod}:{METRICS_PORT}/proxy/metrics"
        try:
            return parse_metrics(kubectl("get", "--raw", path, "--request-timeout=5s"))
        except KubectlError:
            return {}

    def answer(self, pod: str) -> dict[str, float]:
        """The same of a pod that is there, as soon as it answers."""
        return self.until(lambda: self.metrics(pod), f"{pod} answers", ANSWER_S)

    def python(self, pod: str, code: str) -> str:
        """What a piece of Python prints inside the pod's container."""
        return self.kubectl("exec", pod, "--", "python", "-c", code)

    def terminate(self, pod: Pod, timeout_s: float = COMMAND_S) -> End:
        """SIGTERM, as the kubelet sends it; but of a deleted pod, nobody could read later how it ended."""
        ask = ["kubectl", "--namespace", self.name, "exec", pod.name, "--", "sh", "-c", TERMINATE]

        def asked() -> str | None:
            lives = [each for each in self.pods() if each.uid == pod.uid and each.restarts == pod.restarts]
            # kubectl itself may fail, because the container ends before the shell.
            return run(ask, timeout_s=timeout_s).stdout if lives else None

        asked_s = int(self.until(asked, f"{pod.name} is asked to end", ANSWER_S))

        def end() -> End | None:
            manifest = json.loads(self.kubectl("get", "pod", pod.name, "--output=json"))
            container = manifest["status"]["containerStatuses"][0]
            ended = container["state"].get("terminated") or container["lastState"].get("terminated")
            if container["restartCount"] == pod.restarts and "terminated" not in container["state"]:
                return None
            finished_s = datetime.fromisoformat(ended["finishedAt"]).timestamp()
            return End(exit_code=ended["exitCode"], seconds=finished_s - asked_s)

        return self.until(end, f"{pod.name} ends", timeout_s)

    def until(self, condition: Callable[[], T | None], what: str, timeout_s: float) -> T:
        """The first value of ``condition()`` that is true; AssertionError if there is none in time.

        A kubectl that fails has not seen it yet.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            seen: T | KubectlError | None
            try:
                seen = condition()
            except KubectlError as error:
                seen = error
            else:
                if seen:
                    return seen
            assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:g} s; last seen: {seen!r}"
            threading.Event().wait(POLL_S)

    def diagnosis(self) -> str:
        """Pods, what has happened lately, and the last words of learners and of those that are not ready."""
        mine = ["kubectl", "--namespace", self.name]
        events = run([*mine, "get", "events", "--sort-by=.metadata.creationTimestamp"]).stdout.splitlines()
        parts = [run([*mine, "get", "pods", "--output=wide"]).stdout, *events[-LOG_LINES:]]
        shown = [pod for pod in self.pods() if pod.role == "learner" or not pod.is_ready]
        for pod in shown[:MAX_LOGS]:
            parts.append(f"\n--- {pod.name}: {pod.phase} {pod.trouble}")
            for previous in ("true", "false"):
                logs = [*mine, "logs", pod.name, f"--tail={LOG_LINES}", f"--previous={previous}"]
                parts.append(run(logs).stdout)
        return "\n".join(parts)
