"""What a learner has been sent before, to train on it again (Schmitt et al. 2019).

    consumes   every fresh rollout, when it enters a batch
    produces   past rollouts, drawn uniformly
    waits for  nothing
    may drop   the oldest, when the memory is full

Before it comes ``batch.Batcher``, whose thread owns it. Rollouts are held as they travelled, compressed, each
in one piece of memory (``rl.replay``); with a log (``replay_log``) they outlive the process, and the next one
draws on where it stopped. Without a log it begins with an empty memory and the seed's first draws.
"""

from __future__ import annotations

from dataclasses import replace

from services.learner.replay_log import ReplayLog
from services.ops.logging import get_logger
from services.ops.metrics import ReplayMetrics
from services.rl.replay import ReplayMemory
from services.wire import codec
from services.wire.codec import WireError
from services.wire.messages import Rollout

_log = get_logger("replay")


class Replay:
    """The memory, and how much of a batch comes out of it."""

    def __init__(
        self,
        *,
        memory: ReplayMemory,
        log: ReplayLog | None,
        ratio: int,
        unroll_length: int,
        expected: codec.Expected,
        metrics: ReplayMetrics,
    ) -> None:
        self._memory = memory
        self._replay_log = log
        self._ratio = ratio
        self._unroll_length = unroll_length
        self._expected = expected
        self._metrics = metrics
        self._num_lost = 0
        """By the log, as far as it has been counted."""

    def restore(self) -> None:
        """Take back what the log holds; what is not of this run any more is left out."""
        if self._replay_log is None:
            return
        restored = self._replay_log.restore()
        foreign = 0
        for item in restored.items:
            try:
                self._open(item)
            except WireError:
                foreign += 1
            else:
                self._memory.add(item)
        if foreign:
            _log.warning("replay_left_out", rollouts=foreign, reason="of other tasks, shapes or another run")
        if len(self._memory):
            try:
                self._memory.continue_draws(restored.draws)
            except ValueError as error:
                _log.warning("replay_draws_anew", reason=error)
        self._count()

    def share(self, batch_size: int) -> int:
        """How many rollouts of the next batch are replayed: none until there are enough different ones."""
        num_replayed = batch_size // (1 + self._ratio) * self._ratio
        return num_replayed if len(self._memory) >= num_replayed else 0

    def remember(self, rollout: Rollout) -> None:
        """Store a fresh one."""
        item = codec.to_bytes(codec.encode(replace(rollout, episodes=())))
        self._memory.add(item)
        if self._replay_log is not None:
            self._replay_log.append(item, self._memory.draws)
        self._count()

    def draw(self, count: int) -> list[Rollout]:
        """``count`` different ones."""
        return [self._open(item) for item in self._memory.sample(count)]

    def close(self) -> None:
        """Write what the log has in hand; the last thing that the thread does which owns it."""
        if self._replay_log is not None:
            self._replay_log.close()

    def _open(self, item: bytes) -> Rollout:
        rollout = codec.decode(codec.from_bytes(item), self._expected)
        if not isinstance(rollout, Rollout):
            raise WireError("malformed", f"{type(rollout).__name__} where a Rollout belongs")
        return rollout

    def _count(self) -> None:
        self._metrics.steps.set(len(self._memory) * self._unroll_length)
        self._metrics.size_bytes.set(self._memory.size_bytes)
        if self._replay_log is not None:
            num_lost = self._replay_log.num_lost
            self._metrics.log_lost.inc(num_lost - self._num_lost)
            self._num_lost = num_lost
