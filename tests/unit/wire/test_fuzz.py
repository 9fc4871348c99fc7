"""Whatever arrives, only WireError comes out, and neither time nor memory runs away."""

import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest

from services.wire.codec import REASONS, Unpacker, WireError, decode, from_bytes, to_bytes
from services.wire.messages import PROTOCOL_VERSION, Rollout
from tests.unit.wire.mutations import NASTY, Mutator
from tests.unit.wire.samples import EXPECTED, SCHEMA

ROUNDS = 100_000
SECONDS = 60.0
MEBIBYTE = 1 << 20


def resident_bytes() -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def test_only_wire_errors_come_out_in_bounded_time_and_memory() -> None:
    mutator, unpacker = Mutator(seed=20), Unpacker()
    targets = {name: np.empty(spec.shape, spec.dtype) for name, spec in SCHEMA.items()}
    outcomes = dict.fromkeys([*REASONS, "accepted"], 0)
    slowest_s, before, longest_text = 0.0, 0, 0
    start_s = time.process_time()
    for number in range(ROUNDS):
        if number == ROUNDS // 20:  # allocators have warmed up
            before = resident_bytes()
        frames = mutator.draw()
        begin_s = time.process_time()
        try:
            message = decode(frames, EXPECTED)
            if isinstance(message, Rollout):
                for name, packed in message.arrays.items():
                    unpacker.unpack_into(packed, targets[name])
                check_rollout(targets)
        except WireError as error:
            outcomes[error.reason] += 1
            longest_text = max(longest_text, len(str(error)))
        else:
            outcomes["accepted"] += 1
        slowest_s = max(slowest_s, time.process_time() - begin_s)
    assert time.process_time() - start_s < SECONDS
    assert slowest_s < 1.0
    assert longest_text < 1000
    assert resident_bytes() - before < 32 * MEBIBYTE
    # The mutations reach every check, and do not just die at the first one.
    assert min(outcomes.values()) > 50, outcomes


def test_only_wire_errors_come_out_of_a_damaged_message_in_one_piece() -> None:
    mutator, unpacker = Mutator(seed=21), Unpacker()
    targets = {name: np.empty(spec.shape, spec.dtype) for name, spec in SCHEMA.items()}
    outcomes = {"not in one piece": 0, "refused": 0, "accepted": 0}
    before = resident_bytes()
    for _ in range(ROUNDS // 4):
        data = mutator.draw_joined()
        try:
            frames = from_bytes(data)
        except WireError:
            outcomes["not in one piece"] += 1
            continue
        assert to_bytes(frames) == data  # whatever is accepted is read as it stands there, to the last byte
        try:
            message = decode(frames, EXPECTED)
            if isinstance(message, Rollout):
                for name, packed in message.arrays.items():
                    unpacker.unpack_into(packed, targets[name])
                check_rollout(targets)
        except WireError:
            outcomes["refused"] += 1
        else:
            outcomes["accepted"] += 1
    assert resident_bytes() - before < 32 * MEBIBYTE
    assert min(outcomes.values()) > 500, outcomes


def check_rollout(arrays: dict[str, np.ndarray]) -> None:
    """What the trainer relies on, for the rollouts that damage has left acceptable."""
    assert np.isfinite(arrays["behaviour_logits"]).all()
    assert arrays["done"].view(np.uint8).max() <= 1
    assert arrays["action"].min() >= 0
    assert arrays["action"].max() <= 3
    assert arrays["task_step"].min() >= 0


@pytest.mark.parametrize("seed", range(4))
def test_pure_noise_is_refused(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(5_000):
        frames = [rng.bytes(int(rng.integers(200))) for _ in range(rng.integers(0, 5))]
        with pytest.raises(WireError):
            decode(frames, EXPECTED)
        with pytest.raises(WireError):
            decode(from_bytes(rng.bytes(int(rng.integers(200)))), EXPECTED)


def test_a_header_that_announces_more_than_it_holds_costs_neither_time_nor_memory() -> None:
    """Nested arrays, each of which claims to be as long as the whole header."""
    size = MEBIBYTE
    claims = (b"\xdd" + (size - 1).to_bytes(4, "big")) * 1000
    expected = type(EXPECTED)(run_id="run", max_message_bytes=2 * MEBIBYTE)
    before, start_s = resident_bytes(), time.process_time()
    for _ in range(5):
        with pytest.raises(WireError):
            decode([claims + bytes(size - len(claims))], expected)
    assert time.process_time() - start_s < 10.0
    assert resident_bytes() - before < 32 * MEBIBYTE


def test_a_version_of_any_kind_and_size_is_refused_as_protocol_or_malformed() -> None:
    for version in [*NASTY, -1, 2, 2**40, False]:
        if version == PROTOCOL_VERSION:  # True is 1
            continue
        header = msgpack.packb([version, "pull", ["run", ["a", 1, -1], 0, [], 0, 0]])
        with pytest.raises(WireError) as caught:
            decode([header], EXPECTED)
        assert caught.value.reason in ("protocol", "malformed")
