"""Messages to lists of frames and back: sans-I/O, no sockets, no clocks.

A message is a small msgpack header and then one raw buffer per array or payload, which are neither copied on
the way out nor on the way in. Whatever arrives is checked before anything is allocated for it: a frame list
that breaks a rule is a ``WireError`` with a countable reason, never another exception. Only ``unpack_into``
runs a decompressor, and only into a buffer of the size that the run's schema fixed beforehand.

``to_bytes`` joins a message's frames into one piece of memory, for whoever holds or stores many of them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray

from services.wire.messages import (
    NO_SEAT,
    PROTOCOL_VERSION,
    ArraySpec,
    Attend,
    Buffer,
    Client,
    Destination,
    Episode,
    Goodbye,
    Member,
    Message,
    PackedArray,
    Phase,
    Publish,
    Published,
    Pull,
    Refusal,
    Rollout,
    RunState,
    View,
    Weights,
)

Codec = Literal["none", "zstd"]
Reason = Literal["malformed", "protocol", "run", "oversized", "schema", "corrupt"]
"""malformed: not one of our messages; protocol: another version of them; run: of another run; oversized: over
``max_message_bytes``; schema: not the arrays of this run; corrupt: does not decompress to what it says."""

REASONS: tuple[Reason, ...] = get_args(Reason)

ZSTD_LEVEL = 1
MAX_WINDOW_BYTES = 1 << 23
MAX_COUNT = 2**53
"""Bound of versions, steps and sequence numbers: beyond any run, and exact in every language."""
MAX_HEADER_BYTES = 1 << 20
MAX_FRAMES = 64
MAX_NAME = 256
MAX_LEARNER_NAME = 128
"""Of a learner's name and of its store: a view of all learners, in any script, fits a header."""
MAX_DIGEST = 64
MAX_SEATS = 16_384
MAX_LEARNERS = 256
DTYPES = frozenset({"uint8", "bool", "int32", "int64", "float32"})


class WireError(ValueError):
    """What arrived is not acceptable. ``reason`` is a metric label, the text is for the log."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """What one array of a rollout must be."""

    spec: ArraySpec
    dtype: np.dtype[Any]
    shape: list[int]
    """As it stands in a header."""
    size_bytes: int
    """Unless it is compressed."""
    unsigned: np.dtype[Any]
    """Integers: the same bytes read without a sign."""


def _rule(spec: ArraySpec) -> _Rule:
    dtype = np.dtype(spec.dtype)
    size_bytes = math.prod(spec.shape) * dtype.itemsize
    assert spec.high is None or spec.high <= np.iinfo(dtype).max, spec
    unsigned = np.dtype(f"u{dtype.itemsize}") if dtype.kind == "i" else dtype
    return _Rule(spec=spec, dtype=dtype, shape=[*spec.shape], size_bytes=size_bytes, unsigned=unsigned)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a receiver accepts."""

    run_id: str
    max_message_bytes: int
    schema: Mapping[str, ArraySpec] | None = None
    """Of rollouts; who passes none accepts no rollouts."""
    num_tasks: int = 1
    """A rollout's task is below it."""
    max_episodes: int = 65_536
    """That may end in one rollout."""
    rules: Mapping[str, _Rule] = field(init=False, repr=False, compare=False)
    """What follows from the schema, worked out once and not for every rollout."""

    def __post_init__(self) -> None:
        rules = {name: _rule(spec) for name, spec in (self.schema or {}).items()}
        object.__setattr__(self, "rules", rules)


# --- arrays ---------------------------------------------------------------------------------------


class Packer:
    """Compresses arrays. Holds a compression context, so one per thread."""

    def __init__(self, codec: Codec) -> None:
        self.codec: Codec = codec
        self._zstd = zstandard.ZstdCompressor(level=ZSTD_LEVEL)

    def pack(self, array: NDArray[Any]) -> PackedArray:
        """Byte arrays are compressed; others travel as they are, without a copy if they are contiguous."""
        contiguous = np.ascontiguousarray(array)
        data: Buffer = contiguous.reshape(-1).view(np.uint8).data
        codec: Codec = self.codec if array.dtype == np.uint8 else "none"
        if codec == "zstd":
            data = self._zstd.compress(data)
        return PackedArray(dtype=array.dtype.name, shape=array.shape, codec=codec, data=data)


