"""Every knob of a run: typed, validated, documented, with its only default.

A configuration is assembled from a preset, one file (YAML or JSON), environment variables and flags,
each overriding the ones before it, and becomes one frozen ``RunConfig`` that all pods of a run share.
Whatever is wrong with it is a ``ConfigError`` that names the key, the value and what is allowed.
This module imports nothing else of ours, and neither torch nor zmq, so that ``--help`` is instant.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

ENVIRONMENT_PREFIX = "IMPALA__"
"""``IMPALA__LEARNER__QUEUE_CAPACITY=64``. The double underscore keeps clear of the ``IMPALA_*`` variables
that Kubernetes itself injects into the pods of a release called ``impala``."""

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


class ConfigError(ValueError):
    """A configuration that the user can mend. Its text is one line per problem."""


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class EnvConfig(Section):
    """What is played."""

    id: str = "ALE/Pong-v5"
    """A built-in (`catch`, `recall`), an Atari game (`ALE/Pong-v5`), any registered Gymnasium id, or
    `package.module:factory` of your own."""
    kwargs: dict[str, str | int | float | bool | None] = {}
    """Keyword arguments for the built-in, for `gymnasium.make` or for your factory."""
    vectorization: Literal["sync", "async"] = "sync"
    """Gymnasium ids only: `sync` steps all environments in the actor's process, `async` one process each."""
    frame_skip: PositiveInt = 4
    """Atari: emulator frames per agent step. Frames reported = agent steps x frame_skip."""
    frame_stack: Annotated[int, Field(ge=1, le=16)] = 4
    """Image observations: how many frames the network sees at once. Single frames travel on the wire."""
    frame_height: Annotated[int, Field(ge=16, le=512)] = 84
    """Atari: height of the resized frame in pixels."""
    frame_width: Annotated[int, Field(ge=16, le=512)] = 84
    """Atari: width of the resized frame in pixels."""
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


class NetworkConfig(Section):
    """What maps observations to policy logits and a baseline."""

    name: str = "auto"
    """`shallow`, `nature`, `mlp`, `package.module:factory`; `auto` is shallow for images, mlp for vectors."""
    hidden_size: PositiveInt = 128
    """mlp: width of its two hidden layers."""


class LossConfig(Section):
    """V-trace actor-critic (Espeholt et al. 2018)."""

    discount: Probability = 0.99
    """gamma, per agent step."""
    baseline_cost: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    entropy_cost: NonNegativeFloat = 0.01
    """Weight of the entropy bonus."""
    reward_clipping: Literal["abs_one", "soft_asymmetric", "none"] = "abs_one"
    """Applied at the learner only; reported returns are never clipped."""
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


class OptimiserConfig(Section):
    """How gradients become steps."""

    name: Literal["rmsprop", "adam"] = "rmsprop"
    """The optimiser, with torch's definition of it."""
    learning_rate: PositiveFloat = 6e-4
    """At step 0."""
    schedule: Literal["linear", "constant"] = "linear"
    """`linear` falls to 0 at `total_steps`."""
    rmsprop_alpha: Probability = 0.99
    """rmsprop: decay of the squared-gradient average."""
    rmsprop_epsilon: PositiveFloat = 0.01
    """rmsprop: added to the root of the squared-gradient average."""
    rmsprop_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """rmsprop: momentum."""
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
    """Atari: emulator threads of each half."""
    inference_threads: PositiveInt = 1
    """Threads for the policy network."""
    precision: Precision = "auto"
    """Of inference. `auto`: bfloat16 where the processor has instructions for it, else float32."""
    weights_interval_s: NonNegativeFloat = 0.05
    """Least time between two requests for newer weights; bounds the bandwidth per actor."""


class LearnerConfig(Section):
    """One learner process."""

    device: str = "auto"
    """`auto` (CUDA if there is any, else CPU), `cpu`, `cuda` or `cuda:N`."""
    num_threads: PositiveInt = 1
    """Threads for the training step on a CPU."""
    precision: Precision = "auto"
    """Of the network's forward and backward pass; losses and the optimiser are always float32."""
    queue_capacity: PositiveInt | None = None
    """Rollouts that may wait, still compressed; null is two batches. When it is full the learner stops
    reading and the actors wait: a longer queue only makes the rollouts older."""
    max_policy_lag: PositiveInt | None = None
    """Rollouts more than this many versions behind the learner are dropped and counted; null is 20, or twice
    what the fleet has in flight if that is more: actors x num_envs / (batch_size x learners)."""
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
    snapshot_interval_s: PositiveFloat = 10.0
    """Time between two snapshots on disk."""


