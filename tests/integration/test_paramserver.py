"""The parameter server as a process, with real sockets: many clients, restarts, garbage, and its own end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.paramserver.store import read
from services.paramserver.window import UNDER_WAY_S
from services.wire.codec import Expected, decode, encode
from services.wire.messages import (
    NO_GENERATION,
    Attend,
    Client,
    Goodbye,
    Message,
    Publish,
    Published,
    Pull,
    Refusal,
    View,
    Weights,
)
from services.wire.sockets import Requester, wait
from tests.unit.wire.mutations import Mutator

pytestmark = pytest.mark.integration

RUN = "run"
LIMIT = 8 << 20
PATIENCE_S = 30.0
EXPECTED = Expected(run_id=RUN, max_message_bytes=LIMIT)
QUICK = ("--paramserver.hold_s", "0.5", "--paramserver.snapshot_interval_s", "0.05")


class Process:
    """A parameter server, and what it logs."""

    def __init__(self, run_dir: Path, *flags: str, bind: str = "tcp://127.0.0.1:*") -> None:
        command = [sys.executable, "-m", "services.paramserver", "--run_id", RUN, "--run_dir", str(run_dir)]
        command += ["--wire.paramserver_bind", bind, "--wire.max_message_bytes", str(LIMIT)]
        command += ["--ops.host", "127.0.0.1", "--ops.port", "0", *flags]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._serving = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        with self.popen.stderr as stderr:
            for line in stderr:
                self.lines.append(line)
                if " serving " in line:
                    self._serving.set()
        self._serving.set()

    def started(self) -> Process:
        assert self._serving.wait(PATIENCE_S)
        assert self.popen.poll() is None, self.log()
        return self

    def log(self) -> str:
        return "".join(self.lines)

    def logged(self, pattern: str) -> str:
        found = re.search(pattern, self.log())
        assert found, self.log()
        return found[1]

    @property
    def endpoint(self) -> str:
        return self.logged(r"endpoint=(\S+)")

    def get(self, path: str) -> tuple[int, str]:
        """What its HTTP endpoint answers."""
        url = f"http://127.0.0.1:{self.logged(r'ops_port=([0-9]+)')}{path}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def count(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        samples = [s for m in text_string_to_metric_families(self.get("/metrics")[1]) for s in m.samples]
        return sum(
            s.value
            for s in samples
            if s.name == f"impala_paramserver_{name}" and labels.items() <= s.labels.items()
        )

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.popen.send_signal(number)
        code = self.popen.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code


class Actor:
    """Keeps one request open, as an actor does, and says which seat it holds."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.socket = Requester(endpoint, LIMIT)
        self.name = name
        self.seat = -1
        self.version = -1
        self.payload = b""
        self.learners: list[str] = []
        self._generation = NO_GENERATION

    @property
    def client(self) -> Client:
        return Client(client_id=self.name, incarnation=1, seat=self.seat)

    def ask(self) -> None:
        pull = Pull(
            run_id=RUN,
            sender=self.client,
            have_version=self.version,
            seats_for=(self.client,),
            generation=self._generation,
        )
        assert self.socket.send(encode(pull), PATIENCE_S)

    def hear(self, timeout_s: float = PATIENCE_S) -> Weights:
        frames = self.socket.receive(timeout_s)
        assert frames is not None, f"{self.name} was not answered"
        return self.take(decode(frames, EXPECTED))

    def take(self, message: Message) -> Weights:
        assert isinstance(message, Weights), message
        (self.seat,) = message.seats
        if message.generation != NO_GENERATION:
            self._generation = message.generation
            self.learners = [learner.endpoint for learner in message.learners]
        if message.payload is not None:
            self.version, self.payload = message.version, bytes(message.payload)
        return message

    def ask_and_hear(self) -> Weights:
        self.ask()
        return self.hear()


