"""Word ids: computed elsewhere once and for all, because checkpoints rely on them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from services.rl.envs.instructions import INSTRUCTION_LENGTH, NUM_WORDS, hash_words


def test_ids_never_change() -> None:
    # Each word's CRC-32 as gzip writes it into its trailer, modulo 999, plus 1.
    np.testing.assert_array_equal(hash_words("pick the red ball", 6), [859, 274, 346, 783, 0, 0])


def test_case_and_punctuation_do_not_matter_and_order_does() -> None:
    one = hash_words("Pick the RED ball.")
    np.testing.assert_array_equal(one, hash_words(" pick, the  red ball!"))
    assert not np.array_equal(one, hash_words("ball the red pick"))


def test_nothing_said_is_zeros_and_what_is_too_long_is_cut() -> None:
    np.testing.assert_array_equal(hash_words(""), np.zeros(INSTRUCTION_LENGTH))
    long = hash_words("word " * 40)
    assert long.shape == (INSTRUCTION_LENGTH,) == (16,)
    assert long.dtype == np.int32
    assert (long == long[0]).all()
    np.testing.assert_array_equal(hash_words("one two three", 2), hash_words("one two", 2))


def test_ids_fill_their_range_and_are_never_that_of_no_word() -> None:
    ids = hash_words(" ".join(f"word{n}" for n in range(20_000)), 20_000)
    assert set(ids) == set(range(1, NUM_WORDS))


def test_another_process_gives_the_same_ids() -> None:
    code = "from services.rl.envs.instructions import hash_words; print(*hash_words('pick the red ball'))"
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    np.testing.assert_array_equal(hash_words("pick the red ball"), [int(id_) for id_ in there.split()])
