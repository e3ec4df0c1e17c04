"""The recipe of a run: one tree of dataclasses, read from YAML and overridden by flags.

A setting that TRL 1.16 has bears its name and default (two defaults differ: `TRL_DIFFERS` in the tests).
A field's name is unique over the whole tree, so YAML may hold it at the top level or under its section, and its flag
bears no prefix.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_type_hints

from align_engine.errors import BadInput
from align_engine.fields import (
    Count,
    Field,
    Finite,
    Names,
    NotNegative,
    Part,
    Positive,
    Range,
    Share,
    field_of,
    numbers,
    parse,
)
from align_engine.secrets import masked

Rate = Annotated[float, Range("(0, 1e30]")]  # what AdamW makes of it fits into float32
REQUIRED = ("model_name_or_path", "dataset_name", "output_dir", "reward_funcs")
PATHS = {"model_name_or_path", "ref_model_name_or_path", "value_model_name_or_path", "dataset_name",
         "eval_dataset_name", "reward_funcs", "callbacks", "output_dir", "server_weights"}  # fmt: skip
MODELS = ("model_name_or_path", "ref_model_name_or_path", "value_model_name_or_path")
NOT_PART_OF_THE_RUN = ("output_dir", "overwrite", "report_to", "save_total_limit", "logging_steps", "save_steps",
                       "dataset_num_proc")  # fmt: skip


@dataclass_transform(field_specifiers=(field,))
class Section:
    """What derives from it is a dataclass."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(cls)


S = TypeVar("S", bound=Section)


class ModelSection(Section):
    """Model."""

    model_name_or_path: str = ""
    """Folder or hub name of the model to train; its tokenizer is taken from the same place."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Type of the weights in memory; `auto` keeps what the checkpoint says."""
    trust_remote_code: bool = False
    """Run the code that lies beside a model of another architecture than transformers has. Read it before."""
    attn_implementation: str | None = None
    """Attention of transformers: sdpa, eager, flash_attention_2, ... (None: transformers chooses)."""
    load_in_4bit: bool = False
    """Weights in 4 bits (NF4), through bitsandbytes: QLoRA, with use_peft."""
    load_in_8bit: bool = False
    """Weights in 8 bits, through bitsandbytes; with use_peft."""
    use_peft: bool = False
    """Train LoRA adapters instead of all the weights: fresh ones, or those of the folder model_name_or_path."""
    lora_r: Count = 16
    """Rank of the adapters."""
    lora_alpha: Count = 32
    """Scale of the adapters: the update is multiplied by lora_alpha / lora_r."""
    lora_dropout: Annotated[float, Range("[0, 1)")] = 0.05
    """Dropout inside the adapters (sft; the preference methods run without dropout)."""
    lora_target_modules: Annotated[list[str], Names("all-linear")] | None = None
    """Modules that get adapters, `lm_head` included if you like (None or `all-linear`: every linear layer but the
    head)."""


class DataSection(Section):
    """Data."""

    dataset_name: str = ""
    """A .jsonl or .parquet file, a folder written by `datasets`, or a hub name."""
    dataset_train_split: str = "train"
    """Split to train on, where the dataset has splits."""
    eval_dataset_name: str | None = None
    """Dataset to evaluate on (None: no evaluation, unless dataset_test_split is given)."""
    dataset_test_split: str | None = None
    """Split of the evaluation dataset (of dataset_name, when eval_dataset_name is not given)."""
    max_length: Annotated[int, Range("[2, inf)")] | None = 1024
    """Longest sequence in tokens, prompt and completion together (None: no limit)."""
    max_prompt_length: Count | None = None
    """Longest prompt in tokens (None: what max_length leaves)."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with rows over these limits. truncate: cut the prompt at its left, then the completion at its end."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that cannot be used (no `chosen`, chosen equal to rejected, an empty answer, ...)."""
    dataset_num_proc: Count | None = None
    """Processes that tokenise (None: one per core from 20,000 rows on)."""


