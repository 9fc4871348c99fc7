"""A disk without room, for as long as a test wants, and logs that have all the time for one that is slow."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

import pytest

from services.learner.replay_log import ReplayLog


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is closed waits for a disk that others use too; a test may still say for how long."""
    monkeypatch.setattr(ReplayLog, "close", partialmethod(ReplayLog.close, timeout_s=60.0))


@contextmanager
def full_disk(room_bytes: int) -> Iterator[None]:
    """No file grows beyond ``room_bytes``; more is an OSError (EFBIG), as ENOSPC would be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
