"""`impala evaluate`, called as a user calls it, on checkpoints whose returns follow from their weights."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from services import cli
from services import config as configuration
from services.evaluator.games import Games
from services.learner.checkpoint import CheckpointStore
from services.ops.metrics import LearnerMetrics
from tests.unit.evaluator.homemade import NUM_STEPS
from tests.unit.learner.waiting import until

HOMEMADE = "tests.unit.evaluator.homemade"
DIARY = f"{HOMEMADE}:diary"
ALL_ONES = 2**NUM_STEPS - 1
START_S = 60.0
STOP_S = 15.0
TASKS = [{"id": DIARY, "name": "two"}, {"id": DIARY, "name": "three", "kwargs": {"num_actions": 3}}]
TWO_TASKS = ("--tasks", json.dumps(TASKS))
EXACT = ("--network", f"{HOMEMADE}:constant", "--actor.precision", "float32", "--evaluator.num_envs", "2")


def save(
    run_dir: Path, *flags: str, steps: int = 640, odds: float = 1e9, mean_return: float | None = None
) -> Path:
    """A checkpoint of a policy that draws action 1 ``odds`` times as often as each other one."""
    config = configuration.load(flags=["--env", DIARY, *EXACT, "--run_dir", str(run_dir), *flags])
    network = Games(config).network
    weights = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    weights["policy.bias"][1] = math.log(odds)
    metrics = LearnerMetrics(CollectorRegistry())
    store = CheckpointStore(run_dir / "checkpoints", 3, metrics)
    store.save(
        trainer={"network": weights, "version": steps // 640, "steps": steps},
        episodes={"mean_return": mean_return},
        config=configuration.dump(config),
        complete=False,
    )
    until(lambda: not store.busy, "the checkpoint is written")
    return run_dir / "checkpoints" / f"step-{steps:012d}.pt"


@pytest.fixture(autouse=True)
def _logs_end_with_the_test() -> Iterator[None]:
    """The command sends them to a stderr that is closed then."""
    before = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = before


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def evaluate(*argv: str | Path) -> int:
    return cli.main(["evaluate", *map(str, argv)])


def results_in(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


# ----------------------------------------------------------------------------------------- what is reported


def test_a_run_is_evaluated_with_its_newest_checkpoint_and_its_own_configuration(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run_dir, steps=640, odds=1e-9)
    newest = save(run_dir, "--seed", "5", steps=12800)
    assert evaluate(run_dir, "--episodes", "3") == 0
    output = run_dir / "evaluations" / "step-12800-sampled.json"
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{newest}: 12,800 steps, 3 episodes of each task, sampled actions, seed 5"
    assert shown[4].split() == [DIARY, "3", "255.0", "255.0", "0.000", "255.0", "255.0", "8.000"]
    assert shown[-1] == f"every return is in {output}"
    content = results_in(output)
    assert (content["checkpoint"], content["steps"], content["version"]) == (str(newest), 12800, 20)
    assert (content["actions"], content["seed"], content["mean"]) == ("sampled", 5, ALL_ONES)
    assert content["tasks"] == {
        DIARY: {
            "env": DIARY,
            "episodes": 3,
            "mean": ALL_ONES,
            "median": ALL_ONES,
            "std": 0.0,
            "min": ALL_ONES,
            "max": ALL_ONES,
            "mean_length": NUM_STEPS,
            "human_normalised": None,
            "returns": [ALL_ONES] * 3,
            "lengths": [NUM_STEPS] * 3,
        }
    }


def test_flags_override_the_checkpoints_configuration(run_dir: Path) -> None:
    save(run_dir, odds=3.0)
    assert evaluate(run_dir, "--greedy", "--evaluator.episodes", "4", "--env.sticky_actions=0.25") == 0
    content = results_in(run_dir / "evaluations" / "step-640-greedy.json")
    assert content["tasks"][DIARY]["returns"] == [ALL_ONES] * 4
    assert content["env"]["sticky_actions"] == 0.25
    assert content["env"]["life_loss_ends_episode"] is False


def test_the_environments_of_the_shell_are_not_the_checkpoints(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run_dir)
    monkeypatch.setenv("IMPALA__EVALUATOR__EPISODES", "1")
    assert evaluate(run_dir, "--greedy") == 0
    content = results_in(run_dir / "evaluations" / "step-640-greedy.json")
    assert content["tasks"][DIARY]["episodes"] == 10


def test_the_best_checkpoint_is_played_when_asked_for(run_dir: Path) -> None:
    save(run_dir, steps=640, odds=1e9, mean_return=255.0)
    save(run_dir, steps=1280, odds=1e-9, mean_return=0.0)
    (run_dir / "checkpoints" / "best.pt").write_bytes(
        (run_dir / "checkpoints" / "step-000000000640.pt").read_bytes()
    )
    evaluate(run_dir, "--json", run_dir / "newest.json", "--episodes=1")
    evaluate(run_dir, "--best", "--json", run_dir / "best.json", "--episodes=1")
    means = [results_in(run_dir / name)["mean"] for name in ("newest.json", "best.json")]
    assert means == [0, ALL_ONES]


def test_a_checkpoint_that_lies_elsewhere_has_its_results_beside_it(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "kept.pt"
    copy.write_bytes(save(run_dir).read_bytes())
    assert evaluate(copy, "--episodes", "1") == 0
    assert (tmp_path / "evaluations" / "step-640-sampled.json").exists()


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_is_named(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run_dir, steps=640)
    damaged = save(run_dir, steps=1280)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert evaluate(run_dir, "--episodes", "1") == 0
    captured = capsys.readouterr()
    assert f"impala: checkpoint {damaged}: damaged" in captured.err
    assert " 640 steps, " in captured.out


def test_the_same_seed_gives_the_same_returns_and_another_one_does_not(run_dir: Path) -> None:
    save(run_dir, odds=1.0)
    returns = []
    for number, seed in enumerate(("7", "7", "8")):
        output = run_dir / f"{number}.json"
        assert evaluate(run_dir, "--seed", seed, "--json", output) == 0
        returns.append(results_in(output)["tasks"][DIARY]["returns"])
    assert returns[0] == returns[1] != returns[2]


def test_a_recurrent_policy_with_popart_is_evaluated_like_any_other(run_dir: Path) -> None:
    save(run_dir, "--lstm", "--popart")
    assert evaluate(run_dir, "--episodes", "2", "--num-envs", "2") == 0
    assert results_in(run_dir / "evaluations" / "step-640-sampled.json")["mean"] == ALL_ONES


# ------------------------------------------------------------------------------------------- several tasks


def test_all_tasks_are_played_and_the_processes_that_play_them_change_nothing(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run_dir, *TWO_TASKS, odds=1.0)
    played = []
    for workers in ("1", "2"):
        output = run_dir / f"{workers}.json"
        assert evaluate(run_dir, "--episodes", "5", "--workers", workers, "--json", output) == 0
        played.append(results_in(output)["tasks"])
    assert list(played[0]) == ["two", "three"]
    assert played[0] == played[1]
    assert played[0]["two"]["returns"] != played[0]["three"]["returns"]
    assert "mean over 2 tasks: " in capsys.readouterr().out


def test_only_the_tasks_that_are_named_are_played_with_the_same_games_as_among_all(run_dir: Path) -> None:
    save(run_dir, *TWO_TASKS, odds=1.0)
    evaluate(run_dir, "--json", run_dir / "all.json", "--workers", "1")
    assert evaluate(run_dir, "--tasks", "three", "--json", run_dir / "one.json") == 0
    one, among_all = (results_in(run_dir / name)["tasks"] for name in ("one.json", "all.json"))
    assert one == {"three": among_all["three"]}


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str | Path]], str]:
    """The only line of a command that must fail with exit code 2, and that plays nothing."""

    def run(argv: Sequence[str | Path]) -> str:
        assert evaluate(*argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err.removeprefix("impala: ").rstrip()

    return run


Complaint = Callable[[Sequence[str | Path]], str]


@pytest.mark.parametrize("argv", [[], ["--greedy"], ["--episodes", "3"]])
def test_without_anything_to_evaluate_the_usage_is_told(complaint: Complaint, argv: list[str]) -> None:
    assert complaint(argv).endswith("impala evaluate RUN_OR_CHECKPOINT [flags]")


def test_a_path_that_does_not_exist(complaint: Complaint) -> None:
    assert complaint(["/nowhere"]) == (
        "/nowhere: no such file or directory; allowed is a run's directory or a checkpoint"
    )


def test_a_directory_without_checkpoints(complaint: Complaint, tmp_path: Path) -> None:
    assert complaint([tmp_path]).startswith(f"{tmp_path}: holds no checkpoint; ")
    assert complaint([tmp_path, "--best"]).startswith(f"{tmp_path}: holds no best checkpoint; ")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_damaged_or_none(complaint: Complaint, run_dir: Path, tmp_path: Path) -> None:
    path = save(run_dir)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert complaint([path]).startswith(f"checkpoint {path}: damaged or not a checkpoint")
    (tmp_path / "notes.txt").write_text("not one")
    assert complaint([tmp_path / "notes.txt"]).startswith(f"checkpoint {tmp_path / 'notes.txt'}: damaged or")


def test_a_run_whose_checkpoints_are_all_damaged_names_them(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(run_dir)
    path.write_bytes(b"")
    assert evaluate(run_dir) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"impala: checkpoint {path}: damaged")
    assert last.startswith(f"impala: {run_dir}: holds no usable checkpoint; ")


def test_tasks_that_the_run_does_not_have(complaint: Complaint, run_dir: Path) -> None:
    save(run_dir, *TWO_TASKS)
    assert (
        complaint([run_dir, "--tasks", "thre"]) == "--tasks 'thre': no task of this run; did you mean three?"
    )
    assert complaint([run_dir, "--tasks", "two,pong"]) == (
        "--tasks 'pong': no task of this run; allowed are two, three"
    )
    assert "'atari57': no task of this run" in complaint([run_dir, "--tasks", "atari57"])


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--env", f"{HOMEMADE}:wide"], "its observation_shape is (2,), but"),
        (["--env.kwargs", "{num_actions: 4}"], "its num_actions is 4, but"),
        (["--env", "catch"], "its observation_shape is (50,), but"),
    ],
)
def test_an_environment_that_does_not_fit_the_network(
    complaint: Complaint, run_dir: Path, flags: list[str], difference: str
) -> None:
    path = save(run_dir)
    line = complaint([run_dir, *flags])
    assert line.startswith("env.id = ")
    assert f"{difference} the network of {path} was made for " in line


def test_another_network_than_the_checkpoints(complaint: Complaint, run_dir: Path) -> None:
    path = save(run_dir)
    assert complaint([run_dir, "--lstm"]).startswith(f"network: {path} is of another one (")


def test_another_environment_where_there_are_tasks(complaint: Complaint, run_dir: Path) -> None:
    save(run_dir, *TWO_TASKS)
    assert complaint([run_dir, "--env", "catch"]).endswith("choose with --tasks")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--episodes", "0"], "--evaluator.episodes = '0': allowed is greater than or equal to 1"),
        (["--episodes", "-3"], "--evaluator.episodes = '-3': allowed is greater than or equal to 1"),
        (["--num-envs", "0"], "--evaluator.num_envs = '0': allowed is greater than or equal to 1"),
        (["--num_envs", "few"], "--evaluator.num_envs = 'few': allowed is a valid integer"),
        (["--episodes", "--greedy"], "--episodes: a value is missing"),
        (["--workers", "0"], "--workers = '0': allowed is a whole number, at least 1"),
        (["--workers", "all"], "--workers = 'all': allowed is a whole number, at least 1"),
        (["--greedyy"], "--greedyy: unknown flag; did you mean --greedy?"),
        (["more"], "'more' is not a flag; allowed is --key value (see `impala config --help`)"),
        (["--env", "ALE/Pnog-v5"], "env.id = 'ALE/Pnog-v5': unknown Atari game; did you mean"),
    ],
)
def test_a_wrong_flag_is_named(complaint: Complaint, run_dir: Path, flags: list[str], line: str) -> None:
    save(run_dir)
    assert complaint([run_dir, *flags]).startswith(line)


def test_a_preset_would_not_be_the_checkpoints(complaint: Complaint, run_dir: Path) -> None:
    path = save(run_dir)
    assert f"the file {path} was made with 'impala'" in complaint([run_dir, "--preset", "machado"])


def test_best_is_for_runs(complaint: Complaint, run_dir: Path) -> None:
    path = save(run_dir)
    assert complaint([path, "--best"]) == f"--best: {path} is a file; allowed with a run's directory"


def test_results_that_could_not_be_kept_are_not_played_for(
    complaint: Complaint, run_dir: Path, tmp_path: Path
) -> None:
    save(run_dir)
    (tmp_path / "file").write_text("")
    assert complaint([run_dir, "--json", tmp_path / "file" / "x.json"]).endswith("with --json FILE")
    assert complaint([run_dir, "--json", tmp_path]) == f"--json {tmp_path}: is a directory; allowed is a file"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_an_environment_itself_asks_of_the_user(
    run_dir: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    tasks = [{"id": f"{HOMEMADE}:refusing", "name": name} for name in ("one", "two")]
    save(run_dir, "--tasks", json.dumps(tasks))
    assert evaluate(run_dir, "--workers", workers) == 2
    assert capsys.readouterr().err == "impala: env.kwargs.dataset_path = '': the images are missing\n"


# ------------------------------------------------------------------------------------------------ signals


def two_in(beacons: Path) -> list[int]:
    """The processes that have left their ids there, once they are two."""
    pids = [int(path.name) for path in beacons.iterdir()]
    return pids if len(pids) == 2 else []


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def playing(run_dir: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A command in the middle of its games, and its two workers."""
    beacons = run_dir / "beacons"
    beacons.mkdir(parents=True)
    env = {"id": f"{HOMEMADE}:beacon", "kwargs": {"directory": str(beacons)}}
    save(run_dir, "--tasks", json.dumps([env | {"name": "one"}, env | {"name": "two"}]))
    flags = [str(run_dir), "--episodes", "100000000", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "evaluate", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(run_dir)},  # a killed command leaves its file with the weights
        start_new_session=True,
    )
    try:
        workers = until(lambda: two_in(beacons), "two workers play", START_S)
        assert process.pid not in workers
        yield process, workers
    finally:
        process.kill()
        process.communicate()
    until(lambda: not any(alive(worker) for worker in workers), "no worker is left")


