"""A second lineage: the same cases through DeepMind's rlax, in float32, to 1e-5. Skipped where it is absent,
unless IMPALA_CI_RLAX asks for it.

Conventions that differ: rlax takes one column, and weights instead of their logarithms; it gives errors v - V
instead of targets; its c_bar is always 1; its advantage looks at lambda v' + (1 - lambda) V' where ours looks
at v'; and its PopArt moves by a step for each target, ours by one for their mean.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from services.config import LossConfig, PopArtConfig
from services.rl.actions import Discrete
from services.rl.losses import Experience, impala_loss
from services.rl.popart import PopArt, Scale, moments
from services.rl.vtrace import vtrace

rlax: Any = (
    importlib.import_module("rlax") if os.environ.get("IMPALA_CI_RLAX") else pytest.importorskip("rlax")
)

T, B, A = 20, 6, 5
Floats = npt.NDArray[np.float32]


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Floats:
    return rng.normal(scale=scale, size=shape).astype(np.float32)


def close(ours: Tensor, theirs: Any) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), np.asarray(theirs), rtol=1e-5, atol=1e-5)


def test_the_golden_values_of_v_trace() -> None:
    numbers = np.arange(5, dtype=np.float32)
    theirs = rlax.vtrace_td_error_and_advantage(
        numbers,
        np.append(numbers[1:], np.float32(1.0)),
        numbers,
        np.full(5, 0.9, np.float32),
        np.exp(np.array([-2.5, -1.5, -0.5, 0.5, 1.5], np.float32)),
        1.0,
        3.7,
        2.2,
    )
    close(torch.tensor([0.200182, 2.709682, 8.513628, 11.932397, 7.33]), numbers + theirs.errors)
    close(torch.tensor([0.200182, 1.709682, 6.513628, 10.876614, 1.98]), theirs.pg_advantage)


BARS = [
    pytest.param(1.0, 1.0, 1.0, id="defaults"),
    pytest.param(1.0, 1.0, 0.7, id="lambda"),
    pytest.param(1.0, 1.0, 0.0, id="lambda-0"),
    pytest.param(2.5, 1.0, 1.0, id="rho"),
    pytest.param(1.0, 2.5, 1.0, id="pg-rho"),
    pytest.param(0.4, 0.6, 0.9, id="all-below-1"),
]


@pytest.mark.parametrize(("rho_bar", "pg_rho_bar", "trace_lambda"), BARS)
@pytest.mark.parametrize("seed", range(5))
def test_v_trace_targets_and_advantages(
    rho_bar: float, pg_rho_bar: float, trace_lambda: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    log_rhos, rewards = normal(rng, T, B), normal(rng, T, B)
    values, bootstrap = normal(rng, T, B, scale=2.0), normal(rng, B, scale=2.0)
    discounts = (0.95 * (rng.random((T, B)) > 0.1)).astype(np.float32)
    mask = (rng.random((T, B)) > 0.1).astype(np.float32)
    trusted = (rng.random((T, B)) > 0.2).astype(np.float32)
    ours = vtrace(
        log_rhos_TB=torch.tensor(log_rhos),
        discounts_TB=torch.tensor(discounts),
        rewards_TB=torch.tensor(rewards),
        values_TB=torch.tensor(values),
        bootstrap_value_B=torch.tensor(bootstrap),
        mask_TB=torch.tensor(mask),
        trusted_TB=torch.tensor(trusted),
        rho_bar=rho_bar,
        pg_rho_bar=pg_rho_bar,
        trace_lambda=trace_lambda,
    )
    # A step that nobody acted is one whose weight is 0, and a cut is a lambda of 0 for that step.
    rhos, lambdas = np.exp(log_rhos) * mask, trace_lambda * trusted
    next_values = np.concatenate([values[1:], bootstrap[None]])
    for b in range(B):
        theirs = rlax.vtrace_td_error_and_advantage(
            values[:, b],
            next_values[:, b],
            rewards[:, b],
            discounts[:, b],
            rhos[:, b],
            lambdas[:, b].astype(np.float32),
            rho_bar,
            pg_rho_bar,
        )
        errors = np.asarray(theirs.errors)
        close(ours.vs_TB[:, b], values[:, b] + errors)
        shortfall = discounts[:-1, b] * (1 - lambdas[:-1, b]) * errors[1:]
        advantages = np.asarray(theirs.pg_advantage).copy()
        advantages[:-1] += np.minimum(pg_rho_bar, rhos[:-1, b]) * shortfall
        close(ours.pg_advantages_TB[:, b], advantages)


CENTRE, SPREAD = np.array([0.0, 2.0, -50.0]), np.array([0.1, 3.0, 20.0])


def test_popart_statistics_and_weights_over_100_updates() -> None:
    num_features, counted, step_size = 4, 2 * T, 0.05
    rng = np.random.default_rng(11)
    layer = PopArt(num_features, 3, PopArtConfig(step_size=step_size, min_sigma=0.5, max_sigma=15.0))
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor(normal(rng, 3, num_features)))
        layer.linear.bias.copy_(torch.tensor(normal(rng, 3)))
    initial_state, update = rlax.popart(3, step_size / counted, 0.5, 15.0)
    state = initial_state()
    params = {
        "w": layer.linear.weight.detach().numpy().T.copy(),
        "b": layer.linear.bias.detach().numpy().copy(),
    }
    for i in range(100):
        present = [0, 1, 2] if i % 3 else [0, 2]  # task 1 is absent now and then
        task_B = np.repeat(present, 2)
        targets = (CENTRE + SPREAD * rng.normal(size=(T, 1, 3)))[..., task_B].reshape(T, -1)
        targets = (targets + SPREAD[task_B] * rng.normal(size=targets.shape)).astype(np.float32)
        target_TB = torch.tensor(targets)
        layer.update(
            moments(target_TB, torch.ones_like(target_TB), torch.tensor(task_B), 3), torch.tensor(True)
        )
        params, state = update(params, state, targets, np.broadcast_to(task_B, targets.shape))
        close(layer.mean_K, state.shift)
        close(layer.second_moment_K, state.second_moment)
        close(layer.sigmas, state.scale)
        close(layer.linear.weight, np.asarray(params["w"]).T)
        close(layer.linear.bias, params["b"])
    assert layer.sigmas[0] == 0.5 and layer.sigmas[2] == 15.0  # both bounds were met
    assert 0.6 < layer.sigmas[1] < 14.0
    features, task_B = normal(rng, 7, num_features), rng.integers(0, 3, size=7)
    theirs = rlax.unnormalize_linear(state, features @ np.asarray(params["w"]) + params["b"], task_B)
    scale = layer.scale_of(torch.tensor(task_B))
    outputs = layer(torch.tensor(features))[torch.arange(7), torch.tensor(task_B)]
    close(outputs, theirs.normalized)
    size_B = scale.sigma_B + scale.mean_B.abs()  # of what is added up and may cancel
    close((scale.sigma_B * outputs + scale.mean_B) / size_B, theirs.unnormalized / size_B.numpy())


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # rlax would move two functions
def test_the_three_terms_of_a_loss_on_normalised_baselines() -> None:
    rng = np.random.default_rng(12)
    config = LossConfig(discount=0.9, reward_clipping="none", rho_bar=1.5, pg_rho_bar=1.2)
    task_B = np.array([2, 1, 0, 0, 1, 2])
    shift, sigma = np.array([0.0, -3.0, 40.0], np.float32), np.array([0.2, 4.0, 25.0], np.float32)
    state = rlax.PopArtState(shift, sigma, sigma**2 + shift**2)
    logits, behaviour_logits = normal(rng, T, B, A), normal(rng, T, B, A)
    actions = rng.integers(A, size=(T, B))
    rewards = normal(rng, T, B, scale=5.0)
    terminated = rng.random((T, B)) < 0.1
    baselines = normal(rng, T + 1, B)
    loss = impala_loss(
        logits_TBA=torch.tensor(logits),
        baselines_TB=torch.tensor(baselines[:-1]),
        bootstrap_B=torch.tensor(baselines[-1]),
        scale=Scale(mean_B=torch.tensor(shift[task_B]), sigma_B=torch.tensor(sigma[task_B])),
        experience=Experience(
            actions_TB=torch.tensor(actions),
            behaviour_logits_TBA=torch.tensor(behaviour_logits),
            rewards_TB=torch.tensor(rewards),
            terminated_TB=torch.tensor(terminated),
            mask_TB=torch.ones(T, B, dtype=torch.bool),
        ),
        actions=Discrete(A),
        config=config,
    )
    policy = baseline = entropy = 0.0
    values = np.asarray(rlax.unnormalize(state, baselines, np.broadcast_to(task_B, (T + 1, B))))
    for b in range(B):
        theirs = rlax.vtrace_td_error_and_advantage(
            values[:-1, b],
            values[1:, b],
            rewards[:, b],
            (config.discount * ~terminated[:, b]).astype(np.float32),
            rlax.categorical_importance_sampling_ratios(logits[:, b], behaviour_logits[:, b], actions[:, b]),
            1.0,
            config.rho_bar,
            config.pg_rho_bar,
        )
        targets = rlax.normalize(state, values[:-1, b] + theirs.errors, np.full(T, task_B[b]))
        weights = np.ones(T, np.float32)
        normalised_advantages = theirs.pg_advantage / sigma[task_B[b]]
        policy += T * rlax.policy_gradient_loss(logits[:, b], actions[:, b], normalised_advantages, weights)
        baseline += config.baseline_cost * rlax.l2_loss(baselines[:-1, b], targets).sum()
        entropy += T * config.entropy_cost * rlax.entropy_loss(logits[:, b], weights)
    assert loss.policy.item() == pytest.approx(float(policy), rel=1e-5)
    assert loss.baseline.item() == pytest.approx(float(baseline), rel=1e-5)
    assert loss.entropy.item() == pytest.approx(float(entropy), rel=1e-5)
