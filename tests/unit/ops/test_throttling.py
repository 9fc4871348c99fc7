"""Throttling is read from the control group's own file, wherever this kind of system keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.ops.throttling import ThrottlingCollector

V1 = "nr_periods 400\nnr_throttled 100\nthrottled_time 2500000000\nnr_bursts 0\nburst_time 0\n"
V2 = "usage_usec 9000000\nuser_usec 1\nnr_periods 400\nnr_throttled 100\nthrottled_usec 2500000\n"
OF_V1 = "5:memory:/kubepods/pod1\n4:cpu,cpuacct:/kubepods/pod1\n0::/elsewhere\n"
OF_V2 = "0::/kubepods/pod1\n"


def read(root: Path) -> tuple[float | None, float | None, float | None]:
    """(periods, throttled periods, throttled seconds)."""
    registry = CollectorRegistry()
    ThrottlingCollector(registry, root)
    names = ("periods", "throttled_periods", "throttled_seconds")
    periods, throttled, seconds = (registry.get_sample_value(f"impala_cpu_{name}_total") for name in names)
    return periods, throttled, seconds


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "where", "text"),
    [
        (OF_V1, "cpu,cpuacct/kubepods/pod1", V1),
        (OF_V1, "cpu/kubepods/pod1", V1),
        (OF_V1, "cpu", V1),
        (OF_V2, "kubepods/pod1", V2),
        (OF_V2, ".", V2),
    ],
)
def test_periods_and_seconds_are_read_on_hosts_and_in_containers(
    tmp_path: Path, groups: str, where: str, text: str
) -> None:
    write(tmp_path, {"proc/self/cgroup": groups, f"sys/fs/cgroup/{where}/cpu.stat": text})
    assert read(tmp_path) == (400, 100, 2.5)


def test_our_own_group_is_read_and_not_the_whole_hosts(tmp_path: Path) -> None:
    hosts = V2.replace("400", "999").replace("2500000", "1")
    write(tmp_path, {"proc/self/cgroup": OF_V2, "sys/fs/cgroup/cpu.stat": hosts})
    write(tmp_path, {"sys/fs/cgroup/kubepods/pod1/cpu.stat": V2})
    assert read(tmp_path) == (400, 100, 2.5)


def test_where_both_versions_are_mounted_the_one_that_has_the_controller_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/a\n1:cpu:/a\n"})
    write(tmp_path, {"sys/fs/cgroup/a/cpu.stat": "usage_usec 5\n", "sys/fs/cgroup/cpu/a/cpu.stat": V1})
    assert read(tmp_path) == (400, 100, 2.5)


@pytest.mark.parametrize("files", [{}, {"proc/self/cgroup": OF_V2}, {"proc/self/cgroup": "nonsense\n"}])
def test_without_the_file_nothing_is_throttled(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    assert read(tmp_path) == (0, 0, 0)


def test_each_scrape_reads_anew(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    ThrottlingCollector(registry, tmp_path)
    assert registry.get_sample_value("impala_cpu_throttled_seconds_total") == 0
    write(tmp_path, {"proc/self/cgroup": OF_V2, "sys/fs/cgroup/kubepods/pod1/cpu.stat": V2})
    assert registry.get_sample_value("impala_cpu_throttled_seconds_total") == 2.5
