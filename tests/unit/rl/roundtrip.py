"""The whole road of a rollout without a socket: scripted environments to the trainer's batch.

The actor's loop, the codec, the learner's intake and its batcher are the real ones, in the real order. Only
the environments, the policy, the network and the wire between the two processes are written down by hand.
A script's observations are *states*, small numbers that name themselves, so that a network which looks
things up in a table gives every observation a known value and every gradient tells which step it is from.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor, nn

from services.actor.loop import ActorLoop, Half
from services.actor.stages import Stages
from services.config import PopArtConfig, RunConfig
from services.learner.batch import Batch, Batcher, rollout_schema
from services.learner.intake import Freshness, Intake, RolloutQueue
from services.learner.trainer import Trainer
from services.ops.health import Heartbeat
from services.ops.metrics import ActorMetrics, LearnerMetrics
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec, Transition, VectorEnv
from services.rl.networks import ActorCritic, Inputs, PolicyOutput
from services.rl.policy import Policy
from services.rl.popart import PopArt
from services.wire import codec
from services.wire.messages import Buffer, Client, Destination, Episode, Rollout, RunState
from services.wire.sockets import RolloutReceiver, RolloutSender
from services.wire.subscriber import Snapshot, Subscriber

RUN = "run"
LIMIT = 1 << 24
ACTIONS = Discrete(2)
TIMEOUT_S = 30.0


def state_spec(frame_stack: int) -> EnvSpec:
    """States as vectors of one number, or, where they are stacked, as images of one pixel."""
    image = frame_stack > 1
    return EnvSpec(
        id="scripted",
        observation_shape=(1, 1) if image else (1,),
        observation_dtype="uint8" if image else "float32",
        frame_stack=frame_stack,
        num_actions=ACTIONS.num_actions,
        frame_skip=1,
    )


# ------------------------------------------------------------------------------------------ environments


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one transition brings."""

    state: int
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    over: bool = False


def go(state: int, reward: float) -> Step:
    """The episode goes on."""
    return Step(state=state, reward=reward)


def terminate(state: int, reward: float) -> Step:
    """The episode ends in a state that is worth nothing."""
    return Step(state=state, reward=reward, terminated=True, over=True)


def truncate(state: int, reward: float) -> Step:
    """The clock ends the episode."""
    return Step(state=state, reward=reward, truncated=True, over=True)


def lose_life(state: int, reward: float) -> Step:
    """A termination for the learner, after which the same game goes on."""
    return Step(state=state, reward=reward, terminated=True)


def reset(state: int) -> Step:
    """The transition that nobody acted."""
    return Step(state=state)


@dataclass(frozen=True, kw_only=True)
class Script:
    """One environment's whole life."""

    first: int
    steps: Sequence[Step]


class ScriptedEnv(VectorEnv):
    """Plays one script per environment, and remembers what it was told to do."""

    def __init__(self, spec: EnvSpec, scripts: Sequence[Script]) -> None:
        self.spec = spec
        self.num_envs = len(scripts)
        self.seeds: list[int] = []
        self.actions: list[NDArray[np.int64]] = []
        self._scripts = scripts

    def _observations(self, states: Sequence[int]) -> NDArray[np.generic]:
        array = np.array(states).reshape(-1, *[1] * len(self.spec.observation_shape))
        return np.broadcast_to(array, (self.num_envs, *self.spec.observation_shape)).astype(
            self.spec.observation_dtype
        )

    def reset(self, seed: int) -> NDArray[np.generic]:
        self.seeds.append(seed)
        return self._observations([script.first for script in self._scripts])

    def send(self, actions: NDArray[np.int64]) -> None:
        self.actions.append(actions.copy())

    def recv(self) -> Transition:
        steps = [script.steps[len(self.actions) - 1] for script in self._scripts]
        return Transition(
            observation=self._observations([step.state for step in steps]),
            reward=np.array([step.reward for step in steps], np.float32),
            terminated=np.array([step.terminated for step in steps]),
            truncated=np.array([step.truncated for step in steps]),
            episode_over=np.array([step.over for step in steps]),
        )

    def close(self) -> None:
        pass


# ------------------------------------------------------------------------------------- policy and network


