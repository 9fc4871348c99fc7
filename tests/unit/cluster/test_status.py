"""`impala status`: once, as JSON, as log lines, and live."""

import io
import json
import re

import pytest

from services.cluster.objects import ClusterError, UnreachableError
from services.cluster.observer import PAUSES_PER_LIST
from services.cluster.status import Options, status
from tests.unit.cluster.fake_cluster import FakeClock, Release, workload

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    """What is written to it, and that it is one."""

    def isatty(self) -> bool:
        return True


def shown(release: Release, clock: FakeClock, options: Options, output: io.StringIO) -> str:
    assert status(release.cluster, options, output=output, pause=clock.pause, clock=clock) == 0
    return COLOUR.sub("", output.getvalue())


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def release() -> Release:
    return Release()


@pytest.fixture
def clock(release: Release) -> FakeClock:
    clock = FakeClock()
    clock.on_pause = [lambda: release.trains.samples.inc(100)]
    return clock


def test_once_shows_a_rate_and_ends(release: Release, clock: FakeClock) -> None:
    text = shown(release, clock, Options(once=True), Terminal())
    assert "50 steps/s" in text
    assert len(clock.pauses) == 1
    assert "\x1b[?25l" not in text, "the cursor was hidden"


def test_without_a_terminal_it_is_shown_once(release: Release, clock: FakeClock) -> None:
    text = shown(release, clock, Options(), io.StringIO())
    assert text.count("IMPALA") == 1
    assert "50 steps/s" in text


def test_json_is_one_object(release: Release, clock: FakeClock) -> None:
    read = json.loads(shown(release, clock, Options(json=True), Terminal()))
    assert (read["release"], read["namespace"], read["state"]) == ("demo", "lab", "training")
    assert read["training"]["steps_per_s"] == 50
    assert read["roles"][2] == {"role": "actor", "desired": 2, "ready": 2, "restarts": 0, "is_settled": True}


@pytest.mark.usefixtures("own_logging")
def test_log_lines_go_on_until_somebody_stops_them_whatever_the_cluster_does(
    release: Release, clock: FakeClock
) -> None:
    def away() -> None:
        release.cluster.failures = [UnreachableError("cluster does not answer")]

    clock.on_pause += [away, lambda: None, interrupted]
    lines = shown(release, clock, Options(plain=True), io.StringIO()).splitlines()
    assert len(lines) == 4
    assert " info status status state=waiting " in lines[0]
    assert 'ready="learner=1/1 paramserver=1/1 actor=2/2"' in lines[0]
    assert " steps_per_s=10 " in lines[1]
    assert ' warning status unreachable reason="cluster does not answer"' in lines[2]
    assert " info status status state=" in lines[3]


def test_live_it_repaints_and_leaves_the_last_picture_and_the_cursor(
    release: Release, clock: FakeClock
) -> None:
    def away() -> None:
        release.cluster.failures = [UnreachableError("cluster does not answer")]

    clock.on_pause += [away, interrupted]
    text = shown(release, clock, Options(), Terminal())
    assert text.count("IMPALA") >= 3
    assert "50 steps/s" in text
    assert "cluster does not answer" in text
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is visible again"


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize("options", [Options(), Options(plain=True)], ids=["live", "plain"])
def test_a_cluster_that_is_slow_is_asked_less_often(
    release: Release, clock: FakeClock, options: Options
) -> None:
    release.cluster.on_list = lambda: setattr(clock, "now_s", clock.now_s + 4.0)
    clock.on_pause = [interrupted]
    shown(release, clock, options, Terminal())
    assert clock.pauses == [4.0 * PAUSES_PER_LIST]


@pytest.mark.usefixtures("own_logging")
def test_what_the_user_can_mend_ends_it(release: Release, clock: FakeClock) -> None:
    release.cluster.failures = [None, ClusterError("no permission")]
    with pytest.raises(ClusterError, match="no permission"):
        shown(release, clock, Options(plain=True), io.StringIO())
    release.cluster.failures = [UnreachableError("nobody there")]
    with pytest.raises(ClusterError, match="nobody there"):
        shown(release, clock, Options(once=True), io.StringIO())


def test_without_the_right_to_read_metrics_there_are_still_the_pods(
    release: Release, clock: FakeClock
) -> None:
    release.cluster.may_ask = False
    text = " ".join(shown(release, clock, Options(once=True), io.StringIO()).split())
    assert "2 of 2 ready" in text
    assert "metrics cannot be read: no permission for pods/proxy (HTTP 403)" in text


def test_a_release_that_is_not_clear_is_asked_for(release: Release, clock: FakeClock) -> None:
    release.cluster.workloads_now.append(workload("learner", release="other"))
    with pytest.raises(ClusterError, match="name one of demo, other"):
        shown(release, clock, Options(), io.StringIO())
    assert "demo" in shown(release, clock, Options(release="demo"), io.StringIO())
