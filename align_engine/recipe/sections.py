"""The sections of a recipe: every setting with its type, default, range and help.

A setting that TRL 1.16 has bears its name and default (three defaults differ: `TRL_DIFFERS` in the tests). A field's
name is unique over the whole tree of a recipe.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, Literal, dataclass_transform

from align_engine.recipe.values import Bare, Count, Finite, Keywords, Names, NotNegative, Part, Positive, Range, Share

Scorers = Annotated[list[str], Names("none", whole=("http://", "https://"))]
Rate = Annotated[float, Range("(0, 1e30]")]  # what AdamW makes of it fits into float32


@dataclass_transform(field_specifiers=(field,))
class Section:
    """What derives from it is a dataclass."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(cls)


class ModelSection(Section):
    """Model."""

    model_name_or_path: str = ""
    """Folder or hub name of the model to train; its tokenizer is taken from the same place."""
    model_revision: str = "main"
    """Branch, tag or commit on the hub, of the model, its tokenizer and its reference."""
    dtype: Literal["float32", "bfloat16", "auto"] | None = "float32"
    """Type of the weights in memory; `auto`, or None, keeps what the checkpoint says."""
    trust_remote_code: bool = False
    """Run the code that lies beside a model of another architecture than transformers has. Read it before."""
    attn_implementation: str | None = None
    """Attention of transformers: sdpa, eager, flash_attention_2, ... (None: transformers chooses)."""
    use_liger_kernel: bool = False
    """Liger's kernels for the norms, rotary embeddings and gated units of models, on a GPU (the loss stays ours)."""
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
    dataset_config: str | None = None
    """Configuration of it, the `name` of `datasets.load_dataset`, where it has several."""
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


class SftLoss(Section):
    """Loss."""

    loss_type: Literal["nll", "dft"] = "nll"
    """nll: cross-entropy. dft: each token weighed by its own probability, arXiv:2508.05629."""
    assistant_only_loss: bool = False
    """Learn from the assistant's messages of a conversation alone, wherever they stand in it. The chat template's
    {% generation %} tags say which tokens these are; without tags, the text of the turns does."""


class ReferenceFields(Section):
    """The model that a loss, or the KL term of a reward, is measured against."""

    reference: Literal["auto", "none", "frozen", "cpu-offload", "adapter-off", "adapter-copy", "precomputed", "ema"] = (
        "auto"
    )
    """Where the reference's log-probs come from. none: a uniform one. frozen: a second copy of the model, evaluated at
    every step. cpu-offload: the same, its layers in CPU memory until their turn. adapter-off: the model itself without
    its LoRA adapters. adapter-copy: the model with a copy of its adapters as they were before the first step.
    precomputed: one pass over the data before the first step, kept on disk for this run and, in a cache, for others; no
    second copy in memory.
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
    discopop_tau: Positive = 0.05
    """Temperature of discopop."""
    dpop_lambda: NotNegative = 50.0
    """Weight of dpop's penalty on chosen answers that become less probable than under the reference."""


