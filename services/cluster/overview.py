"""A release in figures: what a person wants to know of it, worked out from one ``Look``.

Pure. The learners' figures are those of a local run (``ops.learners``); around them stand the pods, and
what only a cluster has. ``picture`` shows it, ``wait`` decides by it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from services.cluster.objects import ROLES, Pod
from services.cluster.observer import Look
from services.ops.figures import PodPhase, PodStatus, RunInfo, Snapshot, take_snapshot
from services.ops.learners import Reading, leading, snapshot_of
from services.ops.scrape import Scrape

Value = TypeVar("Value")

RunState = Literal["unknown", "waiting", "training", "complete"]
"""unknown: no learner answers; waiting: for rollouts to train on, or for other learners."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleStatus:
    """All pods of one role."""

    role: str
    desired: int
    ready: int
    restarts: int
    is_settled: bool
    """No pods are being replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerStatus:
    """One learner of several. None: not known."""

    name: str
    leads: bool
    world_size: int | None
    """Of the group that it is in; 0 while it is in none."""
    generation: int | None
    """Of that group, or of the last one."""
    steps_per_s: float | None
    """Of its own rollouts."""
    wait_ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What pods of one role have in common that should not be."""

    role: str
    reason: str
    count: int
    example: str
    """The name of one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the evaluator found in its latest round."""

    policy_version: int | None
    returns: Mapping[str, float]
    """Mean of whole episodes, by task."""
    scores: Mapping[str, float]
    """In percent from random to human, where both are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """A release at one moment. None: not known (yet)."""

    namespace: str
    release: str
    state: RunState
    roles: tuple[RoleStatus, ...]
    troubles: tuple[Trouble, ...]
    """The most frequent first."""
    tasks: str
    """The task, or how many there are."""
    training: Snapshot | None
    """The learners' figures, from when they last answered."""
    learners: tuple[LearnerStatus, ...]
    """Each by itself, in the order of their names."""
    world_size: int | None
    """As the learner that leads knows it."""
    generation: int | None
    paramserver_version: int | None
    oldest_version: int | None
    """Of those with which the actors that were asked act."""
    newest_version: int | None
    actors_asked: int
    env_steps_per_s: float | None
    """Of all ready actors, if those that were not asked are like those that were."""
    seats: int | None
    received_bytes_per_s: float | None
    """Rollouts, by learners."""
    sent_bytes_per_s: float | None
    """Weights, by the parameter server and its relays."""
    rollouts: Mapping[str, int]
    """By their fate."""
    auth_failures: int
    evaluation: Evaluation | None

    @property
    def is_ready(self) -> bool:
        """Every pod that there should be is there, of the newest template, and ready."""
        return bool(self.roles) and all(role.is_settled and role.ready >= role.desired for role in self.roles)


def overview(look: Look) -> Overview:
    """What ``look`` comes to."""
    leader = look.learners[leading(look.learners)] if look.learners else None
    training = _training(look, leader) if leader else None
    of_role = {role: _readings(look, role) for role in ROLES}
    servers = [*of_role["paramserver"], *of_role["relay"]]
    acting = [
        version
        for actor in of_role["actor"]
        if (version := _version(actor.now, "impala_actor_weights_version")) is not None
    ]
    acted = [actor.increase("impala_actor_env_steps_total", per_second=True) for actor in of_role["actor"]]
    return Overview(
        namespace=look.namespace,
        release=look.release,
        state=_state(look, leader, training),
        roles=_roles(look),
        troubles=_troubles(look),
        tasks=_tasks(training),
        training=training,
        learners=_learners(look, training) if training else (),
        world_size=training.world_size if training else None,
        generation=training.generation if training else None,
        paramserver_version=_first(
            of_role["paramserver"], lambda each: _version(each, "impala_paramserver_version")
        ),
        oldest_version=min(acting, default=None),
        newest_version=max(acting, default=None),
        actors_asked=len(of_role["actor"]),
        env_steps_per_s=_extrapolated(acted, sum(pod.role == "actor" and pod.is_ready for pod in look.pods)),
        seats=_first(of_role["paramserver"], lambda each: _whole(each.get("impala_paramserver_seats"))),
        received_bytes_per_s=_sum_rates(of_role["learner"], "impala_learner_received_bytes_total"),
        sent_bytes_per_s=_sum_rates(servers, "impala_paramserver_sent_bytes_total"),
        rollouts=_rollouts(of_role["learner"]),
        auth_failures=sum(
            int(count)
            for each in [*of_role["learner"], *servers]
            for count in each.now.by_label("impala_auth_failures_total", "reason").values()
        ),
        evaluation=_first(of_role["evaluator"], lambda each: _evaluation(each, training)),
    )


def _readings(look: Look, role: str) -> list[Reading]:
    return [look.readings[pod.name] for pod in look.pods if pod.role == role and pod.name in look.readings]


