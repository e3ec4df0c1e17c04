"""Advantages against plain loops in float64."""

import math
import random
import statistics

import pytest
import torch

from align_engine.algorithms import grpo, ppo, rloo
from align_engine.errors import BadInput
from align_engine.recipe import GrpoRecipe, PpoLoss, PpoRecipe, RlooLoss, RlooRecipe, check
from align_engine.rollouts import advantages as of_rewards
from align_engine.rollouts.advantages import Experience

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
    got = of_rewards.leave_one_out(torch.tensor(rewards, dtype=torch.float64), size)
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
    got = of_rewards.group_normalised(torch.tensor(rewards, dtype=torch.float64), size, scale)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale_rewards must be group, batch or none, got 'std'"):
        of_rewards.group_normalised(torch.zeros(2), 2, "std")


@pytest.mark.parametrize("seed", range(5))
def test_baselines_of_reinforce(seed):
    rewards = random_rewards(random.Random(seed), 6, 2)
    mean = statistics.mean(scored(rewards))
    tensor = torch.tensor(rewards, dtype=torch.float64)
    want = torch.tensor([0.0 if math.isnan(value) else value - mean for value in rewards], dtype=torch.float64)
    torch.testing.assert_close(of_rewards.BASELINES["batch_mean"](tensor, 2), want)
    plain = torch.tensor([0.0 if math.isnan(value) else value for value in rewards], dtype=torch.float64)
    assert torch.equal(of_rewards.BASELINES["none"](tensor, 2), plain)


@pytest.mark.parametrize("name", list(of_rewards.BASELINES))
def test_nothing_scored_means_no_advantage(name):
    nothing = torch.full((4,), NAN)
    assert torch.equal(of_rewards.BASELINES[name](nothing, 2), torch.zeros(4))
    assert torch.equal(of_rewards.group_normalised(nothing, 2), torch.zeros(4))
    assert of_rewards.best_versus_worst(nothing, 2) == []


@pytest.mark.parametrize("seed", range(20))
def test_best_versus_worst(seed):
    rng, size = random.Random(seed), 4
    rewards = [rng.choice([NAN, 0.0, 0.5, 1.0]) for _ in range(6 * size)]
    want = []
    for start in range(0, len(rewards), size):
        places = [i for i in range(start, start + size) if not math.isnan(rewards[i])]
        if places and max(rewards[i] for i in places) > min(rewards[i] for i in places):
            want.append((max(places, key=lambda i: rewards[i]), min(places, key=lambda i: rewards[i])))
    assert of_rewards.best_versus_worst(torch.tensor(rewards), size) == want


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
    advantages, returns = of_rewards.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].tolist(), values[row, :length].tolist()
        want = torch.tensor(loop_gae(r, v, gamma, lam), dtype=torch.float64)
        torch.testing.assert_close(advantages[row, :length], want)
        torch.testing.assert_close(returns[row, :length], want + torch.tensor(v, dtype=torch.float64))
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_the_score_stands_at_the_last_token():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    kl = torch.tensor([[1.0, 2.0, 9.0], [9.0, 9.0, 9.0], [3.0, 4.0, 5.0]])
    got = of_rewards.token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.5)
    assert got.tolist() == [[-0.5, 9.0, 0.0], [0.0, 0.0, 0.0], [-1.5, -2.0, 27.5]]


@pytest.mark.parametrize("shift", [True, False])
def test_whiten(shift):
    torch.manual_seed(1)
    x, mask = torch.randn(3, 4, dtype=torch.float64) * 5 + 2, torch.rand(3, 4) < 0.6
    kept = x[mask].tolist()
    mean, var = statistics.mean(kept), statistics.variance(kept)
    want = [(value - mean) / math.sqrt(var + 1e-8) + (0.0 if shift else mean) for value in kept]
    got = of_rewards.whiten(x, mask, shift)
    torch.testing.assert_close(got[mask], torch.tensor(want, dtype=torch.float64))
    assert not got[~mask].any()
    assert torch.equal(of_rewards.whiten(x, torch.zeros_like(mask)), torch.zeros_like(x))


# -- the methods' own advantages, with every number worked out by hand ------------------------------------------
def lost(rows, width=3):
    """Lists of different lengths as a table; what lies outside must never be read."""
    return torch.tensor([[*row, *[7e3] * (width - len(row))] for row in rows])


def rollout(rewards, lengths, group_size, **tables):
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    tables = {name: lost(rows) for name, rows in tables.items()}
    return Experience(torch.tensor(rewards, dtype=torch.float64), group_size, mask, **tables)


