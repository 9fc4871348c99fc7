"""How many threads the numeric libraries of this process may start. Call before the first import of torch."""

from __future__ import annotations

import os

from services.config import RunConfig
from services.ops.cores import num_cores

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def learner_threads(config: RunConfig) -> int:
    """Those of the training step."""
    if config.learner.num_threads is not None:
        return config.learner.num_threads
    return num_cores(4) if config.network.name == "deep" else 1


def limit_threads(count: int) -> None:
    """Libraries read these when they load. Left alone, each takes every core, and pods collide."""
    for variable in VARIABLES:
        os.environ[variable] = str(count)
