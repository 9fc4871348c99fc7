"""A parameter server (or relay) without sockets: every message crosses the codec in both directions."""

from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import CollectorRegistry

from services.ops.metrics import ParamserverMetrics
from services.paramserver.membership import RelayedSeats, Seats
from services.paramserver.relay import Relay
from services.paramserver.server import Reply, Server
from services.paramserver.store import EMPTY, Snapshot, Store
from services.wire.codec import Expected, decode, encode
from services.wire.messages import (
    Buffer,
    Client,
    Goodbye,
    Message,
    Publish,
    Published,
    Pull,
    RunState,
    Weights,
)

T = TypeVar("T", bound=Message)

RUN = "run"
HOLD_S = 3.0
LEASE_S = 30.0
LIMIT = 1 << 20
EXPECTED = Expected(run_id=RUN, max_message_bytes=LIMIT)
LEARNER = Client(client_id="learner-0", incarnation=1)


def client(name: str, incarnation: int = 1, seat: int = -1) -> Client:
    return Client(client_id=name, incarnation=incarnation, seat=seat)


def pull(who: Client, have_version: int = -1, *, wants_seat: bool = True, request: int = 0) -> Pull:
    seats_for = (who,) if wants_seat else ()
    return Pull(run_id=RUN, sender=who, have_version=have_version, seats_for=seats_for, request=request)


def publish(version: int, payload: bytes | None = b"weights", state: RunState = "training") -> Publish:
    return Publish(
        run_id=RUN,
        sender=LEARNER,
        state=state,
        version=version,
        steps=version * 640,
        payload=payload,
    )


def cross(frames: list[Buffer]) -> list[Buffer]:
    """Over the network: the same bytes in other memory."""
    return [bytes(frame) for frame in frames]


@dataclass
class Node:
    """A server with its clock, and everything it sent, decoded, by peer."""

    server: Server
    store: Store
    registry: CollectorRegistry
    relay: Relay | None = None
    now_s: float = 100.0
    sent: dict[bytes, list[Message]] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    raw: dict[bytes, list[list[Buffer]]] = field(default_factory=dict)

    def receive(self, peer: bytes, frames: list[Buffer]) -> None:
        self.note(self.server.handle(peer, cross(frames), self.now_s))

    def ask(self, peer: bytes, message: Message) -> list[Message]:
        """What ``peer`` is told at once."""
        self.receive(peer, encode(message))
        return self.take(peer)

    def pull(self, peer: bytes, message: Pull) -> Weights | None:
        answers = self.ask(peer, message)
        assert len(answers) <= 1
        return only(Weights, answers) if answers else None

    def publish(self, message: Publish, peer: bytes = b"learner") -> Published:
        return only(Published, self.ask(peer, message))

    def goodbye(self, peer: bytes, who: Client) -> None:
        assert self.ask(peer, Goodbye(run_id=RUN, sender=who)) == []

    def pass_time(self, seconds: float) -> None:
        """All at once; the server is asked before and at the end."""
        self.now_s += seconds
        self.note(self.server.tick(self.now_s))

    def take(self, peer: bytes) -> list[Message]:
        """What was sent to ``peer`` since the last call."""
        self.raw.pop(peer, None)
        return self.sent.pop(peer, [])

    def note(self, replies: list[Reply]) -> None:
        self.replies += replies
        for reply in replies:
            frames = cross(reply.frames)
            self.raw.setdefault(reply.peer, []).append(frames)
            self.sent.setdefault(reply.peer, []).append(decode(frames, EXPECTED))

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"impala_paramserver_{name}", labels) or 0.0


def only(kind: type[T], messages: list[Message]) -> T:
    (message,) = messages
    assert isinstance(message, kind), message
    return message


def root(snapshot: Snapshot = EMPTY, incarnation: int = 77, num_seats: int = 100) -> Node:
    registry = CollectorRegistry()
    store = Store(snapshot)
    server = Server(
        run_id=RUN,
        incarnation=incarnation,
        hold_s=HOLD_S,
        max_message_bytes=LIMIT,
        store=store,
        membership=Seats(LEASE_S, num_seats),
        metrics=ParamserverMetrics(registry),
    )
    return Node(server=server, store=store, registry=registry)


def relay(name: str = "relay-0", incarnation: int = 88) -> Node:
    registry = CollectorRegistry()
    store = Store()
    seats = RelayedSeats(LEASE_S)
    server = Server(
        run_id=RUN,
        incarnation=incarnation,
        hold_s=HOLD_S,
        max_message_bytes=LIMIT,
        store=store,
        membership=seats,
        metrics=ParamserverMetrics(registry),
        takes_publishes=False,
    )
    upstream = Relay(
        client=client(name),
        run_id=RUN,
        hold_s=HOLD_S,
        max_message_bytes=LIMIT,
        store=store,
        seats=seats,
        server=server,
    )
    return Node(server=server, store=store, registry=registry, relay=upstream)


def connect(below: Node, above: Node, peer: bytes = b"relay") -> int:
    """Carry messages between a relay and its upstream until both are silent; how many requests went up."""
    assert below.relay is not None
    carried = 0
    for _ in range(100):
        requests = below.relay.requests(below.now_s)
        for frames in requests:
            above.receive(peer, frames)
        answers = above.raw.get(peer, [])
        above.take(peer)
        for frames in answers:
            below.note(below.relay.handle(frames, below.now_s))
        carried += len(requests)
        if not requests and not answers:
            return carried
    raise AssertionError("relay and upstream talk without end")
