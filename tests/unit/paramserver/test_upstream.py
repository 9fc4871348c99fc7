"""A relay's connection to its upstream: what was lost with it is asked again, and a dead one is exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from services.ops.metrics import ParamserverMetrics
from services.paramserver import loop as loop_module
from services.paramserver.loop import Loop, Upstream
from services.wire.codec import decode
from services.wire.messages import Buffer, Goodbye, Pull
from services.wire.sockets import RENEW_S, Replier, Requester
from tests.unit.paramserver.harness import EXPECTED, HOLD_S, LEASE_S, LIMIT, client, cross, pull, relay

SOON_S = 1.0
"""Less than the relay's patience, and longer than its pause where nobody is there."""


class Wire:
    """In place of a requester: nobody ever answers."""

    def __init__(self, is_up: bool) -> None:
        self.is_up = is_up
        self.breaks = 0
        self.room = 1_000_000
        """For so many messages."""
        self.asked = 0
        self.departed: list[str] = []
        self.is_closed = False

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        return None

    def send(self, frames: Sequence[Buffer], timeout_s: float) -> bool:
        if not self.is_up or self.room == 0:
            return False
        self.room -= 1
        message = decode(cross(list(frames)), EXPECTED)
        self.asked += isinstance(message, Pull)
        if isinstance(message, Goodbye):
            self.departed.append(message.sender.client_id)
        return True

    def close(self) -> None:
        self.is_closed = True


