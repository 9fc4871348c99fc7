"""Who may connect: the doorkeeper of a socket that listens, and what a client learns of its handshakes.

CURVE encrypts a connection and proves to each side which key the other one holds (``keys``). Without keys
nothing here encrypts or refuses, but connections that are no ZeroMQ are counted all the same.

The ``Doorkeeper`` answers libzmq's question whether a key is welcome (ZAP), and with the role that it
belongs to, which every message from there then carries. pyzmq brings an authenticator too: it knows users by
their key, never sees a handshake that ended before the question (as that of a peer without keys does), and
nobody would notice the death of its thread.
"""

from __future__ import annotations

import errno
import itertools
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

import zmq

from services.ops.logging import get_logger
from services.wire.arrivals import Arrivals
from services.wire.keys import Keys

Refused = Literal["unknown_key", "handshake"]
"""The server knows nobody by this key; or the handshake did not come to an end: no keys, keys for another
server, no ZeroMQ, or nothing said for ``HANDSHAKE_S``."""

HANDSHAKE_S = 10
"""After which libzmq closes a connection whose handshake has not ended."""
ZAP = "inproc://zeromq.zap.01"
"""Where libzmq asks, one in a process."""
TURN_S = 0.5
MOST_AT_ONCE = 1000
"""Of what there is to do in a turn, so that no flood keeps one from its end."""
LOG_INTERVAL_S = 10.0
LOOK_S = 0.25
"""How often a client that sends looks whether it was refused: looking takes as long as sending."""

_log = get_logger("wire").limited(LOG_INTERVAL_S)
_names = itertools.count()


# --- who listens -------------------------------------------------------------------------------------


