"""Many clients in few processes: to the parameter server and the learner each of them is an actor.

Every client has an actor's sockets, its handshakes, its long poll with the lease of a seat, and sends
rollouts that were recorded once, under its own name, sequence and the policy version that it holds, to the
learners of which it is told. One thread turns all clients of a process, because what is measured is the
other side. ``fleet`` starts swarms and reads what they report; weights are taken, timed and thrown away.
Never torch.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import zmq

from services.ops.pod import raise_file_limit
from services.wire import codec
from services.wire.keys import Keys, load_keys
from services.wire.messages import (
    NO_GENERATION,
    NO_SEAT,
    NO_VERSION,
    Buffer,
    Client,
    Destination,
    Goodbye,
    Pull,
    Refusal,
    Rollout,
    Weights,
)
from services.wire.sockets import Requester, RolloutSender, finish, wait
from services.wire.subscriber import BACK_OFF_S

CLIENTS_PER_PROCESS = 128
SOCKETS_PER_CLIENT = 16
"""Two, each with both ends of its monitor, and as many again that libzmq has yet to take apart."""
TURN_S = 0.01
"""How often a client whose learner had no room tries again."""
BURST = 16
"""Rollouts that a client without a rate sends in a turn, if there is room; then come the others."""
PROGRESS_S = 0.1
REFUSED_PAUSE_S = 2.0
GOODBYES_S = 1.0
END_S = 20.0
CONNECT, LEAVE = "connect", "leave"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The system under load, and how its actors behave."""

    paramservers: Sequence[str]
    """The parameter server, or its relays, over which the clients are spread."""
    sends: bool
    """Rollouts; or else it only asks for weights."""
    keys: Path | None
    run_id: str
    max_message_bytes: int
    send_queue: int
    hold_s: float
    weights_interval_s: float
    rollouts_per_second: float | None
    """Of each client; None is as many as the learner takes."""


