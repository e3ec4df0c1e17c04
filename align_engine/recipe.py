"""The recipe of a run: one tree of dataclasses, read from YAML and overridden by flags.

A setting that TRL 1.16 has bears its name and default (two defaults differ: `TRL_DIFFERS` in the tests).
A field's name is unique over the whole tree, so YAML may hold it at the top level or under its section, and its flag
bears no prefix.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar, dataclass_transform

from align_engine.errors import BadInput

REQUIRED = ("model_name_or_path", "dataset_name", "output_dir")
EVALUATED = "needs eval_steps and an evaluation dataset"
NOT_PART_OF_THE_RUN = ("output_dir", "overwrite", "report_to", "save_total_limit", "logging_steps", "save_steps",
                       "dataset_num_proc")  # fmt: skip


@dataclass_transform(field_specifiers=(field,))
class Section:
    """What derives from it is a dataclass."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(cls)


class ModelSection(Section):
    """Model."""

    model_name_or_path: str = ""
    """Folder or hub name of the model to train; its tokenizer is taken from the same place."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Type of the weights in memory; `auto` keeps what the checkpoint says."""
    attn_implementation: str | None = None
    """Attention of transformers: sdpa, eager, flash_attention_2, ... (None: transformers chooses)."""
    load_in_4bit: bool = False
    """Weights in 4 bits (NF4), through bitsandbytes: QLoRA, with use_peft."""
    load_in_8bit: bool = False
    """Weights in 8 bits, through bitsandbytes; with use_peft."""
    use_peft: bool = False
    """Train LoRA adapters instead of all the weights: fresh ones, or those of the folder model_name_or_path."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """Scale of the adapters: the update is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Dropout inside the adapters (sft; the preference methods run without dropout)."""
    lora_target_modules: list[str] | None = None
    """Modules that get adapters, `lm_head` included if you like (None: every linear layer but the head)."""


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
    max_length: int = 1024
    """Longest sequence in tokens, prompt and completion together."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens (None: what max_length leaves)."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with rows over these limits. truncate: cut the prompt at its left, then the completion at its end."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that cannot be used (no `chosen`, chosen equal to rejected, an empty answer, ...)."""
    dataset_num_proc: int | None = None
    """Processes that tokenise."""


class ReferenceFields(Section):
    """Of every loss that has a reference."""

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
    ref_model_mixup_alpha: float = 0.6
    """ema: the reference becomes alpha x model + (1 - alpha) x reference, arXiv:2404.09656 ..."""
    ref_model_sync_steps: int = 512
    """... every so many steps."""
    beta: float = 0.1
    """Strength of the pull towards the reference: higher stays closer to it."""


class DpoLoss(ReferenceFields):
    """Loss."""

    loss_type: str = "sigmoid"
    """Preference loss; `sigmoid` is DPO's. Several with commas between are summed: `sigmoid,sft`. The aot types sort
    the pairs of one forward pass, so with them 8 x 1 is not 1 x 8."""
    loss_weights: list[float] | None = None
    """Weight of each of several losses (None: 1)."""
    label_smoothing: float = 0.0
    """Share of the preference labels taken to be flipped, in [0, 0.5)."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence from the reference that is limited."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence."""
    use_weighting: bool = False
    """WPO: weigh each pair by how probable its answers are to the model."""


class SimpoLoss(Section):
    """Loss."""

    beta: float = 2.0
    """Factor on the difference of the mean log-probs."""
    simpo_gamma: float = 0.5
    """Margin that the chosen answer must have."""
    label_smoothing: float = 0.0
    """Share of the preference labels taken to be flipped, in [0, 0.5)."""


class CpoLoss(SimpoLoss):
    """Loss."""

    loss_type: str = "sigmoid"
    """sigmoid, hinge, ipo, or simpo (the only one with simpo_gamma)."""
    beta: float = 0.1
    """Factor on the difference of the log-probs."""
    cpo_alpha: float = 1.0
    """Weight of the chosen answers' negative log-likelihood."""


class OrpoLoss(Section):
    """Loss."""

    beta: float = 0.1
    """Weight of the odds ratio beside the chosen answers' negative log-likelihood."""


class KtoLoss(ReferenceFields):
    """Loss."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto, or the same with the reference point 0."""
    desirable_weight: float = 1.0
    """Weight of the desirable rows."""
    undesirable_weight: float = 1.0
    """Weight of the undesirable rows."""
    balance_classes: bool = False
    """Raise one of the weights so that desirable_weight x rows to undesirable_weight x rows lies in [1, 4/3]."""


