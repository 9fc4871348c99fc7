"""The actor's loop: what a rollout holds, which policy made it, and when the loop stops.

Rollouts are read as a learner would, through the codec. What they mean for the loss is proved end to end in
tests/unit/rl/test_episode_ends.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from services.actor.loop import ActorLoop, Half
from services.config import EnvConfig, NetworkConfig
from services.ops.metrics import ActorMetrics
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec, env_spec, make_vector_env
from services.rl.networks import Inputs, make_network
from services.rl.policy import Policy
from services.wire.codec import Packer, Unpacker
from services.wire.messages import Buffer, Destination, PackedArray, Rollout
from services.wire.subscriber import Snapshot
from tests.unit.rl.roundtrip import (
    ACTIONS,
    HeldWeights,
    LearnerEnd,
    Outbox,
    Script,
    ScriptedEnv,
    StatePolicy,
    Step,
    actor_loop,
    go,
    lose_life,
    play,
    reset,
    state_spec,
    terminate,
    truncate,
)

SPEC = state_spec(frame_stack=1)
NUM_STATES = 50


def endless(first: int = 0) -> Script:
    """States first, first + 1, first + 2, ...: the state tells the step."""
    return Script(first=first, steps=[go(first + t, float(t)) for t in range(1, NUM_STATES - first)])


def policy_of(num_states: int = NUM_STATES) -> StatePolicy:
    """Action = parity of the state, behaviour logits = (state, -state)."""
    return StatePolicy(
        action_of=[state % 2 for state in range(num_states)],
        behaviour_logits=[(float(state), -float(state)) for state in range(num_states)],
    )


def arrays_of(rollout: Rollout) -> dict[str, NDArray[np.generic]]:
    unpacked = {}
    for name, packed in rollout.arrays.items():
        unpacked[name] = np.zeros(packed.shape, packed.dtype)
        Unpacker().unpack_into(packed, unpacked[name])
    return unpacked


def read(messages: Sequence[list[Buffer]], unroll_length: int, spec: EnvSpec = SPEC) -> list[Rollout]:
    learner = LearnerEnd(spec, unroll_length, batch_size=1)
    return [learner.decode(message) for message in messages]


def played(
    scripts: Sequence[Script], unroll_length: int, num_unrolls: int, frame_stack: int = 1
) -> list[Rollout]:
    spec = state_spec(frame_stack)
    messages = play(scripts, policy_of(), spec=spec, unroll_length=unroll_length, num_unrolls=num_unrolls)
    return read(messages, unroll_length, spec)


# --------------------------------------------------------------------------------- what a rollout holds


def test_a_rollout_holds_what_was_seen_done_and_paid_step_by_step() -> None:
    (rollout,) = played([endless(first=3)], unroll_length=3, num_unrolls=1)
    arrays = arrays_of(rollout)
    assert arrays["observation"].tolist() == [[3], [4], [5], [6]]
    assert arrays["episode_start"].tolist() == [True, False, False, False]
    assert arrays["action"].tolist() == [1, 0, 1]
    assert arrays["behaviour_logits"].tolist() == [[3, -3], [4, -4], [5, -5]]
    assert arrays["reward"].tolist() == [1, 2, 3]
    assert arrays["terminated"].tolist() == [False, False, False]


def test_the_next_rollout_begins_with_the_last_observation_of_the_one_before() -> None:
    first, second = (arrays_of(rollout) for rollout in played([endless()], unroll_length=3, num_unrolls=2))
    assert first["observation"].tolist() == [[0], [1], [2], [3]]
    assert second["observation"].tolist() == [[3], [4], [5], [6]]
    assert second["action"].tolist() == [1, 0, 1]
    assert second["reward"].tolist() == [4, 5, 6]
    assert not second["episode_start"].any()


def test_stacked_frames_travel_once_with_the_history_under_the_first_stack() -> None:
    rollouts = played([endless(first=1)], unroll_length=2, num_unrolls=3, frame_stack=4)
    frames = [arrays_of(rollout)["observation"].reshape(-1).tolist() for rollout in rollouts]
    assert frames == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7]]
    starts = [np.flatnonzero(arrays_of(rollout)["episode_start"]).tolist() for rollout in rollouts]
    assert starts == [[3], [1], []]


@pytest.mark.parametrize(
    ("end", "terminated", "starts"),
    [
        pytest.param(terminate(2, 1.0), [0, 1, 0, 0], [0, 3], id="terminated"),
        pytest.param(truncate(2, 1.0), [0, 0, 0, 0], [0, 3], id="truncated"),
        pytest.param(lose_life(2, 1.0), [0, 1, 0, 0], [0], id="life-lost"),
        pytest.param(go(2, 1.0), [0, 0, 0, 0], [0], id="goes-on"),
    ],
)
def test_only_a_whole_episodes_end_is_followed_by_an_episode_start(
    end: Step, terminated: list[int], starts: list[int]
) -> None:
    script = Script(first=0, steps=[go(1, 1.0), end, reset(3), go(4, 1.0), go(5, 1.0)])
    (rollout,) = played([script], unroll_length=4, num_unrolls=1)
    arrays = arrays_of(rollout)
    assert arrays["terminated"].tolist() == terminated
    assert np.flatnonzero(arrays["episode_start"]).tolist() == starts


def test_an_episode_start_is_carried_over_the_edge_of_an_unroll() -> None:
    script = Script(first=0, steps=[go(1, 1.0), truncate(2, 1.0), reset(3), go(4, 1.0), go(5, 1.0)])
    first, second = (arrays_of(rollout) for rollout in played([script], unroll_length=2, num_unrolls=2))
    assert first["episode_start"].tolist() == [True, False, False]
    assert second["observation"].tolist() == [[2], [3], [4]]
    assert second["episode_start"].tolist() == [False, True, False]


def test_each_environment_has_a_rollout_of_its_own_numbered_in_turn() -> None:
    rollouts = played([endless(0), endless(10), endless(20)], unroll_length=2, num_unrolls=2)
    assert [rollout.sequence for rollout in rollouts] == [0, 1, 2, 3, 4, 5]
    observations = [arrays_of(rollout)["observation"].reshape(-1).tolist() for rollout in rollouts]
    assert observations == [[0, 1, 2], [10, 11, 12], [20, 21, 22], [2, 3, 4], [12, 13, 14], [22, 23, 24]]
    assert {(r.run_id, r.actor_id, r.incarnation, r.task) for r in rollouts} == {("run", "actor-0", 7, 0)}


def test_episodes_are_reported_once_in_the_rollout_in_which_they_end() -> None:
    # 1 + 2 + 4 = 7 over 3 steps, across the edge of an unroll; then -3 over 1. Resets pay and count nothing.
    steps = [go(1, 1.0), go(2, 2.0), terminate(3, 4.0), reset(0), truncate(1, -3.0), reset(0), go(1, 9.0)]
    rollouts = played(
        [Script(first=0, steps=[*steps, go(2, 9.0)]), endless()], unroll_length=2, num_unrolls=3
    )
    ended = [[(e.episode_return, e.length) for e in rollout.episodes] for rollout in rollouts]
    assert ended == [[], [], [(7.0, 3)], [], [(-3.0, 1)], []]


def test_a_message_that_was_sent_is_never_written_again() -> None:
    """The socket sends from this memory while the loop already plays on."""
    stopping = threading.Event()
    half = Half(ScriptedEnv(SPEC, [endless()]), SPEC, 2, ACTIONS.num_outputs, seed=1)
    sent: list[tuple[Sequence[Buffer], list[bytes]]] = []

    class Keeping(Outbox):
        def send(self, frames: Sequence[Buffer]) -> bool:
            sent.append((frames, [bytes(frame) for frame in frames]))
            return super().send(frames)

    actor_loop([half], policy_of(), Keeping(5, stopping), stopping).run()
    for frames, before in sent:
        assert [bytes(frame) for frame in frames] == before


# --------------------------------------------------------------------------------- which policy made it


class ByVersion:
    """A policy whose logits are its version."""

    version = 0

    def load(self, version: int, tensors: object) -> None:
        self.version = version

    def act(
        self, frames_NF: NDArray[np.generic], episode_start_NF: NDArray[np.bool_], *_unused: object
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        num_envs = len(frames_NF)
        return np.zeros(num_envs, np.int64), np.full((num_envs, 2), self.version, np.float32)


class Newer(Outbox):
    """With every message that is sent, newer weights arrive."""

    def __init__(self, stop_after: int, stopping: threading.Event, weights: HeldWeights) -> None:
        super().__init__(stop_after, stopping)
        self._weights = weights

    def send(self, frames: Sequence[Buffer]) -> bool:
        version = 0 if self._weights.newest is None else self._weights.newest.version
        self._weights.newest = Snapshot(version=version + 1, steps=0, weights={}, received_s=0.0)
        return super().send(frames)


def test_a_rollout_is_acted_by_exactly_the_policy_version_that_it_names() -> None:
    """In both halves, although only the first one's end of an unroll exchanges the weights."""
    stopping, weights = threading.Event(), HeldWeights()
    halves = [
        Half(ScriptedEnv(SPEC, [endless(), endless()]), SPEC, 3, ACTIONS.num_outputs, seed=seed)
        for seed in (1, 2)
    ]
    outbox = Newer(16, stopping, weights)
    actor_loop(halves, ByVersion(), outbox, stopping, weights).run()
    rollouts = read(outbox.messages, 3)
    acted_by = [np.unique(arrays_of(rollout)["behaviour_logits"]).tolist() for rollout in rollouts]
    assert acted_by == [[rollout.policy_version] for rollout in rollouts]
    # Two rollouts a half, then the newest of what arrived with them: 0, then 2, 6, 10.
    assert [rollout.policy_version for rollout in rollouts] == [0] * 4 + [2] * 4 + [6] * 4 + [10] * 4


