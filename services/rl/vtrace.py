"""V-trace: off-policy corrected value targets and advantages (Espeholt et al. 2018, section 4.1).

Shapes: T time, B batch; ``values_TB`` are V(x_0..x_{T-1}) and ``bootstrap_value_B`` is V(x_T).
Nothing here is differentiated through: targets and advantages are constants of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VTrace:
    """``vs_TB`` regresses the baseline; ``pg_advantages_TB`` weighs the policy gradient."""

    vs_TB: Tensor
    pg_advantages_TB: Tensor


@torch.no_grad()
def vtrace(
    *,
    log_rhos_TB: Tensor,
    discounts_TB: Tensor,
    rewards_TB: Tensor,
    values_TB: Tensor,
    bootstrap_value_B: Tensor,
    mask_TB: Tensor | None = None,
    trusted_TB: Tensor | None = None,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    pg_rho_bar: float = 1.0,
    trace_lambda: float = 1.0,
) -> VTrace:
    """Targets v_s (equation 1) and advantages min(rho_bar_pg, rho_s) (r_s + g_s v_{s+1} - V_s).

    ``discounts_TB`` is gamma, or 0 where the transition ends in a termination. ``mask_TB`` is 0 for a
    transition that nobody acted, the reset after an episode: it has no temporal difference of its own and
    nothing flows across it, so v = V there and a truncated episode bootstraps from its final observation.
    ``trusted_TB`` is 0 where the trace is cut (lambda = 0): such a step keeps its temporal difference.
    """
    for name, tensor in (("discounts", discounts_TB), ("rewards", rewards_TB), ("values", values_TB)):
        assert tensor.shape == log_rhos_TB.shape, (
            f"{name}: {tensor.shape} against log_rhos {log_rhos_TB.shape}"
        )
    assert bootstrap_value_B.shape == log_rhos_TB.shape[1:], bootstrap_value_B.shape

    rhos_TB = log_rhos_TB.exp()
    next_values_TB = torch.cat([values_TB[1:], bootstrap_value_B.unsqueeze(0)])
    deltas_TB = rhos_TB.clamp(max=rho_bar) * (rewards_TB + discounts_TB * next_values_TB - values_TB)
    decays_TB = discounts_TB * trace_lambda * rhos_TB.clamp(max=c_bar)
    if mask_TB is not None:
        deltas_TB = deltas_TB * mask_TB
        decays_TB = decays_TB * mask_TB
    if trusted_TB is not None:
        decays_TB = decays_TB * trusted_TB

    # v_s - V_s = delta_s + g_s c_s (v_{s+1} - V_{s+1}), backward from v_T = V_T.
    corrections_TB = torch.empty_like(deltas_TB)
    correction_B = torch.zeros_like(bootstrap_value_B)
    for t in reversed(range(deltas_TB.shape[0])):
        correction_B = torch.addcmul(deltas_TB[t], decays_TB[t], correction_B)
        corrections_TB[t] = correction_B
    vs_TB = values_TB + corrections_TB

    next_vs_TB = torch.cat([vs_TB[1:], bootstrap_value_B.unsqueeze(0)])
    advantages_TB = rhos_TB.clamp(max=pg_rho_bar) * (rewards_TB + discounts_TB * next_vs_TB - values_TB)
    if mask_TB is not None:
        advantages_TB = advantages_TB * mask_TB
    return VTrace(vs_TB=vs_TB, pg_advantages_TB=advantages_TB)
