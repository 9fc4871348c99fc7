"""What helm prints after an installation."""

from __future__ import annotations

import pytest

from tests.chart.rendering import CASES, CHART, helm


def notes(*arguments: str, release: str = "impala") -> str:
    done = helm(
        *("install", release, str(CHART), "--namespace", "there", "--dry-run=client", *arguments),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


@pytest.mark.parametrize("case", CASES)
def test_notes_say_how_to_watch_scale_test_and_stop(case: str) -> None:
    text = notes(*CASES[case])

    assert "kubectl --namespace there logs --follow impala-learner-0" in text
    assert "impala status --namespace there impala" in text
    assert "helm test --namespace there impala" in text
    assert "helm uninstall --namespace there impala" in text
    assert "--reuse-values" not in text  # after an update of the chart it lacks the new values
    is_scaled_by_keda = "autoscaling" in case or case == "everything"
    scaled = "learners=N" if is_scaled_by_keda else "actors=N,learners=N"
    assert f"CHART --reset-then-reuse-values --set {scaled}\n" in text
    assert "<no value>" not in text
    assert "%!" not in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_notes_name_what_is_played_and_by_how_many() -> None:
    assert notes("--set", "actors=3").startswith("impala trains catch with 3 actors.\n")
    assert notes(*CASES["example-atari57"]).startswith("impala trains atari57 with 256 actors.\n")
    assert notes(*CASES["three-learners"]).startswith("impala trains catch with 8 actors and 3 learners.\n")
    assert notes(*CASES["autoscaling"]).startswith("impala trains catch with 4 to 256 actors.\n")


def test_notes_say_where_checkpoints_are_and_warn_where_they_are_lost() -> None:
    assert "pong/checkpoints of the claim data-pong-impala-learner-0" in notes(release="pong")
    assert "While another learner leads, they are kept on the claim of that one" in notes(
        *CASES["three-learners"]
    )
    assert "mine/checkpoints of your claim shared" in notes(
        "--set", "runId=mine,learner.persistence.existingClaim=shared"
    )
    assert "WARNING: learner.persistence.enabled is false" in notes(*CASES["no-claim"])


def test_notes_warn_of_what_is_not_guarded_and_of_renderers_that_would_draw_new_seeds() -> None:
    insecure = notes(*CASES["insecure"])

    assert "WARNING: security.enabled is false" in insecure
    assert "WARNING: networkPolicy.enabled is false" in insecure
    assert "Argo CD" in notes()
    assert "WARNING" not in notes()
    assert "Argo CD" not in notes(*CASES["seed-of-mine"])
