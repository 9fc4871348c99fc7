"""The learner pod: builds its parts, runs the loop, stops in order. Nothing else is decided here."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from services import config as configuration
from services.config import RunConfig
from services.ops import logging, pod
from services.ops.health import HealthServer, Heartbeat
from services.ops.lifecycle import Lifecycle
from services.ops.metrics import LearnerMetrics, ReplayMetrics
from services.ops.threads import learner_threads, limit_threads

if TYPE_CHECKING:  # torch only after the threads are limited
    import torch
    from torch import nn

    from services.learner.attendance import Attendance
    from services.learner.checkpoint import Checkpoint
    from services.learner.episodes import Episodes
    from services.learner.group import Group
    from services.learner.publisher import Publisher
    from services.learner.replay import Replay
    from services.learner.trainer import Trainer
    from services.wire import codec
    from services.wire.messages import ArraySpec, Weights

STOP_S = 4.0
"""For each thread; the batcher's may need ``replay_log.CLOSE_S`` of it."""
CATCH_UP_S = 10.0
"""To fetch the weights that the parameter server has, where they are newer than all learners'."""

NAME_RETRY_S = 2.0


class MismatchError(ValueError):
    """The parameter server holds weights that do not fit this configuration."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 stopped, 1 failed, 2 the configuration is wrong, 3 the training diverged."""
    exit_code = pod.main("learner", argv, run)
    group = sys.modules.get("services.learner.group")  # which loads torch, and may not have been needed
    if group is not None and group.is_any_left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def run(config: RunConfig, learner_id: str, lifecycle: Lifecycle) -> int:
    """Build, run, stop."""
    num_threads = learner_threads(config)
    limit_threads(num_threads)  # before anything imports torch

    import torch

    from services.learner.addresses import rollout_endpoint
    from services.learner.attendance import Attendance
    from services.learner.batch import Batcher, message_bytes, rollout_schema
    from services.learner.checkpoint import CheckpointStore
    from services.learner.episodes import Episodes
    from services.learner.fingerprint import fingerprint
    from services.learner.gathering import Gathering
    from services.learner.group import Store
    from services.learner.intake import Freshness, Intake, RolloutQueue
    from services.learner.loop import LearnerLoop
    from services.learner.publisher import Publisher, WeightsCopier
    from services.learner.report import Reporter
    from services.learner.trainer import Trainer, TrainingDivergedError
    from services.rl import precision
    from services.rl.actions import Discrete
    from services.rl.networks import make_network
    from services.rl.tasks import tasks_of, tasks_spec
    from services.wire import codec
    from services.wire.keys import load_keys
    from services.wire.messages import Client
    from services.wire.security import Doorkeeper
    from services.wire.sockets import Requester, RolloutReceiver

    lifecycle.begin()
    log = logging.get_logger("main")
    keys = load_keys(config.wire.keys, "learner")
    torch.set_num_threads(num_threads)
    torch.manual_seed(config.seed)
    device = resolve_device(config.learner.device)
    tasks = tasks_of(config)
    spec = tasks_spec(tasks)
    actions = Discrete(spec.num_actions)
    schema = rollout_schema(spec, actions, config.unroll_length, config.network)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events mean the current device
    network = make_network(spec, config.network, len(tasks), config.popart)
    refuse_impossible_sizes(config, schema, network)
    host = await_host(config, lifecycle)
    if host is None:
        return lifecycle.exit_code
    Store(host)  # refused now if this machine is not called so
    trainer = Trainer(
        network=network,
        actions=actions,
        config=config,
        frame_stack=spec.frame_stack,
        device=device,
        dtype=precision.resolve(config.learner.precision, device),
    )

    registry = CollectorRegistry()
    metrics = LearnerMetrics(registry)
    metrics.queue_capacity.set(config.queue_capacity)
    metrics.checkpoint_interval_seconds.set(config.checkpoint.interval_s)
    metrics.total_steps.set(config.total_steps)
    heartbeat = Heartbeat()
    episodes = Episodes([task.env.id for task in tasks])

    checkpoints = CheckpointStore(config.run_dir / "checkpoints", config.checkpoint.keep, metrics, learner_id)
    restored = checkpoints.latest(partial(restore, config, trainer, episodes))
    metrics.policy_version.set(trainer.version)
    metrics.steps.set(trainer.steps)
    client = Client(client_id=learner_id, incarnation=time.time_ns())
    connect = partial(Requester, config.wire.paramserver_endpoint, config.wire.max_message_bytes, keys)
    publisher = Publisher(
        connect=connect,
        client=client,
        expected=codec.Expected(run_id=config.run_id, max_message_bytes=config.wire.max_message_bytes),
        copier=WeightsCopier(trainer.network),
        stopping=lifecycle.stopping,
    )
    log.info(
        "started",
        learner_id=learner_id,
        device=device,
        precision=precision.resolve(config.learner.precision, device),
        steps=trainer.steps,
        policy_version=trainer.version,
        checkpoint=restored.path if restored else None,
    )

    queue = RolloutQueue(config.queue_capacity)

    def max_policy_lag() -> int:
        return config.max_policy_lag(max(config.actors, attendance.num_actors), trainer.group.world_size)

    freshness = Freshness(lambda: trainer.version, max_policy_lag)
    metrics.max_policy_lag.set_function(max_policy_lag)
    # What is more than twice too large, libzmq refuses before it allocates; what is less, we count.
    most_bytes = message_bytes(schema)
    door = Doorkeeper(keys, lambda reason: metrics.auth_failures.labels(reason).inc())
    receiver = RolloutReceiver(config.wire.learner_bind, config.wire.receive_queue, 2 * most_bytes, door)
    guarding = lifecycle.thread("doorkeeper", partial(door.run, lifecycle.stopping))
    attendance = Attendance(
        connect=connect,
        client=client,
        run_id=config.run_id,
        endpoint=rollout_endpoint(host, receiver.endpoint),
        config=fingerprint(config, device.type),
        max_message_bytes=config.wire.max_message_bytes,
    )
    rollouts = codec.Expected(
        run_id=config.run_id,
        max_message_bytes=most_bytes,
        schema=schema,
        max_episodes=config.unroll_length,
        num_tasks=len(tasks),
    )
    intake = Intake(
        receiver=receiver,
        expected=rollouts,
        queue=queue,
        freshness=freshness,
        on_episode=episodes.add,
        metrics=metrics,
        stopping=lifecycle.stopping,
    )
    replay_metrics = ReplayMetrics(registry) if config.replay.ratio else None
    replay = make_replay(config, learner_id, rollouts, replay_metrics) if replay_metrics else None
    batcher = Batcher(
        rollouts=queue,
        schema=schema,
        batch_size=config.batch_size,
        pinned=device.type == "cuda",
        freshness=freshness,
        refuse=intake.refuse,
        metrics=metrics,
        stopping=lifecycle.stopping,
        replay=replay,
    )
    gathering = Gathering(
        attendance=attendance,
        trainer=trainer,
        episodes=episodes,
        host=host,
        device=device,
        catch_up=partial(catch_up, config, trainer, publisher),
        metrics=metrics,
        heartbeat=heartbeat,
        stopping=lifecycle.stopping,
    )
    health = HealthServer(
        config.ops.host,
        config.ops.port,
        registry,
        heartbeat,
        config.ops.liveness_timeout_s,
        lambda: not_ready(attendance, gathering.group, publisher),
    )
    threads = [
        guarding,
        lifecycle.thread("attendance", attendance.run),
        lifecycle.thread("intake", intake.run),
        lifecycle.thread("batcher", batcher.run),
    ]
    publishing = lifecycle.thread("publisher", publisher.run)
    reporter = Reporter(
        run_dir=config.run_dir,
        tasks=[task.name for task in tasks],
        frame_skip=spec.frame_skip,
        metrics=metrics,
        replay_metrics=replay_metrics,
    )
    loop = LearnerLoop(
        trainer=trainer,
        batcher=batcher,
        attendance=attendance,
        gathering=gathering,
        publisher=publisher,
        checkpoints=checkpoints,
        checkpoint_interval_s=config.checkpoint.interval_s,
        reporter=reporter,
        log_interval_s=config.learner.log_interval_s,
        episodes=episodes,
        config=configuration.dump(config),
        max_policy_lag=max_policy_lag,
        frame_skip=spec.frame_skip,
        metrics=metrics,
        replay_metrics=replay_metrics,
        heartbeat=heartbeat,
        stopping=lifecycle.stopping,
    )
    mismatch: MismatchError | None = None
    try:
        if not loop.run():
            lifecycle.stop("the last checkpoint could not be written", 1)
    except TrainingDivergedError as error:
        log.error("training_diverged", reason=error)
        lifecycle.stop("training diverged", pod.DIVERGED)
    except MismatchError as error:
        mismatch = error
        lifecycle.stop("the parameter server's weights are of another network", pod.BAD_CONFIG)
    except Exception as error:  # noqa: BLE001  (the edge of the pod's main loop)
        lifecycle.fail(error)
    publisher.wake()
    for thread in [*threads, publishing]:
        thread.join(STOP_S)
    receiver.close()
    door.close()
    health.close()
    log.info(
        "stopped",
        exit_code=lifecycle.exit_code,
        steps=trainer.steps,
        policy_version=trainer.version,
        parameters=f"{trainer.checksum():012x}",
    )
    if mismatch is not None:
        raise mismatch
    return lifecycle.exit_code


