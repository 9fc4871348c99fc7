"""Every message arrives as it was sent, and whatever is not acceptable is refused for the right reason."""

import sys
from collections.abc import Callable
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import zstandard

from services.ops.metrics import INVALID_REASONS
from services.wire.codec import (
    MAX_COUNT,
    MAX_DIGEST,
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    MAX_LEARNER_NAME,
    MAX_LEARNERS,
    MAX_NAME,
    MAX_SEATS,
    REASONS,
    Expected,
    Packer,
    Unpacker,
    WireError,
    decode,
    encode,
    from_bytes,
    size_bytes,
    to_bytes,
    view,
)
from services.wire.messages import (
    PROTOCOL_VERSION,
    ArraySpec,
    Buffer,
    Destination,
    Goodbye,
    Member,
    Message,
    PackedArray,
    Publish,
    Published,
    Pull,
    Refusal,
    Rollout,
    Weights,
)
from tests.unit.wire.samples import (
    ACTIONS,
    CLIENT,
    EXPECTED,
    LIMIT,
    NUM_TASKS,
    SCHEMA,
    T,
    arrays,
    attends,
    carry,
    cross,
    messages,
    rollout,
    views,
)

Fields = list[object]


def refused(frames: list[Buffer], expected: Expected = EXPECTED) -> WireError:
    with pytest.raises(WireError) as caught:
        decode(carry(frames), expected)
    assert str(caught.value).startswith(f"{caught.value.reason}: ")
    return caught.value


def kind_of(message: Message) -> str:
    return type(message).__name__


def unpacked(message: Message) -> dict[str, np.ndarray]:
    assert isinstance(message, Rollout)
    unpacker, result = Unpacker(), {}
    for name, packed in message.arrays.items():
        result[name] = np.empty(packed.shape, packed.dtype)
        unpacker.unpack_into(packed, result[name])
    return result


def rewritten(message: Message, change: Callable[[Fields], None]) -> list[Buffer]:
    """The frames of ``message`` with its header fields changed by ``change``."""
    header, *rest = encode(message)
    version, kind, fields = msgpack.unpackb(header)
    change(fields)
    return [msgpack.packb([version, kind, fields]), *rest]


def put(*path: int, value: object) -> Callable[[Fields], None]:
    """Set the header field at ``path``."""

    def change(fields: Fields) -> None:
        *parents, last = path
        for index in parents:
            child = fields[index]
            assert isinstance(child, list)
            fields = child
        fields[last] = value

    return change


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", messages(), ids=kind_of)
def test_every_message_arrives_as_it_was_sent(message: Message) -> None:
    assert cross(message) == message


def test_the_samples_hold_every_message_and_no_reason_is_without_a_metric() -> None:
    assert {type(message) for message in messages()} == set(Message.__args__)
    assert REASONS == INVALID_REASONS


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_arrays_arrive_to_the_bit(codec: str) -> None:
    assert codec in ("zstd", "none")
    received = unpacked(cross(rollout(Packer(codec))))  # type: ignore[arg-type]
    for name, array in arrays().items():
        np.testing.assert_array_equal(received[name], array, strict=True)


def test_only_byte_arrays_are_compressed() -> None:
    codecs = {name: packed.codec for name, packed in rollout().arrays.items()}
    assert codecs == dict.fromkeys(SCHEMA, "none") | {"frames": "zstd"}


def test_uncompressed_arrays_and_payloads_share_the_memory_of_what_arrived() -> None:
    frames = [bytearray(frame) for frame in encode(rollout(Packer("none")))]
    received = decode(frames, EXPECTED)
    assert isinstance(received, Rollout)
    frames[1][0] ^= 0xFF
    assert view(received.arrays["frames"]).reshape(-1)[0] == arrays()["frames"].reshape(-1)[0] ^ 0xFF


def test_encoding_copies_no_array_and_no_payload() -> None:
    array = np.zeros((3, 3), np.float32)
    packed = Packer("zstd").pack(array)
    array[0, 0] = 1.0
    assert view(packed)[0, 0] == 1.0
    payload = bytes(100)
    publish = Publish(run_id="run", sender=CLIENT, state="training", version=1, steps=1, payload=payload)
    assert encode(publish)[1] is payload


