"""Weights reach the parameter server, again if need be, and never hold up the training."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from services.learner import publisher as publisher_module
from services.learner.publisher import Publisher, WeightsCopier, tensors_of
from services.wire.messages import (
    NO_VERSION,
    Buffer,
    Client,
    Publish,
    Published,
    Pull,
    Refusal,
    RunState,
    Weights,
)
from services.wire.sockets import Requester
from tests.unit.learner.fake_server import DEADLINE_S, EXPECTED, LIMIT, RUN, FakeServer
from tests.unit.learner.waiting import until

LEARNER = Client(client_id="learner-0", incarnation=5)
ANNOUNCE_S = 0.1
ANSWER_S = 0.7


class Scene:
    """A publisher in its thread, and the server that it talks to."""

    def __init__(self, directory: Path) -> None:
        self.server = FakeServer(directory)
        self.network = nn.Linear(2, 1)
        self.stopping = threading.Event()
        self.publisher = Publisher(
            connect=self.server.connect,
            client=LEARNER,
            expected=EXPECTED,
            copier=WeightsCopier(self.network),
            stopping=self.stopping,
        )
        self.thread = threading.Thread(target=self.publisher.run, daemon=True)

    def train(self, version: int) -> None:
        """What an update does: it changes the weights in place."""
        with torch.no_grad():
            self.network.weight.fill_(version)

    def offer(self, version: int, state: RunState = "training", wait_s: float = 0.0) -> bool:
        self.train(version)
        return self.publisher.offer(version, version * 640, state, wait_s)

    def hold(self, version: int) -> None:
        """The server says what it holds."""
        self.server.answer(Published(run_id=RUN, server_incarnation=1, version=version))

    def next_after(self, version: int) -> Publish:
        """The next one of another version; until then the server says that it holds this one."""
        while (publish := self.server.next(Publish)).version == version:
            self.hold(version)
        return publish

    def stop(self) -> None:
        self.stopping.set()
        self.publisher.wake()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "ANNOUNCE_S", ANNOUNCE_S)
    monkeypatch.setattr(publisher_module, "ANSWER_S", 10 * DEADLINE_S)  # but not with the tests' answers
    monkeypatch.setattr(publisher_module, "POLL_S", 0.01)  # how long stopping takes


@pytest.fixture
def _very_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "ANSWER_S", ANSWER_S)


@pytest.fixture
def unstarted() -> Iterator[Scene]:
    """The server is not there yet, the publisher does not run yet."""
    with tempfile.TemporaryDirectory(prefix="impala-", dir="/tmp") as directory:  # sockets need short paths
        scene = Scene(Path(directory))
        yield scene
        if scene.thread.is_alive():
            scene.stop()
        scene.server.stop()


@pytest.fixture
def scene(unstarted: Scene) -> Scene:
    unstarted.server.start()
    unstarted.thread.start()
    return unstarted


def value_of(publish: Publish) -> float:
    """The number that ``Scene.train`` wrote into the weights."""
    assert publish.payload is not None
    return float(safetensors.torch.load(bytes(publish.payload))["weight"][0, 0])


# --- publishing ------------------------------------------------------------------------------------


def test_an_offered_version_is_published_with_everything_that_belongs_to_it(scene: Scene) -> None:
    scene.network.bias.data.fill_(0.5)
    assert scene.offer(3)
    publish = scene.server.next(Publish)
    assert (publish.run_id, publish.sender, publish.state) == (RUN, LEARNER, "training")
    assert (publish.version, publish.steps) == (3, 1920)
    assert publish.payload is not None
    tensors = safetensors.torch.load(bytes(publish.payload))
    assert tensors.keys() == scene.network.state_dict().keys()
    assert tensors["weight"].equal(torch.full((1, 2), 3.0))
    assert tensors["bias"].equal(torch.full((1,), 0.5))


def test_updates_after_the_offer_are_not_in_what_is_published(unstarted: Scene) -> None:
    unstarted.server.start()
    assert unstarted.offer(1)
    unstarted.train(2)
    unstarted.thread.start()
    assert value_of(unstarted.server.next(Publish)) == 1


def test_while_one_version_is_on_its_way_one_waits_and_the_others_are_skipped(scene: Scene) -> None:
    assert scene.offer(1)
    assert scene.server.next(Publish).version == 1
    assert scene.offer(2, wait_s=DEADLINE_S)
    assert not scene.offer(3)
    assert not scene.offer(4, wait_s=0.01)
    scene.hold(1)
    publish = scene.server.next(Publish)
    assert (publish.version, value_of(publish)) == (2, 2)  # its weights, not those of the skipped ones
    scene.hold(2)
    assert scene.offer(5, wait_s=DEADLINE_S)
    assert scene.next_after(2).version == 5


def test_the_last_version_waits_until_there_is_room_for_it(scene: Scene) -> None:
    scene.offer(1)
    scene.server.next(Publish)
    scene.offer(2, wait_s=DEADLINE_S)
    last = threading.Thread(target=lambda: scene.offer(9, "complete", wait_s=DEADLINE_S))
    last.start()
    scene.hold(1)
    assert scene.server.next(Publish).version == 2
    scene.hold(2)
    publish = scene.next_after(2)
    assert (publish.version, publish.state, value_of(publish)) == (9, "complete", 9)
    last.join(DEADLINE_S)


def test_without_news_the_server_is_asked_now_and_then_and_sent_nothing(scene: Scene) -> None:
    scene.offer(1)
    scene.server.next(Publish)
    answered_s = time.monotonic()
    scene.hold(1)
    announcement = scene.server.next(Publish)
    assert time.monotonic() - answered_s > ANNOUNCE_S / 2
    assert (announcement.version, announcement.steps, announcement.payload) == (1, 640, None)
    scene.hold(1)
    assert scene.server.next(Publish).payload is None


def test_before_the_first_version_nothing_is_announced(scene: Scene) -> None:
    assert scene.server.next_or_none(3 * ANNOUNCE_S) is None


def test_who_has_nothing_to_publish_still_reads_what_happens_to_its_connection(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise libzmq's reports of it would pile up for as long as the server is away."""
    looks: list[Requester] = []

    def mend(requester: Requester) -> None:
        looks.append(requester)

    monkeypatch.setattr(Requester, "mend", mend)
    until(lambda: len(looks) > 1)


