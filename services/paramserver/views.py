"""Who trains with whom: views of the learners, issued one generation after the other.

Learners attend several times a second and are answered at once. A view is formed and has members, or the
next one is being gathered. A view is over when a learner wants to join, or a member stands because its group
broke, leaves, was restarted, or is silent for the lease. Then everybody is asked to stand, and once all who
are there do, they are the members of the next generation.

Only learners of one configuration train together: who has another than those who are there is refused, unless
it comes from a group that was there before a restart of this server. A group that breaks before it makes a
step goes on without its newcomers (``quarantine.py``).

Everybody takes over the state of the member with the newest version. If the server holds weights and nobody
who stands has been trained at all, the next generation waits a while for somebody with a checkpoint. Until
any weights are published, it waits longer for one that was heard and has gone with a newer state than those
who stand have (``absent.py``).

A generation is issued once, and numbers only rise; members obey gatherings of their own generation or of a
later one. After a restart nothing is known but a number from the disk, and without a disk not even that. As
soon as all ranks of the newest view have attended it is taken over as it is; if they do not come in time,
those who are there gather for a generation above all that have been heard of. Only a run that is new begins
at once: there is neither a number, though this server would have kept it, nor a checkpoint of more than it
began with, nor a publisher.

The clock is an argument everywhere (``now_s``, monotonic). Not thread-safe: one loop owns it.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from services.ops.logging import get_logger
from services.paramserver.absent import AWAY_S, Absent
from services.paramserver.clock import WakingClock
from services.paramserver.quarantine import Quarantine, holder
from services.wire.codec import MAX_LEARNERS
from services.wire.messages import NO_GENERATION, NO_VERSION, Attend, Client, Member

QUIET_S = 1.5
"""Several beats. A gathering does not wait for a learner that has been silent for so long. (To end a view it
takes the lease.)"""
GATHER_S = 10.0
"""A gathering waits no longer for learners that attend but do not come to stand."""
ADOPT_S = 10.0
"""After a restart the rest of a group that trains is waited for at least as long: who is stopped although it
trains was stopped for nothing. An attempt to connect may hang for three seconds, and the next one comes up to
two later; that is twice as much. If one of them died with the server, the others wait for it in vain."""
RETURN_S = 3.0
"""After a restart members are back within as much: their sockets try again at least every 2 s. Learners
without a checkpoint wait as long for one that has it."""
LATE_S = 60.0
"""After a start. Who was trained before it and comes back later finds what others have made meanwhile."""
LARGEST_LEAP = 1_000_000
"""Of a generation beyond those that are known. Nobody can use up the numbers with a few false words."""

_log = get_logger("views").limited(1.0)
_log_waiting = get_logger("views").limited(10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A learner that attends."""

    attend: Attend
    heard_s: float
    is_sent: bool = False
    """It was answered with a view that it is a member of, so it does not stand any more, whatever it said."""

    @property
    def stands(self) -> bool:
        return self.attend.phase == "standing" and not self.is_sent


