"""The legend of all curves: what each metric that a run writes means, and which way it should go.

One place for pages, tables and docs. A `*` stands for what a scorer, a phase or a quantile is called; the metrics of an
evaluation, `eval_...`, are those of the same name over held-out rows.
"""

from __future__ import annotations

import fnmatch
from typing import Literal, NamedTuple

Way = Literal["up", "down", "steady", "any"]
WORDS: dict[Way, str] = {
    "up": "should rise",
    "down": "should fall",
    "steady": "should stay in bounds",
    "any": "has no good direction of its own",
}
HELD_OUT = "eval_"


class Line(NamedTuple):
    """What is said of a metric."""

    means: str
    way: Way
    look: str = ""  # what an odd course of it says

    @property
    def should(self) -> str:
        """Which way it should go, as a sentence."""
        return WORDS[self.way].capitalize() + "." + f" {self.look}" * bool(self.look)


LEGEND: dict[str, Line] = {
    # of every method
    "loss": Line("What the optimiser makes smaller, a mean over the steps since the last line", "down",
                 "Its height says little across methods."),
    "grad_norm": Line("Length of the gradient before it is clipped to max_grad_norm", "steady",
                      "Jumps come from broken rows or too high a learning rate."),
    "learning_rate": Line("What the schedule gives the optimiser", "any"),
    "epoch": Line("Passes over the training data, or over the prompts, so far", "up"),
    "num_tokens": Line("Tokens read so far, prompts included", "up"),
    "tokens_per_second": Line("Tokens read per second, the time of sampling and evaluation included", "steady"),
    "peak_memory_mib": Line("Most memory used so far, in MiB: allocated on a GPU, resident on a CPU", "steady"),
    "time/*": Line("Share of the time that a phase takes: data, forward_backward, step, generate, score, measure, "
                   "eval, save", "any"),
    "entropy": Line("Mean entropy of the next token's distribution over the answers, in nats", "steady",
                    "Towards 0 the model says one thing only and explores no more; a steep rise is noise."),
    "mean_token_accuracy": Line("Share of the answers' tokens that are the model's likeliest choice", "up"),
    "aux_loss": Line("Load-balancing loss of a mixture of experts", "steady",
                     "A rise says that few experts get all tokens."),
    # of pairs and marks
    "rewards/chosen": Line("Mean implicit reward of the chosen or good answers: beta times how much more probable they "
                           "are than under the reference (simpo, orpo, cpo: beta times their log-probability)", "up",
                           "Below 0 and falling: good answers become rarer too, only more slowly than bad ones."),
    "rewards/rejected": Line("Mean implicit reward of the rejected or bad answers", "down"),
    "rewards/margins": Line("Reward of the chosen less that of the rejected answers", "up",
                            "Past some 10 to 20 the pairs have no more to teach: stop earlier, or raise beta."),
    "rewards/accuracies": Line("Share of the pairs whose chosen answer has the higher reward", "up",
                               "0.5 is chance; 1.0 early on says that the pairs are told apart by something simple."),
    "logps/chosen": Line("Mean log-probability of the chosen or good answers, a sum over their tokens", "steady",
                         "A steady fall says that good answers become rarer: raise beta, or lower learning_rate."),
    "logps/rejected": Line("Mean log-probability of the rejected or bad answers, a sum over their tokens", "down"),
    "logits/chosen": Line("Mean logit over vocabulary and tokens of the chosen or good answers", "any"),
    "logits/rejected": Line("Mean logit over vocabulary and tokens of the rejected or bad answers", "any"),
    "nll_loss": Line("Cross-entropy of the chosen answers, a mean over tokens", "down"),
    "log_odds_chosen": Line("Log of the odds of the chosen answer over those of the rejected one", "up"),
    "log_odds_ratio": Line("Log-sigmoid of log_odds_chosen: the part of ORPO's loss that orders the pair", "up"),
    # of a reward model
    "accuracy": Line("Share of the pairs whose chosen answer gets the higher score", "up",
                     "0.5 is chance; far above the held-out one it learns the pairs by heart."),
    "margin": Line("Score of the chosen less that of the rejected answer", "up"),
    "mean_reward": Line("Mean score of all answers", "steady", "It drifts unless center_rewards_coefficient holds it."),
    # of sampled answers
    "reward": Line("Mean reward of the sampled completions, all scorers weighed together", "up",
                   "Read it beside eval_reward, samples and length: what rises may be the scorer's weakness."),
    "reward_std": Line("Standard deviation of the rewards over a rollout", "steady",
                       "At 0 all completions are judged alike and nothing is learnt."),
    "frac_reward_zero_std": Line("Share of the prompts whose completions all have the same reward", "down",
                                 "Near 1 the prompts are too easy, too hard, or the policy says one thing only."),
    "rewards/*/mean": Line("What one scorer says of the completions, on average", "up"),
    "rewards/*/std": Line("Standard deviation of what one scorer says", "steady"),
    "kl": Line("KL divergence from the reference: of grpo per token, of rloo per completion; of kto the baseline that "
               "rewards are compared with", "steady",
               "Slowly up is learning; a run-away says that the policy leaves the reference: raise beta."),
    "kl_coef": Line("Weight of PPO's KL penalty", "any", "With a kl_target it moves until the divergence is there."),
    "completions/mean_length": Line("Mean length of the completions in tokens", "steady",
                                    "Up with the reward may be padding that the scorer likes."),
    "completions/min_length": Line("Length of the shortest completion", "any"),
    "completions/max_length": Line("Length of the longest completion", "any"),
    "completions/clipped_ratio": Line("Share of the completions cut off at max_completion_length", "down"),
    "completions/mean_terminated_length": Line("Mean length of the completions that ended by themselves", "steady"),
    "completions/min_terminated_length": Line("Length of the shortest completion that ended by itself", "any"),
    "completions/max_terminated_length": Line("Length of the longest completion that ended by itself", "any"),
    "dynamic_sample/prompts": Line("Prompts asked in others' place, as those had no spread of rewards", "any"),
    "dynamic_sample/left": Line("Prompts without a spread of rewards that stayed in the rollout", "down"),
    "clip_ratio/low_mean": Line("Share of the tokens (rloo: completions) whose ratio fell below 1 - epsilon", "steady"),
    "clip_ratio/high_mean": Line("Share of the tokens (rloo: completions) whose ratio rose above 1 + epsilon_high",
                                 "steady"),
    "clip_ratio/region_mean": Line("Share of the tokens (rloo: completions) outside these limits: they teach no more",
                                   "steady",
                                   "Up to some 0.2 is usual; near 1 the policy has left the one that sampled."),
    "cispo_clip_ratio": Line("Share of the tokens whose ratio is cut at epsilon_high", "steady"),
    "vespo/phi_seq_mean": Line("Mean weight that vespo gives a completion", "steady"),
    "ratio/*": Line("Probability under the policy over that under the one that sampled, unclipped: least, mean, "
                    "largest and quantiles", "steady", "Near 1."),
    "sampling/importance_sampling_ratio/clipped": Line("Share of the ratios outside the correction's limits", "steady"),
    "sampling/importance_sampling_ratio/*": Line("Probability under the policy over what the sampler says of the same "
                                                 "weights: least, mean, largest and quantiles", "steady", "Near 1."),
    "sampling/sampling_logp_difference/mean": Line("Mean distance of the sampler's log-probs from the policy's", "down",
                                                   "Above 0.1 it has other weights, temperature or precision."),
    # of ppo
    "loss/policy_avg": Line("PPO's clipped surrogate, the policy's part of the loss", "any"),
    "loss/value_avg": Line("Squared error of the critic", "down"),
    "policy/approxkl_avg": Line("Half the squared log-ratio to the policy that sampled", "steady"),
    "policy/clipfrac_avg": Line("Share of the tokens whose ratio is clipped", "steady",
                                "Near 1 the policy has left the one that sampled."),
    "val/ratio": Line("Mean ratio to the policy that sampled", "steady", "Near 1."),
    "val/clipfrac_avg": Line("Share of the tokens whose change of value is clipped", "steady"),
    "objective/kl": Line("KL divergence of a completion from the reference", "steady",
                         "Slowly up is learning; a run-away: raise kl_coef, or give a kl_target."),
    "objective/entropy": Line("Negative log-probability of a completion: a sum over its tokens", "steady"),
    "objective/scores": Line("Mean reward of the completions before the KL penalty", "up"),
    "objective/non_score_reward": Line("The KL penalty in the reward of a completion", "steady"),
    "objective/rlhf_reward": Line("Reward less KL penalty: what PPO raises", "up"),
    # of iterate's rounds
    "pairs": Line("Pairs that a round trains on: prompts whose completions do not tie", "any"),
    "frac_tied": Line("Share of a round's prompts whose completions tie: they give no pair", "down"),
}  # fmt: skip

