"""Every knob of a run: typed, validated, documented, with its only default."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from services.config.presets import PRESETS
from services.config.suggest import suggest

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


def _check_endpoint(endpoint: str) -> str:
    match = re.fullmatch(r"tcp://(?:\[[\w:.%]+\]|[^:/\s\[\]]+):(\d{1,5}|\*)|ipc://.+", endpoint)
    port = match[1] if match else None
    if match is None or (port not in (None, "*") and int(port) > 65535):
        raise ValueError("allowed is tcp://host:port or ipc:///path")
    return endpoint


Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
"""`tcp://host:port` or `ipc:///path`."""
Precision = Literal["auto", "float32", "bfloat16"]

FRESH_ENOUGH_ROLLOUTS = 640
"""A rollout is not stale while no more than so many were trained on since it was begun: 20 batches of 32.
Small batches are fast, and hundreds of versions pass while newer weights are on their way to the actors."""
KERNEL_ROLLOUTS = 100
"""What the kernel and libzmq hold of a connection beside the queues at both ends. Measured over TCP and over
Unix sockets: 6 rollouts of 20 kB, 46 to 67 of 2 kB, at most 95 of 1.6 kB. Of the smallest with 20 steps
(CartPole, 0.8 kB) there are up to 153, which is within the factor that `max_policy_lag` has."""


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class EnvConfig(Section):
    """What is played."""

    id: str = "ALE/Pong-v5"
    """A built-in (`catch`, `recall`), an Atari game (`ALE/Pong-v5`), a ViZDoom scenario (`doom_basic`), a
    level of DeepMind Lab (`dmlab/explore_goal_locations_small`), any registered Gymnasium id, or
    `package.module:factory` of your own."""
    kwargs: dict[str, str | int | float | bool | None] = {}
    """Keyword arguments for the built-in, for `gymnasium.make` or for your factory."""
    vectorization: Literal["sync", "async"] = "sync"
    """Gymnasium and ViZDoom: `sync` steps all environments in the actor's process, `async` one process each,
    which DeepMind Lab always has."""
    frame_skip: PositiveInt = 4
    """Atari, ViZDoom, DeepMind Lab: frames per agent step. Frames reported = agent steps x frame_skip."""
    frame_stack: Annotated[int, Field(ge=1, le=16)] = 4
    """Image observations: how many frames the network sees at once. Single frames travel on the wire."""
    frame_height: Annotated[int, Field(ge=16, le=512)] = 84
    """Image observations: height of the resized frame in pixels."""
    frame_width: Annotated[int, Field(ge=16, le=512)] = 84
    """Image observations: width of the resized frame in pixels."""
    color: bool = False
    """Image observations: three channels instead of gray."""
    noop_max: Annotated[int, Field(ge=0)] = 30
    """Atari: up to this many no-op steps begin each game."""
    sticky_actions: Probability = 0.0
    """Atari: the probability that the emulator repeats the previous action."""
    full_action_set: bool = False
    """Atari: all 18 actions instead of the game's minimal set."""
    life_loss_ends_episode: bool = True
    """Atari: training treats a lost life as a termination; returns are still those of whole games."""
    max_episode_frames: PositiveInt = 108_000
    """Atari: emulator frames after which a game is truncated (108,000 = 30 minutes)."""


class TaskConfig(Section):
    """One of several tasks that a single policy learns."""

    id: str
    """As `env.id`, or the name of a suite: `atari57`, `dmlab30`."""
    name: str | None = None
    """What reports call it; null is the id."""
    kwargs: dict[str, str | int | float | bool | None] = {}
    """Over those of `env.kwargs`."""


def _task(value: object) -> object:
    return {"id": value} if isinstance(value, str) else value


class NetworkConfig(Section):
    """What maps observations to policy logits and a baseline."""

    name: str = "auto"
    """`shallow`, `nature`, `deep`, `mlp`, `package.module:factory`; `auto` is shallow for images, mlp for
    vectors."""
    hidden_size: PositiveInt = 128
    """mlp: width of its two hidden layers."""
    lstm: bool = False
    """A recurrent core between the features and the heads, which also sees the last action and reward."""
    lstm_size: Annotated[int, Field(ge=1, le=8192)] = 256
    """Width of that core."""
    instructions: bool = True
    """Where the environment gives an instruction in words (language levels of DMLab), read it."""


