"""Human-normalised scores, against values worked out by hand from the published tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

import pytest
from ale_py import roms

from services.config import EnvConfig
from services.rl import scores
from services.rl.envs import atari
from services.rl.scores import SCORE_TABLES, human_normalised, summarise

DATA = Path(scores.__file__).parent / "data"
GAMES = SCORE_TABLES["atari57"]
LEVELS = SCORE_TABLES["dmlab30"]


@pytest.mark.parametrize(
    ("game", "score", "percent"),
    [
        ("ALE/Pong-v5", -20.7, 0.0),
        ("ALE/Pong-v5", 14.6, 100.0),
        ("ALE/Pong-v5", -3.05, 50.0),  # 17.65 of 35.3
        ("ALE/Breakout-v5", 16.1, 50.0),  # 14.4 of 28.8
        ("ALE/Breakout-v5", 318.5, 1100.0),  # not capped
        ("ALE/Freeway-v5", 7.4, 25.0),
        ("ALE/Boxing-v5", -11.9, -100.0),  # worse than random
        ("ALE/Skiing-v5", -4336.9, 100.0),  # both scores of the table are negative
        ("ALE/Skiing-v5", -10717.5, 50.0),  # 6380.6 of 12761.2
        ("ALE/Skiing-v5", -29859.3, -100.0),
        ("ALE/DoubleDunk-v5", -14.2, 200.0),  # 4.4 of 2.2
        ("ALE/VideoPinball-v5", 30366.9, 1000.0),  # 14110 of 1411
        ("ALE/Pitfall-v5", 3117.15, 50.0),  # 3346.55 of 6693.1
        ("ALE/MontezumaRevenge-v5", 0.0, 0.0),
    ],
)
def test_a_game_has_the_score_of_the_table(game: str, score: float, percent: float) -> None:
    assert human_normalised(game, score) == pytest.approx(percent, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(
    ("level", "score", "percent"),
    [
        ("rooms_collect_good_objects_train", 5.0365, 50.0),  # the table is that of the test level
        ("rooms_collect_good_objects_test", 5.0365, 50.0),
        ("language_execute_random_task", 124.0685, 50.0),  # 129.9815 of 259.963
        ("skymaze_irreversible_path_varied", 57.2, 50.0),  # 42.8 of 85.6
        ("explore_goal_locations_small", 267.5, 100.0),
        ("psychlab_visual_search", -78.33, -100.0),
    ],
)
@pytest.mark.parametrize("prefix", ["", "dmlab/", "contributed/dmlab30/", "dmlab/contributed/dmlab30/"])
def test_a_level_has_the_score_of_the_table_with_every_prefix(
    prefix: str, level: str, score: float, percent: float
) -> None:
    assert human_normalised(prefix + level, score) == pytest.approx(percent, rel=1e-8)


@pytest.mark.parametrize(
    "spelling",
    [
        *("pong", "Pong", "Pong-v0", "Pong-v4", "ALE/Pong-v5", "ALE/pong"),
        *("PongNoFrameskip-v0", "PongNoFrameskip-v4", "PongDeterministic-v4"),
    ],
)
def test_every_spelling_that_plays_pong_is_scored_as_pong(spelling: str) -> None:
    assert atari.plays(spelling)
    assert human_normalised(spelling, -3.05) == pytest.approx(50.0)


@pytest.mark.parametrize("spelling", ["up_n_down", "UpNDown-v4", "ALE/UpNDown-v5", "upndown"])
def test_underscores_and_capitals_only_spell(spelling: str) -> None:
    assert human_normalised(spelling, 533.4) == 0.0


@pytest.mark.parametrize(
    "task",
    [
        *("catch", "CartPole-v1", "", "ALE/Adventure-v5", "Pong-v6", "pong/pong", "my.suite:pong"),
        *("dmlab/seekavoid_arena_01", "ALE/rooms_watermaze", "dmlab/pong", "other/rooms_watermaze"),
    ],
)
def test_a_task_without_an_entry_has_no_score(task: str) -> None:
    assert human_normalised(task, 1.0) is None
    assert scores.evaluation_task(task) == task


# --- the suites ---------------------------------------------------------------------------------------


def test_both_suites_are_complete() -> None:
    assert len(set(GAMES)) == 57
    assert len(set(LEVELS)) == 30
    assert set(SCORE_TABLES) == {"atari57", "dmlab30"}
    assert {"ALE/Alien-v5", "ALE/MsPacman-v5", "ALE/UpNDown-v5", "ALE/Zaxxon-v5"} <= set(GAMES)
    assert {"dmlab/rooms_watermaze", "dmlab/rooms_exploit_deferred_effects_train"} <= set(LEVELS)


@pytest.mark.parametrize("task", GAMES + LEVELS)
def test_every_task_of_a_suite_has_an_entry_in_which_people_are_better_than_chance(task: str) -> None:
    worst, best = human_normalised(task, -1e6), human_normalised(task, 1e6)
    assert worst is not None
    assert best is not None
    assert worst < 0 < best


def test_every_game_of_the_suite_can_be_played() -> None:
    assert set(GAMES) <= set(atari.known_ids())
    for game in GAMES:
        # Refuses a game that it does not know.
        spec = atari.spec(EnvConfig(id=game, full_action_set=True))
        rom = game.removeprefix("ALE/").removesuffix("-v5").lower()
        path = {name.replace("_", ""): roms.get_rom_path(name) for name in roms.get_all_rom_ids()}[rom]
        assert spec.num_actions == 18
        assert path is not None
        assert Path(path).is_file()


def test_only_two_levels_are_evaluated_on_others() -> None:
    moved = {
        level: scores.evaluation_task(level) for level in LEVELS if scores.evaluation_task(level) != level
    }
    assert moved == {
        "dmlab/rooms_collect_good_objects_train": "dmlab/rooms_collect_good_objects_test",
        "dmlab/rooms_exploit_deferred_effects_train": "dmlab/rooms_exploit_deferred_effects_test",
    }
    for test_level in moved.values():
        assert scores.evaluation_task(test_level) == test_level


def test_games_are_evaluated_on_themselves_and_prefixes_stay() -> None:
    assert [scores.evaluation_task(game) for game in GAMES] == list(GAMES)
    level = "contributed/dmlab30/rooms_collect_good_objects_"
    assert scores.evaluation_task(level + "train") == level + "test"


# --- summaries ----------------------------------------------------------------------------------------


def figures(played: Mapping[str, float]) -> tuple[float, ...]:
    """Mean, median, mean capped, median capped."""
    result = summarise([human_normalised(task, score) for task, score in played.items()])
    assert result is not None
    return astuple(result)


def test_a_summary_is_of_scores_and_of_scores_capped_at_a_hundred_each() -> None:
    normalised = {
        "ALE/Breakout-v5": 318.5,  # 1100
        "pong": -3.05,  # 50
        "ALE/Freeway-v5": 7.4,  # 25
        "ALE/Skiing-v5": -29859.3,  # -100
    }
    # 1075 / 4; between 25 and 50; 75 / 4
    assert figures(normalised) == pytest.approx((268.75, 37.5, 18.75, 37.5))


def test_of_an_odd_number_the_median_is_the_one_in_the_middle() -> None:
    played = {"breakout": 318.5, "pong": -3.05, "boxing": 24.1}  # 1100, 50, 200
    assert figures(played) == pytest.approx((450.0, 200.0, 250 / 3, 100.0))


@pytest.mark.parametrize(("who", "percent"), [("human", 100.0), ("random", 0.0)])
def test_a_suite_played_as_people_do_is_at_a_hundred_and_by_chance_at_zero(who: str, percent: float) -> None:
    games = json.loads((DATA / "atari57.json").read_text())["games"]
    levels = json.loads((DATA / "dmlab30.json").read_text())["levels"]
    for played in (
        {game: entry[who] for game, entry in games.items()},
        {level["test"]: level[who] for level in levels},
    ):
        assert figures(played) == pytest.approx((percent,) * 4)


def test_there_is_no_summary_unless_there_are_several_tasks_and_every_one_has_a_score() -> None:
    assert summarise([50.0, None]) is None
    assert summarise([50.0]) is None
    assert summarise([]) is None


def test_scores_can_be_asked_for_without_torch_or_an_emulator() -> None:
    program = (
        "import sys; import services.rl.scores; "
        "print([name for name in ('torch', 'numpy', 'ale_py', 'gymnasium') if name in sys.modules])"
    )
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "[]"