class Unpacker:
    """Decompresses arrays. Holds a decompression context, so one per thread."""

    def __init__(self) -> None:
        # A frame's own idea of its window would otherwise decide how much the decompressor allocates.
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)

    def unpack_into(self, packed: PackedArray, out: NDArray[Any]) -> None:
        """Fill ``out``, contiguous and of the array's dtype and shape; WireError if the data does not fit."""
        assert out.flags.c_contiguous and out.shape == packed.shape and out.dtype.name == packed.dtype
        if packed.codec == "none":
            np.copyto(out, view(packed))
            return
        target = out.reshape(-1).view(np.uint8)
        try:
            # Streaming into the caller's buffer: a frame that lies about its size can neither make us
            # allocate nor write past the end.
            with self._zstd.stream_reader(packed.data) as reader:
                written = 0
                while written < target.nbytes:
                    count = reader.readinto(target[written:])
                    if not count:
                        break
                    written += count
                longer = written == target.nbytes and bool(reader.read(1))
        except (zstandard.ZstdError, ValueError, MemoryError) as error:
            raise WireError("corrupt", f"zstd: {error}") from None
        if written != target.nbytes or longer:
            raise WireError(
                "corrupt", f"zstd: {'more' if longer else written} bytes where {target.nbytes} were announced"
            )


def view(packed: PackedArray) -> NDArray[Any]:
    """The array of an uncompressed PackedArray, sharing its memory."""
    assert packed.codec == "none"
    return np.frombuffer(packed.data, packed.dtype).reshape(packed.shape)


def size_bytes(frames: Sequence[Buffer]) -> int:
    """Bytes of payload in a message."""
    return sum([frame.nbytes if isinstance(frame, memoryview) else len(frame) for frame in frames])


# --- encoding -------------------------------------------------------------------------------------


def encode(message: Message) -> list[Buffer]:
    """The frames of a message."""
    match message:
        case Rollout():
            packed = message.arrays.values()
            header = [
                *_rollout_head(message),
                [[e.episode_return, e.length] for e in message.episodes],
                [[name, a.dtype, a.shape, a.codec] for name, a in message.arrays.items()],
            ]
            return _frames("rollout", header, *(array.data for array in packed))
        case Pull():
            seats_for = [_client(client) for client in message.seats_for]
            head = [message.run_id, _client(message.sender), message.have_version, seats_for]
            return _frames("pull", [*head, message.generation, message.request])
        case Weights():
            head = [message.run_id, message.server_incarnation, message.state, message.version, message.steps]
            learners = [[learner.endpoint, learner.since] for learner in message.learners]
            head += [message.seats, message.generation, learners, message.request]
            return _frames("weights", head, *_optional(message.payload))
        case Publish():
            head = [message.run_id, _client(message.sender), message.state, message.version, message.steps]
            return _frames("publish", head, *_optional(message.payload))
        case Published():
            return _frames("published", [message.run_id, message.server_incarnation, message.version])
        case Attend():
            head = [message.run_id, _client(message.sender), message.endpoint, message.phase]
            head += [message.generation, message.version, message.has_trained, message.store]
            return _frames("attend", [*head, message.rank, message.world_size, message.since, message.config])
        case View():
            members = [[m.client_id, m.incarnation, m.endpoint, m.store, m.since] for m in message.members]
            head = [message.run_id, message.server_incarnation, message.generation, members]
            return _frames("view", [*head, message.holder, message.version, message.num_seats])
        case Goodbye():
            return _frames("goodbye", [message.run_id, _client(message.sender)])
        case Refusal():
            return _frames("refusal", [message.reason, message.text])


def to_bytes(frames: Sequence[Buffer]) -> bytes:
    """One message in one piece: how many frames, the length of each, and the frames."""
    assert 1 <= len(frames) <= MAX_FRAMES
    lengths = [memoryview(frame).nbytes for frame in frames]
    return b"".join([struct.pack(f"<B{len(frames)}I", len(frames), *lengths), *frames])


def _rollout_head(r: Rollout) -> list[Any]:
    return [r.run_id, r.actor_id, r.incarnation, r.sequence, r.policy_version, r.task]


def _client(client: Client) -> list[Any]:
    return [client.client_id, client.incarnation, client.seat]


def _optional(payload: Buffer | None) -> tuple[Buffer, ...]:
    return () if payload is None else (payload,)


def _frames(kind: str, fields: list[Any], *buffers: Buffer) -> list[Buffer]:
    return [msgpack.packb([PROTOCOL_VERSION, kind, fields]), *buffers]


# --- decoding -------------------------------------------------------------------------------------


