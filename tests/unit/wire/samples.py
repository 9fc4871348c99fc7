"""One of each message, and the way they take: encoded, carried as other memory, decoded."""

from collections.abc import Sequence

import numpy as np

from services.wire.codec import MAX_LEARNERS, Expected, Packer, decode, encode
from services.wire.messages import (
    NO_GENERATION,
    ArraySpec,
    Attend,
    Buffer,
    Client,
    Destination,
    Episode,
    Goodbye,
    Member,
    Message,
    Publish,
    Published,
    Pull,
    Refusal,
    Rollout,
    View,
    Weights,
)

T, ACTIONS = 5, 4
SCHEMA = {
    "frames": ArraySpec(dtype="uint8", shape=(T + 1, 8, 8)),
    "action": ArraySpec(dtype="int32", shape=(T,), high=ACTIONS - 1),
    "task_step": ArraySpec(dtype="int64", shape=(T,), high=2**63 - 1),
    "done": ArraySpec(dtype="bool", shape=(T + 1,)),
    "behaviour_logits": ArraySpec(dtype="float32", shape=(T, ACTIONS)),
}
LIMIT = 64 * 1024
NUM_TASKS = 57
EXPECTED = Expected(run_id="run", max_message_bytes=LIMIT, schema=SCHEMA, num_tasks=NUM_TASKS)
CLIENT = Client(client_id="actor-0", incarnation=2**62, seat=3)


def arrays() -> dict[str, np.ndarray]:
    """What an unroll may hold, with the extreme values that are allowed."""
    rng = np.random.default_rng(1)
    return {
        "frames": rng.integers(0, 256, (T + 1, 8, 8), np.uint8),
        "action": np.array([0, 1, 2, ACTIONS - 1, 0], np.int32),
        "task_step": np.array([0, 1, 2**62, 2**63 - 1, 5], np.int64),
        "done": np.array([True, False, False, True, False, False]),
        "behaviour_logits": rng.standard_normal((T, ACTIONS)).astype(np.float32),
    }


def rollout(packer: Packer | None = None, **replaced: np.ndarray) -> Rollout:
    packer = packer or Packer("zstd")
    return Rollout(
        run_id="run",
        actor_id="actor-0",
        incarnation=17,
        sequence=4,
        policy_version=9,
        task=NUM_TASKS - 1,
        episodes=(Episode(episode_return=-21.0, length=900), Episode(episode_return=0.5, length=0)),
        arrays={name: packer.pack(array) for name, array in (arrays() | replaced).items()},
    )


def messages() -> list[Message]:
    """Every message, with and without its optional parts."""
    seated = Client(client_id="ä" * 256, incarnation=0)
    weights = Weights(
        run_id="run",
        server_incarnation=2**63 - 1,
        state="training",
        version=8,
        steps=5120,
        seats=(0, -1, 16_383),
        payload=b"\x00weights",
        generation=2**53 - 1,
        learners=(
            Destination(endpoint="tcp://10.0.0.7:5555", since=2),
            Destination(endpoint="ä" * 256, since=2**53 - 1),
        ),
        request=7,
    )
    publish = Publish(run_id="run", sender=CLIENT, state="complete", version=0, steps=0, payload=b"")
    return [
        rollout(Packer("zstd")),
        rollout(Packer("none")),
        Pull(run_id="run", sender=CLIENT, have_version=-1, seats_for=(), request=0),
        Pull(
            run_id="run",
            sender=CLIENT,
            have_version=2**53 - 1,
            seats_for=(CLIENT, seated),
            generation=2**53 - 1,
            request=3,
        ),
        weights,
        Weights(
            run_id="run",
            server_incarnation=0,
            state="waiting",
            version=-1,
            steps=0,
            seats=(),
            payload=None,
        ),
        publish,
        Publish(run_id="run", sender=CLIENT, state="training", version=3, steps=640, payload=None),
        Published(run_id="run", server_incarnation=5, version=-1),
        *attends(),
        *views(),
        Goodbye(run_id="run", sender=CLIENT),
        Refusal(reason="protocol", text="the peer speaks another protocol"),
    ]


def attends() -> list[Attend]:
    """A newcomer that stands, and the last rank of the largest group as it leaves."""
    return [
        Attend(
            run_id="run",
            sender=Client(client_id="learner-0", incarnation=3),
            endpoint="tcp://10.0.0.7:5555",
            phase="standing",
            generation=NO_GENERATION,
            version=0,
            has_trained=False,
            store="10.0.0.7:29500",
            rank=0,
            world_size=1,
            since=NO_GENERATION,
        ),
        Attend(
            run_id="run",
            sender=CLIENT,
            endpoint="ä" * 256,
            phase="leaving",
            generation=2**53 - 1,
            version=2**53 - 1,
            has_trained=True,
            store="",
            rank=MAX_LEARNERS - 1,
            world_size=MAX_LEARNERS,
            since=2**53 - 1,
            config="ä" * 64,
        ),
    ]


def views() -> list[View]:
    """One that is gathered by a server that knows nothing, and a formed one."""
    first = Member(
        client_id="learner-0", incarnation=2**62, endpoint="ipc:///run/l0", store="h:1", since=2**53 - 1
    )
    second = Member(client_id="ä" * 128, incarnation=0, endpoint="", store="", since=0)
    return [
        View(
            run_id="run",
            server_incarnation=0,
            generation=NO_GENERATION,
            members=(),
            holder=0,
            version=-1,
            num_seats=0,
        ),
        View(
            run_id="run",
            server_incarnation=2**63 - 1,
            generation=2**53 - 1,
            members=(first, second),
            holder=1,
            version=2**53 - 1,
            num_seats=16_384,
        ),
    ]


def carry(frames: Sequence[Buffer]) -> list[Buffer]:
    """Over the network: the same bytes in other memory."""
    return [memoryview(bytes(frame)) for frame in frames]


def cross(message: Message, expected: Expected = EXPECTED) -> Message:
    """What the other end sees of ``message``."""
    return decode(carry(encode(message)), expected)
