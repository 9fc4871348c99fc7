"""The parameter server's process: ``python -m services.paramserver --config run.yaml``.

Builds the parts, serves until SIGTERM, writes a last snapshot and exits 0. With ``paramserver.upstream`` set
it is a relay of another parameter server: the same process, but without snapshots of its own.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.config import RunConfig
from services.ops import logging, pod
from services.ops.health import HealthServer, Heartbeat
from services.ops.lifecycle import Lifecycle
from services.ops.metrics import ParamserverMetrics
from services.paramserver import store as snapshots
from services.paramserver.loop import Loop, Upstream
from services.paramserver.membership import Membership, RelayedSeats, Seats
from services.paramserver.relay import Relay
from services.paramserver.server import Server
from services.paramserver.store import EMPTY, Snapshot, SnapshotError, SnapshotWriter, Store
from services.paramserver.views import Views
from services.wire.keys import Keys, load_keys
from services.wire.messages import Client
from services.wire.security import Doorkeeper
from services.wire.sockets import Replier, Requester

STOP_S = 2.0
LAST_SNAPSHOT_S = 5.0
"""How long the end of the process waits for a slow disk."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 stopped, 1 failed, 2 the configuration is wrong."""
    return pod.main("paramserver", argv, run)


def run(config: RunConfig, paramserver_id: str, lifecycle: Lifecycle) -> int:
    """Build, run, stop."""
    lifecycle.begin()
    heartbeat = Heartbeat()
    registry = CollectorRegistry()
    metrics = ParamserverMetrics(registry)
    keys = load_keys(config.wire.keys, "paramserver")
    door = Doorkeeper(keys, lambda reason: metrics.auth_failures.labels(reason).inc())
    replier = Replier(config.wire.paramserver_bind, config.wire.max_message_bytes, door)
    loop, store, relay = _build(config, paramserver_id, replier, metrics, keys)
    health = HealthServer(
        config.ops.host,
        config.ops.port,
        registry,
        heartbeat,
        config.ops.liveness_timeout_s,
        readiness=partial(_missing, relay),
    )
    log = logging.get_logger("main")
    log.info("serving", endpoint=replier.endpoint, ops_port=health.port, run_id=config.run_id)
    writer = None if relay is not None else _writer(config, store, metrics)
    writing = None if writer is None else lifecycle.thread("snapshots", writer.run)
    guarding = lifecycle.thread("doorkeeper", partial(door.run, lifecycle.stopping))
    try:
        loop.run(lifecycle.stopping, heartbeat)
    except Exception as error:  # noqa: BLE001  (the last snapshot is written whatever happened)
        lifecycle.fail(error)
    _finish(writer, writing)
    health.close()
    loop.close()
    guarding.join(STOP_S)
    door.close()
    return lifecycle.exit_code


def _build(
    config: RunConfig,
    paramserver_id: str,
    replier: Replier,
    metrics: ParamserverMetrics,
    keys: Keys | None,
) -> tuple[Loop, Store, Relay | None]:
    incarnation = time.time_ns()  # differs from that of any earlier life
    upstream = config.paramserver.upstream
    store = Store(_restored(config) if upstream is None else EMPTY)
    relayed_seats = RelayedSeats(config.paramserver.seat_lease_s)
    membership: Membership = relayed_seats if upstream else Seats(config.paramserver.seat_lease_s)
    views = _views(config, store.snapshot.generation) if upstream is None else None
    server = Server(
        run_id=config.run_id,
        incarnation=incarnation,
        hold_s=config.paramserver.hold_s,
        max_message_bytes=config.wire.max_message_bytes,
        store=store,
        membership=membership,
        metrics=metrics,
        views=views,
    )
    if upstream is None:
        return Loop(server=server, replier=replier, metrics=metrics), store, None
    relay = Relay(
        client=Client(client_id=f"relay-{paramserver_id}", incarnation=incarnation),
        run_id=config.run_id,
        hold_s=config.paramserver.hold_s,
        max_message_bytes=config.wire.max_message_bytes,
        store=store,
        seats=relayed_seats,
        server=server,
    )
    connect = partial(Requester, upstream, config.wire.max_message_bytes, keys)
    return (
        Loop(server=server, replier=replier, metrics=metrics, upstream=Upstream(relay, connect)),
        store,
        relay,
    )


def _views(config: RunConfig, generation: int) -> Views:
    return Views(
        generation=generation,
        lease_s=config.paramserver.learner_lease_s,
        min_learners=config.learner.min_learners,
        remembers=config.paramserver.remembers,
    )


def _missing(relay: Relay | None) -> str | None:
    return "upstream has not answered yet" if relay is not None and not relay.has_answered else None


def _path(config: RunConfig) -> Path:
    return config.run_dir / "paramserver" / "snapshot"


def _restored(config: RunConfig) -> Snapshot:
    log = logging.get_logger("main")
    path = _path(config)
    try:
        snapshot = snapshots.read(path, config.run_id, config.wire.max_message_bytes)
    except (OSError, SnapshotError) as error:
        log.warning("snapshot_refused", path=path, error=error)
        return EMPTY
    if snapshot is not EMPTY:
        log.info(
            "snapshot_restored",
            path=path,
            policy_version=snapshot.version,
            steps=snapshot.steps,
            generation=snapshot.generation,
        )
    return snapshot


def _writer(config: RunConfig, store: Store, metrics: ParamserverMetrics) -> SnapshotWriter:
    def write(snapshot: Snapshot) -> None:
        snapshots.write(_path(config), snapshot, config.run_id)

    return SnapshotWriter(store, write, config.paramserver.snapshot_interval_s, metrics.snapshot_failures)


def _finish(writer: SnapshotWriter | None, writing: threading.Thread | None) -> None:
    if writer is None or writing is None:
        return
    writer.finish()
    writing.join(LAST_SNAPSHOT_S)
    if writing.is_alive():
        logging.get_logger("main").warning("last_snapshot_abandoned", waited_s=LAST_SNAPSHOT_S)


if __name__ == "__main__":
    sys.exit(main())
