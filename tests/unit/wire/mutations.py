"""Damaged messages. They start from valid ones, or most would be refused by the first check they meet."""

import msgpack
import numpy as np

from services.wire.codec import encode, to_bytes
from tests.unit.wire.samples import LIMIT, messages

NASTY: list[object] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64 - 1,
    -(2**63),
    float("nan"),
    float("inf"),
    1e308,
    "",
    "zstd",
    "none",
    "run",
    "x" * 5000,
    b"",
    b"\x00" * 5000,
    [],
    [[]],
    [[[[[]]]]],
    [0] * 5000,
    {},
    {"a": 1},
    msgpack.Timestamp(1),
]


class Mutator:
    """Draws one damaged list of frames after another."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._valid = [[bytes(frame) for frame in encode(message)] for message in messages()]
        self._changes = [
            self._flip,
            self._flip,
            self._truncate,
            self._grow,
            self._drop,
            self._double,
            self._swap,
            self._rewrite_header,
            self._rewrite_header,
            self._rewrite_header,
        ]

    def draw(self) -> list[bytes]:
        frames = list(self._valid[self._below(len(self._valid))])
        for _ in range(1 + self._below(3)):
            if not frames:
                frames = [self._noise(64)]
            self._changes[self._below(len(self._changes))](frames)
        return frames

    def draw_joined(self) -> bytes:
        """One message in one piece, damaged; every other time where the lengths of its frames stand."""
        frames = self._valid[self._below(len(self._valid))]
        joined = [to_bytes(frames)]
        if self._below(2):
            start = bytearray(joined[0])
            start[self._below(1 + 4 * len(frames))] = self._below(256)
            joined = [bytes(start)]
        else:
            [self._flip, self._truncate, self._grow][self._below(3)](joined)
        return joined[0]

    def _below(self, end: int) -> int:
        return int(self._rng.integers(end))

    def _noise(self, longest: int) -> bytes:
        return self._rng.bytes(self._below(longest))

    def _flip(self, frames: list[bytes]) -> None:
        which = self._below(len(frames))
        frame = bytearray(frames[which])
        for _ in range(1 + self._below(4)):
            if frame:
                frame[self._below(len(frame))] = self._below(256)
        frames[which] = bytes(frame)

    def _truncate(self, frames: list[bytes]) -> None:
        which = self._below(len(frames))
        frames[which] = frames[which][: self._below(len(frames[which]) + 1)]

    def _grow(self, frames: list[bytes]) -> None:
        which = self._below(len(frames))
        at = self._below(len(frames[which]) + 1)
        size = 4 * LIMIT if self._below(50) == 0 else 40
        frames[which] = frames[which][:at] + self._noise(size) + frames[which][at:]

    def _drop(self, frames: list[bytes]) -> None:
        del frames[self._below(len(frames))]

    def _double(self, frames: list[bytes]) -> None:
        copies = 70 if self._below(50) == 0 else 1
        frames.extend([frames[self._below(len(frames))]] * copies)

    def _swap(self, frames: list[bytes]) -> None:
        a, b = self._below(len(frames)), self._below(len(frames))
        frames[a], frames[b] = frames[b], frames[a]

    def _rewrite_header(self, frames: list[bytes]) -> None:
        try:
            header = msgpack.unpackb(frames[0])
        except Exception:  # noqa: BLE001  (an earlier change has broken it already)
            return
        target = header
        while isinstance(target, list) and target:
            at = self._below(len(target))
            if isinstance(target[at], list) and self._below(3):
                target = target[at]
                continue
            target[at] = NASTY[self._below(len(NASTY))]
            break
        frames[0] = msgpack.packb(header)