def await_host(config: RunConfig, lifecycle: Lifecycle) -> str | None:
    """By which address others reach this learner; None if the pod stops before there is a way to anybody."""
    from services.learner.addresses import own_host

    log = logging.get_logger("main").limited(10.0)
    while not lifecycle.stopping.is_set():
        try:
            return own_host(config.wire)
        except OSError as error:  # a name that is not known yet, say
            log.warning("no_way", endpoint=config.wire.paramserver_endpoint, error=error)
            lifecycle.stopping.wait(NAME_RETRY_S)
    return None


def not_ready(attendance: Attendance, group: Group | None, publisher: Publisher) -> str | None:
    """In a few words what this learner waits for, or None.

    One that only waits for learners with an older configuration to go is ready to take their place:
    Kubernetes changes them one after the other, and goes on to the next when one is ready. It is not while
    the parameter server is away, or has just been restarted and waits for their weights.
    """
    if attendance.differs:
        return None
    if group is None:
        return attendance.trouble or "waits for the other learners"
    return publisher.trouble if group.is_leader else attendance.trouble


def refuse_impossible_sizes(config: RunConfig, schema: Mapping[str, ArraySpec], network: nn.Module) -> None:
    """ValueError for what could never arrive, be published or be held in memory."""
    from services.learner.batch import NUM_SLOTS, message_bytes

    rollout_bytes = message_bytes(schema)
    weights_bytes = sum(tensor.nbytes for tensor in network.state_dict().values()) + 65_536
    allowed = config.wire.max_message_bytes
    for size, what in ((rollout_bytes, f"a rollout of {config.title}"), (weights_bytes, "the weights")):
        if size > allowed:
            raise ValueError(
                f"wire.max_message_bytes = {allowed}: {what} could never be sent; allowed is at least {size}"
            )
    physical_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if config.replay.ratio:  # frames compress, nobody knows how well; the rest does not
        incompressible = sum(
            math.prod(spec.shape) * 4 for spec in schema.values() if spec.dtype in ("float32", "int32")
        )
        least_gb = config.replay.capacity // config.unroll_length * incompressible / 1e9
        if least_gb > physical_gb:
            raise ValueError(
                f"replay.capacity = {config.replay.capacity}: takes more than {least_gb:,.0f} GB; allowed is "
                f"less than this machine's {physical_gb:,.0f} GB"
            )
    batches_gb = NUM_SLOTS * config.batch_size * rollout_bytes / 1e9
    if batches_gb > physical_gb:
        raise ValueError(
            f"batch_size = {config.batch_size}, unroll_length = {config.unroll_length}: {NUM_SLOTS} batches "
            f"take {batches_gb:,.0f} GB; allowed is less than this machine's {physical_gb:,.0f} GB"
        )


