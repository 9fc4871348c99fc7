"""The gathering: how a learner gets into the next group, with the state that all of its members share.

    before it  ``attendance`` tells the parameter server that this learner stands, and hears its view
    after it   ``loop`` trains in the group until that is over, and comes back

One member holds the state: parameters, optimiser, PopArt, schedules and counters travel from it to all others
as one piece, so that whoever joins goes on exactly where the others are. Should the parameter server have
newer weights than the holder, whose predecessor died after it had published them, these are taken.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Set
from functools import partial
from typing import Any

import torch

from services.learner.attendance import Attendance
from services.learner.episodes import Episodes
from services.learner.group import Group, PeerLostError, Peers, Store, WeightsDifferError, find_store, meet
from services.learner.trainer import Trainer
from services.ops.health import Heartbeat
from services.ops.logging import get_logger
from services.ops.metrics import LearnerMetrics
from services.wire.messages import View

POLL_S = 0.25
RETRY_S = 1.0
STOP_WAIT_S = 3.0
"""How long a pod that stops waits for a step to be completed."""

_log = get_logger("group")
_log_limited = _log.limited(10.0)


class Gathering:
    """Called by the learner's loop, between two groups."""

    def __init__(
        self,
        *,
        attendance: Attendance,
        trainer: Trainer,
        episodes: Episodes,
        host: str,
        device: torch.device,
        catch_up: Callable[[int], None],
        metrics: LearnerMetrics,
        heartbeat: Heartbeat,
        stopping: threading.Event,
    ) -> None:
        """``catch_up`` takes over what the parameter server holds: this version, newer than ours."""
        self._attendance = attendance
        self._trainer = trainer
        self._episodes = episodes
        self._host = host
        self._device = device
        self._catch_up = catch_up
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._stopping = stopping
        self.group: Group | None = None
        """The one that this learner is in, or None in between."""
        self._has_trained = False
        self._stop_by_s: float | None = None
        self._members: Set[tuple[str, int]] = frozenset()

    def join(
        self, lost: PeerLostError | None = None, while_waiting: Callable[[], None] = lambda: None
    ) -> Group | None:
        """The next group; None if the pod stops before there is one. ``lost`` is how the last one ended."""
        self.group = None
        self._metrics.world_size.set(0)
        self._metrics.leads.set(0)
        self._metrics.holds_state.set(0)
        self._metrics.training_complete.set(0)
        while not self._stopping.is_set():
            try:
                store = Store(self._host)
            except (ValueError, RuntimeError) as error:  # it was possible when this pod began
                _log.warning("cannot_stand", reason=error)
                self._stopping.wait(RETRY_S)
                continue
            found = self._await_view(store, while_waiting)
            if found is None:
                return None
            view, rank = found
            self._attendance.train(view, rank)
            try:
                group = self._enter(view, rank, store)
            except PeerLostError as error:
                _log.warning("group_failed", generation=view.generation, reason=error)
                lost = error
                continue
            self._account(view, group, lost)
            self.group = group
            return group
        return None

    def _await_view(self, store: Store, while_waiting: Callable[[], None]) -> tuple[View, int] | None:
        self._attendance.stand(
            version=self._trainer.version, has_trained=self._has_trained, store=store.address
        )
        while not self._stopping.is_set():
            self._heartbeat.beat()  # alive, though not ready: a missing peer is waited for
            found = self._attendance.wait_for_next(POLL_S)
            if found is not None:
                return found
            _log_limited.info("waiting", reason=self._attendance.trouble or "for the other learners")
            while_waiting()
        return None

    def _enter(self, view: View, rank: int, store: Store) -> Group:
        """Meet the others and share the holder's state."""
        world_size = len(view.members)
        peers = None
        if world_size > 1:
            peers = meet(partial(self._connect, view, rank, store), partial(self._is_over, view.generation))
        group = Group(rank=rank, world_size=world_size, generation=view.generation, peers=peers)
        try:
            if rank == view.holder:
                if view.version > self._trainer.version:
                    self._catch_up(view.version)
                group.broadcast(self._state() if world_size > 1 else b"", view.holder)
            else:
                self._take_over(group.broadcast(None, view.holder))
        except PeerLostError:
            group.leave()
            raise
        return group

    def _connect(self, view: View, rank: int, store: Store) -> Peers:
        return Peers(
            store=store.store if rank == view.holder else find_store(view.members[view.holder].store),
            rank=rank,
            world_size=len(view.members),
            generation=view.generation,
            host=self._host,
            device=self._device,
            is_over=partial(self._is_over, view.generation),
        )

    def _is_over(self, generation: int) -> bool:
        """Asked by whoever waits for a peer, which a pod that stops does not do for long."""
        self._heartbeat.beat()  # who waits is alive
        if self._stopping.is_set() and self._stop_by_s is None:
            self._stop_by_s = time.monotonic() + STOP_WAIT_S
        is_late = self._stop_by_s is not None and time.monotonic() > self._stop_by_s
        return is_late or self._attendance.is_over(generation)

    def _state(self) -> bytes:
        content = {"trainer": self._trainer.state_dict(), "episodes": self._episodes.state_dict()}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def _take_over(self, state: bytes) -> None:
        content: dict[str, Any] = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
        self._trainer.load_state_dict(content["trainer"])
        if not self._has_trained:  # after that, everybody has seen episodes of his own
            self._episodes.load_state_dict(content["episodes"])

    def _reason(self, members: Set[tuple[str, int]], lost: PeerLostError | None) -> str:
        """Why there is another group. Who comes ends a wait for peers too, as if one of them was lost."""
        if isinstance(lost, WeightsDifferError):
            return "differed"
        if members > self._members:
            return "joined"
        return "left" if lost is None else "lost"

    def _account(self, view: View, group: Group, lost: PeerLostError | None) -> None:
        members = frozenset((member.client_id, member.incarnation) for member in view.members)
        if self._has_trained:
            self._metrics.regroups.labels(self._reason(members, lost)).inc()
        self._members, self._has_trained = members, True
        self._metrics.generation.set(group.generation)
        self._metrics.leads.set(group.is_leader)
        self._metrics.holds_state.set(group.rank == view.holder)
        self._metrics.policy_version.set(self._trainer.version)
        self._metrics.steps.set(self._trainer.steps)
        self._metrics.world_size.set(group.world_size)  # last, and collected first: who sees it sees the rest
        _log.info(
            "group_formed",
            generation=group.generation,
            rank=group.rank,
            world_size=group.world_size,
            members=",".join(member.client_id for member in view.members),
            holder=view.members[view.holder].client_id,
            policy_version=self._trainer.version,
            steps=self._trainer.steps,
            after=lost,
        )
