"""The trainer: one batch of rollouts becomes one update of the weights.

Before it come batches from ``batch.Batcher``, after it ``publisher`` and ``checkpoint`` read its weights.
Alone it never waits for the device: figures gather there and are fetched by ``read_figures`` once per report.
In a group of several it waits for the sums of all, which may fail, before it changes anything.
Shapes: T unroll length, B batch size, F single frames per rollout, A policy outputs, K tasks, H state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from services.config import RunConfig
from services.learner.batch import Batch
from services.learner.buckets import Buckets
from services.learner.group import Group
from services.learner.optimiser import clip_or_zero, make_optimiser, settings, statistics
from services.rl.actions import Discrete
from services.rl.frames import stack_frames
from services.rl.losses import Experience, Loss, impala_loss
from services.rl.networks import ActorCritic, Inputs
from services.rl.popart import moments

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes, whatever the numbers mean."""


class TrainingDivergedError(RuntimeError):
    """Too many updates in a row had a gradient that is not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Means over the updates since the last report; NaN where there were none."""

    updates: int
    loss_total: float
    loss_policy: float
    loss_baseline: float
    loss_entropy: float
    entropy: float
    rho_clipped_ratio: float
    grad_norm: float
    nonfinite_updates: int
    replay_rejected_ratio: float
    """Share of steps outside of the trust region; NaN without one."""
    popart_mean: tuple[float, ...]
    """Of each task, now; empty without PopArt."""
    popart_sigma: tuple[float, ...]
    task_steps: tuple[int, ...]
    """Fresh agent steps of each task since the last report."""
    total_task_steps: tuple[int, ...]
    """The same since the run began."""


FIGURES = (
    "loss_total",
    "loss_policy",
    "loss_baseline",
    "loss_entropy",
    "entropy",
    "rho_clipped_ratio",
    "replay_rejected_ratio",
    "grad_norm",
)
"""Those that gather on the device, in this order."""


