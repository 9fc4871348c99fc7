"""PopArt against a loop over floats, numbers by hand, and the known bugs of public versions.

Those are: sigma averaged in place of the moments, NaN where a task is absent, and an update that is not
ordered after the optimiser's step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from services.config import PopArtConfig
from services.rl.popart import PopArt, moments

FINITE = torch.tensor(True)
NOT_FINITE = torch.tensor(False)


def layer_of(num_tasks: int, config: PopArtConfig, num_features: int = 6, seed: int = 1) -> PopArt:
    generator = torch.Generator().manual_seed(seed)
    layer = PopArt(num_features, num_tasks, config)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.randn(num_tasks, num_features, generator=generator))
        layer.linear.bias.copy_(torch.randn(num_tasks, generator=generator))
    return layer


def moments_of(targets: Sequence[Sequence[float]]) -> Tensor:
    """Of each task's list of targets, however long."""
    columns = [torch.tensor(of_task, dtype=torch.float64) for of_task in targets]
    return torch.stack(
        [
            torch.tensor([float(len(column)) for column in columns], dtype=torch.float64),
            torch.stack([column.sum() for column in columns]),
            torch.stack([column.square().sum() for column in columns]),
        ]
    )


def values_of(layer: PopArt, features: Tensor) -> Tensor:
    """[N, K]: the outputs on the scale of the rewards, as the loss computes them."""
    scale = layer.scale_of(torch.arange(len(layer.mean_K)))
    result: Tensor = scale.sigma_B * layer(features).detach() + scale.mean_B
    return result


def bits_of(layer: PopArt) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_bits(layer: PopArt, before: dict[str, Tensor]) -> None:
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@dataclass
class Statistics:
    """One task's: mu <- (1 - b) mu + b v, nu <- (1 - b) nu + b v^2, with the averages over a batch."""

    mean: float = 0.0
    second_moment: float = 1.0

    def update(self, targets: Sequence[float], step_size: float) -> None:
        if targets:
            mean = math.fsum(targets) / len(targets)
            second_moment = math.fsum(v * v for v in targets) / len(targets)
            self.mean = (1 - step_size) * self.mean + step_size * mean
            self.second_moment = (1 - step_size) * self.second_moment + step_size * second_moment

    def sigma(self, config: PopArtConfig) -> float:
        variance = self.second_moment - self.mean**2
        return min(max(math.sqrt(max(variance, 0.0)), config.min_sigma), config.max_sigma)


def test_until_the_first_update_it_is_a_plain_linear_layer() -> None:
    layer = layer_of(3, PopArtConfig())
    assert layer.mean_K.tolist() == [0.0] * 3
    assert layer.sigmas.tolist() == [1.0] * 3
    features = torch.randn(4, 6)
    assert torch.equal(values_of(layer, features), layer.linear(features))


def test_moments_are_count_sum_and_sum_of_squares_of_what_counts_for_each_task() -> None:
    # Task 0 owns columns 1 and 3, task 2 column 0, task 3 column 2 of which nothing counts; task 1 is absent.
    result = moments(
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]),
        torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]]),
        torch.tensor([2, 0, 3, 0]),
        num_tasks=5,
    )
    assert result.tolist() == [
        [3.0, 0.0, 2.0, 0.0, 0.0],
        [2.0 + 6.0 + 8.0, 0.0, 1.0 + 5.0, 0.0, 0.0],
        [4.0 + 36.0 + 64.0, 0.0, 1.0 + 25.0, 0.0, 0.0],
    ]


def test_one_update_by_hand() -> None:
    # b = 3e-4, targets 8 and 12: mu = 3e-4 x 10 = .003, nu = 1 + 3e-4 x (104 - 1) = 1.0309, and
    # sigma = sqrt(1.0309 - .000009) = 1.0153280.
    layer = layer_of(1, PopArtConfig())
    layer.update(moments_of([[8.0, 12.0]]), FINITE)
    assert layer.mean_K.item() == pytest.approx(0.003)
    assert layer.second_moment_K.item() == pytest.approx(1.0309)
    assert layer.sigmas.item() == pytest.approx(1.0153280, abs=1e-7)


