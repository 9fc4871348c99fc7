"""The actor-critic loss of IMPALA: policy gradient, baseline and entropy terms over V-trace targets.

Before it come the network's outputs for a batch of rollouts; after it, the backward pass. Everything is
float32 whatever precision the network ran in. V-trace runs on values, the baseline and the advantages on the
scale of the task (``popart``), which without PopArt is the same. Shapes: T time, B batch, A policy outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from services.config import LossConfig
from services.rl.actions import Discrete
from services.rl.popart import Scale
from services.rl.rewards import REWARD_CLIPPING
from services.rl.trust_region import implied_policy_kl
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
    """False where there is nothing to learn: the environment reset itself and no action was taken."""
    fresh_B: Tensor | None = None
    """False for replayed rollouts; None if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The terms as they are summed, and what is worth watching. Without T and B they are scalars."""

    total: Tensor
    policy: Tensor
    baseline: Tensor
    entropy: Tensor
    """The loss term, -entropy_cost x sum of entropies."""
    mean_entropy: Tensor
    """Per step, in nats."""
    rho_clipped_ratio: Tensor
    """Share of steps whose importance weight exceeds rho_bar."""
    rejected_ratio: Tensor
    """Share of steps outside of the trust region."""
    targets_TB: Tensor
    """V-trace targets of the values."""
    counts_TB: Tensor
    """1 where the policy and the baseline learn, 0 elsewhere."""
    num_steps: Tensor
    """That were acted: what a mean is over."""


def impala_loss(
    *,
    logits_TBA: Tensor,
    baselines_TB: Tensor,
    bootstrap_B: Tensor,
    scale: Scale,
    experience: Experience,
    actions: Discrete,
    config: LossConfig,
    trust_region: float | None = None,
) -> Loss:
    """pg + baseline_cost/2 (n(v) - n(V))^2 - entropy_cost H, reduced over the steps that were acted.

    ``baselines_TB`` and ``bootstrap_B`` are normalised. With ``trust_region``, steps whose implied policy is
    further away than that cut the trace and leave the policy and the baseline term.
    """
    log_probs_TB = actions.log_prob(logits_TBA, experience.actions_TB)
    behaviour_log_probs_TB = actions.log_prob(experience.behaviour_logits_TBA, experience.actions_TB)
    log_rhos_TB = log_probs_TB.detach() - behaviour_log_probs_TB
    mask_TB = experience.mask_TB.float()
    if trust_region is None:
        trusted_TB, counts_TB = None, mask_TB
    else:
        kl_TB = implied_policy_kl(logits_TBA, experience.behaviour_logits_TBA, actions, config.rho_bar)
        trusted_TB = (kl_TB < trust_region).float()
        counts_TB = mask_TB * trusted_TB
    values_TB = scale.sigma_B * baselines_TB.detach() + scale.mean_B
    targets = vtrace(
        log_rhos_TB=log_rhos_TB,
        discounts_TB=config.discount * (~experience.terminated_TB).float(),
        rewards_TB=REWARD_CLIPPING[config.reward_clipping](experience.rewards_TB),
        values_TB=values_TB,
        bootstrap_value_B=scale.sigma_B * bootstrap_B.detach() + scale.mean_B,
        mask_TB=mask_TB,
        trusted_TB=trusted_TB,
        rho_bar=config.rho_bar,
        c_bar=config.c_bar,
        pg_rho_bar=config.pg_rho_bar,
        trace_lambda=config.trace_lambda,
    )
    num_steps = mask_TB.sum().clamp(min=1.0)
    entropies_TB = actions.entropy(logits_TBA) * mask_TB
    entropy_sum = entropies_TB.sum()
    # Replayed experience must not push today's policy towards uniform once more.
    fresh_B = experience.fresh_B
    rewarded_sum = entropy_sum if fresh_B is None else (entropies_TB * fresh_B).sum()
    errors_TB = (targets.vs_TB - scale.mean_B) / scale.sigma_B - baselines_TB
    # rho^ ((r + g v' - mu) / sigma - n(V)) is the advantage over sigma.
    policy = -(log_probs_TB * (targets.pg_advantages_TB / scale.sigma_B) * counts_TB).sum()
    baseline = config.baseline_cost * 0.5 * (errors_TB.square() * counts_TB).sum()
    entropy = -config.entropy_cost * rewarded_sum
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
        rejected_ratio=(mask_TB - counts_TB).sum() / num_steps,
        targets_TB=targets.vs_TB,
        counts_TB=counts_TB,
        num_steps=num_steps,
    )
