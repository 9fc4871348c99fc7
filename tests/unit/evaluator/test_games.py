"""The tasks of a run as they are evaluated, with policies whose returns follow from their weights."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services import config as configuration
from services.config import ConfigError, RunConfig
from services.evaluator.games import Games, seeds
from services.evaluator.results import TaskResult
from services.rl.networks.recurrent import RecurrentCore
from services.rl.player import Player
from tests.unit.evaluator.homemade import NUM_STEPS, Constant, Refusing

HOMEMADE = "tests.unit.evaluator.homemade"
DIARY = f"{HOMEMADE}:diary"
ALL_ONES = 2**NUM_STEPS - 1


def configured(*flags: str, env: str = DIARY, episodes: int = 6, num_envs: int = 3) -> RunConfig:
    return configuration.load(
        flags=[
            *(() if "--tasks" in flags else ("--env", env)),
            *("--network", f"{HOMEMADE}:constant", "--actor.precision", "float32"),
            *("--evaluator.episodes", str(episodes), "--evaluator.num_envs", str(num_envs)),
            *flags,
        ]
    )


def games(*flags: str, env: str = DIARY, episodes: int = 6, num_envs: int = 3) -> Games:
    return Games(configured(*flags, env=env, episodes=episodes, num_envs=num_envs))


def prefers(played: Games, odds: float) -> Mapping[str, Tensor]:
    """Weights of a policy that draws action 1 ``odds`` times as often as action 0, whatever it sees."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in played.network.state_dict().items()}
    weights["policy.bias"][1] = math.log(odds)
    return weights


def play(played: Games, weights: Mapping[str, Tensor], number: int = 0, version: int = 5) -> TaskResult:
    result = played.play(number, version, weights, stopping=threading.Event())
    assert result is not None
    return result


# ----------------------------------------------------------------------------------------- greedy, sampled


@pytest.mark.parametrize(("odds", "each"), [(3.0, ALL_ONES), (1 / 3, 0)])
def test_a_greedy_policy_always_does_what_it_prefers(odds: float, each: int) -> None:
    greedy = games("--evaluator.actions", "greedy")
    result = play(greedy, prefers(greedy, odds))
    assert result.returns == [each] * 6
    assert {episode.length for episode in result.episodes} == {NUM_STEPS}


def test_a_sampled_policy_does_what_it_prefers_as_often_as_it_says() -> None:
    """Action 1 with probability 3/4 in each of 300 x 8 steps: 1800 times, with a deviation of 21."""
    sampled = games(episodes=300, num_envs=30)
    result = play(sampled, prefers(sampled, 3.0))
    ones = sum(int(each).bit_count() for each in result.returns)
    assert 1800 - 4 * 21.3 < ones < 1800 + 4 * 21.3
    assert len(set(result.returns)) > 30


# --------------------------------------------------------------------------------------------------- seeds


def test_the_same_seed_and_version_play_the_same_games_and_others_do_not() -> None:
    first = games(episodes=10)
    weights = prefers(first, 1.0)
    returns = play(first, weights).returns
    assert play(first, weights).returns == returns
    assert play(games(episodes=10), weights).returns == returns
    assert play(first, weights, version=6).returns != returns
    assert play(games("--seed", "2", episodes=10), weights).returns != returns


def test_every_seed_version_and_task_has_seeds_of_its_own() -> None:
    all_seeds = {seeds(*key) for key in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (7, 100_000, 56)]}
    flat = [seed for pair in all_seeds for seed in pair]
    assert len(set(flat)) == 10
    assert all(0 <= seed < 2**31 for seed in flat)


# -------------------------------------------------------------------------------------------------- memory


def remembering(played: Games) -> Mapping[str, Tensor]:
    """Random weights of a recurrent policy, large enough for what it does to depend on what it remembers."""
    torch.manual_seed(4)
    return {
        name: torch.randn_like(tensor) * 2
        if tensor.is_floating_point() and "baseline" not in name
        else tensor
        for name, tensor in played.network.state_dict().items()
    }


RECURRENT = ("--lstm", "--network.lstm_size", "8", "--evaluator.actions", "greedy")


def test_every_episode_begins_with_an_empty_memory() -> None:
    """A greedy policy that is shown nothing does always the same, if it knows nothing of the last episode."""
    recurrent = games(*RECURRENT)
    result = play(recurrent, remembering(recurrent))
    assert len(set(result.returns)) == 1
    assert result.returns[0] not in (0, ALL_ONES), "it remembers nothing, and the next test proves nothing"


