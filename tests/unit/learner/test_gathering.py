"""Whoever comes into a group goes on exactly where its state's holder is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from services.learner import group as group_module
from services.learner.attendance import Attendance
from services.learner.episodes import Episodes
from services.learner.gathering import Gathering
from services.learner.group import Group, PeerLostError, WeightsDifferError
from services.learner.trainer import Trainer
from services.ops.health import Heartbeat
from services.ops.metrics import LearnerMetrics
from services.wire.messages import Episode, Member, View
from tests.unit.learner.together import CPU, HOST
from tests.unit.learner.variants import Variant

TIMEOUT_S = 30.0
MAKING = threading.Lock()
VARIANT = Variant("popart-tasks")


class Server:
    """Issues the next view once as many learners stand as it is told to wait for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.standing: dict[str, tuple[int, bool, str]] = {}
        self.generation = 0
        self.view: View | None = None

    def form(self, *names: str, holder: int, version: int = -1) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.standing.keys() >= set(names), TIMEOUT_S)
            self.generation += 1
            self.view = View(
                run_id="run",
                server_incarnation=1,
                generation=self.generation,
                members=tuple(
                    Member(
                        client_id=name,
                        incarnation=1,
                        endpoint=f"tcp://{name}:1",
                        store=self.standing.pop(name)[2],
                        since=1,
                    )
                    for name in names
                ),
                holder=holder,
                version=version,
                num_seats=0,
            )
            self.changed.notify_all()


class Learner:
    """A trainer and what brings it into groups; its attendance is a direct word with the server."""

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self.server = server
        self.registry = CollectorRegistry()
        self.stopping = threading.Event()
        self.caught_up: list[int] = []
        self.heard = 0
        self.trouble: str | None = None
        with MAKING:
            self.trainer: Trainer = VARIANT.make_trainer()
        self.episodes = Episodes(["a", "b", "c"])
        self.gathering = Gathering(
            attendance=cast(Attendance, self),
            trainer=self.trainer,
            episodes=self.episodes,
            host=HOST,
            device=CPU,
            catch_up=self.catch_up,
            metrics=LearnerMetrics(self.registry),
            heartbeat=Heartbeat(),
            stopping=self.stopping,
        )

    def catch_up(self, version: int) -> None:
        self.caught_up.append(version)
        self.trainer.version = version

    def stand(self, *, version: int, has_trained: bool, store: str) -> None:
        with self.server.changed:
            self.heard = self.server.generation
            self.server.standing[self.name] = (version, has_trained, store)
            self.server.changed.notify_all()

    def train(self, view: View, rank: int) -> None:
        self.heard = view.generation

    def wait_for_next(self, timeout_s: float) -> tuple[View, int] | None:
        def found() -> tuple[View, int] | None:
            view = self.server.view
            if view is None or view.generation <= self.heard:
                return None
            return next(((view, n) for n, m in enumerate(view.members) if m.client_id == self.name), None)

        with self.server.changed:
            self.server.changed.wait_for(lambda: found() is not None, timeout_s)
            return found()

    def is_over(self, generation: int) -> bool:
        return self.server.generation > generation

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"impala_learner_{name}", labels)


def all_of(*work: Callable[[], object]) -> None:
    """At the same time."""
    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(each) for each in work]:
            done.result(TIMEOUT_S)


@pytest.fixture
def server() -> Server:
    return Server()


def join(learner: Learner, lost: PeerLostError | None = None) -> Group:
    group = learner.gathering.join(lost)
    assert group is not None
    learner.trainer.group = group
    return group


def test_the_others_take_over_everything_that_the_holder_has(server: Server) -> None:
    new, old = Learner("a", server), Learner("b", server)
    for _ in range(3):
        old.trainer.update(VARIANT.make_batch())
    old.episodes.add(1, Episode(episode_return=5.0, length=9))
    all_of(lambda: join(new), lambda: join(old), lambda: server.form("a", "b", holder=1))
    assert (new.trainer.version, new.trainer.steps) == (old.trainer.version, old.trainer.steps) == (3, 72)
    assert new.trainer.checksum() == old.trainer.checksum()
    assert new.episodes.state_dict() == old.episodes.state_dict()
    all_of(*(lambda each=each: each.trainer.update(VARIANT.make_batch()) for each in (new, old)))
    assert new.trainer.checksum() == old.trainer.checksum(), "so the optimiser's averages are the same"
    assert [each.metric("leads") for each in (new, old)] == [1, 0]
    assert [each.metric("world_size") for each in (new, old)] == [2, 2]
    assert [each.metric("steps") for each in (new, old)] == [72, 72], "no update need follow"
    assert [each.metric("policy_version") for each in (new, old)] == [3, 3]


