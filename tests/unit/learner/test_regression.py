"""One full update of each variant under a fixed seed, so that no change of the loss goes unnoticed.

The figures prove nothing by themselves (tests/unit/rl does that): they are what the code gave when it was
proved. Whoever changes them on purpose prints new ones with ``python -m tests.unit.learner.test_regression``
and says in the commit why they moved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from services import config as configuration
from services.config import RunConfig
from services.learner.batch import Batch
from services.learner.group import Group
from services.learner.trainer import Trainer
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.envs.instructions import INSTRUCTION_LENGTH
from services.rl.networks import make_network
from services.rl.networks.recurrent import cuts_of

T, B = 6, 4
ACTIONS = 5
NUM_TASKS = 3
ALL = ["--unroll_length", str(T), "--batch_size", str(B), "--total_steps", "1000"]
VARIANTS = {
    "shallow": [],
    "nature": ["--network", "nature"],
    "deep": ["--network", "deep"],
    "lstm": ["--lstm", "--network.lstm_size", "32"],
    "deep-lstm-instructions": ["--network", "deep", "--lstm", "--network.lstm_size", "32"],
    "mean": ["--loss.reduction", "mean"],
    "unlike-bars": ["--loss.rho_bar", "3", "--loss.c_bar", "2", "--loss.pg_rho_bar", "1.5"],
    "lambda": ["--loss.trace_lambda", "0.9", "--loss.reward_clipping", "soft_asymmetric"],
    "rmsprop-tf": ["--optimiser.name", "rmsprop_tf"],
    "adam": ["--optimiser.name", "adam"],
    "popart": ["--popart", "--popart.step_size", "0.1", "--loss.reward_clipping", "none"],
    "replay": ["--replay.ratio", "3", "--replay.trust_region", "0.05"],
    "replay-recomputed": [
        *("--replay.ratio", "3", "--lstm", "--network.lstm_size", "32"),
        *("--replay.recurrent_state", "recomputed", "--replay.burn_in", "2"),
    ],
}

# loss_total, loss_policy, loss_baseline, loss_entropy, grad_norm, how far the weights have moved
FIGURES: dict[str, tuple[float, ...]] = {
    "shallow": (12.08122, 3.28382, 9.123694, -0.326294, 48.41159, 132.0761),
    "nature": (12.15577, 4.483041, 7.991051, -0.3183271, 53.72006, 195.5658),
    "deep": (19.40586, 5.157238, 14.42361, -0.1749869, 512.1481, 365.5409),
    "lstm": (16.90838, 9.292386, 7.961822, -0.3458257, 18.4884, 117.2797),
    "deep-lstm-instructions": (13.8684, 6.426095, 7.765674, -0.3233664, 55.83916, 390.1859),
    "mean": (0.6634703, 0.342659, 0.3367051, -0.0158938, 1.453162, 16.10915),
    "unlike-bars": (204.8567, 40.31343, 164.8808, -0.3375324, 143.0876, 135.4773),
    "lambda": (92.75961, 52.59925, 40.49717, -0.3368102, 140.7293, 132.4425),
    "rmsprop-tf": (14.84633, 7.839602, 7.357553, -0.350821, 31.02829, 4.063139),
    "adam": (14.73095, 7.716818, 7.364104, -0.3499756, 31.9054, 69.21016),
    "popart": (81.72247, 20.31412, 61.75364, -0.3452827, 123.5915, 152.919),
    "replay": (0.9385833, -0.1383018, 1.154578, -0.07769245, 21.04757, 71.71378),
    "replay-recomputed": (19.42393, 12.25035, 7.252434, -0.07885017, 17.38841, 112.773),
}


def spec_of(config: RunConfig, instructions: bool) -> EnvSpec:
    return EnvSpec(
        id="images",
        observation_shape=(36, 36),
        observation_dtype="uint8",
        frame_stack=4,
        num_actions=ACTIONS,
        frame_skip=4,
        instruction_length=INSTRUCTION_LENGTH if instructions else 0,
    )


def make_batch(config: RunConfig, spec: EnvSpec) -> Batch:
    """Noise with every kind of end in it. All variants get the same, as far as they look at it."""
    rng = np.random.default_rng(7)
    frames = spec.frame_stack - 1 + T + 1
    starts, terminated = np.zeros((B, frames), np.bool_), np.zeros((B, T), np.bool_)
    starts[0, 3 + 3] = starts[1, 3 + 2] = starts[3, 3] = True
    terminated[1, 0] = terminated[2, 3] = True
    arrays: dict[str, Any] = {
        "observation": rng.integers(256, size=(B, frames, 36, 36)).astype(np.uint8),
        "episode_start": starts,
        "action": rng.integers(ACTIONS, size=(B, T)).astype(np.int32),
        "behaviour_logits": rng.normal(size=(B, T, ACTIONS)).astype(np.float32),
        "reward": (3 * rng.normal(size=(B, T))).astype(np.float32),
        "terminated": terminated,
    }
    if config.network.lstm:
        arrays["initial_state"] = rng.normal(size=(B, 2, config.network.lstm_size)).astype(np.float32)
        arrays["last_action"] = rng.integers(ACTIONS, size=(B, 1)).astype(np.int32)
        arrays["last_reward"] = rng.normal(size=(B, 1)).astype(np.float32)
    if spec.instruction_length:
        words = rng.integers(1000, size=(B, T + 1, spec.instruction_length))
        arrays["instruction"] = (words * (rng.random(words.shape) < 0.5)).astype(np.int32)
    tasks = (0, 2, 2, 0) if config.popart.enabled else (0,) * B
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(
        **tensors,
        task=torch.tensor(tasks),
        tasks=tasks,
        policy_versions=(0,) * B,
        num_fresh=config.fresh_per_update,
        cuts=cuts_of(tensors["episode_start"].T[spec.frame_stack - 1 :]),
        release=lambda: None,
    )


def figures_of(variant: str) -> tuple[float, ...]:
    """Two updates: the second one sees what the first did to the optimiser and the statistics."""
    config = configuration.load(flags=[*ALL, *VARIANTS[variant]])
    spec = spec_of(config, instructions="instructions" in variant)
    num_tasks = NUM_TASKS if config.popart.enabled else 1
    trainer = Trainer(
        network=make_network(spec, config.network, num_tasks, config.popart),
        actions=Discrete(ACTIONS),
        config=config,
        frame_stack=spec.frame_stack,
        device=torch.device("cpu"),
        dtype=torch.float32,
        group=Group(),
    )
    rng = np.random.default_rng(11)  # no version of torch draws other weights
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.from_numpy(scale * rng.normal(size=parameter.shape)))
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    for _ in range(2):
        trainer.update(make_batch(config, spec))
    figures = trainer.read_figures()
    after = trainer.network.state_dict()
    moved = sum((after[name] - before[name]).double().abs().sum().item() for name in before)
    return (
        figures.loss_total,
        figures.loss_policy,
        figures.loss_baseline,
        figures.loss_entropy,
        figures.grad_norm,
        moved,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_is_what_it_was(variant: str) -> None:
    assert figures_of(variant) == pytest.approx(FIGURES[variant], rel=1e-4)


def test_no_two_variants_are_the_same_update() -> None:
    """A switch that switches nothing would go unnoticed."""
    assert len({tuple(round(figure, 3) for figure in figures) for figures in FIGURES.values()}) == len(
        VARIANTS
    )


if __name__ == "__main__":
    for name in VARIANTS:
        print(f"    {name!r}: ({', '.join(f'{figure:.7g}' for figure in figures_of(name))}),")  # noqa: T201
