"""An actor's sender as tests use it: learners by their addresses, and a message that needs no number.

And a stranger's, who sends what he likes, frame by frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import zmq

from services.wire.keys import Keys
from services.wire.messages import Buffer, Destination
from services.wire.sockets import RolloutSender


def sender_to(
    *endpoints: str, queue: int = 2, limit: int = 1 << 24, keys: Keys | None = None
) -> RolloutSender:
    """Connected to these learners."""
    sender = RolloutSender(queue, limit, keys)
    sender.follow([Destination(endpoint=endpoint, since=1) for endpoint in endpoints])
    return sender


def send(sender: RolloutSender, frames: Sequence[Buffer], timeout_s: float) -> bool:
    """To whoever has room; False if nobody has within ``timeout_s``."""
    learner = sender.choose(timeout_s)
    return learner is not None and learner.send(frames)


@contextmanager
def stranger_to(endpoint: str, timeout_s: float = 30.0) -> Iterator[zmq.Socket[bytes]]:
    """Who finds no room within ``timeout_s`` is told so by zmq.Again."""
    socket: zmq.Socket[bytes]
    with zmq.Context.instance().socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 2)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.SNDTIMEO, round(timeout_s * 1000))
        socket.connect(endpoint)
        yield socket