Playing = tuple[subprocess.Popen[str], list[int]]


def complaints(process: subprocess.Popen[str]) -> str:
    """What a command that comes to its end writes to stderr, but for the lines about its progress."""
    _, errors = process.communicate(timeout=STOP_S)
    return "".join(line for line in errors.splitlines(keepends=True) if " info evaluate " not in line)


def test_ctrl_c_which_a_terminal_sends_to_all_ends_all_without_a_word(playing: Playing) -> None:
    process, workers = playing
    os.killpg(process.pid, signal.SIGINT)
    assert complaints(process) == ""
    assert process.returncode == 130
    assert not any(alive(worker) for worker in workers)


def test_workers_do_not_outlive_a_command_that_is_killed(playing: Playing) -> None:
    process, workers = playing
    process.kill()
    process.wait()
    until(lambda: not any(alive(worker) for worker in workers), "no worker is left")


def test_a_worker_that_dies_ends_the_evaluation_and_its_task_is_named(playing: Playing) -> None:
    process, workers = playing
    os.kill(workers[0], signal.SIGKILL)
    line = complaints(process)
    assert re.fullmatch(r"impala: the process that played (one|two) has died \(exit code -9\)\n", line)
    assert process.returncode == 1
    assert not any(alive(worker) for worker in workers)
