"""Disks that are small, and disks that can only be read: real ones, which needs to be root."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import not_permitted

FILLER = "filler"
FILL_BYTES = 4096


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[None]:
    """``directory`` is an empty one of its own, with room for ``size_bytes``."""
    directory.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", directory)
    try:
        yield
    finally:
        # Lazily: a pod that a failed test has yet to end works in it.
        subprocess.run(["umount", "--lazy", directory], check=True)


def fill(directory: Path) -> None:
    """Take what room there is left, to the last page."""
    with (directory / FILLER).open("ab", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(FILL_BYTES))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """What lies in ``directory`` can be read and not be changed, by nobody, not even by root."""
    _mount("--bind", directory, directory)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def _mount(*arguments: str | Path) -> None:
    """Skips the test where that is not allowed, as on a laptop; there CI fails."""
    if os.geteuid() != 0:
        not_permitted("needs to be root, to mount a disk")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        not_permitted(f"cannot mount a disk: {done.stderr.strip()}")
