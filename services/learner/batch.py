"""The batcher: a thread that unpacks queued rollouts into reused batch buffers.

    consumes   rollouts from ``intake.RolloutQueue``, and past ones from ``replay.Replay``
    produces   ``Batch``, ready to be moved to the device
    waits for  a whole batch of rollouts; a buffer that the trainer has given back
    may drop   a rollout that became stale in the queue or does not decompress; each is counted

Beside ``actor/loop.py`` this is the only place where the words of ``wire`` and of ``rl`` meet for rollouts.
Columns first: a rollout decompresses straight into its contiguous place, and time-major views are free.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from services.config import NetworkConfig
from services.learner.intake import Freshness, RolloutQueue
from services.learner.replay import Replay
from services.ops.metrics import LearnerMetrics
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.envs.instructions import NUM_WORDS
from services.rl.networks.recurrent import cuts_of
from services.wire.codec import Unpacker, WireError
from services.wire.messages import ArraySpec, Rollout

POLL_S = 0.25
NUM_SLOTS = 2
"""One that the trainer reads while the other is filled. More would only make rollouts older."""


def rollout_schema(
    spec: EnvSpec, actions: Discrete, unroll_length: int, network: NetworkConfig | None = None
) -> dict[str, ArraySpec]:
    """The arrays of one rollout: what ``actor/loop.py`` sends, and the only thing that is let in."""
    frames = spec.frame_stack - 1 + unroll_length + 1
    network = network or NetworkConfig()
    schema = {
        "observation": ArraySpec(dtype=spec.observation_dtype, shape=(frames, *spec.observation_shape)),
        "episode_start": ArraySpec(dtype="bool", shape=(frames,)),
        "action": ArraySpec(dtype="int32", shape=(unroll_length,), high=actions.num_actions - 1),
        "behaviour_logits": ArraySpec(dtype="float32", shape=(unroll_length, actions.num_outputs)),
        "reward": ArraySpec(dtype="float32", shape=(unroll_length,)),
        "terminated": ArraySpec(dtype="bool", shape=(unroll_length,)),
    }
    if network.lstm:  # how the unroll found the actor's memory
        schema["initial_state"] = ArraySpec(dtype="float32", shape=(2, network.lstm_size))
        schema["last_action"] = ArraySpec(dtype="int32", shape=(1,), high=actions.num_actions - 1)
        schema["last_reward"] = ArraySpec(dtype="float32", shape=(1,))
    if network.instructions and spec.instruction_length:
        shape = (unroll_length + 1, spec.instruction_length)
        schema["instruction"] = ArraySpec(dtype="int32", shape=shape, high=NUM_WORDS - 1)
    return schema


def message_bytes(schema: Mapping[str, ArraySpec]) -> int:
    """Generous bound on one rollout's message: all arrays uncompressed, and the header."""
    arrays = sum(int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize for spec in schema.values())
    return arrays + arrays // 8 + 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B rollouts, columns first, fresh before replayed. Its memory is reused after ``release``."""

    observation: Tensor
    """[B, F, ...]: single frames, F = frame_stack - 1 + T + 1."""
    episode_start: Tensor
    """[B, F]"""
    action: Tensor
    """[B, T], as are the others."""
    behaviour_logits: Tensor
    reward: Tensor
    terminated: Tensor
    initial_state: Tensor | None = None
    """[B, 2, H]; this and the next two for recurrent networks."""
    last_action: Tensor | None = None
    """[B, 1]: before the first observation."""
    last_reward: Tensor | None = None
    instruction: Tensor | None = None
    """[B, T + 1, W]"""
    task: Tensor
    """[B]"""
    tasks: tuple[int, ...]
    """The same, on the host."""
    policy_versions: tuple[int, ...]
    """Per rollout, the version that acted."""
    num_fresh: int
    """How many have not been trained on before."""
    cuts: tuple[int, ...]
    """Times at which an episode begins in some column; only worked out for recurrent networks."""
    release: Callable[[], None]

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class _Slot:
    """Memory for one batch: a tensor per array (pinned where there is CUDA), and numpy's view of the same."""

    def __init__(self, schema: Mapping[str, ArraySpec], batch_size: int, pinned: bool) -> None:
        self.tensors = {
            name: torch.zeros(batch_size, *spec.shape, dtype=getattr(torch, spec.dtype), pin_memory=pinned)
            for name, spec in schema.items()
        }
        self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        self.task = torch.zeros(batch_size, dtype=torch.int64, pin_memory=pinned)