class WireConfig(Section):
    """Addresses and bounds of what crosses a process boundary."""

    learner_endpoints: Annotated[tuple[Endpoint, ...], Field(min_length=1)] = ("tcp://127.0.0.1:5555",)
    """Where actors push rollouts: every learner."""
    learner_bind: Endpoint = "tcp://*:5555"
    """Where a learner listens for rollouts."""
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
    max_message_bytes: Annotated[int, Field(ge=1024, le=2**31 - 1)] = 256 * 2**20
    """Larger messages are refused before anything is allocated for them."""


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
    """Actor processes (or pods)."""
    env: EnvConfig = EnvConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    actor: ActorConfig = ActorConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    paramserver: ParamserverConfig = ParamserverConfig()
    wire: WireConfig = WireConfig()
    ops: OpsConfig = OpsConfig()

    @property
    def steps_per_update(self) -> int:
        """Agent steps that one update of one learner trains on."""
        return self.unroll_length * self.batch_size

    @property
    def queue_capacity(self) -> int:
        """Rollouts that may wait in a learner."""
        return self.learner.queue_capacity or 2 * self.batch_size

    @property
    def batches_in_flight(self) -> int:
        """How many updates one unroll of the whole fleet is worth: policy lag that no setting can avoid."""
        per_update = self.batch_size * len(self.wire.learner_endpoints)
        return -(-self.actors * self.actor.num_envs // per_update)

    @property
    def max_policy_lag(self) -> int:
        """Versions behind the learner at which a rollout is dropped."""
        return self.learner.max_policy_lag or max(20, 2 * self.batches_in_flight)

    @model_validator(mode="after")
    def _check_across_fields(self) -> RunConfig:
        if self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset!r}: {_suggest(self.preset, PRESETS)}")
        if self.queue_capacity < self.batch_size:
            raise ValueError(
                f"learner.queue_capacity = {self.queue_capacity}: a batch of batch_size = "
                f"{self.batch_size} rollouts can never fill; allowed is at least batch_size"
            )
        if self.total_steps < self.steps_per_update:
            raise ValueError(
                f"total_steps = {self.total_steps}: less than one update; allowed is at least "
                f"unroll_length x batch_size = {self.steps_per_update}"
            )
        in_flight = self.batches_in_flight
        if self.max_policy_lag < in_flight:
            raise ValueError(
                f"learner.max_policy_lag = {self.max_policy_lag}: actors x actor.num_envs = "
                f"{self.actors * self.actor.num_envs} environments finish {in_flight} batches of "
                f"{self.batch_size} in one unroll, so most rollouts would be dropped as stale; "
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


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "impala": {},
    "machado": {
        "env": {
            "sticky_actions": 0.25,
            "full_action_set": True,
            "life_loss_ends_episode": False,
            "noop_max": 0,
        }
    },
    "torchbeast": {
        "unroll_length": 80,
        "batch_size": 8,
        "optimiser": {"learning_rate": 4.8e-4},
        "loss": {"entropy_cost": 6e-4},
    },
}
"""Named defaults. `impala` is the Atari column of Espeholt et al. 2018, which the fields above already hold;
`machado` is the protocol of Machado et al. 2018; `torchbeast` the setting of Kuettler et al. 2019."""

ALIASES: Mapping[str, str] = {
    "env": "env.id",
    "network": "network.name",
    "learning-rate": "optimiser.learning_rate",
    "entropy-cost": "loss.entropy_cost",
    "num-envs": "actor.num_envs",
    "device": "learner.device",
}
"""Short spellings on the command line."""


def load(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
) -> RunConfig:
    """The effective configuration: preset < file < environment < flags."""
    layers = [
        _read_file(file) if file else {},
        _from_environment(environment or {}),
        _from_flags(flags),
    ]
    preset: Any = "impala"
    for layer in layers:
        preset = layer.get("preset", preset)
    if layers[0].get("preset", preset) != preset:  # what the file says would hide the new preset
        raise ConfigError(f"preset = {preset!r}: the file {file} was made with {layers[0]['preset']!r}")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"preset = {preset!r}: {_suggest(str(preset), PRESETS)}")
    merged: dict[str, Any] = {}
    for layer in [dict(PRESETS[preset]), *layers]:
        merged = _merge(merged, layer)
    return validate(merged)