class RmLoss(Section):
    """Loss."""

    center_rewards_coefficient: float = 0.0
    """Weight of (chosen + rejected)^2, which keeps the mean score near 0 (0.01 is usual)."""
    rank_margin: float = 0.0
    """Margin per step between the columns `chosen_rank` and `rejected_rank` (rank 1 is the best; 0: no margin). A
    column `margin` is used as it stands."""


class RolloutSection(Section):
    """Rollouts."""

    reward_funcs: list[str] = field(default_factory=list)
    """What scores completions: `module:function` or `file.py:function` (TRL's signature), the folder of a reward model,
    `http://...` of a scorer, or `human`: a file in the run's folder that people fill in."""
    reward_weights: list[float] | None = None
    """Factor of each of them (None: 1)."""
    num_generations: int = 8
    """Completions of each prompt."""
    max_completion_length: int = 512
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Of sampling, and of the policy that is trained."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share of the probability (the loss sees all tokens)."""
    top_k: int = 0
    """Sample from so many likeliest tokens (0: all)."""
    stop_strings: list[str] | None = None
    """Texts that end a completion; the token that completes one is its last."""
    steps_per_generation: int | None = None
    """Forward passes that one rollout feeds, a multiple of gradient_accumulation_steps (None: one step's)."""
    per_device_generation_batch_size: int = 64
    """Completions sampled at a time on one device."""
    use_transformers_continuous_batching: bool = False
    """Sample by transformers' continuous batching: rows that have ended leave the batch. It pays with a
    flash attn_implementation and completions of very different lengths. Not for models with layers of several kinds of
    attention, attn_logit_softcapping, or shards."""
    missing_eos_penalty: float | None = None
    """Taken off the reward of completions that were cut off."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss."""
    server_base_url: str | None = None
    """Sample from this OpenAI-compatible server, e.g. http://localhost:8000 (None: from the policy in this process)."""
    server_model: str | None = None
    """The model's name there (None: server_weights for `transformers serve`, else model_name_or_path)."""
    server_concurrency: int = 64
    """Most requests under way at a time (1, on one process: `transformers serve` gives the same answers
    again)."""
    server_weights: str | None = None
    """Folder that the server (vLLM, `transformers serve`) reads its weights from: the policy is written there before
    each rollout."""


class KlReference(Section):
    """Reference."""

    reference: Literal["auto", "frozen", "cpu-offload", "adapter-off", "adapter-copy"] = "auto"
    """Where the KL term's reference comes from. frozen: a second copy of the model. adapter-off: the model without its
    LoRA adapters. auto: adapter-off with LoRA, else frozen. None is loaded where the KL term's factor is 0."""
    ref_model_name_or_path: str | None = None
    """Reference model (None: the model as it is before the first step)."""


class RoundsSection(Section):
    """Rounds."""

    rounds: int = 3
    """Rounds of sampling, scoring, pairing and training."""
    prompts_per_round: int | None = None
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

    num_iterations: int = 1
    """Passes over each rollout."""
    epsilon: float = 0.2
    """How far below 1 the probability ratio may go before its gradient stops, and above, unless epsilon_high says (of
    gmpo: the log-ratio, below 0)."""
    epsilon_high: float | None = None
    """How far above 1 (None: epsilon)."""


class DirectLoss(ClippedRatio):
    """Loss."""

    baseline: Literal["leave_one_out", "batch_mean", "none"] = "leave_one_out"
    """What is taken off a reward. leave_one_out: the mean of the prompt's other completions (RLOO)."""
    beta: float = 0.05
    """Weight of the KL divergence from the reference in the reward."""
    normalize_advantages: bool = False
    """Divide the advantages by their spread over the rollout, after taking off their mean."""


