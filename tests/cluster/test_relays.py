"""Relays between the parameter server and the actors, and an evaluator beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.kube import Namespace
from tests.cluster.release import Release

pytestmark = pytest.mark.cluster

ACTORS = 2
FULL_PULLS = 'impala_paramserver_pulls_total{result="full"}'


@pytest.fixture(scope="module")
def relayed(namespace: Namespace) -> Iterator[Release]:
    release = Release(namespace, "impala-relayed")
    release.install(
        f"actors={ACTORS}",
        "paramserver.relays=1",
        "evaluator.enabled=true",
        "config.evaluator.interval_s=1",
    )
    release.await_ready(actor=ACTORS, relay=1, evaluator=1)
    yield release
    release.uninstall()
    release.await_gone()


def test_actors_get_their_weights_from_a_relay_and_their_seats_through_it(relayed: Release) -> None:
    relay = relayed.pod("relay").name
    relayed.await_seats(ACTORS)
    steps = relayed.await_steps(above=0)
    pulls = relayed.namespace.answer(relay)[FULL_PULLS]

    relayed.await_steps(above=steps)
    relayed.namespace.until(
        lambda: relayed.namespace.metrics(relay).get(FULL_PULLS, 0) > pulls, "weights through the relay", 30
    )

    [endpoint] = [
        each["value"]
        for each in relayed.namespace.get("pods", f"--selector={relayed.selector}")
        if each["metadata"]["labels"]["app.kubernetes.io/component"] == "actor"
        for each in each["spec"]["containers"][0]["env"]
        if each["name"] == "IMPALA__WIRE__PARAMSERVER_ENDPOINT"
    ][:1]
    assert endpoint == f"tcp://{relayed.name}-relay:5556"


def test_an_evaluator_plays_whole_games_with_weights_that_are_ever_newer(relayed: Release) -> None:
    evaluator = relayed.pod("evaluator").name

    def played(version: float) -> dict[str, float] | None:
        metrics = relayed.namespace.metrics(evaluator)
        return metrics if metrics.get("impala_evaluator_policy_version", -1) > version else None

    first = relayed.namespace.until(lambda: played(0), "a round", 120)
    assert -1 <= first['impala_evaluator_return{statistic="mean",task="catch"}'] <= 1
    assert first["impala_evaluator_episodes_total"] >= 10

    relayed.namespace.until(
        lambda: played(first["impala_evaluator_policy_version"]), "a round with newer weights", 60
    )
