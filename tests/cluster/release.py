"""A release of the chart: installed, changed and looked at as a user does, with helm, kubectl and metrics."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.kube import UNREACHABLE, KubectlError, Namespace, Pod, insist, run

CHART = Path(__file__).parents[2] / "helm"
HELM_S = 120.0
HELM_TEST_S = 280.0
"""Two pods, one after the other, and one of them imports torch beside all others."""
READY_S = 180.0
"""A few cores import torch a dozen times, and that takes a while."""
GONE_S = 240.0
ROLLOUT_S = 300
"""Of a whole StatefulSet, one pod after the other."""

RATE_S = 2.0
"""Over less, a rate of steps says more of the time between two answers than of training."""

DEFAULTS: tuple[str, ...] = ()

CATCH_RETURN = 'impala_episode_return{task="catch"}'
SEATS = "impala_paramserver_seats"
UPDATES = "impala_learner_updates_total"
STEPS = "impala_learner_steps"
WORLD_SIZE = "impala_learner_world_size"
MEMORY = "process_resident_memory_bytes"


class Release:
    """Its name contains "impala", so that it is also the beginning of its objects' names."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        self.namespace = namespace
        self.name = name
        self.selector = f"app.kubernetes.io/instance={name},app.kubernetes.io/component!=test"

    def helm(self, command: str, *flags: str, timeout_s: float = HELM_S) -> str:
        """`helm COMMAND --namespace ... RELEASE FLAGS`."""
        ended = run(["helm", command, "--namespace", self.namespace.name, self.name, *flags], None, timeout_s)
        assert ended.returncode == 0, f"helm {command} {' '.join(flags)}: {ended.stderr}\n{ended.stdout}"
        return ended.stdout

    def install(self, *settings: str, values: str | None = None) -> None:
        """With ``settings`` as of `--set`, and ``values`` as a file."""
        self._apply("install", [*DEFAULTS, *settings], values)

    def upgrade(self, *settings: str) -> None:
        """With these changes to the values of the last time."""
        self._apply("upgrade", settings, None, "--reset-then-reuse-values")

    def _apply(self, command: str, settings: Sequence[str], values: str | None, *flags: str) -> None:
        sets = [word for setting in settings for word in ("--set", setting)]
        file = [] if values is None else ["--values", "-"]
        words = ["helm", command, "--namespace", self.namespace.name, self.name, str(CHART)]
        ended = insist([*words, *flags, *sets, *file], values, HELM_S, UNREACHABLE)
        assert ended.returncode == 0, f"helm {command} {' '.join(sets)}: {ended.stderr}"

    def uninstall(self) -> None:
        """Its pods end soon after; its claim and the pods of `helm test` stay."""
        self.helm("uninstall")

    def await_gone(self) -> None:
        """Until all pods of an uninstalled release are gone."""
        self.namespace.until(
            lambda: not self.namespace.pods(self.selector), f"all pods of {self.name} are gone", GONE_S
        )

    # --- what there is ---------------------------------------------------------------------------------

    def pods(self, role: str | None = None) -> list[Pod]:
        """Those that are not on their way out."""
        pods = self.namespace.pods(self.selector)
        return [pod for pod in pods if not pod.is_ending and role in (None, pod.role)]

    def pod(self, role: str) -> Pod:
        """The first of its role."""
        pods = self.pods(role)
        assert pods, f"{self.name} has no {role}"
        return pods[0]

    def metrics(self, role: str) -> dict[str, float]:
        """Of the first learner, or the parameter server; empty while it does not answer."""
        return self.namespace.metrics(f"{self.name}-{role}-0")

    def answer(self, role: str) -> dict[str, float]:
        """The same, as soon as it answers."""
        return self.namespace.answer(f"{self.name}-{role}-0")

    def learners(self) -> dict[str, dict[str, float]]:
        """The metrics of the learners that are in a group, by pod. One that has just started is in none."""
        answers = {pod.name: self.namespace.metrics(pod.name) for pod in self.pods("learner")}
        return {name: metrics for name, metrics in answers.items() if metrics.get(WORLD_SIZE)}

    def seats(self) -> int | None:
        """Actors that the parameter server knows; None while it does not answer."""
        value = self.metrics("paramserver").get(SEATS)
        return None if value is None else int(value)

    def steps(self) -> float | None:
        """Agent steps trained in this run; None while no learner that trains answers."""
        return max((metrics[STEPS] for metrics in self.learners().values()), default=None)

    # --- what is waited for ----------------------------------------------------------------------------

    def ready(self, **others: int) -> list[Pod] | None:
        """All pods, if these are exactly a learner (unless others say), a parameter server and ``others``,
        and all are ready."""
        pods = self.pods()
        counts = Counter(pod.role for pod in pods)
        as_wanted = counts == Counter({"learner": 1, "paramserver": 1, **others})
        return pods if as_wanted and all(pod.is_ready for pod in pods) else None

    def await_ready(self, **others: int) -> list[Pod]:
        """Until that is so, as in ``await_ready(actor=8)``."""
        what = f"a learner, a parameter server and {others} of {self.name} are ready"
        return self.namespace.until(lambda: self.ready(**others), what, READY_S)

    def await_seats(self, count: int, timeout_s: float = 90.0) -> None:
        """Until exactly so many actors hold a seat."""
        self.namespace.until(lambda: self.seats() == count, f"{count} seats of {self.name}", timeout_s)

    def await_rollout(self, role: str) -> None:
        """Until Kubernetes has replaced all pods of a StatefulSet that has changed."""
        workload = f"statefulset/{self.name}-{role}"
        self.namespace.kubectl(
            *("rollout", "status", workload, f"--timeout={ROLLOUT_S}s"), timeout_s=ROLLOUT_S + 20
        )

    def await_steps(self, above: float, timeout_s: float = 60.0) -> float:
        """Until more than so many steps are trained; how many there are then."""

        def trained() -> float | None:
            steps = self.steps()
            return steps if steps is not None and steps > above else None

        return self.namespace.until(trained, f"more than {above:,.0f} steps of {self.name}", timeout_s)


