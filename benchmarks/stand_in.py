"""A learner that only takes rollouts in, for ``fleet``: it attends, has weights for actors, and never trains.

    raw       a bare ZeroMQ socket with its own defaults, and a loop that receives and counts: the ceiling
    bounded   the same with the short queues and small buffers by which a learner bounds policy lag
    intake    the learner's receiver and intake, which check every rollout; its queue is emptied at once
    batches   the same, and the learner's batcher, which unpacks them and lays them out; nobody trains on them

Started like a pod: ``python -m benchmarks.stand_in intake --config run.yaml``. Its metrics are called as a
learner's are, so whoever reads the one can read the other.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import zmq
from prometheus_client import CollectorRegistry

from benchmarks.fleet_weights import WeightsSource
from services.config import RunConfig
from services.learner.attendance import Attendance
from services.learner.batch import NUM_SLOTS, Batcher, message_bytes, rollout_schema
from services.learner.episodes import Episodes
from services.learner.intake import Freshness, Intake, RolloutQueue
from services.ops import pod
from services.ops.health import HealthServer, Heartbeat
from services.ops.lifecycle import Lifecycle
from services.ops.metrics import LearnerMetrics
from services.rl.actions import Discrete
from services.rl.envs import env_spec
from services.wire import codec
from services.wire.keys import Keys, load_keys
from services.wire.messages import Client
from services.wire.security import Doorkeeper
from services.wire.sockets import ROLLOUTS_BUFFER_BYTES, Requester, RolloutReceiver

KINDS = ("raw", "bounded", "intake", "batches")
WEIGHTS_BYTES = 1_000_000
POLL_S = 0.25
STOP_S = 4.0
COUNT_EVERY = 256
"""Messages, after which the raw receiver brings its counters up to date: they are not to cost anything."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of a pod."""
    kind, *flags = sys.argv[1:] if argv is None else argv
    assert kind in KINDS, kind
    return pod.main("learner", flags, partial(run, kind))


def run(kind: str, config: RunConfig, learner_id: str, lifecycle: Lifecycle) -> int:
    """Until the pod stops."""
    lifecycle.begin()
    keys = load_keys(config.wire.keys, "learner")
    registry = CollectorRegistry()
    metrics = LearnerMetrics(registry)
    heartbeat = Heartbeat()
    if kind in ("raw", "bounded"):
        take_in = partial(_counted, is_bounded=kind == "bounded")
    else:
        take_in = partial(_checked, lays_out=kind == "batches")
    with WeightsSource(
        config.wire.paramserver_endpoint,
        config.wire.keys,
        config.run_id,
        WEIGHTS_BYTES,
        config.wire.max_message_bytes,
    ) as weights:
        weights.publish(0)
    endpoint, threads, close = take_in(config, keys, metrics, lifecycle)
    attendance = Attendance(
        connect=partial(Requester, config.wire.paramserver_endpoint, config.wire.max_message_bytes, keys),
        client=Client(client_id=learner_id, incarnation=time.time_ns()),
        run_id=config.run_id,
        endpoint=endpoint,
        config="stand-in",
        max_message_bytes=config.wire.max_message_bytes,
    )
    threads.append(lifecycle.thread("attendance", attendance.run))
    in_view = threading.Event()
    health = HealthServer(
        config.ops.host,
        config.ops.port,
        registry,
        heartbeat,
        config.ops.liveness_timeout_s,
        lambda: None if in_view.is_set() else "in no view yet",
    )
    attendance.stand(version=0, has_trained=True, store="127.0.0.1:1")
    while not lifecycle.stopping.wait(0.0):
        heartbeat.beat()
        found = attendance.wait_for_next(POLL_S)
        if found is None:
            continue
        view, rank = found
        attendance.train(view, rank)
        in_view.set()
        while not lifecycle.stopping.wait(POLL_S) and not attendance.is_over(view.generation):
            heartbeat.beat()
        attendance.stand(version=0, has_trained=True, store="127.0.0.1:1")
    attendance.leave(version=0)
    for thread in threads:
        thread.join(STOP_S)
    close()
    health.close()
    return lifecycle.exit_code


Parts = tuple[str, list[threading.Thread], Callable[[], None]]
"""Where it is bound, what runs, and what closes it."""


def _counted(
    config: RunConfig, keys: Keys | None, metrics: LearnerMetrics, lifecycle: Lifecycle, *, is_bounded: bool
) -> Parts:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    if is_bounded:
        socket.rcvhwm = config.wire.receive_queue
        socket.rcvbuf = ROLLOUTS_BUFFER_BYTES
    if keys is not None:
        socket.curve_server = True
        socket.curve_secretkey = keys.secret
    socket.bind(config.wire.learner_bind)

    def count() -> None:
        num_rollouts = num_bytes = 0
        while not lifecycle.stopping.is_set():
            if socket.poll(round(POLL_S * 1000)):
                num_rollouts += 1
                num_bytes += sum(map(len, socket.recv_multipart()))
                if num_rollouts < COUNT_EVERY:
                    continue
            metrics.rollouts.labels("ok").inc(num_rollouts)
            metrics.received_bytes.inc(num_bytes)
            num_rollouts = num_bytes = 0

    return config.wire.learner_bind, [lifecycle.thread("count", count)], partial(socket.close, linger=0)


def _checked(
    config: RunConfig, keys: Keys | None, metrics: LearnerMetrics, lifecycle: Lifecycle, *, lays_out: bool
) -> Parts:
    spec = env_spec(config.env)
    schema = rollout_schema(spec, Discrete(spec.num_actions), config.unroll_length, config.network)
    most_bytes = message_bytes(schema)
    door = Doorkeeper(keys, lambda reason: metrics.auth_failures.labels(reason).inc())
    receiver = RolloutReceiver(config.wire.learner_bind, config.wire.receive_queue, 2 * most_bytes, door)
    queue = RolloutQueue(config.queue_capacity)
    freshness = Freshness(lambda: 0, lambda: NUM_SLOTS)
    intake = Intake(
        receiver=receiver,
        expected=codec.Expected(
            run_id=config.run_id,
            max_message_bytes=most_bytes,
            schema=schema,
            max_episodes=config.unroll_length,
        ),
        queue=queue,
        freshness=freshness,
        on_episode=Episodes([config.env.id]).add,
        metrics=metrics,
        stopping=lifecycle.stopping,
    )

    def empty() -> None:
        while not lifecycle.stopping.is_set():
            metrics.rollouts.labels("ok").inc(len(queue.take(config.batch_size, POLL_S)))

    batcher = Batcher(
        rollouts=queue,
        schema=schema,
        batch_size=config.batch_size,
        pinned=False,
        freshness=freshness,
        refuse=intake.refuse,
        metrics=metrics,
        stopping=lifecycle.stopping,
    )

    def give_back() -> None:
        while not lifecycle.stopping.is_set():
            batch = batcher.next(POLL_S)
            if batch is not None:
                metrics.rollouts.labels("ok").inc(batch.num_fresh)
                batch.release()

    threads = [
        lifecycle.thread("doorkeeper", partial(door.run, lifecycle.stopping)),
        lifecycle.thread("intake", intake.run),
    ]
    if lays_out:
        threads += [lifecycle.thread("batcher", batcher.run), lifecycle.thread("give-back", give_back)]
    else:
        threads += [lifecycle.thread("empty", empty)]

    def close() -> None:
        receiver.close()
        door.close()

    return receiver.endpoint, threads, close


if __name__ == "__main__":
    sys.exit(main())
