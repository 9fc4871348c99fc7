"""What is made from values.yaml is up to date, and values.yaml explains everything that it holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.chart.rendering import CHART, EXAMPLES


def generate(chart: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(chart / "generate.py"), *arguments]
    root = CHART.parent  # where `services` is
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60, check=False)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    chart = tmp_path / "helm"
    chart.mkdir()
    for name in ("generate.py", "values.yaml", "values.schema.json", "README.md"):
        shutil.copy(CHART / name, chart / name)
    return chart


def test_schema_and_table_are_up_to_date() -> None:
    done = generate(CHART, "--check")

    assert done.returncode == 0, done.stderr


def test_a_changed_default_is_found_out_of_date_and_put_right(copied: Path) -> None:
    values = copied / "values.yaml"
    values.write_text(values.read_text().replace("size: 5Gi", "size: 6Gi"))

    checked = generate(copied, "--check")
    written = generate(copied)

    assert checked.returncode == 1
    assert "helm/README.md is out of date: run `make chart`" in checked.stderr
    assert "values.schema.json" not in checked.stderr
    assert written.returncode == generate(copied, "--check").returncode == 0
    assert '| `learner.persistence.size` | `"6Gi"` |' in (copied / "README.md").read_text()


def test_a_value_without_an_explanation_is_refused(copied: Path) -> None:
    with (copied / "values.yaml").open("a") as values:
        values.write("mystery: 1\n")

    done = generate(copied)

    assert done.returncode != 0
    assert "mystery has no `# --` comment" in done.stderr


def test_every_value_has_a_row_of_its_own() -> None:
    rows = {
        line.split("`")[1]
        for line in (CHART / "README.md").read_text().splitlines()
        if line.startswith("| `")
    }
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def explained(path: str, value: object) -> bool:
        if path in rows:
            return True
        assert isinstance(value, dict), path
        return all(explained(f"{path}.{key}".lstrip("."), each) for key, each in value.items())

    assert explained("", values)
    assert len(rows) > 80


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_begins_with_what_it_is_and_how_to_use_it(example: Path) -> None:
    opening = example.read_text().partition("\nactors:")[0].splitlines()

    assert all(line.startswith("#") for line in opening)
    assert any(f"impala ./helm -f helm/examples/{example.name}" in line for line in opening)


def test_a_package_of_the_chart_holds_what_helm_needs_and_no_more(tmp_path: Path) -> None:
    import tarfile

    from tests.chart.rendering import helm

    done = helm("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "impala-0.1.0.tgz") as package:
        names = {name.removeprefix("impala/") for name in package.getnames()}

    assert {"Chart.yaml", "values.yaml", "values.schema.json", "README.md", "templates/NOTES.txt"} <= names
    assert not {
        name for name in names if name.startswith("examples") or name.endswith(".py") or "cache" in name
    }
