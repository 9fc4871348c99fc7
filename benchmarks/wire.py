"""Bytes and microseconds of one rollout on its way, with real frames of a random policy.

The receiving side does all that a learner's core does with a rollout: take it from the socket, check it,
decompress it and lay it out in a batch.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import curve
from benchmarks.options import Options, heading, median_seconds, row
from services import config as configuration
from services.actor.loop import Half
from services.learner.batch import message_bytes, rollout_schema
from services.rl.actions import Discrete
from services.rl.envs import env_spec, make_vector_env
from services.wire import codec
from services.wire.messages import Buffer, Destination, Rollout
from services.wire.sockets import RolloutReceiver, RolloutSender

ENVS = 16
UNROLLS = 15
COMPRESSIONS: tuple[codec.Codec, ...] = ("zstd", "none")


def measure(options: Options) -> dict[str, float]:
    """Per codec: bytes per agent step, and rates in agent steps/s on one core."""
    config = configuration.load(flags=["--env", options.env])
    spec = env_spec(config.env)
    actions = Discrete(spec.num_actions)
    schema = rollout_schema(spec, actions, config.unroll_length)
    expected = codec.Expected(run_id="bench", max_message_bytes=message_bytes(schema), schema=schema)
    unrolls = play(config, actions)
    slot = {name: np.zeros(array.shape, array.dtype) for name, array in schema.items()}
    heading(f"rollouts of {options.env}, T = {config.unroll_length}, one core")
    row("codec", "bytes/step", "pack us", "unpack us", "unpack steps/s", "ipc steps/s")
    figures: dict[str, float] = {}
    for name in COMPRESSIONS:
        packer, unpacker = codec.Packer(name), codec.Unpacker()

        def pack(packer: codec.Packer = packer) -> list[list[Buffer]]:
            return pack_all(unrolls, packer)

        messages = pack()

        def unpack(messages: list[list[Buffer]] = messages, unpacker: codec.Unpacker = unpacker) -> None:
            for frames in messages:
                lay_out(codec.decode(frames, expected), slot, unpacker)

        def carry(messages: list[list[Buffer]] = messages, unpacker: codec.Unpacker = unpacker) -> None:
            through_a_socket(messages, expected, slot, unpacker)

        steps = len(messages) * config.unroll_length
        size = sum(codec.size_bytes(frames) for frames in messages) / steps
        pack_s, unpack_s = (median_seconds(run) / len(messages) for run in (pack, unpack))
        carry_s = median_seconds(carry) / len(messages)
        figures |= {
            f"{name} bytes per step": size,
            f"{name} unpack steps per second": config.unroll_length / unpack_s,
            f"{name} ipc steps per second": config.unroll_length / carry_s,
        }
        row(
            name,
            f"{size:,.0f}",
            f"{pack_s * 1e6:,.1f}",
            f"{unpack_s * 1e6:,.1f}",
            f"{config.unroll_length / unpack_s:,.0f}",
            f"{config.unroll_length / carry_s:,.0f}",
        )
    return figures | curve.measure(pack_all(unrolls, codec.Packer(config.wire.codec)))


def pack_all(unrolls: Sequence[Half], packer: codec.Packer) -> list[list[Buffer]]:
    """A message for each environment of each unroll."""
    return [codec.encode(rollout(half, n, packer)) for half in unrolls for n in range(ENVS)]


def play(config: configuration.RunConfig, actions: Discrete) -> list[Half]:
    """Recorded unrolls of a random policy, well into the games."""
    spec = env_spec(config.env)
    halves = []
    env = make_vector_env(config.env, ENVS, num_threads=2)
    half = Half(env, spec, config.unroll_length, actions.num_outputs, seed=1)
    rng = np.random.default_rng(1)
    for _ in range(UNROLLS):
        while not half.full:
            half.action[:, half.t] = rng.integers(0, spec.num_actions, ENVS)
            half.behaviour_logits[:, half.t] = rng.standard_normal((ENVS, actions.num_outputs))
            env.send(half.action[:, half.t].astype(np.int64))
            half.record(env.recv())
        halves.append(snapshot(half))
        half.begin_unroll()
    env.close()
    return halves


def snapshot(half: Half) -> Half:
    """The half as it is now: ``begin_unroll`` gives it new arrays, so a shallow copy keeps these."""
    copy = object.__new__(Half)
    copy.__dict__.update(half.__dict__)
    return copy


def rollout(half: Half, n: int, packer: codec.Packer) -> Rollout:
    """What the actor sends for environment ``n``."""
    return Rollout(
        run_id="bench",
        actor_id="actor-0",
        incarnation=1,
        sequence=n,
        policy_version=1,
        task=0,
        episodes=tuple(half.episodes[n]),
        arrays=half.pack(n, packer),
    )


def lay_out(message: object, slot: dict[str, NDArray[Any]], unpacker: codec.Unpacker) -> None:
    """Decompress a rollout into its column."""
    assert isinstance(message, Rollout)
    for name, packed in message.arrays.items():
        unpacker.unpack_into(packed, slot[name])


def through_a_socket(
    messages: list[list[Buffer]],
    expected: codec.Expected,
    slot: dict[str, NDArray[Any]],
    unpacker: codec.Unpacker,
) -> None:
    """All messages from a sending thread through ipc into the batch."""
    with tempfile.TemporaryDirectory(prefix="impala-") as directory:
        endpoint = f"ipc://{directory}/s"
        receiver = RolloutReceiver(endpoint, queue=8, max_message_bytes=expected.max_message_bytes)

        received = threading.Event()

        def send() -> None:
            with RolloutSender(queue=8, max_message_bytes=expected.max_message_bytes) as sender:
                sender.follow([Destination(endpoint=endpoint, since=1)])
                for frames in messages:
                    learner = sender.choose(timeout_s=10.0)
                    assert learner is not None
                    assert learner.send(frames)
                received.wait(10.0)

        thread = threading.Thread(target=send)
        thread.start()
        for _ in messages:
            frames = receiver.receive(10.0)
            assert frames is not None
            lay_out(codec.decode(frames, expected), slot, unpacker)
        received.set()
        thread.join()
        receiver.close()