@dataclass(slots=True, kw_only=True)
class Record:
    """What one client has lived through. Times are of the monotonic clock, which all processes share."""

    name: str
    answered_s: float = math.inf
    """When the parameter server first answered: the handshake with it is complete."""
    seated_s: float = math.inf
    weights_s: float = math.inf
    sent_s: float = math.inf
    """When the first rollout left, which it does only after the handshake with the learner."""
    versions: list[tuple[float, int]] = field(default_factory=list)
    """When which policy version arrived."""
    sent: int = 0
    seats_lost: int = 0
    reconnects: int = 0
    troubles: set[str] = field(default_factory=set)

    @property
    def ready_s(self) -> float:
        """When it had what an actor needs to begin."""
        return max(self.seated_s, self.weights_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of some clients at one moment."""

    ready: int
    sending: int
    sent: int
    oldest_version: int
    """That any of them holds."""


class Impostor:
    """One client. ``turn_weights`` and ``turn_rollouts`` never wait."""

    def __init__(
        self, name: str, target: Target, keys: Keys | None, rollouts: Sequence[Rollout], number: int
    ) -> None:
        """``number`` decides whom it asks for weights, and which recorded rollout is its first."""
        self.record = Record(name=name)
        self.version = NO_VERSION
        self._target = target
        self._paramserver = target.paramservers[number % len(target.paramservers)]
        self._keys = keys
        self._client = Client(client_id=name, incarnation=time.time_ns())
        self._expected = codec.Expected(run_id=target.run_id, max_message_bytes=target.max_message_bytes)
        self._rollouts = rollouts
        self._next = number
        self._training = False
        self._asked_s = -math.inf
        self._asking = True
        """The request is not on its way yet."""
        self._pause_until_s = -math.inf
        self._silences = 0
        self._generation = NO_GENERATION
        self._learners: tuple[Destination, ...] = ()
        self._send_at_s = -math.inf
        self._sender: RolloutSender | None = None
        self.requester = self._connect()

    def _connect(self) -> Requester:
        self._asking = True
        return Requester(self._paramserver, self._target.max_message_bytes, self._keys)

    def turn_weights(self, now_s: float) -> None:
        """Ask for weights and the seat, or take the answer, as ``wire.subscriber`` does."""
        if now_s < self._pause_until_s:
            return
        if self._asking:
            if self.requester.send(codec.encode(self._request()), 0.0):
                self._asking, self._asked_s = False, now_s
        else:
            frames = self.requester.receive(0.0)
            if frames is not None:
                self._take(frames, now_s)
                self._asking, self._silences = True, 0
                self._pause_until_s = max(
                    self._pause_until_s, self._asked_s + self._target.weights_interval_s
                )
                return
        if self._asking:
            return  # the socket itself goes on trying
        if now_s > self._asked_s + 2 * self._target.hold_s:
            self.record.troubles.add(self.requester.trouble or "parameter server does not answer")
            self.record.reconnects += 1
            self.requester.close()
            self.requester = self._connect()
            longest_s = min(self._target.hold_s * 2**self._silences, BACK_OFF_S)
            self._pause_until_s = now_s + random.uniform(0.0, longest_s)
            self._silences += 1

    def turn_rollouts(self, now_s: float) -> None:
        """Send what is due, as far as a learner has room."""
        if self._sender is None or not self._training:
            return
        rate = self._target.rollouts_per_second
        if rate is None:
            for _ in range(BURST):
                if not self._send(now_s):
                    return
        elif now_s >= self._send_at_s and self._send(now_s):
            self._send_at_s = max(self._send_at_s, now_s - 1 / rate) + 1 / rate

    def _send(self, now_s: float) -> bool:
        """The next rollout; False if no learner had room."""
        assert self._sender is not None
        learner = self._sender.choose(0.0)
        if learner is None or not learner.send(codec.encode(self._rollout(learner.sequence))):
            return False
        self._next += 1
        self.record.sent += 1
        self.record.sent_s = min(self.record.sent_s, now_s)
        return True

    def leave(self) -> None:
        """Give the seat back."""
        farewell = Goodbye(run_id=self._target.run_id, sender=self._client)
        self.requester.send(codec.encode(farewell), 0.0)
        self.requester.close(linger_s=0.5)
        if self._sender is not None:
            if self._sender.trouble:
                self.record.troubles.add(self._sender.trouble)
            self._sender.close()

    def _request(self) -> Pull:
        return Pull(
            run_id=self._target.run_id,
            sender=self._client,
            have_version=self.version,
            seats_for=(self._client,),
            generation=self._generation,
        )

    def _take(self, frames: list[Buffer], now_s: float) -> None:
        record = self.record
        record.answered_s = min(record.answered_s, now_s)
        try:
            reply = codec.decode(frames, self._expected)
        except codec.WireError as error:
            reply = Refusal(reason=error.reason, text=str(error))
        if not isinstance(reply, Weights):
            record.troubles.add(reply.text if isinstance(reply, Refusal) else type(reply).__name__)
            self._pause_until_s = now_s + REFUSED_PAUSE_S
            return
        self._training = reply.state == "training"
        if reply.generation != NO_GENERATION:
            self._generation, self._learners = reply.generation, reply.learners
        if reply.payload is not None:
            self.version = reply.version
            record.weights_s = min(record.weights_s, now_s)
            record.versions.append((now_s, reply.version))
        (seat,) = reply.seats
        record.seats_lost += seat == NO_SEAT and self._client.seat != NO_SEAT
        if seat != NO_SEAT:
            record.seated_s = min(record.seated_s, now_s)
            self._client = replace(self._client, seat=seat)
        if self._target.sends and record.ready_s <= now_s:
            if self._sender is None:
                self._sender = RolloutSender(
                    self._target.send_queue, self._target.max_message_bytes, self._keys
                )
            self._sender.follow(self._learners)

    def _rollout(self, sequence: int) -> Rollout:
        """A recorded one under our name: only the header is encoded anew."""
        recorded = self._rollouts[self._next % len(self._rollouts)]
        return replace(
            recorded,
            run_id=self._target.run_id,
            actor_id=self._client.client_id,
            incarnation=self._client.incarnation,
            sequence=sequence,
            policy_version=self.version,
        )


def live(numbers: Sequence[int], target: Target, rollouts: Sequence[Rollout], link: Connection) -> None:
    """The body of a process: ready, wait for the word, connect all at once, serve until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops us
    zmq.Context.instance().set(zmq.MAX_SOCKETS, SOCKETS_PER_CLIENT * CLIENTS_PER_PROCESS)
    raise_file_limit()
    keys = load_keys(target.keys, "actor")
    link.send(None)
    try:
        if link.recv() != CONNECT:
            return
        clients = [Impostor(f"fleet-{number}", target, keys, rollouts, number) for number in numbers]
        _turn(clients, link)
        for client in clients:
            client.leave()
        finish(GOODBYES_S)
        link.send([client.record for client in clients])
    except (EOFError, BrokenPipeError):
        return  # the parent is gone


def _turn(clients: Sequence[Impostor], link: Connection) -> None:
    """Until the parent says something."""
    rollouts_at_s = progress_at_s = -math.inf
    while not link.poll():
        wait([client.requester for client in clients], TURN_S)
        now_s = time.monotonic()
        for client in clients:
            client.turn_weights(time.monotonic())
        if now_s >= rollouts_at_s:
            rollouts_at_s = now_s + TURN_S
            for client in clients:
                client.turn_rollouts(now_s)
        if now_s >= progress_at_s:
            progress_at_s = now_s + PROGRESS_S
            link.send(
                Progress(
                    ready=sum(math.isfinite(client.record.ready_s) for client in clients),
                    sending=sum(client.record.sent > 0 for client in clients),
                    sent=sum(client.record.sent for client in clients),
                    oldest_version=min(client.version for client in clients),
                )
            )


class Swarm:
    """All clients. Nobody connects before ``connect``."""

    def __init__(self, num_clients: int, target: Target, rollouts: Sequence[Rollout]) -> None:
        """Start the processes and wait until they are there."""
        numbers = range(num_clients)
        spawn = multiprocessing.get_context("spawn")
        self._links: list[Connection] = []
        self._processes = []
        self._latest: dict[int, Progress] = {}
        try:
            with _deaf_to_interrupts():
                for start in range(0, num_clients, CLIENTS_PER_PROCESS):
                    ours, theirs = spawn.Pipe()
                    process = spawn.Process(
                        target=live,
                        args=(numbers[start : start + CLIENTS_PER_PROCESS], target, rollouts, theirs),
                        daemon=True,
                    )
                    process.start()
                    theirs.close()
                    self._links.append(ours)
                    self._processes.append(process)
            for link in self._links:
                link.recv()
        except BaseException:
            self.kill()
            raise

    def connect(self) -> float:
        """All of them, now: this is when."""
        for link in self._links:
            link.send(CONNECT)
        return time.monotonic()

    def progress(self) -> Progress:
        """The latest that all processes have told."""
        for number, link in enumerate(self._links):
            try:
                while link.poll():
                    self._latest[number] = link.recv()
            except EOFError:
                raise RuntimeError("a process of clients has died; its last words are above") from None
        told = self._latest.values()
        return Progress(
            ready=sum(each.ready for each in told),
            sending=sum(each.sending for each in told),
            sent=sum(each.sent for each in told),
            oldest_version=min((each.oldest_version for each in told), default=NO_VERSION)
            if len(self._latest) == len(self._links)
            else NO_VERSION,
        )

    def leave(self) -> list[Record]:
        """Say goodbye with all of them, and end the processes."""
        for link in self._links:
            with contextlib.suppress(BrokenPipeError):
                link.send(LEAVE)
        records: list[Record] = []
        for link in self._links:
            records += self._last_words(link)
        for process in self._processes:
            process.join(END_S)
        self.kill()
        return records

    def kill(self) -> None:
        """End whatever is left; does nothing after ``leave``."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for link in self._links:
            link.close()

    def _last_words(self, link: Connection) -> list[Record]:
        with contextlib.suppress(EOFError, ConnectionResetError):
            while link.poll(END_S):
                said = link.recv()
                if isinstance(said, list):
                    return said
        return []


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started here never see Ctrl-C, not even before their first line."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
