"""Every metric of the system, declared here and nowhere else.

A pod's ``__main__`` makes one ``CollectorRegistry``, builds the class of its role on it, hands that object
to whoever counts something, and serves the registry with ``health.HealthServer``. Dashboards, alerts and
the live display read these names. An actor id is never a label: a thousand actors would be a thousand series.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from services.ops.throttling import ThrottlingCollector

LAG_BUCKETS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
"""Policy versions. Exact where a healthy run lives, so that the largest lag can be read off."""

SECONDS_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

INVALID_REASONS = ("malformed", "protocol", "run", "oversized", "schema", "corrupt")
"""Why a message is refused; the same words as ``wire.codec.WireError.reason``."""

AUTH_FAILURES = ("unknown_key", "handshake")
"""Why a connection is refused; the same words as ``wire.security.Refused``."""

REGROUPS = ("joined", "left", "lost", "differed")
"""Why a learner came into another group; differed: weights that should have been the same were not."""

SUITE_LABELS: Mapping[str, tuple[str, str]] = {
    "mean": ("mean", "false"),
    "median": ("median", "false"),
    "mean_capped": ("mean", "true"),
    "median_capped": ("median", "true"),
}
"""Of a suite's scores: (statistic, capped), by their names in ``rl.scores.Summary``."""


