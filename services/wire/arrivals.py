"""Who arrives at a listening socket, from where, and how many of them fail: as far as libzmq lets us know.

Failures are counted by what is left over, because libzmq has no event for some of them. Whoever was accepted
is through the handshake, refused, still in it, or has failed. Success is reported without saying whose it is,
so only the number of connections that may still be in it is known: those that are open and young. Among many
of them a failure is counted late, by the time that a handshake may take, but never twice.

Addresses can be looked up only while a connection is open, and its number may soon be another one's. So an
address counts if, after it was looked up, there was no news left and none of it the connection's end.
No sockets and no clock; ``security.Doorkeeper`` has both.
"""

from __future__ import annotations

from collections.abc import Callable


class Arrivals:
    """The connections of one listening socket, each known by its number while it is open."""

    def __init__(self, handshake_s: float, address_of: Callable[[int], str | None]) -> None:
        """After ``handshake_s`` at the latest a connection is through or closed."""
        self._handshake_s = handshake_s
        self._address_of = address_of
        self._young: dict[int, float] = {}  # the oldest first
        self._unresolved = 0
        self._explained = 0
        self._looked_up: dict[int, str | None] = {}
        self._addresses: dict[int, str | None] = {}

    def accepted(self, connection: int, now_s: float) -> None:
        """One more."""
        self._unresolved += 1
        self._young[connection] = now_s
        self._looked_up[connection] = self._address_of(connection)

    def resolved(self) -> None:
        """One of them is through the handshake, or was refused."""
        self._unresolved -= 1

    def ended(self, connection: int) -> str | None:
        """Closed, whatever it was; from which address, or None if that was not to be known."""
        self._young.pop(connection, None)
        self._looked_up.pop(connection, None)
        return self._addresses.pop(connection, None)

    def explained(self) -> None:
        """One of them has failed, and why was told, which may be before it counts as failed."""
        self._explained += 1

    def no_news(self) -> None:
        """Everything that had happened by now has been told."""
        self._addresses |= self._looked_up
        self._looked_up.clear()

    def failed(self, now_s: float) -> tuple[int, int]:
        """How many have failed since this was last asked, and of how many of them nobody has told why."""
        while self._young and next(iter(self._young.values())) < now_s - self._handshake_s:
            del self._young[next(iter(self._young))]
        failed = max(0, self._unresolved - len(self._young))
        self._unresolved -= failed
        unexplained = max(0, failed - self._explained)
        self._explained -= failed - unexplained
        if self._unresolved <= 0:  # nobody is left who may still count as failed
            self._explained = 0
        return failed, unexplained
