"""V-trace against published numbers, numbers worked out by hand, and a slow reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from services.rl.vtrace import VTrace, vtrace
from tests.unit.rl.reference import Bars, Column, v_trace


def column(values: list[float]) -> Tensor:
    """[T, 1] in float64."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def flat(tensor: Tensor) -> list[float]:
    """The only column of [T, 1]."""
    result: list[float] = tensor.squeeze(1).tolist()
    return result


def of_one_column(
    *,
    rewards: list[float],
    values: list[float],
    bootstrap_value: float,
    discounts: list[float],
    log_rhos: list[float] | None = None,
    mask: list[float] | None = None,
    trusted: list[float] | None = None,
    bars: Bars | None = None,
) -> tuple[list[float], list[float]]:
    """(v, advantages) for B = 1."""
    result = vtrace(
        log_rhos_TB=column(log_rhos or [0.0] * len(rewards)),
        discounts_TB=column(discounts),
        rewards_TB=column(rewards),
        values_TB=column(values),
        bootstrap_value_B=torch.tensor([bootstrap_value], dtype=torch.float64),
        mask_TB=None if mask is None else column(mask),
        trusted_TB=None if trusted is None else column(trusted),
        **vars(bars or Bars()),
    )
    return flat(result.vs_TB), flat(result.pg_advantages_TB)


def test_the_golden_values_of_an_independent_implementation_are_met() -> None:
    vs, advantages = of_one_column(
        log_rhos=[-2.5, -1.5, -0.5, 0.5, 1.5],
        discounts=[0.9] * 5,
        rewards=[0.0, 1.0, 2.0, 3.0, 4.0],
        values=[0.0, 1.0, 2.0, 3.0, 4.0],
        bootstrap_value=1.0,
        bars=Bars(rho_bar=3.7, pg_rho_bar=2.2),
    )
    assert vs == pytest.approx([0.200182, 2.709682, 8.513628, 11.932397, 7.33], abs=1e-6)
    assert advantages == pytest.approx([0.200182, 1.709682, 6.513628, 10.876614, 1.98], abs=1e-6)


def test_on_policy_without_truncation_the_targets_are_n_step_returns() -> None:
    # v_2 = 4 + .5 x 8 = 8; v_1 = 3 + .5 x 8 = 7; v_0 = 1 + .5 x 7 = 4.5, whatever the values are.
    for values in ([0.0, 0.0, 0.0], [10.0, -3.0, 7.0]):
        vs, advantages = of_one_column(
            rewards=[1.0, 3.0, 4.0], values=values, bootstrap_value=8.0, discounts=[0.5] * 3
        )
        assert vs == pytest.approx([4.5, 7.0, 8.0])
        assert advantages == pytest.approx([v - value for v, value in zip(vs, values, strict=True)])


def test_with_lambda_0_the_targets_look_one_step_ahead() -> None:
    # v_0 = 1 + .5 x 20 = 11; v_1 = 3 + .5 x 30 = 18; v_2 = 4 + .5 x 8 = 8.
    vs, advantages = of_one_column(
        rewards=[1.0, 3.0, 4.0],
        values=[10.0, 20.0, 30.0],
        bootstrap_value=8.0,
        discounts=[0.5] * 3,
        bars=Bars(trace_lambda=0.0),
    )
    assert vs == pytest.approx([11.0, 18.0, 8.0])
    # Advantages look at v_{s+1}: 1 + .5 x 18 - 10 = 0; 3 + .5 x 8 - 20 = -13; 4 + .5 x 8 - 30 = -22.
    assert advantages == pytest.approx([0.0, -13.0, -22.0])


# Two steps, gamma = 1, rewards 1 and 10, all values 0: delta_0 = rho^_0, delta_1 = 10 rho^_1, and
# v_0 = rho^_0 + lambda c_0 10 rho^_1; adv_0 = rho^pg_0 (1 + v_1), adv_1 = 10 rho^pg_1. With rho = (2, 4):
@pytest.mark.parametrize(
    ("bars", "vs", "advantages"),
    [
        pytest.param(Bars(), [11.0, 10.0], [11.0, 10.0], id="all-1"),
        pytest.param(Bars(rho_bar=3.0), [2 + 30, 30.0], [31.0, 10.0], id="rho-between"),
        pytest.param(Bars(rho_bar=4.0), [2 + 40, 40.0], [41.0, 10.0], id="rho-at-the-largest"),
        pytest.param(Bars(rho_bar=9.0), [2 + 40, 40.0], [41.0, 10.0], id="rho-above-all"),
        pytest.param(Bars(c_bar=1.5), [1 + 15, 10.0], [11.0, 10.0], id="c-below"),
        pytest.param(Bars(c_bar=9.0), [1 + 20, 10.0], [11.0, 10.0], id="c-above-all"),
        pytest.param(Bars(pg_rho_bar=3.0), [11.0, 10.0], [2 * 11, 30.0], id="pg-between"),
        pytest.param(Bars(c_bar=9.0, trace_lambda=0.5), [1 + 10, 10.0], [11.0, 10.0], id="lambda"),
        pytest.param(Bars(rho_bar=0.5), [0.5 + 5, 5.0], [6.0, 10.0], id="rho-below-all"),
    ],
)
def test_each_bar_truncates_its_own_weight_and_no_other(
    bars: Bars, vs: list[float], advantages: list[float]
) -> None:
    result_vs, result_advantages = of_one_column(
        log_rhos=[math.log(2.0), math.log(4.0)],
        rewards=[1.0, 10.0],
        values=[0.0, 0.0],
        bootstrap_value=0.0,
        discounts=[1.0, 1.0],
        bars=bars,
    )
    assert result_vs == pytest.approx(vs)
    assert result_advantages == pytest.approx(advantages)


