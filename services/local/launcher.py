"""The loop that keeps a run going: starts the pods, starts again those that die, stops all of them in order.

Consumes exits of pods and the newest scrapes; produces snapshots for ``display`` and, at the end, one
``Outcome``; waits for nothing longer than ``POLL_S``. It receives everything built, from ``train``. No pod
outlives it, unless it is killed itself: then the pods notice, and stop.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.local.display import Progress, Unfailing
from services.local.pod import Backoff, Pod
from services.ops.figures import PodPhase, PodStatus, RunInfo
from services.ops.learners import Learners, snapshot_of
from services.ops.pod import BAD_CONFIG, DIVERGED
from services.ops.scrape import Scrape

KILLED = 128 + signal.SIGINT

STOP_TIMEOUTS_S: Mapping[str, float] = {"actor": 10.0, "learner": 30.0, "paramserver": 10.0}
"""In the order of stopping: who sends goes before who receives, so that the learners' last checkpoint has
nothing left to wait for. Whoever takes longer is killed."""

POLL_S = 0.1
SILENT_AFTER_S = 5.0
"""A pod whose latest scrape is older counts as silent. It is not restarted: it may be paused on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Why the run ended, or has to."""

    exit_code: int
    reason: str
    details: tuple[str, ...] = field(default=())
    log: Path | None = None
    """Where there is more to read about it."""


class Launcher:
    """One run, from the first start of its pods until they have all stopped."""

    def __init__(
        self,
        pods: Sequence[Pod],
        run: RunInfo,
        progress: Progress,
        latest: Callable[[], Mapping[str, Scrape]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pods = pods
        self._run = run
        self._progress = Unfailing(progress)
        self._latest = latest
        self._clock = clock
        self._started_s = clock()
        self._shown_s = -float("inf")
        self._learners = Learners()
        self._interrupts = 0
        self._stopping = False
        self._failed = False

    @property
    def steps(self) -> int:
        """Agent steps trained, as far as the learners have told."""
        return snapshot_of(self._run, self._learners.readings).steps or 0

    def interrupt(self) -> None:
        """Once: stop cleanly. Twice: end everything at once. Safe to call from a signal handler."""
        self._interrupts += 1

    def run(self) -> Outcome:
        """Start the pods; return when they have all stopped. Closes the progress."""
        try:
            return self._stop(self._keep())
        except Exception:
            self._failed = True
            self._stop(Outcome(exit_code=1, reason="the launcher failed"))  # so that the learner still saves
            raise
        finally:  # nothing outlives the launcher, whatever happens to it
            for pod in self._pods:
                pod.kill()
            self._progress.close()

    def _keep(self) -> Outcome:
        """Start the pods, and again those that die, until the run has to end."""
        for pod in self._pods:
            pod.start(self._clock())
        while (outcome := self._look()) is None:
            self._show()
            time.sleep(POLL_S)
        return outcome

    def _look(self) -> Outcome | None:
        """Start whatever is due; say when the run has to end."""
        if self._interrupts:
            return Outcome(exit_code=0, reason="interrupted")
        now_s = self._clock()
        self._listen(now_s)
        for pod in self._pods:
            if pod.start_at_s is not None:
                if now_s >= pod.start_at_s:
                    pod.start(now_s)
            elif not pod.alive and (outcome := self._bury(pod, now_s)):
                return outcome
        leader = self._learners.leader  # which has saved; the others may be done a moment before
        if leader is not None and leader.get("impala_training_complete") == 1:
            return Outcome(exit_code=0, reason="complete")
        return None

    def _listen(self, now_s: float) -> Mapping[str, Scrape]:
        """The newest scrapes of all pods. Of learners only what they say in this life counts for the run."""
        scrapes = self._latest()
        learners = (pod for pod in self._pods if pod.spec.role == "learner")
        self._learners.add(
            {
                pod.spec.name: scrapes[pod.spec.name]
                for pod in learners
                if self._phase(pod, scrapes.get(pod.spec.name), now_s) == "up"
            }
        )
        return scrapes

    def _bury(self, pod: Pod, now_s: float) -> Outcome | None:
        """``pod`` is dead: plan its next life, or say why there is none."""
        pod.kill()  # what it had started itself
        name, code, words = pod.spec.name, pod.exit_code, pod.last_words()
        if code == BAD_CONFIG:
            refused = f"{name} refused its configuration"
            complaints = pod.complaints()
            return Outcome(
                exit_code=BAD_CONFIG,
                reason=refused,
                details=complaints or (f"{refused}: {words}",),
                log=None if complaints else pod.spec.log,
            )
        if code == DIVERGED and pod.spec.role == "learner":
            return Outcome(exit_code=1, reason=f"{name} gave up", details=(words,), log=pod.spec.log)
        delay_s = pod.backoff.after_death(now_s - pod.started_s, now_s)
        if delay_s is None:
            often = f"{name} died {Backoff.MOST_DEATHS} times within {Backoff.WINDOW_S:g} s"
            return Outcome(exit_code=1, reason=often, details=(words,), log=pod.spec.log)
        pod.restarts += 1
        pod.start_at_s = now_s + delay_s
        self._progress.trouble(
            "pod_died", pod=name, exit_code=code, restart=pod.restarts, restart_in_s=delay_s, last_words=words
        )
        return None

    def _stop(self, outcome: Outcome) -> Outcome:
        """Stop role after role. The learner's own trouble with stopping is the run's."""
        self._stopping = True
        if outcome.reason == "interrupted":
            self._progress.event("stopping", hint="press Ctrl-C again to end everything at once")
        for role, timeout_s in STOP_TIMEOUTS_S.items():
            pods = [pod for pod in self._pods if pod.spec.role == role]
            alive = [pod for pod in pods if pod.alive]
            for pod in alive:
                pod.terminate()
            deadline_s = self._clock() + timeout_s
            while any(pod.alive for pod in alive) and self._clock() < deadline_s:
                if self._interrupts > 1:
                    return Outcome(exit_code=KILLED, reason="killed")
                self._show()
                time.sleep(POLL_S)
            for pod in alive:
                # -SIGTERM: it was still starting, with nothing to save and no handler yet.
                failed = pod.alive or pod.exit_code not in (0, -signal.SIGTERM)
                if failed:
                    self._progress.trouble(
                        "pod_killed" if pod.alive else "pod_failed",
                        pod=pod.spec.name,
                        last_words=pod.last_words(),
                    )
                if failed and role == "learner" and outcome.exit_code == 0:
                    outcome = Outcome(
                        exit_code=1,
                        reason=f"{pod.spec.name} did not stop cleanly",
                        details=(pod.last_words(),),
                        log=pod.spec.log,
                    )
            for pod in pods:
                pod.kill()
        self._shown_s = -float("inf")
        self._show()
        return outcome

    def _show(self) -> None:
        if self._failed:  # whatever it was may fail again
            return
        now_s = self._clock()
        scrapes = self._listen(now_s)
        if now_s - self._shown_s < self._progress.interval_s:
            return
        self._shown_s = now_s
        self._progress.update(
            snapshot_of(
                self._run,
                self._learners.readings,
                pods=tuple(self._status(pod, scrapes.get(pod.spec.name), now_s) for pod in self._pods),
                elapsed_s=now_s - self._started_s,
                unix_time_s=time.time(),
                returns=self._learners.returns,
            )
        )

    def _phase(self, pod: Pod, scrape: Scrape | None, now_s: float) -> PodPhase:
        if not pod.alive:
            return "stopped" if self._stopping else "restarting"
        if scrape is None or scrape.time_s < pod.started_s:
            return "starting"
        return "up" if now_s - scrape.time_s < SILENT_AFTER_S else "silent"

    def _status(self, pod: Pod, scrape: Scrape | None, now_s: float) -> PodStatus:
        phase = self._phase(pod, scrape, now_s)
        memory_bytes = scrape.get("process_resident_memory_bytes") if scrape and phase == "up" else None
        return PodStatus(
            name=pod.spec.name,
            role=pod.spec.role,
            phase=phase,
            restarts=pod.restarts,
            memory_bytes=memory_bytes,
        )
