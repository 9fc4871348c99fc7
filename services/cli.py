"""The ``impala`` command: finds out which part is meant and imports only that one.

``impala --help`` and ``impala config`` load neither torch nor zmq. Whatever the user can mend ends as one
line per problem on stderr and exit code 2; anything else is our bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import io
import json
import os
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

PODS = ("actor", "learner", "paramserver", "evaluator")
CLUSTER = ("status", "wait", "metrics")

USAGE = """\
usage: impala <command> [flags]

  train         train on this machine: parameter server, learners and actors as processes
  evaluate      play whole episodes with a checkpoint, and say what they are worth
  config        show the effective configuration; `impala config --help` explains every key
  keygen        make the keys by which the pods of a run know each other
  actor         run one actor
  learner       run one learner
  paramserver   run the parameter server
  evaluator     run one evaluator, which plays whole episodes with the newest weights of a run
  status        show a release on Kubernetes: pods, speed, versions, returns
  wait          block until the training of a release is complete, or its pods are ready
  metrics       check that pods answer, each as what it should be

`impala <command> --help` says more. `impala --version` prints the version.
"""

TRAIN_USAGE = """\
usage: impala train [flags]

Trains until --total_steps agent steps are done. Ctrl-C stops cleanly and saves a checkpoint; a second
Ctrl-C ends everything at once.

  --config FILE      configuration to start from, YAML or JSON
  --run-dir DIR      where the run is kept; default runs/<time>-<env>
  --resume RUN_DIR   continue that run with its configuration; further flags override it
  --plain            log lines instead of the live display (also the case when stdout is no terminal)

Every key of the configuration is a flag too; `impala config --help` lists them all. Some to begin with:

  --env catch                    what to play: catch, ALE/Pong-v5, CartPole-v1, your.module:factory
  --actors 4                     actor processes
  --learners 2                   learner processes, which train as one
  --total_steps 1000000          agent steps to train for
  --num-envs 32                  environments of an actor: actor.num_envs (evaluate: evaluator.num_envs)
  --preset torchbeast            another set of defaults
  --learning-rate 3e-4 --entropy-cost 0.01 --batch_size 32 --unroll_length 20 --seed 7
"""

EVALUATE_USAGE = """\
usage: impala evaluate RUN_OR_CHECKPOINT [flags]

Plays whole episodes of each task: no lost life ends a game, and levels of DMLab are those kept for testing.
Prints a table, and writes a JSON file with every return into the run's directory, below evaluations/. A run
is the directory that `impala train` has made; of several checkpoints in it, the newest that is usable counts.

  --episodes N       of each task; default evaluator.episodes
  --greedy           always the policy's most likely action, instead of one drawn from the policy
  --tasks A,B        only these of the run's tasks, or those of a suite: atari57, dmlab30
  --best             the run's best checkpoint instead of its newest
  --json FILE        where the results go, and replace what is there
  --num-envs N       environments of each task that play at the same time: evaluator.num_envs (of
                     `impala train` it is actor.num_envs)
  --workers N        processes, each with a task of its own; default as many as there are cores, up to 16

The configuration is the checkpoint's own. Every key of it is a flag too (`impala config --help`), such as

  --env.sticky_actions 0.25 --seed 7

The same checkpoint, flags (also --num-envs and --actor.precision) and seed give the same returns again.
Without --json, no results are replaced: the next ones of the same kind are called -2, -3 and so on.
"""

CONFIG_USAGE = """\
usage: impala config [--config FILE] [flags]    print the effective configuration as YAML
       impala config --schema                   print the JSON schema of a configuration file

A configuration is put together from a preset, a file, environment variables and flags; each overrides
the ones before it. The key learner.queue_capacity, for example, is

  in a file        learner: {queue_capacity: 64}
  in the shell     IMPALA__LEARNER__QUEUE_CAPACITY=64
  as a flag        --learner.queue_capacity 64
"""

KEYGEN_USAGE = """\
usage: impala keygen [--seed] DIR                               write files
       impala keygen [--seed] --secret NAME [--namespace NS]    print a Secret for `kubectl apply -f -`

Makes the keys by which the pods of a run know each other, and with which they encrypt what they say. Give
every pod the directory, or the mounted Secret, as --wire.keys DIR. No key is ever replaced.

