"""What is known of each task's episodes: the recent ones, and how many there were.

Written by the intake's thread, as episodes arrive with their rollouts; read by ``report``, and saved in
checkpoints. Returns are raw and of whole episodes. Each of several learners knows those that came to it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.rl.scores import human_normalised, summarise
from services.wire.messages import Episode

RECENT_EPISODES = 100
"""Of each task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEpisodes:
    """One task at one moment."""

    task_id: str
    """Its environment."""
    recent: Sequence[Episode]
    """The latest ones."""
    new: Sequence[Episode]
    """Those since the last report."""
    total: int
    """How many there were in all."""

    @property
    def mean_return(self) -> float | None:
        """Of the latest episodes."""
        return mean([episode.episode_return for episode in self.recent])

    @property
    def mean_length(self) -> float | None:
        """Of the latest episodes."""
        return mean([episode.length for episode in self.recent])

    @property
    def has_score(self) -> bool:
        """Whether it is known how well people play this."""
        return human_normalised(self.task_id, 0.0) is not None

    @property
    def human_normalised(self) -> float | None:
        """Of the mean return, in percent."""
        return None if self.mean_return is None else human_normalised(self.task_id, self.mean_return)


class Episodes:
    """Those of all tasks, in the order that numbers them."""

    def __init__(self, task_ids: Sequence[str]) -> None:
        """``task_ids``: the environment of each task."""
        self._task_ids = tuple(task_ids)
        self._lock = threading.Lock()
        self._recent: list[deque[Episode]] = [deque(maxlen=RECENT_EPISODES) for _ in task_ids]
        self._new: list[list[Episode]] = [[] for _ in task_ids]
        self._totals = [0 for _ in task_ids]

    def add(self, task: int, episode: Episode) -> None:
        """One more."""
        with self._lock:
            self._recent[task].append(episode)
            self._new[task].append(episode)
            self._totals[task] += 1

    def take(self) -> list[TaskEpisodes]:
        """Of each task. What is new is so once."""
        with self._lock:
            taken = self._look()
            self._new = [[] for _ in self._task_ids]
            return taken

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint.

        ``mean_return`` is what checkpoints are ranked by: of several tasks the mean human-normalised score if
        all of them have one, else the mean of their mean returns. None until each has ended an episode, or
        the best checkpoint would be an early one that has not got to the end of the hard tasks yet.
        """
        with self._lock:
            tasks = self._look()
        returns = [task.mean_return for task in tasks]
        suite = summarise([task.human_normalised for task in tasks])
        return {
            "tasks": [
                {"recent": [[e.episode_return, e.length] for e in task.recent], "total": task.total}
                for task in tasks
            ],
            "mean_return": suite.mean if suite else None if None in returns else mean(returns),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there and nowhere else; ValueError if it is of another number of tasks."""
        if len(state["tasks"]) != len(self._task_ids):
            raise ValueError(f"it has {len(state['tasks'])} tasks, this run {len(self._task_ids)}")
        with self._lock:
            for number, task in enumerate(state["tasks"]):
                self._recent[number].clear()
                self._recent[number].extend(Episode(episode_return=r, length=n) for r, n in task["recent"])
                self._totals[number] = task["total"]

    def _look(self) -> list[TaskEpisodes]:
        each = zip(self._task_ids, self._recent, self._new, self._totals, strict=True)
        return [
            TaskEpisodes(task_id=task_id, recent=tuple(recent), new=tuple(new), total=total)
            for task_id, recent, new, total in each
        ]


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
