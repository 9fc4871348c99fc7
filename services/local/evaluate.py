"""`impala evaluate`: a checkpoint and its tasks -> a table, and a JSON file with every return in it.

Before it comes ``cli``; ``evaluator.games`` plays, here or in the processes of ``workers``, and
``scoreboard`` shows. The configuration is the checkpoint's own with the user's flags on top, and what does
not fit the network then is refused before anything is played.
"""

from __future__ import annotations

import difflib
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from services import config as configuration
from services.config import ConfigError, RunConfig
from services.evaluator.games import Games
from services.evaluator.results import Results
from services.learner import checkpoint as checkpoints
from services.learner.checkpoint import Checkpoint
from services.local.run_dir import write_json
from services.local.scoreboard import make_scoreboard, print_results
from services.local.workers import Job, WorkerError, play_all
from services.ops.cores import num_cores
from services.rl.policy import mismatch
from services.rl.scores import SCORE_TABLES
from services.rl.tasks import Task, tasks_of, tasks_spec

FITTING = ("observation_shape", "observation_dtype", "frame_stack", "num_actions", "instruction_length")
"""What a network has been made for; see ``rl.envs.EnvSpec``."""
MAX_WORKERS = 16
"""Unless the user says so: each has a network of its own, and a task's environments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command takes beside the keys of the configuration."""

    best: bool = False
    """Of a run: its best checkpoint instead of its newest."""
    tasks: str | None = None
    """Names of tasks of the run, or a suite's, with commas; None is all."""
    json: Path | None = None
    """Where the results go; None is a place in the run's directory."""
    workers: int | None = None
    """Processes that play at the same time; None is as many as there are cores and tasks, up to 16."""


def evaluate(target: Path, flags: Sequence[str], options: Options) -> int:
    """Play and show; returns the exit code. ConfigError for what the user can mend."""
    try:
        checkpoint = find_checkpoint(target, options.best)
        config = configured(checkpoint, flags)
        games = Games(config)
        refuse_another_network(checkpoint, config, games)
        numbers = choose(games.tasks, options.tasks)
        output = prepared(options.json or default_output(checkpoint, config))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(one_line(error)) from None
    began_s = time.monotonic()
    try:
        results = played(checkpoint, config, games, numbers, options.workers)
    except WorkerError as error:
        print_error(str(error))
        return 1
    content = {
        "checkpoint": str(checkpoint.path),
        "time": round(time.time(), 3),
        "seconds": round(time.monotonic() - began_s, 3),
        "actions": config.evaluator.actions,
        "seed": config.seed,
        **results.plain(),
    }
    try:
        kept = keep(content, output, replace=options.json is not None)
    except OSError as error:
        print_error(f"{output}: cannot be written ({error.strerror})")
        kept = None
    print_results(results, checkpoint.path, config)
    if kept is None:
        return 1
    sys.stdout.write(f"every return is in {kept}\n")
    return 0


def played(
    checkpoint: Checkpoint, config: RunConfig, games: Games, numbers: Sequence[int], workers: int | None
) -> Results:
    """The tasks ``numbers``, with as many processes as make sense unless ``workers`` says so."""
    names = [games.tasks[number].name for number in numbers]
    trainer = checkpoint.trainer
    with (
        tempfile.TemporaryDirectory(prefix="impala-") as directory,
        make_scoreboard(names, config.evaluator.episodes) as scoreboard,
    ):
        weights = Path(directory) / "weights.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in trainer["network"].items()}
        safetensors.torch.save_file(tensors, weights)
        job = Job(config=config, version=trainer["version"], weights=weights)
        num_workers = min(workers or num_cores(MAX_WORKERS), len(numbers))
        tasks = play_all(job, games, numbers, num_workers, scoreboard)
    return Results(version=trainer["version"], steps=trainer["steps"], tasks=tasks)


def keep(content: Mapping[str, object], output: Path, replace: bool) -> Path:
    """Where it is written: beside ``output``, with a number, if that is taken and not to be replaced."""
    path = output
    for number in itertools.count(2):
        if replace:
            break
        try:
            path.open("x").close()  # ours from now on, whoever else comes to its end
            break
        except FileExistsError:
            path = output.with_stem(f"{output.stem}-{number}")
    try:
        write_json(path, content)
    except OSError:
        if not replace:
            path.unlink(missing_ok=True)
        raise
    return path


