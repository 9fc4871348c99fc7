"""Frame stacking against a stack kept frame by frame, and the actor's stacks against the learner's."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.actor.loop import Half
from services.rl.envs import EnvSpec, Transition, VectorEnv
from services.rl.frames import stack_frames
from tests.unit.rl.roundtrip import ACTIONS, LearnerEnd, Outbox, actor_loop


def kept_frame_by_frame(
    frames: NDArray[np.generic], starts: NDArray[np.bool_], depth: int
) -> list[NDArray[np.generic]]:
    """One environment's stacks as a wrapper keeps them: [H, W, depth], from frame depth - 1 on."""
    zero = np.zeros_like(frames[0])
    stack = deque([zero] * depth, maxlen=depth)
    stacks = []
    for frame, start in zip(frames, starts, strict=True):
        if start:
            stack.extend([zero] * depth)
        stack.append(frame)
        stacks.append(np.stack(stack, axis=-1))
    return stacks[depth - 1 :]


def stacked(frames_FN: NDArray[np.generic], starts_FN: NDArray[np.bool_], depth: int) -> Tensor:
    return stack_frames(torch.from_numpy(frames_FN), torch.from_numpy(starts_FN), depth)


def test_a_stack_by_hand() -> None:
    # Frames 1 2 3 4 5 6, an episode starts with 4; stacks of three, oldest first.
    frames = np.arange(1, 7, dtype=np.uint8).reshape(6, 1, 1, 1)
    starts = np.zeros((6, 1), np.bool_)
    starts[3] = True
    assert stacked(frames, starts, 3).squeeze().tolist() == [[1, 2, 3], [0, 0, 4], [0, 4, 5], [4, 5, 6]]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 2), np.uint8), ((5,), np.float32), ((), np.float32)],
    ids=["images", "vectors", "numbers"],
)
def test_stacks_equal_those_kept_frame_by_frame_wherever_episodes_start(
    depth: int, shape: tuple[int, ...], dtype: type[np.generic]
) -> None:
    """Also inside the history, where the oldest stacks begin, and at several starts in a row."""
    rng = np.random.default_rng(depth)
    for start_rate in (0.0, 0.1, 0.4, 1.0):
        for _ in range(15):
            F, N = depth - 1 + int(rng.integers(1, 12)), int(rng.integers(1, 4))
            frames = rng.integers(1, 256, size=(F, N, *shape)).astype(dtype)
            starts = rng.random((F, N)) < start_rate
            result = stacked(frames, starts, depth)
            assert result.shape == (F - depth + 1, N, *shape, depth)
            assert result.dtype == torch.from_numpy(frames).dtype
            for n in range(N):
                wanted = np.stack(kept_frame_by_frame(frames[:, n], starts[:, n], depth))
                np.testing.assert_array_equal(result[:, n], wanted)


@pytest.mark.parametrize("start", range(5))
def test_a_start_within_the_history_clears_what_is_older_than_itself(start: int) -> None:
    frames = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1)
    starts = np.zeros((5, 1), np.bool_)
    starts[start] = True
    visible = [value if value - 1 >= start else 0 for value in (2, 3, 4, 5)]
    first = [1, 2, 3, 4] if start == 4 else [value if value - 1 >= start else 0 for value in (1, 2, 3, 4)]
    assert stacked(frames, starts, 4).squeeze().tolist() == [first, visible]


def test_a_stack_of_one_is_the_frame_itself_without_a_copy() -> None:
    frames = torch.rand(4, 2, 3)
    stacks = stack_frames(frames, torch.ones(4, 2, dtype=torch.bool), 1)
    assert torch.equal(stacks, frames.unsqueeze(-1))
    assert stacks.data_ptr() == frames.data_ptr()


def test_stacking_leaves_its_input_as_it_was() -> None:
    frames = torch.randint(1, 255, (9, 2, 3, 3), dtype=torch.uint8)
    starts = torch.rand(9, 2) < 0.3
    before = frames.clone(), starts.clone()
    stack_frames(frames, starts, 4)
    assert torch.equal(frames, before[0])
    assert torch.equal(starts, before[1])


def test_the_stack_is_laid_out_channels_last() -> None:
    stacks = stack_frames(torch.zeros(6, 2, 8, 8, dtype=torch.uint8), torch.zeros(6, 2, dtype=torch.bool), 4)
    images = stacks.flatten(0, 1).permute(0, 3, 1, 2)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("num_frames", "starts_shape"), [(4, (3, 2)), (2, (3, 1)), (2, (2, 2))])
