"""A command that SIGTERM or SIGHUP ends as Ctrl-C does: everything on the way out is given back.

Left to themselves both end a process on the spot, with a hidden cursor, files and children left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def unwound_by_signals() -> Iterator[None]:
    """The first of ``SIGNALS`` becomes a SystemExit of 128 + its number; later ones find us on the way out.

    Main thread only. What is ignored already stays so, as nohup wants it.
    """
    command = os.getpid()
    received: list[int] = []

    def unwind(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != command:  # a forked child must not clean up for its parent
            os._exit(128 + number)
        if not received:
            received.append(number)
            raise SystemExit(128 + number)

    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, unwind) for number in heeded}
    try:
        yield
    except Exception:
        if received:  # a closed terminal, for example, that the cursor cannot be given back to
            raise SystemExit(128 + received[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
