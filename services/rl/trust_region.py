"""Which replayed steps may still teach: LASER's trust region (Schmitt et al. 2019, section 4).

V-trace does not learn the value of pi but of the implied policy pi~ ~ min(rho_bar mu, pi). Where the two are
far apart, which only old experience can bring about, the target says little about pi. Shapes: T time, B
batch, A actions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.rl.actions import Discrete


@torch.no_grad()
def implied_policy_kl(
    logits_TBA: Tensor, behaviour_logits_TBA: Tensor, actions: Discrete, rho_bar: float
) -> Tensor:
    """KL(pi || pi~_mu) of each step, in nats; pi~_mu is proportional to min(rho_bar mu, pi)."""
    log_pi_TBA = actions.log_probs(logits_TBA)
    log_mu_TBA = actions.log_probs(behaviour_logits_TBA)
    implied_TBA = torch.minimum(log_mu_TBA + math.log(rho_bar), log_pi_TBA).log_softmax(-1)
    return (log_pi_TBA.exp() * (log_pi_TBA - implied_TBA)).sum(-1)
