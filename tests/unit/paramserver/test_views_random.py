"""Learners that obey the rules, and random misfortune: whatever happens, views keep their promises.

A model of a learner stands beside the true ``Views``: it attends, hears the answer or loses it, trains while
all of its group do, and stands when they do not. Learners are killed, frozen, hung and sent home, and so is
the server, at random. No learner knows more of another one than sockets would tell it. One of them may be
such that others never reach it, and it does not reach them.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from services.paramserver.quarantine import LONGEST_WAIT_S
from services.paramserver.views import GATHER_S, RETURN_S, Views
from services.wire.messages import NO_GENERATION, NO_VERSION, Attend, Member, Phase
from tests.unit.paramserver.harness import attend

BEAT_S = 0.25
LEASE_S = 5.0
PATIENCE_S = 5.0
"""Of a learner with peers that do not answer."""
MISFORTUNE_S = 150.0
REGROUP_S = LEASE_S + RETURN_S + 2 * (GATHER_S + PATIENCE_S)
RECOVERY_S = LONGEST_WAIT_S + 2 * REGROUP_S
"""Who was in groups that broke waits before it is let in again, and they are let in one by one."""
SAVE_S = 10.0
"""Between the server's copies of the weights on disk. A generation is noted at once."""
STRIKE = 0.04
"""How likely there is a new misfortune at a beat."""
LOSS = 0.05
"""How likely an attend is lost, and as likely an answer."""


@dataclass
class Learner:
    name: str
    incarnation: int = 1
    phase: Phase = "standing"
    generation: int = NO_GENERATION
    version: int = 0
    has_trained: bool = False
    members: tuple[Member, ...] = ()
    """Of its group."""
    holder: int = 0
    is_in_step: bool = False
    """It has the group's state."""
    waited_s: float = 0.0
    is_alive: bool = True
    frozen_until_s: float = 0.0
    hung_until_s: float = 0.0
    """It attends, but its loop does not turn."""
    heard: tuple[int, tuple[Member, ...], int] = (NO_GENERATION, (), 0)
    """Generation, members and holder."""

    @property
    def identity(self) -> tuple[str, int]:
        return self.name, self.incarnation

    @property
    def rank(self) -> int:
        return identities(self.members).index(self.identity)

    def says(self) -> Attend:
        trains = self.phase == "training"
        return attend(
            self.name,
            self.phase,
            incarnation=self.incarnation,
            generation=self.generation,
            version=self.version,
            has_trained=self.has_trained,
            rank=self.rank if trains else 0,
            world_size=len(self.members) if trains else 1,
            since=self.members[self.rank].since if trains else NO_GENERATION,
        )

    def reborn(self) -> Learner:
        """With a checkpoint that may be newer than what others have, but has not been trained on."""
        return Learner(self.name, incarnation=self.incarnation + 1, version=self.version)

    def join_if_sent(self) -> None:
        generation, members, holder = self.heard
        if generation > self.generation and self.identity in identities(members):
            self.phase, self.generation, self.members, self.holder = "training", generation, members, holder
            self.is_in_step, self.waited_s = False, 0.0

    def stand_if_over(self, has_lost_a_peer: bool) -> None:
        generation, members, _ = self.heard
        is_over = generation > self.generation or (generation == self.generation and not members)
        if is_over or has_lost_a_peer or self.waited_s >= PATIENCE_S:
            self.phase, self.members = "standing", ()
            self.generation = max(self.generation, generation)

    def is_lost_to(self, other: Learner) -> bool:
        """Their connection has broken: the process has ended, or has closed it."""
        return not self.is_alive or (
            self.generation >= other.generation
            and (self.phase, self.generation) != ("training", other.generation)
        )


def identities(members: tuple[Member, ...]) -> list[tuple[str, int]]:
    return [(member.client_id, member.incarnation) for member in members]


