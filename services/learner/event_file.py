"""TensorBoard's framing of events.

Not tensorboardX's writer: its thread dies of a full disk, and then its callers wait for ever for room in its
queue.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


def event_file_name() -> str:
    """As TensorBoard looks for it; another one for every life of the learner."""
    return f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"


def file_header() -> bytes:
    """What an event file begins with."""
    return _record(Event(file_version="brain.Event:2"))


def event(time_s: float, step: int, values: Mapping[str, float]) -> bytes:
    """Values by tag, at one step."""
    tagged = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    return _record(Event(wall_time=time_s, step=step, summary=Summary(value=tagged)))


def _record(message: Event) -> bytes:
    data: bytes = message.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(
        (length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data)))
    )
