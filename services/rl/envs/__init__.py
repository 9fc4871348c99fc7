"""Environments: from ``env.id`` to N of them that step together.

A suite is one file beside this one and one line in ``SUITES``; the first suite that plays an id gets it.
The actor's loop comes after this; rewards leave unclipped and frames unstacked. ``base`` has the contract.
Importing this is cheap: a suite loads its emulator when it is asked for an environment.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from services.config import EnvConfig
from services.rl.envs import atari, catch, dmlab, gym, recall, vizdoom
from services.rl.envs.base import EnvSpec, Suite, Transition, VectorEnv
from services.rl.envs.checked import CheckedVectorEnv
from services.rl.envs.mixed import Mixed

__all__ = [
    "SUITES",
    "EnvSpec",
    "Suite",
    "Transition",
    "VectorEnv",
    "env_spec",
    "make_mixed_env",
    "make_vector_env",
    "union_spec",
]

SUITES: Mapping[str, Suite] = {
    "catch": catch,
    "recall": recall,
    "atari": atari,
    "vizdoom": vizdoom,
    "dmlab": dmlab,
    "gymnasium": gym,  # last: its registry may know Atari games by other settings
}


def env_spec(config: EnvConfig) -> EnvSpec:
    """What ``config``'s environment looks like; may open one and close it."""
    return _suite(config.id).spec(config)


def make_vector_env(config: EnvConfig, num_envs: int, *, num_threads: int = 1) -> VectorEnv:
    """``num_envs`` environments; ``num_threads`` is for suites that step on threads of their own."""
    assert min(num_envs, num_threads) >= 1, f"{num_envs = }, {num_threads = }"
    return CheckedVectorEnv(_suite(config.id).make(config, num_envs, num_threads))


def union_spec(specs: Sequence[EnvSpec]) -> EnvSpec:
    """What one policy for all of them must fit: the same observations, and as many actions as any has."""
    for one, other in pairwise(specs):
        for field in (
            "observation_shape",
            "observation_dtype",
            "frame_stack",
            "frame_skip",
            "instruction_length",
        ):
            if (mine := getattr(one, field)) != (theirs := getattr(other, field)):
                raise ValueError(
                    f"tasks: {field} of {one.id} is {mine} and of {other.id} is {theirs}; "
                    "allowed are tasks for which it is the same, because one policy plays them all"
                )
    first, *others = specs
    return replace(
        first,
        id=f"{first.id} and {len(others)} more" if others else first.id,
        num_actions=max(spec.num_actions for spec in specs),
    )


def make_mixed_env(
    tasks: Sequence[EnvConfig], counts: Sequence[int], num_threads: int = 1, *, num_actions: int | None = None
) -> VectorEnv:
    """``counts`` environments of each task, in order. ``num_actions`` is for a policy that knows more actions
    than any of them, from tasks that are played elsewhere."""
    spec = union_spec([env_spec(task) for task in tasks])
    num_actions = num_actions or spec.num_actions
    if len(tasks) == 1 and num_actions == spec.num_actions:
        return make_vector_env(tasks[0], counts[0], num_threads=num_threads)
    parts = [
        make_vector_env(task, count, num_threads=max(1, num_threads * count // sum(counts)))
        for task, count in zip(tasks, counts, strict=True)
    ]
    return CheckedVectorEnv(Mixed(replace(spec, num_actions=num_actions), parts))


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
