"""Keeps the newest weights at hand: a thread that always has one request open at the parameter server.

After it comes whoever plays, an actor between two unrolls or an evaluator between two rounds: it takes what
is ``newest`` and never waits for the network. The request also renews an actor's seat, and its answer brings
the state of the run and where rollouts go. A missing, restarted or incompatible server is waited for, with
jitter and with one log line now and then. What the weights are is for ``decode`` to know: nothing here
reaches torch.

A server that is not there, or has not ended the handshake yet, is left to the socket, which tries again by
itself for a minute: who began anew would take the last place in a queue of a thousand. Apart from that only a
request that has left and is not answered ends a connection, which may lead to a machine that is gone. If the
connection itself breaks, as that to a server that dies does, the request is sent again as soon as there is
another one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from services.ops.logging import get_logger
from services.wire import codec
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
    RunState,
    Weights,
)
from services.wire.sockets import RENEW_S, Requester

POLL_S = 0.25
REFUSED_PAUSE_S = 2.0
BACK_OFF_S = 10.0
"""The longest pause after a silence."""
THANKS_S = 0.25
"""The longest pause without thanks, until which the server takes the weights for still on their way."""
THANKS = 1
"""The number of the request that only says so; all others are 0."""
LOST_S = 60.0
"""After which a socket that was never connected is exchanged: longer than a thousand handshakes take."""
BEHIND_S = 10.0
"""A restarted server holds less than its actors until the learner publishes again, which takes 2 s."""

T = TypeVar("T")

_log = get_logger("weights").limited(10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Generic[T]):
    """One policy version."""

    version: int
    steps: int
    """Agent steps trained when this version was made."""
    weights: T
    """As ``decode`` made them."""
    received_s: float
    """time.monotonic() of its arrival."""


class Subscriber(Generic[T]):
    """Written by its own thread (``run``), read by any other: every attribute is swapped whole."""

    def __init__(
        self,
        *,
        connect: Callable[[], Requester],
        client: Client,
        expected: codec.Expected,
        decode: Callable[[bytes], T],
        wants_seat: bool,
        hold_s: float,
        interval_s: float,
        stopping: threading.Event,
    ) -> None:
        """``decode`` raises ValueError for what is not acceptable, and ``connect`` OSError if there is no
        file descriptor left, which is waited out. Who wants no seat waits for none.
        """
        self._connect = connect
        self._client = client
        self._expected = expected
        self._decode = decode
        self._wants_seat = wants_seat
        self._hold_s = hold_s
        self._patience_s = 2 * hold_s
        self._silences = 0
        """Since the last answer."""
        self._interval_s = interval_s
        self._stopping = stopping
        self._seated = threading.Event()
        if not wants_seat:
            self._seated.set()
        self._arrived = threading.Event()
        self._behind_since_s: float | None = None
        self._generation = NO_GENERATION
        self.newest: Snapshot[T] | None = None
        self.state: RunState = "waiting"
        self.learners: tuple[Destination, ...] = ()
        """Where rollouts go, as far as is known."""
        self.trouble: str | None = "no answer from the parameter server yet"
        """In a few words why there is no news, or None."""

    @property
    def seat(self) -> int:
        """The leased seat, or NO_SEAT."""
        return self._client.seat

    def missing(self) -> str | None:
        """In a few words what there is to wait for before anything can be played, or None."""
        if self.newest is None:
            return self.trouble or "no weights have been published yet"
        return self.trouble or "no seat is free" if not self._seated.is_set() else None

    def age_s(self) -> float:
        """Time since the newest weights arrived; 0 before any have."""
        newest = self.newest
        return time.monotonic() - newest.received_s if newest else 0.0

    def wait(self, timeout_s: float) -> Snapshot[T] | None:
        """The newest weights once there are any and a wanted seat is leased, or None after ``timeout_s``."""
        deadline_s = time.monotonic() + timeout_s
        ready = self._seated.wait(timeout_s) and self._arrived.wait(max(0.0, deadline_s - time.monotonic()))
        return self.newest if ready else None

    def run(self) -> None:
        """Ask, wait, ask again, until the pod stops; then say goodbye."""
        while not self._stopping.is_set():
            try:
                requester = self._connect()
            except OSError as error:
                self._trouble(f"cannot ask the parameter server: {error}")
            else:
                with requester:
                    self._converse(requester)
            # Whom one silence met together does not come back together.
            longest_s = min(self._hold_s * 2 ** min(self._silences, 8), BACK_OFF_S)
            self._stopping.wait(random.uniform(0.0, longest_s))
            self._silences += 1

    def _converse(self, requester: Requester) -> None:
        """Until the server falls silent or the pod stops."""
        while not self._stopping.is_set():
            had = self.newest
            breaks = self._ask(requester)
            if breaks is None:
                return
            asked_s = time.monotonic()
            if not self._await_reply(requester, asked_s, breaks):
                return
            pause_s = self._interval_s - (time.monotonic() - asked_s)
            if self.newest is not had and pause_s > THANKS_S:
                requester.send(codec.encode(self._thanks()), 0.0)
            self._stopping.wait(max(0.0, pause_s))
        if self._wants_seat:  # otherwise an actor of the same name would lose its seat
            farewell = Goodbye(run_id=self._expected.run_id, sender=self._client)
            requester.send(codec.encode(farewell), 0.0)
        requester.close(linger_s=0.5)

    def _ask(self, requester: Requester) -> int | None:
        """As soon as the server is there. How often the connection had broken by then.

        None if the pod stops before, or if no connection is made for too long.
        """
        frames = codec.encode(self._request())
        began_s = time.monotonic()
        while True:
            breaks = requester.breaks
            if requester.send(frames, POLL_S):
                return breaks
            self._trouble(requester.trouble or "parameter server not reachable")
            longest_s = RENEW_S if breaks else LOST_S
            if self._stopping.is_set() or time.monotonic() - began_s > longest_s:
                return None

    def _request(self) -> Pull:
        have = self.newest.version if self.newest and not self._is_behind() else NO_VERSION
        return Pull(
            run_id=self._expected.run_id,
            sender=self._client,
            have_version=have,
            seats_for=(self._client,) if self._wants_seat else (),
            generation=self._generation,
        )

    def _thanks(self) -> Pull:
        """A request to which no weights are the answer; the next one takes its place."""
        return replace(self._request(), have_version=codec.MAX_COUNT - 1, request=THANKS)

    def _is_behind(self) -> bool:
        """The server has held less than we do for so long that its run must have gone back."""
        return self._behind_since_s is not None and time.monotonic() - self._behind_since_s > BEHIND_S

    def _await_reply(self, requester: Requester, asked_s: float, breaks: int) -> bool:
        """False if the server is silent; ``breaks`` are those of before the request."""
        while not self._stopping.is_set():
            frames = requester.receive(POLL_S)
            if frames is not None:
                self._silences = 0
                if self._take(frames):
                    return True
            elif requester.breaks != breaks:
                self._trouble("parameter server has gone")
                return True
            if time.monotonic() - asked_s > self._patience_s:
                self._trouble("parameter server does not answer")
                return False
        return True

    def _take(self, frames: list[Buffer]) -> bool:
        """Whether this answers the request, and not the thanks before it."""
        try:
            reply = codec.decode(frames, self._expected)
            if isinstance(reply, Refusal):
                self._trouble(f"parameter server refuses: {reply.text}")
                self._stopping.wait(REFUSED_PAUSE_S * random.uniform(0.5, 1.5))
            elif isinstance(reply, Weights):
                self._accept(reply)
                return reply.request != THANKS
            else:
                self._trouble(f"unusable reply: {type(reply).__name__}")
        except ValueError as error:  # WireError is one too
            self._trouble(f"unusable reply: {error}")
            self._stopping.wait(REFUSED_PAUSE_S * random.uniform(0.5, 1.5))
        return True

    def _accept(self, reply: Weights) -> None:
        if reply.generation != NO_GENERATION:  # or else the server does not know yet who is there
            self._generation = reply.generation
            self.learners = reply.learners
        if reply.payload is not None:
            self.newest = Snapshot(
                version=reply.version,
                steps=reply.steps,
                weights=self._decode(bytes(reply.payload)),
                received_s=time.monotonic(),
            )
            self._arrived.set()
        if reply.seats and reply.seats[0] == NO_SEAT and self.seat != NO_SEAT:
            _log.warning("seat_lost", reason="is another actor of this run called the same?")
        if reply.seats and reply.seats[0] != NO_SEAT:
            self._client = replace(self._client, seat=reply.seats[0])
            self._seated.set()
        if self.newest is None or reply.version >= self.newest.version:
            self._behind_since_s = None
        elif self._behind_since_s is None:
            self._behind_since_s = time.monotonic()
        self.state = reply.state
        self.trouble = None

    def _trouble(self, text: str) -> None:
        self.trouble = text
        _log.warning("no_news", reason=text)
