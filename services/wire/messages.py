"""The messages of the system: frozen values without behaviour.

Actors send ``Rollout`` to learners. Everybody else talks to the parameter server in request and reply:
``Pull`` -> ``Weights``, ``Publish`` -> ``Published``, ``Goodbye`` -> nothing, and ``Refusal`` in place of any
reply. ``codec.py`` turns each into frames and back; nothing here knows about bytes, sockets or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PROTOCOL_VERSION = 2
"""Changes whenever an old peer would misread a new message. Checked before anything else in a message."""

RunState = Literal["waiting", "training", "complete"]
"""waiting: no weights yet; training; complete: ``total_steps`` are done, peers may idle."""

NO_VERSION = -1
"""The policy version of whoever has no weights yet."""

NO_SEAT = -1
"""The seat of whoever has none, or none yet."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """What one array of a rollout must be. Floats must also be finite."""

    dtype: str
    shape: tuple[int, ...]
    low: int | None = None
    """Integers: the least value allowed."""
    high: int | None = None
    """Integers: the greatest value allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedArray:
    """One array as it travels: ``data`` is encoded by ``codec`` (`none` or `zstd`)."""

    dtype: str
    shape: tuple[int, ...]
    codec: str
    data: Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A whole episode (game) that ended inside a rollout."""

    episode_return: float
    """Sum of raw rewards, never clipped."""
    length: int
    """Agent steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One unroll of one environment, acted by exactly one policy version."""

    run_id: str
    actor_id: str
    incarnation: int
    """Which life of this actor: a restarted one starts a new sequence."""
    sequence: int
    """Counts this incarnation's rollouts to one learner or another; a gap is a lost rollout."""
    policy_version: int
    task: int
    episodes: tuple[Episode, ...]
    arrays: Mapping[str, PackedArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Somebody who holds, or wants, a seat."""

    client_id: str
    incarnation: int
    seat: int = NO_SEAT
    """The seat it holds. A restarted parameter server knows no leases, and gives it back to who claims it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """ "Anything newer than this version?" Held open until there is, or until the server's patience ends."""

    run_id: str
    sender: Client
    have_version: int
    seats_for: tuple[Client, ...]
    """Who wants a seat: an actor names itself, a relay all of its actors, an evaluator nobody."""
    request: int = 0
    """Comes back in the reply, so that a relay can tell the reply to a request that it has replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The newest weights, or (payload None) the news that there are none newer."""

    run_id: str
    server_incarnation: int
    state: RunState
    version: int
    steps: int
    """Agent steps trained when this version was made."""
    seats: tuple[int, ...]
    """For each of ``Pull.seats_for``, its seat, or NO_SEAT: none is free, or a relay has not heard yet."""
    payload: Buffer | None
    """safetensors bytes; opaque to the parameter server."""
    request: int = 0
    """``Pull.request`` of the request that this answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """A learner's newest version; without a payload it only announces and asks what the server has."""

    run_id: str
    sender: Client
    state: RunState
    version: int
    steps: int
    payload: Buffer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the parameter server holds after a ``Publish``. A restarted one may hold less than its learner."""

    run_id: str
    server_incarnation: int
    version: int
    num_seats: int
    """How many actors there are, which bounds how old a rollout may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """A client that stops on purpose gives its seat back at once."""

    run_id: str
    sender: Client


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request was not served. Its layout never changes, so that peers of any version can read it."""

    reason: str
    text: str


Message = Rollout | Pull | Weights | Publish | Published | Goodbye | Refusal
