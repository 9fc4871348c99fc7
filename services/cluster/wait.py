"""``impala wait``: blocks until a release is ready or its training complete, or there is no hope for either.

A learner that restarts and a cluster that is away for a while are waited for. Exit codes: 0 done, 1 the time
is over or there is nothing to wait for any more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from services.cluster.manifests import OWN_EXITS, describe
from services.cluster.objects import Cluster, ClusterError, UnreachableError
from services.cluster.observer import Look, Observer
from services.cluster.overview import Overview, overview
from services.cluster.releases import find_release
from services.ops.logging import EventLogger

Goal = Literal["complete", "ready"]

INTERVAL_S = 2.0
TELL_INTERVAL_S = 30.0
LOOP_RESTARTS = 3
"""A pod that has been started this often, and waits for its next start, is in a loop."""
FORBIDDEN_LOOKS = 5
"""After so many in a row the right to read metrics is not about to be given."""
TOGETHER_S = 120.0
"""For so long learners that run are given to form a group without the one that has ended: more than a start
takes, or finding each other again, for which they wait up to a minute for one that is away."""
WHO_MAY_READ = "where networkPolicy.metricsFrom is set, it must let in the API server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of the command."""

    release: str | None = None
    goal: Goal = "complete"
    timeout_s: float | None = None


def wait(
    cluster: Cluster,
    options: Options,
    log: EventLogger,
    *,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Returns the exit code; ClusterError for what the user can mend."""
    patience = _Patience(options, log, pause, clock)
    others = _Others(clock)
    observer: Observer | None = None
    forbidden = 0
    with ExitStack() as stack:
        while True:
            try:
                if observer is None:
                    release = find_release(cluster, options.release)
                    observer = stack.enter_context(_observer(cluster, release, options.goal, clock))
                look = observer.look()
            except UnreachableError as error:
                if not patience.goes_on(INTERVAL_S, str(error)):
                    return 1
                continue
            seen = overview(look)
            if is_done(options.goal, seen):
                log.info(options.goal, release=look.release, **progress_fields(seen))
                return 0
            hopeless = why_hopeless(look, cluster, others)
            if hopeless is not None:
                log.error("given_up", release=look.release, reason=hopeless)
                return 1
            forbidden = forbidden + 1 if look.is_forbidden else 0
            if forbidden >= FORBIDDEN_LOOKS:
                raise ClusterError(
                    f"no learner of {look.release} tells how far it is: "
                    f"{next(iter(look.silent.values()))}; `--for ready` needs no such permission"
                )
            missing = what_is_missing(options.goal, look, seen)
            if not patience.goes_on(
                observer.pause_s(INTERVAL_S), missing, release=look.release, **progress_fields(seen)
            ):
                return 1


def _observer(cluster: Cluster, release: str, goal: Goal, clock: Callable[[], float]) -> Observer:
    """Of what ``goal`` needs: the learner alone tells the end of training, and no metrics who is ready."""
    if goal == "ready":
        return Observer(cluster, release, reads_metrics=False, clock=clock)
    return Observer(cluster, release, roles=("learner",), clock=clock)


class _Patience:
    """Pauses, tells now and then what is missing, and ends."""

    def __init__(
        self,
        options: Options,
        log: EventLogger,
        pause: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self._timeout_s = options.timeout_s
        self._log = log
        self._pause = pause
        self._clock = clock
        self._ends_s = math.inf if options.timeout_s is None else clock() + options.timeout_s
        self._tells_s = -math.inf

    def goes_on(self, pause_s: float, missing: str, **fields: object) -> bool:
        """After the pause; False, at once, if the time is over. ``fields`` go with what is told."""
        now_s = self._clock()
        if now_s >= self._ends_s:
            self._log.error("timeout", **fields, timeout_s=self._timeout_s, missing=missing)
            return False
        if now_s >= self._tells_s:
            self._log.info("waiting", **fields, missing=missing)
            self._tells_s = now_s + TELL_INTERVAL_S
        self._pause(min(pause_s, self._ends_s - now_s))
        return True


class _Others:
    """Whether there are learners with whom training goes on, whatever has become of one of them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._runs_since_s: float | None = None
        """Since when learners have been running of whom none was ready."""

    def go_on(self, look: Look) -> bool:
        """One trains, or runs and may soon. A learner in no group is not ready, so it runs for ever where
        ``min_learners`` are not to be had.
        """
        learners = [pod for pod in look.pods if pod.role == "learner"]
        trains = any(pod.is_ready for pod in learners)
        if trains or not any(pod.is_running for pod in learners):
            self._runs_since_s = None
            return trains
        now_s = self._clock()
        if self._runs_since_s is None:
            self._runs_since_s = now_s
        return now_s - self._runs_since_s < TOGETHER_S


def is_done(goal: Goal, seen: Overview) -> bool:
    """Whether there is nothing left to wait for."""
    return seen.state == "complete" if goal == "complete" else seen.is_ready


def what_is_missing(goal: Goal, look: Look, seen: Overview) -> str:
    """In a few words."""
    missing = []
    if goal == "complete" and seen.training is not None:
        steps, total = seen.training.steps or 0, seen.training.run.total_steps
        missing.append(f"{total - steps:,} of {total:,} steps" if steps < total else "the last checkpoint")
    late = (role for role in seen.roles if role.ready < role.desired or not role.is_settled)
    missing += [f"{role.role} {role.ready} of {role.desired} ready" for role in late]
    missing += [f"{each.count} {each.role}: {each.reason}" for each in seen.troubles[:1]]
    if (
        goal == "complete"
        and not look.is_forbidden
        and any(pod.is_ready and pod.name in look.silent for pod in look.pods)
    ):
        missing.append(WHO_MAY_READ)
    return "; ".join(missing) or "an answering learner"


def why_hopeless(look: Look, cluster: Cluster, others: _Others) -> str | None:
    """None while waiting makes sense."""
    if not look.workloads:
        return "the release is gone"
    if others.go_on(look):
        return None
    for pod in look.pods:
        ended = pod.last_exit
        if pod.role != "learner" or pod.is_running or ended is None:
            continue
        looping = pod.is_backing_off and pod.restarts >= LOOP_RESTARTS
        if ended.code in OWN_EXITS or looping:
            ended = replace(ended, message=ended.message or cluster.last_log_line(pod) or "")
            return f"{pod.name}, after {pod.restarts} restarts: {describe(ended)}"
    return None


def progress_fields(seen: Overview) -> dict[str, object]:
    """Of a line that is read from time to time."""
    training = seen.training
    fields: dict[str, object] = {
        "ready": " ".join(f"{each.role}={each.ready}/{each.desired}" for each in seen.roles)
    }
    if training is not None:
        fields |= {
            "steps": training.steps,
            "total_steps": training.run.total_steps,
            "episode_return": training.episode_return,
            "steps_per_s": None if training.steps_per_s is None else round(training.steps_per_s),
            "eta_s": None if training.eta_s is None else round(training.eta_s),
        }
    return {key: value for key, value in fields.items() if value is not None}
