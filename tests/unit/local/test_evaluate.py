"""`impala evaluate`, called as a user calls it, on checkpoints whose returns follow from their weights."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from services import cli
from services import config as configuration
from services.evaluator.games import Games
from services.learner.checkpoint import CheckpointStore
from services.local.evaluate import keep
from services.local.signals import unwound_by_signals
from services.ops.metrics import LearnerMetrics
from tests.unit.evaluator.homemade import NUM_STEPS
from tests.unit.learner.disk import full_disk
from tests.unit.learner.waiting import until

HOMEMADE = "tests.unit.evaluator.homemade"
DIARY = f"{HOMEMADE}:diary"
ALL_ONES = 2**NUM_STEPS - 1
START_S = 60.0
STOP_S = 60.0
TASKS = [{"id": DIARY, "name": "two"}, {"id": DIARY, "name": "three", "kwargs": {"num_actions": 3}}]
TWO_TASKS = ("--tasks", json.dumps(TASKS))
EXACT = ("--network", f"{HOMEMADE}:constant", "--actor.precision", "float32", "--evaluator.num_envs", "2")


def save(
    run_dir: Path, *flags: str, steps: int = 640, odds: float = 1e9, mean_return: float | None = None
) -> Path:
    """A checkpoint of a policy that draws action 1 ``odds`` times as often as each other one."""
    env = () if "--tasks" in flags else ("--env", DIARY)
    config = configuration.load(flags=[*env, *EXACT, "--run_dir", str(run_dir), *flags])
    network = Games(config).network
    weights = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    weights["policy.bias"][1] = math.log(odds)
    metrics = LearnerMetrics(CollectorRegistry())
    store = CheckpointStore(run_dir / "checkpoints", 3, metrics, "learner-0")
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
            "env": {**content["tasks"][DIARY]["env"], "id": DIARY, "life_loss_ends_episode": False},
            "episodes": 3,
            "capped": 0,
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
    assert content["tasks"][DIARY]["env"]["sticky_actions"] == 0.25


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


def test_results_that_are_there_already_are_not_replaced(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run_dir, odds=1.0)
    for seed in ("7", "8", "9"):
        assert evaluate(run_dir, "--seed", seed, "--episodes", "1") == 0
    names = ["step-640-sampled.json", "step-640-sampled-2.json", "step-640-sampled-3.json"]
    directory = run_dir / "evaluations"
    assert [results_in(directory / name)["seed"] for name in names] == [7, 8, 9]
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)
    assert capsys.readouterr().out.endswith(f"every return is in {directory / names[2]}\n")


def test_evaluations_that_come_to_their_end_together_keep_one_file_each(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    start = threading.Barrier(8)

    def write(number: int) -> Path:
        start.wait()
        return keep({"number": number}, output, replace=False)

    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(write, range(8)))
    assert [results_in(path)["number"] for path in kept] == list(range(8))
    assert len(list(tmp_path.iterdir())) == 8


def test_a_file_that_is_named_is_replaced(run_dir: Path) -> None:
    save(run_dir)
    output = run_dir / "mine.json"
    for episodes in ("1", "2"):
        assert evaluate(run_dir, "--episodes", episodes, "--json", output) == 0
    assert results_in(output)["tasks"][DIARY]["episodes"] == 2
    assert not list(run_dir.glob("mine-*"))


def test_results_are_kept_also_if_nobody_reads_the_table(run_dir: Path) -> None:
    """A reader that is gone before the games end."""
    save(run_dir)
    process = command(run_dir, "--episodes", "3", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert complaints(process) == ""
    assert process.returncode == 0
    assert results_in(run_dir / "evaluations" / "step-640-sampled.json")["mean"] == ALL_ONES


def test_results_without_a_place_on_the_disk_are_shown_all_the_same(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run_dir)
    with full_disk(3000):  # enough for the weights
        assert evaluate(run_dir, "--episodes", "1000") == 1
    captured = capsys.readouterr()
    assert "cannot be written (File too large)" in captured.err
    assert f"{DIARY}     1,000  255.0" in captured.out
    assert not list((run_dir / "evaluations").glob("*.json")), "nothing that looks like results"


def test_an_episode_without_an_end_is_cut_off_and_told_of(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run_dir, "--env.id", f"{HOMEMADE}:endless")
    assert evaluate(run_dir, "--episodes", "3", "--evaluator.max_episode_steps", "40") == 0
    task = results_in(run_dir / "evaluations" / "step-640-sampled.json")["tasks"][f"{HOMEMADE}:endless"]
    assert (task["episodes"], task["capped"], task["lengths"]) == (3, 3, [40, 40, 40])
    assert ":endless: 3 of its episodes did not end, and were cut off\n" in capsys.readouterr().out


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


def test_each_task_has_with_it_the_environment_that_was_played(run_dir: Path) -> None:
    save(run_dir, *TWO_TASKS, "--env.sticky_actions", "0.25")
    assert evaluate(run_dir, "--episodes", "1", "--workers", "1") == 0
    content = results_in(run_dir / "evaluations" / "step-640-sampled.json")
    assert "env" not in content, "it would be that of no task"
    for name, kwargs in (("two", {}), ("three", {"num_actions": 3})):
        env = content["tasks"][name]["env"]
        assert (env["id"], env["kwargs"], env["sticky_actions"]) == (DIARY, kwargs, 0.25)
        assert env["life_loss_ends_episode"] is False


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


@pytest.mark.parametrize("flags", [["--env", "catch"], ["--env.id=catch"]])
def test_another_environment_where_there_are_tasks(
    complaint: Complaint, run_dir: Path, flags: list[str]
) -> None:
    path = save(run_dir, *TWO_TASKS)
    line = f"--env: {path} has learned several tasks; choose with --tasks"
    assert complaint([run_dir, *flags]) == line


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
    words = but_for_progress(capsys.readouterr().err)
    assert words == "impala: env.kwargs.dataset_path = '': the images are missing\n"


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("env", "error"), [("broken", "ValueError"), ("cut_off", "BrokenPipeError")])
def test_an_error_in_the_middle_of_a_game_keeps_its_traceback(
    run_dir: Path, env: str, error: str, workers: str
) -> None:
    """It is none that the user could mend, which is exit code 2, and no reader that has seen enough."""
    tasks = [{"id": f"{HOMEMADE}:{env}", "name": name} for name in ("one", "two")]
    save(run_dir, "--tasks", json.dumps(tasks))
    process = command(run_dir, "--workers", workers)
    words = complaints(process)
    assert process.returncode == 1
    assert f"\n{error}: array of the wrong size\n" in words


# ------------------------------------------------------------------------------------------------ signals


def several_in(beacons: Path, count: int) -> list[int]:
    """The processes that have left their ids there, once they are so many."""
    pids = [int(path.name) for path in beacons.iterdir()]
    return pids if len(pids) == count else []


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def command(run_dir: Path, *flags: str, stdout: int | None = None) -> subprocess.Popen[str]:
    """`impala evaluate` as a process, whose temporary files lie in ``run_dir / "tmp"``."""
    (run_dir / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "services.cli", "evaluate", str(run_dir), *flags],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(run_dir / "tmp")},
        start_new_session=True,
    )


@contextlib.contextmanager
def as_in_a_terminal() -> Iterator[None]:
    """What starts meanwhile heeds Ctrl-C and a hangup, also where the tests run in the background."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def in_the_middle(run_dir: Path, num_workers: int) -> Iterator[Playing]:
    """A command in the middle of its games, and the processes that play them."""
    beacons = run_dir / "beacons"
    beacons.mkdir(parents=True)
    env = {"id": f"{HOMEMADE}:beacon", "kwargs": {"directory": str(beacons)}}
    save(run_dir, "--tasks", json.dumps([env | {"name": "one"}, env | {"name": "two"}]))
    with as_in_a_terminal():
        process = command(run_dir, "--episodes", "100000000", "--workers", str(num_workers))
    try:
        workers = until(lambda: several_in(beacons, num_workers), "its workers play", START_S)
        yield process, workers
    finally:
        process.kill()
        process.communicate()
    until(lambda: not any(alive(worker) for worker in workers), "no worker is left")


