"""What only a GPU shows: that the trainer agrees with the CPU, never waits, and publishes what it had.

And that NCCL is called as it wants to be, in a group whose only member has a GPU.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch

from services.learner.batch import Batch
from services.learner.group import Group, PeerLostError, Peers, Store
from services.learner.publisher import WeightsCopier
from services.learner.trainer import Trainer
from tests.unit.learner.together import HOST
from tests.unit.learner.variants import VARIANTS, Variant

pytestmark = pytest.mark.cuda

of_every_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Products of float32 as the CPU makes them, for as long as a test takes."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def pinned(variant: Variant) -> Batch:
    """As the batcher makes it where there is CUDA."""
    batch = variant.make_batch()
    tensors: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in batch.tensors().items()}
    return dataclasses.replace(batch, **tensors)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in trainer.network.state_dict().items()}


@of_every_variant
def test_an_update_on_the_gpu_is_the_one_on_the_cpu(name: str) -> None:
    variant = Variant(name)
    cpu, gpu = (variant.make_trainer(device) for device in ("cpu", "cuda"))
    first = weights_of(cpu)
    for trainer in (cpu, gpu):
        trainer.update(trainer.to_device(pinned(variant)))
    assert gpu.network.policy.weight.is_cuda
    ours, theirs = (dataclasses.asdict(trainer.read_figures()) for trainer in (cpu, gpu))
    assert ours["nonfinite_updates"] == 0
    for figure, value in ours.items():
        assert theirs[figure] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), figure
    for key, theirs_now in weights_of(gpu).items():
        ours_now = weights_of(cpu)[key].double()
        moved = (ours_now - first[key]).abs().mean()
        # An optimiser's first step is as large for tiny gradients, whose signs may differ, as for others.
        assert (theirs_now.double() - ours_now).abs().mean() <= 0.02 * moved + 1e-6, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@of_every_variant
def test_an_update_never_waits_for_the_gpu(name: str, dtype: torch.dtype) -> None:
    variant = Variant(name)
    trainer = variant.make_trainer("cuda", dtype)
    batch = pinned(variant)
    trainer.update(trainer.to_device(batch))  # the first one loads kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.update(trainer.to_device(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.read_figures().updates == 2


@pytest.mark.parametrize("name", ["shallow", "deep-lstm-instructions", "popart-tasks"])
def test_the_published_weights_are_those_of_the_moment_of_the_offer(name: str) -> None:
    variant = Variant(name)
    trainer = variant.make_trainer("cuda")
    batch = pinned(variant)
    copier = WeightsCopier(trainer.network)
    before = weights_of(trainer)
    copier.start()
    for _ in range(5):
        trainer.update(trainer.to_device(batch))
    published = safetensors.torch.load(copier.finish())
    assert all(torch.equal(published[key], tensor) for key, tensor in before.items())
    assert any(not torch.equal(published[key], tensor) for key, tensor in weights_of(trainer).items())


def one_over_nccl(over: threading.Event) -> Group:
    peers = Peers(
        store=Store(HOST).store,
        rank=0,
        world_size=1,
        generation=1,
        host=HOST,
        device=torch.device("cuda", 0),
        is_over=over.is_set,
    )
    return Group(peers=peers)


def test_sums_go_over_nccl_and_counts_over_the_host() -> None:
    group = one_over_nccl(threading.Event())
    on_gpu = torch.arange(4.0, device="cuda")
    group.start_sum(on_gpu)
    group.finish()
    assert on_gpu.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert group.sum_counts([3, 5]) == [3, 5]
    assert group.broadcast(b"state", 0) == b"state"
    group.leave()
    group.leave()


def test_who_waits_for_a_gpu_leaves_when_the_group_is_over() -> None:
    over = threading.Event()
    group = one_over_nccl(over)
    torch.cuda._sleep(2_000_000_000)  # so the sum behind it takes a second
    group.start_sum(torch.ones(1, device="cuda"))
    over.set()
    with pytest.raises(PeerLostError, match="over"):
        group.finish()
    group.leave()


def test_a_first_sum_that_does_not_end_holds_nobody_in_a_group_that_is_over() -> None:
    over = threading.Event()
    over.set()
    torch.cuda._sleep(2_000_000_000)
    with pytest.raises(PeerLostError, match="over"):
        one_over_nccl(over)
    torch.cuda.synchronize()