def _training(look: Look, leader: Reading) -> Snapshot:
    scrape = leader.now
    steps, frames = scrape.get("impala_learner_samples_total"), scrape.get("impala_learner_frames_total")
    tasks = list(scrape.by_label("impala_learner_task_steps_total", "task"))
    run = RunInfo(
        env_id=tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks",
        total_steps=max(1, _whole(scrape.get("impala_total_steps")) or 1),
        frame_skip=round(frames / steps) if steps and frames else 1,
        run_dir=Path(),  # the pods', of no use here
    )
    return snapshot_of(
        run,
        look.learners,
        pods=tuple(
            PodStatus(name=pod.name, role=pod.role, phase=_phase(pod), restarts=pod.restarts)
            for pod in look.pods
        ),
        unix_time_s=look.unix_time_s,
        returns=look.returns,
    )


def _learners(look: Look, training: Snapshot) -> tuple[LearnerStatus, ...]:
    learners = []
    for name, reading in sorted(look.learners.items(), key=lambda item: (len(item[0]), item[0])):
        alone = take_snapshot(training.run, reading.before, reading.now)
        learners.append(
            LearnerStatus(
                name=name,
                leads=name == training.leader,
                world_size=alone.world_size,
                generation=alone.generation,
                steps_per_s=alone.steps_per_s,
                wait_ratio=alone.wait_ratio,
            )
        )
    return tuple(learners)


def _phase(pod: Pod) -> PodPhase:
    return "up" if pod.is_ready else "restarting" if pod.is_backing_off else "starting"


def _tasks(training: Snapshot | None) -> str:
    return training.run.env_id if training and training.task_returns else ""


def _state(look: Look, leader: Reading | None, training: Snapshot | None) -> RunState:
    answers = any(pod.role == "learner" and pod.name in look.readings for pod in look.pods)
    if leader is None or training is None or not answers:
        return "unknown"
    if leader.now.get("impala_training_complete") == 1:
        return "complete"
    if training.steps_per_s is None:  # the first answer of this life
        return "training" if leader.now.get("impala_learner_samples_total") else "waiting"
    return "training" if training.steps_per_s > 0 else "waiting"


def _roles(look: Look) -> tuple[RoleStatus, ...]:
    roles = []
    for role in ROLES:
        workloads = [workload for workload in look.workloads if workload.role == role]
        if workloads:
            roles.append(
                RoleStatus(
                    role=role,
                    desired=sum(workload.desired for workload in workloads),
                    ready=sum(workload.ready for workload in workloads),
                    restarts=sum(pod.restarts for pod in look.pods if pod.role == role),
                    is_settled=all(workload.is_settled for workload in workloads),
                )
            )
    return tuple(roles)


def _troubles(look: Look) -> tuple[Trouble, ...]:
    """A thousand pods that wait for the same reason are one line."""
    found = [(each.role, each.trouble, "") for each in look.workloads if each.trouble]
    for pod in look.pods:
        if pod.trouble is not None:
            found.append((pod.role, pod.trouble, pod.name))
        elif pod.name in look.silent:
            found.append((pod.role, f"metrics cannot be read: {look.silent[pod.name]}", pod.name))
    examples: dict[tuple[str, str], str] = {}
    for role, reason, name in found:
        examples.setdefault((role, reason), name)
    counts = Counter((role, reason) for role, reason, _ in found)
    return tuple(
        Trouble(role=role, reason=reason, count=count, example=examples[role, reason])
        for (role, reason), count in counts.most_common()
    )


def _rollouts(learners: Iterable[Reading]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for learner in learners:
        total.update(
            {
                fate: int(count)
                for fate, count in learner.now.by_label("impala_learner_rollouts_total", "result").items()
            }
        )
    return dict(total)


def _evaluation(scrape: Scrape, training: Snapshot | None) -> Evaluation | None:
    version = _version(scrape, "impala_evaluator_policy_version")
    means = {
        task: scrape.get("impala_evaluator_return", task=task, statistic="mean")
        for task in (training.task_returns if training else ())
    }
    return Evaluation(
        policy_version=version,
        returns={task: mean for task, mean in means.items() if mean is not None},
        scores=scrape.by_label("impala_evaluator_human_normalised_score", "task"),
    )


def _sum_rates(readings: Iterable[Reading], name: str) -> float | None:
    rates = [reading.increase(name, per_second=True) for reading in readings]
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None


def _extrapolated(rates: Iterable[float | None], count: int) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) / len(known) * max(count, len(known)) if known else None


def _first(readings: list[Reading], of: Callable[[Scrape], Value]) -> Value | None:
    return of(readings[0].now) if readings else None


def _version(scrape: Scrape, name: str) -> int | None:
    """None before the first, which is -1."""
    version = _whole(scrape.get(name))
    return None if version is None or version < 0 else version


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else int(value)
