"""Requests that wait for their answer: by when their time runs out, and by how far behind their peers are."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from services.wire.messages import Pull, RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One request."""

    peer: bytes
    pull: Pull
    state: RunState
    """The run's state when it was asked."""
    asked_s: float
    until_s: float


class HeldRequests:
    """One a peer. All are held for equally long. Nothing here looks at all of them but iterating does."""

    def __init__(self) -> None:
        self._requests: OrderedDict[bytes, Held] = OrderedDict()  # the next to run out comes first
        # By the version that they have; who asked first is first.
        self._peers: dict[int, dict[bytes, None]] = {}

    def add(self, held: Held) -> None:
        """In place of the one that this peer has open."""
        self.remove(held.peer)
        self._requests[held.peer] = held
        self._peers.setdefault(held.pull.have_version, {})[held.peer] = None

    def get(self, peer: bytes) -> Held | None:
        """The one of ``peer``."""
        return self._requests.get(peer)

    def remove(self, peer: bytes) -> None:
        """The one of ``peer``, if there is one."""
        held = self._requests.pop(peer, None)
        if held is None:
            return
        version = held.pull.have_version
        del self._peers[version][peer]
        if not self._peers[version]:
            del self._peers[version]

    def furthest_behind(self, version: int) -> Held | None:
        """Of those who have less than ``version``, whoever has least, and of these, whoever asked first.

        So nobody is served twice before everybody else has been served once, however often those who wait
        have to ask again and however fast versions follow each other.
        """
        oldest = min(self._peers, default=version)  # there are few different ones
        return self._requests[next(iter(self._peers[oldest]))] if oldest < version else None

    def ended(self, now_s: float) -> list[Held]:
        """Those whose time has run out."""
        ended = []
        for held in self._requests.values():
            if held.until_s > now_s:
                break
            ended.append(held)
        return ended

    def next_end_s(self) -> float:
        """When the next one runs out; infinity if there is none."""
        return next((held.until_s for held in self._requests.values()), math.inf)

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._requests.values()))
