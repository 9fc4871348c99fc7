"""All sockets of the system: four kinds, what each may block on, and what each may drop.

    RolloutSender    PUSH    the actor's, one to each learner. Blocks, up to its timeout, while no learner has
                             room: that is the backpressure, and the caller counts it. Drops what is unsent
                             when a learner leaves, and at its end.
    RolloutReceiver  PULL    a learner's. Drops nothing; what it does not read stays with the actors.
    Requester        DEALER  of actors, learners and relays. Drops a reply that comes after it was closed.
    Replier          ROUTER  the parameter server's. Drops a reply to a client that is gone or does not read.

None blocks longer than its timeout. Queues are counted in messages and kept at one or two: every rollout
that waits in a buffer is policy lag. All sockets reconnect by themselves. A socket belongs to the thread
that uses it.

MAXMSGSIZE bounds each frame of a message, and libzmq has no bound for their number: a peer that never ends
a message fills memory until its connection is cut. Only who may connect is an answer to that, and it is given
in ``security.py``: the two that listen have a doorkeeper, the two that connect have keys.

A rollout travels as one frame, which costs a copy and saves more: seven frames take a learner twice the time.
And libzmq 4.3.5 aborts the process when a connection breaks in the moment in which its socket is closed, if
it had sent the first frames of a message and not the last (session_base.cpp, clean_pipes). That happened when
a learner ended together with an actor that it held back.

libzmq's own heartbeats stay off. A socket whose inbound queue is full does not read pings either, so under
backpressure they cut connections to living peers; and when such a peer goes away, libzmq 4.3.5 aborts the
whole process at the next heartbeat (assertion !_io_error). TCP keepalive finds peers that vanish while idle,
and whoever waits for an answer stops waiting after a while and asks again over a new socket.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self, TypeVar

import zmq

from services.ops.logging import get_logger
from services.wire import codec
from services.wire.keys import Keys, Role
from services.wire.messages import Buffer, Destination
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
RENEW_S = 10.0
"""After which a requester that cannot reach the server is exchanged, whatever it may hang on. If the server
has sent more than is allowed, libzmq has given up for good."""
MAX_GONE_LEARNERS = 1024
"""Whose sequences an actor remembers."""
SMALL_FRAME_BYTES = 4096
WEIGHTS_BUFFER_BYTES = 256 * 1024
ROLLOUTS_BUFFER_BYTES = 32 * 1024
"""Of the kernel, at each end of a connection over TCP. What waits there is policy lag that no queue counts:
256 kB held 378 rollouts of Pong, 32 kB hold 48. With 16 kB a connection carries half as much."""

_log = get_logger("wire").limited(10.0)


class _Socket:
    """Options that all sockets share, and the two ways to become part of a run: to listen or to connect."""

    def __init__(self, kind: int, max_message_bytes: int, buffer_bytes: int) -> None:
        """OSError if there is no file descriptor left for it."""
        try:
            self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"no socket ({error.strerror})") from None
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
        self._server_endpoint = ""

    def _connect(self, endpoint: str, keys: Keys | None, server: Role) -> None:
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public[server])
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public[keys.role])
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        self._allow_ipv6(endpoint)
        try:
            self._handshakes = Handshakes(self._socket, endpoint)  # which takes two sockets more
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"no connection to {endpoint} ({error.strerror})") from None
        self._server_endpoint = endpoint

    def _allow_ipv6(self, endpoint: str) -> None:
        """Where it is asked for: on a machine without it the option would cost us IPv4."""
        if "[" in endpoint:
            self._socket.setsockopt(zmq.IPV6, 1)

    def mend(self) -> None:
        """Connect anew to a server that refused us for a while, whom libzmq would not try again."""
        if self._handshakes is not None and self._handshakes.take_given_up(RECONNECT_MAX_MS / 1000):
            self._socket.disconnect(self._server_endpoint)  # as it was given to us: see `Handshakes`
            self._socket.connect(self._server_endpoint)

    def _bind(self, endpoint: str, key: str) -> None:
        """``key`` is where the user wrote the endpoint."""
        _prepare_to_send_without_copies()
        self._allow_ipv6(endpoint)
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
        self.mend()
        return bool(self._socket.poll(round(timeout_s * 1000), zmq.POLLOUT)) and self._send_now(frames)

    def _send_now(self, frames: Sequence[Buffer]) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        return True

    def _receive(self, timeout_s: float) -> list[Buffer] | None:
        message = self._take()  # first: where many are waiting, to poll for each would cost as much again
        if message is None and self._socket.poll(round(timeout_s * 1000), zmq.POLLIN):
            message = self._take()
        return message

    def _take(self) -> list[Buffer] | None:
        """Frames of a message that is there, or None. Of a small frame a view costs more than a copy."""
        frames: list[Buffer] = []
        while True:
            try:
                frame = self._socket.recv(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                assert not frames  # a message is there as a whole or not at all
                return None
            frames.append(frame.bytes if len(frame) < SMALL_FRAME_BYTES else frame.buffer)
            if not frame.more:
                return frames

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


def _prepare_to_send_without_copies() -> None:
    """pyzmq's first message without a copy imports a module, starts a thread and opens files for it.

    That is to be over before peers can take all files that there are, because then it ends the process.
    """
    zmq.Frame(b"first", copy=False, copy_threshold=0)


def finish(timeout_s: float) -> bool:
    """Whether all that was to be sent has left, which the end of the process would lose.

    The last act of a process, once all of its sockets are closed, each with its linger.
    """
    ending = threading.Thread(target=zmq.Context.instance().term, daemon=True)  # waits for sockets
    ending.start()
    ending.join(timeout_s)
    return not ending.is_alive()


def wait(sockets: Iterable[_Socket], timeout_s: float, full: Iterable[_Socket] = ()) -> None:
    """Return as soon as one of ``sockets`` has something to receive, at the latest after ``timeout_s``.

    Or when one of ``full`` has room for something to send.
    """
    _ready([*((each, zmq.POLLIN) for each in sockets), *((each, zmq.POLLOUT) for each in full)], timeout_s)


S = TypeVar("S", bound=_Socket)


def _ready(events: Sequence[tuple[S, int]], timeout_s: float) -> list[S]:
    # Rounded up: a timeout below a millisecond would make the caller's loop spin.
    polled = zmq.zmq_poll([(each._socket, event) for each, event in events], math.ceil(timeout_s * 1000))  # noqa: SLF001
    sockets = {socket for socket, _ in polled}
    return [each for each, _ in events if each._socket in sockets]  # noqa: SLF001


class LearnerConnection(_Socket):
    """An actor's connection to one learner. ``RolloutSender`` makes it and says when it has room."""

    def __init__(
        self, destination: Destination, sequence: int, queue: int, max_message_bytes: int, keys: Keys | None
    ) -> None:
        super().__init__(zmq.PUSH, max_message_bytes, ROLLOUTS_BUFFER_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, queue)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # queue only for a learner that is really there
        self._connect(destination.endpoint, keys, "learner")
        self.destination = destination
        self.sequence = sequence
        """Of the next rollout to this learner."""

    def send(self, frames: Sequence[Buffer]) -> bool:
        """Hand over the rollout ``sequence``; False if the learner has gone since there was room."""
        sent = self._send_now([codec.to_bytes(frames)])
        self.sequence += sent
        return sent


