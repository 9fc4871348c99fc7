"""How the display writes numbers: at most about nine characters, in columns that do not jump."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.text import Text


def columns(*pairs: tuple[str, str]) -> Text:
    """Values right-aligned in columns of one width, so that rows line up and do not jump."""
    text = Text()
    for value, unit in pairs:
        text.append(f"{value:>9}")
        text.append(f" {unit:<11}", style="dim")
    text.rstrip()
    return text


SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` characters between their least and their greatest."""
    if not values or width < 1:
        return ""
    num_points = min(width, len(values))
    edges = [round(i * len(values) / num_points) for i in range(num_points + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return SPARKS[0] * num_points
    return "".join(SPARKS[round((mean - low) / (high - low) * (len(SPARKS) - 1))] for mean in means)


def number(value: float | None) -> str:
    """1234567 -> 1,234,567."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if math.isfinite(value) else "many"


def figure(value: float | None) -> str:
    """About four digits, without jumping between notations."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size != 0 and (size >= 1e6 or size < 1e-3):
        return f"{value:.2e}"
    decimals = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{decimals}f}"


def percent(ratio: float | None) -> str:
    """0.256 -> 26 %; 12.5 -> 1,250 %."""
    return "–" if ratio is None else f"{100 * ratio:z,.0f} %"


def duration(seconds: float | None) -> str:
    """75 -> 1:15; 3675 -> 1:01:15; days from 48 hours."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}"