def test_arrays_that_are_not_contiguous_are_packed_as_they_look() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4).T
    packed = Packer("zstd").pack(array)
    np.testing.assert_array_equal(view(packed), array, strict=True)


def test_an_array_without_elements_travels() -> None:
    expected = replace(EXPECTED, schema={"x": ArraySpec(dtype="int32", shape=(0, 3), high=1)})
    message = replace(rollout(), arrays={"x": Packer("zstd").pack(np.empty((0, 3), np.int32))})
    assert unpacked(cross(message, expected))["x"].shape == (0, 3)


def recurrent_schema(T: int, F: int) -> dict[str, ArraySpec]:
    """What an unroll of a recurrent policy brings that also reads an instruction."""
    return {
        "observation": ArraySpec(dtype="uint8", shape=(F, 8, 8, 3)),
        "episode_start": ArraySpec(dtype="bool", shape=(F,)),
        "action": ArraySpec(dtype="int32", shape=(T,), high=17),
        "behaviour_logits": ArraySpec(dtype="float32", shape=(T, 18)),
        "reward": ArraySpec(dtype="float32", shape=(T,)),
        "terminated": ArraySpec(dtype="bool", shape=(T,)),
        "initial_state": ArraySpec(dtype="float32", shape=(2, 256)),
        "last_action": ArraySpec(dtype="int32", shape=(1,), high=17),
        "last_reward": ArraySpec(dtype="float32", shape=(1,)),
        "instruction": ArraySpec(dtype="int32", shape=(F, 16), high=999),
    }


def test_the_arrays_of_a_recurrent_policy_with_instructions_arrive_to_the_bit() -> None:
    rng = np.random.default_rng(2)
    expected = replace(EXPECTED, schema=recurrent_schema(T=5, F=9))
    assert expected.schema is not None
    sent = {
        name: rng.random(spec.shape, np.float32)
        if spec.dtype == "float32"
        else rng.integers(0, (spec.high or 1) + 1, spec.shape).astype(spec.dtype)
        for name, spec in expected.schema.items()
    }
    packer = Packer("zstd")
    message = replace(rollout(), arrays={name: packer.pack(array) for name, array in sent.items()})
    for frames in (carry(encode(message)), from_bytes(to_bytes(encode(message)))):
        received = unpacked(decode(frames, expected))
        for name, array in sent.items():
            np.testing.assert_array_equal(received[name], array, strict=True)


def test_a_rollout_that_lacks_the_state_of_a_recurrent_policy_is_refused() -> None:
    with_state = {**SCHEMA, "initial_state": ArraySpec(dtype="float32", shape=(2, 256))}
    error = refused(encode(rollout()), replace(EXPECTED, schema=with_state))
    assert error.reason == "schema"
    assert "initial_state" in str(error)


def test_size_counts_the_bytes_of_all_frames() -> None:
    assert size_bytes([b"123", np.zeros(5, np.int32).data, bytearray(2)]) == 25


# --- one message in one piece -----------------------------------------------------------------------------


def test_one_piece_is_laid_out_as_in_files_that_exist() -> None:
    lengths = [b"\x02\0\0\0", b"\0\0\0\0", b"\x01\0\0\0"]
    assert to_bytes([b"ab", bytearray(b""), memoryview(b"c")]) == b"".join([b"\x03", *lengths, b"abc"])


@pytest.mark.parametrize("message", messages(), ids=kind_of)
def test_every_message_comes_out_of_one_piece_as_it_went_in(message: Message) -> None:
    joined = to_bytes(carry(encode(message)))
    assert type(joined) is bytes
    assert decode(from_bytes(joined), EXPECTED) == message
    assert decode(from_bytes(memoryview(bytearray(joined))), EXPECTED) == message


@pytest.mark.parametrize("misalignment", range(4))
def test_arrays_come_out_of_one_piece_to_the_bit_wherever_they_lie_in_it(misalignment: int) -> None:
    arrived = rollout(Packer("none"))
    arrived = replace(arrived, actor_id="a" * misalignment)
    received = unpacked(decode(from_bytes(to_bytes(encode(arrived))), EXPECTED))
    for name, array in arrays().items():
        np.testing.assert_array_equal(received[name], array, strict=True)


