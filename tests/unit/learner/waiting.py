"""The only way in which these tests wait for what no event tells: look again and again, until a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.005
WAIT_S = 25.0
"""Less than any lease, and than gloo's patience: what only comes with their end has not come."""


def until(condition: Callable[[], T | None], what: str = "the condition", timeout_s: float = WAIT_S) -> T:
    """The first value of ``condition()`` that is true; AssertionError if there is none in time.

    The last look is one after the deadline, or else a machine that stands still for long would decide.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        is_late = time.monotonic() >= deadline_s
        if value := condition():
            return value
        assert not is_late, f"{what}: not within {timeout_s:g} s; last seen: {value!r}"
        threading.Event().wait(POLL_S)
