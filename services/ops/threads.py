"""How many threads the numeric libraries of this process may start, and how those wait.

Call before the first import of torch.
"""

from __future__ import annotations

import os

from services.config import RunConfig
from services.ops.cores import num_cores

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def learner_threads(config: RunConfig) -> int:
    """Those of the training step. Several learners on one machine share its cores."""
    if config.learner.num_threads is not None:
        return config.learner.num_threads
    if config.network.name != "deep":
        return 1
    return max(1, num_cores(4 * config.learners) // config.learners)


def limit_threads(count: int) -> None:
    """Libraries read these when they load. Left alone, each takes every core, and pods collide.

    Threads of OpenMP that wait for each other sleep, unless the user wants otherwise. They would spin, and
    take from the actors on the same cores, and from each other, the time in which they could be done: beside
    busy processes an update of the deep network took five times as long.
    """
    for variable in VARIABLES:
        os.environ[variable] = str(count)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
