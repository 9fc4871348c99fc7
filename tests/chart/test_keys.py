"""The keys: drawn once and kept, or the user's own; each role mounts its part, and new ones restart pods."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from services.wire import keygen
from services.wire.keys import PEERS, Role, load_keys
from tests.chart.fake_api import render_beside
from tests.chart.rendering import CASES, Object, find, pod_of, pods, refusal, render

SEED = {"seed": base64.b64encode(b"s" * 64).decode()}


def secret(data: dict[str, str], name: str = "impala-keys") -> Object:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}


def checksums(objects: list[Object]) -> set[str]:
    return {
        pod.metadata["annotations"].get("checksum/keys", "none")
        for pod in pods(objects)
        if pod.component != "test"
    }


def test_the_first_installation_draws_a_seed_of_64_characters_and_another_one_another() -> None:
    first, second = (
        base64.b64decode(find(render_beside(), "Secret", "impala-keys")["data"]["seed"]).decode()
        for _ in range(2)
    )

    assert len(first) == len(second) == 64
    assert first.isalnum()
    assert first != second


def test_an_upgrade_keeps_the_seed_and_restarts_nobody() -> None:
    first = render_beside()
    seed = find(first, "Secret", "impala-keys")["data"]

    upgraded = render_beside(secret(seed))

    assert find(upgraded, "Secret", "impala-keys")["data"] == seed
    assert checksums(upgraded) == checksums(first)
    assert len(checksums(first)) == 1


def test_a_seed_that_was_lost_is_drawn_anew_and_restarts_everybody() -> None:
    assert checksums(render_beside()).isdisjoint(checksums(render_beside(secret(SEED))))


@pytest.mark.parametrize("value", ["security.existingSecret", "security.perRole.existingSecret"])
def test_keys_of_the_user_are_never_copied_and_another_name_restarts_everybody(value: str) -> None:
    beside = render_beside(secret(SEED, "mine"), arguments=("--set", f"{value}=mine"))
    other = render_beside(secret(SEED, "other"), arguments=("--set", f"{value}=other"))

    assert not [each for each in beside if each["kind"] == "Secret"]
    assert len(checksums(beside)) == len(checksums(other)) == 1
    assert checksums(beside).isdisjoint(checksums(other))
    assert "ssss" not in str(beside)


@pytest.mark.parametrize("value", ["security.existingSecret=mine", "security.perRole.existingSecret=mine"])
def test_a_secret_of_the_user_that_comes_after_the_pods_restarts_nobody(value: str) -> None:
    before = render_beside(arguments=("--set", value))
    after = render_beside(secret(SEED, "mine"), arguments=("--set", f"{value},actors=9"))

    assert checksums(before) == checksums(after)


def test_a_seed_beside_a_key_pair_for_each_role_is_refused() -> None:
    said = refusal("--set", "security.existingSecret=a,security.perRole.existingSecret=b")

    assert (
        'security.existingSecret = "a", security.perRole.existingSecret = "b": allowed is one of them' in said
    )


def keys_volume(objects: list[Object], component: str) -> Any:
    volumes = {volume["name"]: volume for volume in pod_of(objects, component).spec["volumes"]}
    return volumes["keys"]["secret"]


def files(objects: list[Object], component: str) -> set[str]:
    items = keys_volume(objects, component)["items"]
    assert all(item["key"] == item["path"] for item in items)
    return {item["path"] for item in items}


@pytest.mark.parametrize(("case", "name"), [("default", "impala-keys"), ("seed-of-mine", "mine")])
def test_every_pod_mounts_the_seed_and_nothing_else_of_its_secret(case: str, name: str) -> None:
    for pod in pods(render(*CASES[case])):
        volume = {volume["name"]: volume for volume in pod.spec["volumes"]}["keys"]["secret"]
        assert volume["secretName"] == name
        assert volume["items"] == [{"key": "seed", "path": "seed"}]
        assert {"name": "keys", "mountPath": "/etc/impala-keys", "readOnly": True} in pod.container[
            "volumeMounts"
        ]


def test_the_group_of_the_pod_may_read_the_keys_and_others_may_not() -> None:
    assert keys_volume(render(), "actor")["defaultMode"] == 0o440


def test_with_a_key_pair_for_each_role_a_pod_holds_no_secret_but_its_own() -> None:
    objects = render(
        "--set", "security.perRole.existingSecret=mine,evaluator.enabled=true,paramserver.relays=1"
    )

    assert files(objects, "actor") == {"actor.secret", "learner.public", "paramserver.public"}
    assert files(objects, "learner") == {"learner.secret", "actor.public", "paramserver.public"}
    assert files(objects, "evaluator") == {"evaluator.secret", "paramserver.public"}
    of_the_server = {f"{role}.public" for role in ("actor", "learner", "evaluator")}
    assert files(objects, "paramserver") == files(objects, "relay") == {"paramserver.secret", *of_the_server}


@pytest.mark.parametrize("role", ["actor", "learner", "paramserver", "evaluator"])
@pytest.mark.parametrize("case", ["default", "keys-per-role"])
def test_what_a_role_mounts_is_all_that_it_needs(case: str, role: Role, tmp_path: Path) -> None:
    objects = render(*CASES[case], "--set", "evaluator.enabled=true")
    made = keygen.new_keys(seed=case == "default")
    for file in files(objects, role):
        (tmp_path / file).write_text(made[file])

    keys = load_keys(tmp_path, role)

    assert keys is not None
    assert keys.public.keys() == {role, *PEERS[role]}


def test_the_actor_of_helm_test_has_the_keys_of_an_actor() -> None:
    objects = render("--set", "security.perRole.existingSecret=mine")
    hook = find(objects, "Pod", "impala-test-rollout")["spec"]["volumes"]

    assert {volume["name"]: volume for volume in hook}["keys"]["secret"] == keys_volume(objects, "actor")


def test_without_security_there_are_no_keys_anywhere() -> None:
    objects = render(*CASES["insecure"])

    assert "keys" not in str([pod.spec for pod in pods(objects)])
    assert checksums(objects) == {"none"}
    assert not [each for each in objects if each["kind"] == "Secret"]
