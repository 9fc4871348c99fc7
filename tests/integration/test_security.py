"""A system with keys trains and recovers like any other; strangers stay outside and are counted."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from services.local.plan import reserved_ports
from services.wire import keygen
from services.wire.codec import Expected, decode, encode
from services.wire.keys import PEERS, ROLES, Keys, Role, load_keys
from services.wire.messages import Client, Publish, Published, Refusal
from services.wire.security import HANDSHAKE_S
from services.wire.sockets import Requester
from tests.integration.conftest import StartPod
from tests.integration.system import START_S, Pod, get, scrape
from tests.unit.learner.waiting import until
from tests.unit.wire.sending import send, sender_to

pytestmark = pytest.mark.integration

LIMIT = 1 << 24
FOREVER = ("--total_steps", "1000000000", "--paramserver.seat_lease_s", "15")
REASONS = ("unknown_key", "handshake")


@pytest.fixture
def two_ports() -> Iterator[list[int]]:
    """The learner's and the parameter server's; nobody else's while the test runs."""
    with reserved_ports(0, 2) as ports:
        yield ports


KeysFor = Callable[[Role], Path]


@pytest.fixture(params=["one seed", "a directory each"])
def keys_for(request: pytest.FixtureRequest, tmp_path: Path) -> KeysFor:
    """The directory of a role's keys: the same for all, or one with no file that the role does not need."""
    common = tmp_path / "keys"
    keygen.write_keys(common, keygen.new_keys(seed=request.param == "one seed"))
    if request.param == "one seed":
        return lambda role: common

    def own(role: Role) -> Path:
        directory = tmp_path / f"keys-{role}"
        directory.mkdir(exist_ok=True)
        needed = {f"{role}.secret", *(f"{peer}.public" for peer in PEERS[role] if peer != role)}
        for name in needed:
            (directory / name).write_bytes((common / name).read_bytes())
        assert {file.name for file in directory.iterdir()} == needed
        return directory

    return own


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """A run's keys in the shortest form."""
    keygen.write_keys(tmp_path / "keys", keygen.new_keys(seed=True))
    return tmp_path / "keys"


def keys_of(directory: Path, role: Role) -> Keys:
    keys = load_keys(directory, role)
    assert keys is not None
    return keys


def over_tcp(ports: list[int]) -> list[str]:
    learner, paramserver = (f"tcp://127.0.0.1:{port}" for port in ports)
    return [
        *("--wire.learner_bind", learner),
        *("--wire.paramserver_bind", paramserver, "--wire.paramserver_endpoint", paramserver),
    ]


def failures(pod: Pod) -> Counter[str]:
    samples = scrape(pod.port)
    assert samples, f"it does not answer; its log:\n{pod.log()}"
    return Counter({r: int(samples[f'impala_auth_failures_total{{reason="{r}"}}']) for r in REASONS})


def trains(learner: Pod, paramserver: Pod) -> None:
    """From now on, by ten updates and a version."""
    updates = learner.value("learner_updates_total")
    version = paramserver.value("paramserver_version")
    until(lambda: learner.value("learner_updates_total") > updates + 10, "training", START_S)
    until(lambda: paramserver.value("paramserver_version") > version, "publishing", START_S)


# --- members -----------------------------------------------------------------------------------------


def test_every_pod_of_a_system_with_keys_works_and_comes_back(
    start_pod: StartPod, two_ports: list[int], keys_for: KeysFor
) -> None:
    def start(role: Role) -> Pod:
        flags = [*over_tcp(two_ports), *FOREVER, "--wire.keys", str(keys_for(role))]
        return start_pod(role, *flags, "--ops.log_level", "debug")

    pods: dict[Role, Pod] = {role: start(role) for role in ROLES}
    everyone = [*pods.values()]
    until(lambda: all(pod.ready() for pod in pods.values()), "all are ready", START_S)
    trains(pods["learner"], pods["paramserver"])
    for role in ("actor", "paramserver", "learner"):
        pods[role].end()
        pods[role] = start(role)
        everyone.append(pods[role])
        until(pods[role].ready, f"the new {role} is ready", START_S)
        trains(pods["learner"], pods["paramserver"])
    until(pods["evaluator"].ready, "the evaluator is ready", START_S)
    assert not failures(pods["learner"])["unknown_key"]
    assert not failures(pods["paramserver"])["unknown_key"]
    for pod in pods.values():
        pod.terminate()
    for pod in pods.values():
        assert pod.exit_code(START_S) == 0, pod.log()
        assert not pod.lines("failed"), pod.log()
    secrets = {
        file.name: file.read_text().strip()
        for role in ROLES
        for file in keys_for(role).iterdir()
        if file.name == "seed" or file.suffix == ".secret"
    }
    assert set(secrets) in ({"seed"}, {f"{role}.secret" for role in ROLES})
    for pod in everyone:
        told = pod.log()
        assert told
        assert not [name for name, secret in secrets.items() if secret in told]


