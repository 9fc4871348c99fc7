"""Several learners as one: they come, go and die under load, and neither a step nor a pod is lost with them.

One release of its own, whose tests build on each other in their order. Where two cores carry all of it,
pauses say more of the cores than of the learners: they are reported, and only what is no recovery fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.conftest import LONG, SMALL, Figures
from tests.cluster.kube import Namespace, Pod, run
from tests.cluster.release import HELM_TEST_S, STEPS, WORLD_SIZE, Progress, Release

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ACTORS = 3
LEARNERS = 2
MEMBERS = ("learner-0", "learner-1", "paramserver-0")
FORCED = ("--grace-period=0", "--force")
GATHER_S = 90.0
"""Until all learners that there are train together: those that begin import torch first."""
LONGEST_PAUSE_S = 60.0
"""Of training while a learner comes or goes. How long the parameter server is away is up to the node."""
EQUAL_S = 180.0
"""The next sum is that of a version that 100 divides."""
STATUS_S = 60.0
STOP_S = 10.0
PUBLISHED_S = 5.0
"""Of training may be lost where nobody survives: what the parameter server holds is newer than this."""

LEADS = "impala_learner_leads"
GENERATION = "impala_learner_generation"
CHECKSUM = "impala_learner_parameters_checksum"
VERSION_OF_CHECKSUM = "impala_learner_parameters_checksum_version"
REGROUPS = 'impala_learner_regroups_total{{reason="{}"}}'


@pytest.fixture(scope="module")
def release(namespace: Namespace) -> Iterator[Release]:
    release = Release(namespace, "impala-group")
    cheap = "learner.resources.requests.cpu=100m"
    release.install(f"actors={ACTORS}", f"learners={LEARNERS}", LONG, SMALL, cheap)
    yield release
    release.uninstall()
    release.await_gone()


def identities(pods: list[Pod], *roles: str) -> set[tuple[str, str, int]]:
    return {(pod.name, pod.uid, pod.restarts) for pod in pods if pod.role in roles}


def await_group(release: Release, size: int) -> dict[str, dict[str, float]]:
    """What the learners say once all ``size`` of them train together, in one generation."""

    def together() -> dict[str, dict[str, float]] | None:
        learners = release.learners()
        worlds = {(metrics[WORLD_SIZE], metrics[GENERATION]) for metrics in learners.values()}
        in_one = len(worlds) == 1 and {world for world, _ in worlds} == {size}
        return learners if len(learners) == size and in_one else None

    return release.namespace.until(together, f"{size} learners train together", GATHER_S)


def attending(release: Release) -> float | None:
    """Learners that the parameter server knows; None while it does not answer."""
    return release.metrics("paramserver").get("impala_paramserver_learners")


def generations(learners: dict[str, dict[str, float]]) -> set[float]:
    return {metrics[GENERATION] for metrics in learners.values()}


def leaders(learners: dict[str, dict[str, float]]) -> list[str]:
    return [name for name, metrics in learners.items() if metrics[LEADS] == 1]


def await_equal_weights(release: Release) -> None:
    """Bit by bit: in two learners, at the same version, the same checksum."""

    def equal() -> bool:
        learners = release.learners().values()
        known = {(metrics[VERSION_OF_CHECKSUM], metrics[CHECKSUM]) for metrics in learners}
        return len(learners) > 1 and len(known) == 1 and all(version for version, _ in known)

    release.namespace.until(equal, "learners with the same weights at the same version", EQUAL_S)


def test_all_learners_train_together_and_the_first_one_leads(release: Release) -> None:
    release.await_ready(actor=ACTORS, learner=LEARNERS)
    learners = await_group(release, LEARNERS)
    release.await_steps(above=release.steps() or 0)

    assert leaders(learners) == [f"{release.name}-learner-0"]
    await_equal_weights(release)


def test_impala_status_says_who_trains_with_whom(release: Release) -> None:
    words = ("status", release.name, "--namespace", release.namespace.name, "--json")

    def training() -> dict[str, Any] | None:  # it looks for two seconds, and any pod may be slow to answer
        ended = run([sys.executable, "-m", "services.cli", *words])
        seen: dict[str, Any] = json.loads(ended.stdout) if ended.returncode == 0 else {"state": ended.stderr}
        return seen if seen["state"] == "training" and seen["world_size"] == LEARNERS else None

    seen = release.namespace.until(training, "impala status sees learners that train", STATUS_S)
    assert [(each["name"], each["leads"]) for each in seen["learners"]] == [
        (f"{release.name}-learner-0", True),
        (f"{release.name}-learner-1", False),
    ]
    assert seen["training"]["steps_per_s"] > 0


def test_helm_test_passes_with_several_learners(release: Release) -> None:
    output = release.helm("test", "--logs", timeout_s=HELM_TEST_S)

    assert output.count("Phase:          Succeeded") >= 2, output


@pytest.mark.parametrize(("count", "with_helm"), [(1, True), (2, True), (3, False), (2, False)])
def test_learners_come_and_go_while_everybody_else_trains_on(
    release: Release, figures: Figures, count: int, with_helm: bool
) -> None:
    before = release.pods()
    had = sum(pod.role == "learner" for pod in before)

    with Progress(release) as progress:
        if with_helm:
            release.upgrade(f"learners={count}")
        else:
            release.namespace.kubectl("scale", f"statefulset/{release.name}-learner", f"--replicas={count}")
        after = release.await_ready(actor=ACTORS, learner=count)
        learners = await_group(release, count)
        release.await_steps(above=max(metrics[STEPS] for metrics in learners.values()))

    figures.note(
        f"{had} -> {count} learners: longest pause of training", f"{progress.longest_pause_s():.1f} s"
    )
    assert progress.deepest_fall() == 0
    assert progress.longest_pause_s() < LONGEST_PAUSE_S
    assert identities(before, "actor", "paramserver") == identities(after, "actor", "paramserver")
    fewer, more = sorted((identities(before, "learner"), identities(after, "learner")), key=len)
    assert fewer <= more, "a learner that stays has been restarted"
    assert leaders(learners) == [f"{release.name}-learner-0"]


@pytest.mark.parametrize("flags", [(), FORCED], ids=["politely", "at once"])
@pytest.mark.parametrize("member", MEMBERS)
def test_nothing_is_lost_with_the_death_of(
    release: Release, figures: Figures, member: str, flags: tuple[str, ...]
) -> None:
    release.await_ready(actor=ACTORS, learner=LEARNERS)
    before = await_group(release, LEARNERS)
    victim = next(pod for pod in release.pods() if pod.name == f"{release.name}-{member}")
    survivors = {(pod.uid, pod.restarts) for pod in release.pods() if pod.uid != victim.uid}

    with Progress(release) as progress:
        release.await_steps(above=release.steps() or 0)
        release.namespace.kubectl("delete", "pod", victim.name, *flags, "--wait=false")
        release.namespace.until(
            lambda: victim.uid not in {pod.uid for pod in release.pods()}, f"{victim.name} ends", 60
        )
        pods = release.await_ready(actor=ACTORS, learner=LEARNERS)
        release.await_seats(ACTORS)
        release.namespace.until(lambda: attending(release) == LEARNERS, "all learners attend", GATHER_S)
        release.await_steps(above=max(steps for _, steps in progress.samples))
        learners = await_group(release, LEARNERS)

    how = "by force" if flags else "politely"
    pause_s = progress.longest_pause_s()
    figures.note(f"{member} of {LEARNERS} learners deleted {how}: longest pause", f"{pause_s:.1f} s")
    assert survivors < {(pod.uid, pod.restarts) for pod in pods}, "a pod that was not meant has ended"
    assert progress.deepest_fall() == 0, "steps were trained twice"
    assert leaders(learners) == [f"{release.name}-learner-0"]
    if member == "paramserver-0":  # a group outlives the server that has issued it
        assert generations(learners) == generations(before)
    else:
        assert pause_s < LONGEST_PAUSE_S
    await_equal_weights(release)


@pytest.mark.parametrize("number", [1, 0])
def test_a_learner_of_a_group_ends_soon_and_tells_the_others(
    release: Release, figures: Figures, number: int
) -> None:
    before = await_group(release, LEARNERS)
    leaver, other = f"{release.name}-learner-{number}", f"{release.name}-learner-{1 - number}"
    pod = next(pod for pod in release.pods("learner") if pod.name == leaver)

    def next_group() -> dict[str, float] | None:
        metrics = release.namespace.metrics(other)
        is_next = metrics.get(WORLD_SIZE) and metrics[GENERATION] > before[other][GENERATION]
        return metrics if is_next else None

    end = release.namespace.terminate(pod)
    alone = release.namespace.until(next_group, f"{other} goes on", GATHER_S)
    await_group(release, LEARNERS)

    figures.note(f"learner-{number} of {LEARNERS}: from SIGTERM to the end", f"{end.seconds:.0f} s")
    assert end.exit_code == 0
    assert end.seconds < STOP_S
    assert alone[REGROUPS.format("left")] == before[other][REGROUPS.format("left")] + 1
    assert alone[REGROUPS.format("lost")] == before[other][REGROUPS.format("lost")]


def test_a_configuration_with_which_old_and_new_cannot_train_together_reaches_all_learners(
    release: Release, figures: Figures
) -> None:
    """Kubernetes changes them one after the other, and waits until each new one is ready."""
    before = identities(release.pods(), "learner")
    with Progress(release) as progress:
        release.upgrade("config.total_steps=1900000000")
        release.await_rollout("learner")
        release.await_ready(actor=ACTORS, learner=LEARNERS)
        learners = await_group(release, LEARNERS)
        release.await_steps(above=max(metrics[STEPS] for metrics in learners.values()))

    figures.note("another configuration: longest pause of training", f"{progress.longest_pause_s():.1f} s")
    assert not before & identities(release.pods(), "learner")
    assert leaders(learners) == [f"{release.name}-learner-0"]
    lost = progress.deepest_fall()
    figures.note("another configuration: agent steps trained twice", f"{lost:,.0f}")
    assert lost <= PUBLISHED_S * progress.steps_per_s()


def test_with_fewer_learners_than_it_is_told_to_have_training_waits(release: Release) -> None:
    release.upgrade("config.learner.min_learners=2")
    release.await_rollout("learner")
    release.await_ready(actor=ACTORS, learner=LEARNERS)
    await_group(release, LEARNERS)
    steps = release.await_steps(above=release.steps() or 0)

    release.namespace.kubectl("scale", f"statefulset/{release.name}-learner", "--replicas=1")
    first = f"{release.name}-learner-0"
    release.namespace.until(
        lambda: len(release.pods("learner")) == 1 and release.namespace.metrics(first).get(WORLD_SIZE) == 0,
        "the only learner waits",
        60,
    )
    waited = release.namespace.answer(first)
    assert waited[STEPS] >= steps
    assert not next(pod for pod in release.pods("learner") if pod.name == first).restarts

    release.namespace.kubectl("scale", f"statefulset/{release.name}-learner", f"--replicas={LEARNERS}")
    await_group(release, LEARNERS)
    release.await_steps(above=waited[STEPS])
