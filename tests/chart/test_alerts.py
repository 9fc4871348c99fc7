"""Alerts fire when they should, are silent when all is well and once training is complete, and are explained.

promtool evaluates them: the same code as in Prometheus. ``situations`` has the cases.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.promql import ALERTS, CHART, HELM, KUBERNETES, known_names, names_in, rules, unknown_names
from tests.chart.situations import (
    COMPLETE,
    COMPLETED,
    REINSTALLED,
    RELEASE,
    SITUATIONS,
    STARTED,
    Situation,
    one,
    replaced,
)
from tests.conftest import RequireTool

ROOT = HELM.parent
RUNBOOKS = ROOT / "docs" / "runbooks.md"
FILES = sorted(ALERTS.glob("*.yaml"))
BY_NAME = {rule["alert"]: rule for rule in rules() if "alert" in rule}
REMEMBERED = "release:impala_training_complete:last"
FIRING = [each for each in SITUATIONS if each.fires]


def check(
    promtool: Path, situations: Sequence[Situation], directory: Path, files: Sequence[Path] = FILES
) -> str:
    """What promtool finds wrong; empty if in all of these situations the alert does what it should."""
    tests = [as_test(situation) for situation in situations]
    assert tests
    content = {"rule_files": [str(path) for path in files], "evaluation_interval": "1m", "tests": tests}
    return evaluate(promtool, directory, content)


def as_test(situation: Situation) -> dict[str, Any]:
    """As promtool takes it."""
    rule = BY_NAME[situation.alert]
    expected = {
        "exp_labels": {**RELEASE, **situation.labels, "severity": rule["labels"]["severity"]},
        "exp_annotations": {**rule["annotations"], "description": situation.fires},
    }
    return {
        "name": situation.name,
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in situation.series.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{situation.minute}m",
                "alertname": situation.alert,
                "exp_alerts": [expected] if situation.fires else [],
            }
        ],
    }


def evaluate(promtool: Path, directory: Path, content: Mapping[str, Any]) -> str:
    """What ``promtool test rules`` finds wrong."""
    path = directory / "test.yaml"
    path.write_text(yaml.safe_dump(content))
    done = run(promtool, "test", "rules", path)
    assert done.returncode in (0, 1), done.stderr
    return "" if done.returncode == 0 else done.stdout + done.stderr


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def when_complete(situation: Situation) -> Situation:
    """The same, after the end of the training."""
    return replace(situation, series={**situation.series, **one(COMPLETE, "1x60")}, fires="", labels={})


def of_two_lives(situation: Situation) -> bool:
    """Says itself what is complete and what is not."""
    return any(COMPLETE in name for name in situation.series)


def situations_of(alert: str) -> list[Situation]:
    return [each for each in SITUATIONS if each.alert == alert]


def test_promtool_accepts_every_file(require_tool: RequireTool) -> None:
    done = run(require_tool("promtool"), "check", "rules", *FILES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "duplicate" not in done.stdout


def test_there_is_one_file_for_each_alert_and_it_has_its_name() -> None:
    for path in FILES:
        if path.stem != "recording":
            (group,) = yaml.safe_load(path.read_text())["groups"]
            (rule,) = group["rules"]
            assert rule["alert"] == path.stem
    assert {rule["alert"] for rule in BY_NAME.values()} == {
        *("LearnerStalled", "LearnerStarved", "RolloutsDropped", "PolicyLagHigh", "ActorsMissing"),
        *("WeightsNotAdvancing", "WorldDegraded", "RegroupFlapping", "NonFiniteLoss", "CheckpointStale"),
        *("AuthFailures", "MetricsAbsent"),
    }


@pytest.mark.parametrize("alert", sorted(BY_NAME))
def test_an_alert_fires_when_it_should_and_only_then(
    alert: str, require_tool: RequireTool, tmp_path: Path
) -> None:
    wrong = check(require_tool("promtool"), situations_of(alert), tmp_path)
    assert not wrong, wrong


@pytest.mark.parametrize("alert", sorted(BY_NAME))
def test_an_alert_is_silent_once_training_is_complete_and_only_because_of_that(
    alert: str, require_tool: RequireTool, tmp_path: Path
) -> None:
    promtool = require_tool("promtool")
    complete = [when_complete(each) for each in situations_of(alert) if each.fires and not of_two_lives(each)]
    wrong = check(promtool, complete, tmp_path)
    assert not wrong, wrong

    rule = (ALERTS / f"{alert}.yaml").read_text()
    careless = tmp_path / "careless.yaml"
    careless.write_text(rule.replace("release:impala_training_complete:last == 1", "vector(1) == 2"))
    for each in complete:
        assert check(promtool, [each], tmp_path, [careless, ALERTS / "recording.yaml"]), each.name


@pytest.mark.parametrize(
    ("series", "remembered"),
    [
        pytest.param(COMPLETED, False, id="uninstalled"),
        pytest.param(
            {**COMPLETED, **one("up", "1x9 0x40", role="actor")}, True, id="ended, and still a target"
        ),
        pytest.param(
            {
                **COMPLETED,
                **one("up", "1x40", role="paramserver"),
                **one(STARTED, "0x40", role="paramserver"),
                **one(STARTED, "_x30 1800x9", role="actor"),
            },
            *(True,),
            id="only the learner was removed, and actors come and go",
        ),
        pytest.param(
            {**COMPLETED, **one("up", "_x20 0x40", role="paramserver")},
            *(False,),
            id="uninstalled, and another that does not start",
        ),
        pytest.param(REINSTALLED, False, id="installed again at once"),
        pytest.param(
            {**one(COMPLETE, "1x40"), **one(STARTED, "_x30 1800x9", role="paramserver")},
            *(True,),
            id="the parameter server was replaced",
        ),
    ],
)
def test_what_is_complete_is_remembered_as_long_as_it_is_the_same_release(
    series: Mapping[str, str], remembered: bool, require_tool: RequireTool, tmp_path: Path
) -> None:
    promtool = require_tool("promtool")
    for minute in (9, 31):
        here = remembered or minute == 9
        assert not recorded(promtool, tmp_path, REMEMBERED, series, 1 if here else None, minute)
        assert recorded(promtool, tmp_path, REMEMBERED, series, None if here else 1, minute)


def test_a_pod_that_was_replaced_counts_as_started_again(require_tool: RequireTool, tmp_path: Path) -> None:
    series = replaced(STARTED, 0, 480, 960, role="learner")
    name = "release_role:process_start_time_seconds:changes10m"
    assert not recorded(require_tool("promtool"), tmp_path, name, series, 1, 15, role="learner")


def recorded(
    promtool: Path,
    directory: Path,
    name: str,
    series: Mapping[str, str],
    value: float | None,
    minute: int,
    **labels: str,
) -> str:
    """What promtool finds wrong if at that minute ``value``, or nothing, is expected to be recorded."""
    inside = ",".join(f'{key}="{text}"' for key, text in {**RELEASE, **labels}.items())
    expected = [] if value is None else [{"labels": f"{name}{{{inside}}}", "value": value}]
    test = {
        "interval": "1m",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [{"expr": name, "eval_time": f"{minute}m", "exp_samples": expected}],
    }
    files = [str(path) for path in FILES]
    return evaluate(promtool, directory, {"rule_files": files, "evaluation_interval": "1m", "tests": [test]})


def test_a_wrong_threshold_or_description_would_be_found(require_tool: RequireTool, tmp_path: Path) -> None:
    rule = (ALERTS / "LearnerStarved.yaml").read_text()
    for right, wrong in (("> 0.5", "> 0.9"), ("> 0.5", "> 0.3"), ("humanizePercentage", "humanize")):
        broken = tmp_path / "broken.yaml"
        broken.write_text(rule.replace(right, wrong))
        files = [broken, ALERTS / "recording.yaml"]
        assert check(require_tool("promtool"), situations_of("LearnerStarved"), tmp_path, files)


def test_every_alert_has_a_situation_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    assert {each.alert for each in FIRING} == set(BY_NAME)
    assert {each.alert for each in SITUATIONS if not each.fires} == set(BY_NAME)


# ------------------------------------------------------------------------------------------------ names


def test_every_metric_that_a_rule_names_is_one_of_ours() -> None:
    assert not unknown_names(rule["expr"] for rule in rules())


def test_every_series_that_a_situation_names_is_one_of_ours() -> None:
    named = {name.partition("{")[0] for situation in SITUATIONS for name in situation.series}
    assert named <= known_names() | CHART


def test_a_misspelt_metric_is_found() -> None:
    query = 'sum by (impala_x) (rate(impala_learner_updtes_total{stage="impala_y"}[5m])) > bool up'
    assert names_in(query) == {"impala_learner_updtes_total", "up"}
    assert unknown_names([query]) == {"impala_learner_updtes_total"}
    assert unknown_names(["release:impala_actor_env_stps:rate2m or kube_pod_info"]) == {
        "release:impala_actor_env_stps:rate2m",
        "kube_pod_info",
    }


def test_every_metric_in_a_template_or_a_document_is_one_of_ours() -> None:
    """The scaling rule's query is in a template; the runbooks tell people what to look at."""
    paths = [*HELM.glob("templates/**/*"), RUNBOOKS]
    texts = {path: path.read_text() for path in paths if path.is_file()}
    found = {
        path: set(re.findall(r"(?<![\w:./-])(?:\w+:)?impala_[a-z][\w:]*", text))
        for path, text in texts.items()
    }
    assert any("impala_learner_stage_seconds_sum" in names for names in found.values())
    for path, names in found.items():
        assert names <= known_names(), f"{path.name} names {names - known_names()}"


