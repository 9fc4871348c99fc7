"""Discrete actions: against torch.distributions, numbers by hand, and counts of many samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical

from services.rl.actions import Discrete


def test_the_network_gives_one_output_per_action() -> None:
    assert Discrete(6).num_outputs == 6


def test_log_probabilities_and_entropy_by_hand() -> None:
    # softmax(log 6, log 3, log 1) = (.6, .3, .1), whatever is added to all three.
    logits = torch.tensor([[math.log(6), math.log(3), 0.0]]) + 100.0
    actions = Discrete(3)
    for action, probability in enumerate((0.6, 0.3, 0.1)):
        log_prob = actions.log_prob(logits, torch.tensor([action]))
        assert log_prob.item() == pytest.approx(math.log(probability), abs=1e-5)
    entropy = -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))
    assert actions.entropy(logits).item() == pytest.approx(entropy, abs=1e-5)


def test_a_uniform_policy_has_the_largest_entropy_and_a_certain_one_none() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0]])
    assert Discrete(4).entropy(logits).tolist() == pytest.approx([math.log(4), 0.0])


def test_log_prob_and_entropy_equal_torch_distributions_with_their_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(7, 3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    chosen = torch.randint(5, (7, 3), generator=generator, dtype=torch.int32)
    actions, theirs = Discrete(5), Categorical(logits=logits)
    for our, their in (
        (actions.log_prob(logits, chosen), theirs.log_prob(chosen)),
        (actions.entropy(logits), theirs.entropy()),
    ):
        torch.testing.assert_close(our, their)
        (our_gradient,) = torch.autograd.grad(our.sum(), logits, retain_graph=True)
        (their_gradient,) = torch.autograd.grad(their.sum(), logits, retain_graph=True)
        torch.testing.assert_close(our_gradient, their_gradient)


def test_samples_are_distributed_as_softmax_of_the_logits() -> None:
    """Pearson's chi-square over 200,000 draws: below the 99.9 % quantile for 4 degrees of freedom, 18.47."""
    logits = torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0])
    num_samples = 200_000
    samples = Discrete(5).sample(logits.expand(num_samples, 5), generator=torch.Generator().manual_seed(1))
    expected = num_samples * logits.softmax(-1)
    observed = torch.bincount(samples, minlength=5)
    chi_square = ((observed - expected).square() / expected).sum().item()
    assert chi_square < 18.47, (observed.tolist(), expected.tolist())
    # The test can tell: against a policy that differs by .02 in one logit it fails.
    expected = num_samples * torch.tensor([1.0, -1.0, 0.0, 2.02, -3.0]).softmax(-1)
    assert ((observed - expected).square() / expected).sum().item() > 18.47


def test_each_row_is_sampled_from_its_own_logits_and_not_together_with_others() -> None:
    certain = torch.eye(4) * 100.0
    assert Discrete(4).sample(certain).tolist() == [0, 1, 2, 3]
    uniform = Discrete(4).sample(torch.zeros(1000, 4), generator=torch.Generator().manual_seed(1))
    assert len(uniform.unique()) == 4


def test_the_same_seed_draws_the_same_actions_and_the_generator_moves_on() -> None:
    logits = torch.zeros(100, 4)
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    draws = [Discrete(4).sample(logits, generator) for generator in (first, second, first)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_an_action_that_is_impossible_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0]).expand(10_000, 3)
    assert set(Discrete(3).sample(logits).tolist()) == {0, 2}
