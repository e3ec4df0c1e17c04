"""KTO, PPO and GRPO from hidden states against their formulas over whole float64 logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor

from align_kernels import LossOutput, grpo_loss, kto_loss, ppo_clip_loss

B, T, V, D = 5, 7, 123, 19
WAYS = [("eager", None), ("torch", None), ("cpu", None), ("cpu", 1 << 12)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data(train: tuple[str, ...] = ("hidden", "weight", "bias")) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves and targets [B, T]: ragged rows, one of them without any token."""
    leaves = {"hidden": normal(B, T, D, seed=0), "weight": normal(V, D, seed=1) * 0.5, "bias": normal(V, seed=2) * 0.3}
    targets = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([7, 3, 0, 5, 1])
    targets[torch.arange(T) >= lengths[:, None]] = -100
    return {name: x.requires_grad_(name in train) for name, x in leaves.items()}, targets


def softmax(leaves: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies of the targets [B, T], 0 where ignored, and the mask."""
    log_p = (leaves["hidden"] @ leaves["weight"].T + leaves["bias"]).log_softmax(-1)
    mask = targets != -100
    logp = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * mask
    return logp, -(log_p.exp() * log_p).sum(-1) * mask, mask


def near(logps: Tensor, seed: int, spread: float = 0.4) -> Tensor:
    """Log-probs of another policy, not far away."""
    return logps.detach().float() + spread * normal(*logps.shape, seed=seed)


def compare(out: LossOutput, leaves: dict[str, Tensor], true: Tensor, twins: dict[str, Tensor]) -> None:
    check("loss", out.loss.detach(), true.detach(), scale=1.0)
    wanted = [name for name, x in leaves.items() if x.requires_grad]
    got = torch.autograd.grad(out.loss, [leaves[name] for name in wanted])
    expected = torch.autograd.grad(true, [twins[name] for name in wanted])
    for name, a, b in zip(wanted, got, expected):
        check(f"gradient of {name}", a, b)


def double(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in leaves.items()}


# -- KTO ----------------------------------------------------------------------------------------------------------
DESIRABLE = {"both": [1, 0, 1, 0, 0], "desirable alone": [1] * 5, "undesirable alone": [0] * 5}


@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("train", [("hidden", "weight", "bias"), ("hidden",)], ids=str)
@pytest.mark.parametrize("kl", ["none", "number", "per sequence"])
@pytest.mark.parametrize("marks", DESIRABLE)
def test_kto(marks: str, kl: str, train: tuple[str, ...], impl: str, workspace: int | None):
    leaves, targets = data(train)
    twins = double(leaves)
    logp, entropy, mask = softmax(twins, targets)
    logps = logp.sum(1)
    ref = near(logps, 4, 3.0)
    good = torch.tensor(DESIRABLE[marks]).bool()
    z0 = {"none": torch.zeros(()), "number": torch.tensor(0.7), "per sequence": normal(B, seed=5).abs()}[kl]
    out = kto_loss(
        leaves["hidden"], leaves["weight"], targets, ref, good, z0.tolist() if kl == "none" else z0,
        bias=leaves["bias"], beta=0.3, desirable_weight=1.3, undesirable_weight=0.6, impl=impl, workspace=workspace,
    )  # fmt: skip
    d = logps - ref
    each = torch.where(good, 1.3 * (1 - (0.3 * (d - z0)).sigmoid()), 0.6 * (1 - (0.3 * (z0 - d)).sigmoid()))
    compare(out, leaves, each.mean(), twins)
    check("logps", out.logps, logps.detach())
    for word, rows in (("chosen", good), ("rejected", ~good)):
        count = int(rows.sum())
        assert out.metrics[f"count/{word}"] == count
        zero = torch.zeros((), dtype=torch.float64)
        rewards, mean = (0.3 * d[rows].mean(), logps[rows].mean()) if count else (zero, zero)
        check("rewards", out.metrics[f"rewards/{word}"], rewards.detach(), scale=10.0)
        check("logps", out.metrics[f"logps/{word}"], mean.detach(), scale=10.0)
    check("entropy", out.metrics["entropy"], (entropy.sum() / mask.sum()).detach())
    margin = out.metrics["rewards/chosen"] - out.metrics["rewards/rejected"]
    assert out.metrics["rewards/margins"] == margin
    assert out.metrics["kl"] == pytest.approx(float(z0.mean()))


def test_kto_refuses():
    leaves, targets = data()
    call = lambda **k: kto_loss(  # noqa: E731
        leaves["hidden"], leaves["weight"], targets,
        **{"ref_logps": torch.zeros(B), "desirable": torch.ones(B, dtype=torch.bool), "kl": 0.0} | k,
    )  # fmt: skip
    with pytest.raises(ValueError, match="beta must be above 0, got 0"):
        call(beta=0.0)
    with pytest.raises(ValueError, match="desirable must be bool, got torch"):
        call(desirable=torch.ones(B, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ref_logps must have shape \(5,\), got \(4,\)"):
        call(ref_logps=torch.zeros(4))
    with pytest.raises(ValueError, match=r"kl must have shape \(\) or \(5,\), got \(2,\)"):
        call(kl=torch.zeros(2))


# -- PPO ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("train", [("hidden", "weight", "bias"), ("hidden",)], ids=str)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_ppo(entropy_coef: float, train: tuple[str, ...], impl: str, workspace: int | None):
    leaves, targets = data(train)
    twins = double(leaves)
    logp, entropy, mask = softmax(twins, targets)
    old, advantages = near(logp, 6), normal(B, T, seed=7)
    out = ppo_clip_loss(
        leaves["hidden"], leaves["weight"], targets, old, advantages,
        bias=leaves["bias"], cliprange=0.15, entropy_coef=entropy_coef, impl=impl, workspace=workspace,
    )  # fmt: skip
    r = (logp - old).exp()
    worse = torch.maximum(-advantages * r, -advantages * r.clamp(0.85, 1.15))
    true = ((worse - entropy_coef * entropy) * mask).sum() / mask.sum()
    compare(out, leaves, true, twins)
    mean = lambda x: ((x * mask).sum() / mask.sum()).detach()  # noqa: E731
    clipped = -advantages * r.clamp(0.85, 1.15) > -advantages * r
    assert 0 < mean(clipped) < 1
    check("clipfrac", out.metrics["policy/clipfrac_avg"], mean(clipped.double()))
    check("approxkl", out.metrics["policy/approxkl_avg"], mean(0.5 * (logp - old) ** 2))
    check("ratio", out.metrics["val/ratio"], mean(r))
    check("logps", out.logps, logp.detach())


def test_ppo_refuses():
    leaves, targets = data()
    with pytest.raises(ValueError, match="cliprange must be above 0, got 0"):
        ppo_clip_loss(leaves["hidden"], leaves["weight"], targets, torch.zeros(B, T), torch.zeros(B, T), cliprange=0)
    with pytest.raises(ValueError, match=r"advantages must have shape \(5, 7\), got \(5,\)"):
        ppo_clip_loss(leaves["hidden"], leaves["weight"], targets, torch.zeros(B, T), torch.zeros(B))


# -- GRPO ---------------------------------------------------------------------------------------------------------
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": dict(epsilon=0.1, epsilon_high=0.28, delta=1.5, beta=0.04),
    "delta below the clip": dict(delta=1.05),
    "kl alone": dict(beta=0.5),
}


def grpo_truth(
    logp: Tensor, mask: Tensor, old: Tensor | None, advantages: Tensor, ref: Tensor,
    loss_type: str, level: str, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The lines that a GRPO trainer runs on [B, T] log-probs, and its metrics."""
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    log_ratio = logp - (logp.detach() if old is None else old)
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None]
    r = log_ratio.exp()
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    capped = r if delta is None else r.clamp(max=delta)
    each = -torch.minimum(capped * advantages, r.clamp(low, high) * advantages)
    kl = (ref - logp).exp() - (ref - logp) - 1
    each = (each + beta * kl) * mask
    total = {
        "grpo": (each.sum(1) / mask.sum(1).clamp(min=1)).mean(),
        "bnpo": each.sum() / mask.sum(),
        "dr_grpo": each.sum() / (B * 11),
        "dapo": each.sum() / mask.sum(),
    }[loss_type]
    is_low, is_high = (r < low) & (advantages < 0), (r > high) & (advantages > 0)
    found = {"kl": kl, "clip_ratio/low_mean": is_low, "clip_ratio/high_mean": is_high}
    found["clip_ratio/region_mean"] = is_low | is_high
    return total, {name: ((x * mask).sum() / mask.sum()).detach().double() for name, x in found.items()}


