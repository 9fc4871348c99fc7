"""One process of a run, over all its lives: starting, stopping, its last words, when it may start again.

``plan`` says what to start, ``launcher`` says when. Nothing here waits, except for a process that it has
killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections import deque

from services.local.plan import PodSpec


class Backoff:
    """How long to wait before a pod starts again: 0.2 s, doubling to 10 s; anew after 60 s of life.

    A pod that dies five times within a minute will not come right by itself, and a user who is looking
    elsewhere wants to find an error message, not a loop.
    """

    FIRST_S = 0.2
    LONGEST_S = 10.0
    WINDOW_S = 60.0
    MOST_DEATHS = 5

    def __init__(self) -> None:
        self._delay_s = self.FIRST_S
        self._deaths_s: deque[float] = deque()

    def after_death(self, alive_s: float, now_s: float) -> float | None:
        """The delay before the next start; None if there should be no next start."""
        self._deaths_s.append(now_s)
        while now_s - self._deaths_s[0] > self.WINDOW_S:
            self._deaths_s.popleft()
        if len(self._deaths_s) >= self.MOST_DEATHS:
            return None
        if alive_s >= self.WINDOW_S:
            self._delay_s = self.FIRST_S
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, self.LONGEST_S)
        return delay_s


class Pod:
    """One process of the run, over all its lives."""

    def __init__(self, spec: PodSpec, lock: int) -> None:
        self.spec = spec
        self.restarts = 0
        self.started_s = 0.0
        self.start_at_s: float | None = None
        """When to start it again; None while it lives."""
        self.backoff = Backoff()
        self._lock = lock
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0

    @property
    def alive(self) -> bool:
        """Started and not yet gone."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of the latest life; a signal's number, negated, if that ended it."""
        return self._process.poll() if self._process else None

    def start(self, now_s: float) -> None:
        """A new life, in a session of its own, so that a Ctrl-C in the terminal reaches only the launcher."""
        with self.spec.log.open("ab") as log:
            self._log_offset = log.tell()
            self._process = subprocess.Popen(
                self.spec.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.spec.environment),
                start_new_session=True,
                pass_fds=(self._lock,),
            )
        self.started_s, self.start_at_s = now_s, None

    def terminate(self) -> None:
        """Ask it to stop."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End it and whatever it has started, dead or alive."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_words(self) -> str:
        """The last error that this life has logged, or else its last line."""
        lines = self._output()
        errors = [line for line in lines if line.startswith("impala ") or re.match(r"\S+Z error ", line)]
        return (errors or lines or [""])[-1]

    def complaints(self) -> tuple[str, ...]:
        """What this life has told the user: the lines that begin with its command, without that."""
        prefix = f"impala {self.spec.role}: "
        return tuple(line.removeprefix(prefix) for line in self._output() if line.startswith(prefix))

    def _output(self) -> list[str]:
        """The lines of this life, only the latest if it is talkative."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(max(self._log_offset, log.seek(0, os.SEEK_END) - 2**16))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return []
        return [line.strip() for line in lines if line.strip()]