def test_after_a_termination_nothing_flows_back() -> None:
    # Step 1 terminates: v_1 = 5, v_0 = 1 + .5 x 5 = 3.5. Step 2 is the reset: v_2 = V_2 = 100, no advantage.
    # v_4 = 4 + .5 x 8 = 8, v_3 = 3 + .5 x 8 = 7.
    vs, advantages = of_one_column(
        rewards=[1.0, 5.0, 0.0, 3.0, 4.0],
        values=[1.0, 2.0, 100.0, 3.0, 4.0],
        bootstrap_value=8.0,
        discounts=[0.5, 0.0, 0.5, 0.5, 0.5],
        mask=[1, 1, 0, 1, 1],
    )
    assert vs == pytest.approx([3.5, 5.0, 100.0, 7.0, 8.0])
    assert advantages == pytest.approx([2.5, 3.0, 0.0, 4.0, 4.0])


def test_a_truncated_episode_bootstraps_from_its_final_observation() -> None:
    # The same, but step 1 ends by the clock in an observation worth 6: v_1 = 5 + .5 x 6 = 8, v_0 = 1 + 4.
    vs, advantages = of_one_column(
        rewards=[1.0, 5.0, 0.0, 3.0, 4.0],
        values=[1.0, 2.0, 6.0, 3.0, 4.0],
        bootstrap_value=8.0,
        discounts=[0.5] * 5,
        mask=[1, 1, 0, 1, 1],
    )
    assert vs == pytest.approx([5.0, 8.0, 6.0, 7.0, 8.0])
    assert advantages == pytest.approx([4.0, 6.0, 0.0, 4.0, 4.0])


def test_without_the_mask_the_next_episode_would_leak_into_a_truncated_one() -> None:
    """What the mask is for: the same unroll without it has other targets before the reset."""
    vs, _ = of_one_column(
        rewards=[1.0, 5.0, 0.0, 3.0, 4.0],
        values=[1.0, 2.0, 6.0, 3.0, 4.0],
        bootstrap_value=8.0,
        discounts=[0.5] * 5,
    )
    # v_2 = 0 + .5 x 7 = 3.5, v_1 = 5 + 1.75, v_0 = 1 + 3.375.
    assert vs == pytest.approx([4.375, 6.75, 3.5, 7.0, 8.0])


def test_an_untrusted_step_cuts_the_trace_there_and_keeps_its_own_temporal_difference() -> None:
    # gamma = 1, values 0, rewards 1, 10, 100, 1000: on the whole v = 1111, 1110, 1100, 1000. Step 1 is cut:
    # it still gains its own 10, and step 0 with it, but neither sees anything later. Steps 2 and 3 stay.
    vs, advantages = of_one_column(
        rewards=[1.0, 10.0, 100.0, 1000.0],
        values=[0.0] * 4,
        bootstrap_value=0.0,
        discounts=[1.0] * 4,
        trusted=[1, 0, 1, 1],
    )
    assert vs == [11.0, 10.0, 1100.0, 1000.0]
    # The advantage looks one step ahead, at v_{s+1}, which a cut at s does not change.
    assert advantages == [11.0, 1110.0, 1100.0, 1000.0]


@pytest.mark.parametrize(
    ("trusted", "vs"),
    [
        pytest.param([1, 1, 1, 1], [1111.0, 1110.0, 1100.0, 1000.0], id="nowhere"),
        pytest.param([0, 1, 1, 1], [1.0, 1110.0, 1100.0, 1000.0], id="first"),
        pytest.param([1, 1, 1, 0], [1111.0, 1110.0, 1100.0, 1000.0], id="last-has-nothing-after-it"),
        pytest.param([0, 1, 0, 1], [1.0, 110.0, 100.0, 1000.0], id="two"),
        pytest.param([0, 0, 0, 0], [1.0, 10.0, 100.0, 1000.0], id="everywhere-is-lambda-0"),
    ],
)
def test_a_cut_reaches_only_the_steps_before_it(trusted: list[float], vs: list[float]) -> None:
    result_vs, _ = of_one_column(
        rewards=[1.0, 10.0, 100.0, 1000.0],
        values=[0.0] * 4,
        bootstrap_value=0.0,
        discounts=[1.0] * 4,
        trusted=trusted,
    )
    assert result_vs == vs


