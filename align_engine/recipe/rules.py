"""What no run can use: values that are missing, out of range, or do not go with others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from align_engine.errors import BadInput
from align_engine.recipe.files import typed
from align_engine.recipe.recipes import OnlineRecipe, Recipe, Settings, fields, flat
from align_engine.recipe.secrets import masked
from align_engine.recipe.sections import RolloutSection
from align_engine.recipe.values import numbers

REQUIRED = ("model_name_or_path", "dataset_name", "output_dir", "reward_funcs", "models")
PATHS = {"model_name_or_path", "ref_model_name_or_path", "value_model_name_or_path", "dataset_name",
         "eval_dataset_name", "reward_funcs", "eval_reward_funcs", "callbacks", "output_dir",
         "server_weights", "pairs_name", "reward_model", "reward_models", "encoder", "findings", "checkers",
         "tasks", "include_path", "eval_tasks", "classifier", "evaluation", "run", "runs", "results", "json",
         "project_dir", "run_dir", "gold_name", "guideline"}  # fmt: skip
NOT_PART_OF_THE_RUN = ("output_dir", "overwrite", "report_to", "run_name", "resume_from_checkpoint", "save_total_limit",
                       "logging_strategy", "logging_steps", "logging_first_step", "save_strategy", "save_steps",
                       "dataset_num_proc", "tune_malloc", "fit", "log_completions", "num_completions_to_print",
                       "push_to_hub", "hub_model_id", "hub_private_repo", "wait_for_marks")  # fmt: skip
TRL_REWARDS = {"accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"}  # names of its scripts
GIVE = {"reward_funcs": ": a function (file.py:name), the folder of a reward model, an address of HTTP, or human"}
R = TypeVar("R", bound=Settings)


def check(recipe: R, required: Sequence[str] = REQUIRED) -> R:
    """Refuse values that no run can use, all of them in one message.

    Args:
        required: fields that must be given.
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
    if isinstance(recipe, Recipe):
        recipe.model.dtype = recipe.model.dtype or "auto"
        if _asks_for_the_test_split(recipe):
            recipe.data.dataset_test_split = "test"
    values = flat(recipe)
    missing = [name for name in required if name not in recipe.optional and not values.get(name, True)]
    broken = [f"{name} = {values[name]!r} is required{GIVE.get(name, '')}" for name in missing]
    for name, (_, taken) in fields(type(recipe)).items():
        if taken.range is not None and any(number not in taken.range for number in numbers(values[name])):
            broken.append(f"{name} = {values[name]!r} {taken.range}")
    conflicts = _conflicts(recipe, values) if isinstance(recipe, Recipe) else recipe.conflicts()
    broken += [f"{name} = {values[name]!r} {text}" for name, text in conflicts]
    if broken:
        raise BadInput("; ".join(broken))
    return recipe


def _asks_for_the_test_split(recipe: Recipe) -> bool:
    """Whether there are to be evaluations and nothing says on what: TRL takes the split `test` then."""
    named = recipe.data.eval_dataset_name or recipe.data.dataset_test_split or recipe.eval.eval_tasks
    return recipe.eval.eval_strategy in ("steps", "epoch") and not named