class StatePolicy:
    """Acts by the state it sees, with fixed behaviour logits; remembers every observation it was shown."""

    def __init__(self, action_of: Sequence[int], behaviour_logits: Sequence[Sequence[float]]) -> None:
        self.version = 0
        self.seen_states: list[NDArray[np.generic]] = []
        self._action_of = np.array(action_of, np.int64)
        self._logits = np.array(behaviour_logits, np.float32)

    def load(self, version: int, tensors: object) -> None:
        self.version = version

    def act(
        self, frames_NF: NDArray[np.generic], episode_start_NF: NDArray[np.bool_], *_unused: object
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        states = frames_NF[:, -1].reshape(len(frames_NF)).astype(np.int64)
        self.seen_states.append(states)
        return self._action_of[states], self._logits[states]


class TableNetwork(nn.Module):
    """Looks logits and values up by the newest frame of each stack."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))
        self.logits = nn.Parameter(torch.zeros(len(values), ACTIONS.num_outputs))
        self.baseline = PopArt(1, 1, PopArtConfig()).requires_grad_(False)  # for its scale
        self.observations: list[Tensor] = []

    def forward(self, inputs: Inputs) -> PolicyOutput:
        observations = inputs.observation_TB.flatten(0, 1)
        self.observations.append(observations)
        states_TB = inputs.observation_TB.flatten(2)[..., -1].long()
        return PolicyOutput(
            logits_TBA=self.logits[states_TB],
            baselines_TBK=self.values[states_TB].unsqueeze(-1),
            state_2BH=None,
        )


def make_trainer(network: nn.Module, config: RunConfig, frame_stack: int) -> Trainer:
    """A trainer on the CPU in float32."""
    return Trainer(
        network=cast(ActorCritic, network),
        actions=ACTIONS,
        config=config,
        frame_stack=frame_stack,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


# ------------------------------------------------------------------------------------------- actor's side


class Outbox:
    """Stands for the sockets, and for one learner that always has room.

    Keeps what is sent as other memory, and stops the actor after ``stop_after``.
    """

    def __init__(self, stop_after: int, stopping: threading.Event) -> None:
        self.messages: list[list[Buffer]] = []
        self.sequence = 0
        self._stop_after = stop_after
        self._stopping = stopping

    def follow(self, learners: Sequence[Destination]) -> None:
        """There is none but us."""

    def choose(self, timeout_s: float) -> Outbox | None:
        return self

    def send(self, frames: Sequence[Buffer]) -> bool:
        self.messages.append([bytes(frame) for frame in frames])
        self.sequence += 1
        if len(self.messages) == self._stop_after:
            self._stopping.set()
        return True


@dataclass
class HeldWeights:
    """Stands for the subscriber: a test puts the newest here."""

    newest: Snapshot[Mapping[str, Tensor]] | None = None
    state: RunState = "training"
    learners: tuple[Destination, ...] = ()


def actor_loop(
    halves: Sequence[Half],
    policy: object,
    sender: object,
    stopping: threading.Event,
    weights: object | None = None,
    metrics: ActorMetrics | None = None,
    may_go_on: Callable[[], bool] = lambda: True,
    max_rollouts: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    packer: codec.Packer | None = None,
) -> ActorLoop:
    """The real loop around hand-written neighbours."""
    metrics = metrics or ActorMetrics(CollectorRegistry())
    return ActorLoop(
        halves=halves,
        policy=cast(Policy, policy),
        weights=cast(Subscriber[Mapping[str, Tensor]], weights or HeldWeights()),
        sender=cast(RolloutSender, sender),
        packer=packer or codec.Packer("zstd"),
        run_id=RUN,
        client=Client(client_id="actor-0", incarnation=7),
        metrics=metrics,
        stages=Stages(metrics, clock),
        heartbeat=Heartbeat(),
        may_go_on=may_go_on,
        stopping=stopping,
        max_rollouts=max_rollouts,
    )


def play(
    scripts: Sequence[Script], policy: object, *, spec: EnvSpec, unroll_length: int, num_unrolls: int
) -> list[list[Buffer]]:
    """The messages of all environments' first unrolls: those of the first unroll, then of the second, ..."""
    stopping = threading.Event()
    half = Half(ScriptedEnv(spec, scripts), spec, unroll_length, ACTIONS.num_outputs, seed=1)
    outbox = Outbox(num_unrolls * len(scripts), stopping)
    actor_loop([half], policy, outbox, stopping).run()
    return outbox.messages


# ------------------------------------------------------------------------------------------ learner's side


@dataclass
class LearnerEnd:
    """Everything between the learner's socket and its trainer."""

    spec: EnvSpec
    unroll_length: int
    batch_size: int
    episodes: list[Episode] = field(default_factory=list)

    def decode(self, frames: list[Buffer]) -> Rollout:
        """One message as the intake reads it."""
        message = codec.decode(frames, self._expected)
        assert isinstance(message, Rollout)
        return message

    @property
    def _expected(self) -> codec.Expected:
        schema = rollout_schema(self.spec, ACTIONS, self.unroll_length)
        return codec.Expected(run_id=RUN, max_message_bytes=LIMIT, schema=schema)

    def batches(self, messages: Sequence[list[Buffer]]) -> list[Batch]:
        """All that the messages fill, each in memory of its own."""
        stopping = threading.Event()
        metrics = LearnerMetrics(CollectorRegistry())
        rollouts = RolloutQueue(len(messages))
        freshness = Freshness(lambda: 0, lambda: 1)
        intake = Intake(
            receiver=cast(RolloutReceiver, None),
            expected=self._expected,
            queue=rollouts,
            freshness=freshness,
            on_episode=lambda _task, episode: self.episodes.append(episode),
            metrics=metrics,
            stopping=stopping,
        )
        for message in messages:
            intake.take_in(message)
        batcher = Batcher(
            rollouts=rollouts,
            schema=rollout_schema(self.spec, ACTIONS, self.unroll_length),
            batch_size=self.batch_size,
            pinned=False,
            freshness=freshness,
            refuse=intake.refuse,
            metrics=metrics,
            stopping=stopping,
        )
        threading.Thread(target=batcher.run, daemon=True).start()
        batches = []
        for _ in range(len(messages) // self.batch_size):
            batch = batcher.next(TIMEOUT_S)
            assert batch is not None, "the batcher made no batch"
            batches.append(copied(batch))
            batch.release()
        stopping.set()
        return batches


def copied(batch: Batch) -> Batch:
    """The same in memory of its own, so that it outlives its slot."""
    tensors: dict[str, Any] = {name: tensor.clone() for name, tensor in batch.tensors().items()}
    return replace(batch, **tensors, release=lambda: None)