def test_too_few_frames_or_starts_of_another_shape_are_bugs(
    num_frames: int, starts_shape: tuple[int, int]
) -> None:
    with pytest.raises(AssertionError):
        stack_frames(torch.zeros(3, 2, 5), torch.zeros(starts_shape, dtype=torch.bool), num_frames)


# ------------------------------------------------------------------------------- the actor and the learner


class RandomFrames(VectorEnv):
    """Frames of noise, and episodes that end at random; autoreset as every suite does it."""

    def __init__(self, spec: EnvSpec, num_envs: int, end_rate: float) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self._rng = np.random.default_rng()
        self._end_rate = end_rate
        self._over = np.zeros(num_envs, np.bool_)

    def _frames(self) -> NDArray[np.generic]:
        size = (self.num_envs, *self.spec.observation_shape)
        return self._rng.integers(1, 256, size=size).astype(self.spec.observation_dtype)

    def reset(self, seed: int) -> NDArray[np.generic]:
        self._rng = np.random.default_rng(seed)
        return self._frames()

    def send(self, actions: NDArray[np.int64]) -> None:
        pass

    def recv(self) -> Transition:
        self._over = (self._rng.random(self.num_envs) < self._end_rate) & ~self._over
        truncated = self._over & (self._rng.random(self.num_envs) < 0.5)
        return Transition(
            observation=self._frames(),
            reward=np.zeros(self.num_envs, np.float32),
            terminated=self._over & ~truncated,
            truncated=truncated,
            episode_over=self._over,
        )

    def close(self) -> None:
        pass


class Witness:
    """A policy that stacks what it is shown, as the real one does, and keeps every stack."""

    version = 0

    def __init__(self, depth: int) -> None:
        self.stacks: list[Tensor] = []
        self._depth = depth

    def act(
        self, frames_NF: NDArray[np.generic], episode_start_NF: NDArray[np.bool_], *_unused: object
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        frames_FN = torch.from_numpy(frames_NF.copy()).transpose(0, 1)
        starts_FN = torch.from_numpy(episode_start_NF.copy()).transpose(0, 1)
        stacks = stack_frames(frames_FN, starts_FN, self._depth)
        assert len(stacks) == 1
        self.stacks.append(stacks[0])
        num_envs = len(frames_NF)
        return np.zeros(num_envs, np.int64), np.zeros((num_envs, ACTIONS.num_outputs), np.float32)


@pytest.mark.parametrize("unroll_length", [1, 2, 5, 20])
@pytest.mark.parametrize(
    ("depth", "shape", "dtype"), [(4, (3, 3), "uint8"), (1, (3, 3), "uint8"), (1, (6,), "float32")]
)
@pytest.mark.parametrize("end_rate", [0.0, 0.3])
def test_the_learner_restacks_exactly_what_the_policy_saw(
    unroll_length: int, depth: int, shape: tuple[int, ...], dtype: str, end_rate: float
) -> None:
    """Over consecutive unrolls, shorter and longer than the history that they carry along."""
    num_envs, num_unrolls = 3, 6
    spec = EnvSpec(
        id="noise",
        observation_shape=shape,
        observation_dtype=dtype,
        frame_stack=depth,
        num_actions=ACTIONS.num_actions,
        frame_skip=1,
    )
    stopping, policy = threading.Event(), Witness(depth)
    outbox = Outbox(num_unrolls * num_envs, stopping)
    half = Half(RandomFrames(spec, num_envs, end_rate), spec, unroll_length, ACTIONS.num_outputs, seed=1)
    actor_loop([half], policy, outbox, stopping).run()
    batches = LearnerEnd(spec, unroll_length, batch_size=num_envs).batches(outbox.messages)

    assert len(policy.stacks) >= num_unrolls * unroll_length
    for index, batch in enumerate(batches):
        frames_FB, starts_FB = batch.observation.transpose(0, 1), batch.episode_start.T
        stacks = stack_frames(frames_FB, starts_FB, depth)
        seen = torch.stack(policy.stacks[index * unroll_length : (index + 1) * unroll_length + 1])
        assert torch.equal(stacks[: len(seen)], seen)
        assert len(stacks) == unroll_length + 1
