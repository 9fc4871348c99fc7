"""The rows of the display that tell several tasks apart: all of them, or the best and the worst.

Pure, like ``display``, which puts them below the return. Names lose what stands before their last slash if
they can still be told apart without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

from services.local.formats import columns, figure, percent
from services.ops.figures import Snapshot

MAX_ROWS = 8
FEW_ROWS = 3
"""Of the best, and as many of the worst, where not all tasks have room in ``MAX_ROWS``."""
GAP = "   "
MIN_NAME_WIDTH = 6


def task_rows(snapshot: Snapshot, width: int) -> list[tuple[str, Text]]:
    """(label, content) of each row; none for a single task."""
    returns, scores = snapshot.task_returns, snapshot.task_scores
    if len(returns) < 2:
        return []
    names = _short(list(returns))
    value_width = 10 + (10 if scores else 0)
    name_width = max(MIN_NAME_WIDTH, min(max(map(len, names.values())), width - value_width))
    num_columns = max(1, (width + len(GAP)) // (name_width + value_width + len(GAP)))

    def cell(task: str) -> Text:
        name = names[task] if len(names[task]) <= name_width else names[task][: name_width - 1] + "…"
        text = Text.assemble((f"{name:<{name_width}}", "dim"), f"{figure(returns[task]):>10}")
        if scores:
            text.append(f"{percent(scores[task] / 100) if task in scores else '–':>10}", style="dim")
        return text

    if len(returns) <= MAX_ROWS * num_columns:
        rows = _grid("tasks", [cell(task) for task in returns], num_columns)
    else:
        known = [task for task, value in returns.items() if value is not None]
        by: Mapping[str, float | None] = scores if scores.keys() >= set(known) else returns
        ranked = sorted(known, key=lambda task: by[task] or 0.0, reverse=True)
        few = min(FEW_ROWS * num_columns, (len(ranked) + 1) // 2)
        best, worst = ranked[:few], ranked[few:][-few:]
        rows = [
            ("tasks", Text(f"{len(known)} of {len(returns)} have ended an episode")),
            *_grid("best", [cell(task) for task in best], num_columns),
            *_grid("worst", [cell(task) for task in worst], num_columns),
        ]
    if snapshot.suite_scores:
        suite = snapshot.suite_scores.items()
        pairs = [(percent(score / 100), statistic.replace("_", " ")) for statistic, score in suite]
        rows.append(("human", columns(*pairs)))
    return rows


def _grid(label: str, cells: Sequence[Text], num_columns: int) -> list[tuple[str, Text]]:
    """Filled column by column, so that reading goes down."""
    num_rows = -(-len(cells) // num_columns)
    return [(label if row == 0 else "", Text(GAP).join(cells[row::num_rows])) for row in range(num_rows)]


def _short(tasks: Sequence[str]) -> dict[str, str]:
    short = {task: task.rpartition("/")[2] for task in tasks}
    return short if len(set(short.values())) == len(tasks) else {task: task for task in tasks}
