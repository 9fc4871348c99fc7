"""How a pod begins: its command line, what it refuses, and where it finds the user's modules."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.config import RunConfig
from services.ops import pod
from services.ops.lifecycle import Lifecycle


def refuse_to_run(config: RunConfig, name: str, lifecycle: Lifecycle) -> int:
    raise AssertionError("must not come so far")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--config"], "--config: expected one argument"),
        (["--parent-pid", "x"], "--parent-pid: invalid int value: 'x'"),
        (["--conf", "x"], "--conf: unknown flag; did you mean --config?"),
        (["--actor_idd", "x"], "--actor_idd: unknown flag; did you mean --actor-id?"),
        (["--batch_szie", "1"], "--batch_szie: unknown key; did you mean batch_size?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    argv: Sequence[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pod.main("actor", argv, refuse_to_run) == pod.BAD_CONFIG
    assert capsys.readouterr() == ("", f"impala actor: {line}\n")


def test_modules_where_the_user_is_are_found_after_all_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", ["/somewhere"])
    monkeypatch.chdir(tmp_path)
    pod.find_modules_here()
    pod.find_modules_here()
    assert sys.path == ["/somewhere", str(tmp_path)]


IMPORTS = """
import threading
from services.ops import pod

def run(config, name, lifecycle):
    print("imports", flush=True)
    threading.Event().wait()

raise SystemExit(pod.main("actor", [], run))
"""


def test_a_pod_that_still_imports_what_it_is_made_of_ends_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as begun:
        try:
            assert begun.stdout is not None
            assert begun.stdout.readline() == "imports\n"
            begun.terminate()
            _, log = begun.communicate(timeout=20)
            assert begun.returncode == 0, log
        finally:
            begun.kill()


BEGINS = """
import resource
from services.ops import pod
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, min(most, 500)))

def run(config, name, lifecycle):
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
    return 0

raise SystemExit(pod.main("actor", [], run))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have limits beside this one")
def test_a_pod_may_open_as_many_files_as_the_system_lets_it() -> None:
    begun = subprocess.run([sys.executable, "-c", BEGINS], capture_output=True, text=True, check=False)
    assert (begun.returncode, begun.stdout) == (0, "(500, 500)\n"), begun.stderr
