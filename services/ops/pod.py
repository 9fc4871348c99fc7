"""How every pod begins: command line, configuration, logs and signals, before anything slow is imported.

A pod's ``__main__`` comes after it and builds the rest. What the user can mend is a ``ValueError`` that names
the field, the value and what is allowed; here it becomes one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from services import config as configuration
from services.config import RunConfig
from services.ops import logging
from services.ops.lifecycle import Lifecycle

BAD_CONFIG = 2
"""Exit code of every command, and every pod, whose configuration the user has to mend."""
DIVERGED = 3
"""Exit code of a learner whose training has diverged: starting it again would change nothing."""

Run = Callable[[RunConfig, str, Lifecycle], int]
"""(configuration, name of this pod, life cycle) -> exit code: 0 stopped as asked, 1 failed.

It imports what is slow to import, and then tells the life cycle that it begins."""


def main(role: str, argv: Sequence[str] | None, run: Run) -> int:
    """Run one pod of ``role``; returns its exit code."""
    try:
        arguments, flags = _parse(role, argv)
        find_modules_here()
        raise_file_limit()
        config = configuration.load(arguments.config, os.environ, flags)
        logging.setup(role, config.ops.log_level)
        lifecycle = Lifecycle(has_begun=False)
        lifecycle.install_signals()
        if arguments.parent_pid is not None:
            lifecycle.watch_parent(arguments.parent_pid)
        return run(config, arguments.name, lifecycle)
    except ValueError as error:
        text = name_own_flag(str(error), ("--config", f"--{role}-id", "--parent-pid"))
        sys.stderr.write("".join(f"impala {role}: {line}\n" for line in text.splitlines()))
        return BAD_CONFIG


def parser_of(role: str) -> argparse.ArgumentParser:
    """The flags that every pod has beside the keys of the configuration."""
    parser = argparse.ArgumentParser(
        prog=f"impala {role}",
        usage=f"impala {role} [--config FILE] [flags]",
        description=f"Runs one {role} in the foreground, as a container does. All other flags are "
        "configuration keys; `impala config --help` explains each.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file (YAML or JSON)")
    parser.add_argument(
        f"--{role}-id",
        dest="name",
        metavar="NAME",
        default=socket.gethostname(),
        help="unique in its run; default is the name of this host",
    )
    parser.add_argument(
        "--parent-pid", type=int, metavar="PID", help="stop when this process, our parent, is gone"
    )
    return parser


def find_modules_here() -> None:
    """``--env my_module:make_env`` is a module where the user is; it never hides one that is installed."""
    try:
        here = str(Path.cwd())
    except FileNotFoundError:  # it has been deleted
        return
    if here not in sys.path:
        sys.path.append(here)


def raise_file_limit() -> None:
    """Every peer is an open file, and many systems allow a process 1024 unless it asks for more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS calls its limit infinite, and refuses that
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def name_own_flag(error: str, own: Sequence[str]) -> str:
    """``error``, unless it is about a key that nobody knows and that looks like one of our ``own`` flags."""
    match = re.match(r"(--\S+): unknown key;", error)
    dotted = match is not None and "." in match[1]  # a key of a section, which no flag of our own is
    close = difflib.get_close_matches(match[1], own, n=1, cutoff=0.8) if match and not dotted else []
    return f"{match[1]}: unknown flag; did you mean {close[0]}?" if match and close else error


def _parse(role: str, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    try:
        return parser_of(role).parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from None
