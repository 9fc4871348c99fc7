"""Gradients are the same in buckets as without, begin to travel early, and belong to one group."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from services.learner.buckets import Buckets
from services.learner.group import Group


class Recording:
    """A group of two that notes what is summed, and whose other member has the same gradients."""

    world_size = 2

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def start_sum(self, tensor: Tensor) -> None:
        self.sums.append(tensor)
        tensor.mul_(2)


def make_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 4))


def loss(network: nn.Sequential) -> Tensor:
    return cast(Tensor, network(torch.linspace(-1, 1, 30).reshape(5, 6)).square().sum())


def plain(network: nn.Sequential) -> list[Tensor]:
    network.zero_grad(set_to_none=True)
    loss(network).backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def gradients(network: nn.Sequential) -> list[Tensor]:
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("bucket_bytes", [1, 100, 200, 10**6])
def test_all_gradients_are_summed_once_and_none_is_changed_otherwise(bucket_bytes: int) -> None:
    network, group = make_network(), Recording()
    expected = [2 * gradient for gradient in plain(network)]
    buckets = Buckets(network.parameters(), bucket_bytes)
    for _ in range(2):  # the second time with the memory of the first
        group.sums.clear()
        buckets.begin(cast(Group, group))
        loss(network).backward()
        buckets.finish()
        assert sum(flat.numel() for flat in group.sums) == sum(each.numel() for each in expected)
        torch.testing.assert_close(gradients(network), expected, rtol=0, atol=0)
    buckets.divide(torch.tensor(2.0))
    torch.testing.assert_close(gradients(network), plain(make_network()), rtol=0, atol=0)


def test_the_last_layers_are_on_their_way_before_the_backward_pass_has_reached_the_first() -> None:
    network, group = make_network(), Recording()
    buckets = Buckets(network.parameters(), 100)
    sums_by_then: list[int] = []
    first = next(network.parameters())
    first.register_hook(lambda _: sums_by_then.append(len(group.sums)))
    buckets.begin(cast(Group, group))
    loss(network).backward()
    assert sums_by_then[0] >= 2
    assert group.sums[0].numel() == 4 + 16 + 4  # the last layer, and the bias before it


def test_parameters_without_a_gradient_count_as_zero_and_hold_nobody_up() -> None:
    network, group = make_network(), Recording()
    unused = nn.Linear(3, 3)
    buckets = Buckets([*network.parameters(), *unused.parameters()], 100)
    buckets.begin(cast(Group, group))
    loss(network).backward()
    before = len(group.sums)
    buckets.finish()
    assert before == 0, "the first bucket is the unused layer's, and all begin in the same order"
    assert sum(flat.numel() for flat in group.sums) == sum(
        each.numel() for each in (*network.parameters(), *unused.parameters())
    )
    assert unused.weight.grad is not None and not unused.weight.grad.any()


def test_buckets_begin_in_the_same_order_whichever_fills_first() -> None:
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(6))
    orders = []
    for swap in (False, True):
        group = Recording()
        buckets = Buckets([first, second], 1)
        buckets.begin(cast(Group, group))
        inner, outer = (second, first) if swap else (first, second)
        (torch.cat([inner.tanh().sum().reshape(1)]) * outer.sum()).backward()
        buckets.finish()
        orders.append([flat.numel() for flat in group.sums])
    assert orders == [[6, 4], [6, 4]]


def test_another_group_has_memory_of_its_own() -> None:
    # A sum that was given up may still write to the memory of the group that was left.
    network, left, next_one = make_network(), Recording(), Recording()
    buckets = Buckets(network.parameters())
    for group in (left, next_one):
        buckets.begin(cast(Group, group))
        loss(network).backward()
        buckets.finish()
    assert {flat.data_ptr() for flat in left.sums}.isdisjoint(flat.data_ptr() for flat in next_one.sums)
    left.sums[0].fill_(99.0)
    assert all((gradient != 99.0).all() for gradient in gradients(network))


def test_one_alone_has_gradients_as_torch_makes_them() -> None:
    network = make_network()
    expected = plain(network)
    buckets = Buckets(network.parameters())
    buckets.begin(Group())
    assert gradients(network) == []
    loss(network).backward()
    buckets.finish()
    buckets.divide(torch.tensor(3.0))
    torch.testing.assert_close(gradients(network), expected, rtol=0, atol=0)
