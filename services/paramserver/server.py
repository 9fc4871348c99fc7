"""How requests are answered: rules without sockets and without a clock. ``loop.py`` carries the messages.

Pull
    is answered at once with what the client does not know: a newer version, another group of learners, or a
    seat other than the one that it says it holds. So an actor has its seat before any weights exist, and a
    lost answer is repeated to whoever asks again. (That it has no seat is no news, or who insists on one
    would be answered without end.) Without news the request is held until there is some, until the run's
    state changes, or for ``hold_s``, and then answered without a payload. A peer has one request open; its
    next one replaces it.
    Only so many copies of large weights are on their way at a time (``window.py``). A peer has its copy when
    it asks again; then the next one gets the newest, whoever is furthest behind first. Who waits for its turn
    is told everything else at once, and after ``hold_s`` gets an answer without a payload too. A learner does
    not wait: it asks when a group begins, and the whole group waits for it.
Publish
    of a newer version replaces what is held, and all whose requests are held are answered. Versions never
    fall: an older publish changes nothing, is counted as refused (`stale`), and its answer names the version
    that is held. A learner that went back to a checkpoint therefore numbers its next version above it.
    Without a payload it only updates the run's state, and its answer tells the learner whether the server
    needs the payload (because it was restarted).
    While there is a group, nobody but its first member has a say (`not_leader`): one that was cut off and
    trained on alone would otherwise replace what the others train. A run that is complete is not taken back
    by a publish of the same version, except by that first member, which may have been given more steps.
    A relay takes none (`relay`).
Attend
    renews a learner's place among the learners, and is answered at once with the view (``views.py``). A new
    group is news to all whose requests are held. A learner with another configuration than counts is refused
    (`config`). It may take their place then, but in the first minute of this server not while they have a
    newer state than it holds (`config_wait`). A relay takes none (`relay`).
Goodbye
    ends the sender's seat and its held request. It has no answer.

Where peers have proved their roles, only learners publish and attend; only actors, one seat with a request,
and relays, for all of theirs, take and give back seats. The rest is refused (`role`). Names are not proved:
an actor that takes another one's can end its seat.
Anything else is counted by its reason and answered with a Refusal, at most once per second and peer: what
arrives can neither stop the server nor make it talk without end. A refusal that arrives is never answered.
The payload is one buffer, shared by the store, by all answers and by the writer of snapshots.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.ops.logging import get_logger
from services.ops.metrics import ParamserverMetrics
from services.paramserver.clock import WakingClock
from services.paramserver.held import Held, HeldRequests
from services.paramserver.membership import Membership
from services.paramserver.store import EMPTY, Snapshot, Store
from services.paramserver.views import Views
from services.paramserver.window import Window
from services.wire.codec import Expected, WireError, decode, encode
from services.wire.messages import (
    NO_GENERATION,
    NO_SEAT,
    Attend,
    Buffer,
    Client,
    Destination,
    Goodbye,
    Message,
    Publish,
    Published,
    Pull,
    Refusal,
    View,
    Weights,
)

REFUSAL_INTERVAL_S = 1.0
MAX_REFUSED_PEERS = 4096
LOG_INTERVAL_S = 10.0
OTHER_CONFIG = (
    "this learner's configuration is not the one that the others train with (network, loss, optimiser, ...)"
)
NOT_YET = f"{OTHER_CONFIG}, and this server waits for their weights before anybody takes their place"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What goes to a peer."""

    peer: bytes
    frames: list[Buffer]
    result: str | None = None
    """Of a pull: `full` or `not_modified`."""
    since_s: float | None = None
    """When the request, or the news that it waited for, arrived; None if its time just ran out."""


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
        views: Views | None,
    ) -> None:
        """Without ``views`` it is a relay's: learners publish and attend further up."""
        self._run_id = run_id
        self._incarnation = incarnation
        self._hold_s = hold_s
        self._expected = Expected(run_id=run_id, max_message_bytes=max_message_bytes)
        self._store = store
        self._membership = membership
        self._metrics = metrics
        self._views = views
        self._clock = WakingClock()
        """Of the seats; ``views`` has its own."""
        self._held = HeldRequests()
        self._window = Window()
        self._version_s = -math.inf
        """When the newest version arrived."""
        self._refused_s: OrderedDict[bytes, float] = OrderedDict()
        self._publisher: Client | None = None
        self._log = get_logger("server").limited(LOG_INTERVAL_S)
        metrics.version.set(store.snapshot.version)
        if views is not None:
            views.held_version = views.restored_version = store.snapshot.version

    def handle(
        self, peer: bytes, frames: Sequence[Buffer], now_s: float, role: str | None = None
    ) -> list[Reply]:
        """A request arrived, from a peer that has proved this role; None where there are no keys."""
        try:
            message = decode(frames, self._expected)
        except WireError as error:
            return self._refuse(peer, error.reason, str(error), now_s)
        self._window.end(peer)  # whoever speaks again has what it was sent
        forbidden = None if role is None else _forbidden(message, role)
        if forbidden is not None:
            text = f"only {forbidden}, and this is the key of role {role}"
            return self._refuse(peer, "role", text, now_s)
        match message:
            case Pull():
                return self._pull(peer, message, now_s)
            case Publish():
                return self._publish(peer, message, now_s)
            case Attend():
                return self._attend(peer, message, now_s)
            case Goodbye():
                return self._goodbye(peer, message)
            case Refusal():
                self._count_refused("malformed", f"the peer refused an answer: {message.text}")
                return []
            case _:
                return self._refuse(peer, "malformed", f"{type(message).__name__} is not a request", now_s)

    def tick(self, now_s: float) -> list[Reply]:
        """Time passed: leases and slots end, and held requests are answered."""
        self._membership.expire(self._clock.advance(now_s))
        self._metrics.seats.set(len(self._membership))
        self._window.expire(now_s)
        replies = self._send_weights(now_s)
        if self._views is not None:
            self._views.tick(now_s)
            replies += self._tell_of(self._views, now_s)
        replies += [self._answer(held, since_s=None) for held in self._held.ended(now_s)]
        return replies

    def next_deadline_s(self) -> float:
        """When ``tick`` has something to do; infinity if never."""
        return min(
            self._held.next_end_s(),
            self._window.next_end_s(),
            self._clock.monotonic_s(self._membership.next_expiry_s()),
            math.inf if self._views is None else self._views.next_deadline_s(),
        )

    def offer(self, offered: Snapshot, now_s: float) -> list[Reply]:
        """Weights, a state or a group of learners: answers for all to whom they are news."""
        before = self._store.snapshot
        if self._store.offer(offered) and self._store.snapshot.version > before.version:
            self._metrics.publishes.inc()
            self._note_version(now_s)
            if self._views is not None:
                self._views.held_version = offered.version
        replies = self._send_weights(now_s)
        replies += [self._answer(held, since_s=now_s) for held in self._held if self._is_told_more(held)]
        return replies

    def go_back(self, offered: Snapshot, now_s: float) -> list[Reply]:
        """A relay's: hold an older version. Answers for all to whom that is news.

        Those who have a newer one are told at once that it is not held any more. When to give it up is for
        them to say: they ask again with what they have, and wait as ever.
        """
        assert self._views is None
        self._store.go_back(offered)
        self._note_version(now_s)
        replies = self._send_weights(now_s)
        replies += [
            self._answer(held, since_s=now_s)
            for held in self._held
            if held.pull.have_version > offered.version or self._is_told_more(held)
        ]
        return replies

    def _note_version(self, now_s: float) -> None:
        self._metrics.version.set(self._store.snapshot.version)
        self._version_s = now_s

    def lost(self, peer: bytes, now_s: float) -> list[Reply]:
        """An answer could not be handed over: ``peer`` is gone or does not read, and others get its turn."""
        self._window.end(peer)
        return self._send_weights(now_s)

    def _pull(self, peer: bytes, pull: Pull, now_s: float) -> list[Reply]:
        time_s = self._clock.advance(now_s)
        for client in pull.seats_for:
            self._membership.renew(client, time_s)
        state = self._store.snapshot.state
        held = Held(peer=peer, pull=pull, state=state, asked_s=now_s, until_s=now_s + self._hold_s)
        self._held.add(held)
        is_learner = self._views is not None and self._views.attends(pull.sender)
        if is_learner and pull.have_version < self._store.snapshot.version:
            return [self._answer(held, since_s=now_s, with_weights=True)]
        replies = self._send_weights(now_s)
        if self._held.get(peer) is held and self._is_told_more(held):
            replies.append(self._answer(held, since_s=now_s))
        return replies

    def _is_told_more(self, held: Held) -> bool:
        """There is news for it beside weights."""
        snapshot = self._store.snapshot
        if snapshot.state != held.state:
            return True
        if snapshot.told_generation not in (NO_GENERATION, held.pull.generation):
            return True
        return any(
            self._membership.seat_of(client) not in (client.seat, NO_SEAT) for client in held.pull.seats_for
        )

    def _send_weights(self, now_s: float) -> list[Reply]:
        """To those who lack the newest, as far as there is room."""
        snapshot = self._store.snapshot
        size = 0 if snapshot.payload is None else memoryview(snapshot.payload).nbytes
        replies = []
        while self._window.has_room(size):
            held = self._held.furthest_behind(snapshot.version)
            if held is None:
                break
            self._window.begin(held.peer, size, now_s)
            since_s = max(held.asked_s, self._version_s)
            replies.append(self._answer(held, since_s=since_s, with_weights=True))
        return replies

    def _answer(self, held: Held, since_s: float | None, *, with_weights: bool = False) -> Reply:
        self._held.remove(held.peer)
        snapshot = self._store.snapshot
        weights = Weights(
            run_id=self._run_id,
            server_incarnation=self._incarnation,
            state=snapshot.state,
            version=snapshot.version,
            steps=snapshot.steps,
            seats=tuple(self._membership.seat_of(client) for client in held.pull.seats_for),
            payload=snapshot.payload if with_weights else None,
            generation=snapshot.told_generation,
            learners=snapshot.learners,
            request=held.pull.request,
        )
        result = "full" if with_weights else "not_modified"
        return Reply(peer=held.peer, frames=encode(weights), result=result, since_s=since_s)

    def _publish(self, peer: bytes, publish: Publish, now_s: float) -> list[Reply]:
        if self._views is None:
            return self._refuse(peer, "relay", "publish to the parameter server, not to a relay", now_s)
        snapshot, leader = self._store.snapshot, self._views.members[:1]
        answers: list[Reply] = []
        sender = publish.sender
        if leader and (sender.client_id, sender.incarnation) != (leader[0].client_id, leader[0].incarnation):
            text = f"{sender.client_id} published version {publish.version}, {leader[0].client_id} leads"
            self._count_refused("not_leader", text)
        elif publish.version < snapshot.version:
            text = f"version {publish.version} was published, {snapshot.version} is held"
            self._count_refused("stale", text)
        else:
            is_over = not leader and snapshot.state == "complete" and publish.version == snapshot.version
            offered = Snapshot(
                version=publish.version,
                steps=publish.steps,
                state="complete" if is_over else publish.state,
                payload=publish.payload,
            )
            answers = self.offer(offered, now_s)
            self._note_publisher(publish)
        return [self._to(peer, self._published()), *answers]

    def _note_publisher(self, publish: Publish) -> None:
        """One line when another learner leads, or its next life; none for a former one that lags behind."""
        if publish.sender != self._publisher:
            self._publisher = publish.sender
            self._log.info("publisher", client=publish.sender.client_id, policy_version=publish.version)

    def _published(self) -> Published:
        return Published(
            run_id=self._run_id,
            server_incarnation=self._incarnation,
            version=self._store.snapshot.version,
        )

    def _attend(self, peer: bytes, attend: Attend, now_s: float) -> list[Reply]:
        if self._views is None:
            return self._refuse(peer, "relay", "attend at the parameter server, not at a relay", now_s)
        if self._views.attend(attend, now_s):
            answers = [self._to(peer, self._view(self._views))]
        else:
            waits = self._views.is_about_to_be_given_more
            reason, text = ("config_wait", NOT_YET) if waits else ("config", OTHER_CONFIG)
            answers = self._refuse(peer, reason, text, now_s)
        return [*answers, *self._tell_of(self._views, now_s)]

    def _view(self, views: Views) -> View:
        return View(
            run_id=self._run_id,
            server_incarnation=self._incarnation,
            generation=views.generation,
            members=views.members,
            holder=views.holder,
            version=self._store.snapshot.version,
            num_seats=len(self._membership),
        )

    def _tell_of(self, views: Views, now_s: float) -> list[Reply]:
        """Answers for all to whom the learners' group is news."""
        self._metrics.learners.set(len(views))
        if not views.members or views.generation == self._store.snapshot.told_generation:
            return []
        learners = tuple(Destination(endpoint=m.endpoint, since=m.since) for m in views.members)
        return self.offer(replace(EMPTY, generation=views.generation, learners=learners), now_s)

    def _goodbye(self, peer: bytes, goodbye: Goodbye) -> list[Reply]:
        self._membership.release(goodbye.sender)
        held = self._held.get(peer)
        # A relay passes goodbyes on, and its own request stays open.
        if held is not None and held.pull.sender.client_id == goodbye.sender.client_id:
            self._held.remove(peer)
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


def _forbidden(message: Message, role: str) -> str | None:
    """Who may ask for this, where ``role`` may not; None where it may."""
    match message:
        case Publish() if role != "learner":
            return "a learner may publish"
        case Attend() if role != "learner":
            return "a learner may attend"
        case Pull() if role == "actor" and any(client != message.sender for client in message.seats_for):
            return "a relay may ask for the seats of others"
        case Pull() if role not in ("actor", "paramserver") and message.seats_for:
            return "an actor or a relay may ask for seats"
        case Goodbye() if role not in ("actor", "paramserver"):
            return "an actor or a relay may give seats back"
    return None
