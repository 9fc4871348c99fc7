"""From a preset, a file, environment variables and flags to one ``RunConfig``, or a ``ConfigError``."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from services.config.models import RunConfig, Section
from services.config.presets import PRESETS
from services.config.suggest import suggest

ENVIRONMENT_PREFIX = "IMPALA__"
"""``IMPALA__LEARNER__QUEUE_CAPACITY=64``. The double underscore keeps clear of the ``IMPALA_*`` variables
that Kubernetes itself injects into the pods of a release called ``impala``."""


class ConfigError(ValueError):
    """A configuration that the user can mend. Its text is one line per problem."""


ALIASES: Mapping[str, str] = {
    "env": "env.id",
    "network": "network.name",
    "learning-rate": "optimiser.learning_rate",
    "entropy-cost": "loss.entropy_cost",
    "num-envs": "actor.num_envs",
    "device": "learner.device",
    "lstm": "network.lstm",
    "popart": "popart.enabled",
    "rollouts": "actor.rollouts",
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
        raise ConfigError(f"preset = {preset!r}: {suggest(str(preset), PRESETS)}")
    _refuse_env_beside_tasks(layers, dict(PRESETS[preset]))
    merged: dict[str, Any] = {}
    for layer in [dict(PRESETS[preset]), *layers]:
        merged = _merge(merged, layer)
    return validate(merged)


def _refuse_env_beside_tasks(layers: Sequence[Mapping[str, Any]], preset: Mapping[str, Any]) -> None:
    """Whoever names an environment on the command line is not to get the tasks of a preset or a file."""
    tasks: Any = next((layer["tasks"] for layer in [*reversed(layers), preset] if "tasks" in layer), ())
    for layer in layers[1:]:
        env = layer.get("env", {}).get("id")
        if env is not None and tasks:
            raise ConfigError(
                f"env.id = {env!r}: has no effect beside tasks = {tasks!r}; allowed is one of them "
                "(--tasks '[]' for none)"
            )


def validate(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from plain nested values, or a ConfigError."""
    try:  # JSON mode: strict about types, yet lists become tuples and strings become paths
        return RunConfig.model_validate_json(json.dumps(values, default=_plain))
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
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
        positive = re.sub(r"^no[-_]", "", name)
        negated = ALIASES.get(positive.replace("_", "-"), positive.replace("-", "_"))
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
        raise ConfigError(f"{shown}: unknown key; {suggest(key, [*leaves, *ALIASES])}")
    annotation = leaves[key][0]
    value: Any = text
    if _is_container(annotation):
        try:
            value = yaml.load(text, Loader=_YamlLoader)  # noqa: S506
        except yaml.YAMLError:
            value = text
        if isinstance(value, str) and not text.startswith(("[", "{")):
            value = [part.strip() for part in text.split(",")]
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
        return f"{path} = {detail['input']!r}: unknown key; {suggest(path, _leaves(RunConfig))}"
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