class Learner:
    """Attends over a socket, and does as it is told, as a learner does; its groups never break."""

    def __init__(self, endpoint: str, name: str, incarnation: int = 1) -> None:
        self.socket = Requester(endpoint, LIMIT)
        self.says = Attend(
            run_id=RUN,
            sender=Client(client_id=name, incarnation=incarnation),
            endpoint=f"tcp://{name}:5555",
            phase="standing",
            generation=NO_GENERATION,
            version=0,
            has_trained=False,
            store=f"{name}:1",
            rank=0,
            world_size=1,
            since=NO_GENERATION,
        )
        self.has_stood = True
        """Since this was last set to False."""

    def attend(self) -> View:
        """And obey the answer."""
        self.ask()
        return self.hear()

    def ask(self) -> None:
        assert self.socket.send(encode(self.says), PATIENCE_S)

    def hear(self) -> View:
        frames = self.socket.receive(PATIENCE_S)
        assert frames is not None, f"{self.says.sender.client_id} was not answered"
        view = decode(frames, EXPECTED)
        assert isinstance(view, View), view
        self._obey(view)
        return view

    def _obey(self, view: View) -> None:
        names = [member.client_id for member in view.members]
        own, says = self.says.sender.client_id, self.says
        if view.generation > says.generation and own in names:
            rank = names.index(own)
            self.says = replace(
                says,
                phase="training",
                generation=view.generation,
                has_trained=True,
                rank=rank,
                world_size=len(names),
                since=view.members[rank].since,
            )
        elif view.generation > says.generation or (view.generation == says.generation and not names):
            self.says = replace(says, phase="standing", generation=view.generation)
            self.has_stood = True


def gather(*learners: Learner) -> int:
    """Let them attend until they all train in one view, and nobody else does; its generation."""
    deadline_s, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while True:
        views = [learner.attend() for learner in learners]
        trained = {learner.says.generation for learner in learners if learner.says.phase == "training"}
        if len(views[-1].members) == len(learners) and trained == {views[-1].generation}:
            return views[-1].generation
        assert time.monotonic() < deadline_s, views
        pause.wait(0.05)


def hear_all(actors: Sequence[Actor]) -> list[Weights]:
    """One answer for each, in whatever order they come; one poll loop."""
    answers: dict[str, Weights] = {}
    deadline_s = time.monotonic() + PATIENCE_S
    while len(answers) < len(actors):
        assert time.monotonic() < deadline_s, f"{len(answers)} of {len(actors)} were answered"
        waiting = [actor for actor in actors if actor.name not in answers]
        wait([actor.socket for actor in waiting], 1.0)
        for actor in waiting:
            frames = actor.socket.receive(0.0)
            if frames is not None:
                answers[actor.name] = actor.take(decode(frames, EXPECTED))
    return [answers[actor.name] for actor in actors]


def request(endpoint: str, message: Message) -> Message:
    with Requester(endpoint, LIMIT) as client:
        assert client.send(encode(message), PATIENCE_S)
        frames = client.receive(PATIENCE_S)
        assert frames is not None
        return decode([bytes(frame) for frame in frames], EXPECTED)


def publish(endpoint: str, version: int, payload: bytes | None) -> Message:
    learner = Client(client_id="learner-0", incarnation=1)
    message = Publish(
        run_id=RUN,
        sender=learner,
        state="training",
        version=version,
        steps=version * 640,
        payload=payload,
    )
    return request(endpoint, message)


