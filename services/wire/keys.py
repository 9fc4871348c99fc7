"""The keys of the roles: who meets whom, and what a pod reads from the directory ``wire.keys`` at first.

Keys belong to roles, not to pods: an actor that comes back under another address needs none of its own.

    a seed         every key pair follows from it: whoever holds it may be any role
    a pair a role  a pod holds its own secret and the public keys of its peers, and can be nothing else

``keygen`` makes them, ``security`` uses them. No secret is ever logged, nor part of an error.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import zmq
from zmq.utils import z85

Role = Literal["actor", "learner", "paramserver", "evaluator"]
ROLES: tuple[Role, ...] = get_args(Role)

PEERS: Mapping[Role, tuple[Role, ...]] = {
    "actor": ("learner", "paramserver"),
    "learner": ("actor", "paramserver"),
    "paramserver": ("actor", "learner", "evaluator", "paramserver"),  # relays are parameter servers
    "evaluator": ("paramserver",),
}
"""Whom each role meets."""

ADMITTED: Mapping[Role, tuple[Role, ...]] = {
    "learner": ("actor",),
    "paramserver": PEERS["paramserver"],
}
"""Who may connect to those that listen."""

SEED_FILE = "seed"
SEED_BYTES = (32, 64)
KEY_CHARACTERS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What one pod holds. All keys are in Z85, 40 characters."""

    role: Role
    secret: bytes = field(repr=False)
    public: Mapping[Role, bytes]
    """Of its own role and of those it meets."""

    def admitted(self) -> dict[bytes, Role]:
        """Who may connect to us, by public key in 32 bytes as ZAP has it."""
        return {z85.decode(self.public[role]): role for role in ADMITTED.get(self.role, ())}


def secret_of(seed: bytes, role: Role) -> bytes:
    """The secret key of ``role`` that follows from ``seed``; nothing follows from it about another one."""
    digest = hashlib.blake2b(role.encode(), digest_size=32, key=seed, person=b"impala-curve")
    return z85.encode(digest.digest())


def public_of(secret: bytes) -> bytes:
    """The public key that belongs to ``secret``."""
    return zmq.curve_public(secret)


def load_keys(directory: Path | None, role: Role) -> Keys | None:
    """What ``role`` needs from ``wire.keys``; ValueError if it is not there or does not fit together."""
    if directory is None:
        return None
    if not zmq.has("curve"):
        raise _refusal(
            directory, "this libzmq cannot encrypt", "no keys, or a libzmq that was built with CURVE"
        )
    there = _files_of(directory)
    secret_file, own_file = f"{role}.secret", f"{role}.public"
    if {SEED_FILE, secret_file} <= there:
        raise _refusal(directory, f"holds both {SEED_FILE} and {secret_file}", "one of them")
    if SEED_FILE in there:
        seed = _read_seed(directory)
        secret = secret_of(seed, role)
        public = {peer: public_of(secret_of(seed, peer)) for peer in PEERS[role]}
    elif secret_file in there:
        secret = _read_key(directory, secret_file)
        others = [peer for peer in PEERS[role] if peer != role]
        public = {peer: _read_key(directory, f"{peer}.public") for peer in others}
    else:
        raise _refusal(directory, f"holds neither {SEED_FILE} nor {secret_file}", "one of them")
    public[role] = public_of(secret)
    if SEED_FILE not in there and own_file in there and _read_key(directory, own_file) != public[role]:
        raise _refusal(directory, f"{own_file} does not belong to {secret_file}", "the two files of one pair")
    for one, other in itertools.combinations(public, 2):
        if public[one] == public[other]:
            raise _refusal(
                directory, f"{one} and {other} have the same key", "a key of its own for each role"
            )
    return Keys(role=role, secret=secret, public=public)


def _files_of(directory: Path) -> set[str]:
    try:
        return {file.name for file in directory.iterdir()}
    except OSError as error:
        raise _refusal(
            directory,
            f"cannot be read ({error.strerror})",
            "a readable directory that `impala keygen` has filled",
        ) from None


def _read_seed(directory: Path) -> bytes:
    seed = _read(directory, SEED_FILE)
    least, most = SEED_BYTES
    for end in (b"\r\n", b"\n"):  # of a line of text; random bytes may end like one
        if seed.endswith(end) and len(seed) - len(end) >= least:
            seed = seed.removesuffix(end)
            break
    if not least <= len(seed) <= most:
        raise _refusal(
            directory,
            f"{SEED_FILE} has {len(seed)} bytes",
            f"{least} to {most}, random (`impala keygen --seed`)",
        )
    return seed


def _read_key(directory: Path, name: str) -> bytes:
    key = _read(directory, name).rstrip(b"\r\n")
    try:
        if len(key) == KEY_CHARACTERS and len(z85.decode(key)) == 32:
            return key
    except (KeyError, struct.error):
        pass
    raise _refusal(directory, f"{name} is no key", f"{KEY_CHARACTERS} characters of Z85 (`impala keygen`)")


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        raise _refusal(directory, f"{name} cannot be read ({error.strerror})", "a readable file") from None


def _refusal(directory: Path, what: str, allowed: str) -> ValueError:
    return ValueError(f"wire.keys = {str(directory)!r}: {what}; allowed is {allowed}")
