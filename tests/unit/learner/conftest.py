"""What the learner does not wait for long is waited for longer here: the machine does other things too."""

from __future__ import annotations

from functools import partialmethod

import pytest

from services.learner import group
from services.learner.replay_log import ReplayLog


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With learners that come late and with a slow disk; a test of just that says for how long."""
    monkeypatch.setattr(group, "MEET_S", 60.0)
    monkeypatch.setattr(ReplayLog, "close", partialmethod(ReplayLog.close, timeout_s=60.0))
