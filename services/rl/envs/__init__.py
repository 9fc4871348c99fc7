"""Environments: from ``env.id`` to N of them that step together.

A suite is one file beside this one and one line in ``SUITES``; the first suite that plays an id gets it.
The actor's loop comes after this; rewards leave unclipped and frames unstacked. ``base`` has the contract.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from services.config import EnvConfig
from services.rl.envs import atari, catch, gym, recall
from services.rl.envs.base import EnvSpec, Suite, Transition, VectorEnv
from services.rl.envs.checked import CheckedVectorEnv

__all__ = ["SUITES", "EnvSpec", "Suite", "Transition", "VectorEnv", "env_spec", "make_vector_env"]

SUITES: Mapping[str, Suite] = {
    "catch": catch,
    "recall": recall,
    "atari": atari,
    "gymnasium": gym,  # last: its registry may know Atari games by other settings
}


def env_spec(config: EnvConfig) -> EnvSpec:
    """What ``config``'s environment looks like; may open one and close it."""
    return _suite(config.id).spec(config)


def make_vector_env(config: EnvConfig, num_envs: int, *, num_threads: int = 1) -> VectorEnv:
    """``num_envs`` environments; ``num_threads`` is for suites that step on threads of their own."""
    assert min(num_envs, num_threads) >= 1, f"{num_envs = }, {num_threads = }"
    return CheckedVectorEnv(_suite(config.id).make(config, num_envs, num_threads))


def _suite(env_id: str) -> Suite:
    for suite in SUITES.values():
        if suite.plays(env_id):
            return suite
    known: dict[str, str] = {}  # by full name and by bare name: ALE/Pong-v5 is close to `pomg` as well
    for known_id in (known_id for suite in SUITES.values() for known_id in suite.known_ids()):
        known[known_id.lower()] = known_id
        known[re.sub(r"^.*/|-v\d+$", "", known_id.lower())] = known_id
    matches = difflib.get_close_matches(env_id.lower(), known, n=3, cutoff=0.5)
    close = list(dict.fromkeys(known[match] for match in matches))
    suggestion = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
        f"env.id = {env_id!r}: unknown; {suggestion}Allowed are ids of the suites {', '.join(SUITES)}, "
        "and package.module:factory"
    )
