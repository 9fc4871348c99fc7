"""The publisher: a thread that brings the newest weights to the parameter server.

    consumes   the trainer's weights, copied on the device when ``offer`` is called
    produces   ``Publish`` messages of safetensors bytes
    waits for  the parameter server's answer
    may drop   versions: while one is on its way, newer ones are not even copied; never the last one

Between versions it keeps asking what the server holds, so a restarted server gets the weights again. Beside
``rl/policy.py`` this is the only place where the words of ``wire`` and of ``rl`` meet for weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn

from services.ops.logging import get_logger
from services.wire import codec
from services.wire.codec import WireError
from services.wire.messages import (
    NO_VERSION,
    Buffer,
    Client,
    Message,
    Publish,
    Published,
    Pull,
    Refusal,
    RunState,
    Weights,
)
from services.wire.sockets import RENEW_S, Requester

POLL_S = 0.1
ANSWER_S = 2.0
ANNOUNCE_S = 2.0
"""How often the server is asked what it holds when there is nothing new."""

_log = get_logger("publisher").limited(10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edition:
    """One version, ready to be sent."""

    version: int
    steps: int
    state: RunState
    payload: bytes


class WeightsCopier:
    """Copies weights to the host without stopping the device: pinned memory, a stream of its own."""

    def __init__(self, network: nn.Module) -> None:
        self._tensors = dict(network.state_dict())
        device = next(iter(self._tensors.values())).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copies = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
            for name, tensor in self._tensors.items()
        }
        self._copied: torch.cuda.Event | None = None

    def start(self) -> None:
        """Begin to copy the weights as they are now; updates that follow do not disturb the copy."""
        if self._stream is None:
            for name, copy in self._copies.items():
                copy.copy_(self._tensors[name])
            return
        # Cloned in the trainer's own stream, before the next update writes; carried to the host beside it.
        clones = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for name, copy in self._copies.items():
                copy.copy_(clones[name], non_blocking=True)
                clones[name].record_stream(self._stream)
        self._copied = self._stream.record_event()

    def finish(self) -> bytes:
        """Wait for the copy, in the publisher's thread, and serialise it."""
        if self._copied is not None:
            self._copied.synchronize()
        return safetensors.torch.save({name: copy.contiguous() for name, copy in self._copies.items()})


