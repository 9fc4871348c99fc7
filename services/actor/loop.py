"""The actor's loop: environments x policy -> rollouts.

    consumes   weights (the newest that ``wire.subscriber`` holds), read once per unroll, and the list of the
               learners, read before each rollout is sent and again and again while none has room
    produces   one ``Rollout`` per environment and unroll, pushed to whichever learner has room
    waits for  an environment half to finish its step; a learner to come or to have room (``stages`` counts)
    may drop   the unroll in hand, when the pod stops; what a learner has not read when it leaves

The vector of environments plays in two halves that take turns: while one half steps, on threads or in
processes of its own, the policy acts for the other. The halves are in step with each other, so when the
first one ends its unroll no inference is pending anywhere and the weights can be exchanged: a rollout has
exactly one policy version.

Beside ``learner/batch.py`` this is the only place where the words of ``wire`` and of ``rl`` meet for
rollouts. Every array of a rollout is its own memory, never written again: it may wait for a learner while the
other half of the environments steps on.
Shapes: N environments of one half, T unroll length, F = frame_stack - 1 + T + 1 frames, A policy outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.actor.stages import Stages
from services.ops.health import Heartbeat
from services.ops.metrics import ActorMetrics
from services.rl.envs import EnvSpec, Transition, VectorEnv
from services.rl.policy import Memory, Policy
from services.wire import codec
from services.wire.messages import NO_VERSION, Client, Episode, PackedArray, Rollout
from services.wire.sockets import LearnerConnection, RolloutSender
from services.wire.subscriber import Subscriber

SEND_POLL_S = 0.25
IDLE_S = 0.25


class Half:
    """Half of the environments, and the unroll that they are in."""

    def __init__(
        self,
        env: VectorEnv,
        spec: EnvSpec,
        unroll_length: int,
        num_outputs: int,
        seed: int,
        *,
        tasks: Sequence[int] | None = None,
        memory: Memory | None = None,
        reads_instructions: bool = False,
    ) -> None:
        self.env = env
        self.tasks = tuple(tasks or [0] * env.num_envs)
        """Of each environment."""
        self._memory = memory
        self._reads_instructions = reads_instructions
        self._spec = spec
        self._length = unroll_length
        self._num_outputs = num_outputs
        self._history = spec.frame_stack - 1
        """Frames that are older than the unroll, but seen in its first stacks."""
        self._episode_over = np.zeros(env.num_envs, np.bool_)
        self._episode_return = np.zeros(env.num_envs, np.float64)
        self._episode_length = np.zeros(env.num_envs, np.int64)
        self._allocate()
        self.observation[:, self._history] = env.reset(seed)
        self.episode_start[:, self._history] = True
        self._begin_memory()

    def _allocate(self) -> None:
        # Fresh memory for every unroll: packed rollouts share it until they are sent.
        N, T, F = self.env.num_envs, self._length, self._history + self._length + 1
        self.t = 0
        self.policy_version = NO_VERSION
        """Of the weights that act in this unroll."""
        self.observation: NDArray[Any] = np.zeros(
            (N, F, *self._spec.observation_shape), self._spec.observation_dtype
        )
        self.episode_start = np.zeros((N, F), np.bool_)
        self.action = np.empty((N, T), np.int32)
        self.behaviour_logits = np.empty((N, T, self._num_outputs), np.float32)
        self.reward = np.empty((N, T), np.float32)
        self.terminated = np.empty((N, T), np.bool_)
        self.episodes: list[list[Episode]] = [[] for _ in range(N)]
        self.instruction = np.zeros((N, T + 1, self._spec.instruction_length), np.int32)

    def _begin_memory(self) -> None:
        """What the network knows before the first observation of the unroll."""
        if self._reads_instructions:
            self._read_instructions(0)
        if self._memory is not None:
            self.initial_state = self._memory.state_2NH
            self.last_action = self._memory.last_action_N
            self.last_reward = self._memory.last_reward_N

    def _read_instructions(self, t: int) -> None:
        words = self.env.instructions()
        assert words is not None, f"{self._spec.id} gives no instructions"
        self.instruction[:, t] = words

    @property
    def full(self) -> bool:
        """The unroll is complete."""
        return self.t == self._length

    def begin_unroll(self) -> None:
        """Start the next unroll with the last observation of this one, and the frames stacked under it."""
        observation, episode_start = self.observation, self.episode_start
        self._allocate()
        self.observation[:, : self._history + 1] = observation[:, self._length :]
        self.episode_start[:, : self._history + 1] = episode_start[:, self._length :]
        self._begin_memory()

    def act(self, policy: Policy) -> None:
        """Choose the actions for the newest observation and let the environments step."""
        if self.t == 0:
            self.policy_version = policy.version
        assert policy.version == self.policy_version, "weights were exchanged inside an unroll"
        window = slice(self.t, self.t + self._history + 1)
        instruction = self.instruction[:, self.t] if self._reads_instructions else None
        actions, logits = policy.act(
            self.observation[:, window], self.episode_start[:, window], self._memory, instruction
        )
        self.action[:, self.t] = actions
        self.behaviour_logits[:, self.t] = logits
        self.env.send(actions)

    def record(self, transition: Transition) -> int:
        """Take in what followed; returns how many episodes ended."""
        t = self.t
        self.reward[:, t] = transition.reward
        self.terminated[:, t] = transition.terminated
        self.observation[:, self._history + t + 1] = transition.observation
        if self._reads_instructions:
            self._read_instructions(t + 1)
        if self._memory is not None:
            self._memory.last_reward_N = transition.reward
        # After the end of an episode comes a transition that nobody acted: it brings the reset observation.
        acted = ~self._episode_over
        self.episode_start[:, self._history + t + 1] = self._episode_over
        self._episode_over = transition.episode_over
        self._episode_return += transition.reward
        self._episode_length += acted
        self.t += 1
        ended = np.flatnonzero(transition.episode_over)
        for n in ended:
            self.episodes[n].append(
                Episode(episode_return=float(self._episode_return[n]), length=int(self._episode_length[n]))
            )
        self._episode_return[ended] = 0.0
        self._episode_length[ended] = 0
        return len(ended)

    def pack(self, n: int, packer: codec.Packer) -> dict[str, PackedArray]:
        """The arrays of environment ``n``'s rollout: what ``learner/batch.py`` lets in."""
        arrays = {
            "observation": packer.pack(self.observation[n]),
            "episode_start": packer.pack(self.episode_start[n]),
            "action": packer.pack(self.action[n]),
            "behaviour_logits": packer.pack(self.behaviour_logits[n]),
            "reward": packer.pack(self.reward[n]),
            "terminated": packer.pack(self.terminated[n]),
        }
        if self._memory is not None:
            arrays["initial_state"] = packer.pack(self.initial_state[:, n])
            arrays["last_action"] = packer.pack(self.last_action[n : n + 1])
            arrays["last_reward"] = packer.pack(self.last_reward[n : n + 1])
        if self._reads_instructions:
            arrays["instruction"] = packer.pack(self.instruction[n])
        return arrays