class Progress:
    """Looks at the learners' steps all the time, in a thread: `with Progress(release) as progress`."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._failure: Exception | None = None
        self.looks: list[float] = []
        """Monotonic times, whether or not a learner answered."""
        self.samples: list[tuple[float, float]] = []
        """(monotonic time, steps), whenever a learner answered."""

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._look()
                self._stopping.wait(0.25)
        except Exception as error:  # noqa: BLE001  (of the thread's, none may pass unnoticed)
            self._failure = error

    def _look(self) -> None:
        steps = None
        with contextlib.suppress(KubectlError):
            steps = self._release.steps()
        self.looks.append(time.monotonic())
        if steps is not None:
            self.samples.append((self.looks[-1], steps))

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(90.0)
        assert not self._thread.is_alive(), "the last look does not end"
        if self._failure is not None:
            raise self._failure

    def longest_pause_s(self) -> float:
        """From one record of steps until the next was seen: at most a look more than training stood still."""
        return max(later - earlier for (earlier, _), (later, _) in itertools.pairwise(self._records()))

    def longest_standstill_s(self) -> float:
        """From one record of steps until the next was seen, but for the time that those steps took at least.

        Where a dozen pods begin on two cores an answer may be seconds late, or not come, while training goes
        on: then the next one has as many more steps to tell of. Who stands still has none.
        """
        rates = [
            (steps - former) / (later_s - earlier_s)
            for (earlier_s, former), (later_s, steps) in itertools.combinations(self.samples, 2)
            if later_s - earlier_s >= RATE_S
        ]
        fastest = max(rates, default=0.0)
        return max(
            later_s - earlier_s - (0.0 if fastest <= 0 else (steps - former) / fastest)
            for (earlier_s, former), (later_s, steps) in itertools.pairwise(self._records())
        )

    def _records(self) -> list[tuple[float, float]]:
        """Each record of steps and when it was seen first, and at last that there was no other."""
        best = -math.inf
        records = []
        for time_s, steps in self.samples:
            if steps > best:
                best = steps
                records.append((time_s, steps))
        return [*records, (self.looks[-1], best)]

    def deepest_fall(self) -> float:
        """Steps that were lost, at most, against the record until then."""
        record, deepest = 0.0, 0.0
        for _, steps in self.samples:
            record = max(record, steps)
            deepest = max(deepest, record - steps)
        return deepest

    def steps_per_s(self) -> float:
        """From the first to the last look."""
        (began_s, first), (ended_s, last) = self.samples[0], self.samples[-1]
        return (last - first) / (ended_s - began_s)