class SimpoLoss(Section):
    """Loss."""

    beta: Positive = 2.0
    """Factor on the difference of the mean log-probs."""
    simpo_gamma: NotNegative = 0.5
    """Margin that the chosen answer must have."""
    label_smoothing: Annotated[float, Range("[0, 0.5)")] = 0.0
    """Share of the preference labels taken to be flipped, in [0, 0.5)."""
    alpha: Finite = 0.0
    """Shape of the reward: AlphaPO, arXiv:2501.03884, where it is not 0."""


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

    reward_funcs: Scorers = field(default_factory=list)
    """What scores completions: `module:function` or `file.py:function` (TRL's signature), the folder of a reward model,
    `http://...` of a scorer, or `human`: a file in the run's folder that people fill in."""
    reward_weights: list[Finite] | None = None
    """Factor of each of them (None: 1)."""
    wait_for_marks: bool = False
    """human: wait for the marks, which `align rate --run_dir` collects on a web page (or somebody puts into the file),
    rather than end the run, which the same command goes on with."""
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
    dynamic_sample: bool = False
    """Replace prompts whose completions all have the same reward by further ones (DAPO)."""
    max_resample_times: Count = 3
    """Most rounds of them in one rollout; then such prompts stay."""
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
    each rollout; with use_peft its adapter alone, which vLLM loads."""
    log_completions: bool = False
    """Show some completions with their rewards on the screen whenever metrics are written. They stand in samples.jsonl
    either way."""
    num_completions_to_print: Count | None = None
    """How many of those that are written (None: all)."""


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


class RlooLoss(ClippedRatio):
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
    """Highest learning rate."""
    optim: str = "adamw_torch_fused"
    """Optimiser by transformers' name: adamw_torch, adafactor, sgd, adamw_8bit, paged_adamw_8bit, lion_8bit, ...; or
    muon."""
    optim_args: Annotated[str, Keywords()] | None = None
    """Further arguments of it, as momentum=0.9,nesterov=true."""
    adam_beta1: Annotated[float, Range("[0, 1)")] = 0.9
    """Decay of the mean of the gradients, of AdamW and its kin."""
    adam_beta2: Annotated[float, Range("[0, 1)")] = 0.999
    """Decay of the mean of their squares."""
    adam_epsilon: NotNegative = 1e-8
    """What keeps its division from one by zero."""
    per_device_train_batch_size: Count = 8
    """Rows (pairs, for dpo, or prompts with several answers) in one forward pass on one device."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimiser step; 8 x 1 and 1 x 8 take the same step."""
    packing: Literal["auto", "on", "off"] = "off"
    """Read a forward pass's sequences as one row without padding, in which sequences with the same prompt share it.
    auto: where the model can, and a proof on the first rows finds what padded ones say."""
    tokens_per_batch: Count | None = None
    """Most tokens in one packed forward pass, a shared prompt's once: it shares out the rows of a step in place of
    per_device_train_batch_size (None: rows are counted). A row that has more is alone."""
    num_train_epochs: Positive = 3.0
    """Passes over the training data."""
    max_steps: Annotated[int, Range("[1, inf)", also=-1, meaning="for whole epochs")] = -1
    """Optimiser steps; overrides num_train_epochs where positive."""
    lr_scheduler_type: str = "linear"
    """Schedule of the learning rate, one of transformers': linear, cosine, constant_with_warmup, ..."""
    lr_scheduler_kwargs: Annotated[str, Keywords()] | None = None
    """Further arguments of the schedule, as min_lr_rate=0.1."""
    warmup_ratio: Share = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: NotNegative = 0.0
    """The same in steps; a number below 1 is a share of them."""
    weight_decay: NotNegative = 0.0
    """Weight decay (not on biases and norms)."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm (0: never)."""
    router_aux_loss_coef: NotNegative | None = None
    """Weight of a mixture of experts' load-balancing loss (None: what the model's config.json says; 0: none)."""
    bf16: bool | None = None
    """Compute in bfloat16 (None: on a GPU that can, not on a CPU)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    gradient_checkpointing_kwargs: Annotated[Literal["selective=true"], Keywords("use_reentrant=false")] | None = None
    """Recompute all but what attention gives (None, or use_reentrant=false: that too): a layer keeps twice as much."""
    activation_offloading: bool = False
    """Keep what the backward pass needs in the CPU's memory meanwhile: less memory of a GPU, for time on the bus."""
    tune_malloc: bool = True
    """On a CPU: have glibc's malloc give large blocks back as soon as they are free, and lay them in huge pages."""
    fit: str | None = None
    """Change the recipe so that the run fits into this memory, and say why: a size (24GB), a card by its name, or auto:
    what this machine has. Smaller forward passes of the same step, recomputed activations, a reference elsewhere, LoRA.
    What does not fit at all is refused before weights are loaded (docs/plan.md)."""
    seed: Annotated[int, Range("[0, 4294967295]")] = 42
    """Seed of the order of the rows, of new weights and of dropout."""


class EvalSection(Section):
    """Evaluation."""

    per_device_eval_batch_size: Count = 8
    """Rows in one forward pass of the evaluation."""
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    """When to evaluate. steps: every eval_steps (None: logging_steps). epoch: after each. Both take the split `test`
    where nothing else is named. no: never, whatever data there are. None: every eval_steps. At the end too, but for
    `no`."""
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
    eval_tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, by name or YAML file, that each evaluation measures, apart from loss and reward:
    their metrics are TASK/METRIC (docs/eval.md)."""
    eval_tasks_limit: Count | None = None
    """Only the first so many examples of each of them (None: all)."""


class OnlineEval(EvalSection):
    """Evaluation."""

    eval_reward_funcs: Scorers = field(default_factory=list)
    """Further scorers, as reward_funcs are, asked in evaluations alone and never learnt from: where the reward rises
    and what they say falls, the reward is over-optimised."""


class OutputSection(Section):
    """Output."""

    output_dir: str = ""
    """Folder of the run: metrics.jsonl, checkpoints, report.html, and the trained model in `final`. The same command
    with the same folder goes on where it stopped."""
    overwrite: bool = False
    """Delete the run that output_dir holds and start afresh."""
    run_name: str | None = None
    """Name of the run in trackers that have names for runs."""
    resume_from_checkpoint: Annotated[str, Bare("true")] | None = None
    """The same command goes on from its last checkpoint anyway. true: refuse to begin a run. A checkpoint of
    output_dir: refuse to go on from another one. false: refuse to go on."""
    logging_strategy: Literal["steps", "epoch", "no"] = "steps"
    """When to write metrics: every logging_steps, after each epoch, or never."""
    logging_steps: Count = 10
    """Write metrics every so many steps."""
    logging_first_step: bool = False
    """And of the first step."""
    save_strategy: Literal["steps", "epoch", "best", "no"] = "steps"
    """When to write a checkpoint: every save_steps, after each epoch, after each evaluation better than those before,
    or never. One is written where the run is stopped, and with steps and epoch at its end."""
    save_steps: Count = 500
    """Write a checkpoint every so many steps."""
    save_total_limit: Count | None = None
    """Keep the latest so many checkpoints (None: all)."""
    report_to: Annotated[list[str], Names("none")] = field(default_factory=list)
    """Trackers of accelerate that get the metrics too: tensorboard, wandb, mlflow, ... (`none`: none)."""
    push_to_hub: bool = False
    """Upload `final` to the hub when the run is finished, with the token of HF_TOKEN or `hf auth login`."""
    hub_model_id: str | None = None
    """Repository to upload to, org/name (None: the name of output_dir, of the token's owner)."""
    hub_private_repo: bool | None = None
    """Whether that repository is private (None: as its owner's settings have it)."""
    callbacks: Annotated[list[str], Names("none")] = field(default_factory=list)
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
