"""Every knob of a run, and how a configuration is put together.

A configuration is assembled from a preset (``presets``), one file (YAML or JSON), environment variables and
flags (``loading``), each overriding the ones before it, and becomes one frozen ``RunConfig`` (``models``)
that all pods of a run share. Whatever is wrong with it is a ``ConfigError`` that names the key, the value and
what is allowed. Nothing here imports anything else of ours, nor torch or zmq, so that ``--help`` is instant.
"""

from services.config.loading import (
    ALIASES,
    ENVIRONMENT_PREFIX,
    ConfigError,
    describe,
    dump,
    load,
    schema,
    validate,
)
from services.config.models import (
    ActorConfig,
    CheckpointConfig,
    EnvConfig,
    EvaluatorConfig,
    LearnerConfig,
    LossConfig,
    NetworkConfig,
    OpsConfig,
    OptimiserConfig,
    ParamserverConfig,
    PopArtConfig,
    ReplayConfig,
    RunConfig,
    Section,
    TaskConfig,
    WireConfig,
)
from services.config.presets import PRESETS

__all__ = [
    "ALIASES",
    "ENVIRONMENT_PREFIX",
    "PRESETS",
    "ActorConfig",
    "CheckpointConfig",
    "ConfigError",
    "EnvConfig",
    "EvaluatorConfig",
    "LearnerConfig",
    "LossConfig",
    "NetworkConfig",
    "OpsConfig",
    "OptimiserConfig",
    "ParamserverConfig",
    "PopArtConfig",
    "ReplayConfig",
    "RunConfig",
    "Section",
    "TaskConfig",
    "WireConfig",
    "describe",
    "dump",
    "load",
    "schema",
    "validate",
]
