"""Losses and credit of the methods that learn from their own rollouts, as the table of algorithms names them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align_engine import credit, heads
from align_engine.data.batches import IGNORE, Batch
from align_engine.metrics import with_means
from align_kernels import LossOutput, grpo_loss, ppo_clip_loss, rloo_loss, value_loss
from align_kernels.losses.grpo import LOSS_TYPES
from align_kernels.losses.kl import KL_ESTIMATORS

if TYPE_CHECKING:
    from align_engine.experience import Experience
    from align_engine.recipe import DirectRecipe, GrpoRecipe, PpoRecipe

Given = tuple[dict[str, Tensor], dict[str, Any]]  # (columns of the rollout [R, T], metrics)


def with_mismatch(out: LossOutput, batch: Batch, logps: Tensor | None) -> LossOutput:
    """The output with how far the sampler's log-probs are from ours of the same weights (`logps`, unless the batch has
    them from before the rollout's first step): the mean of |difference| over the tokens that have both."""
    ours = logps if batch.old_logps is None else batch.old_logps
    if ours is None or batch.sampling_logps is None:
        return out
    known = (batch.targets != IGNORE) & ~batch.sampling_logps.isnan()
    difference = (ours.detach() - batch.sampling_logps).where(known, 0.0).abs().sum() / known.sum().clamp(min=1)
    return with_means(out, {"sampling/sampling_logp_difference/mean": difference}, known.sum())


def given(fused: Callable[..., LossOutput], batch: Batch, recipe: Any, num_items: float) -> dict[str, Any]:
    """Keywords of a loss of the kernels: tensors of the batch and settings of the recipe's `loss` by their names."""
    found = vars(recipe.loss) | vars(batch) | {"num_items": num_items}
    return {name: found[name] for name in inspect.signature(fused).parameters if name in found}


def direct(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: DirectRecipe, num_items: float) -> LossOutput:
    """The policy gradient of whole completions; their ratio is clipped where a rollout serves several steps."""
    assert batch.advantages is not None
    first = (batch.targets != IGNORE).int().argmax(1, keepdim=True)
    one = {"advantages": batch.advantages.gather(1, first)[:, 0]}
    out = rloo_loss(hidden, **given(rloo_loss, batch, recipe, num_items) | one, **head)
    return with_mismatch(out, batch, batch.old_logps)


def direct_credit(found: Experience, recipe: DirectRecipe, state: dict[str, Any]) -> Given:
    """Rewards less beta times the KL estimate of each sequence (arXiv:2402.14740 eq. 3), less the baseline."""
    options, kl = recipe.loss, torch.zeros(len(found.rewards))
    if found.ref_logps is not None:
        assert found.old_logps is not None
        kl = (found.old_logps - found.ref_logps).where(found.mask, 0.0).sum(1)
    advantages = credit.BASELINES[options.baseline](found.rewards - options.beta * kl, found.group_size)
    metrics = {"kl": kl.mean()} if found.ref_logps is not None else {}
    if options.normalize_advantages:
        scored = advantages.where(~found.rewards.isnan(), math.nan)
        advantages = ((scored - scored.nanmean()) / (credit.nanstd(scored) + credit.STD_EPSILON)).nan_to_num(0.0)
    return {"advantages": advantages[:, None].expand(found.mask.shape)}, metrics


def grpo(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: GrpoRecipe, num_items: float) -> LossOutput:
    """The GRPO family."""
    options = recipe.loss
    more = {
        "sampling_logps": batch.sampling_logps if options.vllm_importance_sampling_correction else None,
        "max_completion_length": recipe.rollout.max_completion_length,
        "num_tokens": num_items if options.entropy_coef else None,
        # bnpo is dapo whose batch is one forward pass; here it is the whole window
        "loss_type": "dapo" if options.loss_type == "bnpo" else options.loss_type,
    }
    out = grpo_loss(hidden, **given(grpo_loss, batch, recipe, num_items) | more, **head)
    return with_mismatch(out, batch, out.logps)


