"""``impala status``: one release, shown once or for as long as somebody looks."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.live import Live

from services.cluster.objects import Cluster, UnreachableError
from services.cluster.observer import Observer
from services.cluster.overview import overview
from services.cluster.picture import as_json, log_fields, render
from services.cluster.releases import find_release
from services.ops import logging

LIVE_INTERVAL_S = 2.0
PLAIN_INTERVAL_S = 10.0
ONCE_INTERVAL_S = 2.0
"""Rates need two looks."""
MAX_WIDTH = 120
FILE_WIDTH = 100
"""Where no terminal shows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of the command."""

    release: str | None = None
    once: bool = False
    plain: bool = False
    json: bool = False


def status(
    cluster: Cluster,
    options: Options,
    *,
    output: TextIO | None = None,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Returns the exit code; ClusterError for what the user can mend. Ctrl-C is how it ends."""
    stream = output or sys.stdout
    release = find_release(cluster, options.release)
    with Observer(cluster, release, clock=clock) as observer:
        if options.json or options.once or not (options.plain or stream.isatty()):
            _once(observer, stream, json=options.json, pause=pause)
            return 0
        with contextlib.suppress(KeyboardInterrupt):
            if options.plain:
                _log_lines(observer, stream, pause)
            else:
                _live(observer, Console(file=stream), pause)
    return 0


def _once(observer: Observer, stream: TextIO, *, json: bool, pause: Callable[[float], None]) -> None:
    observer.look()
    pause(ONCE_INTERVAL_S)
    seen = overview(observer.look())
    if json:
        stream.write(as_json(seen) + "\n")
        return
    console = Console(file=stream, width=None if stream.isatty() else FILE_WIDTH)
    console.print(render(seen, min(console.width, MAX_WIDTH)))


def _live(observer: Observer, console: Console, pause: Callable[[float], None]) -> None:
    """A cluster that is away for a while leaves the last picture, and says so below it."""
    seen = overview(observer.look())
    with Live(console=console, auto_refresh=False) as live:
        note = ""
        while True:
            live.update(render(seen, min(console.width, MAX_WIDTH), note), refresh=True)
            pause(observer.pause_s(LIVE_INTERVAL_S))
            try:
                seen, note = overview(observer.look()), ""
            except UnreachableError as error:
                note = str(error)


def _log_lines(observer: Observer, stream: TextIO, pause: Callable[[float], None]) -> None:
    logging.setup("status", stream=stream)
    log = logging.get_logger("status")
    while True:
        try:
            log.info("status", **log_fields(overview(observer.look())))
        except UnreachableError as error:
            log.warning("unreachable", reason=str(error))
        pause(observer.pause_s(PLAIN_INTERVAL_S))