class ReferenceFields(Section):
    """The model that a loss, or the KL term of a reward, is measured against."""

    reference: Literal["auto", "none", "frozen", "cpu-offload", "adapter-off", "adapter-copy", "precomputed", "ema"] = (
        "auto"
    )
    """Where the reference's log-probs come from. none: a uniform one. frozen: a second copy of the model, evaluated at
    every step. cpu-offload: the same, its layers in CPU memory until their turn. adapter-off: the model itself without
    its LoRA adapters. adapter-copy: the model with a copy of its adapters as they were before the first step.
    precomputed: one pass over the data before the first step, kept on disk beside the run; no second copy in memory.
    ema: a copy (of the adapters, with LoRA) that follows the model. auto: with LoRA adapter-off, or adapter-copy where
    training goes on with saved adapters; else precomputed."""
    ref_model_name_or_path: str | None = None
    """Reference model (None: the model as it is before the first step)."""


class LossReference(ReferenceFields):
    """Of every loss of fixed rows that has a reference."""

    ref_model_mixup_alpha: Part = 0.6
    """ema: the reference becomes alpha x model + (1 - alpha) x reference, arXiv:2404.09656 ..."""
    ref_model_sync_steps: Count = 512
    """... every so many steps."""
    beta: Positive = 0.1
    """Strength of the pull towards the reference: higher stays closer to it."""


class DpoLoss(LossReference):
    """Loss."""

    loss_type: str = "sigmoid"
    """Preference loss; `sigmoid` is DPO's. Several with commas between are summed: `sigmoid,sft`. The aot types sort
    the pairs of one forward pass, so with them 8 x 1 is not 1 x 8."""
    loss_weights: list[Finite] | None = None
    """Weight of each of several losses (None: 1)."""
    label_smoothing: Annotated[float, Range("[0, 0.5)")] = 0.0
    """Share of the preference labels taken to be flipped, in [0, 0.5)."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence from the reference that is limited."""
    f_alpha_divergence_coef: Finite = 0.5
    """Alpha of alpha_divergence."""
    use_weighting: bool = False
    """WPO: weigh each pair by how probable its answers are to the model."""


class SimpoLoss(Section):
    """Loss."""

    beta: Positive = 2.0
    """Factor on the difference of the mean log-probs."""
    simpo_gamma: NotNegative = 0.5
    """Margin that the chosen answer must have."""
    label_smoothing: Annotated[float, Range("[0, 0.5)")] = 0.0
    """Share of the preference labels taken to be flipped, in [0, 0.5)."""


class CpoLoss(SimpoLoss):
    """Loss."""

    loss_type: str = "sigmoid"
    """sigmoid, hinge, ipo, or simpo (the only one with simpo_gamma)."""
    beta: Positive = 0.1
    """Factor on the difference of the log-probs."""
    cpo_alpha: NotNegative = 1.0
    """Weight of the chosen answers' negative log-likelihood."""


class OrpoLoss(Section):
    """Loss."""

    beta: Positive = 0.1
    """Weight of the odds ratio beside the chosen answers' negative log-likelihood."""


class KtoLoss(LossReference):
    """Loss."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto, or the same with the reference point 0."""
    desirable_weight: NotNegative = 1.0
    """Weight of the desirable rows."""
    undesirable_weight: NotNegative = 1.0
    """Weight of the undesirable rows."""
    balance_classes: bool = False
    """Raise one of the weights so that desirable_weight x rows to undesirable_weight x rows lies in [1, 4/3]."""


class RmLoss(Section):
    """Loss."""

    center_rewards_coefficient: NotNegative = 0.0
    """Weight of (chosen + rejected)^2, which keeps the mean score near 0 (0.01 is usual)."""
    rank_margin: NotNegative = 0.0
    """Margin per step between the columns `chosen_rank` and `rejected_rank` (rank 1 is the best; 0: no margin). A
    column `margin` is used as it stands."""