class ActorMetrics:
    """What an actor counts."""

    STAGES = ("weights", "start", "env", "inference", "pack", "send_blocked", "idle")
    """Of its time; ``actor/stages.py`` tells what each of them is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        _describe_process(registry, "actor")
        self.env_steps = Counter(
            "impala_actor_env_steps", "Agent steps taken in the environments", registry=registry
        )
        self.episodes = Counter("impala_actor_episodes", "Whole episodes (games) finished", registry=registry)
        self.rollouts_sent = Counter(
            "impala_actor_rollouts_sent", "Rollouts handed to a learner's queue", registry=registry
        )
        self.rollouts_dropped = Counter(
            "impala_actor_rollouts_dropped", "Rollouts thrown away unsent", ["reason"], registry=registry
        )
        self.seconds = Counter(
            "impala_actor_seconds", "Where all of the actor's time goes", ["stage"], registry=registry
        )
        self.weights_version = Gauge(
            "impala_actor_weights_version", "Policy version that acts; -1 before the first", registry=registry
        )
        self.weights_age_seconds = Gauge(
            "impala_actor_weights_age_seconds", "Time since the acting weights arrived", registry=registry
        )
        self.sent_bytes = Counter("impala_actor_sent_bytes", "Bytes of rollouts sent", registry=registry)

        self.weights_version.set(-1)
        _start_at_zero(self.rollouts_dropped, "stopping", "complete")
        _start_at_zero(self.seconds, *self.STAGES)


class LearnerMetrics:
    """What a learner counts. ``samples`` counts for this process, ``steps`` for the run over all restarts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        _describe_process(registry, "learner")
        self.updates = Counter("impala_learner_updates", "Optimiser steps", registry=registry)
        self.samples = Counter(
            "impala_learner_samples", "Fresh agent steps trained on by this process", registry=registry
        )
        self.frames = Counter(
            "impala_learner_frames", "Fresh frames (agent steps x frame skip) trained on", registry=registry
        )
        self.received_bytes = Counter("impala_learner_received_bytes", "Bytes of rollouts", registry=registry)
        self.rollouts = Counter(
            "impala_learner_rollouts", "Rollouts that arrived, by their fate", ["result"], registry=registry
        )
        self.invalid_rollouts = Counter(
            "impala_learner_invalid_rollouts", "Rollouts refused", ["reason"], registry=registry
        )
        self.sequence_gaps = Counter(
            "impala_learner_sequence_gaps", "Rollouts sent that never arrived", registry=registry
        )
        self.queue_depth = Gauge("impala_learner_queue_depth", "Rollouts waiting", registry=registry)
        self.queue_capacity = Gauge("impala_learner_queue_capacity", "Of the queue", registry=registry)
        self.loss = Gauge("impala_learner_loss", "Terms of the last loss", ["term"], registry=registry)
        self.entropy = Gauge("impala_learner_entropy", "Mean policy entropy in nats", registry=registry)
        self.grad_norm = Gauge(
            "impala_learner_grad_norm", "Global gradient norm before clipping", registry=registry
        )
        self.rho_clipped_ratio = Gauge(
            "impala_learner_rho_clipped_ratio", "Share of importance weights over rho_bar", registry=registry
        )
        self.learning_rate = Gauge("impala_learner_learning_rate", "Of the last update", registry=registry)
        self.nonfinite_updates = Counter(
            "impala_learner_nonfinite_updates", "Updates skipped: gradient not finite", registry=registry
        )
        self.policy_lag_versions = Histogram(
            "impala_learner_policy_lag_versions",
            "Versions between the policy that acted and the one that trains",
            buckets=LAG_BUCKETS,
            registry=registry,
        )
        self.max_policy_lag = Gauge(
            "impala_learner_max_policy_lag_versions", "Rollouts further behind are dropped", registry=registry
        )
        self.stage_seconds = Histogram(
            "impala_learner_stage_seconds",
            "Duration of the stages of an update",
            ["stage"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.world_size = Gauge(
            "impala_learner_world_size", "Learners in the group; 0 between two", registry=registry
        )
        self.generation = Gauge("impala_learner_generation", "Of the learners' group", registry=registry)
        self.leads = Gauge(
            "impala_learner_leads", "1 for the learner that publishes, reports and saves", registry=registry
        )
        self.holds_state = Gauge(
            "impala_learner_holds_state",
            "1 for the learner whose state the members of its group took over; 0 between two groups",
            registry=registry,
        )
        self.regroups = Counter(
            "impala_learner_regroups",
            "Groups that took the place of another one, because a learner came, left or was lost",
            ["reason"],
            registry=registry,
        )
        self.parameters_checksum = Gauge(
            "impala_learner_parameters_checksum",
            "Of the weights' bits, the same in all learners of a group",
            registry=registry,
        )
        self.parameters_checksum_version = Gauge(
            "impala_learner_parameters_checksum_version", "Policy version that it is of", registry=registry
        )
        self.policy_version = Gauge(
            "impala_learner_policy_version", "Newest policy version; -1 before the first", registry=registry
        )
        self.steps = Gauge(
            "impala_learner_steps", "Agent steps trained in this run, before restarts too", registry=registry
        )
        self.episode_return = Gauge(
            "impala_episode_return", "Mean raw return of the latest episodes", ["task"], registry=registry
        )
        self.episode_length = Gauge(
            "impala_episode_length", "Mean agent steps of the latest episodes", ["task"], registry=registry
        )
        self.human_normalised_score = Gauge(
            "impala_human_normalised_score",
            "Of that return, in percent from random to human, uncapped; only where both are known",
            ["task"],
            registry=registry,
        )
        self.suite_human_normalised_score = Gauge(
            "impala_suite_human_normalised_score",
            "Over several tasks: mean and median, of scores as they are and capped at 100 each",
            ["statistic", "capped"],
            registry=registry,
        )
        self.task_steps = Counter(
            "impala_learner_task_steps", "Fresh agent steps trained on", ["task"], registry=registry
        )
        self.popart_mean = Gauge(
            "impala_popart_mean", "PopArt's mu: mean of the value targets", ["task"], registry=registry
        )
        self.popart_sigma = Gauge(
            "impala_popart_sigma", "PopArt's sigma: scale of the value targets", ["task"], registry=registry
        )
        self.checkpoint_timestamp_seconds = Gauge(
            "impala_checkpoint_timestamp_seconds",
            "Unix time of the newest checkpoint; 0 without any",
            registry=registry,
        )
        self.checkpoint_interval_seconds = Gauge(
            "impala_checkpoint_interval_seconds", "Configured time between two checkpoints", registry=registry
        )
        self.checkpoint_failures = Counter(
            "impala_checkpoint_failures", "Checkpoints that could not be written", registry=registry
        )
        self.training_complete = Gauge(
            "impala_training_complete", "1 once all steps are trained and saved", registry=registry
        )
        self.total_steps = Gauge("impala_total_steps", "Agent steps this run trains for", registry=registry)
        self.auth_failures = _auth_failures(registry)

        self.policy_version.set(-1)
        for term in ("policy", "baseline", "entropy", "total"):
            self.loss.labels(term).set(math.nan)
        for figure in (self.entropy, self.grad_norm, self.rho_clipped_ratio, self.learning_rate):
            figure.set(math.nan)  # not known yet: a zero would look like a finding
        _start_at_zero(self.rollouts, "ok", "stale", "invalid")
        _start_at_zero(self.invalid_rollouts, *INVALID_REASONS)
        _start_at_zero(self.stage_seconds, "wait", "agree", "h2d", "forward_backward", "allreduce", "publish")
        _start_at_zero(self.regroups, *REGROUPS)


class ReplayMetrics:
    """What a learner with replay counts besides; made on its registry, and only then, by ``__main__``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.replayed_samples = Counter(
            "impala_learner_replayed_samples", "Agent steps trained on once more", registry=registry
        )
        self.rejected_ratio = Gauge(
            "impala_learner_replay_rejected_ratio",
            "Share of the trained steps that lie outside of the trust region",
            registry=registry,
        )
        self.age_versions = Gauge(
            "impala_learner_replay_age_versions",
            "Mean versions between acting and replaying, in the last batch",
            registry=registry,
        )
        self.steps = Gauge("impala_learner_replay_steps", "Agent steps held", registry=registry)
        self.capacity = Gauge(
            "impala_learner_replay_capacity", "Agent steps there is room for", registry=registry
        )
        self.size_bytes = Gauge("impala_learner_replay_bytes", "Memory they take", registry=registry)
        self.log_lost = Counter(
            "impala_learner_replay_log_lost",
            "Rollouts that the disk did not take, which a restart would miss",
            registry=registry,
        )

        for figure in (self.rejected_ratio, self.age_versions, self.capacity):
            figure.set(math.nan)


class ParamserverMetrics:
    """What a parameter server, or a relay of one, counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        _describe_process(registry, "paramserver")
        self.pulls = Counter(
            "impala_paramserver_pulls", "Requests for weights answered", ["result"], registry=registry
        )
        self.sent_bytes = Counter("impala_paramserver_sent_bytes", "Bytes of weights sent", registry=registry)
        self.publishes = Counter(
            "impala_paramserver_publishes", "New versions taken from learners", registry=registry
        )
        self.refused_requests = Counter(
            "impala_paramserver_refused_requests", "Requests refused", ["reason"], registry=registry
        )
        self.pull_seconds = Histogram(
            "impala_paramserver_pull_seconds",
            "From a request for weights (or the new version it waited for) to its answer",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.version = Gauge(
            "impala_paramserver_version", "Newest policy version; -1 before the first", registry=registry
        )
        self.seats = Gauge("impala_paramserver_seats", "Actors that hold a seat", registry=registry)
        self.learners = Gauge("impala_paramserver_learners", "Learners that attend", registry=registry)
        self.snapshot_failures = Counter(
            "impala_paramserver_snapshot_failures", "Snapshots that could not be written", registry=registry
        )
        self.auth_failures = _auth_failures(registry)

        self.version.set(-1)
        _start_at_zero(self.pulls, "full", "not_modified")
        _start_at_zero(
            self.refused_requests,
            *INVALID_REASONS,
            "relay",
            "role",
            "stale",
            "config",
            "config_wait",
            "not_leader",
            "internal",
        )


class EvaluatorMetrics:
    """What an evaluator found: of a task when it has been played, of all together at the end of the round."""

    def __init__(self, registry: CollectorRegistry) -> None:
        _describe_process(registry, "evaluator")
        self.episode_return = Gauge(
            "impala_evaluator_return",
            "Raw return of whole episodes: mean, median, std",
            ["task", "statistic"],
            registry=registry,
        )
        self.human_normalised_score = Gauge(
            "impala_evaluator_human_normalised_score",
            "Of the mean return, in percent from random to human, uncapped; only where both are known",
            ["task"],
            registry=registry,
        )
        self.suite_human_normalised_score = Gauge(
            "impala_evaluator_suite_human_normalised_score",
            "Over several tasks: mean and median, of scores as they are and capped at 100 each",
            ["statistic", "capped"],
            registry=registry,
        )
        self.episodes = Counter("impala_evaluator_episodes", "Whole episodes played", registry=registry)
        self.rounds = Counter("impala_evaluator_rounds", "Rounds finished", registry=registry)
        self.policy_version = Gauge(
            "impala_evaluator_policy_version", "That played; -1 before the first round", registry=registry
        )
        self.steps = Gauge(
            "impala_evaluator_steps", "Agent steps trained when that version was made", registry=registry
        )
        self.round_seconds = Gauge(
            "impala_evaluator_round_seconds", "Duration of the latest round", registry=registry
        )
        self.weights_age_seconds = Gauge(
            "impala_evaluator_weights_age_seconds",
            "Time since the newest weights arrived, played or not",
            registry=registry,
        )

        self.policy_version.set(-1)
        for figure in (self.steps, self.round_seconds):
            figure.set(math.nan)


ROLES = {
    "actor": ActorMetrics,
    "learner": LearnerMetrics,
    "paramserver": ParamserverMetrics,
    "evaluator": EvaluatorMetrics,
}


def metric_names(role: str) -> frozenset[str]:
    """Every name that a query against /metrics of ``role`` may use, with ``_total``, ``_bucket`` etc."""
    registry = CollectorRegistry()
    ROLES[role](registry)
    if role == "learner":
        ReplayMetrics(registry)
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return frozenset(
        family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]
    )


def _describe_process(registry: CollectorRegistry, role: str) -> None:
    """build_info, and what the operating system knows: memory, CPU seconds, open files, throttling."""
    try:
        installed = version("impala-kubernetes")
    except PackageNotFoundError:  # run from a checkout that was never installed
        installed = "unknown"
    build_info = Gauge("impala_build_info", "Always 1", ["version", "role"], registry=registry)
    build_info.labels(version=installed, role=role).set(1)
    ProcessCollector(registry=registry)
    ThrottlingCollector(registry)


def _auth_failures(registry: CollectorRegistry) -> Counter:
    """Of whoever listens."""
    counter = Counter(
        "impala_auth_failures",
        "Connections refused: a key that is not known, or no end of the handshake",
        ["reason"],
        registry=registry,
    )
    _start_at_zero(counter, *AUTH_FAILURES)
    return counter


def _start_at_zero(metric: Counter | Histogram, *label_values: str) -> None:
    """A series that only appears with its first event has no increase to alert on."""
    for value in label_values:
        metric.labels(value)
