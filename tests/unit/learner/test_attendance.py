"""A learner keeps its place among the learners, and hears who trains with whom."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from services.learner import attendance as attendance_module
from services.learner.__main__ import not_ready
from services.learner.attendance import Attendance
from services.learner.publisher import Publisher
from services.wire.messages import NO_GENERATION, Attend, Client, Member, Refusal, View
from tests.unit.learner.fake_server import DEADLINE_S, LIMIT, RUN, FakeServer
from tests.unit.learner.waiting import until

LEARNER = Client(client_id="learner-1", incarnation=5)
ENDPOINT = "tcp://10.0.0.7:5555"
OTHER = Member(
    client_id="learner-0", incarnation=3, endpoint="tcp://10.0.0.6:5555", store="10.0.0.6:9", since=2
)
SELF = Member(client_id="learner-1", incarnation=5, endpoint=ENDPOINT, store="10.0.0.7:9", since=4)


def view(generation: int, *members: Member, num_seats: int = 0, holder: int = 0) -> View:
    return View(
        run_id=RUN,
        server_incarnation=1,
        generation=generation,
        members=members,
        holder=holder,
        version=10,
        num_seats=num_seats,
    )


class Scene:
    """An attendance in its thread, and the server that it talks to."""

    def __init__(self, directory: Path) -> None:
        self.server = FakeServer(directory)
        self.now_s = 0.0
        self.attendance = Attendance(
            connect=self.server.connect,
            client=LEARNER,
            run_id=RUN,
            endpoint=ENDPOINT,
            config="abc",
            max_message_bytes=LIMIT,
        )
        self.thread = threading.Thread(target=self.attendance.run, daemon=True)

    def stand(self, version: int = 7, has_trained: bool = False) -> None:
        self.attendance.stand(version=version, has_trained=has_trained, store="10.0.0.7:9")

    def hear(self, answer: View | Refusal, saying: str | None = None) -> Attend:
        """Answer the next request, or the next one in this phase; returns it."""
        while True:
            attend = self.server.next(Attend)
            self.server.answer(answer)
            if saying in (None, attend.phase):
                return attend

    def hear_until(self, answer: View | Refusal, heard: Callable[[], bool]) -> None:
        """Answer all requests until ``heard()``; who has lost patience meanwhile asks again."""

        def hear() -> bool:
            if self.server.next_or_none(0.05) is not None:
                self.server.answer_if_there(answer)
            return heard()

        until(hear)

    def stop(self) -> None:
        leaving = threading.Thread(target=self.attendance.leave, args=(8,))
        leaving.start()
        leaving.join(DEADLINE_S)
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT_S": 0.02, "STANDING_BEAT_S": 0.02, "POLL_S": 0.01, "LEAVE_S": 0.2}.items():
        monkeypatch.setattr(attendance_module, name, seconds)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="impala-", dir="/tmp") as directory:
        scene = Scene(Path(directory))
        scene.server.start()
        scene.thread.start()
        yield scene
        if scene.thread.is_alive():
            scene.stop()
        scene.server.stop()


def test_who_stands_says_what_it_could_bring_into_a_group(scene: Scene) -> None:
    scene.stand(version=7, has_trained=True)
    scene.hear(view(3, OTHER))
    attend = scene.hear(view(3, OTHER))
    assert attend.sender == LEARNER
    assert (attend.phase, attend.endpoint, attend.store) == ("standing", ENDPOINT, "10.0.0.7:9")
    assert attend.config == "abc"
    assert (attend.version, attend.has_trained, attend.generation) == (7, True, NO_GENERATION)


def test_a_view_without_this_learner_is_not_its_next(scene: Scene) -> None:
    scene.stand()
    scene.hear(view(3, OTHER))
    until(lambda: scene.attendance.view is not None)
    assert scene.attendance.wait_for_next(0.0) is None


def test_the_next_view_comes_with_the_own_rank(scene: Scene) -> None:
    scene.stand()
    scene.hear(view(4, OTHER, SELF))
    found = scene.attendance.wait_for_next(DEADLINE_S)
    assert found is not None
    assert found == (view(4, OTHER, SELF), 1)


@pytest.mark.parametrize("other", [replace(SELF, incarnation=4), replace(SELF, store="10.0.0.7:8")])
def test_a_view_with_another_life_or_an_older_offer_of_this_learner_is_not_its_next(
    scene: Scene, other: Member
) -> None:
    scene.stand()
    scene.hear(view(4, OTHER, other))
    until(lambda: scene.attendance.view is not None)
    assert scene.attendance.wait_for_next(0.0) is None


def test_who_trains_says_where_it_is_in_which_group(scene: Scene) -> None:
    scene.stand()
    scene.hear(view(4, OTHER, SELF))
    found = scene.attendance.wait_for_next(DEADLINE_S)
    assert found is not None
    scene.attendance.train(*found)
    attend = scene.hear(view(4, OTHER, SELF), saying="training")
    assert (attend.generation, attend.rank, attend.world_size, attend.since, attend.store) == (4, 1, 2, 4, "")


def test_a_group_that_broke_is_over_for_who_stands_and_only_a_later_view_is_its_next(scene: Scene) -> None:
    scene.stand()
    scene.hear(view(4, OTHER, SELF))
    found = scene.attendance.wait_for_next(DEADLINE_S)
    assert found is not None
    scene.attendance.train(*found)
    scene.stand(version=9, has_trained=True)
    while (attend := scene.hear(view(4, OTHER, SELF))).version != 9:  # what it said before is under way
        pass
    assert (attend.phase, attend.generation, attend.has_trained) == ("standing", 4, True)
    assert scene.attendance.wait_for_next(0.0) is None
    scene.hear(view(4))
    scene.hear(view(5, SELF))
    assert scene.attendance.wait_for_next(DEADLINE_S) == (view(5, SELF), 0)


@pytest.mark.parametrize(
    ("heard", "over"),
    [
        (None, False),
        (view(NO_GENERATION), False),  # a server that has just started
        (view(3, OTHER), False),
        (view(3), False),
        (view(4, OTHER, SELF), False),
        (view(4), True),
        (view(4, OTHER), True),
        (view(5, OTHER), True),
        (view(5), True),
    ],
)
def test_a_group_is_over_once_its_generation_has_no_members_or_there_is_a_later_one(
    scene: Scene, heard: View | None, over: bool
) -> None:
    scene.attendance.view = heard
    assert scene.attendance.is_over(4) is over


def test_leaving_is_told_and_ends_the_thread(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance_module, "LEAVE_S", DEADLINE_S)
    scene.stand()
    scene.hear(view(3))  # who was never heard has nothing to take back
    leaving = threading.Thread(target=scene.attendance.leave, args=(8,))
    leaving.start()
    assert scene.hear(view(4), saying="leaving").version == 8  # it was 7 when this learner stood
    leaving.join(DEADLINE_S)
    scene.thread.join(DEADLINE_S)
    assert not leaving.is_alive() and not scene.thread.is_alive()


def test_leaving_does_not_wait_for_a_server_that_is_not_there(scene: Scene) -> None:
    scene.stand()
    scene.server.stop()
    scene.stop()


def test_a_server_that_died_with_a_request_is_asked_again_as_soon_as_there_is_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance_module, "ANSWER_S", 10 * DEADLINE_S)
    scene.stand()
    asked = scene.server.next(Attend)
    scene.server.stop()
    scene.server.start()
    assert scene.server.next(Attend) == asked


def test_a_server_that_was_silent_is_asked_again_over_a_new_connection(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance_module, "ANSWER_S", 0.2)
    scene.stand()
    scene.server.next(Attend)
    first = scene.server.peer
    until(lambda: scene.attendance.trouble == "parameter server does not answer")
    scene.server.next(Attend)
    assert scene.server.peer != first


def test_a_refusal_is_trouble_in_the_servers_own_words_until_it_relents(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance_module, "ANSWER_S", 0.2)
    scene.stand()
    scene.hear_until(
        Refusal(reason="run", text="this is run 'other'"),
        lambda: "this is run 'other'" in (scene.attendance.trouble or ""),
    )
    scene.hear_until(view(4, OTHER, SELF), lambda: scene.attendance.trouble is None)


@pytest.mark.parametrize(
    "unready",
    [
        Refusal(reason="run", text="this is run 'other'"),
        Refusal(reason="config_wait", text="not the one that the others train with"),
    ],
)
def test_a_learner_with_another_configuration_knows_that_it_waits_for_the_others_to_go(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, unready: Refusal
) -> None:
    monkeypatch.setattr(attendance_module, "ANSWER_S", 0.05)
    scene.stand()
    other_config = Refusal(reason="config", text="not the one that the others train with")
    assert not scene.attendance.differs
    scene.hear_until(other_config, lambda: scene.attendance.differs)
    assert not_ready(scene.attendance, None, cast(Publisher, None)) is None, "an upgrade goes on"
    scene.hear_until(unready, lambda: not scene.attendance.differs)
    assert not_ready(scene.attendance, None, cast(Publisher, None)) is not None
    scene.hear_until(other_config, lambda: scene.attendance.differs)
    scene.hear_until(view(4, OTHER, SELF), lambda: not scene.attendance.differs)


def test_it_does_not_while_the_server_is_away(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance_module, "ANSWER_S", 0.05)
    scene.stand()
    other_config = Refusal(reason="config", text="not the one that the others train with")
    scene.hear_until(other_config, lambda: scene.attendance.differs)
    until(lambda: not scene.attendance.differs)  # the next one may not know yet who trains
    assert not_ready(scene.attendance, None, cast(Publisher, None)) is not None
    scene.hear_until(other_config, lambda: scene.attendance.differs)


# --- how many actors there are ---------------------------------------------------------------------


def counting() -> tuple[Attendance, list[float]]:
    """One that is never started, and its clock."""
    now_s = [0.0]
    attendance = Attendance(
        connect=lambda: pytest.fail("never started"),
        client=LEARNER,
        run_id=RUN,
        endpoint=ENDPOINT,
        config="abc",
        max_message_bytes=LIMIT,
        clock=lambda: now_s[0],
    )
    return attendance, now_s


def test_more_actors_are_believed_at_once_and_fewer_only_after_a_while() -> None:
    attendance, now = counting()
    for now_s, num_seats, believed in (
        (0.0, 200, 200),
        (2.0, 256, 256),
        (4.0, 240, 256),
        (63.0, 0, 256),  # the server was restarted
        (64.1, 0, 240),  # 256 were there until 4.0
        (65.0, 240, 240),
        (123.0, 0, 240),
        (182.9, 0, 240),
        (183.1, 0, 0),
        (183.2, 7, 7),
    ):
        now[0] = now_s
        attendance._count_actors(num_seats)
        assert attendance.num_actors == believed, now_s


def test_actors_that_were_there_before_the_server_fell_silent_are_not_forgotten() -> None:
    attendance, now = counting()
    for now_s, num_seats, believed in ((0.0, 256, 256), (1000.0, 0, 256), (1060.1, 0, 0)):
        now[0] = now_s
        attendance._count_actors(num_seats)
        assert attendance.num_actors == believed, now_s


def test_the_number_of_actors_comes_with_each_view(scene: Scene) -> None:
    scene.stand()
    scene.hear(view(3, OTHER, num_seats=200))
    until(lambda: scene.attendance.num_actors == 200)
