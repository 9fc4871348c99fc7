"""What encryption costs: rollouts and weights over TCP between two threads, with keys and without.

``wire.measure`` calls it with its messages. Both sides share this machine's cores here, so a figure is what
one core at each end can do at the most; the ratio is what to look at.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from benchmarks.options import heading, median_seconds, row
from services.wire import keygen
from services.wire.keys import Role, load_keys
from services.wire.messages import Buffer, Destination
from services.wire.security import Doorkeeper, Refused
from services.wire.sockets import Replier, Requester, RolloutReceiver, RolloutSender

ENDPOINT = "tcp://127.0.0.1:*"
PATIENCE_S = 10.0
WEIGHTS_BYTES = 6_700_000
"""About those of the nature network in float32."""
PULLS = 20


def measure(rollouts: Sequence[list[Buffer]]) -> dict[str, float]:
    """Rollouts/s and MB/s of weights, without keys and with them."""
    heading("over TCP, with keys (CURVE) and without")
    row("keys", "rollouts/s", "weights MB/s")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="impala-") as path:
        keygen.write_keys(Path(path), keygen.new_keys(seed=True))
        for name, directory in (("without", None), ("with", Path(path))):
            rollouts_s = _rollout_seconds(rollouts, directory) / len(rollouts)
            weights_s = _weights_seconds(directory) / PULLS
            figures |= {
                f"rollouts per second {name} keys": 1 / rollouts_s,
                f"weights MB per second {name} keys": WEIGHTS_BYTES / 1e6 / weights_s,
            }
            row(name, f"{1 / rollouts_s:,.0f}", f"{WEIGHTS_BYTES / 1e6 / weights_s:,.0f}")
    ratios = [
        figures[f"{kind} per second with keys"] / figures[f"{kind} per second without keys"]
        for kind in ("rollouts", "weights MB")
    ]
    row("ratio", *(f"{ratio:.2f}" for ratio in ratios))
    return figures


def _rollout_seconds(rollouts: Sequence[list[Buffer]], keys: Path | None) -> float:
    most_bytes = 1 << 24
    with (
        closing(_door(keys, "learner")) as door,
        RolloutReceiver(ENDPOINT, 8, most_bytes, door) as receiver,
        _kept(door),
        RolloutSender(8, most_bytes, load_keys(keys, "actor")) as sender,
    ):
        sender.follow([Destination(endpoint=receiver.endpoint, since=1)])

        def send() -> None:
            for frames in rollouts:
                learner = sender.choose(PATIENCE_S)
                assert learner is not None
                assert learner.send(frames)

        def carry() -> None:
            with _beside(send):
                for _ in rollouts:
                    assert receiver.receive(PATIENCE_S) is not None

        return median_seconds(carry)


def _weights_seconds(keys: Path | None) -> float:
    weights = bytes(WEIGHTS_BYTES)
    with (
        closing(_door(keys, "paramserver")) as door,
        Replier(ENDPOINT, 2 * WEIGHTS_BYTES, door) as replier,
        _kept(door),
        Requester(replier.endpoint, 2 * WEIGHTS_BYTES, load_keys(keys, "actor")) as requester,
    ):

        def serve() -> None:
            for _ in range(PULLS):
                request = replier.receive(PATIENCE_S)
                assert request is not None
                assert replier.send(request[0], [b"weights", weights])

        def pull() -> None:
            with _beside(serve):
                for _ in range(PULLS):
                    assert requester.send([b"pull"], PATIENCE_S)
                    assert requester.receive(PATIENCE_S) is not None

        return median_seconds(pull)


def _door(keys: Path | None, role: Role) -> Doorkeeper:
    return Doorkeeper(load_keys(keys, role), list[Refused]().append)


@contextmanager
def _kept(door: Doorkeeper) -> Iterator[None]:
    stopping = threading.Event()
    with _beside(partial(door.run, stopping)):
        try:
            yield
        finally:
            stopping.set()


@contextmanager
def _beside(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()
