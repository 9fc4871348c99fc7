"""Networks: the same mathematics in every layout and precision, the same weights from the same seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.config import NetworkConfig
from services.rl.envs import EnvSpec
from services.rl.networks import TORSOS, ActorCritic, Inputs, make_network
from services.rl.networks.convolutional import ConvTorso, PixelConv2d
from services.rl.networks.torso import Torso
from services.rl.precision import resolve

CPU = torch.device("cpu")


def images(height: int = 84, width: int = 84, frame_stack: int = 4) -> EnvSpec:
    return EnvSpec(
        id="images",
        observation_shape=(height, width),
        observation_dtype="uint8",
        frame_stack=frame_stack,
        num_actions=6,
        frame_skip=4,
    )


def vectors(size: int = 5) -> EnvSpec:
    return EnvSpec(
        id="CartPole-v1",
        observation_shape=(size,),
        observation_dtype="float32",
        frame_stack=1,
        num_actions=3,
        frame_skip=1,
    )


def spec_for(name: str) -> EnvSpec:
    return vectors() if name == "mlp" else images()


def observations(spec: EnvSpec, count: int = 8) -> Tensor:
    """[N, *observation, stack], as the actor and the learner stack them."""
    shape = (count, *spec.observation_shape, spec.frame_stack)
    generator = torch.Generator().manual_seed(1)
    if spec.observation_dtype == "uint8":
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


def seeded(spec: EnvSpec, name: str, seed: int = 1) -> ActorCritic:
    torch.manual_seed(seed)
    return make_network(spec, NetworkConfig(name=name))


@dataclass(frozen=True)
class Output:
    """Of single observations."""

    logits: Tensor
    baseline: Tensor


def run(network: ActorCritic, observations: Tensor) -> Output:
    """One time step of as many environments as there are observations."""
    output = network(Inputs(observation_TB=observations.unsqueeze(0)))
    return Output(output.logits_TBA[0], output.baselines_TBK[0, :, 0])


of_every_family = pytest.mark.parametrize("name", list(TORSOS))
plain_convolutional = pytest.mark.parametrize("name", ["shallow", "nature"])
convolutional = pytest.mark.parametrize("name", ["shallow", "nature", "deep"])


# ------------------------------------------------------------------------------------------- mathematics


def test_a_pixel_convolution_is_a_convolution_of_pixels_between_0_and_1() -> None:
    torch.manual_seed(1)
    ours = PixelConv2d(4, 16, 8, 4)
    pixels = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8).float()
    theirs = F.conv2d(pixels / 255.0, ours.weight, ours.bias, stride=4)
    torch.testing.assert_close(ours(pixels), theirs, rtol=1e-5, atol=1e-5)
    ours(pixels).square().sum().backward()
    assert ours.weight.grad is not None
    our_gradient = ours.weight.grad.clone()
    ours.weight.grad = None
    theirs.square().sum().backward()
    torch.testing.assert_close(our_gradient, ours.weight.grad, rtol=1e-4, atol=1e-3)


@plain_convolutional
def test_the_channels_last_network_equals_a_plain_one_on_contiguous_pixels(name: str) -> None:
    """The same weights in torch's own layers, N C H W, pixels divided by 255."""
    network = seeded(images(), name)
    torso = network.torso
    assert isinstance(torso, ConvTorso)
    pixels = observations(images())
    x = (pixels.permute(0, 3, 1, 2).contiguous() / 255.0).contiguous()
    for convolution in torso.convolutions:
        assert isinstance(convolution, nn.Conv2d)
        x = torch.relu(F.conv2d(x, convolution.weight.contiguous(), convolution.bias, convolution.stride))
    features = torch.relu(F.linear(x.flatten(1), torso.linear.weight, torso.linear.bias))
    output = run(network, pixels)
    torch.testing.assert_close(output.logits, network.policy(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.baseline, network.baseline(features)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "convolutions", "linear"),
    [
        # 84 -> (84 - 8)/4 + 1 = 20 -> (20 - 4)/2 + 1 = 9; 32 x 9 x 9 = 2592
        ("shallow", [(16, 4, 8, 8), (32, 16, 4, 4)], (256, 2592)),
        # ... 20 -> 9 -> 7; 64 x 7 x 7 = 3136
        ("nature", [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)], (512, 3136)),
    ],
)
def test_the_layers_are_those_of_the_papers(
    name: str, convolutions: list[tuple[int, ...]], linear: tuple[int, int]
) -> None:
    torso = seeded(images(), name).torso
    assert isinstance(torso, ConvTorso)
    layers = [layer for layer in torso.convolutions if isinstance(layer, nn.Conv2d)]
    assert [tuple(layer.weight.shape) for layer in layers] == convolutions
    assert tuple(torso.linear.weight.shape) == linear
    assert torso.num_features == linear[0]


