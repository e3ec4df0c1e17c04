"""Iterative preference optimisation (arXiv:2405.07863): rounds of sampling, scoring, pairing and training.

    round-1/samples.jsonl   every completion with its score, and with what each scorer says
    round-1/answers/        while a round samples: its batches so far
    round-1/pairs.jsonl     best and worst of each prompt, as token ids; prompts whose completions tie are left out
    round-1/train/          the round's training run, with its model in `final`
    metrics.jsonl           one line per round, of its samples
    final/                  the last round's model

Each file and folder appears whole or not at all, so a run that is killed goes on inside its round.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console

from align_engine import inputs
from align_engine import recipe as recipes
from align_engine.algorithms import ALGORITHMS
from align_engine.data.sources import Origin
from align_engine.data.tokenize import check_vocab
from align_engine.errors import BadInput, RunFailed
from align_engine.models import load
from align_engine.models.merging import merged
from align_engine.planning import cards
from align_engine.planning.rehearse import lengths
from align_engine.planning.show import plan
from align_engine.recipe import IterateRecipe, ModelSection, Recipe, ReferenceFields, RolloutSection
from align_engine.reports import card, hub
from align_engine.rollouts.advantages import best_versus_worst
from align_engine.rollouts.completion import Completion, Sampler
from align_engine.rollouts.server import reload_weights
from align_engine.rollouts.source import Prompts
from align_engine.run import (
    begin,
    check_choices,
    check_loss,
    finish,
    load_prepared,
    make_accelerator,
    open_folder,
    publish,
    train,
)
from align_engine.training import ranks, stops, tensor_parallel
from align_engine.training.callbacks import from_recipe
from align_engine.training.checkpoint import RunFolder
from align_engine.training.metrics import read
from align_engine.training.samples import some, table

if TYPE_CHECKING:
    from accelerate import Accelerator


SHARED = ("model", "data", "train", "eval", "output", "kernels", "limits")  # sections of a round's training


def runner(command: str) -> Callable[[Any], RunFolder]:
    """What a command does with its recipe: the rounds of `iterate`, or one training run."""
    return iterate if command == "iterate" else partial(train, command)


def planned(command: str, recipe: Recipe, memory: str | None = None, prompt: int | None = None) -> dict[str, Any]:
    """What `align plan` says of a command: of `iterate` it is a round.

    Args:
        memory: what it has to fit into, as `planning.cards.card` takes it. prompt: tokens of a row's prompt.
    Raises:
        BadInput: from the recipe and the model's configuration; no such card.
    """
    name, trained, rollout = trained_by(command, recipe)
    return plan(name, trained, cards.card(memory), lengths(recipe, prompt), rollout)


def trained_by(command: str, recipe: Recipe) -> tuple[str, Recipe, RolloutSection | None]:
    """(the algorithm of a command's training, its recipe, how its rows are sampled before): of `iterate` a round's.

    Raises:
        BadInput: from the recipe.
    """
    recipe = recipes.check(recipe, required=("model_name_or_path",))
    if isinstance(recipe, IterateRecipe):
        made = round_recipe(recipe, recipe.model.model_name_or_path, Path("round-1"), 1)
        return recipe.iteration.method, made, recipe.rollout
    return command, recipe, None


def iterate(recipe: IterateRecipe) -> RunFolder:
    """All rounds; goes on where an earlier call with the same recipe stopped.

    Returns:
        the run's folder, with the last round's model in `final`.
    Raises:
        BadInput: before anything is computed. RunFailed: later; what is there is whole.
    """
    recipe = recipes.check(recipe)
    inputs.check_outputs(recipe)
    hub.check(recipe.output)
    accelerator = make_accelerator(recipe)
    first = recipes.check(round_recipe(recipe, recipe.model.model_name_or_path, Path("round-1"), 1))
    check_choices(first, accelerator)
    tensor_parallel.check(first, scalar=False)
    check_loss(ALGORITHMS[recipe.iteration.method], first)
    from_recipe(first)
    recipes.check(round_recipe(recipe, "model", Path("round-2"), 2))  # has another reference
    with open_folder("iterate", recipe, accelerator) as (folder, finished):
        if not finished:
            all_rounds(recipe, accelerator, folder)
    publish(folder, recipe, accelerator)
    return folder


def all_rounds(recipe: IterateRecipe, accelerator: Accelerator, folder: RunFolder) -> None:
    """The rounds that are still to do, in a folder that is ours."""
    options, data, section = recipe.iteration, recipe.data, recipe.model
    own = {"trust_remote_code": section.trust_remote_code, "revision": section.model_revision}
    tokenizer = load.load_tokenizer(section.model_name_or_path, **own)
    shared = (recipe, tokenizer, accelerator)
    rows = load_prepared(data.dataset_name, data.dataset_train_split, data.dataset_config, "prompt", *shared)
    if data.eval_dataset_name:  # of every round's training: refused now rather than after hours of sampling
        load_prepared(data.eval_dataset_name, data.dataset_test_split, None, "preference", *shared)
    elif data.dataset_test_split:
        raise BadInput(f"dataset_test_split = {data.dataset_test_split!r} needs eval_dataset_name, of preference data")
    origin = Origin(data.dataset_name, data.dataset_train_split)
    with origin.named():
        check_vocab(rows[0], load.vocab_size(section.model_name_or_path, **own), named=origin.rows)
    prompts = Prompts(*rows, tokenizer, recipe, accelerator, folder)
    begin(folder, recipe, accelerator, inputs.facts(recipe) | {"data": prompts.fingerprint()})
    started = "round 1 starts" if options.reference == "initial" else "each round starts"
    accelerator.print(f"reference {options.reference}: the model that {started} from")
    model = recipe.model.model_name_or_path
    for number in range(1, options.rounds + 1):
        here = folder.path / f"round-{number}"
        if not (here / "pairs.jsonl").exists():
            write_pairs(prompts, number, options.prompts_per_round or len(prompts.rows), model)
        accelerator.print(f"round {number} of {options.rounds}: {options.method} on {here / 'pairs.jsonl'}")
        if accelerator.is_main_process:
            folder.adopt(f"{here.name}/train")
        train(options.method, round_recipe(recipe, model, here, number))
        accelerator.free_memory()  # of the round's model, which refers to itself
        trained = str(here / "train" / "final")
        model = merge(model, here, folder, accelerator, section) if section.use_peft else trained
    if accelerator.is_main_process:
        with folder.written("final") as path:
            shutil.copytree(model, path)
            (path / card.NAME).write_text(card.card(folder, "iterate", recipe), encoding="utf-8")
    finish(folder, "iterate", recipe, accelerator)


def round_recipe(recipe: IterateRecipe, model: str, here: Path, number: int) -> Recipe:
    """The recipe of a round's training: the shared sections, the method's own settings, the round's paths.

    Raises:
        BadInput: a method that does not learn from preferences, or a setting that it does not have.
    """
    options = recipe.iteration
    known = [name for name, row in ALGORITHMS.items() if row.kind == "preference" and not row.scalar]
    if options.method not in known:
        raise BadInput(f"method = {options.method!r} is none of {', '.join(known)}")
    made = recipes.RECIPES[options.method]()
    changes: dict[str, Any] = {name: dict(vars(getattr(recipe, name))) for name in SHARED}
    if unset := [setting for setting in options.method_settings if "=" not in setting]:
        raise BadInput(f"method_settings: {unset[0]!r} is not of the form name=value")
    changes["loss"] = dict(setting.split("=", 1) for setting in options.method_settings)
    if "ref_model_name_or_path" in changes["loss"]:
        way = "it is `--reference initial` or `previous` that says what the rounds are compared with"
        raise BadInput(f"method_settings: ref_model_name_or_path is set by each round: {way}")
    changes["model"]["model_name_or_path"] = model
    changes["data"] |= {"dataset_name": str(here / "pairs.jsonl"), "dataset_config": None}
    changes["data"] |= {"dataset_train_split": "train"}
    changes["output"] |= {"output_dir": str(here / "train"), "overwrite": False, "push_to_hub": False}
    changes["output"] |= {"hub_model_id": None, "hub_private_repo": None}
    if options.reference == "initial" and number > 1 and made.section(ReferenceFields) is not None:
        changes["loss"]["ref_model_name_or_path"] = recipe.model.model_name_or_path
    elif number > 1:  # nothing of this round comes from the hub
        changes["model"]["model_revision"] = "main"
    return recipes.typed(made, changes, f"method_settings = {options.method_settings}")


def write_pairs(prompts: Prompts, number: int, count: int, model: str) -> None:
    """Write samples.jsonl and pairs.jsonl of round `number`: answers of the model at a path to `count` prompts.
    pairs.jsonl comes last: it says that the rest is there.

    Raises:
        RunFailed: all completions of every prompt tie.
    """
    accelerator, folder, size = prompts.accelerator, prompts.folder, prompts.settings.num_generations
    asked = prompts.asked((number - 1) * count, count)
    together = isinstance(accelerator, tensor_parallel.OneProcess)
    sampler = kept(sampler_of(prompts, model), folder, f"round-{number}/answers", together)
    stopped = stops.Stopped(f"stopped in round {number}; the same command goes on inside it")
    with stops.graceful(accelerator.print):
        try:
            with stops.breakable() if ranks.launched() == 1 else nullcontext():
                completions = prompts.answers(sampler, asked, number)
        except stops.StopNow as error:
            raise stopped from error
        if any(gather_object([stops.asked()])):
            raise stopped
    accelerator.free_memory()
    judged = prompts.judge(asked, completions, size, number)
    pairs = best_versus_worst(judged.rewards, size)
    numbers = {**judged.metrics, "pairs": len(pairs), "frac_tied": 1 - len(pairs) / count}
    left = f"{len(pairs)} pairs of {count} prompts (the others tie)"
    accelerator.print(f"round {number}: reward {numbers['reward']:.4g}, {left}")
    if not pairs:
        raise RunFailed(f"round {number}: the completions of every prompt tie; raise num_generations or temperature")
    for side, places in zip(("chosen", "rejected"), zip(*pairs)):
        numbers[f"rewards/{side}"] = float(judged.rewards[list(places)].mean())
    if accelerator.is_main_process:
        folder.truncate_metrics(number - 1, {"step": number, **numbers})
        ids, said = prompts.rows[asked]["prompt_ids"], judged.answers["completions"]
        scores = [None if math.isnan(score) else score for score in judged.rewards.tolist()]
        samples = judged.samples()
        if prompts.settings.log_completions:
            shown = some(some(samples), prompts.settings.num_completions_to_print)
            Console().print(table(f"round {number}", shown))
        rows = [
            {"prompt_ids": ids[best], "chosen_ids": completions[best].ids, "rejected_ids": completions[worst].ids,
             "chosen": said[best], "rejected": said[worst],
             "chosen_score": scores[best], "rejected_score": scores[worst]}
            for best, worst in pairs
        ]  # fmt: skip
        folder.write_rows(f"round-{number}/samples.jsonl", samples)
        folder.write_rows(f"round-{number}/pairs.jsonl", rows)
        folder.discard(f"round-{number}/answers")
    accelerator.wait_for_everyone()


def sampler_of(prompts: Prompts, path: str) -> Sampler:
    """A sampler of the model at a path."""
    settings, accelerator, model = prompts.settings, prompts.accelerator, None
    if not settings.server_base_url:
        model = load.load_model(path, prompts.recipe.model)
        load.check_pad(model, prompts.tokenizer)
        model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    elif prompts.server_weights is not None:
        if accelerator.is_main_process:
            prompts.server_weights.copy(path)
            reload_weights(settings, prompts.kind)
        accelerator.wait_for_everyone()
    return prompts.sampler(model)


def kept(sampler: Sampler, folder: RunFolder, name: str, together: bool = False) -> Sampler:
    """The same sampler, with its answers kept in a folder of the run, batch by batch: they are sampled once, however
    often the run is killed.

    Args:
        together: all ranks draw each batch as one, so that the first says what there is, and writes.
    """

    def sample(prompts: Sequence[list[int]], seed: int) -> list[Completion]:
        path = folder.path / name / f"{seed}.jsonl"
        there = [holds(path, prompts)]
        if not (gather_object(there)[0] if together else there[0]):
            said = zip(prompts, sampler(prompts, seed))
            rows = [{"prompt_ids": prompt, "ids": one.ids, "ended": one.ended} for prompt, one in said]
            if not together or PartialState().is_main_process:
                folder.write_rows(f"{name}/{seed}.jsonl", rows)
        if together:
            PartialState().wait_for_everyone()
        return [Completion(row["ids"], torch.full((len(row["ids"]),), math.nan), row["ended"]) for row in read(path)]

    return sample


def holds(path: Path, prompts: Sequence[list[int]]) -> bool:
    """Whether a file holds answers to these prompts; a damaged one does not."""
    try:
        rows = read(path) if path.exists() else []
        return [row["prompt_ids"] for row in rows if {*row} >= {"ids", "ended"}] == list(prompts)
    except (ValueError, KeyError, TypeError):
        return False


def merge(
    model: str, here: Path, folder: RunFolder, accelerator: Accelerator, section: ModelSection | None = None
) -> str:
    """The round's adapter in the weights that it was trained on, in round-n/merged: what the next round starts from.

    Args:
        model: where the round started from; its tokenizer goes along.
        here: the round's folder.
        section: of the recipe, for how the weights are loaded. Default None: as they were saved.
    """
    if accelerator.is_main_process and not (here / "merged").exists():
        asked = section or ModelSection()
        plain = ModelSection(dtype="auto", trust_remote_code=asked.trust_remote_code)
        own = {"trust_remote_code": asked.trust_remote_code, "revision": asked.model_revision}
        tokenizer = load.load_tokenizer(model, **own)
        whole = merged(str(here / "train" / "final"), plain, tokenizer)
        with folder.written(f"{here.name}/merged") as path:
            whole.save_pretrained(path)
            tokenizer.save_pretrained(path)
    accelerator.wait_for_everyone()
    return str(here / "merged")
