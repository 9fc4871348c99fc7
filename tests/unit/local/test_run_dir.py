"""The directory of a run: its name, its lock, and what a resumed run finds in it."""

import os
from datetime import datetime
from pathlib import Path

import pytest

from services.config import ConfigError, RunConfig
from services.local.run_dir import open_run_dir, resumed_config, with_new_run_dir


def test_a_new_run_gets_a_directory_of_its_own(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    moment = datetime(2026, 11, 20, 14, 2, 36)
    pong = config.model_copy(update={"env": config.env.model_copy(update={"id": "ALE/Pong-v5"})})
    assert with_new_run_dir(pong, moment).run_dir == Path("runs/20261120-140236-Pong-v5")
    Path("runs/20261120-140236-Pong-v5").mkdir(parents=True)
    assert with_new_run_dir(pong, moment).run_dir == Path("runs/20261120-140236-Pong-v5-2")


@pytest.mark.parametrize("env_id", ["my.module:factory", "../../etc", "a b/ü", "::"])
def test_no_environment_id_leads_out_of_the_runs(config: RunConfig, env_id: str) -> None:
    odd = config.model_copy(update={"env": config.env.model_copy(update={"id": env_id})})
    run_dir = with_new_run_dir(odd, datetime(2026, 11, 20, 14, 2, 36)).run_dir
    assert run_dir.parent == Path("runs")


def test_a_new_run_refuses_the_directory_of_another(config: RunConfig) -> None:
    with open_run_dir(config, resume=False):
        pass
    with (
        pytest.raises(ConfigError, match=f"already holds a run; continue it with --resume {config.run_dir}"),
        open_run_dir(config, resume=False),
    ):
        pass


def test_a_new_run_refuses_a_directory_with_other_things_in_it(config: RunConfig) -> None:
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty"), open_run_dir(config, resume=False):
        pass
    assert [path.name for path in config.run_dir.iterdir()] == ["thesis.tex"]


def test_a_run_directory_that_cannot_be_made_is_a_clear_error(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    impossible = config.model_copy(update={"run_dir": tmp_path / "file" / "run"})
    with (
        pytest.raises(ConfigError, match=r"run_dir = .*cannot be written \(Not a directory\)"),
        open_run_dir(impossible, resume=False),
    ):
        pass


def test_two_launchers_never_share_a_run_directory(config: RunConfig) -> None:
    with (
        open_run_dir(config, resume=False),
        pytest.raises(ConfigError, match=f"in use by another launcher \\(process {os.getpid()}\\)"),
        open_run_dir(config, resume=True),
    ):
        pass


def test_a_resumed_run_has_its_configuration_with_flags_over_it(config: RunConfig) -> None:
    with open_run_dir(config, resume=False):
        pass
    resumed = resumed_config(config.run_dir, {"IMPALA__SEED": "7"}, ["--total_steps", "2000"])
    assert resumed == config.model_copy(update={"seed": 7, "total_steps": 2000})
    with open_run_dir(resumed, resume=True):
        pass
    assert resumed_config(config.run_dir, {}, []) == resumed


def test_a_run_directory_that_was_moved_is_resumed_where_it_is(config: RunConfig, tmp_path: Path) -> None:
    with open_run_dir(config, resume=False):
        pass
    moved = config.run_dir.rename(tmp_path / "moved")
    assert resumed_config(moved, {}, []).run_dir == moved


def test_a_resumed_run_keeps_its_preset(config: RunConfig) -> None:
    with open_run_dir(config, resume=False):
        pass
    with pytest.raises(ConfigError, match="preset = 'torchbeast'"):
        resumed_config(config.run_dir, {}, ["--preset", "torchbeast"])


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("--env", "recall", "env.id = 'recall': the run in {} began with 'catch'"),
        ("--env.kwargs", "{rows: 5}", "env.kwargs = {{'rows': 5}}: the run in {} began with {{}}"),
        ("--network", "nature", "network.name = 'nature': the run in {} began with 'auto'"),
        ("--network.hidden_size", "64", "network.hidden_size = 64: the run in {} began with 128"),
        ("--optimiser.name", "adam", "optimiser.name = 'adam': the run in {} began with 'rmsprop'"),
        (
            "--optimiser.rmsprop_momentum",
            "0.9",
            "optimiser.rmsprop_momentum = 0.9: the run in {} began with 0.0",
        ),
        ("--popart.min_sigma", "0.01", "popart.min_sigma = 0.01: the run in {} began with 0.0001"),
        (
            "--tasks",
            "catch",
            "tasks = [{{'id': 'catch', 'name': None, 'kwargs': {{}}}}]: the run in {} began with []",
        ),
    ],
)
def test_a_resumed_run_keeps_what_its_checkpoints_depend_on(
    config: RunConfig, flag: str, value: str, line: str
) -> None:
    with open_run_dir(config, resume=False):
        pass
    with pytest.raises(ConfigError) as error:
        resumed_config(config.run_dir, {}, [flag, value])
    assert str(error.value) == line.format(config.run_dir)
    assert resumed_config(config.run_dir, {}, []) == config


@pytest.mark.parametrize("name", ["logs", "checkpoints"])
def test_a_file_where_a_directory_has_to_be_is_a_clear_error(config: RunConfig, name: str) -> None:
    with open_run_dir(config, resume=False):
        (config.run_dir / name).rmdir()
        (config.run_dir / name).touch()
    with (
        pytest.raises(ConfigError, match=f"cannot be written .*{name}: File exists"),
        open_run_dir(config, resume=True),
    ):
        pass


def test_resuming_what_is_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--resume {tmp_path}: holds no run"):
        resumed_config(tmp_path, {}, [])


def test_resuming_forgets_the_snapshot_of_the_parameter_server_and_keeps_checkpoints(
    config: RunConfig,
) -> None:
    with open_run_dir(config, resume=False):
        (config.run_dir / "paramserver").mkdir()
        (config.run_dir / "paramserver" / "snapshot").touch()
        (config.run_dir / "checkpoints" / "7").touch()
    with open_run_dir(config, resume=True):
        pass
    assert not (config.run_dir / "paramserver").exists()
    assert (config.run_dir / "checkpoints" / "7").exists()
