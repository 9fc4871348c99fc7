"""The parameter server's only loop: carries messages between the sockets and the rules.

It consumes requests, and in a relay upstream's answers; it produces answers, and in a relay requests. It
waits for either and for its nearest deadline, never longer than half a second, and for nothing else: no
peer, disk or upstream can hold it up. What it may drop are answers to peers that are gone or do not read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from services.ops.health import Heartbeat
from services.ops.logging import get_logger
from services.ops.metrics import ParamserverMetrics
from services.paramserver.relay import Relay
from services.paramserver.server import LOG_INTERVAL_S, Reply, Server
from services.wire.codec import size_bytes
from services.wire.messages import Buffer
from services.wire.sockets import RENEW_S, Replier, Requester, wait

TURN_S = 0.5
"""The loop turns at least this often, for its heartbeat and to see that it shall stop."""


_log = get_logger("relay").limited(LOG_INTERVAL_S)


class Upstream:
    """A relay and its connection, which is taken anew when it leads nowhere."""

    def __init__(self, relay: Relay, connect: Callable[[], Requester]) -> None:
        self.relay = relay
        self.socket = connect()
        self._connect = connect
        self._breaks = 0
        """Of the connection when the last request left."""
        self._stuck_since_s: float | None = None
        """Since when no request could leave."""

    def turn(self, now_s: float) -> list[Reply]:
        """Take what has arrived, send what is due; answers for the relay's own clients."""
        frames = self.socket.receive(0.0)
        replies = [] if frames is None else self.relay.handle(frames, now_s)
        breaks = self.socket.breaks
        if self.relay.is_overdue(now_s) or (breaks and self._is_stuck(now_s)):
            self._connect_anew(now_s)
            breaks = self.socket.breaks
        elif breaks != self._breaks and self.relay.is_asking:
            self.relay.unsent(now_s)  # or lost on the way, which is the same
        pull = self.relay.pull(now_s)
        if pull is not None:
            if self.socket.send(pull, timeout_s=0.0):
                self._breaks, self._stuck_since_s = breaks, None
            else:
                self.relay.unsent(now_s)
                self._stuck_since_s = now_s if self._stuck_since_s is None else self._stuck_since_s
        for goodbye in self.relay.goodbyes():
            if not self.socket.send(goodbye, timeout_s=0.0):
                break  # this one and the others when there is room
        return replies

    def _is_stuck(self, now_s: float) -> bool:
        """Never while a request is open: that one has left, and ``is_overdue`` tells how long it may take."""
        return self._stuck_since_s is not None and now_s - self._stuck_since_s > RENEW_S

    def _connect_anew(self, now_s: float) -> None:
        try:
            fresh = self._connect()
        except OSError as error:  # no file is left to open, say: ask again over what there is
            _log.warning("upstream_not_connected", error=error)
            self.relay.unsent(now_s)
            self._stuck_since_s = now_s  # nor is a socket asked for at every turn
            return
        self.socket.close()
        self.socket, self._breaks, self._stuck_since_s = fresh, 0, None
        self.relay.connected(now_s)


class Loop:
    """Owns the sockets. With ``upstream`` it is a relay's."""

    def __init__(
        self,
        *,
        server: Server,
        replier: Replier,
        metrics: ParamserverMetrics,
        upstream: Upstream | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._replier = replier
        self._metrics = metrics
        self._upstream = upstream
        self._clock = clock
        self._log = get_logger("loop").limited(LOG_INTERVAL_S)

    def run(self, stopping: threading.Event, heartbeat: Heartbeat) -> None:
        """Serve until ``stopping``."""
        while not stopping.is_set():
            heartbeat.beat()
            self.turn()

    def close(self) -> None:
        """Close the sockets."""
        self._replier.close()
        if self._upstream is not None:
            self._upstream.socket.close()

    def turn(self) -> None:
        """Wait for something to do, and do it."""
        self._wait()
        request = self._replier.receive(0.0)
        if request is not None:
            self._send(self._handle(*request))
        if self._upstream is not None:
            self._send(self._upstream.turn(self._clock()))
        self._send(self._server.tick(self._clock()))

    def _handle(self, peer: bytes, frames: Sequence[Buffer], role: str | None) -> list[Reply]:
        try:
            return self._server.handle(peer, frames, self._clock(), role)
        except Exception as error:  # noqa: BLE001  (a bug that one request meets must not end all the others)
            self._metrics.refused_requests.labels("internal").inc()
            self._log.crash("request_failed", error)
            return []

    def _wait(self) -> None:
        deadline_s = self._server.next_deadline_s()
        sockets: list[Replier | Requester] = [self._replier]
        full: list[Requester] = []
        if self._upstream is not None:
            deadline_s = min(deadline_s, self._upstream.relay.next_deadline_s())
            sockets.append(self._upstream.socket)
            full += [self._upstream.socket] if self._upstream.relay.has_goodbyes else []
        wait(sockets, min(max(deadline_s - self._clock(), 0.0), TURN_S), full)

    def _send(self, replies: list[Reply]) -> None:
        """And what others are told in place of those who are gone."""
        while replies:
            lost = [reply.peer for reply in replies if not self._deliver(reply)]
            replies = [other for peer in lost for other in self._server.lost(peer, self._clock())]

    def _deliver(self, reply: Reply) -> bool:
        if not self._replier.send(reply.peer, reply.frames):
            self._log.debug("peer_gone", peer=reply.peer.hex())
            return False
        if reply.result is not None:
            self._metrics.pulls.labels(reply.result).inc()
            if reply.since_s is not None:
                self._metrics.pull_seconds.observe(self._clock() - reply.since_s)
            if reply.result == "full":
                self._metrics.sent_bytes.inc(size_bytes(reply.frames))
        return True
