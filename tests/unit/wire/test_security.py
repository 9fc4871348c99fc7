"""Keys are what their standards say, fit together or are refused, and open the door to their role only."""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import zmq

from services.config import RunConfig
from services.ops.metrics import AUTH_FAILURES
from services.wire import keygen
from services.wire.arrivals import Arrivals
from services.wire.keys import ADMITTED, PEERS, ROLES, Keys, Role, load_keys, public_of, secret_of
from services.wire.security import ZAP, Doorkeeper, Handshakes, Refused
from services.wire.sockets import Replier, Requester, RolloutReceiver, RolloutSender
from tests.unit.learner.waiting import until
from tests.unit.wire import reference
from tests.unit.wire.sending import send, sender_to

SEED = b"0123456789abcdef" * 3
LIMIT = 1 << 20


def pair(role: Role, seed: bytes = SEED) -> dict[str, bytes]:
    """The two files of ``role``."""
    secret = secret_of(seed, role)
    return {f"{role}.secret": secret, f"{role}.public": public_of(secret)}


def directory(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def own_part(role: Role, seed: bytes = SEED) -> dict[str, bytes]:
    """No more than a pod of ``role`` needs."""
    files = {f"{peer}.public": pair(peer, seed)[f"{peer}.public"] for peer in PEERS[role] if peer != role}
    return files | {f"{role}.secret": pair(role, seed)[f"{role}.secret"]}


# --- derivation --------------------------------------------------------------------------------------


def test_the_references_of_these_tests_give_what_their_standards_print() -> None:
    # RFC 7748, 5.2 and 6.1; RFC 7693, appendix A; ZeroMQ RFC 32.
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    u = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    product = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert reference.x25519(scalar, u).hex() == product
    once = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert reference.x25519(reference.BASE_POINT).hex() == once
    abc = (
        "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1"
        "7d87c5392aab792dc252d5de4533cc9518d38aa8dbf1925ab92386edd4009923"
    )
    assert reference.blake2b(b"abc", 64).hex() == abc
    assert reference.z85(bytes.fromhex("864fd26fb559f75b")) == "HelloWorld"


@pytest.mark.parametrize("seed", [b"s" * 32, SEED, bytes(range(64))])
def test_the_keys_of_a_role_are_those_that_the_standards_derive_from_the_seed(seed: bytes) -> None:
    for role in ROLES:
        secret = reference.blake2b(role.encode(), 32, key=seed, person=b"impala-curve")
        assert secret_of(seed, role).decode() == reference.z85(secret)
        assert public_of(secret_of(seed, role)).decode() == reference.z85(reference.x25519(secret))


def test_no_two_roles_nor_two_seeds_share_a_key() -> None:
    seeds = [SEED, SEED[:-1] + b"!", b"s" * 32]
    assert len({secret_of(seed, role) for seed in seeds for role in ROLES}) == len(seeds) * len(ROLES)


# --- who meets whom ----------------------------------------------------------------------------------


def test_whoever_is_let_in_knows_the_key_of_the_door_and_the_other_way_round() -> None:
    for server, clients in ADMITTED.items():
        assert set(clients) <= set(PEERS[server])
        for client in clients:
            assert server in PEERS[client]
    for client in ROLES:
        for server in PEERS[client]:
            assert client in PEERS[server]


def test_a_learner_hears_actors_only_and_a_parameter_server_everybody() -> None:
    assert ADMITTED == {
        "learner": ("actor",),
        "paramserver": ("actor", "learner", "evaluator", "paramserver"),
    }


# --- loading -----------------------------------------------------------------------------------------


def test_without_a_directory_there_are_no_keys() -> None:
    assert load_keys(None, "actor") is None


@pytest.mark.parametrize("role", ROLES)
def test_pairs_of_files_are_the_same_keys_as_the_seed_that_they_follow_from(
    role: Role, tmp_path: Path
) -> None:
    from_seed = load_keys(directory(tmp_path / "seed", {"seed": SEED}), role)
    from_files = load_keys(directory(tmp_path / "files", own_part(role)), role)
    assert from_seed == from_files
    assert from_seed is not None
    assert set(from_seed.public) == {role, *PEERS[role]}
    assert from_seed.secret == secret_of(SEED, role)
    assert from_seed.public[role] == public_of(from_seed.secret)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_end_of_the_line_is_no_part_of_a_key_or_of_a_seed(end: bytes, tmp_path: Path) -> None:
    plain = load_keys(directory(tmp_path / "plain", {"seed": SEED}), "learner")
    ended = {name: key + end for name, key in own_part("learner").items()}
    assert load_keys(directory(tmp_path / "seed", {"seed": SEED + end}), "learner") == plain
    assert load_keys(directory(tmp_path / "files", ended), "learner") == plain


@pytest.mark.parametrize("size", [32, 64])
def test_the_shortest_and_the_longest_seed_are_taken(size: int, tmp_path: Path) -> None:
    assert load_keys(directory(tmp_path, {"seed": b"x" * size}), "actor") is not None


@pytest.mark.parametrize("last", [b"\n", b"\r", b"\r\n", b"\n\n"])
def test_random_bytes_that_end_like_a_line_are_a_seed(last: bytes, tmp_path: Path) -> None:
    seed = b"x" * (32 - len(last)) + last
    loaded = load_keys(directory(tmp_path, {"seed": seed}), "actor")
    assert loaded is not None
    assert loaded.secret == secret_of(seed, "actor")


def test_a_seed_loses_no_more_than_the_end_of_one_line(tmp_path: Path) -> None:
    loaded = load_keys(directory(tmp_path, {"seed": b"x" * 40 + b"\n\n"}), "actor")
    assert loaded is not None
    assert loaded.secret == secret_of(b"x" * 40 + b"\n", "actor")


def test_a_pod_reads_no_file_that_it_does_not_need(tmp_path: Path) -> None:
    files = own_part("actor") | {"learner.secret": b"rubbish", "evaluator.public": b"rubbish"}
    assert load_keys(directory(tmp_path, files), "actor") is not None


def test_a_file_that_anybody_may_read_is_taken_as_secrets_are_mounted_so(tmp_path: Path) -> None:
    (directory(tmp_path, {"seed": SEED}) / "seed").chmod(0o444)
    assert load_keys(tmp_path, "actor") is not None


ACTOR = own_part("actor")
KEY = r"40 characters of Z85 \(`impala keygen`\)$"
SIZES = r"allowed is 32 to 64, random \(`impala keygen --seed`\)$"


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, r"holds neither seed nor actor\.secret; allowed is one of them$"),
        ({"learner.secret": ACTOR["actor.secret"]}, r"holds neither seed nor actor\.secret"),
        (ACTOR | {"seed": SEED}, r"holds both seed and actor\.secret; allowed is one of them$"),
        ({"seed": b""}, rf"seed has 0 bytes; {SIZES}"),
        ({"seed": b"x" * 30 + b"\n"}, rf"seed has 31 bytes; {SIZES}"),
        ({"seed": b"x" * 65}, rf"seed has 65 bytes; {SIZES}"),
        ({"seed": b"x" * 65 + b"\n"}, rf"seed has 65 bytes; {SIZES}"),
        (ACTOR | {"actor.secret": b""}, rf"actor\.secret is no key; allowed is {KEY}"),
        (ACTOR | {"actor.secret": ACTOR["actor.secret"][:-1]}, rf"actor\.secret is no key; allowed is {KEY}"),
        (ACTOR | {"learner.public": b"x" * 45}, rf"learner\.public is no key; allowed is {KEY}"),
        (ACTOR | {"learner.public": b"x" * 39 + b" "}, rf"learner\.public is no key; allowed is {KEY}"),
        (
            ACTOR | {"learner.public": b"x" * 38 + b"\xc3\xa9"},
            rf"learner\.public is no key; allowed is {KEY}",
        ),
        (ACTOR | {"learner.public": b"#" * 40}, rf"learner\.public is no key; allowed is {KEY}"),  # over 2^32
        (
            ACTOR | {"actor.public": pair("learner")["learner.public"]},
            r"actor\.public does not belong to actor\.secret; allowed is the two files of one pair$",
        ),
        (
            ACTOR | {"learner.public": ACTOR["paramserver.public"]},
            r"learner and paramserver have the same key; allowed is a key of its own for each role$",
        ),
        (
            ACTOR | {"paramserver.public": pair("actor")["actor.public"]},
            r"paramserver and actor have the same key; allowed is a key of its own for each role$",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_never_shown(
    files: dict[str, bytes], complaint: str, tmp_path: Path
) -> None:
    directory(tmp_path, files)
    with pytest.raises(ValueError, match=rf"^wire\.keys = '{tmp_path}': {complaint}") as refused:
        load_keys(tmp_path, "actor")
    for content in files.values():
        assert len(content) < 5 or content.decode(errors="replace") not in str(refused.value)


@pytest.mark.parametrize("name", ["learner.public", "paramserver.public"])
def test_a_key_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    (directory(tmp_path, ACTOR) / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(No such file or directory\); allowed is"):
        load_keys(tmp_path, "actor")


def test_keys_without_a_libzmq_that_encrypts_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory(tmp_path, {"seed": SEED})
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    with pytest.raises(ValueError, match=rf"^wire\.keys = '{tmp_path}': this libzmq cannot encrypt; "):
        load_keys(tmp_path, "actor")
    assert load_keys(None, "actor") is None


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    complaint = rf"^wire\.keys = '{tmp_path}/no': cannot be read \(No such file or directory\); allowed is a"
    with pytest.raises(ValueError, match=complaint):
        load_keys(tmp_path / "no", "actor")


def test_a_directory_at_which_nobody_may_look_is_refused_like_one_that_is_missing(tmp_path: Path) -> None:
    # In place of one that may not be entered, because root enters all.
    with pytest.raises(ValueError, match=r"cannot be read \(File name too long\); allowed is a readable dir"):
        load_keys(tmp_path / ("x" * 300), "actor")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be read \(Not a directory\)"):
        load_keys(tmp_path / "file", "actor")


def test_the_secret_is_no_part_of_what_is_shown_of_keys(tmp_path: Path) -> None:
    keys = load_keys(directory(tmp_path, {"seed": SEED}), "actor")
    assert keys is not None
    assert keys.secret.decode() not in repr(keys)
    assert "learner" in repr(keys)


# --- new keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("seed", [True, False])
def test_new_keys_are_such_as_every_role_can_load(seed: bool, role: Role, tmp_path: Path) -> None:
    keygen.write_keys(tmp_path / "keys", keygen.new_keys(seed=seed))
    assert load_keys(tmp_path / "keys", role) is not None


def test_new_keys_are_never_the_same_again() -> None:
    assert keygen.new_keys(seed=True) != keygen.new_keys(seed=True)
    contents = [*keygen.new_keys(seed=False).values(), *keygen.new_keys(seed=False).values()]
    assert len(set(contents)) == len(contents) == 4 * len(ROLES)


# --- the count of failures ---------------------------------------------------------------------------


class Door:
    """Connections as libzmq reports them, and the failures that follow."""

    def __init__(self) -> None:
        self.addresses: dict[int, str] = {}
        self.arrivals = Arrivals(handshake_s=10.0, address_of=self.addresses.get)
        self.now_s = 100.0

    def failed(self) -> int:
        return self.arrivals.failed(self.now_s)[0]

    def unexplained(self) -> int:
        return self.arrivals.failed(self.now_s)[1]

    def accept(self, *connections: int) -> None:
        for connection in connections:
            self.arrivals.accepted(connection, self.now_s)

    def succeed(self) -> None:
        self.arrivals.resolved()


def test_a_connection_that_ends_before_its_handshake_does_has_failed() -> None:
    door = Door()
    door.accept(5)
    assert door.failed() == 0
    door.arrivals.ended(5)
    assert door.failed() == 1
    assert door.failed() == 0


def test_a_connection_that_ends_after_its_handshake_has_not_failed() -> None:
    door = Door()
    door.accept(5)
    door.succeed()
    door.arrivals.ended(5)
    assert door.failed() == 0
    door.accept(6)
    door.succeed()
    door.now_s += 1000
    assert door.failed() == 0
    door.arrivals.ended(6)
    assert door.failed() == 0


def test_a_failure_among_young_connections_is_counted_once_they_are_old() -> None:
    door = Door()
    door.accept(5, 6)
    door.succeed()  # 5 or 6, which nobody tells
    door.arrivals.ended(6)
    assert door.failed() == 0  # 5 may still be in it
    door.now_s += 10.1
    assert door.failed() == 1
    door.arrivals.ended(5)
    assert door.failed() == 0


def test_a_failure_that_counts_late_is_not_explained_twice() -> None:
    door = Door()
    door.accept(5, 6)
    door.succeed()
    door.arrivals.ended(6)
    door.arrivals.explained()
    assert door.unexplained() == 0
    door.now_s += 10.1  # only now it counts
    assert door.arrivals.failed(door.now_s) == (1, 0)
    door.accept(7)
    door.arrivals.ended(7)  # without a word
    assert door.arrivals.failed(door.now_s) == (1, 1)


def test_what_is_told_of_one_that_was_refused_explains_no_other() -> None:
    door = Door()
    door.accept(5)
    door.succeed()
    door.arrivals.ended(5)
    door.arrivals.explained()
    assert door.arrivals.failed(door.now_s) == (0, 0)
    door.accept(6)
    door.arrivals.ended(6)
    assert door.arrivals.failed(door.now_s) == (1, 1)


def test_the_number_of_a_connection_may_come_again() -> None:
    door = Door()
    for _ in range(3):
        door.accept(5)
        door.arrivals.ended(5)
    assert door.failed() == 3


def test_the_address_of_a_connection_is_known_at_its_end_if_it_was_open_when_looked_up() -> None:
    door = Door()
    door.addresses |= {5: "10.0.0.5"}
    door.accept(5)
    door.arrivals.no_news()
    door.addresses.clear()
    assert door.arrivals.ended(5) == "10.0.0.5"
    assert door.arrivals.ended(5) is None


def test_an_address_that_may_be_the_next_connections_is_not_told() -> None:
    door = Door()
    door.addresses |= {5: "10.0.0.6"}  # the first one has ended by the time that it is looked up
    door.accept(5)
    assert door.arrivals.ended(5) is None
    door.accept(5)
    door.arrivals.no_news()
    assert door.arrivals.ended(5) == "10.0.0.6"


# --- the door ----------------------------------------------------------------------------------------


class Server:
    """A parameter server's or a learner's socket with its doorkeeper, in the test's own process."""

    def __init__(
        self, keys: Keys | None, endpoint: str = "tcp://127.0.0.1:*", most_bytes: int = LIMIT
    ) -> None:
        self.refused: Counter[Refused] = Counter()
        self.door = Doorkeeper(keys, lambda reason: self.refused.update([reason]))
        try:
            self.replier = Replier(endpoint, most_bytes, self.door)
        except ValueError:
            self.door.close()
            raise
        self.endpoint = self.replier.endpoint
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.door.run, args=(self._stopping,))
        self._thread.start()

    def close(self) -> None:
        if self._stopping.is_set():
            return
        self.replier.close()
        self._stopping.set()
        self._thread.join()
        self.door.close()

    def role_of_next(self) -> str | None:
        request = self.replier.receive(10.0)
        assert request is not None
        return request[2]


Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def start(*arguments: Any) -> Server:
        servers.append(Server(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def keys(tmp_path: Path) -> Callable[..., Keys]:
    """``keys("actor")``: of one run; ``keys("actor", b"another seed")``: of another one."""

    def make(role: Role, seed: bytes = SEED) -> Keys:
        loaded = load_keys(directory(tmp_path / str(hash(seed)), {"seed": seed}), role)
        assert loaded is not None
        return loaded

    return make


MakeKeys = Callable[..., Keys]
STRANGE = b"stranger" * 4


@pytest.mark.parametrize("role", ADMITTED["paramserver"])
def test_every_message_tells_the_role_of_its_sender(role: Role, serve: Serve, keys: MakeKeys) -> None:
    server = serve(keys("paramserver"))
    with Requester(server.endpoint, LIMIT, keys(role)) as client:
        assert client.send([b"one", b"two"], 10.0)
        assert server.role_of_next() == role
        assert client.trouble is None
    assert not server.refused


def test_each_reason_of_a_refusal_is_counted_from_the_start() -> None:
    assert set(AUTH_FAILURES) == set(get_args(Refused))


def test_without_keys_there_are_no_roles(serve: Serve) -> None:
    server = serve(None)
    with Requester(server.endpoint, LIMIT) as client:
        assert client.send([b"one"], 10.0)
        assert server.role_of_next() is None
    assert not server.refused


def refused_as(server: Server, client: Requester, reason: Refused, trouble: str) -> None:
    """Nothing leaves the client, which knows why; the server counts that reason and no other one."""
    assert not client.send([b"x"], 0.3)
    until(lambda: not client.send([b"x"], 0.0) and trouble in (client.trouble or ""), trouble)
    until(lambda: server.refused, "a refusal")  # the doorkeeper may be later than the client
    assert set(server.refused) == {reason}
    assert server.replier.receive(0.0) is None


def test_an_unknown_key_is_refused(serve: Serve, keys: MakeKeys) -> None:
    server = serve(keys("paramserver"))
    stranger = keys("actor", STRANGE)
    ours = Keys(
        role="actor",
        secret=stranger.secret,
        public={**keys("actor").public, "actor": stranger.public["actor"]},
    )
    with Requester(server.endpoint, LIMIT, ours) as client:
        refused_as(server, client, "unknown_key", "the server does not know our key")
        assert server.refused["unknown_key"] == 1  # not a handshake besides, nor one more a moment later


def test_a_role_that_is_not_met_is_an_unknown_key(keys: MakeKeys) -> None:
    refused: Counter[Refused] = Counter()
    door = Doorkeeper(keys("learner"), lambda reason: refused.update([reason]))
    stopping = threading.Event()
    with closing(door), RolloutReceiver("tcp://127.0.0.1:*", 2, LIMIT, door) as receiver:
        thread = threading.Thread(target=door.run, args=(stopping,))
        thread.start()
        posing = Keys(
            role="evaluator",
            secret=keys("evaluator").secret,
            public={**keys("evaluator").public, "learner": keys("learner").public["learner"]},
        )
        with sender_to(receiver.endpoint, keys=posing) as sender:
            assert not send(sender, [b"x"], 0.3)
            until(lambda: refused, "a refusal")
        with sender_to(receiver.endpoint, keys=keys("actor")) as sender:
            assert send(sender, [b"x"], 10.0)
            assert receiver.receive(10.0) == [b"x"]
        stopping.set()
        thread.join()
    assert refused == {"unknown_key": 1}


def test_a_client_without_keys_is_refused(serve: Serve, keys: MakeKeys) -> None:
    server = serve(keys("paramserver"))
    with Requester(server.endpoint, LIMIT) as client:
        refused_as(server, client, "handshake", "one side has wire.keys and the other has none")


def test_a_client_with_keys_does_not_talk_to_a_server_without(serve: Serve, keys: MakeKeys) -> None:
    server = serve(None)
    with Requester(server.endpoint, LIMIT, keys("actor")) as client:
        refused_as(server, client, "handshake", "one side has wire.keys and the other has none")


def test_a_client_of_another_run_is_refused(serve: Serve, keys: MakeKeys) -> None:
    server = serve(keys("paramserver"))
    with Requester(server.endpoint, LIMIT, keys("actor", STRANGE)) as client:
        refused_as(server, client, "handshake", "the peer closed the connection; has it other keys?")


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n" * 10, b"\xff" * 200, b"\0" * 64])
def test_what_is_no_zeromq_is_counted_once(garbage: bytes, keyed: bool, serve: Serve, keys: MakeKeys) -> None:
    server = serve(keys("paramserver") if keyed else None)
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(garbage)
    until(lambda: server.refused, "a refusal")
    with Requester(server.endpoint, LIMIT, keys("actor") if keyed else None) as client:
        assert client.send([b"x"], 10.0)
        server.role_of_next()
    assert server.refused == {"handshake": 1}


def test_a_stranger_fills_no_more_than_32_mib_by_default(
    serve: Serve, keys: MakeKeys, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(keys("paramserver"), "tcp://127.0.0.1:*", RunConfig().wire.max_message_bytes)
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    long_command = b"\x06" + struct.pack(">Q", 32 * 2**20 + 1)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(greeting + long_command)
        until(lambda: server.refused, "it is cut off")
    assert server.refused == {"handshake": 1}
    assert "no end of it" not in caplog.text  # as where the rest is waited for


def restarted(serve: Serve, keys: Keys | None, endpoint: str) -> Server | None:
    """A new server where another one was; libzmq gives its port back a moment after it is closed."""
    try:
        return serve(keys, endpoint)
    except ValueError:
        return None


@pytest.mark.parametrize("first", ["stranger", "none"])
def test_a_client_gets_in_once_the_server_has_the_right_keys(
    first: str, serve: Serve, keys: MakeKeys
) -> None:
    # libzmq gives up a refused endpoint for good; see `Handshakes`.
    server = Server(keys("paramserver", STRANGE) if first == "stranger" else None)
    with Requester(server.endpoint, LIMIT, keys("actor")) as client:
        assert not client.send([b"x"], 0.3)
        until(lambda: server.refused, "a refusal")
        server.close()
        server = until(lambda: restarted(serve, keys("paramserver"), server.endpoint), "the port is free")
        until(lambda: client.send([b"x"], 0.1), "a connection")
        assert server.role_of_next() == "actor"
        assert client.trouble is None


def test_what_was_wrong_with_a_server_that_has_gone_is_not_said_any_more(
    serve: Serve, keys: MakeKeys
) -> None:
    server = serve(keys("paramserver"))
    with Requester(server.endpoint, LIMIT) as client:
        until(lambda: client.trouble, "it is refused")
        server.close()
        until(lambda: not client.send([b"x"], 0.0) and client.trouble is None, "nobody is there")


def test_only_a_connection_that_had_been_made_can_break(serve: Serve, keys: MakeKeys) -> None:
    ours, stranger = keys("paramserver"), keys("paramserver", STRANGE)
    server = serve(ours)
    with Requester(server.endpoint, LIMIT, keys("actor")) as client:
        assert client.send([b"x"], 15.0)
        assert client.breaks == 0
        server.close()
        until(lambda: client.breaks == 1, "it is noticed")
        refusing = until(lambda: restarted(serve, stranger, server.endpoint), "the port is free")
        until(lambda: client.trouble and refusing.refused, "a refusal")
        refusing.close()
        server = until(lambda: restarted(serve, ours, server.endpoint), "the port is free")
        until(lambda: client.send([b"x"], 0.1), "a connection")
        assert client.breaks == 1
        server.close()
        until(lambda: client.breaks == 2, "it is noticed again")


def test_a_name_without_an_address_is_told_from_nobody_who_is_there() -> None:
    with Requester("tcp://no..name:5556", LIMIT) as client:  # a name that no resolver is asked for
        until(lambda: not client.send([b"x"], 0.0) and client.trouble, "it is noticed")
        assert client.trouble is not None
        assert client.trouble.startswith("cannot try tcp://no..name:5556: its name does not resolve")


class Told:
    """In place of what libzmq reports: these events, once."""

    def __init__(self, *events: zmq.Event) -> None:
        self._events = events
        self.looks = 0

    def take(self) -> Iterator[tuple[int, int, str]]:
        self.looks += 1
        events, self._events = self._events, ()
        return ((event, 0, "tcp://server:5556") for event in events)


@contextmanager
def handshakes_of(told: Told) -> Iterator[Handshakes]:
    with Requester("tcp://127.0.0.1:1", LIMIT) as client:
        handshakes = client._handshakes
        assert handshakes is not None
        true, handshakes._events = handshakes._events, told  # type: ignore[assignment]
        try:
            yield handshakes
        finally:
            handshakes._events = true  # which is closed in its turn, or libzmq would wait for it


@pytest.mark.parametrize(
    ("events", "is_lost"),
    [
        ("RETRIED", True),
        ("RETRIED RETRIED", True),
        ("RETRIED DELAYED", False),
        ("DELAYED CLOSED RETRIED", False),
        ("CLOSED RETRIED", False),
        ("DELAYED CLOSED RETRIED RETRIED", True),
        ("RETRIED DELAYED CLOSED", False),
        ("RETRIED DELAYED HANDSHAKE_SUCCEEDED", False),
        ("DELAYED HANDSHAKE_SUCCEEDED DISCONNECTED RETRIED", False),
        ("DELAYED HANDSHAKE_SUCCEEDED DISCONNECTED RETRIED RETRIED", True),
        ("RETRIED DELAYED CLOSED RETRIED DELAYED", False),
    ],
)
@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_name_is_lost_if_an_attempt_ended_that_had_not_begun(
    scheme: str, events: str, *, is_lost: bool
) -> None:
    names = [f"CONNECT_{name}" if name in ("RETRIED", "DELAYED") else name for name in events.split()]
    with handshakes_of(Told(*(zmq.Event[name] for name in names))) as handshakes:
        handshakes._endpoint = f"{scheme}://server:5556"
        lost = "cannot try tcp://server:5556: its name does not resolve, or no file is left to open"
        assert handshakes.trouble == (lost if is_lost and scheme == "tcp" else None)


def test_who_sends_does_not_look_each_time_whether_it_was_refused() -> None:
    clock = iter([100.0, 100.0, 100.1, 100.2, 100.3, 100.3, 100.4, 100.6, 100.6])
    told = Told()
    with handshakes_of(told) as handshakes:
        handshakes._clock = lambda: next(clock)
        for _ in range(6):
            handshakes.take_given_up(2.0)
    assert told.looks == 3  # at 100.0, 100.3 and 100.6
    assert not list(clock)


def by_name(endpoint: str) -> str:
    """As in a cluster, where no pod knows another one's address."""
    return endpoint.replace("127.0.0.1", "localhost")


def hostile(keys: Keys, to: Role) -> Keys:
    """Of the same server, to which ``to`` is a stranger."""
    other = public_of(secret_of(STRANGE, to))
    return Keys(role=keys.role, secret=keys.secret, public={**keys.public, to: other})


@pytest.mark.parametrize("refuses", ["the key", "all keys"])
def test_a_client_that_was_in_gets_in_again_after_it_was_refused(
    refuses: str, serve: Serve, keys: MakeKeys
) -> None:
    # libzmq tells a connection that was there once by its address, and disconnects only by name.
    ours = keys("paramserver")
    server = serve(ours)
    with Requester(by_name(server.endpoint), LIMIT, keys("actor")) as client:
        assert client.send([b"x"], 15.0)
        assert server.role_of_next() == "actor"
        for held in (hostile(ours, "actor") if refuses == "the key" else None, ours):
            server.close()
            server = until(lambda: restarted(serve, held, server.endpoint), "the port is free")  # noqa: B023
            if held is not ours:
                until(lambda: client.trouble and server.refused, "a refusal")  # noqa: B023
        until(lambda: client.send([b"x"], 0.1), "a connection")
        assert server.role_of_next() == "actor"
        assert client.trouble is None


def test_an_actor_that_was_refused_for_a_while_sends_rollouts_again(keys: MakeKeys) -> None:
    endpoint = "tcp://127.0.0.1:*"
    ours = keys("learner")
    sender: RolloutSender | None = None
    for held in (ours, hostile(ours, "actor"), ours):
        refused: Counter[Refused] = Counter()
        door = Doorkeeper(held, lambda reason: refused.update([reason]))  # noqa: B023
        receiver = until(lambda: listening(endpoint, door), "the port is free")  # noqa: B023
        endpoint = receiver.endpoint
        stopping = threading.Event()
        thread = threading.Thread(target=door.run, args=(stopping,))
        thread.start()
        sender = sender or sender_to(by_name(endpoint), keys=keys("actor"))
        if held is ours:
            until(lambda: send(sender, [b"x"], 0.1), "a connection")  # noqa: B023
            assert receiver.receive(15.0) == [b"x"]
        else:
            until(lambda: sender.trouble and refused, "a refusal")  # noqa: B023
        receiver.close()
        stopping.set()
        thread.join()
        door.close()
    assert sender is not None
    sender.close()


def listening(endpoint: str, door: Doorkeeper) -> RolloutReceiver | None:
    """A learner's socket, once the port is free."""
    try:
        return RolloutReceiver(endpoint, 2, LIMIT, door)
    except ValueError:
        return None


def test_a_server_whose_doorkeeper_is_gone_lets_nobody_in(keys: MakeKeys) -> None:
    server = Server(keys("paramserver"))
    with Requester(server.endpoint, LIMIT, keys("actor")) as friend:
        assert friend.send([b"x"], 10.0)
        assert server.role_of_next() == "actor"
        server._stopping.set()
        server._thread.join()
        assert server.door._questions is not None
        server.door._questions.unbind(ZAP)
        with Requester(server.endpoint, LIMIT, keys("actor")) as late:
            assert not late.send([b"x"], 0.5)
            until(lambda: "closed the connection" in (late.trouble or ""), "it is refused")  # not just slow
        assert friend.send([b"x"], 10.0)  # who is in stays in
        assert server.role_of_next() == "actor"
    server.replier.close()


def test_the_log_names_the_address_of_an_unknown_key_and_no_key(
    serve: Serve, keys: MakeKeys, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(keys("paramserver"))
    stranger = keys("actor", STRANGE)
    ours = Keys(
        role="actor",
        secret=stranger.secret,
        public={**keys("actor").public, "actor": stranger.public["actor"]},
    )
    with caplog.at_level(logging.DEBUG, "impala"), Requester(server.endpoint, LIMIT, ours) as client:
        refused_as(server, client, "unknown_key", "the server does not know our key")
    fields = [record.__dict__["fields"] for record in caplog.records if record.message == "unknown_key"]
    assert fields == [{"address": "127.0.0.1"}]
    for secret in (stranger.secret, keys("paramserver").secret):
        assert secret.decode() not in str([record.__dict__ for record in caplog.records])