def rloo_recipe(**loss):
    return RlooRecipe(loss=RlooLoss(**loss))


# old - ref summed over each completion: 1, 3, 0.5 and -1
OLD = [[-1.0, -2.0], [-1.0, -1.0, -1.0], [-3.0], [-2.0, -4.0]]
REF = [[-2.0, -2.0], [-1.0, -3.0, -2.0], [-3.5], [-1.0, -4.0]]


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        # rewards 1, 3, none, 2 less half the KL: 0.5, 1.5, none, 2.5
        (dict(baseline="leave_one_out"), [-1.0, 1.0, 0.0, 0.0]),
        (dict(baseline="batch_mean"), [-1.0, 0.0, 0.0, 1.0]),
        (dict(baseline="none"), [0.5, 1.5, 0.0, 2.5]),
        # of -1, 0 and 1 the mean is 0 and the spread 1; the completion without a reward is none of them
        (dict(baseline="batch_mean", normalize_advantages=True), [-1 / 1.0001, 0.0, 0.0, 1 / 1.0001]),
        (dict(baseline="none", normalize_advantages=True), [-1 / 1.0001, 0.0, 0.0, 1 / 1.0001]),
    ],
)
def test_rloo_takes_the_kl_of_each_completion_off_its_reward(loss, want):
    found = rollout([1.0, 3.0, NAN, 2.0], [2, 3, 1, 2], 2, old_logps=OLD, ref_logps=REF)
    given, measured = rloo.advantages(found, rloo_recipe(beta=0.5, **loss), {})
    assert given["advantages"].shape == (4, 3)
    torch.testing.assert_close(given["advantages"][:, 0], torch.tensor(want, dtype=torch.float64))
    assert (given["advantages"] == given["advantages"][:, :1]).all(), "one for the whole completion"
    assert float(measured["kl"]) == pytest.approx((1 + 3 + 0.5 - 1) / 4)


def test_rloo_without_a_reference_takes_the_rewards_as_they_are():
    given, measured = rloo.advantages(rollout([1.0, 4.0, 2.0, NAN], [1, 1, 1, 1], 2), rloo_recipe(beta=0.5), {})
    assert given["advantages"][:, 0].tolist() == [-3.0, 3.0, 0.0, 0.0] and measured == {}


def test_grpo_normalises_within_groups_and_leaves_out_what_nobody_scored():
    found = rollout([1.0, 3.0, NAN, 2.0, 4.0, NAN], [1, 2, 3, 1, 2, 3], 3)
    given, _ = grpo.advantages(found, GrpoRecipe(), {})
    one = 1 / (math.sqrt(2) + 1e-4)  # of 1, 3 and of 2, 4: 1 from the mean, spread sqrt(2)
    want = torch.tensor([-one, one, 0, -one, one, 0], dtype=torch.float64)
    torch.testing.assert_close(given["advantages"], want[:, None].expand(6, 3))


def ppo_recipe(**loss):
    return PpoRecipe(loss=PpoLoss(**dict(kl_coef=0.1, gamma=1.0, lam=0.5) | loss))


def ppo_rollout():
    """Of two tokens with reward 1, of three without a reward, of one with reward 2. KL per token: 0.5, -1; 1, 0, 0; 0.
    Rewards per token: -0.05, 1.1; of no account; 2."""
    return rollout(
        [1.0, NAN, 2.0], [2, 3, 1], 1,
        old_logps=[[-1.0, -2.0], [-1.0, -1.0, -1.0], [-3.0]],
        ref_logps=[[-1.5, -1.0], [-2.0, -1.0, -1.0], [-3.0]],
        values=[[0.2, 0.4], [0.1, 0.3, 0.6], [0.5]],
    )  # fmt: skip


def white(values):
    mean, std = statistics.mean(values), statistics.stdev(values)
    return [(value - mean) / std for value in values]


