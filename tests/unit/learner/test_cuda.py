"""What only a GPU shows: that the trainer agrees with the CPU, never waits, and publishes what it had."""

from __future__ import annotations

import dataclasses

import pytest
import safetensors.torch
import torch

from benchmarks.parts import random_batch
from services import config as configuration
from services.config import RunConfig
from services.learner.batch import Batch
from services.learner.group import Group
from services.learner.publisher import WeightsCopier
from services.learner.trainer import Trainer
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.networks import make_network

pytestmark = pytest.mark.cuda

SPEC = EnvSpec(
    id="noise",
    observation_shape=(84, 84),
    observation_dtype="uint8",
    frame_stack=4,
    num_actions=6,
    frame_skip=4,
)
ACTIONS = Discrete(SPEC.num_actions)
CONFIG = configuration.load(flags=["--batch-size", "8"])


def trainer_on(device: str, dtype: torch.dtype = torch.float32) -> Trainer:
    torch.manual_seed(1)
    return Trainer(
        network=make_network(SPEC, CONFIG.network),
        actions=ACTIONS,
        config=CONFIG,
        frame_stack=SPEC.frame_stack,
        device=torch.device(device),
        dtype=dtype,
        group=Group(),
    )


def pinned(config: RunConfig) -> Batch:
    batch = random_batch(config, SPEC, ACTIONS)
    tensors = {name: value.pin_memory() for name, value in vars_of(batch).items()}
    return dataclasses.replace(batch, **tensors)  # type: ignore[arg-type]


def vars_of(batch: Batch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def test_an_update_on_the_gpu_is_the_one_on_the_cpu() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    batch = pinned(CONFIG)
    cpu, gpu = trainer_on("cpu"), trainer_on("cuda")
    for trainer in (cpu, gpu):
        trainer.update(trainer.to_device(batch))
    ours, theirs = cpu.read_figures(), gpu.read_figures()
    assert ours.loss_total == pytest.approx(theirs.loss_total, rel=1e-3)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
    for name, tensor in cpu.network.state_dict().items():
        # RMSProp's first step is lr x g / (0.1 |g| + eps): signs of tiny gradients may differ, sizes may not.
        moved = gpu.network.state_dict()[name].cpu()
        assert (moved - tensor).abs().mean() < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_never_waits_for_the_gpu(dtype: torch.dtype) -> None:
    trainer = trainer_on("cuda", dtype)
    batch = pinned(CONFIG)
    trainer.update(trainer.to_device(batch))  # the first one loads kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.update(trainer.to_device(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.read_figures().updates == 2


def test_the_published_weights_are_those_of_the_moment_of_the_offer() -> None:
    trainer = trainer_on("cuda")
    batch = pinned(CONFIG)
    copier = WeightsCopier(trainer.network)
    before = {name: tensor.cpu().clone() for name, tensor in trainer.network.state_dict().items()}
    copier.start()
    for _ in range(5):
        trainer.update(trainer.to_device(batch))
    published = safetensors.torch.load(copier.finish())
    assert all(torch.equal(published[name], before[name]) for name in before)
    assert any(not torch.equal(published[n], t.cpu()) for n, t in trainer.network.state_dict().items())