def make_replay(
    config: RunConfig, learner_id: str, expected: codec.Expected, metrics: ReplayMetrics
) -> Replay:
    """The replay memory, with what it held in this learner's last life if that was kept."""
    import numpy as np

    from services.learner.replay import Replay
    from services.learner.replay_log import ReplayLog
    from services.rl.replay import ReplayMemory

    capacity = config.replay.capacity // config.unroll_length
    log = ReplayLog(config.run_dir / "replay" / learner_id, capacity) if config.replay.checkpoint else None
    metrics.capacity.set(capacity * config.unroll_length)
    replay = Replay(
        memory=ReplayMemory(capacity, np.random.default_rng(config.seed)),
        log=log,
        ratio=config.replay.ratio,
        unroll_length=config.unroll_length,
        expected=expected,
        metrics=metrics,
    )
    replay.restore()
    return replay


def restore(config: RunConfig, trainer: Trainer, episodes: Episodes, checkpoint: Checkpoint) -> None:
    """Continue from ``checkpoint``; ValueError if it is of another game, network or optimiser."""
    try:
        ours = configuration.dump(config)
        for section, knob in (("env", "id"), ("network", "name")):
            was, now = checkpoint.config[section][knob], ours[section][knob]
            if was != now and "auto" not in (was, now):  # then the shapes of the weights decide
                raise ValueError(f"{section}.{knob} was {was!r} and is {now!r}")  # noqa: TRY301
        if checkpoint.config["tasks"] != ours["tasks"]:
            raise ValueError("tasks are not the same, or not in the same order")  # noqa: TRY301
        if checkpoint.config["popart"]["enabled"] != config.popart.enabled:
            raise ValueError(f"popart.enabled was not {config.popart.enabled}")  # noqa: TRY301
        trainer.load_state_dict(checkpoint.trainer)
        episodes.load_state_dict(checkpoint.episodes)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"checkpoint {checkpoint.path}: does not fit this run ({why})") from None


