"""The learners' group: who trains together in one generation, and how their numbers become one.

    before it  ``gathering`` has a view from the parameter server
    after it   ``trainer`` and ``buckets`` sum gradients and counts, ``loop`` agrees on every turn

A group is fixed: whoever comes or goes makes another one. Whatever fails in it, and the news that it is over,
is one ``PeerLostError``, raised before anything has been changed; the group is then left for good. A group of
one has no connections at all.

torch.distributed has no way to give up a sum that waits for a frozen peer. So it is left to its time-out, in
memory that nobody else uses, and whoever waited goes on. The process groups are objects of their own here and
not torch's global one, because two of them may exist at the same time.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from services.ops.logging import get_logger

MEET_S = 5.0
"""For all members of a new view to find each other; one that does not come breaks the group."""
MEET_POLL_S = 0.01
WAIT_S = 30.0
"""The longest that a member may take for its step while the others wait, if it is alive and in the view."""
LEAVE_S = 10.0
"""After which a learner that cannot get out of its group ends itself."""
LOOK_S = 0.1
"""How often who waits looks whether the group is over."""
LOOK_AT_DEVICE_S = 0.0005
LEFT_BEHIND = "left-behind"
"""The name of threads that may still be inside of torch, or hold on to what is, when Python ends."""

dist: Any = torch.distributed
"""Its type stubs know little of what there is."""


class PeerLostError(RuntimeError):
    """Somebody of the group is gone, or the group is over."""


class WeightsDifferError(PeerLostError):
    """What should be the same in all members is not: the next group takes over one member's."""


class Store:
    """Where the members of one generation find each other's addresses; offered by each, used of one."""

    def __init__(self, host: str) -> None:
        """Listens on ``host`` only: nobody has to prove who he is."""
        try:
            family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as listener:
                listener.bind(address)
                listener.listen(64)
                self.address = f"{host}:{listener.getsockname()[1]}"
                self.store = dist.TCPStore(
                    host,
                    listener.getsockname()[1],
                    is_master=True,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=MEET_S),
                    master_listen_fd=listener.detach(),
                )
        except OSError as error:
            raise ValueError(
                f"wire.learner_host = {host!r}: cannot listen there ({error.strerror or error}); allowed is "
                "an address or name of this machine"
            ) from None


def find_store(address: str) -> Any:
    """The one that another member offers; PeerLostError if it is not there."""
    host, _, port = address.rpartition(":")
    try:
        return dist.TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=MEET_S)
        )
    except (RuntimeError, ValueError) as error:
        raise PeerLostError(f"no store at {address} ({_first_line(error)})") from None