def eventually(condition: Callable[[], bool]) -> None:
    """For what another process does in its own time."""
    deadline_s = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s
        pause.wait(0.02)


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start parameter servers that do not outlive the test."""
    processes: list[Process] = []

    def start_one(*flags: str, **keywords: str) -> Process:
        processes.append(Process(tmp_path / "runs", *flags, **keywords))
        return processes[-1]

    yield start_one
    for process in processes:
        process.popen.kill()
        process.popen.wait()


@pytest.fixture
def actors() -> Iterator[Callable[[str, int], list[Actor]]]:
    """Make actors whose sockets do not outlive the test."""
    made: list[Actor] = []

    def make(endpoint: str, count: int) -> list[Actor]:
        new = [Actor(endpoint, f"actor-{len(made) + i}") for i in range(count)]
        made.extend(new)
        return new

    yield make
    for actor in made:
        actor.socket.close()


Make = Callable[[str, int], list[Actor]]


@pytest.fixture
def learner() -> Iterator[Callable[..., Learner]]:
    """Make a learner whose socket does not outlive the test."""
    made: list[Learner] = []

    def make(endpoint: str, name: str, incarnation: int = 1) -> Learner:
        made.append(Learner(endpoint, name, incarnation))
        return made[-1]

    yield make
    for one in made:
        one.socket.close()


MakeLearner = Callable[..., Learner]

# --- many clients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_64_actors_get_64_seats_and_every_one_the_new_weights(
    start: Start, actors: Make, tmp_path: Path, transport: str
) -> None:
    bind = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path}/ps"
    server = start(*QUICK, bind=bind).started()
    crowd = actors(server.endpoint, 64)
    for actor in crowd:
        actor.ask()
    first = hear_all(crowd)
    assert sorted(actor.seat for actor in crowd) == list(range(64))
    assert {(weights.state, weights.version) for weights in first} == {("waiting", -1)}

    for actor in crowd:
        actor.ask()
    payload = os.urandom(1 << 20)
    assert publish(server.endpoint, 0, payload) == Published(
        run_id=RUN, server_incarnation=first[0].server_incarnation, version=0
    )
    hear_all(crowd)
    while any(actor.version < 0 for actor in crowd):  # whose request had run out when it was published
        late = [actor for actor in crowd if actor.version < 0]
        for actor in late:
            actor.ask()
        hear_all(late)
    assert all(actor.payload == payload for actor in crowd)

    for actor in crowd:
        actor.ask()
    assert {weights.payload for weights in hear_all(crowd)} == {None}  # held, and nothing came
    assert server.count("pulls_total", result="full") == 64
    assert server.count("sent_bytes_total") >= 64 << 20
    assert (server.count("seats"), server.count("version")) == (64, 0)
    request_goodbyes(crowd)
    eventually(lambda: server.count("seats") == 0)


def test_large_weights_go_to_as_many_at_a_time_as_the_window_has_room_for(start: Start, actors: Make) -> None:
    server = start(*QUICK).started()
    payload = os.urandom(6 << 20)
    publish(server.endpoint, 0, payload)
    crowd = actors(server.endpoint, 32)
    served = []
    while any(actor.version < 0 for actor in crowd):
        for actor in crowd:
            actor.ask()  # whoever has its copy says so
        served.append(sum(weights.payload is not None for weights in hear_all(crowd)))
    # Nobody asked again before all had been answered: what was sent in a round was on its way at one time.
    assert served == [10, 10, 10, 2]  # 60 of 64 MB
    assert all(actor.payload == payload for actor in crowd)
    assert server.count("pulls_total", result="full") == 32
    assert 32 * len(payload) < server.count("sent_bytes_total") < 33 * len(payload)


def test_clients_that_are_gone_take_nobodys_turn(start: Start, actors: Make) -> None:
    server = start("--paramserver.hold_s", "10").started()
    publish(server.endpoint, 0, b"small")
    *crowd, alive = actors(server.endpoint, 33)
    for actor in [*crowd, alive]:
        actor.ask_and_hear()  # its seat, and what makes the next request one that is held
        actor.ask()
    for actor in crowd:
        actor.socket.close()
    published_s = time.monotonic()
    publish(server.endpoint, 1, os.urandom(6 << 20))
    assert alive.hear().payload is not None
    assert time.monotonic() - published_s < UNDER_WAY_S  # for which the first ten would have had it


def request_goodbyes(crowd: Sequence[Actor]) -> None:
    for actor in crowd:
        assert actor.socket.send(encode(Goodbye(run_id=RUN, sender=actor.client)), PATIENCE_S)


def test_a_client_that_never_reads_holds_up_nobody_and_costs_bounded_memory(
    start: Start, actors: Make
) -> None:
    server = start(*QUICK).started()
    deaf, alive = actors(server.endpoint, 2)
    for version in range(40):
        publish(server.endpoint, version, os.urandom(2 << 20))
        deaf.version = -1
        deaf.ask()
        begin_s = time.monotonic()
        alive.ask_and_hear()
        assert time.monotonic() - begin_s < 5.0
    assert alive.version == 39
    assert resident_bytes(server) < 200 << 20  # not all 80 MB that it did not read, 40 times over


# --- memory and modules -----------------------------------------------------------------------------------


def resident_bytes(process: Process, field: str = "VmRSS") -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    status = Path(f"/proc/{process.popen.pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def test_the_process_stays_under_100_mb_and_has_no_torch_in_it(start: Start, actors: Make) -> None:
    server = start(*QUICK).started()
    crowd = actors(server.endpoint, 16)
    for version in range(10):
        publish(server.endpoint, version, os.urandom(3 << 20))
        for actor in crowd:
            actor.ask()
        hear_all(crowd)
    eventually((server_dir(server) / "snapshot").exists)
    assert resident_bytes(server) < 100_000_000
    maps = Path(f"/proc/{server.popen.pid}/maps").read_text(encoding="utf-8")
    assert "numpy" in maps
    assert "torch" not in maps


def server_dir(process: Process) -> Path:
    arguments = process.popen.args
    assert isinstance(arguments, list)
    return Path(arguments[arguments.index("--run_dir") + 1]) / "paramserver"


def test_importing_the_process_imports_no_torch() -> None:
    code = "import sys, services.paramserver.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# --- restarts ---------------------------------------------------------------------------------------------


def test_after_kill_9_actors_keep_their_seats_and_late_joiners_get_the_snapshot(
    start: Start, actors: Make
) -> None:
    first = start(*QUICK).started()
    endpoint = first.endpoint
    crowd = actors(endpoint, 8)
    for actor in crowd:
        actor.ask()
    hear_all(crowd)
    seats = [actor.seat for actor in crowd]
    assert sorted(seats) == list(range(8))
    payload = os.urandom(1 << 20)
    publish(endpoint, 3, payload)
    for actor in crowd:
        actor.ask()
    before = hear_all(crowd)[0]
    eventually((server_dir(first) / "snapshot").exists)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL

    second = start(*QUICK, bind=endpoint).started()
    crowd.reverse()  # who had seat 0 comes last
    for actor in crowd:  # over the same sockets, which reconnect by themselves
        actor.ask()
    after = hear_all(crowd)
    assert [actor.seat for actor in reversed(crowd)] == seats
    assert {(weights.version, weights.payload) for weights in after} == {(3, None)}
    assert after[0].server_incarnation != before.server_incarnation
    (newcomer,) = actors(endpoint, 1)
    newcomer.ask_and_hear()
    assert (newcomer.seat, newcomer.version, newcomer.payload) == (8, 3, payload)
    assert "snapshot_restored" in second.log()


def test_after_kill_9_learners_train_on_in_the_same_view_and_the_next_one_counts_above_it(
    start: Start, actors: Make, learner: MakeLearner
) -> None:
    patient = (*QUICK, "--paramserver.learner_lease_s", "60")
    first = start(*patient).started()
    endpoint = first.endpoint
    learners = [learner(endpoint, f"learner-{number}") for number in (0, 1)]
    generation = gather(*learners)
    payload = os.urandom(1 << 20)
    publish(endpoint, 3, payload)
    old, newcomer = actors(endpoint, 2)
    told = old.ask_and_hear()
    assert (told.generation, [d.endpoint for d in told.learners]) == (
        generation,
        list(map(rollouts_of, learners)),
    )
    on_disk = server_dir(first) / "snapshot"
    eventually(lambda: (found := read(on_disk, RUN, LIMIT)).generation == generation and found.version == 3)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL

    second = start(*patient, bind=endpoint).started()
    late = newcomer.ask_and_hear()  # before any learner is back
    assert (late.version, late.payload, late.generation) == (3, payload, NO_GENERATION)
    for one in learners:
        one.has_stood = False
    views = [one.attend() for one in learners]  # over the same sockets, which reconnect by themselves
    assert [view.generation for view in views] == [NO_GENERATION, generation]
    assert [view.generation for view in (one.attend() for one in learners)] == [generation] * 2
    assert not any(one.has_stood for one in learners)
    assert views[-1].version == 3
    assert "taken_over" in second.log()
    assert (newcomer.ask_and_hear().learners, old.ask_and_hear().learners) == (told.learners, told.learners)
    assert (second.count("learners"), second.count("seats")) == (2, 2)

    learners.append(learner(endpoint, "learner-2"))
    assert gather(*learners) > generation
    while old.learners != list(map(rollouts_of, learners)):
        old.ask_and_hear()


def test_after_the_end_of_all_learners_and_the_server_no_generation_is_given_twice(
    start: Start, learner: MakeLearner
) -> None:
    first = start(*QUICK).started()
    generation = gather(*(learner(first.endpoint, f"learner-{number}") for number in (0, 1)))
    assert generation > 1
    on_disk = server_dir(first) / "snapshot"
    eventually(lambda: read(on_disk, RUN, LIMIT).generation == generation)  # before there are weights
    first.end(signal.SIGKILL)
    second = start(*QUICK).started()
    assert gather(learner(second.endpoint, "learner-0", incarnation=2)) > generation


def test_a_frozen_server_ends_nobodys_membership(start: Start, learner: MakeLearner) -> None:
    lease_s = 8.0
    server = start(*QUICK, "--paramserver.learner_lease_s", str(lease_s)).started()
    learners = [learner(server.endpoint, f"learner-{number}") for number in (0, 1)]
    generation = gather(*learners)
    server.popen.send_signal(signal.SIGSTOP)
    for one in learners:
        one.ask()
    threading.Event().wait(1.25 * lease_s)
    server.popen.send_signal(signal.SIGCONT)
    assert [one.hear().generation for one in learners] == [generation, generation]
    assert gather(*learners) == generation


def test_a_group_goes_on_without_a_killed_member_long_before_its_lease_ends(
    start: Start, learner: MakeLearner
) -> None:
    server = start(*QUICK, "--paramserver.learner_lease_s", "600").started()
    alive, killed = (learner(server.endpoint, f"learner-{number}") for number in (0, 1))
    generation = gather(alive, killed)
    alive.says = replace(alive.says, phase="standing")  # its connection to the other one has broken
    assert gather(alive) > generation


def rollouts_of(learner: Learner) -> str:
    return learner.says.endpoint


def test_an_actor_that_lost_its_seat_to_a_faster_newcomer_is_given_another(
    start: Start, actors: Make
) -> None:
    first = start(*QUICK).started()
    holder, thief = actors(first.endpoint, 2)
    holder.ask_and_hear()
    first.end(signal.SIGKILL)
    start(*QUICK, bind=first.endpoint).started()
    thief.ask_and_hear()
    assert thief.seat == 0
    holder.ask_and_hear()
    assert holder.seat == 1


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other run"])
def test_a_snapshot_that_cannot_be_trusted_is_refused_in_one_line_and_the_server_starts_empty(
    start: Start, damage: str
) -> None:
    first = start(*QUICK).started()
    publish(first.endpoint, 3, b"weights")
    assert first.end() == 0
    path = server_dir(first) / "snapshot"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "foreign":
        path.write_bytes(os.urandom(1000))
    second = start(*QUICK, *(("--run_id", "another") if damage == "other run" else ())).started()
    assert second.log().count("snapshot_refused") == 1
    if damage != "other run":
        answer = publish(second.endpoint, 1, None)
        assert isinstance(answer, Published)
        assert answer.version == -1
    assert second.end() == 0


def test_a_disk_that_cannot_be_written_is_counted_and_changes_nothing_else(
    start: Start, actors: Make, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file where a directory should be")
    server = start(*QUICK).started()
    publish(server.endpoint, 3, b"weights")
    eventually(lambda: server.count("snapshot_failures_total") >= 2)
    (actor,) = actors(server.endpoint, 1)
    actor.ask_and_hear()
    assert actor.payload == b"weights"
    assert server.end() == 0


# --- garbage ----------------------------------------------------------------------------------------------


def test_garbage_of_all_kinds_is_counted_and_the_server_goes_on(start: Start, actors: Make) -> None:
    server = start(*QUICK).started()
    publish(server.endpoint, 1, b"weights")
    mutator = Mutator(seed=3)
    clients = [Requester(server.endpoint, LIMIT) for _ in range(5)]
    for number in range(1000):
        frames = mutator.draw() or [b""]
        assert clients[number % 5].send(frames, PATIENCE_S)
    rng = np.random.default_rng(3)
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    left_open = []
    for number in range(100):
        raw = socket.create_connection((host, int(port)), PATIENCE_S)
        raw.sendall(
            [rng.bytes(200), b"GET / HTTP/1.1\r\n\r\n", greeting, greeting + rng.bytes(200), b""][number % 5]
        )
        left_open.append(raw) if number % 2 else raw.close()
    (actor,) = actors(server.endpoint, 1)
    actor.ask_and_hear()
    actor.ask_and_hear()
    assert actor.version >= 1
    eventually(lambda: server.count("refused_requests_total") > 500)
    assert server.count("refused_requests_total") <= 1000
    assert server.count("refused_requests_total", reason="internal") == 0
    assert server.get("/healthz")[0] == 200
    for client in clients:
        client.close()
    for raw in left_open:
        raw.close()
    assert server.end() == 0
    assert "Traceback" not in server.log()


def test_a_frame_over_the_limit_costs_its_sender_the_connection_and_nobody_else(
    start: Start, actors: Make
) -> None:
    server = start(*QUICK).started()
    (actor,) = actors(server.endpoint, 1)
    actor.ask_and_hear()
    with Requester(server.endpoint, 16 * LIMIT) as sender:
        assert sender.send([b"x" * (2 * LIMIT)], PATIENCE_S)
        assert sender.receive(1.0) is None
    actor.ask_and_hear()
    with closing(Requester(server.endpoint, LIMIT)) as sender:  # each frame is small enough, their sum is not
        assert sender.send([b"x" * (LIMIT // 4)] * 5, PATIENCE_S)
        frames = sender.receive(PATIENCE_S)
        assert frames is not None
        refusal = decode(frames, EXPECTED)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "oversized"


def test_a_peer_of_another_protocol_is_told_so(start: Start) -> None:
    server = start(*QUICK).started()
    with Requester(server.endpoint, LIMIT) as peer:
        assert peer.send([b"\x93\x63\xa4pull\x90"], PATIENCE_S)
        frames = peer.receive(PATIENCE_S)
        assert frames is not None
        refusal = decode(frames, EXPECTED)
    assert isinstance(refusal, Refusal)
    assert "the peer speaks protocol 99" in refusal.text


# --- relays -----------------------------------------------------------------------------------------------


def test_a_relay_survives_its_upstream_and_finds_it_again(start: Start, actors: Make) -> None:
    root = start(*QUICK).started()
    relay = start(*QUICK, "--paramserver.upstream", root.endpoint).started()
    eventually(lambda: relay.get("/readyz")[0] == 200)
    at_root, at_relay = actors(root.endpoint, 1) + actors(relay.endpoint, 1)
    at_root.ask_and_hear()
    while at_relay.seat < 0:
        at_relay.ask_and_hear()
    assert (at_root.seat, at_relay.seat) == (0, 1)
    publish(root.endpoint, 1, b"one")
    while at_relay.version < 1:
        at_relay.ask_and_hear()
    assert at_relay.payload == b"one"

    root.end(signal.SIGKILL)
    (late,) = actors(relay.endpoint, 1)
    while late.version < 1:
        late.ask_and_hear()
    assert (late.payload, late.seat) == (b"one", -1)
    start(*QUICK, bind=root.endpoint).started()
    publish(root.endpoint, 2, b"two")
    while at_relay.version < 2 or late.version < 2 or late.seat < 0:
        at_relay.ask_and_hear()
        late.ask_and_hear()
    assert (at_relay.seat, late.seat, late.payload) == (1, 0, b"two")  # the first actor has not come back
    assert relay.end() == 0
    assert not list(server_dir(relay).glob("*.tmp"))


def test_a_relay_asks_again_as_soon_as_its_upstream_is_back(start: Start, actors: Make) -> None:
    patient = ("--paramserver.hold_s", "60", "--paramserver.seat_lease_s", "300")
    root = start(*patient).started()
    relay = start(*patient, "--paramserver.upstream", root.endpoint).started()
    (actor,) = actors(relay.endpoint, 1)
    publish(root.endpoint, 1, b"one")
    while actor.version < 1 or actor.seat < 0:
        actor.ask_and_hear()
    root.end(signal.SIGKILL)  # and with it a request that it had a minute to answer
    start(*patient, bind=root.endpoint).started()
    publish(root.endpoint, 2, b"two")
    assert actor.ask_and_hear().version == 2


def test_versions_seats_and_learners_reach_the_leaves_of_a_tree_whose_branches_die(
    start: Start, actors: Make, learner: MakeLearner
) -> None:
    root = start(*QUICK).started()
    middle = [start(*QUICK, "--paramserver.upstream", root.endpoint).started() for _ in range(2)]
    leaves = [start(*QUICK, "--paramserver.upstream", middle[i].endpoint).started() for i in (0, 0, 1)]
    learners = [learner(root.endpoint, "learner-0")]
    gather(*learners)
    publish(root.endpoint, 1, b"one")
    crowd = [actor for leaf in leaves for actor in actors(leaf.endpoint, 2)]

    def hear(version: int) -> None:
        """Everybody, of this version, of all learners, and of a seat."""
        wanted = list(map(rollouts_of, learners))
        deadline_s = time.monotonic() + PATIENCE_S
        while any(actor.version < version or actor.seat < 0 or actor.learners != wanted for actor in crowd):
            assert time.monotonic() < deadline_s
            for actor in crowd:
                actor.ask()
            hear_all(crowd)

    hear(version=1)
    seats = [actor.seat for actor in crowd]
    assert sorted(seats) == list(range(6))
    assert {actor.payload for actor in crowd} == {b"one"}

    branch = middle[0].endpoint
    middle[0].end(signal.SIGKILL)
    learners.append(learner(root.endpoint, "learner-1"))
    gather(*learners)
    publish(root.endpoint, 2, b"two")
    start(*QUICK, "--paramserver.upstream", root.endpoint, bind=branch).started()
    hear(version=2)
    assert [actor.seat for actor in crowd] == seats
    assert root.count("seats") == 6
    refusal = request(leaves[0].endpoint, learners[0].says)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "relay"


def test_a_relay_is_alive_but_unready_until_upstream_has_answered(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        endpoint = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
    relay = start(*QUICK, "--paramserver.upstream", endpoint).started()
    assert relay.get("/readyz") == (503, "upstream has not answered yet\n")
    assert relay.get("/healthz")[0] == 200
    refusal = publish(relay.endpoint, 1, b"weights")
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "relay"
    start(*QUICK, bind=endpoint).started()
    eventually(lambda: relay.get("/readyz")[0] == 200)


# --- the end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_10_seconds_with_a_last_snapshot(
    start: Start, number: signal.Signals
) -> None:
    server = start("--paramserver.snapshot_interval_s", "10000").started()
    publish(server.endpoint, 3, b"weights")
    assert not (server_dir(server) / "snapshot").exists()
    begin_s = time.monotonic()
    assert server.end(number) == 0
    assert time.monotonic() - begin_s < 10.0
    assert b"weights" in (server_dir(server) / "snapshot").read_bytes()
    again = start().started()
    answer = publish(again.endpoint, 3, None)
    assert isinstance(answer, Published)
    assert answer.version == 3


def test_a_relay_without_upstream_ends_within_10_seconds(start: Start) -> None:
    relay = start("--paramserver.upstream", "tcp://127.0.0.1:1").started()
    begin_s = time.monotonic()
    assert relay.end() == 0
    assert time.monotonic() - begin_s < 10.0


def test_it_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    launcher = (
        "import os, subprocess, sys\n"
        "flags = ['--parent-pid', str(os.getpid()), *sys.argv[1:]]\n"
        "child = subprocess.Popen([sys.executable, '-m', 'services.paramserver', *flags])\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    flags = ["--run_dir", str(tmp_path), "--ops.port", "0", "--wire.paramserver_bind", f"ipc://{tmp_path}/ps"]
    parent = subprocess.Popen(
        [sys.executable, "-c", launcher, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stderr is not None
        while " serving " not in (line := parent.stderr.readline()):
            assert line, "it did not start"
        parent.kill()
        rest = parent.stderr.read()  # until the server, which inherited it, has ended too
    assert "parent process is gone" in rest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--paramserver.hold_s", "-1"], "paramserver.hold_s"),
        (["--paramserver.hold"], "--paramserver.hold: unknown key; did you mean paramserver.hold_s"),
        (
            ["--wire.paramserver_bind", "tcp://192.0.2.1:5556"],
            "wire.paramserver_bind = 'tcp://192.0.2.1:5556': cannot listen",
        ),
        (
            ["--ops.host", "192.0.2.1", "--wire.paramserver_bind", "tcp://127.0.0.1:*"],
            "ops.host = '192.0.2.1'",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    command = [sys.executable, "-m", "services.paramserver", "--run_dir", str(tmp_path), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