class RolloutSection(Section):
    """Rollouts."""

    reward_funcs: list[str] = field(default_factory=list)
    """What scores completions: `module:function` or `file.py:function` (TRL's signature), the folder of a reward model,
    `http://...` of a scorer, or `human`: a file in the run's folder that people fill in."""
    reward_weights: list[Finite] | None = None
    """Factor of each of them (None: 1)."""
    num_generations: Count = 8
    """Completions of each prompt."""
    max_completion_length: Count = 512
    """Longest completion in tokens."""
    temperature: Positive = 1.0
    """Of sampling, and of the policy that is trained."""
    top_p: Part = 1.0
    """Sample from the likeliest tokens that hold this share of the probability (the loss sees all tokens)."""
    top_k: Annotated[int, Range("[0, inf)")] = 0
    """Sample from so many likeliest tokens (0: all)."""
    stop_strings: list[str] | None = None
    """Texts that end a completion; the token that completes one is its last."""
    steps_per_generation: Count | None = None
    """Forward passes that one rollout feeds, a multiple of gradient_accumulation_steps (None: one step's)."""
    per_device_generation_batch_size: Count = 64
    """Completions sampled at a time on one device."""
    use_transformers_continuous_batching: bool = False
    """Sample by transformers' continuous batching: rows that have ended leave the batch. It pays with a
    flash attn_implementation and completions of very different lengths. Not for models with layers of several kinds of
    attention, attn_logit_softcapping, or shards."""
    missing_eos_penalty: NotNegative | None = None
    """Taken off the reward of completions that were cut off."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss."""
    server_base_url: str | None = None
    """Sample from this OpenAI-compatible server, e.g. http://localhost:8000 (None: from the policy in this process)."""
    server_model: str | None = None
    """The model's name there (None: server_weights for `transformers serve`, else model_name_or_path)."""
    server_concurrency: Count = 64
    """Most requests under way at a time (1, on one process: `transformers serve` gives the same answers
    again)."""
    server_weights: str | None = None
    """Folder that the server (vLLM, `transformers serve`) reads its weights from: the policy is written there before
    each rollout."""


class KlReference(ReferenceFields):
    """Reference."""

    reference: Literal["auto", "frozen", "cpu-offload", "adapter-off", "adapter-copy"] = "auto"
    """Where the KL term's reference comes from. frozen: a second copy of the model. adapter-off: the model without its
    LoRA adapters. auto: adapter-off with LoRA, else frozen. None is loaded where the KL term's factor is 0."""


class RoundsSection(Section):
    """Rounds."""

    rounds: Count = 3
    """Rounds of sampling, scoring, pairing and training."""
    prompts_per_round: Count | None = None
    """Prompts of one round (None: all of them, every round)."""
    method: str = "dpo"
    """Algorithm that trains on the pairs: dpo or another that learns from preferences."""
    method_settings: list[str] = field(default_factory=list)
    """Its own settings as `name=value`: beta=0.1 loss_type=sigmoid label_smoothing=0.1 ..."""
    reference: Literal["initial", "previous"] = "initial"
    """Reference of every round. initial: the model that the first round starts from. previous: the model that the
    round itself starts from."""


class ClippedRatio(Section):
    """Of the losses that clip the ratio of a completion's probability to that when it was sampled."""

    num_iterations: Count = 1
    """Passes over each rollout."""
    epsilon: NotNegative = 0.2
    """How far below 1 the probability ratio may go before its gradient stops, and above, unless epsilon_high says (of
    gmpo: the log-ratio, below 0)."""
    epsilon_high: Positive | None = None
    """How far above 1 (None: epsilon)."""


class DirectLoss(ClippedRatio):
    """Loss."""

    baseline: Literal["leave_one_out", "batch_mean", "none"] = "leave_one_out"
    """What is taken off a reward. leave_one_out: the mean of the prompt's other completions (RLOO)."""
    beta: NotNegative = 0.05
    """Weight of the KL divergence from the reference in the reward."""
    normalize_advantages: bool = False
    """Divide the advantages by their spread over the rollout, after taking off their mean."""


