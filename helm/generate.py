"""Writes values.schema.json and the table of values in README.md, so that neither can tell another story.

Both come from values.yaml, whose `# --` comments say what each value is for, and the schema of `config` comes
from the models that the pods themselves check it against. What the chart computes is left out of that schema:
helm refuses it by name, instead of overwriting what somebody has asked for. `python helm/generate.py` after
each change; with `--check` nothing is written, and the exit code says whether anything would have been.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from services import config

CHART = Path(__file__).parent
SCHEMA, README = CHART / "values.schema.json", CHART / "README.md"
TABLE = re.compile(r"(<!-- values: written by `make chart` -->\n).*?(<!-- end of values -->)", re.DOTALL)

COMPUTED = (
    "run_id",
    "run_dir",
    "actors",
    "learners",
    "actor.rollouts",
    "wire.learner_bind",
    "wire.learner_host",
    "wire.paramserver_endpoint",
    "wire.paramserver_bind",
    "wire.keys",
    "paramserver.upstream",
    "paramserver.remembers",
    "ops.host",
    "ops.port",
)
"""Keys of a RunConfig that the chart sets itself (templates/_config.tpl), or leaves alone on purpose."""

Schema = dict[str, Any]

COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
OBJECT: Schema = {"type": "object"}
OBJECTS: Schema = {"type": "array", "items": OBJECT}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
LABELS: Schema = {**TEXTS, "propertyNames": {"not": {"pattern": r"^(app\.kubernetes\.io|helm\.sh)/"}}}
OURS = (
    "HOME",
    "IMPALA__LEARNER__NUM_THREADS",
    "IMPALA__PARAMSERVER__UPSTREAM",
    "IMPALA__WIRE__LEARNER_HOST",
    "IMPALA__WIRE__PARAMSERVER_ENDPOINT",
)
"""Variables that the templates set. Twice in a list, and Kubernetes refuses the pod or takes either."""
SIZE: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([KMGTP]i?|k)?$"}
QUANTITIES: Schema = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
COUNT_OR_SHARE: Schema = {"anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]{1,2}%$|^100%$"}]}

SHAPES: dict[str, Schema] = {
    "actors": COUNT,
    "learners": POSITIVE,
    "runId": {"type": "string", "pattern": "^([A-Za-z0-9_-][A-Za-z0-9._-]{0,63})?$"},
    "paramserver.relays": COUNT,
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "pullSecrets": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": {"description": "Of a Secret.", "type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "repository": {"type": "string", "minLength": 1},
    "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "resources": {
        "type": "object",
        "properties": {
            "requests": {"description": "What a node must have free.", **QUANTITIES},
            "limits": {"description": "What the container may not exceed.", **QUANTITIES},
            "claims": {"description": "Names of resource claims.", **OBJECTS},
        },
        "additionalProperties": False,
    },
    "sharedMemory": SIZE,
    "size": SIZE,
    "accessModes": {
        "type": "array",
        "minItems": 1,
        "items": {"enum": ["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"]},
    },
    "nodeSelector": TEXTS,
    "affinity": OBJECT,
    "tolerations": OBJECTS,
    "topologySpreadConstraints": OBJECTS,
    "podLabels": LABELS,
    "podAnnotations": TEXTS,
    "extraEnv": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": {"description": "Of a variable.", "not": {"enum": OURS}}},
        },
    },
    "extraVolumes": OBJECTS,
    "extraVolumeMounts": OBJECTS,
    "podSecurityContext": OBJECT,
    "containerSecurityContext": OBJECT,
    "terminationGracePeriodSeconds": POSITIVE,
    "networkPolicy.metricsFrom": OBJECTS,
    "podDisruptionBudget.learner": COUNT_OR_SHARE,
    "podDisruptionBudget.relay": COUNT_OR_SHARE,
    "podDisruptionBudget.actor": COUNT_OR_SHARE,
    "autoscaling.minActors": POSITIVE,
    "autoscaling.maxActors": POSITIVE,
    "autoscaling.fallbackActors": POSITIVE,
    "autoscaling.pollingInterval": POSITIVE,
    "autoscaling.authenticationRef": {
        "type": "object",
        "properties": {
            "name": {"description": "Of the object.", "type": "string"},
            "kind": {
                "description": "Which it is.",
                "enum": ["TriggerAuthentication", "ClusterTriggerAuthentication"],
            },
        },
        "additionalProperties": False,
    },
    "autoscaling.prometheusAddress": {"type": "string", "pattern": "^https?://"},
    "monitoring.podMonitor.interval": {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"},
    "labels": LABELS,
    "commonLabels": LABELS,
    "extraObjects": {"type": "array", "items": {"type": ["object", "string"]}},
}
"""What a value may be, by its path or the last part of it; all others are switches and plain texts."""


def main(arguments: list[str]) -> int:
    """Exit code 1: with --check, something is out of date."""
    values = CHART / "values.yaml"
    root = yaml.compose(values.read_text(encoding="utf-8"))
    assert isinstance(root, yaml.MappingNode)
    leaves = list(documented(root, values.read_text(encoding="utf-8").splitlines()))
    readme = README.read_text(encoding="utf-8")
    wanted = {
        SCHEMA: json.dumps(schema_of(leaves), indent=2) + "\n",
        README: TABLE.sub(lambda match: match[1] + table_of(leaves) + match[2], readme),
    }
    changed = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in changed:
            print(f"helm/{path.name} is out of date: run `make chart`", file=sys.stderr)
        return 1 if changed else 0
    for path in changed:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


def documented(node: yaml.MappingNode, lines: list[str], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(path, default, text) of every value. What has a comment is one; a mapping without is a section."""
    for key_node, value_node in node.value:
        path, line = prefix + key_node.value, key_node.start_mark.line
        comment: list[str] = []
        while line > 0 and (above := lines[line - 1].strip()).startswith("#"):
            comment.insert(0, above.removeprefix("#").strip())
            line -= 1
        text = " ".join(comment)
        if text.startswith("-- "):
            yield path, plain(value_node), text.removeprefix("-- ")
        elif isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from documented(value_node, lines, path + ".")
        else:
            raise ValueError(f"values.yaml: {path} has no `# --` comment; every value needs one")