def test_sigma_comes_from_the_averaged_moments_and_is_not_averaged_itself() -> None:
    # b = 1/2. Targets 2: mu = 1, nu = (1 + 4) / 2 = 2.5, sigma^2 = 1.5. Targets 6: mu = 3.5, nu = 19.25,
    # sigma^2 = 7. Averaged, sigma would have fallen instead: neither batch has any deviation of its own.
    layer = layer_of(1, PopArtConfig(step_size=0.5))
    layer.update(moments_of([[2.0, 2.0]]), FINITE)
    assert layer.sigmas.item() == pytest.approx(math.sqrt(1.5))
    layer.update(moments_of([[6.0, 6.0]]), FINITE)
    assert layer.sigmas.item() == pytest.approx(math.sqrt(7.0))


def test_the_statistics_are_those_of_a_loop_over_floats() -> None:
    rng = np.random.default_rng(4)
    for step_size in (3e-4, 0.05, 1.0):
        config = PopArtConfig(step_size=step_size)
        layer, loop = layer_of(5, config), [Statistics() for _ in range(5)]
        for _ in range(100):
            targets = [batch_of(rng, k, int(rng.integers(0, 40))) for k in range(5)]
            layer.update(moments_of(targets), FINITE)
            for statistics, of_task in zip(loop, targets, strict=True):
                statistics.update(of_task, step_size)
        np.testing.assert_allclose(layer.mean_K, [task.mean for task in loop], rtol=1e-12)
        np.testing.assert_allclose(layer.second_moment_K, [task.second_moment for task in loop], rtol=1e-12)
        np.testing.assert_allclose(layer.sigmas, [task.sigma(config) for task in loop], rtol=1e-6)


SPREAD = np.array([1e-3, 1.0, 1e4, 0.1, 30.0])
CENTRE = np.array([0.0, 0.0, 0.0, 100.0, -1e4])


def batch_of(rng: np.random.Generator, task: int, count: int) -> list[float]:
    """Targets of five tasks of very different scales; the last two's means are far from 0."""
    targets: list[float] = (CENTRE[task] + SPREAD[task] * rng.normal(size=count)).tolist()
    return targets


def test_no_output_changes_in_1000_updates_of_tasks_of_very_different_scales() -> None:
    layer = layer_of(5, PopArtConfig(step_size=0.03))
    features = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    before, weights = values_of(layer, features), layer.linear.weight.clone()
    rng = np.random.default_rng(5)
    for _ in range(1000):
        targets = [batch_of(rng, k, int(rng.integers(0, 3))) for k in range(5)]
        layer.update(moments_of(targets), FINITE)
        scale_K = torch.maximum(layer.sigmas, layer.mean_K.abs()).clamp(min=before.abs().amax(0))
        errors_K = (values_of(layer, features) - before).abs().amax(0)
        assert (errors_K <= 1e-5 * scale_K).all(), errors_K / scale_K
    # The statistics have arrived, and outputs on the new scale from the old weights would be far off.
    np.testing.assert_allclose(layer.sigmas, SPREAD, rtol=0.5)
    np.testing.assert_array_less(np.abs(layer.mean_K.numpy() - CENTRE), SPREAD)
    with torch.no_grad():
        layer.linear.weight.copy_(weights)
    moved = [k for k in range(5) if k != 1]
    assert ((values_of(layer, features) - before)[:, moved].abs().amax(0) > 0.01).all()


def test_an_absent_task_keeps_its_statistics_and_its_weights_bit_for_bit() -> None:
    layer = layer_of(3, PopArtConfig(step_size=0.1))
    with torch.no_grad():  # far from 0, where a careless formula loses a small bias
        layer.mean_K.copy_(torch.tensor([1e4, 1e4, -1e4 / 3]))
        layer.second_moment_K.copy_(layer.mean_K.square() + torch.tensor([1.0, 1.0, 0.7]))
        layer.linear.bias.copy_(torch.tensor([1e-9, 1e-9, -1 / 3]))
    before = bits_of(layer)
    for _ in range(10):
        layer.update(moments_of([[], [5.0, 6.0], []]), FINITE)
    for name, tensor in layer.state_dict().items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor[[0, 2]], before[name][[0, 2]]), name
        assert not torch.equal(tensor[1], before[name][1]), name


