"""The flags of `impala status`, `impala wait` and `impala metrics`, and what each says of itself."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from typing import NoReturn

from services.config import ConfigError

STATUS_USAGE = """\
usage: impala status [RELEASE] [flags]

Shows a release on Kubernetes: its pods and why they are not ready, how far the training is, how fast, with
which returns and which policy versions, and of several learners who leads and trains. Needs a kubeconfig and
nothing else; metrics are read through the API server, of actors at most 16, and are missing where the
kubeconfig gives no right to pods/proxy. Without RELEASE, the only one of the namespace. Ctrl-C ends it.

  -n, --namespace NS   default is that of the context
  --context CTX        of kubeconfig; default is the current one
  --once               show it once (also the case when stdout is no terminal)
  --plain              a log line every ten seconds
  --json               all figures, once, as JSON
"""

WAIT_USAGE = """\
usage: impala wait [RELEASE] [flags]

Blocks until the training of a release on Kubernetes is complete, and tells every half minute how far it is.
Pods that restart, and a cluster that is away for a while, are waited for; learners whose configuration is
wrong, that have diverged, or that end again and again are not, unless another one trains on.

  --for WHAT           complete (default), or ready: all pods are, which no metrics are read for
  --timeout S          seconds; default is no limit
  -n, --namespace NS   default is that of the context
  --context CTX        of kubeconfig; default is the current one

Exit codes: 0 done, 1 the time is over or it is hopeless, 2 wrong use.
"""

METRICS_USAGE = """\
usage: impala metrics ROLE=URL... [flags]

Checks that a pod answers at each URL, and as what it should be: actor, learner, paramserver, relay or
evaluator. `helm test` runs it inside the cluster.

  --timeout S          for all together; default 60 seconds

  impala metrics learner=http://demo-impala-learner:9400 paramserver=http://demo-impala-paramserver:9400

Exit codes: 0 all answer, 1 not all do, 2 wrong use.
"""

USAGES = {"status": STATUS_USAGE, "wait": WAIT_USAGE, "metrics": METRICS_USAGE}
"""By command."""


def main(command: str, flags: Sequence[str]) -> int:
    """Run one of the commands; returns its exit code. ConfigError for what the user can mend."""
    if "--help" in flags or "-h" in flags:
        sys.stdout.write(USAGES[command])
        return 0
    return {"status": _status, "wait": _wait, "metrics": _metrics}[command](flags)


def _status(flags: Sequence[str]) -> int:
    parser = _release_parser()
    for switch in ("--once", "--plain", "--json"):
        parser.add_argument(switch, action="store_true")
    given = parser.read(flags)
    if given.plain and (given.once or given.json):
        raise ConfigError("--plain goes on, --once and --json do not; give one of them")

    from services.cluster.api import connect
    from services.cluster.status import Options, status
    from services.local.signals import unwound_by_signals

    cluster = connect(given.context, given.namespace)
    with unwound_by_signals():
        options = Options(release=given.release, once=given.once, plain=given.plain, json=given.json)
        return status(cluster, options)


def _wait(flags: Sequence[str]) -> int:
    parser = _release_parser()
    parser.add_argument("--for", dest="goal", default="complete")
    parser.add_argument("--timeout")
    given = parser.read(flags)
    if given.goal not in ("complete", "ready"):
        raise ConfigError(f"--for = {given.goal!r}: allowed are complete and ready")
    timeout_s = None if given.timeout is None else _seconds(given.timeout)

    from services.cluster.api import connect
    from services.cluster.wait import Options, wait
    from services.ops import logging

    cluster = connect(given.context, given.namespace)
    logging.setup("wait")
    options = Options(release=given.release, goal=given.goal, timeout_s=timeout_s)
    return wait(cluster, options, logging.get_logger("wait"))


def _metrics(flags: Sequence[str]) -> int:
    from services.cluster.check import check, read_target

    parser = _Parser()
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--timeout", default="60")
    given = parser.read(flags)
    if not given.targets:
        raise ConfigError("a target is missing: impala metrics ROLE=URL...")
    return check([read_target(text) for text in given.targets], _seconds(given.timeout))


class _Parser(argparse.ArgumentParser):
    """Complains as all our commands do."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def read(self, flags: Sequence[str]) -> argparse.Namespace:
        """ConfigError for what is left over."""
        given, unknown = self.parse_known_args(flags)
        for word in unknown:
            if not word.startswith("-"):
                raise ConfigError(f"{word}: one release is enough")
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(known)}"
            raise ConfigError(f"{word}: unknown flag; {hint}")
        return given

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            message.removeprefix("argument ").replace("expected one argument", "a value is missing")
        )


def _release_parser() -> _Parser:
    parser = _Parser()
    parser.add_argument("release", nargs="?")
    parser.add_argument("-n", "--namespace")
    parser.add_argument("--context")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"--timeout = {text!r}: allowed is a number of seconds, at least 0")
    return value
