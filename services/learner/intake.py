"""The intake: a thread that empties the socket into a bounded queue of still compressed rollouts.

    consumes   messages from the rollout socket
    produces   valid, fresh rollouts, oldest first, for ``batch.Batcher``
    waits for  a message; room in the queue
    may drop   what is malformed or of another run or shape, and what is too stale; each is counted

When the queue is full nothing more is read from the socket: the actors' queues fill, and the actors wait.
Rollouts stay packed here, two orders of magnitude smaller than the batch they become.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from services.ops.logging import get_logger
from services.ops.metrics import LearnerMetrics
from services.wire import codec
from services.wire.codec import WireError
from services.wire.messages import Buffer, Episode, Rollout
from services.wire.sockets import RolloutReceiver

POLL_S = 0.25
MAX_TRACKED_ACTORS = 16_384
MAX_GAP = 1_000_000


class RolloutQueue:
    """Bounded, first in first out. One thread takes, in batches, and is not woken before there is one."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rollouts: deque[Rollout] = deque()
        lock = threading.Lock()
        self._has_room = threading.Condition(lock)
        self._has_enough = threading.Condition(lock)
        self._wanted = 0

    def __len__(self) -> int:
        return len(self._rollouts)

    def put(self, rollout: Rollout, timeout_s: float) -> bool:
        """Append; False if there was no room within ``timeout_s``."""
        with self._has_room:
            if not self._has_room.wait_for(lambda: len(self._rollouts) < self.capacity, timeout_s):
                return False
            self._rollouts.append(rollout)
            if len(self._rollouts) >= self._wanted:
                self._has_enough.notify()
            return True

    def take(self, count: int, timeout_s: float) -> list[Rollout]:
        """The ``count`` oldest, or none if there were not so many within ``timeout_s``."""
        with self._has_enough:
            self._wanted = count
            if not self._has_enough.wait_for(lambda: len(self._rollouts) >= count, timeout_s):
                return []
            taken = [self._rollouts.popleft() for _ in range(count)]
            self._has_room.notify_all()
            return taken


class Freshness:
    """Whether a rollout may still be trained on, asked when it arrives and again when it is used."""

    def __init__(self, current_version: Callable[[], int], max_policy_lag: Callable[[], int]) -> None:
        self._current_version = current_version
        self._max_policy_lag = max_policy_lag

    def stale(self, rollout: Rollout, updates_ahead: int = 0) -> bool:
        """Too far behind, if ``updates_ahead`` more updates come before the one that it would be used in.

        Also ahead of us: then weights acted that the learner lost when it went back to a checkpoint.
        """
        version = self._current_version()
        too_old = version + updates_ahead - rollout.policy_version > self._max_policy_lag()
        return too_old or rollout.policy_version > version


class Intake:
    """Runs in its own thread until the pod stops."""

    def __init__(
        self,
        *,
        receiver: RolloutReceiver,
        expected: codec.Expected,
        queue: RolloutQueue,
        freshness: Freshness,
        on_episode: Callable[[int, Episode], None],
        metrics: LearnerMetrics,
        stopping: threading.Event,
    ) -> None:
        self._receiver = receiver
        self._expected = expected
        self._queue = queue
        self._freshness = freshness
        self._on_episode = on_episode
        self._sequences = SequenceTracker()
        self._metrics = metrics
        metrics.queue_depth.set_function(queue.__len__)
        self._stopping = stopping
        self._log = get_logger("intake").limited(10.0)

    def run(self) -> None:
        """Receive, check, queue."""
        while not self._stopping.is_set():
            frames = self._receiver.receive(POLL_S)
            if frames is not None:
                self.take_in(frames)

    def take_in(self, frames: list[Buffer]) -> None:
        """One message: queue it, or count why not."""
        self._metrics.received_bytes.inc(codec.size_bytes(frames))
        try:
            rollout = codec.decode(frames, self._expected)
        except WireError as error:
            self.refuse(error)
            return
        if not isinstance(rollout, Rollout):
            self.refuse(WireError("malformed", f"{type(rollout).__name__} where a Rollout belongs"))
            return
        missing = self._sequences.gap(rollout)
        if missing:
            self._metrics.sequence_gaps.inc(missing)
        for episode in rollout.episodes:
            self._on_episode(rollout.task, episode)
        if self._freshness.stale(rollout):
            self._metrics.rollouts.labels("stale").inc()
            return
        while not self._queue.put(rollout, POLL_S):
            if self._stopping.is_set():
                return

    def refuse(self, error: WireError) -> None:
        """Count a message that must not be used."""
        self._metrics.rollouts.labels("invalid").inc()
        self._metrics.invalid_rollouts.labels(error.reason).inc()
        self._log.warning(f"rollout_{error.reason}", error=error)


class SequenceTracker:
    """Counts the rollouts that an actor sent to this learner and that never arrived.

    An actor that has connected anew may be heard over its old connection a little longer: what comes late was
    counted as missing, but moves nothing back, or all that had come before it would be missing once more.
    """

    def __init__(self) -> None:
        self._next: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def gap(self, rollout: Rollout) -> int:
        """How many are missing just before this one."""
        incarnation, expected = self._next.pop(rollout.actor_id, (rollout.incarnation, rollout.sequence))
        missing = max(0, rollout.sequence - expected) if incarnation == rollout.incarnation else 0
        if missing > MAX_GAP:
            missing = 0  # not a gap but nonsense
        if incarnation < rollout.incarnation:
            incarnation, expected = rollout.incarnation, 0
        if incarnation == rollout.incarnation:
            expected = max(expected, rollout.sequence + 1)
        self._next[rollout.actor_id] = (incarnation, expected)
        if len(self._next) > MAX_TRACKED_ACTORS:
            self._next.popitem(last=False)
        return missing
