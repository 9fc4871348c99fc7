"""The trainer with several tasks, with PopArt and with replay: what reaches which weights and statistics.

The mathematics of each is proved in tests/unit/rl; here is that the trainer gives them the right columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor

from services import config as configuration
from services.config import RunConfig
from services.learner.batch import Batch
from services.learner.checkpoint import CheckpointStore, read
from services.learner.publisher import WeightsCopier, tensors_of
from services.learner.trainer import Trainer
from services.ops.metrics import LearnerMetrics
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.networks import PolicyOutput, make_network
from services.rl.networks.recurrent import cuts_of
from services.wire.messages import Weights
from tests.unit.learner.waiting import until

T, B, A, H = 5, 4, 3, 8
NUM_TASKS = 2
STEP_SIZE = 0.25
SPEC = EnvSpec(
    id="vectors",
    observation_shape=(6,),
    observation_dtype="float32",
    frame_stack=1,
    num_actions=A,
    frame_skip=1,
)
POPART = {"popart": {"enabled": True, "step_size": STEP_SIZE}}
REPLAY = {"replay": {"ratio": 3, "trust_region": None}}
RESETS = ((0, 3), (1, 2))
"""(column, observation) that begins an episode: the transition before it was acted by nobody."""


def config(**sections: Any) -> RunConfig:
    """Targets are the rewards as they are: nothing is discounted or clipped."""
    small = {"unroll_length": T, "batch_size": B, "total_steps": 1000, "actor": {"num_envs": 2}}
    network = {"hidden_size": 16, "lstm_size": H, **sections.pop("network", {})}
    loss = {"discount": 0.0, "reward_clipping": "none"}
    return configuration.validate({**small, "network": network, "loss": loss, **sections})


def make_trainer(run: RunConfig, seed: int = 1) -> Trainer:
    torch.manual_seed(seed)
    return Trainer(
        network=make_network(SPEC, run.network, NUM_TASKS, run.popart),
        actions=Discrete(A),
        config=run,
        frame_stack=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def make_batch(
    tasks: Sequence[int] = (0,) * B, *, num_fresh: int = B, seed: int = 1, recurrent: bool = False
) -> Batch:
    """Noise in which every action was unlikely to be taken, so that all importance weights are cut to 1."""
    rng = np.random.default_rng(seed)
    starts = np.zeros((B, T + 1), np.bool_)
    for column, at in RESETS:
        starts[column, at] = True
    action = rng.integers(A, size=(B, T)).astype(np.int32)
    logits = np.zeros((B, T, A), np.float32)
    np.put_along_axis(logits, action[..., None].astype(np.int64), -4.0, axis=-1)
    arrays: dict[str, Any] = {
        "observation": rng.normal(size=(B, T + 1, 6)).astype(np.float32),
        "episode_start": starts,
        "action": action,
        "behaviour_logits": logits,
        "reward": rng.normal(5.0, 3.0, size=(B, T)).astype(np.float32),
        "terminated": np.zeros((B, T), np.bool_),
    }
    if recurrent:
        arrays["initial_state"] = rng.normal(size=(B, 2, H)).astype(np.float32)
        arrays["last_action"] = rng.integers(A, size=(B, 1)).astype(np.int32)
        arrays["last_reward"] = rng.normal(size=(B, 1)).astype(np.float32)
    return Batch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        task=torch.tensor(tasks),
        tasks=tuple(tasks),
        policy_versions=(0,) * B,
        num_fresh=num_fresh,
        cuts=cuts_of(torch.from_numpy(starts.T)) if recurrent else (),
        release=lambda: None,
    )


def acted() -> NDArray[np.bool_]:
    """[B, T]"""
    acted_BT = np.ones((B, T), np.bool_)
    for column, at in RESETS:
        acted_BT[column, at - 1] = False
    return acted_BT


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


def row(tensors: dict[str, Tensor], task: int) -> list[Tensor]:
    """All that the baseline has of one task."""
    names = ("linear.weight", "linear.bias", "mean_K", "second_moment_K")
    return [tensors[f"baseline.{name}"][task] for name in names]


def baselines(trainer: Trainer, batch: Batch) -> Tensor:
    """[T + 1, B, K], normalised."""
    outputs: list[PolicyOutput] = []
    hook = trainer.network.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    with torch.no_grad():
        trainer._loss(batch)
    hook.remove()
    return outputs[0].baselines_TBK


def values(trainer: Trainer, task: int, seed: int = 5) -> Tensor:
    """On the scale of the rewards."""
    baseline = trainer.network.baseline
    normalised = baselines(trainer, make_batch((task,) * B, seed=seed))[..., task]
    return baseline.sigmas[task].float() * normalised + baseline.mean_K[task].float()


# ------------------------------------------------------------------------------------------ several tasks


@pytest.mark.parametrize("popart", [False, True])
@pytest.mark.parametrize("task", [0, 1])
def test_experience_of_one_task_has_no_gradient_for_the_baseline_of_another(task: int, popart: bool) -> None:
    trainer = make_trainer(config(**POPART if popart else {}))
    trainer._loss(make_batch((task,) * B)).total.backward()
    linear = trainer.network.baseline.linear
    assert linear.weight.grad is not None and linear.bias.grad is not None
    assert linear.weight.grad[task].abs().min() > 0
    assert linear.bias.grad[task] != 0
    assert not linear.weight.grad[1 - task].any()
    assert not linear.bias.grad[1 - task]


def test_columns_may_stand_in_any_order_as_long_as_each_keeps_its_task() -> None:
    run = config(**POPART)
    trainer = make_trainer(run)
    for seed in range(5):  # until the tasks are unlike each other
        trainer.update(make_batch((0, 1, 1, 1), seed=seed))
    batch = make_batch((0, 1, 0, 1))
    order = torch.tensor([3, 0, 2, 1])
    columns: dict[str, Any] = {name: tensor[order] for name, tensor in batch.tensors().items()}
    shuffled = replace(batch, **columns, tasks=tuple(batch.tasks[i] for i in order.tolist()))
    loss, same, other = (
        trainer._loss(each).total.item()
        for each in (batch, shuffled, replace(batch, task=1 - batch.task, tasks=(1, 0, 1, 0)))
    )
    assert same == pytest.approx(loss, rel=1e-5)
    assert other != pytest.approx(loss, rel=1e-2)


def test_steps_are_counted_for_the_task_of_each_column() -> None:
    trainer = make_trainer(config())
    trainer.update(make_batch((0, 1, 1, 1)))
    trainer.update(make_batch((1, 1, 0, 1)))
    assert trainer.read_figures().task_steps == (2 * T, 6 * T)
    figures = trainer.read_figures()
    assert figures.task_steps == (0, 0), "since the last report"
    assert figures.total_task_steps == (2 * T, 6 * T)


def test_steps_of_each_task_travel_with_the_state_that_another_learner_takes_over() -> None:
    holder, joiner = make_trainer(config()), make_trainer(config())
    for trainer, tasks in ((holder, (0, 1, 1, 1)), (joiner, (0, 0, 0, 0)), (joiner, (0, 0, 0, 0))):
        trainer.update(make_batch(tasks))
    joiner.load_state_dict(holder.state_dict())
    joiner.update(make_batch((0, 0, 1, 1)))
    figures = joiner.read_figures()
    assert figures.total_task_steps == (3 * T, 5 * T)
    assert joiner.steps == 8 * T
    assert holder.read_figures().total_task_steps == (T, 3 * T), "the state is a copy"


@pytest.mark.parametrize(("steps", "wanted"), [(0, (0, 0)), (48, (24, 24)), (53, (27, 26))])
def test_steps_of_which_only_the_number_is_known_are_spread_over_the_tasks(
    steps: int, wanted: tuple[int, int]
) -> None:
    trainer = make_trainer(config())
    trainer.load(trainer.network.state_dict(), version=9, steps=steps)
    assert (trainer.version, trainer.steps) == (9, steps)
    assert trainer.read_figures().total_task_steps == wanted
    trainer.update(make_batch((1, 1, 1, 1)))
    trainer.load(trainer.network.state_dict(), version=11, steps=steps + 6 * T)
    assert trainer.read_figures().total_task_steps == (wanted[0] + T, wanted[1] + 5 * T)


def test_a_state_without_steps_of_tasks_has_them_spread() -> None:
    state = make_trainer(config()).state_dict() | {"steps": 7}
    del state["task_steps"]
    trainer = make_trainer(config())
    trainer.load_state_dict(state)
    assert trainer.read_figures().total_task_steps == (4, 3)


def test_a_state_of_another_number_of_tasks_is_refused() -> None:
    state = make_trainer(config()).state_dict() | {"task_steps": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match="3 tasks, this run 2"):
        make_trainer(config()).load_state_dict(state)


# -------------------------------------------------------------------------------------------------- PopArt


@pytest.mark.parametrize("tasks", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0), (1, 0, 0, 0)])
def test_an_update_moves_the_statistics_of_each_task_towards_its_own_targets(tasks: Sequence[int]) -> None:
    trainer = make_trainer(config(**POPART))
    before = state(trainer)
    batch = make_batch(tasks)
    trainer.update(batch)
    figures, after = trainer.read_figures(), state(trainer)
    reward_BT, counts_BT = batch.reward.numpy().astype(np.float64), acted()
    for task in range(NUM_TASKS):
        columns = [column for column in range(B) if tasks[column] == task]
        if not columns:
            for mine, old in zip(row(after, task), row(before, task), strict=True):
                assert mine.equal(old), "an absent task keeps everything"
            assert (figures.popart_mean[task], figures.popart_sigma[task]) == (0.0, 1.0)
            continue
        targets = reward_BT[columns][counts_BT[columns]]
        mean = STEP_SIZE * targets.mean()
        second_moment = (1 - STEP_SIZE) + STEP_SIZE * (targets**2).mean()
        assert figures.popart_mean[task] == pytest.approx(mean, rel=1e-5)
        assert figures.popart_sigma[task] == pytest.approx(math.sqrt(second_moment - mean**2), rel=1e-5)
        assert not row(after, task)[0].equal(row(before, task)[0])


def test_each_column_is_normalised_by_the_scale_of_its_own_task() -> None:
    trainer, tasks = make_trainer(config(**POPART)), (0, 1, 1, 0)
    for seed in range(5):  # only one of the tasks leaves where it began
        trainer.update(make_batch((1,) * B, seed=seed))
    batch = make_batch(tasks)
    baseline = trainer.network.baseline
    mean, sigma = baseline.mean_K.tolist(), baseline.sigmas.tolist()
    normalised = baselines(trainer, batch).numpy()
    wanted = 0.0
    for column, at in zip(*np.nonzero(acted()), strict=True):
        task = tasks[column]
        target = (batch.reward[column, at].item() - mean[task]) / sigma[task]
        wanted += 0.5 * 0.5 * (target - normalised[at, column, task]) ** 2
    assert trainer._loss(batch).baseline.item() == pytest.approx(wanted, rel=1e-4)


def test_without_popart_the_statistics_stay_where_they_are() -> None:
    trainer = make_trainer(config())
    trainer.update(make_batch((0, 1, 0, 1)))
    figures = trainer.read_figures()
    assert (figures.popart_mean, figures.popart_sigma) == ((), ())
    baseline = trainer.network.baseline
    assert (baseline.mean_K.tolist(), baseline.sigmas.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def test_values_move_with_the_optimiser_and_not_with_the_statistics() -> None:
    """With a learning rate of zero nothing is learnt, however far the statistics move."""
    trainer = make_trainer(config(**POPART))
    trainer.load(trainer.network.state_dict(), version=0, steps=1000)  # all of them
    assert trainer.learning_rate == 0.0
    before = [values(trainer, task) for task in range(NUM_TASKS)]
    for seed in range(20):
        trainer.update(make_batch((0, 1, 1, 1), seed=seed))
    assert min(trainer.read_figures().popart_mean) > 3.0
    for task in range(NUM_TASKS):
        torch.testing.assert_close(values(trainer, task), before[task], rtol=1e-4, atol=1e-4)


def test_the_statistics_are_in_the_checkpoint_to_the_last_bit(tmp_path: Path) -> None:
    run = config(**POPART)
    uninterrupted = make_trainer(run)
    for seed in range(4):
        uninterrupted.update(make_batch((0, 1, 1, seed % 2), seed=seed))
    store = CheckpointStore(tmp_path, 1, LearnerMetrics(CollectorRegistry()), "learner-0")
    store.save(trainer=uninterrupted.state_dict(), episodes={"mean_return": None}, config={}, complete=False)
    until(lambda: store.saved_steps == uninterrupted.steps)
    (path,) = tmp_path.glob("step-*.pt")
    resumed = make_trainer(run, seed=77)
    resumed.load_state_dict(read(path).trainer)  # read with weights_only=True
    statistics = resumed.network.baseline.mean_K
    assert statistics.dtype == torch.float64
    assert statistics.unique().numel() == NUM_TASKS and (statistics > 0).all()
    for trainer in (uninterrupted, resumed):
        for seed in range(4, 7):
            trainer.update(make_batch((1, 0, 1, 0), seed=seed))
    after, wanted = state(resumed), state(uninterrupted)
    assert after.keys() == wanted.keys()
    assert all(after[name].equal(wanted[name]) for name in wanted)


def published(trainer: Trainer) -> Weights:
    """What the parameter server holds of it."""
    copier = WeightsCopier(trainer.network)
    copier.start()
    return Weights(
        run_id="run",
        server_incarnation=1,
        state="training",
        version=trainer.version,
        steps=trainer.steps,
        seats=(),
        payload=copier.finish(),
    )


def test_published_weights_bring_the_scale_that_their_baselines_are_on() -> None:
    run = config(**POPART)
    ahead, behind = make_trainer(run), make_trainer(run)
    for seed in range(10):
        ahead.update(make_batch((0, 1, 1, 1), seed=seed))
    tensors = tensors_of(published(ahead))
    behind.load(tensors, version=3, steps=0)
    for task in range(NUM_TASKS):
        assert values(behind, task).equal(values(ahead, task))
    # A head without its scale would be worth something else.
    own = make_trainer(run).network.state_dict()
    scaled = tensors | {name: tensor for name, tensor in own.items() if name.endswith("_K")}
    behind.load(scaled, version=3, steps=0)
    for task in range(NUM_TASKS):
        assert (values(behind, task) - values(ahead, task)).abs().min() > 1.0


# -------------------------------------------------------------------------------------------------- replay


def test_fresh_rollouts_alone_advance_the_run_and_its_schedule() -> None:
    trainer = make_trainer(config(**REPLAY))
    rates = []
    for num_fresh in (B, 1, 1):  # first there is nothing to replay
        trainer.update(make_batch((0, 1, 1, 1), num_fresh=num_fresh))
        rates.append(trainer.optimiser.param_groups[0]["lr"])
    assert trainer.steps == (B + 1 + 1) * T
    assert trainer.version == 3
    assert rates == pytest.approx([6e-4, 6e-4 * (1 - 20 / 1000), 6e-4 * (1 - 25 / 1000)], rel=1e-12)
    assert trainer.read_figures().task_steps == (3 * T, 3 * T)


def test_a_run_ends_at_its_fresh_steps_and_its_rates_are_numbers_all_the_way() -> None:
    trainer = make_trainer(config(**REPLAY, total_steps=4 * T))
    trainer.update(make_batch(num_fresh=1))
    while not trainer.complete:
        assert 0.0 < trainer.learning_rate < 6e-4
        trainer.update(make_batch(num_fresh=1))
    assert trainer.version == 4
    assert trainer.learning_rate == 0.0


@pytest.mark.parametrize(("num_fresh", "num_steps"), [(1, 4), (2, 8), (B, 18)])
def test_only_fresh_rollouts_are_paid_for_entropy_and_all_are_measured(
    num_fresh: int, num_steps: int
) -> None:
    """The first policy is all but uniform: log 3 at each step, of which 4, 4, 5 and 5 were acted."""
    trainer = make_trainer(config(**REPLAY))
    trainer.update(make_batch(num_fresh=num_fresh))
    figures = trainer.read_figures()
    assert figures.loss_entropy == pytest.approx(-0.01 * num_steps * math.log(3), rel=1e-3)
    assert figures.entropy == pytest.approx(math.log(3), rel=1e-3)


def far_away(batch: Batch, columns: Sequence[int]) -> Batch:
    """There the behaviour was certain of an action that today's policy takes once in three times."""
    logits = torch.zeros_like(batch.behaviour_logits)
    logits[list(columns), :, 1] = 20.0
    return replace(batch, behaviour_logits=logits)


