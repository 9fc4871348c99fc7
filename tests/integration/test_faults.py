"""Faults that need no network of their own: frozen peers, peers that never read, and clocks that jump.

Each begins with a system in training, whose pods are real processes over TCP, and ends with the same pods in
training: what happens in between must stop nobody, and nobody may have been restarted by it.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services import config as configuration
from services.learner.fingerprint import fingerprint
from services.local.plan import reserved_ports
from services.wire.codec import encode
from services.wire.messages import NO_VERSION, Attend, Client, Message, Pull
from tests.integration.system import CATCH, REPOSITORY, START_S, Pod, Process, rss_bytes, scrape
from tests.unit.learner.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RUN = "local"
SHARED = (*CATCH, "--learner.device", "cpu", "--total_steps", "1000000000")
SEAT_LEASE_S = 8.0
LEARNER_LEASE_S = 6.0
FORGETFUL = (
    *("--paramserver.seat_lease_s", str(SEAT_LEASE_S), "--paramserver.hold_s", "1"),
    *("--paramserver.learner_lease_s", str(LEARNER_LEASE_S)),
)
"""Leases that a test can wait for the end of, and that seven processes on two cores do not miss."""
PATIENT = ("--paramserver.seat_lease_s", "30", "--paramserver.learner_lease_s", "30")
"""Where no lease may end. One that a jump of the clock ends, ends at once, however long it is."""
SEATS = "impala_paramserver_seats"
STOP_S = 15.0
"""Of a learner that waits for its peer's part, and then for an answer: five seconds. Gloo takes thirty."""
DAY_S = 86_400.0
WATCHED_S = 12.0
MAX_GROWTH_BYTES = 32 << 20
"""What any process may come to need in a while; much less than all that a reader does not read."""


