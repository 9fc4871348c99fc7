"""What the policy's outputs mean: the only place that knows that actions are discrete.

The actor samples through this and the loss takes log-probabilities and entropies through it, so another
kind of action is another class with these methods and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Discrete:
    """One of ``num_actions``; the policy's outputs are unnormalised log-probabilities."""

    num_actions: int

    @property
    def num_outputs(self) -> int:
        """How many numbers the network gives per observation."""
        return self.num_actions

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions drawn from softmax(logits), by the Gumbel-max trick: one pass, no normalisation."""
        # Exponential(1) noise is never 0 in float32, so its log is finite.
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
        return (logits.float() - noise.log()).argmax(dim=-1)

    def most_likely(self, logits: Tensor) -> Tensor:
        """The action that the policy prefers."""
        return logits.argmax(dim=-1)

    def log_probs(self, logits: Tensor) -> Tensor:
        """log pi(.|x), of every action."""
        return logits.log_softmax(-1)

    def log_prob(self, logits: Tensor, actions: Tensor) -> Tensor:
        """log pi(a|x)."""
        return self.log_probs(logits).gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self, logits: Tensor) -> Tensor:
        """H(pi(.|x)) in nats."""
        log_probs = self.log_probs(logits)
        return -(log_probs.exp() * log_probs).sum(-1)
