"""A batch out of an actor's hands: for gates in which actor and trainer take turns in one process."""

from __future__ import annotations

import torch

from services.actor.loop import Half
from services.learner.batch import Batch
from services.rl.networks.recurrent import cuts_of


def batch_of(half: Half) -> Batch:
    """The unroll of all of its environments, as the batcher would lay it out."""
    columns = half.env.num_envs
    first = half.episode_start.shape[1] - half.action.shape[1] - 1  # before it, only frame history
    episode_start = torch.from_numpy(half.episode_start)
    return Batch(
        observation=torch.from_numpy(half.observation),
        episode_start=episode_start,
        action=torch.from_numpy(half.action),
        behaviour_logits=torch.from_numpy(half.behaviour_logits),
        reward=torch.from_numpy(half.reward),
        terminated=torch.from_numpy(half.terminated),
        task=torch.zeros(columns, dtype=torch.int64),
        tasks=(0,) * columns,
        policy_versions=(half.policy_version,) * columns,
        num_fresh=columns,
        cuts=cuts_of(episode_start.T[first:]),
        release=lambda: None,
    )