@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_grpo(loss_type: str, level: str, options: str, impl: str, workspace: int | None):
    leaves, targets = data()
    twins = double(leaves)
    logp, entropy, mask = softmax(twins, targets)
    old, ref, advantages = near(logp, 6), near(logp, 8), normal(B, seed=7)
    out = grpo_loss(
        leaves["hidden"], leaves["weight"], targets, old, advantages, bias=leaves["bias"], loss_type=loss_type,
        importance_sampling_level=level, max_completion_length=11, ref_logps=ref, impl=impl, workspace=workspace,
        use_bias_correction_kl=False, **OPTIONS[options],
    )  # fmt: skip
    true, metrics = grpo_truth(logp, mask, old, advantages, ref, loss_type, level, **OPTIONS[options])
    compare(out, leaves, true, twins)
    if "beta" not in OPTIONS[options]:
        assert "kl" not in out.metrics
        del metrics["kl"]
    for name, value in metrics.items():
        check(name, out.metrics[name], value)
    check("entropy", out.metrics["entropy"], (entropy.sum() / mask.sum()).detach())
    check("logps", out.logps, logp.detach())


@pytest.mark.parametrize("impl", ["eager", "cpu"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("per_token", [False, True])
def test_grpo_on_policy(per_token: bool, level: str, impl: str):
    """Without old log-probs the ratio is one and its gradient that of the log-prob; the head may be frozen."""
    leaves, targets = data(("hidden",))
    twins = double(leaves)
    logp, _, mask = softmax(twins, targets)
    advantages = normal(*((B, T) if per_token else (B,)), seed=7)
    out = grpo_loss(
        leaves["hidden"], leaves["weight"], targets, None, advantages, bias=leaves["bias"], loss_type="grpo",
        importance_sampling_level=level, impl=impl,
    )  # fmt: skip
    true, _ = grpo_truth(logp, mask, None, advantages, logp.detach(), "grpo", level)
    compare(out, leaves, true, twins)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "num_items"), [("grpo", B), ("dr_grpo", B), ("dapo", 16)])