class World:
    """The server, its learners, and what is promised."""

    def __init__(
        self,
        seed: int,
        *,
        num_learners: int,
        min_learners: int,
        keeps_notes: bool = True,
        cut_off: str | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.learners = [Learner(f"learner-{number}") for number in range(num_learners)]
        self.formed: dict[int, list[tuple[str, int]]] = {}
        """In their order."""
        self.taken_over = 0
        self.steps = 0
        self.steps_of: Counter[str] = Counter()
        self.saved_version = NO_VERSION
        """What the server has on its disk, if it has one, which is not always the newest."""
        self._saved_s = 0.0
        self.restarts: Counter[str] = Counter()
        """By what the server had, and whether learners had more."""
        self._cut_off = cut_off
        self._min_learners = min_learners
        self._keeps_notes = keeps_notes
        self._server_away_until_s = 0.0
        self._start_server()

    def run(self, seconds: float, *, misfortune: bool) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += BEAT_S
            if misfortune and self.rng.random() < STRIKE:
                self._strike()
            loss = LOSS if misfortune else 0.0
            awake = [x for x in self.learners if x.is_alive and x.frozen_until_s <= self.now_s]
            if self._server_away_until_s <= self.now_s:
                for learner in self.rng.sample(awake, len(awake)):
                    self._attend(learner, loss)
                self.views.tick(self.now_s)
                self._check()
            for learner in awake:
                if learner.hung_until_s <= self.now_s:
                    self._turn(learner)
            self._train()

    def end_misfortune(self) -> None:
        """Who is dead stays dead, as far as others are enough to train."""
        self._server_away_until_s = 0.0
        for learner in self.learners:
            learner.frozen_until_s = learner.hung_until_s = 0.0
        missing = self._min_learners - len(self.alive)
        for number, learner in enumerate(self.learners):
            if missing > 0 and not learner.is_alive:
                self.learners[number] = learner.reborn()
                missing -= 1

    @property
    def alive(self) -> list[Learner]:
        return [learner for learner in self.learners if learner.is_alive]

    # --- the server ---------------------------------------------------------------------------------------

    def _start_server(self) -> None:
        noted = max(self.formed, default=NO_GENERATION) if self._keeps_notes else NO_GENERATION
        self.views = Views(
            generation=noted,
            lease_s=LEASE_S,
            min_learners=self._min_learners,
            remembers=self._keeps_notes or self.saved_version > NO_VERSION,
        )
        self.views.held_version = self.views.restored_version = self.saved_version
        kind = "restored" if self.saved_version > NO_VERSION else "empty"
        is_outdated = any(learner.version > max(self.saved_version, 0) for learner in self.learners)
        self.restarts[f"{kind}, outdated" if is_outdated else kind] += 1
        self._has_view = False

    def _attend(self, learner: Learner, loss: float) -> None:
        if self.rng.random() < loss:
            return
        self.views.attend(learner.says(), self.now_s)
        self._check()
        if self.rng.random() >= loss:
            learner.heard = (self.views.generation, self.views.members, self.views.holder)

    def _check(self) -> None:
        if not self.views.members:
            return
        generation, members = self.views.generation, identities(self.views.members)
        if generation in self.formed and self._keeps_notes:
            assert self.formed[generation] == members, "a generation was issued twice"
            assert generation == max(self.formed), "generations went back"
            self.taken_over += not self._has_view
        elif generation not in self.formed:
            assert generation > max(self.formed, default=NO_GENERATION) or not self._keeps_notes
            assert len(members) >= self._min_learners
            assert members == sorted(set(members))
        self.formed[generation] = members
        self._has_view = True

    # --- the learners -------------------------------------------------------------------------------------

    def _turn(self, learner: Learner) -> None:
        """One of its loop, whatever it waits for."""
        if learner.phase == "standing":
            learner.join_if_sent()
            return
        peers = [x for x in self.learners if x.identity in identities(learner.members)]
        is_short = len(peers) < len(learner.members)  # somebody has another life by now
        learner.waited_s += BEAT_S
        learner.stand_if_over(is_short or any(peer.is_lost_to(learner) for peer in peers))

    def _train(self) -> None:
        """A step of every group all of whose members turn, with the state of the one that holds it."""
        for first in self.alive:
            group = [x for x in self.alive if (x.phase, x.generation) == ("training", first.generation)]
            busy_until_s = max((max(x.frozen_until_s, x.hung_until_s) for x in group), default=0.0)
            if first not in group or first.rank > 0 or busy_until_s > self.now_s:
                continue
            if sorted(x.identity for x in group) != sorted(identities(first.members)):
                continue
            if len(group) > 1 and self._cut_off in {x.name for x in group}:
                continue
            holder = next(x for x in group if x.rank == x.holder)
            assert len({x.holder for x in group}) == 1
            for learner in group:
                assert learner.version <= holder.version or not learner.has_trained, "steps were taken back"
                assert not learner.is_in_step or learner.version == holder.version
            version = max(holder.version, self.views.held_version) + 1
            for learner in group:
                learner.version, learner.has_trained = version, True
                learner.is_in_step, learner.waited_s = True, 0.0
            self.steps += 1
            self.steps_of.update(x.name for x in group)
            self._publish(first, version)

    def _publish(self, leader: Learner, version: int) -> None:
        """Nobody but the leader of the newest group is heard."""
        if self._server_away_until_s <= self.now_s and (
            not self.views.members or identities(self.views.members)[0] == leader.identity
        ):
            self.views.held_version = max(self.views.held_version, version)
            if self._keeps_notes and self.now_s >= self._saved_s + SAVE_S:
                self.saved_version, self._saved_s = self.views.held_version, self.now_s

    # --- misfortune ---------------------------------------------------------------------------------------

    def _strike(self) -> None:
        number, until_s = (
            self.rng.randrange(len(self.learners)),
            self.now_s + self.rng.choice((0.5, 2, 8, 20)),
        )
        learner = self.learners[number]
        match self.rng.choice(
            ("kill", "return", "return", "freeze", "hang", "leave", "server", "frozen server")
        ):
            case "kill":
                learner.is_alive = False
            case "return":
                self.learners[number] = learner.reborn()
            case "freeze":
                learner.frozen_until_s = until_s
            case "hang":
                learner.hung_until_s = until_s
            case "leave" if learner.is_alive and self._server_away_until_s <= self.now_s:
                learner.phase = "leaving"
                self._attend(learner, loss=LOSS)
                learner.is_alive = False
            case "server":
                self._server_away_until_s = self.now_s + self.rng.choice((0.25, 4.0))
                self._start_server()
            case "frozen server":
                self._server_away_until_s = until_s


def assert_all_train_together(world: World) -> None:
    members = identities(world.views.members)
    assert members == sorted(learner.identity for learner in world.alive)
    assert {(x.phase, x.generation) for x in world.alive} == {("training", world.views.generation)}
    steps = world.steps
    world.run(1.0, misfortune=False)
    assert world.steps == steps + 4
    assert len({learner.version for learner in world.alive}) == 1


@pytest.mark.parametrize("seed", range(30))
def test_generations_only_rise_no_step_is_taken_back_and_in_the_end_all_train_together(seed: int) -> None:
    world = World(seed, num_learners=1 + seed % 6, min_learners=1 + (seed % 6 > 3))
    world.run(MISFORTUNE_S, misfortune=True)
    world.end_misfortune()
    world.run(RECOVERY_S, misfortune=False)
    assert_all_train_together(world)


@pytest.mark.parametrize("seed", range(30, 45))
def test_a_server_that_loses_its_notes_with_every_life_brings_all_together_too(seed: int) -> None:
    world = World(seed, num_learners=4, min_learners=1, keeps_notes=False)
    world.run(MISFORTUNE_S, misfortune=True)
    world.end_misfortune()
    world.run(RECOVERY_S, misfortune=False)
    assert_all_train_together(world)


@pytest.mark.parametrize("cut_off", [f"learner-{number}" for number in range(4)])
@pytest.mark.parametrize("min_learners", [1, 2])
def test_one_that_the_others_never_reach_keeps_them_from_training_for_a_short_time_only(
    cut_off: str, min_learners: int
) -> None:
    world = World(0, num_learners=4, min_learners=min_learners, cut_off=cut_off)
    world.run(LONGEST_WAIT_S + REGROUP_S, misfortune=False)
    before = Counter(world.steps_of)
    world.run(5 * LONGEST_WAIT_S, misfortune=False)
    beats = 5 * LONGEST_WAIT_S / BEAT_S
    for learner in world.learners:
        share = (world.steps_of[learner.name] - before[learner.name]) / beats
        assert share == 0 if learner.name == cut_off else share > 0.8, (learner.name, share)


@pytest.mark.parametrize("seed", range(50, 70))
def test_with_one_that_the_others_never_reach_they_train_again_after_any_misfortune(seed: int) -> None:
    world = World(seed, num_learners=4, min_learners=1, cut_off=f"learner-{seed % 4}")
    world.run(MISFORTUNE_S, misfortune=True)
    world.end_misfortune()
    world.run(RECOVERY_S, misfortune=False)
    steps = world.steps
    world.run(2 * LONGEST_WAIT_S, misfortune=False)
    assert world.steps - steps > LONGEST_WAIT_S / BEAT_S


def test_the_misfortunes_are_many_and_are_survived() -> None:
    worlds = [World(seed, num_learners=3, min_learners=1) for seed in range(100, 110)]
    for world in worlds:
        world.run(MISFORTUNE_S, misfortune=True)
    assert sum(len(world.formed) for world in worlds) > 100
    assert sum(world.taken_over for world in worlds) > 10
    assert min(world.steps for world in worlds) > 100
    assert sum(world.restarts["restored, outdated"] for world in worlds) > 10


def test_servers_that_lose_their_notes_begin_with_less_than_learners_have() -> None:
    worlds = [World(seed, num_learners=3, min_learners=1, keeps_notes=False) for seed in range(110, 115)]
    for world in worlds:
        world.run(MISFORTUNE_S, misfortune=True)
    assert sum(world.restarts["empty, outdated"] for world in worlds) > 5
    assert sum(world.restarts["restored, outdated"] for world in worlds) == 0
