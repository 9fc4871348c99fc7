"""The README's commands are taken as they stand: by the schema, and by the templates."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.chart.rendering import CHART, refusal, render

TEXT = (CHART / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    command.replace("\\\n", " ").removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    for command in re.findall(r"^\$ (?:.*\\\n)*.*", block, re.MULTILINE)
]
OF_THE_CHART = [command for command in COMMANDS if re.match(r"helm (install|upgrade) \S+ \./helm ", command)]


def settings(command: str) -> list[str]:
    """Its --set flags, with their values."""
    words = shlex.split(command)
    return [part for at, word in enumerate(words) if word == "--set" for part in words[at : at + 2]]


@pytest.mark.parametrize("command", OF_THE_CHART)
def test_the_chart_takes_every_command(command: str) -> None:
    assert settings(command)
    assert render(*settings(command))


def test_commands_are_found_and_a_misspelt_value_would_be() -> None:
    assert len(OF_THE_CHART) >= 8
    assert any(command.count("--set ") > 2 for command in OF_THE_CHART)  # over several lines
    assert "at '/actor'" in refusal(*settings("helm install x --set actor=3"))


def test_upgrades_take_the_values_that_a_newer_chart_brings() -> None:
    upgrades = [command for command in COMMANDS if command.startswith("helm upgrade")]

    assert upgrades
    assert all("--reset-then-reuse-values" in command for command in upgrades)


def test_the_first_command_builds_images_that_hundreds_of_nodes_can_pull() -> None:
    assert COMMANDS[0] == "make image TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu"
    (gpu,) = [command for command in COMMANDS if "LEARNER_TORCH_INDEX_URL" in command]
    assert f"#   {gpu}\n" in (CHART / "examples" / "gpu.yaml").read_text()