class Doorkeeper:
    """Of the one socket at which a pod listens: a thread of its own, so that no load delays an answer.

    What arrives here comes from libzmq, in the shape that libzmq gives it: a peer's part in it is its key.
    Nothing that a peer does is waited for. One thread may construct and close it, another one run it.
    """

    def __init__(self, keys: Keys | None, count: Callable[[Refused], None]) -> None:
        self._keys = keys
        self._count = count
        self._admitted = keys.admitted() if keys is not None else {}
        self._questions: zmq.Socket[bytes] | None = None
        self._events: Events | None = None
        self._arrivals = Arrivals(HANDSHAKE_S + 1, address_of)
        self._why = ""
        self._log = get_logger("door").limited(LOG_INTERVAL_S)

    def guard(self, socket: zmq.Socket[bytes]) -> bool:
        """Before ``socket`` binds. Whether its messages will tell the role of their sender."""
        self._events = Events(
            socket,
            zmq.EVENT_ACCEPTED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
        )
        if self._keys is None:
            return False
        self._questions = zmq.Context.instance().socket(zmq.REP)
        self._questions.setsockopt(zmq.LINGER, 0)
        self._questions.bind(ZAP)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, self._keys.role.encode())
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody there to ask means no, not yes
        return True

    def run(self, stopping: threading.Event) -> None:
        """Until ``stopping``. Nobody is let in any more after that."""
        while not stopping.is_set():
            self.turn(TURN_S)

    def turn(self, timeout_s: float) -> None:
        """Wait for something to do, and do it."""
        assert self._events is not None
        poller = zmq.Poller()
        poller.register(self._events.socket, zmq.POLLIN)
        if self._questions is not None:
            poller.register(self._questions, zmq.POLLIN)
        poller.poll(round(timeout_s * 1000))
        if self._questions is not None:  # before the events, which include what follows from the answers
            for _ in range(MOST_AT_ONCE):
                if not self._questions.poll(0):
                    break
                self._questions.send_multipart(self._answer(self._questions.recv_multipart()))
        taken = 0
        for event, value, _endpoint in itertools.islice(self._events.take(), MOST_AT_ONCE):
            taken += 1
            self._note(event, value)
        if taken < MOST_AT_ONCE:  # none was left after the last one had been noted
            self._arrivals.no_news()
        failed, unexplained = self._arrivals.failed(time.monotonic())
        for _ in range(failed):
            self._count("handshake")
        if unexplained:
            self._log.warning("handshake_failed", error="the peer does not speak ZeroMQ")

    def close(self) -> None:
        """After the guarded socket has been closed."""
        if self._events is not None:
            self._events.close()
        if self._questions is not None:
            self._questions.unbind(ZAP)  # at once; closing leaves it to another thread
            self._questions.close()

    def _answer(self, question: list[bytes]) -> list[bytes]:
        version, request, _domain, address, _identity, _mechanism, *credentials = question
        role = self._admitted.get(credentials[0]) if credentials else None
        if role is not None:
            return [version, request, b"200", b"welcome", role.encode(), b""]
        self._arrivals.resolved()
        self._count("unknown_key")
        self._log.warning("unknown_key", address=address.decode(errors="replace"))
        return [version, request, b"400", b"unknown key", b"", b""]

    def _note(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._arrivals.accepted(value, time.monotonic())
        elif event == zmq.EVENT_DISCONNECTED:
            address = self._arrivals.ended(value)
            why, self._why = self._why, ""
            if why:
                self._arrivals.explained()
                self._log.warning("handshake_failed", address=address or "unknown", error=why)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._arrivals.resolved()
        else:
            self._why = why_failed(event, value)  # the end of that connection is told next


def address_of(connection: int) -> str | None:
    """Of the peer, while this file descriptor is open; None if there is none."""
    try:
        with socket.fromfd(connection, socket.AF_INET, socket.SOCK_STREAM) as duplicate:
            return str(duplicate.getpeername()[0])  # of the family that it really has
    except (OSError, IndexError):
        return None


# --- who connects ------------------------------------------------------------------------------------


class Handshakes:
    """Of a client's socket: what went wrong with the last one, and whether libzmq has given up.

    A refused key or another security mechanism ends libzmq's attempts for good. But a server that refuses us
    today may be restarted with our keys, so whoever owns the socket connects anew: to the endpoint that it
    was given, because libzmq tells a connection's host by its name or, once it was there, by its address, and
    knows an endpoint to disconnect only as it was connected.
    """

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        """Before ``socket`` connects to ``endpoint``."""
        self._endpoint = endpoint
        self._events = Events(
            socket,
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_CLOSED  # which only an attempt to connect reports that came to nothing
            | zmq.EVENT_CONNECT_DELAYED
            | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_DISCONNECTED,
        )
        self._clock = time.monotonic
        self._is_connected = False
        self._is_begun = False
        """In this attempt to connect, which ends with a pause, there was a TCP socket, and so an address."""
        self._is_lost = False
        """In the last attempt there was none."""
        self._breaks = 0
        self._given_up_s: float | None = None
        self._looked_s = -math.inf
        self._trouble: str | None = None

    @property
    def trouble(self) -> str | None:
        """In a few words why the last handshake failed, or that there seems to be no address to connect to.

        None if neither is so, also if nobody was there at all.
        """
        self._look()
        if self._is_lost and self._endpoint.startswith("tcp:"):  # of other kinds nobody is there
            return f"cannot try {self._endpoint}: its name does not resolve, or no file is left to open"
        return self._trouble

    @property
    def breaks(self) -> int:
        """How often a connection has broken that had been made; what was under way over it is lost."""
        self._look_now_and_then()
        return self._breaks

    def take_given_up(self, pause_s: float) -> bool:
        """Whether libzmq gave up ``pause_s`` ago, which is told once: it is time to connect anew."""
        self._look_now_and_then()
        if self._given_up_s is None or self._clock() < self._given_up_s + pause_s:
            return False
        self._given_up_s = None
        return True

    def _look_now_and_then(self) -> None:
        if self._clock() >= self._looked_s + LOOK_S:
            self._look()

    def _look(self) -> None:
        self._looked_s = self._clock()
        for event, value, endpoint in self._events.take():
            if event == zmq.EVENT_DISCONNECTED:  # of handshakes too, which have said why already
                self._breaks += self._is_connected
                self._is_connected = False
                continue
            if event == zmq.EVENT_CONNECT_RETRIED:
                self._is_lost, self._is_begun = not self._is_begun, False
                continue
            self._is_lost, self._is_begun = False, True
            if event == zmq.EVENT_CONNECT_DELAYED:
                continue
            if event in (zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_CLOSED):
                self._trouble = None
                self._is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
                continue
            self._trouble = f"handshake with {endpoint} failed: {why_failed(event, value)}"
            _log.warning("handshake_failed", endpoint=endpoint, error=why_failed(event, value))
            if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._given_up_s = self._given_up_s or self._clock()

    def close(self) -> None:
        """After the socket has been closed."""
        self._events.close()


class Events:
    """What libzmq reports of a socket's connections.

    Its I/O thread waits while nobody takes them and the queue is full, which would hold up all traffic: so
    the queue has no bound, and ``socket`` has to end its monitor before this is closed.
    """

    def __init__(self, socket: zmq.Socket[bytes], events: int) -> None:
        """Before ``socket`` binds or connects."""
        name = f"inproc://events-{next(_names)}"
        socket.monitor(name, events)
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.connect(name)

    def take(self) -> Iterator[tuple[int, int, str]]:
        """(event, its value, endpoint) of all that has happened, without waiting."""
        while True:
            try:
                event, endpoint = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            yield *struct.unpack("=HI", event), endpoint.decode(errors="replace")

    def close(self) -> None:
        """The rest is not of interest."""
        self.socket.close()


def why_failed(event: int, value: int) -> str:
    """In a few words, of a handshake that has failed."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "the server does not know our key"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return "one side has wire.keys and the other has none"
        if value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            return "the client expects another key of the server"
        return f"ZeroMQ protocol error {value:#x}"
    if value == errno.EAGAIN:
        return f"no end of it in {HANDSHAKE_S} s"
    return "the peer closed the connection; has it other keys?"