def test_a_relay_and_an_actor_behind_it_have_keys_too(
    start_pod: StartPod, two_ports: list[int], keys_for: KeysFor
) -> None:
    def start(role: Role, *flags: str) -> Pod:
        flags = (*over_tcp(two_ports), *FOREVER, "--wire.keys", str(keys_for(role)), *flags)
        return start_pod(role, *flags)

    with reserved_ports(0, 1) as (port,):
        relay = f"tcp://127.0.0.1:{port}"
        upstream = f"tcp://127.0.0.1:{two_ports[1]}"
        paramserver, learner = start("paramserver"), start("learner")
        start("paramserver", "--wire.paramserver_bind", relay, "--paramserver.upstream", upstream)
        start("actor", "--wire.paramserver_endpoint", relay)
        until(lambda: learner.value("learner_updates_total") > 0, "training", START_S)
        trains(learner, paramserver)
        assert not failures(paramserver)["unknown_key"]


# --- strangers ---------------------------------------------------------------------------------------


@contextmanager
def unharmed(learner: Pod, paramserver: Pod, expected: dict[str, int]) -> Iterator[None]:
    """Each counts exactly these in the meantime, and the training goes on."""
    pods = (learner, paramserver)
    before = [failures(pod) for pod in pods]
    yield
    for pod, count in zip(pods, before, strict=True):
        until(lambda: failures(pod) - count == Counter(expected), f"{expected}", 2 * START_S)  # noqa: B023
    trains(learner, paramserver)
    for pod, count in zip(pods, before, strict=True):
        assert failures(pod) - count == Counter(expected)
        assert not pod.lines("failed"), pod.log()


def knock(ports: list[int], keys: Callable[[Role], Keys | None]) -> None:
    """As an actor at both doors, once, in vain: who does not go on sending never connects anew."""
    learner, paramserver = (f"tcp://127.0.0.1:{port}" for port in ports)
    with (
        sender_to(learner, keys=keys("learner")) as sender,
        Requester(paramserver, LIMIT, keys("paramserver")) as requester,
    ):
        until(lambda: sender.trouble, "it is refused", START_S)
        assert not send(sender, [b"x"], 0.0)
        until(lambda: requester.trouble, "it is refused", START_S)
        assert not requester.send([b"x"], 0.0)


def test_strangers_are_refused_by_reason_and_harm_nobody(
    start_pod: StartPod, two_ports: list[int], seed: Path, tmp_path: Path
) -> None:
    flags = [*over_tcp(two_ports), *FOREVER, "--wire.keys", str(seed)]
    paramserver, learner, actor = (start_pod(role, *flags) for role in ("paramserver", "learner", "actor"))
    until(lambda: learner.value("learner_updates_total") > 20, "training", START_S)
    keygen.write_keys(tmp_path / "other", keygen.new_keys(seed=True))
    ours, other = keys_of(seed, "actor"), keys_of(tmp_path / "other", "actor")

    unknown = replace(other, public={**ours.public, "actor": other.public["actor"]})
    with unharmed(learner, paramserver, {"unknown_key": 1}):
        knock(two_ports, lambda _: unknown)
    with unharmed(learner, paramserver, {"handshake": 1}):  # no key
        knock(two_ports, lambda _: None)
    misled = replace(
        ours, public=dict.fromkeys(ours.public, other.public["learner"]) | {"actor": ours.public["actor"]}
    )
    with ExitStack() as knocks:  # the wrong server key, over and over again
        before = [failures(pod) for pod in (learner, paramserver)]
        knocks.enter_context(sender_to(f"tcp://127.0.0.1:{two_ports[0]}", keys=misled))
        knocks.enter_context(Requester(f"tcp://127.0.0.1:{two_ports[1]}", LIMIT, misled))
        for pod, count in zip((learner, paramserver), before, strict=True):
            until(lambda: (failures(pod) - count)["handshake"] > 3, "it is counted", START_S)  # noqa: B023
            assert not (failures(pod) - count)["unknown_key"]
    trains(learner, paramserver)
    with unharmed(learner, paramserver, {"handshake": 2}):
        for port in two_ports:
            for garbage in (b"GET / HTTP/1.1\r\nHost: learner\r\n\r\n" * 3, bytes(range(256))):
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(garbage)
    greeting = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    with unharmed(learner, paramserver, {"handshake": 2}), ExitStack() as half_open:
        for port in two_ports:
            for begin in (b"", greeting):
                connection = socket.create_connection(("127.0.0.1", port), timeout=3 * HANDSHAKE_S)
                half_open.enter_context(connection).sendall(begin)
                while connection.recv(4096):  # until it is closed at the other end
                    pass
    assert actor.alive
    for pod in (learner, paramserver):
        waited = [
            line for line in pod.lines("handshake_failed") if f"no end of it in {HANDSHAKE_S} s" in line
        ]
        assert "address=127.0.0.1" in waited[0]
        assert "address=127.0.0.1" in pod.lines("unknown_key")[0]
    assert paramserver.value("paramserver_seats") == 1


