"""Who went away with a newer state than others have, and may come back: sans-I/O, used by ``views.py``.

A server that was replaced and has no disk holds no weights until the next group publishes. A learner that
leaves before that takes the newest state with it, saves it and is soon started again. Others with an older
checkpoint wait for it: a run is not to go back for half a minute, and no update to be made twice.

It is waited for once. Who is started again and again with a state that it never shares holds nobody up.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.wire.codec import MAX_LEARNERS
from services.wire.messages import NO_VERSION, Attend

AWAY_S = 60.0
"""A pod that is replaced is back within as much, also where the node is busy: 20 s were seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Away:
    """A learner that is waited for."""

    attend: Attend
    """The last that was heard of it. Its state is that of this version, or newer."""
    until_s: float


class Absent:
    """``left`` and ``came`` are told of all learners."""

    def __init__(self) -> None:
        self._away: dict[str, Away] = {}
        self._returned_version = NO_VERSION
        """The newest state that somebody came back for, in another life."""

    def left(self, attend: Attend, now_s: float) -> None:
        """This is the last that was heard of a learner."""
        self._away = {name: away for name, away in self._away.items() if away.until_s > now_s}
        if attend.version > self._returned_version and len(self._away) < MAX_LEARNERS:
            self._away[attend.sender.client_id] = Away(attend=attend, until_s=now_s + AWAY_S)

    def came(self, attend: Attend) -> None:
        """A learner is there, and what it brings is all that it has; or it was refused."""
        away = self._away.pop(attend.sender.client_id, None)
        if away is not None and away.attend.sender.incarnation != attend.sender.incarnation:
            self._returned_version = max(self._returned_version, away.attend.version)

    def newest(self, version: int, now_s: float) -> Away | None:
        """Who may come back with the newest state of all, if that is newer than ``version``."""
        newer = [
            away for away in self._away.values() if away.attend.version > version and away.until_s > now_s
        ]
        return max(newer, key=lambda away: away.attend.version, default=None)
