"""Whole episodes of one task: a ``Player`` -> returns and lengths.

``games`` comes before this and sets up the task, ``results`` comes after it. Which environment plays how many
episodes is fixed before the first one: taking whichever end first would favour short ones, and in many games
the short ones are the bad ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.rl.player import Player
from services.wire.messages import Episode


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """All episodes that were asked for."""

    episodes: tuple[Episode, ...]
    num_capped: int
    """So many of them were cut off."""


def play(
    player: Player,
    num_episodes: int,
    max_steps: int,
    *,
    stopping: threading.Event,
    on_step: Callable[[], None],
    on_episode: Callable[[Episode], None],
) -> Played | None:
    """Episode i is the next one of environment i mod N; None if stopped before the last one has ended.

    An environment that has played its share idles: it steps on with the others, and counts for nothing. So
    does one whose episode was cut off after ``max_steps``, until nobody plays: only all can begin anew.
    """
    N = player.env.num_envs
    shares = [len(range(n, num_episodes, N)) for n in range(N)]
    played: list[list[Episode]] = [[] for _ in range(N)]
    num_left, num_capped = num_episodes, 0

    def unfinished() -> list[bool]:
        return [len(mine) < share for mine, share in zip(played, shares, strict=True)]

    playing = np.array(unfinished())
    episode_return, length = np.zeros(N), np.zeros(N, np.int64)
    resetting = np.zeros(N, np.bool_)
    while num_left:
        if stopping.is_set():
            return None
        on_step()
        if not playing.any():
            player.restart()
            playing = np.array(unfinished())
            episode_return[:], length[:], resetting[:] = 0.0, 0, False
        transition = player.step()
        episode_return += transition.reward
        length += ~resetting
        resetting = transition.episode_over.copy()
        capped = ~resetting & (length >= max_steps)
        for n in np.flatnonzero(playing & (resetting | capped)):
            episode = Episode(episode_return=float(episode_return[n]), length=int(length[n]))
            played[n].append(episode)
            num_left -= 1
            num_capped += int(capped[n])
            playing[n] = not capped[n] and len(played[n]) < shares[n]
            on_episode(episode)
        episode_return[resetting] = 0.0
        length[resetting] = 0
    episodes = tuple(played[number % N][number // N] for number in range(num_episodes))
    return Played(episodes=episodes, num_capped=num_capped)
