"""What an evaluation has found: episodes -> statistics per task and over tasks, ready for JSON and metrics.

``games`` comes before this; the pod's reports and the command's table come after it. Returns are raw and of
whole episodes. Deviations are those of the episodes themselves (divided by n, not n - 1).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass

from services.config import EnvConfig
from services.ops.append import finite
from services.rl.scores import Summary, human_normalised, summarise
from services.wire.messages import Episode


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One task, of which at least one episode was played."""

    name: str
    env: EnvConfig
    """What was played: a level that is kept for testing, perhaps, and not the one that was trained on."""
    episodes: tuple[Episode, ...]
    num_capped: int = 0
    """So many of them did not end, but were cut off after ``evaluator.max_episode_steps``."""

    @property
    def returns(self) -> list[float]:
        """In the order of the episodes."""
        return [episode.episode_return for episode in self.episodes]

    @property
    def mean(self) -> float:
        """Of the returns."""
        return statistics.fmean(self.returns)

    @property
    def median(self) -> float:
        """Of the returns."""
        return statistics.median(self.returns)

    @property
    def std(self) -> float:
        """Of the returns; 0 of a single one."""
        return math.sqrt(statistics.fmean((each - self.mean) ** 2 for each in self.returns))

    @property
    def mean_length(self) -> float:
        """Agent steps."""
        return statistics.fmean(episode.length for episode in self.episodes)

    @property
    def human_normalised(self) -> float | None:
        """Of the mean, in percent from random to human, uncapped; None where nobody has measured both."""
        return human_normalised(self.env.id, self.mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All tasks, played with one version of the weights."""

    version: int
    steps: int
    """Agent steps trained when that version was made."""
    tasks: tuple[TaskResult, ...]

    @property
    def mean(self) -> float:
        """Over tasks, of their mean returns: each counts alike."""
        return statistics.fmean(task.mean for task in self.tasks)

    @property
    def human_normalised(self) -> Summary | None:
        """Over several tasks; None unless each of them has a score."""
        return summarise([task.human_normalised for task in self.tasks])

    def plain(self) -> dict[str, object]:
        """For JSON, which knows no number that is not finite: null."""
        suite = self.human_normalised
        return {
            "version": self.version,
            "steps": self.steps,
            "mean": finite(self.mean),
            "human_normalised": {k: finite(v) for k, v in asdict(suite).items()} if suite else None,
            "tasks": {task.name: _plain(task) for task in self.tasks},
        }


def _plain(task: TaskResult) -> dict[str, object]:
    return {
        "env": task.env.model_dump(mode="json"),
        "episodes": len(task.episodes),
        "capped": task.num_capped,
        "mean": finite(task.mean),
        "median": finite(task.median),
        "std": finite(task.std),
        "min": finite(min(task.returns)),
        "max": finite(max(task.returns)),
        "mean_length": task.mean_length,
        "human_normalised": finite(task.human_normalised),
        "returns": [finite(each) for each in task.returns],
        "lengths": [episode.length for episode in task.episodes],
    }