class LossConfig(Section):
    """V-trace actor-critic (Espeholt et al. 2018)."""

    discount: Probability = 0.99
    """gamma, per agent step."""
    baseline_cost: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    entropy_cost: NonNegativeFloat = 0.01
    """Weight of the entropy bonus."""
    reward_clipping: Literal["auto", "abs_one", "soft_asymmetric", "none"] = "auto"
    """Applied at the learner only; reported returns are never clipped. `auto` is abs_one, and with PopArt,
    which is there to do without, none."""
    rho_bar: PositiveFloat = 1.0
    """V-trace: truncation of the importance weights in the value target."""
    c_bar: PositiveFloat = 1.0
    """V-trace: truncation of the trace coefficients."""
    pg_rho_bar: PositiveFloat = 1.0
    """V-trace: truncation of the importance weights in the policy gradient."""
    trace_lambda: Probability = 1.0
    """V-trace: lambda, which multiplies the trace coefficients."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over time and batch. The papers' learning rates assume `sum`; `mean` rescales all terms together."""


class PopArtConfig(Section):
    """Baselines on a normalised scale of each task's own (Hessel et al. 2018)."""

    enabled: bool = False
    """Without it the scale is that of the (clipped) rewards, for all tasks."""
    step_size: Annotated[float, Field(gt=0, le=1)] = 3e-4
    """beta: how far an update moves the statistics towards those of its batch."""
    min_sigma: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Least scale. Every task begins with 1."""
    max_sigma: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1e6
    """Greatest scale."""


class ReplayConfig(Section):
    """LASER: mixing past experience into each batch (Schmitt et al. 2019)."""

    ratio: Annotated[int, Field(ge=0, le=1023)] = 0
    """Replayed rollouts for each fresh one in a batch of `batch_size`; 0 is no replay at all."""
    capacity: PositiveInt = 200_000
    """Agent steps that are held, compressed, in each learner; the oldest make room for the newest."""
    trust_region: PositiveFloat | None = 1.0
    """b: a step counts only if KL(pi || pi~_mu) is below this; null lets all of them count."""
    recurrent_state: Literal["stored", "recomputed"] = "stored"
    """LSTM: replayed rollouts begin with the state that the actor had, or with what today's network makes of
    it over their first `burn_in` steps, which then are in no loss."""
    burn_in: PositiveInt = 5
    """For `recurrent_state: recomputed`."""
    checkpoint: bool = False
    """Keep the replay memory on disk, in the run's directory, so that it survives a restart."""