@pytest.fixture
def playing(run_dir: Path) -> Iterator[Playing]:
    """With two workers."""
    with in_the_middle(run_dir, 2) as (process, workers):
        assert process.pid not in workers
        yield process, workers


Playing = tuple[subprocess.Popen[str], list[int]]


def but_for_progress(errors: str) -> str:
    """Without the lines that say every ten seconds how far it is."""
    return "".join(line for line in errors.splitlines(keepends=True) if " info evaluate " not in line)


def complaints(process: subprocess.Popen[str]) -> str:
    """What a command that comes to its end writes to stderr, but for the lines about its progress."""
    _, errors = process.communicate(timeout=STOP_S)
    return but_for_progress(errors)


def test_ctrl_c_which_a_terminal_sends_to_all_ends_all_without_a_word(playing: Playing) -> None:
    process, workers = playing
    os.killpg(process.pid, signal.SIGINT)
    assert complaints(process) == ""
    assert process.returncode == 130
    assert not any(alive(worker) for worker in workers)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_nothing_behind(
    run_dir: Path, number: int, num_workers: int
) -> None:
    with in_the_middle(run_dir, num_workers) as (process, workers):
        assert list((run_dir / "tmp").glob("impala-*")), "no weights lie there, and the test proves nothing"
        process.send_signal(number)
        assert complaints(process) == ""
        assert process.returncode == 128 + number
        assert not any(alive(worker) for worker in workers)
        assert not list((run_dir / "tmp").glob("impala-*"))


def test_a_terminal_that_is_closed_ends_all_without_a_word(playing: Playing) -> None:
    process, workers = playing
    os.killpg(process.pid, signal.SIGHUP)
    assert complaints(process) == ""
    assert process.returncode == 128 + signal.SIGHUP
    assert not any(alive(worker) for worker in workers)


def test_a_command_that_was_told_to_ignore_a_closed_terminal_plays_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with unwound_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # on the way out: once is enough
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_fails_on_the_way_out_does_not_hide_why() -> None:
    def play() -> None:
        with unwound_by_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                raise OSError("the terminal is gone")

    with pytest.raises(SystemExit) as ended:
        play()
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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