def test_what_only_some_clusters_have_stands_before_an_or() -> None:
    texts = [path.read_text() for path in HELM.glob("templates/**/*.yaml")]
    texts += [rule["expr"] for rule in rules()]
    for text in texts:
        for metric in KUBERNETES & set(re.findall(r"kube_\w+", text)):
            assert re.search(r"\bor\b", text[text.index(metric) :]), text
        assert set(re.findall(r"\bkube_\w+", text)) <= KUBERNETES


# ---------------------------------------------------------------------------------------------- runbooks


def test_every_alert_has_its_paragraph_and_every_paragraph_its_alert() -> None:
    headings = re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), re.M)
    assert sorted(headings) == sorted(BY_NAME)
    paragraphs = re.split(r"^## \w+$", RUNBOOKS.read_text(), flags=re.M)[1:]
    for heading, paragraph in zip(headings, paragraphs, strict=True):
        assert len(paragraph.split()) > 40, heading
        for question in ("**Means.**", "**Look.**", "**Do.**"):
            assert question in paragraph, f"{heading} has no {question}"


@pytest.mark.parametrize("alert", sorted(BY_NAME))
def test_an_alert_says_how_bad_it_is_what_it_found_and_where_to_read_on(alert: str) -> None:
    rule = BY_NAME[alert]
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{alert.lower()}"
    assert "$value" in rule["annotations"]["description"]
    assert rule["annotations"]["summary"]


