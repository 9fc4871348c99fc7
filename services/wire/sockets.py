"""All sockets of the system: four kinds, what each may block on, and what each may drop.

    RolloutSender    PUSH    the actor's. Blocks, up to its timeout, while every learner's queue is full: that
                             is the backpressure, and the caller counts it. Drops what is unsent at its end.
    RolloutReceiver  PULL    a learner's. Drops nothing; what it does not read stays with the actors.
    Requester        DEALER  of actors, learners and relays. Drops a reply that comes after it was closed.
    Replier          ROUTER  the parameter server's. Drops a reply to a client that is gone or does not read.

None blocks longer than its timeout. Queues are counted in messages and kept at one or two: every rollout
that waits in a buffer is policy lag. All sockets reconnect by themselves. A socket belongs to the thread
that uses it.

MAXMSGSIZE bounds each frame of a message, and libzmq has no bound for their number: a peer that never ends
a message fills memory until its connection is cut. Only who may connect is an answer to that, and it is given
in ``security.py``: the two that listen have a doorkeeper, the two that connect have keys.

libzmq's own heartbeats stay off. A socket whose inbound queue is full does not read pings either, so under
backpressure they cut connections to living peers; and when such a peer goes away, libzmq 4.3.5 aborts the
whole process at the next heartbeat (assertion !_io_error). TCP keepalive finds peers that vanish while idle,
and whoever waits for an answer stops waiting after a while and asks again over a new socket.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import zmq

from services.wire.keys import Keys, Role
from services.wire.messages import Buffer
from services.wire.security import HANDSHAKE_S, Doorkeeper, Handshakes

KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000
BACKLOG = 4096
"""Connections that wait to be accepted, if the kernel allows so many (net.core.somaxconn). When a thousand
clients come at once, libzmq's own 100 lets it drop most of them, who then try again seconds later."""
CONNECT_MS = 3_000
"""After which an attempt to connect is given up and made anew, which also asks the DNS again: who tries while
a pod is being replaced finds the address of the old one, which never answers, and the kernel alone would wait
for it for two minutes."""
WEIGHTS_BUFFER_BYTES = 256 * 1024
ROLLOUTS_BUFFER_BYTES = 32 * 1024
"""Of the kernel, at each end of a connection over TCP. What waits there is policy lag that no queue counts:
256 kB held 378 rollouts of Pong, 32 kB hold 48."""


class _Socket:
    """Options that all sockets share, and the two ways to become part of a run: to listen or to connect."""

    def __init__(self, kind: int, max_message_bytes: int, buffer_bytes: int) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        for option, value in {
            zmq.LINGER: 0,
            zmq.MAXMSGSIZE: max_message_bytes,  # per frame; libzmq disconnects a peer that exceeds it
            zmq.RECONNECT_IVL: RECONNECT_MS,
            zmq.RECONNECT_IVL_MAX: RECONNECT_MAX_MS,
            zmq.CONNECT_TIMEOUT: CONNECT_MS,
            zmq.HANDSHAKE_IVL: HANDSHAKE_S * 1000,
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: KEEPALIVE_IDLE_S,
            zmq.TCP_KEEPALIVE_INTVL: KEEPALIVE_INTERVAL_S,
            zmq.TCP_KEEPALIVE_CNT: KEEPALIVE_PROBES,
            zmq.SNDBUF: buffer_bytes,
            zmq.RCVBUF: buffer_bytes,
        }.items():
            self._socket.setsockopt(option, value)
        self._handshakes: Handshakes | None = None
        self._endpoints: tuple[str, ...] = ()

    def _connect(self, endpoints: Sequence[str], keys: Keys | None, server: Role) -> None:
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public[server])
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public[keys.role])
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        self._handshakes = Handshakes(self._socket)
        self._endpoints = tuple(endpoints)
        for endpoint in self._endpoints:
            self._socket.connect(endpoint)

    def _bind(self, endpoint: str, key: str) -> None:
        """``key`` is where the user wrote the endpoint."""
        # pyzmq's first message without a copy imports a module, starts a thread and opens files for it. That
        # is to be over before peers can take all files that there are, because then it ends the process.
        zmq.Frame(b"first", copy=False, copy_threshold=0)
        self._socket.setsockopt(zmq.BACKLOG, BACKLOG)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            # pyzmq appends the address that we have named already
            reason = str(error.strerror).partition(" (addr=")[0]
            raise ValueError(
                f"{key} = {endpoint!r}: cannot listen ({reason}); allowed is a free address of this host"
            ) from None

    @property
    def trouble(self) -> str | None:
        """In a few words what is wrong with the server that we connect to; None if it is just not there."""
        return None if self._handshakes is None else self._handshakes.trouble

    def _send(self, frames: Sequence[Buffer], timeout_s: float) -> bool:
        if self._handshakes is not None and self._handshakes.take_given_up(RECONNECT_MAX_MS / 1000):
            for endpoint in self._endpoints:  # as they were given to us: see `Handshakes`
                self._socket.disconnect(endpoint)
                self._socket.connect(endpoint)
        if not self._socket.poll(round(timeout_s * 1000), zmq.POLLOUT):
            return False
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        return True

    def _receive(self, timeout_s: float) -> list[Buffer] | None:
        if not self._socket.poll(round(timeout_s * 1000), zmq.POLLIN):
            return None
        try:
            return [part.buffer for part in self._socket.recv_multipart(zmq.DONTWAIT, copy=False)]
        except zmq.Again:
            return None

    @property
    def endpoint(self) -> str:
        """The address last bound or connected, with the port that a wildcard was given."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self, linger_s: float = 0.0) -> None:
        """Close. What has not left for the kernel is tried for ``linger_s``, while the process lives."""
        if self._socket.closed:
            return
        self._socket.disable_monitor()  # before its reader goes: libzmq would wait for it
        if self._handshakes is not None:
            self._handshakes.close()
        self._socket.close(linger=round(linger_s * 1000))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def finish(timeout_s: float) -> bool:
    """Whether all that was to be sent has left, which the end of the process would lose.

    The last act of a process, once all of its sockets are closed, each with its linger.
    """
    ending = threading.Thread(target=zmq.Context.instance().term, daemon=True)  # waits for sockets
    ending.start()
    ending.join(timeout_s)
    return not ending.is_alive()


def wait(sockets: Sequence[_Socket], timeout_s: float) -> None:
    """Return as soon as one of ``sockets`` has something to receive, at the latest after ``timeout_s``."""
    # Rounded up: a timeout below a millisecond would make the caller's loop spin.
    zmq.zmq_poll([(socket._socket, zmq.POLLIN) for socket in sockets], math.ceil(timeout_s * 1000))  # noqa: SLF001


class RolloutSender(_Socket):
    """An actor's side: deals rollouts round-robin to the learners that have room."""

    def __init__(
        self, endpoints: Sequence[str], queue: int, max_message_bytes: int, keys: Keys | None = None
    ) -> None:
        super().__init__(zmq.PUSH, max_message_bytes, ROLLOUTS_BUFFER_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, queue)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # queue only for learners that are really there
        self._connect(endpoints, keys, "learner")

    def send(self, frames: Sequence[Buffer], timeout_s: float) -> bool:
        """Hand over a message; False if no learner had room within ``timeout_s``.

        Large frames are not copied: their memory must stay as it is until the message has left.
        """
        return self._send(frames, timeout_s)