def test_a_member_publishes_only_as_a_learner(start_pod: StartPod, two_ports: list[int], seed: Path) -> None:
    paramserver = start_pod("paramserver", *over_tcp(two_ports), "--wire.keys", str(seed))
    until(paramserver.ready, "it is up", START_S)
    endpoint = f"tcp://127.0.0.1:{two_ports[1]}"
    expected = Expected(run_id="local", max_message_bytes=LIMIT)

    def publish(role: Role, version: int) -> object:
        sender = Client(client_id="learner", incarnation=1)
        message = Publish(
            run_id="local", sender=sender, state="training", version=version, steps=0, payload=b"weights"
        )
        with Requester(endpoint, LIMIT, keys_of(seed, role)) as requester:
            assert requester.send(encode(message), 10.0)
            frames = requester.receive(10.0)
            assert frames is not None
            return decode(frames, expected)

    others: tuple[Role, ...] = ("actor", "evaluator", "paramserver")
    for count, role in enumerate(others, start=1):
        answer = publish(role, 7)
        assert isinstance(answer, Refusal)
        assert answer.reason == "role"
        assert role in answer.text
        assert paramserver.value("paramserver_refused_requests_total", reason="role") == count
    assert paramserver.value("paramserver_version") == -1
    answer = publish("learner", 3)
    assert isinstance(answer, Published)
    assert answer.version == 3
    assert paramserver.value("paramserver_version") == 3


# --- those who should have had keys ------------------------------------------------------------------


def test_an_actor_without_keys_waits_says_why_and_plays_once_it_may(
    start_pod: StartPod, two_ports: list[int], seed: Path
) -> None:
    flags = [*over_tcp(two_ports), *FOREVER]
    paramserver, learner = (
        start_pod(role, *flags, "--wire.keys", str(seed)) for role in ("paramserver", "learner")
    )
    actor = start_pod("actor", *flags)
    why = "one side has wire.keys and the other has none"
    until(lambda: why in get(actor.port, "/readyz")[1], "/readyz says why", START_S)
    assert get(actor.port, "/healthz")[0] == 200
    until(lambda: any(why in line for line in actor.lines("no_news")), "so does the log", START_S)
    assert not actor.ready()
    for pod in (learner, paramserver):
        pod.terminate()
        assert pod.exit_code(START_S) == 0
    paramserver, learner = (start_pod(role, *flags) for role in ("paramserver", "learner"))
    until(actor.ready, "the actor plays", START_S)
    trains(learner, paramserver)


@pytest.mark.parametrize("role", ROLES)
def test_a_pod_whose_keys_are_missing_ends_at_once_and_says_so(
    role: Role, start_pod: StartPod, tmp_path: Path
) -> None:
    pod = start_pod(role, "--wire.keys", str(tmp_path))
    assert pod.exit_code(START_S) == 2
    assert f"impala {role}: wire.keys = '{tmp_path}': holds neither seed nor {role}.secret" in pod.log()
