"""Reads the metrics of pods, as Prometheus would: the other end of ``health``.

Every pod of a local run has a thread of its own here and every request a timeout, so that a frozen pod
freezes nothing. What comes out are ``Scrape`` values; ``figures`` makes sense of them.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

TIMEOUT_S = 1.0
MAX_SCRAPE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """One pod's metrics at one moment."""

    time_s: float
    """On the monotonic clock."""
    samples: Mapping[str, float]
    """By series, written as Prometheus does: ``impala_learner_loss{term="total"}``."""

    def get(self, name: str, **labels: str) -> float | None:
        """The value of one series; None if it is not there."""
        inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        return self.samples.get(f"{name}{{{inside}}}" if inside else name)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Label value -> sample, for a metric with that one label."""
        series = re.compile(re.escape(name) + r"\{" + label + r'="(.*)"\}')
        return {match[1]: value for key, value in self.samples.items() if (match := series.fullmatch(key))}


def parse_metrics(text: str) -> dict[str, float]:
    """Series -> value. Lines that are neither comments nor samples are skipped."""
    samples = {}
    for line in text.splitlines():
        series, _, value = line.rpartition(" ")
        if series and not line.startswith("#"):
            try:
                samples[series] = float(value)
            except ValueError:
                continue
    return samples


class Scraper:
    """Reads every pod once per ``interval_s`` until ``close``."""

    def __init__(self, ports: Mapping[str, int], interval_s: float) -> None:
        self._interval_s = interval_s
        self._closed = threading.Event()
        self._latest: dict[str, Scrape] = {}  # replaced whole by one thread each: no lock is needed
        for name, port in ports.items():
            threading.Thread(target=self._run, args=(name, port), name=f"scrape-{name}", daemon=True).start()

    def latest(self) -> dict[str, Scrape]:
        """The newest scrape of every pod that ever answered."""
        return dict(self._latest)

    def close(self) -> None:
        """End the threads, without waiting for pods that do not answer."""
        self._closed.set()

    def _run(self, name: str, port: int) -> None:
        while not self._closed.is_set():
            samples = fetch(port)
            if samples is not None:
                self._latest[name] = Scrape(time_s=time.monotonic(), samples=samples)
            self._closed.wait(self._interval_s)


class NoMetricsError(Exception):
    """Nobody there, or frozen, or no pod at all: which, in a few words."""


def fetch(port: int, timeout_s: float = TIMEOUT_S, path: str = "/metrics") -> dict[str, float] | None:
    """Series -> value of the pod at ``port`` of this machine; None if there are none (yet)."""
    try:
        return parse_metrics(read_metrics("127.0.0.1", port, timeout_s, path))
    except NoMetricsError:
        return None


def read_metrics(host: str, port: int, timeout_s: float = TIMEOUT_S, path: str = "/metrics") -> str:
    """The text that a pod answers. NoMetricsError."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read(MAX_SCRAPE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise NoMetricsError(f"no answer ({reason})") from None
    finally:
        connection.close()
    if response.status != 200:
        raise NoMetricsError(f"HTTP status {response.status}")
    return body.decode(errors="replace")


class Increase(Protocol):
    """``increase(name, label=value)``: how much a series grew, in all or per second."""

    def __call__(self, name: str, *, per_second: bool = False, **labels: str) -> float | None: ...


def increases(before: Scrape | None, now: Scrape) -> Increase:
    """How much a counter grew between the scrapes; None if that cannot be known (a restart, one scrape)."""
    started = "process_start_time_seconds"
    comparable = before is not None and before.time_s < now.time_s and before.get(started) == now.get(started)

    def increase(name: str, *, per_second: bool = False, **labels: str) -> float | None:
        if not comparable or before is None:
            return None
        first, last = before.get(name, **labels), now.get(name, **labels)
        if first is None or last is None or last < first:
            return None
        return (last - first) / (now.time_s - before.time_s if per_second else 1.0)

    return increase
