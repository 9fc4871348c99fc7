"""Slow construction in a thread of its own: meanwhile a pod neither seems stuck nor is deaf to a stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from services.ops.health import Heartbeat
from services.ops.lifecycle import Lifecycle

T = TypeVar("T")

POLL_S = 0.25


def build_beside(lifecycle: Lifecycle, heartbeat: Heartbeat, builders: Sequence[Callable[[], T]]) -> list[T]:
    """Build in a thread while this one beats: loading hundreds of emulators is neither being stuck nor deaf.

    When the pod is stopped meanwhile, what is there by then.
    """
    built: list[T] = []
    failures: list[Exception] = []

    def work() -> None:
        try:
            built.extend(build() for build in builders)
        except Exception as error:  # noqa: BLE001  (whatever it is, the main thread has the word for it)
            failures.append(error)

    building = lifecycle.thread("environments", work)
    while building.is_alive() and not lifecycle.stopping.is_set():
        heartbeat.beat()
        building.join(POLL_S)
    if failures:
        raise failures[0]
    return list(built)
