"""The `impala` command, called as a function, and as a process where it matters what it imports."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from services import cli, config
from services.config import RunConfig
from services.local import run_dir
from services.local import train as training


class FakeTrain:
    """Stands where the launcher is."""

    def __init__(self) -> None:
        self.config: RunConfig | None = None
        self.resume = self.plain = False

    def __call__(self, run_config: RunConfig, *, resume: bool, plain: bool) -> int:
        self.config, self.resume, self.plain = run_config, resume, plain
        return 7


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTrain:
    fake = FakeTrain()
    monkeypatch.setattr(training, "train", fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    """What a command that must fail with exit code 2 writes to stderr."""

    def run(argv: Sequence[str]) -> str:
        assert cli.main(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return run


Complaint = Callable[[Sequence[str]], str]


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    output = capsys.readouterr().out
    for command in ("train", "evaluate", "config", "keygen", *cli.PODS, *cli.CLUSTER):
        assert f"\n  {command} " in output


@pytest.mark.parametrize("command", ["train", "evaluate", "config", "keygen", *cli.PODS, *cli.CLUSTER])
def test_every_command_has_help_that_fits_a_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([command, "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: impala {command}")
    prose = [line for line in output.splitlines() if " = " not in line]
    assert max(map(len, prose)) <= 110


def test_help_on_the_configuration_lists_every_key_alias_and_preset(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.main(["config", "--help"])
    output = capsys.readouterr().out
    for key, default, _ in config.describe():
        assert f"  {key} = {default}\n" in output
    for alias, key in config.ALIASES.items():
        assert f"--{alias} " in output
        assert f"--{key}\n" in output
    assert all(preset in output for preset in config.PRESETS)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["keygen", "--help"],
        ["config"],
        ["actor", "--help"],
        ["status", "--help"],
        ["metrics", "--help"],
    ],
)
def test_commands_that_only_tell_import_nothing_heavy(argv: list[str]) -> None:
    program = (
        "import sys; from services import cli; cli.main(sys.argv[1:]); "
        "names = ('torch', 'zmq', 'numpy', 'gymnasium', 'rich', 'kubernetes'); "
        "heavy = [name for name in names if name in sys.modules]; "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_num_envs_is_another_key_of_each_command_which_their_helps_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command, own in (("train", "actor.num_envs"), ("evaluate", "evaluator.num_envs")):
        cli.main([command, "--help"])
        text = capsys.readouterr().out.partition("  --num-envs ")[2]
        assert own in text.partition("\n")[0]
        assert "actor.num_envs" in text
        assert "evaluator.num_envs" in text


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("impala ")


def test_output_into_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "services.cli", "config", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


# -------------------------------------------------------------------------------------------- config


def test_config_prints_the_effective_configuration_as_a_file_that_can_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("seed: 5\n")
    assert cli.main(["config", "--config", str(tmp_path / "run.yaml"), "--learning-rate", "1e-5"]) == 0
    output = capsys.readouterr().out
    effective = config.validate(yaml.safe_load(output))
    assert (effective.seed, effective.optimiser.learning_rate) == (5, 1e-5)


def test_a_printed_configuration_can_be_used_for_many_runs(
    train: FakeTrain, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli.main(["config", "--env", "catch"])
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    cli.main(["train", "--config", "my.yaml"])
    assert train.config is not None
    assert train.config.run_dir.name.endswith("-catch")
    cli.main(["config", "--run_dir", "here"])
    assert yaml.safe_load(capsys.readouterr().out)["run_dir"] == "here"


def test_config_reads_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMPALA__SEED", "9")
    cli.main(["config"])
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 9


def test_config_prints_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(config.schema()))


# --------------------------------------------------------------------------------------------- train


def test_train_gets_a_new_directory_and_its_exit_code_is_the_commands(train: FakeTrain) -> None:
    assert cli.main(["train", "--env", "catch", "--total_steps", "2000", "--plain"]) == 7
    assert train.config is not None
    assert train.config.run_dir.parent == Path("runs")
    assert train.config.run_dir.name.endswith("-catch")
    assert train.config.total_steps == 2000
    assert (train.resume, train.plain) == (False, True)


@pytest.mark.parametrize("flag", ["--run-dir", "--run_dir"])
def test_train_takes_the_directory_it_is_given(train: FakeTrain, flag: str) -> None:
    cli.main(["train", flag, "here"])
    assert train.config is not None
    assert train.config.run_dir == Path("here")


def test_train_resumes_with_the_configuration_of_the_run(train: FakeTrain, tmp_path: Path) -> None:
    with run_dir.open_run_dir(config.load(flags=["--seed", "4", "--run_dir", "old"]), resume=False):
        pass
    assert cli.main(["train", "--resume=old", "--total_steps", "60000000"]) == 7
    assert train.config is not None
    assert (train.config.seed, train.config.total_steps, train.config.run_dir) == (4, 60_000_000, Path("old"))
    assert train.resume


def test_an_interrupt_before_anything_has_started_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(run_config: RunConfig, *, resume: bool, plain: bool) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr() == ("", "")


def test_modules_where_the_user_is_are_found_after_all_others(
    train: FakeTrain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    cli.main(["train"])
    assert sys.path[-1] == str(tmp_path)


# ------------------------------------------------------------------------------------------ mistakes


OTHERS = ", ".join([*cli.PODS, *cli.CLUSTER])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], "impala: unknown command 'trian'; did you mean train?\n"),
        (
            ["xyz"],
            f"impala: unknown command 'xyz'; allowed are train, evaluate, config, keygen, {OTHERS}\n",
        ),
        (["train", "--batch_szie", "3"], "impala: --batch_szie: unknown key; did you mean batch_size?\n"),
        (["train", "--resum", "x"], "impala: --resum: unknown flag; did you mean --resume?\n"),
        (["train", "--plan"], "impala: --plan: unknown flag; did you mean --plain?\n"),
        (["config", "--conf", "x"], "impala: --conf: unknown flag; did you mean --config?\n"),
        (["train", "--config"], "impala: --config: a value is missing\n"),
        (["train", "--config", "--plain"], "impala: --config: a value is missing\n"),
        (["train", "--resume="], "impala: --resume: a value is missing\n"),
        (
            ["train", "--resume", "/nowhere"],
            "impala: --resume /nowhere: holds no run; allowed is a directory with a config.json\n",
        ),
        (
            ["config", "--config", "/nowhere"],
            "impala: configuration file /nowhere: No such file or directory\n",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv: list[str], line: str, complaint: Complaint) -> None:
    assert complaint(argv) == line


def test_resume_and_config_are_not_for_the_same_run(complaint: Complaint) -> None:
    assert complaint(["train", "--resume", "a", "--config", "b"]).count("\n") == 1


def test_several_mistakes_are_a_line_each(complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("batch_size: 0\nseed: -1\n")
    lines = complaint(["config", "--config", str(tmp_path / "run.yaml")]).splitlines()
    assert [line.partition(" = ")[0] for line in lines] == ["impala: seed", "impala: batch_size"]


def test_a_wrong_environment_is_a_mistake_and_leaves_nothing_behind(
    complaint: Complaint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert complaint(["train", "--env", "ALE/Pnog-v5", "--plain"]).startswith(
        "impala: env.id = 'ALE/Pnog-v5'"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("role", ["actor", "learner", "paramserver", "evaluator"])
def test_the_help_of_a_pod_names_all_flags_of_its_own(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([role, "--help"])
    output = capsys.readouterr().out
    assert all(flag in output for flag in ("--config FILE", f"--{role}-id NAME", "--parent-pid PID"))


@pytest.mark.parametrize("role", ["actor", "learner", "paramserver", "evaluator"])
def test_a_pod_refuses_a_wrong_configuration_with_exit_code_2(role: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.cli", role, "--batch_size", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--batch_size = '0'" in result.stderr
    assert "Traceback" not in result.stderr
