"""Networks: a torso per family, one file each, an optional recurrent core, and heads for policy and baseline.

A torso is a ``torch.nn.Module`` with an attribute ``num_features``, which maps [N, *observation] to
[N, num_features]; images arrive as uint8 [N, height, width, (color,) stack]. A new one is a file, and a line
here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping

from services.config import NetworkConfig, PopArtConfig
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.networks.actor_critic import ActorCritic, Inputs, PolicyOutput
from services.rl.networks.convolutional import nature, shallow
from services.rl.networks.mlp import mlp
from services.rl.networks.residual import deep
from services.rl.networks.torso import Torso

__all__ = ["TORSOS", "ActorCritic", "Inputs", "PolicyOutput", "make_network"]

TORSOS: Mapping[str, Callable[[EnvSpec, NetworkConfig], Torso]] = {
    "shallow": shallow,
    "nature": nature,
    "deep": deep,
    "mlp": mlp,
}


def make_network(
    spec: EnvSpec, config: NetworkConfig, num_tasks: int = 1, popart: PopArtConfig | None = None
) -> ActorCritic:
    """The network of a run; ValueError if its name is unknown or it does not fit the observations."""
    name = config.name
    if name == "auto":
        name = "shallow" if spec.observation_dtype == "uint8" and len(spec.observation_shape) > 1 else "mlp"
    torso = TORSOS[name](spec, config) if name in TORSOS else _custom(name)(spec, config)
    return ActorCritic(
        torso,
        Discrete(spec.num_actions),
        lstm_size=config.lstm_size if config.lstm else None,
        reads_instructions=config.instructions and spec.instruction_length > 0,
        num_tasks=num_tasks,
        popart=popart or PopArtConfig(),
    )


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