def catch_up(config: RunConfig, trainer: Trainer, publisher: Publisher, version: int) -> None:
    """Continue from ``version``, which the parameter server holds.

    It is newer than what any learner has: all were killed after their last checkpoint, or the leader died
    when it had just published. If it cannot be had, only its number is taken: the server never goes back, and
    what its actors play would look as if it came from the future.
    """
    newer = publisher.fetch_newer(trainer.version, CATCH_UP_S)
    log = logging.get_logger("main")
    if newer is None:
        log.warning("newer_weights_missed", policy_version=version, ours=trainer.version)
        trainer.version = version
        return
    adopt(config, trainer, newer)
    log.info("newer_weights", policy_version=trainer.version, steps=trainer.steps)


def adopt(config: RunConfig, trainer: Trainer, newer: Weights) -> None:
    """Continue from what the parameter server holds; MismatchError if it is another network's."""
    from safetensors import SafetensorError

    from services.learner.publisher import tensors_of

    try:
        trainer.load(tensors_of(newer), newer.version, newer.steps)
    except (RuntimeError, SafetensorError) as error:
        raise MismatchError(
            f"run_id = {config.run_id!r}: the parameter server holds version {newer.version}, which does not "
            f"fit this network ({' '.join(str(error).split())}); allowed is the network that the run began "
            "with, or another run_id"
        ) from None


def resolve_device(name: str) -> torch.device:
    """The device of the training; ValueError if this machine does not have it."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"learner.device = {name!r}: allowed are auto, cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"learner.device = {name!r}: allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # set_device takes none without an index
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"learner.device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "allowed is cpu"
        )
    return device


if __name__ == "__main__":
    sys.exit(main())
