"""The oldest falls out, every item is as likely as any other, and the bytes are counted."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter, deque
from collections.abc import Hashable, Iterable

import numpy as np
import pytest

from services.rl.replay import ReplayMemory


def item(number: int) -> bytes:
    """One that can be told from all others."""
    return number.to_bytes(4, "big")


def filled(capacity: int, num_added: int, seed: int = 1) -> ReplayMemory:
    memory = ReplayMemory(capacity, np.random.default_rng(seed))
    for number in range(num_added):
        memory.add(item(number))
    return memory


def held(memory: ReplayMemory) -> set[bytes]:
    return set(memory.sample(len(memory)))


# --- first in, first out --------------------------------------------------------------------------


def test_the_oldest_falls_out_first() -> None:
    memory = ReplayMemory(3, np.random.default_rng(1))
    fallen_out = [memory.add(name) for name in (b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h")]
    assert fallen_out == [None, None, None, b"a", b"b", b"c", b"d", b"e"]
    assert held(memory) == {b"f", b"g", b"h"}


@pytest.mark.parametrize(
    ("num_added", "numbers"),
    [(0, []), (1, [0]), (4, range(4)), (5, range(5)), (6, range(1, 6)), (12, range(7, 12))],
)
def test_what_is_held_are_the_newest(num_added: int, numbers: Iterable[int]) -> None:
    memory = filled(5, num_added)
    assert held(memory) == {item(number) for number in numbers}
    assert len(memory) == min(num_added, 5)


def test_a_memory_for_one_holds_the_newest() -> None:
    memory = ReplayMemory(1, np.random.default_rng(1))
    assert [memory.add(name) for name in (b"a", b"b", b"c")] == [None, b"a", b"b"]
    assert memory.sample(1) == [b"c"]


def test_sizes_are_counted_over_many_rounds_of_the_ring() -> None:
    rng = np.random.default_rng(3)
    memory, expected = ReplayMemory(7, rng), deque[bytes](maxlen=7)
    for number in range(100):
        new = bytes([number]) * int(rng.integers(0, 50))
        oldest = expected[0] if len(expected) == 7 else None
        expected.append(new)
        assert memory.add(new) == oldest
        assert memory.size_bytes == sum(len(item) for item in expected)
        assert len(memory) == len(expected)


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_added", [1, 10, 100, 101, 250])
def test_nothing_is_drawn_twice_at_a_time(num_added: int) -> None:
    memory = filled(100, num_added)
    for count in range(len(memory) + 1):
        drawn = memory.sample(count)
        assert len(drawn) == len(set(drawn)) == count


def test_the_items_themselves_are_drawn_and_not_copies() -> None:
    memory = ReplayMemory(10, np.random.default_rng(1))
    added = [item(number) for number in range(10)]
    for new in added:
        memory.add(new)
    assert {id(drawn) for drawn in memory.sample(10)} == {id(new) for new in added}


def test_more_than_there_is_cannot_be_drawn() -> None:
    assert filled(10, 0).sample(0) == []
    for memory in (filled(10, 0), filled(10, 3), filled(10, 30)):
        with pytest.raises(AssertionError):
            memory.sample(len(memory) + 1)


def test_the_generator_decides_what_is_drawn() -> None:
    assert filled(50, 60, seed=1).sample(20) == filled(50, 60, seed=1).sample(20)
    assert filled(50, 60, seed=1).sample(20) != filled(50, 60, seed=2).sample(20)


@pytest.mark.parametrize("num_added", [1, 7, 50, 60, 149])
def test_a_memory_that_is_filled_again_and_given_the_state_draws_on(num_added: int) -> None:
    original = filled(50, num_added)
    for count in range(1, min(num_added, 20)):
        original.sample(count)
    again = filled(50, 0, seed=2)
    for number in range(max(0, num_added - 50), num_added):
        again.add(item(number))
    again.continue_draws(original.draws())
    for number in range(num_added, num_added + 60):
        count = min(len(original), 5)
        assert original.sample(count) == again.sample(count)
        original.add(item(number))
        again.add(item(number))


@pytest.mark.parametrize("state", [b"", b"{}", b"[1]", b'{"bit_generator": "MT19937"}', b"\xff", b'"PCG64"'])
def test_what_is_no_state_of_the_draws_is_refused_and_changes_nothing(state: bytes) -> None:
    memory = filled(50, 60)
    with pytest.raises(ValueError, match="no state of PCG64"):
        memory.continue_draws(state)
    assert memory.sample(20) == filled(50, 60).sample(20)


def surprise(drawn: Iterable[Hashable], num_outcomes: int) -> float:
    """Standard deviations by which chi-square exceeds its mean, were all outcomes equally likely."""
    counts = Counter(drawn)
    expected = counts.total() / num_outcomes
    unseen = num_outcomes - len(counts)
    chi_square = sum((n - expected) ** 2 for n in counts.values()) / expected + unseen * expected
    degrees = num_outcomes - 1
    return float((chi_square - degrees) / np.sqrt(2 * degrees))


UNSURPRISING = 4.0


@pytest.mark.parametrize("num_added", [20, 50, 51, 75, 99, 100, 149])
def test_every_item_is_as_likely_as_any_other_however_full_the_ring_is(num_added: int) -> None:
    memory = filled(50, num_added)
    draws = [memory.sample(5) for _ in range(20_000)]
    assert set(itertools.chain(*draws)) == {item(n) for n in range(max(0, num_added - 50), num_added)}
    assert abs(surprise(itertools.chain(*draws), len(memory))) < UNSURPRISING
    assert abs(surprise((draw[0] for draw in draws), len(memory))) < UNSURPRISING


def test_every_pair_is_as_likely_to_be_drawn_together_as_any_other() -> None:
    memory = filled(8, 11)
    pairs = [tuple(memory.sample(2)) for _ in range(30_000)]
    assert abs(surprise(pairs, 8 * 7)) < UNSURPRISING


def test_draws_that_are_a_little_uneven_or_too_even_would_be_noticed() -> None:
    rng = np.random.default_rng(4)
    one_is_rarer = np.append(np.full(49, 1.0), 0.8)
    uneven = rng.choice(50, 100_000, p=one_is_rarer / one_is_rarer.sum())
    assert surprise(uneven.tolist(), 50) > UNSURPRISING
    without_the_newest = rng.integers(0, 49, 100_000)
    assert surprise(without_the_newest.tolist(), 50) > UNSURPRISING
    in_turns = np.arange(100_000) % 50
    assert surprise(in_turns.tolist(), 50) < -UNSURPRISING


def test_large_memories_are_drawn_from_evenly_too() -> None:
    memory = filled(20_000, 30_000)
    drawn = itertools.chain(*(memory.sample(28) for _ in range(10_000)))
    tenths = (int.from_bytes(one, "big") - 10_000 for one in drawn)
    assert abs(surprise((number // 2_000 for number in tenths), 10)) < UNSURPRISING


# --- cost -----------------------------------------------------------------------------------------


def test_holding_an_item_costs_no_more_than_a_pointer_to_it() -> None:
    num_items = 10_000
    added = [item(number) for number in range(2 * num_items)]
    tracemalloc.start()
    try:
        memory = ReplayMemory(num_items, np.random.default_rng(1))
        for new in added:
            memory.add(new)
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used_bytes < 10_000 + 10 * num_items
