"""V-trace the slow way: the sum of equation 1 as it is printed, one episode at a time.

The code under test runs one backward recursion over a whole unroll, with discounts and masks for what
happens in between. This reference has neither: it cuts the unroll wherever an episode ends and computes
each piece as if nothing else existed. Plain floats, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bars:
    """The truncations of section 4.1, and lambda."""

    rho_bar: float = 1.0
    c_bar: float = 1.0
    pg_rho_bar: float = 1.0
    trace_lambda: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Column:
    """One environment's unroll, T transitions long."""

    log_rhos: Sequence[float]
    rewards: Sequence[float]
    values: Sequence[float]
    bootstrap_value: float
    gamma: float
    terminated: Sequence[bool]
    is_reset: Sequence[bool]
    """The transition only brings the first observation of the next episode."""
    trusted: Sequence[bool]
    """False where lambda is 0, whatever ``Bars`` say."""


def v_trace(column: Column, bars: Bars) -> tuple[list[float], list[float]]:
    """(v, advantages) of the whole unroll, put together from its pieces."""
    vs, advantages = list(column.values), [0.0] * len(column.values)
    start = 0
    for t in range(len(column.values)):
        if column.is_reset[t]:  # whatever ended here without a termination ended in observation t
            _fill(column, bars, start, t, column.values[t], vs, advantages)
            start = t + 1
        elif column.terminated[t]:
            _fill(column, bars, start, t + 1, 0.0, vs, advantages)
            start = t + 1
    _fill(column, bars, start, len(column.values), column.bootstrap_value, vs, advantages)
    return vs, advantages


def _fill(
    column: Column,
    bars: Bars,
    start: int,
    end: int,
    last_value: float,
    vs: list[float],
    advantages: list[float],
) -> None:
    """The piece [start, end) of an episode, whose observation ``end`` is worth ``last_value``."""
    piece = slice(start, end)
    vs[piece], advantages[piece] = v_trace_of_one_episode(
        column.log_rhos[piece],
        column.rewards[piece],
        [*column.values[piece], last_value],
        [bars.trace_lambda if trusted else 0.0 for trusted in column.trusted[piece]],
        column.gamma,
        bars,
    )


def v_trace_of_one_episode(
    log_rhos: Sequence[float],
    rewards: Sequence[float],
    values: Sequence[float],
    lambdas: Sequence[float],
    gamma: float,
    bars: Bars,
) -> tuple[list[float], list[float]]:
    """v_s = V_s + sum_t gamma^(t-s) (prod_{i=s}^{t-1} c_i) rho_t (r_t + gamma V_{t+1} - V_t); V has T + 1."""
    T = len(rewards)
    rhos = [math.exp(log_rho) for log_rho in log_rhos]
    cs = [lambdas[t] * min(bars.c_bar, rhos[t]) for t in range(T)]
    deltas = [min(bars.rho_bar, rhos[t]) * (rewards[t] + gamma * values[t + 1] - values[t]) for t in range(T)]
    vs = [
        values[s] + math.fsum(gamma ** (t - s) * math.prod(cs[s:t]) * deltas[t] for t in range(s, T))
        for s in range(T)
    ]
    next_vs = [*vs[1:], values[T]]
    advantages = [
        min(bars.pg_rho_bar, rhos[s]) * (rewards[s] + gamma * next_vs[s] - values[s]) for s in range(T)
    ]
    return vs, advantages
