"""A parameter server and a learner under hundreds of real clients: who is served, how fast, at what cost.

    fleet --clients 256 --seconds 30      processes of its own, first without keys, then with keys
    fleet --ingest                        what the learner takes in, beside a bare socket that only counts
    fleet --weights-mb 2,6.5              how long new weights of that size take to reach everybody
    fleet --weights-mb 2 --relays 0,1,4   the same, with clients that ask relays
    fleet --keys DIR --run-id demo --endpoint-paramserver tcp://10.244.0.7:5556 \\
          --metrics-learner 10.244.0.8:9400     a system that is there already

All clients connect at the same moment, as after an outage. They send recorded rollouts of a random policy,
from which nobody learns anything: never point them at a run that matters. The learner's and the parameter
server's figures are their own /metrics. What the clients themselves cost is told too: where all of it shares
a few cores, the machine is the limit and not the servers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import wire
from benchmarks.fleet_figures import Curves, Figures, Sample, figures_of, memory_of, table, told_together
from benchmarks.fleet_pods import Own, Pods, make_keys, own_pods, scrape
from benchmarks.fleet_weights import WeightsSource
from benchmarks.options import heading
from benchmarks.swarm import Record, Swarm, Target
from services import config as configuration
from services.config import RunConfig
from services.local.signals import unwound_by_signals
from services.rl.actions import Discrete
from services.rl.envs import env_spec
from services.wire import codec
from services.wire.messages import Rollout

READY_S = 120.0
"""How long clients may take to have a seat and weights; who has none then is reported, not waited for."""
SENDING_S = 30.0
"""How long their first rollouts may take."""
WARM_UP_S = 5.0
SAMPLE_S = 1.0
REACHED_S = 60.0
PAUSE_S = 0.1
INGEST = "raw,bounded,intake,batches,learner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the clients do."""

    clients: int
    seconds: float
    env: str = "catch"
    codec: codec.Codec | None = None
    """Of the frames in them; None is what actors use."""
    rollouts_per_second: float | None = None
    """Of each client; None is as many as the learner takes."""
    weights_mb: float | None = None
    """Publish weights of this size, in place of a learner."""
    ready_within_s: float = READY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one system under one load."""

    figures: Figures
    memory: Curves


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, 1 somebody was not served, 130 Ctrl-C, 143 SIGTERM."""
    arguments = _parser().parse_args(argv)
    sizes = [float(size) for size in arguments.weights_mb.split(",")] if arguments.weights_mb else [None]
    results: dict[str, dict[str, Measured]] = {}
    with unwound_by_signals(), tempfile.TemporaryDirectory(prefix="impala-fleet-keys-") as directory:
        doors = _doors(arguments, Path(directory))
        try:
            for size in sizes:
                load = Load(
                    clients=arguments.clients,
                    seconds=arguments.seconds,
                    env=arguments.env,
                    codec=arguments.codec,
                    rollouts_per_second=arguments.rate,
                    weights_mb=size,
                )
                title = f"rollouts of {load.env}" if size is None else f"weights of {size:g} MB"
                heading(f"{load.clients} clients, {title}, {os.cpu_count()} cores, {load.seconds:g} s each")
                results[title] = compare(load, doors, arguments.rounds)
                table({name: measured.figures for name, measured in results[title].items()})
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
    if arguments.json:
        told = {
            title: {name: {**each.figures, "memory": each.memory} for name, each in columns.items()}
            for title, columns in results.items()
        }
        arguments.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    figures = [each.figures for columns in results.values() for each in columns.values()]
    return 0 if all(each["served"] == each["clients"] for each in figures) else 1


Door = Callable[[Load], AbstractContextManager[Pods]]
"""Opens the system under load, and closes it if it is our own."""


