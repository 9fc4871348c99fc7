"""What a pod answers over HTTP: /metrics for Prometheus, /healthz and /readyz for the kubelet.

Liveness is the age of the pod's own heartbeat and nothing else: a pod that waits for a lost peer is alive,
and restarting it would help nobody. Readiness is the pod's own word. The server has its own threads, so it
answers while the main loop computes, and no client, however slow or hostile, holds it up.
"""

from __future__ import annotations

import errno
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from services.ops.logging import get_logger

MAX_CONNECTIONS = 32
CONNECTION_DEADLINE_S = 10.0
"""A scrape takes milliseconds. Whoever is not done by then is cut off."""


class Heartbeat:
    """Beaten by the main loop every time it turns, whether or not it had work. A float: no lock is needed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = clock()

    def beat(self) -> None:
        """The loop has turned."""
        self._last_s = self._clock()

    def age_s(self) -> float:
        """Time since it last did."""
        return self._clock() - self._last_s


class HealthServer:
    """Serves from construction until ``close``."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        heartbeat: Heartbeat,
        liveness_timeout_s: float,
        readiness: Callable[[], str | None],
    ) -> None:
        """``readiness`` returns None, or in a few words what is still missing. It must not block."""
        published = _WithoutCreated(registry)

        def answer(path: str) -> tuple[int, str, bytes]:
            if path == "/metrics":
                return 200, CONTENT_TYPE_LATEST, generate_latest(published)
            if path == "/healthz":
                age_s = heartbeat.age_s()
                stuck = f"main loop has not turned for {age_s:.1f} s; allowed are {liveness_timeout_s:g} s"
                return _verdict(stuck if age_s > liveness_timeout_s else None)
            if path == "/readyz":
                return _verdict(readiness())
            return 404, "text/plain", b"/metrics, /healthz or /readyz\n"

        try:
            self._server = _Server(host, port, answer)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                wrong, allowed = f"ops.port = {port}", "a free port from 1024 upwards, or 0 to take any"
            else:
                wrong, allowed = f"ops.host = {host!r}", "an address of this machine, or 0.0.0.0 for all"
            raise ValueError(
                f"{wrong}: cannot listen on {host}:{port} ({error.strerror}); allowed is {allowed}"
            ) from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="health", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that was bound, also if 0 was asked for."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _verdict(trouble: str | None) -> tuple[int, str, bytes]:
    return (503, "text/plain", f"{trouble}\n".encode()) if trouble else (200, "text/plain", b"ok\n")


class _WithoutCreated(Collector):
    """The registry without its ``_created`` series, which double a scrape's size and which nobody reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _Server(ThreadingHTTPServer):
    """HTTP/1.0, one request a connection, a bounded number of them, each with a deadline.

    The newest one is always let in, and the oldest makes room for it: a probe is done in milliseconds, so
    whoever holds all places shuts out nobody but himself.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, answer: Callable[[str], tuple[int, str, bytes]]) -> None:
        self.answer = answer
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        self._log = get_logger("health").limited(60.0)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the DNS for the host's name and may wait long for it.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def verify_request(self, request: object, client_address: object) -> bool:  # noqa: ARG002
        assert isinstance(request, socket.socket)
        with self._lock:
            crowded_out = next(iter(self._open)) if len(self._open) >= MAX_CONNECTIONS else None
            if crowded_out is not None:
                del self._open[crowded_out]
            self._open[request] = time.monotonic()
        if crowded_out is not None:
            self._cut_off(crowded_out)
        return True

    def service_actions(self) -> None:
        oldest_s = time.monotonic() - CONNECTION_DEADLINE_S
        with self._lock:
            late = [request for request, since_s in self._open.items() if since_s < oldest_s]
        for request in late:
            self._cut_off(request)

    def _cut_off(self, request: socket.socket) -> None:
        """Wakes the thread that reads from it, which then cleans up."""
        try:
            request.shutdown(socket.SHUT_RDWR)
        except OSError:
            self._log.debug("connection_already_gone")

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):  # OSError: the client went away
            self._log.crash("http_request_failed", error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "impala"
    sys_version = ""
    timeout = CONNECTION_DEADLINE_S / 2

    def do_GET(self) -> None:
        self.wfile.write(self._begin())

    def do_HEAD(self) -> None:
        self._begin()

    def _begin(self) -> bytes:
        """Send all but the body."""
        status, content_type, body = self.server.answer(self.path.partition("?")[0])
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the name is the base class's)
        """Scrapes and probes are no events."""