class Trainer:
    """Owns the weights, the optimiser and the counters of the run."""

    def __init__(
        self,
        *,
        network: ActorCritic,
        actions: Discrete,
        config: RunConfig,
        frame_stack: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.network = network.to(device)
        self.optimiser = make_optimiser(config.optimiser, self.network)
        self.version = 0
        """Updates made, which numbers the policy."""
        self.group = Group()
        """Who trains together; for its owner to exchange between two updates."""
        self.allreduce_s = 0.0
        """How long the last update waited for the others' sums."""
        self._parameters = list(self.network.parameters())
        self._has_momentum = config.optimiser.name == "adam" or config.optimiser.rmsprop_momentum > 0
        self._actions = actions
        self._config = config
        self._loss_config = config.loss.model_copy(update={"reward_clipping": config.reward_clipping})
        self._frame_stack = frame_stack
        self._device = device
        self._dtype = dtype
        self._buckets = Buckets(self._parameters)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._num_tasks = len(self.network.baseline.mean_K)
        self._task_steps = torch.zeros(self._num_tasks, dtype=torch.int64)
        self._new_task_steps = torch.zeros(self._num_tasks, dtype=torch.int64)
        """Since the last report."""
        self._sums = torch.zeros(len(FIGURES), device=device)
        self._pending_updates = 0
        self._nonfinite = torch.zeros(3, dtype=torch.int64, device=device)
        """Since the last report: how many; now in a row; the longest row."""

    @property
    def steps(self) -> int:
        """Agent steps trained, of all tasks."""
        return int(self._task_steps.sum())

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        config = self._config.optimiser
        if config.schedule == "constant":
            return config.learning_rate
        return config.learning_rate * max(0.0, 1.0 - self.steps / self._config.total_steps)

    @property
    def complete(self) -> bool:
        """All steps are trained."""
        return self.steps >= self._config.total_steps

    def load(self, tensors: Mapping[str, Tensor], version: int, steps: int) -> None:
        """Replace the weights by those of another learner, which had made so many updates and steps.

        Of which tasks its last steps were is not known; environments are dealt evenly, and so are they.
        """
        self.network.load_state_dict(tensors)
        self.version = version
        self._task_steps += _spread(steps - self.steps, self._num_tasks)

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues the training where it is."""
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "version": self.version,
            "steps": self.steps,
            "task_steps": self._task_steps,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there; ValueError or RuntimeError if it is another network's or optimiser's state."""
        own_settings = [settings(group) for group in self.optimiser.param_groups]
        saved = state["optimiser"]["param_groups"]
        if [statistics(group) for group in saved] != [statistics(group) for group in own_settings]:
            raise ValueError(
                "it was written with another optimiser.name, or optimiser.rmsprop_momentum has become 0 or "
                "ceased to be"
            )
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        for group, own in zip(self.optimiser.param_groups, own_settings, strict=True):
            group.update(own)  # the configuration says how to go on, not the checkpoint
        self.version = state["version"]
        task_steps = state.get("task_steps")  # which checkpoints of earlier releases lack
        if task_steps is None:
            task_steps = _spread(state["steps"], self._num_tasks)
        if len(task_steps) != self._num_tasks:
            raise ValueError(f"it has {len(task_steps)} tasks, this run {self._num_tasks}")
        self._task_steps = task_steps.clone()
        torch.set_rng_state(state["rng"].cpu())

    def checksum(self) -> int:
        """Of all bits of the weights, in 48 bits: learners of a group have the same."""
        total = 0
        for tensor in self.network.state_dict().values():
            kind = INTEGERS.get(tensor.element_size(), torch.uint8)
            total += int(tensor.detach().reshape(-1).view(kind).sum(dtype=torch.int64))
        return total % 2**48

    def to_device(self, batch: Batch) -> Batch:
        """The same batch where the network is. Does not wait; the result's ``release`` does, for the copy."""
        if self._device.type == "cpu":
            return batch
        # On a stream of its own, so that it overlaps with the update before.
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            tensors: dict[str, Any] = {
                name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.tensors().items()
            }
            copied = torch.cuda.current_stream(self._device).record_event()
        compute.wait_event(copied)
        for tensor in tensors.values():
            tensor.record_stream(compute)

        def release() -> None:
            copied.synchronize()
            batch.release()

        return replace(batch, **tensors, release=release)

    def update(self, batch: Batch) -> None:
        """One optimiser step. An update whose gradient is not finite changes no weight and is counted.

        All that the group has to do comes first: if it fails, ``PeerLostError``, nothing has changed.
        """
        fresh = self._fresh_steps(batch)
        self.group.start_sum(fresh)  # learners may have different ones, and have to agree on the step
        loss = self._loss(batch)
        targets = self._reduce(loss, batch)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        grad_norm, finite = clip_or_zero(gradients, self._config.optimiser.max_grad_norm)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = self.learning_rate
        self._step_if(finite)
        if self._config.popart.enabled:  # after the step, whose gradient was taken on the old scale
            self.network.baseline.update(targets, finite)
        self.version += 1
        self._task_steps += fresh
        self._new_task_steps += fresh
        self._remember(
            [
                loss.total,
                loss.policy,
                loss.baseline,
                loss.entropy,
                loss.mean_entropy,
                loss.rho_clipped_ratio,
                loss.rejected_ratio,
                grad_norm,
            ],
            finite,
        )

    def _fresh_steps(self, batch: Batch) -> Tensor:
        """[K], on the host: of each task."""
        tasks = torch.tensor(batch.tasks[: batch.num_fresh], dtype=torch.int64)
        return torch.bincount(tasks, minlength=self._num_tasks) * self._config.unroll_length

    def _reduce(self, loss: Loss, batch: Batch) -> Tensor:
        """The backward pass, over the batches of all learners; returns the moments of all their targets.

        A sum is averaged over the learners, a mean over the steps of all of them: neither changes its scale
        when learners come or go.
        """
        self._buckets.begin(self.group)
        self.allreduce_s = 0.0
        targets = moments(loss.targets_TB, loss.counts_TB, batch.task, self._num_tasks)
        if self.group.world_size == 1:
            loss.total.backward()
            return targets
        weight = loss.num_steps if self._config.loss.reduction == "mean" else torch.ones_like(loss.num_steps)
        (loss.total * weight).backward()
        self._buckets.finish()
        totals = torch.cat([weight.double().reshape(1), targets.reshape(-1)])
        self.group.start_sum(totals)
        waiting_s = time.perf_counter()
        self.group.finish()
        self.allreduce_s = time.perf_counter() - waiting_s
        self._buckets.divide(totals[0])
        return totals[1:].reshape(targets.shape)

    def _loss(self, batch: Batch) -> Loss:
        config, first = self._config, self._frame_stack - 1
        starts_FB = batch.episode_start.T
        replayed_from = batch.num_fresh if batch.num_fresh < len(batch.tasks) else None
        burn_in = config.replay.burn_in if config.replay.recurrent_state == "recomputed" else 0
        inputs = Inputs(
            observation_TB=stack_frames(batch.observation.transpose(0, 1), starts_FB, self._frame_stack),
            episode_start_TB=starts_FB[first:],
            last_action_TB=_shifted(batch.last_action, batch.action),
            last_reward_TB=_shifted(batch.last_reward, batch.reward),
            state_2BH=None if batch.initial_state is None else batch.initial_state.transpose(0, 1),
            cuts=batch.cuts,
            instruction_TBW=None if batch.instruction is None else batch.instruction.transpose(0, 1),
        )
        mask_TB = ~starts_FB[first + 1 :]
        if replayed_from is not None:  # the first steps only bring an old state up to date
            mask_TB[:burn_in, replayed_from:] = False
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            output = self.network(inputs)
        column_B = torch.arange(len(batch.tasks), device=self._device)
        baselines_TB = output.baselines_TBK[:, column_B, batch.task]
        return impala_loss(
            logits_TBA=output.logits_TBA[:-1],
            baselines_TB=baselines_TB[:-1],
            bootstrap_B=baselines_TB[-1],
            scale=self.network.baseline.scale_of(batch.task),
            experience=Experience(
                actions_TB=batch.action.T,
                behaviour_logits_TBA=batch.behaviour_logits.transpose(0, 1),
                rewards_TB=batch.reward.T,
                terminated_TB=batch.terminated.T,
                mask_TB=mask_TB,
                fresh_B=None if replayed_from is None else column_B < replayed_from,
            ),
            actions=self._actions,
            config=self._loss_config,
            trust_region=config.replay.trust_region if config.replay.ratio else None,
        )

    def _step_if(self, finite: Tensor) -> None:
        """Let the optimiser step; where ``finite`` is false the weights stay as they are."""
        if not self._has_momentum:  # a gradient of zero, which it is then, moves nothing
            self.optimiser.step()
            return
        before = [parameter.detach().clone() for parameter in self._parameters]
        self.optimiser.step()
        with torch.no_grad():
            for parameter, old in zip(self._parameters, before, strict=True):
                parameter.copy_(torch.where(finite, parameter, old))

    def _remember(self, figures: list[Tensor], finite: Tensor) -> None:
        self._pending_updates += 1
        self._sums += torch.where(finite, torch.stack([figure.detach() for figure in figures]), 0.0)
        count, row, longest = self._nonfinite.unbind()
        bad = (~finite).long()
        row = (row + 1) * bad
        self._nonfinite = torch.stack([count + bad, row, torch.maximum(longest, row)])

    def read_figures(self) -> Figures:
        """Fetch and reset what has gathered on the device: the only place that waits for it."""
        nonfinite, row, longest = self._nonfinite.tolist()
        updates = self._pending_updates
        good = updates - nonfinite
        sums = zip(FIGURES, self._sums.tolist(), strict=True)
        means = {name: value / good if good else math.nan for name, value in sums}
        if not self._config.replay.ratio or self._config.replay.trust_region is None:
            means["replay_rejected_ratio"] = math.nan
        task_steps = self._new_task_steps.tolist()
        self._new_task_steps.zero_()
        baseline, popart = self.network.baseline, self._config.popart.enabled
        self._sums.zero_()
        self._nonfinite = torch.tensor([0, row, row], device=self._device)
        self._pending_updates = 0
        limit = self._config.learner.max_nonfinite_updates
        if longest >= limit:
            raise TrainingDivergedError(
                f"{longest} updates in a row had a gradient that is not finite, at version {self.version} "
                f"(learner.max_nonfinite_updates = {limit}); lower optimiser.learning_rate = "
                f"{self._config.optimiser.learning_rate} or look at the rewards of {self._config.title}"
            )
        return Figures(
            updates=updates,
            nonfinite_updates=nonfinite,
            popart_mean=tuple(baseline.mean_K.tolist()) if popart else (),
            popart_sigma=tuple(baseline.sigmas.tolist()) if popart else (),
            task_steps=tuple(task_steps),
            total_task_steps=tuple(self._task_steps.tolist()),
            **means,
        )


def _spread(steps: int, num_tasks: int) -> Tensor:
    """[K]: so many, as evenly as whole steps go."""
    each, rest = divmod(steps, num_tasks)
    return torch.tensor([each + (task < rest) for task in range(num_tasks)], dtype=torch.int64)


def _shifted(before_B1: Tensor | None, values_BT: Tensor) -> Tensor | None:
    """[T + 1, B]: at each observation, the value of the step before it."""
    return None if before_B1 is None else torch.cat([before_B1, values_BT], 1).T