def test_weights_that_are_not_newer_are_not_loaded_again() -> None:
    stopping, weights = threading.Event(), HeldWeights()
    weights.newest = Snapshot(version=0, steps=0, weights={}, received_s=0.0)

    class Counting(ByVersion):
        loads = 0

        def load(self, version: int, tensors: object) -> None:
            self.loads += 1
            super().load(version, tensors)

    policy = Counting()
    half = Half(ScriptedEnv(SPEC, [endless()]), SPEC, 2, ACTIONS.num_outputs, seed=1)
    actor_loop([half], policy, Outbox(3, stopping), stopping, weights).run()
    assert policy.loads == 0


def test_the_halves_take_turns_so_that_one_steps_while_the_policy_acts_for_the_other() -> None:
    calls: list[str] = []

    class Noting(ScriptedEnv):
        def __init__(self, name: str) -> None:
            super().__init__(SPEC, [endless()])
            self._name = name

        def send(self, actions: NDArray[np.int64]) -> None:
            calls.append(f"send {self._name}")
            super().send(actions)

    stopping = threading.Event()
    halves = [Half(Noting(name), SPEC, 2, ACTIONS.num_outputs, seed=1) for name in "AB"]
    actor_loop(halves, policy_of(), Outbox(2, stopping), stopping).run()
    assert calls[:6] == ["send A", "send B"] * 3
    assert all(half.env.actions for half in halves if isinstance(half.env, Noting))