class RolloutReceiver(_Socket):
    """A learner's side."""

    def __init__(
        self, endpoint: str, queue: int, max_message_bytes: int, door: Doorkeeper | None = None
    ) -> None:
        super().__init__(zmq.PULL, max_message_bytes, ROLLOUTS_BUFFER_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, queue)
        if door is not None:
            door.guard(self._socket)
        self._bind(endpoint, "wire.learner_bind")

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        """The next message's frames, not copied; None if there is none within ``timeout_s``."""
        return self._receive(timeout_s)


class Requester(_Socket):
    """A client of the parameter server. One request is open at a time, and a new one replaces it.

    Whoever got no answer closes it and connects anew, because the old connection may lead to a machine that
    is gone, which TCP alone notices only after many minutes.
    """

    def __init__(self, endpoint: str, max_message_bytes: int, keys: Keys | None = None) -> None:
        super().__init__(zmq.DEALER, max_message_bytes, WEIGHTS_BUFFER_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 4)
        self._socket.setsockopt(zmq.RCVHWM, 4)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._connect([endpoint], keys, "paramserver")

    def send(self, frames: Sequence[Buffer], timeout_s: float) -> bool:
        """Send a request; False if the server is not there within ``timeout_s``."""
        return self._send(frames, timeout_s)

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        """The next reply's frames, not copied; None if there is none within ``timeout_s``."""
        return self._receive(timeout_s)


class Replier(_Socket):
    """The parameter server's side. ``peer`` is a connection: a client that reconnects is a new peer."""

    def __init__(self, endpoint: str, max_message_bytes: int, door: Doorkeeper | None = None) -> None:
        super().__init__(zmq.ROUTER, max_message_bytes, WEIGHTS_BUFFER_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 8)
        self._socket.setsockopt(zmq.RCVHWM, 8)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # report peers that are gone or do not read
        self._knows_roles = door is not None and door.guard(self._socket)
        self._bind(endpoint, "wire.paramserver_bind")

    def receive(self, timeout_s: float) -> tuple[bytes, list[Buffer], str | None] | None:
        """(peer, frames, role) of the next request; None if there is none within ``timeout_s``.

        The role is whose key the peer has proved to hold, or None where there are no keys.
        """
        if not self._socket.poll(round(timeout_s * 1000), zmq.POLLIN):
            return None
        try:
            peer, *parts = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        role = str(parts[0].get("User-Id")) if self._knows_roles else None
        return bytes(peer.buffer), [part.buffer for part in parts], role

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> bool:
        """Answer; False if the peer is gone or has stopped reading."""
        try:
            self._socket.send_multipart([peer, *frames], zmq.DONTWAIT, copy=False)
        except (zmq.Again, zmq.ZMQError):
            return False
        return True