def test_a_batch_in_which_nothing_counts_changes_nothing() -> None:
    layer = layer_of(2, PopArtConfig(step_size=0.1))
    layer.update(moments_of([[3.0, 5.0], [100.0]]), FINITE)
    before = bits_of(layer)
    nothing = moments(torch.full((4, 3), 7.0), torch.zeros(4, 3), torch.tensor([0, 1, 1]), 2)
    layer.update(nothing, FINITE)
    assert_same_bits(layer, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_moves_nothing(bad: float) -> None:
    layer = layer_of(3, PopArtConfig(step_size=0.1))
    layer.update(moments_of([[3.0], [5.0], [7.0]]), FINITE)
    before = bits_of(layer)
    targets = torch.tensor([[1.0, bad, 3.0], [2.0, 4.0, 5.0]])
    poisoned = moments(targets, torch.ones(2, 3), torch.tensor([0, 1, 1]), 3)
    assert not poisoned.isfinite().all()
    layer.update(poisoned, NOT_FINITE)
    assert_same_bits(layer, before)
    layer.update(torch.full((3, 3), bad).double(), NOT_FINITE)
    assert_same_bits(layer, before)
    layer.update(moments(targets[1:], torch.ones(1, 3), torch.tensor([0, 1, 1]), 3), NOT_FINITE)
    assert_same_bits(layer, before)  # nor healthy targets beside a gradient that is not
    layer.update(moments(targets[1:], torch.ones(1, 3), torch.tensor([0, 1, 1]), 3), FINITE)
    assert layer.mean_K[0] != before["mean_K"][0]


@pytest.mark.parametrize(
    ("targets", "sigma"),
    [
        pytest.param([5.0, 5.0], 0.5, id="none"),
        pytest.param([-0.25, 0.25], 0.5, id="below"),
        pytest.param([-1.0, 1.0], 1.0, id="between"),
        pytest.param([-3.0, 3.0], 2.0, id="above"),
    ],
)
def test_sigma_is_clipped_at_both_ends_and_outputs_survive_it(targets: list[float], sigma: float) -> None:
    layer = layer_of(1, PopArtConfig(step_size=1.0, min_sigma=0.5, max_sigma=2.0))
    features = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    before = values_of(layer, features)
    for _ in range(3):
        layer.update(moments_of([targets]), FINITE)
        assert layer.sigmas.item() == pytest.approx(sigma)
        torch.testing.assert_close(values_of(layer, features), before, rtol=1e-5, atol=1e-5)


def test_by_default_sigma_stays_between_a_ten_thousandth_and_a_million() -> None:
    layer = layer_of(2, PopArtConfig(step_size=1.0))
    layer.update(moments_of([[0.0, 0.0], [-1e9, 1e9]]), FINITE)
    assert layer.sigmas.tolist() == [1e-4, 1e6]


def test_a_variance_that_rounds_to_less_than_0_is_the_least_sigma_and_not_nan() -> None:
    layer = layer_of(1, PopArtConfig())
    layer.mean_K.fill_(1e4)
    layer.second_moment_K.fill_(1e8 - 1e-7)
    assert layer.sigmas.item() == 1e-4


def test_a_small_deviation_around_a_large_mean_is_not_rounded_away() -> None:
    # In float32 the squares of 30000 +- 1 are 9e8 +- 6e4, in steps of 64: nothing would be left of the 1.
    generator = torch.Generator().manual_seed(6)
    targets = 30000.0 + torch.randn(20, 32, generator=generator)
    layer = layer_of(1, PopArtConfig(step_size=1.0))
    layer.update(moments(targets, torch.ones(20, 32), torch.zeros(32, dtype=torch.long), 1), FINITE)
    assert layer.sigmas.item() == pytest.approx(float(np.std(targets.double().numpy())), rel=1e-6)


def test_two_ranks_with_parts_of_a_batch_hold_the_statistics_of_the_whole() -> None:
    rng = np.random.default_rng(7)
    targets = torch.tensor(rng.normal(3.0, 2.0, size=(10, 6)))
    counts = torch.tensor(rng.integers(0, 2, size=(10, 6))).double()
    task = torch.tensor([0, 1, 1, 0, 0, 2])  # the first rank never sees task 2, and 0 less often
    parts = [moments(targets[:, part], counts[:, part], task[part], 3) for part in (slice(0, 3), slice(3, 6))]
    whole, ranks = layer_of(3, PopArtConfig(step_size=0.1)), layer_of(3, PopArtConfig(step_size=0.1))
    whole.update(moments(targets, counts, task, 3), FINITE)
    ranks.update(parts[0] + parts[1], FINITE)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(ranks.state_dict()[name], tensor, rtol=1e-6, atol=1e-9)
    # Ranks that averaged their means would weigh the few targets of the one like the many of the other.
    mean_of_means = sum(part[1, 0] / part[0, 0] for part in parts) / 2
    assert abs(whole.mean_K[0] / 0.1 - mean_of_means) > 1e-3


def test_shift_and_scale_of_one_two_three_turn_outputs_of_one_into_six_four_two() -> None:
    layer = PopArt(4, 3, PopArtConfig())
    with torch.no_grad():
        layer.linear.weight.zero_()
        layer.linear.bias.fill_(1.0)
        layer.mean_K.copy_(torch.tensor([1.0, 2.0, 3.0]))
        layer.second_moment_K.copy_(torch.tensor([2.0, 8.0, 18.0]))  # shift^2 + scale^2
    task_B = torch.tensor([2, 1, 0])
    outputs_B = layer(torch.randn(3, 4))[torch.arange(3), task_B]
    scale = layer.scale_of(task_B)
    assert outputs_B.tolist() == [1.0, 1.0, 1.0]
    assert (scale.sigma_B * outputs_B + scale.mean_B).tolist() == pytest.approx([6.0, 4.0, 2.0])


def test_after_each_update_the_values_are_those_of_the_stepped_layer() -> None:
    layer = layer_of(2, PopArtConfig(step_size=0.2))
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(8)
    for _ in range(50):
        features = torch.randn(10, 6, generator=generator)
        targets = torch.randn(10, 2, generator=generator) * torch.tensor([5.0, 0.1]) + 3.0
        scale = layer.scale_of(torch.arange(2))
        loss = ((targets - scale.mean_B) / scale.sigma_B - layer(features)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        before = values_of(layer, features)
        optimiser.step()
        stepped = values_of(layer, features)
        layer.update(moments(targets, torch.ones(10, 2), torch.arange(2), 2), FINITE)
        torch.testing.assert_close(values_of(layer, features), stepped, rtol=1e-5, atol=1e-5)
        assert (stepped - before).abs().max() > 1e-3


@pytest.mark.parametrize("update_first", [False, True], ids=["after-the-step", "before-the-step"])
def test_the_gradient_of_the_old_scale_belongs_to_weights_on_the_old_scale(update_first: bool) -> None:
    """Against weights on the scale of the rewards, which no update of the statistics has to touch."""
    learning_rate = 0.05
    layer = layer_of(1, PopArtConfig(step_size=0.5), num_features=2).double()
    optimiser = torch.optim.SGD(layer.parameters(), lr=learning_rate)
    rng = np.random.default_rng(9)
    loop, config = Statistics(), PopArtConfig()
    weights: npt.NDArray[np.float64] = layer.linear.weight.detach().numpy()[0].copy()
    bias = layer.linear.bias.item()
    for _ in range(20):
        feature, target = rng.normal(size=2), float(rng.normal(10.0, 5.0))
        scale = layer.scale_of(torch.tensor([0]))
        normalised = (target - scale.mean_B.double()) / scale.sigma_B.double()
        loss = 0.5 * (normalised - layer(torch.tensor(feature))).square().sum()
        optimiser.zero_grad()
        loss.backward()
        if update_first:
            layer.update(moments_of([[target]]), FINITE)
        optimiser.step()
        if not update_first:
            layer.update(moments_of([[target]]), FINITE)
        sigma = loop.sigma(config)
        error = (target - float(weights @ feature) - bias) / sigma
        weights = weights + learning_rate * sigma * error * feature
        bias += learning_rate * sigma * error
        loop.update([target], 0.5)
    result = (layer.sigmas * layer.linear.weight[0]).detach().numpy()
    assert np.allclose(result, weights, rtol=1e-4) is not update_first


def test_a_restored_layer_has_the_same_statistics_and_goes_on_the_same_way() -> None:
    layer = layer_of(2, PopArtConfig(step_size=0.1))
    layer.update(moments_of([[300.0, 500.0], [0.1]]), FINITE)
    restored = layer_of(2, PopArtConfig(step_size=0.1), seed=2)
    restored.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"linear.weight", "linear.bias", "mean_K", "second_moment_K"}
    assert restored.mean_K.dtype == restored.second_moment_K.dtype == torch.float64
    assert_same_bits(restored, bits_of(layer))
    features = torch.randn(3, 6)
    assert torch.equal(values_of(restored, features), values_of(layer, features))
    for each in (layer, restored):
        each.update(moments_of([[200.0], [0.3, 0.5]]), FINITE)
    assert_same_bits(restored, bits_of(layer))


def test_an_optimiser_never_moves_the_statistics() -> None:
    layer = layer_of(2, PopArtConfig())
    assert {name for name, _ in layer.named_parameters()} == {"linear.weight", "linear.bias"}
    scale = layer.scale_of(torch.tensor([1, 0, 1]))
    assert not scale.mean_B.requires_grad and not scale.sigma_B.requires_grad