# --------------------------------------------------------------------------------------------- stopping


class Full(Outbox):
    """A learner without room after it has taken ``accepts``, while the actor is told to stop."""

    def __init__(self, accepts: int, stopping: threading.Event) -> None:
        super().__init__(10**6, stopping)
        self.tries = 0
        self._accepts = accepts

    def choose(self, timeout_s: float) -> Outbox | None:
        self.tries += 1
        if self.tries <= self._accepts:
            return self
        if self.tries == self._accepts + 3:
            self._stopping.set()
        return None


def test_a_loop_that_waits_for_a_learner_stops_when_told_and_counts_what_it_drops() -> None:
    stopping = threading.Event()
    registry = CollectorRegistry()
    half = Half(ScriptedEnv(SPEC, [endless()] * 3), SPEC, 2, ACTIONS.num_outputs, seed=1)
    sender = Full(accepts=1, stopping=stopping)
    actor_loop([half], policy_of(), sender, stopping, metrics=ActorMetrics(registry)).run()
    assert sender.tries == 4
    assert registry.get_sample_value("impala_actor_rollouts_sent_total") == 1
    assert registry.get_sample_value("impala_actor_rollouts_dropped_total", {"reason": "stopping"}) == 2


def test_a_loop_with_an_end_that_waits_for_a_learner_ends_when_training_is_complete() -> None:
    stopping, weights = threading.Event(), HeldWeights()
    registry = CollectorRegistry()

    class Completing(Full):
        def choose(self, timeout_s: float) -> Outbox | None:
            weights.state = "complete"
            return None

    half = Half(ScriptedEnv(SPEC, [endless()] * 3), SPEC, 2, ACTIONS.num_outputs, seed=1)
    metrics = ActorMetrics(registry)
    loop = actor_loop(
        [half], policy_of(), Completing(0, stopping), stopping, weights, metrics, max_rollouts=9
    )
    loop.run()
    assert not stopping.is_set()
    assert not loop.has_sent_all
    assert registry.get_sample_value("impala_actor_rollouts_dropped_total", {"reason": "complete"}) == 3


