"""The acting policy: a network on the CPU, one version of its weights, and the dice.

Before it come the frames of the environments, after it actions and the logits that drew them. The weights
change only through ``load``, which the actor's loop calls between unrolls, never inside one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.rl.actions import Discrete
from services.rl.frames import stack_frames
from services.rl.networks import ActorCritic
from services.wire.messages import NO_VERSION


def mismatch(network: ActorCritic, tensors: Mapping[str, Tensor]) -> str | None:
    """In a few words why these are not this network's weights, or None."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if not wrong:
        return None
    name = wrong[0]
    return f"{name} has shape {given.get(name, 'none')}, the network's has {own.get(name, 'none')}"


class Policy:
    """Acts for a whole vector of environments at once."""

    def __init__(
        self, *, network: ActorCritic, actions: Discrete, frame_stack: int, dtype: torch.dtype, seed: int
    ) -> None:
        # The heads stay float32: the logits that are sent are the very ones that were sampled from.
        network.torso.to(dtype)
        self._network = network.eval().requires_grad_(False)
        self._actions = actions
        self._frame_stack = frame_stack
        self._generator = torch.Generator().manual_seed(seed)
        self.version = NO_VERSION

    def load(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over new weights, whatever their dtype. Their names and shapes have been checked."""
        self._network.load_state_dict(tensors)
        self.version = version

    def act(
        self, frames_NF: NDArray[np.generic], episode_start_NF: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(actions [N], logits [N, A]) for the newest of the given frames of each environment."""
        with torch.inference_mode():
            frames_FN = torch.from_numpy(frames_NF).transpose(0, 1)
            starts_FN = torch.from_numpy(episode_start_NF).transpose(0, 1)
            logits = self._network(stack_frames(frames_FN, starts_FN, self._frame_stack)[0]).logits
            actions = self._actions.sample(logits, self._generator)
            return actions.numpy(), logits.numpy()