def find_checkpoint(target: Path, best: bool) -> Checkpoint:
    """The checkpoint in a file, or the newest usable one (or the best) of a run's directory."""
    if not target.exists():
        raise ConfigError(
            f"{target}: no such file or directory; allowed is a run's directory or a checkpoint"
        )
    if not target.is_dir():
        if best:
            raise ConfigError(f"--best: {target} is a file; allowed with a run's directory")
        return checkpoints.read(target)
    directory = target / "checkpoints"
    found = [directory / "best.pt"] if best else sorted(directory.glob("step-*.pt"), reverse=True)
    refusals = []
    for path in found:
        try:
            return checkpoints.read(path)
        except ValueError as error:
            refusals.append(str(error))
            if path.exists():
                print_error(str(error))
    kind = "best checkpoint" if best else "usable checkpoint" if refusals else "checkpoint"
    raise ConfigError(
        f"{target}: holds no {kind}; allowed is a run's directory with one, or a checkpoint file"
    )


def configured(checkpoint: Checkpoint, flags: Sequence[str]) -> RunConfig:
    """The configuration of the checkpoint, overridden by ``flags``."""
    if checkpoint.config.get("tasks") and any(
        flag.partition("=")[0] in ("--env", "--env.id") for flag in flags
    ):
        raise ConfigError(f"--env: {checkpoint.path} has learned several tasks; choose with --tasks")
    with tempfile.TemporaryDirectory(prefix="impala-") as directory:
        file = Path(directory) / "config.json"
        write_json(file, checkpoint.config)
        try:
            return configuration.load(file, None, flags)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(file), str(checkpoint.path))) from None


def refuse_another_network(checkpoint: Checkpoint, config: RunConfig, games: Games) -> None:
    """ConfigError unless the checkpoint's weights are of the network that ``config`` describes."""
    trained = configured(checkpoint, ())
    if config.env != trained.env:
        spec = tasks_spec(tasks_of(trained))
        for name in FITTING:
            if (now := getattr(games.spec, name)) != (before := getattr(spec, name)):
                raise ConfigError(
                    f"env.id = {games.spec.id!r}: its {name} is {now}, but the network of {checkpoint.path} "
                    f"was made for {before}; allowed is what it was trained on, or what looks like it"
                )
    if (wrong := mismatch(games.network, checkpoint.trainer["network"])) is not None:
        raise ConfigError(
            f"network: {checkpoint.path} is of another one ({wrong}); allowed is the one it was trained with"
        )


def choose(tasks: Sequence[Task], text: str | None) -> list[int]:
    """The numbers of the tasks that are named, in that order."""
    names = [task.name for task in tasks]
    if text is None:
        return list(range(len(tasks)))
    chosen = []
    for wanted in text.split(","):
        for name in (wanted,) if wanted in names else SCORE_TABLES.get(wanted, (wanted,)):
            if name not in names:
                close = difflib.get_close_matches(name, names, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f"allowed are {', '.join(names)}"
                raise ConfigError(f"--tasks {wanted!r}: no task of this run; {hint}")
            chosen.append(names.index(name))
    return list(dict.fromkeys(chosen))


def default_output(checkpoint: Checkpoint, config: RunConfig) -> Path:
    """In the directory of the run that the checkpoint lies in, else beside it."""
    folder = checkpoint.path.parent
    run_dir = folder.parent if folder.name == "checkpoints" else folder
    return run_dir / "evaluations" / f"step-{checkpoint.trainer['steps']}-{config.evaluator.actions}.json"


def prepared(output: Path) -> Path:
    """Found out before the games, not after them: whether ``output`` can be written."""
    if output.is_dir():
        raise ConfigError(f"--json {output}: is a directory; allowed is a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            return output
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot be written ({error.strerror}); name another place with --json FILE"
        ) from None


def one_line(error: ValueError) -> str:
    """Its text, however its author broke it."""
    return " ".join(str(error).split())


def print_error(text: str) -> None:
    """One line, as all of the command's complaints."""
    sys.stderr.write(f"impala: {text}\n")