A key pair for each role, <role>.secret and <role>.public: a pod needs its own secret and the public keys of
the roles that it meets, and can then be no other role.

  actor         actor.secret learner.public paramserver.public
  learner       learner.secret actor.public paramserver.public
  paramserver   paramserver.secret actor.public learner.public evaluator.public
  evaluator     evaluator.secret paramserver.public

  --seed        one file `seed` instead, from which all of them follow: who has it may be any role
"""

USAGES = {"train": TRAIN_USAGE, "evaluate": EVALUATE_USAGE, "keygen": KEYGEN_USAGE}

OWN_FLAGS = {
    "train": ("--config", "--run-dir", "--resume", "--plain"),
    "evaluate": ("--episodes", "--greedy", "--tasks", "--best", "--json", "--num-envs", "--workers"),
    "config": ("--config", "--schema"),
    "keygen": ("--seed", "--secret", "--namespace"),
}
"""Beside the keys of the configuration."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if os.getpid() == 1:  # of a container: the kernel keeps signals from it that it has no handler for
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: an ASCII terminal is no reason to fail
    try:
        exit_code = _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # before the part itself took care of it
        exit_code = 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise  # another pipe, which is our bug
        exit_code = 0  # `impala config --help | head`
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                sys.stderr.write(f"impala: cannot write the output ({error.strerror})\n")
                exit_code = exit_code or 1
            # Nobody reads it any more; without this Python would try again, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return exit_code


