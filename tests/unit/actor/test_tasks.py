"""Rollouts of several tasks say which one they are of, from an actor's deal to the learner's batch."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import cast

import pytest
import torch

from services import config as configuration
from services.actor.__main__ import deals_alike
from services.actor.loop import Half
from services.config import ActorConfig, RunConfig
from services.learner.batch import Batch, Batcher, message_bytes, rollout_schema
from services.learner.episodes import Episodes
from services.learner.intake import Freshness, Intake, RolloutQueue
from services.rl.actions import Discrete
from services.rl.networks import make_network
from services.rl.policy import Policy
from services.rl.tasks import deal, tasks_of, tasks_spec
from services.wire.codec import Expected
from services.wire.messages import NO_SEAT
from services.wire.sockets import RolloutReceiver
from tests.unit.actor import errands
from tests.unit.learner.rollouts import RUN, Counts
from tests.unit.rl.roundtrip import Outbox, actor_loop, copied

T, NUM_ENVS, NUM_UNROLLS = 7, 6, 5
CONFIG = configuration.validate(
    {
        "tasks": [
            {"id": f"{errands.HERE}:short", "name": "short"},
            {"id": f"{errands.HERE}:long", "name": "long"},
        ],
        "actor": {"num_envs": NUM_ENVS},
        "network": {"hidden_size": 8},
    }
)
TASKS = tasks_of(CONFIG)
SPEC = tasks_spec(TASKS)
ACTIONS = Discrete(SPEC.num_actions)
MARKS = (1, 10)


@dataclass
class Learner:
    """What has arrived."""

    batches: list[Batch]
    episodes: Episodes
    counts: Counts


def make_policy(seed: int) -> Policy:
    policy = Policy(
        network=make_network(SPEC, CONFIG.network, len(TASKS)),
        actions=ACTIONS,
        frame_stack=1,
        dtype=torch.float32,
        seed=seed,
    )
    policy.version = 0
    return policy


def make_halves(seat: int) -> list[Half]:
    return [
        Half(dealt.make(TASKS, SPEC.num_actions, 1), SPEC, T, ACTIONS.num_outputs, seed=1, tasks=dealt.tasks)
        for dealt in deal(seat, NUM_ENVS, len(TASKS))
    ]


def trained(seat: int, num_tasks: int = len(TASKS)) -> Learner:
    """One actor's rollouts, as a learner of ``num_tasks`` takes them in: a batch per unroll."""
    stopping = threading.Event()
    outbox = Outbox(NUM_UNROLLS * NUM_ENVS, stopping)
    actor_loop(make_halves(seat), make_policy(seat), outbox, stopping).run()

    stopping = threading.Event()
    learner = Learner(batches=[], episodes=Episodes(["short", "long"]), counts=Counts())
    schema = rollout_schema(SPEC, ACTIONS, T)
    rollouts, freshness = RolloutQueue(1000), Freshness(lambda: 0, lambda: 1)
    intake = Intake(
        receiver=cast(RolloutReceiver, None),
        expected=Expected(
            run_id=RUN, max_message_bytes=message_bytes(schema), schema=schema, num_tasks=num_tasks
        ),
        queue=rollouts,
        freshness=freshness,
        on_episode=learner.episodes.add,
        metrics=learner.counts.metrics,
        stopping=stopping,
    )
    batcher = Batcher(
        rollouts=rollouts,
        schema=schema,
        batch_size=NUM_ENVS,
        pinned=False,
        freshness=freshness,
        refuse=intake.refuse,
        metrics=learner.counts.metrics,
        stopping=stopping,
    )
    for message in outbox.messages:
        intake.take_in(message)
    num_batches = len(rollouts) // NUM_ENVS
    thread = threading.Thread(target=batcher.run, daemon=True)
    thread.start()
    for _ in range(num_batches):
        batch = batcher.next(10.0)
        assert batch is not None
        learner.batches.append(copied(batch))
        batch.release()
    stopping.set()
    thread.join()
    return learner


@pytest.mark.parametrize("seat", [0, 1])
def test_every_column_of_a_batch_is_of_the_task_that_it_says(seat: int) -> None:
    learner = trained(seat)
    assert len(learner.batches) == NUM_UNROLLS
    for batch in learner.batches:
        assert batch.task.tolist() == list(batch.tasks)
        shown = [{int(mark) for mark in column[:, 0]} for column in batch.observation]
        assert shown == [{MARKS[task]} for task in batch.tasks]
        assert sorted(batch.tasks) == [0, 0, 0, 1, 1, 1], "both are served evenly"


def test_an_action_that_a_task_does_not_have_is_recorded_as_it_was_chosen() -> None:
    """Or importance weights would be those of another action."""
    learner = trained(0)
    chosen: dict[int, set[int]] = {0: set(), 1: set()}
    for batch in learner.batches:
        assert batch.behaviour_logits.shape[-1] == 4
        for task, actions in zip(batch.tasks, batch.action, strict=True):
            chosen[task] |= set(actions.tolist())
    assert chosen == {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}}


def test_episodes_are_counted_for_the_task_that_they_are_of() -> None:
    short, long = trained(0).episodes.take()
    # 35 steps of 3 environments; with its reset an episode takes 4 or 6 of them.
    assert (short.total, long.total) == (3 * (35 // 4 + 1), 3 * (35 // 6 + 1))
    assert {(e.episode_return, e.length) for e in short.recent} == {(3.0, 3)}
    assert {(e.episode_return, e.length) for e in long.recent} == {(50.0, 5)}


def test_rollouts_of_a_task_that_the_run_does_not_have_are_refused_and_counted() -> None:
    learner = trained(0, num_tasks=1)
    assert learner.counts("rollouts_total", result="invalid") == NUM_UNROLLS * 3
    assert learner.counts("invalid_rollouts_total", reason="schema") == NUM_UNROLLS * 3
    assert [batch.tasks for batch in learner.batches] == [(0,) * NUM_ENVS] * 2
    assert learner.episodes.take()[1].total == 0


def test_an_actor_whose_new_seat_has_other_tasks_begins_anew_and_otherwise_goes_on() -> None:
    config = RunConfig(actor=ActorConfig(num_envs=2), actors=4)
    alike = partial(deals_alike, config)
    assert alike(num_tasks=4, old=0, new=0)
    assert alike(num_tasks=4, old=0, new=NO_SEAT), "perhaps it gets the old one back"
    assert not alike(num_tasks=4, old=0, new=1)
    assert alike(num_tasks=4, old=0, new=2), "slots 4 and 5 have the tasks of 0 and 1"
    assert alike(num_tasks=1, old=0, new=3)


def test_a_loop_that_may_not_go_on_ends_between_two_unrolls() -> None:
    stopping = threading.Event()
    answers = iter([True, False])
    outbox = Outbox(10**6, stopping)
    loop = actor_loop(make_halves(0), make_policy(0), outbox, stopping, may_go_on=lambda: next(answers))
    loop.run()
    assert not stopping.is_set()
    assert len(outbox.messages) == 2 * NUM_ENVS - NUM_ENVS // 2, "the second half was in its second unroll"