class Unforgetting(RecurrentCore):
    """Takes no observation for the first of an episode."""

    def forward(
        self,
        features_TBF: Tensor,
        last_action_TB: Tensor,
        last_reward_TB: Tensor,
        episode_start_TB: Tensor,
        cuts: Sequence[int],
        state_2BH: Tensor,
    ) -> tuple[Tensor, Tensor]:
        never = torch.zeros_like(episode_start_TB)
        return super().forward(features_TBF, last_action_TB, last_reward_TB, never, cuts, state_2BH)


def test_a_memory_that_went_on_would_be_seen() -> None:
    recurrent = games(*RECURRENT)
    recurrent.network.core = Unforgetting(Constant.num_features, num_actions=2, size=8)
    result = play(recurrent, remembering(recurrent))
    assert len(set(result.returns)) > 1


# --------------------------------------------------------------------------------------------------- tasks

TASKS = [{"id": DIARY, "name": "two"}, {"id": DIARY, "name": "three", "kwargs": {"num_actions": 3}}]
TWO = ("--tasks", json.dumps(TASKS))


def test_one_policy_plays_all_tasks_with_the_actions_of_the_one_that_has_most() -> None:
    both = games(*TWO, "--popart", "--evaluator.actions", "greedy")
    assert [task.name for task in both.tasks] == ["two", "three"]
    weights = prefers(both, 3.0)
    assert weights["policy.bias"].shape == (3,)
    for number in (0, 1):
        result = play(both, weights, number)
        assert (result.name, result.returns) == (both.tasks[number].name, [ALL_ONES] * 6)
    weights["policy.bias"][2] = 10.0  # which is action 0 where there is no action 2
    assert play(both, weights, 0).returns == [0.0] * 6


def test_what_else_is_played_does_not_change_a_tasks_games() -> None:
    both = games(*TWO)
    weights = prefers(both, 1.0)
    alone = play(games(*TWO), weights, 1)
    play(both, weights, 0)
    assert play(both, weights, 1) == alone


def test_games_are_whole_though_training_ends_them_at_a_lost_life() -> None:
    breakout = games(env="ALE/Breakout-v5").tasks[0].env
    assert not breakout.life_loss_ends_episode
    assert (breakout.id, breakout.noop_max, breakout.sticky_actions) == ("ALE/Breakout-v5", 30, 0.0)


def test_levels_are_those_that_are_kept_for_testing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "rl" / "envs" / "fake_lab"))
    levels = games("--tasks", "rooms_collect_good_objects_train,dmlab/rooms_watermaze").tasks
    assert [(task.name, task.env.id, task.env.kwargs) for task in levels] == [
        ("rooms_collect_good_objects_train", "rooms_collect_good_objects_test", {"test": True}),
        ("dmlab/rooms_watermaze", "dmlab/rooms_watermaze", {"test": True}),
    ]


# --------------------------------------------------------------------------------------------- the edges


def test_no_more_environments_are_opened_than_there_are_episodes() -> None:
    opened = []

    def build(sit_down: Callable[[], Player]) -> Player:
        opened.append(sit_down())
        return opened[-1]

    single = Games(configured(episodes=1, num_envs=50), build)
    assert play(single, prefers(single, 1e6)).returns == [ALL_ONES]
    assert [player.env.num_envs for player in opened] == [1]


def test_a_stop_leaves_no_result_whether_before_or_in_the_game() -> None:
    diary = games()
    stopping = threading.Event()
    stopping.set()
    assert diary.play(0, 1, prefers(diary, 1.0), stopping=stopping) is None
    gone = Games(configured(), lambda sit_down: None)
    assert gone.play(0, 1, prefers(gone, 1.0), stopping=threading.Event()) is None


def test_environments_that_do_not_begin_are_closed_and_their_complaint_is_the_users() -> None:
    unlucky = games(env=f"{HOMEMADE}:refusing")
    Refusing.num_open = 0
    with pytest.raises(ConfigError, match=r"^env\.kwargs\.dataset_path = '': the images are missing$"):
        play(unlucky, prefers(unlucky, 1.0))
    assert Refusing.num_open == 0


def test_what_goes_wrong_in_a_game_is_nothing_for_the_user_to_mend() -> None:
    broken = games(env=f"{HOMEMADE}:broken")
    with pytest.raises(ValueError, match="array of the wrong size") as raised:
        play(broken, prefers(broken, 1.0))
    assert not isinstance(raised.value, ConfigError)


def test_an_episode_without_an_end_is_cut_off_as_configured() -> None:
    endless = games("--evaluator.max_episode_steps", "20", env=f"{HOMEMADE}:endless")
    result = play(endless, prefers(endless, 1e6))
    assert result.num_capped == 6
    assert [episode.length for episode in result.episodes] == [20] * 6
    assert play(games(), prefers(games(), 1.0)).num_capped == 0


def test_what_cannot_be_played_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"env\.id = 'ALE/Pnog-v5'.*Pong"):
        games(env="ALE/Pnog-v5")