@pytest.mark.parametrize(("max_rollouts", "sent"), [(1, 3), (3, 3), (4, 6)])
def test_a_loop_with_an_end_ends_with_the_unroll_that_reaches_it(max_rollouts: int, sent: int) -> None:
    stopping = threading.Event()
    half = Half(ScriptedEnv(SPEC, [endless()] * 3), SPEC, 2, ACTIONS.num_outputs, seed=1)
    outbox = Outbox(100, stopping)
    loop = actor_loop([half], policy_of(), outbox, stopping, max_rollouts=max_rollouts)
    loop.run()
    assert len(outbox.messages) == sent
    assert loop.has_sent_all
    assert not stopping.is_set()


def test_a_rollout_that_found_no_learner_was_not_sent() -> None:
    stopping = threading.Event()
    half = Half(ScriptedEnv(SPEC, [endless()]), SPEC, 2, ACTIONS.num_outputs, seed=1)
    loop = actor_loop([half], policy_of(), Full(0, stopping), stopping, max_rollouts=1)
    loop.run()
    assert not loop.has_sent_all


def test_a_loop_with_an_end_ends_at_once_when_training_is_complete() -> None:
    stopping = threading.Event()
    half = Half(ScriptedEnv(SPEC, [endless()]), SPEC, 2, ACTIONS.num_outputs, seed=1)
    outbox = Outbox(100, stopping)
    weights = HeldWeights(state="complete")
    loop = actor_loop([half], policy_of(), outbox, stopping, weights=weights, max_rollouts=1)
    loop.run()
    assert not outbox.messages
    assert not loop.has_sent_all


def test_a_learner_that_has_room_again_gets_the_very_rollout_that_waited() -> None:
    stopping = threading.Event()

    class Slow(Outbox):
        refusals = 3

        def choose(self, timeout_s: float) -> Outbox | None:
            self.refusals -= 1
            return None if self.refusals >= 0 else self

    outbox = Slow(2, stopping)
    half = Half(ScriptedEnv(SPEC, [endless()]), SPEC, 2, ACTIONS.num_outputs, seed=1)
    actor_loop([half], policy_of(), outbox, stopping).run()
    assert [rollout.sequence for rollout in read(outbox.messages, 2)] == [0, 1]
    assert [arrays_of(r)["observation"][0].tolist() for r in read(outbox.messages, 2)] == [[0], [2]]


def test_a_rollout_is_packed_once_however_long_it_waits_and_whoever_refuses_it() -> None:
    stopping = threading.Event()
    packed: list[int] = []

    class Counting(Packer):
        def pack(self, array: NDArray[np.generic]) -> PackedArray:
            packed.append(array.nbytes)
            return super().pack(array)

    class Fickle(Outbox):
        """Has no room, then has some, but is gone when it is used, and so on."""

        def __init__(self) -> None:
            super().__init__(1, stopping)
            self.chosen = 0
            self.offered: list[int] = []

        def choose(self, timeout_s: float) -> Outbox | None:
            self.chosen += 1
            self.sequence = 10 * self.chosen
            return self if self.chosen % 2 == 0 else None

        def send(self, frames: Sequence[Buffer]) -> bool:
            self.offered.append(self.sequence)
            return super().send(frames) if self.chosen == 6 else False

    outbox = Fickle()
    half = Half(ScriptedEnv(SPEC, [endless()]), SPEC, 2, ACTIONS.num_outputs, seed=1)
    actor_loop([half], policy_of(), outbox, stopping, packer=Counting("zstd")).run()
    assert outbox.offered == [20, 40, 60]
    assert [rollout.sequence for rollout in read(outbox.messages, 2)] == [60], "the number of whom it went to"
    assert len(packed) == len(read(outbox.messages, 2)[0].arrays)


# ------------------------------------------------------------------------------------- who gets rollouts

FIRST, SECOND = (Destination(endpoint=f"tcp://10.0.0.{n}:5555", since=n) for n in (1, 2))


