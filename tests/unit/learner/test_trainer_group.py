"""Several learners are as one: the same weights in all, and the updates of one that has all rollouts."""

from __future__ import annotations

import copy
import threading
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from services.learner.batch import Batch
from services.learner.group import Group, PeerLostError
from services.learner.trainer import Trainer
from tests.unit.learner.test_trainer import make_batch, poisoned, run_config, weights
from tests.unit.learner.test_trainer import make_trainer as make_plain
from tests.unit.learner.together import together
from tests.unit.learner.variants import Variant

SINGLE_THREADED = threading.Lock()
"""Networks draw their first weights from a generator that the whole process shares."""


def make_trainer(variant: Variant, group: Group) -> Trainer:
    with SINGLE_THREADED:
        trainer = variant.make_trainer()
    trainer.group = group
    return trainer


def unclipped(name: str) -> Variant:
    """Clipping would hide the scale."""
    variant = Variant(name)
    optimiser = variant.config.optimiser.model_copy(update={"max_grad_norm": 1e9})
    variant.config = variant.config.model_copy(update={"optimiser": optimiser})
    return variant


def shuffled(batch: Batch, seed: int) -> Batch:
    """The same kind of noise, but other noise."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(batch.tasks), generator=generator)
    tensors: dict[str, Any] = {name: tensor[order] for name, tensor in batch.tensors().items()}
    reward = torch.randn(batch.reward.shape, generator=generator) * 3
    tasks = tuple(tensors["task"].tolist())
    return replace(batch, **tensors | {"reward": reward}, tasks=tasks)


def joined(batches: list[Batch]) -> Batch:
    """All rollouts in one batch."""
    first = batches[0]
    tensors: dict[str, Any] = {
        name: torch.cat([batch.tensors()[name] for batch in batches]) for name in first.tensors()
    }
    return replace(
        first,
        **tensors,
        tasks=tuple(task for batch in batches for task in batch.tasks),
        policy_versions=tuple(v for batch in batches for v in batch.policy_versions),
        num_fresh=sum(batch.num_fresh for batch in batches),
        cuts=tuple(sorted({cut for batch in batches for cut in batch.cuts})),
    )


def gradients(trainer: Trainer) -> list[Tensor]:
    return [
        parameter.grad.clone() for parameter in trainer.network.parameters() if parameter.grad is not None
    ]


def state(trainer: Trainer) -> list[Tensor]:
    """Weights, statistics and the optimiser's averages."""
    tensors = list(trainer.network.state_dict().values())
    for averages in trainer.optimiser.state_dict()["state"].values():
        tensors += [value for value in averages.values() if isinstance(value, Tensor)]
    return [tensor.clone() for tensor in tensors]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("num_learners", [2, 3])
def test_after_1000_updates_all_learners_hold_the_same_bits(num_learners: int) -> None:
    variant = Variant("mlp")
    batches = [[shuffled(variant.make_batch(), 10 * rank + n) for n in range(10)] for rank in range(3)]

    def work(group: Group) -> tuple[list[Tensor], int, int, int]:
        trainer = make_trainer(variant, group)
        for update in range(1000):
            trainer.update(batches[group.rank][update % 10])
        return state(trainer), trainer.version, trainer.steps, trainer.checksum()

    results = together(num_learners, work)
    for tensors, version, steps, checksum in results:
        assert equal(tensors, results[0][0])
        assert (version, steps, checksum) == (1000, 1000 * num_learners * 24, results[0][3])


@pytest.mark.parametrize("name", ["popart-tasks", "lstm", "adam", "rmsprop-momentum", "replay", "deep"])
def test_every_kind_of_update_leaves_the_same_bits_in_all_learners(name: str) -> None:
    variant = Variant(name)

    def work(group: Group) -> list[Tensor]:
        trainer = make_trainer(variant, group)
        for update in range(5):
            trainer.update(shuffled(variant.make_batch(), 10 * group.rank + update))
        return state(trainer)

    results = together(2, work)
    assert equal(*results)


