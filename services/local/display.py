"""What a local run shows of itself: ``Snapshot`` -> a live display in a terminal, or log lines elsewhere.

``render`` is pure, so that every picture can be tested without a terminal. The figures come from
``ops.figures``; nothing here starts, stops or waits for a pod: that is ``launcher``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.local.formats import columns, duration, figure, number, percent, sparkline
from services.local.task_rows import task_rows
from services.ops.figures import PodPhase, PodStatus, Replay, Snapshot, plain_fields
from services.ops.logging import EventLogger, format_value, get_logger

LABEL_WIDTH = len("paramserver")


def render(snapshot: Snapshot, width: int) -> RenderableType:
    """The live display: quiet, one subject a row, and nothing that jumps when a figure gains a digit."""
    inner = max(30, width - 4)
    room = inner - LABEL_WIDTH - 2
    rows = Table.grid(padding=(0, 2), expand=False)
    rows.add_column(style="dim", no_wrap=True, width=LABEL_WIDTH)
    rows.add_column(no_wrap=True, overflow="ellipsis", max_width=room)
    for label, content in _rows(snapshot, room):
        rows.add_row(label, content)
    title = Text.assemble(" IMPALA ", (" ", ""), (snapshot.run.env_id, "bold"), " ")
    footer = Text(f" {snapshot.run.run_dir} ", style="dim")
    return Panel(
        Group(progress_line(snapshot, inner), Text(), rows),
        title=title,
        title_align="left",
        subtitle=footer,
        subtitle_align="left",
        border_style="dim",
        box=ROUNDED,
        width=width,
        padding=(1, 1, 0, 1),
    )


def progress_line(snapshot: Snapshot, width: int) -> RenderableType:
    """How far it is, and how long it will take."""
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    line.add_column(justify="right", no_wrap=True, style="dim")
    counts = f"{number(snapshot.steps or 0)} of {number(snapshot.run.total_steps)} steps"
    line.add_row(
        ProgressBar(
            total=1.0,
            completed=snapshot.done_ratio,
            complete_style="cyan",
            finished_style="green",
            style="bright_black",
        ),
        Text(f"{math.floor(100 * snapshot.done_ratio):3d} %", style="bold"),
        Text(f"{_remaining(snapshot):>14}") if width >= 40 else Text(),
    )
    return Group(line, Text(counts, style="dim"))


def _remaining(snapshot: Snapshot) -> str:
    if snapshot.done_ratio >= 1.0:
        return "done"
    if _all_stopped(snapshot):
        return "stopped"
    if snapshot.eta_s is not None:
        return f"{duration(snapshot.eta_s)} left"
    return "waiting" if snapshot.steps else "starting"


def _rows(snapshot: Snapshot, width: int) -> list[tuple[str, RenderableType]]:
    rows: list[tuple[str, RenderableType]] = [
        (
            "speed",
            columns(
                (number(snapshot.steps_per_s), "steps/s"),
                (number(snapshot.frames_per_s), "frames/s"),
                (duration(snapshot.elapsed_s), "elapsed"),
            ),
        ),
        ("return", return_line(snapshot, width)),
        *task_rows(snapshot, width),
        (
            "learner",
            columns(
                (percent(snapshot.wait_ratio), "waiting"),
                (f"{number(snapshot.queue_depth)}/{number(snapshot.queue_capacity)}", "queued"),
                (number(snapshot.policy_version), "version"),
            ),
        ),
        *_group_rows(snapshot),
        ("lag", columns((figure(snapshot.lag_mean), "mean"), (number(snapshot.lag_max), "at most"))),
        (
            "loss",
            columns(
                *((figure(snapshot.losses.get(term)), term) for term in ("total", "policy", "baseline")),
            ),
        ),
        (
            "",
            columns(
                (figure(snapshot.entropy), "entropy"),
                (figure(snapshot.grad_norm), "grad norm"),
                (figure(snapshot.learning_rate), "lr"),
            ),
        ),
        *_replay_rows(snapshot.replay),
        ("saved", _saved(snapshot)),
        ("", Text()),
        *_pod_rows(snapshot.pods),
    ]
    if snapshot.troubles:
        lost = "   ".join(f"{count:,} {kind}" for kind, count in snapshot.troubles.items())
        rows += [("", Text()), ("lost", Text(lost, style="yellow"))]
    return rows


def _group_rows(snapshot: Snapshot) -> list[tuple[str, Text]]:
    """Of several learners: how many of them train together."""
    if snapshot.num_learners < 2:
        return []
    there = number(snapshot.world_size)
    if snapshot.world_size != snapshot.num_learners:
        there += f"/{snapshot.num_learners}"
    group, leader = number(snapshot.generation), snapshot.leader or "–"
    return [("", columns((there, "learners"), (group, "group"), (leader, "leads")))]


def _all_stopped(snapshot: Snapshot) -> bool:
    return bool(snapshot.pods) and all(pod.phase == "stopped" for pod in snapshot.pods)


def _saved(snapshot: Snapshot) -> Text:
    if _all_stopped(snapshot):  # the learner saves as the last thing it does, and then nobody can ask it
        return Text("in checkpoints/", style="dim")
    if snapshot.checkpoint_age_s is None:
        return Text("no checkpoint yet", style="dim")
    return columns((duration(snapshot.checkpoint_age_s), "ago"))


def return_line(snapshot: Snapshot, width: int) -> Text:
    """The return, and its course as far as there is room."""
    if snapshot.episode_return is None:
        return Text("no episode yet", style="dim")
    line = Text(f"{figure(snapshot.episode_return):>9}", style="bold")
    if len(snapshot.task_returns) == 1:
        for score in snapshot.task_scores.values():
            line = Text.assemble(line, f"{percent(score / 100):>9}", (" human", "dim"))
    room = max(0, min(48, width - len(line) - 5))
    return Text.assemble(line, "  ", (sparkline(snapshot.returns, room), "cyan"))


def _replay_rows(replay: Replay | None) -> list[tuple[str, Text]]:
    if replay is None:
        return []
    full = percent(replay.steps / replay.capacity if replay.capacity else None)
    row = columns(
        (f"{number(replay.size_bytes / 1e6)} MB", f"{full} full"),
        (figure(replay.age_versions), "mean age"),
        (percent(replay.rejected_ratio), "rejected"),
    )
    return [("replay", row)]


PHASE_STYLES: Mapping[PodPhase, str] = {
    "up": "green",
    "starting": "bright_black",
    "silent": "yellow",
    "restarting": "red",
    "stopped": "bright_black",
}


def _pod_rows(pods: Sequence[PodStatus]) -> list[tuple[str, Text]]:
    """One row a role: the servers first, then all actors together, in their worst phase."""
    rows = []
    for role in dict.fromkeys(pod.role for pod in pods):
        group = [pod for pod in pods if pod.role == role]
        up = sum(pod.phase == "up" for pod in group)
        memory_bytes = sum(pod.memory_bytes or 0.0 for pod in group)
        restarts = sum(pod.restarts for pod in group)
        text = Text()
        for phase, style in PHASE_STYLES.items():
            count = sum(pod.phase == phase for pod in group)
            text.append("●" * min(count, 16), style=style)
        text.append(f" {up} of {len(group)} up" if len(group) > 1 else f" {group[0].phase}")
        if memory_bytes:
            text.append(f"   {memory_bytes / 1e6:,.0f} MB", style="dim")
        if restarts:
            text.append(f"   {restarts} restart{'s' if restarts > 1 else ''}", style="yellow")
        rows.append((role if len(group) == 1 else f"{role}s", text))
    return rows


class Progress(Protocol):
    """Where the launcher reports to."""

    @property
    def interval_s(self) -> float:
        """Time between two calls of ``update``."""

    def update(self, snapshot: Snapshot) -> None:
        """Show the newest figures."""

    def event(self, name: str, **fields: object) -> None:
        """Something happened that is worth a line."""

    def trouble(self, name: str, **fields: object) -> None:
        """Something happened that should not have."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


