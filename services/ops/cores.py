"""How many cores this process may use."""

from __future__ import annotations

import os


def num_cores(cap: int) -> int:
    """At most ``cap``: a container often sees all cores of its host, and may use few of them."""
    if hasattr(os, "sched_getaffinity"):  # Linux, where not all of them need be ours
        return min(cap, len(os.sched_getaffinity(0)))
    return min(cap, os.cpu_count() or 1)
