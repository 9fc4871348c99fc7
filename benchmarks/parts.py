"""The parts of an agent step, each alone on one core, through the very classes that the pods use.

bound = cores / (1/env + 1/inference + 1/training): what a perfect system would reach on this machine's cores.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.options import Options, heading, median_seconds, row
from services import config as configuration
from services.config import RunConfig
from services.learner.batch import Batch, rollout_schema
from services.learner.trainer import Trainer
from services.rl import precision
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec, VectorEnv
from services.rl.networks import make_network
from services.rl.networks.recurrent import cuts_of
from services.rl.policy import Policy
from services.rl.tasks import deal, tasks_of, tasks_spec

CPU = torch.device("cpu")
HALF = 16
ENV_STEPS = 60


def measure(options: Options) -> dict[str, float]:
    """Rates in agent steps per second and core."""
    torch.set_num_threads(1)
    heading(f"parts of {options.env}, agent steps/s on one core")
    figures: dict[str, float] = {}
    for variant in options.variants:
        config = configuration.load(flags=options.flags(variant))
        tasks = tasks_of(config)
        spec = tasks_spec(tasks)
        env = environment_rate(deal(0, 2 * HALF, len(tasks))[0].make(tasks, spec.num_actions, num_threads=1))
        figures[f"{variant} env"] = env
        row(f"{variant} environment", f"{env:,.0f}")
        for dtype in dict.fromkeys((precision.resolve("auto", CPU), torch.float32)):
            label = f"{variant} {str(dtype).removeprefix('torch.')}"
            inference, training = inference_rate(config, spec, dtype), training_rate(config, spec, dtype)
            cores = os.cpu_count() or 1
            bound = cores / (1 / env + 1 / inference + 1 / training)
            figures |= {
                f"{label} inference": inference,
                f"{label} training": training,
                f"{label} bound": bound,
            }
            row(
                label,
                f"infer {inference:,.0f}",
                f"train {training:,.0f}",
                f"bound({cores}) {bound:,.0f}",
            )
    return figures


def environment_rate(env: VectorEnv) -> float:
    """Half an actor's environments, random actions."""
    env.reset(1)
    rng = np.random.default_rng(1)

    def play() -> None:
        for _ in range(ENV_STEPS):
            env.send(rng.integers(0, env.spec.num_actions, HALF))
            env.recv()

    rate = ENV_STEPS * HALF / median_seconds(play, warm_up=1)
    env.close()
    return rate


def inference_rate(config: RunConfig, spec: EnvSpec, dtype: torch.dtype) -> float:
    """What the actor does per half and step: stack, network, sample."""
    network = make_network(spec, config.network, len(tasks_of(config)), config.popart)
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    policy = Policy(
        network=network,
        actions=Discrete(spec.num_actions),
        frame_stack=spec.frame_stack,
        dtype=dtype,
        seed=1,
    )
    policy.load(1, tensors)
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 255, (HALF, spec.frame_stack, *spec.observation_shape)).astype(
        spec.observation_dtype
    )
    starts = np.zeros((HALF, spec.frame_stack), np.bool_)
    memory = policy.new_memory(HALF)
    return HALF / median_seconds(lambda: policy.act(frames, starts, memory))


def training_rate(config: RunConfig, spec: EnvSpec, dtype: torch.dtype) -> float:
    """What the trainer does per batch: restack, forward, loss, backward, optimiser step. In fresh steps."""
    actions = Discrete(spec.num_actions)
    trainer = Trainer(
        network=make_network(spec, config.network, len(tasks_of(config)), config.popart),
        actions=actions,
        config=config,
        frame_stack=spec.frame_stack,
        device=CPU,
        dtype=dtype,
    )
    batch = random_batch(config, spec, actions)
    return config.steps_per_update / median_seconds(lambda: trainer.update(batch))


def random_batch(config: RunConfig, spec: EnvSpec, actions: Discrete) -> Batch:
    """A batch of noise, of the run's shapes."""
    rng = np.random.default_rng(1)
    arrays = {}
    for name, array in rollout_schema(spec, actions, config.unroll_length, config.network).items():
        shape = (config.batch_size, *array.shape)
        values: NDArray[Any]
        if name in ("episode_start", "terminated"):
            values = rng.random(shape) < 0.001
        elif array.dtype == "float32":
            values = rng.standard_normal(shape)
        else:
            values = rng.integers(0, 256 if array.high is None else array.high + 1, shape)
        arrays[name] = torch.from_numpy(values.astype(array.dtype))
    columns = config.batch_size
    tensors: dict[str, Any] = arrays
    return Batch(
        **tensors,
        task=torch.zeros(columns, dtype=torch.int64),
        tasks=(0,) * columns,
        policy_versions=(0,) * columns,
        num_fresh=config.fresh_per_update,
        cuts=cuts_of(arrays["episode_start"].T[spec.frame_stack - 1 :]),
        release=lambda: None,
    )
