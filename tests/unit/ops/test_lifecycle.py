"""Every way for a pod to be stopped. Signals go to real child processes."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from services.ops.lifecycle import Lifecycle

PATIENCE_S = 20.0


class Child:
    """A process that runs ``code``, with a Lifecycle at hand, and talks in lines."""

    def __init__(self, code: str) -> None:
        prelude = """
            import os, signal, sys, threading, time
            from services.ops import logging
            from services.ops.lifecycle import Lifecycle
            logging.setup("pod")
            life = Lifecycle()
            def say(word): print(word, flush=True)
        """
        program = textwrap.dedent(prelude) + textwrap.dedent(code)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        _, log = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, log


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_pod_with_exit_code_0(children: list[Child], number: signal.Signals) -> None:
    child = Child("life.install_signals(); say('up'); life.stopping.wait(); sys.exit(life.exit_code)")
    children.append(child)
    assert child.read() == "up"
    child.process.send_signal(number)
    code, log = child.end()
    assert code == 0
    assert f"stopping reason={number.name}" in log


def test_a_signal_is_noticed_while_the_main_thread_is_busy(children: list[Child]) -> None:
    child = Child("""
        life.install_signals()
        threading.Thread(target=lambda: (life.stopping.wait(), say('noticed'), os._exit(7))).start()
        say('up')
        import hashlib
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # one long native call; no Python handler can run
    """)
    children.append(child)
    assert child.read() == "up"
    child.process.send_signal(signal.SIGTERM)
    assert child.read() == "noticed"


def test_a_pod_that_is_still_importing_ends_at_once(children: list[Child]) -> None:
    child = Child("""
        life = Lifecycle(has_begun=False)
        life.install_signals()
        say('up')
        threading.Event().wait()
    """)
    children.append(child)
    assert child.read() == "up"
    child.process.send_signal(signal.SIGTERM)
    code, log = child.end()
    assert code == 0
    assert "stopping reason=SIGTERM" in log


def test_what_stops_such_a_pod_names_its_exit_code(children: list[Child]) -> None:
    child = Child("Lifecycle(has_begun=False).stop('parent process is gone', 3); say('goes on')")
    children.append(child)
    assert child.read() == ""
    assert child.end()[0] == 3


def test_a_pod_that_has_begun_stops_in_order(children: list[Child]) -> None:
    child = Child("""
        life = Lifecycle(has_begun=False)
        life.install_signals()
        life.begin()
        say('up')
        life.stopping.wait()
        say('stopping in order')
    """)
    children.append(child)
    assert child.read() == "up"
    child.process.send_signal(signal.SIGTERM)
    assert child.read() == "stopping in order"
    assert child.end()[0] == 0


def test_a_second_interrupt_ends_a_pod_that_does_not_stop(children: list[Child]) -> None:
    child = Child("""
        life.install_signals()
        say('up')
        life.stopping.wait()
        say('stopping')
        threading.Event().wait()
    """)
    children.append(child)
    assert child.read() == "up"
    child.process.send_signal(signal.SIGINT)
    assert child.read() == "stopping"
    child.process.send_signal(signal.SIGINT)
    assert child.end()[0] == 130


def test_a_second_sigterm_lets_the_pod_finish(children: list[Child]) -> None:
    child = Child("""
        life.install_signals()
        say('up')
        life.stopping.wait()
        say('saving')
        sys.stdin.readline()
    """)
    children.append(child)
    assert child.read() == "up"
    child.process.send_signal(signal.SIGTERM)
    assert child.read() == "saving"
    child.process.send_signal(signal.SIGTERM)
    assert child.end()[0] == 0


def test_a_forked_child_of_the_pod_dies_of_its_own_signal_and_the_pod_lives(children: list[Child]) -> None:
    child = Child("""
        life.install_signals()
        pid = os.fork()
        if pid == 0:
            while True:
                time.sleep(1)
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        say(os.waitstatus_to_exitcode(status))
        say(life.stopping.wait(0.2))
    """)
    children.append(child)
    assert child.read() == str(-signal.SIGTERM)
    assert child.read() == "False"


def test_a_pod_whose_parent_was_killed_stops(children: list[Child]) -> None:
    # The middle process is the launcher; the pod holds the pipe's other end, so reading ends when it is gone.
    child = Child("""
        import subprocess
        pod = ("import os, sys\\n"
               "from services.ops.lifecycle import Lifecycle\\n"
               "life = Lifecycle()\\n"
               "life.watch_parent(int(sys.argv[1]))\\n"
               "print('up', flush=True)\\n"
               "life.stopping.wait()\\n"
               "print('stopped', flush=True)\\n")
        subprocess.Popen([sys.executable, "-c", pod, str(os.getpid())]).wait()
    """)
    children.append(child)
    assert child.read() == "up"
    child.process.kill()
    assert child.read() == "stopped"


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    life = Lifecycle()
    life.watch_parent(os.getppid(), parent=lambda: 1)
    assert life.stopping.wait(PATIENCE_S)
    assert life.exit_code == 0


def test_the_parent_watch_ends_with_the_pod() -> None:
    life = Lifecycle()
    before = set(threading.enumerate())
    life.watch_parent(os.getppid())
    [watch] = set(threading.enumerate()) - before
    life.stop("test")
    watch.join(PATIENCE_S)
    assert not watch.is_alive()


def test_a_thread_that_fails_stops_the_pod_with_exit_code_1() -> None:
    def broken() -> None:
        raise KeyError("missing")

    life = Lifecycle()
    life.thread("intake", broken)
    assert life.stopping.wait(PATIENCE_S)
    assert life.exit_code == 1


def test_a_thread_that_returns_stops_nothing() -> None:
    life = Lifecycle()
    life.thread("short", lambda: None).join(PATIENCE_S)
    assert not life.stopping.is_set()


def test_the_first_failure_names_the_exit_code() -> None:
    life = Lifecycle()
    life.stop("asked to")
    assert life.exit_code == 0
    life.fail(RuntimeError("diverged"), exit_code=3)
    life.fail(RuntimeError("and then this"))
    assert life.exit_code == 3
