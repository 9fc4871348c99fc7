"""Several learners in one process: a thread each, and a real group of gloo between them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from services.learner.group import Group, Peers, Store, find_store

HOST = "127.0.0.1"
CPU = torch.device("cpu")

R = TypeVar("R")


def together(
    num_learners: int,
    work: Callable[[Group], R],
    *,
    generation: int = 1,
    over: threading.Event | None = None,
) -> list[R]:
    """What ``work`` returns in each of them, by rank. ``over`` ends the group.

    Nobody begins before all are connected: one that is gone already would be missed at the meeting.
    """
    store = Store(HOST)
    connected = threading.Barrier(num_learners, timeout=120.0)
    is_over = (over or threading.Event()).is_set

    def learner(rank: int) -> R:
        try:
            group = connect(rank)
        except BaseException:
            connected.abort()
            raise
        try:
            connected.wait()
            return work(group)
        finally:
            group.leave()

    def connect(rank: int) -> Group:
        peers = Peers(
            store=store.store if rank == 0 else find_store(store.address),
            rank=rank,
            world_size=num_learners,
            generation=generation,
            host=HOST,
            device=CPU,
            is_over=is_over,
        )
        return Group(rank=rank, world_size=num_learners, generation=generation, peers=peers)

    with ThreadPoolExecutor(num_learners) as threads:
        return list(threads.map(learner, range(num_learners)))
