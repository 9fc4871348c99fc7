"""The only way in which these tests wait for what no event tells: look again and again, until a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.005


def until(condition: Callable[[], T | None], what: str = "the condition", timeout_s: float = 15.0) -> T:
    """The first value of ``condition()`` that is true; AssertionError if there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:g} s; last seen: {value!r}"
        threading.Event().wait(POLL_S)
    return value
