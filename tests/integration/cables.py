"""Two hosts and a cable that is cut and mended between them; prints what they noticed, as JSON.

A program of its own: a network takes root, or the root of a user namespace, and tests may have neither.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from functools import partial

from benchmarks.chaos_network import Network, NetworkError

NOT_PERMITTED = 2
PORT = 5555
SILENCE_S = 1.5
PATIENCE_S = 20.0
ADDRESSES = {"near": "10.77.0.1", "far": "10.77.0.2", "third": "10.77.0.3"}


def main() -> int:
    """Exit codes: 0 tried, 2 not permitted."""
    try:
        network = Network(ADDRESSES)
    except NetworkError as error:
        sys.stderr.write(f"{error}\n")
        return NOT_PERMITTED
    for name in ("far", "third"):
        ready = threading.Event()
        threading.Thread(target=_echo, args=(network, name, ready), daemon=True).start()
        ready.wait(PATIENCE_S)
    network.enter("near")
    noticed = _try(network)
    network.close()
    sys.stdout.write(json.dumps(noticed))
    return 0


def _try(network: Network) -> dict[str, object]:
    noticed: dict[str, object] = {}
    with _connect("far") as far, _connect("third") as third:
        noticed["before"] = _asked(far, b"a")
        addresses = _addresses()
        network.cut("far")
        noticed["cut"] = _asked(far, b"b", SILENCE_S)
        noticed["new connection"] = _refused(partial(_connect, "far", SILENCE_S))
        noticed["others"] = _asked(third, b"c")
        noticed["addresses stay"] = _addresses() == addresses
        network.mend("far")
        noticed["mended"] = _heard(far, PATIENCE_S)  # the kernel sends again what was lost
        noticed["after"] = _asked(far, b"d")
    return noticed


def _echo(network: Network, name: str, ready: threading.Event) -> None:
    network.enter(name)
    with socket.create_server((ADDRESSES[name], PORT)) as server:
        ready.set()
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(100):
                connection.sendall(data)


def _connect(name: str, timeout_s: float = PATIENCE_S) -> socket.socket:
    return socket.create_connection((ADDRESSES[name], PORT), timeout=timeout_s)


def _asked(connection: socket.socket, data: bytes, timeout_s: float = PATIENCE_S) -> str:
    connection.sendall(data)
    return _heard(connection, timeout_s)


def _heard(connection: socket.socket, timeout_s: float) -> str:
    """What came, or the name of what went wrong."""
    connection.settimeout(timeout_s)
    try:
        return connection.recv(100).decode()
    except OSError as error:
        return type(error).__name__


def _refused(connect: partial[socket.socket]) -> str:
    try:
        connect().close()
    except OSError as error:
        return type(error).__name__
    return "connected"


def _addresses() -> str:
    """Of this host, with the state of its end of the cable."""
    command = ["ip", "-4", "-oneline", "address", "show", "dev", "eth0"]
    link = ["ip", "-oneline", "link", "show", "dev", "eth0"]
    return subprocess.check_output(command, text=True) + subprocess.check_output(link, text=True)


if __name__ == "__main__":
    sys.exit(main())