def validate(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from plain nested values, or a ConfigError."""
    try:  # JSON mode: strict about types, yet lists become tuples and strings become paths
        return RunConfig.model_validate_json(json.dumps(values, default=_plain))
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A list whose only element is wrong is also too short: that says nothing more.
        inside = {detail["loc"][:-1] for detail in details}
        lines = [_explain(detail) for detail in details if detail["loc"] not in inside or not detail["loc"]]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _plain(value: object) -> str:
    """YAML reads 2020-01-01 as a date; here it is what was written, or something that no knob takes."""
    return value.isoformat() if isinstance(value, datetime.date) else repr(value)


def dump(config: RunConfig) -> dict[str, Any]:
    """Plain nested values; ``validate(dump(config)) == config``."""
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    return RunConfig.model_json_schema()


def describe() -> Iterator[tuple[str, str, str]]:
    """(key, default, documentation) of every knob, in order of definition."""
    for key, (_, default, text) in _leaves(RunConfig).items():
        yield key, json.dumps(default, default=str), " ".join(text.split())


def _leaves(section: type[Section], prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
    leaves: dict[str, tuple[Any, Any, str]] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            leaves |= _leaves(field.annotation, f"{prefix}{name}.")
        else:
            annotation: Any = (
                Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            )
            leaves[prefix + name] = (annotation, field.default, field.description or "")
    return leaves


class _YamlLoader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number, as YAML 1.2 and JSON do, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = yaml.load(text, Loader=_YamlLoader)  # noqa: S506  (a SafeLoader; JSON is a subset of YAML)
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration file {path}: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"configuration file {path}: holds {values!r}; allowed is a mapping of keys to values"
        )
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable in sorted(environment):
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            _set(values, key, environment[variable], shown=variable)
    return values


def _from_flags(flags: Sequence[str]) -> dict[str, Any]:
    """``--a.b value``, ``--a.b=value``, ``--switch``, ``--no-switch``; a dash is an underscore."""
    leaves = _leaves(RunConfig)
    values: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        name, has_value, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not name:
            raise ConfigError(f"{flag!r} is not a flag; allowed is --key value (see `impala config --help`)")
        key = ALIASES.get(name.replace("_", "-"), name.replace("-", "_"))
        negated = key.removeprefix("no_")
        if key not in leaves and leaves.get(negated, (None,))[0] is bool and not has_value:
            key, value = negated, "false"
        elif leaves.get(key, (None,))[0] is bool and not has_value:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not has_value and key in leaves:
            if not rest:
                raise ConfigError(f"--{name}: a value is missing")
            value = rest.pop(0)
        _set(values, key, value, shown=f"--{name}")
    return values


def _set(values: dict[str, Any], key: str, text: str, shown: str) -> None:
    """Put the string ``text`` at ``key``, converted to the type that the knob has."""
    leaves = _leaves(RunConfig)
    if key not in leaves:
        raise ConfigError(f"{shown}: unknown key; {_suggest(key, [*leaves, *ALIASES])}")
    annotation = leaves[key][0]
    value: Any = text
    if _is_container(annotation):
        try:
            value = yaml.load(text, Loader=_YamlLoader)  # noqa: S506
        except yaml.YAMLError:
            value = text
        if isinstance(value, str) and not text.startswith(("[", "{")):
            value = text.split(",")
    elif text.lower() in ("null", "none") and type(None) in get_args(annotation):
        value = None
    elif re.fullmatch(r"\d+(\.\d+)?[eE]\d+", text) and float(text).is_integer() and _is_integer(annotation):
        value = int(float(text))
    else:
        try:
            value = TypeAdapter(annotation).validate_strings(text, strict=False)
        except ValidationError as error:
            raise ConfigError(f"{shown} = {text!r}: {_allowed(error.errors()[0])}") from None
        if isinstance(value, Path):
            value = str(value)
    *parents, name = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[name] = value


def _is_integer(annotation: Any) -> bool:
    return annotation is int or any(_is_integer(part) for part in get_args(annotation) if part is not None)


def _is_container(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _is_container(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return any(_is_container(part) for part in get_args(annotation))
    return origin in (dict, tuple, list)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if key != "kwargs" and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _explain(detail: ErrorDetails) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{path} = {detail['input']!r}: unknown key; {_suggest(path, _leaves(RunConfig))}"
    if detail["type"] == "value_error" and not path:  # one of our cross-field checks, which names its fields
        return str(detail["ctx"]["error"])
    if detail["type"] == "json_invalid":
        return f"configuration: {detail['msg']}"
    return f"{path} = {detail['input']!r}: {_allowed(detail)}"


def _allowed(detail: ErrorDetails) -> str:
    """pydantic's words, in ours."""
    if detail["type"] == "value_error":  # one of our validators of a single knob
        return str(detail["ctx"]["error"])
    if detail["type"] == "string_pattern_mismatch":
        return f"allowed is what matches {detail['ctx']['pattern']}"
    message = detail["msg"].removeprefix("Input should ")
    if message.startswith("be "):
        return f"allowed is {message.removeprefix('be ')}"
    return f"it should {message}" if message != detail["msg"] else message


def _suggest(wrong: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    names = list(known)
    close = difflib.get_close_matches(wrong, names, n=3, cutoff=0.5)
    if not close:  # the right name under the wrong section, or the other way round
        last = wrong.rpartition(".")[2]
        close = [name for name in names if name.rpartition(".")[2] == last][:3]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"allowed are {', '.join(names)}" if len(names) < 20 else "`impala config --help` lists all"