def decode(frames: Sequence[Buffer], expected: Expected) -> Message:
    """The message in these frames; WireError if it is not an acceptable one.

    The arrays and payloads of the result share the memory of ``frames``.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError("malformed", f"{len(frames)} frames; allowed are 1 to {MAX_FRAMES}")
    total = size_bytes(frames)
    if total > expected.max_message_bytes:
        raise WireError("oversized", f"{total} bytes; allowed are {expected.max_message_bytes}")
    kind, fields = _open_header(frames[0])
    buffers = [memoryview(frame) for frame in frames[1:]]
    if kind == "refusal":
        reason, text = _take(fields, 2)
        return Refusal(reason=_text(reason), text=_text(text, longest=4096))
    if not fields or fields[0] != expected.run_id:
        shown = repr(fields[0])[:80] if fields else "nothing"
        raise WireError("run", f"run {shown}; this is run {expected.run_id!r}")
    if kind == "rollout":
        return _rollout(fields, buffers, expected)
    if kind not in _DECODERS:
        raise WireError("malformed", f"message kind {kind!r:.80}")
    return _DECODERS[kind](fields, buffers)


def from_bytes(data: Buffer) -> list[Buffer]:
    """The frames that ``to_bytes`` joined, sharing the memory of ``data``; WireError if they are none."""
    whole = memoryview(data).cast("B")
    num_frames = whole[0] if whole.nbytes else 0
    start = 1 + 4 * num_frames
    if not 1 <= num_frames <= MAX_FRAMES or whole.nbytes < start:
        raise WireError("malformed", f"{whole.nbytes} bytes that do not begin with the lengths of frames")
    frames: list[Buffer] = []
    for length in struct.unpack_from(f"<{num_frames}I", whole, 1):
        frames.append(whole[start : start + length])
        start += length
    if start != whole.nbytes:
        raise WireError("malformed", f"{whole.nbytes} bytes where frames of {start} were announced")
    return frames


def _open_header(frame: Buffer) -> tuple[str, list[Any]]:
    if memoryview(frame).nbytes > MAX_HEADER_BYTES:
        raise WireError(
            "malformed", f"header of {memoryview(frame).nbytes} bytes; allowed are {MAX_HEADER_BYTES}"
        )
    try:
        header = msgpack.unpackb(frame, ext_hook=_no_extension)
    except Exception as error:  # noqa: BLE001  (msgpack has its own tree beside ValueError, RecursionError, ...)
        raise WireError("malformed", f"header: {type(error).__name__}") from None
    if not isinstance(header, list) or len(header) != 3 or not isinstance(header[0], int):
        raise WireError("malformed", "header is not [protocol version, kind, fields]")
    version, kind, fields = header
    if kind == "refusal" and isinstance(fields, list):
        return kind, fields  # readable across versions, or a mismatch could not be explained
    if version != PROTOCOL_VERSION:
        raise WireError(
            "protocol", f"the peer speaks protocol {version}, this is protocol {PROTOCOL_VERSION}"
        )
    if not isinstance(kind, str) or not isinstance(fields, list):
        raise WireError("malformed", "header is not [protocol version, kind, fields]")
    return kind, fields


def _no_extension(_code: int, _data: bytes) -> None:
    raise ValueError("msgpack extension types are not used")


def _rollout(fields: list[Any], buffers: list[memoryview], expected: Expected) -> Rollout:
    if expected.schema is None:
        raise WireError("malformed", "a rollout where none is accepted")
    run_id, actor_id, incarnation, sequence, policy_version, task, episodes, arrays = _take(fields, 8)
    if not _integer(task) < expected.num_tasks:
        raise WireError("schema", f"task {task}; allowed is less than {expected.num_tasks}")
    if not isinstance(arrays, list) or len(arrays) != len(expected.schema) or len(buffers) != len(arrays):
        raise WireError("schema", f"{len(buffers)} arrays; allowed are {', '.join(expected.schema)}")
    packed: dict[str, PackedArray] = {}
    for entry, data in zip(arrays, buffers, strict=True):
        if not isinstance(entry, list) or len(entry) != 4 or not isinstance(entry[0], str):
            raise WireError("malformed", "array entry is not [name, dtype, shape, codec]")
        name = entry[0]
        rule = expected.rules.get(name)
        if rule is None or name in packed:
            raise WireError(
                "schema", f"array {name!r:.80}; allowed, once each, are {', '.join(expected.schema)}"
            )
        packed[name] = _array(name, entry, data, rule)
    return Rollout(
        run_id=run_id,
        actor_id=_text(actor_id),
        incarnation=_integer(incarnation),
        sequence=_integer(sequence, high=MAX_COUNT),
        policy_version=_integer(policy_version, high=MAX_COUNT),
        task=task,
        episodes=tuple(_episode(e) for e in _list(episodes, longest=expected.max_episodes)),
        arrays=packed,
    )


def _array(name: str, entry: list[Any], data: memoryview, rule: _Rule) -> PackedArray:
    _, dtype, shape, codec = entry
    spec = rule.spec
    if dtype != spec.dtype or shape != rule.shape:
        raise WireError(
            "schema", f"{name} is {dtype!r:.40} {shape!r:.80}; allowed is {spec.dtype} {list(spec.shape)}"
        )
    if spec.dtype not in DTYPES:
        raise WireError("schema", f"{name}: dtype {spec.dtype} does not travel")
    if codec == "none":
        if data.nbytes != rule.size_bytes:
            raise WireError("corrupt", f"{name} has {data.nbytes} bytes; its shape needs {rule.size_bytes}")
        _check_values(name, data, rule)
    elif codec != "zstd" or spec.dtype != "uint8":
        raise WireError("schema", f"{name}: codec {codec!r:.40} for {spec.dtype}")
    return PackedArray(dtype=spec.dtype, shape=spec.shape, codec=codec, data=data)


def _check_values(name: str, data: memoryview, rule: _Rule) -> None:
    """Values that would crash or poison the training step must not get near it.

    Searching bytes takes a quarter of the time of numpy's reductions, and these arrays are small.
    """
    spec = rule.spec
    if spec.dtype == "float32":
        if b"\0" in np.isfinite(np.frombuffer(data, rule.dtype)).tobytes():
            raise WireError("schema", f"{name} holds a value that is not finite")
    elif spec.dtype == "bool":
        if bytes(data).translate(None, b"\0\1"):
            raise WireError("schema", f"{name} holds a byte that is neither 0 nor 1")
    elif spec.high is not None and b"\1" in (np.frombuffer(data, rule.unsigned) > spec.high).tobytes():
        # Without its sign a negative number is larger than any that is allowed.
        array = np.frombuffer(data, rule.dtype)
        raise WireError(
            "schema", f"{name} holds {array.min()} to {array.max()}; allowed are 0 to {spec.high}"
        )


def _pull(fields: list[Any], buffers: list[memoryview]) -> Pull:
    run_id, sender, have_version, seats_for, generation, request = _take(fields, 6)
    _no_buffers(buffers)
    return Pull(
        run_id=run_id,
        sender=_to_client(sender),
        have_version=_integer(have_version, low=-1, high=MAX_COUNT),
        seats_for=tuple(_to_client(c) for c in _list(seats_for, longest=MAX_SEATS)),
        generation=_integer(generation, high=MAX_COUNT),
        request=_integer(request),
    )


def _weights(fields: list[Any], buffers: list[memoryview]) -> Weights:
    run_id, incarnation, state, version, steps, *rest = _take(fields, 9)
    seats, generation, learners, request = rest
    return Weights(
        run_id=run_id,
        server_incarnation=_integer(incarnation),
        state=_state(state),
        version=_integer(version, low=-1, high=MAX_COUNT),
        steps=_integer(steps, high=MAX_COUNT),
        seats=tuple(_seat(seat) for seat in _list(seats, longest=MAX_SEATS)),
        payload=_at_most_one(buffers),
        generation=_integer(generation, high=MAX_COUNT),
        learners=tuple(_destination(d) for d in _list(learners, longest=MAX_LEARNERS)),
        request=_integer(request),
    )


def _publish(fields: list[Any], buffers: list[memoryview]) -> Publish:
    run_id, sender, state, version, steps = _take(fields, 5)
    return Publish(
        run_id=run_id,
        sender=_to_client(sender),
        state=_state(state),
        version=_integer(version, high=MAX_COUNT),
        steps=_integer(steps, high=MAX_COUNT),
        payload=_at_most_one(buffers),
    )


def _published(fields: list[Any], buffers: list[memoryview]) -> Published:
    run_id, incarnation, version = _take(fields, 3)
    _no_buffers(buffers)
    return Published(
        run_id=run_id,
        server_incarnation=_integer(incarnation),
        version=_integer(version, low=-1, high=MAX_COUNT),
    )


def _goodbye(fields: list[Any], buffers: list[memoryview]) -> Goodbye:
    run_id, sender = _take(fields, 2)
    _no_buffers(buffers)
    return Goodbye(run_id=run_id, sender=_to_client(sender))


def _attend(fields: list[Any], buffers: list[memoryview]) -> Attend:
    run_id, sender, endpoint, phase, generation, version, *rest = _take(fields, 12)
    has_trained, store, rank, world_size, since, config = rest
    _no_buffers(buffers)
    if phase not in get_args(Phase):
        raise WireError("malformed", f"phase {phase!r:.40}")
    if type(has_trained) is not bool:
        raise WireError("malformed", f"{has_trained!r:.40} where true or false belongs")
    if not _integer(rank) < _integer(world_size, low=1, high=MAX_LEARNERS + 1):
        raise WireError("malformed", f"rank {rank} of {world_size}")
    return Attend(
        run_id=run_id,
        sender=_to_client(sender, longest=MAX_LEARNER_NAME),
        endpoint=_text(endpoint),
        phase=cast(Phase, phase),
        generation=_integer(generation, high=MAX_COUNT),
        version=_integer(version, high=MAX_COUNT),
        has_trained=has_trained,
        store=_text(store, longest=MAX_LEARNER_NAME),
        rank=rank,
        world_size=world_size,
        since=_integer(since, high=MAX_COUNT),
        config=_text(config, longest=MAX_DIGEST),
    )


def _view(fields: list[Any], buffers: list[memoryview]) -> View:
    run_id, incarnation, generation, members, holder, version, num_seats = _take(fields, 7)
    _no_buffers(buffers)
    decoded = tuple(_member(member) for member in _list(members, longest=MAX_LEARNERS))
    if not _integer(holder) < max(1, len(decoded)):
        raise WireError("malformed", f"holder {holder} of {len(decoded)} members")
    return View(
        run_id=run_id,
        server_incarnation=_integer(incarnation),
        generation=_integer(generation, high=MAX_COUNT),
        members=decoded,
        holder=holder,
        version=_integer(version, low=-1, high=MAX_COUNT),
        num_seats=_integer(num_seats, high=MAX_COUNT),
    )


def _member(value: Any) -> Member:
    client_id, incarnation, endpoint, store, since = _take(_list(value, longest=5), 5)
    return Member(
        client_id=_text(client_id, longest=MAX_LEARNER_NAME),
        incarnation=_integer(incarnation),
        endpoint=_text(endpoint),
        store=_text(store, longest=MAX_LEARNER_NAME),
        since=_integer(since, high=MAX_COUNT),
    )


def _destination(value: Any) -> Destination:
    endpoint, since = _take(_list(value, longest=2), 2)
    return Destination(endpoint=_text(endpoint), since=_integer(since, high=MAX_COUNT))


_DECODERS: Mapping[str, Callable[[list[Any], list[memoryview]], Message]] = {
    "pull": _pull,
    "weights": _weights,
    "publish": _publish,
    "published": _published,
    "attend": _attend,
    "view": _view,
    "goodbye": _goodbye,
}
"""From a kind to the function that takes its header's fields and its buffers."""