class ActorLoop:
    """Runs until the pod stops, may not go on, or has sent ``max_rollouts``."""

    def __init__(
        self,
        *,
        halves: Sequence[Half],
        policy: Policy,
        weights: Subscriber[Mapping[str, Tensor]],
        sender: RolloutSender,
        packer: codec.Packer,
        run_id: str,
        client: Client,
        metrics: ActorMetrics,
        stages: Stages,
        heartbeat: Heartbeat,
        may_go_on: Callable[[], bool],
        stopping: threading.Event,
        max_rollouts: int | None = None,
    ) -> None:
        self._halves = halves
        self._policy = policy
        self._weights = weights
        self._sender = sender
        self._packer = packer
        self._run_id = run_id
        self._client = client
        self._metrics = metrics
        self._stages = stages
        self._heartbeat = heartbeat
        self._may_go_on = may_go_on
        self._stopping = stopping
        self._max_rollouts = max_rollouts
        self._sent = 0

    def run(self) -> None:
        """Play. The policy must hold weights already."""
        if self._stopping.is_set():
            return
        first = self._halves[0]
        for half in self._halves:
            half.act(self._policy)
        self._stages.end("inference")
        while not self._stopping.is_set():
            self._heartbeat.beat()
            if self._weights.state == "complete":  # nobody trains on what would be played now
                if self._max_rollouts is not None:
                    return
                self._idle()
                continue
            for half in self._halves:
                transition = half.env.recv()
                self._metrics.episodes.inc(half.record(transition))
                self._metrics.env_steps.inc(half.env.num_envs)
                self._stages.end("env")
                if half.full:
                    if not self._ship(half) or self.has_sent_all:
                        return
                    half.begin_unroll()
                    self._stages.end("pack")
                    if half is first:
                        self._refresh_weights()
                        if not self._may_go_on():
                            return
                half.act(self._policy)
                self._stages.end("inference")

    @property
    def has_sent_all(self) -> bool:
        """Whether it has sent as many rollouts as it was to send; never if it has no end."""
        return self._max_rollouts is not None and self._sent >= self._max_rollouts

    def _idle(self) -> None:
        self._sender.follow(self._weights.learners)
        self._stopping.wait(IDLE_S)
        self._stages.end("idle")

    def _refresh_weights(self) -> None:
        newest = self._weights.newest
        if newest is not None and newest.version != self._policy.version:
            self._policy.load(newest.version, newest.weights)
            self._metrics.weights_version.set(newest.version)
        self._stages.end("weights")

    def _ship(self, half: Half) -> bool:
        """Push every environment's rollout; False if it is to stop before all have found a learner."""
        for n in range(half.env.num_envs):
            rollout = self._rollout(half, n)
            while True:
                self._stages.end("pack")
                learner = self._await_room()
                if learner is None:
                    why = "stopping" if self._stopping.is_set() else "complete"
                    self._metrics.rollouts_dropped.labels(why).inc(half.env.num_envs - n)
                    return False
                frames = codec.encode(replace(rollout, sequence=learner.sequence))
                if learner.send(frames):
                    break
            self._sent += 1
            self._metrics.rollouts_sent.inc()
            self._metrics.sent_bytes.inc(codec.size_bytes(frames))
        return True

    def _await_room(self) -> LearnerConnection | None:
        """The learner that is next; None if the loop is to stop before there is one."""
        while True:
            self._sender.follow(self._weights.learners)
            learner = self._sender.choose(SEND_POLL_S)
            is_over = self._weights.state == "complete"
            self._stages.end("idle" if is_over and learner is None else "send_blocked")
            if learner is not None:
                return learner
            self._heartbeat.beat()  # waiting for a learner is not being stuck
            if self._stopping.is_set() or (is_over and self._max_rollouts is not None):
                return None

    def _rollout(self, half: Half, n: int) -> Rollout:
        """Packed before it is known to whom it goes, which gives it its number."""
        return Rollout(
            run_id=self._run_id,
            actor_id=self._client.client_id,
            incarnation=self._client.incarnation,
            sequence=0,
            policy_version=half.policy_version,  # the policy may hold newer weights by now
            task=half.tasks[n],
            episodes=tuple(half.episodes[n]),
            arrays=half.pack(n, self._packer),
        )
