"""New keys, as files or as a Secret for Kubernetes: what ``keys.load_keys`` reads later.

Nothing is ever replaced: whoever renews keys makes a new directory or a new Secret, and restarts the run's
pods with it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

from services.wire.keys import ROLES, SEED_FILE, public_of, secret_of

SEED_CHARACTERS = 64
LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
MAX_NAME_LENGTH = 253
MAX_NAMESPACE_LENGTH = 63


def new_keys(*, seed: bool) -> dict[str, str]:
    """Contents by file name: a seed, or a key pair for each role."""
    if seed:
        return {SEED_FILE: secrets.token_hex(SEED_CHARACTERS // 2)}
    files = {}
    for role in ROLES:
        secret = secret_of(secrets.token_bytes(64), role)
        files[f"{role}.secret"] = secret.decode()
        files[f"{role}.public"] = public_of(secret).decode()
    return files


def write_keys(directory: Path, files: dict[str, str]) -> None:
    """Into files that only their owner can read, but for public keys; ValueError if one is there already.

    All of them or none.
    """
    written: list[Path] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = sorted(file.name for file in directory.iterdir() if is_key_file(file.name))
        if there:
            raise ValueError(
                f"DIR = {str(directory)!r}: holds {', '.join(there)}; allowed is a directory without keys"
            )
        for name, content in files.items():
            mode = 0o644 if name.endswith(".public") else 0o600
            descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(directory / name)
            with os.fdopen(descriptor, "w") as file:
                file.write(content + "\n")
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise ValueError(
            f"DIR = {str(directory)!r}: cannot be written ({error.strerror}); allowed is a new directory"
        ) from None


def is_key_file(name: str) -> bool:
    """Whether ``load_keys`` might read it."""
    return name == SEED_FILE or name in {f"{role}.{kind}" for role in ROLES for kind in ("secret", "public")}


def secret_manifest(name: str, namespace: str | None, files: dict[str, str]) -> str:
    """A Secret for `kubectl apply -f -`. It is immutable, so that no second one replaces it unnoticed.

    In JSON, which no reader takes for anything else: there are keys that YAML takes for numbers.
    """
    if re.fullmatch(rf"(?=.{{1,{MAX_NAME_LENGTH}}}$){LABEL}(\.{LABEL})*", name) is None:
        raise ValueError(
            f"--secret = {name!r}: allowed are up to {MAX_NAME_LENGTH} lower-case letters, digits, '-' and "
            "'.', with a letter or a digit at both ends and beside each '.'"
        )
    if (
        namespace is not None
        and re.fullmatch(rf"(?=.{{1,{MAX_NAMESPACE_LENGTH}}}$){LABEL}", namespace) is None
    ):
        raise ValueError(
            f"--namespace = {namespace!r}: allowed are up to {MAX_NAMESPACE_LENGTH} lower-case letters, "
            "digits and '-', with a letter or a digit at both ends"
        )
    metadata = {"name": name} if namespace is None else {"name": name, "namespace": namespace}
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "type": "Opaque",
        "immutable": True,
        "stringData": files,
    }
    return json.dumps(manifest, indent=2) + "\n"
