"""A relay's connection to its upstream: what was lost with it is asked again, and a dead one is exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from services.paramserver.loop import Upstream
from services.wire.messages import Buffer
from services.wire.sockets import RENEW_S, Requester
from tests.unit.paramserver.harness import HOLD_S, relay

SOON_S = 1.0
"""Less than the relay's patience, and longer than its pause where nobody is there."""


class Wire:
    """In place of a requester: nobody ever answers."""

    def __init__(self, is_up: bool) -> None:
        self.is_up = is_up
        self.breaks = 0
        self.asked = 0
        self.is_closed = False

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        return None

    def send(self, frames: Sequence[Buffer], timeout_s: float) -> bool:
        self.asked += self.is_up
        return self.is_up

    def close(self) -> None:
        self.is_closed = True


class Scene:
    def __init__(self, is_up: bool = True, hold_s: float = HOLD_S) -> None:
        self._is_up = is_up
        self._is_failing = False
        self.failures = 0
        self.wires: list[Wire] = []
        below = relay(hold_s=hold_s).relay
        assert below is not None
        self.upstream = Upstream(below, self._connect)
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
