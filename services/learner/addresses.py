"""By which address others reach this learner: actors with their rollouts, and the other learners.

Nobody has a list of learners: each one tells the parameter server where it is, and that tells everybody else.
"""

from __future__ import annotations

import socket
from ipaddress import ip_address

from services.config import WireConfig
from services.ops.logging import get_logger

LOOPBACK = "127.0.0.1"

_log = get_logger("addresses")


def own_host(wire: WireConfig) -> str:
    """``wire.learner_host``, or the way to the parameter server decides; OSError while there is none."""
    if wire.learner_host is not None:
        return wire.learner_host
    if wire.paramserver_endpoint.startswith("ipc://"):
        return LOOPBACK
    host, _, port = wire.paramserver_endpoint.removeprefix("tcp://").rpartition(":")
    family, kind, *_, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as towards:
        towards.connect(address)  # sends nothing, but chooses the way
        own = str(towards.getsockname()[0])
    if ip_address(own).is_loopback:
        _log.warning("own_address", host=own, hint="others reach this learner only with wire.learner_host")
    return own


def rollout_endpoint(host: str, bound: str) -> str:
    """What actors connect to, of a learner on ``host`` that listens at ``bound``."""
    if not bound.startswith("tcp://"):
        return bound
    port = bound.rpartition(":")[2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
