"""V-trace is what makes old experience teach: Catch, played by a policy that is always far behind.

In one process, so that the lag is exact: the actor's half of the work and the trainer take turns, and every
unroll is acted with the weights of ``LAG`` updates ago. In the counter-run the correction is switched off by
telling the trainer that its own policy had acted, which makes every importance weight 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from services.actor.loop import Half
from services.config import ActorConfig, EnvConfig, NetworkConfig, RunConfig
from services.learner.batch import Batch
from services.learner.trainer import Trainer
from services.rl.actions import Discrete
from services.rl.envs import env_spec, make_vector_env
from services.rl.networks import Inputs, make_network
from services.rl.policy import Policy
from tests.learning.in_process import batch_of

pytestmark = [pytest.mark.learning, pytest.mark.timeout(900)]

NUM_ENVS, UNROLL_LENGTH = 32, 20
LAG, UPDATES, CHUNK = 30, 600, 50
CATCH = EnvConfig(id="catch")


def as_if_on_policy(batch: Batch, trainer: Trainer) -> Batch:
    """Without the correction: log pi - log mu = 0 everywhere."""
    with torch.no_grad():
        observation_TB = batch.observation[:, :-1].transpose(0, 1).unsqueeze(-1)
        logits_TBA = trainer.network(Inputs(observation_TB=observation_TB)).logits_TBA
    return replace(batch, behaviour_logits=logits_TBA.transpose(0, 1).contiguous())


def course(corrected: bool, seed: int = 1) -> list[float]:
    """Mean return of the episodes of each CHUNK of updates."""
    torch.manual_seed(seed)
    spec = env_spec(CATCH)
    actions = Discrete(spec.num_actions)
    network = NetworkConfig()
    config = RunConfig(
        env=CATCH,
        batch_size=NUM_ENVS,
        unroll_length=UNROLL_LENGTH,
        total_steps=10**9,
        actor=ActorConfig(num_envs=NUM_ENVS),
    )
    trainer = Trainer(
        network=make_network(spec, network),
        actions=actions,
        config=config,
        frame_stack=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    policy = Policy(
        network=make_network(spec, network), actions=actions, frame_stack=1, dtype=torch.float32, seed=seed
    )
    half = Half(make_vector_env(CATCH, NUM_ENVS), spec, UNROLL_LENGTH, actions.num_outputs, seed)
    past: deque[dict[str, torch.Tensor]] = deque(maxlen=LAG + 1)
    means, returns = [], []
    for update in range(1, UPDATES + 1):
        past.append({name: tensor.clone() for name, tensor in trainer.network.state_dict().items()})
        policy.load(trainer.version, past[0])
        while not half.full:
            half.act(policy)
            half.record(half.env.recv())
        returns += [episode.episode_return for episodes in half.episodes for episode in episodes]
        batch = batch_of(half)
        trainer.update(batch if corrected else as_if_on_policy(batch, trainer))
        half.begin_unroll()
        if update % CHUNK == 0:
            means.append(sum(returns) / len(returns))
            returns = []
    return means


def show_course(name: str, means: list[float], show: Callable[[str], None]) -> None:
    rows = "".join(f"    {CHUNK * (n + 1):>5} updates   return {mean:6.2f}\n" for n, mean in enumerate(means))
    show(f"catch, acted {LAG} versions ago, {name}\n{rows}")


def test_with_the_correction_experience_of_30_versions_ago_solves_catch(show: Callable[[str], None]) -> None:
    means = course(corrected=True)
    show_course("V-trace", means, show)
    assert means[-1] >= 0.9


def test_without_the_correction_it_is_clearly_worse(show: Callable[[str], None]) -> None:
    means = course(corrected=False)
    show_course("importance weights of 1", means, show)
    late = means[-4:]
    assert sum(late) / len(late) <= 0.7
