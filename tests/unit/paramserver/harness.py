"""A parameter server (or relay) without sockets: every message crosses the codec in both directions."""

from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import CollectorRegistry

from services.ops.metrics import ParamserverMetrics
from services.paramserver.clock import LONGEST_TURN_S
from services.paramserver.membership import RelayedSeats, Seats
from services.paramserver.relay import Relay
from services.paramserver.server import Reply, Server
from services.paramserver.store import EMPTY, Snapshot, Store
from services.paramserver.views import Views
from services.wire.codec import Expected, decode, encode
from services.wire.messages import (
    NO_GENERATION,
    Attend,
    Buffer,
    Client,
    Goodbye,
    Message,
    Phase,
    Publish,
    Published,
    Pull,
    RunState,
    View,
    Weights,
)

T = TypeVar("T", bound=Message)

RUN = "run"
HOLD_S = 3.0
LEASE_S = 30.0
LEARNER_LEASE_S = 5.0
LIMIT = 1 << 20
EXPECTED = Expected(run_id=RUN, max_message_bytes=LIMIT)
LEARNER = Client(client_id="learner-0", incarnation=1)


def client(name: str, incarnation: int = 1, seat: int = -1) -> Client:
    return Client(client_id=name, incarnation=incarnation, seat=seat)


def pull(
    who: Client,
    have_version: int = -1,
    *,
    wants_seat: bool = True,
    generation: int = NO_GENERATION,
    request: int = 0,
) -> Pull:
    return Pull(
        run_id=RUN,
        sender=who,
        have_version=have_version,
        seats_for=(who,) if wants_seat else (),
        generation=generation,
        request=request,
    )


def publish(version: int, payload: bytes | None = b"weights", state: RunState = "training") -> Publish:
    return Publish(
        run_id=RUN,
        sender=LEARNER,
        state=state,
        version=version,
        steps=version * 640,
        payload=payload,
    )


def attend(
    name: str = "learner-0",
    phase: Phase = "standing",
    *,
    incarnation: int = 1,
    generation: int = NO_GENERATION,
    version: int = 1,
    has_trained: bool = False,
    rank: int = 0,
    world_size: int = 1,
    since: int = NO_GENERATION,
    config: str = "",
) -> Attend:
    return Attend(
        run_id=RUN,
        sender=client(name, incarnation),
        endpoint=f"tcp://{name}:5555",
        phase=phase,
        generation=generation,
        version=version,
        has_trained=has_trained,
        store=f"{name}:{incarnation}" if phase == "standing" else "",
        rank=rank,
        world_size=world_size,
        since=since,
        config=config,
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

    def attend(self, message: Attend) -> View:
        return only(View, self.ask(message.sender.client_id.encode(), message))

    def goodbye(self, peer: bytes, who: Client) -> None:
        assert self.ask(peer, Goodbye(run_id=RUN, sender=who)) == []

    def pass_time(self, seconds: float) -> None:
        """Turn by turn of the loop."""
        end_s = self.now_s + seconds
        while self.now_s + LONGEST_TURN_S / 2 < end_s:
            self.now_s += LONGEST_TURN_S / 2
            self.note(self.server.tick(self.now_s))
        self.now_s = end_s
        self.note(self.server.tick(self.now_s))

    def freeze(self, seconds: float) -> None:
        """The process stops, and its next turn is late."""
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


def root(
    snapshot: Snapshot = EMPTY, incarnation: int = 77, num_seats: int = 100, min_learners: int = 1
) -> Node:
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
        views=Views(generation=snapshot.generation, lease_s=LEARNER_LEASE_S, min_learners=min_learners),
    )
    return Node(server=server, store=store, registry=registry)


def relay(name: str = "relay-0", incarnation: int = 88, hold_s: float = HOLD_S) -> Node:
    registry = CollectorRegistry()
    store = Store()
    seats = RelayedSeats(LEASE_S)
    server = Server(
        run_id=RUN,
        incarnation=incarnation,
        hold_s=hold_s,
        max_message_bytes=LIMIT,
        store=store,
        membership=seats,
        metrics=ParamserverMetrics(registry),
        views=None,
    )
    upstream = Relay(
        client=client(name),
        run_id=RUN,
        hold_s=hold_s,
        max_message_bytes=LIMIT,
        store=store,
        seats=seats,
        server=server,
    )
    return Node(server=server, store=store, registry=registry, relay=upstream)


def requests_of(node: Node) -> list[list[Buffer]]:
    """What a relay sends upstream now, where there is room for all of it."""
    assert node.relay is not None
    pull = node.relay.pull(node.now_s)
    return ([] if pull is None else [pull]) + list(node.relay.goodbyes())


def connect(below: Node, above: Node, peer: bytes = b"relay") -> int:
    """Carry messages between a relay and its upstream until both are silent; how many requests went up."""
    assert below.relay is not None
    carried = 0
    for _ in range(100):
        requests = requests_of(below)
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
