"""The load generator against a real parameter server and learner: whoever has keys is served, all at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fleet import Load, main, record, run
from benchmarks.fleet_pods import Own, Pods, make_keys, own_pods, scrape
from benchmarks.stand_in import KINDS
from tests.integration.system import REPOSITORY, START_S, environment
from tests.unit.learner.waiting import until

pytestmark = pytest.mark.integration

NUM_CLIENTS = 32
GOODBYES_S = 15.0
"""Half of a lease, with which the seats would come back without goodbyes."""


def test_32_clients_with_keys_are_served_and_nothing_is_refused(tmp_path: Path) -> None:
    load = Load(clients=NUM_CLIENTS, seconds=6.0)
    with own_pods(Own(env="catch", keys=make_keys(tmp_path / "keys"), actors=NUM_CLIENTS)) as pods:
        measured = run(load, pods, record(load))
        figures = measured.figures
        until(lambda: _seats(pods) == 0, "all have said goodbye", GOODBYES_S)
    for what in ("answered", "served", "seats_held", "sending"):
        assert figures[what] == NUM_CLIENTS, what
    for what in (
        "seats_lost",
        "paramserver_refused",
        "rollouts_invalid",
        "sequence_gaps",
    ):
        assert figures[what] == 0, what
    assert figures["paramserver_auth_failures"] == figures["learner_auth_failures"] == 0
    assert 0 < figures["rollouts_ok"] <= figures["sent"]
    assert figures["rollouts_stale"] == 0
    assert figures["new_version_50_s"] <= figures["new_version_100_s"] < 10
    assert measured.memory.keys() == {"paramserver", "learner"}
    for curve in measured.memory.values():
        assert len(curve) >= 3
        assert all(mb > 1 for _, mb in curve)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_takes_what_a_learner_takes(kind: str, tmp_path: Path) -> None:
    load = Load(clients=4, seconds=2.0)
    keys = make_keys(tmp_path / "keys") if kind == "intake" else None
    with own_pods(Own(env="catch", keys=keys, learner=kind)) as pods:
        figures = run(load, pods, record(load)).figures
    assert figures["served"] == figures["sending"] == 4
    assert figures["rollouts_invalid"] == figures["rollouts_stale"] == figures["sequence_gaps"] == 0
    assert 0 < figures["rollouts_ok"] <= figures["sent"]
    assert figures["rollouts_mb_per_s"] > 0


def test_clients_with_keys_of_another_run_are_reported_as_not_served(tmp_path: Path) -> None:
    ours, theirs = make_keys(tmp_path / "ours"), make_keys(tmp_path / "theirs")
    load = Load(clients=4, seconds=1.0, ready_within_s=3.0)
    with own_pods(Own(env="catch", keys=ours)) as pods:
        figures = run(load, replace(pods, keys=theirs), record(load)).figures
    assert figures["answered"] == figures["served"] == figures["sending"] == figures["seats_held"] == 0
    assert figures["rollouts_ok"] == 0
    assert figures["paramserver_auth_failures"] >= 4


def test_a_learner_with_keys_of_another_run_cannot_publish_in_its_place(tmp_path: Path) -> None:
    ours, theirs = make_keys(tmp_path / "ours"), make_keys(tmp_path / "theirs")
    load = Load(clients=1, seconds=1.0, weights_mb=0.1)
    with own_pods(Own(env="catch", keys=ours, learner=None)) as pods:
        with pytest.raises(RuntimeError, match="could not be sent: handshake with"):
            run(load, replace(pods, keys=theirs), [])
        assert scrape(pods.metrics["paramserver"])["impala_paramserver_version"] == -1


@pytest.mark.parametrize("relays", [0, 2])
def test_new_weights_are_timed_from_their_publication(relays: int, tmp_path: Path) -> None:
    load = Load(clients=NUM_CLIENTS, seconds=2.0, weights_mb=1.0)
    own = Own(env="catch", keys=make_keys(tmp_path / "keys"), learner=None, relays=relays)
    with own_pods(own) as pods:
        assert len(pods.relays) == relays
        figures = run(load, pods, []).figures
        until(lambda: _seats(pods) == 0, "all have said goodbye, also through a relay", GOODBYES_S)
    assert figures["served"] == NUM_CLIENTS
    assert figures["versions"] > 1
    assert 0 < figures["new_version_50_s"] <= figures["new_version_99_s"] <= figures["new_version_100_s"]


def test_ctrl_c_ends_it_with_goodbyes_and_leaves_no_process(tmp_path: Path) -> None:
    with own_pods(Own(env="catch")) as pods:
        fleet = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks", "fleet", "--clients", "8", "--seconds", "600"),
                *("--endpoint-paramserver", pods.paramserver),
                *("--metrics-paramserver", pods.metrics["paramserver"]),
                *("--metrics-learner", pods.metrics["learner"], "--run-id", pods.run_id),
            ],
            env=environment(),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until(lambda: _seats(pods) == 8, "all sit", START_S)
            fleet.send_signal(signal.SIGINT)
            assert fleet.wait(30) == 130
        finally:
            fleet.kill()
            fleet.wait()
        until(lambda: _seats(pods) == 0, "all have said goodbye", GOODBYES_S)


@pytest.mark.parametrize(
    "flags",
    [["--endpoint-paramserver", "tcp://127.0.0.1:1"], ["--weights-mb", "1", "--endpoint-paramserver", "x"]],
)
def test_half_of_an_existing_system_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(flags)
    assert refused.value.code == 2


def _seats(pods: Pods) -> float:
    return scrape(pods.metrics["paramserver"]).get("impala_paramserver_seats", 0.0)