# --- servers that forget, fall silent, refuse --------------------------------------------------------


def test_a_restarted_server_that_holds_nothing_gets_the_weights_again(scene: Scene) -> None:
    scene.offer(7)
    scene.server.next(Publish)
    scene.hold(7)
    scene.server.stop()
    scene.server.start()
    announcement = scene.server.next(Publish)
    assert (announcement.version, announcement.payload) == (7, None)
    scene.hold(NO_VERSION)
    again = scene.server.next(Publish)
    assert (again.version, value_of(again)) == (7, 7)
    until(lambda: scene.publisher.held_version == NO_VERSION)
    scene.hold(7)
    until(lambda: scene.publisher.held_version == 7)


def test_a_restarted_server_that_holds_an_older_version_gets_the_newest(scene: Scene) -> None:
    scene.offer(7)
    scene.server.next(Publish)
    scene.hold(7)
    scene.server.next(Publish)
    scene.hold(6)
    assert value_of(scene.server.next(Publish)) == 7


def test_a_server_that_holds_a_newer_version_is_sent_nothing(scene: Scene) -> None:
    # The learner's loop numbers its next version above it.
    scene.offer(7)
    scene.server.next(Publish)
    scene.hold(100)
    until(lambda: scene.publisher.held_version == 100)
    assert scene.server.next(Publish).payload is None
    assert scene.publisher.trouble is None


def test_a_version_that_got_lost_on_its_way_is_sent_again(scene: Scene) -> None:
    scene.offer(4)
    scene.server.next(Publish)
    scene.server.stop()  # before it answered
    scene.server.start()
    assert scene.server.next(Publish).version == 4
    scene.hold(NO_VERSION)
    assert value_of(scene.server.next(Publish)) == 4


def test_what_a_server_took_with_it_is_sent_again_as_soon_as_there_is_one(scene: Scene) -> None:
    assert publisher_module.ANSWER_S > DEADLINE_S
    scene.offer(4)
    scene.server.next(Publish)
    scene.server.stop()
    scene.server.start()
    assert scene.server.next(Publish).version == 4


