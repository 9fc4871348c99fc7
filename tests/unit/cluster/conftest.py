"""Commands set up the logging of their process, which here is the tests'."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def own_logging() -> Iterator[None]:
    """The process's own logging comes back after."""
    root, ours = logging.getLogger(), logging.getLogger("impala")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers = []  # a command's `setup` would close pytest's
    yield
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
