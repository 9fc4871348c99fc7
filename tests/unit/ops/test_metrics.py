"""The metrics: their names, and the series that exist before anything has happened."""

import math

import pytest
from prometheus_client import CollectorRegistry

from services.ops.metrics import (
    INVALID_REASONS,
    ROLES,
    ActorMetrics,
    EvaluatorMetrics,
    LearnerMetrics,
    ParamserverMetrics,
    ReplayMetrics,
    metric_names,
)
from services.wire.codec import REASONS


def series(registry: CollectorRegistry) -> set[str]:
    return {sample.name for family in registry.collect() for sample in family.samples}


@pytest.mark.parametrize("role", ROLES)
def test_every_metric_of_ours_starts_with_impala_and_nothing_else_does_but_the_process(role: str) -> None:
    for name in metric_names(role):
        assert name.startswith(("impala_", "process_")), name


ONLY_WITH_EVENTS = {
    "learner": {
        *("impala_episode_return", "impala_episode_length", "impala_learner_task_steps_total"),
        *("impala_human_normalised_score", "impala_suite_human_normalised_score"),
        *("impala_popart_mean", "impala_popart_sigma"),
    },
    "evaluator": {
        *("impala_evaluator_return", "impala_evaluator_human_normalised_score"),
        "impala_evaluator_suite_human_normalised_score",
    },
}
REPLAY = {
    "impala_learner_replayed_samples_total",
    "impala_learner_replay_rejected_ratio",
    "impala_learner_replay_age_versions",
    "impala_learner_replay_steps",
    "impala_learner_replay_capacity",
    "impala_learner_replay_bytes",
    "impala_learner_replay_log_lost_total",
}


@pytest.mark.parametrize("role", ROLES)
def test_metric_names_are_the_names_that_are_really_exposed(role: str) -> None:
    registry = CollectorRegistry()
    ROLES[role](registry)
    if role == "learner":
        ReplayMetrics(registry)
    exposed = {name for name in series(registry) if not name.endswith("_created")}
    assert metric_names(role) - exposed == ONLY_WITH_EVENTS.get(role, set())
    assert exposed <= metric_names(role)


def test_a_run_without_replay_has_no_series_of_replay() -> None:
    plain, replaying = CollectorRegistry(), CollectorRegistry()
    LearnerMetrics(plain)
    LearnerMetrics(replaying)
    ReplayMetrics(replaying)
    assert {name for name in series(replaying) - series(plain) if not name.endswith("_created")} == REPLAY
    assert metric_names("learner") >= REPLAY


def test_the_documented_names_exist() -> None:
    assert {
        "impala_actor_env_steps_total",
        "impala_actor_seconds_total",
        "impala_build_info",
    } <= metric_names("actor")
    assert {
        "impala_learner_samples_total",
        "impala_learner_policy_lag_versions_bucket",
        "impala_learner_stage_seconds_sum",
        "impala_episode_return",
        "impala_checkpoint_timestamp_seconds",
        "impala_training_complete",
        "impala_total_steps",
    } <= metric_names("learner")
    assert {"impala_paramserver_pulls_total", "impala_paramserver_seats"} <= metric_names("paramserver")
    assert {
        "impala_evaluator_return",
        "impala_evaluator_episodes_total",
        "impala_evaluator_rounds_total",
        "impala_evaluator_policy_version",
        "impala_evaluator_steps",
        "impala_evaluator_round_seconds",
    } <= metric_names("evaluator")


def test_two_registries_in_one_process_share_nothing() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    ActorMetrics(first).env_steps.inc(3)
    ActorMetrics(second)
    assert first.get_sample_value("impala_actor_env_steps_total") == 3
    assert second.get_sample_value("impala_actor_env_steps_total") == 0


@pytest.mark.parametrize(
    ("name", "label", "values"),
    [
        ("impala_learner_rollouts_total", "result", ("ok", "stale", "invalid")),
        ("impala_learner_invalid_rollouts_total", "reason", INVALID_REASONS),
        ("impala_learner_stage_seconds_count", "stage", ("wait", "h2d", "forward_backward", "publish")),
    ],
)
def test_series_with_known_labels_exist_at_zero(name: str, label: str, values: tuple[str, ...]) -> None:
    registry = CollectorRegistry()
    LearnerMetrics(registry)
    for value in values:
        assert registry.get_sample_value(name, {label: value}) == 0


def test_the_reasons_that_are_counted_are_those_that_the_decoder_gives() -> None:
    assert set(INVALID_REASONS) == set(REASONS)


def test_every_reason_to_refuse_a_request_exists_at_zero() -> None:
    registry = CollectorRegistry()
    ParamserverMetrics(registry)
    for reason in (
        *INVALID_REASONS,
        "relay",
        "role",
        "stale",
        "config",
        "config_wait",
        "not_leader",
        "internal",
    ):
        assert registry.get_sample_value("impala_paramserver_refused_requests_total", {"reason": reason}) == 0


def test_what_the_learner_has_not_reported_yet_is_not_a_number() -> None:
    registry = CollectorRegistry()
    LearnerMetrics(registry)
    for term in ("policy", "baseline", "entropy", "total"):
        assert math.isnan(registry.get_sample_value("impala_learner_loss", {"term": term}) or 0.0)
    for name in ("entropy", "grad_norm", "rho_clipped_ratio", "learning_rate"):
        assert math.isnan(registry.get_sample_value(f"impala_learner_{name}") or 0.0)


def test_what_replay_and_the_evaluator_have_not_found_yet_is_not_a_number() -> None:
    registry = CollectorRegistry()
    ReplayMetrics(registry)
    EvaluatorMetrics(registry)
    for name in (
        *("learner_replay_rejected_ratio", "learner_replay_age_versions", "learner_replay_capacity"),
        *("evaluator_steps", "evaluator_round_seconds"),
    ):
        assert math.isnan(registry.get_sample_value(f"impala_{name}") or 0.0), name
    assert registry.get_sample_value("impala_learner_replay_steps") == 0  # nothing is held: that is known


def test_versions_start_below_the_first_one() -> None:
    server, evaluator = CollectorRegistry(), CollectorRegistry()
    ParamserverMetrics(server)
    EvaluatorMetrics(evaluator)
    assert server.get_sample_value("impala_paramserver_version") == -1
    assert evaluator.get_sample_value("impala_evaluator_policy_version") == -1


def test_build_info_names_the_role() -> None:
    registry = CollectorRegistry()
    ParamserverMetrics(registry)
    [sample] = [s for f in registry.collect() for s in f.samples if s.name == "impala_build_info"]
    assert sample.value == 1
    assert sample.labels["role"] == "paramserver"
    assert sample.labels["version"]
