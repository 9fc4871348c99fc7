"""Every pod may die at any time, politely or not: training goes on by itself, and hardly a step is lost."""

from __future__ import annotations

import pytest

from tests.cluster.conftest import ACTORS, Figures
from tests.cluster.release import Progress, Release

pytestmark = pytest.mark.cluster

FORCED = ("--grace-period=0", "--force")
PUBLISHED_S = 5.0
"""A learner begins with the newest weights that there are: those of its checkpoint, which may be a minute
old, or the parameter server's, which are much newer than this."""


@pytest.mark.parametrize("flags", [(), FORCED], ids=["politely", "at once"])
@pytest.mark.parametrize("role", ["actor", "paramserver", "learner"])
def test_training_goes_on_by_itself_after_the_death_of(
    release: Release, figures: Figures, role: str, flags: tuple[str, ...]
) -> None:
    victim = release.pod(role)
    survivors = {(pod.uid, pod.restarts) for pod in release.pods() if pod.uid != victim.uid}

    with Progress(release) as progress:
        release.await_steps(above=release.steps() or 0)
        release.namespace.kubectl("delete", "pod", victim.name, *flags, "--wait=false")
        release.namespace.until(
            lambda: victim.uid not in {pod.uid for pod in release.pods()}, f"{victim.name} ends", 60
        )
        pods = release.await_ready(actor=ACTORS)
        release.await_seats(ACTORS)
        release.await_steps(above=max(steps for _, steps in progress.samples))

    how = "by force" if flags else "politely"
    lost = progress.deepest_fall()
    figures.note(f"{role} deleted {how}: longest pause of training", f"{progress.longest_pause_s():.1f} s")
    figures.note(f"{role} deleted {how}: agent steps trained twice", f"{lost:,.0f}")
    assert survivors < {(pod.uid, pod.restarts) for pod in pods}, "a pod that was not meant has ended"
    assert lost <= (PUBLISHED_S * progress.steps_per_s() if role == "learner" else 0)
