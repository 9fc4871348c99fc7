"""``impala metrics``: does every role answer /metrics, as itself? For `helm test`, from inside the cluster.

Needs neither Kubernetes' client nor torch, and no permissions.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO
from urllib.parse import urlsplit

from services.config import ConfigError
from services.ops.scrape import NoMetricsError, Scrape, parse_metrics, read_metrics

ANSWER_TIMEOUT_S = 5.0
PAUSE_S = 1.0
DEFAULT_PORT = 9400

FIGURES: Mapping[str, tuple[str, ...]] = {
    "actor": ("impala_actor_weights_version", "impala_actor_env_steps_total"),
    "learner": ("impala_learner_policy_version", "impala_learner_steps", "impala_training_complete"),
    "paramserver": ("impala_paramserver_version", "impala_paramserver_seats"),
    "relay": ("impala_paramserver_version", "impala_paramserver_seats"),
    "evaluator": ("impala_evaluator_policy_version", "impala_evaluator_rounds_total"),
}
"""By role, what its line says."""
BUILT_AS = {"relay": "paramserver"}
"""What a role calls itself, where that is another word: a relay is a parameter server's program."""


BUILD_INFO = re.compile(r'impala_build_info\{role="(?P<role>[^"]*)",version="(?P<version>[^"]*)"\}')


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who should answer where."""

    role: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.role} at {self.host}:{self.port}"


def read_target(text: str) -> Target:
    """From ``learner=http://host:9400``; ConfigError."""
    role, _, url = text.partition("=")
    if role not in FIGURES:
        raise ConfigError(f"{text}: {role!r} is no role; allowed are {', '.join(FIGURES)}, as in ROLE=URL")
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORT
    except ValueError:
        raise ConfigError(f"{text}: {url!r} has no such port; allowed is http://host:9400") from None
    if parts.scheme != "http" or not parts.hostname or parts.path.rstrip("/") not in ("", "/metrics"):
        raise ConfigError(f"{text}: {url!r} is no URL of a pod; allowed is http://host:9400")
    return Target(role=role, host=parts.hostname, port=port)


def check(
    targets: Sequence[Target],
    timeout_s: float,
    *,
    read: Callable[[str, int, float], str] = read_metrics,
    output: TextIO | None = None,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """A line each; 0 if all answer within ``timeout_s`` of the start, else 1."""
    stream = output or sys.stdout
    deadline_s = clock() + timeout_s
    failed = 0
    for target in targets:
        while True:
            left_s = deadline_s - clock()
            line, trouble = _ask(target, min(ANSWER_TIMEOUT_S, max(0.1, left_s)), read)
            if trouble is None or clock() + PAUSE_S >= deadline_s:
                break
            pause(PAUSE_S)
        failed += trouble is not None
        stream.write(f"ok      {line}\n" if trouble is None else f"FAILED  {target}: {trouble}\n")
        stream.flush()
    return 1 if failed else 0


def _ask(target: Target, timeout_s: float, read: Callable[[str, int, float], str]) -> tuple[str, str | None]:
    """(what it says, None), or ("", what is wrong)."""
    try:
        scrape = Scrape(time_s=0.0, samples=parse_metrics(read(target.host, target.port, timeout_s)))
    except NoMetricsError as error:
        return "", str(error)
    builds = [match for series in scrape.samples if (match := BUILD_INFO.fullmatch(series))]
    if not builds:
        return "", "answers, but is no pod of IMPALA: no impala_build_info"
    role, wanted = builds[0]["role"], BUILT_AS.get(target.role, target.role)
    if role != wanted:
        return "", f"answers as {role}"
    values = {name.removeprefix("impala_"): scrape.get(name) for name in FIGURES[target.role]}
    figures = [f"{name}={value:.0f}" for name, value in values.items() if value is not None]
    return " ".join([f"{target}:", f"version={builds[0]['version']}", *figures]), None
