"""What a cluster says of a release, as values: its pods and its workloads. Comes from ``api``.

Errors:

    ConfigError
    └── ClusterError            one line for the user: no kubeconfig, no permission, no such release
        └── UnreachableError    may pass by itself; whoever waits goes on waiting
    PodSilentError              one pod's metrics cannot be read; the others' can
    └── PodForbiddenError       nor may they be; pods and workloads still can
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.config import ConfigError

ROLES = ("learner", "paramserver", "relay", "actor", "evaluator")
"""Components of a release that stay; test pods come and go. In the order in which they are shown."""


class ClusterError(ConfigError):
    """The cluster, or what it was asked for, is not there or not allowed."""


class UnreachableError(ClusterError):
    """Nobody answers, or only that it is busy."""


class PodSilentError(Exception):
    """Why, in a few words."""


class PodForbiddenError(PodSilentError):
    """Whoever reads pods may not read through the API server's proxy: a right of its own, often not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a container's last life ended."""

    code: int
    reason: str
    """Kubernetes' word: Error, OOMKilled, Completed."""
    message: str
    """The last line that it left behind, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One pod of a release."""

    name: str
    release: str
    role: str
    container: str
    """The one that runs the role."""
    metrics_port: int
    is_ready: bool
    is_running: bool
    """Its container runs now, ready or not."""
    is_backing_off: bool
    """It has ended, and Kubernetes waits before it starts it again."""
    restarts: int
    trouble: str | None
    """Why it is not ready."""
    last_exit: Exit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A Deployment or StatefulSet of a release."""

    release: str
    role: str
    desired: int
    ready: int
    is_settled: bool
    """The newest template has been seen, and as many pods as desired are made of it."""
    trouble: str | None
    """Why it cannot make its pods."""


class Cluster(Protocol):
    """One namespace of a cluster. Every call has a timeout; ``metrics`` may be called by many threads."""

    @property
    def namespace(self) -> str:
        """Where the releases are looked for."""

    def pods(self, release: str, roles: Sequence[str] = ROLES) -> Sequence[Pod]:
        """Those of ``roles``. ClusterError."""

    def workloads(self, release: str | None = None) -> Sequence[Workload]:
        """Those of ``release``, or of all. ClusterError."""

    def metrics(self, pod: Pod) -> str:
        """What /metrics of ``pod`` says. PodSilentError."""

    def last_log_line(self, pod: Pod) -> str | None:
        """Of a container that has ended; None if there is none to be had."""
