"""Every kind of update that the flags can ask for, each with a trainer and a batch of noise for it.

``test_regression`` holds their figures fast, and ``test_cuda`` compares the GPU's with the CPU's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from services import config as configuration
from services.config import RunConfig
from services.learner.batch import Batch
from services.learner.trainer import Trainer
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.envs.instructions import INSTRUCTION_LENGTH
from services.rl.networks import make_network
from services.rl.networks.recurrent import cuts_of

T, B = 6, 4
ACTIONS = 5
NUM_TASKS = 3
ALL = ("--unroll_length", str(T), "--batch_size", str(B), "--total_steps", "1000")
LSTM = ("--lstm", "--network.lstm_size", "32")
VARIANTS: dict[str, tuple[str, ...]] = {
    "shallow": (),
    "nature": ("--network", "nature"),
    "deep": ("--network", "deep"),
    "mlp": ("--network", "mlp", "--network.hidden_size", "32"),
    "lstm": LSTM,
    "deep-lstm-instructions": ("--network", "deep", *LSTM),
    "mean": ("--loss.reduction", "mean"),
    "unlike-bars": ("--loss.rho_bar", "3", "--loss.c_bar", "2", "--loss.pg_rho_bar", "1.5"),
    "lambda": ("--loss.trace_lambda", "0.9", "--loss.reward_clipping", "soft_asymmetric"),
    "rmsprop-momentum": ("--optimiser.rmsprop_momentum", "0.5"),
    "rmsprop-tf": ("--optimiser.name", "rmsprop_tf"),
    "adam": ("--optimiser.name", "adam"),
    "tasks": (),
    "popart-tasks": ("--popart", "--popart.step_size", "0.1", "--loss.reward_clipping", "none"),
    "replay": ("--replay.ratio", "3", "--replay.trust_region", "0.05"),
    "replay-unbounded": ("--replay.ratio", "3", "--replay.trust_region", "null"),
    "replay-stored": ("--replay.ratio", "3", *LSTM),
    "replay-recomputed": (
        *("--replay.ratio", "3", *LSTM),
        *("--replay.recurrent_state", "recomputed", "--replay.burn_in", "2"),
    ),
}
"""Flags of `impala train`. Those called tasks have three, and those called instructions read them."""


class Variant:
    """One of them, by name."""

    def __init__(self, name: str) -> None:
        self.config: RunConfig = configuration.load(flags=[*ALL, *VARIANTS[name]])
        self.several_tasks = "tasks" in name
        vectors = "mlp" in name
        self.spec = EnvSpec(
            id="noise",
            observation_shape=(10,) if vectors else (36, 36),
            observation_dtype="float32" if vectors else "uint8",
            frame_stack=1 if vectors else 4,
            num_actions=ACTIONS,
            frame_skip=4,
            instruction_length=INSTRUCTION_LENGTH if "instructions" in name else 0,
        )

    def make_trainer(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Trainer:
        """Its first weights are those of numpy: no version of torch draws others."""
        num_tasks = NUM_TASKS if self.several_tasks else 1
        network = make_network(self.spec, self.config.network, num_tasks, self.config.popart)
        rng = np.random.default_rng(11)
        with torch.no_grad():
            for parameter in network.parameters():
                scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.from_numpy(scale * rng.normal(size=parameter.shape)))
        return Trainer(
            network=network,
            actions=Discrete(ACTIONS),
            config=self.config,
            frame_stack=self.spec.frame_stack,
            device=torch.device(device),
            dtype=dtype,
        )

    def make_batch(self) -> Batch:
        """Noise with every kind of end in it. All variants get the same, as far as they look at it."""
        rng = np.random.default_rng(7)
        history = self.spec.frame_stack - 1
        frames = history + T + 1
        starts, terminated = np.zeros((B, frames), np.bool_), np.zeros((B, T), np.bool_)
        starts[0, history + 3] = starts[1, history + 2] = starts[3, history] = True
        terminated[1, 0] = terminated[2, 3] = True
        pixels = rng.integers(256, size=(B, frames, *self.spec.observation_shape))
        arrays: dict[str, Any] = {
            "observation": pixels.astype(self.spec.observation_dtype),
            "episode_start": starts,
            "action": rng.integers(ACTIONS, size=(B, T)).astype(np.int32),
            "behaviour_logits": rng.normal(size=(B, T, ACTIONS)).astype(np.float32),
            "reward": (3 * rng.normal(size=(B, T))).astype(np.float32),
            "terminated": terminated,
        }
        if self.spec.observation_dtype == "float32":
            arrays["observation"] /= 128.0
        if self.config.network.lstm:
            size = self.config.network.lstm_size
            arrays["initial_state"] = rng.normal(size=(B, 2, size)).astype(np.float32)
            arrays["last_action"] = rng.integers(ACTIONS, size=(B, 1)).astype(np.int32)
            arrays["last_reward"] = rng.normal(size=(B, 1)).astype(np.float32)
        if self.spec.instruction_length:
            words = rng.integers(1000, size=(B, T + 1, self.spec.instruction_length))
            arrays["instruction"] = (words * (rng.random(words.shape) < 0.5)).astype(np.int32)
        tasks = (0, 2, 2, 0) if self.several_tasks else (0,) * B
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Batch(
            **tensors,
            task=torch.tensor(tasks),
            tasks=tasks,
            policy_versions=(0,) * B,
            num_fresh=self.config.fresh_per_update,
            cuts=cuts_of(tensors["episode_start"].T[history:]),
            release=lambda: None,
        )
