"""Tasks side by side in processes of their own: the numbers of tasks -> their results.

Each worker has one pipe to the command and gets its next task when it has finished one; a worker that dies
ends its pipe, and with it the evaluation. Workers are spawned, never forked, because torch has threads.
Ctrl-C, which a terminal sends to all, is blocked in them: the command stops them, and they notice its end.
The seeds of a task do not depend on who plays it, nor on what is played beside it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol

import torch

from services.config import RunConfig
from services.evaluator.games import Games
from services.evaluator.results import TaskResult
from services.ops.lifecycle import Lifecycle
from services.rl.policy import decode_weights
from services.wire.messages import Episode

POLL_S = 1.0
END_S = 5.0


class WorkerError(Exception):
    """A worker has died; its own words stand on stderr."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is played, with which weights."""

    config: RunConfig
    version: int
    weights: Path
    """A file of safetensors: the command would wait until a new process has read what it is given itself."""


class Scoreboard(Protocol):
    """Hears how it goes."""

    def began(self, name: str) -> None:
        """A task is being played."""

    def episode(self, name: str, episode: Episode) -> None:
        """One of its episodes has ended."""

    def finished(self, result: TaskResult) -> None:
        """All of them have."""


def play_all(
    job: Job, games: Games, numbers: Sequence[int], num_workers: int, scoreboard: Scoreboard
) -> tuple[TaskResult, ...]:
    """The results of the tasks ``numbers``, in their order. ``games`` are those of ``job``."""
    if num_workers > 1:
        return _side_by_side(job, games, numbers, num_workers, scoreboard)
    torch.set_num_threads(job.config.actor.inference_threads)
    weights = decode_weights(games.network, job.weights.read_bytes())
    results = []
    for number in numbers:
        name = games.tasks[number].name
        scoreboard.began(name)
        result = games.play(
            number,
            job.version,
            weights,
            stopping=threading.Event(),
            on_episode=partial(scoreboard.episode, name),
        )
        assert result is not None, "nobody stops it"
        scoreboard.finished(result)
        results.append(result)
    return tuple(results)


def _side_by_side(
    job: Job, games: Games, numbers: Sequence[int], num_workers: int, scoreboard: Scoreboard
) -> tuple[TaskResult, ...]:
    results: dict[int, TaskResult] = {}
    left = deque(numbers)
    playing: dict[Connection, int] = {}

    def deal(pipe: Connection) -> None:
        if left:
            playing[pipe] = left.popleft()
            pipe.send(playing[pipe])
            scoreboard.began(games.tasks[playing[pipe]].name)
        else:
            del playing[pipe]
            pipe.close()

    with _workers(job, num_workers) as workers:
        for pipe in workers:
            deal(pipe)
        while playing:
            ready = wait(list(playing), POLL_S)
            for pipe in [each for each in playing if each in ready]:
                name = games.tasks[playing[pipe]].name
                try:
                    said = pipe.recv()
                except (EOFError, OSError):
                    workers[pipe].join(END_S)
                    code = workers[pipe].exitcode
                    raise WorkerError(f"the process that played {name} has died (exit code {code})") from None
                match said:
                    case Episode():
                        scoreboard.episode(name, said)
                    case TaskResult():
                        scoreboard.finished(said)
                        results[playing[pipe]] = said
                        deal(pipe)
                    case _:
                        raise ValueError(said)
    return tuple(results[number] for number in numbers)


@contextlib.contextmanager
def _workers(job: Job, count: int) -> Iterator[dict[Connection, SpawnProcess]]:
    """Started, and gone in the end, whatever happens."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which a process inherits
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                worker = context.Process(target=_work, args=(theirs, job))
                worker.start()
                theirs.close()
                workers[ours] = worker
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        yield workers
    finally:
        for pipe, worker in workers.items():
            pipe.close()
            worker.terminate()
        for worker in workers.values():
            worker.join(END_S)
            worker.kill()
            worker.join()


def _work(pipe: Connection, job: Job) -> None:
    """A worker's life."""
    lifecycle = Lifecycle()
    lifecycle.install_signals()
    command = multiprocessing.parent_process()
    assert command is not None and command.pid is not None
    lifecycle.watch_parent(command.pid)
    torch.set_num_threads(job.config.actor.inference_threads)
    games = Games(job.config)
    weights = decode_weights(games.network, job.weights.read_bytes())
    with contextlib.suppress(EOFError, OSError):  # the command wants nothing more, or is gone
        while not lifecycle.stopping.is_set():
            try:
                result = games.play(
                    pipe.recv(), job.version, weights, stopping=lifecycle.stopping, on_episode=pipe.send
                )
            except ValueError as error:  # for the user to mend
                pipe.send(str(error))
                return
            if result is not None:
                pipe.send(result)
