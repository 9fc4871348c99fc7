"""How every pod begins: command line, configuration, logs and signals, before anything slow is imported.

A pod's ``__main__`` comes after it and builds the rest. What the user can mend is a ``ValueError`` that names
the field, the value and what is allowed; here it becomes one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import os
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
"""(configuration, name of this pod, life cycle) -> exit code: 0 stopped as asked, 1 failed."""


def main(role: str, argv: Sequence[str] | None, run: Run) -> int:
    """Run one pod of ``role``; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=f"impala {role}",
        description="All other flags are configuration keys; `impala config --help` explains each.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="configuration file (YAML or JSON)")
    parser.add_argument(f"--{role}-id", dest="name", default=socket.gethostname(), help="unique in its run")
    parser.add_argument("--parent-pid", type=int, help="stop when this process, our parent, is gone")
    arguments, flags = parser.parse_known_args(argv)
    try:
        config = configuration.load(arguments.config, os.environ, flags)
        logging.setup(role, config.ops.log_level)
        lifecycle = Lifecycle()
        lifecycle.install_signals()
        if arguments.parent_pid is not None:
            lifecycle.watch_parent(arguments.parent_pid)
        return run(config, arguments.name, lifecycle)
    except ValueError as error:
        sys.stderr.write("".join(f"impala {role}: {line}\n" for line in str(error).splitlines()))
        return BAD_CONFIG
