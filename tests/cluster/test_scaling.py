"""`helm upgrade --set actors=N` under load: actors come and go, and nobody else notices.

Where all cores are busy, more actors bring nothing and fewer cost nothing; where they are not, throughput
follows their number. So removing actors may cost at most their share; what adding some brings is not asked.
"""

from __future__ import annotations

import pytest

from tests.cluster.conftest import ACTORS, Figures
from tests.cluster.kube import Pod
from tests.cluster.release import Progress, Release

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

MEASURED_S = 8.0
LONGEST_PAUSE_S = 10.0
"""Of training: a dozen processes that import torch keep two cores busy."""
NOISE = 0.6
"""Of two measurements of the same throughput on a machine that has other things to do, as a ratio."""


def identities(pods: list[Pod]) -> set[tuple[str, str, int]]:
    return {(pod.name, pod.uid, pod.restarts) for pod in pods}


def measure(release: Release) -> float:
    """Agent steps trained per second."""
    with Progress(release) as progress:
        release.namespace.until(
            lambda: progress.samples and progress.samples[-1][0] - progress.samples[0][0] > MEASURED_S,
            "two looks at the learner",
            timeout_s=4 * MEASURED_S,
        )
    return progress.steps_per_s()


def test_actors_come_and_go_while_everybody_else_trains_on(release: Release, figures: Figures) -> None:
    before = release.pods()
    servants = identities([pod for pod in before if pod.role != "actor"])
    actors = {ACTORS: identities(release.pods("actor"))}
    steps_per_s: dict[int, float] = {}

    for count in (8, 12, 4):
        with Progress(release) as progress:
            release.upgrade(f"actors={count}")
            pods = release.await_ready(actor=count)
            release.await_seats(count)
        figures.note(
            f"scaling to {count} actors: longest pause of training", f"{progress.longest_pause_s():.1f} s"
        )
        assert progress.longest_standstill_s() < LONGEST_PAUSE_S
        assert progress.deepest_fall() == 0

        assert identities([pod for pod in pods if pod.role != "actor"]) == servants
        actors[count] = identities([pod for pod in pods if pod.role == "actor"])
        steps_per_s[count] = measure(release)
        figures.note(f"agent steps trained per second with {count} actors", f"{steps_per_s[count]:,.0f}")

    assert actors[ACTORS] <= actors[8] <= actors[12]
    assert actors[4] <= actors[12]
    assert steps_per_s[4] > NOISE * 4 / 12 * steps_per_s[12]
