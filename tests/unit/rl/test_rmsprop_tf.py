"""TensorFlow's RMSProp against its documented formula, by hand and as a loop over floats.

ms <- a ms + (1 - a) g^2; mom <- momentum mom + lr g / sqrt(ms + eps); w <- w - mom; ms begins at 1, mom at 0.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from services.rl.rmsprop_tf import RMSpropTF


def trajectory(optimiser: torch.optim.Optimizer, weight: Tensor, gradients: Iterable[float]) -> list[float]:
    """The weight after each gradient."""
    weights = []
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimiser.step()
        weights.append(weight.item())
    return weights


def weight_of(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# lr = .1, a = .5, eps = 3, w = 2, gradients 1, 5, -3:
# ms = .5 + .5 = 1, root of 4 = 2, step .1 / 2 = .05; ms = .5 + 12.5 = 13, root of 16 = 4, step .5 / 4 = .125;
# ms = 6.5 + 4.5 = 11, root of 14 = 3.7416574, step -.3 / 3.7416574 = -.0801784.
# With momentum .5: .05; .025 + .125 = .15; .075 - .0801784 = -.0051784.
@pytest.mark.parametrize(
    ("momentum", "weights"),
    [
        (0.0, [1.95, 1.825, 1.9051784]),
        (0.5, [1.95, 1.8, 1.8051784]),
    ],
)
def test_three_steps_by_hand(momentum: float, weights: list[float]) -> None:
    weight = weight_of(2.0)
    optimiser = RMSpropTF([weight], lr=0.1, alpha=0.5, eps=3.0, momentum=momentum)
    assert trajectory(optimiser, weight, [1.0, 5.0, -3.0]) == pytest.approx(weights, abs=1e-7)


def test_the_average_of_squares_begins_at_1_so_the_first_step_is_small() -> None:
    # g = .1, a = .99: ms = .99 + .0001 = .9901, so the step is .1 / .99504; torch's would be .1 / .01 = 10.
    weight = weight_of(0.0)
    optimiser = RMSpropTF([weight], lr=1.0, alpha=0.99, eps=1e-12, momentum=0.0)
    assert trajectory(optimiser, weight, [0.1]) == pytest.approx([-0.1004987], abs=1e-6)


def test_epsilon_stands_inside_the_root() -> None:
    # a = 0: ms = g^2 = .0001, and .01 / sqrt(.0001 + .01) = .0995037; outside it is .01 / (.01 + .01) = .5.
    weight = weight_of(0.0)
    optimiser = RMSpropTF([weight], lr=1.0, alpha=0.0, eps=0.01, momentum=0.0)
    assert trajectory(optimiser, weight, [0.01]) == pytest.approx([-0.0995037], abs=1e-6)


def test_the_learning_rate_of_each_step_is_part_of_what_momentum_remembers() -> None:
    # a = 0 and eps = 0 make each step lr. .1; then .5 x .1 + .2 = .25 (torch's: .2 x (.5 + 1) = .3).
    weight = weight_of(1.0)
    optimiser = RMSpropTF([weight], lr=0.1, alpha=0.0, eps=0.0, momentum=0.5)
    first = trajectory(optimiser, weight, [7.0])
    optimiser.param_groups[0]["lr"] = 0.2
    assert first + trajectory(optimiser, weight, [7.0]) == pytest.approx([0.9, 0.65])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_not_torchs(momentum: float) -> None:
    gradients = [1.0, 5.0, -3.0]
    ours, torchs = weight_of(2.0), weight_of(2.0)
    our_optimiser = RMSpropTF([ours], lr=0.1, alpha=0.5, eps=3.0, momentum=momentum)
    torchs_optimiser = torch.optim.RMSprop([torchs], lr=0.1, alpha=0.5, eps=3.0, momentum=momentum)
    our_weights = trajectory(our_optimiser, ours, gradients)
    torchs_weights = trajectory(torchs_optimiser, torchs, gradients)
    # torch, first step: ms = .5, .1 / (.7071068 + 3) = .0269752.
    assert torchs_weights[0] == pytest.approx(2 - 0.0269752, abs=1e-7)
    assert all(abs(one - other) > 0.01 for one, other in zip(our_weights, torchs_weights, strict=True))


def test_many_steps_of_many_weights_equal_a_loop_over_floats() -> None:
    generator = random.Random(3)
    for _ in range(20):
        lr, alpha = 10 ** generator.uniform(-4, 0), generator.uniform(0.5, 0.999)
        eps, momentum = 10 ** generator.uniform(-6, 0), generator.choice([0.0, 0.5, 0.95])
        weights = [generator.gauss(0, 1) for _ in range(6)]
        parameters = [
            torch.tensor(weights[:2], dtype=torch.float64, requires_grad=True),
            torch.tensor(weights[2:], dtype=torch.float64).reshape(2, 2).requires_grad_(),
        ]
        optimiser = RMSpropTF(parameters, lr=lr, alpha=alpha, eps=eps, momentum=momentum)
        ms, mom = [1.0] * 6, [0.0] * 6
        for _ in range(30):
            gradients = [generator.gauss(0, 3) for _ in range(6)]
            for i, g in enumerate(gradients):
                ms[i] = alpha * ms[i] + (1 - alpha) * g * g
                mom[i] = momentum * mom[i] + lr * g / math.sqrt(ms[i] + eps)
                weights[i] -= mom[i]
            parameters[0].grad = torch.tensor(gradients[:2], dtype=torch.float64)
            parameters[1].grad = torch.tensor(gradients[2:], dtype=torch.float64).reshape(2, 2)
            optimiser.step()
        result = torch.cat([parameter.detach().flatten() for parameter in parameters]).tolist()
        assert result == pytest.approx(weights, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_restored_optimiser_goes_on_as_if_it_had_never_stopped(momentum: float) -> None:
    def build() -> tuple[Tensor, RMSpropTF]:
        weight = weight_of(1.0)
        return weight, RMSpropTF([weight], lr=0.1, alpha=0.9, eps=0.01, momentum=momentum)

    weight, optimiser = build()
    trajectory(optimiser, weight, [3.0, -1.0])
    restored_weight, restored = build()
    with torch.no_grad():
        restored_weight.copy_(weight)
    restored.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    fresh_weight, fresh = build()
    with torch.no_grad():
        fresh_weight.copy_(weight)
    onward = trajectory(optimiser, weight, [2.0, 0.5])
    assert trajectory(restored, restored_weight, [2.0, 0.5]) == onward
    assert trajectory(fresh, fresh_weight, [2.0, 0.5]) != onward


def test_a_weight_without_a_gradient_stays_and_keeps_no_averages() -> None:
    used, unused = weight_of(1.0), weight_of(1.0)
    optimiser = RMSpropTF([used, unused], lr=0.1, alpha=0.9, eps=0.01, momentum=0.9)
    trajectory(optimiser, used, [1.0, 1.0])
    assert used.item() != 1.0
    assert unused.item() == 1.0
    assert unused not in optimiser.state


def test_a_gradient_of_0_moves_nothing_without_momentum() -> None:
    weight = weight_of(1.0)  # a skipped update is one with a zero gradient
    optimiser = RMSpropTF([weight], lr=0.1, alpha=0.9, eps=0.01, momentum=0.0)
    trajectory(optimiser, weight, [5.0])
    before = weight.item()
    assert trajectory(optimiser, weight, [0.0]) == [before]
