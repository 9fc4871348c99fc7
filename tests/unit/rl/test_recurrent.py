"""The recurrent core: what it remembers, what it forgets at the start of an episode, and what it is told."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from services.config import NetworkConfig
from services.rl.actions import Discrete
from services.rl.envs import EnvSpec
from services.rl.networks import ActorCritic, Inputs, PolicyOutput, make_network
from services.rl.networks.recurrent import RecurrentCore, cuts_of
from services.rl.policy import Policy

T, B, F, A, H = 12, 5, 6, 4, 8


def inputs(length: int = T, columns: int = B, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Features, last actions and last rewards."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(length, columns, F, generator=generator),
        torch.randint(A, (length, columns), generator=generator, dtype=torch.int32),
        torch.randn(length, columns, generator=generator) * 3,
    )


def random_starts(seed: int, share: float) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(seed)) < share


def core() -> RecurrentCore:
    torch.manual_seed(3)
    return RecurrentCore(F, A, H)


def zeros(columns: int = B) -> Tensor:
    return torch.zeros(2, columns, H)


def by_hand(core: RecurrentCore, features: Tensor, action: Tensor, reward: Tensor, start: Tensor) -> Tensor:
    """One column, one step at a time, with the equations of an LSTM cell: outputs [T, H]."""
    weights = core.lstm.state_dict()
    w, u = weights["weight_ih_l0"], weights["weight_hh_l0"]
    bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    h, c = torch.zeros(H), torch.zeros(H)
    outputs = []
    for t in range(len(features)):
        last_action, last_reward = torch.zeros(A), torch.zeros(1)
        if start[t]:
            h, c = torch.zeros(H), torch.zeros(H)
        else:
            last_action[action[t]] = 1.0
            last_reward[0] = max(-1.0, min(1.0, float(reward[t])))
        x = torch.cat([features[t], last_reward, last_action])
        i, f, g, o = (w @ x + u @ h + bias).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_an_unroll_equals_the_cells_equations_with_a_reset_at_every_start(share: float) -> None:
    network, starts = core(), random_starts(7, share)
    features, actions, rewards = inputs()
    output, _ = network(features, actions, rewards, starts, cuts_of(starts), zeros())
    for b in range(B):
        alone = by_hand(network, features[:, b], actions[:, b], rewards[:, b], starts[:, b])
        torch.testing.assert_close(output[:, b], alone, rtol=1e-5, atol=1e-6)


def test_an_episode_inside_an_unroll_equals_the_same_episode_alone() -> None:
    network, starts = core(), random_starts(7, 0.2)
    features, actions, rewards = inputs()
    output, state = network(features, actions, rewards, starts, cuts_of(starts), zeros())
    compared = 0
    for b in range(B):
        edges = sorted({0, *starts[:, b].nonzero().flatten().tolist(), T})
        for begin, end in itertools.pairwise(edges):
            alone, alone_state = network(
                features[begin:end, b : b + 1],
                actions[begin:end, b : b + 1],
                rewards[begin:end, b : b + 1],
                starts[begin:end, b : b + 1],
                (),
                zeros(1),
            )
            torch.testing.assert_close(output[begin:end, b], alone[:, 0], rtol=1e-5, atol=1e-6)
            if end == T:
                torch.testing.assert_close(state[:, b], alone_state[:, 0], rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared > B


def test_two_unrolls_in_a_row_equal_one_of_twice_the_length() -> None:
    network, starts = core(), random_starts(9, 0.1)
    features, actions, rewards = inputs()
    whole, last = network(features, actions, rewards, starts, cuts_of(starts), zeros())
    half = T // 2
    first, between = network(
        features[:half], actions[:half], rewards[:half], starts[:half], cuts_of(starts[:half]), zeros()
    )
    second, end = network(
        features[half:], actions[half:], rewards[half:], starts[half:], cuts_of(starts[half:]), between
    )
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-6)


def test_a_start_at_the_first_observation_forgets_the_state_that_came_with_the_unroll() -> None:
    network = core()
    features, actions, rewards = inputs()
    starts = torch.zeros(T, B, dtype=torch.bool)
    starts[0, 2] = True
    stale = torch.randn(2, B, H)
    output, _ = network(features, actions, rewards, starts, cuts_of(starts), stale)
    clean, _ = network(features, actions, rewards, starts, cuts_of(starts), zeros())
    torch.testing.assert_close(output[:, 2], clean[:, 2])
    assert not torch.allclose(output[:, 1], clean[:, 1])


def test_no_gradient_crosses_the_start_of_an_episode() -> None:
    network = core()
    features, actions, rewards = inputs()
    features.requires_grad_()
    starts = torch.zeros(T, B, dtype=torch.bool)
    starts[5, 0] = True
    output, _ = network(features, actions, rewards, starts, cuts_of(starts), zeros())
    output[5:, 0].square().sum().backward()
    assert features.grad is not None
    assert not features.grad[:5, 0].any()
    assert features.grad[5:, 0].abs().sum() > 0


def test_a_start_that_the_cuts_do_not_name_is_noticed() -> None:
    network = core()
    features, actions, rewards = inputs()
    starts = torch.zeros(T, B, dtype=torch.bool)
    starts[5, 0] = True
    with pytest.raises(AssertionError, match="episodes begin at other times"):
        network(features, actions, rewards, starts, (), zeros())


def test_the_lstm_is_given_contiguous_states_because_cudnn_takes_no_others() -> None:
    network = core()
    contiguous: list[bool] = []
    network.lstm.register_forward_pre_hook(
        lambda _module, given: contiguous.extend(state.is_contiguous() for state in given[1])
    )
    features, actions, rewards = inputs()
    starts = torch.zeros(T, B, dtype=torch.bool)
    of_rollouts = torch.randn(B, 2, H).transpose(0, 1)
    network(features, actions, rewards, starts, (), of_rollouts)
    assert contiguous == [True, True]


def test_without_starts_the_whole_unroll_is_one_call() -> None:
    network, calls = core(), []
    network.lstm.register_forward_hook(lambda _module, given, _output: calls.append(len(given[0])))
    features, actions, rewards = inputs()
    starts = torch.zeros(T, B, dtype=torch.bool)
    starts[0] = True
    network(features, actions, rewards, starts, cuts_of(starts), zeros())
    starts[4, 1] = starts[4, 3] = starts[9, 0] = True
    network(features, actions, rewards, starts, cuts_of(starts), zeros())
    assert calls == [12, 4, 5, 3]


def test_the_forget_gate_begins_open_and_the_others_do_not() -> None:
    size = 64
    torch.manual_seed(3)
    weights = RecurrentCore(F, A, size).lstm.state_dict()
    bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    i, f, g, o = bias.chunk(4)
    assert torch.equal(f, torch.ones(size))
    for other in (i, g, o):
        assert other.abs().max() <= 2 / size**0.5


# ------------------------------------------------------------------------------------------ the network


SPEC = EnvSpec(
    id="vectors",
    observation_shape=(3,),
    observation_dtype="float32",
    frame_stack=1,
    num_actions=A,
    frame_skip=1,
)


def network(lstm: bool = True) -> ActorCritic:
    torch.manual_seed(5)
    return make_network(SPEC, NetworkConfig(name="mlp", hidden_size=F, lstm=lstm, lstm_size=H))


def test_an_actor_step_by_step_and_a_learner_in_one_unroll_see_the_same() -> None:
    """Acting with the memory that Policy carries, against the same rollout through the network at once."""
    policy = Policy(network=network(), actions=Discrete(A), frame_stack=1, dtype=torch.float32, seed=1)
    rng = np.random.default_rng(1)
    observations = rng.standard_normal((B, T, 3)).astype(np.float32)
    starts = rng.random((B, T)) < 0.2
    starts[:, 0] = True
    rewards = (3 * rng.standard_normal((B, T))).astype(np.float32)
    memory = policy.new_memory(B)
    assert memory is not None
    last_actions, logits = [], []
    for t in range(T):
        last_actions.append(memory.last_action_N)
        _, step_logits = policy.act(observations[:, t : t + 1], starts[:, t : t + 1], memory)
        logits.append(step_logits)
        memory.last_reward_N = rewards[:, t]
    starts_TB = torch.from_numpy(starts).T
    before = np.concatenate([np.zeros((B, 1), np.float32), rewards[:, :-1]], axis=1)
    output: PolicyOutput = network()(
        Inputs(
            observation_TB=torch.from_numpy(observations).transpose(0, 1).unsqueeze(-1),
            episode_start_TB=starts_TB,
            last_action_TB=torch.from_numpy(np.stack(last_actions)),
            last_reward_TB=torch.from_numpy(before).T,
            state_2BH=torch.zeros(2, B, H),
            cuts=cuts_of(starts_TB),
        )
    )
    torch.testing.assert_close(output.logits_TBA, torch.from_numpy(np.stack(logits)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.state_2BH, torch.from_numpy(memory.state_2NH), rtol=1e-4, atol=1e-6)


def test_a_feed_forward_network_is_not_told_the_last_action_which_could_carry_a_memory() -> None:
    observation = torch.randn(1, B, 3)
    alone = network(lstm=False)(Inputs(observation_TB=observation)).logits_TBA
    told = network(lstm=False)(
        Inputs(
            observation_TB=observation,
            episode_start_TB=torch.zeros(1, B, dtype=torch.bool),
            last_action_TB=torch.ones(1, B, dtype=torch.int32),
            last_reward_TB=torch.ones(1, B),
        )
    ).logits_TBA
    assert torch.equal(alone, told)
    policy = Policy(
        network=network(lstm=False), actions=Discrete(A), frame_stack=1, dtype=torch.float32, seed=1
    )
    assert policy.new_memory(B) is None


def test_the_core_computes_in_float32_whatever_the_torso_does() -> None:
    recurrent = network()
    given = Inputs(
        observation_TB=torch.randn(T, B, 3),
        episode_start_TB=torch.zeros(T, B, dtype=torch.bool),
        last_action_TB=torch.zeros(T, B, dtype=torch.int32),
        last_reward_TB=torch.zeros(T, B),
        state_2BH=zeros(),
    )
    seen: list[torch.dtype] = []
    assert recurrent.core is not None
    recurrent.core.lstm.register_forward_hook(
        lambda _module, inputs, output: seen.extend([inputs[0].dtype, output[0].dtype])
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = recurrent(given)
    assert seen == [torch.float32] * 2
    assert output.state_2BH is not None
    assert output.state_2BH.dtype == output.logits_TBA.dtype == torch.float32


def test_a_greedy_policy_takes_the_most_likely_action_every_time() -> None:
    greedy = Policy(
        network=network(lstm=False),
        actions=Discrete(A),
        frame_stack=1,
        dtype=torch.float32,
        seed=1,
        greedy=True,
    )
    observations = np.random.default_rng(1).standard_normal((64, 1, 3)).astype(np.float32)
    starts = np.zeros((64, 1), np.bool_)
    for _ in range(3):
        actions, logits = greedy.act(observations, starts)
        assert (actions == logits.argmax(-1)).all()
