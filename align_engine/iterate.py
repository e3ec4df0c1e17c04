"""Iterative preference optimisation (arXiv:2405.07863): rounds of sampling, scoring, pairing and training.

    round-1/samples.jsonl   every completion with its score
    round-1/pairs.jsonl     best and worst of each prompt, as token ids; prompts whose completions tie are left out
    round-1/train/          the round's training run, with its model in `final`
    metrics.jsonl           one line per round, of its samples
    final/                  the last round's model

Each file and folder appears whole or not at all, so a run that is killed goes on inside its round.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from align_engine import policy
from align_engine import recipe as recipes
from align_engine import rewards as scoring
from align_engine.algorithms import ALGORITHMS
from align_engine.checkpoint import RunFolder
from align_engine.credit import best_versus_worst
from align_engine.data import describe, load_rows, prepare
from align_engine.errors import BadInput, RunFailed
from align_engine.experience import length_metrics
from align_engine.recipe import IterateRecipe, Recipe
from align_engine.rollout import Completion, sample_all, transformers_sampler
from align_engine.run import make_accelerator, train
from align_engine.server import check_server, reload_weights, server_sampler
from align_engine.source import endless_order

if TYPE_CHECKING:
    from accelerate import Accelerator


def iterate(recipe: IterateRecipe) -> RunFolder:
    """All rounds; goes on where an earlier call with the same recipe stopped.

    Returns:
        the run's folder, with the last round's model in `final`.
    Raises:
        BadInput: before anything is computed. RunFailed: later; what is there is whole.
    """
    recipes.check(recipe)
    options, accelerator = recipe.iteration, make_accelerator(recipe)
    recipes.check(round_recipe(recipe, "model", Path("round-1"), 1))
    identity = {"algorithm": "iterate", "processes": accelerator.num_processes, **recipes.identity(recipe)}
    folder = RunFolder(recipe.output.output_dir, identity)
    if folder.inspect(recipe.output.overwrite) == "finished":
        accelerator.print(f"{folder.path} holds this run, finished: nothing to do (model in {folder.final})")
        return folder
    sampling = Sampling(recipe, folder, accelerator)
    with accelerator.main_process_first():
        folder.begin({}, recipe.output.overwrite and accelerator.is_main_process)
    if accelerator.is_main_process:
        with folder.written("recipe.yaml") as path:
            recipes.save(recipe, path)
    started = "round 1 starts" if options.reference == "initial" else "each round starts"
    accelerator.print(f"reference {options.reference}: the model that {started} from")
    model = recipe.model.model_name_or_path
    for number in range(1, options.rounds + 1):
        here = folder.path / f"round-{number}"
        if not (here / "pairs.jsonl").exists():
            sampling.write(number, model)
        accelerator.print(f"round {number} of {options.rounds}: {options.method} on {here / 'pairs.jsonl'}")
        train(options.method, round_recipe(recipe, model, here, number))
        model = merge(model, here, folder, accelerator) if recipe.model.use_peft else str(here / "train" / "final")
    if accelerator.is_main_process:
        from align_engine.report import write_report

        with folder.written("final") as path:
            shutil.copytree(model, path)
        write_report(folder, "iterate", recipe)
        folder.finish()
    accelerator.wait_for_everyone()
    accelerator.print(f"model in {folder.final}, curves in {folder.path / 'report.html'}")
    return folder


def round_recipe(recipe: IterateRecipe, model: str, here: Path, number: int) -> Recipe:
    """The recipe of a round's training: the shared sections, the method's own settings, the round's paths.

    Raises:
        BadInput: a method that does not learn from preferences, or a setting that it does not have.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    options = recipe.iteration
    known = [name for name, row in ALGORITHMS.items() if row.kind == "preference" and not row.scalar]
    if options.method not in known:
        raise BadInput(f"method = {options.method!r} is none of {', '.join(known)}")
    made: Any = recipes.RECIPES[options.method]()
    try:
        changes = OmegaConf.from_dotlist([f"loss.{setting}" for setting in options.method_settings])
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(made), changes))
    except OmegaConfBaseException as error:
        raise BadInput(f"method_settings = {options.method_settings}: {str(error).splitlines()[0]}") from error
    for name in ("model", "data", "train", "eval", "output", "kernels"):
        setattr(made, name, copy.deepcopy(getattr(recipe, name)))
    made.model.model_name_or_path, made.output.output_dir = model, str(here / "train")
    made.data.dataset_name, made.data.dataset_train_split = str(here / "pairs.jsonl"), "train"
    made.output.overwrite = False
    if options.reference == "initial" and number > 1:
        for section in vars(made).values():
            if hasattr(section, "ref_model_name_or_path"):
                section.ref_model_name_or_path = recipe.model.model_name_or_path
    return made