def test_the_share_of_steps_outside_of_the_trust_region_is_among_the_figures() -> None:
    trainer = make_trainer(config(replay={"ratio": 3, "trust_region": 1.0}))
    trainer.update(far_away(make_batch(num_fresh=1), columns=(0, 3)))
    trainer.update(far_away(make_batch(num_fresh=1), columns=()))
    assert trainer.read_figures().replay_rejected_ratio == pytest.approx((9 / 18 + 0) / 2)


@pytest.mark.parametrize("replay", [{"ratio": 0, "trust_region": 1.0}, {"ratio": 3, "trust_region": None}])
def test_without_a_trust_region_nothing_is_rejected_and_there_is_no_share(replay: dict[str, Any]) -> None:
    trainer = make_trainer(config(replay=replay))
    batch = far_away(make_batch(num_fresh=1 if replay["ratio"] else B), columns=(0, 3))
    assert trainer._loss(batch).counts_TB.T.bool().tolist() == acted().tolist()
    trainer.update(batch)
    assert math.isnan(trainer.read_figures().replay_rejected_ratio)


RECURRENT = {"network": {"lstm": True}}


@pytest.mark.parametrize("burn_in", [1, 2, 4])
@pytest.mark.parametrize("num_fresh", [1, 2])
def test_the_burn_in_of_replayed_columns_is_masked_and_nothing_else(burn_in: int, num_fresh: int) -> None:
    replay = {"ratio": 3, "trust_region": None, "recurrent_state": "recomputed", "burn_in": burn_in}
    trainer = make_trainer(config(**RECURRENT, replay=replay))
    counts = trainer._loss(make_batch(num_fresh=num_fresh, recurrent=True)).counts_TB.T.bool().numpy()
    wanted = acted()
    wanted[num_fresh:, :burn_in] = False
    assert counts.tolist() == wanted.tolist()