class Batcher:
    """Runs in its own thread until the pod stops; the trainer calls ``next``."""

    QUEUE: ClassVar = queue.Queue
    """Not SimpleQueue: before Python 3.13 a signal at the end of its timeout makes ``get`` wait for ever."""

    def __init__(
        self,
        *,
        rollouts: RolloutQueue,
        schema: Mapping[str, ArraySpec],
        batch_size: int,
        pinned: bool,
        freshness: Freshness,
        refuse: Callable[[WireError], None],
        metrics: LearnerMetrics,
        stopping: threading.Event,
        replay: Replay | None = None,
    ) -> None:
        self._rollouts = rollouts
        self._batch_size = batch_size
        self._freshness = freshness
        self._refuse = refuse
        self._metrics = metrics
        self._stopping = stopping
        self._replay = replay
        self._unpacker = Unpacker()
        self._free: queue.Queue[_Slot] = self.QUEUE()
        self._ready: queue.Queue[Batch] = self.QUEUE()
        for _ in range(NUM_SLOTS):
            self._free.put(_Slot(schema, batch_size, pinned))

    def next(self, timeout_s: float) -> Batch | None:
        """The oldest ready batch, or None if there is none within ``timeout_s``."""
        try:
            return self._ready.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def run(self) -> None:
        """Fill free buffers with the oldest rollouts; at the end close the replay, which is this thread's."""
        try:
            self._fill_slots()
        finally:
            if self._replay is not None:
                self._replay.close()

    def _fill_slots(self) -> None:
        while not self._stopping.is_set():
            try:
                slot = self._free.get(timeout=POLL_S)
            except queue.Empty:
                continue
            batch = self._fill(slot)
            if batch is not None:
                self._ready.put(batch)

    def _fill(self, slot: _Slot) -> Batch | None:
        """The batch that is now in the slot; None if the pod stops before it is full."""
        columns: list[Rollout] = []
        num_fresh = self._batch_size - (self._replay.share(self._batch_size) if self._replay else 0)
        if not self._add_fresh(slot, columns, num_fresh):
            return None
        if self._replay is not None and not self._add_replayed(self._replay, slot, columns):
            return None
        tasks = tuple(rollout.task for rollout in columns)
        slot.task.numpy()[:] = tasks
        return Batch(
            **slot.tensors,
            task=slot.task,
            tasks=tasks,
            policy_versions=tuple(rollout.policy_version for rollout in columns),
            num_fresh=num_fresh,
            cuts=self._cuts(slot),
            release=functools.partial(self._free.put, slot),
        )

    def _add_fresh(self, slot: _Slot, columns: list[Rollout], num_fresh: int) -> bool:
        """Take the oldest rollouts that are not stale; False if the pod stops before there are enough."""
        while len(columns) < num_fresh:
            # Without replay a batch at once; a batch that has to do without may be more than the queue holds.
            count = min(num_fresh - len(columns), self._rollouts.capacity)
            taken = self._rollouts.take(count, POLL_S)
            if not taken and self._stopping.is_set():
                return False
            for rollout in taken:
                # Every other buffer that is not free is a batch that will be trained on before this one.
                if self._freshness.stale(rollout, updates_ahead=NUM_SLOTS - 1 - self._free.qsize()):
                    self._metrics.rollouts.labels("stale").inc()
                else:
                    self._add(rollout, slot, columns)
        return True

    def _add_replayed(self, replay: Replay, slot: _Slot, columns: list[Rollout]) -> bool:
        """Fill up with past rollouts, then remember the fresh ones; False if the pod stops before that."""
        fresh = tuple(columns)
        while len(columns) < self._batch_size:  # once, unless one of them is damaged
            if self._stopping.is_set():
                return False
            for rollout in replay.draw(self._batch_size - len(columns)):
                self._add(rollout, slot, columns)
        for rollout in fresh:  # not any sooner, or a batch might replay what is fresh in it
            replay.remember(rollout)
        return True

    def _cuts(self, slot: _Slot) -> tuple[int, ...]:
        """Found here, on the host, because the device would have to be waited for."""
        if "initial_state" not in slot.tensors:
            return ()
        first = slot.tensors["episode_start"].shape[1] - slot.tensors["action"].shape[1] - 1
        return cuts_of(slot.tensors["episode_start"].T[first:])

    def _add(self, rollout: Rollout, slot: _Slot, columns: list[Rollout]) -> bool:
        """Unpack it into the next column; False, and refused, if it is damaged."""
        try:
            for name, packed in rollout.arrays.items():
                self._unpacker.unpack_into(packed, slot.arrays[name][len(columns)])
        except WireError as error:
            self._refuse(error)
            return False
        columns.append(rollout)
        return True
