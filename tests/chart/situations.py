"""What happens to a release, minute by minute, and which alert that is: the cases of ``test_alerts``.

Series are written as promtool takes them: ``0+60x40`` begins at 0 and grows by 60 a minute, 40 times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Series = Mapping[str, str]

RELEASE = {"namespace": "ml", "release": "pong"}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Of one alert, at one moment."""

    alert: str
    name: str
    series: Series
    minute: int = 30
    fires: str = ""
    """The description that is shown; empty for silence."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the alert, beside its severity and the release."""


def one(metric: str, values: str, **labels: str) -> dict[str, str]:
    """One series of the release."""
    inside = ",".join(f'{name}="{value}"' for name, value in {**RELEASE, **labels}.items())
    return {f"{metric}{{{inside}}}": values}


def rollouts(ok: str, stale: str = "0x40", invalid: str = "0x40", gaps: str = "0x40") -> Series:
    return {
        **one("impala_learner_rollouts_total", ok, result="ok"),
        **one("impala_learner_rollouts_total", stale, result="stale"),
        **one("impala_learner_rollouts_total", invalid, result="invalid"),
        **one("impala_learner_sequence_gaps_total", gaps),
    }


def lag(lags: str, limit: str) -> Series:
    return {
        **one("impala_learner_policy_lag_versions_sum", lags),
        **one("impala_learner_policy_lag_versions_count", "0+100x40"),
        **one("impala_learner_max_policy_lag_versions", limit),
    }


def actors(count: int, seats: str, without_weights: int = 0) -> dict[str, str]:
    """Discovered ones; the root parameter server has ``seats`` of them."""
    series = one("impala_paramserver_seats", seats, role="paramserver", pod="paramserver-0")
    for number in range(count):
        version = "-1x40" if number < without_weights else "5x40"
        series |= one("up", "1x40", role="actor", pod=f"actor-{number}")
        series |= one("impala_actor_weights_version", version, role="actor", pod=f"actor-{number}")
    return series


def version(values: str, role: str = "paramserver", pod: str = "paramserver-0") -> dict[str, str]:
    return one("impala_paramserver_version", values, role=role, pod=pod)


def checkpoint(written: str, started: str, interval: str = "60x40") -> Series:
    return {
        **one("impala_checkpoint_timestamp_seconds", written, role="learner"),
        **one("process_start_time_seconds", started, role="learner"),
        **one("impala_checkpoint_interval_seconds", interval, role="learner"),
    }


def scraped(actor: str = "1x40", learner: str = "1x40", paramserver: str = "1x40") -> dict[str, str]:
    """Who answers; their own series are there for as long as they do."""
    return {
        **one("up", actor, role="actor", pod="actor-0"),
        **one("up", learner, role="learner", pod="learner-0"),
        **one("up", paramserver, role="paramserver", pod="paramserver-0"),
        **one("impala_learner_updates_total", learner.replace("0x", "_x"), role="learner"),
        **version(paramserver.replace("0x", "_x")),
    }


def replaced(metric: str, *values: int, pod: str = "learner-0", **labels: str) -> dict[str, str]:
    """Of a pod that is replaced every eight minutes: each time it has another address, and another value."""
    series: dict[str, str] = {}
    for life, value in enumerate(values):
        samples = f"_x{8 * life} " * (life > 0) + f"{value}x7 stale"
        series |= one(metric, samples, pod=pod, instance=f"10.0.0.{life}", **labels)
    return series


UPDATES = "impala_learner_updates_total"
STARTED = "process_start_time_seconds"
WAITED = "impala_learner_stage_seconds_sum"
COMPLETE = "impala_training_complete"
WORLD = "impala_learner_world_size"
LEARNERS = "release:impala_learners_configured:count"
REGROUPS = "impala_learner_regroups_total"
NOT_FINITE = "impala_learner_nonfinite_updates_total"
REFUSED = "impala_auth_failures_total"
NO_UPDATE = "No update in the last 5 minutes, for more than 10 minutes."
EVERYBODY = scraped()
COMPLETED = {**dict.fromkeys(EVERYBODY, "1x9 stale"), **one(COMPLETE, "1x9 stale")}
"""And then nobody of the release is left."""
REINSTALLED = {
    **COMPLETED,
    **one("up", "_x10 1x60", role="paramserver", instance="new"),
    **one("impala_paramserver_version", "_x10 5x60", role="paramserver", instance="new"),
    **one(STARTED, "_x10 600x60", role="paramserver", instance="new"),
}
"""At once: there was no moment without a target."""