class GrpoLoss(ClippedRatio):
    """Loss."""

    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "luspo", "cispo", "sapo", "vespo", "gmpo"] = "dapo"
    """How tokens are weighed and averaged (bnpo is dapo here: its batch is the whole step)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation divides the advantages."""
    beta: NotNegative = 0.0
    """Weight of the KL divergence from the reference (0: no reference is loaded)."""
    delta: Positive | None = None
    """Upper limit of the ratio for negative advantages too (None: none)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """One ratio for each token, or for each sequence (GSPO)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the KL term."""
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the ratio."""
    entropy_coef: NotNegative = 0.0
    """Weight of an entropy bonus (with a loss_type that is a mean over tokens)."""
    top_entropy_quantile: Part = 1.0
    """Learn from this share of the tokens of each forward pass, those of highest entropy."""
    off_policy_mask_threshold: NotNegative | None = None
    """Leave out completions of negative advantage that have become so much less likely than when sampled."""
    sapo_temperature_pos: Positive = 1.0
    """sapo's temperature where the advantage is positive."""
    sapo_temperature_neg: Positive = 1.05
    """And where it is not."""
    vespo_k_pos: NotNegative = 2.0
    """vespo's power where the advantage is not negative."""
    vespo_lambda_pos: NotNegative = 3.0
    """And its rate."""
    vespo_k_neg: NotNegative = 3.0
    """vespo's power where the advantage is negative."""
    vespo_lambda_neg: NotNegative = 2.0
    """And its rate."""
    vllm_importance_sampling_correction: bool = False
    """Correct for a sampler (of a server) whose log-probs are not quite the policy's."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """Per token or completion; ratios outside the limits are clipped (truncate) or left out (mask)."""
    vllm_importance_sampling_clip_min: NotNegative | None = None
    """Lower limit of that ratio."""
    vllm_importance_sampling_clip_max: Positive | None = 3.0
    """Upper limit of that ratio."""


class PpoLoss(Section):
    """Loss."""

    num_ppo_epochs: Count = 4
    """Passes over each rollout."""
    kl_coef: NotNegative = 0.05
    """Weight of the KL penalty in the reward of each token (0: no reference is loaded)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """k1: log pi - log ref. k3: never negative."""
    kl_target: Positive | None = None
    """KL divergence per completion that kl_coef is steered to (None: kl_coef stays)."""
    kl_horizon: Annotated[float, Range("[1, inf)")] = 10000.0
    """Completions in which kl_coef can about double or halve."""
    cliprange: Positive = 0.2
    """Largest change of a token's probability ratio that is rewarded."""
    dual_clip: Annotated[float, Range("(1, inf)")] | None = None
    """The loss of a token of negative advantage is at most this times it (None: unbounded)."""
    cliprange_value: Positive = 0.2
    """Largest change of a value in one rollout that is rewarded."""
    vf_coef: NotNegative = 0.1
    """Weight of the value loss."""
    gamma: Share = 1.0
    """Discount per token."""
    lam: Share = 0.95
    """Lambda of GAE."""
    whiten_rewards: bool = False
    """Divide the rewards by their spread over the rollout."""
    entropy_coef: NotNegative = 0.0
    """Weight of an entropy bonus."""
    value_model_name_or_path: str | None = None
    """Model that the critic starts from, e.g. the reward model (None: a linear head on the policy's hidden states)."""
    value_learning_rate: Rate = 1e-5
    """Highest learning rate of the critic, on the policy's schedule: it starts from less than the policy does."""


class TrainSection(Section):
    """Training."""

    learning_rate: Rate = 2e-5
    """Highest learning rate of AdamW."""
    per_device_train_batch_size: Count = 8
    """Rows (pairs, for dpo) in one forward pass on one device."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimiser step; 8 x 1 and 1 x 8 take the same step."""
    num_train_epochs: Positive = 3.0
    """Passes over the training data."""
    max_steps: Annotated[int, Range("[1, inf)", also=-1, meaning="for whole epochs")] = -1
    """Optimiser steps; overrides num_train_epochs where positive."""
    lr_scheduler_type: str = "linear"
    """Schedule of the learning rate, one of transformers': linear, cosine, constant_with_warmup, ..."""
    warmup_ratio: Share = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay (not on biases and norms)."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm (0: never)."""
    router_aux_loss_coef: NotNegative | None = None
    """Weight of a mixture of experts' load-balancing loss (None: what the model's config.json says; 0: none)."""
    bf16: bool | None = None
    """Compute in bfloat16 (None: on a GPU that can, not on a CPU)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: Annotated[int, Range("[0, 4294967295]")] = 42
    """Seed of the order of the rows, of new weights and of dropout."""


class EvalSection(Section):
    """Evaluation."""

    per_device_eval_batch_size: Count = 8
    """Rows in one forward pass of the evaluation."""
    eval_steps: Count | None = None
    """Evaluate every so many steps (None: at the end only)."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint of the best evaluation whatever save_total_limit says, and end with its weights."""
    metric_for_best_model: str | None = None
    """Metric of the evaluation that says which is best (None: loss), for load_best_model_at_end and early stopping."""
    greater_is_better: bool | None = None
    """Whether more of that metric is better (None: yes, unless its name ends in loss)."""
    early_stopping_patience: Count | None = None
    """Stop after so many evaluations without a better one (None: never)."""
    early_stopping_threshold: NotNegative = 0.0
    """By how much an evaluation must be better to count as one, for early stopping."""


