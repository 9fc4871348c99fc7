"""Networks: a torso per family, one file each, under a head for the policy and one for the baseline.

A torso is a ``torch.nn.Module`` with an attribute ``num_features``, which maps [N, *observation] to
[N, num_features]; images arrive as uint8 [N, height, width, stack]. A new one is a file, and a line here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.config import NetworkConfig
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.networks.convolutional import nature, shallow
from services.rl.networks.mlp import mlp
from services.rl.networks.torso import Torso

TORSOS: Mapping[str, Callable[[EnvSpec, NetworkConfig], Torso]] = {
    "shallow": shallow,
    "nature": nature,
    "mlp": mlp,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOutput:
    """For each observation, the policy's outputs and the baseline. Always float32."""

    logits: Tensor
    baseline: Tensor


class ActorCritic(nn.Module):
    """One torso under two linear heads."""

    def __init__(self, torso: Torso, actions: Discrete) -> None:
        super().__init__()
        self.torso = torso
        self.policy = nn.Linear(torso.num_features, actions.num_outputs)
        self.baseline = nn.Linear(torso.num_features, 1)
        # A near-uniform first policy explores; small gain as in Andrychowicz et al. 2021, section 3.2.
        nn.init.orthogonal_(self.policy.weight, gain=0.01)
        nn.init.orthogonal_(self.baseline.weight, gain=1.0)
        nn.init.zeros_(self.policy.bias)
        nn.init.zeros_(self.baseline.bias)

    def forward(self, observations: Tensor) -> PolicyOutput:
        """[N, *observation] -> N outputs. The torso may run in bfloat16, the heads are float32."""
        features = self.torso(observations)
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            return PolicyOutput(
                logits=self.policy(features),
                baseline=self.baseline(features).squeeze(-1),
            )


def make_network(spec: EnvSpec, config: NetworkConfig) -> ActorCritic:
    """The network of a run; ValueError if its name is unknown or it does not fit the observations."""
    name = config.name
    if name == "auto":
        name = "shallow" if len(spec.observation_shape) == 2 else "mlp"
    torso = TORSOS[name](spec, config) if name in TORSOS else _custom(name)(spec, config)
    return ActorCritic(torso, Discrete(spec.num_actions))


def _custom(name: str) -> Callable[[EnvSpec, NetworkConfig], Torso]:
    """``package.module:factory``; the factory is called like those in TORSOS."""
    module, colon, attribute = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, [*TORSOS, "auto"], n=1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"allowed are auto, {', '.join(TORSOS)} or package.module:factory"
        )
        raise ValueError(f"network.name = {name!r}: {hint}")
    try:
        factory: Callable[[EnvSpec, NetworkConfig], Torso] = getattr(
            importlib.import_module(module), attribute
        )
    except (ImportError, AttributeError) as error:
        raise ValueError(f"network.name = {name!r}: {error}") from None
    return factory