def test_one_piece_holds_as_many_frames_as_a_message_may_have() -> None:
    for count in (1, MAX_FRAMES):
        frames = [bytes([number]) * number for number in range(count)]
        assert from_bytes(to_bytes(frames)) == frames
    with pytest.raises(AssertionError):
        to_bytes([b""] * (MAX_FRAMES + 1))


def test_frames_are_sized_in_bytes_whatever_they_hold() -> None:
    numbers = np.arange(3, dtype=np.int32)
    assert from_bytes(to_bytes([b"head", numbers.data])) == [b"head", numbers.tobytes()]
    assert from_bytes(memoryview(to_bytes([numbers.data])).cast("b")) == [numbers.tobytes()]


def test_the_frames_share_the_memory_of_the_piece() -> None:
    joined = bytearray(to_bytes([b"ab", b"cd"]))
    _, last = from_bytes(joined)
    joined[-1] = ord("x")
    assert last == b"cx"


WHOLE = to_bytes([b"header", b"", b"array"])


@pytest.mark.parametrize(
    "data",
    [
        *(WHOLE[:length] for length in range(len(WHOLE))),
        WHOLE + b"\0",
        b"\0",
        b"\0" * 100,
        bytes([MAX_FRAMES + 1]) + bytes(4 * (MAX_FRAMES + 1)),
        b"\x02" + b"\xff\xff\xff\xff" * 2,
        b"\xff" * 2000,
        WHOLE[:1] + b"\x07" + WHOLE[2:],
        WHOLE[:1] + b"\x05" + WHOLE[2:],
    ],
)
def test_what_is_not_a_message_in_one_piece_is_malformed(data: bytes) -> None:
    assert from_bytes(WHOLE) == [b"header", b"", b"array"]
    with pytest.raises(WireError) as caught:
        from_bytes(data)
    assert caught.value.reason == "malformed"


# --- malformed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [b"text"],
        [msgpack.packb(None)],
        [msgpack.packb({})],
        [msgpack.packb([])],
        [msgpack.packb([PROTOCOL_VERSION, "pull"])],
        [msgpack.packb([PROTOCOL_VERSION, "pull", [], 0])],
        [msgpack.packb(["1", "pull", []])],
        [msgpack.packb([PROTOCOL_VERSION, "pull", {}])],
        [msgpack.packb([PROTOCOL_VERSION, 3, ["run"]])],
        [msgpack.packb([PROTOCOL_VERSION, "unheard of", ["run"]])],
        [msgpack.packb([PROTOCOL_VERSION, "pull", ["run"]]) + b"\x00"],
        [msgpack.packb([PROTOCOL_VERSION, "pull", [msgpack.ExtType(5, b"x")]])],
        [msgpack.packb([PROTOCOL_VERSION, "pull", [{"a": 1}]])[:-1]],
        [b"\x91" * 50_000],
        [b"\xdd\xff\xff\xff\xff"],
        [b"\x93\x01\xa2\xff\xfe\x90"],
    ],
    ids=range(19),
)
def test_headers_that_are_none_are_malformed(frames: list[Buffer]) -> None:
    assert refused(frames).reason == "malformed"


def test_a_header_may_be_as_large_as_allowed_and_not_larger() -> None:
    padding = (
        MAX_HEADER_BYTES - len(msgpack.packb([PROTOCOL_VERSION, "pull", ["run", bytes(70_000)]])) + 70_000
    )
    header = msgpack.packb([PROTOCOL_VERSION, "pull", ["run", bytes(padding)]])
    assert len(header) == MAX_HEADER_BYTES
    roomy = replace(EXPECTED, max_message_bytes=2 * MAX_HEADER_BYTES)
    assert "2 header fields where 6 belong" in str(refused([header], roomy))
    assert "allowed are 1048576" in str(refused([header + b"\0"], roomy))


def test_a_message_may_have_as_many_frames_as_allowed_and_not_more() -> None:
    header, *_ = encode(Goodbye(run_id="run", sender=CLIENT))
    assert "frames too many" in str(refused([header, *[b""] * (MAX_FRAMES - 1)]))
    assert f"allowed are 1 to {MAX_FRAMES}" in str(refused([header, *[b""] * MAX_FRAMES]))


