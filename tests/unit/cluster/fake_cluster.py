"""A cluster written by hand: pods are values, and their metrics are those that real pods would expose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry, generate_latest

from services.cluster.objects import (
    ROLES,
    ClusterError,
    Exit,
    Pod,
    PodForbiddenError,
    PodSilentError,
    Workload,
)
from services.ops.metrics import (
    ActorMetrics,
    EvaluatorMetrics,
    LearnerMetrics,
    ParamserverMetrics,
)

STARTED = "# a pod's start\nprocess_start_time_seconds {}\n"


def pod(
    name: str,
    *,
    release: str = "demo",
    is_ready: bool = True,
    is_running: bool = True,
    is_backing_off: bool = False,
    restarts: int = 0,
    trouble: str | None = None,
    last_exit: Exit | None = None,
) -> Pod:
    """`learner-0`: the role is what stands before the dash."""
    role = name.partition("-")[0]
    return Pod(
        name=name,
        release=release,
        role=role,
        container=role,
        metrics_port=9400,
        is_ready=is_ready,
        is_running=is_running,
        is_backing_off=is_backing_off,
        restarts=restarts,
        trouble=trouble,
        last_exit=last_exit,
    )


def workload(
    role: str,
    desired: int = 1,
    ready: int | None = None,
    *,
    release: str = "demo",
    is_settled: bool = True,
    trouble: str | None = None,
) -> Workload:
    """Ready as desired, unless said otherwise."""
    return Workload(
        release=release,
        role=role,
        desired=desired,
        ready=desired if ready is None else ready,
        is_settled=is_settled,
        trouble=trouble,
    )


class FakePod:
    """What one pod counts. ``restart`` begins at zero, as a process does."""

    def __init__(
        self,
        kind: type[ActorMetrics] | type[LearnerMetrics] | type[ParamserverMetrics] | type[EvaluatorMetrics],
    ) -> None:
        self._kind = kind
        self._lives = 0
        self.restart()

    def restart(self) -> None:
        self._lives += 1
        self.registry = CollectorRegistry()
        self.metrics = self._kind(self.registry)

    def text(self) -> str:
        lines = generate_latest(self.registry).decode().splitlines()
        kept = [line for line in lines if not line.startswith("process_")]
        return "\n".join(kept) + "\n" + STARTED.format(self._lives)


class FakeCluster:
    """A `Cluster`. What stands in ``failures`` is raised by lists of pods, one after the other, and what
    stands in ``workload_failures`` by those of workloads."""

    def __init__(self, pods: Sequence[Pod], workloads: Sequence[Workload]) -> None:
        self.namespace = "lab"
        self.pods_now = list(pods)
        self.workloads_now = list(workloads)
        self.answers: dict[str, Callable[[], str]] = {}
        self.failures: list[ClusterError | None] = []
        self.workload_failures: list[ClusterError | None] = []
        self.listed: list[tuple[str, ...]] = []
        self.on_list: Callable[[], None] = lambda: None
        self.asked: list[str] = []
        self.may_ask = True
        self.log_lines: dict[str, str] = {}
        self._lock = threading.Lock()

    def pods(self, release: str, roles: Sequence[str] = ROLES) -> Sequence[Pod]:
        self.on_list()
        self.listed.append(tuple(roles))
        self._fail(self.failures)
        return [each for each in self.pods_now if each.release == release and each.role in roles]

    def workloads(self, release: str | None = None) -> Sequence[Workload]:
        self._fail(self.workload_failures)
        return [each for each in self.workloads_now if release in (None, each.release)]

    def metrics(self, pod: Pod) -> str:
        with self._lock:
            self.asked.append(pod.name)
        if not self.may_ask:
            raise PodForbiddenError("no permission for pods/proxy (HTTP 403)")
        if pod.name not in self.answers:
            raise PodSilentError("connection refused")
        return self.answers[pod.name]()

    def last_log_line(self, pod: Pod) -> str | None:
        return self.log_lines.get(pod.name)

    def _fail(self, failures: list[ClusterError | None]) -> None:
        failure = failures.pop(0) if failures else None
        if failure is not None:
            raise failure

    def change(self, name: str, **fields: object) -> None:
        """Another state of one pod."""
        self.pods_now = [
            replace(each, **fields) if each.name == name else each  # type: ignore[arg-type]
            for each in self.pods_now
        ]


class Release:
    """`demo` in a fake cluster: a learner (or several), a parameter server and some actors, all well."""

    def __init__(self, num_actors: int = 2, *, learners: int = 1, evaluator: bool = False) -> None:
        self.learners = {f"learner-{number}": FakePod(LearnerMetrics) for number in range(learners)}
        self.learner = self.learners["learner-0"]
        self.paramserver = FakePod(ParamserverMetrics)
        self.actors = {f"actor-{number:04}": FakePod(ActorMetrics) for number in range(num_actors)}
        self.evaluator = FakePod(EvaluatorMetrics)
        running = {**self.learners, "paramserver-0": self.paramserver, **self.actors}
        workloads = [workload("learner", learners), workload("paramserver"), workload("actor", num_actors)]
        if evaluator:
            running["evaluator-0"] = self.evaluator
            workloads.append(workload("evaluator"))
        self.cluster = FakeCluster([pod(name) for name in running], workloads)
        self.cluster.answers = {name: each.text for name, each in running.items()}
        for number in range(learners):
            self.learns(number).total_steps.set(1000)
            self.learns(number).world_size.set(learners)
            self.learns(number).leads.set(number == 0)

    @property
    def trains(self) -> LearnerMetrics:
        """The first learner."""
        return self.learns(0)

    def learns(self, number: int) -> LearnerMetrics:
        metrics = self.learners[f"learner-{number}"].metrics
        assert isinstance(metrics, LearnerMetrics)
        return metrics

    @property
    def serves(self) -> ParamserverMetrics:
        assert isinstance(self.paramserver.metrics, ParamserverMetrics)
        return self.paramserver.metrics

    @property
    def evaluates(self) -> EvaluatorMetrics:
        assert isinstance(self.evaluator.metrics, EvaluatorMetrics)
        return self.evaluator.metrics

    def acts(self, number: int) -> ActorMetrics:
        metrics = self.actors[f"actor-{number:04}"].metrics
        assert isinstance(metrics, ActorMetrics)
        return metrics


class FakeClock:
    """Moves when somebody pauses, and does then what it was told to do."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.on_pause: list[Callable[[], None]] = []
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds
        self.pauses.append(seconds)
        if self.on_pause:
            self.on_pause.pop(0)()
