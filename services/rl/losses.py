"""The actor-critic loss of IMPALA: policy gradient, baseline and entropy terms over V-trace targets.

Before it come the network's outputs for a batch of rollouts; after it, the backward pass. Everything is
float32 whatever precision the network ran in. Shapes: T time, B batch, A policy outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from services.config import LossConfig
from services.rl.actions import Discrete
from services.rl.rewards import REWARD_CLIPPING
from services.rl.vtrace import vtrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """What the loss needs to know of a batch beside the network's outputs."""

    actions_TB: Tensor
    behaviour_logits_TBA: Tensor
    rewards_TB: Tensor
    """Raw."""
    terminated_TB: Tensor
    """The transition ended in a state whose value is 0. A time limit is not that."""
    mask_TB: Tensor
    """False where the environment reset itself and no action was taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The terms as they are summed, and what is worth watching. All are scalars on the device."""

    total: Tensor
    policy: Tensor
    baseline: Tensor
    entropy: Tensor
    """The loss term, -entropy_cost x sum of entropies."""
    mean_entropy: Tensor
    """Per step, in nats."""
    rho_clipped_ratio: Tensor
    """Share of steps whose importance weight exceeds rho_bar."""


def impala_loss(
    *,
    logits_TBA: Tensor,
    baselines_TB: Tensor,
    bootstrap_value_B: Tensor,
    experience: Experience,
    actions: Discrete,
    config: LossConfig,
) -> Loss:
    """pg + baseline_cost/2 (v - V)^2 - entropy_cost H, reduced over the steps that were acted."""
    log_probs_TB = actions.log_prob(logits_TBA, experience.actions_TB)
    behaviour_log_probs_TB = actions.log_prob(experience.behaviour_logits_TBA, experience.actions_TB)
    log_rhos_TB = log_probs_TB.detach() - behaviour_log_probs_TB
    mask_TB = experience.mask_TB.float()
    targets = vtrace(
        log_rhos_TB=log_rhos_TB,
        discounts_TB=config.discount * (~experience.terminated_TB).float(),
        rewards_TB=REWARD_CLIPPING[config.reward_clipping](experience.rewards_TB),
        values_TB=baselines_TB.detach(),
        bootstrap_value_B=bootstrap_value_B.detach(),
        mask_TB=mask_TB,
        rho_bar=config.rho_bar,
        c_bar=config.c_bar,
        pg_rho_bar=config.pg_rho_bar,
        trace_lambda=config.trace_lambda,
    )
    num_steps = mask_TB.sum().clamp(min=1.0)
    entropy_sum = (actions.entropy(logits_TBA) * mask_TB).sum()
    policy = -(log_probs_TB * targets.pg_advantages_TB * mask_TB).sum()
    baseline = config.baseline_cost * 0.5 * ((targets.vs_TB - baselines_TB).square() * mask_TB).sum()
    entropy = -config.entropy_cost * entropy_sum
    if config.reduction == "mean":
        policy, baseline, entropy = policy / num_steps, baseline / num_steps, entropy / num_steps
    exceeds_TB = (log_rhos_TB.exp() > config.rho_bar).float() * mask_TB
    return Loss(
        total=policy + baseline + entropy,
        policy=policy,
        baseline=baseline,
        entropy=entropy,
        mean_entropy=entropy_sum / num_steps,
        rho_clipped_ratio=exceeds_TB.sum() / num_steps,
    )