def _nobody_reads() -> bool:
    """Whether stdout or stderr is a pipe that is closed at its other end."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)  # for errors only
    return bool(poll.poll(0))


def _run(arguments: list[str]) -> int:
    from services.config import ConfigError
    from services.ops.pod import BAD_CONFIG, name_own_flag

    try:
        return _dispatch(arguments)
    except ConfigError as error:
        own = OWN_FLAGS.get(arguments[0], ()) if arguments else ()
        for line in name_own_flag(str(error), own).splitlines():
            print(f"impala: {line}", file=sys.stderr)
        return BAD_CONFIG


def _dispatch(arguments: list[str]) -> int:
    from services.config import ConfigError

    command, flags = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    wants_help = "--help" in flags or "-h" in flags
    if command in ("--help", "-h", "help"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"impala {_version()}")
    elif wants_help and command in USAGES:
        print(USAGES[command], end="")
    elif command == "train":
        return _train(flags)
    elif command == "evaluate":
        return _evaluate(flags)
    elif command == "config":
        if wants_help:
            _explain_config()
        else:
            _show_config(flags)
    elif command == "keygen":
        _keygen(flags)
    elif command in CLUSTER:
        from services.cluster import commands

        return commands.main(command, flags)
    elif command in PODS:
        if wants_help:
            from services.ops.pod import parser_of

            parser_of(command).print_help()
        else:
            return int(importlib.import_module(f"services.{command}.__main__").main(flags))
    else:
        known = ["train", "evaluate", "config", "keygen", *PODS, *CLUSTER]
        close = difflib.get_close_matches(command, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(known)}"
        raise ConfigError(f"unknown command {command!r}; {hint}")
    return 0


def _train(flags: list[str]) -> int:
    from services import config
    from services.local import run_dir, train
    from services.ops.pod import find_modules_here

    find_modules_here()
    plain = _take_switch(flags, "--plain")
    file = _take_value(flags, "--config")
    resumed = _take_value(flags, "--resume")
    if resumed is not None:
        if file is not None:
            raise config.ConfigError(
                "--resume and --config: a resumed run has its configuration; give one of them"
            )
        run_config = run_dir.resumed_config(Path(resumed), os.environ, flags)
    else:
        run_config = config.load(Path(file) if file else None, os.environ, flags)
        if "run_dir" not in run_config.model_fields_set:
            run_config = run_dir.with_new_run_dir(run_config, datetime.now())
    return train.train(run_config, resume=resumed is not None, plain=plain)


def _evaluate(flags: list[str]) -> int:
    from services.config import ConfigError
    from services.local.signals import unwound_by_signals
    from services.ops.pod import find_modules_here
    from services.ops.threads import limit_threads

    best = _take_switch(flags, "--best")
    greedy = _take_switch(flags, "--greedy")
    tasks = _take_value(flags, "--tasks")
    output = _take_value(flags, "--json")
    workers = _take_value(flags, "--workers")
    episodes = _take_value(flags, "--episodes")
    num_envs = _take_value(flags, "--num_envs") or _take_value(flags, "--num-envs")
    if workers is not None and not (workers.isdecimal() and int(workers) > 0):
        raise ConfigError(f"--workers = {workers!r}: allowed is a whole number, at least 1")
    if not flags or flags[0].startswith("--"):
        raise ConfigError(
            "a run's directory or a checkpoint file is missing: impala evaluate RUN_OR_CHECKPOINT [flags]"
        )
    target = Path(flags.pop(0))
    if episodes is not None:
        flags += ["--evaluator.episodes", episodes]
    if num_envs is not None:
        flags += ["--evaluator.num_envs", num_envs]
    if greedy:
        flags += ["--evaluator.actions", "greedy"]
    find_modules_here()
    limit_threads(1)  # before anything imports torch

    with unwound_by_signals():
        from services.local import evaluate

        options = evaluate.Options(
            best=best,
            tasks=tasks,
            json=Path(output) if output else None,
            workers=int(workers) if workers else None,
        )
        return evaluate.evaluate(target, flags, options)


def _keygen(flags: list[str]) -> None:
    from services.config import ConfigError
    from services.wire import keygen

    seed = _take_switch(flags, "--seed")
    name = _take_value(flags, "--secret")
    namespace = _take_value(flags, "--namespace")
    unknown = next((flag for flag in flags if flag.startswith("-")), None)
    if unknown is not None:
        raise ConfigError(f"{unknown}: unknown flag; allowed are {', '.join(OWN_FLAGS['keygen'])}")
    if (name is None) != (len(flags) == 1) or (name is None and namespace is not None):
        raise ConfigError("allowed is either one directory or --secret NAME: impala keygen [--seed] DIR")
    files = keygen.new_keys(seed=seed)
    try:
        if name is None:
            keygen.write_keys(Path(flags[0]), files)
            print(f"wrote {', '.join(files)} to {flags[0]}")
        else:
            print(keygen.secret_manifest(name, namespace, files), end="")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _show_config(flags: list[str]) -> None:
    import yaml

    from services import config

    if _take_switch(flags, "--schema"):
        print(json.dumps(config.schema(), indent=2))
        return
    file = _take_value(flags, "--config")
    effective = config.load(Path(file) if file else None, os.environ, flags)
    values = config.dump(effective)
    if effective.run_dir == config.RunConfig.model_fields["run_dir"].default:
        del values["run_dir"]  # so that every run from the printed file gets one of its own
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")


def _explain_config() -> None:
    from services import config

    width = max(60, min(100, shutil.get_terminal_size().columns))
    print(CONFIG_USAGE)
    section = ""
    for key, default, text in config.describe():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            print(f"[{section}]\n")
        print(f"  {key} = {default}")
        print(textwrap.fill(text, width, initial_indent="      ", subsequent_indent="      ") + "\n")
    print("short spellings")
    for alias, key in config.ALIASES.items():
        print(f"  --{alias:<16} --{key}")
    print(f"\npresets: {', '.join(config.PRESETS)}")


def _take_switch(flags: list[str], name: str) -> bool:
    """Whether ``name`` is among ``flags``, from which it is removed."""
    present = name in flags
    while name in flags:
        flags.remove(name)
    return present


def _take_value(flags: list[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, removed from ``flags``; the last one counts."""
    from services.config import ConfigError

    value = None
    index = 0
    while index < len(flags):
        if flags[index] == name:
            if index + 1 == len(flags) or flags[index + 1].startswith("--"):
                raise ConfigError(f"{name}: a value is missing")
            value = flags[index + 1]
            del flags[index : index + 2]
        elif flags[index].startswith(f"{name}="):
            value = flags.pop(index).partition("=")[2]
        else:
            index += 1
    if value == "":
        raise ConfigError(f"{name}: a value is missing")
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("impala-kubernetes")
    except PackageNotFoundError:
        return "(from a checkout that is not installed)"


if __name__ == "__main__":
    sys.exit(main())
