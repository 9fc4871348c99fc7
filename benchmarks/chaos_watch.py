"""Looks at every pod many times a second from inside of its own host, so that no fault stands between them.

One thread for each pod: a frozen one is waited for by its own and delays nobody's. What is seen is kept as
the trace that ``chaos_findings`` judges; here nothing is concluded, and nothing asked but /metrics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from benchmarks.chaos_findings import FIGURES, Seen
from services.ops.scrape import NoMetricsError, read_metrics

ANSWER_S = 1.0


class Watch:
    """Begins at once, ends with ``close``."""

    def __init__(self, enter: Callable[[str], None], port: int, interval_s: Mapping[str, float]) -> None:
        """``enter`` puts the calling thread on the host of a pod; ``interval_s`` is by pod."""
        self._enter = enter
        self._port = port
        self._lock = threading.Lock()
        self._trace: list[Seen] = []
        self._latest: dict[str, Seen] = {}
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=each, name=f"watch-{each[0]}", daemon=True)
            for each in interval_s.items()
        ]
        for thread in self._threads:
            thread.start()

    def latest(self) -> dict[str, Seen]:
        """The newest look at every pod that ever answered."""
        with self._lock:
            return dict(self._latest)

    def trace(self) -> list[Seen]:
        """All since ``forget``, in the order of time."""
        with self._lock:
            return list(self._trace)

    def forget(self) -> None:
        """Begin a new trace."""
        with self._lock:
            self._trace.clear()

    def close(self) -> None:
        """No look begins after this."""
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * ANSWER_S)

    def _run(self, pod: str, interval_s: float) -> None:
        self._enter(pod)
        next_s = time.monotonic()
        while not self._closed.is_set():
            self._look(pod)
            next_s = max(next_s + interval_s, time.monotonic())
            self._closed.wait(next_s - time.monotonic())

    def _look(self, pod: str) -> None:
        try:
            page = read_metrics("127.0.0.1", self._port, ANSWER_S)
        except NoMetricsError:
            return  # killed, frozen or not there yet: nothing is seen, and that is what the trace shows
        figures = figures_of(page)
        with self._lock:
            seen = Seen(time_s=time.monotonic(), pod=pod, figures=figures)
            self._trace.append(seen)
            self._latest[pod] = seen


def figures_of(page: str) -> dict[str, float]:
    """Only those that are kept: a page has hundreds, and is read twenty times a second."""
    figures = {}
    for line in page.splitlines():
        name, _, value = line.partition(" ")
        if name in FIGURES:
            figures[name] = float(value)
    return figures
