"""How a release looks: ``Overview`` -> a panel for a terminal, the fields of a log line, or JSON.

All pure. Made of the same pieces as the display of `impala train`, so that both are read alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from services.cluster.overview import Evaluation, LearnerStatus, Overview, RoleStatus, RunState, Trouble
from services.local.display import LABEL_WIDTH, progress_line, return_line
from services.local.formats import columns, duration, figure, number, percent
from services.local.task_rows import task_rows
from services.ops.figures import Snapshot, plain_fields

MAX_TROUBLES = 6
MAX_DOTS = 16
MAX_LEARNERS = 8
STATE_STYLES: Mapping[RunState, str] = {
    "unknown": "yellow",
    "waiting": "yellow",
    "training": "bold cyan",
    "complete": "bold green",
}
STATE_WORDS: Mapping[RunState, str] = {
    "unknown": "no learner answers",
    "waiting": "waiting for rollouts",
    "training": "training",
    "complete": "complete",
}
Row = tuple[str, RenderableType]


def render(overview: Overview, width: int, note: str = "") -> RenderableType:
    """The picture. ``note`` is what keeps it from being up to date."""
    inner = max(30, width - 4)
    room = inner - LABEL_WIDTH - 2
    table = Table.grid(padding=(0, 2), expand=False)
    table.add_column(style="dim", no_wrap=True, width=LABEL_WIDTH)
    table.add_column(overflow="fold", max_width=room)
    for label, content in [*_run_rows(overview, room), ("", Text()), *_pod_rows(overview)]:
        table.add_row(label, content)
    for trouble in overview.troubles[:MAX_TROUBLES]:
        table.add_row("", _trouble(trouble))
    if len(overview.troubles) > MAX_TROUBLES:
        table.add_row("", Text(f"and {len(overview.troubles) - MAX_TROUBLES} more", style="yellow"))
    head = [progress_line(overview.training, inner), Text()] if overview.training else []
    return Panel(
        Group(*head, table),
        title=Text.assemble(" IMPALA  ", (overview.release, "bold"), " "),
        title_align="left",
        subtitle=Text(f" {note or f'namespace {overview.namespace}'} ", style="yellow" if note else "dim"),
        subtitle_align="left",
        border_style="dim",
        box=ROUNDED,
        width=width,
        padding=(1, 1, 0, 1),
    )


def _run_rows(overview: Overview, room: int) -> list[Row]:
    state = Text(STATE_WORDS[overview.state], style=STATE_STYLES[overview.state])
    rows: list[Row] = [("run", Text.assemble(state, ("   " + overview.tasks, "dim")))]
    if overview.training is None:
        return rows
    training = overview.training
    rows += [
        (
            "speed",
            columns(
                (number(training.steps_per_s), "steps/s"),
                (number(training.frames_per_s), "frames/s"),
                (number(overview.env_steps_per_s), "acted/s"),
            ),
        ),
        ("return", return_line(training, room)),
        *task_rows(training, room),
        *_evaluation_rows(overview.evaluation),
        *_learner_rows(overview, training),
    ]
    return rows


def _learner_rows(overview: Overview, training: Snapshot) -> list[Row]:
    rows: list[Row] = [
        (
            "learner",
            columns(
                (percent(training.wait_ratio), "waiting"),
                (f"{number(training.queue_depth)}/{number(training.queue_capacity)}", "queued"),
                (number(overview.world_size), f"in group {number(overview.generation)}"),
            ),
        ),
        *_each_learner(overview.learners),
        (
            "version",
            columns(
                (number(training.policy_version), "learner"), (number(overview.paramserver_version), "served")
            ),
        ),
        (
            "",
            columns(
                (number(overview.oldest_version), "oldest"),
                (number(overview.newest_version), "newest"),
                (number(overview.actors_asked), "actors asked"),
            ),
        ),
        ("lag", columns((figure(training.lag_mean), "mean"), (number(training.lag_max), "at most"))),
        ("rollouts", columns(*((number(count), fate) for fate, count in overview.rollouts.items()))),
        (
            "traffic",
            columns(
                (_size(overview.received_bytes_per_s), "rollouts"),
                (_size(overview.sent_bytes_per_s), "weights"),
            ),
        ),
        ("saved", _saved(training)),
    ]
    if overview.auth_failures:
        rows.append(
            ("refused", Text(f"{overview.auth_failures:,} connections without a known key", style="yellow"))
        )
    return rows


def _each_learner(learners: Sequence[LearnerStatus]) -> list[Row]:
    """A row each, where there are several; of the group only what is not like the leader's."""
    if len(learners) < 2:
        return []
    group = next(((one.world_size, one.generation) for one in learners if one.leads), None)
    rows: list[Row] = []
    for one in learners[:MAX_LEARNERS]:
        text = columns((percent(one.wait_ratio), "waiting"), (number(one.steps_per_s), "steps/s"))
        if one.leads:
            text.append("   leads", style="green")
        elif not one.world_size:
            text.append("   in no group", style="yellow")
        elif (one.world_size, one.generation) != group:
            text.append(f"   still in group {number(one.generation)}", style="yellow")
        rows.append((one.name[one.name.rfind("learner") :], text))
    if len(learners) > MAX_LEARNERS:
        rows.append(("", Text(f"and {len(learners) - MAX_LEARNERS} more", style="dim")))
    return rows


