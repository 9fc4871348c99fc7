"""Which newcomers the others can train with, found out by trying: sans-I/O, used by ``views.py``.

A learner may reach the parameter server while other learners do not reach it. Every group with it fails, and
would be formed anew with it for ever. So a group that broke before it made a step goes on without those of
its members who have never been in a group that made one. Each of them waits, longer every time, and then they
are let in again one by one, so that one that nobody can reach does not keep out those beside it. All is
forgotten with the first step that it takes part in.

Somebody has to go on: if all are newcomers, the one whose state the others take over does, alone. Should it
be the one that cannot be reached, then nobody can join it, and after a few groups it is the one that waits.

Nobody waits whom ``min_learners`` needs: without it nobody would train at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.ops.logging import get_logger
from services.wire.codec import MAX_LEARNERS
from services.wire.messages import Attend, Member

FIRST_WAIT_S = 5.0
LONGEST_WAIT_S = 60.0
"""The wait doubles up to this."""
FAILURES_ALONE = 3
"""Groups that break with one that has only trained alone, until two others or more are tried without it."""
PROVEN_S = 60.0
"""A group that is up for so long is a good one even if it has had nothing to train on. No learner waits for a
peer for so long."""

_log = get_logger("views")

Identity = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wait:
    times: int
    """Groups in a row that broke with it."""
    until_s: float


class Quarantine:
    """Of every view: ``begin``, ``note`` while it is there, ``end``, and ``judge`` before the next one."""

    def __init__(self) -> None:
        self._members: frozenset[Identity] = frozenset()
        """Of the newest view."""
        self._version = 0
        """Above which it has made a step."""
        self._began_s = 0.0
        self._is_proven = True
        """It has made a step, or there is none."""
        self._is_suspicious = False
        """It broke, and whether it had made a step is not known yet."""
        self._proven: frozenset[Identity] = frozenset()
        """Who were together in a group that made a step."""
        self._waits: dict[str, _Wait] = {}
        self._failures_alone = 0

    def begin(self, members: Sequence[Member], version: int, now_s: float, *, has_trained: bool) -> None:
        """A view is formed, or (``has_trained``) taken over; none of its members has a newer version."""
        self._members = frozenset((member.client_id, member.incarnation) for member in members)
        self._version, self._began_s = version, now_s
        self._is_proven = self._is_suspicious = False
        if has_trained:
            self._proven = self._members

    def note(self, held_version: int, now_s: float) -> None:
        """What the server holds while the view is there."""
        if not self._is_proven and (held_version > self._version or now_s - self._began_s >= PROVEN_S):
            self._prove()

    def end(self, *, is_broken: bool) -> None:
        """Nobody is to blame for a view that ends because somebody joins or leaves."""
        self._is_suspicious = is_broken and not self._is_proven
        self._is_proven = True

    def judge(self, standing: Sequence[Attend], now_s: float) -> None:
        """After ``end``: all who were in the view have said what they bring, those who are there at least."""
        if not self._is_suspicious:
            return
        self._is_suspicious = False
        survivors = [attend for attend in standing if _identity(attend) in self._members]
        if any(attend.version > self._version for attend in survivors):
            self._prove()
            return
        newcomers = self._members - self._proven
        if not newcomers:  # if it goes on like this, one of them cannot be reached any more
            self._proven -= self._members
            return
        if survivors and not any(_identity(attend) in self._proven for attend in survivors):
            self._proven = frozenset({_identity(survivors[holder(survivors)])})
            newcomers -= self._proven
        self._failures_alone += len(self._proven) == 1
        if self._failures_alone >= FAILURES_ALONE and len(standing) > 2:
            newcomers, self._proven, self._failures_alone = self._proven, frozenset(), 0
            self._waits.clear()
        for name, _ in self._proven:
            self._waits.pop(name, None)
        self._quarantine(sorted(name for name, _ in newcomers), now_s)

    def may_join(self, name: str, now_s: float) -> bool:
        """Whether it may end the view to be in the next one."""
        wait = self._waits.get(name)
        return wait is None or (self._is_proven and wait.until_s <= now_s)

    def waits(self, name: str, now_s: float) -> bool:
        wait = self._waits.get(name)
        return wait is not None and wait.until_s > now_s

    def admitted(self, standing: Sequence[Attend], min_learners: int, now_s: float) -> list[Attend]:
        """Of those who stand, in their order: the next view."""
        tried = [attend for attend in standing if attend.sender.client_id in self._waits]
        tried.sort(key=lambda attend: self._place(attend.sender.client_id, now_s))
        room = min_learners - (len(standing) - len(tried))
        if tried and not self.waits(tried[0].sender.client_id, now_s):
            room = max(1, room)
        outside = {attend.sender.client_id for attend in tried[max(0, room) :]}
        return [attend for attend in standing if attend.sender.client_id not in outside]

    def _place(self, name: str, now_s: float) -> tuple[bool, int, float]:
        """Who has failed less often is tried before others."""
        wait = self._waits[name]
        return wait.until_s > now_s, wait.times, wait.until_s

    def _prove(self) -> None:
        self._is_proven, self._proven = True, self._members
        if len(self._members) > 1:
            self._failures_alone = 0
        for name, _ in self._members:
            self._waits.pop(name, None)

    def _quarantine(self, names: Sequence[str], now_s: float) -> None:
        if len(self._waits) > MAX_LEARNERS:  # many have come and gone
            self._waits = {name: wait for name, wait in self._waits.items() if wait.until_s > now_s}
        for name in names:
            times = self._waits[name].times + 1 if name in self._waits else 1
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(times - 1, 10))
            self._waits[name] = _Wait(times=times, until_s=now_s + wait_s)
            _log.warning("quarantined", learner=name, for_s=wait_s)


def holder(ranks: Sequence[Attend]) -> int:
    """The rank with the newest version; of those that are equal, one that was trained, not only restored."""
    return max(range(len(ranks)), key=lambda rank: (ranks[rank].version, ranks[rank].has_trained, -rank))


def _identity(attend: Attend) -> Identity:
    return attend.sender.client_id, attend.sender.incarnation
