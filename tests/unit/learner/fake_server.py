"""A parameter server of which the test is the brain: it takes each request and says what is answered."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeVar

from services.wire.codec import Expected, decode, encode
from services.wire.messages import Buffer, Message
from services.wire.sockets import Replier, Requester

RUN = "run"
LIMIT = 1 << 20
EXPECTED = Expected(run_id=RUN, max_message_bytes=LIMIT)
DEADLINE_S = 15.0

M = TypeVar("M", bound=Message)


class FakeServer:
    """A real socket; used by the test's own thread only."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory}/server"
        self._replier: Replier | None = None
        self._peer = b""

    def start(self) -> None:
        self._replier = Replier(self.endpoint, LIMIT)

    def stop(self) -> None:
        if self._replier is not None:
            self._replier.close()
            self._replier = None

    def connect(self) -> Requester:
        """A client's end."""
        return Requester(self.endpoint, LIMIT)

    def next(self, kind: type[M], timeout_s: float = DEADLINE_S) -> M:
        """The next request, which must be of this kind; ``answer`` goes to whoever sent it."""
        message = self.next_or_none(timeout_s)
        assert isinstance(message, kind), f"{message} where a {kind.__name__} belongs"
        return message

    def next_or_none(self, timeout_s: float) -> Message | None:
        """The next request, if there is one in time, or by the first look after that."""
        assert self._replier is not None
        deadline_s = time.monotonic() + timeout_s
        while True:
            left_s = deadline_s - time.monotonic()
            received = self._replier.receive(max(0.0, left_s))
            if received is not None:
                self._peer, frames, _ = received
                return decode([bytes(frame) for frame in frames], EXPECTED)
            if left_s <= 0.0:
                return None

    @property
    def peer(self) -> bytes:
        """The connection over which the last request came."""
        return self._peer

    def answer(self, message: Message) -> None:
        """Answer the last request."""
        self.answer_frames(encode(message))

    def answer_frames(self, frames: list[Buffer]) -> None:
        """Answer the last request with whatever a test has in mind."""
        assert self._send(frames), "who asked is gone"

    def answer_if_there(self, message: Message) -> bool:
        """Answer the last request; False if who asked has lost patience and is gone."""
        return self._send(encode(message))

    def _send(self, frames: list[Buffer]) -> bool:
        assert self._replier is not None
        return self._replier.send(self._peer, frames)
