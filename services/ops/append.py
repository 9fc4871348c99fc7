"""Reports grow by whole pieces or not at all: a disk that is full for a while costs no more than these."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path


def append(path: Path, data: bytes, header: bytes = b"") -> None:
    """Add ``data`` to the file, in a new one after ``header``; or, with an OSError, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        data = data if end else header + data
        written = 0
        try:
            written = file.write(data)
        finally:
            if written < len(data):
                file.truncate(end)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finite(value: float | None) -> float | None:
    """For JSON, which knows no other numbers: null."""
    return value if value is not None and math.isfinite(value) else None