def _conflicts(recipe: Recipe, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields that do not go with others: (name, what it must be or needs)."""
    get, peft = values.get, values["use_peft"]
    room, most = values["max_prompt_length"], values["max_length"]
    if room and most and room >= most:
        yield "max_prompt_length", f"must leave room for a completion: below max_length = {most}"
    evaluation = values["eval_dataset_name"] or values["dataset_test_split"]
    if evaluation and get("reward_funcs") == ["human"]:
        yield "eval_dataset_name" if values["eval_dataset_name"] else "dataset_test_split", "needs a scorer, not people"
    if get("eval_reward_funcs") and not evaluation:
        yield "eval_reward_funcs", "needs eval_dataset_name or dataset_test_split"
    if "human" in (get("eval_reward_funcs") or ()):
        yield "eval_reward_funcs", "takes scorers, not people"
    if twice := set(get("eval_reward_funcs") or ()) & set(get("reward_funcs") or ()):
        yield "eval_reward_funcs", f"names {min(twice)!r}, which is one of reward_funcs and asked in evaluations anyway"
    yield from _evaluation_conflicts(values, evaluation)
    if values["warmup_ratio"] and values["warmup_steps"]:
        yield "warmup_steps", f"does not go with warmup_ratio = {values['warmup_ratio']}: leave one of them out"
    for name in ("hub_model_id", "hub_private_repo"):
        if values[name] is not None and not values["push_to_hub"]:
            yield name, "needs --push_to_hub"
    for name in ("load_in_4bit", "load_in_8bit"):
        if values[name] and not peft:
            yield name, "needs --use_peft: such weights cannot be trained"
    if values["load_in_4bit"] and values["load_in_8bit"]:
        yield "load_in_8bit", "does not go with load_in_4bit = True: choose one of them"
    if values["gradient_checkpointing_kwargs"] and not values["gradient_checkpointing"]:
        yield "gradient_checkpointing_kwargs", "needs gradient_checkpointing"
    if values["tokens_per_batch"] and values["packing"] == "off":
        yield "tokens_per_batch", "needs packing: on, or auto"
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


def _evaluation_conflicts(values: dict[str, Any], evaluation: str | None) -> Iterator[tuple[str, str]]:
    strategy, measured = values["eval_strategy"], evaluation or values["eval_tasks"]
    if values["eval_steps"] and not measured and strategy is None:
        yield (
            "eval_steps",
            "needs eval_dataset_name, dataset_test_split, eval_tasks, or eval_strategy: steps for `test`",
        )
    often = strategy in ("steps", "epoch") or (strategy is None and values["eval_steps"])
    needs = "needs eval_steps, or eval_strategy: steps or epoch, and an evaluation dataset, or eval_tasks"
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if values[name] and not (often and measured):
            yield name, needs
        elif values[name] and not evaluation and not values["metric_for_best_model"]:
            yield name, "needs metric_for_best_model, as TASK/METRIC: with eval_tasks alone there is no loss to go by"
    if values["save_strategy"] == "best" and not (often and measured):
        yield "save_strategy", needs


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
    if values["wait_for_marks"] and scorers != ["human"]:
        yield "wait_for_marks", "is for reward_funcs human: other scorers answer at once"
    for name in TRL_REWARDS & {*scorers, *(values.get("eval_reward_funcs") or ())}:
        yield "reward_funcs", f"names {name!r}, which is TRL's: trl.rewards:{name} is that function"
    if len(set(scorers)) < len(scorers):
        yield "reward_funcs", "names a scorer twice: give it one of the reward_weights"
    if weights is not None and len(weights) != len(scorers):
        yield "reward_weights", f"must be {len(scorers)} numbers, as many as reward_funcs"
    for name in ("server_weights", "server_model"):
        if values[name] and not values["server_base_url"]:
            yield name, "needs server_base_url"
    if values["server_weights"] and values["use_peft"]:
        if "rounds" in values:
            yield "server_weights", "needs use_peft: false, as each round of iterate merges its adapter"
        if values["server_model"]:
            yield "server_model", "is not read with server_weights and use_peft: each adapter gets a name of its own"
    if values["dynamic_sample"]:
        yield from (("dynamic_sample", text) for text in _never_resampled(values))
    passes, accumulation = values["steps_per_generation"], values["gradient_accumulation_steps"]
    if passes and accumulation >= 1 and passes % accumulation:
        yield "steps_per_generation", f"must be a multiple of gradient_accumulation_steps = {accumulation}"
    if values[paged := "use_transformers_continuous_batching"]:
        for name, unset in {"top_p": 1.0, "top_k": 0, "stop_strings": None, "server_base_url": None}.items():
            if values[name] != unset:
                yield name, f"must be {unset} with {paged}"


def _never_resampled(values: dict[str, Any]) -> Iterator[str]:
    """Why a prompt whose completions have the same reward is not to be replaced."""
    if "rounds" in values:
        yield "is for grpo and rloo: iterate leaves out prompts whose completions tie"
    elif "num_ppo_epochs" in values:
        yield "is for grpo and rloo: ppo learns from equal rewards too"
    elif values.get("baseline", "leave_one_out") != "leave_one_out":
        yield f"needs baseline leave_one_out: with {values['baseline']} equal rewards are learnt from too"
    if values["num_generations"] == 1:
        yield "needs num_generations above 1"
    if values["reward_funcs"] == ["human"]:
        yield "needs a scorer, not people"


def identity(recipe: Settings, processes: int = 1) -> dict[str, Any]:
    """What decides what a run computes: two runs that agree on it (and on data) end with equal weights, up to rounding.

    Fields stand by their names. Of those that share a step out among processes and forward passes what they come to is
    enough, unless the loss is one of a whole forward pass. Secrets of addresses are masked.
    """
    found = {name: masked(value) for name, value in flat(recipe).items() if name not in NOT_PART_OF_THE_RUN}
    if not isinstance(recipe, Recipe):
        return found
    if of_forward_passes(found):
        return found | {"processes": processes}
    shared_out = {"rows_per_step": rows_per_step(recipe, processes)}
    if isinstance(recipe, OnlineRecipe):
        shared_out["steps_per_rollout"] = recipe.windows
        del found["steps_per_generation"]
    del found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
    return found | shared_out


def rows_per_step(recipe: Recipe, processes: int) -> int:
    """Rows that one optimiser step sees, over all processes."""
    return recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * processes


def of_forward_passes(values: dict[str, Any]) -> bool:
    """Whether the loss depends on which rows share a forward pass."""
    kinds = str(values.get("loss_type")).split(",")
    return any(kind.startswith("aot") for kind in kinds) or values.get("top_entropy_quantile", 1.0) < 1