class Group:
    """One generation. By default a group of one."""

    def __init__(
        self, *, rank: int = 0, world_size: int = 1, generation: int = 0, peers: Peers | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.generation = generation
        self._peers = peers
        self._sums: list[tuple[Any, Tensor]] = []

    @property
    def is_leader(self) -> bool:
        """Publishes weights, reports and writes checkpoints."""
        return self.rank == 0

    def start_sum(self, tensor: Tensor) -> None:
        """Begin to sum it over all members, in place. All members begin the same sums in the same order."""
        if self._peers is not None:
            self._sums.append((self._peers.start_sum(tensor), tensor))

    def finish(self) -> None:
        """Wait for all sums that were begun."""
        if self._peers is not None:
            for work, tensor in self._sums:
                self._peers.wait(work, tensor)
            self._sums.clear()

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Over all members; on the host, so that no device is waited for."""
        if self._peers is None:
            return list(counts)
        totals = torch.tensor(counts, dtype=torch.int64)
        self.start_sum(totals)
        self.finish()
        return totals.tolist()

    def broadcast(self, content: bytes | None, holder: int) -> bytes:
        """The bytes that the member of rank ``holder`` has, which all others call with None."""
        if self._peers is None:
            assert content is not None
            return content
        size = torch.tensor([len(content or b"")], dtype=torch.int64)
        self._peers.broadcast(size, holder)
        if content is None:
            data = torch.empty(int(size), dtype=torch.uint8)
        else:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._peers.broadcast(data, holder)
        return data.numpy().tobytes() if content is None else content

    def leave(self) -> None:
        """For good, whatever state it is in. Never blocks."""
        if self._peers is not None:
            self._peers.leave([work for work, _ in self._sums])
            self._peers, self._sums = None, []


class Peers:
    """The connections of one generation: gloo between hosts, and NCCL between their GPUs."""

    def __init__(
        self,
        *,
        store: Any,
        rank: int,
        world_size: int,
        generation: int,
        host: str,
        device: torch.device,
        is_over: Callable[[], bool],
    ) -> None:
        """Meets all others; PeerLostError if one does not come."""
        self._is_over = is_over
        self._gloo: Any = None
        self._nccl: Any = None
        self._pending: list[Any] = []
        prefixed = dist.PrefixStore(f"generation-{generation}", store)
        try:
            self._meet(prefixed, rank, world_size)
            options = dist.ProcessGroupGloo._Options()  # noqa: SLF001  (its only name)
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001
            options._timeout = timedelta(seconds=MEET_S)  # noqa: SLF001
            self._gloo = dist.ProcessGroupGloo(prefixed, rank, world_size, options)
            self._gloo.set_timeout(timedelta(seconds=WAIT_S))
            if device.type == "cuda":
                self._nccl = _nccl(dist.PrefixStore("nccl", prefixed), rank, world_size, device)
                # Its connections are made by the first sum. Whoever waits for them cannot be called back,
                # only left behind (``meet``); from the sum itself we can walk away.
                first = torch.zeros(1, device=device)
                self.wait(self._nccl.allreduce([first]), first)
        except PeerLostError:
            self.leave([])
            raise
        except RuntimeError as error:
            self.leave([])
            raise PeerLostError(f"{world_size} learners did not connect ({_first_line(error)})") from None

    def _meet(self, store: Any, rank: int, world_size: int) -> None:
        """All members have come to the store: only then they connect, which cannot be given up."""
        store.set(f"member-{rank}", b"here")
        members = [f"member-{each}" for each in range(world_size)]
        deadline_s = time.monotonic() + MEET_S
        while not store.check(members):
            if self._is_over():
                raise PeerLostError("the group is over")
            if time.monotonic() > deadline_s:
                raise PeerLostError(f"not all of {world_size} learners came in {MEET_S:g} s")
            time.sleep(MEET_POLL_S)

    def start_sum(self, tensor: Tensor) -> Any:
        """What to wait for."""
        try:
            return (self._nccl if tensor.is_cuda else self._gloo).allreduce([tensor])
        except RuntimeError as error:
            raise _lost(error) from None

    def broadcast(self, tensor: Tensor, holder: int) -> None:
        """In place, of tensors on the host."""
        options = dist.BroadcastOptions()
        options.rootRank = holder
        try:
            work = self._gloo.broadcast([tensor], options)
        except RuntimeError as error:
            raise _lost(error) from None
        self.wait(work, tensor)

    def wait(self, work: Any, tensor: Tensor) -> None:
        """Until it is done; PeerLostError if it fails or the group is over."""
        while True:
            completed = work.is_completed()  # asked before: what is not, only ran out of patience
            try:
                if completed or not tensor.is_cuda:  # NCCL's own wait would return at once
                    work.wait(timedelta(seconds=LOOK_S))
                    return
            except RuntimeError as error:
                if completed:
                    raise _lost(error) from None
            if self._is_over():
                self._pending.append(work)
                raise PeerLostError("the group is over")
            if tensor.is_cuda:
                time.sleep(LOOK_AT_DEVICE_S)

    def leave(self, unfinished: Sequence[Any]) -> None:
        """Close what can be closed at once; ``unfinished`` sums still wait for a peer."""
        with ends_within(LEAVE_S):
            if self._nccl is not None:
                try:
                    self._nccl.abort()
                except RuntimeError as error:
                    get_logger("group").warning("nccl_not_aborted", error=_first_line(error))
            pending = [work for work in (*self._pending, *unfinished) if not work.is_completed()]
            if pending:
                threading.Thread(
                    target=_outlive, args=(self._gloo, pending), name=LEFT_BEHIND, daemon=True
                ).start()
            self._gloo = None


def meet(connect: Callable[[], Peers], is_over: Callable[[], bool]) -> Peers:
    """What ``connect`` makes; PeerLostError if it takes too long or the group is over.

    It runs in a thread of its own, which may be left behind: whoever waits for a host that has just vanished
    cannot be called back.
    """
    made: Future[Peers] = Future()

    def run() -> None:
        try:
            made.set_result(connect())
        except Exception as error:  # noqa: BLE001  (is raised where it is waited for)
            made.set_exception(error)

    threading.Thread(target=run, name=LEFT_BEHIND, daemon=True).start()
    deadline_s = time.monotonic() + 2 * MEET_S
    while True:
        try:
            return made.result(LOOK_S)
        except TimeoutError:
            if is_over():
                raise PeerLostError("the group is over") from None
            if time.monotonic() > deadline_s:
                raise PeerLostError(f"the learners did not meet within {2 * MEET_S:g} s") from None


def is_any_left_behind() -> bool:
    """Whether anything still waits for a store, for members or for a sum that nobody needs any more.

    The process cannot end in the usual way then: torch would wait for it too, or abort.
    """
    return any(thread.name == LEFT_BEHIND for thread in threading.enumerate())


@contextlib.contextmanager
def ends_within(seconds: float, exit_process: Callable[[int], object] = os._exit) -> Iterator[None]:
    """What takes longer ends the whole process, whose next life joins the others: nothing else would help."""

    def give_up() -> None:
        get_logger("group").error("cannot_leave", waited_s=seconds)
        exit_process(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _lost(error: RuntimeError) -> PeerLostError:
    return PeerLostError(_first_line(error))


def _outlive(_gloo: Any, pending: Sequence[Any]) -> None:
    """Hold on to a process group until nothing in it waits: to destroy it before would stop this process."""
    while not all(work.is_completed() for work in pending):
        time.sleep(1.0)


def _nccl(store: Any, rank: int, world_size: int, device: torch.device) -> Any:
    # Otherwise its watchdog ends the whole process when a peer is gone.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    torch.cuda.set_device(device)  # of this thread
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=WAIT_S)  # noqa: SLF001  (its only name)
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


def _first_line(error: BaseException) -> str:
    """Without the place in the library's source that gloo begins with."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S*\] ", "", line)[:120]
