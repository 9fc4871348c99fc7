"""The dashboard is well made and asks only for what there is; the integration tests ask a Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.dashboard import COLUMNS, DASHBOARD, expanded, panels
from tests.chart.promql import HELM, known_names, names_in, unknown_names
from tests.conftest import RequireTool

CONTENT = json.loads(DASHBOARD.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in CONTENT["panels"] if panel["type"] != "row"]
DOCS = HELM.parent / "docs"


def title_of(panel: dict[str, Any]) -> str:
    return str(panel["title"])


@pytest.mark.parametrize("panel", PANELS, ids=title_of)
def test_a_panel_says_what_it_shows_in_which_unit_and_which_line_is_which(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 20
    assert panel["description"].endswith(".")
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"][0]["value"] is None
    legends = [target["legendFormat"] for target in panel["targets"]]
    assert all(legends)
    assert len(set(legends)) == len(legends)
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("panel", PANELS, ids=title_of)
def test_a_panel_asks_for_metrics_that_exist_and_only_of_the_release_that_is_chosen(
    panel: dict[str, Any],
) -> None:
    for target in panel["targets"]:
        query = target["expr"]
        assert names_in(query)
        assert not unknown_names([query])
        selectors = re.findall(r"\{[^}]*\}", query)
        assert len(selectors) == len(re.findall("|".join(map(re.escape, names_in(query))), query))
        for selector in selectors:
            assert 'namespace=~"$namespace",release=~"$release"' in selector
        used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        grouped = re.search(r"\bby \(([^)]*)\)", query)
        assert used <= set(re.split(r",\s*", grouped[1]) if grouped else ()), (
            "a legend names a label that is gone"
        )


def test_what_every_actor_counts_is_asked_for_as_it_was_recorded() -> None:
    """Or a dashboard of a thousand actors would read a thousand series for each panel."""
    named = {name for panel in PANELS for target in panel["targets"] for name in names_in(target["expr"])}
    assert any("impala_actor_" in name for name in named)
    per_actor = [
        name for name in named if name.startswith(("impala_actor_", "process_", "impala_cpu_", "up"))
    ]
    assert not per_actor


def test_every_recorded_series_is_used() -> None:
    texts = [
        path.read_text()
        for path in (*HELM.glob("alerts/*.yaml"), DASHBOARD, *HELM.glob("templates/monitoring/*.yaml"))
    ]
    for name in known_names():
        if re.match(r"release\w*:", name):
            times = sum(len(re.findall(re.escape(name) + r"(?![\w:])", text)) for text in texts)
            assert times >= 2, name


def test_no_two_panels_are_in_the_same_place_or_have_the_same_number_or_title() -> None:
    everything = CONTENT["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in everything:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= COLUMNS
    for one, other in combinations([panel["gridPos"] for panel in everything], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_the_dashboard_has_what_was_asked_for() -> None:
    kinds = {panel.title: panel.kind for panel in panels()}
    assert kinds["Policy lag"] == "heatmap"
    assert kinds["Return against frames"] == "xychart"
    assert {panel.title for panel in panels() if panel.stacked} >= {
        "Where the learner's time goes",
        "Where the actors' time goes",
    }
    variables = {variable["name"]: variable for variable in CONTENT["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "release"]
    assert CONTENT["uid"] == "impala"
    assert CONTENT["schemaVersion"] >= 39


def test_one_release_is_shown_and_never_several_as_if_they_were_one() -> None:
    """Each panel adds up or takes the largest: of two releases, that would be no figure of either."""
    variables = {variable["name"]: variable for variable in CONTENT["templating"]["list"]}
    for name in ("namespace", "release"):
        assert not variables[name]["includeAll"]
        assert not variables[name]["multi"]
        assert not variables[name]["current"]
    assert 'namespace=~"$namespace"' in variables["release"]["query"]["query"]


def test_variables_become_what_grafana_makes_of_them() -> None:
    query = 'rate(x{release=~"$release"}[$__rate_interval])'
    assert expanded(query, scrape_s=15, step_s=5) == 'rate(x{release=~""}[60000ms])'
    assert expanded(query, scrape_s=15, step_s=120, release="pong") == 'rate(x{release=~"pong"}[135000ms])'
    with pytest.raises(KeyError):
        expanded("x[$__interval_of_nothing]", scrape_s=1, step_s=1)


# ------------------------------------------------------------------------------------------- scraping


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-kubernetes.yml"])
def test_prometheus_accepts_the_documented_configurations_with_all_of_our_rules(
    name: str, require_tool: RequireTool, tmp_path: Path
) -> None:
    config = yaml.safe_load((DOCS / name).read_text())
    (pattern,) = config["rule_files"]
    assert (DOCS / pattern).resolve() == HELM / "alerts" / "*.yaml"
    config["rule_files"] = [str((DOCS / pattern).resolve())]
    for job in config["scrape_configs"]:
        job.pop("kubernetes_sd_configs", None)  # Debian's Prometheus is built without
    path = tmp_path / name
    path.write_text(yaml.safe_dump(config))
    command = [str(require_tool("promtool")), "check", "config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(list(HELM.glob('alerts/*.yaml')))} rule files found" in done.stdout


def test_the_port_that_is_scraped_is_the_one_that_every_pod_has() -> None:
    (job,) = yaml.safe_load((DOCS / "prometheus-kubernetes.yml").read_text())["scrape_configs"]
    (port,) = [rule["regex"] for rule in job["relabel_configs"] if rule.get("action") == "keep"]
    templates = [*HELM.glob("templates/*/statefulset.yaml"), *HELM.glob("templates/*/deployment.yaml")]
    assert len(templates) == 5
    for template in templates:
        assert f"name: {port}, containerPort" in template.read_text()
