"""Time in which this process could hear others: ``server.py`` and ``views.py`` count leases in it.

A process that was frozen has heard nobody, and that is nobody's silence: of the time between two turns of the
loop only so much counts as one turn can take. Whoever asked meanwhile is heard before any lease ends.
"""

from __future__ import annotations

LONGEST_TURN_S = 1.0
"""The loop turns twice as often."""


class WakingClock:
    """Runs like ``now_s``, which is monotonic, except while this process is frozen."""

    def __init__(self) -> None:
        self._start_s: float | None = None
        self._now_s = 0.0
        self._frozen_s = 0.0

    def advance(self, now_s: float) -> float:
        """It is ``now_s``. The time on this clock."""
        if self._start_s is None:
            self._start_s = self._now_s = now_s
        self._frozen_s += max(now_s - self._now_s - LONGEST_TURN_S, 0.0)
        self._now_s = max(now_s, self._now_s)
        return self._now_s - self._frozen_s

    @property
    def age_s(self) -> float:
        """Since it was first asked."""
        return 0.0 if self._start_s is None else self._now_s - self._frozen_s - self._start_s

    def monotonic_s(self, time_s: float) -> float:
        """When it will be ``time_s`` on this clock, unless the process is frozen once more."""
        return time_s + self._frozen_s