class OutputSection(Section):
    """Output."""

    output_dir: str = ""
    """Folder of the run: metrics.jsonl, checkpoints, report.html, and the trained model in `final`. The same command
    with the same folder goes on where it stopped."""
    overwrite: bool = False
    """Delete the run that output_dir holds and start afresh."""
    logging_steps: Count = 10
    """Write metrics every so many steps."""
    save_steps: Count = 500
    """Write a checkpoint every so many steps."""
    save_total_limit: Count | None = None
    """Keep the latest so many checkpoints (None: all)."""
    report_to: Annotated[list[str], Names("none")] = field(default_factory=list)
    """Trackers of accelerate that get the metrics too: tensorboard, wandb, mlflow, ... (`none`: none)."""
    callbacks: list[str] = field(default_factory=list)
    """TrainerCallbacks of transformers by import path, `module:Class` or `file.py:Class`."""


class KernelSection(Section):
    """Kernels."""

    impl: str = "auto"
    """Backend of the fused loss: auto, eager, cpu, ... (see `align env`). One asked for by name never falls back."""
    workspace: Count | None = None
    """Bytes that the fused loss may use for logits at a time (None: the kernels decide)."""


class LimitSection(Section):
    """Limits on gradients."""

    grad_clamp: Positive | None = None
    """Largest |1 - p| or |0 - p| of a token of the vocabulary in the gradient of its logit (None: no limit)."""
    prob_gate: Annotated[float, Range("(0, 1)")] | None = None
    """Tokens of answers that are more probable than this are not trained on any further (None: all are)."""


class Recipe(Section):
    """What every algorithm has; those with settings of their own add a section `loss`."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    output: OutputSection = field(default_factory=OutputSection)
    kernels: KernelSection = field(default_factory=KernelSection)

    def section(self, kind: type[S]) -> S | None:
        """The section of a kind, where the recipe has one."""
        return next((section for section in vars(self).values() if isinstance(section, kind)), None)

    def models(self) -> dict[str, str]:
        """Paths of the models that the recipe names, by field."""
        return {name: path for name in MODELS if (path := flat(self).get(name))}


class LanguageRecipe(Recipe):
    """What the methods share whose loss is one of token probabilities."""

    limits: LimitSection = field(default_factory=LimitSection)


class SftRecipe(LanguageRecipe):
    """Supervised fine-tuning: maximise the log-probability of the completions."""


class GentleRecipe(LanguageRecipe):
    """What the methods share that go on from a model which answers already."""

    train: TrainSection = field(default_factory=lambda: TrainSection(learning_rate=1e-6))


class DpoRecipe(GentleRecipe):
    """Direct preference optimisation: raise the chosen completion above the rejected one, relative to a reference."""

    loss: DpoLoss = field(default_factory=DpoLoss)


class SimpoRecipe(GentleRecipe):
    """SimPO: raise the mean log-probability of the chosen completion above the rejected one's, by a margin."""

    loss: SimpoLoss = field(default_factory=SimpoLoss)


class OrpoRecipe(GentleRecipe):
    """ORPO: supervised fine-tuning on the chosen completions with an odds ratio against the rejected ones."""

    loss: OrpoLoss = field(default_factory=OrpoLoss)


class CpoRecipe(GentleRecipe):
    """Contrastive preference optimisation: DPO with a uniform reference, and the chosen completions' likelihood."""

    loss: CpoLoss = field(default_factory=CpoLoss)


