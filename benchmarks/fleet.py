"""A parameter server and a learner under hundreds of real clients, with and without CURVE.

    fleet --clients 256 --seconds 30      processes of its own, first without keys, then with keys
    fleet --weights-mb 2,6.5              how long new weights of that size take to reach everybody
    fleet --keys DIR --run-id demo --endpoint-paramserver tcp://10.244.0.7:5556 \\
          --endpoint-learner tcp://10.244.0.8:5555        a system that is there already

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import wire
from benchmarks.fleet_figures import Figures, Sample, figures_of, table
from benchmarks.fleet_pods import Pods, make_keys, own_pods, scrape
from benchmarks.options import heading
from benchmarks.swarm import Record, Swarm, Target
from services import config as configuration
from services.config import RunConfig
from services.local.signals import unwound_by_signals
from services.rl.actions import Discrete
from services.rl.envs import env_spec
from services.wire import codec
from services.wire.keys import load_keys
from services.wire.messages import Client, Publish, Published, Rollout
from services.wire.sockets import Requester

READY_S = 120.0
"""How long clients may take to have a seat and weights; who has none then is reported, not waited for."""
SENDING_S = 30.0
"""How long their first rollouts may take."""
WARM_UP_S = 5.0
SAMPLE_S = 1.0
ANSWER_S = 60.0
PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the clients do."""

    clients: int
    seconds: float
    env: str = "catch"
    rollouts_per_second: float | None = None
    """Of each client; None is as many as the learner takes."""
    weights_mb: float | None = None
    """Publish weights of this size, in place of a learner."""
    ready_within_s: float = READY_S


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, 1 somebody was not served, 130 Ctrl-C, 143 SIGTERM."""
    arguments = _parser().parse_args(argv)
    sizes = [float(size) for size in arguments.weights_mb.split(",")] if arguments.weights_mb else [None]
    results: dict[str, dict[str, Figures]] = {}
    with unwound_by_signals(), tempfile.TemporaryDirectory(prefix="impala-fleet-keys-") as directory:
        doors = _doors(arguments, Path(directory))
        try:
            for size in sizes:
                load = Load(
                    clients=arguments.clients,
                    seconds=arguments.seconds,
                    env=arguments.env,
                    rollouts_per_second=arguments.rate,
                    weights_mb=size,
                )
                title = f"rollouts of {load.env}" if size is None else f"weights of {size:g} MB"
                heading(f"{load.clients} clients, {title}, {os.cpu_count()} cores, {load.seconds:g} s each")
                results[title] = compare(load, doors, arguments.rounds)
                table(results[title])
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    served = [each["served"] == each["clients"] for columns in results.values() for each in columns.values()]
    return 0 if all(served) else 1


Door = Callable[[Load], AbstractContextManager[Pods]]
"""Opens the system under load, and closes it if it is our own."""


def compare(load: Load, doors: Mapping[str, Door], rounds: int) -> dict[str, Figures]:
    """By door, the median of each figure over ``rounds``, in which the doors take turns."""
    rollouts = record(load.env) if load.weights_mb is None else []
    measured: dict[str, list[Figures]] = {name: [] for name in doors}
    for _ in range(rounds):
        for name, door in doors.items():
            with door(load) as pods:
                measured[name].append(run(load, pods, rollouts))
    return {
        name: {figure: statistics.median(each[figure] for each in figures) for figure in figures[0]}
        for name, figures in measured.items()
    }


def run(load: Load, pods: Pods, rollouts: Sequence[Rollout]) -> Figures:
    """Once: connect, wait until all are served, measure, leave."""
    config = configuration.load(flags=["--env", load.env])
    swarm = Swarm(load.clients, _target(load, pods, config), rollouts)
    samples: list[Sample] = []

    def sample() -> None:
        samples.append(Sample(time.monotonic(), {role: scrape(at) for role, at in pods.metrics.items()}))

    def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline_s:
            if time.monotonic() > samples[-1].time_s + SAMPLE_S:
                sample()
            time.sleep(0.01)

    def everybody_is_ready() -> bool:
        return swarm.progress().ready == load.clients

    published: dict[int, float] = {}
    used_s = _children_cpu_s()
    try:
        with _publisher(load, pods, config) as publish:
            if publish is not None:
                publish(0)
            sample()
            connected_s = swarm.connect()
            wait_until(everybody_is_ready, load.ready_within_s)
            print(f"{swarm.progress().ready} ready after {time.monotonic() - connected_s:.1f} s", flush=True)
            if publish is None and everybody_is_ready():
                wait_until(lambda: swarm.progress().sending == load.clients, SENDING_S)
                wait_until(lambda: False, WARM_UP_S)
            begun_s = time.monotonic()
            sample()
            while (left_s := begun_s + load.seconds - time.monotonic()) > 0:
                if publish is None:
                    wait_until(lambda: False, left_s)
                    continue
                version = len(published) + 1
                published[version] = publish(version)
                wait_until(lambda: swarm.progress().oldest_version >= version, ANSWER_S)  # noqa: B023
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
    return figures_of(
        samples=samples,
        records=records,
        published=published or None,
        connected_s=connected_s,
        window_s=(begun_s, ended_s),
        clients_cpu_s=used_s,
    )


def record(env: str) -> list[Rollout]:
    """Some hundred rollouts, played by a random policy; their arrays as they travel."""
    config = configuration.load(flags=["--env", env])
    packer = codec.Packer(config.wire.codec)
    actions = Discrete(env_spec(config.env).num_actions)
    rollouts = []
    for half in wire.play(config, actions):
        for n in range(wire.ENVS):
            rollout = wire.rollout(half, n, packer)
            arrays = {name: replace(array, data=bytes(array.data)) for name, array in rollout.arrays.items()}
            rollouts.append(replace(rollout, arrays=arrays))
    return rollouts


@contextmanager
def _publisher(load: Load, pods: Pods, config: RunConfig) -> Iterator[Callable[[int], float] | None]:
    """Publishes a version in a learner's place and tells when; None where there is a learner."""
    if load.weights_mb is None:
        yield None
        return
    payload = os.urandom(round(load.weights_mb * 1e6))
    sender = Client(client_id="fleet-learner", incarnation=time.time_ns())
    limit = config.wire.max_message_bytes
    expected = codec.Expected(run_id=pods.run_id, max_message_bytes=limit)
    with Requester(pods.paramserver, limit, load_keys(pods.keys, "learner")) as requester:

        def publish(version: int) -> float:
            message = Publish(
                run_id=pods.run_id,
                sender=sender,
                state="training",
                version=version,
                steps=version,
                payload=payload,
            )
            sent_s = time.monotonic()
            while not requester.send(codec.encode(message), PAUSE_S):
                if requester.trouble or time.monotonic() > sent_s + ANSWER_S:
                    raise RuntimeError(f"version {version} could not be sent: {requester.trouble}")
            frames = requester.receive(ANSWER_S)
            answer = None if frames is None else codec.decode(frames, expected)
            if not isinstance(answer, Published) or answer.version != version:
                raise RuntimeError(f"version {version} was not taken: {answer}")
            return sent_s

        yield publish


