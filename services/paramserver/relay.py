"""A relay's side towards upstream: the store of a ``Server`` that is fed by pulling instead of publishing.

One long-poll for weights is always open, and names all of the relay's clients, so that their leases are
renewed further up and every seat is decided in one place. Its answer also says where rollouts go. A newcomer
does not wait for that poll to end: a new request, which names it, replaces the open one. Such a request is
answered at once, so those who arrive in the meantime share the next one. Without upstream the relay goes on
serving what it has, and asks again.

A run that goes back to a checkpoint while nobody further up holds its weights goes on with older versions
than a relay has. An upstream that has named such a one for so long that it is not just being restarted is
asked for whatever it holds, and that is taken. Those below, actors or relays, do the same with this relay.

Sans-I/O like the server, and called by the same loop: relay and server share one thread and need no lock.
Since a relay answers as a parameter server does, it can be upstream of another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.ops.logging import get_logger
from services.paramserver.membership import RelayedSeats
from services.paramserver.server import LOG_INTERVAL_S, Reply, Server
from services.paramserver.store import Snapshot, Store
from services.wire.codec import Expected, WireError, decode, encode
from services.wire.messages import NO_VERSION, Buffer, Client, Goodbye, Pull, Weights
from services.wire.subscriber import BEHIND_S

CONNECT_S = 0.1
"""Before trying again when upstream is not there, or not yet."""

REFUSED_S = 1.0
"""Before asking again when upstream did not answer as it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Open:
    number: int
    clients: tuple[Client, ...]
    has_newcomers: bool
    until_s: float


class Relay:
    """Asks upstream on behalf of all clients of ``server``."""

    def __init__(
        self,
        *,
        client: Client,
        run_id: str,
        hold_s: float,
        max_message_bytes: int,
        store: Store,
        seats: RelayedSeats,
        server: Server,
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._patience_s = 2 * hold_s
        self._expected = Expected(run_id=run_id, max_message_bytes=max_message_bytes)
        self._store = store
        self._seats = seats
        self._server = server
        self._number = 0
        self._open: _Open | None = None
        self._ask_at_s = 0.0
        self._behind_since_s: float | None = None
        """Since when all answers have named an older version than is held here."""
        self._has_gone_back = False
        """They have done so for so long that the run itself must have."""
        self._log = get_logger("relay").limited(LOG_INTERVAL_S)
        self.has_answered = False
        """Whether upstream has answered yet."""

    def pull(self, now_s: float) -> list[Buffer] | None:
        """The next Pull if it is due. It counts as open, until ``unsent``."""
        return self._pull(now_s) if now_s >= self.next_deadline_s() else None

    def goodbyes(self) -> Iterator[list[Buffer]]:
        """Goodbyes to pass on. Whoever takes the next one has sent the one before.

        Where many leave at once they do not fit into a socket's queue: the others are here next time.
        """
        while (client := self._seats.departed()) is not None:
            yield encode(Goodbye(run_id=self._run_id, sender=client))
            self._seats.passed_on(client)

    @property
    def has_goodbyes(self) -> bool:
        """Some are to be passed on as soon as there is room for them."""
        return self._seats.departed() is not None

    def next_deadline_s(self) -> float:
        """When the next Pull is due."""
        if self._open is None or (self._seats.has_unasked and not self._open.has_newcomers):
            return self._ask_at_s
        return max(self._ask_at_s, self._open.until_s)

    @property
    def is_asking(self) -> bool:
        """Whether a request is open."""
        return self._open is not None

    def is_overdue(self, now_s: float) -> bool:
        """Upstream has not answered for so long that the connection may lead nowhere: time for a new one."""
        return self._open is not None and now_s >= self._open.until_s

    def unsent(self, now_s: float) -> None:
        """Upstream is not there."""
        self._open = None
        self._ask_at_s = now_s + CONNECT_S
        self._forget_behind()  # whoever answers next may be another server

    def connected(self, now_s: float) -> None:
        """There is a new connection: ask over it at once."""
        self._ask_at_s = now_s

    def handle(self, frames: Sequence[Buffer], now_s: float) -> list[Reply]:
        """Take over what upstream says, and answer the clients to whom it is news."""
        try:
            message = decode(frames, self._expected)
        except WireError as error:
            return self._complain(str(error), now_s)
        if not isinstance(message, Weights):
            return self._complain(str(message), now_s)
        self.has_answered = True
        if self._open is not None and message.request == self._open.number:
            if len(message.seats) != len(self._open.clients):
                return self._complain("it did not answer with one seat for each client", now_s)
            self._seats.learn(self._open.clients, message.seats)
            self._open = None
        snapshot = Snapshot(
            version=message.version,
            steps=message.steps,
            state=message.state,
            payload=message.payload,
            generation=message.generation,
            learners=message.learners,
        )
        held_version = self._store.snapshot.version
        if NO_VERSION < snapshot.version < held_version:
            self._note_behind(now_s)
        else:
            self._forget_behind()
        if self._has_gone_back and snapshot.payload is not None:
            self._forget_behind()
            self._log.warning("went_back", policy_version=snapshot.version, held_version=held_version)
            return self._server.go_back(snapshot, now_s)
        return self._server.offer(snapshot, now_s)

    def _note_behind(self, now_s: float) -> None:
        if self._behind_since_s is None:
            self._behind_since_s = now_s
        self._has_gone_back = now_s - self._behind_since_s > BEHIND_S

    def _forget_behind(self) -> None:
        self._behind_since_s, self._has_gone_back = None, False

    def _pull(self, now_s: float) -> list[Buffer]:
        if self.is_overdue(now_s):
            self._log.warning("upstream_silent", waited_s=self._patience_s)
            self._forget_behind()
        has_newcomers = self._seats.has_unasked
        self._number += 1
        self._open = _Open(
            number=self._number,
            clients=self._seats.ask(),
            has_newcomers=has_newcomers,
            until_s=now_s + self._patience_s,
        )
        pull = Pull(
            run_id=self._run_id,
            sender=self._client,
            have_version=NO_VERSION if self._has_gone_back else self._store.snapshot.version,
            seats_for=self._open.clients,
            generation=self._store.snapshot.told_generation,
            request=self._number,
        )
        return encode(pull)

    def _complain(self, text: str, now_s: float) -> list[Reply]:
        self._log.warning("upstream_refused", error=text)
        self._open = None
        self._ask_at_s = now_s + REFUSED_S
        return []
