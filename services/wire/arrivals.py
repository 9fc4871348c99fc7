"""How many handshakes failed, by what is left over: libzmq has no event for some of them.

Whoever was accepted is through the handshake, refused, still in it, or has failed. Success is reported
without saying whose it is, so only the number of connections that may still be in it is known: those that
are open and young. Among many of them a failure is counted late, by the time that a handshake may take, but
never twice.
No sockets and no clock; ``security.Doorkeeper`` has both.
"""

from __future__ import annotations


class Arrivals:
    """The connections of one listening socket."""

    def __init__(self, handshake_s: float) -> None:
        """After ``handshake_s`` at the latest a connection is through or closed."""
        self._handshake_s = handshake_s
        self._young: dict[int, float] = {}  # the oldest first
        self._unresolved = 0

    def accepted(self, connection: int, now_s: float) -> None:
        """One more. ``connection`` is its number while it is open."""
        self._unresolved += 1
        self._young[connection] = now_s

    def resolved(self) -> None:
        """One of them is through the handshake, or was refused."""
        self._unresolved -= 1

    def ended(self, connection: int) -> None:
        """Closed, whatever it was."""
        self._young.pop(connection, None)

    def failed(self, now_s: float) -> int:
        """How many have failed since this was last asked."""
        while self._young and next(iter(self._young.values())) < now_s - self._handshake_s:
            del self._young[next(iter(self._young))]
        failed = max(0, self._unresolved - len(self._young))
        self._unresolved -= failed
        return failed
