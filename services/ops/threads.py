"""How many threads the numeric libraries of this process may start. Call before the first import of torch."""

from __future__ import annotations

import os

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def limit_threads(count: int) -> None:
    """Libraries read these when they load. Left alone, each takes every core, and pods collide."""
    for variable in VARIABLES:
        os.environ[variable] = str(count)
