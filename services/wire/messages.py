"""The messages of the system: frozen values without behaviour.

Actors send ``Rollout`` to learners. Everybody talks to the parameter server in request and reply:
``Pull`` -> ``Weights``, ``Publish`` -> ``Published``, ``Attend`` -> ``View``, ``Goodbye`` -> nothing, and
``Refusal`` in place of any reply. ``codec.py`` turns each into frames and back; nothing here knows about
bytes, sockets or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

PROTOCOL_VERSION = 3
"""Changes whenever an old peer would misread a new message. Checked before anything else in a message."""

RunState = Literal["waiting", "training", "complete"]
"""waiting: no weights yet; training; complete: ``total_steps`` are done, peers may idle."""

NO_VERSION = -1
"""The policy version of whoever has no weights yet."""

NO_SEAT = -1
"""The seat of whoever has none, or none yet."""

NO_GENERATION = 0
"""Before the learners' first group; or which one there is is not known (yet)."""

Phase = Literal["standing", "training", "leaving"]
"""standing: in no group, and ready for the next one; training: in the group of a generation, or on its way
into it; leaving: stops on purpose."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """What one array of a rollout must be. Floats must also be finite."""

    dtype: str
    shape: tuple[int, ...]
    high: int | None = None
    """Integers: if given, they are from 0 to this."""


class PackedArray(NamedTuple):
    """One array as it travels: ``data`` is encoded by ``codec`` (`none` or `zstd`).

    A tuple: a learner makes six and more for every rollout, and frozen dataclasses take twice as long.
    """

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
    """Counts this incarnation's rollouts to this learner; a gap is a lost rollout."""
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
class Destination:
    """A learner as actors see it."""

    endpoint: str
    """Where it takes rollouts."""
    since: int
    """The generation since which it is a member without a break. With another one it is connected anew: the
    old connection may lead to a machine that is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A learner as learners see it. Its rank is its place in the view."""

    client_id: str
    incarnation: int
    endpoint: str
    store: str
    """`host:port` of the store that it offered for this generation; used if it holds the state."""
    since: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """ "Anything newer than this version?" Held open until there is, or until the server's patience ends."""

    run_id: str
    sender: Client
    have_version: int
    seats_for: tuple[Client, ...]
    """Who wants a seat: an actor names itself, a relay all of its actors, an evaluator nobody."""
    generation: int = NO_GENERATION
    """Of the learners that the sender knows; another one is news."""
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
    generation: int = NO_GENERATION
    """Of the learners; with NO_GENERATION nothing is known of them, and the old ones are to be kept."""
    learners: tuple[Destination, ...] = ()
    """Where rollouts go."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend:
    """A learner is there, several times a second: its lease on membership, and what it is doing."""

    run_id: str
    sender: Client
    endpoint: str
    """Where it takes rollouts."""
    phase: Phase
    generation: int
    """training: which; standing: the last one that it was in or heard of, which is over for it."""
    version: int
    """Updates completed; training: when it last stood."""
    has_trained: bool
    """Whether its state comes from training in a group in this life, not only from a checkpoint."""
    store: str
    """standing: `host:port` where it hosts a store for the next generation; else empty."""
    rank: int
    """training: its place. A restarted server learns the view from those who are in it."""
    world_size: int
    since: int
    """training: as ``Member.since``."""
    config: str = ""
    """Digest of what all learners must have in common: network, loss, optimiser, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Who trains together. Without members those of this generation and before are to stop and stand."""

    run_id: str
    server_incarnation: int
    generation: int
    members: tuple[Member, ...]
    """In the order of their ranks."""
    holder: int
    """The rank of the member whose state all others take over."""
    version: int
    """That the server holds."""
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


Message = Rollout | Pull | Weights | Publish | Published | Attend | View | Goodbye | Refusal
