"""The recurrent core: an LSTM over features, the clipped last reward and the last action.

An episode begins with a state of zeros, also inside an unroll. The LSTM runs as one fused call per stretch of
time in which no column begins an episode, because a step-by-step loop costs several times the arithmetic.
Always float32: it is small beside the torso, and its state lives long. Shapes: T time, B columns, F features,
H state; a state is [2, B, H], the LSTM's h and c.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RecurrentCore(nn.Module):
    """[T, B, F] -> [T, B, H].

    Torch's initialisation, but for a bias of 1 at the forget gate, as TensorFlow's LSTM had for the published
    agents (Jozefowicz et al. 2015): without it what is remembered halves with every step at first.
    """

    def __init__(self, num_features: int, num_actions: int, size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(num_features + 1 + num_actions, size)
        for name, bias in ((name, p) for name, p in self.lstm.named_parameters() if "bias" in name):
            nn.init.constant_(bias[size : 2 * size], 1.0 if name.startswith("bias_ih") else 0.0)
        self.size = size
        self._num_actions = num_actions

    def forward(
        self,
        features_TBF: Tensor,
        last_action_TB: Tensor,
        last_reward_TB: Tensor,
        episode_start_TB: Tensor,
        cuts: Sequence[int],
        state_2BH: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after them. At the times ``cuts`` some column begins an episode.

        The same is in ``episode_start_TB``, but a device would have to be waited for to look there.
        """
        if episode_start_TB.device.type == "cpu":
            assert set(cuts_of(episode_start_TB)) <= set(cuts), f"episodes begin at other times than {cuts}"
        going_on_TB1 = (~episode_start_TB).unsqueeze(-1).to(features_TBF.dtype)
        actions_TBA = nn.functional.one_hot(last_action_TB.long(), self._num_actions)
        # Whatever came before its first observation is not part of an episode.
        rewards_TB1 = last_reward_TB.clamp(-1.0, 1.0).unsqueeze(-1)
        inputs_TBX = torch.cat([features_TBF, rewards_TB1 * going_on_TB1, actions_TBA * going_on_TB1], dim=-1)
        outputs = []
        edges = sorted({0, *cuts, len(inputs_TBX)})
        for begin, end in itertools.pairwise(edges):
            # A rollout's state comes as a view; cuDNN takes contiguous ones only.
            hidden_2BH = (state_2BH * going_on_TB1[begin]).contiguous()
            output, (h, c) = self.lstm(inputs_TBX[begin:end], (hidden_2BH[:1], hidden_2BH[1:]))
            outputs.append(output)
            state_2BH = torch.cat([h, c])
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0], state_2BH


def cuts_of(episode_start_TB: Tensor) -> tuple[int, ...]:
    """The times after the first at which some column begins an episode. For a tensor on the host."""
    return tuple(episode_start_TB[1:].any(1).nonzero().flatten().add(1).tolist())