class GrpoLoss(ClippedRatio):
    """Loss."""

    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "luspo", "cispo", "sapo", "vespo", "gmpo"] = "dapo"
    """How tokens are weighed and averaged (bnpo is dapo here: its batch is the whole step)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation divides the advantages."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference (0: no reference is loaded)."""
    delta: float | None = None
    """Upper limit of the ratio for negative advantages too (None: none)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """One ratio for each token, or for each sequence (GSPO)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the KL term."""
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the ratio."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus (with a loss_type that is a mean over tokens)."""
    top_entropy_quantile: float = 1.0
    """Learn from this share of the tokens of each forward pass, those of highest entropy."""
    off_policy_mask_threshold: float | None = None
    """Leave out completions of negative advantage that have become so much less likely than when sampled."""
    sapo_temperature_pos: float = 1.0
    """sapo's temperature where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """And where it is not."""
    vespo_k_pos: float = 2.0
    """vespo's power where the advantage is not negative."""
    vespo_lambda_pos: float = 3.0
    """And its rate."""
    vespo_k_neg: float = 3.0
    """vespo's power where the advantage is negative."""
    vespo_lambda_neg: float = 2.0
    """And its rate."""
    vllm_importance_sampling_correction: bool = False
    """Correct for a sampler (of a server) whose log-probs are not quite the policy's."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """Per token or completion; ratios outside the limits are clipped (truncate) or left out (mask)."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower limit of that ratio."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper limit of that ratio."""


class PpoLoss(Section):
    """Loss."""

    num_ppo_epochs: int = 4
    """Passes over each rollout."""
    kl_coef: float = 0.05
    """Weight of the KL penalty in the reward of each token (0: no reference is loaded)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """k1: log pi - log ref. k3: never negative."""
    kl_target: float | None = None
    """KL divergence per completion that kl_coef is steered to (None: kl_coef stays)."""
    kl_horizon: float = 10000.0
    """Completions in which kl_coef can about double or halve."""
    cliprange: float = 0.2
    """Largest change of a token's probability ratio that is rewarded."""
    dual_clip: float | None = None
    """The loss of a token of negative advantage is at most this times it (None: unbounded)."""
    cliprange_value: float = 0.2
    """Largest change of a value in one rollout that is rewarded."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of GAE."""
    whiten_rewards: bool = False
    """Divide the rewards by their spread over the rollout."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    value_model_name_or_path: str | None = None
    """Model that the critic starts from, e.g. the reward model (None: a linear head on the policy's hidden states)."""


class TrainSection(Section):
    """Training."""

    learning_rate: float = 2e-5
    """Highest learning rate of AdamW."""
    per_device_train_batch_size: int = 8
    """Rows (pairs, for dpo) in one forward pass on one device."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step; 8 x 1 and 1 x 8 take the same step."""
    num_train_epochs: float = 3.0
    """Passes over the training data."""
    max_steps: int = -1
    """Optimiser steps; overrides num_train_epochs where positive."""
    lr_scheduler_type: str = "linear"
    """Schedule of the learning rate, one of transformers': linear, cosine, constant_with_warmup, ..."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay (not on biases and norms)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm (0: never)."""
    bf16: bool | None = None
    """Compute in bfloat16 (None: on a GPU that can, not on a CPU)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 42
    """Seed of the order of the rows, of new weights and of dropout."""


class EvalSection(Section):
    """Evaluation."""

    per_device_eval_batch_size: int = 8
    """Rows in one forward pass of the evaluation."""
    eval_steps: int | None = None
    """Evaluate every so many steps (None: at the end only)."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint of the best evaluation whatever save_total_limit says, and end with its weights."""
    metric_for_best_model: str | None = None
    """Metric of the evaluation that says which is best (None: loss), for load_best_model_at_end and early stopping."""
    greater_is_better: bool | None = None
    """Whether more of that metric is better (None: yes, unless its name ends in loss)."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a better one (None: never)."""
    early_stopping_threshold: float = 0.0
    """By how much an evaluation must be better to count as one, for early stopping."""


class OutputSection(Section):
    """Output."""

    output_dir: str = ""
    """Folder of the run: metrics.jsonl, checkpoints, report.html, and the trained model in `final`. The same command
    with the same folder goes on where it stopped."""
    overwrite: bool = False
    """Delete the run that output_dir holds and start afresh."""
    logging_steps: int = 10
    """Write metrics every so many steps."""
    save_steps: int = 500
    """Write a checkpoint every so many steps."""
    save_total_limit: int | None = None
    """Keep the latest so many checkpoints (None: all)."""
    report_to: list[str] = field(default_factory=list)
    """Trackers of accelerate that get the metrics too: tensorboard, wandb, mlflow, ..."""
    callbacks: list[str] = field(default_factory=list)
    """TrainerCallbacks of transformers by import path, `module:Class` or `file.py:Class`."""


class KernelSection(Section):
    """Kernels."""

    impl: str = "auto"
    """Backend of the fused loss: auto, eager, cpu, ... (see `align env`). One asked for by name never falls back."""
    workspace: int | None = None
    """Bytes that the fused loss may use for logits at a time (None: the kernels decide)."""


class LimitSection(Section):
    """Limits on gradients."""

    grad_clamp: float | None = None
    """Largest |1 - p| or |0 - p| of a token of the vocabulary in the gradient of its logit (None: no limit)."""
    prob_gate: float | None = None
    """Tokens of answers that are more probable than this are not trained on any further (None: all are)."""


class Recipe(Section):
    """What every algorithm has; those with settings of their own add a section `loss`."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    output: OutputSection = field(default_factory=OutputSection)
    kernels: KernelSection = field(default_factory=KernelSection)


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


class DirectRecipe(OnlineRecipe):
    """Direct RL (REINFORCE, RLOO): raise the probability of completions by what people or programs say of them."""

    loss: DirectLoss = field(default_factory=DirectLoss)
    rollout: RolloutSection = field(default_factory=lambda: RolloutSection(num_generations=2))


class GrpoRecipe(OnlineRecipe):
    """Group-relative policy optimisation: completions are judged against the others of their prompt."""

    loss: GrpoLoss = field(default_factory=GrpoLoss)


class PpoRecipe(OnlineRecipe):
    """Proximal policy optimisation with a critic, a KL penalty and several passes over each rollout."""

    loss: PpoLoss = field(default_factory=PpoLoss)
    rollout: RolloutSection = field(default_factory=lambda: RolloutSection(num_generations=1, temperature=0.7))
    train: TrainSection = field(default_factory=lambda: TrainSection(learning_rate=3e-6))


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
    """The fields that decide what a run computes: two runs that agree on them (and on data) end with equal weights."""
    return {name: value for name, value in flat(recipe).items() if name not in NOT_PART_OF_THE_RUN}


def load(kind: type[R], path: str | Path) -> R:
    """Read a recipe from YAML.

    Args:
        kind: the algorithm's recipe class; fields that the file leaves out keep its defaults.
        path: file whose keys are field names, at the top level or under their section's name.
    Raises:
        BadInput: no such file, not YAML, an unknown key (with the nearest known one), a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise BadInput(f"recipe {path}: {error.strerror or error}") from error
    except (YAMLError, ValueError) as error:
        raise BadInput(f"recipe {path} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"recipe {path} holds no `name: value` lines")
    return typed(kind(), _into_sections(kind(), content, path), f"recipe {path}")


def typed(recipe: R, changes: dict[str, dict[str, Any]], where: str) -> R:
    """The recipe with `changes` (section -> field -> value); raises BadInput for a value that is not of its field's
    type, with `where` in front."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        made: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(recipe), changes))
        return made
    except OmegaConfBaseException as error:
        raise BadInput(f"{where}: {error.full_key}: {str(error).splitlines()[0]}") from error


def _into_sections(recipe: Recipe, content: dict[Any, Any], path: str | Path) -> dict[str, dict[str, Any]]:
    section_of = {name: section for section, fields in dataclasses.asdict(recipe).items() for name in fields}
    tree: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        is_section = hasattr(recipe, str(key))
        for name, inner in (value or {}).items() if is_section else [(key, value)]:
            if name not in section_of:
                (close,) = difflib.get_close_matches(str(name), section_of, n=1, cutoff=0.0)
                raise BadInput(f"recipe {path}: unknown key `{name}`; did you mean `{close}`?")
            if is_section and section_of[name] != key:
                raise BadInput(f"recipe {path}: `{name}` belongs under `{section_of[name]}`, not under `{key}`")
            tree.setdefault(section_of[name], {})[name] = inner
    return tree


def save(recipe: Recipe, path: str | Path) -> None:
    """Write the whole recipe, defaults included, as YAML that `load` reads."""
    from omegaconf import OmegaConf

    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)))


RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # what a number must be, where it is given -> which fields
    "must be at least 0": (
        lambda x: x >= 0,
        "weight_decay max_grad_norm seed center_rewards_coefficient rank_margin desirable_weight undesirable_weight "
        "top_k beta kl_coef vf_coef entropy_coef epsilon",
    ),
    "must be at least 1": (
        lambda x: x >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps save_steps "
        "save_total_limit lora_r lora_alpha eval_steps early_stopping_patience workspace max_prompt_length kl_horizon "
        "dataset_num_proc ref_model_sync_steps num_generations max_completion_length per_device_generation_batch_size "
        "num_iterations num_ppo_epochs rounds prompts_per_round server_concurrency steps_per_generation",
    ),
    "must be at least 2": (lambda x: x >= 2, "max_length"),
    "must be above 0": (
        lambda x: x > 0,
        "learning_rate num_train_epochs temperature cliprange cliprange_value epsilon_high delta kl_target grad_clamp",
    ),
    "must be above 1": (lambda x: x > 1, "dual_clip"),
    "must be above 0, or -1 for whole epochs": (lambda x: x > 0 or x == -1, "max_steps"),
    "must lie in [0, 1]": (lambda x: 0 <= x <= 1, "warmup_ratio gamma lam top_entropy_quantile"),
    "must lie in [0, 1)": (lambda x: 0 <= x < 1, "lora_dropout"),
    "must lie in (0, 1)": (lambda x: 0 < x < 1, "prob_gate"),
    "must lie in (0, 1]": (lambda x: 0 < x <= 1, "top_p ref_model_mixup_alpha"),
    "must lie in [0, 0.5)": (lambda x: 0 <= x < 0.5, "label_smoothing"),
}


def check(recipe: Recipe) -> None:
    """Refuse values that no run can use, all of them in one message.

    Raises:
        BadInput: naming each value and what it must be.
    """
    values = flat(typed(recipe, {}, "recipe"))
    rules = [(name, bool(values[name]), "is required") for name in (*REQUIRED, "reward_funcs") if name in values]
    for text, (holds, names) in RANGES.items():
        rules += [(name, holds(values[name]), text) for name in names.split() if values.get(name) is not None]
    get, peft, accumulation = values.get, values["use_peft"], values["gradient_accumulation_steps"]
    judged = values["eval_steps"] and (values["eval_dataset_name"] or values["dataset_test_split"])
    kind, scorers, weights = get("reference", "auto"), get("reward_funcs", []), get("reward_weights")
    relations = [
        ("beta", get("beta") or isinstance(recipe, OnlineRecipe), "must be above 0"),
        ("max_prompt_length", (values["max_prompt_length"] or 0) < values["max_length"],
         f"must leave room for a completion: below max_length = {values['max_length']}"),
        ("load_best_model_at_end", not values["load_best_model_at_end"] or judged, EVALUATED),
        ("early_stopping_patience", not values["early_stopping_patience"] or judged, EVALUATED),
        ("load_in_4bit", not values["load_in_4bit"] or peft, "needs --use_peft: such weights cannot be trained"),
        ("load_in_8bit", not values["load_in_8bit"] or peft, "needs --use_peft: such weights cannot be trained"),
        ("load_in_8bit", not (values["load_in_4bit"] and values["load_in_8bit"]), "is not load_in_4bit"),
        ("reference", not kind.startswith("adapter") or peft, "needs --use_peft: there are no adapters"),
        ("ref_model_name_or_path", kind not in ("none", "ema", "adapter-off", "adapter-copy")
         or not get("ref_model_name_or_path"), f"is another reference than reference = {kind!r}"),
        ("reward_funcs", len(scorers) == 1 or "human" not in scorers, "takes 'human' alone, without other scorers"),
        ("eval_dataset_name", not values["eval_dataset_name"] or scorers != ["human"], "needs a scorer, not people"),
        ("server_weights", not get("server_weights") or get("server_base_url"), "needs server_base_url"),
        ("server_weights", not (get("server_weights") and peft), "needs use_peft: false"),
        ("entropy_coef", get("loss_type") not in ("grpo", "dr_grpo", "luspo", "sapo", "gmpo")
         or not get("entropy_coef"), "needs a loss_type that counts tokens"),
        ("epsilon_high", get("loss_type") != "cispo" or get("epsilon_high") is not None,
         "is the limit of cispo's ratio: give it (5.0 is usual)"),
        ("reward_weights", weights is None or len(weights) == len(scorers), f"must be {len(scorers)}, as reward_funcs"),
        ("steps_per_generation", (get("steps_per_generation") or 0) % max(accumulation, 1) == 0,
         f"must be a multiple of gradient_accumulation_steps = {accumulation}"),
    ]  # fmt: skip
    if get(paged := "use_transformers_continuous_batching"):
        unset = {"top_p": 1.0, "top_k": 0, "stop_strings": None, "server_base_url": None}
        relations += [(name, values[name] == x, f"must be {x} with {paged}") for name, x in unset.items()]
    rules += [rule for rule in relations if rule[0] in values]
    broken = [f"{name} = {values[name]!r} {text}" for name, holds, text in rules if not holds]
    if broken:
        raise BadInput("; ".join(broken))
