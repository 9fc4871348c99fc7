"""The API's JSON -> ``Pod`` and ``Workload``. Pure; written against every version since Kubernetes 1.20.

Lists are read as JSON rather than by the client's models, which refuse what another version of the API
leaves out.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from services.cluster.objects import ROLES, Exit, Pod, Workload
from services.ops.pod import BAD_CONFIG, DIVERGED

DEFAULT_METRICS_PORT = 9400
OWN_EXITS = {BAD_CONFIG: "wrong configuration", DIVERGED: "training diverged"}
"""What our pods mean by their exit codes; the next start would change nothing."""

_Json = dict[str, Any]


def read_pods(body: bytes) -> list[Pod]:
    """Of a PodList; pods that have done their work are left out."""
    pods = [_pod(item) for item in _items(body) if item.get("status", {}).get("phase") != "Succeeded"]
    return sorted(
        (pod for pod in pods if pod.role in ROLES), key=lambda pod: (ROLES.index(pod.role), pod.name)
    )


def read_workloads(body: bytes) -> list[Workload]:
    """Of a DeploymentList or a StatefulSetList."""
    return [workload for item in _items(body) if (workload := _workload(item)).role in ROLES]


def error_message(body: str | bytes | None) -> str:
    """What a Status object says; else the text itself, on one line."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    with contextlib.suppress(ValueError, KeyError, TypeError):  # or a proxy's own words
        text = str(json.loads(text)["message"])
    return " ".join(text.split())[:300]


def _items(body: bytes) -> list[_Json]:
    items: list[_Json] = json.loads(body).get("items") or []
    return items


def _labels(item: _Json) -> tuple[str, str]:
    labels = item["metadata"].get("labels") or {}
    return labels.get("app.kubernetes.io/instance", ""), labels.get("app.kubernetes.io/component", "")


def _workload(item: _Json) -> Workload:
    release, role = _labels(item)
    desired = item["spec"].get("replicas", 1)
    status = item.get("status") or {}
    seen = status.get("observedGeneration", 0) >= item["metadata"].get("generation", 0)
    failures = [
        condition.get("message", "")
        for condition in status.get("conditions") or ()
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True"
    ]
    return Workload(
        release=release,
        role=role,
        desired=desired,
        ready=status.get("readyReplicas", 0),
        is_settled=seen and status.get("updatedReplicas", 0) >= desired,
        trouble=failures[0] if failures else None,
    )


def _pod(item: _Json) -> Pod:
    release, role = _labels(item)
    status = item.get("status") or {}
    containers = item["spec"]["containers"]
    own = next((one for one in containers if one["name"] == role), containers[0])
    statuses = status.get("containerStatuses") or ()
    own_status: _Json = next((one for one in statuses if one["name"] == own["name"]), {})
    state = own_status.get("state") or {}
    ports = {port.get("name"): port["containerPort"] for port in own.get("ports") or ()}
    is_ready = _condition(status, "Ready").get("status") == "True"
    is_leaving = "deletionTimestamp" in item["metadata"]
    return Pod(
        name=item["metadata"]["name"],
        release=release,
        role=role,
        container=own["name"],
        metrics_port=ports.get("metrics", DEFAULT_METRICS_PORT),
        is_ready=is_ready and not is_leaving,
        is_running="running" in state,
        is_backing_off=(state.get("waiting") or {}).get("reason") == "CrashLoopBackOff",
        restarts=sum(one.get("restartCount", 0) for one in statuses),
        trouble="is being deleted" if is_leaving else None if is_ready else _trouble(status),
        last_exit=_last_exit(own_status),
    )


def _condition(status: _Json, kind: str) -> _Json:
    return next((one for one in status.get("conditions") or () if one.get("type") == kind), {})


def _last_exit(container: _Json) -> Exit | None:
    for state in (container.get("state") or {}, container.get("lastState") or {}):
        ended = state.get("terminated")
        if ended:
            lines = str(ended.get("message") or "").strip().splitlines()
            return Exit(
                code=ended.get("exitCode", 0),
                reason=ended.get("reason", ""),
                message=lines[-1] if lines else "",
            )
    return None


def _trouble(status: _Json) -> str:
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return f"cannot be scheduled: {scheduled.get('message', scheduled.get('reason', ''))}"
    if status.get("phase") == "Failed":  # evicted, or its node is gone
        return _joined(status.get("reason", "failed"), status.get("message"))
    for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        state, ended = container.get("state") or {}, _last_exit(container)
        if container.get("ready") or (ended and ended.code == 0 and "terminated" in state):
            continue
        waiting = state.get("waiting")
        if ended is not None:
            now = "crash loop" if waiting else "restarted" if "running" in state else "ended"
            return f"{now}: {describe(ended)}"
        if waiting:
            return _joined(waiting.get("reason", "waiting"), waiting.get("message"))
        return "runs, and is not ready yet"
    return "is starting" if status.get("phase") == "Running" else str(status.get("phase", "Pending")).lower()


def describe(ended: Exit) -> str:
    """``exit code 137 (OOMKilled): its last line``."""
    reason = ended.reason if ended.reason not in ("", "Error", "Completed") else OWN_EXITS.get(ended.code)
    return _joined(
        f"exit code {ended.code} ({reason})" if reason else f"exit code {ended.code}", ended.message
    )


def _joined(what: str, why: str | None) -> str:
    return f"{what}: {' '.join(why.split())}" if why else what