def test_grpo_pieces_equal_the_whole(loss_type: str, num_items: int, level: str):
    leaves, targets = data()
    hidden, weight, bias = leaves.values()
    old, advantages = -normal(B, T, seed=6).abs() - 4, normal(B, seed=7)
    options: dict[str, Any] = dict(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9)
    whole = grpo_loss(hidden, weight, targets, old, advantages, bias=bias, **options)
    assert int((targets != -100).sum()) == 16
    pieces = [
        grpo_loss(hidden[r], weight, targets[r], old[r], advantages[r], bias=bias, num_items=num_items, **options).loss
        for r in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    torch.testing.assert_close(sum(pieces), whole.loss)
    for a, b in zip(
        torch.autograd.grad(sum(pieces), (hidden, weight, bias)),
        torch.autograd.grad(whole.loss, (hidden, weight, bias)),
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type="gspo"), "loss_type must be one of grpo, bnpo, dr_grpo, dapo, luspo, .*, got 'gspo'"),
        (
            dict(importance_sampling_level="word"),
            "importance_sampling_level must be .* token, sequence, got 'word'",
        ),
        (dict(epsilon=-0.1), "epsilon and epsilon_high must not be negative, got -0.1 and -0.1"),
        (dict(delta=0.0), "delta must be above 0, got 0.0"),
        (dict(beta=0.04), r"beta=0.04 needs ref_logps \[B, T\]"),
        (dict(loss_type="dr_grpo"), "needs max_completion_length above 0, got None"),
        (dict(old_logps=torch.zeros(B)), r"old_logps must have shape \(5, 7\), got \(5,\)"),
        (dict(advantages=torch.zeros(T)), r"advantages must have shape \(5, 7\) or \(5,\), got \(7,\)"),
        (dict(beta=0.1, ref_logps=torch.zeros(B, 2)), r"ref_logps must have shape \(5, 7\), got \(5, 2\)"),
    ],
)
def test_grpo_refuses(options: dict[str, Any], message: str):
    leaves, targets = data()
    options = {"old_logps": None, "advantages": torch.zeros(B)} | options
    with pytest.raises(ValueError, match=message):
        grpo_loss(leaves["hidden"], leaves["weight"], targets, **options)