class OptimiserConfig(Section):
    """How gradients become steps."""

    name: Literal["rmsprop", "rmsprop_tf", "adam"] = "rmsprop"
    """`rmsprop` and `adam` as torch defines them; `rmsprop_tf` as TensorFlow does: epsilon inside the root,
    and an average that begins at 1."""
    learning_rate: PositiveFloat = 6e-4
    """At step 0."""
    schedule: Literal["linear", "constant"] = "linear"
    """`linear` falls to 0 at `total_steps`."""
    rmsprop_alpha: Probability = 0.99
    """rmsprop, rmsprop_tf: decay of the squared-gradient average."""
    rmsprop_epsilon: PositiveFloat = 0.01
    """rmsprop: added to the root of the squared-gradient average; rmsprop_tf: to the average itself."""
    rmsprop_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """rmsprop, rmsprop_tf: momentum."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """adam: decay of the gradient average."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """adam: decay of the squared-gradient average."""
    adam_epsilon: PositiveFloat = 1e-8
    """adam: added to the root of the squared-gradient average."""
    max_grad_norm: PositiveFloat = 40.0
    """Gradients are scaled down to this global norm."""


class ActorConfig(Section):
    """One actor process."""

    num_envs: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] = 32
    """Environments, in two halves: the policy acts on one half while the other one steps."""
    env_threads: PositiveInt = 2
    """Atari: emulator threads of each half; with several tasks at least one for each that it plays."""
    inference_threads: PositiveInt = 1
    """Threads for the policy network."""
    precision: Precision = "auto"
    """Of inference. `auto`: bfloat16 where the processor has instructions for it, else float32."""
    weights_interval_s: NonNegativeFloat = 0.05
    """Least time between two requests for newer weights; bounds the bandwidth per actor."""
    rollouts: PositiveInt | None = None
    """An actor that has sent so many, or finds training complete, ends with exit code 0; null is never."""


class LearnerConfig(Section):
    """One learner process."""

    device: str = "auto"
    """`auto` (CUDA if there is any, else CPU), `cpu`, `cuda` or `cuda:N`."""
    num_threads: PositiveInt | None = None
    """Threads for the training step on a CPU. null is 1, and for `deep`, the slowest part of any run, as many
    as there are cores, up to 4."""
    precision: Precision = "auto"
    """Of the network's forward and backward pass; losses and the optimiser are always float32."""
    queue_capacity: PositiveInt | None = None
    """Rollouts that may wait, still compressed; null is the fresh ones of two batches. When it is full the
    learner stops reading and the actors wait: a longer queue only makes the rollouts older."""
    max_policy_lag: PositiveInt | None = None
    """Rollouts more than this many versions behind the learner are dropped and counted. null is 20 (more with
    batches of fewer than 32 fresh rollouts), or twice what as many actors as hold seats may have under way,
    or with replay what the memory holds, which is trained on at that age anyway: whichever is most."""
    min_learners: PositiveInt = 1
    """Training pauses while fewer learners than these are there."""
    max_nonfinite_updates: PositiveInt = 10
    """Consecutive updates with a non-finite gradient, each skipped, after which the learner gives up."""
    log_interval_s: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Time between two lines of metrics.jsonl, and between two looks at `max_nonfinite_updates`."""


class CheckpointConfig(Section):
    """What survives a stop."""

    interval_s: PositiveFloat = 60.0
    """Time between two checkpoints."""
    keep: PositiveInt = 3
    """The newest ones that are kept, beside the best one."""


class ParamserverConfig(Section):
    """The parameter server, or a relay of one."""

    upstream: Endpoint | None = None
    """Of a relay: the parameter server (or relay) it gets its weights from."""
    hold_s: PositiveFloat = 3.0
    """How long a request for newer weights is held open when there are none. A client asks again after twice
    this time without an answer, so it also bounds how fast clients notice a restarted server."""
    seat_lease_s: PositiveFloat = 30.0
    """An actor that is silent for this long loses its seat."""
    learner_lease_s: Annotated[float, Field(ge=1, le=600)] = 5.0
    """A learner that is silent for this long is no longer a member of the group: one that is frozen or cut
    off holds up the others for as long, and one that dies together with this server for 10 s at least."""
    snapshot_interval_s: PositiveFloat = 10.0
    """Time between two snapshots on disk."""
    remembers: bool = True
    """Whether its next life finds these snapshots again. A pod without a claim does not: it gives learners
    that may have trained under its last life `learner_lease_s` to come back, before a run is a new one."""


class EvaluatorConfig(Section):
    """Whole episodes played to measure a policy, by `impala evaluate` and by the evaluator pod."""

    episodes: PositiveInt = 10
    """Of each task."""
    num_envs: PositiveInt = 10
    """Environments that play at the same time."""
    max_episode_steps: PositiveInt = 108_000
    """Agent steps after which an episode is cut off and counted as capped: not every game ends."""
    actions: Literal["sampled", "greedy"] = "sampled"
    """Drawn from the policy, as in training, or always its most likely one."""
    interval_s: NonNegativeFloat = 60.0
    """The pod: least time between the beginnings of two rounds. A round takes the newest weights."""


class WireConfig(Section):
    """Addresses and bounds of what crosses a process boundary."""

    learner_bind: Endpoint = "tcp://*:5555"
    """Where a learner listens for rollouts."""
    learner_host: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:%-]{1,253}$")] | None = None
    """Address or name of the machine that a learner is on, told to the actors and to the other learners, who
    connect to it. null is the address from which it reaches the parameter server."""
    paramserver_endpoint: Endpoint = "tcp://127.0.0.1:5556"
    """Where actors and learners find the parameter server, or actors a relay."""
    paramserver_bind: Endpoint = "tcp://*:5556"
    """Where a parameter server listens."""
    codec: Literal["zstd", "none"] = "zstd"
    """Compression of byte observations."""
    send_queue: Annotated[int, Field(ge=1, le=64)] = 2
    """Rollout messages an actor may have waiting per learner. Each one is policy lag."""
    receive_queue: Annotated[int, Field(ge=1, le=64)] = 2
    """Rollout messages a learner's socket may hold per actor."""
    max_message_bytes: Annotated[int, Field(ge=1024, le=2**31 - 1)] = 32 * 2**20
    """Larger messages are refused. So much memory a stranger can fill with each connection, keys or none."""
    keys: Path | None = None
    """Directory of the keys by which peers know each other, made by `impala keygen`: `seed`, or the own
    `<role>.secret` and the peers' `<role>.public`. With them all that crosses these addresses is encrypted,
    and whoever has no key is refused."""

    @property
    def rollouts_per_connection(self) -> int:
        """That an actor can have sent to a learner which reads none of them."""
        return self.send_queue + self.receive_queue + KERNEL_ROLLOUTS