@pytest.mark.parametrize("message", messages(), ids=kind_of)
def test_a_field_too_many_or_too_few_is_malformed(message: Message) -> None:
    assert refused(rewritten(message, lambda fields: fields.append(0))).reason == "malformed"
    assert refused(rewritten(message, lambda fields: fields.__delitem__(-1))).reason in ("malformed", "run")


WRONG: list[object] = [None, True, 1.5, "text", b"bytes", [], [1], {}, -2, 2**63]


@pytest.mark.parametrize("message", messages(), ids=kind_of)
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_no_field_of_no_message_accepts_a_value_of_another_kind(message: Message, wrong: object) -> None:
    """Or if it does, then because the value is acceptable there, and arrives as it was sent."""
    _, _, fields = msgpack.unpackb(encode(message)[0])
    for index in range(len(fields)):
        frames = rewritten(message, put(index, value=wrong))
        try:
            received = decode(carry(frames), EXPECTED)
        except WireError:
            continue
        assert msgpack.unpackb(encode(received)[0]) == msgpack.unpackb(frames[0])


PULL = Pull(run_id="run", sender=CLIENT, have_version=5, seats_for=(CLIENT,))
WEIGHTS = Weights(
    run_id="run", server_incarnation=1, state="training", version=1, steps=1, seats=(1,), payload=b"w"
)
PUBLISH = Publish(run_id="run", sender=CLIENT, state="training", version=1, steps=1, payload=b"w")
PUBLISHED = Published(run_id="run", server_incarnation=1, version=1)
ATTEND = attends()[0]
VIEW = views()[1]
DESTINATION: list[object] = ["tcp://h:1", 1]
MEMBER: list[object] = ["learner-0", 1, "tcp://h:1", "h:2", 1]