def test_what_a_runbook_says_to_type_is_complete_and_the_chart_takes_it(require_tool: RequireTool) -> None:
    commands = re.findall(r"helm upgrade [^`\n]*", RUNBOOKS.read_text())
    assert len(commands) >= 4
    for command in commands:
        given = re.fullmatch(r"helm upgrade pong \./helm --reset-then-reuse-values --set (\S+)", command)
        assert given, command
        done = run(require_tool("helm"), "template", "pong", HELM, "--set", given[1].replace("=N", "=3"))
        assert done.returncode == 0, done.stderr


def test_a_runbook_calls_objects_what_the_chart_calls_them(require_tool: RequireTool) -> None:
    done = run(require_tool("helm"), "template", "pong", HELM)
    objects = [each for each in yaml.safe_load_all(done.stdout) if each]
    names = {each["metadata"]["name"] for each in objects}
    for each in objects:
        if each["kind"] == "StatefulSet":
            pod = f"{each['metadata']['name']}-0"
            names.add(pod)
            claims = each["spec"].get("volumeClaimTemplates", [])
            names |= {f"{claim['metadata']['name']}-{pod}" for claim in claims}
    named = set(re.findall(r"[\w-]*pong-impala-\w[\w-]*", RUNBOOKS.read_text()))
    assert "data-pong-impala-learner-0" in named
    assert named <= names


# ------------------------------------------------------------------------------------------- the chart's


def rendered(helm: Path, template: str, *flags: str) -> Any:
    done = run(helm, "template", "pong", HELM, "--namespace", "ml", "--show-only", template, *flags)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def rule_object(helm: Path, *flags: str) -> Any:
    flags = ("--set", "monitoring.rules.enabled=true", *flags)
    return rendered(helm, "templates/monitoring/prometheusrule.yaml", *flags)


def test_the_chart_brings_the_very_rules_that_were_tested(require_tool: RequireTool, tmp_path: Path) -> None:
    found = rule_object(require_tool("helm"), "--set", "monitoring.rules.runbookBaseUrl=docs/runbooks.md")
    assert found["kind"] == "PrometheusRule"
    *groups, configured = found["spec"]["groups"]
    assert groups == [group for path in FILES for group in yaml.safe_load(path.read_text())["groups"]]
    assert len({group["name"] for group in found["spec"]["groups"]}) == len(groups) + 1
    assert {rule["record"] for rule in configured["rules"]} == CHART
    assert all(rule["labels"] == RELEASE for rule in configured["rules"])
    assert {name for rule in configured["rules"] for name in names_in(rule["expr"])} == KUBERNETES
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(found["spec"]))
    assert run(require_tool("promtool"), "check", "rules", path).returncode == 0


