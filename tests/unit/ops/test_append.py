"""A file grows by whole pieces, or stays as it is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from services.ops.append import append, finite
from tests.unit.learner.disk import full_disk


def test_pieces_follow_each_other_and_the_header_comes_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines"
    append(path, b"one\n", header=b"head\n")
    append(path, b"two\n", header=b"head\n")
    assert path.read_bytes() == b"head\none\ntwo\n"


@pytest.mark.parametrize("room_bytes", [4, 6])
def test_a_piece_that_does_not_fit_leaves_nothing_of_itself(tmp_path: Path, room_bytes: int) -> None:
    path = tmp_path / "lines"
    append(path, b"one\n")
    with full_disk(room_bytes), pytest.raises(OSError, match=r"large|space"):
        append(path, b"two\n")
    append(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"


def test_json_has_no_numbers_that_are_not_finite() -> None:
    assert [finite(value) for value in (1.5, 0.0, math.inf, -math.inf, math.nan, None)] == [
        1.5,
        0.0,
        *[None] * 4,
    ]