@pytest.mark.parametrize(
    ("message", "path", "accepted", "one_beyond"),
    [
        (PULL, (1, 0), "x" * MAX_NAME, "x" * (MAX_NAME + 1)),
        (PULL, (1, 1), 0, -1),
        (PULL, (1, 1), 2**63 - 1, 2**63),
        (PULL, (1, 2), -1, -2),
        (PULL, (1, 2), MAX_SEATS - 1, MAX_SEATS),
        (PULL, (2,), -1, -2),
        (PULL, (3,), [["a", 1, -1]] * MAX_SEATS, [["a", 1, -1]] * (MAX_SEATS + 1)),
        (PULL, (3, 0), ["a", 1, 0], ["a", 1, 0, 0]),
        (PULL, (4,), 0, -1),
        (PULL, (4,), MAX_COUNT - 1, MAX_COUNT),
        (PULL, (5,), 0, -1),
        (WEIGHTS, (2,), "complete", "completed"),
        (WEIGHTS, (3,), -1, -2),
        (WEIGHTS, (4,), 0, -1),
        (WEIGHTS, (5,), [0] * MAX_SEATS, [0] * (MAX_SEATS + 1)),
        (WEIGHTS, (5, 0), -1, -2),
        (WEIGHTS, (6,), 0, -1),
        (WEIGHTS, (6,), MAX_COUNT - 1, MAX_COUNT),
        (WEIGHTS, (7,), [DESTINATION] * MAX_LEARNERS, [DESTINATION] * (MAX_LEARNERS + 1)),
        (WEIGHTS, (7,), [DESTINATION], [DESTINATION[:1]]),
        (WEIGHTS, (7,), [DESTINATION], [[*DESTINATION, 1]]),
        (WEIGHTS, (7,), [["x" * MAX_NAME, 0]], [["x" * (MAX_NAME + 1), 0]]),
        (WEIGHTS, (7,), [["", 0]], [[None, 0]]),
        (WEIGHTS, (7,), [["", 0]], [["", -1]]),
        (WEIGHTS, (7,), [["", MAX_COUNT - 1]], [["", MAX_COUNT]]),
        (WEIGHTS, (8,), 0, -1),
        (PUBLISHED, (1,), 0, -1),
        (PUBLISHED, (2,), -1, -2),
        (PUBLISHED, (2,), MAX_COUNT - 1, MAX_COUNT),
        (ATTEND, (1, 1), 0, -1),
        (ATTEND, (2,), "x" * MAX_NAME, "x" * (MAX_NAME + 1)),
        (ATTEND, (3,), "training", "trains"),
        (ATTEND, (3,), "leaving", ["leaving"]),
        (ATTEND, (4,), 0, -1),
        (ATTEND, (4,), MAX_COUNT - 1, MAX_COUNT),
        (ATTEND, (5,), 0, -1),
        (ATTEND, (5,), MAX_COUNT - 1, MAX_COUNT),
        (ATTEND, (6,), True, 1),
        (ATTEND, (6,), False, None),
        (ATTEND, (7,), "", None),
        (ATTEND, (7,), "x" * MAX_LEARNER_NAME, "x" * (MAX_LEARNER_NAME + 1)),
        (ATTEND, (1, 0), "x" * MAX_LEARNER_NAME, "x" * (MAX_LEARNER_NAME + 1)),
        (ATTEND, (8,), 0, -1),
        (ATTEND, (8,), 0, 1),  # of a group of one
        (ATTEND, (9,), 1, 0),
        (ATTEND, (9,), MAX_LEARNERS, MAX_LEARNERS + 1),
        (ATTEND, (10,), 0, -1),
        (ATTEND, (10,), MAX_COUNT - 1, MAX_COUNT),
        (ATTEND, (11,), "x" * MAX_DIGEST, "x" * (MAX_DIGEST + 1)),
        (ATTEND, (11,), "", None),
        (VIEW, (1,), 0, -1),
        (VIEW, (2,), 0, -1),
        (VIEW, (2,), MAX_COUNT - 1, MAX_COUNT),
        (VIEW, (3,), [MEMBER] * MAX_LEARNERS, [MEMBER] * (MAX_LEARNERS + 1)),
        (VIEW, (3, 0), MEMBER, MEMBER[:-1]),
        (VIEW, (3, 0), MEMBER, [*MEMBER, 0]),
        (VIEW, (3, 0, 0), "x" * MAX_LEARNER_NAME, "x" * (MAX_LEARNER_NAME + 1)),
        (VIEW, (3, 0, 1), 0, -1),
        (VIEW, (3, 0, 2), "x" * MAX_NAME, "x" * (MAX_NAME + 1)),
        (VIEW, (3, 0, 3), "x" * MAX_LEARNER_NAME, "x" * (MAX_LEARNER_NAME + 1)),
        (VIEW, (3, 0, 3), "", None),
        (VIEW, (3, 0, 4), 0, -1),
        (VIEW, (3, 0, 4), MAX_COUNT - 1, MAX_COUNT),
        (VIEW, (4,), 0, -1),
        (VIEW, (4,), 1, 2),  # of two members
        (VIEW, (5,), -1, -2),
        (VIEW, (6,), 0, -1),
        (views()[0], (4,), 0, 1),  # of none
        (PUBLISH, (3,), 0, -1),
        (PUBLISH, (4,), 0, -1),
        (rollout(), (5,), 0, -1),
        (rollout(), (6,), [], [[1.0, 2], [3.0]]),
        (rollout(), (6, 0, 1), 0, -1),
        (rollout(), (6,), [[1.0, 1]] * 65_536, [[1.0, 1]] * 65_537),
        (Refusal(reason="r", text="t"), (1,), "x" * 4096, "x" * 4097),
    ],
)
def test_bounds_of_header_fields(
    message: Message, path: tuple[int, ...], accepted: object, one_beyond: object
) -> None:
    roomy = replace(EXPECTED, max_message_bytes=2 * MAX_HEADER_BYTES)
    decode(carry(rewritten(message, put(*path, value=accepted))), roomy)
    assert refused(rewritten(message, put(*path, value=one_beyond)), roomy).reason == "malformed"


