"""The acting policy: a network on the CPU, one version of its weights, and the dice.

Before it come the frames of the environments, after it actions and the logits that drew them. The weights
change only through ``load``, which an actor calls between unrolls, never inside one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from services.rl.actions import Discrete
from services.rl.frames import stack_frames
from services.rl.networks import ActorCritic, Inputs

NO_WEIGHTS = -1
"""The version of a policy that has not loaded any."""


def mismatch(network: ActorCritic, tensors: Mapping[str, Tensor]) -> str | None:
    """In a few words why these are not this network's weights, or None."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if not wrong:
        return None
    name = wrong[0]
    return f"{name} has shape {given.get(name, 'none')}, the network's has {own.get(name, 'none')}"


def decode_weights(network: ActorCritic, payload: bytes) -> Mapping[str, Tensor]:
    """Published weights by name; ValueError if they are damaged or another network's."""
    try:
        tensors = safetensors.torch.load(payload)
    except (SafetensorError, KeyError, TypeError) as error:
        # safetensors.torch raises more than its own error for what its parser lets pass
        raise ValueError(f"not safetensors: {error}") from None
    if (wrong := mismatch(network, tensors)) is not None:
        raise ValueError(f"weights of another network: {wrong}")
    return tensors


@dataclass(slots=True, kw_only=True)
class Memory:
    """What a recurrent policy carries between steps of N environments. Arrays are replaced, never written."""

    state_2NH: NDArray[np.float32]
    """Before the next observation."""
    last_action_N: NDArray[np.int32]
    last_reward_N: NDArray[np.float32]
    """Raw."""


class Policy:
    """Acts for a whole vector of environments at once."""

    def __init__(
        self,
        *,
        network: ActorCritic,
        actions: Discrete,
        frame_stack: int,
        dtype: torch.dtype,
        seed: int,
        greedy: bool = False,
    ) -> None:
        # All but the torso stays float32: the logits that are sent are the very ones that were sampled from.
        network.torso.to(dtype)
        self._network = network.eval().requires_grad_(False)
        self._dtype = dtype
        self._actions = actions
        self._frame_stack = frame_stack
        self._generator = torch.Generator().manual_seed(seed)
        self._greedy = greedy
        self.version = NO_WEIGHTS

    def load(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over new weights, whatever their dtype. Their names and shapes have been checked."""
        self._network.load_state_dict(tensors)
        self.version = version

    @property
    def reads_instructions(self) -> bool:
        """``act`` needs what the environments say."""
        return self._network.instructions is not None

    def new_memory(self, num_envs: int) -> Memory | None:
        """Before the first step of ``num_envs`` environments; None if this policy remembers nothing."""
        size = self._network.state_size
        if not size:
            return None
        return Memory(
            state_2NH=np.zeros((2, num_envs, size), np.float32),
            last_action_N=np.zeros(num_envs, np.int32),
            last_reward_N=np.zeros(num_envs, np.float32),
        )

    def act(
        self,
        frames_NF: NDArray[np.generic],
        episode_start_NF: NDArray[np.bool_],
        memory: Memory | None = None,
        instruction_NW: NDArray[np.int32] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(actions [N], logits [N, A]) for the newest of the given frames; ``memory`` moves on by a step."""
        with torch.inference_mode():
            frames_FN = torch.from_numpy(frames_NF).transpose(0, 1)
            starts_FN = torch.from_numpy(episode_start_NF).transpose(0, 1)
            inputs = Inputs(
                observation_TB=stack_frames(frames_FN, starts_FN, self._frame_stack),
                episode_start_TB=starts_FN[-1:],
                last_action_TB=None if memory is None else torch.from_numpy(memory.last_action_N)[None],
                last_reward_TB=None if memory is None else torch.from_numpy(memory.last_reward_N)[None],
                state_2BH=None if memory is None else torch.from_numpy(memory.state_2NH),
                instruction_TBW=None if instruction_NW is None else torch.from_numpy(instruction_NW)[None],
            )
            # Ours convert what they are given; a torso of the user's own need not.
            with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
                output = self._network(inputs)
            logits = output.logits_TBA[0]
            if self._greedy:
                actions = self._actions.most_likely(logits)
            else:
                actions = self._actions.sample(logits, self._generator)
        chosen: NDArray[np.int64] = actions.numpy()
        if memory is not None:
            memory.state_2NH = output.state_2BH.numpy()
            memory.last_action_N = chosen.astype(np.int32)
        return chosen, logits.numpy()
