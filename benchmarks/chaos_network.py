"""A network of our own on one machine, in which a cut cable is silence: no FIN, no RST, no "unreachable".

Every host is a network namespace with one address, and a cable (veth) from it ends in a switch (a bridge in a
namespace of its own). A cut takes the switch's end out of the bridge and leaves it up: both sides go on
sending, nothing arrives, and no host can tell. Addresses and routes stay, and who has which is written down
at every host beforehand, so that nobody learns anything from an ARP request without an answer.

Linux only; it takes root, or the root of a user namespace that ``privileged`` enters.

The namespaces have no names: an open file keeps each alive, so they end with this process, however it ends.
Nothing of the machine's own network is looked at or changed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

CLONE_NEWNET = 0x40000000  # sched.h; Python has os.setns from 3.12 on
COMMAND_S = 30.0
PREFIX_BITS = 24

Result = TypeVar("Result")


class NetworkError(RuntimeError):
    """This machine does not let us have one: why, in one line."""


def privileged(command: Sequence[str]) -> list[str]:
    """``command``, as root of a user namespace unless we are root already."""
    return [*command] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--", *command]


class Network:
    """Hosts by name, each with its address; gone after ``close``."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        """NetworkError."""
        if shutil.which("ip") is None:
            raise NetworkError("the program 'ip' (iproute2) is not installed")
        self._hosts: dict[str, int] = {}
        self._switch = _new_namespace()
        try:
            self._run(self._switch, ["link add switch type bridge", "link set switch up"])
            for name, address in addresses.items():
                self._hosts[name] = _new_namespace()
                self._plug_in(name, address)
            for name, host in self._hosts.items():
                others = [other for peer, other in addresses.items() if peer != name]
                self._run(host, [f"neigh add {a} lladdr {_mac(a)} dev eth0 nud permanent" for a in others])
        except BaseException:
            self.close()
            raise

    def cut(self, name: str) -> None:
        """From now on nothing that this host sends arrives, nor anything that is sent to it."""
        self._run(self._switch, [f"link set {name} nomaster"])

    def mend(self, name: str) -> None:
        """The cable is whole again."""
        self._run(self._switch, [f"link set {name} master switch"])

    def enter(self, name: str) -> None:
        """The calling thread, and what it starts from now on, is on this host for good."""
        _call("setns", self._hosts[name])

    def close(self) -> None:
        """Namespaces end when the last process in them has."""
        for file in [*self._hosts.values(), self._switch]:
            os.close(file)
        self._hosts = {}

    def _plug_in(self, name: str, address: str) -> None:
        host = self._hosts[name]
        peer = f"peer name eth0 address {_mac(address)} netns /proc/{os.getpid()}/fd/{host}"
        self._run(
            self._switch,
            [f"link add {name} type veth {peer}", f"link set {name} master switch", f"link set {name} up"],
        )
        addressed = f"address add {address}/{PREFIX_BITS} dev eth0"
        self._run(host, ["link set lo up", addressed, "link set eth0 up"])

    def _run(self, namespace: int, commands: Sequence[str]) -> None:
        """Commands of `ip`, in order."""

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["ip", "-batch", "-"],
                input="\n".join(commands),
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                check=False,
            )

        done = _inside(namespace, run)
        if done.returncode:
            raise NetworkError(f"ip: {' '.join(done.stderr.split())}")


def _mac(address: str) -> str:
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def _new_namespace() -> int:
    """An open file that keeps it alive."""

    def make() -> int:
        _call("unshare")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _on_a_thread(make)


def _inside(namespace: int, work: Callable[[], Result]) -> Result:
    """What ``work`` returns, run in this namespace while the caller stays where it is."""

    def enter_and_work() -> Result:
        _call("setns", namespace)
        return work()

    return _on_a_thread(enter_and_work)


def _on_a_thread(work: Callable[[], Result]) -> Result:
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  (raised again below)
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, function):
        raise NetworkError("network namespaces are a thing of Linux")
    if getattr(libc, function)(*arguments, CLONE_NEWNET):
        reason = os.strerror(ctypes.get_errno())
        raise NetworkError(f"network namespaces are not permitted here ({function}: {reason})")
