"""Log lines: one event a line whatever the values hold, and no more lines than allowed."""

import io
import logging as std_logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.ops import logging
from services.ops.logging import LONGEST_VALUE, format_value


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """What a pod with the role `learner` logs at level info; the process's own logging comes back after."""
    root, ours = std_logging.getLogger(), std_logging.getLogger("impala")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers = []  # `setup` would close pytest's
    stream = io.StringIO()
    logging.setup("learner", "info", stream)
    yield stream
    std_logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


class ClosedPipe(io.StringIO):
    """Its reader has gone: `impala train --plain | head -1`."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_lines_that_nobody_can_read_are_lost_without_a_word(
    output: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.setup("train", "info", ClosedPipe())
    logging.get_logger("train").info("progress", steps=1)
    assert capsys.readouterr() == ("", "")
    assert output.getvalue() == ""


def failure() -> Exception:
    """An error that has really been raised, so that it has a traceback."""
    try:
        Path("/dev/null/nothing").read_bytes()
    except OSError as error:
        return error
    raise AssertionError


def test_a_line_has_time_level_role_event_and_fields(output: io.StringIO) -> None:
    logging.get_logger("checkpoint").info("checkpoint_written", path="runs/x/7", steps=12800, seconds=0.25)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info learner checkpoint_written "
        r"path=runs/x/7 steps=12800 seconds=0\.25\n",
        output.getvalue(),
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("word", "word"),
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("line\nbreak", '"line\\nbreak"'),
        ("\x1b[31mred", '"\\u001b[31mred"'),
        ("\u2028", '"\\u2028"'),
        ("Zürich", "Zürich"),
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (1234567, "1234567"),
        (1 / 3, "0.333333"),
        (float("nan"), "nan"),
        (ValueError("bad thing"), '"ValueError: bad thing"'),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_value_is_one_word_or_quoted(value: object, written: str) -> None:
    assert format_value(value) == written


def test_a_value_of_any_length_leaves_a_line_of_bounded_length(output: io.StringIO) -> None:
    logging.get_logger("intake").info("malformed", data="x" * 10_000_000)
    assert len(output.getvalue()) < LONGEST_VALUE + 200


def test_an_error_is_one_line_and_its_traceback_is_for_debugging(output: io.StringIO) -> None:
    logging.get_logger("store").warning("snapshot_failed", error=failure())
    assert output.getvalue().count("\n") == 1
    assert "Not a directory" in output.getvalue()
    assert "Traceback" not in output.getvalue()

    std_logging.getLogger("impala").setLevel("DEBUG")
    logging.get_logger("store").warning("snapshot_failed", error=failure())
    assert "Traceback" in output.getvalue()


def test_a_crash_keeps_its_traceback(output: io.StringIO) -> None:
    logging.get_logger("main").crash("failed", failure(), part="intake")
    first, *rest = output.getvalue().splitlines()
    assert " error learner failed error=" in first
    assert first.endswith(" part=intake")
    assert rest[0].startswith("Traceback")


def test_events_below_the_level_are_not_written(output: io.StringIO) -> None:
    logging.get_logger("main").debug("turned")
    assert output.getvalue() == ""


def test_warnings_of_other_libraries_are_lines_too_and_their_chatter_is_not(output: io.StringIO) -> None:
    std_logging.getLogger("gymnasium").info("chatter")
    with warnings.catch_warnings():  # pytest has its own capture, which must not see this one
        warnings.resetwarnings()
        std_logging.captureWarnings(True)
        warnings.warn("old and\nunsafe", stacklevel=1)
    std_logging.getLogger("gymnasium").warning("look %s", "out")
    assert 'warning learner log logger=gymnasium message="look out"' in output.getvalue()
    assert "chatter" not in output.getvalue()


def test_a_limited_logger_writes_an_event_once_per_interval_and_counts_the_rest(output: io.StringIO) -> None:
    now_s = 0.0
    log = logging.get_logger("intake").limited(10.0, clock=lambda: now_s)
    for now_s in (0.0, 1.0, 9.9, 10.0, 11.0, 20.0):
        log.warning("malformed", at=now_s)
    assert [line.partition("malformed ")[2] for line in output.getvalue().splitlines()] == [
        "at=0",
        "at=10 suppressed=2",
        "at=20 suppressed=1",
    ]


def test_a_limited_logger_keeps_events_apart(output: io.StringIO) -> None:
    log = logging.get_logger("intake").limited(10.0, clock=lambda: 0.0)
    log.warning("malformed")
    log.warning("oversized")
    log.warning("malformed")
    assert len(output.getvalue().splitlines()) == 2
