"""Where an actor's time goes: every moment of it, from its first wait for weights, belongs to one stage.

    weights        waits for the first weights and its seat; takes over newer ones
    start          builds the environments and the policy
    env            waits for an environment half to finish its step, and takes in what followed
    inference      chooses actions
    pack           makes rollouts of an unroll and hands them to a learner's socket
    send_blocked   waits for a learner with room
    idle           waits because training is complete

Nobody adds up what was measured here and there: the clock is read only where a stage ends, and all that has
passed since the last such reading is that stage's. So the stages add up to the time that there was.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from services.ops.metrics import ActorMetrics


class Stages:
    """The clock of one actor's main thread."""

    def __init__(self, metrics: ActorMetrics, clock: Callable[[], float] = time.perf_counter) -> None:
        """Time runs from now on."""
        self._clock = clock
        self._seconds = {stage: metrics.seconds.labels(stage) for stage in metrics.STAGES}
        self._since_s = clock()

    def end(self, stage: str) -> None:
        """All the time since the last stage ended was ``stage``."""
        now_s = self._clock()
        self._seconds[stage].inc(now_s - self._since_s)
        self._since_s = now_s
