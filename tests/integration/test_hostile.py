"""What a broken or hostile peer can send into a running system: it is counted, and it changes nothing.

What does not even speak ZeroMQ, and single frames far over the limit, libzmq itself refuses: it closes the
connection before anything reaches us, so these cannot be counted. The tests only ask that they do no harm.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard

from services.config import EnvConfig
from services.learner.batch import message_bytes, rollout_schema
from services.learner.checkpoint import read
from services.local.plan import reserved_ports
from services.ops.metrics import INVALID_REASONS
from services.rl.actions import Discrete
from services.rl.envs import env_spec
from services.wire.codec import Expected, Unpacker, WireError, decode, encode
from services.wire.messages import (
    NO_VERSION,
    PROTOCOL_VERSION,
    Buffer,
    Client,
    Goodbye,
    Publish,
    Pull,
    Refusal,
    Rollout,
    Weights,
)
from services.wire.sockets import Requester
from tests.integration.conftest import StartPod
from tests.integration.system import START_S, Pod, field, rss_bytes, scrape
from tests.unit.learner.rollouts import play
from tests.unit.learner.waiting import until
from tests.unit.wire.mutations import Mutator
from tests.unit.wire.sending import stranger_to

pytestmark = pytest.mark.integration

RUN = "local"
NUM_MESSAGES = 1000
UNROLL_LENGTH = 20
ENV = EnvConfig(id="catch", kwargs={"pixels": True}, frame_height=24, frame_width=24)
PIXELS = ("--env.kwargs", '{"pixels": true}', "--env.frame_height", "24", "--env.frame_width", "24")
SPEC = env_spec(ENV)
SCHEMA = rollout_schema(SPEC, Discrete(SPEC.num_actions), UNROLL_LENGTH)
ROLLOUTS = Expected(
    run_id=RUN, max_message_bytes=message_bytes(SCHEMA), schema=SCHEMA, max_episodes=UNROLL_LENGTH
)
REQUESTS = Expected(run_id=RUN, max_message_bytes=1 << 20)
NEVER_STALE = ("--learner.max_policy_lag", "1000000")
"""Version 0 is as good as any, so that the learner looks inside of every rollout that it lets in."""
HOSTILE = Client(client_id="hostile", incarnation=1)
MAX_GROWTH_BYTES = 64 << 20
"""Much less than the 100 MiB that one bomb holds, or a leak of all messages would be."""


class Mutations(Mutator):
    """Damaged versions of these messages."""

    def __init__(self, seed: int, valid: Sequence[list[Buffer]]) -> None:
        super().__init__(seed)
        self._valid = [[bytes(frame) for frame in frames] for frames in valid]


def rollouts() -> list[Rollout]:
    """Valid ones, as an actor would send them."""
    return [
        Rollout(
            run_id=RUN,
            actor_id="hostile",
            incarnation=1,
            sequence=sequence,
            policy_version=0,
            task=0,
            episodes=(),
            arrays=unroll.packed,
        )
        for sequence, unroll in enumerate(play(ENV, UNROLL_LENGTH, num_unrolls=2, codec="zstd"))
    ]


def bombs() -> Iterator[list[Buffer]]:
    """Valid on the outside; what is inside decompresses to something else than announced."""
    message = rollouts()[0]
    observation = message.arrays["observation"]
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27)
    ).compressobj()
    for data in (
        zstandard.ZstdCompressor().compress(bytes(100 << 20)),
        wide.compress(bytes(1000)) + wide.flush(),
        zstandard.ZstdCompressor().compress(b""),
        b"",
    ):
        yield encode(
            replace(message, arrays={**message.arrays, "observation": observation._replace(data=data)})
        )


def refusal_of(frames: Sequence[Buffer], expected: Expected) -> str | None:
    """The reason for which this message must be refused, or None."""
    try:
        message = decode(frames, expected)
        if isinstance(message, Rollout):
            for name, packed in message.arrays.items():
                Unpacker().unpack_into(packed, np.empty(packed.shape, SCHEMA[name].dtype))
            return None
    except WireError as error:
        return error.reason
    if isinstance(message, Refusal) or expected is ROLLOUTS:
        return "malformed"
    return None


def bad_rollouts() -> Iterator[tuple[list[bytes], str | None]]:
    """Damaged ones and the reason for which each must be refused; some are valid all the same."""
    mutations = Mutations(7, [encode(message) for message in rollouts()])
    for _ in range(NUM_MESSAGES):
        frames = mutations.draw()
        if not frames or any(len(frame) > 2 * ROLLOUTS.max_message_bytes for frame in frames):
            continue  # libzmq's business
        reason = refusal_of(frames, ROLLOUTS)
        if reason in (None, "corrupt"):
            with suppress(WireError):
                message = decode(frames, ROLLOUTS)
                if isinstance(message, Rollout) and message.policy_version > 0:
                    continue  # from the learner's future: dropped as stale before anybody looks inside
        yield frames, reason
    for bomb in bombs():
        yield [bytes(frame) for frame in bomb], "corrupt"
    for frames in ([b""], [b"x" * ROLLOUTS.max_message_bytes] * 2, [b"\0"] * 1000):
        yield frames, refusal_of(frames, ROLLOUTS)
    header = msgpack.unpackb(encode(rollouts()[0])[0])
    yield [msgpack.packb([PROTOCOL_VERSION + 1, *header[1:]])], "protocol"


def bad_requests() -> Iterator[tuple[list[bytes], str | None]]:
    """The same for the parameter server. A publish that is valid is no damage but an order, and left out."""
    valid = [
        encode(Pull(run_id=RUN, sender=HOSTILE, have_version=NO_VERSION, seats_for=(HOSTILE,))),
        encode(Publish(run_id=RUN, sender=HOSTILE, state="training", version=0, steps=0, payload=b"x" * 500)),
        encode(Goodbye(run_id=RUN, sender=HOSTILE)),
        encode(Refusal(reason="run", text="no")),
        encode(rollouts()[0]),
    ]
    mutations = Mutations(8, valid)
    for _ in range(NUM_MESSAGES):
        frames = mutations.draw()
        if not frames or any(len(frame) > REQUESTS.max_message_bytes for frame in frames):
            continue
        reason = refusal_of(frames, REQUESTS)
        if reason is None and isinstance(decode(frames, REQUESTS), Publish):
            continue
        yield frames, reason


class RefusedCount:
    """How many messages a pod has refused by reason since this was made."""

    def __init__(self, pod: Pod, metric: str) -> None:
        self._pod = pod
        self._metric = metric
        self._before = self._now()

    def _now(self) -> Counter[str]:
        samples = scrape(self._pod.port)
        assert samples, f"it does not answer; its log:\n{self._pod.log()}"
        return Counter(
            {r: int(samples[f'impala_{self._metric}_total{{reason="{r}"}}']) for r in INVALID_REASONS}
        )

    def reaches(self, expected: Counter[str]) -> None:
        """Exactly these, once all have arrived."""
        until(lambda: self.so_far().total() >= expected.total(), str(expected), START_S)
        assert self.so_far() == expected

    def so_far(self) -> Counter[str]:
        return self._now() - self._before


@contextmanager
def unharmed(learner: Pod, paramserver: Pod) -> Iterator[None]:
    """Both live on in the same memory, and the training goes on, while ``with`` it is tried to stop that."""
    pods = (learner, paramserver)
    before = [rss_bytes(pod.pid) for pod in pods]
    yield
    updates = learner.value("learner_updates_total")
    until(lambda: learner.value("learner_updates_total") > updates + 10, "training", START_S)
    version = paramserver.value("paramserver_version")
    until(lambda: paramserver.value("paramserver_version") > version, "publishing")
    for pod, rss in zip(pods, before, strict=True):
        assert pod.alive
        assert rss_bytes(pod.pid) < rss + MAX_GROWTH_BYTES
        assert not pod.lines("failed"), pod.log()
        assert not pod.lines("request_failed"), pod.log()


def tcp_garbage() -> Iterator[bytes]:
    """What does not speak ZeroMQ, or stops to."""
    rng = np.random.default_rng(9)
    yield b""
    yield b"GET /metrics HTTP/1.1\r\nHost: learner\r\n\r\n"
    for size in (1, 10, 64, 1000, 100_000):
        yield rng.bytes(size)
    greeting = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
    yield greeting
    yield greeting[:40]
    yield greeting + rng.bytes(5000)
    for kind in (b"PUSH", b"DEALER"):
        ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
        connected = greeting + b"\x04" + bytes([len(ready)]) + ready
        yield connected + b"\x02" + struct.pack(">Q", 2**62)  # a frame of four exabytes begins
        yield connected + b"\x01\x05first"  # more frames follow, but never do
        yield connected + b"\x04" + b"\xff" + rng.bytes(255)  # a command that is none
        yield connected + rng.bytes(5000)


def pour(port: int) -> None:
    """Send each kind of garbage over a connection of its own, all at once; a third of them is reset."""
    with ExitStack() as connections:
        for number, garbage in enumerate([*tcp_garbage()] * 3):
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            with suppress(OSError):  # it may have been closed by then, which is as good
                connection.sendall(garbage)
            if number % 3 == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()


@pytest.fixture
def two_ports() -> Iterator[list[int]]:
    """Nobody else's while the test runs."""
    with reserved_ports(0, 2) as ports:
        yield ports


