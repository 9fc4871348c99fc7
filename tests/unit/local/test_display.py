"""The pictures, looked at as text."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from services.local.display import LiveProgress, PlainProgress, render
from services.local.formats import SPARKS, sparkline
from services.ops.figures import PodPhase, PodStatus, Replay, RunInfo, Snapshot
from services.ops.logging import get_logger

RUN = RunInfo(
    env_id="ALE/Pong-v5", total_steps=50_000_000, frame_skip=4, run_dir=Path("runs/20261120-140236-Pong-v5")
)


def pod(
    name: str, phase: PodPhase = "up", restarts: int = 0, memory_bytes: float | None = 240e6
) -> PodStatus:
    return PodStatus(
        name=name, role=name.partition("-")[0], phase=phase, restarts=restarts, memory_bytes=memory_bytes
    )


FULL = Snapshot(
    run=RUN,
    elapsed_s=3712,
    pods=(pod("paramserver"), pod("learner"), pod("actor-0", "restarting", 1, None), pod("actor-1")),
    steps=31_024_128,
    steps_per_s=3204.3,
    eta_s=5923,
    episode_return=18.32,
    returns=tuple(float(value) for value in range(-21, 19)),
    lag_mean=1.23,
    lag_max=3,
    wait_ratio=0.12,
    queue_depth=34,
    queue_capacity=64,
    losses={"policy": -12.1, "baseline": 3.2, "entropy": -4.1, "total": -13.0},
    entropy=1.321,
    grad_norm=43.2,
    learning_rate=4.1e-4,
    policy_version=48231,
    checkpoint_age_s=12,
    troubles={"stale rollouts": 13},
)
EMPTY = Snapshot(run=RUN, elapsed_s=2, pods=(pod("paramserver", "starting", 0, None),))


def drawn(snapshot: Snapshot, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(render(snapshot, width))
    return console.export_text()


GAMES = ("Pong", "Breakout", "Skiing", "MontezumaRevenge")
MANY = replace(
    FULL,
    task_returns={f"ALE/{game}-v5": 1234.5 for game in GAMES},
    task_scores={f"ALE/{game}-v5": 123.4 for game in GAMES},
    suite_scores={"mean": 4321.0, "median": 55.5, "mean_capped": 44.4},
    replay=Replay(
        steps=190_000, capacity=200_000, size_bytes=1234.4e6, age_versions=123.456, rejected_ratio=0.034
    ),
)


@pytest.mark.parametrize("snapshot", [FULL, EMPTY, MANY], ids=["full", "empty", "many"])
@pytest.mark.parametrize("width", [20, 34, 60, 80, 120])
def test_every_line_has_the_width_that_it_was_given(snapshot: Snapshot, width: int) -> None:
    lines = drawn(snapshot, width).splitlines()
    assert {len(line) for line in lines} == {width}


@pytest.mark.parametrize("snapshot", [FULL, MANY], ids=["full", "many"])
@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off_in_a_usual_terminal(snapshot: Snapshot, width: int) -> None:
    assert "…" not in drawn(snapshot, width)


def test_all_figures_are_shown() -> None:
    text = drawn(FULL)
    for figure in (
        "ALE/Pong-v5",
        "runs/20261120-140236-Pong-v5",
        "31,024,128 of 50,000,000 steps",
        "62 %",
        "1:38:43 left",
        "3,204 steps/s",
        "12,817 frames/s",
        "1:01:52 elapsed",
        "18.32  ▁",
        "12 % waiting",
        "34/64 queued",
        "48,231 version",
        "1.230 mean",
        "3 at most",
        "-13.00 total",
        "-12.10 policy",
        "3.200 baseline",
        "1.321 entropy",
        "43.20 grad norm",
        "4.10e-04 lr",
        "0:12 ago",
        "●● 1 of 2 up   240 MB   1 restart",
        "13 stale rollouts",
    ):
        assert figure in text, figure


def test_replay_is_one_row() -> None:
    assert "replay        1,234 MB 95 % full      123.5 mean age         3 % rejected" in drawn(MANY)
    assert "replay" not in drawn(FULL)


def test_a_replay_that_has_only_begun_has_dashes() -> None:
    begun = Replay(steps=0, capacity=None, size_bytes=0.0, age_versions=None, rejected_ratio=None)
    text = drawn(replace(FULL, replay=begun))
    assert "0 MB – full" in text
    assert "– mean age" in text
    assert "– rejected" in text


def test_several_tasks_stand_below_the_mean_of_their_returns() -> None:
    lines = drawn(MANY).splitlines()
    (at,) = (number for number, line in enumerate(lines) if "return  " in line)
    assert "18.32  ▁" in lines[at]
    assert lines[at + 1].startswith("│ tasks        Pong-v5 ")
    assert "learner " in lines[at + 1 + len(GAMES) + 1]
    assert "4,321 % mean            56 % median          44 % mean capped" in lines[at + 1 + len(GAMES)]


def test_a_single_game_has_its_score_beside_its_return() -> None:
    one = replace(FULL, task_returns={"ALE/Pong-v5": 18.32}, task_scores={"ALE/Pong-v5": 110.54})
    text = drawn(one)
    assert "18.32    111 % human  ▁" in text
    assert text.count("\n") == drawn(FULL).count("\n")
    assert "18.32  ▁" in drawn(replace(one, task_scores={}))


def test_what_is_not_known_yet_is_a_dash_and_not_a_zero() -> None:
    text = drawn(EMPTY)
    assert "– steps/s" in text
    assert "no episode yet" in text
    assert "no checkpoint yet" in text
    assert "starting" in text
    assert "lost" not in text


def test_the_picture_keeps_its_height_while_figures_come_in() -> None:
    known = replace(EMPTY, steps=5, steps_per_s=1.0, episode_return=1.0, checkpoint_age_s=3.0)
    assert drawn(known).count("\n") == drawn(EMPTY).count("\n")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"steps": 50_000_000}, "done"),
        ({"steps": 60_000_000}, "100 %"),
        ({"eta_s": None}, "waiting"),
        ({"pods": (pod("learner", "stopped"),)}, "stopped"),
        ({"pods": (pod("learner", "stopped"),)}, "in checkpoints/"),
        ({"eta_s": 60.0 * 3600}, "2.5 days left"),
        ({"losses": {"total": math.nan}}, "nan total"),
        ({"grad_norm": math.inf}, "inf grad norm"),
        ({"lag_max": math.inf}, "many at most"),
        ({"episode_return": 123456.0}, "123,456"),
        ({"episode_return": 1.5e9}, "1.50e+09"),
        ({"pods": (pod("learner", "silent"),)}, "● silent"),
        ({"wait_ratio": -0.001}, " 0 % waiting"),
    ],
)
def test_unusual_values_have_a_form(change: dict[str, object], shown: str) -> None:
    assert shown in drawn(replace(FULL, **change))  # type: ignore[arg-type]


def test_a_run_directory_is_never_read_as_markup() -> None:
    odd = replace(RUN, run_dir=Path("runs/[bold red]x[/]"), env_id="[blink]")
    text = drawn(replace(FULL, run=odd))
    assert "[bold red]x[/]" in text.replace("\n", "")
    assert "[blink]" in text


LEARNERS = (pod("learner-0"), pod("learner-1"), pod("learner-2", "restarting", 2))


@pytest.mark.parametrize(("world_size", "shown"), [(3, "        3 learners"), (2, "      2/3 learners")])
def test_several_learners_say_how_many_of_them_train_together(world_size: int, shown: str) -> None:
    several = replace(FULL, pods=LEARNERS, world_size=world_size, generation=12, leader="learner-1")
    text = drawn(several)
    assert f"{shown}          12 group      learner-1 leads" in text
    assert "learners     ●●● 2 of 3 up   720 MB   2 restarts" in text
    assert "–/3 learners" in drawn(replace(EMPTY, pods=LEARNERS)), "known or not"


def test_a_single_learner_has_no_group_to_speak_of() -> None:
    one = replace(FULL, world_size=1, generation=3, leader="learner-0")
    assert " group" not in drawn(one)


def test_a_hundred_actors_are_one_row() -> None:
    many = replace(FULL, pods=tuple(pod(f"actor-{number}") for number in range(100)))
    assert "100 of 100 up   24,000 MB" in drawn(many)


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 10, ""),
        ([1.0], 10, "▁"),
        ([1.0, 1.0, 1.0], 10, "▁▁▁"),
        ([0.0, 7.0], 10, "▁█"),
        (list(range(8)), 8, SPARKS),
        (list(range(800)), 8, SPARKS),
        ([1.0, 2.0], 0, ""),
    ],
)
def test_a_sparkline_goes_from_the_least_to_the_greatest(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line


def test_live_progress_draws_events_and_leaves_the_last_picture() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, height=50, color_system=None)
    progress = LiveProgress(console, clock=lambda: 0.0)
    progress.update(EMPTY)
    progress.trouble("pod_died", pod="actor-0", exit_code=1, last_words="out of memory")
    progress.update(FULL)
    progress.close()
    text = output.getvalue()
    assert 'pod died  pod=actor-0  exit_code=1  last_words="out of memory"' in text
    assert "31,024,128" in text
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is visible again"


def test_plain_progress_is_a_line_of_figures(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        PlainProgress(get_logger("train")).update(FULL)
    [record] = caplog.records
    fields = record.__dict__["fields"]
    assert record.getMessage() == "progress"
    assert fields["steps"] == 31_024_128
    assert fields["frames_per_s"] == 12817