def test_who_holds_the_state_says_so_whatever_its_rank_and_nobody_does_between_two_groups(
    server: Server,
) -> None:
    first, second = Learner("a", server), Learner("b", server)

    def holds() -> list[float | None]:
        return [each.metric("holds_state") for each in (first, second)]

    assert holds() == [0, 0]
    all_of(lambda: join(first), lambda: join(second), lambda: server.form("a", "b", holder=1))
    assert holds() == [0, 1]
    assert [each.metric("leads") for each in (first, second)] == [1, 0]
    all_of(lambda: join(first), lambda: join(second), lambda: server.form("a", "b", holder=0))
    assert holds() == [1, 0]
    first.stopping.set()
    assert first.gathering.join() is None
    assert holds() == [0, 0]
    all_of(lambda: join(second), lambda: server.form("b", holder=0))
    assert holds() == [0, 1], "alone it holds its own"


def test_one_alone_keeps_what_it_has(server: Server) -> None:
    learner = Learner("a", server)
    learner.trainer.update(VARIANT.make_batch())
    before = learner.trainer.checksum()
    all_of(lambda: join(learner), lambda: server.form("a", holder=0))
    assert (learner.trainer.version, learner.trainer.checksum()) == (1, before)
    assert learner.gathering.group is not None and learner.gathering.group.world_size == 1


@pytest.mark.parametrize(("held", "caught_up"), [(-1, []), (4, []), (5, []), (6, [6])])
def test_the_holder_catches_up_with_a_server_that_is_ahead(
    server: Server, held: int, caught_up: list[int]
) -> None:
    holder, other = Learner("a", server), Learner("b", server)
    holder.trainer.version = 5
    all_of(lambda: join(holder), lambda: join(other), lambda: server.form("a", "b", holder=0, version=held))
    assert holder.caught_up == caught_up
    assert other.caught_up == []
    assert other.trainer.version == holder.trainer.version == max(5, held)


def test_who_has_trained_keeps_the_episodes_that_it_has_seen(server: Server) -> None:
    first, second = Learner("a", server), Learner("b", server)
    all_of(lambda: join(first), lambda: join(second), lambda: server.form("a", "b", holder=0))
    second.episodes.add(2, Episode(episode_return=7.0, length=3))
    seen = second.episodes.state_dict()
    all_of(lambda: join(first), lambda: join(second), lambda: server.form("a", "b", holder=0))
    assert second.episodes.state_dict() == seen != first.episodes.state_dict()


def test_a_group_that_does_not_come_about_is_followed_by_the_next(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "MEET_S", 0.5)
    learner, dead = Learner("a", server), Learner("b", server)

    def serve() -> None:
        dead.stand(version=9, has_trained=True, store="127.0.0.1:9")  # nobody listens there
        server.form("a", "b", holder=1)
        server.form("a", holder=0)

    all_of(lambda: join(learner), serve)
    assert learner.gathering.group is not None
    assert (learner.gathering.group.generation, learner.gathering.group.world_size) == (2, 1)


def test_stopping_ends_the_wait_for_a_view(server: Server) -> None:
    learner = Learner("a", server)
    threading.Timer(0.2, learner.stopping.set).start()
    assert learner.gathering.join() is None
    assert learner.gathering.group is None
    assert learner.metric("world_size") == 0


def test_a_group_after_the_first_is_counted_by_its_reason(server: Server) -> None:
    a, b = Learner("a", server), Learner("b", server)

    def counts() -> list[float | None]:
        reasons = ("joined", "left", "lost", "differed")
        return [a.metric("regroups_total", reason=reason) for reason in reasons]

    all_of(lambda: join(a), lambda: server.form("a", holder=0))
    assert counts() == [0, 0, 0, 0]
    all_of(lambda: join(a), lambda: join(b), lambda: server.form("a", "b", holder=0))
    assert counts() == [1, 0, 0, 0]
    all_of(lambda: join(a), lambda: server.form("a", holder=0))
    assert counts() == [1, 1, 0, 0]
    all_of(lambda: join(a, PeerLostError("gone")), lambda: server.form("a", holder=0))
    assert counts() == [1, 1, 1, 0]
    over = PeerLostError("the group is over")  # to whoever waits for a peer, the end of a view looks like it
    all_of(lambda: join(a, over), lambda: join(b), lambda: server.form("a", "b", holder=0))
    assert counts() == [2, 1, 1, 0]
    all_of(lambda: join(a, WeightsDifferError("x")), lambda: join(b), lambda: server.form("a", "b", holder=0))
    assert counts() == [2, 1, 1, 1]
    assert a.metric("generation") == 6
