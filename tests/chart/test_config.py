"""The ConfigMap holds exactly the run that the values ask for: it is read here as the pods read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from services import config
from services.config import RunConfig
from tests.chart.rendering import CASES, EXAMPLES, Object, as_json, config_json, pod_of, render


def decoded(*arguments: str, release: str = "impala", name: str = "impala") -> RunConfig:
    return config.validate(config_json(render(*arguments, release=release), name))


def expected(values: dict[str, Any]) -> RunConfig:
    """The run of ``values`` in a release called impala, written down by hand."""
    of_the_chart: dict[str, Any] = {
        "run_id": "impala",
        "run_dir": "/data/impala",
        "wire": {
            "learner_bind": "tcp://*:5555",
            "paramserver_endpoint": "tcp://impala-paramserver:5556",
            "paramserver_bind": "tcp://*:5556",
            "keys": "/etc/impala-keys",
            **values.pop("wire", {}),
        },
        "paramserver": {"remembers": False, **values.pop("paramserver", {})},
        "ops": {"host": "0.0.0.0", "port": 9400, **values.pop("ops", {})},
    }
    return config.validate({"env": {"id": "catch"}, **values, **of_the_chart})


def test_default_values_are_a_run_of_catch() -> None:
    assert decoded() == expected({})


def test_a_parameter_server_is_told_whether_it_keeps_its_disk() -> None:
    assert not decoded().paramserver.remembers
    assert decoded("--set", "paramserver.persistence.enabled=true").paramserver.remembers


def test_large_integers_and_small_fractions_survive_a_file(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(
        "config:\n"
        "  seed: 2147483647\n"
        "  total_steps: 200000000\n"
        "  batch_size: 64\n"
        "  optimiser: {learning_rate: 1e-4, rmsprop_epsilon: 0.00031866995608948655, max_grad_norm: 40}\n"
        "  loss: {discount: 1.0, entropy_cost: 0.00000001}\n"
        "  popart: {max_sigma: 1e6}\n"
        "  wire: {max_message_bytes: 2147483647, codec: none}\n"
        "  ops: {log_level: debug}\n"
        "  replay: {trust_region: null, capacity: 12345678}\n"
    )

    assert decoded("--values", str(values)) == expected(
        {
            "seed": 2147483647,
            "total_steps": 200_000_000,
            "batch_size": 64,
            "optimiser": {
                "learning_rate": 0.0001,
                "rmsprop_epsilon": 0.00031866995608948655,
                "max_grad_norm": 40.0,
            },
            "loss": {"discount": 1.0, "entropy_cost": 1e-8},
            "popart": {"max_sigma": 1e6},
            "wire": {"max_message_bytes": 2147483647, "codec": "none"},
            "ops": {"log_level": "debug"},
            "replay": {"trust_region": None, "capacity": 12345678},
        }
    )


def test_large_integers_and_small_fractions_survive_the_command_line() -> None:
    run = decoded(
        "--set",
        "config.total_steps=200000000,config.seed=2147483647,config.replay.trust_region=null",
        "--set-json",
        "config.optimiser.learning_rate=1e-4",
    )

    assert run == expected(
        {
            "total_steps": 200_000_000,
            "seed": 2147483647,
            "replay": {"trust_region": None},
            "optimiser": {"learning_rate": 0.0001},
        }
    )


def test_nested_tasks_keep_their_order_and_their_types() -> None:
    tasks = [
        "ALE/Pong-v5",
        {"id": "CartPole-v1", "name": "pole", "kwargs": {"x": 1, "y": "1", "z": None, "on": True}},
    ]

    run = decoded(*as_json(config={"tasks": tasks}))

    assert run == expected({"tasks": tasks})
    assert run.tasks[1].kwargs["x"] == 1
    assert run.tasks[1].kwargs["y"] == "1"


def test_what_is_given_beside_a_default_leaves_the_default_alone() -> None:
    run = decoded("--set", "config.env.frame_stack=2")

    assert (run.env.id, run.env.frame_stack) == ("catch", 2)


def test_the_run_has_the_name_of_its_release_or_the_one_that_is_given() -> None:
    other = decoded(release="pong", name="pong-impala")
    named = decoded("--set", "runId=second")

    assert (other.run_id, str(other.run_dir)) == ("pong", "/data/pong")
    assert other.wire.paramserver_endpoint == "tcp://pong-impala-paramserver:5556"
    assert (named.run_id, str(named.run_dir)) == ("second", "/data/second")


def test_nobody_is_told_how_many_learners_there_are_only_how_many_there_must_be() -> None:
    assert decoded(*CASES["three-learners"]) == expected({"learner": {"min_learners": 2}})


def environment_of(objects: list[Object], component: str, pod_ip: str = "10.0.0.7") -> dict[str, str]:
    """The container's variables as the kubelet fills them in, one CPU requested."""
    filled = {}
    for each in pod_of(objects, component).container["env"]:
        source = each.get("valueFrom", {})
        told = {"status.podIP": pod_ip}.get(source.get("fieldRef", {}).get("fieldPath"))
        filled[each["name"]] = each.get("value", told or ("1" if "resourceFieldRef" in source else ""))
    assert all(filled.values()), filled
    return filled


def run_of(objects: list[Object], component: str, directory: Path) -> RunConfig:
    """The configuration as a pod of that role loads it."""
    file = directory / "config.json"
    file.write_text(json.dumps(config_json(objects)))
    return config.load(file, environment_of(objects, component))


@pytest.mark.parametrize("case", ["default", "three-learners"])
def test_a_learner_is_reached_at_the_address_of_its_pod(case: str, tmp_path: Path) -> None:
    run = run_of(render(*CASES[case]), "learner", tmp_path)

    assert (run.wire.learner_host, run.wire.learner_bind) == ("10.0.0.7", "tcp://*:5555")


def test_without_security_nobody_looks_for_keys() -> None:
    assert "keys" not in config_json(render(*CASES["insecure"]))["wire"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_the_run_that_it_says(example: Path) -> None:
    asked_for = yaml.safe_load(example.read_text())

    run = decoded(*CASES[f"example-{example.stem}"])

    assert run == expected({"env": {"id": "catch"}, **asked_for["config"]})


def test_actors_alone_ask_the_relays_and_relays_ask_the_parameter_server(tmp_path: Path) -> None:
    objects = render(*CASES["relays"])

    def told(component: str) -> RunConfig:
        return run_of(objects, component, tmp_path)

    assert told("actor").wire.paramserver_endpoint == "tcp://impala-relay:5556"
    assert told("learner").wire.paramserver_endpoint == "tcp://impala-paramserver:5556"
    assert told("relay").paramserver.upstream == "tcp://impala-paramserver:5556"
    assert told("paramserver").paramserver.upstream is None
