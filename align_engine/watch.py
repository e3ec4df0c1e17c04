"""Warnings that matter: each is said once in a run, with the number that set it off."""

from __future__ import annotations

from collections.abc import Callable

Trouble = Callable[[float, float], bool]  # (first logged value, present value) -> whether something is wrong
CLIPPED = (
    "{now:.0%} of the tokens are clipped: the policy has left the one that sampled. Lower learning_rate, or make fewer "
    "passes over a rollout"
)


def above(limit: float) -> Trouble:
    """Trouble is a value above a limit."""
    return lambda first, now: now > limit


RULES: dict[str, tuple[Trouble, str]] = {  # of a metric: what is trouble, and the advice, with {first} and {now}
    "logps/chosen": (lambda first, now: now < first - max(0.2 * abs(first), 1.0),
        "the chosen answers' log-probability fell from {first:.4g} to {now:.4g}: the loss widens the margin by making "
        "good answers rarer too. Raise beta, lower learning_rate, or take a loss that holds them up"),
    "rewards/margins": (above(20),
        "the margin of the rewards has run to {now:.4g}: the pairs have no more to teach. Stop earlier, lower "
        "learning_rate, or raise beta"),
    "kl": (above(50),
        "the KL divergence from the reference has run to {now:.4g} (at first {first:.4g}). Lower learning_rate or "
        "raise beta"),
    "objective/kl": (above(50),
        "the KL divergence of a completion from the reference has run to {now:.4g} (at first {first:.4g}). Lower "
        "learning_rate, raise kl_coef, or give a kl_target"),
    "reward_std": (lambda first, now: now < 1e-6,
        "all completions have the same reward: there is nothing to learn from. Look at the scorer, raise temperature, "
        "or take prompts of another difficulty"),
    "frac_reward_zero_std": (above(0.95),
        "in {now:.0%} of the groups all completions have the same reward, so that they teach nothing. Raise "
        "temperature or num_generations, or take prompts of another difficulty"),
    "clip_ratio/region_mean": (above(0.9), CLIPPED),
    "policy/clipfrac_avg": (above(0.9), CLIPPED),
    "completions/clipped_ratio": (above(0.9),
        "{now:.0%} of the completions are cut off at max_completion_length. Raise it, or set missing_eos_penalty"),
    "sampling/sampling_logp_difference/mean": (above(0.1),
        "the sampler's log-probs differ from the policy's by {now:.4g} on average: it has other weights, another "
        "temperature or another precision. Set vllm_importance_sampling_correction, or mend the server"),
}  # fmt: skip


def warnings(watched: dict[str, float], said: list[str], means: dict[str, float]) -> list[str]:
    """What is to be said about newly logged means.

    Args:
        watched: first logged value of each metric; filled here.
        said: metrics that were complained about; filled here.
        means: metric -> value.
    """
    found = []
    for metric, (trouble, advice) in RULES.items():
        if metric in means and metric not in said:
            now = means[metric]
            first = watched.setdefault(metric, now)
            if trouble(first, now):
                said.append(metric)
                found.append(f"{metric}: {advice.format(first=first, now=now)}")
    return found