def test_the_largest_view_and_the_longest_list_of_learners_fit_a_header() -> None:
    widest = "\N{GRINNING FACE}"  # four bytes
    member = Member(
        client_id=widest * MAX_LEARNER_NAME,
        incarnation=2**63 - 1,
        endpoint=widest * MAX_NAME,
        store=widest * MAX_LEARNER_NAME,
        since=MAX_COUNT - 1,
    )
    largest = replace(
        views()[1],
        server_incarnation=2**63 - 1,
        generation=MAX_COUNT - 1,
        members=(member,) * MAX_LEARNERS,
        holder=MAX_LEARNERS - 1,
        num_seats=MAX_COUNT - 1,
    )
    seated = replace(
        WEIGHTS,
        seats=(MAX_SEATS - 1,) * MAX_SEATS,
        learners=(Destination(endpoint=member.endpoint, since=MAX_COUNT - 1),) * MAX_LEARNERS,
    )
    roomy = replace(EXPECTED, max_message_bytes=2 * MAX_HEADER_BYTES)
    for message in (largest, seated):
        assert len(encode(message)[0]) < MAX_HEADER_BYTES
        assert cross(message, roomy) == message


@pytest.mark.parametrize(
    "message", [PULL, PUBLISHED, ATTEND, VIEW, Goodbye(run_id="run", sender=CLIENT)], ids=kind_of
)
def test_messages_without_buffers_take_none(message: Message) -> None:
    assert refused([*encode(message), b""]).reason == "malformed"


@pytest.mark.parametrize("message", [WEIGHTS, PUBLISH])
def test_weights_and_publish_take_at_most_one_buffer(message: Message) -> None:
    assert refused([*encode(message), b""]).reason == "malformed"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1, True, "1.0", None])
def test_an_episode_return_is_a_finite_float(value: object) -> None:
    assert refused(rewritten(rollout(), put(6, 0, 0, value=value))).reason == "malformed"


def test_who_expects_no_rollouts_refuses_them() -> None:
    assert refused(encode(rollout()), replace(EXPECTED, schema=None)).reason == "malformed"


# --- protocol, run, oversized -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1, 2**40, -1])
@pytest.mark.parametrize("rest", [["pull", ["run"]], ["a kind of the future", [1, {"of": "another shape"}]]])
def test_another_protocol_is_named_before_anything_else_is_looked_at(
    version: int, rest: list[object]
) -> None:
    error = refused([msgpack.packb([version, *rest])])
    assert error.reason == "protocol"
    assert f"protocol {version}, this is protocol {PROTOCOL_VERSION}" in str(error)


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1])
def test_a_refusal_of_any_protocol_is_readable_so_that_both_sides_can_say_what_is_wrong(version: int) -> None:
    refusal = Refusal(reason="protocol", text="the peer speaks protocol 1, this is protocol 2")
    _, kind, fields = msgpack.unpackb(encode(refusal)[0])
    assert decode([msgpack.packb([version, kind, fields])], EXPECTED) == refusal


def test_a_refusals_layout_is_the_one_that_old_peers_know() -> None:
    frames = encode(Refusal(reason="run", text="no"))
    assert [msgpack.unpackb(frame) for frame in frames] == [[PROTOCOL_VERSION, "refusal", ["run", "no"]]]


@pytest.mark.parametrize("message", [m for m in messages() if not isinstance(m, Refusal)], ids=kind_of)
def test_messages_of_another_run_are_refused_and_named(message: Message) -> None:
    assert not isinstance(message, Refusal)
    error = refused(encode(replace(message, run_id="another")))
    assert error.reason == "run"
    assert "'another'" in str(error)
    assert "'run'" in str(error)


def test_a_long_run_id_is_not_repeated_in_full() -> None:
    assert len(str(refused(encode(replace(PULL, run_id="x" * 50_000))))) < 200


def test_a_message_may_be_as_large_as_allowed_and_not_larger() -> None:
    header, _ = encode(PUBLISH)
    room = LIMIT - len(header)
    decode([header, bytes(room)], EXPECTED)
    assert refused([header, bytes(room + 1)]).reason == "oversized"