@pytest.mark.parametrize("num_learners", [2, 3])
@pytest.mark.parametrize("name", ["mean", "popart-tasks", "mlp", "lstm"])
def test_the_gradient_is_that_of_one_learner_with_all_the_rollouts(name: str, num_learners: int) -> None:
    # A sum over N learners' rollouts is N times the average of their sums, and that average is the update.
    variant = unclipped(name)
    batches = [shuffled(variant.make_batch(), rank) for rank in range(num_learners)]
    one = make_trainer(variant, Group())
    one.update(joined(batches))
    times = 1 if variant.config.loss.reduction == "mean" else num_learners
    expected = [gradient / times for gradient in gradients(one)]

    def work(group: Group) -> list[Tensor]:
        trainer = make_trainer(variant, group)
        trainer.update(batches[group.rank])
        assert trainer.steps == one.steps
        torch.testing.assert_close(trainer.network.baseline.mean_K, one.network.baseline.mean_K)
        return gradients(trainer)

    for got in together(num_learners, work):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_learners_with_fewer_steps_that_count_weigh_less_in_a_mean() -> None:
    # Else N learners would not be one: a mean of means is not the mean.
    variant = unclipped("mean")
    batches = [shuffled(variant.make_batch(), rank) for rank in range(2)]
    starts = batches[1].episode_start.clone()
    starts[:, -4:] = True  # nobody acted in these
    batches[1] = replace(batches[1], episode_start=starts)
    one = make_trainer(variant, Group())
    one.update(joined(batches))

    def work(group: Group) -> list[Tensor]:
        trainer = make_trainer(variant, group)
        trainer.update(batches[group.rank])
        return gradients(trainer)

    for got in together(2, work):
        torch.testing.assert_close(got, gradients(one), rtol=1e-4, atol=1e-7)


def test_many_updates_of_several_learners_are_those_of_one_with_all_the_rollouts() -> None:
    variant = Variant("mean")
    rounds = [[shuffled(variant.make_batch(), 10 * rank + n) for rank in range(3)] for n in range(20)]
    one = make_trainer(variant, Group())
    for batches in rounds:
        one.update(joined(batches))

    def work(group: Group) -> dict[str, Tensor]:
        trainer = make_trainer(variant, group)
        for batches in rounds:
            trainer.update(batches[group.rank])
        return weights(trainer)

    moved = max(float((now - before).detach().abs().max()) for now, before in _moved(variant, one))
    for got in together(3, work):
        for name, tensor in weights(one).items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-3 * moved)


def _moved(variant: Variant, trainer: Trainer) -> list[tuple[Tensor, Tensor]]:
    before = make_trainer(variant, Group()).network.parameters()
    return list(zip(trainer.network.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["mlp", "mean"])
def test_learners_that_come_and_go_do_not_change_the_scale_of_an_update(name: str) -> None:
    variant = unclipped(name)
    batch = variant.make_batch()
    alone = make_trainer(variant, Group())
    alone.update(batch)

    def work(group: Group) -> list[Tensor]:
        trainer = make_trainer(variant, group)
        trainer.update(batch)
        return gradients(trainer)

    for num_learners in (2, 3, 2):
        for got in together(num_learners, work):
            torch.testing.assert_close(got, gradients(alone), rtol=1e-4, atol=1e-6)


def test_a_gradient_of_one_learner_that_is_not_finite_changes_no_weight_of_any() -> None:
    def work(group: Group) -> bool:
        with SINGLE_THREADED:
            trainer = make_plain(run_config())
        trainer.group = group
        before = weights(trainer)
        batch = make_batch(seed=group.rank)
        trainer.update(poisoned(batch) if group.rank == 1 else batch)
        unchanged = all(torch.equal(before[name], now) for name, now in weights(trainer).items())
        trainer.update(batch)
        return unchanged and trainer.read_figures().nonfinite_updates == 1

    assert together(2, work) == [True, True]


@pytest.mark.parametrize("name", ["popart-tasks", "adam"])
def test_a_step_whose_group_breaks_changes_nothing_and_can_be_made_again(name: str) -> None:
    variant = Variant(name)
    batch = variant.make_batch()

    def work(group: Group) -> None:
        trainer = make_trainer(variant, group)
        trainer.update(batch)
        if group.rank == 1:
            return  # gone
        before = copy.deepcopy(trainer.state_dict())
        was = state(trainer)
        with pytest.raises(PeerLostError):
            trainer.update(batch)
        assert equal(state(trainer), was)
        assert (trainer.version, trainer.steps) == (before["version"], before["steps"])
        untouched = make_trainer(variant, Group())
        untouched.load_state_dict(before)
        trainer.group = Group()
        trainer.update(batch)
        untouched.update(batch)
        assert equal(state(trainer), state(untouched))
        assert not equal(state(trainer), was)

    together(2, work)


def test_all_fields_of_a_batch_are_joined() -> None:
    variant = Variant("lstm")
    both = joined([variant.make_batch(), variant.make_batch()])
    for field in fields(both):
        value = getattr(both, field.name)
        if isinstance(value, Tensor):
            assert len(value) == 2 * len(getattr(variant.make_batch(), field.name)), field.name