class Sampling:
    """The first half of a round: completions, scores and pairs.

    Args:
        recipe: its sections data, rollout and iteration.
        folder: of the run.
        accelerator: shares the work out among the ranks.
    """

    def __init__(self, recipe: IterateRecipe, folder: RunFolder, accelerator: Accelerator) -> None:
        data = recipe.data
        self.recipe, self.settings, self.folder, self.accelerator = recipe, recipe.rollout, folder, accelerator
        self.tokenizer = policy.load_tokenizer(recipe.model.model_name_or_path)
        check_server(self.settings)
        self.rewards = scoring.load_rewards(self.settings.reward_funcs, accelerator.device)
        limits = {name: getattr(data, name) for name in ("max_length", "max_prompt_length", "overlong", "bad_rows")}
        with accelerator.main_process_first():
            self.columns = load_rows(data.dataset_name, data.dataset_train_split)
            self.rows, report = prepare(self.columns, self.tokenizer, "prompt", **limits)
        accelerator.print(f"{data.dataset_name}: {describe(report)}")

    def write(self, number: int, model_path: str) -> None:
        """Write samples.jsonl and pairs.jsonl of round `number`, sampled from the model at `model_path`.

        Raises:
            RunFailed: all completions of every prompt tie.
        """
        size, seed, n = self.settings.num_generations, self.recipe.train.seed, len(self.rows)
        count = self.recipe.iteration.prompts_per_round or n
        chosen = [endless_order(n, seed, place) for place in range((number - 1) * count, number * count)]
        asked = [row for row in chosen for _ in range(size)]
        prompts = self.rows[asked]["prompt_ids"]
        completions = self.sample(model_path, prompts, (seed, number))
        ids = [one.ids for one in completions]
        answers = scoring.Answers.of(self.columns[self.rows[asked]["index"]], ids, self.tokenizer)
        if self.settings.reward_funcs == [scoring.HUMAN]:
            with self.accelerator.main_process_first():
                scores = scoring.human_scores(self.folder.path / "marks", number, answers)
        else:
            scores = scoring.score_over_ranks(self.rewards, answers, size, self.accelerator)
        ended = [one.ended for one in completions]
        total = scoring.combine(scores, self.settings, ended)
        pairs = best_versus_worst(total, size)
        numbers = scoring.reward_metrics(self.rewards, scores, total, size) | length_metrics(list(map(len, ids)), ended)
        numbers |= {"pairs": len(pairs), "frac_tied": 1 - len(pairs) / count}
        if pairs:
            sides = zip(("rewards/chosen", "rewards/rejected"), zip(*pairs))
            numbers |= {name: float(total[list(places)].mean()) for name, places in sides}
        self.accelerator.print(
            f"round {number}: reward {numbers['reward']:.4g}, {len(pairs)} pairs of {count} prompts (the others tie)"
        )
        if not pairs:
            raise RunFailed(
                f"round {number}: the completions of every prompt tie; raise num_generations or temperature"
            )
        if self.accelerator.is_main_process:
            self.put(number, answers, prompts, total, pairs, numbers)
        self.accelerator.wait_for_everyone()

    def sample(self, model_path: str, prompts: list[list[int]], seeds: tuple[int, int]) -> list[Completion]:
        """One completion of each prompt by the model at a path, which is freed again."""
        settings, name = self.settings, self.recipe.model.model_name_or_path
        if settings.server_base_url:
            sampler = server_sampler(self.tokenizer, settings, name)
            if settings.server_weights and self.accelerator.is_main_process:
                shutil.copytree(model_path, settings.server_weights, dirs_exist_ok=True)
                reload_weights(settings)
            self.accelerator.wait_for_everyone()
        else:
            model = policy.load_model(model_path, self.recipe.model)
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
            sampler = transformers_sampler(model, self.tokenizer, settings)
        found = sample_all(sampler, prompts, settings.per_device_generation_batch_size, seeds, self.accelerator)
        self.accelerator.free_memory()
        return found

    def put(
        self, number: int, answers: scoring.Answers, prompts: list[list[int]], total: Tensor,
        pairs: list[tuple[int, int]], numbers: dict[str, float],
    ) -> None:  # fmt: skip
        """Write the round's files, pairs.jsonl last: it says that the others are there."""
        here = f"round-{number}"
        (self.folder.path / here).mkdir(exist_ok=True)
        scores = [None if math.isnan(score) else score for score in total.tolist()]
        said = zip(answers.prompts, answers.completions, scores)
        samples = [{"prompt": prompt, "completion": completion, "score": score} for prompt, completion, score in said]
        self.folder.truncate_metrics(number - 1)
        with self.folder.metrics.open("a") as file:
            file.write(json.dumps({"step": number, **numbers}) + "\n")
        ids = answers.completion_ids
        rows = [
            {"prompt_ids": prompts[best], "chosen_ids": ids[best], "rejected_ids": ids[worst],
             "chosen": answers.completions[best], "rejected": answers.completions[worst],
             "chosen_score": scores[best], "rejected_score": scores[worst]}
            for best, worst in pairs
        ]  # fmt: skip
        for name, content in (("samples", samples), ("pairs", rows)):
            with self.folder.written(f"{here}/{name}.jsonl") as path:
                path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def merge(model: str, here: Path, folder: RunFolder, accelerator: Accelerator) -> str:
    """The round's adapter in the weights that it was trained on, in round-n/merged: what the next round starts from."""
    if accelerator.is_main_process and not (here / "merged").exists():
        from peft import AutoPeftModelForCausalLM

        adapted: Any = AutoPeftModelForCausalLM.from_pretrained(here / "train" / "final")
        with folder.written(f"{here.name}/merged") as path:
            adapted.merge_and_unload().save_pretrained(path)
            policy.load_tokenizer(model).save_pretrained(path)
    accelerator.wait_for_everyone()
    return str(here / "merged")
