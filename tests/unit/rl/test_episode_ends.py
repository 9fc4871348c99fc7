"""Ends of episodes, from the environment to the gradient, with every number worked out by hand.

Each test plays a script through the real actor loop, codec, intake, batcher and trainer. The network is a
table: state -> (logits, value). Every step of a script is in a state of its own, so the gradients of the
table tell, step by step, what the loss made of it:

    d total / d V(x_s)          = -(v_s - V_s)                          with baseline_cost = 1
    d total / d logits(x_s)[a]  = -adv_s (1{a taken} - 1/2)             with a uniform pi and no entropy cost

gamma = 1/2 throughout. Unless a test says otherwise the behaviour policy is uniform as well, so rho = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from services.config import ActorConfig, LossConfig, OptimiserConfig, RunConfig
from services.learner.batch import Batch
from services.learner.trainer import Trainer
from tests.unit.rl.roundtrip import (
    LearnerEnd,
    Script,
    StatePolicy,
    Step,
    TableNetwork,
    go,
    lose_life,
    make_trainer,
    play,
    reset,
    state_spec,
    terminate,
    truncate,
)

UNIFORM = (0.0, 0.0)
LIKES_0 = (math.log(3.0), 0.0)
"""mu = (3/4, 1/4): rho is 2/3 for action 0 and 2 for action 1."""

stacked_or_not = pytest.mark.parametrize("frame_stack", [1, 3], ids=["vectors", "stacked-images"])


def run_config(unroll_length: int, batch_size: int, loss: LossConfig | None = None) -> RunConfig:
    return RunConfig(
        unroll_length=unroll_length,
        batch_size=batch_size,
        loss=loss or LossConfig(discount=0.5, baseline_cost=1.0, entropy_cost=0.0, reward_clipping="none"),
        optimiser=OptimiserConfig(max_grad_norm=1e9),  # gradients as they are
        actor=ActorConfig(num_envs=2),
    )


class Trained:
    """What the trainer makes of scripts: one update per unroll, the table put back before each."""

    def __init__(
        self,
        *scripts: Script,
        values: Sequence[float],
        frame_stack: int,
        unroll_length: int,
        num_unrolls: int = 1,
        action_of: Sequence[int] | None = None,
        behaviour_logits: Sequence[Sequence[float]] | None = None,
        loss: LossConfig | None = None,
    ) -> None:
        spec = state_spec(frame_stack)
        policy = StatePolicy(action_of or [0] * len(values), behaviour_logits or [UNIFORM] * len(values))
        messages = play(scripts, policy, spec=spec, unroll_length=unroll_length, num_unrolls=num_unrolls)
        learner = LearnerEnd(spec, unroll_length, batch_size=len(scripts))
        self.batches = learner.batches(messages)
        self.episodes = [(episode.episode_return, episode.length) for episode in learner.episodes]
        self.corrections: list[list[float]] = []
        """Per unroll: v_s - V_s of each state, 0 for those that are not in it."""
        self.advantages: list[list[float]] = []
        self.trainers: list[Trainer] = []
        for batch in self.batches:
            self._update(batch, values, frame_stack, run_config(unroll_length, len(scripts), loss))

    def _update(self, batch: Batch, values: Sequence[float], frame_stack: int, config: RunConfig) -> None:
        network = TableNetwork(values)
        trainer = make_trainer(network, config, frame_stack)
        trainer.update(batch)
        self.trainers.append(trainer)
        assert network.values.grad is not None and network.logits.grad is not None
        self.corrections.append((-network.values.grad).tolist())
        # Both logits get half of the advantage, with opposite signs.
        torch.testing.assert_close(network.logits.grad[:, 0], -network.logits.grad[:, 1])
        self.advantages.append((-2 * network.logits.grad[:, 0]).tolist())


#        x_0 --1--> x_1 --5--> x_2 | reset to x_3 --3--> x_4 --4--> x_5
def two_episodes(end: Step) -> Script:
    return Script(first=0, steps=[go(1, 1), end, reset(3), go(4, 3), go(5, 4), go(5, 0)])


@stacked_or_not
def test_a_termination_in_the_middle_of_an_unroll(frame_stack: int) -> None:
    # v_4 = 4 + 8/2 = 8, v_3 = 3 + 8/2 = 7; nothing for the reset; v_1 = 5 alone, v_0 = 1 + 5/2 = 3.5.
    # The final observation x_2 is worth 100 to the network, and nobody asks.
    trained = Trained(
        two_episodes(terminate(2, 5)),
        values=[1.0, 2.0, 100.0, 3.0, 4.0, 8.0],
        frame_stack=frame_stack,
        unroll_length=5,
    )
    assert trained.corrections == [pytest.approx([2.5, 3.0, 0.0, 4.0, 4.0, 0.0])]
    assert trained.advantages == [pytest.approx([2.5, 3.0, 0.0, 4.0, 4.0, 0.0])]
    assert trained.episodes == [(6.0, 2)]


@stacked_or_not
def test_a_truncation_in_the_middle_bootstraps_from_the_true_final_observation(frame_stack: int) -> None:
    # x_2 is worth 6: v_1 = 5 + 6/2 = 8, v_0 = 1 + 8/2 = 5. Nothing of the second episode reaches the first,
    # and x_2 itself, in which nobody acted, is not trained.
    trained = Trained(
        two_episodes(truncate(2, 5)),
        values=[1.0, 2.0, 6.0, 3.0, 4.0, 8.0],
        frame_stack=frame_stack,
        unroll_length=5,
    )
    assert trained.corrections == [pytest.approx([4.0, 6.0, 0.0, 4.0, 4.0, 0.0])]
    assert trained.advantages == [pytest.approx([4.0, 6.0, 0.0, 4.0, 4.0, 0.0])]
    assert trained.episodes == [(6.0, 2)]


@stacked_or_not
def test_a_truncation_exactly_at_the_edge_of_an_unroll(frame_stack: int) -> None:
    # The first unroll ends in x_2, worth 6: v_1 = 5 + 6/2 = 8, v_0 = 1 + 8/2 = 5. The second one begins with
    # the reset, which is no step of anybody; then v_3 = 3 + 4/2 = 5.
    trained = Trained(
        two_episodes(truncate(2, 5)),
        values=[1.0, 2.0, 6.0, 3.0, 4.0, 8.0],
        frame_stack=frame_stack,
        unroll_length=2,
        num_unrolls=2,
    )
    assert trained.corrections == [
        pytest.approx([4.0, 6.0, 0.0, 0.0, 0.0, 0.0]),
        pytest.approx([0.0, 0.0, 0.0, 2.0, 0.0, 0.0]),
    ]
    assert trained.advantages == trained.corrections
    assert trained.episodes == [(6.0, 2)]


@stacked_or_not
def test_a_termination_exactly_at_the_edge_of_an_unroll(frame_stack: int) -> None:
    trained = Trained(
        two_episodes(terminate(2, 5)),
        values=[1.0, 2.0, 100.0, 3.0, 4.0, 8.0],
        frame_stack=frame_stack,
        unroll_length=2,
        num_unrolls=2,
    )
    assert trained.corrections == [
        pytest.approx([2.5, 3.0, 0.0, 0.0, 0.0, 0.0]),
        pytest.approx([0.0, 0.0, 0.0, 2.0, 0.0, 0.0]),
    ]
    assert trained.advantages == trained.corrections


@stacked_or_not
def test_an_episode_that_begins_at_the_last_step_of_an_unroll(frame_stack: int) -> None:
    # T = 3: the unroll's last transition is the reset itself, and its bootstrap value, V(x_3) = 3, is for
    # nobody. The second unroll holds v_4 = 4 + V(x_5)/2 = 8, v_3 = 3 + 8/2 = 7 and one step in x_5 onto x_5.
    trained = Trained(
        two_episodes(truncate(2, 5)),
        values=[1.0, 2.0, 6.0, 3.0, 4.0, 8.0],
        frame_stack=frame_stack,
        unroll_length=3,
        num_unrolls=2,
    )
    # In x_5: v = 0 + 8/2 = 4, so its correction is -4, and v_4 = 4 + 4/2 = 6, v_3 = 3 + 6/2 = 6.
    assert trained.corrections == [
        pytest.approx([4.0, 6.0, 0.0, 0.0, 0.0, 0.0]),
        pytest.approx([0.0, 0.0, 0.0, 3.0, 2.0, -4.0]),
    ]
    assert trained.advantages == trained.corrections


@stacked_or_not
def test_a_lost_life_terminates_but_the_game_goes_on(frame_stack: int) -> None:
    # v_1 = 5 and v_0 = 3.5, as for a termination; but x_2 was acted in: v_2 = 7 + 8/2 = 11, 11 - 6 = 5.
    script = Script(first=0, steps=[go(1, 1), lose_life(2, 5), go(3, 7), terminate(4, 10), reset(0)])
    trained = Trained(script, values=[1.0, 2.0, 6.0, 8.0, 0.0], frame_stack=frame_stack, unroll_length=3)
    assert trained.corrections == [pytest.approx([2.5, 3.0, 5.0, 0.0, 0.0])]
    assert trained.advantages == trained.corrections
    assert trained.episodes == []


def test_the_return_of_a_game_counts_all_of_its_lives_and_no_resets() -> None:
    script = Script(
        first=0,
        steps=[go(1, 1), lose_life(2, 5), go(3, 7), terminate(4, -10), reset(0), terminate(1, 2), reset(0)],
    )
    trained = Trained(script, values=[0.0] * 5, frame_stack=1, unroll_length=6)
    assert trained.episodes == [(1 + 5 + 7 - 10, 4), (2, 1)]


@stacked_or_not
def test_the_stack_is_cleared_at_a_reset_and_at_nothing_else(frame_stack: int) -> None:
    steps = [
        go(1, 1),
        lose_life(2, 1),
        truncate(3, 1),
        reset(4),
        go(5, 1),
        terminate(6, 1),
        reset(7),
        go(8, 1),
    ]
    trained = Trained(
        Script(first=9, steps=steps),
        values=[0.0] * 10,
        frame_stack=frame_stack,
        unroll_length=4,
        num_unrolls=2,
    )
    network = [trainer.network for trainer in trained.trainers]
    seen = [
        observation.flatten(1).tolist()
        for table in network
        if isinstance(table, TableNetwork)
        for observation in table.observations
    ]
    stacks = [
        [[0, 0, 9], [0, 9, 1], [9, 1, 2], [1, 2, 3], [0, 0, 4]],
        [[0, 0, 4], [0, 4, 5], [4, 5, 6], [0, 0, 7], [0, 7, 8]],
    ]
    assert seen == [[stack[-frame_stack:] for stack in unroll] for unroll in stacks]


@stacked_or_not
def test_columns_are_trained_by_their_own_flags_actions_and_logits(frame_stack: int) -> None:
    # Environment 0 terminates, environment 1 (states 6 to 11) is truncated at the same step. Actions differ
    # by state. In states 3 and 9 the behaviour policy was (3/4, 1/4) and action 0 was taken: rho = 2/3.
    #   column 0: v_4 = 8; adv_3 = 2/3 (3 + 8/2 - 3) = 8/3 = v_3 - V_3; v_1 = 5, v_0 = 3.5.
    #   column 1: the same, with v_7 = 5 + 6/2 = 8 and v_6 = 1 + 8/2 = 5.
    # In states 4 and 10 it was (3/4, 1/4) and action 1 was taken: rho = 2, truncated to 1.
    one = two_episodes(terminate(2, 5))
    two = Script(first=6, steps=[go(7, 1), truncate(8, 5), reset(9), go(10, 3), go(11, 4), go(11, 0)])
    actions = [0, 1, 0, 0, 1, 0]
    logits = [UNIFORM, UNIFORM, LIKES_0, LIKES_0, LIKES_0, UNIFORM]
    trained = Trained(
        one,
        two,
        values=[*(1.0, 2.0, 100.0, 3.0, 4.0, 8.0), *(1.0, 2.0, 6.0, 3.0, 4.0, 8.0)],
        frame_stack=frame_stack,
        unroll_length=5,
        action_of=actions * 2,
        behaviour_logits=logits * 2,
    )
    third = 8 / 3
    assert trained.corrections == [
        pytest.approx([*(2.5, 3.0, 0.0, third, 4.0, 0.0), *(4.0, 6.0, 0.0, third, 4.0, 0.0)])
    ]
    # Of action 1 the advantage raises the other logit.
    assert trained.advantages == [
        pytest.approx([*(2.5, -3.0, 0.0, third, -4.0, 0.0), *(4.0, -6.0, 0.0, third, -4.0, 0.0)])
    ]
    assert trained.episodes == [(6.0, 2), (6.0, 2)]


@stacked_or_not
def test_the_reported_terms_are_the_sums_over_the_steps_that_were_acted(frame_stack: int) -> None:
    # The unroll of the first test: 4 steps acted, advantages 2.5, 3, 4, 4 and as many corrections.
    #   policy   = log 2 x 13.5
    #   baseline = 1/2 x 1/2 x (6.25 + 9 + 16 + 16) = 11.8125, at the usual baseline_cost of 1/2
    #   entropy  = -0.01 x 4 x log 2
    trained = Trained(
        two_episodes(terminate(2, 5)),
        values=[1.0, 2.0, 100.0, 3.0, 4.0, 8.0],
        frame_stack=frame_stack,
        unroll_length=5,
        behaviour_logits=[UNIFORM] * 4 + [LIKES_0] * 2,
        action_of=[0, 0, 0, 0, 1, 0],
        loss=LossConfig(discount=0.5, reward_clipping="none"),
    )
    figures = trained.trainers[0].read_figures()
    assert figures.loss_policy == pytest.approx(math.log(2) * 13.5, rel=1e-6)
    assert figures.loss_baseline == pytest.approx(11.8125, rel=1e-6)
    assert figures.loss_entropy == pytest.approx(-0.04 * math.log(2), rel=1e-6)
    assert figures.loss_total == pytest.approx(math.log(2) * 13.46 + 11.8125, rel=1e-6)
    assert figures.entropy == pytest.approx(math.log(2), rel=1e-6)
    # rho = 2 in x_4 alone, of four steps; the reset's own rho does not count.
    assert figures.rho_clipped_ratio == pytest.approx(1 / 4)


@stacked_or_not
def test_what_happens_at_a_reset_transition_has_no_influence(frame_stack: int) -> None:
    """Its action and behaviour logits are of nobody; also its flags would be, if a suite ever set them."""
    usual, odd = (
        Trained(
            Script(first=0, steps=[go(1, 1), truncate(2, 5), step, go(4, 3), go(5, 4), go(5, 0)]),
            values=[1.0, 2.0, 6.0, 3.0, 4.0, 8.0],
            frame_stack=frame_stack,
            unroll_length=5,
            action_of=[0, 0, action, 0, 0, 0],
            behaviour_logits=[UNIFORM, UNIFORM, logits, UNIFORM, UNIFORM, UNIFORM],
        )
        for step, action, logits in (
            (reset(3), 0, UNIFORM),
            (Step(state=3, terminated=True), 1, (-30.0, 30.0)),
        )
    )
    assert usual.corrections == odd.corrections
    assert usual.advantages == odd.advantages
