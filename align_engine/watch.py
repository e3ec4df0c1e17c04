"""Warnings that matter: each is said once in a run, with the number that set it off."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    """When a metric's value means trouble."""

    metric: str
    broken: Callable[[float, float], bool]  # (first logged value, present value) -> trouble
    advice: str  # with {first} and {now}


RULES: list[Rule] = [
    Rule(
        "logps/chosen",
        lambda first, now: now < first - max(0.2 * abs(first), 1.0),
        "the chosen answers' log-probability fell from {first:.4g} to {now:.4g}: the loss widens the margin by making "
        "good answers rarer too. Raise beta, lower learning_rate, or take a loss that holds them up",
    ),
    Rule(
        "rewards/margins",
        lambda first, now: now > 20,
        "the margin of the rewards has run to {now:.4g}: the pairs have no more to teach. Stop earlier, lower "
        "learning_rate, or raise beta",
    ),
    Rule(
        "kl",
        lambda first, now: now > 50,
        "the KL divergence from the reference has run to {now:.4g} (at first {first:.4g}). Lower learning_rate or "
        "raise beta",
    ),
    Rule(
        "objective/kl",
        lambda first, now: now > 50,
        "the KL divergence of a completion from the reference has run to {now:.4g} (at first {first:.4g}). Lower "
        "learning_rate, raise kl_coef, or give a kl_target",
    ),
    Rule(
        "reward_std",
        lambda first, now: now < 1e-6,
        "all completions have the same reward: there is nothing to learn from. Look at the scorer, raise temperature, "
        "or take prompts of another difficulty",
    ),
    Rule(
        "frac_reward_zero_std",
        lambda first, now: now > 0.95,
        "in {now:.0%} of the groups all completions have the same reward, so that they teach nothing. Raise "
        "temperature or num_generations, or take prompts of another difficulty",
    ),
    *(
        Rule(
            metric,
            lambda first, now: now > 0.9,
            "{now:.0%} of the tokens are clipped: the policy has left the one that sampled. Lower learning_rate, or "
            "make fewer passes over a rollout",
        )
        for metric in ("clip_ratio/region_mean", "policy/clipfrac_avg")
    ),
    Rule(
        "completions/clipped_ratio",
        lambda first, now: now > 0.9,
        "{now:.0%} of the completions are cut off at max_completion_length. Raise it, or set missing_eos_penalty",
    ),
    Rule(
        "sampling/sampling_logp_difference/mean",
        lambda first, now: now > 0.1,
        "the sampler's log-probs differ from the policy's by {now:.4g} on average: it has other weights, another "
        "temperature or another precision. Set vllm_importance_sampling_correction, or mend the server",
    ),
]


def warnings(watched: dict[str, float], said: list[str], means: dict[str, float]) -> list[str]:
    """What is to be said about newly logged means.

    Args:
        watched: first logged value of each metric; filled here.
        said: metrics that were complained about; filled here.
        means: metric -> value.
    """
    found = []
    for rule in RULES:
        if rule.metric in means and rule.metric not in said:
            now = means[rule.metric]
            first = watched.setdefault(rule.metric, now)
            if rule.broken(first, now):
                said.append(rule.metric)
                found.append(f"{rule.metric}: {rule.advice.format(first=first, now=now)}")
    return found