OF_METHOD: dict[str, dict[str, Line]] = {  # where a name means something else
    **{
        name: {
            "loss": Line(
                "What the optimiser makes smaller: its gradient raises the reward",
                "any",
                "Its height says nothing about quality: read the reward.",
            )
        }
        for name in ("rloo", "grpo", "ppo")
    },
    "rm": {
        "rewards/chosen": Line("Mean score of the chosen answers", "up"),
        "rewards/rejected": Line("Mean score of the rejected answers", "down"),
        "rewards/margins": Line("Score of the chosen less that of the rejected answers", "up"),
    },
    "iterate": {
        "rewards/chosen": Line("Mean reward of each prompt's best completion", "up"),
        "rewards/rejected": Line("Mean reward of each prompt's worst completion", "up"),
    },
}


def line(name: str, method: str = "") -> Line | None:
    """What is said of a metric; None of one that is none of the engine's: a callback's, or a plugin's.

    Args:
        name: as metrics.jsonl has it.
        method: the command whose run wrote it. Default "": any.
    """
    if name.startswith(HELD_OUT):
        found = line(name.removeprefix(HELD_OUT), method)
        return found and found._replace(means=f"On held-out rows: {found.means[0].lower()}{found.means[1:]}")
    for table in (OF_METHOD.get(method, {}), LEGEND):
        if name in table:
            return table[name]
    return next((LEGEND[key] for key in LEGEND if "*" in key and fnmatch.fnmatchcase(name, key)), None)


def markdown() -> str:
    """The legend as a table of Markdown, for the docs."""
    rows = [f"| `{name}` | {one.means} | {one.should} |" for name, one in LEGEND.items()]
    rows += [f"| `{name}` of {method} | {one.means} | {one.should} |"
             for method, table in OF_METHOD.items() for name, one in table.items()]  # fmt: skip
    return "\n".join(["| metric | what it is | which way |", "|---|---|---|", *rows])
