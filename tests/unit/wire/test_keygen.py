"""`impala keygen`: files that nobody else reads and nobody overwrites, or a Secret that kubectl takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from services import cli
from services.wire import keygen
from services.wire.keys import PEERS, ROLES, load_keys

PAIRS = {f"{role}.{kind}" for role in ROLES for kind in ("secret", "public")}


def complaint(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said when nothing is done."""
    assert cli.main(["keygen", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_pair_of_files_is_written_for_each_role_and_only_public_keys_are_public(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["keygen", str(tmp_path / "new" / "keys")]) == 0
    said = capsys.readouterr().out
    files = {file.name: file for file in (tmp_path / "new" / "keys").iterdir()}
    assert set(files) == PAIRS
    for name, file in files.items():
        assert file.stat().st_mode & 0o077 == (0o044 if name.endswith(".public") else 0)
        assert file.read_text().strip() not in said
    assert all(load_keys(tmp_path / "new" / "keys", role) for role in ROLES)


def test_one_seed_is_written_for_all(tmp_path: Path) -> None:
    assert cli.main(["keygen", "--seed", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == "seed"
    assert file.stat().st_mode & 0o077 == 0
    assert all(load_keys(tmp_path, role) for role in ROLES)


@pytest.mark.parametrize("there", ["seed", "actor.secret", "learner.public"])
@pytest.mark.parametrize("flags", [[], ["--seed"]])
def test_no_key_is_ever_replaced(
    there: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / there).write_text("precious")
    expected = f"impala: DIR = '{tmp_path}': holds {there}; allowed is a directory without keys\n"
    assert complaint([*flags, str(tmp_path)], capsys) == expected
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {there: "precious"}


@pytest.mark.parametrize("flags", [[], ["--seed"]])
def test_a_secret_holds_what_every_role_can_load(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["keygen", *flags, "--secret", "my-keys", "--namespace", "training"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["apiVersion"], manifest["kind"], manifest["type"]) == ("v1", "Secret", "Opaque")
    assert manifest["metadata"] == {"name": "my-keys", "namespace": "training"}
    assert set(manifest["stringData"]) == ({"seed"} if flags else PAIRS)
    for name, content in manifest["stringData"].items():  # as kubelet mounts it
        (tmp_path / name).write_text(content)
    assert all(load_keys(tmp_path, role) for role in ROLES)


@pytest.mark.parametrize(("name", "namespace"), [("a.b-c.1", "b" * 63), ("a" * 253, "1")])
def test_the_longest_and_the_oddest_names_that_kubernetes_takes_are_taken(name: str, namespace: str) -> None:
    manifest = json.loads(keygen.secret_manifest(name, namespace, {}))
    assert manifest["metadata"] == {"name": name, "namespace": namespace}


def test_a_directory_is_left_as_it_was_when_not_all_could_be_written(tmp_path: Path) -> None:
    impossible = {"actor.secret": "a", "x" * 300: "b"}
    with pytest.raises(ValueError, match=r"cannot be written \(File name too long\)"):
        keygen.write_keys(tmp_path / "keys", impossible)
    assert list((tmp_path / "keys").iterdir()) == []


def test_the_help_says_which_files_each_role_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keygen", "--help"]) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    for role in ROLES:
        needed = {f"{role}.secret", *(f"{peer}.public" for peer in PEERS[role] if peer != role)}
        assert [set(words[1:]) for words in said if words[:1] == [role]] == [needed]


def test_without_a_namespace_the_secret_goes_where_kubectl_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keygen", "--secret", "my-keys"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == {"name": "my-keys"}


ONE = "impala: allowed is either one directory or --secret NAME: impala keygen [--seed] DIR\n"
NAMES = (
    "allowed are up to 253 lower-case letters, digits, '-' and '.', with a letter or a digit at both ends "
    "and beside each '.'\n"
)
LABELS = "allowed are up to 63 lower-case letters, digits and '-', with a letter or a digit at both ends\n"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], ONE),
        (["a", "b"], ONE),
        (["a", "--secret", "b"], ONE),
        (["a", "--namespace", "b"], ONE),
        (["--secret"], "impala: --secret: a value is missing\n"),
        (["--secret", "My_Keys"], f"impala: --secret = 'My_Keys': {NAMES}"),
        (["--secret", "a\n"], f"impala: --secret = 'a\\n': {NAMES}"),
        (["--secret", "a", "--namespace", "-b"], None),
        (["--secret", "a", "--namespace=-b"], f"impala: --namespace = '-b': {LABELS}"),
        (["--secret", "a", "--namespace=a.b"], f"impala: --namespace = 'a.b': {LABELS}"),
        (["--secret", "a", f"--namespace={'b' * 64}"], f"impala: --namespace = '{'b' * 64}': {LABELS}"),
        (["--secret", "a..b"], f"impala: --secret = 'a..b': {NAMES}"),
        (["--secret", "a" * 254], f"impala: --secret = '{'a' * 254}': {NAMES}"),
        (["--sede", "a"], "impala: --sede: unknown flag; allowed are --seed, --secret, --namespace\n"),
        (
            ["/dev/null/x"],
            "impala: DIR = '/dev/null/x': cannot be written (Not a directory); allowed is a new directory\n",
        ),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_key(
    argv: list[str], line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(argv, capsys)
    assert said.count("\n") == 1
    assert line is None or said == line