class KtoRecipe(GentleRecipe):
    """Kahneman-Tversky optimisation: raise the answers marked desirable, lower the others, against a reference."""

    loss: KtoLoss = field(default_factory=KtoLoss)


class RmRecipe(Recipe):
    """Reward model: a score that is higher for the chosen completion than for the rejected one (Bradley-Terry)."""

    loss: RmLoss = field(default_factory=RmLoss)
    data: DataSection = field(default_factory=lambda: DataSection(overlong="drop"))
    train: TrainSection = field(default_factory=lambda: TrainSection(learning_rate=1e-4))


class OnlineRecipe(GentleRecipe):
    """What the methods share that learn from their own rollouts."""

    rollout: RolloutSection = field(default_factory=RolloutSection)
    kl: KlReference = field(default_factory=KlReference)

    @property
    def passes(self) -> int:
        """Times that each rollout is learnt from."""
        raise NotImplementedError


class ClippedRecipe(OnlineRecipe):
    """What the methods share that clip the ratio to the policy which sampled."""

    loss: ClippedRatio = field(default_factory=ClippedRatio)

    @property
    def passes(self) -> int:
        return self.loss.num_iterations


class DirectRecipe(ClippedRecipe):
    """Direct RL (REINFORCE, RLOO): raise the probability of completions by what people or programs say of them."""

    loss: DirectLoss = field(default_factory=DirectLoss)
    rollout: RolloutSection = field(default_factory=lambda: RolloutSection(num_generations=2))


class GrpoRecipe(ClippedRecipe):
    """Group-relative policy optimisation: completions are judged against the others of their prompt."""

    loss: GrpoLoss = field(default_factory=GrpoLoss)


class PpoRecipe(OnlineRecipe):
    """Proximal policy optimisation with a critic, a KL penalty and several passes over each rollout."""

    loss: PpoLoss = field(default_factory=PpoLoss)
    rollout: RolloutSection = field(default_factory=lambda: RolloutSection(num_generations=1, temperature=0.7))
    train: TrainSection = field(default_factory=lambda: TrainSection(learning_rate=3e-6))

    @property
    def passes(self) -> int:
        return self.loss.num_ppo_epochs


class IterateRecipe(LanguageRecipe):
    """Iterative preference optimisation: sample, score, pair the best answer with the worst, train on the pairs, again.

    The sections of training (learning_rate, num_train_epochs, ...) are those of one round.
    """

    rollout: RolloutSection = field(default_factory=RolloutSection)
    iteration: RoundsSection = field(default_factory=RoundsSection)
    train: TrainSection = field(default_factory=lambda: TrainSection(learning_rate=5e-7, num_train_epochs=1.0))


RECIPES: dict[str, type[Recipe]] = {
    "sft": SftRecipe, "rm": RmRecipe, "dpo": DpoRecipe, "simpo": SimpoRecipe, "orpo": OrpoRecipe, "cpo": CpoRecipe,
    "kto": KtoRecipe, "direct": DirectRecipe, "grpo": GrpoRecipe, "ppo": PpoRecipe, "iterate": IterateRecipe,
}  # fmt: skip
R = TypeVar("R", bound=Recipe)


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every field of the tree by its bare name."""
    sections = dataclasses.asdict(recipe).values()
    return {name: value for section in sections for name, value in section.items()}


def identity(recipe: Recipe) -> dict[str, Any]:
    """The fields that decide what a run computes: two runs that agree on them (and on data) end with equal weights.
    Secrets of addresses are masked."""
    return {name: masked(value) for name, value in flat(recipe).items() if name not in NOT_PART_OF_THE_RUN}


@functools.cache
def fields(kind: type[Recipe]) -> dict[str, tuple[str, Field]]:
    """Every field of a recipe class by its bare name: (its section's name, what it takes)."""
    return {
        name: (section, field_of(annotation))
        for section, value in vars(kind()).items()
        for name, annotation in get_type_hints(type(value), include_extras=True).items()
    }


def load(kind: type[R], path: str | Path) -> R:
    """Read a recipe from YAML.

    Every value is text until its field says what it is, as that of a flag is; nothing in it is expanded: `${...}` is
    text too.

    Args:
        kind: the algorithm's recipe class; fields that the file leaves out keep its defaults.
        path: file whose keys are field names, at the top level or under their section's name.
    Raises:
        BadInput: no such file, not YAML, an unknown key (with the nearest known one), a value of the wrong type.
    """
    import yaml

    from align_engine import yaml_text

    where = f"recipe {path}"
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), yaml_text.TextLoader)
    except OSError as error:
        raise BadInput(f"{where}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 (byte {error.object[error.start]:#x} at {error.start})") from error
    except RecursionError as error:
        raise BadInput(f"{where} is not readable YAML: it is nested too deep") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{where} is not readable YAML: {yaml_text.sentence(error)}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{where} holds no `name: value` lines")
    return typed(kind(), _into_sections(kind, content, where), where)