def _evaluation_rows(evaluation: Evaluation | None) -> list[Row]:
    if evaluation is None:
        return []
    if not evaluation.returns:
        return [("evaluated", Text("no round yet", style="dim"))]
    pairs = [
        (figure(sum(evaluation.returns.values()) / len(evaluation.returns)), "mean"),
        (number(evaluation.policy_version), "version"),
    ]
    if evaluation.scores:
        pairs.append((percent(sum(evaluation.scores.values()) / len(evaluation.scores) / 100), "human"))
    return [("evaluated", columns(*pairs))]


def _saved(training: Snapshot) -> Text:
    if training.checkpoint_age_s is None:
        return Text("no checkpoint yet", style="dim")
    return columns((duration(training.checkpoint_age_s), "ago"))


def _size(bytes_per_s: float | None) -> str:
    return "–" if bytes_per_s is None else f"{bytes_per_s / 1e6:,.2f} MB/s"


def _pod_rows(overview: Overview) -> list[Row]:
    return [(_plural(role), _pods(role, overview.seats)) for role in overview.roles]


def _plural(role: RoleStatus) -> str:
    return role.role if role.desired == 1 else f"{role.role}s"


def _pods(role: RoleStatus, seats: int | None) -> Text:
    """A dot for every pod, or for every so many."""
    shown = min(role.desired, MAX_DOTS)
    green = shown * min(role.ready, role.desired) // max(1, role.desired)
    text = Text.assemble(("●" * green, "green"), ("●" * (shown - green), "bright_black"))
    text.append(f"{' ' if shown else ''}{role.ready:,} of {role.desired:,} ready")
    if role.role == "actor" and seats is not None:
        text.append(f"   {seats:,} seated", style="dim")
    if not role.is_settled:
        text.append("   being replaced", style="yellow")
    if role.restarts:
        text.append(f"   {role.restarts:,} restart{'s' if role.restarts > 1 else ''}", style="yellow")
    return text


def _trouble(trouble: Trouble) -> Text:
    who = trouble.example or trouble.role
    if trouble.count > 1:
        who = f"{trouble.count:,} {trouble.role}s, such as {who}"
    return Text.assemble((f"{who}: ", "yellow"), trouble.reason)


def log_fields(overview: Overview) -> dict[str, object]:
    """Of a log line; what is not known is left out."""
    fields: dict[str, object] = {
        "state": overview.state,
        "ready": " ".join(f"{role.role}={role.ready}/{role.desired}" for role in overview.roles),
        **(plain_fields(overview.training) if overview.training else {}),
        "env_steps_per_s": None if overview.env_steps_per_s is None else round(overview.env_steps_per_s),
        "world_size": overview.world_size,
        "generation": overview.generation,
        "leader": overview.training.leader if overview.training and len(overview.learners) > 1 else None,
        "seats": overview.seats,
        "paramserver_version": overview.paramserver_version,
        "actors_oldest_version": overview.oldest_version,
        "auth_failures": overview.auth_failures or None,
        "trouble": "; ".join(_trouble(trouble).plain for trouble in overview.troubles[:MAX_TROUBLES]) or None,
    }
    unknown_here = ("pods_up", "memory_mb")  # ``ready`` says it better; most pods were not asked
    return {key: value for key, value in fields.items() if value is not None and key not in unknown_here}


def as_json(overview: Overview) -> str:
    """All of it. Numbers that are not finite, which JSON does not have, are null."""
    content = asdict(overview)
    if content["training"] is not None:
        del content["training"]["pods"], content["training"]["run"]["run_dir"]
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
