"""A group sums what its members have, and is left at once when one of them is gone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import cast

import pytest
import torch

from services.learner import group as group_module
from services.learner.group import (
    Group,
    PeerLostError,
    Peers,
    Store,
    ends_within,
    find_store,
    is_any_left_behind,
    meet,
)
from tests.unit.learner.together import CPU, HOST, together
from tests.unit.learner.waiting import until

SOON_S = 20.0
"""Less than the half minute after which gloo gives up by itself."""
assert SOON_S < group_module.WAIT_S


@pytest.fixture(autouse=True)
def _nobody_left_behind() -> Iterator[None]:
    """A thread that is inside of torch when Python ends would abort it."""
    yield
    until(lambda: not is_any_left_behind(), "nobody waits", 4 * group_module.MEET_S + group_module.WAIT_S)


def test_one_alone_sums_nothing_and_has_no_connections() -> None:
    group = Group()
    tensor = torch.ones(3)
    group.start_sum(tensor)
    group.finish()
    assert tensor.tolist() == [1, 1, 1]
    assert group.sum_counts([1, 2]) == [1, 2]
    assert group.broadcast(b"state", 0) == b"state"
    assert group.is_leader
    group.leave()


@pytest.mark.parametrize("num_learners", [2, 3])
def test_all_members_get_the_same_sums(num_learners: int) -> None:
    def work(group: Group) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(group.rank)
        first = torch.randn(1000, generator=generator)
        second = torch.full((7,), float(group.rank), dtype=torch.float64)
        group.start_sum(first)
        group.start_sum(second)
        group.finish()
        return group.sum_counts([1, 2**50 + group.rank]), first, second

    results = together(num_learners, work)
    noise = [torch.randn(1000, generator=torch.Generator().manual_seed(rank)) for rank in range(num_learners)]
    for counts, first, second in results:
        assert counts == [num_learners, num_learners * 2**50 + sum(range(num_learners))]
        assert first.equal(results[0][1])
        torch.testing.assert_close(first, sum(noise, torch.zeros(1000)))
        assert second.tolist() == [sum(range(num_learners))] * 7


@pytest.mark.parametrize("holder", [0, 2])
def test_the_holders_state_reaches_all(holder: int) -> None:
    state = bytes(range(256)) * 5000
    results = together(3, lambda group: group.broadcast(state if group.rank == holder else None, holder))
    assert results == [state] * 3


def test_only_rank_0_leads() -> None:
    assert together(3, lambda group: group.is_leader) == [True, False, False]


# --- somebody is gone --------------------------------------------------------------------------------


def seconds_until_lost(group: Group) -> float:
    """How long a sum waits for a member that does not take part, until the group is known to be lost."""
    started_s = time.monotonic()
    with pytest.raises(PeerLostError):
        group.sum_counts([1])
    return time.monotonic() - started_s


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_member_that_goes_is_noticed_by_those_who_wait_for_it(gone: int) -> None:
    waited_s = together(3, lambda group: 0.0 if group.rank == gone else seconds_until_lost(group))
    assert max(waited_s) < SOON_S


def test_a_member_that_is_frozen_is_not_waited_for_once_the_group_is_over() -> None:
    over, all_lost = threading.Event(), threading.Barrier(3)

    def work(group: Group) -> float:
        if group.rank == 2:  # alive and connected, but not taking part
            threading.Timer(0.3, over.set).start()
            all_lost.wait(60)
            return 0.0
        waited_s = seconds_until_lost(group)
        leaving_s = time.monotonic()
        group.leave()
        left_s = time.monotonic() - leaving_s
        all_lost.wait(60)
        assert left_s < SOON_S
        return waited_s

    assert max(together(3, work, over=over)) < SOON_S


def test_after_a_loss_the_survivors_stand_in_the_next_generation() -> None:
    def lose(group: Group) -> None:
        if group.rank != 2:
            with pytest.raises(PeerLostError):
                group.sum_counts([1])

    together(3, lose, generation=1)
    assert together(2, lambda group: group.sum_counts([1]), generation=2) == [[2], [2]]


def test_a_holder_that_is_silent_is_not_waited_for_once_the_group_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_module, "MEET_S", 5.0)  # after which the thread comes back that is left behind
    # It was frozen, or its cable was pulled, between its view and the meeting: the kernel still accepts.
    with socket.socket() as silent:
        silent.bind((HOST, 0))
        silent.listen()
        address = f"{HOST}:{silent.getsockname()[1]}"
        started_s = time.monotonic()

        def connect() -> Peers:
            find_store(address)
            raise AssertionError("nobody answers there")

        with pytest.raises(PeerLostError, match="the group is over"):
            meet(connect, lambda: time.monotonic() > started_s + 0.2)
        assert time.monotonic() - started_s < SOON_S


def test_who_meets_nobody_in_time_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "MEET_S", 0.1)
    never = threading.Event()
    try:
        with pytest.raises(PeerLostError, match="did not meet within"):
            meet(lambda: cast(Peers, never.wait()), lambda: False)
    finally:
        never.set()


def test_who_is_left_behind_is_known_until_it_comes_back() -> None:
    back = threading.Event()
    with pytest.raises(PeerLostError, match="the group is over"):
        meet(lambda: cast(Peers, back.wait()), lambda: True)
    assert is_any_left_behind()
    back.set()
    until(lambda: not is_any_left_behind())


def test_what_goes_wrong_at_the_meeting_is_raised_where_it_is_waited_for() -> None:
    def connect() -> Peers:
        raise PeerLostError("no store")

    with pytest.raises(PeerLostError, match="no store"):
        meet(connect, lambda: False)


def test_a_member_that_does_not_come_breaks_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "MEET_S", 0.5)
    store = Store(HOST)
    with pytest.raises(PeerLostError, match="not all of 2 learners came"):
        Peers(
            store=store.store,
            rank=0,
            world_size=2,
            generation=1,
            host=HOST,
            device=CPU,
            is_over=lambda: False,
        )


def test_who_waits_for_the_others_to_come_goes_as_soon_as_the_group_is_over() -> None:
    started_s = time.monotonic()
    with pytest.raises(PeerLostError, match="the group is over"):
        Peers(
            store=Store(HOST).store,
            rank=0,
            world_size=2,
            generation=1,
            host=HOST,
            device=CPU,
            is_over=lambda: time.monotonic() > started_s + 0.2,
        )
    assert time.monotonic() - started_s < group_module.MEET_S / 2


def test_a_holder_that_is_gone_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "MEET_S", 0.5)
    address = Store(HOST).address  # and closed again
    with pytest.raises(PeerLostError, match=r"no store at 127\.0\.0\.1:"):
        find_store(address)


def test_a_store_listens_where_it_says_and_nowhere_else() -> None:
    store = Store(HOST)
    host, _, port = store.address.rpartition(":")
    assert host == HOST
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", int(port)), 1.0)


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_a_host_that_is_not_this_machine_is_refused_by_name(host: str) -> None:
    with pytest.raises(ValueError, match=r"wire\.learner_host") as refusal:
        Store(host)
    assert repr(host) in str(refusal.value)
    assert "allowed is" in str(refusal.value)


def test_a_learner_that_cannot_leave_ends_itself() -> None:
    ended = threading.Event()
    codes: list[int] = []

    def exit_process(code: int) -> None:
        codes.append(code)
        ended.set()

    with ends_within(0.05, exit_process):
        assert ended.wait(SOON_S)
    assert codes == [1]


def test_a_learner_that_leaves_in_time_lives_on() -> None:
    codes: list[int] = []
    with ends_within(60.0, codes.append):
        pass
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(SOON_S)
    assert codes == []
