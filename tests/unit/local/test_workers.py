"""A worker that dies between two tasks; what happens while one plays stands in ``test_evaluate``."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import safetensors.torch

from services import config as configuration
from services.evaluator.games import Games
from services.evaluator.results import TaskResult
from services.local.workers import Job, WorkerError, play_all
from services.wire.messages import Episode
from tests.unit.evaluator import homemade

HOMEMADE = homemade.__name__
TASKS = [{"id": f"{HOMEMADE}:diary", "name": name} for name in ("one", "two", "three")]


class Killer:
    """Hears how it goes, and kills all workers when a task is over."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def began(self, name: str) -> None:
        self.begun.append(name)

    def episode(self, name: str, episode: Episode) -> None:
        pass

    def tick(self) -> None:
        pass

    def finished(self, result: TaskResult) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()


def test_a_worker_that_is_dead_when_it_is_given_a_task_ends_the_evaluation(tmp_path: Path) -> None:
    """And not as a closed pipe, which the command takes for a reader that has seen enough."""
    config = configuration.load(
        flags=["--tasks", json.dumps(TASKS), "--network", f"{HOMEMADE}:constant", "--evaluator.episodes", "2"]
    )
    games = Games(config)
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(games.network.state_dict(), weights)
    job = Job(config=config, version=1, weights=weights)
    killer = Killer()
    with pytest.raises(WorkerError, match=r"^the process that played three has died \(exit code -9\)$"):
        play_all(job, games, [0, 1, 2], 2, killer)
    assert killer.begun == ["one", "two"]
    assert multiprocessing.active_children() == []
