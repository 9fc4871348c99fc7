"""How a pod comes to its end: by signal, because its parent is gone, or because one of its threads failed.

All of these set ``stopping``, which every loop of the pod waits on; the pod's ``__main__`` then shuts down in
order and returns ``exit_code``. Nothing here ends a thread or the process by force, with two exceptions: a
second Ctrl-C, and a pod that is still importing what it is made of, where nothing waits on anything yet.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable

from services.ops.logging import get_logger

PARENT_CHECK_S = 0.5
SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = get_logger("lifecycle")


class Lifecycle:
    """One per process. All methods may be called from any thread, except ``install_signals``."""

    def __init__(self, *, has_begun: bool = True) -> None:
        """Until ``begin``, unless it ``has_begun``, whatever stops the pod ends its process at once."""
        self.stopping = threading.Event()
        self._has_begun = has_begun
        self._lock = threading.Lock()
        self._exit_code = 0

    @property
    def exit_code(self) -> int:
        """0, or that of the first failure."""
        return self._exit_code

    def begin(self) -> None:
        """From here on there is something to shut down in order."""
        with self._lock:
            self._has_begun = True

    def stop(self, reason: str, exit_code: int = 0) -> None:
        """Ask everything to stop. Only the first call is logged; the first exit code other than 0 stays."""
        with self._lock:
            first = not self.stopping.is_set()
            self._exit_code = self._exit_code or exit_code
            self.stopping.set()
        if first:
            _log.info("stopping", reason=reason)
        with self._lock:
            if not self._has_begun:  # to import torch takes seconds, and minutes with a tenth of a core
                os._exit(self._exit_code)

    def fail(self, error: BaseException, part: str = "main", exit_code: int = 1) -> None:
        """An unexpected error in ``part`` of the pod: log it with its traceback and stop."""
        _log.crash("failed", error, part=part)
        self.stop(f"{part} failed", exit_code)

    def thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        """Start ``target`` in a daemon thread. It should return soon after ``stopping`` is set."""

        def supervised() -> None:
            try:
                target()
            except Exception as error:  # noqa: BLE001  (whatever it is, a pod with a dead thread must not go on)
                self.fail(error, part=name)

        thread = threading.Thread(target=supervised, name=name, daemon=True)
        thread.start()
        return thread

    def install_signals(self) -> None:
        """SIGTERM and SIGINT stop the pod; a second SIGINT ends it at once. Main thread only.

        The handler itself does nothing, because Event.set would deadlock if the signal arrived while the main
        thread held the event's lock. Python also writes the signal's number to a socket, and a thread
        reads it there, which works even while the main thread is inside a long native call.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # first, or one could be lost here
        for number in SIGNALS:
            signal.signal(number, lambda _number, _frame: None)
        os.register_at_fork(
            before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_leave_signals_behind
        )

        def listen() -> None:
            interrupts = 0
            with reader, writer:  # the closure keeps both open as long as the process lives
                while received := reader.recv(1):
                    number = signal.Signals(received[0])
                    self.stop(number.name)
                    interrupts += number == signal.SIGINT
                    if interrupts > 1:
                        os._exit(128 + signal.SIGINT)

        threading.Thread(target=listen, name="signals", daemon=True).start()

    def watch_parent(self, pid: int, parent: Callable[[], int] = os.getppid) -> None:
        """Stop when this process is no longer a child of ``pid``: its launcher was killed."""

        def watch() -> None:
            while parent() == pid:
                if self.stopping.wait(PARENT_CHECK_S):
                    return
            self.stop("parent process is gone")

        self.thread("parent-watch", watch)


def _leave_signals_behind() -> None:
    """In a forked child (an asynchronous environment): die of signals and leave the parent's socket alone."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _unblock_signals()


def _block_signals() -> None:
    """From before the fork, so that no child takes its own early signal for its parent's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
