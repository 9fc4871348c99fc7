"""How requests are answered: rules without sockets and without a clock. ``loop.py`` carries the messages.

Pull
    is answered at once with what the client does not know: a newer version, or a seat other than the one that
    it says it holds. So an actor has its seat before any weights exist, and a lost answer is repeated to
    whoever asks again. (That it has no seat is no news, or who insists on one would be answered without
    end.) Without news the request is held until there is some, until the run's state changes, or for
    ``hold_s``, and then answered without a payload. A peer has one request open; its next one replaces it.
Publish
    of a newer version replaces what is held, and all whose requests are held are answered. Versions never
    fall: an older publish changes nothing, is counted as refused (`stale`), and its answer names the version
    that is held. A learner that went back to a checkpoint therefore numbers its next version above it.
    Without a payload it only updates the run's state, and its answer tells the learner whether the server
    needs the payload (because it was restarted). A relay takes none (`relay`), and where peers have proved
    their roles, nobody takes one but from a learner (`role`).
Goodbye
    ends the sender's seat and its held request. It has no answer.

Anything else is counted by its reason and answered with a Refusal, at most once per second and peer: what
arrives can neither stop the server nor make it talk without end. A refusal that arrives is never answered.
The payload is one buffer, shared by the store, by all answers and by the writer of snapshots.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from services.ops.logging import get_logger
from services.ops.metrics import ParamserverMetrics
from services.paramserver.membership import Membership
from services.paramserver.store import Snapshot, Store
from services.wire.codec import Expected, WireError, decode, encode
from services.wire.messages import (
    NO_SEAT,
    Buffer,
    Client,
    Goodbye,
    Message,
    Publish,
    Published,
    Pull,
    Refusal,
    RunState,
    Weights,
)

REFUSAL_INTERVAL_S = 1.0
MAX_REFUSED_PEERS = 4096
LOG_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What goes to a peer."""

    peer: bytes
    frames: list[Buffer]
    result: str | None = None
    """Of a pull: `full` or `not_modified`."""
    since_s: float | None = None
    """When the request, or the news that it waited for, arrived; None if its time just ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    pull: Pull
    state: RunState
    """The run's state when it was asked."""
    until_s: float


