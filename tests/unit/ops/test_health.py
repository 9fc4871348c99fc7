"""The HTTP endpoint, asked by well-behaved and other clients."""

import http.client
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from services.ops import health
from services.ops.health import HealthServer, Heartbeat
from services.ops.metrics import LearnerMetrics


@dataclass
class FakePod:
    """Its main loop turns when the test says so."""

    now_s: float = 1000.0
    missing: str | None = None
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(clock=lambda: self.now_s)

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> HealthServer:
        return HealthServer(host, port, self.registry, self.heartbeat, 60.0, lambda: self.missing)


@pytest.fixture
def pod() -> FakePod:
    return FakePod()


@pytest.fixture
def server(pod: FakePod) -> Iterator[HealthServer]:
    server = pod.serve()
    yield server
    server.close()


def get(server: HealthServer, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body


def connect(server: HealthServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def test_metrics_are_served_as_prometheus_text_without_created_series(
    pod: FakePod, server: HealthServer
) -> None:
    LearnerMetrics(pod.registry).updates.inc(7)
    status, body = get(server, "/metrics")
    assert status == 200
    assert "impala_learner_updates_total 7.0\n" in body
    assert "_created" not in body


def test_a_query_string_changes_nothing(server: HealthServer) -> None:
    assert get(server, "/healthz?verbose=1") == (200, "ok\n")


@pytest.mark.parametrize(("age_s", "status"), [(0.0, 200), (60.0, 200), (60.1, 503)])
def test_liveness_is_the_age_of_the_heartbeat(
    pod: FakePod, server: HealthServer, age_s: float, status: int
) -> None:
    pod.now_s += age_s
    assert get(server, "/healthz")[0] == status


def test_a_beat_makes_a_stuck_pod_alive_again(pod: FakePod, server: HealthServer) -> None:
    pod.now_s += 73.2
    assert get(server, "/healthz") == (503, "main loop has not turned for 73.2 s; allowed are 60 s\n")
    pod.heartbeat.beat()
    assert get(server, "/healthz") == (200, "ok\n")


def test_readiness_is_what_the_pod_says_and_leaves_liveness_alone(pod: FakePod, server: HealthServer) -> None:
    pod.missing = "no weights yet"
    assert get(server, "/readyz") == (503, "no weights yet\n")
    assert get(server, "/healthz")[0] == 200
    pod.missing = None
    assert get(server, "/readyz") == (200, "ok\n")


def test_an_unknown_path_is_told_the_known_ones(server: HealthServer) -> None:
    status, body = get(server, "/")
    assert status == 404
    assert "/metrics" in body


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\xff" * 50 + b"\r\n\r\n", b"GET\r\n\r\n", b"POST /metrics HTTP/1.0\r\n\r\n", b"A" * 70_000],
)
def test_garbage_is_survived(server: HealthServer, garbage: bytes) -> None:
    with connect(server) as client:
        client.sendall(garbage)
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:  # it stopped reading before we stopped sending
            pass
    assert get(server, "/healthz") == (200, "ok\n")


def test_a_client_that_hangs_up_before_its_answer_is_survived(
    server: HealthServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(20):
        with connect(server) as client:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    assert get(server, "/healthz") == (200, "ok\n")
    assert capfd.readouterr().err == ""


def test_clients_that_never_finish_are_cut_off_and_their_places_free_again(
    pod: FakePod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CONNECTION_DEADLINE_S", 0.5)
    server = pod.serve()
    slow = [connect(server) for _ in range(health.MAX_CONNECTIONS)]
    for client in slow:
        client.sendall(b"GET /met")
    for client in slow:
        assert client.recv(1) == b""  # blocks until the deadline, and no longer than the socket's timeout
        client.close()
    assert get(server, "/healthz") == (200, "ok\n")
    server.close()


def test_whoever_holds_all_places_keeps_no_probe_out(server: HealthServer) -> None:
    with ExitStack() as held:
        clients = [held.enter_context(connect(server)) for _ in range(2 * health.MAX_CONNECTIONS)]
        for client in clients:
            client.sendall(b"GET /met")
        for _ in range(10):
            assert get(server, "/healthz") == (200, "ok\n")
        assert clients[0].recv(1) == b""  # the oldest have made room


def test_a_readiness_check_that_fails_is_an_error_of_that_request_only(pod: FakePod) -> None:
    def broken() -> str | None:
        raise RuntimeError("a bug")

    server = HealthServer("127.0.0.1", 0, pod.registry, pod.heartbeat, 60.0, broken)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        get(server, "/readyz")
    assert get(server, "/healthz")[0] == 200
    server.close()


def test_a_port_in_use_is_an_error_that_names_the_knob(pod: FakePod, server: HealthServer) -> None:
    with pytest.raises(ValueError, match=rf"^ops\.port = {server.port}: .*in use.*allowed is a free port"):
        pod.serve(port=server.port)


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours_is_an_error_that_names_the_knob(pod: FakePod, host: str) -> None:
    with pytest.raises(ValueError, match=r"^ops\.host = .*allowed is an address of this machine"):
        pod.serve(host=host)


def test_after_close_the_port_is_free_again(pod: FakePod) -> None:
    first = pod.serve()
    first.close()
    second = pod.serve(port=first.port)
    assert get(second, "/healthz")[0] == 200
    second.close()


def test_head_is_get_without_the_body(pod: FakePod, server: HealthServer) -> None:
    for missing, status in ((None, 200), ("no weights yet", 503)):
        pod.missing = missing
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("HEAD", "/readyz")
        response = connection.getresponse()
        assert (response.status, response.read()) == (status, b"")
        connection.close()