@pytest.mark.parametrize(
    ("loss", "advantages", "returns"),
    [
        # delta: -0.05 + 0.4 - 0.2 = 0.15, 1.1 - 0.4 = 0.7; 2 - 0.5 = 1.5. The first advantage: 0.15 + 0.5 * 0.7
        ({}, [0.5, 0.7, 1.5], [0.7, 1.1, 2.0]),
        # delta: -0.05 + 0.5 * 0.4 - 0.2 = -0.05, 0.7; 1.5. The first advantage: -0.05 + 0.5 * 1 * 0.7
        (dict(gamma=0.5, lam=1.0), [0.3, 0.7, 1.5], [0.5, 1.1, 2.0]),
        # no KL: 0 + 0.4 - 0.2 = 0.2, 1 - 0.4 = 0.6; 1.5. The first advantage: 0.2 + 0.5 * 0.6
        (dict(kl_coef=0.0), [0.5, 0.6, 1.5], [0.7, 1.0, 2.0]),
        # k3, exp(-d) - 1 + d: 0.5 -> 0.10653066, -1 -> 0.71828183; rewards -0.010653066, 1 - 0.071828183; 2
        (dict(kl_estimator="k3"), [0.453432842, 0.528171817, 1.5], [0.653432842, 0.928171817, 2.0]),
    ],
)
def test_ppo_learns_from_scored_completions_alone(loss, advantages, returns):
    found = ppo_rollout()
    given, _ = ppo.advantages(found, ppo_recipe(**loss), {})
    table, want = given["advantages"], white(advantages)
    got = [table[0, 0], table[0, 1], table[2, 0]]
    assert [float(x) for x in got] == pytest.approx(want, abs=1e-5)
    assert not table[1].any() and not table[0, 2:].any() and not table[2, 1:].any()
    table = given["returns"]
    assert [float(x) for x in (table[0, 0], table[0, 1], table[2, 0])] == pytest.approx(returns, abs=1e-6)
    assert torch.equal(table[1], found.values[1]), "what nobody scored must not move the critic"


def test_ppo_divides_rewards_by_their_spread():
    given, _ = ppo.advantages(ppo_rollout(), ppo_recipe(whiten_rewards=True), {})
    mean, std = statistics.mean([-0.05, 1.1, 2.0]), statistics.stdev([-0.05, 1.1, 2.0])
    first, last, other = ((x - mean) / std + mean for x in (-0.05, 1.1, 2.0))
    returns = [first + 0.4 - 0.2 + 0.5 * (last - 0.4) + 0.2, last, other]
    table = given["returns"]
    assert [float(x) for x in (table[0, 0], table[0, 1], table[2, 0])] == pytest.approx(returns, abs=1e-5)


def test_ppo_measures_the_kl_of_a_completion_as_a_sum_over_its_tokens():
    _, measured = ppo.advantages(ppo_rollout(), ppo_recipe(), {})
    measured = {name: float(value) for name, value in measured.items()}
    kl = (-0.5 + 1.0 + 0.0) / 3
    assert measured == pytest.approx({
        "objective/kl": kl, "objective/entropy": 3.0, "objective/scores": 1.5, "objective/non_score_reward": -0.1 * kl,
        "objective/rlhf_reward": 1.5 - 0.1 * kl, "kl_coef": 0.1,
    }, abs=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "want"),
    [
        (0.15, 0.1 * (1 + (1 / 9) * 3 / 10)),  # (1/6) / 0.15 - 1 = 1/9
        (0.02, 0.1 * (1 + 0.2 * 3 / 10)),  # far above the target: at most 0.2
        (5.00, 0.1 * (1 - 0.2 * 3 / 10)),  # far below it: at least -0.2
    ],
)
def test_ppo_steers_the_kl_coefficient_by_three_completions_of_a_horizon_of_ten(target, want):
    state = {}
    _, first = ppo.advantages(ppo_rollout(), ppo_recipe(kl_target=target, kl_horizon=10.0), state)
    assert first["kl_coef"] == 0.1, "the coefficient that the rewards were computed with"
    assert state["kl_coef"] == pytest.approx(want, abs=1e-9)
    _, second = ppo.advantages(ppo_rollout(), ppo_recipe(kl_target=target, kl_horizon=10.0), state)
    assert second["kl_coef"] == pytest.approx(want, abs=1e-9), "the next rollout goes on from there"


def test_a_kl_coefficient_without_a_target_stays():
    state = {}
    ppo.advantages(ppo_rollout(), ppo_recipe(), state)
    assert state == {"kl_coef": 0.1}


@pytest.mark.parametrize("lam", [-0.1, 1.5])
def test_lambda_outside_its_range_is_refused(lam):
    recipe = ppo_recipe(lam=lam)
    recipe.model.model_name_or_path = recipe.data.dataset_name = recipe.output.output_dir = "x"
    recipe.rollout.reward_funcs = ["tiny:word_reward"]
    with pytest.raises(BadInput, match=rf"^lam = {lam} must lie in \[0, 1\]$"):
        check(recipe)