def plain(node: yaml.Node) -> Any:
    """The value that a node of YAML stands for."""
    return yaml.safe_load(yaml.serialize(node))


def schema_of(leaves: list[tuple[str, Any, str]]) -> Schema:
    """JSON schema of the values; nothing that is not in values.yaml is allowed."""
    of_config, definitions = config_schema()
    shapes = {**SHAPES, "config": of_config}
    properties: Schema = {"global": {"type": "object", "description": "Helm's own, for subcharts."}}
    for path, default, text in leaves:
        parents = path.split(".")
        name = parents.pop()
        shape = shapes.get(path) or shapes.get(name) or scalar(path, default)
        section = properties
        for parent in parents:
            section = section.setdefault(
                parent, {"type": "object", "properties": {}, "additionalProperties": False}
            )["properties"]
        section[name] = {"description": text, **shape}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": properties,
        # A null takes a default away, and these are looked into.
        "required": [name for name, each in properties.items() if "properties" in each and name != "global"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def scalar(path: str, default: Any) -> Schema:
    """Of a switch or a text."""
    types = {bool: "boolean", str: "string"}
    if type(default) not in types:
        raise ValueError(f"values.yaml: {path} = {default!r}: neither a switch nor a text; needs a shape")
    return {"type": types[type(default)]}


def config_schema() -> tuple[Schema, Schema]:
    """(schema of `config`, the definitions it refers to), without what the chart computes."""
    schema = config.schema()
    definitions: Schema = schema.pop("$defs")
    for key in COMPUTED:
        *parents, name = key.split(".")
        section = schema
        for parent in parents:
            section = definitions[section["properties"][parent]["$ref"].rpartition("/")[2]]
        section["properties"].pop(name)  # a KeyError: there is no such key any more
    for section in (schema, *definitions.values()):
        section.pop("title", None)
        for knob in section["properties"].values():
            knob.pop("title", None)
            if "$ref" in knob:
                knob.pop("default", None)  # it would name what the chart computes
    schema.pop("description")
    return schema, definitions


def table_of(leaves: list[tuple[str, Any, str]]) -> str:
    """A row for each value, in the order of the file."""
    rows = ["| value | default | what it is |", "| --- | --- | --- |"]
    for path, default, text in leaves:
        shown = json.dumps(default) if default != "" else '""'
        rows.append(f"| `{path}` | `{shown}` | {text.replace('|', '&#124;')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
