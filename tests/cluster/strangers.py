"""Clients that try to get in. Imports nothing of ours: its text is run inside the cluster by `python -c`.

Its argument is a JSON list of attempts, each with a name and an endpoint. One with `raw` bytes, in hex, is a
TCP client that sends them; the others speak ZeroMQ, with CURVE if they have `server`, `public` and `secret`.
Each has time for one handshake. Prints what became of them by name: "let in", "refused" or "not reached".
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

PATIENCE_S = 20.0
REFUSALS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_DISCONNECTED,
)


def send_raw(endpoint: str, raw: bytes) -> str:
    """Refused is who is cut off."""
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
            connection.sendall(raw)
            while connection.recv(4096):
                pass
    except TimeoutError:
        return "let in"
    except ConnectionResetError:
        return "refused"
    except OSError as error:
        return f"not reached: {error}"
    return "refused"


def shake_hands(endpoint: str, attempt: dict[str, str]) -> str:
    """The first thing that libzmq says of it."""
    kind = zmq.PUSH if endpoint.endswith(":5555") else zmq.DEALER
    client: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    client.setsockopt(zmq.LINGER, 0)
    if "server" in attempt:
        client.setsockopt(zmq.CURVE_SERVERKEY, attempt["server"].encode())
        client.setsockopt(zmq.CURVE_PUBLICKEY, attempt["public"].encode())
        client.setsockopt(zmq.CURVE_SECRETKEY, attempt["secret"].encode())
    monitor = client.get_monitor_socket()
    client.connect(endpoint)
    deadline_s = time.monotonic() + PATIENCE_S
    try:
        while monitor.poll(max(0, round(1000 * (deadline_s - time.monotonic())))):
            event: Any = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return "let in"
            if event in REFUSALS:
                return "refused"
        return "not reached"
    finally:
        client.disable_monitor()
        client.close()


if __name__ == "__main__":
    results = {}
    for attempt in json.loads(sys.argv[1]):
        endpoint = attempt["endpoint"]
        if "raw" in attempt:
            results[attempt["name"]] = send_raw(endpoint, bytes.fromhex(attempt["raw"]))
        else:
            results[attempt["name"]] = shake_hands(endpoint, attempt)
    sys.stdout.write(json.dumps(results))
