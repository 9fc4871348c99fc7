"""What helm refuses, and that the line it says so with names the value and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from services import config
from tests.chart.rendering import CASES, CHART, as_json, helm, pods, refusal, render

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("actor=3", "at '/actor': got number, want object"),
        ("acters=3", "additional properties 'acters' not allowed"),
        ("actors=many", "at '/actors': got string, want integer"),
        ("actors=-1", "at '/actors': minimum: got -1, want 0"),
        ("learners=two", "at '/learners': got string, want integer"),
        ("learners=0", "at '/learners': minimum: got 0, want 1"),
        ("paramserver.relays=-1", "at '/paramserver/relays': minimum: got -1, want 0"),
        ("runId=a/b", "at '/runId': 'a/b' does not match pattern"),
        ("runId=..", "at '/runId': '..' does not match pattern"),
        ("image.pullPolicy=Sometimes", "value must be one of 'Always', 'IfNotPresent', 'Never'"),
        ("image.actor.digest=latest", "at '/image/actor/digest': 'latest' does not match pattern"),
        ("learner.resources.cpu=1", "at '/learner/resources': additional properties 'cpu' not allowed"),
        ("learner.persistence.size=lots", "at '/learner/persistence/size': 'lots' does not match pattern"),
        ("security.enabled=maybe", "at '/security/enabled': got string, want boolean"),
        ("autoscaling.minActors=0", "at '/autoscaling/minActors': minimum: got 0, want 1"),
        ("podDisruptionBudget.actor=200%", "at '/podDisruptionBudget/actor'"),
        ("monitoring.podMonitor.intervall=1s", "additional properties 'intervall' not allowed"),
        ("config.actor.numenvs=3", "at '/config/actor': additional properties 'numenvs' not allowed"),
        ("config.actor.num_envs=3", "at '/config/actor/num_envs': multipleOf: got 3, want 2"),
        ("config.loss.discount=2", "at '/config/loss/discount': maximum: got 2, want 1"),
        ("config.env=catch", "at '/config/env': got string, want object"),
        ("config.tasks={1}", "at '/config/tasks/0': got number, want string"),
        (
            "config.optimiser.learning_rate=1e-4",
            "at '/config/optimiser/learning_rate': got string, want number",
        ),
        ("config=null", "at '': missing property 'config'"),
        ("learner=null", "at '': missing property 'learner'"),
        ("commonLabels.app\\.kubernetes\\.io/component=x", "'app.kubernetes.io/component'"),
        ("actor.podLabels.helm\\.sh/chart=x", "'helm.sh/chart'"),
        ("actor.extraEnv[0].name=HOME", "at '/actor/extraEnv/0/name': 'not' failed"),
        ("autoscaling.authenticationRef.nam=x", "additional properties 'nam' not allowed"),
        ("terminationGracePeriodSeconds=0", "at '/terminationGracePeriodSeconds': minimum: got 0, want 1"),
        ("image.actor.tag=7", "at '/image/actor/tag': got number, want string"),
        ("config.optimiser.name=sgd", "value must be one of 'rmsprop', 'rmsprop_tf', 'adam'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path_and_what_is_allowed(value: str, line: str) -> None:
    assert line in refusal("--set", value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run_id", "mine"),
        ("run_dir", "/mine"),
        ("actors", 3),
        ("actor.rollouts", 3),
        ("learners", 3),
        ("wire.learner_bind", "tcp://*:1"),
        ("wire.learner_host", "10.0.0.1"),
        ("wire.paramserver_endpoint", "tcp://a:1"),
        ("wire.paramserver_bind", "tcp://*:1"),
        ("wire.keys", "/keys"),
        ("paramserver.upstream", "tcp://a:1"),
        ("paramserver.remembers", True),
        ("ops.host", "127.0.0.1"),
        ("ops.port", 1),
    ],
)
def test_what_the_chart_computes_is_refused_by_name(key: str, value: object) -> None:
    section, _, name = key.rpartition(".")

    said = refusal("--set-json", f"config.{key}={json.dumps(value)}")

    assert f"additional properties '{name}' not allowed" in said
    assert f"at '/config{'/' + section if section else ''}'" in said


def test_all_other_knobs_of_a_run_may_be_set_to_their_defaults(tmp_path: Path) -> None:
    values = config.dump(config.RunConfig())
    for key in ("run_id", "run_dir", "actors", "learners"):
        del values[key]
    values["wire"] = {key: value for key, value in values["wire"].items() if key in ("codec", "send_queue")}
    values["ops"] = {"log_level": "info"}
    del values["paramserver"]["upstream"], values["paramserver"]["remembers"]
    del values["actor"]["rollouts"]
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({"config": values}))

    assert render("--values", str(file))


@pytest.mark.parametrize("learners", [1, 3])
def test_fewer_learners_than_training_waits_for_are_refused(learners: int) -> None:
    least = f"learners={learners},config.learner.min_learners"

    said = refusal("--set", f"{least}={learners + 1}")
    assert f"config.learner.min_learners = {learners + 1}: allowed is learners = {learners} at most" in said
    assert render("--set", f"{least}={learners}")


def test_a_value_of_the_default_may_be_taken_away() -> None:
    assert render(*as_json(podSecurityContext={"runAsUser": None}))


def test_every_variable_that_the_templates_set_is_kept_from_extra_env() -> None:
    refused = SCHEMA["properties"]["actor"]["properties"]["extraEnv"]["items"]["properties"]["name"]["not"][
        "enum"
    ]
    ours = {each["name"] for pod in pods(render(*CASES["relays"])) for each in pod.container["env"]}

    assert ours == set(refused)


def test_the_chart_may_be_a_part_of_another(tmp_path: Path) -> None:
    (tmp_path / "Chart.yaml").write_text(
        "apiVersion: v2\nname: lab\nversion: 1.0.0\n"
        f"dependencies: [{{name: impala, version: 0.1.0, repository: 'file://{CHART}'}}]\n"
    )
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "impala").symlink_to(CHART)

    done = helm("template", "lab", str(tmp_path), "--set", "impala.actors=3,global.team=rl")

    assert done.returncode == 0, done.stderr
    assert "name: lab-impala-learner" in done.stdout


def sections(schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every object of the schema, with those that it refers to."""
    found = [(path, schema)]
    for name, each in schema.get("properties", {}).items():
        target = SCHEMA["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else each
        if "properties" in target:
            found += sections(target, f"{path}.{name}")
    return found


def test_nothing_in_the_schema_lets_unknown_keys_pass_or_lacks_a_description() -> None:
    found = sections(SCHEMA)

    assert len(found) > 25
    for path, section in found:
        assert section["additionalProperties"] is False, path
        for name, each in section["properties"].items():
            assert "properties" in each or "$ref" in each or each.get("description"), f"{path}.{name}"
