"""The query by which KEDA chooses the number of actors, answered by Prometheus's own engine (promtool)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.ops.metrics import ROLES, metric_names
from tests.chart.rendering import CASES, Object, as_json, find, refusal, render
from tests.conftest import find_tool

OURS = 'namespace="there", release="impala"'
SEATS = 16
STEP_S = 15


def scaled_object() -> Object:
    spec = find(render(*CASES["autoscaling"]), "ScaledObject", "impala-actor")["spec"]
    assert isinstance(spec, dict)
    return spec


def query() -> str:
    (trigger,) = scaled_object()["triggers"]
    return str(trigger["metadata"]["query"])


def fleet(
    *, waiting: float = 0.0, blocked: float = 0.0, stale: float = 0.0, rate: float = 100.0, complete: int = 0
) -> list[dict[str, str]]:
    """Series of a release with 16 seats, by shares of time and of rollouts. Another one beside it starves."""

    def grows(series: str, per_s: float) -> dict[str, str]:
        return {"series": series, "values": f"0+{per_s * STEP_S:g}x40"}

    def stays(series: str, value: float) -> dict[str, str]:
        return {"series": series, "values": f"{value:g}x40"}

    other = OURS.replace("impala", "other")
    return [
        stays(f'impala_paramserver_seats{{{OURS}, role="paramserver", pod="p"}}', SEATS),
        stays(f'impala_paramserver_seats{{{OURS}, role="relay", pod="r"}}', SEATS + 3),
        grows(f'impala_learner_stage_seconds_sum{{{OURS}, stage="wait", pod="l"}}', waiting),
        grows(f'impala_learner_stage_seconds_sum{{{OURS}, stage="forward_backward", pod="l"}}', 1 - waiting),
        *(
            grows(f'impala_actor_seconds_total{{{OURS}, stage="{stage}", pod="{pod}"}}', share)
            for pod in ("a", "b")
            for stage, share in (("send_blocked", blocked), ("env", 1 - blocked))
        ),
        grows(f'impala_learner_rollouts_total{{{OURS}, result="ok", pod="l"}}', rate * (1 - stale)),
        grows(f'impala_learner_rollouts_total{{{OURS}, result="stale", pod="l"}}', rate * stale),
        stays(f'impala_training_complete{{{OURS}, pod="l"}}', complete),
        stays(f'impala_paramserver_seats{{{other}, role="paramserver", pod="q"}}', 500),
        grows(f'impala_learner_stage_seconds_sum{{{other}, stage="wait", pod="m"}}', 1),
    ]


@pytest.mark.parametrize(
    ("what", "series", "wanted"),
    [
        ("all is well", fleet(), 16),
        ("the learner waits half of its time", fleet(waiting=0.5), 32),
        ("the learner does nothing but wait", fleet(waiting=1.0), 32),
        ("actors are blocked a quarter of their time", fleet(blocked=0.25), 12),
        ("actors are always blocked", fleet(blocked=1.0), 8),
        ("a quarter of the rollouts is stale", fleet(stale=0.25), 12),
        ("nothing has arrived yet", fleet(rate=0.0), 16),
        ("training is complete", fleet(complete=1), 0),
    ],
)
def test_actors_wanted(what: str, series: list[dict[str, str]], wanted: float, tmp_path: Path) -> None:
    rules = {"groups": [{"name": "keda", "rules": [{"record": "wanted", "expr": query()}]}]}
    expected: dict[str, Any] = {
        "expr": "round(wanted, 0.001)",
        "eval_time": "9m",
        "exp_samples": [{"labels": "{}", "value": wanted}],
    }
    unit = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [{"interval": f"{STEP_S}s", "input_series": series, "promql_expr_test": [expected]}],
    }
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(unit))

    command = [str(find_tool("promtool")), "test", "rules", str(tmp_path / "test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, f"{what}: {done.stdout}{done.stderr}"


def test_the_query_asks_for_metrics_that_there_are() -> None:
    named = set(re.findall(r"impala_\w+", query()))

    assert len(named) == 5
    assert named <= set().union(*(metric_names(role) for role in ROLES))


def test_keda_stays_between_the_bounds_and_has_a_number_for_when_prometheus_is_away() -> None:
    spec = scaled_object()

    assert spec["scaleTargetRef"] == {"name": "impala-actor"}
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (4, 256)
    assert spec["fallback"] == {"failureThreshold": 3, "replicas": 16}
    assert spec["triggers"][0]["metricType"] == "AverageValue"
    assert spec["triggers"][0]["metadata"]["threshold"] == "1"


def test_no_more_than_the_most_may_be_the_least() -> None:
    on = "autoscaling.enabled=true,autoscaling.maxActors=8,autoscaling.minActors"

    assert "autoscaling.minActors = 9: allowed is autoscaling.maxActors = 8 at most" in refusal(
        "--set", f"{on}=9"
    )
    assert render("--set", f"{on}=8")


def test_keda_proves_who_it_is_where_prometheus_wants_to_know() -> None:
    known = {"enabled": True, "authModes": "bearer", "authenticationRef": {"name": "prometheus"}}
    spec = find(render(*as_json(autoscaling=known)), "ScaledObject", "impala-actor")["spec"]
    (trigger,), (anonymous,) = spec["triggers"], scaled_object()["triggers"]

    assert trigger["authenticationRef"] == {"name": "prometheus"}
    assert trigger["metadata"]["authModes"] == "bearer"
    assert trigger["metadata"].keys() - anonymous["metadata"].keys() == {"authModes"}
    assert "authenticationRef" not in anonymous