def _take(fields: list[Any], count: int) -> list[Any]:
    if len(fields) != count:
        raise WireError("malformed", f"{len(fields)} header fields where {count} belong")
    return fields


def _list(value: Any, longest: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > longest:
        raise WireError("malformed", f"not a list of at most {longest}")
    return value


def _text(value: Any, longest: int = MAX_NAME) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise WireError("malformed", f"not a text of at most {longest} characters")
    return value


def _integer(value: Any, low: int = 0, high: int = 2**63) -> int:
    if type(value) is not int or not low <= value < high:
        raise WireError("malformed", f"{value!r:.40} where an integer from {low} to below {high} belongs")
    return value


def _state(value: Any) -> RunState:
    if value not in get_args(RunState):
        raise WireError("malformed", f"run state {value!r:.40}")
    return cast(RunState, value)


def _to_client(value: Any, longest: int = MAX_NAME) -> Client:
    client_id, incarnation, seat = _take(_list(value, longest=3), 3)
    return Client(client_id=_text(client_id, longest), incarnation=_integer(incarnation), seat=_seat(seat))


def _seat(value: Any) -> int:
    return _integer(value, low=NO_SEAT, high=MAX_SEATS)


def _episode(value: Any) -> Episode:
    episode_return, length = _take(_list(value, longest=2), 2)
    if type(episode_return) is not float or not math.isfinite(episode_return):
        raise WireError("malformed", f"episode return {episode_return!r:.40}")
    return Episode(episode_return=episode_return, length=_integer(length))


def _no_buffers(buffers: list[memoryview]) -> None:
    if buffers:
        raise WireError("malformed", f"{len(buffers)} frames too many")


def _at_most_one(buffers: list[memoryview]) -> memoryview | None:
    if len(buffers) > 1:
        raise WireError("malformed", f"{len(buffers) - 1} frames too many")
    return buffers[0] if buffers else None