def grpo_credit(found: Experience, recipe: GrpoRecipe, state: dict[str, Any]) -> Given:
    """Rewards normalised within their group."""
    advantages = credit.group_normalised(found.rewards, found.group_size, recipe.loss.scale_rewards)
    return {"advantages": advantages[:, None].expand(found.mask.shape)}, {}


def grpo_units(batch: Batch, recipe: GrpoRecipe) -> int:
    """Tokens, or sequences where the loss is a mean over them."""
    by_sequence = LOSS_TYPES[recipe.loss.loss_type].counts == "sequences"
    return len(batch.targets) if by_sequence else batch.num_tokens


class ValueHead(nn.Module):
    """The critic: one number per position, from the policy's own hidden states or from a model of its own.

    Args:
        hidden_size: of the policy.
        model: an AutoModelForSequenceClassification with one label, e.g. the reward model; None: a linear layer on the
            policy's last hidden states, zero at first.
    """

    def __init__(self, hidden_size: int, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        if model is None:
            self.score = nn.Linear(hidden_size, 1)
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[B, T, D] -> [B, T] float32: what position i is worth before its target is chosen."""
        if self.model is not None:
            return heads.values(self.model, batch.input_ids, batch.attention_mask)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.float()).squeeze(-1)


def ppo(
    hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: PpoRecipe, num_items: float, values: Tensor
) -> LossOutput:
    """The clipped surrogate, and vf_coef times the clipped value loss."""
    assert batch.values is not None and batch.returns is not None
    tokens, mask = batch.num_tokens, batch.targets != IGNORE
    policy = ppo_clip_loss(hidden, **given(ppo_clip_loss, batch, recipe, num_items), **head)
    clip = recipe.loss.cliprange_value
    value = value_loss(values, batch.values, batch.returns, mask, cliprange_value=clip, num_items=num_items)
    parts = {"loss/policy_avg": policy.loss, "loss/value_avg": value.loss}
    means = {name: loss.detach() * num_items / max(tokens, 1) for name, loss in parts.items()}
    out = policy._replace(metrics=policy.metrics | value.metrics, counts=policy.counts | value.counts)
    out = with_mismatch(with_means(out, means, tokens), batch, policy.logps)
    return out._replace(loss=policy.loss + recipe.loss.vf_coef * value.loss)


def ppo_credit(found: Experience, recipe: PpoRecipe, state: dict[str, Any]) -> Given:
    """GAE over rewards with the KL penalty in them; a KL controller keeps its coefficient in `state`."""
    assert found.old_logps is not None and found.values is not None
    options, mask = recipe.loss, found.mask
    coefficient = state.setdefault("kl_coef", options.kl_coef)
    kl = torch.zeros_like(found.old_logps)
    if found.ref_logps is not None:
        kl = KL_ESTIMATORS[options.kl_estimator](found.old_logps, found.ref_logps).where(mask, 0.0)
    scored = ~found.rewards.isnan()
    rewards = credit.token_rewards(found.rewards.nan_to_num(0.0).float(), kl, mask, coefficient)
    learnt = mask & scored[:, None]
    if options.whiten_rewards:
        rewards = credit.whiten(rewards, learnt, shift_mean=False)
    advantages, returns = credit.gae(rewards, found.values, mask, options.gamma, options.lam)
    sequence_kl = kl.sum(1)
    metrics = {
        "objective/kl": sequence_kl.mean(),
        "objective/entropy": -found.old_logps.where(mask, 0.0).sum(1).mean(),
        "objective/scores": found.rewards.nanmean(),
        "objective/non_score_reward": -coefficient * sequence_kl.mean(),
        "objective/rlhf_reward": found.rewards.nanmean() - coefficient * sequence_kl.mean(),
        "kl_coef": coefficient,
    }
    if options.kl_target is not None:  # arXiv:1909.08593 section 2.2
        error = min(max(float(sequence_kl.mean()) / options.kl_target - 1, -0.2), 0.2)
        state["kl_coef"] = coefficient * (1 + error * len(found.rewards) / options.kl_horizon)
    columns = {"advantages": credit.whiten(advantages, learnt), "returns": returns.where(learnt, found.values)}
    return columns, metrics
