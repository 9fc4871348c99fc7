"""A learner tells others an address at which they reach it."""

from __future__ import annotations

import pytest

from services.config import WireConfig
from services.learner.addresses import own_host, rollout_endpoint


@pytest.mark.parametrize(
    ("host", "bound", "endpoint"),
    [
        ("10.0.0.7", "tcp://0.0.0.0:5555", "tcp://10.0.0.7:5555"),
        ("learner-0.lab", "tcp://[::]:6000", "tcp://learner-0.lab:6000"),
        ("fd00::7", "tcp://[::]:5555", "tcp://[fd00::7]:5555"),
        ("10.0.0.7", "ipc:///run/learner", "ipc:///run/learner"),
    ],
)
def test_actors_connect_to_the_host_and_the_port_that_was_bound(host: str, bound: str, endpoint: str) -> None:
    assert rollout_endpoint(host, bound) == endpoint


def test_a_host_that_was_named_is_taken() -> None:
    assert own_host(WireConfig(learner_host="10.0.0.7")) == "10.0.0.7"


@pytest.mark.parametrize(
    ("paramserver", "host"),
    [
        ("tcp://127.0.0.1:5556", "127.0.0.1"),
        ("tcp://localhost:5556", "127.0.0.1"),
        ("ipc:///run/paramserver", "127.0.0.1"),
        ("tcp://[::1]:5556", "::1"),
    ],
)
def test_otherwise_it_is_the_way_to_the_parameter_server_that_says_who_one_is(
    paramserver: str, host: str
) -> None:
    assert own_host(WireConfig(paramserver_endpoint=paramserver)) in (host, "::1")


def test_a_parameter_server_that_no_way_leads_to_is_an_error_that_may_pass() -> None:
    with pytest.raises(OSError, match=r".+"):
        own_host(WireConfig(paramserver_endpoint="tcp://no-such-host.invalid:5556"))