def typed(recipe: R, changes: dict[str, dict[str, Any]], where: str) -> R:
    """A recipe with `changes` (section -> field -> value), every field of it as its type has it.

    Raises:
        BadInput: naming every value that is not of its field's type, and `where` they stand.
    """
    known, wrong, sections = fields(type(recipe)), [], {}
    for section, default in vars(recipe).items():
        values = vars(default) | changes.get(section, {})
        for name, value in values.items():
            if name not in known or known[name][0] != section:
                there = [one for one, (at, _) in known.items() if at == section]
                raise BadInput(f"{where}: {unknown('key', str(name), there)}")
            try:
                values[name] = parse(known[name][1], value)
            except ValueError as error:
                wrong.append(f"{name} = {reprlib.repr(value)} {error}")
        sections[section] = values
    if wrong:
        raise BadInput(f"{where}: {'; '.join(wrong)}")
    made = {section: type(getattr(recipe, section))(**values) for section, values in sections.items()}
    return type(recipe)(**made)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence on a name that is not known, with the nearest one that is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown {what} `{name:.80}`" + (
        f"; did you mean `{close[0]}`?" if close else ": --help lists all there are"
    )


def _into_sections(kind: type[Recipe], content: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    known, sections = fields(kind), vars(kind())
    tree: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        is_section = key in sections
        if is_section and not isinstance(value or {}, dict):
            raise BadInput(f"{where}: `{key}` is a section: it takes `name: value` lines, not {reprlib.repr(value)}")
        for name, inner in (value or {}).items() if is_section else [(key, value)]:
            if name not in known:
                raise BadInput(f"{where}: {unknown('key', name, known)}")
            section = known[name][0]
            if is_section and section != key:
                raise BadInput(f"{where}: `{name}` belongs under `{section}`, not under `{key}`")
            if name in tree.setdefault(section, {}):
                raise BadInput(f"{where}: `{name}` stands at the top and under `{section}`; leave one of them out")
            tree[section][name] = inner
    return tree


def save(recipe: Recipe, path: str | Path) -> None:
    """Write the whole recipe, defaults included, as YAML that `load` reads. Secrets of addresses are masked."""
    import yaml

    content = masked(dataclasses.asdict(recipe))
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "utf-8")


def check(recipe: R) -> R:
    """Refuse values that no run can use, all of them in one message.

    Returns:
        the recipe with every value as its field's type has it, and a home in place of each `~`.
    Raises:
        BadInput: naming each value and what it must be.
    """
    recipe = typed(recipe, {}, "recipe")
    for section in vars(recipe).values():
        for name in PATHS & vars(section).keys():
            if value := getattr(section, name):
                home = list(map(os.path.expanduser, value)) if isinstance(value, list) else os.path.expanduser(value)
                setattr(section, name, home)
    values = flat(recipe)
    broken = [f"{name} = {values[name]!r} is required" for name in REQUIRED if not values.get(name, True)]
    for name, (_, taken) in fields(type(recipe)).items():
        if taken.range is not None and any(number not in taken.range for number in numbers(values[name])):
            broken.append(f"{name} = {values[name]!r} {taken.range}")
    broken += [f"{name} = {values[name]!r} {text}" for name, text in _conflicts(recipe, values)]
    if broken:
        raise BadInput("; ".join(broken))
    return recipe


