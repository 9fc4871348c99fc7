"""A signal at an unlucky moment must not leave the trainer waiting for ever."""

from __future__ import annotations

import subprocess
import sys

UNLUCKY = """
import faulthandler, os, queue, signal, threading, time
from services.learner.batch import POLL_S, Batcher
from services.ops.lifecycle import Lifecycle

faulthandler.dump_traceback_later(15, exit=True)
batcher = object.__new__(Batcher)
batcher._ready = Batcher.QUEUE()
lifecycle = Lifecycle()
lifecycle.install_signals()
until = time.monotonic() + POLL_S + 0.05


def signal_just_before_the_timeout():
    time.sleep(POLL_S - 0.0015)
    os.kill(os.getpid(), signal.SIGTERM)


def keep_the_interpreter_busy():
    while time.monotonic() < until:
        pass


for target in (signal_just_before_the_timeout, keep_the_interpreter_busy):
    threading.Thread(target=target, daemon=True).start()
while not lifecycle.stopping.is_set():
    batcher.next(POLL_S)
print("left")
"""


def test_a_signal_at_the_end_of_a_wait_does_not_make_it_endless() -> None:
    # With queue.SimpleQueue this hangs on Python before 3.13, nearly every time.
    result = subprocess.run(
        [sys.executable, "-c", UNLUCKY], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (0, "left\n"), result.stderr
