"""Warnings that matter: each is said once in a run, with the number that set it off.

Means over other rows differ whatever the training does. So a metric that is judged by how far it has moved is compared
over the same rows only: with what the reference gives them, where that is the model that training starts from; else
with the first epoch, after each later one, and with the first evaluation, after each later one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from align_engine.models.modelfiles import adapter_base
from align_engine.recipe import LossReference, Recipe
from align_engine.training.metrics import Sums

if TYPE_CHECKING:
    from align_engine.training.engine import Progress

Trouble = Callable[[float, float], bool]  # (first value, present value) -> whether something is wrong
MOVING = ("logps/chosen", "rewards/margins")  # metrics of fixed rows that are judged by how far they have moved
OF_PAIRS = (*MOVING, "rewards/chosen", "rewards/rejected")  # and what a margin is made of
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
    "rewards/margins": (lambda first, now: now > max(20, 2 * first),
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


def warnings(watched: dict[str, float], said: list[str], means: Mapping[str, float]) -> list[str]:
    """What is to be said about new means.

    Args:
        watched: first value of each metric; filled here.
        said: metrics that were complained about; filled here.
        means: metric -> value; those of MOVING over the same rows as `watched`.
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


def reference_beta(recipe: Recipe) -> float | None:
    """`beta` of a recipe of fixed rows whose reference is the model as it is before the first step; else None."""
    loss = recipe.section(LossReference)
    if loss is None or loss.reference == "none" or loss.ref_model_name_or_path is not None:
        return None
    saved_adapters = adapter_base(recipe.model.model_name_or_path, recipe.model.model_revision) is not None
    return None if loss.reference == "adapter-off" and saved_adapters else loss.beta


class Health:
    """The warnings of a run; what they compare with is kept in `progress.watched`, by the rows that it is of.

    Args:
        recipe: says what the reference is.
        progress: of the engine; saved with its checkpoints.
    """

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        self.beta, self.progress = reference_beta(recipe), progress

    def step(self, sums: Sums) -> None:
        """Add the sums of a step to those of the epoch."""
        epoch = Sums(self.progress.watched.get("epoch so far"))
        epoch.merge(Sums({name: pair for name, pair in sums.totals.items() if name in OF_PAIRS}))
        self.progress.watched["epoch so far"] = epoch.totals

    def epoch(self) -> list[str]:
        """What is to be said at the end of an epoch, about all of its rows."""
        return self._compare("epoch", Sums(self.progress.watched.pop("epoch so far", None)).means())

    def evaluation(self, found: Mapping[str, float]) -> list[str]:
        """What is to be said about an evaluation."""
        return self._compare("evaluation", {name.removeprefix("eval_"): value for name, value in found.items()})

    def _compare(self, rows: str, means: Mapping[str, float]) -> list[str]:
        moving = {name: means[name] for name in MOVING if name in means}
        return warnings(self.progress.watched.setdefault(rows, {}), self.progress.said, moving)

    def log(self, means: Mapping[str, float]) -> list[str]:
        """What is to be said about the means of the steps since the last call."""
        others = {name: value for name, value in means.items() if name not in MOVING}
        found = warnings(self.progress.watched.setdefault("steps", {}), self.progress.said, others)
        if self.beta is not None and means.keys() >= {"logps/chosen", "rewards/chosen"}:
            moved = means["rewards/chosen"] / self.beta  # log-probability now less that under the reference
            before = {"logps/chosen": means["logps/chosen"] - moved, "rewards/margins": 0.0}
            found += warnings(before, self.progress.said, {name: means[name] for name in MOVING if name in means})
        return found
