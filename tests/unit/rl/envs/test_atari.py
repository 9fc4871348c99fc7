"""Atari: lives, ends of games and time limits on real emulators, and the spellings of ids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from services.config import EnvConfig
from services.rl.envs import Transition, env_spec, make_vector_env

Flags = npt.NDArray[np.bool_]


def play(config: EnvConfig, num_steps: int) -> list[Transition]:
    """Random actions in one game (the same ones for every configuration), seed 1."""
    env = make_vector_env(config, 1)
    rng = np.random.default_rng(2)
    env.reset(1)
    transitions = []
    for _ in range(num_steps):
        env.send(rng.integers(env.spec.num_actions, size=1))
        transitions.append(env.recv())
    env.close()
    return transitions


def steps_with(flag: str, transitions: list[Transition]) -> list[int]:
    return [step for step, transition in enumerate(transitions) if getattr(transition, flag)[0]]


def test_breakout_terminates_at_each_of_its_five_lives_and_is_over_at_the_last() -> None:
    lives = play(EnvConfig(id="ALE/Breakout-v5"), 350)
    games = play(EnvConfig(id="ALE/Breakout-v5", life_loss_ends_episode=False), 350)
    over = steps_with("episode_over", games)[0]
    ends = [step for step in steps_with("terminated", lives) if step <= over]
    assert len(ends) == 5
    assert ends[-1] == over
    assert (
        steps_with("terminated", games)
        == steps_with("episode_over", games)
        == steps_with("episode_over", lives)
    )
    for one, other in zip(lives, games, strict=True):  # the same games: a lost life resets nothing
        np.testing.assert_array_equal(one.observation, other.observation)
        np.testing.assert_array_equal(one.reward, other.reward)


def test_a_game_without_lives_is_over_at_its_end_only_and_rewards_are_raw() -> None:
    transitions = play(EnvConfig(id="ALE/Pong-v5"), 1400)
    over = steps_with("episode_over", transitions)
    assert over == steps_with("terminated", transitions)
    assert not steps_with("truncated", transitions)
    episode = [float(transition.reward[0]) for transition in transitions[: over[0] + 1]]
    assert episode.count(-1.0) == 21
    assert episode[-1] == -1.0


def test_rewards_are_not_clipped() -> None:
    rewards = {float(t.reward[0]) for t in play(EnvConfig(id="ALE/SpaceInvaders-v5"), 200)}
    assert max(rewards) >= 5


def test_a_game_out_of_time_is_truncated_and_starts_again() -> None:
    config = EnvConfig(id="ALE/Pong-v5", max_episode_frames=40)
    transitions = play(config, 25)
    assert steps_with("truncated", transitions) == steps_with("episode_over", transitions) == [9, 20]
    assert not steps_with("terminated", transitions)


def test_a_life_lost_when_time_runs_out_is_a_termination_and_the_game_is_over() -> None:
    lost = steps_with("terminated", play(EnvConfig(id="ALE/Breakout-v5"), 100))[0]
    out_of_time = EnvConfig(id="ALE/Breakout-v5", max_episode_frames=4 * (lost + 1))
    *_, last, reset = play(out_of_time, lost + 2)
    assert (last.terminated[0], last.truncated[0], last.episode_over[0]) == (True, False, True)
    assert not reset.episode_over[0]
    assert reset.reward[0] == 0


def test_the_end_of_a_game_brings_its_last_frame_and_the_next_transition_the_first_of_another() -> None:
    config = EnvConfig(id="ALE/Breakout-v5", noop_max=0)
    env = make_vector_env(config, 1)
    first_frame = env.reset(1)  # without no-ops all games start alike
    env.close()
    transitions = play(config, 350)
    over = steps_with("episode_over", transitions)[0]
    before, last, reset = transitions[over - 1 : over + 2]
    np.testing.assert_array_equal(reset.observation, first_frame)
    changed = [np.count_nonzero(last.observation != other) for other in (before.observation, first_frame)]
    assert changed[0] < changed[1]  # it continues the old game


def test_a_frame_skip_of_one_plays_every_frame() -> None:
    transitions = play(EnvConfig(id="ALE/Pong-v5", max_episode_frames=10, frame_skip=1), 15)
    assert steps_with("truncated", transitions) == [9]


def test_color_shows_the_same_game_in_three_channels() -> None:
    gray = play(EnvConfig(id="ALE/Pong-v5"), 60)
    color = play(EnvConfig(id="ALE/Pong-v5", color=True), 60)
    assert env_spec(EnvConfig(id="ALE/Pong-v5", color=True)).observation_shape == (84, 84, 3)
    luma = np.array([0.299, 0.587, 0.114])
    for one, other in zip(gray, color, strict=True):
        np.testing.assert_allclose(other.observation @ luma, one.observation, atol=2)
    np.testing.assert_array_equal(color[0].observation[0, 42, 42], [144, 72, 17])  # the court is brown


@pytest.mark.parametrize(
    "env_id",
    ["ALE/MontezumaRevenge-v5", "MontezumaRevengeNoFrameskip-v4", "MontezumaRevenge-v4", "montezuma_revenge"],
)
def test_a_game_may_be_spelt_in_all_the_usual_ways(env_id: str) -> None:
    assert env_spec(EnvConfig(id=env_id)).num_actions == 18


def test_settings_come_from_the_configuration_and_not_from_the_suffix_of_the_id() -> None:
    config = EnvConfig(id="PongNoFrameskip-v4", frame_skip=3, frame_stack=2, frame_height=72, frame_width=96)
    spec = env_spec(config)
    assert (spec.frame_skip, spec.frame_stack, spec.observation_shape) == (3, 2, (72, 96))
    assert spec.num_actions == 6
    assert env_spec(EnvConfig(id="Pong-v4", full_action_set=True)).num_actions == 18


@pytest.mark.parametrize("game", ["skiing", "lost_luggage"])
def test_a_game_without_a_fire_button_understands_all_18_actions(game: str) -> None:
    """What presses the button there does what it would do without."""
    pairs = {
        1: 0,
        10: 2,
        11: 3,
        12: 4,
        13: 5,
        14: 6,
        15: 7,
        16: 8,
        17: 9,
    }  # FIRE and NOOP, UPFIRE and UP, ...
    config = EnvConfig(id=game, full_action_set=True, noop_max=0)
    assert env_spec(config).num_actions == 18
    env = make_vector_env(config, 2)
    env.reset(1)
    twin = make_vector_env(config, 2)
    twin.reset(1)
    rng = np.random.default_rng(1)
    for _ in range(300):
        actions = rng.integers(18, size=2)
        env.send(actions)
        twin.send(np.array([pairs.get(action, action) for action in actions.tolist()]))
        np.testing.assert_array_equal(env.recv().observation, twin.recv().observation)
    env.close()
    twin.close()


def last_frame(config: EnvConfig, action: int) -> npt.NDArray[np.uint8]:
    """Of one environment, after 40 times the same action."""
    env = make_vector_env(config, 1)
    frame: npt.NDArray[np.uint8] = env.reset(1)[0]
    for _ in range(40):
        env.send(np.array([action]))
        frame = env.recv().observation[0]
    env.close()
    return frame


def test_the_same_number_moves_to_the_same_side_in_every_game() -> None:
    """RIGHT is 3 and LEFT is 4, also where the emulator's own list is shorter."""
    full = EnvConfig(id="skiing", full_action_set=True, noop_max=0)
    minimal = EnvConfig(id="skiing", noop_max=0)  # NOOP, RIGHT, LEFT
    right, left = last_frame(full, 3), last_frame(full, 4)
    np.testing.assert_array_equal(right, last_frame(minimal, 1))
    np.testing.assert_array_equal(left, last_frame(minimal, 2))
    assert not np.array_equal(right, left)


def test_arguments_are_refused_because_atari_is_configured_by_name() -> None:
    with pytest.raises(ValueError, match=r"env.kwargs.frameskip: unknown; .* env.frame_skip"):
        env_spec(EnvConfig(id="ALE/Pong-v5", kwargs={"frameskip": 4}))


def test_a_game_for_two_players_only_is_unknown_instead_of_ending_the_process() -> None:
    with pytest.raises(ValueError, match="unknown Atari game"):
        env_spec(EnvConfig(id="ALE/Combat-v5"))
