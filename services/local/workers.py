"""Tasks side by side in processes of their own: the numbers of tasks -> their results.

Each worker has one pipe to the command and gets its next task when it has finished one; a worker that dies
ends its pipe, and with it the evaluation. Workers are spawned, never forked, because torch has threads.
Ctrl-C and SIGHUP, which a terminal sends to all, are blocked in them: the command stops them, and they notice
its end.
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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol

import torch

from services.config import ConfigError, RunConfig
from services.evaluator.games import Games
from services.evaluator.results import TaskResult
from services.ops.lifecycle import Lifecycle
from services.rl.policy import decode_weights
from services.wire.messages import Episode

POLL_S = 1.0
END_S = 5.0
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)


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

    def tick(self) -> None:
        """Time goes by, whether or not anything has ended: called about once a second or more often."""

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
            on_step=scoreboard.tick,
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

    def death(worker: SpawnProcess, number: int) -> WorkerError:
        worker.join(END_S)
        name, code = games.tasks[number].name, worker.exitcode
        return WorkerError(f"the process that played {name} has died (exit code {code})")

    def deal(pipe: Connection, worker: SpawnProcess) -> None:
        if not left:
            playing.pop(pipe, None)
            pipe.close()
            return
        playing[pipe] = left.popleft()
        try:
            pipe.send(playing[pipe])
        except OSError:
            raise death(worker, playing[pipe]) from None
        scoreboard.began(games.tasks[playing[pipe]].name)

    with _workers(job, num_workers) as workers:
        for pipe, worker in workers.items():
            deal(pipe, worker)
        while playing:
            ready = wait(list(playing), POLL_S)
            scoreboard.tick()
            for pipe in [each for each in playing if each in ready]:
                try:
                    said = pipe.recv()
                except (EOFError, OSError):
                    raise death(workers[pipe], playing[pipe]) from None
                match said:
                    case Episode():
                        scoreboard.episode(games.tasks[playing[pipe]].name, said)
                    case TaskResult():
                        scoreboard.finished(said)
                        results[playing[pipe]] = said
                        deal(pipe, workers[pipe])
                    case _:
                        raise ConfigError(said)
    return tuple(results[number] for number in numbers)


@contextlib.contextmanager
def _workers(job: Job, count: int) -> Iterator[dict[Connection, SpawnProcess]]:
    """Started, and gone in the end, whatever happens."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    try:
        resource_tracker.ensure_running()  # now, because its start unblocks what is blocked
        signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)  # which a process inherits
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                worker = context.Process(target=_work, args=(theirs, job))
                worker.start()
                theirs.close()
                workers[ours] = worker
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINAL_SIGNALS)
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

    def tell(said: Episode | TaskResult | str) -> None:
        try:
            pipe.send(said)
        except OSError:
            lifecycle.stop("the command is gone")

    while not lifecycle.stopping.is_set():
        try:
            number = pipe.recv()
        except (EOFError, OSError):  # the command wants nothing more, or is gone
            return
        try:
            result = games.play(number, job.version, weights, stopping=lifecycle.stopping, on_episode=tell)
        except ConfigError as error:
            tell(str(error))
            return
        if result is not None:
            tell(result)