def test_the_deep_network_equals_a_plain_one_written_layer_by_layer() -> None:
    """Espeholt et al. 2018, figure 3, in torch's functions, N C H W, pixels divided by 255."""
    network = seeded(images(), "deep")
    weights = network.torso.state_dict()

    def convolve(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"].contiguous(), weights[f"{name}.bias"], padding=1)

    pixels = observations(images(), 3)
    x = pixels.permute(0, 3, 1, 2).contiguous() / 255.0
    for section, (channels, side) in enumerate([(16, 42), (32, 21), (32, 11)]):
        x = F.max_pool2d(convolve(x, f"sections.{section}.0"), 3, stride=2, padding=1)
        assert x.shape == (3, channels, side, side)
        for block in (2, 3):
            y = convolve(F.relu(x), f"sections.{section}.{block}.first")
            x = x + convolve(F.relu(y), f"sections.{section}.{block}.second")
    features = F.relu(F.linear(F.relu(x).flatten(1), weights["linear.weight"], weights["linear.bias"]))
    assert features.shape == (3, 256)
    output = run(network, pixels)
    torch.testing.assert_close(output.logits, network.policy(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.baseline, network.baseline(features)[:, 0], rtol=1e-4, atol=1e-5)
    convolutions = [module for module in network.torso.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 15


@convolutional
def test_a_frame_in_color_is_seen_in_all_of_its_channels(name: str) -> None:
    spec = replace(images(), observation_shape=(84, 84, 3))
    network, x = seeded(spec, name), observations(spec, 1)
    before = run(network, x).baseline
    for channel in range(3):
        for frame in range(4):
            other = x.clone()
            other[..., channel, frame] = 255 - other[..., channel, frame]
            assert not torch.allclose(run(network, other).baseline, before)


def test_an_mlp_is_two_tanh_layers_over_the_flattened_observation() -> None:
    network = seeded(vectors(), "mlp")
    weights = network.state_dict()
    x = observations(vectors())
    hidden = torch.tanh(x.flatten(1) @ weights["torso.first.weight"].T + weights["torso.first.bias"])
    features = torch.tanh(hidden @ weights["torso.second.weight"].T + weights["torso.second.bias"])
    torch.testing.assert_close(
        run(network, x).baseline,
        (features @ weights["baseline.linear.weight"].T + weights["baseline.linear.bias"])[:, 0],
    )


def test_an_mlp_reads_bytes_as_numbers_between_0_and_1() -> None:
    torch.manual_seed(1)
    network = make_network(images(16, 16), NetworkConfig(name="mlp", hidden_size=32))
    pixels = observations(images(16, 16))
    torch.testing.assert_close(network.torso(pixels), network.torso(pixels.float() / 255.0))
    assert network.torso.num_features == 32


@of_every_family
def test_one_observation_does_not_depend_on_the_others_in_its_batch(name: str) -> None:
    network, x = seeded(spec_for(name), name), observations(spec_for(name))
    together, alone = run(network, x), run(network, x[3:4])
    torch.testing.assert_close(together.logits[3:4], alone.logits, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together.baseline[3:4], alone.baseline, rtol=1e-4, atol=1e-6)


@convolutional
def test_every_frame_of_the_stack_is_seen(name: str) -> None:
    network, x = seeded(images(), name), observations(images(), 1)
    for frame in range(4):
        other = x.clone()
        other[..., frame] = 255 - other[..., frame]
        assert not torch.allclose(run(network, other).baseline, run(network, x).baseline)


# --------------------------------------------------------------------------------------------- precision


@of_every_family
def test_a_bfloat16_torso_is_close_to_float32_and_its_heads_are_float32(name: str) -> None:
    """As the actor runs it: the torso converted, the heads untouched."""
    network, x = seeded(spec_for(name), name), observations(spec_for(name))
    exact = run(network, x)
    network.torso.to(torch.bfloat16)
    rounded = run(network, x)
    for ours, wanted in ((rounded.logits, exact.logits), (rounded.baseline, exact.baseline)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())
    assert network.policy.weight.dtype == torch.float32


@of_every_family
def test_under_autocast_the_torso_is_bfloat16_and_the_heads_are_float32(name: str) -> None:
    """As the learner runs it: float32 weights, and gradients for all of them."""
    network, x = seeded(spec_for(name), name), observations(spec_for(name))
    exact = run(network, x)
    dtypes: list[torch.dtype] = []
    network.torso.register_forward_hook(lambda _module, _input, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = run(network, x)
    assert output.logits.dtype == output.baseline.dtype == torch.float32
    assert not torch.equal(output.baseline, exact.baseline), "nothing ran in bfloat16"
    torch.testing.assert_close(
        output.baseline, exact.baseline, rtol=0.05, atol=0.05 * exact.baseline.abs().max().item()
    )
    (output.logits.sum() + output.baseline.sum()).backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_the_heads_do_not_round_even_inside_autocast() -> None:
    network = seeded(vectors(), "mlp")
    features = torch.randn(4, network.torso.num_features)

    class Given(Torso):
        num_features = network.torso.num_features

        def forward(self, observations: Tensor) -> Tensor:
            return features

    network.torso = Given()
    exact = run(network, torch.zeros(4, 1))
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(network, torch.zeros(4, 1))
    assert torch.equal(inside.logits, exact.logits)
    assert torch.equal(inside.baseline, exact.baseline)


def test_precision_resolves_to_what_is_asked_for_and_auto_to_something_native() -> None:
    assert resolve("float32", CPU) == torch.float32
    assert resolve("bfloat16", CPU) == torch.bfloat16
    assert resolve("auto", CPU) in (torch.float32, torch.bfloat16)


# ---------------------------------------------------------------------------------------- initial weights


@of_every_family
def test_the_same_seed_makes_the_same_weights_and_another_seed_others(name: str) -> None:
    spec = spec_for(name)
    first, again, other = (seeded(spec, name, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if key.endswith("weight"))


@of_every_family
def test_the_first_policy_is_nearly_uniform(name: str) -> None:
    spec = spec_for(name)
    probabilities = run(seeded(spec, name), observations(spec)).logits.softmax(-1)
    assert (probabilities * spec.num_actions - 1).abs().max() < 0.1


def test_weights_are_orthogonal_with_the_gain_of_their_place() -> None:
    network = seeded(images(), "shallow")
    torso = network.torso
    assert isinstance(torso, ConvTorso)
    for weight, gain in (
        (torso.convolutions[0].weight, math.sqrt(2)),
        (torso.linear.weight, math.sqrt(2)),
        (network.policy.weight, 0.01),
        (network.baseline.linear.weight, 1.0),
    ):
        assert isinstance(weight, Tensor)
        rows = weight.detach().flatten(1)
        wanted = gain**2 * torch.eye(len(rows))
        torch.testing.assert_close(rows @ rows.T, wanted, rtol=1e-4, atol=1e-5)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


# --------------------------------------------------------------------------------------- names and misfits


def test_auto_is_shallow_for_images_and_mlp_for_vectors() -> None:
    for spec, name in ((images(), "shallow"), (vectors(), "mlp")):
        assert seeded(spec, "auto").state_dict().keys() == seeded(spec, name).state_dict().keys()


@of_every_family
def test_every_family_gives_one_output_per_action_and_one_baseline_per_observation(name: str) -> None:
    spec = spec_for(name)
    output = run(seeded(spec, name), observations(spec, 3))
    assert output.logits.shape == (3, spec.num_actions)
    assert output.baseline.shape == (3,)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("shalow", "did you mean shallow?"),
        ("natur", "did you mean nature?"),
        ("aut", "did you mean auto?"),
        ("xyz", "allowed are auto, shallow, nature, deep, mlp or package.module:factory"),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest_one(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"^network.name = '{name}': ") as refusal:
        make_network(images(), NetworkConfig(name=name))
    known = hint.startswith("allowed") and all(word in str(refusal.value) for word in TORSOS)
    assert known or hint in str(refusal.value)


class Doubled(Torso):
    """A user's own: two features."""

    num_features = 2

    def __init__(self, spec: EnvSpec, config: NetworkConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen = (spec.id, config.name)

    def forward(self, observations: Tensor) -> Tensor:
        return observations.flatten(1)[:, :2] * self.scale


def test_a_network_of_the_users_own_is_found_by_package_and_name() -> None:
    name = "tests.unit.rl.test_networks:Doubled"
    network = make_network(vectors(), NetworkConfig(name=name))
    assert type(network.torso).__name__ == "Doubled"
    assert network.torso.seen == ("CartPole-v1", name)
    assert run(network, observations(vectors())).logits.shape == (8, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.networks:deep", "No module named 'no_such_package'"),
        ("tests.unit.rl.test_networks:Trebled", "has no attribute 'Trebled'"),
    ],
)
def test_a_network_of_the_users_own_that_cannot_be_found_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^network.name = '{name}': .*{message}"):
        make_network(vectors(), NetworkConfig(name=name))


@convolutional
def test_a_convolution_on_vectors_is_refused_by_naming_both_knobs(name: str) -> None:
    with pytest.raises(ValueError, match=r"network.name: .* env.id = 'CartPole-v1', float32 of shape \[5\]"):
        make_network(vectors(), NetworkConfig(name=name))


@pytest.mark.parametrize(("name", "side"), [("shallow", 20), ("nature", 36)])
def test_frames_that_are_just_large_enough_fit_and_smaller_ones_are_refused(name: str, side: int) -> None:
    # shallow needs 4 after its first layer: 8 + 3 x 4 = 20; nature needs 3 after its second, so 8 after its
    # first: 8 + 7 x 4 = 36.
    network = make_network(images(side, side), NetworkConfig(name=name))
    assert run(network, observations(images(side, side))).logits.isfinite().all()
    for height, width in ((side - 1, side), (side, side - 1)):
        with pytest.raises(ValueError, match=r"env\.frame_height and env\.frame_width larger"):
            make_network(images(height, width), NetworkConfig(name=name))