class Clock:
    """What `time.time()` says in the pods that are given it: this machine's time and a shift.

    Python reads its wall clock nowhere else, and `sitecustomize` runs before everything. Their monotonic
    clocks go on as ever, as they do when a real clock is set.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = directory / "shift"
        directory.mkdir()
        self.set(0.0)
        (directory / "sitecustomize.py").write_text(
            "import pathlib, time\n"
            f"shift = pathlib.Path({str(self._file)!r})\n"
            "real = time.time_ns\n"
            "time.time_ns = lambda: real() + int(float(shift.read_text()) * 10**9)\n"
            "time.time = lambda: time.time_ns() / 10**9\n"
        )

    def set(self, shift_s: float) -> None:
        """From now on, for all who have this clock."""
        new = self.directory / "new"
        new.write_text(str(shift_s))
        new.replace(self._file)


class Clocked(Pod):
    """A pod with a clock of ours."""

    def __init__(self, role: str, port: int, flags: Sequence[str], log: Path, clock: Clock) -> None:
        self.port = port
        python = ["env", f"PYTHONPATH={clock.directory}:{REPOSITORY}", sys.executable]
        ops = ["--ops.host", "127.0.0.1", "--ops.port", str(port)]
        Process.__init__(self, [*python, "-m", f"services.{role}", *flags, *ops], log)


@dataclass
class System:
    """Pods by name, as a launcher would start them, but without one that starts them again."""

    directory: Path
    paramserver_port: int
    ops_ports: Iterator[int]
    pods: dict[str, Pod]

    def start(self, name: str, *flags: str, clock: Clock | None = None) -> Pod:
        """`paramserver`, `learner-0`, `actor-3`, ...; also in place of one of this name that has ended."""
        role = name.partition("-")[0]
        endpoint = f"tcp://127.0.0.1:{self.paramserver_port}"
        words = [*SHARED, *FORGETFUL, "--run_id", RUN, "--run_dir", str(self.directory / "run")]
        words += ["--wire.learner_bind", "tcp://127.0.0.1:*"]
        words += ["--wire.paramserver_bind", endpoint, "--wire.paramserver_endpoint", endpoint]
        words += [] if role == "paramserver" else [f"--{role}-id", name]
        log = self.directory / f"{name}.log"
        old = self.pods.get(name)
        port = next(self.ops_ports) if old is None else old.port
        pod = (
            Pod(role, port, [*words, *flags], log)
            if clock is None
            else Clocked(role, port, [*words, *flags], log, clock)
        )
        self.pods[name] = pod
        return pod

    def train(self, learner: str = "learner-0", updates: int = 20) -> None:
        """Until so many more updates are made."""
        pod = self.pods[learner]
        first = pod.value("learner_updates_total")
        until(lambda: pod.value("learner_updates_total") >= first + updates, "training", START_S)

    def seats(self, number: int) -> None:
        """Until so many actors hold one."""
        server = self.pods["paramserver"]
        until(lambda: server.value("paramserver_seats") == number, f"{number} seats", START_S)

    def learners(self, number: int) -> None:
        """Until so many train together, as learner-0 sees it."""
        until(lambda: self.world_size() == number, f"{number} learners", START_S)

    def world_size(self) -> float:
        return self.pods["learner-0"].value("learner_world_size")

    def sends(self, actor: str) -> None:
        """Until this one has sent more than now."""
        pod = self.pods[actor]
        sent = pod.value("actor_rollouts_sent_total")
        until(lambda: pod.value("actor_rollouts_sent_total") > sent, f"{actor} sends", START_S)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """Nothing of it outlives the test, frozen or not."""
    with ExitStack() as held:
        first, *rest = held.enter_context(reserved_ports(0, 12))
        made = System(directory=tmp_path, paramserver_port=first, ops_ports=iter(rest), pods={})
        yield made
        for pod in made.pods.values():
            pod.end()


@contextmanager
def frozen(pod: Pod) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    os.kill(pod.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pod.pid, signal.SIGCONT)


# --- frozen peers -----------------------------------------------------------------------------------------


def test_an_actor_that_is_frozen_for_longer_than_its_lease_loses_its_seat_and_comes_back_to_another(
    system: System,
) -> None:
    for name in ("paramserver", "learner-0", "actor-0", "actor-1"):
        system.start(name)
    system.seats(2)
    system.sends("actor-1")
    with frozen(system.pods["actor-1"]):
        system.seats(1)
        system.start("actor-2")  # takes the seat that is free
        system.seats(2)
        system.train()
        system.sends("actor-0")
    system.seats(3)
    for name in ("actor-0", "actor-1", "actor-2"):
        system.sends(name)
    system.train()
    assert all(pod.alive for pod in system.pods.values())
    assert not system.pods["learner-0"].lines("group_lost")


def test_a_learner_whose_peer_is_frozen_goes_on_alone_and_stops_in_time_when_it_is_asked_to(
    system: System,
) -> None:
    for name in ("paramserver", "learner-0", "learner-1", "actor-0"):
        system.start(name)
    system.learners(2)
    system.train()
    learner, peer = system.pods["learner-0"], system.pods["learner-1"]
    with frozen(peer):
        system.learners(1)
        system.train()
    system.learners(2)
    system.train()
    with frozen(peer):
        learner.terminate()  # in the middle of a sum that the other one will not finish
        assert learner.exit_code(STOP_S) == 0, learner.log()
    assert learner.lines("checkpoint_written")
    assert not learner.lines("cannot_leave")
    system.start("learner-0")
    system.learners(2)
    system.train()
    assert peer.alive


# --- peers that do not read -------------------------------------------------------------------------------


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def connect_zmtp(port: int, kind: bytes) -> socket.socket:
    """As libzmq does without keys: greeting and READY of both sides. Who speaks before that is cut off."""
    greeting = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    connection = connect(port)
    connection.sendall(greeting + b"\x04" + bytes([len(ready)]) + ready)
    answer = b""
    while len(answer) < len(greeting) + 2 or len(answer) < len(greeting) + 2 + answer[len(greeting) + 1]:
        received = connection.recv(1)
        assert received, "refused"
        answer += received
    return connection


def zmtp_message(message: Message) -> bytes:
    """Its frames, as they travel."""
    frames = [bytes(frame) for frame in encode(message)]
    flags = [3] * (len(frames) - 1) + [2]  # all of them long, and whether more follow
    return b"".join(
        struct.pack(">BQ", flag, len(frame)) + frame for flag, frame in zip(flags, frames, strict=True)
    )


class Deaf:
    """Asks the same over all of these connections, as fast as it can, and never reads a byte."""

    def __init__(self, connections: Sequence[socket.socket], request: bytes) -> None:
        self._stopping = threading.Event()
        self._connections, self._request = connections, request
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sent = 0

    def __enter__(self) -> Deaf:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(10)
        for each in self._connections:
            each.close()

    def _run(self) -> None:
        for each in self._connections:
            each.setblocking(False)
        left = dict.fromkeys(self._connections, b"")
        while not self._stopping.wait(0.01):
            for each in self._connections:
                left[each] = left[each] or self._request
                try:
                    left[each] = left[each][each.send(left[each]) :]
                except OSError:  # the other side has stopped to read, or has had enough of us
                    continue
                self.sent += not left[each]


def test_peers_that_ask_and_never_read_hold_up_nobody_and_cost_bounded_memory(system: System) -> None:
    for name in ("paramserver", "learner-0", "actor-0"):
        system.start(name)
    system.train()
    server = system.pods["paramserver"]
    nobody = Client(client_id="deaf", incarnation=1)
    pull = Pull(run_id=RUN, sender=nobody, have_version=NO_VERSION, seats_for=())
    before = {name: rss_bytes(pod.pid) for name, pod in system.pods.items()}
    requesters = [connect_zmtp(system.paramserver_port, b"DEALER") for _ in range(8)]
    wants_weights = Deaf(requesters, zmtp_message(pull))
    wants_metrics = Deaf([connect(server.port) for _ in range(8)], b"GET /metrics HTTP/1.1\r\n\r\n")
    with wants_weights as deaf, wants_metrics:
        until(lambda: deaf.sent > 2000, "many requests", START_S)
        for _ in range(5):
            version = server.value("paramserver_version")
            until(lambda: server.value("paramserver_version") > version, "new weights", START_S)  # noqa: B023
            system.train(updates=5)
            system.sends("actor-0")
        during = {name: rss_bytes(pod.pid) for name, pod in system.pods.items()}
    grown = {name: during[name] - before[name] for name in before}
    assert all(bytes_ < MAX_GROWTH_BYTES for bytes_ in grown.values()), grown
    system.train()
    assert not server.lines("request_failed")


def test_a_learner_that_attends_and_never_reads_does_not_stop_those_who_do(system: System) -> None:
    """It is let into a group and never comes, which breaks this one group and no other."""
    for name in ("paramserver", "learner-0", "actor-0"):
        system.start(name)
    system.train()
    standing = Attend(
        run_id=RUN,
        sender=Client(client_id="learner-9", incarnation=1),
        endpoint="tcp://127.0.0.1:9",
        phase="standing",
        generation=0,
        version=0,
        has_trained=False,
        store="127.0.0.1:9",
        rank=0,
        world_size=1,
        since=0,
        config=fingerprint(configuration.load(flags=SHARED), "cpu"),
    )
    with connect_zmtp(system.paramserver_port, b"DEALER") as deaf:

        def failed() -> list[str]:
            deaf.sendall(zmtp_message(standing))  # again, or it is forgotten before learner-0 stands
            time.sleep(0.2)
            return system.pods["learner-0"].lines("group_failed")

        until(failed, "a group without it failed", START_S)
        system.learners(1)
        system.train()
    assert system.pods["learner-0"].alive


# --- clocks that jump -------------------------------------------------------------------------------------


def day_of_last_line(pod: Pod) -> datetime:
    """By the pod's own clock."""
    lines = [line for line in pod.log().splitlines() if line[:4].isdigit()]
    return datetime.fromisoformat(lines[-1].split()[0].replace("Z", "+00:00"))


