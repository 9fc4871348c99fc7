"""A pod that builds something slow goes on beating, and can be stopped."""

from __future__ import annotations

import threading

import pytest

from services.ops.beside import build_beside
from services.ops.health import Heartbeat
from services.ops.lifecycle import Lifecycle

TIMEOUT_S = 15.0


class CountingHeartbeat(Heartbeat):
    """Calls ``after`` once it has been beaten a few times."""

    def __init__(self, after: threading.Event) -> None:
        super().__init__()
        self.beats = 0
        self._after = after

    def beat(self) -> None:
        super().beat()
        self.beats += 1
        if self.beats == 3:
            self._after.set()


def test_what_is_built_comes_in_order_and_the_heart_beats_meanwhile() -> None:
    beaten = threading.Event()
    heartbeat = CountingHeartbeat(beaten)
    builders = [lambda: beaten.wait(TIMEOUT_S), lambda: False]
    assert build_beside(Lifecycle(), heartbeat, builders) == [True, False]
    assert heartbeat.beats >= 3


def test_a_stop_does_not_wait_for_what_is_still_being_built() -> None:
    lifecycle, never = Lifecycle(), threading.Event()

    def stop_and_build_on() -> int:
        lifecycle.stopping.set()
        never.wait()
        return 2

    assert build_beside(lifecycle, Heartbeat(), [lambda: 1, stop_and_build_on]) == [1]
    never.set()


def test_a_failure_to_build_is_the_callers() -> None:
    def fail() -> None:
        raise ValueError("env.id = 'x': unknown")

    lifecycle = Lifecycle()
    with pytest.raises(ValueError, match=r"env\.id = 'x'"):
        build_beside(lifecycle, Heartbeat(), [fail])
    assert not lifecycle.stopping.is_set()
