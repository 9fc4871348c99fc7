"""The parameter server's process: ``python -m services.paramserver --config run.yaml``.

Builds the parts, serves until SIGTERM, writes a last snapshot and exits 0. With ``paramserver.upstream`` set
it is a relay of another parameter server: the same process, but without snapshots of its own.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from services import config as configuration
from services.config import ConfigError, RunConfig
from services.ops import logging
from services.ops.health import HealthServer, Heartbeat
from services.ops.lifecycle import Lifecycle
from services.ops.metrics import ParamserverMetrics
from services.paramserver import store as snapshots
from services.paramserver.loop import Loop, Upstream
from services.paramserver.membership import Membership, RelayedSeats, Seats
from services.paramserver.relay import Relay
from services.paramserver.server import Server
from services.paramserver.store import EMPTY, Snapshot, SnapshotError, SnapshotWriter, Store
from services.wire.messages import Client
from services.wire.sockets import Replier, Requester

LAST_SNAPSHOT_S = 5.0
"""How long the end of the process waits for a slow disk."""


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 after a stop that was asked for, 2 for what the user can mend, 1 for a bug."""
    parser = argparse.ArgumentParser(
        prog="python -m services.paramserver",
        description="Serve weights and seats. All other flags are configuration keys: --paramserver.hold_s 3",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="configuration file (YAML or JSON)")
    parser.add_argument("--parent-pid", type=int, help="stop when this process, our parent, is gone")
    arguments, flags = parser.parse_known_args(argv)
    try:
        config = configuration.load(arguments.config, os.environ, flags)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logging.setup("paramserver", config.ops.log_level)
    lifecycle = Lifecycle()
    lifecycle.install_signals()
    if arguments.parent_pid is not None:
        lifecycle.watch_parent(arguments.parent_pid)
    heartbeat = Heartbeat()
    registry = CollectorRegistry()
    metrics = ParamserverMetrics(registry)
    try:
        replier = Replier(config.wire.paramserver_bind, config.wire.max_message_bytes)
    except ValueError as error:
        sys.stderr.write(f"wire.paramserver_bind: {error}\n")
        return 2
    loop, store, relay = _build(config, replier, metrics)
    try:
        health = HealthServer(
            config.ops.host,
            config.ops.port,
            registry,
            heartbeat,
            config.ops.liveness_timeout_s,
            readiness=partial(_missing, relay),
        )
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    log = logging.get_logger("main")
    log.info("serving", endpoint=replier.endpoint, ops_port=health.port, run_id=config.run_id)
    writer = None if relay is not None else _writer(config, store, metrics)
    writing = None if writer is None else lifecycle.thread("snapshots", writer.run)
    try:
        loop.run(lifecycle.stopping, heartbeat)
    except Exception as error:  # noqa: BLE001  (the last snapshot is written whatever happened)
        lifecycle.fail(error)
    _finish(writer, writing)
    health.close()
    loop.close()
    return lifecycle.exit_code


def _build(
    config: RunConfig, replier: Replier, metrics: ParamserverMetrics
) -> tuple[Loop, Store, Relay | None]:
    incarnation = time.time_ns()  # differs from that of any earlier life
    upstream = config.paramserver.upstream
    store = Store(_restored(config) if upstream is None else EMPTY)
    relayed_seats = RelayedSeats(config.paramserver.seat_lease_s)
    membership: Membership = relayed_seats if upstream else Seats(config.paramserver.seat_lease_s)
    server = Server(
        run_id=config.run_id,
        incarnation=incarnation,
        hold_s=config.paramserver.hold_s,
        max_message_bytes=config.wire.max_message_bytes,
        store=store,
        membership=membership,
        metrics=metrics,
        takes_publishes=upstream is None,
    )
    if upstream is None:
        return Loop(server=server, replier=replier, metrics=metrics), store, None
    relay = Relay(
        client=Client(client_id=f"relay-{socket.gethostname()}", incarnation=incarnation),
        run_id=config.run_id,
        hold_s=config.paramserver.hold_s,
        max_message_bytes=config.wire.max_message_bytes,
        store=store,
        seats=relayed_seats,
        server=server,
    )
    connect = partial(Requester, upstream, config.wire.max_message_bytes)
    return (
        Loop(server=server, replier=replier, metrics=metrics, upstream=Upstream(relay, connect)),
        store,
        relay,
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
        log.info("snapshot_restored", path=path, policy_version=snapshot.version, steps=snapshot.steps)
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