def test_the_sum_of_small_frames_is_oversized_too() -> None:
    assert refused([b"", *[bytes(LIMIT // 32)] * 33]).reason == "oversized"


# --- schema -----------------------------------------------------------------------------------------------


def arrays_changed(change: Callable[[list[list[object]]], object]) -> list[Buffer]:
    def rewrite(fields: Fields) -> None:
        entries = fields[7]
        assert isinstance(entries, list)
        change(entries)

    return rewritten(rollout(), rewrite)


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries.pop(),
        lambda entries: entries.append(entries[0]),
        lambda entries: entries[1].__setitem__(0, "unheard of"),
        lambda entries: entries.__setitem__(1, entries[0]),
        lambda entries: entries[0].__setitem__(1, "int8"),
        lambda entries: entries[1].__setitem__(1, "uint32"),
        lambda entries: entries[0].__setitem__(1, "object"),
        lambda entries: entries[0].__setitem__(1, None),
        lambda entries: entries[0].__setitem__(2, [T + 1, 8, 9]),
        lambda entries: entries[0].__setitem__(2, [-1, 8, 8]),
        lambda entries: entries[0].__setitem__(2, [2**62, 2**62, 2**62]),
        lambda entries: entries[0].__setitem__(2, []),
        lambda entries: entries[0].__setitem__(2, "888"),
        lambda entries: entries[0].__setitem__(3, "lz4"),
        lambda entries: entries[0].__setitem__(3, ["zstd"]),
        lambda entries: entries[1].__setitem__(3, "zstd"),
    ],
    ids=range(16),
)
def test_arrays_that_are_not_the_runs_are_refused(change: Callable[[list[list[object]]], object]) -> None:
    assert refused(arrays_changed(change)).reason == "schema"


def test_an_array_entry_of_another_layout_is_malformed() -> None:
    assert refused(arrays_changed(lambda entries: entries[0].pop())).reason == "malformed"
    assert refused(arrays_changed(lambda entries: entries[0].__setitem__(0, 5))).reason == "malformed"


def test_a_missing_or_surplus_buffer_is_refused() -> None:
    frames = encode(rollout())
    assert refused(frames[:-1]).reason == "schema"
    assert refused([*frames, b""]).reason == "schema"


def test_a_dtype_that_may_not_travel_is_refused_even_if_the_schema_names_it() -> None:
    expected = replace(EXPECTED, schema={"x": ArraySpec(dtype="complex64", shape=(1,))})
    message = replace(
        rollout(), arrays={"x": PackedArray(dtype="complex64", shape=(1,), codec="none", data=bytes(8))}
    )
    assert refused(encode(message), expected).reason == "schema"


def test_a_task_that_the_run_does_not_have_is_refused_and_named() -> None:
    cross(replace(rollout(), task=NUM_TASKS - 1))
    error = refused(encode(replace(rollout(), task=NUM_TASKS)))
    assert (error.reason, str(error)) == ("schema", "schema: task 57; allowed is less than 57")


def test_a_run_has_one_task_unless_it_says_otherwise() -> None:
    expected = Expected(run_id="run", max_message_bytes=LIMIT, schema=SCHEMA)
    cross(replace(rollout(), task=0), expected)
    assert refused(encode(replace(rollout(), task=1)), expected).reason == "schema"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, T * ACTIONS - 1])
def test_floats_that_are_not_finite_are_refused(value: float, position: int) -> None:
    logits = arrays()["behaviour_logits"]
    logits.reshape(-1)[position] = value
    error = refused(encode(rollout(behaviour_logits=logits)))
    assert (error.reason, str(error)) == (
        "schema",
        "schema: behaviour_logits holds a value that is not finite",
    )


@pytest.mark.parametrize("value", [0.0, -0.0, np.finfo(np.float32).max, np.finfo(np.float32).tiny / 2])
def test_all_finite_floats_are_accepted(value: float) -> None:
    logits = np.full((T, ACTIONS), value, np.float32)
    np.testing.assert_array_equal(
        unpacked(cross(rollout(behaviour_logits=logits)))["behaviour_logits"], logits
    )


@pytest.mark.parametrize("value", [-1, ACTIONS, 2**31 - 1, -(2**31)])
def test_actions_out_of_range_are_refused(value: int) -> None:
    action = arrays()["action"]
    action[-1] = value
    error = refused(encode(rollout(action=action)))
    assert error.reason == "schema"
    assert f"allowed are 0 to {ACTIONS - 1}" in str(error)


