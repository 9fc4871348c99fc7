"""What a recurrent policy remembered travels with its rollouts: the learner computes its very logits again.

Through the real actor loop, codec, intake, batcher and trainer, over many unrolls, with newer weights after
each of them and episodes that end anywhere. Counter-checks leave out each thing that has to travel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from services.actor.loop import Half
from services.config import ActorConfig, NetworkConfig, PopArtConfig, RunConfig
from services.learner.batch import Batch, Batcher, rollout_schema
from services.learner.intake import Freshness, Intake, RolloutQueue
from services.learner.trainer import Trainer
from services.ops.metrics import LearnerMetrics
from services.rl.actions import Discrete
from services.rl.networks import ActorCritic, PolicyOutput
from services.rl.policy import Policy
from services.wire.codec import Expected
from services.wire.messages import Buffer
from services.wire.sockets import RolloutReceiver
from services.wire.subscriber import Snapshot
from tests.unit.rl.roundtrip import LIMIT, RUN, HeldWeights, Outbox, actor_loop, copied
from tests.unit.rl.talking import SPEC, Flat, Talking

T, H = 5, 16
HALVES = (1, 3)
"""Environments of each: of a single one the arrays of its rollout are not slices of anything."""
COLUMNS = sum(HALVES)
NUM_UNROLLS = 8
ACTIONS = Discrete(SPEC.num_actions)
NETWORK = NetworkConfig(lstm=True, lstm_size=H)


def network(reads_instructions: bool) -> ActorCritic:
    return ActorCritic(
        Flat(),
        ACTIONS,
        lstm_size=H,
        reads_instructions=reads_instructions,
        num_tasks=1,
        popart=PopArtConfig(),
    )


def weights(version: int, reads_instructions: bool) -> dict[str, Tensor]:
    """Far from those of any other version, and large enough for logits of about 1."""
    generator = torch.Generator().manual_seed(version)
    return {
        name: tensor if name.endswith("_K") else 0.5 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in network(reads_instructions).state_dict().items()
    }


# ------------------------------------------------------------------------------------------- actor's side


class Newer(Outbox):
    """With every rollout newer weights arrive. Keeps the very memory that it was given, too."""

    def __init__(self, stop_after: int, stopping: threading.Event, held: HeldWeights, talks: bool) -> None:
        super().__init__(stop_after, stopping)
        self.given: list[Sequence[Buffer]] = []
        self._held = held
        self._talks = talks

    def send(self, frames: Sequence[Buffer]) -> bool:
        self.given.append(frames)
        version = len(self.given)
        newest = weights(version, self._talks)
        self._held.newest = Snapshot(version=version, steps=0, weights=newest, received_s=0.0)
        return super().send(frames)


def played(talks: bool) -> Newer:
    """What two halves of an actor send in ``NUM_UNROLLS`` unrolls."""
    stopping, held = threading.Event(), HeldWeights()
    policy = Policy(network=network(talks), actions=ACTIONS, frame_stack=3, dtype=torch.float32, seed=3)
    policy.load(0, weights(0, talks))
    halves = [
        Half(
            Talking(num_envs),
            SPEC,
            T,
            ACTIONS.num_outputs,
            seed=num_envs,
            memory=policy.new_memory(num_envs),
            reads_instructions=policy.reads_instructions,
        )
        for num_envs in HALVES
    ]
    outbox = Newer(NUM_UNROLLS * COLUMNS, stopping, held, talks)
    actor_loop(halves, policy, outbox, stopping, held).run()
    return outbox


# ----------------------------------------------------------------------------------------- learner's side


def batches_of(messages: Sequence[list[Buffer]], talks: bool) -> list[Batch]:
    """One batch per unroll."""
    stopping, metrics = threading.Event(), LearnerMetrics(CollectorRegistry())
    schema = rollout_schema(SPEC, ACTIONS, T, NETWORK.model_copy(update={"instructions": talks}))
    rollouts, freshness = RolloutQueue(len(messages)), Freshness(lambda: 1000, lambda: 1000)
    intake = Intake(
        receiver=cast(RolloutReceiver, None),
        expected=Expected(run_id=RUN, max_message_bytes=LIMIT, schema=schema),
        queue=rollouts,
        freshness=freshness,
        on_episode=lambda _task, _episode: None,
        metrics=metrics,
        stopping=stopping,
    )
    for message in messages:
        intake.take_in(message)
    batcher = Batcher(
        rollouts=rollouts,
        schema=schema,
        batch_size=COLUMNS,
        pinned=False,
        freshness=freshness,
        refuse=intake.refuse,
        metrics=metrics,
        stopping=stopping,
    )
    thread = threading.Thread(target=batcher.run, daemon=True)
    thread.start()
    batches = []
    for _ in range(len(messages) // COLUMNS):
        batch = batcher.next(10.0)
        assert batch is not None, "no batch in time"
        batches.append(copied(batch))
        batch.release()
    stopping.set()
    thread.join()
    return batches


class Recomputing:
    """A trainer, and the logits that its network gives in an update."""

    def __init__(self, talks: bool) -> None:
        self._talks = talks
        self._trainer = Trainer(
            network=network(talks),
            actions=ACTIONS,
            config=RunConfig(unroll_length=T, batch_size=COLUMNS, actor=ActorConfig(num_envs=2)),
            frame_stack=SPEC.frame_stack,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        self._outputs: list[PolicyOutput] = []
        self._trainer.network.register_forward_hook(lambda _m, _inputs, output: self._outputs.append(output))

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, A], by the weights that acted."""
        (version,) = set(batch.policy_versions)
        self._trainer.load(weights(version, self._talks), version=0, steps=0)
        self._trainer.update(batch)
        return self._outputs.pop().logits_TBA[:-1].detach().transpose(0, 1)

    def agrees(self, batch: Batch) -> list[bool]:
        """In which columns they are the logits that travelled."""
        pairs = zip(self.logits(batch), batch.behaviour_logits, strict=True)
        return [torch.allclose(mine, sent, rtol=1e-5, atol=1e-6) for mine, sent in pairs]


