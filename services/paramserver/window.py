"""How many copies of the weights may be on their way at a time.

libzmq lets all connections send in turn. Answered all at once, nobody has the weights before everybody does:
hundreds of large answers end when all of those who asked have given up, and with keys each connection holds
an encrypted copy meanwhile. So a copy has a slot until whoever gets it has asked again, and there are only so
many. Who comes next is for ``held.py`` to say.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

WINDOW_BYTES = 64 * 2**20
"""Half a second of a gigabit: a link stays busy while those who are done say so, and a copy that has begun
arrives long before its peer gives up."""
LEAST_SLOTS = 4
"""However large the weights: one peer that is gone does not stop the others."""
UNDER_WAY_S = 10.0
"""After which a peer that has not asked again counts as gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    size_bytes: int
    until_s: float


class Window:
    """One slot a peer. ``now_s`` is monotonic."""

    def __init__(self) -> None:
        self._slots: OrderedDict[bytes, _Slot] = OrderedDict()  # the next to run out comes first
        self._bytes = 0

    def has_room(self, size_bytes: int) -> bool:
        """For one more copy."""
        return len(self._slots) < LEAST_SLOTS or self._bytes + size_bytes <= WINDOW_BYTES

    def begin(self, peer: bytes, size_bytes: int, now_s: float) -> None:
        """A copy goes to ``peer``."""
        self.end(peer)
        self._slots[peer] = _Slot(size_bytes=size_bytes, until_s=now_s + UNDER_WAY_S)
        self._bytes += size_bytes

    def end(self, peer: bytes) -> None:
        """It has arrived, or never will."""
        slot = self._slots.pop(peer, None)
        if slot is not None:
            self._bytes -= slot.size_bytes

    def expire(self, now_s: float) -> None:
        """A slot ends at, not after, its last moment."""
        while self.next_end_s() <= now_s:
            self.end(next(iter(self._slots)))

    def next_end_s(self) -> float:
        """When the next slot runs out; infinity if there is none."""
        return next((slot.until_s for slot in self._slots.values()), math.inf)
