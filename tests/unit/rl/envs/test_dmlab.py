"""DeepMind Lab, against a stand-in whose frames show what it was told (see fake_lab/deepmind_lab.py)."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from services.config import EnvConfig
from services.rl.envs import dmlab, env_spec, make_vector_env
from services.rl.envs.instructions import hash_words
from services.rl.envs.vectorized import vectorize
from tests.unit.learner.disk import full_disk

pytestmark = pytest.mark.usefixtures("fake_lab", "scratch_dir")

LANGUAGE = "language_select_described_object"
FRAMES = 160  # of the stand-in's episodes
Kwargs = dict[str, str | int | float | bool | None]


def color(env_id: str, **settings: Any) -> EnvConfig:
    """A configuration whose frames pass through as Lab makes them."""
    return EnvConfig(id=env_id, color=True, frame_height=72, frame_width=96, **settings)


def told(frame: npt.NDArray[np.uint8]) -> tuple[list[int], int, int]:
    """The action, the number of frames and the seed that a frame shows."""
    return (
        [int(v) - 128 for v in frame[0, :7, 0]],
        int(frame[0, 7, 0]),
        int.from_bytes(bytes(frame[1, :4, 0]), "little"),
    )


def opened(config: EnvConfig) -> dict[str, Any]:
    """What Lab was made of, for the configuration's environment."""
    import deepmind_lab  # type: ignore[import-not-found]

    level = dmlab.Level(config)
    level.reset(seed=1)
    level.close()
    made: dict[str, Any] = deepmind_lab.opened[-1]
    return made


def test_the_nine_actions_are_those_of_the_paper_in_its_order() -> None:
    env = make_vector_env(color("rooms_watermaze"), 9)
    assert env.spec.num_actions == 9
    env.reset(1)
    env.send(np.arange(9))
    seen = env.recv()
    env.close()
    look, strafe, move, fire = 0, 2, 3, 4
    expected: list[dict[int, int]] = [
        {move: 1},
        {move: -1},
        {strafe: -1},
        {strafe: 1},
        {look: -20},
        {look: 20},
        {look: -20, move: 1},
        {look: 20, move: 1},
        {fire: 1},
    ]
    for frame, action in zip(seen.observation, expected, strict=True):
        assert told(frame)[0] == [action.get(i, 0) for i in range(7)]
    np.testing.assert_array_equal(seen.reward, [0] * 8 + [4])  # four frames of firing


def test_frame_skip_is_the_number_of_frames_that_an_action_lasts() -> None:
    env = make_vector_env(color("rooms_watermaze", frame_skip=7), 2)
    env.reset(1)
    for step in (1, 2):
        env.send(np.array([8, 0]))
        seen = env.recv()
        assert told(seen.observation[0])[1] == 7 * step
        np.testing.assert_array_equal(seen.reward, [7, 0])
    env.close()
    assert env.spec.frame_skip == 7


