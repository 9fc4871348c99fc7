"""What a release looks like, looked at as text."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from services.cluster.overview import Evaluation, LearnerStatus, Overview, RoleStatus, RunState, Trouble
from services.cluster.picture import MAX_LEARNERS, MAX_TROUBLES, render
from services.ops.figures import RunInfo, Snapshot


def role(
    name: str, desired: int = 1, ready: int = 1, restarts: int = 0, *, is_settled: bool = True
) -> RoleStatus:
    return RoleStatus(role=name, desired=desired, ready=ready, restarts=restarts, is_settled=is_settled)


TRAINING = Snapshot(
    run=RunInfo(env_id="catch", total_steps=1_000_000, frame_skip=4, run_dir=Path()),
    elapsed_s=0.0,
    pods=(),
    steps=250_000,
    steps_per_s=5_000.0,
    eta_s=150.0,
    episode_return=0.5,
    task_returns={"catch": 0.5},
    lag_mean=1.5,
    lag_max=4,
    wait_ratio=0.25,
    queue_depth=3,
    queue_capacity=64,
    policy_version=1234,
    checkpoint_age_s=61.0,
)
FULL = Overview(
    namespace="lab",
    release="demo",
    state="training",
    roles=(role("learner"), role("paramserver", restarts=1), role("actor", 256, 250)),
    troubles=(Trouble(role="actor", reason="0/8 nodes are available", count=6, example="demo-actor-x"),),
    tasks="catch",
    training=TRAINING,
    learners=(),
    world_size=1,
    generation=7,
    paramserver_version=1233,
    oldest_version=1229,
    newest_version=1233,
    actors_asked=16,
    env_steps_per_s=5_100.0,
    seats=250,
    received_bytes_per_s=2.5e6,
    sent_bytes_per_s=0.75e6,
    rollouts={"ok": 12_500, "stale": 12, "invalid": 1},
    auth_failures=3,
    evaluation=Evaluation(policy_version=1100, returns={"catch": 0.75}, scores={"catch": 87.0}),
)
NOTHING = Overview(
    namespace="lab",
    release="demo",
    state="unknown",
    roles=(role("actor", 0, 0),),
    troubles=(),
    tasks="",
    training=None,
    learners=(),
    world_size=None,
    generation=None,
    paramserver_version=None,
    oldest_version=None,
    newest_version=None,
    actors_asked=0,
    env_steps_per_s=None,
    seats=None,
    received_bytes_per_s=None,
    sent_bytes_per_s=None,
    rollouts={},
    auth_failures=0,
    evaluation=None,
)


def drawn(overview: Overview, width: int = 100, note: str = "") -> str:
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(render(overview, width, note))
    return console.export_text()


@pytest.mark.parametrize(
    "line",
    [
        "IMPALA  demo",
        "namespace lab",
        "250,000 of 1,000,000 steps",
        "25 %",
        "2:30 left",
        "training   catch",
        "5,000 steps/s       20,000 frames/s       5,100 acted/s",
        "return           0.500",
        "evaluated        0.750 mean           1,100 version         87 % human",
        "25 % waiting         3/64 queued             1 in group 7",
        "1,234 learner        1,233 served",
        "1,229 oldest         1,233 newest            16 actors asked",
        "1.500 mean               4 at most",
        "12,500 ok                12 stale              1 invalid",
        "2.50 MB/s rollouts   0.75 MB/s weights",
        "1:01 ago",
        "3 connections without a known key",
        "learner      ● 1 of 1 ready",
        "paramserver  ● 1 of 1 ready   1 restart",
        f"actors       {'●' * 16} 250 of 256 ready   250 seated",
        "6 actors, such as demo-actor-x: 0/8 nodes are available",
    ],
)
def test_what_is_known_is_shown(line: str) -> None:
    assert line in drawn(FULL)


def learner(number: int, *, leads: bool = False, world_size: int = 2, generation: int = 7) -> LearnerStatus:
    return LearnerStatus(
        name=f"demo-impala-learner-{number}",
        leads=leads,
        world_size=world_size,
        generation=generation,
        steps_per_s=1_000.0,
        wait_ratio=0.5,
    )


@pytest.mark.parametrize(
    "line",
    [
        "2 in group 7",
        "learner-0         50 % waiting        1,000 steps/s   leads",
        "learner-1         50 % waiting        1,000 steps/s   still in group 6",
        "learner-2         50 % waiting        1,000 steps/s   in no group",
        "learner-3         50 % waiting        1,000 steps/s    ",
    ],
)
def test_several_learners_have_a_row_each(line: str) -> None:
    learners = (
        learner(0, leads=True),
        learner(1, generation=6),
        learner(2, world_size=0),
        learner(3),
    )
    assert line in drawn(replace(FULL, learners=learners, world_size=2))


def test_many_learners_do_not_fill_the_screen_and_a_single_one_needs_no_row() -> None:
    many = tuple(learner(number, leads=number == 0) for number in range(MAX_LEARNERS + 2))
    assert "and 2 more" in drawn(replace(FULL, learners=many))
    assert "more" not in drawn(replace(FULL, learners=many[:MAX_LEARNERS]))
    assert "leads" not in drawn(replace(FULL, learners=many[:1]))


def test_what_is_not_known_takes_no_room() -> None:
    text = drawn(NOTHING)
    assert "no learner answers" in text
    assert "actors       0 of 0 ready" in text
    for absent in ("speed", "return", "refused", "evaluated", "steps"):
        assert absent not in text
    assert len(text.splitlines()) == 6


def test_a_learner_that_has_only_begun_has_dashes() -> None:
    begun = replace(FULL, training=Snapshot(run=TRAINING.run, elapsed_s=0.0, pods=()), seats=None)
    text = drawn(replace(begun, received_bytes_per_s=None, evaluation=replace(FULL.evaluation, returns={})))  # type: ignore[type-var]
    assert "– steps/s" in text
    assert "– rollouts" in text
    assert "no episode yet" in text
    assert "no round yet" in text
    assert "no checkpoint yet" in text
    assert "seated" not in text


@pytest.mark.parametrize(
    ("state", "words"),
    [("waiting", "waiting for rollouts"), ("complete", "complete"), ("unknown", "no learner")],
)
def test_the_state_of_the_run_is_in_words(state: RunState, words: str) -> None:
    assert words in drawn(replace(FULL, state=state))


@pytest.mark.parametrize("overview", [FULL, NOTHING], ids=["full", "nothing"])
@pytest.mark.parametrize("width", [34, 60, 80, 120])
def test_every_line_has_the_width_that_it_was_given(overview: Overview, width: int) -> None:
    assert {len(line) for line in drawn(overview, width).splitlines()} == {width}


def test_only_so_many_troubles_are_shown() -> None:
    troubles = tuple(
        Trouble(role="actor", reason=f"reason {number}", count=1, example=f"pod-{number}")
        for number in range(MAX_TROUBLES + 3)
    )
    text = drawn(replace(FULL, troubles=troubles))
    assert f"pod-{MAX_TROUBLES - 1}: reason" in text
    assert f"pod-{MAX_TROUBLES}: reason" not in text
    assert "and 3 more" in text


def test_a_long_reason_is_folded_and_never_cut_off() -> None:
    words = [f"word{number}" for number in range(60)]
    text = drawn(replace(FULL, troubles=(replace(FULL.troubles[0], reason=" ".join(words)),)), width=80)
    assert all(word in text for word in words)


def test_pods_that_are_being_replaced_are_said_to_be() -> None:
    assert "being replaced" in drawn(replace(FULL, roles=(role("actor", 4, 4, is_settled=False),)))
    assert "being replaced" not in drawn(FULL)


def test_a_note_stands_where_the_namespace_was() -> None:
    text = drawn(FULL, note="cluster does not answer")
    assert "cluster does not answer" in text
    assert "namespace lab" not in text


def test_names_from_a_cluster_are_never_read_as_markup() -> None:
    odd = replace(FULL, release="[bold]x[/]", troubles=(replace(FULL.troubles[0], reason="[red]why[/]"),))
    text = drawn(odd)
    assert "[bold]x[/]" in text
    assert "[red]why[/]" in text


def test_the_picture_of_a_usual_run_fits_a_terminal_of_24_lines() -> None:
    usual = replace(FULL, troubles=(), auth_failures=0, evaluation=None)
    assert len(drawn(usual, 80).splitlines()) <= 24