def compare(load: Load, doors: Mapping[str, Door], rounds: int) -> dict[str, Measured]:
    """By door, the median of each figure over ``rounds``, in which the doors take turns; the last memory."""
    rollouts = record(load) if load.weights_mb is None else []
    measured: dict[str, list[Measured]] = {name: [] for name in doors}
    for _ in range(rounds):
        for name, door in doors.items():
            with door(load) as pods:
                measured[name].append(run(load, pods, rollouts))
    return {
        name: Measured(
            figures={
                figure: statistics.median(each.figures[figure] for each in of_door)
                for figure in of_door[0].figures
            },
            memory=of_door[-1].memory,
        )
        for name, of_door in measured.items()
    }


def run(load: Load, pods: Pods, rollouts: Sequence[Rollout]) -> Measured:
    """Once: connect, wait until all are served, measure, leave."""
    config = configuration.load(flags=["--env", load.env])
    swarm = Swarm(load.clients, _target(load, pods, config), rollouts)
    samples: list[Sample] = []

    def sample() -> None:
        series = {name: scrape(address) for name, address in pods.metrics.items()}
        samples.append(Sample(time.monotonic(), told_together(series)))

    def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline_s:
            if time.monotonic() > samples[-1].time_s + SAMPLE_S:
                swarm.progress()  # or the pipes would be full after a minute, and the clients stand still
                sample()
            time.sleep(0.01)

    def everybody_is_ready() -> bool:
        return swarm.progress().ready == load.clients

    published: dict[int, float] = {}
    used_s = _children_cpu_s()
    try:
        with ExitStack() as held:
            source = None if load.weights_mb is None else held.enter_context(_weights(load, pods, config))
            if source is not None:
                source.publish(0)
            sample()
            connected_s = swarm.connect()
            wait_until(everybody_is_ready, load.ready_within_s)
            print(f"{swarm.progress().ready} ready after {time.monotonic() - connected_s:.1f} s", flush=True)
            if source is None and everybody_is_ready():
                wait_until(lambda: swarm.progress().sending == load.clients, SENDING_S)
                wait_until(lambda: False, WARM_UP_S)
            begun_s = time.monotonic()
            sample()
            while (left_s := begun_s + load.seconds - time.monotonic()) > 0:
                if source is None:
                    wait_until(lambda: False, left_s)
                    continue
                version = len(published) + 1
                published[version] = source.publish(version)
                wait_until(lambda: swarm.progress().oldest_version >= version, REACHED_S)  # noqa: B023
                wait_until(lambda: False, PAUSE_S)
            sample()
            ended_s = time.monotonic()
    except BaseException:
        swarm.leave()
        raise
    records = swarm.leave()
    if len(records) < load.clients:
        raise RuntimeError(f"{load.clients - len(records)} of {load.clients} clients have not reported")
    _explain(records)
    used_s = _children_cpu_s() - used_s
    sample()  # what is left when all have said goodbye
    figures = figures_of(
        samples=samples,
        records=records,
        published=published or None,
        connected_s=connected_s,
        window_s=(begun_s, ended_s),
        clients_cpu_s=used_s,
    )
    return Measured(figures=figures, memory=memory_of(samples, (begun_s, ended_s)))


def record(load: Load) -> list[Rollout]:
    """Some hundred rollouts, played by a random policy; their arrays as they travel."""
    config = configuration.load(flags=["--env", load.env])
    packer = codec.Packer(load.codec or config.wire.codec)
    actions = Discrete(env_spec(config.env).num_actions)
    rollouts = []
    for half in wire.play(config, actions):
        for n in range(wire.ENVS):
            rollout = wire.rollout(half, n, packer)
            arrays = {name: array._replace(data=bytes(array.data)) for name, array in rollout.arrays.items()}
            rollouts.append(replace(rollout, arrays=arrays))
    return rollouts


def _weights(load: Load, pods: Pods, config: RunConfig) -> WeightsSource:
    assert load.weights_mb is not None
    size_bytes = round(load.weights_mb * 1e6)
    return WeightsSource(pods.paramserver, pods.keys, pods.run_id, size_bytes, config.wire.max_message_bytes)


