"""The three terms of the loss: each against plain numpy, and what must not matter to any of them.

Also on normalised baselines (PopArt), with a trust region and with replayed columns.
"""

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
from services.rl.popart import Scale
from services.rl.rewards import REWARD_CLIPPING
from tests.unit.rl.reference import Bars, Column, v_trace

T, B, A = 6, 3, 4
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that goes into one loss, in float64."""

    logits: Floats
    baselines: Floats
    """On the scale of ``mean`` and ``sigma``, like ``bootstrap``."""
    bootstrap: Floats
    actions: npt.NDArray[np.int64]
    behaviour_logits: Floats
    rewards: Floats
    terminated: npt.NDArray[np.bool_]
    mask: npt.NDArray[np.bool_]
    mean: Floats
    sigma: Floats
    fresh: npt.NDArray[np.bool_]

    @property
    def values(self) -> Floats:
        """The baselines on the scale of the rewards."""
        return self.sigma * self.baselines + self.mean

    def trusted(self, config: LossConfig, trust_region: float | None) -> npt.NDArray[np.bool_]:
        """KL(pi || pi~) < b, from probabilities as section 4 of the paper has it."""
        if trust_region is None:
            return np.ones((T, B), np.bool_)
        pi, mu = np.exp(log_softmax(self.logits)), np.exp(log_softmax(self.behaviour_logits))
        implied = np.minimum(config.rho_bar * mu, pi)
        implied /= implied.sum(-1, keepdims=True)
        trusted: npt.NDArray[np.bool_] = (pi * np.log(pi / implied)).sum(-1) < trust_region
        return trusted

    def column(self, b: int, config: LossConfig, trust_region: float | None = None) -> Column:
        """What the slow V-trace wants to know."""
        pi, mu = log_softmax(self.logits), log_softmax(self.behaviour_logits)
        chosen = self.actions[:, b]
        clipped = REWARD_CLIPPING[config.reward_clipping](torch.tensor(self.rewards)).numpy()
        return Column(
            log_rhos=(pi - mu)[np.arange(T), b, chosen].tolist(),
            rewards=clipped[:, b].tolist(),
            values=self.values[:, b].tolist(),
            bootstrap_value=float(self.sigma[b] * self.bootstrap[b] + self.mean[b]),
            gamma=config.discount,
            terminated=self.terminated[:, b].tolist(),
            is_reset=(~self.mask[:, b]).tolist(),
            trusted=self.trusted(config, trust_region)[:, b].tolist(),
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
        mean=np.zeros(B),
        sigma=np.ones(B),
        fresh=np.ones(B, np.bool_),
    )


def multi_task_case() -> Case:
    """Each column on a scale of its own: a mean far from 0, tiny rewards, and large ones."""
    return replace(
        random_case(), mean=np.array([50.0, -0.02, 0.0]), sigma=np.array([2.0, 0.03, 400.0]), fresh=REPLAYED
    )


REPLAYED = np.array([False, True, False])
"""Columns 0 and 2 are."""


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of the total."""

    logits: Tensor
    baselines: Tensor


def loss_of(
    case: Case, config: LossConfig, trust_region: float | None = None, *, replay: bool = True
) -> tuple[Loss, Gradients]:
    logits = torch.tensor(case.logits, requires_grad=True)
    baselines = torch.tensor(case.baselines, requires_grad=True)
    bootstrap = torch.tensor(case.bootstrap, requires_grad=True)
    loss = impala_loss(
        logits_TBA=logits,
        baselines_TB=baselines,
        bootstrap_B=bootstrap,
        scale=Scale(mean_B=torch.tensor(case.mean), sigma_B=torch.tensor(case.sigma)),
        experience=Experience(
            actions_TB=torch.tensor(case.actions),
            behaviour_logits_TBA=torch.tensor(case.behaviour_logits),
            rewards_TB=torch.tensor(case.rewards),
            terminated_TB=torch.tensor(case.terminated),
            mask_TB=torch.tensor(case.mask),
            fresh_B=torch.tensor(case.fresh) if replay else None,
        ),
        actions=Discrete(A),
        config=config,
        trust_region=trust_region,
    )
    loss.total.backward()
    assert logits.grad is not None and baselines.grad is not None
    assert bootstrap.grad is None, "the bootstrap value is a target, never trained through"
    return loss, Gradients(logits=logits.grad, baselines=baselines.grad)


def values_of(loss: Loss) -> dict[str, float]:
    """The terms and figures."""
    names = {field.name for field in fields(loss)} - {"targets_TB", "counts_TB", "num_steps"}
    return {name: getattr(loss, name).item() for name in names}


