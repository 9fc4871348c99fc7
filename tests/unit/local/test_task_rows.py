"""The rows that tell tasks apart, as text, in whatever room there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from services.local.task_rows import FEW_ROWS, MAX_ROWS, task_rows
from services.ops.figures import RunInfo, Snapshot

WIDTH = 63
"""What a terminal of 80 columns leaves."""

NONE = Snapshot(
    run=RunInfo(env_id="x", total_steps=1, frame_skip=1, run_dir=Path("x")), elapsed_s=0.0, pods=()
)


def rows(snapshot: Snapshot, width: int = WIDTH) -> list[tuple[str, str]]:
    return [(label, content.plain) for label, content in task_rows(snapshot, width)]


def games(count: int) -> Snapshot:
    """game-0 returns 0, game-1 returns 10, and so on."""
    return replace(NONE, task_returns={f"ALE/game-{n}": 10.0 * n for n in range(count)})


@pytest.mark.parametrize("returns", [{}, {"pong": 1.0}])
def test_without_several_tasks_there_are_no_rows(returns: dict[str, float]) -> None:
    assert rows(replace(NONE, task_returns=returns)) == []


def test_tasks_are_read_downwards_in_their_order() -> None:
    assert rows(games(5)) == [
        ("tasks", "game-0     0.000   game-2     20.00   game-4     40.00"),
        ("", "game-1     10.00   game-3     30.00"),
    ]
    assert rows(games(3), 20) == [
        ("tasks", "game-0     0.000"),
        ("", "game-1     10.00"),
        ("", "game-2     20.00"),
    ]


def test_a_task_without_an_episode_has_its_place_already() -> None:
    snapshot = replace(NONE, task_returns={"a": None, "b": 1.0}, task_scores={"b": 12.6})
    assert rows(snapshot) == [("tasks", "a              –         –   b          1.000      13 %")]


def test_names_that_differ_only_before_the_slash_stay_whole() -> None:
    snapshot = replace(NONE, task_returns={"easy/maze": 1.0, "hard/maze": 2.0})
    assert rows(snapshot) == [("tasks", "easy/maze     1.000   hard/maze     2.000")]


@pytest.mark.parametrize("width", [40, WIDTH, 103])
@pytest.mark.parametrize("count", [2, 7, 8, 9, 16, 24, 25, 30, 57, 500])
def test_there_are_never_more_rows_than_a_person_can_look_over(count: int, width: int) -> None:
    contents = rows(games(count), width)
    assert len(contents) <= MAX_ROWS
    assert max(len(content) for _, content in contents) <= width
    shown = [content for label, content in contents for content in content.split() if "game" in content]
    assert len(shown) == len(set(shown))
    if contents[0][0] == "tasks" and "ended" not in contents[0][1]:
        assert len(shown) == count


def test_of_too_many_tasks_the_best_and_the_worst_are_shown() -> None:
    many = games(57)
    assert rows(many) == [
        ("tasks", "57 of 57 have ended an episode"),
        ("best", "game-56     560.0   game-53     530.0   game-50     500.0"),
        ("", "game-55     550.0   game-52     520.0   game-49     490.0"),
        ("", "game-54     540.0   game-51     510.0   game-48     480.0"),
        ("worst", "game-8      80.00   game-5      50.00   game-2      20.00"),
        ("", "game-7      70.00   game-4      40.00   game-1      10.00"),
        ("", "game-6      60.00   game-3      30.00   game-0      0.000"),
    ]


def test_the_best_are_those_of_the_best_scores_where_all_have_one() -> None:
    returns = games(57).task_returns
    scores = {task: -float(number) for number, task in enumerate(returns)}  # the other way round
    best = rows(replace(NONE, task_returns=returns, task_scores=scores))[1]
    assert best == ("best", "game-0      0.000       0 %   game-3      30.00      -3 %")
    some = {"ALE/game-0": 5000.0}  # a score here and there says nothing of the rest
    assert rows(replace(NONE, task_returns=returns, task_scores=some))[1] == (
        "best",
        "game-56     560.0         –   game-53     530.0         –",
    )


def test_while_few_tasks_have_ended_an_episode_none_is_shown_twice() -> None:
    waiting: dict[str, float | None] = dict.fromkeys(games(57).task_returns)
    assert rows(replace(NONE, task_returns=waiting)) == [("tasks", "0 of 57 have ended an episode")]
    three = waiting | {"ALE/game-0": 1.0, "ALE/game-1": 2.0, "ALE/game-2": 3.0}
    shown = rows(replace(NONE, task_returns=three))
    assert [label for label, _ in shown] == ["tasks", "best", "worst"]
    assert shown[1][1] == "game-2      3.000   game-1      2.000"
    assert shown[2][1] == "game-0      1.000"


def test_the_scores_of_the_suite_stand_below() -> None:
    snapshot = replace(games(57), suite_scores={"mean": 1234.4, "median": 56.0, "mean_capped": 49.6})
    assert len(rows(snapshot)) == 2 + 2 * FEW_ROWS
    assert rows(snapshot)[-1] == (
        "human",
        "  1,234 % mean            56 % median          50 % mean capped",
    )


def test_a_long_name_gives_way_to_its_figures() -> None:
    long = "psychlab_arbitrary_visuomotor_mapping"
    snapshot = replace(NONE, task_returns={f"dmlab/{long}": 58.75, "dmlab/x": 1.0})
    assert rows(snapshot)[0] == ("tasks", f"{long}     58.75")
    assert rows(snapshot, 30)[0] == ("tasks", "psychlab_arbitrary_…     58.75")
