"""The gradients of one network, summed over the group while the backward pass still runs.

Before it comes the trainer's loss, after it the clipping. Gradients are views into a few flat buffers, last
layers first, as the backward pass makes them: whenever a buffer is full, its sum begins. A parameter without
a gradient counts as zero. The buffers belong to one group: a sum that was given up may still write to them.
A group of one has none of this, and gradients as torch makes them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from services.learner.group import Group

BUCKET_BYTES = 1 << 20
"""Small enough for the first sums to begin early, large enough for a network to be busy with one."""


class Buckets:
    """Made once for a network; ``begin``, the backward pass, ``finish``, for each update."""

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets: list[list[nn.Parameter]] = []
        size = 0
        for parameter in reversed([each for each in parameters if each.requires_grad]):
            if not self._buckets or size + parameter.nbytes > bucket_bytes:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.nbytes
        self._bucket_of = {each: n for n, bucket in enumerate(self._buckets) for each in bucket}
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._accumulated)
        self._group = Group()
        self._flats: list[Tensor] = []
        self._missing: list[int] = []
        self._begun = 0

    def begin(self, group: Group) -> None:
        """Before the backward pass: all gradients are zero, or None in a group of one."""
        if group is not self._group:
            self._group = group
            self._flats = [] if group.world_size == 1 else [_flat(bucket) for bucket in self._buckets]
        self._begun = 0
        self._missing = [len(bucket) for bucket in self._buckets]
        if not self._flats:
            for parameter in self._bucket_of:
                parameter.grad = None
            return
        for bucket, flat in zip(self._buckets, self._flats, strict=True):
            flat.zero_()
            start = 0
            for parameter in bucket:
                parameter.grad = flat.as_strided(parameter.shape, parameter.stride(), start)
                start += parameter.numel()

    def finish(self) -> None:
        """After the backward pass: begin the sums that have not begun by themselves."""
        while self._begun < len(self._flats):
            self._group.start_sum(self._flats[self._begun])
            self._begun += 1

    def divide(self, total: Tensor) -> None:
        """All sums, once they are complete."""
        for flat in self._flats:
            flat.div_(total)

    def _accumulated(self, parameter: Tensor) -> None:
        if not self._flats:
            return
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]  # hooks are typed for tensors
        # In this order on all ranks, though the backward pass of another batch may fill them in another one.
        while self._begun < len(self._flats) and not self._missing[self._begun]:
            self._group.start_sum(self._flats[self._begun])
            self._begun += 1


def _flat(bucket: list[nn.Parameter]) -> Tensor:
    first = bucket[0]
    assert all(each.dtype == first.dtype for each in bucket)
    return torch.zeros(sum(each.numel() for each in bucket), dtype=first.dtype, device=first.device)
