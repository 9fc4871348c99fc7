"""What only real sockets show: backpressure, peers that vanish, and what that must not do to us."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from services.wire import sockets
from services.wire.security import Events
from services.wire.sockets import Requester, RolloutReceiver
from tests.unit.wire.sending import send, sender_to

pytestmark = pytest.mark.integration

PEER_VANISHES = """
import sys, time
from services.wire.sockets import RolloutReceiver
from tests.unit.wire.sending import send, sender_to
endpoint = sys.argv[1]
receiver = RolloutReceiver(endpoint, queue=2, max_message_bytes=1 << 20)
sender = sender_to(endpoint)
patience_s = 30.0
while send(sender, [b"x" * 100_000], patience_s):
    patience_s = 0.3
sender.close()
deadline = time.monotonic() + 3.0
while time.monotonic() < deadline:
    time.sleep(0.1)
assert receiver.receive(1.0) == [b"x" * 100_000]
print("alive")
"""


def test_a_learner_that_does_not_read_survives_the_end_of_an_actor_that_it_holds_back(tmp_path: Path) -> None:
    # libzmq 4.3.5 aborts the process here when heartbeats are on: see the docstring of sockets.py. In a
    # process of its own, because an abort would take the tests with it.
    result = subprocess.run(
        [sys.executable, "-c", PEER_VANISHES, f"ipc://{tmp_path}/s"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout.strip()) == (0, "alive"), result.stderr


BOTH_END = """
import sys
from services.wire.sockets import RolloutReceiver
from tests.unit.wire.sending import send, sender_to
for turn in range(20):
    receiver = RolloutReceiver(sys.argv[1] + str(turn), queue=2, max_message_bytes=1 << 20)
    sender = sender_to(receiver.endpoint)
    patience_s = 30.0
    while send(sender, [b"header"] + [b"x" * 3000] * 6, patience_s):
        patience_s = 0.05
    receiver.close()
    sender.close()
print("alive")
"""


def test_an_actor_that_is_held_back_survives_that_its_learner_ends_as_it_leaves_it(tmp_path: Path) -> None:
    # With messages of several frames libzmq 4.3.5 aborts the process here: see the docstring of sockets.py.
    result = subprocess.run(
        [sys.executable, "-c", BOTH_END, f"ipc://{tmp_path}/s"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout.strip()) == (0, "alive"), result.stderr


def test_a_sender_is_held_back_after_a_few_messages_until_the_learner_reads(
    tmp_path: Path,
) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    message = [b"header", b"x" * 1_000_000]
    with (
        RolloutReceiver(endpoint, queue=2, max_message_bytes=1 << 24) as receiver,
        sender_to(endpoint) as sender,
    ):
        sent, patience_s = 0, 30.0
        while send(sender, message, patience_s):
            sent, patience_s = sent + 1, 0.5
            assert sent < 20, "nothing holds the sender back"
        # Both queues of two, and at most two messages on their way between them.
        assert 2 <= sent <= 6
        for _ in range(sent):
            assert receiver.receive(5.0) == message
        assert receiver.receive(0.5) is None
        assert send(sender, message, timeout_s=5.0)
        assert receiver.receive(5.0) == message


def test_a_sender_without_a_learner_reports_that_nothing_left(tmp_path: Path) -> None:
    with sender_to(f"ipc://{tmp_path}/nobody") as sender:
        assert not send(sender, [b"x"], timeout_s=0.1)


SENDS_AND_ENDS = """
import sys
from services.wire.sockets import finish
from tests.unit.wire.sending import send, sender_to
sender = sender_to(sys.argv[1])
sent = 0
while send(sender, [b"header", b"x" * 4_000_000], timeout_s=60.0 if sent < 3 else 1.0):
    sent += 1
sender.close(linger_s=60.0)
print(sent, flush=True)
sys.exit(0 if finish(60.0) else 1)
"""
ENDS_UNHEARD = """
import sys
from services.wire.sockets import finish
from tests.unit.wire.sending import send, sender_to
sender = sender_to(sys.argv[1])
sent = 0
while send(sender, [b"x" * 4_000_000], timeout_s=1.0 if sent else 60.0):
    sent += 1
