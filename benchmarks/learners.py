"""How the learners scale: samples/s of 1, 2, 4, ... of them, one core each, as many as there are cores.

Real trainers in processes of their own and a real group between them, on resident batches of noise, so that
nothing but the learners is measured. The numbers of learners take turns, and with them as many that do not
know of each other (`apart`): what the machine gives to so many at once. Beside them stands what another
system has published; it is of other machines, with a GPU each.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from multiprocessing.connection import Connection

from benchmarks.options import Options, heading, row

ROUNDS = 3
WARM_UP = 3
MEET_S = 120.0
HOST = "127.0.0.1"
PUBLISHED = {1: 1.0, 2: 0.93, 4: 0.81, 8: 0.47}
"""Efficiency of the learners of the project `seed` (one GPU each), as it published them."""


def measure(options: Options) -> dict[str, float]:
    """Samples/s and the efficiency: samples/s over those of as many learners alone."""
    cores = os.cpu_count() or 1
    sizes = [size for size in (1, 2, 4, 8) if size <= cores]
    figures: dict[str, float] = {}
    for variant in options.variants:
        heading(f"learners of {options.env} {variant}, samples/s, one core each of {cores}")
        rates: dict[int, list[float]] = defaultdict(list)
        shares: dict[int, list[float]] = defaultdict(list)
        apart: dict[int, list[float]] = defaultdict(list)
        for _ in range(ROUNDS):
            for size in sizes:
                rate, share = _measure(size, options.flags(variant), options.seconds / ROUNDS)
                rates[size].append(rate)
                shares[size].append(share)
                if size > 1:
                    rate, _ = _measure(size, options.flags(variant), options.seconds / ROUNDS, is_group=False)
                    apart[size].append(rate)
        alone = statistics.median(rates[1])
        for size in sizes:
            rate = statistics.median(rates[size])
            efficiency = rate / (size * alone)
            ceiling = statistics.median(apart[size] or rates[1]) / (size * alone)
            share = statistics.median(shares[size])
            figures |= {
                f"{variant} {size} learners": rate,
                f"{variant} {size} efficiency": efficiency,
                f"{variant} {size} efficiency apart": ceiling,
                f"{variant} {size} waiting": share,
            }
            row(
                f"{size} learners",
                *(f"{rate:,.0f}", f"{efficiency:.1%}", f"waiting {share:.1%}"),
                *(f"apart {ceiling:.1%}", f"published {PUBLISHED[size]:.0%}"),
            )
    return figures


def _measure(
    num_learners: int, flags: list[str], seconds: float, *, is_group: bool = True
) -> tuple[float, float]:
    """(samples/s of all, share of the time in which one waited for the others' sums)."""
    context = multiprocessing.get_context("spawn")
    pipes, learners = [], []
    try:
        for rank in range(num_learners):
            ours, theirs = context.Pipe()
            learner = context.Process(
                target=_learner, args=(theirs, rank, num_learners, flags, seconds, is_group)
            )
            learner.start()
            theirs.close()
            pipes.append(ours)
            learners.append(learner)
        address = pipes[0].recv()
        for pipe in pipes[1:]:
            pipe.send(address)
        results: list[tuple[float, float]] = [pipe.recv() for pipe in pipes]
    finally:
        for learner in learners:
            learner.join(MEET_S if len(pipes) == num_learners else 0.0)
            learner.kill()
    rates = [rate for rate, _ in results]  # of a group, each is that of all
    return min(rates) if is_group else sum(rates), statistics.mean(share for _, share in results)


def _learner(
    pipe: Connection, rank: int, num_learners: int, flags: list[str], seconds: float, is_group: bool
) -> None:
    import torch

    from benchmarks.parts import CPU, random_batch
    from services import config as configuration
    from services.learner.group import Group, Peers, Store, find_store
    from services.learner.trainer import Trainer
    from services.rl import precision
    from services.rl.actions import Discrete
    from services.rl.networks import make_network
    from services.rl.tasks import tasks_of, tasks_spec

    torch.set_num_threads(1)
    config = configuration.load(flags=flags)
    tasks = tasks_of(config)
    spec = tasks_spec(tasks)
    actions = Discrete(spec.num_actions)
    torch.manual_seed(1)
    trainer = Trainer(
        network=make_network(spec, config.network, len(tasks), config.popart),
        actions=actions,
        config=config,
        frame_stack=spec.frame_stack,
        device=CPU,
        dtype=precision.resolve("auto", CPU),
    )
    batch = random_batch(config, spec, actions)
    for _ in range(WARM_UP):
        trainer.update(batch)
    if rank == 0:
        store = Store(HOST)
        pipe.send(store.address)
        shared = store.store
    else:
        shared = find_store(pipe.recv())
    alone = group = trainer.group
    if num_learners > 1:
        peers = Peers(
            store=shared,
            rank=rank,
            world_size=num_learners,
            generation=1,
            host=HOST,
            device=CPU,
            is_over=lambda: False,
        )
        group = Group(rank=rank, world_size=num_learners, generation=1, peers=peers)
    trainer.group = group if is_group else alone
    trainer.update(batch)
    group.sum_counts([1])  # nobody begins before everybody is there
    started_s, steps, waited_s = time.perf_counter(), trainer.steps, 0.0
    # As the learner's loop does: one agreement, which also says for how long, and one update.
    world_size = trainer.group.world_size
    while trainer.group.sum_counts([time.perf_counter() - started_s < seconds])[0] == world_size:
        trainer.update(batch)
        waited_s += trainer.allreduce_s
    took_s = time.perf_counter() - started_s
    pipe.send(((trainer.steps - steps) / took_s, waited_s / took_s))
    group.leave()
