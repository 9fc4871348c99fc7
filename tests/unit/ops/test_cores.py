"""How many cores a process may use."""

from __future__ import annotations

import os

import pytest

from services.ops.cores import num_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux pins processes to cores")
def test_cores_are_those_that_the_process_may_use_up_to_a_cap() -> None:
    allowed = os.sched_getaffinity(0)
    assert num_cores(10_000) == len(allowed)
    assert num_cores(1) == 1
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert num_cores(10_000) == 1
    finally:
        os.sched_setaffinity(0, allowed)
