"""Every metric of the system, declared here and nowhere else.

A pod's ``__main__`` makes one ``CollectorRegistry``, builds the class of its role on it, hands that object
to whoever counts something, and serves the registry with ``health.HealthServer``. Dashboards, alerts and
the live display read these names. An actor id is never a label: a thousand actors would be a thousand series.
"""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

LAG_BUCKETS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
"""Policy versions. Exact where a healthy run lives, so that the largest lag can be read off."""

SECONDS_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

INVALID_REASONS = ("malformed", "protocol", "run", "oversized", "schema", "corrupt")
"""Why a message is refused; the same words as ``wire.codec.WireError.reason``."""


class ActorMetrics:
    """What an actor counts."""

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
            "impala_actor_seconds", "Where the time of the actor's loop goes", ["stage"], registry=registry
        )
        self.weights_version = Gauge(
            "impala_actor_weights_version", "Policy version that acts; -1 before the first", registry=registry
        )
        self.weights_age_seconds = Gauge(
            "impala_actor_weights_age_seconds", "Time since the acting weights arrived", registry=registry
        )
        self.sent_bytes = Counter("impala_actor_sent_bytes", "Bytes of rollouts sent", registry=registry)

        self.weights_version.set(-1)
        _start_at_zero(self.rollouts_dropped, "stopping")
        _start_at_zero(self.seconds, "env", "inference", "send_blocked", "weights")


class LearnerMetrics:
    """What a learner counts. ``samples`` counts for this process, ``steps`` for the run over all restarts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        _describe_process(registry, "learner")
        self.updates = Counter("impala_learner_updates", "Optimiser steps", registry=registry)
        self.samples = Counter(
            "impala_learner_samples", "Agent steps trained on by this process", registry=registry
        )
        self.frames = Counter(
            "impala_learner_frames", "Frames (agent steps x frame skip) trained on", registry=registry
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
        self.stage_seconds = Histogram(
            "impala_learner_stage_seconds",
            "Duration of the stages of an update",
            ["stage"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.world_size = Gauge("impala_learner_world_size", "Learners in the group", registry=registry)
        self.generation = Gauge("impala_learner_generation", "Of the learners' group", registry=registry)
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
        self.checkpoint_timestamp_seconds = Gauge(
            "impala_checkpoint_timestamp_seconds",
            "Unix time of the newest checkpoint; 0 without any",
            registry=registry,
        )
        self.checkpoint_failures = Counter(
            "impala_checkpoint_failures", "Checkpoints that could not be written", registry=registry
        )
        self.training_complete = Gauge(
            "impala_training_complete", "1 once all steps are trained and saved", registry=registry
        )
        self.total_steps = Gauge("impala_total_steps", "Agent steps this run trains for", registry=registry)

        self.policy_version.set(-1)
        for term in ("policy", "baseline", "entropy", "total"):
            self.loss.labels(term).set(math.nan)
        for figure in (self.entropy, self.grad_norm, self.rho_clipped_ratio, self.learning_rate):
            figure.set(math.nan)  # not known yet: a zero would look like a finding
        _start_at_zero(self.rollouts, "ok", "stale", "invalid")
        _start_at_zero(self.invalid_rollouts, *INVALID_REASONS)
        _start_at_zero(self.stage_seconds, "wait", "h2d", "forward_backward", "publish")


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
        self.snapshot_failures = Counter(
            "impala_paramserver_snapshot_failures", "Snapshots that could not be written", registry=registry
        )

        self.version.set(-1)
        _start_at_zero(self.pulls, "full", "not_modified")
        _start_at_zero(self.refused_requests, *INVALID_REASONS, "relay", "stale", "internal")


ROLES = {"actor": ActorMetrics, "learner": LearnerMetrics, "paramserver": ParamserverMetrics}


def metric_names(role: str) -> frozenset[str]:
    """Every name that a query against /metrics of ``role`` may use, with ``_total``, ``_bucket`` etc."""
    registry = CollectorRegistry()
    ROLES[role](registry)
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return frozenset(
        family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]
    )


def _describe_process(registry: CollectorRegistry, role: str) -> None:
    """build_info, and what the operating system knows: memory, CPU seconds, open files."""
    try:
        installed = version("impala-kubernetes")
    except PackageNotFoundError:  # run from a checkout that was never installed
        installed = "unknown"
    build_info = Gauge("impala_build_info", "Always 1", ["version", "role"], registry=registry)
    build_info.labels(version=installed, role=role).set(1)
    ProcessCollector(registry=registry)


def _start_at_zero(metric: Counter | Histogram, *label_values: str) -> None:
    """A series that only appears with its first event has no increase to alert on."""
    for value in label_values:
        metric.labels(value)
