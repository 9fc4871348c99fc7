"""The launcher's loop, with fake pods as real processes."""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from services.config import RunConfig
from services.local import launcher as launching
from services.local.launcher import Launcher, Outcome
from services.local.plan import plan_pods, pod_names, reserved_ports
from services.local.pod import Backoff, Pod
from services.local.run_dir import open_run_dir
from services.ops.figures import RunInfo, Snapshot
from services.ops.scrape import Scrape, Scraper
from tests.unit.local.fake_pods import Pods


class FakeProgress:
    """Remembers what it is shown, and may act on it."""

    interval_s = 0.0

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.snapshots: list[Snapshot] = []
        self.on_update: Callable[[Snapshot], None] = lambda snapshot: None
        self.on_event: Callable[[str], None] = lambda name: None

    def update(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        self.on_update(snapshot)

    def event(self, name: str, **fields: object) -> None:
        self.events.append((name, fields))
        self.on_event(name)

    trouble = event

    def close(self) -> None:
        pass


def launch(
    config: RunConfig,
    pods: Pods,
    progress: FakeProgress,
    when_all_up: str = "interrupt",
    scraped: Callable[[], None] = lambda: None,
) -> Outcome:
    """Launch until all pods are up, then interrupt. ``scraped`` is called at every look at the scrapes."""
    with (
        open_run_dir(config, resume=False) as lock,
        reserved_ports(0, len(pod_names(config))) as ports,
    ):
        specs = plan_pods(config, ports, Path("/nowhere"), os.environ, pods.command)
        scraper = Scraper({spec.name: spec.port for spec in specs}, 0.05)
        run = RunInfo(env_id="catch", total_steps=1000, frame_skip=1, run_dir=config.run_dir)

        def latest() -> Mapping[str, Scrape]:
            scraped()
            return scraper.latest()

        launcher = Launcher([Pod(spec, lock) for spec in specs], run, progress, latest)
        interrupted = False

        def interrupt_once(snapshot: Snapshot) -> None:
            nonlocal interrupted
            if not interrupted and all(pod.phase == "up" for pod in snapshot.pods):
                interrupted = True
                launcher.interrupt()

        if when_all_up != "fail":
            progress.on_update = interrupt_once
        if when_all_up == "interrupt twice":
            progress.on_event = lambda name: launcher.interrupt() if name == "stopping" else None
        try:
            return launcher.run()
        finally:
            scraper.close()


def test_an_interrupt_stops_actors_then_learner_then_parameter_server(config: RunConfig, pods: Pods) -> None:
    config = config.model_copy(update={"actors": 2})
    progress = FakeProgress()
    assert launch(config, pods, progress) == Outcome(exit_code=0, reason="interrupted")
    lines = pods.rest()
    assert sorted(lines[:4]) == ["actor-0 up", "actor-1 up", "learner-0 up", "paramserver up"]
    assert sorted(lines[4:6]) == ["actor-0 stopped", "actor-1 stopped"]
    assert lines[6:] == ["learner-0 stopped", "paramserver stopped"]
    assert [pod.phase for pod in progress.snapshots[-1].pods] == ["stopped"] * 4


def test_a_second_interrupt_kills_pods_that_do_not_stop(config: RunConfig, pods: Pods) -> None:
    pods.behaviours = dict.fromkeys(pods.behaviours, "stubborn")
    outcome = launch(config, pods, FakeProgress(), when_all_up="interrupt twice")
    assert outcome == Outcome(exit_code=130, reason="killed")
    assert sorted(pods.rest()) == ["actor-0 up", "learner-0 up", "paramserver up"]


def test_a_pod_that_does_not_stop_in_time_is_killed_and_a_learner_that_does_not_is_a_failure(
    config: RunConfig, pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "STOP_TIMEOUTS_S", {"actor": 0.1, "learner": 0.1, "paramserver": 60.0})
    pods.behaviours |= {"actor": "stubborn", "learner": "stubborn"}
    progress = FakeProgress()
    outcome = launch(config, pods, progress)
    assert outcome.exit_code == 1
    assert "learner-0 did not stop cleanly" in outcome.reason
    assert [fields["pod"] for name, fields in progress.events if name == "pod_killed"] == [
        "actor-0",
        "learner-0",
    ]
    assert pods.rest()[-1] == "paramserver stopped"


def test_a_learner_that_fails_to_save_is_a_failure(config: RunConfig, pods: Pods) -> None:
    pods.behaviours["learner"] = "fail-1"
    assert launch(config, pods, FakeProgress()).exit_code == 1


def test_a_pod_that_died_is_started_again_and_counted(config: RunConfig, pods: Pods) -> None:
    pods.behaviours["actor"] = "die-once"
    progress = FakeProgress()
    assert launch(config, pods, progress).exit_code == 0
    [(name, fields)] = [event for event in progress.events if event[0] == "pod_died"]
    assert (name, fields["pod"], fields["exit_code"], fields["restart_in_s"]) == (
        "pod_died",
        "actor-0",
        1,
        0.2,
    )
    assert {pod.name: pod.restarts for pod in progress.snapshots[-1].pods}["actor-0"] == 1
    assert any(pod.phase == "restarting" for snapshot in progress.snapshots for pod in snapshot.pods)


def test_several_learners_stop_together_and_a_death_of_any_is_counted(config: RunConfig, pods: Pods) -> None:
    config = config.model_copy(update={"learners": 2})
    pods.behaviours["learner"] = "die-once"
    progress = FakeProgress()
    assert launch(config, pods, progress) == Outcome(exit_code=0, reason="interrupted")
    died = {fields["pod"] for name, fields in progress.events if name == "pod_died"}
    assert died == {"learner-0", "learner-1"}
    assert {pod.name: pod.restarts for pod in progress.snapshots[-1].pods if pod.role == "learner"} == {
        "learner-0": 1,
        "learner-1": 1,
    }
    lines = pods.rest()
    assert sorted(lines[-3:-1]) == ["learner-0 stopped", "learner-1 stopped"]
    assert lines[-1] == "paramserver stopped"


def test_a_run_is_complete_when_the_learner_that_leads_says_so(
    config: RunConfig, pods: Pods, tmp_path: Path
) -> None:
    config = config.model_copy(update={"learners": 2})
    done, saved = "impala_training_complete", "impala_learner_leads"
    says = {"learner-0": {done: 0.0, saved: 1.0}, "learner-1": {done: 1.0, saved: 0.0}}

    with open_run_dir(config, resume=False) as lock, reserved_ports(0, 4) as ports:
        specs = plan_pods(config, ports, Path("/nowhere"), os.environ, pods.command)
        now_s = 100.0

        def clock() -> float:
            nonlocal now_s
            now_s += 0.01
            return now_s

        def latest() -> Mapping[str, Scrape]:
            return {name: Scrape(time_s=now_s, samples=samples) for name, samples in says.items()}

        progress = FakeProgress()
        run = RunInfo(env_id="catch", total_steps=1000, frame_skip=1, run_dir=config.run_dir)
        launcher = Launcher([Pod(spec, lock) for spec in specs], run, progress, latest, clock)

        def save_at_the_third_look(snapshot: Snapshot) -> None:
            if len(progress.snapshots) == 3:
                assert snapshot.leader == "learner-0"
                says["learner-0"][done] = 1.0

        progress.on_update = save_at_the_third_look
        assert launcher.run() == Outcome(exit_code=0, reason="complete")
    assert len(progress.snapshots) > 3


def test_a_pod_that_dies_again_and_again_ends_the_run_and_the_learner_still_saves(
    config: RunConfig, pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "FIRST_S", 0.0)
    pods.behaviours["actor"] = "exit-1"
    outcome = launch(config, pods, FakeProgress())
    assert outcome.exit_code == 1
    assert outcome.reason == "actor-0 died 5 times within 60 s"
    assert outcome.details[0].endswith("diverged reason=nan")


class BrokenProgress(FakeProgress):
    """A terminal that is closed while its display is open."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def update(self, snapshot: Snapshot) -> None:
        super().update(snapshot)
        if snapshot.pods and all(pod.phase == "up" for pod in snapshot.pods):
            raise OSError(errno.EIO, "Input/output error")

    def close(self) -> None:
        self.closed = True
        raise OSError(errno.EIO, "Input/output error")


def test_a_display_that_fails_is_replaced_and_the_run_goes_on_to_its_orderly_end(
    config: RunConfig, pods: Pods
) -> None:
    progress = BrokenProgress()
    assert launch(config, pods, progress) == Outcome(exit_code=0, reason="interrupted")
    assert progress.closed, "the terminal is given back"
    assert pods.rest()[3:] == ["actor-0 stopped", "learner-0 stopped", "paramserver stopped"]


def test_an_error_of_the_launcher_itself_still_stops_the_pods_in_order(config: RunConfig, pods: Pods) -> None:
    progress = FakeProgress()

    def fail_once_all_are_up() -> None:
        if progress.snapshots and all(pod.phase == "up" for pod in progress.snapshots[-1].pods):
            raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        launch(config, pods, progress, when_all_up="fail", scraped=fail_once_all_are_up)
    assert pods.rest()[3:] == ["actor-0 stopped", "learner-0 stopped", "paramserver stopped"]
