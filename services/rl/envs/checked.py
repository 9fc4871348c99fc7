"""The order of calls, the range of actions and the form of instructions, checked once for all suites.

Violations are bugs of the caller, and without the check they are hard to find: an action outside of the
range makes ALE's worker threads wait for ever, and a forgotten ``recv`` shifts all later transitions by one.
"""

from __future__ import annotations

import numpy as np

from services.rl.envs.base import Actions, Instructions, Observations, Transition, VectorEnv


class CheckedVectorEnv(VectorEnv):
    """Passes calls on to ``env`` and asserts that they are legal."""

    def __init__(self, env: VectorEnv) -> None:
        self.spec = env.spec
        self.num_envs = env.num_envs
        self._env = env
        self._next = "reset"

    def reset(self, seed: int) -> Observations:
        assert self._next in ("reset", "send"), f"reset() called where {self._next}() is due"
        self._next = "send"
        return self._env.reset(seed)

    def send(self, actions: Actions) -> None:
        assert self._next == "send", f"send() called where {self._next}() is due"
        assert actions.shape == (self.num_envs,), f"{actions.shape = }, expected ({self.num_envs},)"
        assert actions.dtype == np.int64, f"{actions.dtype = }, expected int64"
        legal = actions.min() >= 0 and actions.max() < self.spec.num_actions
        assert legal, f"{actions = }, expected 0 to {self.spec.num_actions - 1}"
        self._env.send(actions)
        self._next = "recv"

    def recv(self) -> Transition:
        assert self._next == "recv", f"recv() called where {self._next}() is due"
        self._next = "send"
        return self._env.recv()

    def instructions(self) -> Instructions | None:
        assert self._next == "send", f"instructions() called where {self._next}() is due"
        instructions = self._env.instructions()
        length = self.spec.instruction_length
        if instructions is None:
            assert length == 0, f"no instructions, expected {length} words each"
        else:
            assert length > 0, f"{instructions = }, expected none"
            assert instructions.shape == (self.num_envs, length), f"{instructions.shape = }"
            assert instructions.dtype == np.int32, f"{instructions.dtype = }, expected int32"
        return instructions

    def close(self) -> None:
        if self._next != "nothing":
            self._next = "nothing"
            self._env.close()
