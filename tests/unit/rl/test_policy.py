"""What a policy takes over as its weights, and what it refuses."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from services.config import NetworkConfig
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.networks import ActorCritic, make_network
from services.rl.policy import NO_WEIGHTS, Policy, decode_weights

SPEC = EnvSpec(
    id="states",
    observation_shape=(3,),
    observation_dtype="float32",
    frame_stack=1,
    num_actions=2,
    frame_skip=1,
)


def network(hidden_size: int = 4, seed: int = 1) -> ActorCritic:
    torch.manual_seed(seed)
    return make_network(SPEC, NetworkConfig(hidden_size=hidden_size))


def test_published_weights_are_decoded_to_the_very_tensors_that_were_encoded() -> None:
    sent, receiving = network(seed=1), network(seed=2)
    tensors = decode_weights(receiving, safetensors.torch.save(sent.state_dict()))
    assert tensors.keys() == sent.state_dict().keys()
    assert all(tensors[name].equal(tensor) for name, tensor in sent.state_dict().items())
    policy = Policy(
        network=receiving, actions=Discrete(2), frame_stack=1, dtype=torch.float32, seed=1, greedy=True
    )
    assert policy.version == NO_WEIGHTS
    policy.load(7, tensors)
    assert policy.version == 7
    assert all(tensor.equal(tensors[name]) for name, tensor in receiving.state_dict().items())


@pytest.mark.parametrize("payload", [b"", b"not safetensors", safetensors.torch.save({})])
def test_what_is_not_weights_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"not safetensors|another network"):
        decode_weights(network(), payload)


def test_every_truncation_and_every_changed_byte_of_the_header_is_refused_or_harmless() -> None:
    """safetensors raises several kinds of errors, of which a pod's thread would die."""
    own = network()
    payload = safetensors.torch.save(own.state_dict())
    header = 8 + int.from_bytes(payload[:8], "little")
    refused = 0
    for at in range(header):
        for damaged in (payload[:at], payload[:at] + bytes([payload[at] ^ 0xFF]) + payload[at + 1 :]):
            try:
                decode_weights(own, damaged)
            except ValueError:
                refused += 1
    assert refused > header


def test_weights_of_another_network_are_refused_by_name_and_shape() -> None:
    payload = safetensors.torch.save(network(hidden_size=8).state_dict())
    with pytest.raises(ValueError, match=r"weights of another network: \S+ has shape \(.*8.*4"):
        decode_weights(network(hidden_size=4), payload)
