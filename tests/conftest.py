"""What every test may rely on: one thread per process, and tools that are there or honestly missing.

A tool or an optional package that is missing skips the test on a laptop and fails it in CI, so that CI never
turns green by skipping. A GPU is no tool: without one, tests marked `cuda` are skipped everywhere.
"""

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

RequireTool = Callable[[str], Path]


def pytest_configure() -> None:
    # The environment is for the processes that tests start; torch in this one has already read it.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    torch.set_num_threads(1)
    # Who is started in the background by a shell without job control ignores Ctrl-C, and so do its children.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true"}


def needs_package(name: str) -> pytest.MarkDecorator:
    """Skips a test where the package is missing. Not in CI: there the test runs into its absence."""
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing and not in_ci(), reason=f"{name} is not installed")


def find_tool(name: str) -> Path:
    """The path of the program `name`; without it, skips the running test, or fails it in CI."""
    path = shutil.which(name)
    if path is not None:
        return Path(path)
    reason = f"the program {name!r} is not installed"
    if in_ci():
        pytest.fail(f"{reason}, and CI must not skip; .ci/run is where it gets installed", pytrace=False)
    pytest.skip(reason)


def not_permitted(reason: str) -> NoReturn:
    """Ends the running test, which needs more rights than there are: a skip, or a failure in CI."""
    if in_ci():
        pytest.fail(f"{reason}; CI must not skip: run it as root", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def require_tool() -> RequireTool:
    """`prometheus = require_tool("prometheus")`: its path, or a skip (a failure in CI)."""
    return find_tool
