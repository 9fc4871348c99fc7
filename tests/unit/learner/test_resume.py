"""What a resumed trainer takes from its checkpoint, and what from its configuration."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from services import config as configuration
from services.config import RunConfig
from services.learner.__main__ import adopt, catch_up
from services.learner.checkpoint import to_host
from services.learner.publisher import Publisher, WeightsCopier
from services.learner.trainer import Trainer
from services.rl.actions import Discrete
from services.rl.envs import env_spec
from services.rl.networks import make_network
from services.wire.messages import Weights

BEFORE = {"env": {"id": "catch"}, "network": {"hidden_size": 8}, "total_steps": 64_000}


def config(**optimiser: Any) -> RunConfig:
    return configuration.validate(BEFORE | {"optimiser": optimiser})


def trainer(run: RunConfig) -> Trainer:
    spec = env_spec(run.env)
    return Trainer(
        network=make_network(spec, run.network, popart=run.popart),
        actions=Discrete(spec.num_actions),
        config=run,
        frame_stack=spec.frame_stack,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def step(learning: Trainer) -> None:
    """One optimiser step, without a batch."""
    for parameter in learning.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    learning.optimiser.step()
    learning.load(learning.network.state_dict(), learning.version + 1, learning.steps + 640)


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


# --- after a crash: newer weights than the checkpoint's ---------------------------------------------------


def published(learning: Trainer) -> Weights:
    """What the parameter server has of it."""
    copier = WeightsCopier(learning.network)
    copier.start()
    return Weights(
        run_id="run",
        server_incarnation=1,
        state="training",
        version=learning.version,
        steps=learning.steps,
        seats=(),
        payload=copier.finish(),
    )


def test_newer_weights_bring_their_version_their_steps_and_the_statistics_of_their_baselines() -> None:
    run = configuration.validate(BEFORE | {"popart": {"enabled": True, "step_size": 0.5}})
    ahead, crashed = trainer(run), trainer(run)
    step(ahead)
    checkpoint = to_host(ahead.state_dict())
    for targets in (100.0, 300.0):
        step(ahead)
        moments = torch.tensor([[2.0], [2 * targets], [2 * targets**2 + 8]], dtype=torch.float64)
        ahead.network.baseline.update(moments, torch.tensor(True))
    crashed.load_state_dict(checkpoint)
    adopt(run, crashed, published(ahead))
    assert (crashed.version, crashed.steps) == (3, 3 * 640)
    assert crashed.learning_rate == ahead.learning_rate
    now, wanted = crashed.network.state_dict(), ahead.network.state_dict()
    assert all(now[name].equal(wanted[name]) for name in wanted)
    assert crashed.network.baseline.mean_K.tolist() == [175.0]  # 0, 50, 175
    averages = crashed.optimiser.state_dict()["state"][0]["square_avg"]
    assert averages.equal(checkpoint["optimiser"]["state"][0]["square_avg"]), "these are the checkpoint's"


def test_newer_weights_that_cannot_be_had_leave_only_their_number(caplog: pytest.LogCaptureFixture) -> None:
    """What the server's actors play by them would else look as if it came from the future."""

    class Silent:
        def fetch_newer(self, version: int, timeout_s: float) -> Weights | None:
            return None

    learning = trainer(config())
    step(learning)
    before = to_host(learning.state_dict())
    catch_up(config(), learning, cast(Publisher, Silent()), version=9)
    assert (learning.version, learning.steps) == (9, 640)
    assert all(now.equal(before["network"][name]) for name, now in learning.network.state_dict().items())
    assert "newer_weights_missed" in [record.getMessage() for record in caplog.records]


def test_newer_weights_of_another_network_are_refused_by_the_name_of_the_run() -> None:
    other = configuration.validate(BEFORE | {"network": {"hidden_size": 9}, "run_id": "mine"})
    learning = trainer(config())
    with pytest.raises(ValueError, match=r"run_id = 'mine': .* version 0, which does not fit"):
        adopt(other, learning, published(trainer(other)))
    assert (learning.version, learning.steps) == (0, 0)
