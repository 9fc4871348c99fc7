"""Ten updates are five, a checkpoint on the disk, a new process's trainer, and five more: to the bit.

What is compared are the checkpoints after the last update, so that whatever is ever saved is compared too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from services import config as configuration
from services.learner.batch import Batch, Batcher, message_bytes, rollout_schema
from services.learner.checkpoint import Checkpoint, CheckpointStore, read, to_host
from services.learner.intake import Freshness, RolloutQueue
from services.learner.replay import Replay
from services.learner.replay_log import ReplayLog
from services.learner.trainer import Trainer
from services.ops.metrics import LearnerMetrics, ReplayMetrics
from services.rl.actions import Discrete
from services.rl.replay import ReplayMemory
from services.wire.codec import Expected, Packer
from services.wire.messages import Rollout
from tests.unit.learner.variants import ACTIONS, ALL, LSTM, VARIANTS, B, T, Variant
from tests.unit.learner.waiting import until

OPTIMISERS = {
    "rmsprop": (),
    "rmsprop-momentum": ("--optimiser.rmsprop_momentum", "0.9"),
    "rmsprop_tf": ("--optimiser.name", "rmsprop_tf", "--optimiser.rmsprop_momentum", "0.9"),
    "adam": ("--optimiser.name", "adam"),
}
DEADLINE_S = 60.0
SEED, ANOTHER_SEED = 5, 99


def variant(name: str, *flags: str) -> Variant:
    """One of ``VARIANTS``, and more flags."""
    made = Variant(name)
    made.config = configuration.load(flags=[*ALL, *VARIANTS[name], *flags])
    return made


def batches(of: Variant, count: int) -> list[Batch]:
    """Different ones, always the same."""
    same_all = of.make_batch()
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        order = torch.from_numpy(rng.permutation(same_all.action.shape[1]))
        made.append(
            replace(
                same_all,
                action=same_all.action[:, order],
                reward=same_all.reward + torch.from_numpy(rng.normal(size=(B, T)).astype(np.float32)),
            )
        )
    return made


def begin(of: Variant, seed: int = SEED) -> Trainer:
    """A trainer in a process whose random numbers begin with ``seed``."""
    torch.manual_seed(seed)
    return of.make_trainer()


def train(trainer: Trainer, on: Sequence[Batch]) -> None:
    for batch in on:
        trainer.update(batch)
        torch.rand(3)  # as a network with random layers would


def save(trainer: Trainer, directory: Path) -> Checkpoint:
    """Written by one process, read by another."""
    writer = CheckpointStore(directory, 3, LearnerMetrics(CollectorRegistry()), "learner-0")
    assert writer.save(
        trainer=trainer.state_dict(), episodes={"mean_return": None}, config={}, complete=trainer.complete
    )
    until(lambda: not writer.busy, "it is written, and cleared up", DEADLINE_S)
    assert writer.saved_steps == trainer.steps
    reader = CheckpointStore(directory, 3, LearnerMetrics(CollectorRegistry()), "learner-0")
    checkpoint = reader.latest(lambda checkpoint: None)
    assert checkpoint is not None
    return checkpoint


def resume(of: Variant, checkpoint: Checkpoint) -> Trainer:
    """In a process where nothing is as it was: other weights, other random numbers."""
    trainer = begin(of, ANOTHER_SEED)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.fill_(0.123)
    trainer.load_state_dict(checkpoint.trainer)
    return trainer


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two states are not the same to the bit."""
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or not a.equal(b):
            yield path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            yield from differences(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}/{index}")
    elif a != b:
        yield path


def assert_same(resumed: Trainer, straight: Trainer, tmp_path: Path) -> None:
    now, wanted = save(resumed, tmp_path / "resumed").trainer, save(straight, tmp_path / "straight").trainer
    assert list(differences(dict(now), dict(wanted))) == []
    assert resumed.learning_rate == straight.learning_rate
    assert {"network", "optimiser", "version", "steps", "rng"} <= now.keys()


def resumed_in_the_middle(of: Variant, tmp_path: Path) -> tuple[Trainer, Trainer]:
    """(five updates and five more, ten updates)"""
    all_batches = batches(of, 10)
    straight = begin(of)
    train(straight, all_batches)
    first = begin(of)
    train(first, all_batches[:5])
    resumed = resume(of, save(first, tmp_path / "checkpoints"))
    assert (resumed.version, resumed.steps) == (5, first.steps)
    train(resumed, all_batches[5:])
    return resumed, straight


@pytest.mark.parametrize("name", [name for name in VARIANTS if "deep" not in name])
def test_every_kind_of_update_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    of = variant(name)
    resumed, straight = resumed_in_the_middle(of, tmp_path)
    assert_same(resumed, straight, tmp_path)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_optimiser_does_with_popart_and_a_memory(optimiser: str, tmp_path: Path) -> None:
    of = variant("popart-tasks", *LSTM, *OPTIMISERS[optimiser])
    resumed, straight = resumed_in_the_middle(of, tmp_path)
    assert_same(resumed, straight, tmp_path)
    statistics = resumed.network.baseline.mean_K
    assert statistics.dtype == torch.float64
    assert statistics[0] != 0 != statistics[2], "they have moved"
    assert resumed.optimiser.state_dict()["state"], "there is something in it"


