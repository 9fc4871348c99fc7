"""The plan of faults, the file of findings, and the table that is made of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.chaos import NOT_PERMITTED, main
from benchmarks.chaos_faults import KINDS, QUIET_S, plans, victim_of
from benchmarks.chaos_findings import DIFFERED, GENERATION, HOLDS, SENT, STEPS, Crew, Finding, Seen
from benchmarks.chaos_report import (
    BEGIN,
    END,
    Results,
    Settings,
    draw,
    judged_s,
    line,
    quantile,
    read,
    seed_of,
    summary,
    table,
    too_slow,
    write_into,
)
from benchmarks.chaos_watch import figures_of

CREW = Crew(
    learners=("learner-0", "learner-1", "learner-2"),
    actors=("actor-0", "actor-1"),
    paramserver="paramserver",
    steps_per_update=100,
)
SETTINGS = Settings(learners=3, actors=2, seed=7, hold_s=10.0, flags=("--batch_size", "8"), commit="abc")
KILLED = Finding(
    round=1,
    fault="kill",
    target="state holder",
    victim="learner-0",
    training_s=1.5,
    weights_s=2.0,
    whole_s=8.0,
    normal_s=0.1,
    gave_up=(),
    violations=(),
)
CUT = replace(KILLED, fault="cut", target="parameter server", victim="paramserver", training_s=0.0)


# --- the plan ---------------------------------------------------------------------------------------------


def test_every_round_has_every_kind_of_fault_once() -> None:
    for number in (1, 2, 3):
        kinds = [(each.fault, each.target) for each in plans(3, seed=1) if each.round == number]
        assert sorted(kinds) == sorted(KINDS)


def held_by(pod: str | None) -> dict[str, Seen]:
    """What is seen of the learners while this one holds the state."""
    return {
        each: Seen(time_s=1.0, pod=each, figures={GENERATION: 5.0, HOLDS: float(each == pod)})
        for each in CREW.learners
    }


@pytest.mark.parametrize("holder", CREW.learners)
def test_victims_are_what_the_kind_says_when_it_happens(holder: str) -> None:
    victims: dict[str, set[str | None]] = {}
    for each in plans(20, seed=1):
        victims.setdefault(each.target, set()).add(victim_of(each, CREW, held_by(holder)))
        assert QUIET_S[0] <= each.quiet_s <= QUIET_S[1]
    assert victims == {
        "state holder": {holder},
        "other learner": {*CREW.learners} - {holder},
        "parameter server": {"paramserver"},
        "actor": {"actor-0", "actor-1"},
    }


def test_while_nobody_holds_the_state_no_learner_can_be_chosen() -> None:
    for each in plans(1, seed=1):
        victim = victim_of(each, CREW, held_by(None))
        assert (victim is None) == (each.target in ("state holder", "other learner"))


def test_a_seed_is_a_plan_whose_rounds_do_not_depend_on_their_number() -> None:
    assert [*plans(5, seed=1)] == [*plans(5, seed=1)]
    assert [*plans(5, seed=1)][: len(KINDS)] == [*plans(1, seed=1)]
    assert [*plans(1, seed=1)] != [*plans(1, seed=2)]


# --- the file ---------------------------------------------------------------------------------------------


def test_a_run_that_was_broken_off_knows_what_has_happened(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    first = Results(path, SETTINGS)
    broken = replace(CUT, violations=("learner-1 fell",), whole_s=None)
    killed = replace(KILLED, victim="learner-2")  # which is not in the plan
    for each in (killed, broken):
        first.add(each)
    second = Results(path, SETTINGS)
    assert second.findings == [killed, broken]
    left = [each for each in plans(2, seed=7) if not second.has(each)]
    assert len(left) == 2 * len(KINDS) - 2
    assert Counter((each.fault, each.target) for each in left)["kill", "state holder"] == 1


def test_findings_under_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path, SETTINGS)
    with pytest.raises(ValueError, match=r"results\.jsonl: commit was 'abc' and is 'def'; allowed is"):
        Results(path, replace(SETTINGS, commit="def"))


def test_the_seed_of_an_earlier_call_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert seed_of(path) is None
    Results(path, SETTINGS).add(KILLED)
    assert seed_of(path) == 7


def test_a_last_line_that_was_only_half_written_is_no_finding_and_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Results(path, SETTINGS)
    for each in (KILLED, CUT):
        first.add(each)
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert read(path) == (SETTINGS, [KILLED])
    assert path.read_text() == whole[:-20], "to read is not to mend"
    second = Results(path, SETTINGS)
    assert second.findings == [KILLED]
    second.add(CUT)
    assert path.read_text() == whole


def test_a_file_without_a_whole_line_is_as_none(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read(path) is None
    path.write_text('{"learners": 3, "act')
    assert read(path) is None
    assert seed_of(path) is None
    Results(path, SETTINGS).add(KILLED)
    assert read(path) == (SETTINGS, [KILLED])


def test_what_is_in_a_file_is_told_without_running_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    assert main(["--report", str(path)]) == NOT_PERMITTED
    assert capsys.readouterr().err == f"--report {path}: has no results\n"
    results = Results(path, SETTINGS)
    results.add(KILLED)
    assert main(["--report", str(path)]) == 0
    assert "1 faults" in capsys.readouterr().out
    results.add(replace(KILLED, round=2, training_s=18.5))
    assert main(["--report", str(path)]) == 1
    slow = "kill -9, state holder: training goes on after 10.0 s; allowed is under 10 s"
    assert capsys.readouterr().out.endswith(f"VIOLATION {slow}\n")


# --- the bound --------------------------------------------------------------------------------------------


def test_every_kind_is_judged_by_its_own_median() -> None:
    assert too_slow([], 10.0) == []
    fast = [replace(KILLED, target="actor", round=n, training_s=0.1) for n in range(9)]
    assert too_slow([*fast, replace(KILLED, training_s=9.9)], 10.0) == []
    (told,) = too_slow([*fast, replace(KILLED, training_s=10.0)], 10.0)
    assert told.startswith("kill -9, state holder: ")


@pytest.mark.parametrize("fault", ["freeze", "cut"])
def test_of_a_server_that_is_away_for_a_while_what_is_longer_than_that_is_judged(fault: str) -> None:
    away = replace(CUT, fault=fault, training_s=19.9)
    assert judged_s(away, 10.0) == pytest.approx(9.9)
    assert judged_s(replace(away, training_s=4.0), 10.0) == 0.0
    assert too_slow([away], 10.0) == []
    assert len(too_slow([replace(away, training_s=20.0)], 10.0)) == 1
    assert rows(table([away], 10.0))[2][6:8] == ["9.9 s", "9.9 s"]


def test_a_killed_server_and_a_frozen_learner_are_judged_from_the_fault_on() -> None:
    assert judged_s(replace(CUT, fault="kill", training_s=12.0), 10.0) == 12.0
    assert judged_s(replace(KILLED, fault="freeze", training_s=12.0), 10.0) == 12.0


# --- the table --------------------------------------------------------------------------------------------


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in each.strip("| ").split("|")] for each in text.splitlines()]


def test_the_table_has_a_row_for_each_kind_with_its_distribution_and_its_violations() -> None:
    slow = replace(KILLED, round=2, training_s=9.0, whole_s=None, gave_up=("it",), violations=("one", "two"))
    head, _, killed, cut = rows(table([KILLED, slow, CUT], 10.0))
    assert len(head) == len(killed) == len(cut)
    assert killed == [
        *("kill -9", "state holder", "2", "5.2 s", "9.0 s", "9.0 s", "-", "-", "2.0 s", "2.0 s"),
        *("never", "never", "1", "2"),
    ]
    assert cut[:4] == ["partition", "parameter server", "1", "0.0 s"]


def test_a_quantile_is_a_value_that_was_measured() -> None:
    values = [float(n) for n in range(1, 21)]
    assert [quantile(values, q) for q in (0.0, 0.5, 0.9, 0.91, 1.0)] == [1.0, 10.0, 18.0, 19.0, 20.0]
    assert quantile([3.0], 0.9) == 3.0


def test_one_line_tells_what_happened_and_what_was_broken() -> None:
    assert "learner-0" in line(KILLED)
    assert "VIOLATION" not in line(KILLED)
    told = line(
        replace(KILLED, whole_s=None, gave_up=("learner-2 exited with -6",), violations=("it went back",))
    )
    assert "whole never" in told
    assert "; learner-2 exited with -6\n" in told
    assert told.endswith("VIOLATION it went back")


def test_the_summary_counts_faults_and_not_violations() -> None:
    assert summary([]) == "no fault yet"
    broken = replace(CUT, violations=("one", "two"))
    assert summary([KILLED, broken]).startswith("2 faults: training goes on after 0.8 s (median)")
    assert summary([KILLED, broken]).endswith("1 broke a promise")


def test_the_table_takes_the_place_of_the_last_one_and_of_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "chaos.md"
    document.write_text(f"# Chaos\n\n{BEGIN}\nold\n{END}\n\nwords\n")
    write_into(document, "new\n")
    write_into(document, "newer\n")
    assert document.read_text() == f"# Chaos\n\n{BEGIN}\nnewer\n{END}\n\nwords\n"
    document.write_text("# Chaos\n")
    with pytest.raises(ValueError, match="has no"):
        write_into(document, "new\n")
    assert document.read_text() == "# Chaos\n"


def test_the_picture_is_drawn_of_however_few(tmp_path: Path) -> None:
    draw([KILLED, CUT], 10.0, tmp_path / "chaos.png")
    assert (tmp_path / "chaos.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_are_plain_json(tmp_path: Path) -> None:
    Results(tmp_path / "results.jsonl", SETTINGS).add(replace(KILLED, whole_s=None))
    settings, found = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert settings["flags"] == ["--batch_size", "8"]
    assert found["whole_s"] is None
    assert math.isclose(found["training_s"], 1.5)


def test_of_a_page_of_metrics_only_what_is_judged_is_kept() -> None:
    page = "\n".join(
        [
            f"# HELP {STEPS} Agent steps",
            f"{STEPS} 1.28e+06",
            f"{SENT} 17.0",
            f"{DIFFERED} 1.0",
            'impala_learner_regroups_total{reason="lost"} 4.0',
            'impala_learner_loss{term="total"} NaN',
            "impala_learner_steps_else 3",
        ]
    )
    assert figures_of(page) == {STEPS: 1_280_000.0, SENT: 17.0, DIFFERED: 1.0}