GAMMA = 0.875
"""Exact in float32, in which the loss holds its discounts, and so is its product with lambda."""
OFF_POLICY = LossConfig(
    discount=GAMMA,
    baseline_cost=0.7,
    entropy_cost=0.03,
    rho_bar=1.3,
    c_bar=0.9,
    pg_rho_bar=1.1,
    trace_lambda=0.75,
)
CONFIGS = [
    pytest.param(LossConfig(discount=GAMMA), id="defaults"),
    pytest.param(OFF_POLICY, id="every-knob-turned"),
    pytest.param(LossConfig(discount=GAMMA, reward_clipping="soft_asymmetric"), id="soft-asymmetric"),
    pytest.param(LossConfig(discount=GAMMA, reward_clipping="none", reduction="mean"), id="mean"),
]


VARIANTS = [
    pytest.param(random_case(), None, id="plain"),
    pytest.param(multi_task_case(), None, id="popart"),
    pytest.param(random_case(), 0.2, id="trust-region"),
    pytest.param(multi_task_case(), 0.2, id="popart-and-trust-region"),
]


@pytest.mark.parametrize(("case", "trust_region"), VARIANTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_each_term_equals_an_independent_computation(
    case: Case, trust_region: float | None, config: LossConfig
) -> None:
    bars = Bars(
        rho_bar=config.rho_bar,
        c_bar=config.c_bar,
        pg_rho_bar=config.pg_rho_bar,
        trace_lambda=config.trace_lambda,
    )
    log_pi, log_mu = log_softmax(case.logits), log_softmax(case.behaviour_logits)
    trusted = case.trusted(config, trust_region)
    assert trusted[case.mask].any() and trusted[case.mask].all() == (trust_region is None)
    policy = baseline = entropy = fresh_entropy = 0.0
    steps = clipped = rejected = 0
    targets = np.zeros((T, B))
    for b in range(B):
        vs, advantages = v_trace(case.column(b, config, trust_region), bars)
        targets[:, b] = vs
        for t in range(T):
            if not case.mask[t, b]:
                continue
            action = case.actions[t, b]
            if trusted[t, b]:
                policy += -log_pi[t, b, action] * advantages[t] / case.sigma[b]
                normalised = (vs[t] - case.mean[b]) / case.sigma[b]
                baseline += config.baseline_cost / 2 * (normalised - case.baselines[t, b]) ** 2
            here = -float((np.exp(log_pi[t, b]) * log_pi[t, b]).sum())
            entropy += here
            fresh_entropy += here * case.fresh[b]
            clipped += np.exp(log_pi - log_mu)[t, b, action] > config.rho_bar
            rejected += not trusted[t, b]
            steps += 1
    scale = steps if config.reduction == "mean" else 1
    loss, _ = loss_of(case, config, trust_region)
    assert loss.num_steps.item() == steps
    assert values_of(loss) == pytest.approx(
        {
            "total": (policy + baseline - config.entropy_cost * fresh_entropy) / scale,
            "policy": policy / scale,
            "baseline": baseline / scale,
            "entropy": -config.entropy_cost * fresh_entropy / scale,
            "mean_entropy": entropy / steps,
            "rho_clipped_ratio": clipped / steps,
            "rejected_ratio": rejected / steps,
        },
        rel=1e-9,
    )
    np.testing.assert_allclose(loss.targets_TB, targets, rtol=1e-9)
    np.testing.assert_array_equal(loss.counts_TB, case.mask & trusted)


@pytest.mark.parametrize(("case", "trust_region"), VARIANTS)
def test_the_gradients_are_those_of_the_papers_three_sums(case: Case, trust_region: float | None) -> None:
    # d/dlogits: adv / sigma (pi - 1{a}) where it counts, + entropy_cost pi (log pi + H) in fresh columns;
    # d/dn(V): -baseline_cost ((v - mu) / sigma - n(V)) where it counts. All masked.
    config = LossConfig(discount=GAMMA, entropy_cost=0.03)
    pi = np.exp(log_softmax(case.logits))
    entropies = -(pi * np.log(pi)).sum(-1)
    counts = case.mask & case.trusted(config, trust_region)
    _, gradients = loss_of(case, config, trust_region)
    for b in range(B):
        vs, advantages = v_trace(case.column(b, config, trust_region), Bars())
        for t in range(T):
            chosen = np.eye(A)[case.actions[t, b]]
            wanted = counts[t, b] * advantages[t] / case.sigma[b] * (pi[t, b] - chosen)
            bonus = config.entropy_cost * pi[t, b] * (np.log(pi[t, b]) + entropies[t, b])
            wanted += case.mask[t, b] * case.fresh[b] * bonus
            np.testing.assert_allclose(gradients.logits[t, b], wanted, rtol=1e-9, atol=1e-12)
            normalised = (vs[t] - case.mean[b]) / case.sigma[b]
            np.testing.assert_allclose(
                gradients.baselines[t, b],
                counts[t, b] * config.baseline_cost * (case.baselines[t, b] - normalised),
                rtol=1e-9,
                atol=1e-12,
            )


def test_rewards_and_values_on_another_scale_have_the_same_gradients_once_normalised() -> None:
    # r -> 1000 r with sigma 1000 is the same problem in other units, and so is V -> V + 7 with mean 7 where
    # every step terminates in a reward that is 7 larger.
    config = LossConfig(reward_clipping="none")
    case = replace(random_case(), sigma=np.full(B, 0.5))
    scaled = replace(case, rewards=1000 * case.rewards, sigma=1000 * case.sigma)
    ends = replace(case, terminated=np.ones((T, B), np.bool_))
    shifted = replace(ends, rewards=ends.rewards + 7.0, mean=np.full(B, 7.0))
    for one, other in ((case, scaled), (ends, shifted)):
        one_gradients, other_gradients = loss_of(one, config)[1], loss_of(other, config)[1]
        torch.testing.assert_close(one_gradients.logits, other_gradients.logits)
        torch.testing.assert_close(one_gradients.baselines, other_gradients.baselines)
    unscaled = replace(scaled, sigma=case.sigma)  # and without the normalisation they differ
    assert not torch.allclose(loss_of(unscaled, config)[1].logits, loss_of(case, config)[1].logits, rtol=0.1)


def test_baselines_become_values_on_the_scale_of_their_own_column() -> None:
    # Where nobody acted v = V: shift = scale = 3, 2, 1 and outputs of one give 6, 4, 2.
    case = replace(
        random_case(),
        baselines=np.ones((T, B)),
        mask=np.zeros((T, B), np.bool_),
        mean=np.array([3.0, 2.0, 1.0]),
        sigma=np.array([3.0, 2.0, 1.0]),
    )
    loss, _ = loss_of(case, LossConfig())
    assert loss.targets_TB.tolist() == [[6.0, 4.0, 2.0]] * T


def test_a_rejected_step_changes_nothing_after_it_and_passes_on_no_more_than_its_own_difference() -> None:
    # One column that plays on-policy but for step 2, where the policy has turned around; step 2 is rejected.
    # gamma = 1, values 0, rewards 1, 2, 4, 8, 16, 32. rho_2 = 1, as its action happened to keep its
    # probability. So v = 1+2+4, 2+4, 4 up to there, and 8+16+32, 16+32, 32 beyond.
    behaviour = np.tile(np.log([0.25, 0.25, 0.25, 0.25]), (T, 1, 1))
    logits = behaviour.copy()
    logits[2] = np.log([0.25, 0.0001, 0.0001, 0.7498])
    case = Case(
        logits=logits,
        baselines=np.zeros((T, 1)),
        bootstrap=np.zeros(1),
        actions=np.zeros((T, 1), np.int64),
        behaviour_logits=behaviour,
        rewards=np.exp2(np.arange(T, dtype=np.float64))[:, None],
        terminated=np.zeros((T, 1), np.bool_),
        mask=np.ones((T, 1), np.bool_),
        mean=np.zeros(1),
        sigma=np.ones(1),
        fresh=np.ones(1, np.bool_),
    )
    # pi~ at step 2 is (.25, .0001, .0001, .25) / .5002: KL = .2502 ln .5002 + .7498 ln (.7498 x .5002 / .25).
    config = LossConfig(discount=1.0, reward_clipping="none", entropy_cost=0.1)
    loss, gradients = loss_of(case, config, trust_region=0.12)
    assert loss.targets_TB.flatten().tolist() == pytest.approx([7.0, 6.0, 4.0, 56.0, 48.0, 32.0])
    assert loss.counts_TB.flatten().tolist() == [1, 1, 0, 1, 1, 1]
    assert loss.rejected_ratio.item() == pytest.approx(1 / 6)
    # Step 2 has left the baseline's term; what is left of the policy's gradient is the entropy bonus.
    assert gradients.baselines.flatten().tolist() == pytest.approx([-3.5, -3.0, 0.0, -28.0, -24.0, -16.0])
    pi = np.exp(logits[2, 0])
    bonus = 0.1 * pi * (np.log(pi) - (pi * np.log(pi)).sum())
    np.testing.assert_allclose(gradients.logits[2, 0], bonus, rtol=1e-6, atol=1e-9)
    # A wider region takes the step back in, and the returns are whole again.
    accepted, _ = loss_of(case, config, trust_region=0.14)
    assert accepted.targets_TB.flatten().tolist() == pytest.approx([63.0, 62.0, 60.0, 56.0, 48.0, 32.0])
    assert accepted.rejected_ratio.item() == 0.0


def test_a_region_that_holds_every_step_is_as_good_as_none() -> None:
    case = multi_task_case()
    within, within_gradients = loss_of(case, LossConfig(), trust_region=1e6)
    without, without_gradients = loss_of(case, LossConfig(), trust_region=None)
    assert values_of(within) == values_of(without)
    assert torch.equal(within_gradients.logits, without_gradients.logits)


def test_where_every_step_is_rejected_only_the_entropy_bonus_of_fresh_columns_is_left() -> None:
    case = replace(random_case(), fresh=REPLAYED)
    loss, gradients = loss_of(case, LossConfig(), trust_region=1e-9)
    figures = values_of(loss)
    assert figures["policy"] == figures["baseline"] == 0.0
    assert figures["rejected_ratio"] == 1.0
    assert figures["total"] == figures["entropy"] < 0.0
    assert not gradients.baselines.any()
    assert gradients.logits[:, 1].any() and not gradients.logits[:, [0, 2]].any()


def test_only_fresh_columns_pay_for_entropy_but_all_are_measured() -> None:
    case = random_case()
    replayed = replace(case, fresh=REPLAYED)
    all_fresh, some_fresh = (
        values_of(loss_of(case, LossConfig())[0]),
        values_of(loss_of(replayed, LossConfig())[0]),
    )
    log_pi = log_softmax(case.logits)[:, 1][case.mask[:, 1]]
    assert some_fresh["entropy"] == pytest.approx(0.01 * (np.exp(log_pi) * log_pi).sum(), rel=1e-6)
    assert some_fresh["entropy"] > all_fresh["entropy"]
    for figure in ("policy", "baseline", "mean_entropy"):
        assert some_fresh[figure] == all_fresh[figure]


def test_a_batch_without_replay_is_one_whose_columns_are_all_fresh() -> None:
    case = random_case()
    told, told_gradients = loss_of(case, LossConfig())
    untold, untold_gradients = loss_of(case, LossConfig(), replay=False)
    assert values_of(told) == values_of(untold)
    assert torch.equal(told_gradients.logits, untold_gradients.logits)


def test_the_mean_rescales_everything_together_by_the_steps_that_were_acted() -> None:
    case = random_case()
    steps = T * B - 2
    summed, sum_gradients = loss_of(case, LossConfig(reduction="sum"))
    mean, mean_gradients = loss_of(case, LossConfig(reduction="mean"))
    for term in ("total", "policy", "baseline", "entropy"):
        assert values_of(summed)[term] == pytest.approx(steps * values_of(mean)[term])
    for figure in ("mean_entropy", "rho_clipped_ratio", "rejected_ratio"):
        assert values_of(summed)[figure] == values_of(mean)[figure]
    torch.testing.assert_close(sum_gradients.logits, steps * mean_gradients.logits)
    torch.testing.assert_close(sum_gradients.baselines, steps * mean_gradients.baselines)


def test_the_sum_grows_with_the_batch_and_the_mean_does_not() -> None:
    case = random_case()
    axis = {"bootstrap": 0, "mean": 0, "sigma": 0, "fresh": 0}
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
@pytest.mark.parametrize("trust_region", [None, 0.2])
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
    changes: dict[str, Any], config: LossConfig, trust_region: float | None
) -> None:
    case = multi_task_case()
    loss, gradients = loss_of(case, config, trust_region)
    other_loss, other_gradients = loss_of(everywhere_else(case, **changes), config, trust_region)
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


@pytest.mark.parametrize("trust_region", [None, 0.2])
def test_a_batch_in_which_nobody_acted_is_worth_nothing(trust_region: float | None) -> None:
    case = replace(random_case(), mask=np.zeros((T, B), np.bool_))
    for config in (LossConfig(reduction="sum"), LossConfig(reduction="mean")):
        loss, gradients = loss_of(case, config, trust_region)
        assert set(values_of(loss).values()) <= {0.0}
        assert not gradients.logits.any()
        assert not gradients.baselines.any()
        assert not loss.counts_TB.any()


def test_rewards_are_clipped_before_anything_else_sees_them() -> None:
    case = random_case()
    clipped = replace(case, rewards=case.rewards.clip(-1, 1))
    assert values_of(loss_of(case, LossConfig())[0]) == values_of(
        loss_of(clipped, LossConfig(reward_clipping="none"))[0]
    )
    assert values_of(loss_of(case, LossConfig())[0]) != values_of(
        loss_of(case, LossConfig(reward_clipping="none"))[0]
    )