def test_nothing_that_arrives_harms_a_running_system(start_pod: StartPod, two_ports: list[int]) -> None:
    rollout_port, request_port = two_ports
    rollout_endpoint, request_endpoint = (f"tcp://127.0.0.1:{port}" for port in two_ports)
    flags = [*PIXELS, *NEVER_STALE]
    flags += ["--wire.learner_bind", rollout_endpoint]
    flags += ["--wire.paramserver_bind", request_endpoint, "--wire.paramserver_endpoint", request_endpoint]
    flags += ["--total_steps", "1000000000"]
    paramserver, learner, _ = (start_pod(role, *flags) for role in ("paramserver", "learner", "actor"))
    until(lambda: learner.value("learner_updates_total") > 20, "training", START_S)

    with unharmed(learner, paramserver):
        counted = RefusedCount(learner, "learner_invalid_rollouts")
        expected: Counter[str] = Counter()
        with stranger_to(rollout_endpoint) as stranger:
            for frames, reason in bad_rollouts():
                stranger.send_multipart(frames)
                expected.update([reason] if reason else [])
            counted.reaches(expected)
        assert set(expected) == set(INVALID_REASONS)
        assert expected.total() > NUM_MESSAGES / 2

    with unharmed(learner, paramserver):
        counted = RefusedCount(paramserver, "paramserver_refused_requests")
        expected = Counter()
        for frames, reason in bad_requests():
            with Requester(request_endpoint, 1 << 20) as requester:
                assert requester.send(frames, timeout_s=30.0)
                requester.close(linger_s=5.0)
            expected.update([reason] if reason else [])
        counted.reaches(expected)
        assert expected.total() > NUM_MESSAGES / 2

    with unharmed(learner, paramserver):
        counted = RefusedCount(learner, "learner_invalid_rollouts")
        for port in (rollout_port, request_port):
            pour(port)
        with stranger_to(rollout_endpoint) as stranger:
            stranger.send(b"x" * (10 * ROLLOUTS.max_message_bytes))
            stranger.send(b"garbage")  # over a connection that was made anew
        until(counted.so_far, "the last one is counted", START_S)
        assert set(counted.so_far()) == {"malformed"}  # with what happened to look like frames to libzmq

    with Requester(request_endpoint, 1 << 24) as requester:
        pull = Pull(run_id=RUN, sender=HOSTILE, have_version=NO_VERSION, seats_for=())
        assert requester.send(encode(pull), timeout_s=10.0)
        reply = requester.receive(timeout_s=10.0)
    assert reply is not None
    served = decode(reply, replace(REQUESTS, max_message_bytes=1 << 24))
    assert isinstance(served, Weights)
    assert served.payload is not None
    learner.terminate()
    assert learner.exit_code(10.0) == 0, learner.log()
    checkpoint = read(Path(field(learner.lines("checkpoint_written")[-1], "path")))
    for tensors in (safetensors.torch.load(bytes(served.payload)), checkpoint.trainer["network"]):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
