"""Which environments one policy learns, and which of them an actor's seat plays.

``RunConfig.tasks`` -> a tuple of ``Task``, whose order numbers them on the wire and in the baseline's
outputs. Every environment of the fleet is a slot, numbered through all seats, and slot s plays task s modulo
the number of tasks: whatever the number of actors, no task has more than one environment more than another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from services.config import EnvConfig, RunConfig, TaskConfig
from services.rl.envs import EnvSpec, VectorEnv, env_spec, make_mixed_env, union_spec
from services.rl.scores import SCORE_TABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One of them."""

    name: str
    """What reports call it; no two tasks of a run are called the same."""
    env: EnvConfig


def tasks_of(config: RunConfig) -> tuple[Task, ...]:
    """The tasks of a run; ValueError if they cannot be told apart or not all of them would be played."""
    entries = [expanded for entry in config.tasks for expanded in _expand(entry)]
    if not entries:
        return (Task(name=config.env.id, env=config.env),)
    names = Counter(entry.name or entry.id for entry in entries)
    for name, count in names.items():
        if count > 1:
            raise ValueError(f"tasks: {count} are called {name!r}; allowed are different ids, or names")
    slots = config.actors * config.actor.num_envs
    if slots < len(entries):
        raise ValueError(
            f"tasks: {len(entries)} of them, but actors x actor.num_envs = {slots} environments play no more "
            f"than {slots}; allowed are fewer tasks, or more actors or environments"
        )
    several = len(entries) > 1
    return tuple(
        Task(
            name=entry.name or entry.id,
            env=config.env.model_copy(
                update={
                    "id": entry.id,
                    "kwargs": config.env.kwargs | entry.kwargs,
                    # One policy speaks for all games, and the same number has to mean the same action.
                    "full_action_set": config.env.full_action_set or several,
                }
            ),
        )
        for entry in entries
    )


def tasks_spec(tasks: tuple[Task, ...]) -> EnvSpec:
    """What a network that plays all of them must fit; ValueError if there is no such network."""
    return union_spec([replace(env_spec(task.env), id=task.name) for task in tasks])


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """What half an actor plays: the task of each of its environments, in ascending order."""

    tasks: tuple[int, ...]

    def make(self, tasks: tuple[Task, ...], num_actions: int, num_threads: int) -> VectorEnv:
        """Its environments, for a policy of ``num_actions``."""
        counts = Counter(self.tasks)
        envs = [tasks[task].env for task in counts]
        return make_mixed_env(envs, list(counts.values()), num_threads, num_actions=num_actions)


def deal(seat: int, num_envs: int, num_tasks: int) -> tuple[Deal, Deal]:
    """The two halves of the actor on ``seat``."""
    first = seat * num_envs
    played = [slot % num_tasks for slot in range(first, first + num_envs)]
    half = num_envs // 2
    return Deal(tasks=tuple(sorted(played[:half]))), Deal(tasks=tuple(sorted(played[half:])))


def _expand(entry: TaskConfig) -> list[TaskConfig]:
    tasks = SCORE_TABLES.get(entry.id)
    if tasks is None:
        return [entry]
    if entry.name is not None:
        raise ValueError(
            f"tasks: name = {entry.name!r} for the {len(tasks)} tasks of {entry.id}; allowed is none"
        )
    return [TaskConfig(id=task, kwargs=entry.kwargs) for task in tasks]