class Scene:
    def __init__(self, is_up: bool = True, hold_s: float = HOLD_S) -> None:
        self._is_up = is_up
        self._is_failing = False
        self.failures = 0
        self.wires: list[Wire] = []
        self.node = relay(hold_s=hold_s)
        assert self.node.relay is not None
        self.upstream = Upstream(self.node.relay, self._connect)
        self.now_s = 100.0
        self.upstream.turn(self.now_s)

    def fail(self) -> None:
        """From now on no file is left to open."""
        self._is_failing = True

    def _connect(self) -> Requester:
        if self._is_failing:
            self.failures += 1
            raise OSError("too many open files")
        self.wires.append(Wire(self._is_up))
        return cast(Requester, self.wires[-1])

    def pass_time(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.05
            self.upstream.turn(self.now_s)


@pytest.fixture
def scene() -> Scene:
    scene = Scene()
    assert scene.wires[0].asked == 1
    return scene


def test_a_request_that_is_open_is_not_repeated(scene: Scene) -> None:
    scene.pass_time(SOON_S)
    assert scene.wires[0].asked == 1


def test_what_was_lost_with_the_connection_is_asked_again_once(scene: Scene) -> None:
    (wire,) = scene.wires
    wire.is_up, wire.breaks = False, 1
    scene.pass_time(SOON_S)
    assert wire.asked == 1
    wire.is_up = True
    scene.pass_time(SOON_S)
    assert wire.asked == 2
    assert len(scene.wires) == 1


def test_whoever_does_not_answer_is_asked_over_a_new_connection(scene: Scene) -> None:
    scene.pass_time(2 * HOLD_S + SOON_S)
    assert [wire.asked for wire in scene.wires] == [1, 1]
    assert [wire.is_closed for wire in scene.wires] == [True, False]


def test_a_connection_that_is_not_made_again_is_exchanged(scene: Scene) -> None:
    scene.wires[0].is_up, scene.wires[0].breaks = False, 1
    scene.pass_time(RENEW_S - SOON_S)
    assert len(scene.wires) == 1
    scene.pass_time(2 * SOON_S)
    assert [wire.asked for wire in scene.wires] == [1, 1]
    assert scene.wires[0].is_closed


@pytest.fixture
def patient() -> Scene:
    """Its requests are held for longer than a connection is given to be made again."""
    return Scene(hold_s=RENEW_S + 2 * SOON_S)


def test_a_connection_that_broke_once_is_kept_while_a_request_is_held(patient: Scene) -> None:
    (wire,) = patient.wires
    wire.breaks = 1
    patient.pass_time(RENEW_S + SOON_S)
    assert len(patient.wires) == 1
    assert wire.asked == 2


def test_a_connection_that_breaks_late_is_given_its_time(patient: Scene) -> None:
    (wire,) = patient.wires
    patient.pass_time(RENEW_S + SOON_S)
    wire.is_up, wire.breaks = False, 1
    patient.pass_time(RENEW_S - SOON_S)
    assert len(patient.wires) == 1
    wire.is_up = True
    patient.pass_time(SOON_S)
    assert (len(patient.wires), wire.asked) == (1, 2)


def test_over_a_connection_that_was_exchanged_the_relay_asks_at_once(patient: Scene) -> None:
    wire = patient.wires[0]
    wire.is_up, wire.breaks = False, 1
    while len(patient.wires) == 1:
        patient.pass_time(0.05)
    assert patient.wires[1].asked == 1
    patient.pass_time(RENEW_S + SOON_S)
    assert patient.wires[1].asked == 1


def test_where_no_connection_can_be_had_one_is_not_asked_for_at_every_turn(scene: Scene) -> None:
    scene.wires[0].is_up, scene.wires[0].breaks = False, 1
    scene.fail()
    scene.pass_time(3 * RENEW_S)
    assert scene.failures == 2
    scene.wires[0].is_up = True
    scene.pass_time(SOON_S)
    assert scene.wires[0].asked == 2
    assert not scene.wires[0].is_closed


def test_an_upstream_that_was_never_there_is_left_to_its_socket() -> None:
    scene = Scene(is_up=False)
    scene.pass_time(3 * RENEW_S)
    assert len(scene.wires) == 1


# --- goodbyes ---------------------------------------------------------------------------------------------


@pytest.fixture
def crowded(scene: Scene) -> Scene:
    """Twelve clients, all of whom upstream has been asked about, leave at once; there is room for four."""
    for number in range(12):
        scene.node.pull(b"%d" % number, pull(client(f"{number:02d}")))
    scene.pass_time(0.05)
    (wire,) = scene.wires
    assert wire.asked == 2
    wire.room = 4
    for number in range(12):
        scene.node.goodbye(b"%d" % number, client(f"{number:02d}"))
    scene.pass_time(0.05)
    return scene


def test_goodbyes_that_do_not_fit_into_the_queue_are_passed_on_when_it_has_room(crowded: Scene) -> None:
    (wire,) = crowded.wires
    assert (wire.departed, crowded.upstream.relay.has_goodbyes) == (
        [f"{number:02d}" for number in range(4)],
        True,
    )
    wire.room = 7
    crowded.pass_time(0.05)
    assert (len(wire.departed), crowded.upstream.relay.has_goodbyes) == (11, True)
    wire.room = 7
    crowded.pass_time(0.05)
    assert wire.departed == [f"{number:02d}" for number in range(12)]
    assert not crowded.upstream.relay.has_goodbyes


def test_the_loop_waits_for_room_only_while_there_are_goodbyes_left(
    crowded: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waited: list[list[Wire]] = []
    monkeypatch.setattr(loop_module, "wait", lambda _sockets, _timeout_s, full: waited.append(list(full)))
    with Replier(f"ipc://{tmp_path}/s", LIMIT) as replier:
        loop = Loop(
            server=crowded.node.server,
            replier=replier,
            metrics=ParamserverMetrics(CollectorRegistry()),
            upstream=crowded.upstream,
            clock=lambda: crowded.now_s,
        )
        loop.turn()
        crowded.wires[0].room = 100
        loop.turn()
        loop.turn()
    assert waited == [crowded.wires, crowded.wires, []]


def test_a_relay_that_was_frozen_passes_goodbyes_on_as_well(scene: Scene) -> None:
    scene.node.freeze(10 * LEASE_S)  # which its own leases do not count
    scene.node.pull(b"a", pull(client("a")))
    scene.node.goodbye(b"a", client("a"))
    scene.now_s = scene.node.now_s
    scene.pass_time(0.05)
    assert "a" in [name for each in scene.wires for name in each.departed]


def test_a_queue_full_of_goodbyes_neither_repeats_the_open_request_nor_ends_the_connection(
    crowded: Scene,
) -> None:
    (wire,) = crowded.wires
    crowded.pass_time(SOON_S)
    assert (wire.asked, len(crowded.wires)) == (2, 1)
