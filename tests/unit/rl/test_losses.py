"""The three terms of the loss: each against plain numpy, and what must not matter to any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from services.config import LossConfig
from services.rl.actions import Discrete
from services.rl.losses import Experience, Loss, impala_loss
from services.rl.rewards import REWARD_CLIPPING
from tests.unit.rl.reference import Bars, Column, v_trace

T, B, A = 6, 3, 4
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that goes into one loss, in float64."""

    logits: Floats
    baselines: Floats
    bootstrap: Floats
    actions: npt.NDArray[np.int64]
    behaviour_logits: Floats
    rewards: Floats
    terminated: npt.NDArray[np.bool_]
    mask: npt.NDArray[np.bool_]

    def column(self, b: int, config: LossConfig) -> Column:
        """What the slow V-trace wants to know."""
        pi, mu = log_softmax(self.logits), log_softmax(self.behaviour_logits)
        chosen = self.actions[:, b]
        clipped = REWARD_CLIPPING[config.reward_clipping](torch.tensor(self.rewards)).numpy()
        return Column(
            log_rhos=(pi - mu)[np.arange(T), b, chosen].tolist(),
            rewards=clipped[:, b].tolist(),
            values=self.baselines[:, b].tolist(),
            bootstrap_value=float(self.bootstrap[b]),
            gamma=config.discount,
            terminated=self.terminated[:, b].tolist(),
            is_reset=(~self.mask[:, b]).tolist(),
        )


