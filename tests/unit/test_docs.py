"""The documentation names real files, real commands and real knobs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from services import config as configuration
from services.cli import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:services|benchmarks|tests|docs|helm)/[\w./-]*)`", text))
    named |= {link for link in re.findall(r"\]\(([\w./-]+)\)", text) if "://" not in link}
    assert named, "the pattern finds nothing"
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing, f"{document} names {missing}"


def test_the_road_of_a_rollout_passes_through_every_pod_and_both_libraries() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    road = text.partition("## The road of one rollout")[2].partition("\n## ")[0]
    for stop in ("rl/envs", "actor/loop", "wire/codec", "learner/trainer", "rl/vtrace", "paramserver/store"):
        assert f"services/{stop}" in road


def test_every_training_command_in_the_readme_is_a_valid_configuration() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    pods = "(train|actor|learner|paramserver|evaluator)"
    commands = re.findall(rf"^(?:\$|host-\w\$) impala {pods} +([^#\n]*)", text, re.M)
    commands += re.findall(rf"`impala {pods} ([^`]*)`", text)
    assert len(commands) >= 20
    for _, flags in commands:
        words = shlex.split(flags)
        for own in ("--resume", "--run-dir", "--actor-id", "--learner-id"):  # of the command, not of the run
            if own in words:
                del words[words.index(own) : words.index(own) + 2]
        configuration.load(flags=words)


def test_every_knob_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for key, _, text in configuration.describe():
        assert len(text) > 5, f"{key} has no documentation"
    assert main(["config", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key, _, _ in configuration.describe())


def test_every_dependency_has_its_reason() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = re.findall(r'^    "([A-Za-z0-9-]+)[>=\[]', project, re.M)
    assert "torch" in names
    reasons = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").lower()
    missing = [name for name in names if name.lower() not in reasons]
    assert not missing, f"CONTRIBUTING.md gives no reason for {missing}"