@pytest.mark.parametrize("value", [-1, -(2**63)])
def test_a_range_up_to_the_largest_integer_has_no_negative_ones(value: int) -> None:
    step = arrays()["task_step"]
    assert step.max() == 2**63 - 1
    step[0] = value
    assert refused(encode(rollout(task_step=step))).reason == "schema"


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_bools_that_are_neither_0_nor_1_are_refused(byte: int) -> None:
    done = arrays()["done"].view(np.uint8)
    done[-1] = byte
    assert refused(encode(rollout(done=done.view(np.bool_)))).reason == "schema"


# --- corrupt ----------------------------------------------------------------------------------------------


def with_frames(data: bytes, codec: str = "zstd") -> list[Buffer]:
    """A rollout whose compressed ``frames`` are ``data``."""
    message = rollout()
    packed = message.arrays["frames"]._replace(codec=codec, data=data)
    return encode(replace(message, arrays={**message.arrays, "frames": packed}))


def corrupt(data: bytes, codec: str = "zstd") -> str:
    with pytest.raises(WireError) as caught:
        unpacked(decode(carry(with_frames(data, codec)), EXPECTED))
    assert caught.value.reason == "corrupt"
    return str(caught.value)


RAW = arrays()["frames"].tobytes()


@pytest.mark.parametrize("data", [b"", RAW[:-1], RAW + b"\0"], ids=["empty", "shorter", "longer"])
def test_an_uncompressed_array_of_another_length_is_corrupt(data: bytes) -> None:
    assert f"its shape needs {len(RAW)}" in corrupt(data, "none")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not zstd at all",
        zstandard.compress(RAW)[:-1],
        zstandard.compress(RAW)[:5],
        zstandard.compress(RAW[:-1]),
        zstandard.compress(RAW + b"\0"),
        zstandard.compress(b""),
        b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
    ],
    ids=["empty", "garbage", "cut", "cut short", "shorter", "longer", "nothing", "skippable frame"],
)
def test_what_does_not_decompress_to_the_schemas_size_is_corrupt(data: bytes) -> None:
    corrupt(data)


def test_a_frame_that_claims_more_than_it_holds_is_corrupt() -> None:
    honest = zstandard.compress(RAW)
    parameters = zstandard.get_frame_parameters(honest)
    assert parameters.content_size == len(RAW)
    at = honest.index((len(RAW) - 256).to_bytes(2, "little"))  # a 2-byte content size is stored minus 256
    lying = honest[:at] + (len(RAW) + 1000 - 256).to_bytes(2, "little") + honest[at + 2 :]
    assert zstandard.get_frame_parameters(lying).content_size == len(RAW) + 1000
    corrupt(lying)


def test_a_bomb_is_neither_unpacked_nor_makes_room_for_itself() -> None:
    """A few kilobytes that would become 256 MiB, with the largest window that zstd takes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    bomb = stream.compress(bytes(256 << 20)) + stream.flush()
    assert len(bomb) < LIMIT // 2
    assert zstandard.get_frame_parameters(bomb).window_size == 128 << 20
    before = resident_bytes()
    for _ in range(20):
        assert "zstd" in corrupt(bomb)  # its window is refused before there is room for it
    assert resident_bytes() - before < 32 << 20


def resident_bytes() -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))


def test_unpacking_writes_nothing_outside_its_target() -> None:
    memory = np.full(len(RAW) + 2, 7, np.uint8)
    packed = rollout().arrays["frames"]._replace(data=zstandard.compress(RAW + bytes(1000)))
    with pytest.raises(WireError):
        Unpacker().unpack_into(packed, memory[1:-1].reshape(packed.shape))
    assert memory[0] == memory[-1] == 7


def test_an_unpacker_goes_on_after_a_corrupt_array() -> None:
    unpacker = Unpacker()
    packed = rollout().arrays["frames"]
    out = np.empty(packed.shape, np.uint8)
    with pytest.raises(WireError):
        unpacker.unpack_into(packed._replace(data=b"garbage"), out)
    unpacker.unpack_into(packed, out)
    np.testing.assert_array_equal(out, arrays()["frames"])