def learners(count: int, **world: str) -> dict[str, str]:
    """Discovered ones, of which those in ``world`` (`a="3x40"`) say how many they train with."""
    series: dict[str, str] = {}
    for number in range(count):
        series |= one("up", "1x40", role="learner", pod=f"learner-{number}")
    for pod, values in world.items():
        series |= one(WORLD, values, role="learner", pod=pod)
    return series


def of(alert: str, *cases: tuple[str, Series, int, str, Mapping[str, str]]) -> list[Situation]:
    """Situations of one alert: (name, series, minute, description or "" for silence, labels)."""
    return [
        Situation(alert=alert, name=name, series=series, minute=minute, fires=fires, labels=labels)
        for name, series, minute, fires, labels in cases
    ]


SITUATIONS = [
    *of(
        "LearnerStalled",
        ("updates end", one(UPDATES, "0+100x10 1000x30"), 40, NO_UPDATE, {}),
        ("it never begins", one(UPDATES, "0x40"), 30, NO_UPDATE, {}),
        (
            "it starts again and again, and trains in between",
            {**one(UPDATES, "0+9x40"), **one(STARTED, "0x5 1x5 2x5 3x30", role="learner")},
            *(30, "It was started again 3 times in 30 minutes.", {}),
        ),
        (
            "its pod is replaced again and again, and trains in between",
            {**one(UPDATES, "0+9x40"), **replaced(STARTED, 0, 480, 960, 1440, role="learner")},
            *(36, "It was started again 3 times in 30 minutes.", {}),
        ),
        (
            "a resumed run, whose last life was complete",
            {
                **one(UPDATES, "0x40"),
                **one(COMPLETE, "1x9 stale", instance="old"),
                **one(COMPLETE, "0x40", instance="new"),
            },
            *(30, NO_UPDATE, {}),
        ),
        ("it trains", one(UPDATES, "0+100x40"), 40, "", {}),
        ("it has just started", one(UPDATES, "_x20 0x20"), 30, "", {}),
        ("one restart resets the counter", one(UPDATES, "0+100x20 0+100x20"), 24, "", {}),
        (
            "two restarts",
            {**one(UPDATES, "0+9x40"), **one(STARTED, "0x5 1x5 2x30", role="learner")},
            *(30, "", {}),
        ),
        (
            "its pod is replaced twice",
            {**one(UPDATES, "0+9x40"), **replaced(STARTED, 0, 480, 960, role="learner")},
            *(36, "", {}),
        ),
        (
            "several learners, each replaced once",
            {
                **one(UPDATES, "0+9x40"),
                **replaced(STARTED, 0, 480, role="learner"),
                **replaced(STARTED, 0, 481, pod="learner-1", role="learner"),
                **replaced(STARTED, 0, 482, pod="learner-2", role="learner"),
            },
            *(30, "", {}),
        ),
        (
            "completed, and then removed",
            {**one(UPDATES, "0x40"), **one("up", "1x40", role="paramserver"), **one(COMPLETE, "1x9 stale")},
            *(30, "", {}),
        ),
    ),
    *of(
        "LearnerStarved",
        (
            "it waits 48 seconds of each minute",
            one(WAITED, "0+48x40", stage="wait"),
            *(30, "It spends 80% of its time waiting; more actors would make training faster.", {}),
        ),
        ("it waits 24 seconds of each minute", one(WAITED, "0+24x40", stage="wait"), 30, "", {}),
        ("it computes", one(WAITED, "0+55x40", stage="forward_backward"), 30, "", {}),
        ("it waits for the first actors", one(WAITED, "0+60x8 480+6x30", stage="wait"), 16, "", {}),
    ),
    *of(
        "RolloutsDropped",
        (
            "one in ten is stale",
            rollouts("0+90x40", stale="0+10x40"),
            *(30, "10% of the rollouts are stale, invalid or lost.", {}),
        ),
        (
            "one in four is refused",
            rollouts("0+75x40", invalid="0+25x40"),
            *(30, "25% of the rollouts are stale, invalid or lost.", {}),
        ),
        (
            "one in ten never arrives",
            rollouts("0+90x40", gaps="0+10x40"),
            *(30, "10% of the rollouts are stale, invalid or lost.", {}),
        ),
        ("one in a hundred is stale", rollouts("0+99x40", stale="0+1x40"), 30, "", {}),
        ("nothing arrives at all", rollouts("0x40"), 30, "", {}),
    ),
    *of(
        "PolicyLagHigh",
        (
            "16 of 20 versions",
            lag("0+1600x40", "20x40"),
            30,
            "They are 16 versions behind on average, over three quarters of the limit.",
            {},
        ),
        ("14 of 20 versions", lag("0+1400x40", "20x40"), 30, "", {}),
        ("16 of 200 versions, in a large fleet", lag("0+1600x40", "200x40"), 30, "", {}),
        ("nothing is trained on", {**lag("0x40", "20x40")}, 30, "", {}),
    ),
    *of(
        "ActorsMissing",
        (
            "seven of eight have a seat",
            actors(8, seats="7x40"),
            *(30, "Only 7 actors play, less than nine tenths of those that should.", {}),
        ),
        (
            "two of eight have no weights",
            actors(8, seats="8x40", without_weights=2),
            *(30, "Only 6 actors play, less than nine tenths of those that should.", {}),
        ),
        (
            "none of those that the chart asks for was ever seen",
            {**actors(0, seats="0x40"), **one("release:impala_actors_configured:count", "8x40")},
            *(30, "Only 0 actors play, less than nine tenths of those that should.", {}),
        ),
        ("eight of eight", actors(8, seats="8x40"), 30, "", {}),
        ("nine of ten, on spot nodes", actors(10, seats="9x40"), 30, "", {}),
        ("the start", actors(8, seats="_x22 0x40"), 30, "", {}),
        (
            "half of them behind a relay, which the root knows too",
            {**actors(8, seats="8x40"), **one("impala_paramserver_seats", "4x40", role="relay", pod="r")},
            *(30, "", {}),
        ),
    ),
    *of(
        "WeightsNotAdvancing",
        (
            "the parameter server stands still",
            {**version("0+10x10 100x30"), **one(UPDATES, "0+10x40")},
            30,
            "paramserver paramserver-0 has held version 100 for 10 minutes although the learner trains.",
            {"role": "paramserver", "pod": "paramserver-0"},
        ),
        (
            "one relay stands still",
            {
                **version("0+10x40"),
                **version("0+10x10 100x30", "relay", "relay-a"),
                **version("0+10x40", "relay", "relay-b"),
                **one(UPDATES, "0+10x40"),
            },
            30,
            "relay relay-a has held version 100 for 10 minutes although the learner trains.",
            {"role": "relay", "pod": "relay-a"},
        ),
        ("versions follow", {**version("0+10x40"), **one(UPDATES, "0+10x40")}, 30, "", {}),
        ("nobody trains", {**version("100x40"), **one(UPDATES, "100x40")}, 30, "", {}),
    ),
    *of(
        "WorldDegraded",
        (
            "two of the three that the chart asks for, and the third was never seen",
            {**learners(2, a="2x40", b="2x40"), **one(LEARNERS, "3x40")},
            *(30, "Only 2 learners train together.", {}),
        ),
        (
            "the third runs, and does not get into the group",
            learners(3, a="3x9 2x30", b="3x9 2x30", c="3x9 0x30"),
            *(30, "Only 2 learners train together.", {}),
        ),
        (
            "they wait for more of them",
            {**learners(1, a="0x40"), **one(LEARNERS, "2x40")},
            *(30, "Only 0 learners train together.", {}),
        ),
        ("all three", learners(3, a="3x40", b="3x40", c="3x40"), 30, "", {}),
        ("the only one", {**learners(1, a="1x40"), **one(LEARNERS, "1x40")}, 30, "", {}),
        (
            "one is away for four minutes",
            learners(3, a="3x9 2x3 3x30", b="3x9 2x3 3x30", c="3x9 0x3 3x30"),
            *(14, "", {}),
        ),
        (
            "scaled from one to three, and the two others have just come",
            {**learners(1, a="1x9 3x30", b="_x9 0x1 3x30"), **one(LEARNERS, "1x9 3x30")},
            *(20, "", {}),
        ),
        (
            "scaled from three to one",
            {**learners(1, a="3x9 1x30", b="3x9 stale"), **one(LEARNERS, "3x9 1x30")},
            *(20, "", {}),
        ),
    ),
    *of(
        "RegroupFlapping",
        (
            "a member is lost five times, as both of the others count",
            {
                **one(REGROUPS, "0x5 1x5 2x5 3x5 4x5 5x20", reason="lost", pod="learner-0"),
                **one(REGROUPS, "0x5 1x5 2x5 3x5 4x5 5x20", reason="lost", pod="learner-1"),
            },
            *(31, "The group broke about 5 times in 30 minutes.", {}),
        ),
        (
            "weights differ again and again",
            one(REGROUPS, "0x5 1x5 2x5 3x5 4x5 5x20", reason="differed", pod="learner-0"),
            *(31, "The group broke about 5 times in 30 minutes.", {}),
        ),
        (
            "the pod that counts is itself replaced",
            {
                **one(REGROUPS, "0x5 1x3 2x3 3x3 stale", reason="lost", pod="learner-0", instance="old"),
                **one(REGROUPS, "_x16 0x2 1x2 2x2 3x20", reason="lost", pod="learner-0", instance="new"),
            },
            *(31, "The group broke about 6 times in 30 minutes.", {}),
        ),
        (
            "three times",
            one(REGROUPS, "0x5 1x5 2x5 3x25", reason="lost", pod="learner-0"),
            *(31, "", {}),
        ),
        (
            "eight learners are added and removed again",
            {
                **one(REGROUPS, "0x5 0+1x8 8x30", reason="joined", pod="learner-0"),
                **one(REGROUPS, "0x15 0+1x8 8x30", reason="left", pod="learner-0"),
            },
            *(31, "", {}),
        ),
    ),
    *of(
        "NonFiniteLoss",
        (
            "three updates",
            one(NOT_FINITE, "0x10 3x30"),
            *(12, "About 3 updates were skipped in the last 15 minutes.", {}),
        ),
        ("long ago", one(NOT_FINITE, "0x10 3x30"), 40, "", {}),
        (
            "as each of three learners counts",
            {
                **one(NOT_FINITE, "0x10 3x30", pod="learner-0"),
                **one(NOT_FINITE, "0x10 3x30", pod="learner-1"),
                **one(NOT_FINITE, "0x10 3x30", pod="learner-2"),
            },
            *(12, "About 3 updates were skipped in the last 15 minutes.", {}),
        ),
        ("a restart resets the counter", one(NOT_FINITE, "3x10 0x30"), 20, "", {}),
        ("the last loss is not known yet", one("impala_learner_loss", "NaN " * 40, term="total"), 20, "", {}),
    ),
    *of(
        "CheckpointStale",
        (
            "ten minutes old, at one a minute",
            checkpoint("0x9 600x40", "5x40"),
            *(20, "Nothing has been saved for 10m 0s; a crash would cost what was trained since.", {}),
        ),
        (
            "there never was one",
            checkpoint("0x40", "10x40"),
            *(20, "Nothing has been saved for 19m 50s; a crash would cost what was trained since.", {}),
        ),
        ("written every minute", checkpoint("0+60x40", "5x40"), 30, "", {}),
        ("the learner has just begun", checkpoint("0x40", "1100x40"), 20, "", {}),
        ("it has just resumed from an old one", checkpoint("100x40", "1100x40"), 20, "", {}),
        (
            "the leader's disk is full, and another learner starts again and again",
            {
                **checkpoint("600x40", "5x40"),
                **replaced(STARTED, 5, 480, 960, 1440, pod="learner-1", role="learner"),
            },
            *(30, "Nothing has been saved for 20m 0s; a crash would cost what was trained since.", {}),
        ),
        (
            "the leader has died, and the next one, which never led, is about to write",
            {
                **one("impala_checkpoint_timestamp_seconds", "0+60x29 stale", pod="learner-0"),
                **one("impala_checkpoint_timestamp_seconds", "0x40", pod="learner-1"),
                **one(STARTED, "5x29 stale", role="learner", pod="learner-0"),
                **one(STARTED, "5x40", role="learner", pod="learner-1"),
                **one("impala_checkpoint_interval_seconds", "60x40", role="learner", pod="learner-1"),
            },
            *(33, "", {}),
        ),
        ("one an hour", checkpoint("600x40", "5x40", interval="3600x40"), 40, "", {}),
    ),
    *of(
        "AuthFailures",
        (
            "a wrong key tries again every minute",
            one(REFUSED, "0+1x40", role="learner", reason="unknown_key"),
            20,
            "The learner refused about 10 connections in 10 minutes (unknown_key).",
            {"role": "learner", "reason": "unknown_key"},
        ),
        (
            "one client died in its handshake",
            one(REFUSED, "0x10 1x30", role="paramserver", reason="handshake"),
            *(15, "", {}),
        ),
        (
            "a stranger who speaks no ZeroMQ goes on for half an hour",
            one(REFUSED, "0+1x40", role="learner", reason="handshake"),
            32,
            "The learner refused about 10 connections in 10 minutes (handshake).",
            {"role": "learner", "reason": "handshake"},
        ),
        (
            "256 spot actors are replaced in ten minutes",
            one(REFUSED, "0x10 0+4x10 40x40", role="paramserver", reason="handshake"),
            *(20, "", {}),
        ),
        (
            "and an hour later once more",
            one(REFUSED, "0+4x10 40x50 40+4x10 80x20", role="paramserver", reason="handshake"),
            *(70, "", {}),
        ),
    ),
    *of(
        "MetricsAbsent",
        (
            "the learner's pod is gone",
            {**one("up", "1x40", role="actor"), **one("up", "1x40", role="paramserver"), **version("5x40")},
            30,
            "1 learner without metrics for 10 minutes; no other alert can judge it.",
            {"role": "learner"},
        ),
        (
            "the learner does not answer",
            scraped(learner="0x40"),
            30,
            "1 learner without metrics for 10 minutes; no other alert can judge it.",
            {"role": "learner"},
        ),
        (
            "the parameter server does not answer",
            scraped(paramserver="0x40"),
            30,
            "1 paramserver without metrics for 10 minutes; no other alert can judge it.",
            {"role": "paramserver"},
        ),
        (
            "two relays do not answer",
            {
                **EVERYBODY,
                **one("up", "0x40", role="relay", pod="relay-a"),
                **one("up", "0x40", role="relay", pod="relay-b"),
            },
            30,
            "2 relay without metrics for 10 minutes; no other alert can judge it.",
            {"role": "relay"},
        ),
        ("everybody answers", EVERYBODY, 30, "", {}),
        ("one actor does not", scraped(actor="0x40"), 30, "", {}),
        ("the learner's image is being fetched", scraped(learner="_x8 1x30"), 8, "", {}),
        ("it was uninstalled", dict.fromkeys(EVERYBODY, "1x9 stale"), 25, "", {}),
        (
            "completed, and the learner removed",
            {**EVERYBODY, **scraped(learner="1x9 stale"), **one(COMPLETE, "1x9 stale")},
            *(30, "", {}),
        ),
        (
            "completed, uninstalled and installed again, and no learner comes",
            REINSTALLED,
            40,
            "1 learner without metrics for 10 minutes; no other alert can judge it.",
            {"role": "learner"},
        ),
    ),
]
