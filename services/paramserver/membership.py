"""Who is here: seats, small integers from which an actor's task and seed follow.

A seat is leased with every request and ends when its holder has been silent for the lease, or says goodbye;
the smallest free one is dealt next, so that with n actors the seats are 0 to n-1 most of the time. A client
is known by its id. A newer incarnation of it (a restarted container) inherits the seat; an older one, which
can only be a process that was given up for dead, neither renews nor is told any seat.

Leases live in memory only. After a restart of the parameter server clients claim the seat that they hold, and
get it unless somebody was faster; only the slower one has to change its seat.

The clock is an argument everywhere (``now_s``, monotonic). Not thread-safe: one loop owns it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Protocol

from services.wire.codec import MAX_SEATS
from services.wire.messages import NO_SEAT, Client


class Membership(Protocol):
    """What the server asks, whether it decides (``Seats``) or has to ask further up (``RelayedSeats``)."""

    def renew(self, client: Client, now_s: float) -> None:
        """``client`` asked for something: lease it a seat, or lengthen the lease that it has."""

    def seat_of(self, client: Client) -> int:
        """The seat to tell ``client``, or NO_SEAT."""

    def release(self, client: Client) -> None:
        """``client`` said goodbye."""

    def expire(self, now_s: float) -> None:
        """End the leases that have run out."""

    def next_expiry_s(self) -> float:
        """When the next lease runs out; infinity if there is none."""

    def __len__(self) -> int:
        """Clients that hold a lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lease:
    incarnation: int
    seat: int
    until_s: float


class Seats:
    """Decides who sits where."""

    def __init__(self, lease_s: float, num_seats: int = MAX_SEATS) -> None:
        self._lease_s = lease_s
        self._leases: OrderedDict[str, _Lease] = OrderedDict()  # the next to run out comes first
        self._free = list(range(num_seats))  # ascending

    def renew(self, client: Client, now_s: float) -> None:
        """Without a lease: the seat that it claims, else the smallest free one, else none."""
        lease = self._leases.get(client.client_id)
        if lease is None:
            seat = self._take(client.seat)
            if seat == NO_SEAT:
                return
        elif client.incarnation < lease.incarnation:
            return
        else:
            seat = lease.seat
        self._leases[client.client_id] = _Lease(
            incarnation=client.incarnation, seat=seat, until_s=now_s + self._lease_s
        )
        self._leases.move_to_end(client.client_id)

    def seat_of(self, client: Client) -> int:
        """NO_SEAT for a full house and for a superseded incarnation."""
        lease = self._leases.get(client.client_id)
        return NO_SEAT if lease is None or client.incarnation < lease.incarnation else lease.seat

    def release(self, client: Client) -> None:
        """Its seat is free at once."""
        lease = self._leases.get(client.client_id)
        if lease is not None and client.incarnation >= lease.incarnation:
            self._end(client.client_id)

    def expire(self, now_s: float) -> None:
        """A lease ends at, not after, its last moment."""
        while self.next_expiry_s() <= now_s:
            self._end(next(iter(self._leases)))

    def next_expiry_s(self) -> float:
        """The first lease is the one renewed longest ago."""
        return next((lease.until_s for lease in self._leases.values()), math.inf)

    def __len__(self) -> int:
        return len(self._leases)

    def _take(self, claimed: int) -> int:
        if not self._free:
            return NO_SEAT
        at = bisect_left(self._free, claimed)
        if at == len(self._free) or self._free[at] != claimed:  # NO_SEAT, or somebody else sits there
            at = 0
        return self._free.pop(at)

    def _end(self, client_id: str) -> None:
        insort(self._free, self._leases.pop(client_id).seat)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Guest:
    client: Client  # with the seat last heard from upstream, or until then the one that it claims
    until_s: float


class RelayedSeats:
    """A relay's clients, and the seats that upstream gave them."""

    def __init__(self, lease_s: float, num_seats: int = MAX_SEATS) -> None:
        self._lease_s = lease_s
        self._num_seats = num_seats
        self._guests: OrderedDict[str, _Guest] = OrderedDict()  # the next to run out comes first
        self._unasked: set[str] = set()
        self._departed: dict[str, Client] = {}

    def renew(self, client: Client, now_s: float) -> None:
        """A newcomer keeps what it claims until upstream has spoken."""
        guest = self._guests.get(client.client_id)
        if guest is None:
            self._departed.pop(client.client_id, None)  # it has come back
            if len(self._guests) >= self._num_seats:
                return
            self._unasked.add(client.client_id)
        elif client.incarnation < guest.client.incarnation:
            return
        else:
            client = replace(client, seat=guest.client.seat)
        self._guests[client.client_id] = _Guest(client=client, until_s=now_s + self._lease_s)
        self._guests.move_to_end(client.client_id)

    def seat_of(self, client: Client) -> int:
        """What upstream said last, else what the client itself says."""
        guest = self._guests.get(client.client_id)
        if guest is None or client.incarnation < guest.client.incarnation:
            return NO_SEAT
        return guest.client.seat

    def release(self, client: Client) -> None:
        """``client`` said goodbye, which is to be passed on."""
        guest = self._guests.get(client.client_id)
        if guest is not None and client.incarnation >= guest.client.incarnation:
            self._end(client.client_id)
            if len(self._departed) < self._num_seats:  # or its lease has to end
                self._departed[client.client_id] = client

    def expire(self, now_s: float) -> None:
        """Not told upstream: a silent client may just have moved to another relay."""
        while self.next_expiry_s() <= now_s:
            self._end(next(iter(self._guests)))

    def next_expiry_s(self) -> float:
        """The first guest is the one renewed longest ago."""
        return next((guest.until_s for guest in self._guests.values()), math.inf)

    def __len__(self) -> int:
        return len(self._guests)

    @property
    def has_unasked(self) -> bool:
        """Is there a client whom upstream has not been asked about?"""
        return bool(self._unasked)

    def ask(self) -> tuple[Client, ...]:
        """All clients, to be named in the next request upstream."""
        self._unasked.clear()
        return tuple(guest.client for guest in self._guests.values())

    def learn(self, clients: tuple[Client, ...], seats: tuple[int, ...]) -> None:
        """Upstream's answer for ``clients``, some of whom may have left since."""
        for client, seat in zip(clients, seats, strict=True):
            guest = self._guests.get(client.client_id)
            if guest is not None:
                self._guests[client.client_id] = replace(guest, client=replace(guest.client, seat=seat))

    def departed(self) -> Client | None:
        """Whose goodbye is the next to be passed on. It is this one until ``passed_on``."""
        return next(iter(self._departed.values()), None)

    def passed_on(self, client: Client) -> None:
        """Its goodbye is on its way."""
        del self._departed[client.client_id]

    def _end(self, client_id: str) -> None:
        del self._guests[client_id]
        self._unasked.discard(client_id)
