"""What all learners of a group must have in common, in a few characters.

Learners with different losses or schedules would make different steps of the same gradients. So each one says
with its ``Attend`` what it trains with, and the parameter server keeps out who differs from the others.
"""

from __future__ import annotations

import hashlib
import json

from services import config as configuration
from services.config import RunConfig

SHARED = (
    "env",
    "tasks",
    "network",
    "loss",
    "popart",
    "replay",
    "optimiser",
    "unroll_length",
    "batch_size",
    "total_steps",
)


def fingerprint(config: RunConfig, device_type: str) -> str:
    """Of the keys in ``SHARED``. GPUs and processors have no way to sum with each other."""
    dumped = configuration.dump(config)
    shared = {key: dumped[key] for key in SHARED} | {"device": device_type}
    text = json.dumps(shared, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()
