"""Logs: one event a line, ``time level role event key=value ...``, to stderr.

    2026-11-20T14:02:36.123Z info learner checkpoint_written path=runs/x/checkpoints/7 steps=12800

``setup`` is called once by a pod's ``__main__``; everybody else asks ``get_logger`` and names an event and
its fields. Whatever a field holds, it stays on its line and its length is bounded.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

LONGEST_VALUE = 2000
"""Characters of one value. What arrives from outside may be any length."""

_ROOT = "impala"


def setup(role: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send all logs of this process to ``stream`` (stderr); other libraries' only from warnings upward."""
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(_LineFormatter(role))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(_ROOT).setLevel(level.upper())
    logging.captureWarnings(True)


def get_logger(name: str) -> EventLogger:
    """The logger of one part of a pod."""
    return EventLogger(logging.getLogger(f"{_ROOT}.{name}"))


class EventLogger:
    """``log.info("regrouped", generation=3, world_size=2)``. An exception is a field like any other."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: object) -> None:
        """What only helps who reads the code."""
        self._emit(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """What happens in a healthy run."""
        self._emit(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """What is lost or late, though the pod goes on."""
        self._emit(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """What stops the pod, or needs a person."""
        self._emit(logging.ERROR, event, fields)

    def crash(self, event: str, error: BaseException, **fields: object) -> None:
        """An error that nobody expected: its line, and below it the traceback at every log level."""
        self._emit(logging.ERROR, event, {"error": error, **fields}, traceback_of=error)

    def limited(self, interval_s: float, clock: Callable[[], float] = time.monotonic) -> EventLogger:
        """A logger for what a hostile peer can provoke: each event at most once per ``interval_s``."""
        return _LimitedLogger(self._logger, interval_s, clock)

    def _emit(
        self,
        level: int,
        event: str,
        fields: dict[str, object],
        traceback_of: BaseException | None = None,
    ) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if traceback_of is None and self._logger.isEnabledFor(logging.DEBUG):
            errors = [value for value in fields.values() if isinstance(value, BaseException)]
            traceback_of = errors[0] if errors else None
        self._logger.log(level, event, extra={"fields": fields}, exc_info=traceback_of)


class _LimitedLogger(EventLogger):
    """Counts what it holds back, and says so with the event's next line."""

    def __init__(self, logger: logging.Logger, interval_s: float, clock: Callable[[], float]) -> None:
        super().__init__(logger)
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._last_s: dict[str, float] = {}
        self._suppressed: dict[str, int] = {}

    def _emit(
        self,
        level: int,
        event: str,
        fields: dict[str, object],
        traceback_of: BaseException | None = None,
    ) -> None:
        now_s = self._clock()
        with self._lock:
            if event in self._last_s and now_s - self._last_s[event] < self._interval_s:
                self._suppressed[event] = self._suppressed.get(event, 0) + 1
                return
            self._last_s[event] = now_s
            suppressed = self._suppressed.pop(event, 0)
        if suppressed:
            fields = {**fields, "suppressed": suppressed}
        super()._emit(level, event, fields, traceback_of)


class _Handler(logging.StreamHandler[TextIO]):
    """Loses lines silently when nobody can read them: a pipe or a terminal that is closed, a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the name is the base class's)
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


class _LineFormatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] | None = getattr(record, "fields", None)
        if fields is None:  # another library's
            event, fields = "log", {"logger": record.name, "message": record.getMessage().strip()}
        else:
            event = record.getMessage()
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        parts = [moment.replace("+00:00", "Z"), record.levelname.lower(), self._role, event]
        line = " ".join([*parts, *(f"{key}={format_value(value)}" for key, value in fields.items())])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def format_value(value: object) -> str:
    """``value`` as one word, quoted like JSON where it would not be one."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, BaseException):
        text = f"{type(value).__name__}: {value}" if str(value) else type(value).__name__
    else:
        text = str(value)
    if len(text) > LONGEST_VALUE:
        text = text[:LONGEST_VALUE] + "..."
    if text and text.isprintable() and not any(character in text for character in ' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.replace("\n", "").replace("\t", "").isprintable())
