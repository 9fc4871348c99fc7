"""The attendance: a thread that keeps this learner's place among the learners.

    consumes   what the loop does: it stands, trains or leaves
    produces   an ``Attend`` several times a second; the newest ``View``, and how many actors there are
    waits for  the parameter server's answer; the next beat
    may drop   nothing

The answers decide who trains with whom (``gathering``), and end the wait for a peer that is gone (``group``).
While the parameter server is away the last view holds: those who are in a group go on training.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from services.ops.logging import get_logger
from services.wire import codec
from services.wire.codec import WireError
from services.wire.messages import NO_GENERATION, Attend, Buffer, Client, Refusal, View
from services.wire.sockets import RENEW_S, Requester

BEAT_S = 0.25
STANDING_BEAT_S = 0.05
"""Who stands wants to know at once."""
POLL_S = 0.1
ANSWER_S = 2.0
LEAVE_S = 1.0
FEWER_ACTORS_S = 60.0
"""For how long there must be fewer actors than before until we believe it: a restarted server knows none at
first, and rollouts of actors that have gone are still under way."""

_log = get_logger("attendance").limited(10.0)


class Attendance:
    """``run`` is the thread's; all else is for the learner's loop."""

    def __init__(
        self,
        *,
        connect: Callable[[], Requester],
        client: Client,
        run_id: str,
        endpoint: str,
        config: str,
        max_message_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``endpoint`` is where actors reach this learner, ``config`` its ``fingerprint``."""
        self._connect = connect
        self._expected = codec.Expected(run_id=run_id, max_message_bytes=max_message_bytes)
        self._clock = clock
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._says = Attend(
            run_id=run_id,
            sender=client,
            endpoint=endpoint,
            phase="standing",
            generation=NO_GENERATION,
            version=0,
            has_trained=False,
            store="",
            rank=0,
            world_size=1,
            since=NO_GENERATION,
            config=config,
        )
        self._is_known = False
        """Whether the server has answered to what this learner says now."""
        self._actors: deque[tuple[float, int]] = deque()
        """Until when there were so many: of the last answers those that no later one exceeds."""
        self.view: View | None = None
        """The newest one."""
        self.num_actors = 0
        """That hold seats, lately."""
        self.trouble: str | None = "no answer from the parameter server yet"
        """In a few words why nothing is known of the other learners, or None."""
        self.differs = False
        """The server says that the others train with another configuration, and that this learner may take
        their place: it waits for them to go."""

    def stand(self, *, version: int, has_trained: bool, store: str) -> None:
        """In no group any more, with ``version`` complete, and ready for the next."""
        generation = max(self._says.generation, NO_GENERATION if self.view is None else self.view.generation)
        self._say(
            replace(
                self._says,
                phase="standing",
                generation=generation,
                version=version,
                has_trained=has_trained,
                store=store,
            )
        )

    def train(self, view: View, rank: int) -> None:
        """In the group of ``view``, or on the way into it."""
        self._say(
            replace(
                self._says,
                phase="training",
                generation=view.generation,
                store="",
                rank=rank,
                world_size=len(view.members),
                since=view.members[rank].since,
            )
        )

    def leave(self, version: int) -> None:
        """On purpose, with this version. Returns once the server knows, or after ``LEAVE_S``; ``run`` too."""
        has_begun = self._says.store or self._says.phase != "standing"
        self._say(replace(self._says, phase="leaving", version=version, store=""))
        with self._changed:
            if has_begun:
                self._changed.wait_for(lambda: self._is_known, LEAVE_S)
            self._ended.set()
            self._changed.notify_all()

    def wait_for_next(self, timeout_s: float) -> tuple[View, int] | None:
        """A view that came since this learner stands, and its rank in it; None if none came in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._next() is not None, timeout_s)
            return self._next()

    def is_over(self, generation: int) -> bool:
        """Whether the group of ``generation`` is to train no more, or not with this learner."""
        view = self.view
        if view is None or view.generation < generation:
            return False
        own = (self._says.sender.client_id, self._says.sender.incarnation)
        members = [(member.client_id, member.incarnation) for member in view.members]
        return view.generation > generation or own not in members

    def run(self) -> None:
        """Attend from when it first stands until it leaves."""
        with self._changed:
            self._changed.wait_for(lambda: self._says.store or self._ended.is_set())
        while not self._ended.is_set():
            try:
                with self._connect() as requester:
                    self._converse(requester)
            except OSError as error:  # no file is left to open, say
                self._trouble(f"cannot connect ({error})")
                self._pause(ANSWER_S)

    def _converse(self, requester: Requester) -> None:
        """Until the server falls silent or this learner leaves."""
        while not self._ended.is_set():
            says, asked_s = self._says, self._clock()
            began_s = asked_s
            breaks = requester.breaks
            while not requester.send(codec.encode(says), POLL_S):
                self._trouble(requester.trouble or "parameter server not reachable")
                if self._ended.is_set() or self._clock() - began_s > RENEW_S:
                    return
                says, asked_s, breaks = self._says, self._clock(), requester.breaks
            if not self._hear(requester, says, asked_s + ANSWER_S, breaks):
                return
            self._pause(STANDING_BEAT_S if self._says.phase == "standing" else BEAT_S, unless=says)

    def _hear(self, requester: Requester, says: Attend, deadline_s: float, breaks: int) -> bool:
        """False if there is no answer; ``breaks`` are those of before the request."""
        while not self._ended.is_set():
            frames = requester.receive(POLL_S)
            if frames is not None:
                self._take(frames, says)
                return True
            if requester.breaks != breaks:
                self._trouble("parameter server has gone")
                return False
            if self._clock() > deadline_s:
                self._trouble("parameter server does not answer")
                return False
        return False

    def _take(self, frames: list[Buffer], says: Attend) -> None:
        try:
            answer = codec.decode(frames, self._expected)
        except WireError as error:
            self._trouble(f"unusable answer: {error}")
            self._pause(ANSWER_S)
            return
        if not isinstance(answer, View):
            text = answer.text if isinstance(answer, Refusal) else f"a {type(answer).__name__} for an answer"
            differs = isinstance(answer, Refusal) and answer.reason == "config"
            self._trouble(f"parameter server refuses: {text}", differs=differs)
            self._pause(ANSWER_S)
            return
        self.differs = False
        self._count_actors(answer.num_seats)
        own = self._says.sender
        superseded = any(
            member.client_id == own.client_id and member.incarnation > own.incarnation
            for member in answer.members
        )
        if superseded:
            self._trouble(f"another learner is called {own.client_id!r} too, and began later")
        with self._changed:
            self.view = answer
            self.trouble = self.trouble if superseded else None
            self._is_known = says is self._says
            self._changed.notify_all()

    def _next(self) -> tuple[View, int] | None:
        view, says = self.view, self._says
        if view is None or says.phase != "standing" or view.generation <= says.generation:
            return None
        own = (says.sender.client_id, says.sender.incarnation, says.store)
        for rank, member in enumerate(view.members):
            if (member.client_id, member.incarnation, member.store) == own:
                return view, rank
        return None

    def _say(self, says: Attend) -> None:
        with self._changed:
            self._says, self._is_known = says, False
            self._changed.notify_all()

    def _pause(self, seconds: float, unless: Attend | None = None) -> None:
        """Until the next beat, or until there is something else to say."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended.is_set() or (unless is not None and self._says is not unless), seconds
            )

    def _count_actors(self, num_actors: int) -> None:
        """The most that there were in ``FEWER_ACTORS_S``; what was answered counts until the next answer."""
        now_s = self._clock()
        if self._actors:
            self._actors[-1] = (now_s, self._actors[-1][1])
        while self._actors and self._actors[-1][1] <= num_actors:
            self._actors.pop()
        self._actors.append((now_s, num_actors))
        while self._actors[0][0] < now_s - FEWER_ACTORS_S:
            self._actors.popleft()
        self.num_actors = self._actors[0][1]

    def _trouble(self, text: str, *, differs: bool = False) -> None:
        self.trouble, self.differs = text, differs
        _log.warning("not_attending", reason=text)