class Publisher:
    """``offer`` is called by the trainer's loop, ``run`` is the publisher's thread."""

    def __init__(
        self,
        *,
        connect: Callable[[], Requester],
        client: Client,
        expected: codec.Expected,
        copier: WeightsCopier,
        stopping: threading.Event,
    ) -> None:
        self._connect = connect
        self._client = client
        self._expected = expected
        self._copier = copier
        self._stopping = stopping
        self._changed = threading.Condition()
        self._offered: tuple[int, int, RunState] | None = None
        self._edition: _Edition | None = None
        self.held_version = NO_VERSION
        """What the server held when it last answered."""
        self._confirmed: tuple[int, RunState] | None = None
        self._unreachable_since_s: float | None = None
        self.trouble: str | None = "no answer from the parameter server yet"
        """In a few words why nothing can be published, or None."""

    def offer(self, version: int, steps: int, state: RunState, wait_s: float = 0.0) -> bool:
        """Publish the weights as they are now. False, after ``wait_s``, if others are still on their way."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._offered is None, wait_s):
                return False
            self._copier.start()
            self._offered = (version, steps, state)
            self._changed.notify_all()
            return True

    def retire(self) -> None:
        """Another learner publishes from now on: forget what this one did, or the server would hear of it."""
        with self._changed:
            self._edition = self._offered = None
            self.trouble = None
            self._changed.notify_all()

    def wait_until_confirmed(self, version: int, state: RunState, timeout_s: float) -> bool:
        """Whether the server has answered, within ``timeout_s``, to this version in this state."""
        with self._changed:
            return self._changed.wait_for(lambda: self._confirmed == (version, state), timeout_s)

    def fetch_newer(self, version: int, timeout_s: float) -> Weights | None:
        """The server's weights if they are newer than ``version``; None if not, or without an answer."""
        pull = Pull(run_id=self._expected.run_id, sender=self._client, have_version=version, seats_for=())
        try:
            with self._connect() as requester:
                weights = self._ask(requester, pull, time.monotonic() + timeout_s)
        except OSError as error:
            self._trouble(f"cannot connect ({error})")
            return None
        return weights if isinstance(weights, Weights) and weights.payload is not None else None

    def run(self) -> None:
        """Send what is offered; otherwise ask, now and then, what the server holds."""
        while not self._stopping.is_set():
            try:
                with self._connect() as requester:
                    self._converse(requester)
            except OSError as error:  # no file is left to open, say
                self._trouble(f"cannot connect ({error})")
                self._stopping.wait(ANSWER_S)

    def _converse(self, requester: Requester) -> None:
        """Until the server falls silent or the pod stops."""
        answered = True
        while answered and not self._stopping.is_set():
            with self._changed:
                self._changed.wait_for(
                    lambda: self._offered is not None or self._stopping.is_set(), ANNOUNCE_S
                )
                offered = self._offered
            if offered is not None:
                version, steps, state = offered
                payload = self._copier.finish()
                newest = _Edition(version=version, steps=steps, state=state, payload=payload)
                with self._changed:
                    if self._offered is not offered:  # retired meanwhile
                        continue
                    self._edition, self._offered = newest, None
                    self._changed.notify_all()
                answered = self._send(requester, newest, with_payload=True)
            elif (edition := self._edition) is not None:
                answered = self._send(requester, edition, with_payload=False)
                if answered and self.held_version < edition.version:
                    answered = self._send(requester, edition, with_payload=True)
            else:  # whoever does not lead only keeps its connection, and reads what libzmq reports of it
                requester.mend()

    def wake(self) -> None:
        """Make ``run`` look at ``stopping`` now."""
        with self._changed:
            self._changed.notify_all()

    def _send(self, requester: Requester, edition: _Edition, with_payload: bool) -> bool:
        """False if the server was sent this and is silent.

        While it is not there to be sent anything, the socket goes on trying by itself: a new one would begin
        its handshake anew.
        """
        now_s = time.monotonic()
        breaks = self._post(requester, self._publish(edition, with_payload), now_s + ANSWER_S)
        if breaks is None:
            self._unreachable_since_s = self._unreachable_since_s or now_s
            is_stuck = time.monotonic() - self._unreachable_since_s > RENEW_S
            self._unreachable_since_s = None if is_stuck else self._unreachable_since_s
            return not is_stuck
        self._unreachable_since_s = None
        answer = self._hear(requester, time.monotonic() + ANSWER_S, breaks)
        if isinstance(answer, Published):
            self.trouble = None
            with self._changed:
                self.held_version = answer.version
                if answer.version >= edition.version:
                    self._confirmed = (edition.version, edition.state)
                self._changed.notify_all()
        return answer is not None

    def _publish(self, edition: _Edition, with_payload: bool) -> Publish:
        return Publish(
            run_id=self._expected.run_id,
            sender=self._client,
            state=edition.state,
            version=edition.version,
            steps=edition.steps,
            payload=edition.payload if with_payload else None,
        )

    def _ask(self, requester: Requester, request: Message, deadline_s: float) -> Message | None:
        breaks = self._post(requester, request, deadline_s)
        return None if breaks is None else self._hear(requester, deadline_s, breaks)

    def _post(self, requester: Requester, request: Message, deadline_s: float) -> int | None:
        """How often the connection had broken before; None if the server is not there."""
        frames = codec.encode(request)
        while True:
            breaks = requester.breaks
            if requester.send(frames, POLL_S):
                return breaks
            if time.monotonic() > deadline_s or self._stopping.is_set():
                self._trouble(requester.trouble or "parameter server not reachable")
                return None

    def _hear(self, requester: Requester, deadline_s: float, breaks: int) -> Message | None:
        while not self._stopping.is_set():
            frames = requester.receive(POLL_S)
            if frames is not None:
                return self._open(frames)
            if requester.breaks != breaks:
                self._trouble("parameter server has gone")
                return None
            if time.monotonic() > deadline_s:
                self._trouble("parameter server does not answer")
                return None
        return None

    def _open(self, frames: list[Buffer]) -> Message | None:
        try:
            answer = codec.decode(frames, self._expected)
        except WireError as error:
            self._trouble(f"unusable answer: {error}")
            return None
        if isinstance(answer, Refusal):
            self._trouble(f"parameter server refuses: {answer.text}")
        return answer

    def _trouble(self, text: str) -> None:
        self.trouble = text
        _log.warning("not_published", reason=text)


def tensors_of(weights: Weights) -> dict[str, Tensor]:
    """The weights in a message by name."""
    assert weights.payload is not None
    return safetensors.torch.load(bytes(weights.payload))
