"""KL(pi || pi~_mu) against cases solved by hand, and against the quantities that it is confused with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from services.rl.actions import Discrete
from services.rl.trust_region import implied_policy_kl


def kl(pi: list[float], mu: list[float], rho_bar: float = 1.0) -> float:
    """The code under test on one step, from probabilities."""
    return kl_of_logits(
        torch.tensor([[pi]]).double().log(), torch.tensor([[mu]]).double().log(), rho_bar
    ).item()


def kl_of_logits(logits: Tensor, behaviour_logits: Tensor, rho_bar: float = 1.0) -> Tensor:
    return implied_policy_kl(logits, behaviour_logits, Discrete(logits.shape[-1]), rho_bar)


@pytest.mark.parametrize("phi", [0.5, 0.6, 0.9, 0.999, 1 - 1e-9])
def test_of_two_mirrored_policies_the_implied_one_is_uniform(phi: float) -> None:
    # mu = (phi, 1 - phi), pi = (1 - phi, phi): min(mu, pi) is the same for both actions.
    entropy = -phi * math.log(phi) - (1 - phi) * math.log(1 - phi)
    expected = math.log(2) - entropy
    assert kl(pi=[1 - phi, phi], mu=[phi, 1 - phi]) == pytest.approx(expected, abs=1e-7)


# pi = (.6, .3, .1), mu = (.2, .3, .5). With rho_bar 1 min(mu, pi) = (.2, .3, .1), so pi~ = (1/3, 1/2, 1/6):
# KL(pi || pi~) = .6 ln 1.8 + .4 ln .6 = .1483417. It is neither KL(pi~ || pi) = ln(5/9) / 3 + ln(5/3) 2/3
# = .1446215, nor KL(mu || pi) = .2 ln(1/3) + .5 ln 5 = .5849965, nor KL(pi || mu) = .6 ln 3 + .1 ln .2
# = .4982236.
# With rho_bar 2 pi~ = (.4, .3, .1) / .8; with 3 and more pi~ = pi; with 1/2 pi~ = (.1, .15, .1) / .35.
@pytest.mark.parametrize(
    ("rho_bar", "expected"),
    [
        (1.0, 0.1483417),
        (2.0, 0.6 * math.log(1.2) + 0.4 * math.log(0.8)),
        (3.0, 0.0),
        (1000.0, 0.0),
        (0.5, 0.6 * math.log(2.1) + 0.3 * math.log(0.7) + 0.1 * math.log(0.35)),
    ],
)
def test_an_asymmetric_case_worked_out_by_hand(rho_bar: float, expected: float) -> None:
    assert kl(pi=[0.6, 0.3, 0.1], mu=[0.2, 0.3, 0.5], rho_bar=rho_bar) == pytest.approx(expected, abs=1e-7)


def test_the_roles_of_the_two_policies_are_not_symmetric() -> None:
    # The other way round pi~ is the same, but KL(mu || pi~) = .2 ln .6 + .3 ln .6 + .5 ln 3 = .2938933.
    assert kl(pi=[0.2, 0.3, 0.5], mu=[0.6, 0.3, 0.1]) == pytest.approx(0.2938933, abs=1e-7)


def test_nothing_changes_when_a_constant_is_added_to_the_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 3, 5, generator=generator, dtype=torch.float64)
    behaviour_logits = torch.randn(7, 3, 5, generator=generator, dtype=torch.float64)
    before = kl_of_logits(logits, behaviour_logits)
    assert before.shape == (7, 3)
    assert (before > 0.01).any()
    offsets = 10 * torch.randn(7, 3, 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(kl_of_logits(logits + offsets, behaviour_logits), before)
    torch.testing.assert_close(kl_of_logits(logits, behaviour_logits + offsets), before)
    # The minimum of raw logits is another one: there, an offset decides which of the two policies it is.
    implied = torch.minimum(behaviour_logits + offsets, logits).log_softmax(-1)
    log_pi = logits.log_softmax(-1)
    raw = (log_pi.exp() * (log_pi - implied)).sum(-1)
    assert not torch.allclose(raw, before, rtol=0.1)


@pytest.mark.parametrize("rho_bar", [0.3, 1.0, 2.0])
def test_on_policy_it_is_0_whatever_the_bar(rho_bar: float) -> None:
    logits = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(2))
    distance = kl_of_logits(logits, logits + 3.0, rho_bar)
    torch.testing.assert_close(distance, torch.zeros(7, 3), rtol=0.0, atol=1e-6)


def test_what_the_policy_has_given_up_does_not_matter() -> None:
    # pi = (1, 0): all that pi~ keeps is pi's own action, however rarely mu took it.
    assert kl(pi=[1 - 1e-12, 1e-12], mu=[0.01, 0.99]) == pytest.approx(0.0, abs=1e-8)


def test_policies_without_a_common_action_are_far_apart_and_not_nan() -> None:
    distance = kl_of_logits(torch.tensor([[[90.0, -90.0]]]), torch.tensor([[[-90.0, 90.0]]]))
    # min(mu, pi) is e^-180 for both actions: pi~ is uniform.
    assert distance.item() == pytest.approx(math.log(2))


def test_no_gradient_flows_through_it() -> None:
    logits = torch.randn(2, 2, 3, requires_grad=True)
    assert not kl_of_logits(logits, torch.randn(2, 2, 3)).requires_grad
