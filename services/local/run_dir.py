"""The directory of a run: what it is called, whose it is, and what is in it when a run is resumed.

``cli`` chooses one here; ``train`` holds it open, which locks it, and hands the lock to every pod. Never two
launchers write into the same directory, nor a launcher beside the last pods of a dead one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from services import config as configuration
from services.config import ConfigError, RunConfig

LAST_PODS_S = 40.0
"""How long a resumed run waits for pods that have just lost their launcher: they are saving."""

POLL_S = 0.1

FROZEN = (
    "env.id",
    "env.kwargs",
    "env.frame_stack",
    "env.frame_height",
    "env.frame_width",
    "env.color",
    "env.full_action_set",
    "tasks",
    "network",
    "popart.enabled",
    "popart.min_sigma",
    "popart.max_sigma",
    "optimiser.name",
)
"""Keys, and whole sections, that a run keeps: with others its checkpoints would be of no use."""


def with_new_run_dir(config: RunConfig, now: datetime) -> RunConfig:
    """``config`` with a directory of its own: runs/<time>-<env>."""
    env = re.sub(r"[^A-Za-z0-9.]+", "-", config.title.rpartition("/")[2]).strip("-.")
    first = Path("runs") / f"{now:%Y%m%d-%H%M%S}-{env}"
    names = [first, *(first.with_name(f"{first.name}-{number}") for number in range(2, 100))]
    free = next((name for name in names if not name.exists()), first)
    return config.model_copy(update={"run_dir": free})


def resumed_config(run_dir: Path, environment: Mapping[str, str], flags: Sequence[str]) -> RunConfig:
    """The configuration of the run in ``run_dir``, overridden by ``environment`` and ``flags``."""
    if not (run_dir / "config.json").is_file():
        raise ConfigError(f"--resume {run_dir}: holds no run; allowed is a directory with a config.json")
    before = configuration.load(run_dir / "config.json")
    config = configuration.load(run_dir / "config.json", environment, flags)
    was, now = _leaves(configuration.dump(before)), _leaves(configuration.dump(config))
    contradictions = [
        f"{key} = {now[key]!r}: the run in {run_dir} began with {was[key]!r}"
        for key in was
        if now[key] != was[key] and any(key == frozen or key.startswith(f"{frozen}.") for frozen in FROZEN)
    ]
    momentum = "optimiser.rmsprop_momentum"
    if bool(now[momentum]) != bool(was[momentum]):  # its averages are there, or are not
        contradictions.append(
            f"{momentum} = {now[momentum]!r}: the run in {run_dir} began with {was[momentum]!r}"
        )
    if contradictions:
        raise ConfigError("\n".join(contradictions))
    return config.model_copy(update={"run_dir": run_dir})


def _leaves(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and prefix + key != "env.kwargs":
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


@contextlib.contextmanager
def open_run_dir(config: RunConfig, resume: bool) -> Iterator[int]:
    """Prepare ``config.run_dir`` and hold its lock, whose file descriptor is for the pods to inherit.

    They hold it too, so that nobody resumes a run whose pods are still writing, even if its launcher is dead.
    """
    run_dir = config.run_dir
    if not resume and (run_dir / "config.json").exists():
        raise ConfigError(f"run_dir = {run_dir}: already holds a run; continue it with --resume {run_dir}")
    if not resume and run_dir.is_dir() and any(run_dir.iterdir()) and not (run_dir / ".lock").exists():
        raise ConfigError(f"run_dir = {run_dir}: is not empty; allowed is a new or an empty directory")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run_dir = {run_dir}: cannot be written ({error.strerror})") from None
    try:
        _wait_for_lock(lock, run_dir)
        try:
            _furnish(lock, config, resume)
        except OSError as error:
            where = error.filename or run_dir
            raise ConfigError(f"run_dir = {run_dir}: cannot be written ({where}: {error.strerror})") from None
        yield lock
    finally:
        os.close(lock)


def _furnish(lock: int, config: RunConfig, resume: bool) -> None:
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    for name in ("logs", "checkpoints"):
        (config.run_dir / name).mkdir(exist_ok=True)
    if resume:  # the checkpoint is the truth; newer weights that were never saved would contradict it
        shutil.rmtree(config.run_dir / "paramserver", ignore_errors=True)
    write_json(config.run_dir / "config.json", configuration.dump(config))


def write_json(path: Path, values: object) -> None:
    """Readers see the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _wait_for_lock(lock: int, run_dir: Path) -> None:
    """Take the lock; if only the last pods of a dead launcher hold it, wait for them to stop."""
    deadline_s = time.monotonic() + LAST_PODS_S
    told = False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace")
            if not holder.isdigit() or Path("/proc", holder).exists() or time.monotonic() > deadline_s:
                raise ConfigError(
                    f"run_dir = {run_dir}: in use by another launcher (process {holder}) or its last pods"
                ) from None
        if not told:
            print(
                f"impala: the last pods of a killed launcher are still in {run_dir}; waiting", file=sys.stderr
            )
            told = True
        time.sleep(POLL_S)
