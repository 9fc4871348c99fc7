"""A time limit is not the end of the world, and a policy that is told so behaves differently.

In the one state of this environment a player either goes on, which pays 1, or takes 1.5 and the episode
terminates. The clock ends every episode after its first step. With a discount of 0.9 going on for ever is
worth 1/(1 - 0.9) = 10, so that is right if the clock merely interrupts. If its end were a termination, going
on would be worth 1, and taking the 1.5 would be right.

In one process: the actor's half of the work and the trainer take turns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.actor.loop import Half
from services.config import ActorConfig, LossConfig, NetworkConfig, OptimiserConfig, RunConfig
from services.learner.trainer import Trainer
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec, Transition, VectorEnv
from services.rl.networks import Inputs, make_network
from services.rl.policy import Policy
from tests.learning.in_process import batch_of

pytestmark = [pytest.mark.learning, pytest.mark.timeout(900)]

TAKE, GO_ON = 0, 1
NUM_ENVS, UNROLL_LENGTH, UPDATES = 32, 20, 200
SPEC = EnvSpec(
    id="go-on-or-take",
    observation_shape=(1,),
    observation_dtype="float32",
    frame_stack=1,
    num_actions=2,
    frame_skip=1,
)


class GoOnOrTake(VectorEnv):
    """``clock_terminates`` is the mistake: the time limit reported as a termination."""

    def __init__(self, clock_terminates: bool) -> None:
        self.spec = SPEC
        self.num_envs = NUM_ENVS
        self._clock_terminates = clock_terminates
        self._over = np.zeros(NUM_ENVS, np.bool_)
        self._actions = np.zeros(NUM_ENVS, np.int64)

    def reset(self, seed: int) -> NDArray[np.float32]:
        return np.ones((NUM_ENVS, 1), np.float32)

    def send(self, actions: NDArray[np.int64]) -> None:
        self._actions = actions

    def recv(self) -> Transition:
        acted = ~self._over
        taken = acted & (self._actions == TAKE)
        late = acted & ~taken
        self._over = acted
        return Transition(
            observation=np.ones((NUM_ENVS, 1), np.float32),
            reward=(1.5 * taken + 1.0 * late).astype(np.float32),
            terminated=acted if self._clock_terminates else taken,
            truncated=np.zeros(NUM_ENVS, np.bool_) if self._clock_terminates else late,
            episode_over=acted,
        )

    def close(self) -> None:
        pass


def learned(clock_terminates: bool) -> tuple[float, float]:
    """(probability to go on, value of the state) after the training."""
    torch.manual_seed(1)
    actions = Discrete(SPEC.num_actions)
    config = RunConfig(
        unroll_length=UNROLL_LENGTH,
        batch_size=NUM_ENVS,
        loss=LossConfig(discount=0.9, reward_clipping="none"),
        optimiser=OptimiserConfig(learning_rate=3e-3),
        actor=ActorConfig(num_envs=NUM_ENVS),
    )
    network = NetworkConfig(hidden_size=16)
    trainer = Trainer(
        network=make_network(SPEC, network),
        actions=actions,
        config=config,
        frame_stack=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    policy = Policy(
        network=make_network(SPEC, network), actions=actions, frame_stack=1, dtype=torch.float32, seed=1
    )
    half = Half(GoOnOrTake(clock_terminates), SPEC, UNROLL_LENGTH, actions.num_outputs, seed=1)
    for _ in range(UPDATES):
        policy.load(trainer.version, trainer.network.state_dict())
        while not half.full:
            half.act(policy)
            half.record(half.env.recv())
        trainer.update(batch_of(half))
        half.begin_unroll()
    output = trainer.network(Inputs(observation_TB=torch.ones(1, 1, 1, 1)))
    return output.logits_TBA.softmax(-1)[0, 0, GO_ON].item(), output.baselines_TBK.item()


def test_a_policy_that_is_only_interrupted_goes_on(show: Callable[[str], None]) -> None:
    goes_on, value = learned(clock_terminates=False)
    show(f"interrupted by the clock: goes on with p = {goes_on:.3f}, value {value:.2f} (10 is right)")
    assert goes_on > 0.95
    assert value == pytest.approx(10.0, abs=0.5)


def test_a_policy_that_takes_the_clock_for_the_end_does_not(show: Callable[[str], None]) -> None:
    """The counter-run: the same training can tell the difference."""
    goes_on, value = learned(clock_terminates=True)
    show(f"terminated by the clock: goes on with p = {goes_on:.3f}, value {value:.2f} (1.5 is right)")
    assert goes_on < 0.05
    assert value == pytest.approx(1.5, abs=0.2)