@pytest.mark.parametrize("forgotten", ["optimiser", "rng", "task_steps"])
def test_what_is_forgotten_shows(forgotten: str, tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    of = variant("popart-tasks", *LSTM)
    all_batches = batches(of, 10)
    first = begin(of)
    train(first, all_batches[:5])
    whole, partly = save(first, tmp_path), read(save(first, tmp_path).path)
    empty = begin(of, ANOTHER_SEED).state_dict()[forgotten]
    partly = replace(partly, trainer={**partly.trainer, forgotten: empty})
    ends = []
    for each in (whole, partly):
        trainer = resume(of, each)
        train(trainer, all_batches[5:])
        ends.append(to_host(trainer.state_dict()))
    differing = {path.split("/")[1] for path in differences(*ends)}
    assert differing == {"rng"} if forgotten == "rng" else {"network", "optimiser"} <= differing


# --- with replay: what is drawn goes on too -----------------------------------------------------------


class Life:
    """Of a learner with a replay memory that is kept on disk; smaller than what it is sent."""

    CAPACITY = 6

    def __init__(self, of: Variant, trainer: Trainer, log: Path, seed: int) -> None:
        schema = rollout_schema(of.spec, Discrete(ACTIONS), T, of.config.network)
        expected = Expected(run_id="run", max_message_bytes=message_bytes(schema), schema=schema)
        registry = CollectorRegistry()
        self.trainer = trainer
        self.log = ReplayLog(log, self.CAPACITY)
        self.queue = RolloutQueue(100)
        self.stopping = threading.Event()
        self.drawn: list[int] = []
        replay = Replay(
            memory=ReplayMemory(self.CAPACITY, np.random.default_rng(seed)),
            log=self.log,
            ratio=of.config.replay.ratio,
            unroll_length=T,
            expected=expected,
            metrics=ReplayMetrics(registry),
        )
        replay.restore()
        self.batcher = Batcher(
            rollouts=self.queue,
            schema=schema,
            batch_size=B,
            pinned=False,
            freshness=Freshness(lambda: 0, lambda: 0),
            refuse=lambda error: pytest.fail(str(error)),
            metrics=LearnerMetrics(registry),
            stopping=self.stopping,
            replay=replay,
        )
        self.thread = threading.Thread(target=self.batcher.run, daemon=True)
        self.thread.start()

    def train(self, updates: int, rollouts: Iterator[Rollout]) -> None:
        """Every batch has one fresh rollout, but for the first, for which nothing is held yet."""
        for _ in range(updates):
            for _ in range(1 if self.trainer.version else B):
                assert self.queue.put(next(rollouts), DEADLINE_S)
            batch = self.batcher.next(DEADLINE_S)
            assert batch is not None
            self.drawn += batch.reward[:, 0].int().tolist()
            self.trainer.update(batch)
            batch.release()
            until(lambda: self.log._writer is None, "the log is written", DEADLINE_S)

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        assert self.log.num_lost == 0


def rollouts(of: Variant) -> Iterator[Rollout]:
    """Without end; the first reward of each says which it is."""
    packer = Packer("zstd")
    number = 0
    for batch in batches(of, 100):
        for column in range(B):
            arrays = {name: tensor[column].numpy().copy() for name, tensor in batch.tensors().items()}
            del arrays["task"]
            arrays["reward"][0] = number
            yield Rollout(
                run_id="run",
                actor_id="actor-0",
                incarnation=1,
                sequence=number,
                policy_version=0,
                task=0,
                episodes=(),
                arrays={name: packer.pack(array) for name, array in arrays.items()},
            )
            number += 1


@pytest.mark.parametrize("name", ["replay", "replay-stored"])
def test_a_learner_with_replay_draws_and_trains_on_as_if_nothing_had_happened(
    name: str, tmp_path: Path
) -> None:
    of = variant(name)
    played = rollouts(of)
    straight = Life(of, begin(of), tmp_path / "log-straight", SEED)
    straight.train(10, played)
    straight.stop()

    played = rollouts(of)
    first = Life(of, begin(of), tmp_path / "log", SEED)
    first.train(5, played)
    first.stop()
    checkpoint = save(first.trainer, tmp_path / "checkpoints")
    resumed = Life(of, resume(of, checkpoint), tmp_path / "log", ANOTHER_SEED)
    resumed.train(5, played)
    resumed.stop()
    assert first.drawn + resumed.drawn == straight.drawn
    assert max(straight.drawn) >= 2 * Life.CAPACITY, "the memory's ring is in its second round"
    assert_same(resumed.trainer, straight.trainer, tmp_path)