def test_the_end_is_a_termination_that_shows_the_last_frame_there_was() -> None:
    env = make_vector_env(color("rooms_watermaze"), 2)
    env.reset(1)
    seen = []
    for _ in range(FRAMES // 4 + 1):
        env.send(np.array([0, 8]))
        seen.append(env.recv())
    env.close()
    *_, before, last, reset = seen
    assert last.terminated.all() and last.episode_over.all() and not last.truncated.any()
    np.testing.assert_array_equal(last.reward, [0, 4])
    np.testing.assert_array_equal(last.observation, before.observation)
    assert [told(frame)[1] for frame in reset.observation] == [0, 0]


def test_every_episode_of_every_environment_has_a_seed_of_its_own_that_depends_on_the_first_one() -> None:
    def seeds(seed: int) -> list[int]:
        env = make_vector_env(color("rooms_watermaze", frame_skip=80), 3)
        frames = [env.reset(seed)]
        for _ in range(30):  # an episode is two steps and a reset
            env.send(np.zeros(3, np.int64))
            transition = env.recv()
            frames.append(transition.observation)
        env.close()
        return list(dict.fromkeys(told(frame)[2] for step in frames for frame in step))

    one = seeds(1)
    assert len(one) == 3 * 11
    assert max(one) > 2**30 and min(one) >= 0  # all 31 bits are used
    assert seeds(1) == one
    assert not set(seeds(2)) & set(one)


def test_instructions_belong_to_the_newest_observation_and_are_the_callers_to_keep() -> None:
    words = [hash_words(f"pick the {colour} ball") for colour in ("red", "green", "blue", "yellow")]
    env = make_vector_env(color(f"dmlab/{LANGUAGE}", frame_skip=80), 6)
    assert env.spec.instruction_length == 16
    frames = [env.reset(1)]
    said = [env.instructions()]
    for _ in range(12):
        env.send(np.zeros(6, np.int64))
        frames.append(env.recv().observation)
        said.append(env.instructions())
    env.close()
    assert len({told(frame)[2] % 4 for step in frames for frame in step}) == 4
    for step, instructions in zip(frames, said, strict=True):
        assert instructions is not None
        np.testing.assert_array_equal(instructions, [words[told(frame)[2] % 4] for frame in step])


@pytest.mark.parametrize("how", ["sync", "async"])
def test_instructions_come_along_in_this_process_or_another(how: Literal["sync", "async"]) -> None:
    config = color(LANGUAGE)
    env = vectorize(partial(dmlab.Level, config), lambda *_: env_spec(config), 1, how)
    for seed in range(4):
        (frame,) = env.reset(seed)
        colour = ("red", "green", "blue", "yellow")[told(frame)[2] % 4]
        np.testing.assert_array_equal(env.instructions(), [hash_words(f"pick the {colour} ball")])
    env.close()


def test_lab_is_loaded_in_the_processes_of_the_environments_and_never_in_this_one() -> None:
    sys.modules.pop("deepmind_lab", None)
    env = make_vector_env(EnvConfig(id="rooms_watermaze", vectorization="sync"), 2)
    env.reset(1)
    env.close()
    assert "deepmind_lab" not in sys.modules


def test_a_level_that_says_nothing_has_instructions_of_no_words() -> None:
    env = make_vector_env(color("dmlab/rooms_watermaze"), 2)
    env.reset(1)
    np.testing.assert_array_equal(env.instructions(), np.zeros((2, 16)))
    env.close()


@pytest.mark.parametrize("in_color", [True, False])
def test_frames_are_rendered_at_the_configured_size_gray_unless_color_is_asked_for(in_color: bool) -> None:
    config = EnvConfig(id="rooms_watermaze", frame_height=24, frame_width=32, color=in_color)
    env = make_vector_env(config, 2)
    frame = env.reset(1)[0]
    env.close()
    assert frame.shape == env.spec.observation_shape == ((24, 32, 3) if in_color else (24, 32))
    red = told(frame.reshape(24, 32, -1))[2] % 256
    assert (frame[2:] == ([red, 0, 0] if in_color else round(0.299 * red))).all()


@pytest.mark.parametrize(
    ("env_id", "level"),
    [
        ("rooms_collect_good_objects_train", "contributed/dmlab30/rooms_collect_good_objects_train"),
        ("dmlab/explore_goal_locations_large", "contributed/dmlab30/explore_goal_locations_large"),
        ("dmlab/contributed/dmlab30/rooms_watermaze", "contributed/dmlab30/rooms_watermaze"),
        ("dmlab/tests/empty_room_test", "tests/empty_room_test"),
    ],
)
def test_a_level_of_dmlab30_may_go_by_its_bare_name_and_others_by_their_path(env_id: str, level: str) -> None:
    assert opened(EnvConfig(id=env_id))["level"] == level


def test_lab_is_told_the_size_and_what_the_arguments_say() -> None:
    plain = opened(EnvConfig(id="rooms_watermaze", frame_height=72, frame_width=96))
    assert plain["config"] == {"width": "96", "height": "72", "logLevel": "WARN"}
    assert plain["renderer"] == "software"
    kwargs: Kwargs = {"dataset_path": "/data/brady", "renderer": "hardware", "test": True}
    assert opened(EnvConfig(id="rooms_watermaze", kwargs=kwargs)) == {
        "level": "contributed/dmlab30/rooms_watermaze",
        "renderer": "hardware",
        "config": {
            "width": "84",
            "height": "84",
            "logLevel": "WARN",
            "datasetPath": "/data/brady",
            "allowHoldOutLevels": "true",
            "mixerSeed": "1611489005",
        },
    }


def test_a_level_that_is_held_out_for_tests_is_played_as_one() -> None:
    held_out = opened(EnvConfig(id="rooms_exploit_deferred_effects_test"))["config"]
    assert held_out["allowHoldOutLevels"] == "true"
    assert "mixerSeed" in held_out
    assert "mixerSeed" not in opened(EnvConfig(id="rooms_exploit_deferred_effects_train"))["config"]


def test_a_map_is_compiled_once_however_many_processes_want_it(scratch_dir: Path) -> None:
    cache = scratch_dir / "cache" / "maps"
    config = color("rooms_watermaze", kwargs={"level_cache": str(cache)})
    for _ in range(2):
        env = make_vector_env(config, 2)
        seeds = [told(frame)[2] for frame in env.reset(1)]
        env.close()
        assert {path.name for path in cache.iterdir()} == {f"map-{seed}" for seed in seeds}
        kept = cache / f"map-{seeds[0]}"
        assert kept.read_text() == f"compiled for {seeds[0]}"
        for seed in seeds:
            (scratch_dir / f"map-{seed}.pk3").unlink()


def test_a_map_that_is_kept_is_copied_to_where_lab_wants_it(tmp_path: Path) -> None:
    cache = dmlab.LevelCache(tmp_path / "cache")
    wanted = tmp_path / "wanted.pk3"
    assert not cache.fetch("key", str(wanted))
    assert not wanted.exists()
    wanted.write_bytes(b"map")
    cache.write("key", str(wanted))
    wanted.unlink()
    assert cache.fetch("key", str(wanted))
    assert wanted.read_bytes() == b"map"


def test_a_map_that_is_kept_can_be_read_by_other_users_of_the_directory(tmp_path: Path) -> None:
    cache = dmlab.LevelCache(tmp_path / "cache")
    compiled = tmp_path / "map.pk3"
    compiled.write_bytes(b"map")
    cache.write("key", str(compiled))
    assert (tmp_path / "cache" / "key").stat().st_mode & 0o777 == 0o644


def test_a_cache_on_a_full_disk_is_of_no_use_and_ends_no_episode(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    cache = dmlab.LevelCache(directory)
    compiled = tmp_path / "map.pk3"
    compiled.write_bytes(b"map" * 1000)
    with full_disk(1000):
        cache.write("key", str(compiled))
    assert list(directory.iterdir()) == [], "no half of a map"
    assert not cache.fetch("key", str(tmp_path / "wanted.pk3"))


def test_a_cache_that_is_gone_or_unreadable_ends_no_episode(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    cache = dmlab.LevelCache(directory)
    (directory / "key").mkdir()  # which nobody, not even root, reads as a file
    assert not cache.fetch("key", str(tmp_path / "wanted.pk3"))
    (directory / "key").rmdir()
    directory.rmdir()
    compiled = tmp_path / "map.pk3"
    compiled.write_bytes(b"map")
    cache.write("key", str(compiled))
    assert not cache.fetch("key", str(tmp_path / "wanted.pk3"))


def test_all_32_levels_are_known_by_name_and_nothing_else_is_a_bare_name() -> None:
    assert len(dmlab.LEVELS) == 32
    assert all(dmlab.plays(level) and dmlab.plays(f"dmlab/{level}") for level in dmlab.LEVELS)
    assert {"rooms_collect_good_objects_test", "skymaze_irreversible_path_hard"} <= set(dmlab.LEVELS)
    assert not dmlab.plays("rooms_watermaz")
    with pytest.raises(ValueError, match="did you mean dmlab/rooms_watermaze"):
        env_spec(EnvConfig(id="rooms_watermaz"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium shows the process's traceback as well
def test_a_level_that_lab_does_not_have_is_refused_with_what_lab_says() -> None:
    env = make_vector_env(EnvConfig(id="dmlab/no/such_level"), 2)
    with pytest.raises(ValueError, match=r"env.id = 'dmlab/no/such_level' .*Level not found!"):
        env.reset(1)
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"render": "hardware"},
            "env.kwargs.render: unknown; allowed are dataset_path, renderer, level_cache, test",
        ),
        ({"renderer": "metal"}, "env.kwargs.renderer = 'metal': allowed is software or hardware"),
        ({"test": "yes"}, "env.kwargs.test = 'yes': allowed is bool"),
    ],
)
def test_bad_arguments_are_refused_by_name(kwargs: Kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        env_spec(EnvConfig(id="rooms_watermaze", kwargs=kwargs))


def test_without_the_package_it_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepmind_lab", None)
    for ask in (env_spec, lambda config: make_vector_env(config, 2)):
        with pytest.raises(ValueError, match=r"'rooms_watermaze': needs the package deepmind_lab.*bazel"):
            ask(EnvConfig(id="rooms_watermaze"))
