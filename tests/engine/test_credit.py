"""Advantages against plain loops in float64."""

import math
import random
import statistics

import pytest
import torch

from align_engine import credit

NAN = math.nan


def random_rewards(rng, groups, size):
    return [NAN if rng.random() < 0.2 else rng.choice([0.0, 1.0, rng.uniform(-5, 5)]) for _ in range(groups * size)]


def scored(values):
    return [value for value in values if not math.isnan(value)]


def std(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def groups_of(rewards, size):
    return [rewards[i : i + size] for i in range(0, len(rewards), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out(size, seed):
    rewards = random_rewards(random.Random(seed), 5, size)
    want = []
    for group in groups_of(rewards, size):
        for i, value in enumerate(group):
            others = scored(group[:i] + group[i + 1 :])
            want.append(0.0 if math.isnan(value) or not others else value - sum(others) / len(others))
    got = credit.leave_one_out(torch.tensor(rewards, dtype=torch.float64), size)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_group_normalised(scale, size, seed):
    rewards = random_rewards(random.Random(seed), 4, size)
    want = []
    for group in groups_of(rewards, size):
        mean = statistics.mean(scored(group)) if scored(group) else NAN
        spread = {"group": std(scored(group)) + 1e-4, "batch": std(scored(rewards)) + 1e-4, "none": 1.0}[scale]
        want += [0.0 if math.isnan(value) else (value - mean) / spread for value in group]
    got = credit.group_normalised(torch.tensor(rewards, dtype=torch.float64), size, scale)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale_rewards must be group, batch or none, got 'std'"):
        credit.group_normalised(torch.zeros(2), 2, "std")


@pytest.mark.parametrize("seed", range(5))
def test_baselines_of_reinforce(seed):
    rewards = random_rewards(random.Random(seed), 6, 2)
    mean = statistics.mean(scored(rewards))
    tensor = torch.tensor(rewards, dtype=torch.float64)
    want = torch.tensor([0.0 if math.isnan(value) else value - mean for value in rewards], dtype=torch.float64)
    torch.testing.assert_close(credit.BASELINES["batch_mean"](tensor, 2), want)
    plain = torch.tensor([0.0 if math.isnan(value) else value for value in rewards], dtype=torch.float64)
    assert torch.equal(credit.BASELINES["none"](tensor, 2), plain)


@pytest.mark.parametrize("name", list(credit.BASELINES))
def test_nothing_scored_means_no_advantage(name):
    nothing = torch.full((4,), NAN)
    assert torch.equal(credit.BASELINES[name](nothing, 2), torch.zeros(4))
    assert torch.equal(credit.group_normalised(nothing, 2), torch.zeros(4))
    assert credit.best_versus_worst(nothing, 2) == []


@pytest.mark.parametrize("seed", range(20))
def test_best_versus_worst(seed):
    rng, size = random.Random(seed), 4
    rewards = [rng.choice([NAN, 0.0, 0.5, 1.0]) for _ in range(6 * size)]
    want = []
    for start in range(0, len(rewards), size):
        places = [i for i in range(start, start + size) if not math.isnan(rewards[i])]
        if places and max(rewards[i] for i in places) > min(rewards[i] for i in places):
            want.append((max(places, key=lambda i: rewards[i]), min(places, key=lambda i: rewards[i])))
    assert credit.best_versus_worst(torch.tensor(rewards), size) == want


def loop_gae(rewards, values, gamma, lam):
    """One sequence, from the definition: A_t = sum_l (gamma lam)^l delta_(t+l)."""
    delta = [r + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(delta))) for t in range(len(delta))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.7, 0.0)])
def test_gae_of_sequences_of_many_lengths(gamma, lam):
    torch.manual_seed(0)
    lengths = [5, 1, 0, 3]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    rewards = torch.randn(4, 5, dtype=torch.float64).where(mask, NAN)
    values = torch.randn(4, 5, dtype=torch.float64).where(mask, NAN)
    advantages, returns = credit.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].tolist(), values[row, :length].tolist()
        want = torch.tensor(loop_gae(r, v, gamma, lam), dtype=torch.float64)
        torch.testing.assert_close(advantages[row, :length], want)
        torch.testing.assert_close(returns[row, :length], want + torch.tensor(v, dtype=torch.float64))
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_the_score_stands_at_the_last_token():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    kl = torch.tensor([[1.0, 2.0, 9.0], [9.0, 9.0, 9.0], [3.0, 4.0, 5.0]])
    got = credit.token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.5)
    assert got.tolist() == [[-0.5, 9.0, 0.0], [0.0, 0.0, 0.0], [-1.5, -2.0, 27.5]]


@pytest.mark.parametrize("shift", [True, False])
def test_whiten(shift):
    torch.manual_seed(1)
    x, mask = torch.randn(3, 4, dtype=torch.float64) * 5 + 2, torch.rand(3, 4) < 0.6
    kept = x[mask].tolist()
    mean, var = statistics.mean(kept), statistics.variance(kept)
    want = [(value - mean) / math.sqrt(var + 1e-8) + (0.0 if shift else mean) for value in kept]
    got = credit.whiten(x, mask, shift)
    torch.testing.assert_close(got[mask], torch.tensor(want, dtype=torch.float64))
    assert not got[~mask].any()
    assert torch.equal(credit.whiten(x, torch.zeros_like(mask)), torch.zeros_like(x))
