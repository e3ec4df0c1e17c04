"""Proximal policy optimisation, with a critic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from align_engine.algorithms.common import tokens, with_ratios
from align_engine.data.batches import IGNORE, Batch, collate_rollouts
from align_engine.integrations import hook
from align_engine.models.score_head import ValueHead, load_scalar_model
from align_engine.recipe import PpoRecipe
from align_engine.rollouts.advantages import Experience, gae, token_rewards, whiten
from align_engine.training.algorithm import Algorithm, Columns, keywords
from align_engine.training.metrics import with_means
from align_kernels import LossOutput, ppo_clip_loss, value_loss
from align_kernels.losses.kl import KL_ESTIMATORS


def ppo(
    hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: PpoRecipe, num_items: float, values: Tensor
) -> LossOutput:
    """The clipped surrogate, and vf_coef times the clipped value loss."""
    assert batch.values is not None and batch.returns is not None
    count, mask = batch.num_tokens, batch.targets != IGNORE
    policy = ppo_clip_loss(hidden, **keywords(ppo_clip_loss, head, batch, recipe, num_items))
    clip = recipe.loss.cliprange_value
    value = value_loss(values, batch.values, batch.returns, mask, cliprange_value=clip, num_items=num_items)
    parts = {"loss/policy_avg": policy.loss, "loss/value_avg": value.loss}
    means = {name: loss.detach() * num_items / max(count, 1) for name, loss in parts.items()}
    out = policy._replace(metrics=policy.metrics | value.metrics, counts=policy.counts | value.counts)
    out = with_ratios(with_means(out, means, count), batch, policy.logps)
    return out._replace(loss=policy.loss + recipe.loss.vf_coef * value.loss)


def advantages(found: Experience, recipe: PpoRecipe, state: dict[str, Any]) -> tuple[Columns, dict[str, Any]]:
    """GAE over rewards with the KL penalty in them; a KL controller keeps its coefficient in `state`."""
    assert found.old_logps is not None and found.values is not None
    options, mask = recipe.loss, found.mask
    coefficient = state.setdefault("kl_coef", options.kl_coef)
    kl = torch.zeros_like(found.old_logps)
    if found.ref_logps is not None:
        kl = KL_ESTIMATORS[options.kl_estimator](found.old_logps, found.ref_logps).where(mask, 0.0)
    scored = ~found.rewards.isnan()
    rewards = token_rewards(found.rewards.nan_to_num(0.0).float(), kl, mask, coefficient)
    learnt = mask & scored[:, None]
    if options.whiten_rewards:
        rewards = whiten(rewards, learnt, shift_mean=False)
    each, returns = gae(rewards, found.values, mask, options.gamma, options.lam)
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
    columns = {"advantages": whiten(each, learnt), "returns": returns.where(learnt, found.values)}
    return columns, metrics


def add_critic(model: Any, recipe: PpoRecipe, pad_id: int) -> None:
    """Give a model its value head."""
    path, causal = recipe.loss.value_model_name_or_path, hook.causal_model(model)
    section = replace(recipe.model, model_revision=recipe.revision("value_model_name_or_path"))
    critic = load_scalar_model(path, section, pad_id) if path else None
    size = causal.config.get_text_config().hidden_size
    causal.value_head = ValueHead(size, critic, learning_rate=recipe.loss.value_learning_rate)


PPO = Algorithm(
    "ppo", "prompt", collate_rollouts, tokens, ppo, refers=lambda recipe: recipe.loss.kl_coef > 0,
    advantages=advantages, extend_model=add_critic,
)  # fmt: skip
