"""What could never be sent or held is refused before anything is allocated for it."""

from __future__ import annotations

import pytest

from services import config as configuration
from services.config import RunConfig
from services.learner.__main__ import refuse_impossible_sizes
from services.learner.batch import rollout_schema
from services.rl.actions import Discrete
from services.rl.envs import env_spec
from services.rl.networks import make_network


def check(*flags: str) -> None:
    config: RunConfig = configuration.load(flags=["--env", "catch", *flags])
    spec = env_spec(config.env)
    schema = rollout_schema(spec, Discrete(spec.num_actions), config.unroll_length, config.network)
    refuse_impossible_sizes(config, schema, make_network(spec, config.network))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--wire.max_message_bytes", "4096"],
            r"wire.max_message_bytes = 4096: a rollout of catch could never",
        ),
        (
            ["--batch_size=65536", "--unroll_length=4096", "--total_steps=1e9"],
            "batches take",
        ),
        (
            ["--replay.ratio", "1", "--replay.capacity", "1e12"],
            r"replay.capacity = 1000000000000: takes more than",
        ),
    ],
)
def test_what_no_machine_holds_is_refused_by_its_knob(flags: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check(*flags)


def test_the_defaults_fit() -> None:
    check()
    check("--replay.ratio", "7")
