"""Peers that speak different versions of the protocol part with clear words, and wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgpack
import pytest

from services.local.plan import private_socket_dir
from services.wire.codec import Expected, decode, encode
from services.wire.messages import NO_VERSION, PROTOCOL_VERSION, Buffer, Client, Message, Pull, Refusal
from services.wire.sockets import Replier, Requester
from tests.integration.conftest import StartPod
from tests.integration.system import START_S, get
from tests.unit.learner.waiting import until
from tests.unit.wire.samples import attends

pytestmark = pytest.mark.integration

LIMIT = 1 << 20
OTHER = PROTOCOL_VERSION + 1


def of_other_version(frames: list[Buffer]) -> list[Buffer]:
    """The same message from a peer of another version."""
    return [msgpack.packb([OTHER, *msgpack.unpackb(frames[0])[1:]]), *frames[1:]]


@contextmanager
def server_of_other_version() -> Iterator[str]:
    """Its endpoint. It refuses everybody, and says why."""
    done = threading.Event()
    text = f"the peer speaks protocol {PROTOCOL_VERSION}, this is protocol {OTHER}"
    refusal = of_other_version(encode(Refusal(reason="protocol", text=text)))

    def serve(endpoint: str) -> None:
        with Replier(endpoint, LIMIT) as replier:
            while not done.is_set():
                request = replier.receive(0.1)
                if request is not None:
                    replier.send(request[0], refusal)

    with private_socket_dir() as directory:
        endpoint = f"ipc://{directory}/other"
        thread = threading.Thread(target=serve, args=(endpoint,), daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            done.set()
            thread.join()


ACTOR = Client(client_id="from-the-future", incarnation=1)


@pytest.mark.parametrize(
    "message",
    [
        Pull(run_id="local", sender=ACTOR, have_version=NO_VERSION, seats_for=(ACTOR,)),
        replace(attends()[0], run_id="local"),
    ],
    ids=["actor", "learner"],
)
def test_a_client_of_another_version_is_refused_in_words_that_it_can_read(
    start_pod: StartPod, message: Message
) -> None:
    with private_socket_dir() as directory:
        endpoint = f"ipc://{directory}/paramserver"
        paramserver = start_pod("paramserver", "--wire.paramserver_bind", endpoint)
        until(lambda: paramserver.lines("serving"), "it serves", START_S)
        with Requester(endpoint, LIMIT) as requester:
            assert requester.send(of_other_version(encode(message)), timeout_s=10.0)
            reply = requester.receive(timeout_s=10.0)
        assert reply is not None
        refusal = decode(of_other_version(reply), Expected(run_id="local", max_message_bytes=LIMIT))
        assert isinstance(refusal, Refusal)
        assert refusal.reason == "protocol"
        assert f"the peer speaks protocol {OTHER}, this is protocol {PROTOCOL_VERSION}" in refusal.text
        assert paramserver.value("paramserver_refused_requests_total", reason="protocol") == 1
        assert paramserver.value("paramserver_seats") == 0
        assert paramserver.value("paramserver_learners") == 0
        (line,) = paramserver.lines("request_refused")
        assert f"protocol {OTHER}" in line


@pytest.mark.parametrize(("role", "event"), [("actor", "no_news"), ("learner", "not_attending")])
def test_a_pod_that_faces_a_server_of_another_version_stays_alive_unready_and_says_why(
    start_pod: StartPod, role: str, event: str
) -> None:
    with server_of_other_version() as endpoint:
        pod = start_pod(role, "--wire.paramserver_endpoint", endpoint)
        until(lambda: any(f"protocol {OTHER}" in line for line in pod.lines(event)), "it says why", START_S)
        until(lambda: f"this is protocol {OTHER}" in get(pod.port, "/readyz")[1], "it is unready")
        assert get(pod.port, "/readyz")[0] == 503
        assert get(pod.port, "/healthz")[0] == 200
        assert pod.alive
        pod.terminate()
        assert pod.exit_code(10.0) == 0, pod.log()
