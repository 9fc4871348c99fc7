"""Whole episodes of one task: a ``Player`` -> returns and lengths.

``games`` comes before this and sets up the task, ``results`` comes after it. Which environment plays how many
episodes is fixed before the first one: taking whichever end first would favour short ones, and in many games
the short ones are the bad ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from services.rl.player import Player
from services.wire.messages import Episode


def play(
    player: Player,
    num_episodes: int,
    *,
    stopping: threading.Event,
    on_step: Callable[[], None],
    on_episode: Callable[[Episode], None],
) -> tuple[Episode, ...] | None:
    """Episode i is the next one of environment i mod N; None if stopped before the last one has ended.

    An environment that has played its share idles: it steps on with the others, and counts for nothing.
    """
    N = player.env.num_envs
    played: list[list[Episode]] = [[] for _ in range(N)]
    episode_return, length = np.zeros(N), np.zeros(N, np.int64)
    resetting = np.zeros(N, np.bool_)
    num_left = num_episodes
    while num_left:
        if stopping.is_set():
            return None
        on_step()
        transition = player.step()
        episode_return += transition.reward
        length += ~resetting
        resetting = transition.episode_over
        for n in np.flatnonzero(resetting):
            if len(played[n]) * N + n < num_episodes:
                episode = Episode(episode_return=float(episode_return[n]), length=int(length[n]))
                played[n].append(episode)
                num_left -= 1
                on_episode(episode)
        episode_return[resetting] = 0.0
        length[resetting] = 0
    return tuple(played[number % N][number // N] for number in range(num_episodes))