def _target(load: Load, pods: Pods, config: RunConfig) -> Target:
    return Target(
        paramservers=pods.relays or [pods.paramserver],
        sends=load.weights_mb is None,
        keys=pods.keys,
        run_id=pods.run_id,
        max_message_bytes=config.wire.max_message_bytes,
        send_queue=config.wire.send_queue,
        hold_s=config.paramserver.hold_s,
        weights_interval_s=config.actor.weights_interval_s,
        rollouts_per_second=load.rollouts_per_second,
    )


def _children_cpu_s() -> float:
    """Of the processes that have ended: here, those of the clients."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _explain(records: Sequence[Record]) -> None:
    troubles = sorted({trouble for each in records for trouble in each.troubles})
    for trouble in troubles[:10]:
        print(f"client's trouble: {trouble}", flush=True)


# --- command line ------------------------------------------------------------------------------------


def _doors(arguments: argparse.Namespace, directory: Path) -> dict[str, Door]:
    """By what heads their column: a system that is there, or our own in several ways."""
    if arguments.endpoint_paramserver:
        if arguments.weights_mb or arguments.ingest or arguments.relays:
            _parser().error("an existing system has its own weights, learner and relays")
        if not arguments.metrics_learner:
            _parser().error("an existing system needs --metrics-learner")
        paramserver = arguments.metrics_paramserver or _metrics_of(arguments.endpoint_paramserver)
        existing = Pods(
            paramserver=arguments.endpoint_paramserver,
            metrics={"paramserver": paramserver, "learner": arguments.metrics_learner},
            keys=arguments.keys,
            run_id=arguments.run_id,
        )
        return {"keys" if arguments.keys else "no keys": lambda _load: nullcontext(existing)}

    def own(keys: Path | None, learner: str = "learner", relays: int = 0) -> Door:
        return lambda load: own_pods(
            Own(
                env=load.env,
                keys=keys,
                learner=learner if load.weights_mb is None else None,
                relays=relays,
            )
        )

    if arguments.ingest:  # the ceiling has no keys, unless somebody wants them
        return {kind: own(arguments.keys, learner=kind) for kind in arguments.ingest.split(",")}
    if arguments.relays:
        keys = None if arguments.no_keys else arguments.keys or make_keys(directory)
        numbers = [int(number) for number in arguments.relays.split(",")]
        return {f"{number} relays": own(keys, relays=number) for number in numbers}
    if arguments.no_keys:
        return {"no keys": own(None)}
    if arguments.keys:
        return {"keys": own(arguments.keys)}
    return {"no keys": own(None), "keys": own(make_keys(directory))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement (default 30)")
    parser.add_argument("--env", default="catch", help="whose rollouts are sent (default catch)")
    parser.add_argument("--codec", choices=("none", "zstd"), help="of their frames; default as actors do it")
    parser.add_argument("--rate", type=float, help="rollouts/s of each client; default as many as are taken")
    parser.add_argument("--rounds", type=int, default=1, help="of which medians are told (default 1)")
    parser.add_argument("--weights-mb", help="publish weights of these sizes, comma-separated; no rollouts")
    parser.add_argument(
        "--ingest",
        nargs="?",
        const=INGEST,
        metavar="KINDS",
        help=f"learners to compare without keys, of {INGEST}, which is also the default",
    )
    parser.add_argument("--relays", help="compare these numbers of relays, comma-separated")
    parser.add_argument("--no-keys", action="store_true", help="only without keys")
    parser.add_argument("--keys", type=Path, metavar="DIR", help="only with these keys (`impala keygen`)")
    parser.add_argument("--endpoint-paramserver", metavar="ENDPOINT", help="of an existing system")
    parser.add_argument("--metrics-paramserver", metavar="HOST:PORT", help="default is port 9400 there")
    parser.add_argument("--metrics-learner", metavar="HOST:PORT")
    parser.add_argument("--run-id", default="local", help="of the existing system (default local)")
    parser.add_argument("--json", type=Path, help="also write the figures, and memory over time, here")
    return parser


def _metrics_of(endpoint: str) -> str:
    return endpoint.removeprefix("tcp://").rpartition(":")[0] + ":9400"