class OpsConfig(Section):
    """How a pod is observed."""

    host: str = "0.0.0.0"
    """Address of the HTTP endpoint (/metrics, /healthz, /readyz)."""
    port: Port = 9400
    """Its port; 0 takes a free one."""
    liveness_timeout_s: PositiveFloat = 60.0
    """/healthz fails when the main loop has not turned for this long."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe event that is logged."""


class RunConfig(Section):
    """One training run, the same for all of its pods."""

    preset: str = "impala"
    """The named set of defaults that this configuration started from."""
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "local"
    """Peers of another run are refused."""
    run_dir: Path = Path("runs/local")
    """Checkpoints, metrics and logs of this run."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Of environments and initial weights. Actions are drawn anew in every life of an actor."""
    total_steps: PositiveInt = 50_000_000
    """Agent steps to train for (50M agent steps = 200M Atari frames)."""
    unroll_length: Annotated[int, Field(ge=1, le=4096)] = 20
    """T: agent steps per rollout."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    """B: rollouts per update of one learner."""
    actors: PositiveInt = 1
    """Actor processes of `impala train`. In a cluster they come and go, and what depends on their number
    counts those that hold seats."""
    learners: PositiveInt = 1
    """Learner processes of `impala train`, which train as one. In a cluster they come and go."""
    env: EnvConfig = EnvConfig()
    tasks: tuple[
        Annotated[TaskConfig, BeforeValidator(_task, json_schema_input_type=str | TaskConfig)], ...
    ] = ()
    """Several tasks for one policy, by id or with `name` and `kwargs`, instead of `env.id`; what else stands
    in `env` holds for all of them."""
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    popart: PopArtConfig = PopArtConfig()
    replay: ReplayConfig = ReplayConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    actor: ActorConfig = ActorConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    paramserver: ParamserverConfig = ParamserverConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    wire: WireConfig = WireConfig()
    ops: OpsConfig = OpsConfig()

    @property
    def reward_clipping(self) -> str:
        """`loss.reward_clipping`, without `auto`."""
        if self.loss.reward_clipping == "auto":
            return "none" if self.popart.enabled else "abs_one"
        return self.loss.reward_clipping

    @property
    def title(self) -> str:
        """What is played, in a word or two."""
        names = [task.name or task.id for task in self.tasks] or [self.env.id]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    @property
    def fresh_per_update(self) -> int:
        """Rollouts of a batch that come from the actors; the rest is replayed."""
        return self.batch_size // (1 + self.replay.ratio)

    @property
    def steps_per_update(self) -> int:
        """Agent steps by which one update of one learner advances the run: the fresh ones."""
        return self.unroll_length * self.fresh_per_update

    @property
    def queue_capacity(self) -> int:
        """Rollouts that may wait in a learner."""
        return self.learner.queue_capacity or 2 * self.fresh_per_update

    @property
    def batches_in_flight(self) -> int:
        """How many updates one unroll of the whole fleet is worth: policy lag that no setting can avoid."""
        return math.ceil(self.actors * self.actor.num_envs / (self.learners * self.fresh_per_update))

    def max_policy_lag(self, actors: int, learners: int) -> int:
        """Versions behind the learners at which a rollout is dropped, while there are so many of both."""
        if self.learner.max_policy_lag is not None:
            return self.learner.max_policy_lag
        meanwhile = max(FRESH_ENOUGH_ROLLOUTS, 2 * self._most_rollouts_under_way(actors, learners))
        replayed = self.replay.capacity // self.steps_per_update if self.replay.ratio else 0
        return max(20, math.ceil(meanwhile / (learners * self.fresh_per_update)), replayed)

    def _most_rollouts_under_way(self, actors: int, learners: int) -> int:
        """Acted and not trained on, while the learners hold back the fleet: everything is full."""
        of_an_actor = 2 * self.actor.num_envs  # one is played, one waits
        of_an_actor += learners * self.wire.rollouts_per_connection
        of_a_learner = self.queue_capacity + 2 * self.fresh_per_update  # two batches are laid out
        return actors * of_an_actor + learners * of_a_learner

    @model_validator(mode="after")
    def _check_across_fields(self) -> RunConfig:
        if self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset!r}: {suggest(self.preset, PRESETS)}")
        self._check_replay()
        if self.queue_capacity < self.fresh_per_update:
            raise ValueError(
                f"learner.queue_capacity = {self.queue_capacity}: a batch with {self.fresh_per_update} fresh "
                f"rollouts can never fill; allowed is at least batch_size / (1 + replay.ratio)"
            )
        if self.total_steps < self.steps_per_update:
            raise ValueError(
                f"total_steps = {self.total_steps}: less than one update; allowed is at least "
                f"unroll_length x batch_size / (1 + replay.ratio) = {self.steps_per_update}"
            )
        in_flight = self.batches_in_flight
        max_policy_lag = self.max_policy_lag(self.actors, self.learners)
        if max_policy_lag < in_flight:
            raise ValueError(
                f"learner.max_policy_lag = {max_policy_lag}: actors x actor.num_envs = "
                f"{self.actors * self.actor.num_envs} environments finish {in_flight} batches of "
                f"{self.fresh_per_update} in one unroll, so most rollouts would be dropped as stale; "
                f"allowed is at least {in_flight}"
            )
        if 2 * self.paramserver.hold_s >= self.paramserver.seat_lease_s:
            raise ValueError(
                f"paramserver.hold_s = {self.paramserver.hold_s}: allowed is less than half of "
                f"paramserver.seat_lease_s = {self.paramserver.seat_lease_s}, or seats end while actors wait"
            )
        if 2 * self.actor.weights_interval_s >= self.paramserver.seat_lease_s:
            raise ValueError(
                f"actor.weights_interval_s = {self.actor.weights_interval_s}: allowed is less than half of "
                f"paramserver.seat_lease_s = {self.paramserver.seat_lease_s}, or seats end between requests"
            )
        return self

    def _check_replay(self) -> None:
        replay = self.replay
        if replay.ratio == 0:
            return
        parts = 1 + replay.ratio
        if self.batch_size % parts:
            below = self.batch_size // parts * parts
            near = " or ".join(str(size) for size in (below, below + parts) if size)
            raise ValueError(
                f"replay.ratio = {replay.ratio}: batch_size = {self.batch_size} cannot be one fresh part and "
                f"{replay.ratio} replayed ones; allowed is a batch_size that {parts} divides, such as {near}"
            )
        if replay.capacity < self.unroll_length * self.batch_size:
            raise ValueError(
                f"replay.capacity = {replay.capacity}: less than one batch; allowed is at least "
                f"unroll_length x batch_size = {self.unroll_length * self.batch_size}"
            )
        if replay.recurrent_state == "recomputed" and not self.network.lstm:
            raise ValueError(
                "replay.recurrent_state = 'recomputed': there is no state without network.lstm; "
                "allowed is stored"
            )
        if replay.recurrent_state == "recomputed" and replay.burn_in >= self.unroll_length:
            raise ValueError(
                f"replay.burn_in = {replay.burn_in}: leaves nothing to train on; allowed is less than "
                f"unroll_length = {self.unroll_length}"
            )
