"""Frame stacking. Single frames travel on the wire; actor and learner stack them with this very function."""

from __future__ import annotations

import torch
from torch import Tensor


def stack_frames(frames_FN: Tensor, episode_start_FN: Tensor, num_frames: int) -> Tensor:
    """Stacks of the newest ``num_frames`` frames: [F, N, ...] -> [F - num_frames + 1, N, ..., num_frames].

    ``episode_start_FN`` marks the first frame of an episode; a stack shows zeros for what came before it, as
    a fresh frame stack does. The stack is the last dimension, oldest frame first, which is the channels-last
    layout that convolutions want: no transpose follows.
    """
    length = frames_FN.shape[0] - num_frames + 1
    assert length >= 1 and episode_start_FN.shape == frames_FN.shape[:2], (
        frames_FN.shape,
        episode_start_FN.shape,
    )
    if num_frames == 1:
        return frames_FN.unsqueeze(-1)
    stacked = frames_FN.new_empty(length, *frames_FN.shape[1:], num_frames)
    keep = torch.ones_like(episode_start_FN[:length])
    pixels = (..., *([None] * (frames_FN.ndim - 2)))
    for k in reversed(range(num_frames)):
        torch.mul(frames_FN[k : k + length], keep[pixels], out=stacked[..., k])
        keep = keep & ~episode_start_FN[k : k + length]  # what is older than a start is never shown with it
    return stacked
