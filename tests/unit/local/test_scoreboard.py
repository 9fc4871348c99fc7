"""What `impala evaluate` shows, with figures worked out by hand."""

from __future__ import annotations

import io
import logging as python_logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from services.config import EnvConfig
from services.evaluator.results import Results, TaskResult
from services.local.scoreboard import LiveScoreboard, PlainScoreboard, table
from services.ops import logging
from services.rl.scores import SCORE_TABLES
from services.wire.messages import Episode


def result(name: str, *returns: float, num_capped: int = 0) -> TaskResult:
    episodes = tuple(Episode(episode_return=r, length=2400) for r in returns)
    return TaskResult(name=name, env=EnvConfig(id=name), episodes=episodes, num_capped=num_capped)


def results(*tasks: TaskResult) -> Results:
    return Results(version=1, steps=640, tasks=tasks)


# ----------------------------------------------------------------------------------------------- the table


def test_a_single_task_is_a_row_and_its_statistics() -> None:
    shown = table(results(result("catch", 1.0, -1.0, 1.0, 1.0)), width=100)
    assert shown.splitlines() == [
        "task   episodes   mean  median    std     min    max  length",
        "------------------------------------------------------------",
        "catch         4  0.500   1.000  0.866  -1.000  1.000   2,400",
    ]


def test_a_suite_has_scores_beside_its_tasks_and_below_them_what_they_come_to() -> None:
    """Pong at 200 %, Breakout (1.7 and 30.5) at 50 %."""
    shown = table(results(result("ALE/Pong-v5", 49.9), result("ALE/Breakout-v5", 16.1)), width=100)
    assert shown.splitlines() == [
        "task             episodes   mean  median    std    min    max  length  human",
        "----------------------------------------------------------------------------",
        "ALE/Pong-v5             1  49.90   49.90  0.000  49.90  49.90   2,400  200 %",
        "ALE/Breakout-v5         1  16.10   16.10  0.000  16.10  16.10   2,400   50 %",
        "",
        "mean over 2 tasks: 33.00",
        "human-normalised: mean 125 %, median 125 %",
        "capped at 100 %: mean 75 %, median 75 %",
    ]


def test_tasks_without_a_score_have_none_and_a_mix_has_no_suite() -> None:
    shown = table(results(result("ALE/Pong-v5", 14.6), result("catch", 1.0)), width=100).splitlines()
    assert shown[2].endswith("  100 %")
    assert shown[3].endswith("      –")
    assert shown[-1] == "mean over 2 tasks: 7.800"


@pytest.mark.parametrize("suite", ["atari57", "dmlab30"])
@pytest.mark.parametrize("width", [140, 80, 60])
def test_a_whole_suite_fits_the_terminal_and_no_number_is_cut(suite: str, width: int) -> None:
    tasks = [result(name, 10.0**k, 123456.0) for k, name in enumerate(SCORE_TABLES[suite][:7])]
    tasks += [result(name, 5.0) for name in SCORE_TABLES[suite][7:]]
    lines = table(results(*tasks), width).splitlines()
    rows = lines[2 : 2 + len(tasks)]
    assert max(map(len, lines)) <= width
    assert len({len(row) for row in rows}) == 1
    means = [f"{(10**k + 123456) / 2:,.0f}" for k in range(7)]
    assert all(mean in row for mean, row in zip(means, rows, strict=False))
    assert all(row.endswith(" %") for row in rows)


def test_the_least_telling_columns_go_first_and_a_long_name_loses_its_beginning() -> None:
    task = result("dmlab/psychlab_arbitrary_visuomotor_mapping", 30.0)
    wide, narrow = (table(results(task), width).splitlines() for width in (120, 50))
    assert wide[0].split() == ["task", "episodes", "mean", "median", "std", "min", "max", "length", "human"]
    assert narrow[0].split() == ["task", "mean", "std", "max", "human"]
    assert narrow[2].startswith("...")
    assert narrow[2].split()[0].endswith("visuomotor_mapping")


def test_episodes_that_were_cut_off_are_told_of_below() -> None:
    tasks = result("catch", 1.0, 1.0, num_capped=1), result("pole", 1.0)
    assert table(results(*tasks), width=100).splitlines()[-3:] == [
        "",
        "mean over 2 tasks: 1.000",
        "catch: 1 of its episodes did not end, and were cut off",
    ]


# --------------------------------------------------------------------------------------------- while it plays


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    logging.setup("evaluate", stream=stream)
    yield stream
    python_logging.basicConfig(force=True)


def lines(log: io.StringIO) -> list[str]:
    """Without time and level."""
    return [line.partition(" evaluate ")[2] for line in log.getvalue().splitlines()]


EPISODE = Episode(episode_return=1.0, length=9)


def test_plain_lines_say_how_far_it_is_now_and_then_and_what_each_task_came_to(log: io.StringIO) -> None:
    clock = Clock()
    board = PlainScoreboard(["a", "b"], 3, logging.get_logger("evaluate"), clock)
    with board:
        for now_s in (1.0, 11.0, 12.0):
            clock.now_s = now_s
            board.episode("a", EPISODE)
            board.tick()
        board.finished(result("a", 1.0, 1.0, 4.0))
    assert lines(log) == [
        "playing episodes=2 of=6 seconds=11",
        "played task=a episodes=3 mean_return=2 tasks=1/2",
    ]


def test_plain_lines_go_on_while_no_episode_ends(log: io.StringIO) -> None:
    clock = Clock()
    board = PlainScoreboard(["a"], 3, logging.get_logger("evaluate"), clock)
    for now_s in (9.9, 10.0, 19.9, 20.0):
        clock.now_s = now_s
        board.tick()
    assert lines(log) == ["playing episodes=0 of=3 seconds=10", "playing episodes=0 of=3 seconds=20"]


def test_live_bars_count_episodes_and_show_the_mean_so_far() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with LiveScoreboard(["a [b]", "c"], 4, console) as board:
        board.began("a [b]")
        for value in (1.0, 2.0, 6.0):
            board.episode("a [b]", Episode(episode_return=value, length=1))
        board._progress.refresh()
        picture = stream.getvalue()
        board.finished(result("a [b]", 1.0, 2.0, 6.0))
        board._progress.refresh()
        after = stream.getvalue()[len(picture) :]
    assert "a [b]" in picture
    assert "3/4" in picture
    assert "3.000" in picture
    assert "2 tasks" in picture
    assert "3/8" in picture
    assert "a [b]" not in after
    assert "3/8" in after
