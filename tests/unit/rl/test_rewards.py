"""Reward clipping by hand: below, at and above every edge."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from services.config import LossConfig
from services.rl.rewards import REWARD_CLIPPING

REWARDS = [-400.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 400.0]


@pytest.mark.parametrize(
    ("name", "clipped"),
    [
        ("abs_one", [-1.0, -1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.0, 1.0]),
        (
            "soft_asymmetric",  # 5 tanh(r/5), and 1.5 tanh(r/5) below 0
            [-1.5, -0.4369689, -0.2960630, -0.1495020, 0.0, 0.4983400, 0.9868766, 1.4565631, 5.0],
        ),
        ("none", REWARDS),
    ],
)
def test_rewards_are_clipped_as_the_mode_says(name: str, clipped: list[float]) -> None:
    result = REWARD_CLIPPING[name](torch.tensor(REWARDS))
    assert result.tolist() == pytest.approx(clipped, abs=1e-6)


def test_soft_asymmetric_clipping_is_what_its_formula_says() -> None:
    result = REWARD_CLIPPING["soft_asymmetric"](torch.tensor([-2.0, 2.0]))
    assert result.tolist() == pytest.approx([0.3 * 5 * math.tanh(-0.4), 5 * math.tanh(0.4)])


def test_every_mode_of_the_configuration_exists_and_no_other() -> None:
    annotation = LossConfig.model_fields["reward_clipping"].annotation
    assert set(get_args(annotation)) == set(REWARD_CLIPPING)