talking_or_not = pytest.mark.parametrize("talks", [False, True], ids=["silent", "with-instructions"])


Unrolls = Mapping[bool, list[Batch]]


@pytest.fixture(scope="module")
def unrolls() -> Unrolls:
    """Played once, silent and with instructions."""
    return {talks: batches_of(played(talks).messages, talks) for talks in (False, True)}


@talking_or_not
def test_the_learner_computes_the_logits_that_the_actor_sampled_from(unrolls: Unrolls, talks: bool) -> None:
    learner, batches = Recomputing(talks), unrolls[talks]
    assert len(batches) == NUM_UNROLLS
    assert len({batch.policy_versions for batch in batches}) == NUM_UNROLLS, "newer weights each time"
    for batch in batches:
        assert batch.behaviour_logits.std() > 0.2, "logits that are worth comparing"
        torch.testing.assert_close(learner.logits(batch), batch.behaviour_logits, rtol=1e-5, atol=1e-6)


def test_episodes_end_in_all_manner_of_places(unrolls: Unrolls) -> None:
    """Or the test above would prove less than it says."""
    starts = torch.cat([batch.episode_start[:, SPEC.frame_stack - 1 :] for batch in unrolls[False]])
    assert starts.any(0).all(), "at each place of an unroll, the first and the last included"
    assert (starts.sum(1) > 1).any() and (starts.sum(1) == 0).any()
    assert sum(batch.terminated.sum().item() for batch in unrolls[False]) > 5
    assert any(len(batch.cuts) not in (0, T) for batch in unrolls[False])


def without(name: str) -> Callable[[Batch], Batch]:
    def zeroed(batch: Batch) -> Batch:
        changes: Mapping[str, Any] = {name: torch.zeros_like(getattr(batch, name))}
        return replace(batch, **changes)

    return zeroed


def swapped(batch: Batch) -> Batch:
    assert batch.initial_state is not None
    return replace(batch, initial_state=batch.initial_state.flip(0))


def exchanged(batch: Batch) -> Batch:
    """c for h."""
    assert batch.initial_state is not None
    return replace(batch, initial_state=batch.initial_state.flip(1))


WRONG: Mapping[str, Callable[[Batch], Batch]] = {
    "no initial state": without("initial_state"),
    "another column's initial state": swapped,
    "h and c exchanged": exchanged,
    "no action before the unroll": without("last_action"),
    "no reward before the unroll": without("last_reward"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_without_what_the_unroll_began_with_the_logits_are_others(unrolls: Unrolls, wrong: str) -> None:
    learner, first_in_episode = Recomputing(False), SPEC.frame_stack - 1
    differing = 0
    for batch in unrolls[False][1:]:
        agrees = learner.agrees(WRONG[wrong](batch))
        begins_B = batch.episode_start[:, first_in_episode].tolist()
        assert all(agree for agree, begins in zip(agrees, begins_B, strict=True) if begins)
        differing += agrees.count(False)
    unfinished = sum((~batch.episode_start[:, first_in_episode]).sum().item() for batch in unrolls[False][1:])
    # An action or reward before the unroll may be the very one that takes its place.
    assert differing > 0.5 * unfinished > 5


def test_cuts_that_leave_out_a_start_are_noticed_before_anything_leaks_into_the_next_episode(
    unrolls: Unrolls,
) -> None:
    learner = Recomputing(False)
    for batch in (batch for batch in unrolls[False] if batch.cuts):
        with pytest.raises(AssertionError, match="episodes begin at other times"):
            learner.agrees(replace(batch, cuts=()))


def test_with_the_instructions_of_other_steps_the_logits_are_others(
    unrolls: Unrolls,
) -> None:
    learner = Recomputing(True)
    for batch in unrolls[True]:
        assert batch.instruction is not None
        assert not any(learner.agrees(replace(batch, instruction=batch.instruction.roll(1, dims=1))))


def test_an_unroll_begins_with_the_action_and_the_reward_that_ended_the_one_before(
    unrolls: Unrolls,
) -> None:
    first, *others = batches = unrolls[False]
    assert first.initial_state is not None and first.last_action is not None and first.last_reward is not None
    for array in (first.initial_state, first.last_action, first.last_reward):
        assert not array.any(), "before the first step there is nothing to remember"
    for before, after in zip(batches, others, strict=False):
        assert after.last_action is not None and after.last_reward is not None
        assert after.last_action.squeeze(1).equal(before.action[:, -1])
        assert after.last_reward.squeeze(1).equal(before.reward[:, -1])
    rewards = torch.cat([batch.reward for batch in batches])
    assert (rewards.abs() > 1).any(), "raw, not clipped"


def test_what_was_said_last_in_an_unroll_is_what_is_said_first_in_the_next(unrolls: Unrolls) -> None:
    for before, after in zip(unrolls[True], unrolls[True][1:], strict=False):
        assert before.instruction is not None and after.instruction is not None
        assert before.instruction[:, 0].any(1).all(), "something is always said"
        assert after.instruction[:, 0].equal(before.instruction[:, -1])


@talking_or_not
def test_nothing_that_was_sent_is_written_again(talks: bool) -> None:
    """The socket still reads this memory while the policy plays on."""
    outbox = played(talks)
    assert len(outbox.given) == NUM_UNROLLS * COLUMNS
    for given, sent in zip(outbox.given, outbox.messages, strict=True):
        assert [bytes(frame) for frame in given] == sent
