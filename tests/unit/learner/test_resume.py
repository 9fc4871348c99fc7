"""What a resumed trainer takes from its checkpoint, and what from its configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services import config as configuration
from services.config import RunConfig
from services.learner.checkpoint import to_host
from services.learner.group import Group
from services.learner.trainer import Trainer
from services.rl.actions import Discrete
from services.rl.envs import env_spec
from services.rl.networks import make_network

BEFORE = {"env": {"id": "catch"}, "network": {"hidden_size": 8}, "total_steps": 64_000}


def config(**optimiser: Any) -> RunConfig:
    return configuration.validate(BEFORE | {"optimiser": optimiser})


def trainer(run: RunConfig) -> Trainer:
    spec = env_spec(run.env)
    return Trainer(
        network=make_network(spec, run.network),
        actions=Discrete(spec.num_actions),
        config=run,
        frame_stack=spec.frame_stack,
        device=torch.device("cpu"),
        dtype=torch.float32,
        group=Group(),
    )


def step(learning: Trainer) -> None:
    """One optimiser step, without a batch."""
    for parameter in learning.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    learning.optimiser.step()
    learning.version += 1
    learning.steps += 640


def trained(run: RunConfig) -> dict[str, Any]:
    learning = trainer(run)
    for _ in range(3):
        step(learning)
    return learning.state_dict()


@pytest.mark.parametrize(
    "optimiser",
    [{}, {"name": "adam"}, {"rmsprop_momentum": 0.9}],
    ids=["rmsprop", "adam", "rmsprop with momentum"],
)
def test_a_resumed_trainer_makes_the_very_updates_that_it_would_have_made(optimiser: dict[str, Any]) -> None:
    run = config(**optimiser)
    original, resumed = trainer(run), trainer(run)
    step(original)
    resumed.load_state_dict(to_host(original.state_dict()))
    assert (resumed.version, resumed.steps) == (1, 640)
    assert resumed.learning_rate == original.learning_rate < run.optimiser.learning_rate
    for learning in (original, resumed):
        step(learning)
    pairs = zip(original.network.parameters(), resumed.network.parameters(), strict=True)
    assert all(mine.equal(theirs) for mine, theirs in pairs)


def test_settings_given_to_a_resumed_run_hold() -> None:
    resumed = trainer(config(rmsprop_epsilon=0.5, rmsprop_alpha=0.9))
    resumed.load_state_dict(trained(config(rmsprop_epsilon=0.01, rmsprop_alpha=0.99)))
    (group,) = resumed.optimiser.param_groups
    assert (group["eps"], group["alpha"]) == (0.5, 0.9)
    step(resumed)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"name": "rmsprop"}, {"name": "adam"}),
        ({"name": "adam"}, {"name": "rmsprop"}),
        ({"rmsprop_momentum": 0.0}, {"rmsprop_momentum": 0.9}),
        ({"rmsprop_momentum": 0.9}, {"rmsprop_momentum": 0.0}),
    ],
)
def test_a_checkpoint_of_another_optimiser_is_refused_before_anything_is_changed(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    learning = trainer(config(**after))
    weights = [parameter.clone() for parameter in learning.network.parameters()]
    with pytest.raises(ValueError, match=r"optimiser.name|optimiser.rmsprop_momentum"):
        learning.load_state_dict(trained(config(**before)))
    assert learning.version == 0
    assert all(map(torch.equal, weights, learning.network.parameters()))


def test_a_changed_momentum_is_no_other_optimiser() -> None:
    learning = trainer(config(rmsprop_momentum=0.5))
    learning.load_state_dict(trained(config(rmsprop_momentum=0.9)))
    step(learning)
