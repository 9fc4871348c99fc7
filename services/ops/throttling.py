"""How long the kernel has held this process back, because its container had used up its CPU limit.

Read from the ``cpu.stat`` of our own control group at each scrape; ``metrics`` registers it for every role.
An actor with a CPU limit computes for 10 ms and stands still for 90, which no other figure shows. Where there
is no such file, or no limit, nobody holds us back: the series are there and stay at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


class ThrottlingCollector(Collector):
    """Three counters. ``root`` is the file system, for tests."""

    def __init__(self, registry: CollectorRegistry, root: Path = Path("/")) -> None:
        self._root = root
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        stat = _read(self._root)
        seconds = stat.get("throttled_usec", 0) / 1e6 + stat.get("throttled_time", 0) / 1e9  # v2, v1
        for name, text, value in (
            ("impala_cpu_periods", "Scheduling periods under a CPU limit", stat.get("nr_periods", 0)),
            ("impala_cpu_throttled_periods", "Of these, cut short by it", stat.get("nr_throttled", 0)),
            ("impala_cpu_throttled_seconds", "Time that threads were held back by it", seconds),
        ):
            yield CounterMetricFamily(name, text, value=value)


def _read(root: Path) -> Mapping[str, int]:
    """The first ``cpu.stat`` there is; empty without any."""
    for directory in _directories(root):
        try:
            lines = (directory / "cpu.stat").read_text().splitlines()
        except OSError:
            continue
        words = (line.split() for line in lines)
        return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}
    return {}


def _directories(root: Path) -> Iterator[Path]:
    """Where our control group may be: under its path on a host, at the mount itself inside a container."""
    mount = root / "sys/fs/cgroup"
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in sorted(
        (each for each in groups if len(each) == 3), key=lambda each: not each[1]
    ):
        if "cpu" in controllers.split(","):  # version 1, which has the controller where both are mounted
            yield mount / controllers / path.lstrip("/")
            yield mount / "cpu" / path.lstrip("/")
            yield mount / controllers
            yield mount / "cpu"
        elif not controllers:
            yield mount / path.lstrip("/")
            yield mount
