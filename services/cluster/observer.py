"""Looks at a release again and again: its pods, its workloads, and what those pods say of themselves.

``overview`` comes after it. However many actors there are, at most ``SAMPLE`` of them are asked, always the
same ones as long as they live, because rates need two answers of one pod. But all pods are listed, a list of
a thousand is 9 MB, and several people may look at once: ``pause_s`` says how long to leave the cluster alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from services.cluster.objects import ROLES, Cluster, Pod, PodForbiddenError, PodSilentError, Workload
from services.ops.figures import History
from services.ops.learners import Learners, Reading
from services.ops.scrape import Scrape, parse_metrics

SAMPLE = 16
"""Of the actors; of other roles there are few, and their figures are added up."""
NUM_THREADS = 16
LARGE = 300
"""More pods than these are listed every ``LARGE_INTERVAL_S`` at most."""
LARGE_INTERVAL_S = 10.0
PAUSES_PER_LIST = 5.0
"""The pause is this many times as long as the lists took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A release at one moment."""

    namespace: str
    release: str
    workloads: tuple[Workload, ...]
    pods: tuple[Pod, ...]
    readings: Mapping[str, Reading]
    """By name, of the pods that have answered this time."""
    silent: Mapping[str, str]
    """By name, why a pod that was asked has not."""
    is_forbidden: bool
    """Pods were not asked, because nobody with these credentials may."""
    learners: Mapping[str, Reading]
    """By name, of the learners that have answered this time, or else of those that did last."""
    returns: tuple[float, ...]
    """Their course since the first look."""
    unix_time_s: float


class Observer:
    """Holds a small pool of threads until it is closed."""

    def __init__(
        self,
        cluster: Cluster,
        release: str,
        *,
        roles: Sequence[str] = ROLES,
        reads_metrics: bool = True,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        """``roles`` are those whose pods are looked at."""
        self._cluster = cluster
        self._release = release
        self._roles = tuple(roles)
        self._reads_metrics = reads_metrics
        self._clock = clock
        self._unix_clock = unix_clock
        self._lists_took_s = 0.0
        self._num_pods = 0
        self._histories: dict[str, History] = {}
        self._learners = Learners()
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="observe")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def look(self) -> Look:
        """ClusterError if the cluster does not tell; a pod that does not is only named."""
        began_s = self._clock()
        pods = tuple(self._cluster.pods(self._release, self._roles))
        workloads = tuple(self._cluster.workloads(self._release))
        self._lists_took_s, self._num_pods = self._clock() - began_s, len(pods)
        asked = [pod for role in self._roles for pod in _sample(pods, role)] if self._reads_metrics else []
        answers = list(self._threads.map(self._ask, asked))
        self._histories = {pod.name: self._histories.get(pod.name, History()) for pod in asked}
        readings, silent = {}, {}
        for pod, answer in zip(asked, answers, strict=True):
            if isinstance(answer, PodSilentError):
                silent[pod.name] = str(answer)
                continue
            history = self._histories[pod.name]
            history.add(answer)
            readings[pod.name] = Reading(before=history.before, now=answer)
        self._learners.add(
            {
                pod.name: readings[pod.name].now
                for pod in asked
                if pod.role == "learner" and pod.name in readings
            }
        )
        return Look(
            namespace=self._cluster.namespace,
            release=self._release,
            workloads=workloads,
            pods=pods,
            readings=readings,
            silent=silent,
            is_forbidden=any(isinstance(answer, PodForbiddenError) for answer in answers),
            learners=self._learners.readings,
            returns=self._learners.returns,
            unix_time_s=self._unix_clock(),
        )

    def pause_s(self, interval_s: float) -> float:
        """Until the next look: ``interval_s``, or longer if this one was a burden to the cluster."""
        at_least_s = LARGE_INTERVAL_S if self._num_pods > LARGE else 0.0
        return max(interval_s, at_least_s, PAUSES_PER_LIST * self._lists_took_s)

    def _ask(self, pod: Pod) -> Scrape | PodSilentError:
        try:
            samples = parse_metrics(self._cluster.metrics(pod))
        except PodSilentError as error:
            return error
        return Scrape(time_s=self._clock(), samples=samples)


def _sample(pods: Sequence[Pod], role: str) -> list[Pod]:
    """Ready ones first."""
    running = [pod for pod in pods if pod.role == role and pod.is_running]
    running.sort(key=lambda pod: (not pod.is_ready, pod.name))
    return running[:SAMPLE] if role == "actor" else running
