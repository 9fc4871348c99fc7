"""ViZDoom, compared with the environments that it brings for Gymnasium itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
import numpy.typing as npt
import pytest

from services.config import EnvConfig
from services.rl.envs import Transition, VectorEnv, env_spec, make_vector_env, vizdoom
from services.rl.envs.base import env_seeds
from tests.conftest import needs_package

pytestmark = pytest.mark.usefixtures("scratch_dir")
needs_vizdoom = needs_package("vizdoom")

STAY = 0
TIMEOUT_FRAMES = 300  # of Basic


def play(env: VectorEnv, num_steps: int, action: int = STAY) -> list[Transition]:
    """The same action all the time, from seed 5."""
    env.reset(5)
    seen = []
    for _ in range(num_steps):
        env.send(np.full(env.num_envs, action))
        seen.append(env.recv())
    return seen


@pytest.fixture
def alone() -> Iterator[gymnasium.Env[Any, Any]]:
    """ViZDoom's own environment, as it is when frames of up to 160 x 120 are asked for."""
    import vizdoom.gymnasium_wrapper  # type: ignore[import-untyped,unused-ignore]  # noqa: F401

    env = gymnasium.make(
        "VizdoomBasic-v1", frame_skip=4, screen_resolution="RES_160X120", disable_env_checker=True
    )
    yield env
    env.close()


def gray(screen: npt.NDArray[np.uint8]) -> Any:
    return cv2.resize(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)


@needs_vizdoom
def test_basic_plays_exactly_as_vizdoom_plays_it(alone: gymnasium.Env[Any, Any]) -> None:
    env = make_vector_env(EnvConfig(id="VizdoomBasic-v1"), 2)
    reference, _ = alone.reset(seed=env_seeds(5, 2)[1])
    np.testing.assert_array_equal(env.reset(5)[1], gray(reference["screen"]))
    over, num_ends = False, 0
    rng = np.random.default_rng(1)
    for _ in range(200):
        action = int(rng.integers(4))
        env.send(np.array([STAY, action]))
        seen = env.recv()
        if over:
            reference, _ = alone.reset()
            assert seen.reward[1] == 0
            over = False
        else:
            reference, reward, over, _, _ = alone.step(action)
            assert seen.reward[1] == reward
        assert seen.episode_over[1] == over
        num_ends += over
        if not over:  # where ViZDoom itself is black
            np.testing.assert_array_equal(seen.observation[1], gray(reference["screen"]))
    env.close()
    assert num_ends >= 3


@needs_vizdoom
@pytest.mark.parametrize("frame_skip", [4, 10])
def test_a_time_limit_counts_frames_truncates_and_shows_the_last_screen_there_was(frame_skip: int) -> None:
    env = make_vector_env(EnvConfig(id="doom_basic", frame_skip=frame_skip), 2)
    seen = play(env, TIMEOUT_FRAMES // frame_skip + 1)
    env.close()
    *earlier, before, last, reset = seen
    assert not any(t.episode_over.any() for t in [*earlier, before, reset])
    assert last.truncated.all() and last.episode_over.all() and not last.terminated.any()
    np.testing.assert_array_equal(last.reward, -frame_skip)  # living costs 1 a frame
    np.testing.assert_array_equal(last.observation, before.observation)
    assert last.observation.any()


@needs_vizdoom
def test_a_monster_that_is_shot_is_a_termination() -> None:
    env = make_vector_env(EnvConfig(id="doom_basic"), 8)
    rng = np.random.default_rng(1)
    env.reset(1)
    shot = 0
    for _ in range(150):
        env.send(rng.integers(4, size=8))
        seen = env.recv()
        hit = seen.reward > 50
        assert (seen.terminated == hit).all()
        shot += int(hit.sum())
    env.close()
    assert shot > 5


@needs_vizdoom
def test_color_shows_the_same_screen_in_three_channels(alone: gymnasium.Env[Any, Any]) -> None:
    env = make_vector_env(EnvConfig(id="doom_basic", color=True, frame_height=120, frame_width=160), 1)
    reference, _ = alone.reset(seed=env_seeds(5, 1)[0])
    (frame,) = env.reset(5)
    env.close()
    np.testing.assert_array_equal(frame, reference["screen"])


@needs_vizdoom
@pytest.mark.parametrize(
    ("env_id", "kwargs", "num_actions"),
    [
        ("doom_basic", {}, 1 + 3),
        ("VizdoomBasic-MultiBinary-v1", {}, 1 + 3),
        ("doom_basic", {"max_buttons_pressed": 2}, 1 + 3 + 3),
        ("doom_deathmatch", {}, 1 + 17),  # and three buttons that turn by an amount
        ("VizdoomFreedoom1E1M1-S3-v0", {}, 1 + 19),
    ],
)
def test_an_action_presses_one_button_or_none(
    env_id: str, kwargs: dict[str, str | int | float | bool | None], num_actions: int
) -> None:
    config = EnvConfig(id=env_id, kwargs=kwargs)
    env = make_vector_env(config, 1)
    assert env_spec(config).num_actions == env.spec.num_actions == num_actions
    play(env, 2, action=num_actions - 1)
    env.close()


@needs_vizdoom
def test_every_short_name_is_a_scenario_that_vizdoom_has() -> None:
    for name, env_id in vizdoom.SCENARIOS.items():
        ours, theirs = (env_spec(EnvConfig(id=spelling)) for spelling in (name, env_id))
        assert ours.num_actions == theirs.num_actions >= 2


@needs_vizdoom
def test_frames_of_any_size_are_covered_by_what_is_rendered() -> None:
    for side in (16, 121, 512):
        env = make_vector_env(EnvConfig(id="doom_basic", frame_height=side, frame_width=side), 1)
        assert env.reset(1).shape == (1, side, side)
        env.close()


@needs_vizdoom
@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        ("VizdoomBasc-v1", {}, "env.id = 'VizdoomBasc-v1': unknown; .*Did you mean: `VizdoomBasic`"),
        ("doom_basic", {"frame_skip": 2}, "env.kwargs.frame_skip: unknown; allowed are max_buttons_pressed"),
        (
            "doom_basic",
            {"max_buttons_pressed": 0},
            "env.kwargs.max_buttons_pressed = 0: allowed is at least 1",
        ),
    ],
)
def test_mistakes_are_refused_by_name(
    env_id: str, kwargs: dict[str, str | int | float | bool | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        env_spec(EnvConfig(id=env_id, kwargs=kwargs))


@needs_vizdoom
def test_a_working_directory_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "_vizdoom").write_text("in the way", encoding="utf-8")
    with pytest.raises(ValueError, match=r"env.id = 'doom_basic': .*working directory.*_vizdoom"):
        make_vector_env(EnvConfig(id="doom_basic"), 1)


@needs_vizdoom
def test_nothing_but_the_folder_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = make_vector_env(EnvConfig(id="doom_basic"), 1)
    play(env, 3)
    env.close()
    assert [path.name for path in tmp_path.rglob("*")] == ["_vizdoom"]


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    for ask in (env_spec, lambda config: make_vector_env(config, 2)):
        with pytest.raises(ValueError, match=r"'doom_basic': needs the package vizdoom.*pip install"):
            ask(EnvConfig(id="doom_basic"))
    assert not list(tmp_path.iterdir())