class RolloutSender:
    """An actor's side: deals rollouts round-robin to the learners that have room.

    Each learner has a socket of its own, so that one that comes, leaves or refuses us disturbs no other. What
    a closed one had not handed to the kernel is lost, and nobody here can tell how much that was. But numbers
    go on where they were, so a learner that is connected anew counts what it has missed; one that is gone for
    good misses nothing.
    """

    def __init__(self, queue: int, max_message_bytes: int, keys: Keys | None = None) -> None:
        """Without learners, for whom nothing has room: see ``follow``."""
        _prepare_to_send_without_copies()
        self._queue = queue
        self._max_message_bytes = max_message_bytes
        self._keys = keys
        self._connections: deque[LearnerConnection] = deque()
        """Whose turn it is stands first."""
        self._sequences: dict[str, int] = {}
        """Of those that are closed, by endpoint."""

    def follow(self, learners: Sequence[Destination]) -> None:
        """Be connected to these learners and to no others. Who stays is not disturbed; nothing waits."""
        wanted = {learner.endpoint: learner for learner in learners}
        for connection in list(self._connections):
            endpoint = connection.destination.endpoint
            if wanted.get(endpoint) == connection.destination:
                connection.mend()
                del wanted[endpoint]
                continue
            self._connections.remove(connection)
            self._sequences[endpoint] = connection.sequence
            if len(self._sequences) > MAX_GONE_LEARNERS:  # every new pod has another address
                del self._sequences[next(iter(self._sequences))]
            connection.close()
        for learner in wanted.values():
            self._open(learner)

    def _open(self, learner: Destination) -> None:
        sequence = self._sequences.get(learner.endpoint, 0)
        try:
            connection = LearnerConnection(
                learner, sequence, self._queue, self._max_message_bytes, self._keys
            )
        except OSError as error:  # tried again with the next `follow`
            _log.warning("learner_not_connected", endpoint=learner.endpoint, error=error)
        else:
            self._connections.append(connection)

    def choose(self, timeout_s: float) -> LearnerConnection | None:
        """The next learner that has room; None if there is none within ``timeout_s``."""
        for connection in self._connections:
            connection.mend()
        with_room = _ready([(connection, zmq.POLLOUT) for connection in self._connections], timeout_s)
        if not with_room:
            return None
        chosen = with_room[0]
        self._connections.remove(chosen)
        self._connections.append(chosen)
        return chosen

    @property
    def trouble(self) -> str | None:
        """In a few words what is wrong with a learner; None if all is well or they are just not there."""
        return next(filter(None, (connection.trouble for connection in self._connections)), None)

    def close(self, linger_s: float = 0.0) -> None:
        """Close. What has not left for the kernel is tried for ``linger_s``, while the process lives."""
        for connection in self._connections:
            connection.close(linger_s)
        self._connections.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RolloutReceiver(_Socket):
    """A learner's side."""

    def __init__(
        self, endpoint: str, queue: int, max_message_bytes: int, door: Doorkeeper | None = None
    ) -> None:
        most_bytes = max_message_bytes + len(codec.to_bytes([b""] * codec.MAX_FRAMES))  # when joined
        super().__init__(zmq.PULL, most_bytes, ROLLOUTS_BUFFER_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, queue)
        if door is not None:
            door.guard(self._socket)
        self._bind(endpoint, "wire.learner_bind")

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        """The next message's frames, not copied; None if there is none within ``timeout_s``."""
        received = self._receive(timeout_s)
        if received is None or len(received) != 1:
            return received
        try:
            return codec.from_bytes(received[0])
        except codec.WireError:  # as it came: the decoder will refuse it, and say why
            return received


class Requester(_Socket):
    """A client of the parameter server. One request is open at a time, and a new one replaces it.

    Whoever got no answer closes it and connects anew, because the old connection may lead to a machine that
    is gone, which TCP alone notices only after many minutes. A connection that was seen to break is made anew
    by itself, and then the request has to be sent again: see ``breaks``.
    """

    def __init__(self, endpoint: str, max_message_bytes: int, keys: Keys | None = None) -> None:
        super().__init__(zmq.DEALER, max_message_bytes, WEIGHTS_BUFFER_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 4)
        self._socket.setsockopt(zmq.RCVHWM, 4)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._connect(endpoint, keys, "paramserver")

    @property
    def breaks(self) -> int:
        """How often the connection has broken, and with it the request that was open."""
        return 0 if self._handshakes is None else self._handshakes.breaks

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