class Following(Outbox):
    """Has room only while it follows ``SECOND``, who comes after some tries."""

    def __init__(self, stop_after: int, stopping: threading.Event, weights: HeldWeights) -> None:
        super().__init__(stop_after, stopping)
        self.followed: list[Sequence[Destination]] = []
        self._weights = weights

    def follow(self, learners: Sequence[Destination]) -> None:
        self.followed.append(learners)

    def choose(self, timeout_s: float) -> Outbox | None:
        if SECOND in self.followed[-1]:
            return self
        if len(self.followed) == 3:
            self._weights.learners = (FIRST, SECOND)
        return None


@pytest.mark.parametrize("known", [(), (FIRST,)])
def test_a_learner_that_comes_while_the_actor_waits_for_room_is_used_at_once(
    known: tuple[Destination, ...],
) -> None:
    stopping, weights = threading.Event(), HeldWeights(learners=known)
    outbox = Following(1, stopping, weights)
    half = Half(ScriptedEnv(SPEC, [endless()]), SPEC, 2, ACTIONS.num_outputs, seed=1)
    actor_loop([half], policy_of(), outbox, stopping, weights).run()
    assert outbox.followed[:4] == [known, known, known, (FIRST, SECOND)]
    assert len(outbox.messages) == 1


def test_learners_that_leave_are_left_at_the_end_of_an_unroll_at_the_latest() -> None:
    stopping, weights = threading.Event(), HeldWeights(learners=(FIRST, SECOND))

    class Leaving(Following):
        def send(self, frames: Sequence[Buffer]) -> bool:
            self._weights.learners = (SECOND,)
            return super().send(frames)

    outbox = Leaving(2, stopping, weights)
    half = Half(ScriptedEnv(SPEC, [endless()]), SPEC, 2, ACTIONS.num_outputs, seed=1)
    actor_loop([half], policy_of(), outbox, stopping, weights).run()
    assert outbox.followed == [(FIRST, SECOND), (SECOND,)]


def test_steps_and_episodes_are_counted_over_all_environments() -> None:
    stopping = threading.Event()
    registry = CollectorRegistry()
    ending = Script(first=0, steps=[terminate(1, 1.0), reset(0)] * 10)
    half = Half(ScriptedEnv(SPEC, [endless(), ending]), SPEC, 4, ACTIONS.num_outputs, seed=1)
    actor_loop([half], policy_of(), Outbox(4, stopping), stopping, metrics=ActorMetrics(registry)).run()
    # Two unrolls of four steps; the loop looks whether to stop only after every turn.
    assert registry.get_sample_value("impala_actor_env_steps_total") == 2 * 8
    assert registry.get_sample_value("impala_actor_episodes_total") == 4


# ------------------------------------------------------------------------------- with the real neighbours


@pytest.mark.parametrize("kwargs", [{}, {"pixels": True}], ids=["vectors", "stacked-images"])
def test_the_logits_that_travel_are_those_that_the_learner_recomputes(kwargs: dict[str, bool]) -> None:
    """Same weights, same observations, through everything in between: rho is 1 up to rounding."""
    config = EnvConfig(id="catch", kwargs=dict(kwargs), frame_height=36, frame_width=36)
    spec = env_spec(config)
    actions = Discrete(spec.num_actions)
    torch.manual_seed(1)
    network = make_network(spec, NetworkConfig(name="auto"))
    policy = Policy(
        network=network, actions=actions, frame_stack=spec.frame_stack, dtype=torch.float32, seed=3
    )
    policy.version = 5
    stopping = threading.Event()
    halves = [Half(make_vector_env(config, 2), spec, 7, actions.num_outputs, seed) for seed in (1, 2)]
    outbox = Outbox(12, stopping)
    loop: ActorLoop = actor_loop(halves, policy, outbox, stopping)
    loop.run()

    from services.learner.batch import rollout_schema
    from services.rl.frames import stack_frames
    from services.wire.codec import Expected, decode

    expected = Expected(run_id="run", max_message_bytes=1 << 24, schema=rollout_schema(spec, actions, 7))
    for message in outbox.messages:
        rollout = decode(message, expected)
        assert isinstance(rollout, Rollout)
        arrays = {name: torch.from_numpy(array).unsqueeze(1) for name, array in arrays_of(rollout).items()}
        stacks = stack_frames(arrays["observation"], arrays["episode_start"], spec.frame_stack)
        logits = network(Inputs(observation_TB=stacks[:-1])).logits_TBA[:, 0]
        torch.testing.assert_close(logits, arrays["behaviour_logits"].squeeze(1), rtol=1e-5, atol=1e-6)
        assert rollout.policy_version == 5
