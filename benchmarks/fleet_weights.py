"""Publishes weights in a learner's place: noise of any size, which everybody is sent and nobody plays by."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from services.wire import codec
from services.wire.keys import load_keys
from services.wire.messages import Client, Publish, Published
from services.wire.sockets import Requester

ANSWER_S = 60.0
POLL_S = 0.1


class WeightsSource:
    """One connection to a parameter server, and weights for it."""

    def __init__(
        self, paramserver: str, keys: Path | None, run_id: str, size_bytes: int, max_message_bytes: int
    ) -> None:
        self._run_id = run_id
        self._expected = codec.Expected(run_id=run_id, max_message_bytes=max_message_bytes)
        self._sender = Client(client_id="fleet-weights", incarnation=time.time_ns())
        self._payload = os.urandom(size_bytes)
        self._requester = Requester(paramserver, max_message_bytes, load_keys(keys, "learner"))

    def publish(self, version: int) -> float:
        """Make ``version`` the newest; returns when it was sent, on the monotonic clock."""
        message = Publish(
            run_id=self._run_id,
            sender=self._sender,
            state="training",
            version=version,
            steps=version,
            payload=self._payload,
        )
        sent_s = time.monotonic()
        while not self._requester.send(codec.encode(message), POLL_S):
            if self._requester.trouble or time.monotonic() > sent_s + ANSWER_S:
                raise RuntimeError(f"version {version} could not be sent: {self._requester.trouble}")
        frames = self._requester.receive(ANSWER_S)
        answer = None if frames is None else codec.decode(frames, self._expected)
        if not isinstance(answer, Published) or answer.version != version:
            raise RuntimeError(f"version {version} was not taken: {answer}")
        return sent_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requester.close()