def _conflicts(recipe: Recipe, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields that do not go with others: (name, what it must be or needs)."""
    get, peft = values.get, values["use_peft"]
    room, most = values["max_prompt_length"], values["max_length"]
    if room and most and room >= most:
        yield "max_prompt_length", f"must leave room for a completion: below max_length = {most}"
    evaluation = values["eval_dataset_name"] or values["dataset_test_split"]
    if evaluation and get("reward_funcs") == ["human"]:
        yield "eval_dataset_name" if values["eval_dataset_name"] else "dataset_test_split", "needs a scorer, not people"
    if values["eval_steps"] and not evaluation:
        yield "eval_steps", "needs eval_dataset_name or dataset_test_split"
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if values[name] and not (values["eval_steps"] and evaluation):
            yield name, "needs eval_steps and an evaluation dataset"
    for name in ("load_in_4bit", "load_in_8bit"):
        if values[name] and not peft:
            yield name, "needs --use_peft: such weights cannot be trained"
    if values["load_in_4bit"] and values["load_in_8bit"]:
        yield "load_in_8bit", "does not go with load_in_4bit = True: choose one of them"
    yield from _reference_conflicts(values)
    if recipe.section(RolloutSection) is not None:
        yield from _rollout_conflicts(values)
    if get("loss_type") in ("grpo", "dr_grpo", "luspo", "sapo", "gmpo") and get("entropy_coef"):
        yield "entropy_coef", f"needs a loss_type that counts tokens, and {get('loss_type')} does not"
    if get("loss_type") == "cispo" and get("epsilon_high") is None:
        yield "epsilon_high", "is the limit of cispo's ratio: give it (5.0 is usual)"
    low, high = get("vllm_importance_sampling_clip_min"), get("vllm_importance_sampling_clip_max")
    if low is not None and high is not None and low >= high:
        yield "vllm_importance_sampling_clip_min", f"must be below vllm_importance_sampling_clip_max = {high}"
    if get("kl_target") and not get("kl_coef"):
        yield "kl_target", "needs kl_coef above 0, which it steers"
    if get("desirable_weight") == 0 and get("undesirable_weight") == 0:
        yield "desirable_weight", "and undesirable_weight are both 0: no row would count"


def _reference_conflicts(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kind, path = values.get("reference", "auto"), values.get("ref_model_name_or_path")
    if kind.startswith("adapter") and not values["use_peft"]:
        yield "reference", "needs --use_peft: there are no adapters"
    if path and kind in ("none", "ema", "adapter-off", "adapter-copy"):
        yield "ref_model_name_or_path", f"is another reference than reference = {kind!r}: leave one of them out"
    weight = "kl_coef" if "kl_coef" in values else "beta"
    if path and values.get(weight) == 0:
        yield "ref_model_name_or_path", f"is not read where {weight} = 0: leave it out, or raise {weight}"


def _rollout_conflicts(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    scorers, weights = values["reward_funcs"], values["reward_weights"]
    if len(scorers) > 1 and "human" in scorers:
        yield "reward_funcs", "takes 'human' alone, without other scorers"
    if len(set(scorers)) < len(scorers):
        yield "reward_funcs", "names a scorer twice: give it one of the reward_weights"
    if weights is not None and len(weights) != len(scorers):
        yield "reward_weights", f"must be {len(scorers)} numbers, as many as reward_funcs"
    for name in ("server_weights", "server_model"):
        if values[name] and not values["server_base_url"]:
            yield name, "needs server_base_url"
    if values["server_weights"] and values["use_peft"]:
        yield "server_weights", "needs use_peft: false"
    passes, accumulation = values["steps_per_generation"], values["gradient_accumulation_steps"]
    if passes and accumulation >= 1 and passes % accumulation:
        yield "steps_per_generation", f"must be a multiple of gradient_accumulation_steps = {accumulation}"
    if values[paged := "use_transformers_continuous_batching"]:
        for name, unset in {"top_p": 1.0, "top_k": 0, "stop_strings": None, "server_base_url": None}.items():
            if values[name] != unset:
                yield name, f"must be {unset} with {paged}"