def test_a_batch_of_fresh_rollouts_has_no_burn_in() -> None:
    replay = {"ratio": 3, "trust_region": None, "recurrent_state": "recomputed", "burn_in": 2}
    trainer = make_trainer(config(**RECURRENT, replay=replay))
    counts = trainer._loss(make_batch(num_fresh=B, recurrent=True)).counts_TB
    assert counts.T.bool().tolist() == acted().tolist()


def test_a_stored_state_needs_no_burn_in() -> None:
    trainer = make_trainer(config(**RECURRENT, **REPLAY))
    counts = trainer._loss(make_batch(num_fresh=1, recurrent=True)).counts_TB
    assert counts.T.bool().tolist() == acted().tolist()


def test_an_update_of_everything_at_once_only_reads_its_batch() -> None:
    """Its memory is the batcher's."""
    replay = {"ratio": 3, "recurrent_state": "recomputed", "burn_in": 2}
    trainer = make_trainer(config(**RECURRENT, **POPART, replay=replay))
    batch, untouched = (make_batch((0, 1, 1, 0), num_fresh=1, recurrent=True) for _ in range(2))
    trainer.update(batch)
    for name, tensor in untouched.tensors().items():
        assert batch.tensors()[name].equal(tensor), name
    assert trainer.read_figures().nonfinite_updates == 0