def test_a_clock_that_jumps_by_a_day_costs_nobody_a_seat_or_a_step(system: System, tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    for name in ("paramserver", "learner-0", "learner-1", "actor-0", "actor-1"):
        system.start(name, "--checkpoint.interval_s", "0.5", *PATIENT, clock=clock)
    system.learners(2)
    system.seats(2)
    system.train()
    learner, server = system.pods["learner-0"], system.pods["paramserver"]
    for name in ("actor-0", "actor-1"):
        system.sends(name)
    generation = learner.value("learner_generation")
    lost_seats: list[float] = []
    for shift_s in (DAY_S, -DAY_S, 0.0):
        clock.set(shift_s)
        version = server.value("paramserver_version")
        saved = len(learner.lines("checkpoint_written"))
        until_s = time.monotonic() + WATCHED_S
        while time.monotonic() < until_s:
            system.train(updates=1)
            seats = scrape(server.port).get(SEATS, 2.0)  # a look that is not answered is no lost seat
            lost_seats += [seats] if seats != 2 else []
        until(lambda: len(learner.lines("checkpoint_written")) > saved, "a checkpoint", START_S)  # noqa: B023
        shown = day_of_last_line(learner) - datetime.now(UTC)
        assert abs(shown - timedelta(seconds=shift_s)) < timedelta(hours=1), "the clock did not jump"
        assert server.value("paramserver_version") > version
        for name in ("actor-0", "actor-1"):
            system.sends(name)
    assert lost_seats == []
    assert learner.value("learner_generation") == generation
    assert system.world_size() == 2
    assert all(pod.alive for pod in system.pods.values())


def test_a_clock_that_jumps_neither_ends_nor_lengthens_the_lease_of_who_is_silent(
    system: System, tmp_path: Path
) -> None:
    clock = Clock(tmp_path / "clock")
    for name in ("paramserver", "learner-0", "actor-0", "actor-1"):
        system.start(name, clock=clock)
    system.seats(2)
    system.sends("actor-1")
    server = system.pods["paramserver"]
    with frozen(system.pods["actor-1"]):
        silent_s = time.monotonic()
        clock.set(DAY_S)
        while True:
            seats = scrape(server.port).get(SEATS, 2.0)
            if time.monotonic() > silent_s + SEAT_LEASE_S / 2:
                break
            assert seats == 2
        clock.set(-DAY_S)
        system.seats(1)
    system.seats(2)
    system.sends("actor-1")


def test_pods_whose_clock_was_set_back_between_two_lives_are_let_in_again(
    system: System, tmp_path: Path
) -> None:
    """They look like processes that were given up for dead, until the lease of their last life is over."""
    clock = Clock(tmp_path / "clock")
    for name in ("paramserver", "learner-0", "learner-1", "actor-0"):
        system.start(name, clock=clock)
    system.learners(2)
    system.seats(1)
    system.train()
    clock.set(-DAY_S)
    for name in ("actor-0", "learner-1", "paramserver"):
        system.pods[name].popen.kill()
        system.pods[name].popen.wait()
        system.start(name, clock=clock)
        until(system.pods[name].ready, f"{name} is ready", START_S)
        assert day_of_last_line(system.pods[name]) < datetime.now(UTC) - timedelta(hours=23)
        system.learners(2)
        system.seats(1)
        system.sends("actor-0")
        system.train()
        system.train("learner-1")