def test_the_recursion_equals_the_papers_sum_on_500_random_unrolls() -> None:
    rng = np.random.default_rng(20)
    for _ in range(500):
        T, B = int(rng.integers(1, 51)), int(rng.integers(1, 9))
        gamma = float(rng.choice([0.0, 0.5, 0.9, 0.99, 1.0]))
        bars = Bars(
            rho_bar=float(rng.choice([0.3, 1.0, 2.5, math.inf])),
            c_bar=float(rng.choice([0.3, 1.0, 1.5, 2.5])),
            pg_rho_bar=float(rng.choice([0.3, 1.0, 2.5, math.inf])),
            trace_lambda=float(rng.choice([0.0, 0.3, 0.7, 1.0])),
        )
        columns = [random_column(rng, T, gamma) for _ in range(B)]
        result = vtrace_of(columns, bars)
        for b, column_b in enumerate(columns):
            vs, advantages = v_trace(column_b, bars)
            np.testing.assert_allclose(result.vs_TB[:, b], vs, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(result.pg_advantages_TB[:, b], advantages, rtol=1e-10, atol=1e-10)


def random_column(rng: np.random.Generator, T: int, gamma: float) -> Column:
    """Episodes that end anywhere (terminated, out of time, or a life lost without a reset), and cuts."""
    cut_rate = rng.choice([0.0, 0.1, 0.5])
    end_rate = rng.choice([0.0, 0.05, 0.3])
    terminated, is_reset = np.zeros(T, np.bool_), np.zeros(T, np.bool_)
    over = rng.random() < end_rate  # the unroll before may have ended with an episode
    for t in range(T):
        is_reset[t] = over
        over = False
        if not is_reset[t] and rng.random() < end_rate:
            kind = rng.choice(["terminated", "truncated", "life lost"])
            terminated[t] = kind != "truncated"
            over = kind != "life lost"
    return Column(
        log_rhos=list(rng.normal(scale=0.8, size=T)),
        rewards=list(rng.normal(size=T) * ~is_reset),
        values=list(rng.normal(scale=3.0, size=T)),
        bootstrap_value=float(rng.normal(scale=3.0)),
        gamma=gamma,
        terminated=list(terminated),
        is_reset=list(is_reset),
        trusted=list(rng.random(T) >= cut_rate),
    )


def vtrace_of(columns: list[Column], bars: Bars) -> VTrace:
    """The code under test on all columns at once."""

    def stacked(name: str) -> Tensor:
        return torch.tensor(np.array([getattr(column, name) for column in columns]).T)

    return vtrace(
        log_rhos_TB=stacked("log_rhos"),
        discounts_TB=columns[0].gamma * (~stacked("terminated")).double(),
        rewards_TB=stacked("rewards"),
        values_TB=stacked("values"),
        bootstrap_value_B=stacked("bootstrap_value"),
        mask_TB=(~stacked("is_reset")).double(),
        trusted_TB=stacked("trusted").double(),
        **vars(bars),
    )


def vtrace_with(inputs: dict[str, Tensor], bootstrap_value_B: Tensor) -> VTrace:
    """Inputs by name; those that are missing are zeros of [3, 2]."""
    zeros = torch.zeros(3, 2)
    return vtrace(
        log_rhos_TB=inputs.get("log_rhos_TB", zeros),
        discounts_TB=inputs.get("discounts_TB", zeros),
        rewards_TB=inputs.get("rewards_TB", zeros),
        values_TB=inputs.get("values_TB", zeros),
        bootstrap_value_B=bootstrap_value_B,
    )


def test_no_gradient_flows_through_targets_or_advantages() -> None:
    names = ("log_rhos_TB", "discounts_TB", "rewards_TB", "values_TB")
    inputs = {name: torch.randn(5, 2, requires_grad=True) for name in names}
    result = vtrace_with(inputs, torch.randn(2, requires_grad=True))
    assert not result.vs_TB.requires_grad
    assert not result.pg_advantages_TB.requires_grad


def test_an_importance_weight_beyond_float_range_is_truncated_like_any_other() -> None:
    vs, advantages = of_one_column(
        log_rhos=[1000.0, -1000.0],
        rewards=[1.0, 1.0],
        values=[0.0, 0.0],
        bootstrap_value=5.0,
        discounts=[1.0, 1.0],
    )
    # rho_0 = inf counts as 1, rho_1 = 0: step 1 changes nothing, v_0 = 0 + 1 (1 + 0 - 0).
    assert vs == [1.0, 0.0]
    assert advantages == [1.0, 0.0]


@pytest.mark.parametrize("name", ["discounts_TB", "rewards_TB", "values_TB"])
def test_an_input_of_another_shape_is_a_bug_that_names_it(name: str) -> None:
    with pytest.raises(AssertionError, match=name.removesuffix("_TB")):  # or it would broadcast in silence
        vtrace_with({name: torch.zeros(3, 1)}, torch.zeros(2))


def test_a_bootstrap_value_of_another_shape_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        vtrace_with({}, torch.zeros(1))