def desired(
    who: str, promtool: Path, directory: Path, spec: Mapping[str, Any], series: Mapping[str, str]
) -> str:
    """What promtool finds wrong if 12 actors, or learners, are expected to be recorded."""
    (directory / "rules.yaml").write_text(yaml.safe_dump(spec))
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"release:impala_{who}_desired:count",
                "eval_time": "5m",
                "exp_samples": [
                    {
                        "labels": f'release:impala_{who}_desired:count{{namespace="ml",release="pong"}}',
                        "value": 12,
                    }
                ],
            }
        ],
    }
    content = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    return evaluate(promtool, directory, content)


REPLICAS = 'kube_deployment_spec_replicas{namespace="ml",deployment="pong-impala-actor"}'
STATEFUL = 'kube_statefulset_replicas{{namespace="ml",statefulset="{}-impala-learner"}}'
OF_ANOTHER = 'kube_deployment_spec_replicas{namespace="ml",deployment="breakout-impala-actor"}'


@pytest.mark.parametrize(
    ("flags", "series"),
    [
        (("--set", "actors=12"), {}),
        (("--set", "actors=12"), {OF_ANOTHER: "3x9"}),
        (("--set", "actors=8"), {REPLICAS: "12x9", OF_ANOTHER: "3x9"}),
        (("--set", "autoscaling.enabled=true"), {REPLICAS: "12x9"}),
        (
            ("--set", "autoscaling.enabled=true"),
            {f'up{{namespace="ml",release="pong",role="actor",pod="{n}"}}': "1x9" for n in range(12)},
        ),
    ],
)
def test_as_many_actors_are_expected_as_the_deployment_asks_for(
    require_tool: RequireTool, tmp_path: Path, flags: tuple[str, ...], series: dict[str, str]
) -> None:
    found = rule_object(require_tool("helm"), *flags)
    wrong = desired("actors", require_tool("promtool"), tmp_path, found["spec"], series)
    assert not wrong, wrong
    other = {name: values.replace("12x", "11x") for name, values in series.items()}
    if other != series:
        assert desired("actors", require_tool("promtool"), tmp_path, found["spec"], other)


@pytest.mark.parametrize(
    ("flag", "series", "is_twelve"),
    [
        ("learners=12", {}, True),
        ("learners=11", {}, False),
        ("learners=1", {STATEFUL.format("pong"): "12x9", STATEFUL.format("breakout"): "3x9"}, True),
        ("learners=12", {STATEFUL.format("pong"): "1x9"}, False),
    ],
    ids=["the chart's", "another number", "after kubectl scale", "after kubectl scale down"],
)
def test_as_many_learners_are_expected_as_the_stateful_set_asks_for(
    require_tool: RequireTool, tmp_path: Path, flag: str, series: dict[str, str], is_twelve: bool
) -> None:
    found = rule_object(require_tool("helm"), "--set", flag)
    wrong = desired("learners", require_tool("promtool"), tmp_path, found["spec"], series)
    assert (not wrong) is is_twelve, wrong


def annotated(found: Any) -> dict[str, Mapping[str, str]]:
    """Of every alert."""
    rules = [rule for group in found["spec"]["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule["annotations"] for rule in rules if "alert" in rule}


def test_runbooks_may_be_anywhere(require_tool: RequireTool) -> None:
    base = "https://wiki.example.com/$1/impala"
    found = rule_object(require_tool("helm"), "--set", f"monitoring.rules.runbookBaseUrl={base}")
    urls = {alert: each["runbook_url"] for alert, each in annotated(found).items()}
    assert urls == {name: f"{base}#{name.lower()}" for name in BY_NAME}


def test_alerts_link_nowhere_if_nobody_says_where_the_runbooks_are(require_tool: RequireTool) -> None:
    found = rule_object(require_tool("helm"), "--set", "monitoring.rules.runbookBaseUrl=")
    tested = {name: dict(rule["annotations"]) for name, rule in BY_NAME.items()}
    for each in tested.values():
        each.pop("runbook_url")
    assert annotated(found) == tested


def test_only_one_release_of_several_need_carry_what_is_for_all(require_tool: RequireTool) -> None:
    carrier = rule_object(require_tool("helm"))
    other = rule_object(require_tool("helm"), "--set", "monitoring.rules.shared=false")
    assert len(carrier["spec"]["groups"]) > 1
    (configured,) = other["spec"]["groups"]
    assert configured == carrier["spec"]["groups"][-1]


def test_the_chart_brings_the_very_dashboards_for_grafanas_sidecar(require_tool: RequireTool) -> None:
    flags = ("--set", "monitoring.dashboards.enabled=true")
    found = rendered(require_tool("helm"), "templates/monitoring/dashboards.yaml", *flags)
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = {path.name: json.loads(path.read_text()) for path in HELM.glob("dashboards/*.json")}
    assert {name: json.loads(text) for name, text in found["data"].items()} == files
    assert files
