"""Small pods as real processes, for the launcher to start.

They serve real metrics and write what they do as lines into a pipe that the test reads. A test therefore
waits for lines, never for time; reading ends (with "") when no pod is left, however it died.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

FAKE_POD = '''
"""usage: fake_pod.py ROLE BEHAVIOUR PIPE --flags"""
import os, signal, sys
from pathlib import Path

role, behaviour, pipe, *flags = sys.argv[1:]
flags = dict(zip(flags[::2], flags[1::2]))
name = flags.get(f"--{role}-id", role)
report = os.open(pipe, os.O_WRONLY)

def say(word):
    os.write(report, f"{name} {word}\\n".encode())

def first_life():
    marker = Path(flags["--run_dir"], f"{name}-has-lived")
    first = not marker.exists()
    marker.touch()
    return first

if behaviour == "refuse":
    print("2026-11-20T14:02:36.123Z info learner started")
    print(f"impala {role}: network.name: a convolutional network cannot see 4 numbers", file=sys.stderr)
    sys.exit(2)
if behaviour.startswith("exit-"):
    print("2026-11-20T14:02:36.123Z error learner diverged reason=nan")
    print("the very last line", flush=True)
    sys.exit(int(behaviour[5:]))
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "die-once" and first_life():
    sys.exit(1)

from prometheus_client import CollectorRegistry
from services.ops import logging
from services.ops.health import Heartbeat, HealthServer
from services.ops.lifecycle import Lifecycle
from services.ops.metrics import ROLES

logging.setup(role)
life = Lifecycle()
if behaviour != "stubborn":
    life.install_signals()
if behaviour != "orphan":
    life.watch_parent(int(flags["--parent-pid"]))
registry = CollectorRegistry()
metrics = ROLES[role](registry)
if behaviour == "complete":
    metrics.steps.set(1000)
    metrics.leads.set(1)
server = HealthServer(flags["--ops.host"], int(flags["--ops.port"]), registry, Heartbeat(), 60, lambda: None)
say("up")
up = Path(pipe).parent  # and not in the run's directory, of which tests look whether it is empty
(up / f"{name}-is-up").touch()
if behaviour == "complete":  # but not before the others have said their word: the launcher ends them then
    while not all((up / f"{other}-is-up").exists() for other in ("paramserver", "actor-0")):
        life.stopping.wait(0.01)
    metrics.training_complete.set(1)
if behaviour == "stubborn":
    signal.pause()
life.stopping.wait()
if behaviour == "save":  # steps that nobody has scraped
    Path(flags["--run_dir"], "checkpoints", "step-000000000640.pt").touch()
say("stopped")
sys.exit(int(behaviour[5:]) if behaviour.startswith("fail-") else 0)
'''


class Pods:
    """The command line of fake pods, each role with a behaviour, and what they say."""

    def __init__(self, directory: Path) -> None:
        self.script = directory / "fake_pod.py"
        self.script.write_text(FAKE_POD)
        self.pipe = directory / "pipe"
        os.mkfifo(self.pipe)
        self.reader = os.fdopen(os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK), "r")
        self.placeholder = os.open(self.pipe, os.O_WRONLY)  # until pods are there, reading shall wait
        os.set_blocking(self.reader.fileno(), True)
        self.behaviours = {"paramserver": "serve", "learner": "serve", "actor": "serve"}

    def command(self, role: str, flags: Sequence[str]) -> list[str]:
        return [sys.executable, str(self.script), role, self.behaviours[role], str(self.pipe), *flags]

    def read(self, lines: int) -> list[str]:
        return [self.reader.readline().strip() for _ in range(lines)]

    def rest(self) -> list[str]:
        """Everything that is still said until the last pod is gone."""
        os.close(self.placeholder)
        return self.reader.read().splitlines()