@pytest.mark.usefixtures("_very_impatient")
def test_a_silent_server_is_trouble_and_is_asked_again_over_a_new_connection(
    unstarted: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected_s: list[float] = []

    def connect() -> Requester:
        if connected_s:
            monkeypatch.setattr(publisher_module, "ANSWER_S", 10 * DEADLINE_S)
        connected_s.append(time.monotonic())
        return unstarted.server.connect()

    unstarted.publisher._connect = connect
    unstarted.server.start()
    unstarted.offer(1)
    unstarted.thread.start()
    unstarted.server.next(Publish)
    first = unstarted.server.peer
    until(lambda: unstarted.publisher.trouble == "parameter server does not answer")
    unstarted.server.next(Publish)
    assert connected_s[1] - connected_s[0] > ANSWER_S
    assert unstarted.server.peer != first
    unstarted.hold(1)
    until(lambda: unstarted.publisher.trouble is None)


@pytest.mark.usefixtures("_very_impatient")
def test_a_server_that_is_not_there_is_trouble_and_is_waited_for(
    unstarted: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    unstarted.thread.start()
    unstarted.offer(1)
    until(lambda: unstarted.publisher.trouble == "parameter server not reachable")
    monkeypatch.setattr(publisher_module, "ANSWER_S", 10 * DEADLINE_S)
    unstarted.server.start()
    assert unstarted.server.next(Publish).version == 1
    unstarted.hold(NO_VERSION)  # an answer is an answer
    until(lambda: unstarted.publisher.trouble is None)


@pytest.mark.usefixtures("_very_impatient")
def test_a_handshake_that_takes_longer_than_an_answer_is_not_begun_anew(unstarted: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:  # accepts, and has no time to say anything yet
        endpoint = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
        unstarted.publisher._connect = lambda: Requester(endpoint, LIMIT)
        unstarted.thread.start()
        unstarted.offer(1)
        busy.settimeout(DEADLINE_S)
        with busy.accept()[0]:
            until(lambda: unstarted.publisher.trouble == "parameter server not reachable")
            busy.settimeout(2 * ANSWER_S)
            with pytest.raises(TimeoutError):
                busy.accept()
        unstarted.stop()


def test_a_refusal_is_trouble_in_the_servers_own_words_until_it_relents(scene: Scene) -> None:
    scene.offer(1)
    scene.server.next(Publish)
    refusal = Refusal(reason="protocol", text="the peer speaks protocol 1, this is protocol 2")
    scene.server.answer(refusal)
    until(lambda: "protocol 2" in (scene.publisher.trouble or ""))
    assert scene.publisher.trouble == (
        "parameter server refuses: the peer speaks protocol 1, this is protocol 2"
    )
    scene.offer(2, wait_s=DEADLINE_S)
    while (publish := scene.server.next(Publish)).version == 1:
        scene.server.answer(refusal)
    assert publish.version == 2
    scene.hold(2)
    until(lambda: scene.publisher.trouble is None)


@pytest.mark.parametrize(
    "garbage", [[b""], [b"\xc1"], [b"x" * 1000, b"y"]], ids=["empty", "not msgpack", "frames too many"]
)
def test_garbage_in_place_of_an_answer_is_trouble_and_survived(scene: Scene, garbage: list[Buffer]) -> None:
    scene.offer(1)
    scene.server.next(Publish)
    scene.server.answer_frames(garbage)
    until(lambda: "unusable answer" in (scene.publisher.trouble or ""))
    scene.offer(2, wait_s=DEADLINE_S)
    scene.server.next(Publish)
    scene.hold(2)
    until(lambda: scene.publisher.held_version == 2)


# --- waiting for the server's word -------------------------------------------------------------------


def test_who_is_retired_says_nothing_more_until_it_is_asked_to_again(scene: Scene) -> None:
    scene.offer(1)
    scene.server.next(Publish)
    scene.hold(1)
    until(lambda: scene.publisher.held_version == 1)
    scene.publisher.retire()
    if scene.server.next_or_none(3 * ANNOUNCE_S) is not None:  # one may have been under way
        scene.hold(1)
        assert scene.server.next_or_none(3 * ANNOUNCE_S) is None
    scene.offer(7)
    publish = scene.next_after(1)
    assert (publish.version, value_of(publish)) == (7, 7.0)


def test_a_version_is_confirmed_in_its_state_once_the_server_says_so(scene: Scene) -> None:
    scene.offer(3)
    scene.server.next(Publish)
    assert not scene.publisher.wait_until_confirmed(3, "training", 0.01)
    scene.hold(3)
    assert scene.publisher.wait_until_confirmed(3, "training", DEADLINE_S)
    assert not scene.publisher.wait_until_confirmed(3, "complete", 0.01)
    assert not scene.publisher.wait_until_confirmed(4, "training", 0.01)


def test_who_waits_is_woken_by_the_answer(scene: Scene) -> None:
    confirmed: list[bool] = []

    def wait() -> None:
        confirmed.append(scene.publisher.wait_until_confirmed(3, "training", DEADLINE_S))

    waiting = threading.Thread(target=wait)
    waiting.start()
    scene.offer(3)
    scene.server.next(Publish)
    scene.hold(3)
    waiting.join(DEADLINE_S)
    assert confirmed == [True]


# --- newer weights -----------------------------------------------------------------------------------


class Fetch:
    """``fetch_newer`` in a thread of its own."""

    def __init__(self, scene: Scene, version: int, timeout_s: float = DEADLINE_S) -> None:
        self._fetched: list[Weights | None] = []
        self._thread = threading.Thread(
            target=lambda: self._fetched.append(scene.publisher.fetch_newer(version, timeout_s))
        )
        self._thread.start()

    def result(self) -> Weights | None:
        self._thread.join(DEADLINE_S)
        (fetched,) = self._fetched
        return fetched


def weights(version: int, payload: Buffer | None) -> Weights:
    return Weights(
        run_id=RUN,
        server_incarnation=1,
        state="training",
        version=version,
        steps=version * 640,
        seats=(),
        payload=payload,
    )


def test_newer_weights_are_fetched(unstarted: Scene) -> None:
    unstarted.server.start()
    fetch = Fetch(unstarted, version=5)
    pull = unstarted.server.next(Pull)
    assert (pull.sender, pull.have_version, pull.seats_for) == (LEARNER, 5, ())
    unstarted.server.answer(weights(9, safetensors.torch.save({"weight": torch.ones(2)})))
    newer = fetch.result()
    assert newer is not None
    assert (newer.version, newer.steps) == (9, 5760)
    assert tensors_of(newer)["weight"].equal(torch.ones(2))


def test_nothing_is_fetched_from_a_server_that_is_not_there(unstarted: Scene) -> None:
    assert Fetch(unstarted, version=5, timeout_s=0.2).result() is None
    assert unstarted.publisher.trouble == "parameter server not reachable"


def test_nothing_is_fetched_from_a_server_that_does_not_answer(unstarted: Scene) -> None:
    unstarted.server.start()
    fetch = Fetch(unstarted, version=5, timeout_s=3.0)
    unstarted.server.next(Pull)
    assert fetch.result() is None
    assert unstarted.publisher.trouble == "parameter server does not answer"


def test_who_is_refused_weights_says_why(unstarted: Scene) -> None:
    unstarted.server.start()
    fetch = Fetch(unstarted, version=5)
    unstarted.server.next(Pull)
    unstarted.server.answer(Refusal(reason="run", text="run 'run'; this is run 'other'"))
    assert fetch.result() is None
    assert "this is run 'other'" in (unstarted.publisher.trouble or "")


def test_an_answer_without_weights_changes_nothing(unstarted: Scene) -> None:
    unstarted.server.start()
    fetch = Fetch(unstarted, version=5)
    unstarted.server.next(Pull)
    unstarted.server.answer(weights(9, None))
    assert fetch.result() is None


# --- stopping ----------------------------------------------------------------------------------------


def test_stopping_while_there_is_nothing_to_do_returns_at_once(scene: Scene) -> None:
    scene.stop()


def test_stopping_while_the_server_is_silent_returns(scene: Scene) -> None:
    scene.offer(1)
    scene.server.next(Publish)
    scene.stop()


@pytest.mark.usefixtures("_very_impatient")
def test_stopping_while_the_server_is_not_there_returns(unstarted: Scene) -> None:
    unstarted.thread.start()
    unstarted.offer(1)
    until(lambda: unstarted.publisher.trouble == "parameter server not reachable")
    unstarted.stop()


# --- the copy ----------------------------------------------------------------------------------------


def test_the_copy_holds_the_weights_of_the_moment_it_was_started() -> None:
    convolution = nn.Conv2d(3, 4, 2)
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    network = nn.Sequential(convolution, nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    copier = WeightsCopier(network)
    copier.start()
    for parameter in network.parameters():
        parameter.data.add_(1.0)
    copied = safetensors.torch.load(copier.finish())
    assert copied.keys() == before.keys()
    assert all(copied[name].equal(before[name]) for name in before)
    copier.start()
    again = safetensors.torch.load(copier.finish())
    assert all(again[name].equal(before[name] + 1.0) for name in before)


@pytest.mark.cuda
def test_the_copy_from_a_gpu_holds_the_weights_of_the_moment_it_was_started() -> None:
    network = nn.Linear(2000, 2000).cuda()
    copier = WeightsCopier(network)
    for number in range(20):
        network.weight.data.fill_(number)
        copier.start()
        network.weight.data.fill_(-1.0)
        assert safetensors.torch.load(copier.finish())["weight"].unique().tolist() == [number]