class Views:
    """``attend`` and ``tick`` change the view, everything else only looks at it."""

    def __init__(self, *, generation: int, lease_s: float, min_learners: int, remembers: bool = True) -> None:
        """``generation`` is the newest one that an earlier life of this server has noted.

        Without one the run is new, if this server ``remembers`` what it notes.
        """
        self._remembers = remembers
        self._lease_s = lease_s
        self._min_learners = min_learners
        self._generation = generation
        self._is_collecting = True
        """Restarted, and still finding out who trains."""
        self._members: tuple[Member, ...] = ()
        self._begin_s: float | None = None
        """When collecting (with the first that was heard) or gathering began."""
        self._since: Mapping[tuple[str, int], int] = {}
        """Since when the members of the last view have been members."""
        self._seen: OrderedDict[str, _Seen] = OrderedDict()  # whose lease is the next to end comes first
        self._quarantine = Quarantine()
        self._absent = Absent()
        self._blank_s: float | None = None
        """Since when this gathering has been waiting for a checkpoint."""
        self.held_version = NO_VERSION
        """The version that the server holds, which keeps this up to date."""
        self.restored_version = NO_VERSION
        """The version that it began with."""
        self._clock = WakingClock()
        self._time_s = 0.0
        """On this clock."""
        self.holder = 0
        """The rank of the member whose state all others take over."""

    @property
    def generation(self) -> int:
        """Of the members; without members, of the view that is over; NO_GENERATION if nothing is known."""
        return NO_GENERATION if self._is_collecting else self._generation

    @property
    def members(self) -> tuple[Member, ...]:
        """In the order of their ranks; none until the next view is formed."""
        return self._members

    def __len__(self) -> int:
        """Learners that attend."""
        return len(self._seen)

    @property
    def is_about_to_be_given_more(self) -> bool:
        """Those who attend have a newer state than this server, which is young, and are enough to publish it.

        Who trains has said which version it had when it last stood, and may have far more by now.
        """
        if self._clock.age_s >= LATE_S or len(self) < self._min_learners:
            return False
        attends = [seen.attend for seen in self._seen.values()]
        nothing_came = self.held_version <= self.restored_version
        trains = any(attend.phase == "training" for attend in attends)
        is_newer = any(attend.version > max(self.held_version, 0) for attend in attends)
        return is_newer or (trains and nothing_came)

    def attends(self, client: Client) -> bool:
        """Whether this very process does."""
        seen = self._seen.get(client.client_id)
        return seen is not None and seen.attend.sender.incarnation == client.incarnation

    def attend(self, attend: Attend, now_s: float) -> bool:
        """A learner says what it does. Its answer is the view as it is after this.

        False if it cannot train with the others: it is to be refused, and nothing has changed.
        """
        self._time_s = self._clock.advance(now_s)
        if not self._is_credible(attend):
            return True
        if self._is_alien(attend):
            self._absent.came(attend)
            return False
        self._hear(attend)
        self._end_if_over(attend)
        self._settle()
        name = attend.sender.client_id
        member = self._member(name)
        if member is not None and member.incarnation == attend.sender.incarnation:
            self._seen[name] = replace(self._seen[name], is_sent=True)
        return True

    def tick(self, now_s: float) -> None:
        """Time passed."""
        self._time_s = self._clock.advance(now_s)
        self._settle()

    def next_deadline_s(self) -> float:
        """When ``tick`` has something to do; infinity if never."""
        deadlines_s = [seen.heard_s + self._lease_s for seen in list(self._seen.values())[:1]]
        if self._is_collecting and self._begin_s is not None and self._seen:
            deadlines_s.append(self._begin_s + self._patience_s())
        if self._is_gathering and self._begin_s is not None:
            deadlines_s += [seen.heard_s + QUIET_S for seen in self._there() if not seen.stands]
            ends_s = [self._begin_s + GATHER_S]
            ends_s += [] if self._blank_s is None else [self._blank_s + RETURN_S]
            away = self._absent.newest(NO_VERSION, self._time_s) if self._seen else None
            ends_s += [] if away is None else [away.until_s, self._begin_s + AWAY_S]
            deadlines_s += [end_s for end_s in ends_s if end_s > self._time_s]
        return self._clock.monotonic_s(min(deadlines_s, default=math.inf))

    # --- what is heard ------------------------------------------------------------------------------------

    def _is_credible(self, attend: Attend) -> bool:
        """False for a process that was given up for dead, and for what cannot be."""
        if attend.generation > self._generation + LARGEST_LEAP:
            return False
        seen = self._seen.get(attend.sender.client_id)
        if seen is None:
            return len(self._seen) < MAX_LEARNERS
        return attend.sender.incarnation >= seen.attend.sender.incarnation

    def _is_alien(self, attend: Attend) -> bool:
        """Whether another configuration than its own counts, as one does for all that attend.

        Whoever came first has named it, and it stays until all of them are gone. But those who have trained
        and find a newcomer with a restarted server count for more than that one, also if it has been given a
        view meanwhile, because they are a little late.
        """
        name = attend.sender.client_id  # whose former life does not count
        others = [
            seen.attend for other, seen in self._seen.items() if other != name and self._has_lease(seen)
        ]
        if all(other.config == attend.config for other in others):
            return False
        if self._is_of_an_earlier_life(attend):
            return False
        have_trained = any(other.has_trained or other.phase == "training" for other in others)
        is_first = attend.has_trained and not self._members and not have_trained
        return not is_first

    def _is_of_an_earlier_life(self, attend: Attend) -> bool:
        """Whether it was trained in a view that this life of the server, which is young, has not issued."""
        if self._clock.age_s >= LATE_S or not (attend.phase == "training" or attend.has_trained):
            return False
        if attend.generation != self._generation:
            return attend.generation > self._generation
        identity = (attend.sender.client_id, attend.sender.incarnation)
        members = {(member.client_id, member.incarnation) for member in self._members} or set(self._since)
        return attend.phase == "training" and identity not in members

    def _hear(self, attend: Attend) -> None:
        if self._begin_s is None:
            self._begin_s = self._time_s
        self._seen.pop(attend.sender.client_id, None)
        for seen in [seen for seen in self._seen.values() if seen.attend.config != attend.config]:
            self._forget(seen)
        if attend.phase == "leaving":
            self._absent.left(attend, self._time_s)
        else:
            self._absent.came(attend)
            self._seen[attend.sender.client_id] = _Seen(attend=attend, heard_s=self._time_s)

    def _end_if_over(self, attend: Attend) -> None:
        """End the view if it cannot go on after this."""
        if attend.generation > self._generation:  # issued by a life of this server that left no note of it
            self._generation = attend.generation
            if not self._is_collecting:
                self._gather("outdated", attend.sender)
        elif self._members:
            reason = self._why_over(attend)
            if reason is not None:
                self._gather(reason, attend.sender)

    def _why_over(self, attend: Attend) -> str | None:
        """After this the view is over, because ...; None if it is not."""
        member = self._member(attend.sender.client_id)
        is_of_this_view = attend.generation == self._generation
        if member is None:
            if attend.phase == "standing":
                may_join = self._quarantine.may_join(attend.sender.client_id, self._time_s)
                return "joins" if may_join else None
            # It trains in a view of the same number, which an earlier life of this server issued.
            return "issued_twice" if attend.phase == "training" and is_of_this_view else None
        if attend.phase == "leaving":
            return "leaves"
        if attend.sender.incarnation != member.incarnation:
            return "restarted"
        # Who stands after an earlier generation just has not heard of this one yet.
        return "broken" if attend.phase == "standing" and is_of_this_view else None

    def _member(self, client_id: str) -> Member | None:
        return next((member for member in self._members if member.client_id == client_id), None)

    # --- time ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Do what it is time for."""
        self._expire()
        if self._members:
            self._quarantine.note(self.held_version, self._time_s)
        if self._is_collecting:
            if not self._seen:
                self._begin_s = None
            self._adopt_or_give_up()
        if self._is_gathering:
            self._form_if_ready()

    def _expire(self) -> None:
        while self._seen:
            seen = next(iter(self._seen.values()))
            if self._has_lease(seen):
                return
            self._absent.left(seen.attend, self._time_s)
            self._forget(seen)

    def _has_lease(self, seen: _Seen) -> bool:
        """A lease ends at, not after, its last moment."""
        return seen.heard_s + self._lease_s > self._time_s

    def _forget(self, seen: _Seen) -> None:
        del self._seen[seen.attend.sender.client_id]
        if self._member(seen.attend.sender.client_id) is not None:
            self._gather("silent", seen.attend.sender)

    @property
    def _waited_s(self) -> float:
        return 0.0 if self._begin_s is None else self._time_s - self._begin_s

    # --- gathering ----------------------------------------------------------------------------------------

    @property
    def _is_gathering(self) -> bool:
        return not self._is_collecting and not self._members

    def _gather(self, reason: str, client: Client | None = None) -> None:
        """From now on those who hear this are to stop and to stand."""
        if self._members:
            self._quarantine.note(self.held_version, self._time_s)
            self._quarantine.end(is_broken=reason == "broken")
            self._since = {(member.client_id, member.incarnation): member.since for member in self._members}
        self._is_collecting, self._members = False, ()
        self.holder = 0
        self._begin_s, self._blank_s = self._time_s, None
        name = None if client is None else client.client_id
        _log.info("gathering", generation=self._generation, reason=reason, learner=name)

    def _there(self) -> list[_Seen]:
        return [seen for seen in self._seen.values() if self._time_s - seen.heard_s < QUIET_S]

    def _form_if_ready(self) -> None:
        there, quarantine = self._there(), self._quarantine
        others = [seen.attend.sender.client_id for seen in there if not seen.stands]
        if self._waited_s < GATHER_S and not all(quarantine.waits(name, self._time_s) for name in others):
            return
        ready = sorted((seen.attend for seen in there if seen.stands), key=_rank_key)
        if not ready:
            return
        quarantine.judge(ready, self._time_s)
        admitted = quarantine.admitted(ready, self._min_learners, self._time_s)
        if len(admitted) < self._min_learners or self._lacks_checkpoint(ready) or self._lacks_newest(ready):
            return
        self._form(admitted)

    def _lacks_checkpoint(self, standing: Sequence[Attend]) -> bool:
        """The run has been trained, by none of them, and somebody with a checkpoint may still come."""
        if self.held_version <= 0 or any(attend.has_trained or attend.version for attend in standing):
            return False
        if self._blank_s is None:
            self._blank_s = self._time_s
        return self._time_s - self._blank_s < RETURN_S

    def _lacks_newest(self, standing: Sequence[Attend]) -> bool:
        """Nothing was published yet, and somebody has fallen silent or gone with more than they all have."""
        if self.held_version > self.restored_version or self._waited_s >= AWAY_S:
            return False
        version = max(self.held_version, *(attend.version for attend in standing))
        there = {seen.attend.sender.client_id for seen in self._there()}
        silent = [seen.attend for name, seen in self._seen.items() if name not in there]
        away = self._absent.newest(version, self._time_s)
        if away is not None:
            left_s = min(away.until_s - self._time_s, AWAY_S - self._waited_s)
            name, version_away = away.attend.sender.client_id, away.attend.version
            _log_waiting.info("waiting", learner=name, policy_version=version_away, for_s=round(left_s))
        return away is not None or any(attend.version > version for attend in silent)

    def _form(self, ready: Sequence[Attend]) -> None:
        self._generation += 1
        self._members = tuple(
            _member_of(a, self._since.get((a.sender.client_id, a.sender.incarnation), self._generation))
            for a in ready
        )
        self.holder = holder(ready)
        self._begin_quarantine(ready, has_trained=False)
        self._log_formed("formed")

    def _begin_quarantine(self, group: Sequence[Attend], *, has_trained: bool) -> None:
        version = max(self.held_version, *(attend.version for attend in group))
        self._quarantine.begin(self._members, version, self._time_s, has_trained=has_trained)

    def _log_formed(self, event: str) -> None:
        learners = ",".join(member.client_id for member in self._members)
        holder = self._members[self.holder].client_id
        _log.info(event, generation=self._generation, learners=learners, holder=holder)

    # --- after a restart ----------------------------------------------------------------------------------

    def _adopt_or_give_up(self) -> None:
        attends = [seen.attend for seen in self._seen.values()]
        group = [a for a in attends if a.phase == "training" and a.generation == self._generation]
        group.sort(key=lambda attend: attend.rank)
        if group and [(a.rank, a.world_size) for a in group] == [(i, len(group)) for i in range(len(group))]:
            self._is_collecting = False
            self._members = tuple(_member_of(attend, attend.since) for attend in group)
            self.holder = holder(group)
            self._begin_quarantine(group, has_trained=True)
            self._log_formed("taken_over")
        elif self._seen and (self._is_new(attends) or self._waited_s >= self._patience_s()):
            self._since = {(a.sender.client_id, a.sender.incarnation): a.since for a in group}
            self._gather("started")

    def _is_new(self, attends: Sequence[Attend]) -> bool:
        """Whether nothing shows that more was trained than this server began with: nobody is waited for."""
        newest = max(self.held_version, *(attend.version for attend in attends))
        has_begun = self._generation != NO_GENERATION or newest > max(self.restored_version, 0)
        return self._remembers and not has_begun

    def _patience_s(self) -> float:
        """Those who stand need not wait for long for others who may train, if anything is known of them."""
        attends = [seen.attend for seen in self._seen.values()]
        if _are_of_one_view(attends, self._generation):
            return max(ADOPT_S, self._lease_s)
        trains = any(attend.phase == "training" for attend in attends)
        return self._lease_s if trains or not self._remembers else min(RETURN_S, self._lease_s)


def _are_of_one_view(attends: Sequence[Attend], generation: int) -> bool:
    """Whether all of these train in this generation, as members of one group."""
    train = all(attend.phase == "training" and attend.generation == generation for attend in attends)
    sizes = {attend.world_size for attend in attends}
    ranks = {attend.rank for attend in attends}
    return train and len(sizes) == 1 and len(ranks) == len(attends)


def _member_of(attend: Attend, since: int) -> Member:
    return Member(
        client_id=attend.sender.client_id,
        incarnation=attend.sender.incarnation,
        endpoint=attend.endpoint,
        store=attend.store,
        since=since,
    )


def _rank_key(attend: Attend) -> tuple[list[str | int], str]:
    """Names by their numbers: learner-2 comes before learner-10, so that learner-0 leads while it lives."""
    name = attend.sender.client_id
    parts = re.split(r"(\d+)", name)  # texts at even places, numbers at odd ones
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
