"""The tasks of a run as they are evaluated: weights -> the results of one task at a time.

Whole games, although training may end an episode at a lost life; in DMLab, the levels and the mazes that are
kept for testing. ``loop`` (the pod) and ``local.evaluate`` (the command) come before this, ``play`` after
it. The seeds of environments and of actions follow from the run's seed, the version of the weights and the
task: who plays a version again, or elsewhere, or fewer tasks, plays the same games, provided that as many
environments play and that the precision is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from services.config import ConfigError, RunConfig
from services.evaluator.play import play
from services.evaluator.results import TaskResult
from services.rl import precision
from services.rl.actions import Discrete
from services.rl.envs import dmlab, make_mixed_env
from services.rl.networks import make_network
from services.rl.player import Player
from services.rl.policy import Policy
from services.rl.scores import evaluation_task
from services.rl.tasks import Task, tasks_of, tasks_spec
from services.wire.messages import Episode

Build = Callable[[Callable[[], Player]], Player | None]
"""Calls a builder that may take long; None if there is no point in going on."""


class Games:
    """One network at the tables of all tasks. Not for two threads at once."""

    def __init__(self, config: RunConfig, build: Build = lambda builder: builder()) -> None:
        """ValueError if the configuration names what cannot be played."""
        self.tasks = tuple(_whole_games(task) for task in tasks_of(config))
        self.spec = tasks_spec(self.tasks)
        self.network = make_network(self.spec, config.network, len(self.tasks), config.popart)
        self._config = config
        self._build = build

    def play(
        self,
        number: int,
        version: int,
        weights: Mapping[str, Tensor],
        *,
        stopping: threading.Event,
        on_step: Callable[[], None] = lambda: None,
        on_episode: Callable[[Episode], None] = lambda _: None,
    ) -> TaskResult | None:
        """``evaluator.episodes`` of task ``number`` with these weights, which fit; None if stopped.

        ConfigError if its environments cannot be opened; whatever goes wrong later is no fault of the user's.
        """
        config, task = self._config, self.tasks[number]
        env_seed, action_seed = seeds(config.seed, version, number)
        policy = Policy(
            network=self.network,
            actions=Discrete(self.spec.num_actions),
            frame_stack=self.spec.frame_stack,
            dtype=precision.resolve(config.actor.precision, torch.device("cpu")),
            seed=action_seed,
            greedy=config.evaluator.actions == "greedy",
        )
        policy.load(version, weights)
        num_envs = min(config.evaluator.num_envs, config.evaluator.episodes)

        def sit_down() -> Player:
            env = make_mixed_env(
                [task.env], [num_envs], config.actor.env_threads, num_actions=self.spec.num_actions
            )
            try:
                return Player(env, policy, env_seed)
            except BaseException:
                env.close()
                raise

        try:
            player = self._build(sit_down)
        except ValueError as error:
            raise ConfigError(" ".join(str(error).split())) from error
        if player is None:
            return None
        try:
            played = play(
                player,
                config.evaluator.episodes,
                config.evaluator.max_episode_steps,
                stopping=stopping,
                on_step=on_step,
                on_episode=on_episode,
            )
        finally:
            player.env.close()
        if played is None:
            return None
        return TaskResult(
            name=task.name, env=task.env, episodes=played.episodes, num_capped=played.num_capped
        )


def seeds(seed: int, version: int, task: int) -> tuple[int, int]:
    """Of a task's environments, and of the dice of the policy that plays it."""
    env_seed, action_seed = np.random.SeedSequence([seed, version, task]).generate_state(2) >> 1
    return int(env_seed), int(action_seed)


def _whole_games(task: Task) -> Task:
    kwargs = task.env.kwargs | ({"test": True} if dmlab.plays(task.env.id) else {})
    changed = {"id": evaluation_task(task.env.id), "kwargs": kwargs, "life_loss_ends_episode": False}
    return replace(task, env=task.env.model_copy(update=changed))
