"""The actor pod: builds its parts, runs the loop, stops in order. Nothing else is decided here."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry

from services.config import RunConfig
from services.ops import logging, pod
from services.ops.beside import build_beside
from services.ops.health import HealthServer, Heartbeat
from services.ops.lifecycle import Lifecycle
from services.ops.metrics import ActorMetrics
from services.ops.threads import limit_threads

STOP_S = 5.0
POLL_S = 0.25
LAST_ROLLOUTS_S = 10.0
"""How long an actor that was to send only so many waits for a learner to take the last ones."""
GOODBYE_S = 1.0
"""How long any other one waits for its goodbye to leave."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 stopped, 1 failed, 2 the configuration is wrong."""
    return pod.main("actor", argv, run)


def run(config: RunConfig, actor_id: str, lifecycle: Lifecycle) -> int:
    """Build, run, stop."""
    limit_threads(config.actor.inference_threads)  # before anything imports torch

    import torch

    from services.actor.loop import ActorLoop, Half
    from services.actor.stages import Stages
    from services.rl import precision
    from services.rl.actions import Discrete
    from services.rl.networks import make_network
    from services.rl.policy import Policy, decode_weights
    from services.rl.tasks import Deal, deal, tasks_of, tasks_spec
    from services.wire import codec
    from services.wire.keys import load_keys
    from services.wire.messages import Client
    from services.wire.sockets import Requester, RolloutSender, finish
    from services.wire.subscriber import Subscriber

    lifecycle.begin()
    torch.set_num_threads(config.actor.inference_threads)
    torch.set_num_interop_threads(1)
    log = logging.get_logger("main")
    keys = load_keys(config.wire.keys, "actor")
    tasks = tasks_of(config)
    spec = tasks_spec(tasks)
    actions = Discrete(spec.num_actions)
    network = make_network(spec, config.network, len(tasks), config.popart)

    registry = CollectorRegistry()
    metrics = ActorMetrics(registry)
    stages = Stages(metrics)
    heartbeat = Heartbeat()
    client = Client(client_id=actor_id, incarnation=time.time_ns())
    expected = codec.Expected(run_id=config.run_id, max_message_bytes=config.wire.max_message_bytes)
    weights = Subscriber(
        connect=lambda: Requester(config.wire.paramserver_endpoint, config.wire.max_message_bytes, keys),
        client=client,
        expected=expected,
        decode=partial(decode_weights, network),
        wants_seat=True,
        hold_s=config.paramserver.hold_s,
        interval_s=config.actor.weights_interval_s,
        stopping=lifecycle.stopping,
    )
    metrics.weights_age_seconds.set_function(weights.age_s)
    health = HealthServer(
        config.ops.host,
        config.ops.port,
        registry,
        heartbeat,
        config.ops.liveness_timeout_s,
        weights.missing,
    )
    log.info("started", actor_id=actor_id, env=config.title, port=health.port)
    puller = lifecycle.thread("weights", weights.run)

    all_sent = False
    snapshot = None
    while snapshot is None and not lifecycle.stopping.is_set():
        heartbeat.beat()  # alive, though not ready: a missing peer is waited for
        snapshot = weights.wait(POLL_S)
        stages.end("weights")
    if snapshot is not None:
        seat = weights.seat  # read once: it is another thread's to change
        policy = Policy(
            network=network,
            actions=actions,
            frame_stack=spec.frame_stack,
            dtype=precision.resolve(config.actor.precision, torch.device("cpu")),
            seed=hash((config.seed, seat, client.incarnation)) % 2**63,
        )
        policy.load(snapshot.version, snapshot.weights)
        metrics.weights_version.set(snapshot.version)

        def build(dealt: Deal, seed: int) -> Half:
            env = dealt.make(tasks, spec.num_actions, config.actor.env_threads)
            try:
                return Half(
                    env,
                    spec,
                    config.unroll_length,
                    actions.num_outputs,
                    seed,
                    tasks=dealt.tasks,
                    memory=policy.new_memory(env.num_envs),
                    reads_instructions=policy.reads_instructions,
                )
            except Exception:  # the first reset failed, and nobody else knows of the environments
                env.close()
                raise

        dealt = deal(seat, config.actor.num_envs, len(tasks))
        seeds = env_seeds(config, seat)
        builders = [partial(build, *each) for each in zip(dealt, seeds, strict=True)]
        halves = build_beside(lifecycle, heartbeat, builders)
        stages.end("start")
        log.info(
            "playing",
            seat=seat,
            num_envs=config.actor.num_envs,
            tasks=len({*dealt[0].tasks, *dealt[1].tasks}),
            policy_version=policy.version,
        )
        sender = RolloutSender(config.wire.send_queue, config.wire.max_message_bytes, keys)
        loop = ActorLoop(
            halves=halves,
            policy=policy,
            weights=weights,
            sender=sender,
            packer=codec.Packer(config.wire.codec),
            run_id=config.run_id,
            client=client,
            metrics=metrics,
            stages=stages,
            heartbeat=heartbeat,
            may_go_on=lambda: deals_alike(config, len(tasks), seat, weights.seat),
            stopping=lifecycle.stopping,
            max_rollouts=config.actor.rollouts,
        )
        try:
            loop.run()
            if loop.has_sent_all:
                lifecycle.stop(f"{config.actor.rollouts} rollouts sent")
            elif config.actor.rollouts is not None and weights.state == "complete":
                lifecycle.stop("training is complete, nobody takes rollouts")
            elif not lifecycle.stopping.is_set():  # the next life takes the new seat's tasks
                lifecycle.stop(f"seat {weights.seat} instead of {seat}, with other tasks", 1)
        except Exception as error:  # noqa: BLE001  (the edge of the pod's main loop)
            lifecycle.fail(error)
        for half in halves:
            half.env.close()
        all_sent = loop.has_sent_all
        sender.close(2 * LAST_ROLLOUTS_S if all_sent else 0.0)  # `finish` gives up earlier, and says so
    puller.join(STOP_S)
    health.close()
    if not finish(LAST_ROLLOUTS_S if all_sent else GOODBYE_S) and all_sent:
        log.error("rollouts_lost", reason=f"no learner took the last ones in {LAST_ROLLOUTS_S:g} s")
        lifecycle.stop("not all rollouts have left", 1)
    log.info("stopped", exit_code=lifecycle.exit_code)
    return lifecycle.exit_code


def deals_alike(config: RunConfig, num_tasks: int, old: int, new: int) -> bool:
    """Whether an actor that has lost its seat, or got another, goes on as it is: it plays the right tasks."""
    from services.rl.tasks import deal
    from services.wire.messages import NO_SEAT

    num_envs = config.actor.num_envs
    return new in (old, NO_SEAT) or deal(new, num_envs, num_tasks) == deal(old, num_envs, num_tasks)


def env_seeds(config: RunConfig, seat: int) -> tuple[int, int]:
    """One per half. Seats that are held at the same time never share an environment's seed."""
    first = config.seed * 1_000_003 + seat * config.actor.num_envs
    return first % 2**31, (first + config.actor.num_envs // 2) % 2**31


if __name__ == "__main__":
    sys.exit(main())