def _target(load: Load, pods: Pods, config: RunConfig) -> Target:
    return Target(
        paramserver=pods.paramserver,
        learner=None if load.weights_mb else pods.learner,
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
    """By what heads their column: a system that is there, or our own with and without keys."""
    if arguments.endpoint_paramserver or arguments.endpoint_learner:
        if arguments.weights_mb or not (arguments.endpoint_paramserver and arguments.endpoint_learner):
            _parser().error(
                "an existing system needs --endpoint-paramserver and --endpoint-learner, and no --weights-mb"
            )
        existing = Pods(
            paramserver=arguments.endpoint_paramserver,
            learner=arguments.endpoint_learner,
            metrics={
                "paramserver": arguments.metrics_paramserver or _metrics_of(arguments.endpoint_paramserver),
                "learner": arguments.metrics_learner or _metrics_of(arguments.endpoint_learner),
            },
            keys=arguments.keys,
            run_id=arguments.run_id,
        )
        return {"keys" if arguments.keys else "no keys": lambda _load: nullcontext(existing)}
    chosen = {"no keys": None, "keys": arguments.keys or make_keys(directory)}
    if arguments.no_keys:
        del chosen["keys"]
    elif arguments.keys:
        del chosen["no keys"]

    def own(keys: Path | None) -> Door:
        return lambda load: own_pods(load.env, keys, with_learner=load.weights_mb is None)

    return {name: own(keys) for name, keys in chosen.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement (default 30)")
    parser.add_argument("--env", default="catch", help="whose rollouts are sent (default catch)")
    parser.add_argument("--rate", type=float, help="rollouts/s of each client; default as many as are taken")
    parser.add_argument("--rounds", type=int, default=1, help="of which medians are told (default 1)")
    parser.add_argument("--weights-mb", help="publish weights of these sizes, comma-separated; no rollouts")
    parser.add_argument("--no-keys", action="store_true", help="only without keys")
    parser.add_argument("--keys", type=Path, metavar="DIR", help="only with these keys (`impala keygen`)")
    parser.add_argument("--endpoint-paramserver", metavar="ENDPOINT", help="of an existing system")
    parser.add_argument("--endpoint-learner", metavar="ENDPOINT")
    parser.add_argument("--metrics-paramserver", metavar="HOST:PORT", help="default is port 9400 there")
    parser.add_argument("--metrics-learner", metavar="HOST:PORT")
    parser.add_argument("--run-id", default="local", help="of the existing system (default local)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def _metrics_of(endpoint: str) -> str:
    return endpoint.removeprefix("tcp://").rpartition(":")[0] + ":9400"
