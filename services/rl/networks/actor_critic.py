"""The whole network: a torso over single observations, perhaps a core over time, and two heads.

Actors call it for one time step, learners for an unroll, and both get the same outputs. The torso may run in
bfloat16 or be wrapped by torch.compile; everything after it is float32 and eager. Shapes: T time, B columns,
A policy outputs, K tasks, H state, W words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.config import PopArtConfig
from services.rl.actions import Discrete
from services.rl.networks.instructions import InstructionEncoder
from services.rl.networks.recurrent import RecurrentCore
from services.rl.networks.torso import Torso
from services.rl.popart import PopArt


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the network sees of T steps of B environments; the optional parts if it uses them."""

    observation_TB: Tensor
    """[T, B, *observation]: stacked frames, or vectors."""
    episode_start_TB: Tensor | None = None
    last_action_TB: Tensor | None = None
    last_reward_TB: Tensor | None = None
    """Raw."""
    state_2BH: Tensor | None = None
    """Before the first of the steps."""
    cuts: tuple[int, ...] = ()
    """Times at which some column begins an episode; see ``recurrent.cuts_of``."""
    instruction_TBW: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOutput:
    """For each observation, the policy's outputs and the baselines. Always float32."""

    logits_TBA: Tensor
    baselines_TBK: Tensor
    """On the scale of each task; see ``popart``."""
    state_2BH: Tensor | None
    """After the last step; None without a core."""


class ActorCritic(nn.Module):
    """One body under two linear heads, one of which has an output per task."""

    def __init__(
        self,
        torso: Torso,
        actions: Discrete,
        *,
        lstm_size: int | None,
        reads_instructions: bool,
        num_tasks: int,
        popart: PopArtConfig,
    ) -> None:
        super().__init__()
        self.torso = torso
        num_features = torso.num_features
        self.instructions = InstructionEncoder() if reads_instructions else None
        if self.instructions is not None:
            num_features += self.instructions.num_features
        self.core = RecurrentCore(num_features, actions.num_actions, lstm_size) if lstm_size else None
        if self.core is not None:
            num_features = self.core.size
        self.policy = nn.Linear(num_features, actions.num_outputs)
        self.baseline = PopArt(num_features, num_tasks, popart)
        # A near-uniform first policy explores; small gain as in Andrychowicz et al. 2021, section 3.2.
        nn.init.orthogonal_(self.policy.weight, gain=0.01)
        nn.init.orthogonal_(self.baseline.linear.weight, gain=1.0)
        nn.init.zeros_(self.policy.bias)
        nn.init.zeros_(self.baseline.linear.bias)

    @property
    def state_size(self) -> int:
        """H; 0 without a core."""
        return 0 if self.core is None else self.core.size

    def forward(self, inputs: Inputs) -> PolicyOutput:
        """[T, B] observations -> as many outputs."""
        length, columns = inputs.observation_TB.shape[:2]
        features = self.torso(inputs.observation_TB.flatten(0, 1))
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.instructions is not None:
                assert inputs.instruction_TBW is not None
                words = self.instructions(inputs.instruction_TBW.flatten(0, 1))
                features = torch.cat([features, words], -1)
            features_TBF = features.unflatten(0, (length, columns))
            state_2BH = None
            if self.core is not None:
                assert inputs.last_action_TB is not None and inputs.last_reward_TB is not None
                assert inputs.episode_start_TB is not None and inputs.state_2BH is not None
                features_TBF, state_2BH = self.core(
                    features_TBF,
                    inputs.last_action_TB,
                    inputs.last_reward_TB,
                    inputs.episode_start_TB,
                    inputs.cuts,
                    inputs.state_2BH,
                )
            return PolicyOutput(
                logits_TBA=self.policy(features_TBF),
                baselines_TBK=self.baseline(features_TBF),
                state_2BH=state_2BH,
            )