class Server:
    """The rules. ``now_s`` is monotonic; only one thread calls."""

    def __init__(
        self,
        *,
        run_id: str,
        incarnation: int,
        hold_s: float,
        max_message_bytes: int,
        store: Store,
        membership: Membership,
        metrics: ParamserverMetrics,
        takes_publishes: bool = True,
    ) -> None:
        self._run_id = run_id
        self._incarnation = incarnation
        self._hold_s = hold_s
        self._expected = Expected(run_id=run_id, max_message_bytes=max_message_bytes)
        self._store = store
        self._membership = membership
        self._metrics = metrics
        self._takes_publishes = takes_publishes
        self._held: OrderedDict[bytes, _Held] = OrderedDict()  # the next to run out comes first
        self._refused_s: OrderedDict[bytes, float] = OrderedDict()
        self._learner: Client | None = None
        self._log = get_logger("server").limited(LOG_INTERVAL_S)
        metrics.version.set(store.snapshot.version)

    def handle(
        self, peer: bytes, frames: Sequence[Buffer], now_s: float, role: str | None = None
    ) -> list[Reply]:
        """A request arrived, from a peer that has proved this role; None where there are no keys."""
        try:
            message = decode(frames, self._expected)
        except WireError as error:
            return self._refuse(peer, error.reason, str(error), now_s)
        match message:
            case Pull():
                return self._pull(peer, message, now_s)
            case Publish() if role not in (None, "learner"):
                return self._refuse(peer, "role", f"a learner may publish, and this is no {role}'s", now_s)
            case Publish():
                return self._publish(peer, message, now_s)
            case Goodbye():
                return self._goodbye(peer, message)
            case Refusal():
                self._count_refused("malformed", f"the peer refused an answer: {message.text}")
                return []
            case _:
                return self._refuse(peer, "malformed", f"{type(message).__name__} is not a request", now_s)

    def tick(self, now_s: float) -> list[Reply]:
        """Time passed: leases end, and held requests are answered."""
        self._membership.expire(now_s)
        self._metrics.seats.set(len(self._membership))
        replies = []
        while self._held and next(iter(self._held.values())).until_s <= now_s:
            peer, held = self._held.popitem(last=False)
            replies.append(self._answer(peer, held.pull, since_s=None))
        return replies

    def next_deadline_s(self) -> float:
        """When ``tick`` has something to do; infinity if never."""
        hold_ends_s = next((held.until_s for held in self._held.values()), math.inf)
        return min(hold_ends_s, self._membership.next_expiry_s())

    def offer(self, offered: Snapshot, now_s: float) -> list[Reply]:
        """A learner or upstream sent weights or a state: answers for all to whom they are news."""
        before = self._store.snapshot
        if self._store.offer(offered) and self._store.snapshot.version > before.version:
            self._metrics.publishes.inc()
            self._metrics.version.set(offered.version)
        return self._answer_news(now_s)

    def _answer_news(self, now_s: float) -> list[Reply]:
        informed = [(peer, held) for peer, held in self._held.items() if self._is_news(held)]
        for peer, _ in informed:
            del self._held[peer]
        return [self._answer(peer, held.pull, since_s=now_s) for peer, held in informed]

    def _pull(self, peer: bytes, pull: Pull, now_s: float) -> list[Reply]:
        for client in pull.seats_for:
            self._membership.renew(client, now_s)
        self._held.pop(peer, None)
        held = _Held(pull=pull, state=self._store.snapshot.state, until_s=now_s + self._hold_s)
        if self._is_news(held):
            return [self._answer(peer, pull, since_s=now_s)]
        self._held[peer] = held
        return []

    def _is_news(self, held: _Held) -> bool:
        snapshot = self._store.snapshot
        return (
            snapshot.version > held.pull.have_version
            or snapshot.state != held.state
            or any(
                self._membership.seat_of(client) not in (client.seat, NO_SEAT)
                for client in held.pull.seats_for
            )
        )

    def _answer(self, peer: bytes, pull: Pull, since_s: float | None) -> Reply:
        snapshot = self._store.snapshot
        is_newer = snapshot.version > pull.have_version
        weights = Weights(
            run_id=self._run_id,
            server_incarnation=self._incarnation,
            state=snapshot.state,
            version=snapshot.version,
            steps=snapshot.steps,
            seats=tuple(self._membership.seat_of(client) for client in pull.seats_for),
            payload=snapshot.payload if is_newer else None,
            request=pull.request,
        )
        result = "full" if is_newer else "not_modified"
        return Reply(peer=peer, frames=encode(weights), result=result, since_s=since_s)

    def _publish(self, peer: bytes, publish: Publish, now_s: float) -> list[Reply]:
        if not self._takes_publishes:
            return self._refuse(peer, "relay", "publish to the parameter server, not to a relay", now_s)
        if publish.sender != self._learner:
            self._learner = publish.sender
            self._log.info("learner", client=publish.sender.client_id, policy_version=publish.version)
        if publish.version < self._store.snapshot.version:
            held = self._store.snapshot.version
            self._count_refused("stale", f"version {publish.version} was published, {held} is held")
            answers = []
        else:
            offered = Snapshot(
                version=publish.version,
                steps=publish.steps,
                state=publish.state,
                payload=publish.payload,
            )
            answers = self.offer(offered, now_s)
        return [self._to(peer, self._published()), *answers]

    def _published(self) -> Published:
        return Published(
            run_id=self._run_id,
            server_incarnation=self._incarnation,
            version=self._store.snapshot.version,
            num_seats=len(self._membership),
        )

    def _goodbye(self, peer: bytes, goodbye: Goodbye) -> list[Reply]:
        self._membership.release(goodbye.sender)
        held = self._held.get(peer)
        # A relay passes goodbyes on, and its own request stays open.
        if held is not None and held.pull.sender.client_id == goodbye.sender.client_id:
            del self._held[peer]
        return []

    def _refuse(self, peer: bytes, reason: str, text: str, now_s: float) -> list[Reply]:
        self._count_refused(reason, text)
        if now_s < self._refused_s.get(peer, -math.inf) + REFUSAL_INTERVAL_S:
            return []
        self._refused_s[peer] = now_s
        self._refused_s.move_to_end(peer)
        if len(self._refused_s) > MAX_REFUSED_PEERS:
            self._refused_s.popitem(last=False)
        return [self._to(peer, Refusal(reason=reason, text=text[:1000]))]

    def _count_refused(self, reason: str, text: str) -> None:
        self._metrics.refused_requests.labels(reason).inc()
        self._log.warning("request_refused", reason=reason, error=text)

    def _to(self, peer: bytes, message: Message) -> Reply:
        return Reply(peer=peer, frames=encode(message))