sender.close(linger_s=60.0)
sys.exit(0 if finish(0.2) else 1)
"""


def test_what_an_actor_has_sent_arrives_although_the_learner_reads_only_after_its_end(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    with RolloutReceiver(endpoint, queue=1, max_message_bytes=1 << 24) as receiver:
        command = [sys.executable, "-c", SENDS_AND_ENDS, endpoint]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as actor:
            assert actor.stdout is not None
            sent = int(
                actor.stdout.readline()
            )  # its sockets are closed, and what is in them does not fit here
            assert sent > 2
            for _ in range(sent):
                frames = receiver.receive(60.0)
                assert frames is not None
                assert len(frames[1]) == 4_000_000
            assert actor.wait(60) == 0


def test_the_end_waits_for_a_learner_that_reads_nothing_no_longer_than_it_may(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    with RolloutReceiver(endpoint, queue=1, max_message_bytes=1 << 24):
        actor = subprocess.run([sys.executable, "-c", ENDS_UNHEARD, endpoint], timeout=60, check=False)
    assert actor.returncode == 1


def test_an_address_in_use_is_named() -> None:
    with (
        RolloutReceiver("tcp://127.0.0.1:*", queue=1, max_message_bytes=1024) as first,
        pytest.raises(ValueError, match=rf"^wire.learner_bind = '{first.endpoint}': .*already in use"),
    ):
        RolloutReceiver(first.endpoint, queue=1, max_message_bytes=1024)


RUNS_OUT_OF_FILES = """
import os, resource, sys
from services.wire.sockets import Replier
replier = Replier("tcp://127.0.0.1:*", max_message_bytes=1 << 24)
print(replier.endpoint, flush=True)
peer, *_ = replier.receive(30.0)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), 4096))
try:
    while True:
        os.dup(0)
except OSError:
    pass
assert replier.send(peer, [b"header", bytes(1 << 20)])
sys.stdin.read()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_server_without_a_file_left_goes_on_answering() -> None:
    with ExitStack() as opened:
        server = opened.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", RUNS_OUT_OF_FILES],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        opened.callback(server.kill)
        assert server.stdout is not None
        client = opened.enter_context(Requester(server.stdout.readline().strip(), max_message_bytes=1 << 24))
        assert client.send([b"request"], timeout_s=30.0)
        assert client.receive(10.0) == [b"header", bytes(1 << 20)]


def is_connected(client: socket.socket, within_ms: int) -> bool:
    poll = select.poll()
    poll.register(client, select.POLLOUT)
    return bool(poll.poll(within_ms))


LISTENS = """
import sys
from services.wire.sockets import Replier
replier = Replier("tcp://127.0.0.1:*", max_message_bytes=1 << 20)
print(replier.endpoint, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another kernel counts differently")
def test_hundreds_who_come_at_once_wait_to_be_let_in() -> None:
    crowd = 400
    if int(Path("/proc/sys/net/core/somaxconn").read_text(encoding="ascii")) < crowd:
        pytest.skip("this kernel lets fewer wait")
    with ExitStack() as opened:
        server = opened.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", LISTENS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        opened.callback(server.kill)
        assert server.stdout is not None
        host, port = server.stdout.readline().strip().removeprefix("tcp://").split(":")
        server.send_signal(signal.SIGSTOP)  # too busy to accept anybody
        clients = [opened.enter_context(socket.socket()) for _ in range(crowd)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex((host, int(port)))
        assert all(is_connected(client, within_ms=3000) for client in clients)


@pytest.mark.parametrize(("connect_ms", "soon"), [(200, True), (0, False)])
def test_an_address_that_does_not_answer_is_soon_tried_anew(
    connect_ms: int, soon: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "CONNECT_MS", connect_ms)  # 0: the kernel alone, as if there were no timeout
    with ExitStack() as opened:
        silent = opened.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)  # a full queue: as of an address that nobody has, nothing comes back
        for _ in range(4):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        host, port = silent.getsockname()
        client = opened.enter_context(Requester(f"tcp://{host}:{port}", 1024))
        retried = Events(client._socket, zmq.EVENT_CONNECT_RETRIED)
        opened.callback(retried.close)
        opened.callback(client._socket.disable_monitor)
        assert bool(retried.socket.poll(15_000 if soon else 2000)) is soon
