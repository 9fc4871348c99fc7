"""What a measurement is asked for, and how it prints."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FOUR_GAMES = "ALE/Pong-v5,ALE/Breakout-v5,ALE/Seaquest-v5,ALE/SpaceInvaders-v5"

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "shallow": ("--network", "shallow"),
    "shallow+lstm": ("--network", "shallow", "--lstm"),
    "nature": ("--network", "nature"),
    "nature+lstm": ("--network", "nature", "--lstm"),
    "deep": ("--network", "deep"),
    "deep+lstm": ("--network", "deep", "--lstm"),
    "popart-4-games": (
        *("--network", "shallow", "--tasks", FOUR_GAMES),
        *("--popart", "--loss.reward_clipping", "none"),
    ),
    "replay-7": ("--network", "shallow", "--replay.ratio", "7", "--replay.capacity", "200000"),
}
"""What can be measured, and the flags that make it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of one call of ``make bench``."""

    env: str
    variants: tuple[str, ...]
    seconds: float

    def flags(self, variant: str) -> list[str]:
        """Of ``impala train``."""
        flags = VARIANTS[variant]
        return [*flags] if "--tasks" in flags else ["--env", self.env, *flags]


def median_seconds(run: Callable[[], object], at_least_s: float = 2.0, warm_up: int = 2) -> float:
    """The median duration of ``run``, called for ``at_least_s`` and five times at the least."""
    for _ in range(warm_up):
        run()
    durations_s: list[float] = []
    while sum(durations_s) < at_least_s or len(durations_s) < 5:
        started_s = time.perf_counter()
        run()
        durations_s.append(time.perf_counter() - started_s)
    return statistics.median(durations_s)


def heading(text: str) -> None:
    """Above a group of figures."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def row(label: str, *columns: str) -> None:
    """One line of figures."""
    print(f"{label:34}" + "".join(f"{column:>18}" for column in columns), flush=True)