def random_case(seed: int = 1) -> Case:
    """Column 0 is truncated at step 2, column 1 terminates there, 3 resets both; column 2 loses a life."""
    rng = np.random.default_rng(seed)
    terminated, mask = np.zeros((T, B), np.bool_), np.ones((T, B), np.bool_)
    terminated[2, 1] = terminated[4, 2] = True
    mask[3, :2] = False
    return Case(
        logits=rng.normal(size=(T, B, A)),
        baselines=rng.normal(scale=2.0, size=(T, B)),
        bootstrap=rng.normal(scale=2.0, size=B),
        actions=rng.integers(A, size=(T, B)),
        behaviour_logits=rng.normal(size=(T, B, A)),
        rewards=rng.normal(scale=2.0, size=(T, B)) * mask,
        terminated=terminated,
        mask=mask,
    )


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of the total."""

    logits: Tensor
    baselines: Tensor


def loss_of(case: Case, config: LossConfig) -> tuple[Loss, Gradients]:
    logits = torch.tensor(case.logits, requires_grad=True)
    baselines = torch.tensor(case.baselines, requires_grad=True)
    bootstrap = torch.tensor(case.bootstrap, requires_grad=True)
    loss = impala_loss(
        logits_TBA=logits,
        baselines_TB=baselines,
        bootstrap_value_B=bootstrap,
        experience=Experience(
            actions_TB=torch.tensor(case.actions),
            behaviour_logits_TBA=torch.tensor(case.behaviour_logits),
            rewards_TB=torch.tensor(case.rewards),
            terminated_TB=torch.tensor(case.terminated),
            mask_TB=torch.tensor(case.mask),
        ),
        actions=Discrete(A),
        config=config,
    )
    loss.total.backward()
    assert logits.grad is not None and baselines.grad is not None
    assert bootstrap.grad is None, "the bootstrap value is a target, never trained through"
    return loss, Gradients(logits=logits.grad, baselines=baselines.grad)


def values_of(loss: Loss) -> dict[str, float]:
    return {field.name: getattr(loss, field.name).item() for field in fields(loss)}


OFF_POLICY = LossConfig(
    discount=0.9,
    baseline_cost=0.7,
    entropy_cost=0.03,
    rho_bar=1.3,
    c_bar=0.9,
    pg_rho_bar=1.1,
    trace_lambda=0.8,
)
CONFIGS = [
    pytest.param(LossConfig(), id="defaults"),
    pytest.param(OFF_POLICY, id="every-knob-turned"),
    pytest.param(LossConfig(reward_clipping="soft_asymmetric"), id="soft-asymmetric"),
    pytest.param(LossConfig(reward_clipping="none", reduction="mean"), id="mean"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_each_term_equals_an_independent_computation(config: LossConfig) -> None:
    case = random_case()
    bars = Bars(
        rho_bar=config.rho_bar,
        c_bar=config.c_bar,
        pg_rho_bar=config.pg_rho_bar,
        trace_lambda=config.trace_lambda,
    )
    log_pi, log_mu = log_softmax(case.logits), log_softmax(case.behaviour_logits)
    policy = baseline = entropy = clipped = 0.0
    steps = 0
    for b in range(B):
        vs, advantages = v_trace(case.column(b, config), bars)
        for t in range(T):
            if case.mask[t, b]:
                action = case.actions[t, b]
                policy += -log_pi[t, b, action] * advantages[t]
                baseline += config.baseline_cost / 2 * (vs[t] - case.baselines[t, b]) ** 2
                entropy += -float((np.exp(log_pi[t, b]) * log_pi[t, b]).sum())
                clipped += float(np.exp(log_pi - log_mu)[t, b, action] > config.rho_bar)
                steps += 1
    scale = steps if config.reduction == "mean" else 1
    loss, _ = loss_of(case, config)
    assert values_of(loss) == pytest.approx(
        {
            "total": (policy + baseline - config.entropy_cost * entropy) / scale,
            "policy": policy / scale,
            "baseline": baseline / scale,
            "entropy": -config.entropy_cost * entropy / scale,
            "mean_entropy": entropy / steps,
            "rho_clipped_ratio": clipped / steps,
        },
        rel=1e-6,  # the mask and the discounts are float32
    )


def test_the_gradients_are_those_of_the_papers_three_sums() -> None:
    # d/dlogits: adv (pi - 1{a}) + entropy_cost pi (log pi + H); d/dV: -baseline_cost (v - V). All masked.
    case, config = random_case(), LossConfig(entropy_cost=0.03)
    pi = np.exp(log_softmax(case.logits))
    entropies = -(pi * np.log(pi)).sum(-1)
    _, gradients = loss_of(case, config)
    for b in range(B):
        vs, advantages = v_trace(case.column(b, config), Bars())
        for t in range(T):
            acted = float(case.mask[t, b])
            chosen = np.eye(A)[case.actions[t, b]]
            wanted = advantages[t] * (pi[t, b] - chosen)
            wanted += config.entropy_cost * pi[t, b] * (np.log(pi[t, b]) + entropies[t, b])
            np.testing.assert_allclose(gradients.logits[t, b], acted * wanted, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(
                gradients.baselines[t, b],
                acted * config.baseline_cost * (case.baselines[t, b] - vs[t]),
                rtol=1e-6,
                atol=1e-9,
            )


def test_the_mean_rescales_everything_together_by_the_steps_that_were_acted() -> None:
    case = random_case()
    steps = T * B - 2
    summed, sum_gradients = loss_of(case, LossConfig(reduction="sum"))
    mean, mean_gradients = loss_of(case, LossConfig(reduction="mean"))
    for term in ("total", "policy", "baseline", "entropy"):
        assert values_of(summed)[term] == pytest.approx(steps * values_of(mean)[term])
    for figure in ("mean_entropy", "rho_clipped_ratio"):
        assert values_of(summed)[figure] == values_of(mean)[figure]
    torch.testing.assert_close(sum_gradients.logits, steps * mean_gradients.logits)
    torch.testing.assert_close(sum_gradients.baselines, steps * mean_gradients.baselines)


def test_the_sum_grows_with_the_batch_and_the_mean_does_not() -> None:
    case = random_case()
    axis = {"bootstrap": 0}
    twice = Case(
        **{
            field.name: np.concatenate([getattr(case, field.name)] * 2, axis=axis.get(field.name, 1))
            for field in fields(case)
        }
    )
    for config, factor in ((LossConfig(reduction="sum"), 2.0), (LossConfig(reduction="mean"), 1.0)):
        once_total, twice_total = (values_of(loss_of(c, config)[0])["total"] for c in (case, twice))
        assert twice_total == pytest.approx(factor * once_total)


def everywhere_else(case: Case, **changes: Any) -> Case:
    """The case with other values at its masked steps only."""
    replaced: Mapping[str, Any] = {
        name: np.where(
            case.mask if getattr(case, name).ndim == 2 else case.mask[..., None], getattr(case, name), value
        )
        for name, value in changes.items()
    }
    return replace(case, **replaced)


@pytest.mark.parametrize(
    "config",
    [LossConfig(reward_clipping="none"), LossConfig(reward_clipping="none", reduction="mean")],
    ids=["sum", "mean"],
)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rewards": 1e6}, id="reward"),
        pytest.param({"actions": 3}, id="action"),
        pytest.param({"logits": np.array([50.0, -50.0, 0.0, 3.0])}, id="policy"),
        pytest.param({"behaviour_logits": np.array([-80.0, 90.0, 0.0, 0.0])}, id="behaviour-policy"),
        pytest.param({"terminated": True}, id="terminated"),
        pytest.param(
            {"rewards": -1e6, "actions": 0, "behaviour_logits": np.array([-200.0, 0, 0, 0])}, id="all-at-once"
        ),
    ],
)
def test_nothing_at_a_masked_step_reaches_any_term_or_gradient(
    changes: dict[str, Any], config: LossConfig
) -> None:
    case = random_case()
    loss, gradients = loss_of(case, config)
    other_loss, other_gradients = loss_of(everywhere_else(case, **changes), config)
    assert values_of(other_loss) == values_of(loss)
    assert torch.equal(other_gradients.logits, gradients.logits)
    assert torch.equal(other_gradients.baselines, gradients.baselines)


def test_a_masked_step_has_no_gradient_of_its_own() -> None:
    case = random_case()
    _, gradients = loss_of(case, LossConfig(entropy_cost=0.1))
    masked = torch.tensor(~case.mask)
    assert not gradients.logits[masked].any()
    assert not gradients.baselines[masked].any()
    assert gradients.baselines[~masked].all()


def test_the_value_at_a_masked_step_matters_after_a_truncation_and_not_after_a_termination() -> None:
    case = random_case()
    before = values_of(loss_of(case, LossConfig())[0])["total"]
    for column, matters in ((0, True), (1, False)):
        baselines = case.baselines.copy()
        baselines[3, column] += 10.0
        after = values_of(loss_of(replace(case, baselines=baselines), LossConfig())[0])["total"]
        assert (after != before) is matters


def test_a_batch_in_which_nobody_acted_is_worth_nothing() -> None:
    case = replace(random_case(), mask=np.zeros((T, B), np.bool_))
    for config in (LossConfig(reduction="sum"), LossConfig(reduction="mean")):
        loss, gradients = loss_of(case, config)
        assert set(values_of(loss).values()) <= {0.0}
        assert not gradients.logits.any()
        assert not gradients.baselines.any()


def test_rewards_are_clipped_before_anything_else_sees_them() -> None:
    case = random_case()
    clipped = replace(case, rewards=case.rewards.clip(-1, 1))
    assert values_of(loss_of(case, LossConfig())[0]) == values_of(
        loss_of(clipped, LossConfig(reward_clipping="none"))[0]
    )
    assert values_of(loss_of(case, LossConfig())[0]) != values_of(
        loss_of(case, LossConfig(reward_clipping="none"))[0]
    )
