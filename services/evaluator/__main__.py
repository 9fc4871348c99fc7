"""The evaluator pod: builds its parts, runs the loop, stops in order. Nothing else is decided here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from services.config import ConfigError, RunConfig
from services.ops import logging, pod
from services.ops.beside import build_beside
from services.ops.health import HealthServer, Heartbeat
from services.ops.lifecycle import Lifecycle
from services.ops.metrics import EvaluatorMetrics
from services.ops.threads import limit_threads

if TYPE_CHECKING:  # torch only after the threads are limited
    from services.rl.player import Player

STOP_S = 5.0
PULL_INTERVAL_S = 1.0
"""Weights that are a second old are new enough for a round."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 stopped, 1 failed, 2 the configuration is wrong."""
    return pod.main("evaluator", argv, run)


def run(config: RunConfig, evaluator_id: str, lifecycle: Lifecycle) -> int:
    """Build, run, stop."""
    limit_threads(config.actor.inference_threads)  # before anything imports torch

    import torch

    from services.evaluator.games import Games
    from services.evaluator.loop import EvaluatorLoop
    from services.rl.policy import decode_weights
    from services.wire import codec
    from services.wire.keys import load_keys
    from services.wire.messages import Client
    from services.wire.sockets import Requester
    from services.wire.subscriber import Subscriber

    lifecycle.begin()
    torch.set_num_threads(config.actor.inference_threads)
    torch.set_num_interop_threads(1)
    log = logging.get_logger("main")
    keys = load_keys(config.wire.keys, "evaluator")
    registry = CollectorRegistry()
    metrics = EvaluatorMetrics(registry)
    heartbeat = Heartbeat()

    def build(sit_down: Callable[[], Player]) -> Player | None:
        built = build_beside(lifecycle, heartbeat, [sit_down])
        return built[0] if built else None

    games = Games(config, build)
    weights = Subscriber(
        connect=lambda: Requester(config.wire.paramserver_endpoint, config.wire.max_message_bytes, keys),
        client=Client(client_id=evaluator_id, incarnation=time.time_ns()),
        expected=codec.Expected(run_id=config.run_id, max_message_bytes=config.wire.max_message_bytes),
        decode=partial(decode_weights, games.network),
        wants_seat=False,
        hold_s=config.paramserver.hold_s,
        interval_s=PULL_INTERVAL_S,
        stopping=lifecycle.stopping,
    )
    health = HealthServer(
        config.ops.host,
        config.ops.port,
        registry,
        heartbeat,
        config.ops.liveness_timeout_s,
        weights.missing,
    )
    log.info("started", evaluator_id=evaluator_id, env=config.title, port=health.port)
    puller = lifecycle.thread("weights", weights.run)
    loop = EvaluatorLoop(
        weights=weights,
        games=games,
        interval_s=config.evaluator.interval_s,
        report=config.run_dir / "evaluations.jsonl",
        metrics=metrics,
        heartbeat=heartbeat,
        stopping=lifecycle.stopping,
    )
    try:
        loop.run()
    except ConfigError:  # an environment that cannot be opened, which nothing has found out before
        lifecycle.stop("wrong configuration", pod.BAD_CONFIG)
        raise
    except Exception as error:  # noqa: BLE001  (the edge of the pod's main loop)
        lifecycle.fail(error)
    finally:
        puller.join(STOP_S)
        health.close()
        log.info("stopped", exit_code=lifecycle.exit_code)
    return lifecycle.exit_code


if __name__ == "__main__":
    sys.exit(main())