class PlainProgress:
    """A line every few seconds."""

    interval_s = 5.0

    def __init__(self, log: EventLogger) -> None:
        self._log = log

    def update(self, snapshot: Snapshot) -> None:
        """One line with all figures."""
        self._log.info("progress", **plain_fields(snapshot))

    def event(self, name: str, **fields: object) -> None:
        """One line."""
        self._log.info(name, **fields)

    def trouble(self, name: str, **fields: object) -> None:
        """One line."""
        self._log.warning(name, **fields)

    def close(self) -> None:
        """Nothing to do."""


class LiveProgress:
    """A display that repaints itself in place; events scroll by above it."""

    interval_s = 1.0

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.time) -> None:
        self._console = console or Console()
        self._clock = clock
        self._live = Live(console=self._console, auto_refresh=False)
        self._live.start()

    def update(self, snapshot: Snapshot) -> None:
        """Repaint. The width follows the terminal's, up to where lines become hard to read."""
        self._live.update(render(snapshot, min(self._console.width, 120)), refresh=True)

    def event(self, name: str, **fields: object) -> None:
        """A line above the display."""
        self._print(name, fields, style="bold")

    def trouble(self, name: str, **fields: object) -> None:
        """A line above the display that catches the eye."""
        self._print(name, fields, style="bold yellow")

    def _print(self, name: str, fields: Mapping[str, object], style: str) -> None:
        text = Text(time.strftime("%H:%M:%S ", time.localtime(self._clock())), style="dim")
        text.append(name.replace("_", " "), style=style)
        text.append("".join(f"  {key}={format_value(value)}" for key, value in fields.items()))
        self._live.console.print(text, soft_wrap=True)

    def close(self) -> None:
        """The last picture stays."""
        self._live.stop()


class Unfailing:
    """Another ``Progress`` until that fails (a closed terminal), then log lines: no display ends a run."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @property
    def interval_s(self) -> float:
        """That of whoever shows it now."""
        return self._progress.interval_s

    def update(self, snapshot: Snapshot) -> None:
        """Show it, or find out that this is no longer possible."""
        with self._giving_up():
            self._progress.update(snapshot)

    def event(self, name: str, **fields: object) -> None:
        """As ``update``."""
        with self._giving_up():
            self._progress.event(name, **fields)

    def trouble(self, name: str, **fields: object) -> None:
        """As ``update``."""
        with self._giving_up():
            self._progress.trouble(name, **fields)

    def close(self) -> None:
        """As ``update``."""
        with self._giving_up():
            self._progress.close()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  (whatever it is, the pods must not pay for it)
            log = get_logger("train")
            log.warning("display_failed", error=error)
            broken, self._progress = self._progress, PlainProgress(log)
            with contextlib.suppress(Exception):  # give the terminal back, if there is one
                broken.close()
