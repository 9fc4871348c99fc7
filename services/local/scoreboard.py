"""What `impala evaluate` shows: bars or log lines while it plays, a table in the end.

``table`` is pure, so that it can be tested without a terminal. The table goes to stdout, everything before it
to stderr.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from services.config import RunConfig
from services.evaluator.results import Results, TaskResult
from services.local.formats import figure, percent
from services.ops import logging
from services.ops.logging import EventLogger
from services.wire.messages import Episode

FILE_WIDTH = 140
"""Of a table that no terminal shows."""
NAME_WIDTH = 20
"""Of a task, at least; without room, longer ones lose their beginning, which many have in common."""
LINE_INTERVAL_S = 10.0

COLUMNS: Mapping[str, Callable[[TaskResult], str]] = {
    "episodes": lambda task: f"{len(task.episodes):,}",
    "mean": lambda task: figure(task.mean),
    "median": lambda task: figure(task.median),
    "std": lambda task: figure(task.std),
    "min": lambda task: figure(min(task.returns)),
    "max": lambda task: figure(max(task.returns)),
    "length": lambda task: figure(task.mean_length),
    "human": lambda task: _score(task.human_normalised),
}
DISPENSABLE = ("episodes", "length", "median", "min", "max", "std")
"""In this order."""


def table(results: Results, width: int) -> str:
    """A row per task, and below what they come to together. Without room for all, columns go, not digits."""
    columns = {heading: [cell(task) for task in results.tasks] for heading, cell in COLUMNS.items()}
    if not any(task.human_normalised is not None for task in results.tasks):
        del columns["human"]
    widths = {heading: max(map(len, [heading, *cells])) + 2 for heading, cells in columns.items()}
    names = [task.name for task in results.tasks]
    longest = max(map(len, ["task", *names]))
    for heading in DISPENSABLE:
        if min(longest, NAME_WIDTH) + sum(widths[kept] for kept in columns) > width:
            del columns[heading]
    name_width = min(longest, max(NAME_WIDTH, width - sum(widths[kept] for kept in columns)))

    def row(name: str, cells: Iterable[str]) -> str:
        short = name if len(name) <= name_width else f"...{name[3 - name_width :]}"
        aligned = (f"{cell:>{widths[heading]}}" for heading, cell in zip(columns, cells, strict=True))
        return "".join([f"{short:<{name_width}}", *aligned])

    head = row("task", columns)
    body = (row(name, cells) for name, *cells in zip(names, *columns.values(), strict=True))
    notes = [*_together(results), *_capped(results)]
    return "\n".join([head, "-" * len(head), *body, *([""] if notes else []), *notes])


def _together(results: Results) -> list[str]:
    """Of several tasks."""
    if len(results.tasks) == 1:
        return []
    lines = [f"mean over {len(results.tasks)} tasks: {figure(results.mean)}"]
    if (suite := results.human_normalised) is not None:
        lines += [
            f"human-normalised: mean {_score(suite.mean)}, median {_score(suite.median)}",
            f"capped at 100 %: mean {_score(suite.mean_capped)}, median {_score(suite.median_capped)}",
        ]
    return lines


def _capped(results: Results) -> list[str]:
    """What must not be taken for whole episodes."""
    capped = {task.name: task.num_capped for task in results.tasks if task.num_capped}
    return [
        f"{name}: {count:,} of its episodes did not end, and were cut off" for name, count in capped.items()
    ]


def _score(value: float | None) -> str:
    return percent(None if value is None else value / 100)


def print_results(results: Results, checkpoint: Path, config: RunConfig) -> None:
    """On stdout."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else FILE_WIDTH
    actions, episodes, seed = config.evaluator.actions, config.evaluator.episodes, config.seed
    sys.stdout.write(
        f"{checkpoint}: {results.steps:,} steps, {episodes:,} episodes of each task, {actions} actions, "
        f"seed {seed}\n\n{table(results, width)}\n\n"
    )


class LiveScoreboard:
    """Bars: one of all episodes, and one of each task that is being played."""

    def __init__(self, names: list[str], num_episodes: int, console: Console) -> None:
        self._num_episodes = num_episodes
        self._returns: dict[str, list[float]] = {}
        self._rows: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[mean]:>9}", style="bold"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._all: TaskID | None = None
        if len(names) > 1:
            self._all = self._progress.add_task(
                f"{len(names)} tasks", total=len(names) * num_episodes, mean=""
            )

    def began(self, name: str) -> None:
        """A new bar."""
        self._returns[name] = []
        self._rows[name] = self._progress.add_task(name, total=self._num_episodes, mean="")

    def episode(self, name: str, episode: Episode) -> None:
        """Beside the bar stands the mean so far."""
        returns = self._returns[name]
        returns.append(episode.episode_return)
        self._progress.update(self._rows[name], advance=1, mean=figure(sum(returns) / len(returns)))
        if self._all is not None:
            self._progress.advance(self._all)

    def tick(self) -> None:
        """Bars draw themselves."""

    def finished(self, result: TaskResult) -> None:
        """Its bar goes."""
        self._progress.remove_task(self._rows.pop(result.name))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class PlainScoreboard:
    """A line for every task, and one now and then in between."""

    def __init__(
        self,
        names: list[str],
        num_episodes: int,
        log: EventLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_tasks = len(names)
        self._all = len(names) * num_episodes
        self._log = log
        self._clock = clock
        self._began_s = self._told_s = clock()
        self._finished = 0
        self._played = 0

    def began(self, name: str) -> None:
        """Nothing to say."""

    def episode(self, name: str, episode: Episode) -> None:  # noqa: ARG002
        """One more."""
        self._played += 1

    def tick(self) -> None:
        """How far it is, if that was not told for a while."""
        now_s = self._clock()
        if now_s - self._told_s >= LINE_INTERVAL_S and self._played < self._all:
            self._told_s = now_s
            seconds = round(now_s - self._began_s)
            self._log.info("playing", episodes=self._played, of=self._all, seconds=seconds)

    def finished(self, result: TaskResult) -> None:
        """Its mean."""
        self._finished += 1
        self._told_s = self._clock()
        self._log.info(
            "played",
            task=result.name,
            episodes=len(result.episodes),
            mean_return=result.mean,
            tasks=f"{self._finished}/{self._num_tasks}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to leave behind."""


def make_scoreboard(names: list[str], num_episodes: int) -> LiveScoreboard | PlainScoreboard:
    """Bars where there is a terminal that can draw them, log lines elsewhere."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return LiveScoreboard(names, num_episodes, Console(stderr=True))
    logging.setup("evaluate")
    return PlainScoreboard(names, num_episodes, logging.get_logger("evaluate"))
