"""The documentation names real files, real commands and real knobs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from services import config as configuration
from services.cli import main
from services.local import evaluate
from services.rl.tasks import tasks_of

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")


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


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")


def commands(names: str) -> list[tuple[str, list[str]]]:
    """(command, words after it) of all in the README, in consoles and in the text."""
    found = re.findall(rf"^(?:\$|host-\w\$) impala ({names}) +([^#\n]*)", readme(), re.M)
    found += re.findall(rf"`impala ({names}) ([^`]*)`", readme())
    return [(command, shlex.split(words)) for command, words in found]


def test_every_training_command_in_the_readme_is_a_valid_configuration_whose_tasks_are_all_played() -> None:
    found = commands("train|actor|learner|paramserver|evaluator")
    assert len(found) >= 20
    for _, words in found:
        for own in ("--resume", "--run-dir", "--actor-id", "--learner-id"):  # of the command, not of the run
            if own in words:
                del words[words.index(own) : words.index(own) + 2]
        assert tasks_of(configuration.load(flags=words))


def test_every_evaluation_in_the_readme_is_one_that_the_command_understands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Path, Sequence[str]]] = []

    def played(target: Path, flags: Sequence[str], options: evaluate.Options) -> int:
        asked.append((target, flags))
        return 0

    monkeypatch.setattr(evaluate, "evaluate", played)
    found = commands("evaluate")
    assert len(found) >= 4
    for _, words in found:
        assert main(["evaluate", *words]) == 0
    assert [str(target) for target, _ in asked] == [words[0] for _, words in found]
    for _, flags in asked:  # what is left are keys of the configuration
        configuration.load(flags=flags)


def test_every_command_of_the_seeds_has_an_equivalent() -> None:
    table = readme().partition("### Coming from")[2].partition("\n\nOur steps")[0]
    _, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert len(rows) >= 10
    keys = {key for key, _, _ in configuration.describe()}
    for theirs, ours in rows:
        if (
            re.search(r"`impala \w+ ", ours) or "](#" in ours
        ):  # a command, which is tested above, or a section
            continue
        flags = re.findall(r"`--([\w.]+)", ours)
        assert flags, f"nothing to type beside {theirs}"
        assert set(flags) <= keys, f"unknown beside {theirs}: {set(flags) - keys}"


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
