"""One training run, from a recipe to a folder with a model: load, check, train, save, report."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from align_engine import heads, policy
from align_engine import recipe as recipes
from align_engine import reference as references
from align_engine.algorithms import ALGORITHMS, Algorithm, check_loss
from align_engine.callbacks import Callbacks, from_recipe
from align_engine.checkpoint import RunFolder
from align_engine.data.batches import Batch
from align_engine.data.sources import load_rows
from align_engine.data.tokenize import check_vocab, describe, prepare
from align_engine.engine import Engine
from align_engine.errors import BadInput
from align_engine.experience import Prompts, Rollouts
from align_engine.kto import class_weights, with_strangers
from align_engine.loops import Training, offline, online
from align_engine.metrics import Journal
from align_engine.online import ValueHead
from align_engine.recipe import GrpoRecipe, KtoRecipe, OnlineRecipe, PpoRecipe, Recipe
from align_engine.source import Source, rows_seen, total_steps


def train(name: str, recipe: Recipe, callbacks: Sequence[Any] = ()) -> RunFolder:
    """Run the algorithm `name` as the recipe says; go on where an earlier call with the same recipe stopped.

    Args:
        callbacks: transformers.TrainerCallback classes or objects, besides those that the recipe names.
    Returns:
        the run's folder, with the trained model in `final`.
    Raises:
        BadInput: before anything is computed. RunFailed: later; the last checkpoint is whole.
    """
    recipes.check(recipe)
    algorithm = ALGORITHMS[name]
    accelerator = make_accelerator(recipe)
    check_choices(recipe, accelerator.device)
    check_loss(algorithm, recipe)
    callbacks = [*from_recipe(recipe), *callbacks]
    folder, finished = open_folder(name, recipe, accelerator)
    if finished:
        return folder

    tokenizer = policy.load_tokenizer(recipe.model.model_name_or_path, distinct_pad=algorithm.scalar)
    if algorithm.scalar and tokenizer.pad_token_id == tokenizer.eos_token_id:
        accelerator.print("pad and EOS are one token: transformers' own forward will read scores before the EOS")
    data = recipe.data
    shared, evaluation = (recipe, algorithm, tokenizer, folder, accelerator), None
    source = load_source(data.dataset_name, data.dataset_train_split, *shared)
    if data.eval_dataset_name or data.dataset_test_split:
        where = data.eval_dataset_name or data.dataset_name
        evaluation = load_source(where, data.dataset_test_split, *shared, training=False)
    if isinstance(recipe, KtoRecipe):
        loss, said = class_weights(source.rows, recipe.loss)
        recipe = dataclasses.replace(recipe, loss=loss)
        accelerator.print(said)
    steps = total_steps(source, recipe.train.num_train_epochs, recipe.train.max_steps)

    set_seed(recipe.train.seed)
    model = load_policy(recipe, algorithm, tokenizer)
    for part in filter(None, (source, evaluation)):
        check_source(part, model, recipe)
    if not algorithm.scalar:
        policy.check_head(model)
    check_room(folder, model, recipe)
    begin(folder, recipe, accelerator, {"data": source.fingerprint()})
    set_seed(recipe.train.seed, device_specific=True)
    engine = Engine(model, algorithm, recipe, steps, accelerator)
    if needs_reference(recipe, algorithm):
        add_reference(engine, source, evaluation, rows_seen(source, steps) if algorithm.reference else [], folder)
    for part in (source, evaluation):
        if isinstance(part, Rollouts):
            part.start(engine, learns=part is source)
    if checkpoints := folder.checkpoints():
        engine.restore(checkpoints[-1])
        accelerator.print(f"going on from {checkpoints[-1]}")
    if accelerator.is_main_process:
        folder.truncate_metrics(engine.progress.step)
    accelerator.init_trackers("align", config={k: str(v) for k, v in recipes.flat(recipe).items()})
    accelerator.print(summary(engine, source, steps))
    with Journal(folder.metrics, accelerator, steps, engine.progress.step, name) as journal:
        around = Callbacks(engine, tokenizer, steps, source.steps_per_epoch, callbacks)
        training = Training(engine, evaluation, folder, journal, around, steps, source.steps_per_epoch)
        if isinstance(source, Rollouts):
            online(training, source)
        else:
            offline(training, source)
    if best := training.best():
        accelerator.print(f"the model is that of step {best}, the best evaluation")
        engine.restore(folder.checkpoint(best))
    engine.save_model(folder, tokenizer)
    finish(folder, name, recipe, accelerator)
    for tracker in accelerator.trackers:  # not end_training: the processes stay together for a further run
        tracker.finish()
    return folder


def open_folder(name: str, recipe: Recipe, accelerator: Accelerator) -> tuple[RunFolder, bool]:
    """The folder of the run, and whether it holds the run already, finished."""
    identity = {"algorithm": name, "processes": accelerator.num_processes, **recipes.identity(recipe)}
    folder = RunFolder(recipe.output.output_dir, identity)
    finished = folder.finished(recipe.output.overwrite)
    if finished:
        accelerator.print(f"{folder.path} holds this run, finished: nothing to do (model in {folder.final})")
    return folder, finished


def begin(folder: RunFolder, recipe: Recipe, accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Make the folder, or go on in it, with the recipe in it; `facts` are as RunFolder.begin has them."""
    with accelerator.main_process_first():
        folder.begin(facts, recipe.output.overwrite and accelerator.is_main_process)
    if accelerator.is_main_process:
        with folder.written("recipe.yaml") as path:
            recipes.save(recipe, path)


def finish(folder: RunFolder, name: str, recipe: Recipe, accelerator: Accelerator) -> None:
    """Write the report of a run whose model is there."""
    if accelerator.is_main_process:
        from align_engine.report import write_report

        write_report(folder, name, recipe)
        folder.mark(finished=True)
    accelerator.wait_for_everyone()
    accelerator.print(f"model in {folder.final}, curves in {folder.path / 'report.html'}")


def check_choices(recipe: Recipe, device: torch.device) -> None:
    """Refuse names that the kernels or transformers do not know, before anything is loaded."""
    from transformers import SchedulerType

    from align_kernels.dispatch import IMPLS, pick
    from align_kernels.losses.grpo import LOSS_TYPES as GROUP_TYPES

    values = recipes.flat(recipe)
    policy.check_path(values.get("ref_model_name_or_path") or recipe.model.model_name_or_path)
    choices = {"impl": IMPLS, "lr_scheduler_type": [kind.value for kind in SchedulerType]}
    if isinstance(recipe, GrpoRecipe):
        choices["loss_type"] = GROUP_TYPES
    for name, known in choices.items():
        if name in values and values[name] not in known:
            raise BadInput(f"{name} = {values[name]!r} is none of {', '.join(known)}")
    if recipe.kernels.impl not in ("auto", "eager"):
        try:
            pick(recipe.kernels.impl, device, torch.float32)
        except ValueError as error:
            raise BadInput(str(error)) from error


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Device, precision and trackers; refuses a tracker that is not installed."""
    from accelerate.tracking import get_available_trackers

    available = [str(tracker.value) for tracker in get_available_trackers()]
    if missing := [tracker for tracker in recipe.output.report_to if tracker not in available]:
        raise BadInput(
            f"report_to = {missing[0]!r} is not installed or unknown; here: {', '.join(available) or 'none'}"
        )
    bf16 = recipe.train.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    trackers: Any = recipe.output.report_to or None
    return Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        log_with=trackers,
        project_dir=recipe.output.output_dir,
    )


def load_prepared(
    where: str, split: str | None, kind: Any, recipe: Recipe, tokenizer: Any, accelerator: Accelerator
) -> tuple[Any, Any]:
    """Rows from file to token ids, with what was dropped or cut said once: (prepared, as they stand in the file)."""
    names = ("max_length", "max_prompt_length", "overlong", "bad_rows")
    limits = {name: getattr(recipe.data, name) for name in names}
    try:
        with accelerator.main_process_first():
            found = load_rows(where, split)
            rows, report = prepare(found, tokenizer, kind, num_proc=recipe.data.dataset_num_proc, **limits)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(f"{where}: {error}") from error
    accelerator.print(f"{where}: {describe(report)}")
    return rows, found


def load_source(
    where: str, split: str | None, recipe: Recipe, algorithm: Algorithm, tokenizer: Any, folder: RunFolder,
    accelerator: Accelerator, training: bool = True,
) -> Source:  # fmt: skip
    """The rows of a file as the algorithm learns from them."""
    train, (rows, found) = recipe.train, load_prepared(where, split, algorithm.kind, recipe, tokenizer, accelerator)
    if isinstance(recipe, OnlineRecipe):
        return Rollouts(Prompts(rows, found, tokenizer, recipe, accelerator, folder))
    if algorithm.kind == "unpaired":
        rows = with_strangers(rows, train.seed, recipe.data.max_length)
    rank_margin = recipes.flat(recipe).get("rank_margin", 0.0)
    return Source(
        with_margins(rows, rank_margin) if rank_margin else rows,
        algorithm.collate,
        tokenizer.pad_token_id,
        train.per_device_train_batch_size if training else recipe.eval.per_device_eval_batch_size,
        train.gradient_accumulation_steps if training else 1,
        accelerator.process_index,
        accelerator.num_processes,
        train.seed,
    )


def with_margins(rows: Any, per_rank: float) -> Any:
    """A column `margin` from the ranks of the two answers, rank 1 being the best."""
    if missing := {"chosen_rank", "rejected_rank"} - set(rows.column_names):
        raise BadInput(f"rank_margin = {per_rank}: the rows have no column {' and no '.join(sorted(missing))}")
    ranks = np.asarray(rows["rejected_rank"][:]) - np.asarray(rows["chosen_rank"][:])
    if "margin" in rows.column_names:
        raise BadInput(f"rank_margin = {per_rank}, and the rows have a column `margin` too: leave one of them out")
    return rows.add_column("margin", per_rank * ranks.astype(np.float64))


def check_source(source: Source, model: Any, recipe: Recipe) -> None:
    """Refuse rows with token ids that the model has no embedding for."""
    try:
        check_vocab(source.rows, policy.causal_model(model).get_input_embeddings().num_embeddings)
    except ValueError as error:
        raise BadInput(f"{recipe.model.model_name_or_path}: {error}") from error


def check_room(folder: RunFolder, model: Any, recipe: Recipe) -> None:
    """Refuse a disk that cannot hold the checkpoints that the run keeps, one being written, and the final model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    need = (1 + (recipe.output.save_total_limit or 1)) * 3 * weights + weights  # AdamW holds two more of each weight
    place = next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise BadInput(
            f"output_dir = {str(folder.path)!r}: {free / 2**30:.1f} GiB are free, and the checkpoints need about "
            f"{need / 2**30:.1f} GiB; choose another disk, or a lower save_total_limit"
        )


def load_policy(recipe: Recipe, algorithm: Algorithm, tokenizer: Any) -> Any:
    """The model to train: head, adapters, checkpointing and dropout as the recipe and the algorithm say."""
    path, section = recipe.model.model_name_or_path, recipe.model
    if policy.adapter_base(path) is not None and not section.use_peft:
        raise BadInput(f"model_name_or_path = {path!r} holds adapters: add --use_peft to train them further")
    if algorithm.scalar:
        model = heads.load_scalar_model(path, section, tokenizer.pad_token_id)
    else:
        model = policy.load_model(path, section)
    if section.use_peft and policy.adapter_base(path) is None:
        model = policy.add_adapters(model, section, "SEQ_CLS" if algorithm.scalar else "CAUSAL_LM")
    if section.use_peft and needs_reference(recipe, algorithm) and reference_kind(recipe)[0] in ("adapter-copy", "ema"):
        references.copy_adapter(model)
    if isinstance(recipe, PpoRecipe):
        own = recipe.loss.value_model_name_or_path
        critic = heads.load_scalar_model(own, section, tokenizer.pad_token_id) if own else None
        causal = policy.causal_model(model)
        causal.value_head = ValueHead(causal.config.get_text_config().hidden_size, critic)
    if recipe.train.gradient_checkpointing:
        policy.checkpoint_activations(model)
    if not algorithm.dropout:
        policy.disable_dropout(model)
    return model.train()


def reference_kind(recipe: Recipe) -> tuple[str, str]:
    """How the recipe gets its reference, and the sentence that says why."""
    values, model = recipes.flat(recipe), recipe.model
    saved = policy.adapter_base(model.model_name_or_path) is not None
    own, rollouts = values["ref_model_name_or_path"] is not None, isinstance(recipe, OnlineRecipe)
    return references.choose(values["reference"], model.use_peft, own, saved, rollouts)


def needs_reference(recipe: Recipe, algorithm: Algorithm) -> bool:
    """Whether the loss has a reference: always, or where the weight of its KL term is not 0."""
    return algorithm.reference or bool(recipes.flat(recipe).get(algorithm.kl))


def add_reference(
    engine: Engine, source: Source, evaluation: Source | None, rows: list[int], folder: RunFolder
) -> None:
    """Give batches their `ref_logps`, in the way the recipe names."""
    recipe, accelerator, values = engine.recipe, engine.accelerator, recipes.flat(engine.recipe)
    own, inner = values["ref_model_name_or_path"], accelerator.unwrap_model(engine.model)
    per_token = engine.algorithm.credit is not None
    kind, why = reference_kind(recipe)
    accelerator.print(f"reference {kind}: {why}")
    model, how = engine.model, contextlib.nullcontext
    if kind == "none":
        engine.reference = lambda batch: torch.zeros(len(batch.targets), device=batch.targets.device)
        return
    if kind == "adapter-off":
        how = inner.disable_adapter
    elif kind == "adapter-copy" or (kind == "ema" and recipe.model.use_peft):
        how = partial(references.adapter, inner, references.COPY)
    elif own or kind != "precomputed":
        model = policy.load_model(own or recipe.model.model_name_or_path, recipe.model).requires_grad_(False)
        if kind == "cpu-offload":
            model = references.offload(model, accelerator.device)
        else:
            model = accelerator.prepare_model(model, evaluation_mode=True)
        policy.check_head(model)
    if kind == "ema":
        engine.after_step = follower = references.Follower(
            references.pairs_of_adapters(inner, inner.active_adapter)
            if recipe.model.use_peft
            else list(zip(model.parameters(), engine.model.parameters())),
            values["ref_model_mixup_alpha"],
            values["ref_model_sync_steps"],
        )
        accelerator.register_for_checkpointing(follower)
    if model is not engine.model:
        model.eval()
    if kind != "precomputed":

        def live(batch: Batch) -> torch.Tensor:
            with how():
                return references.reference_logps(model, batch, engine.head_options, per_token)

        engine.reference = live
        return
    training = model.training
    model.eval()
    for name, part, needed in (("train", source, rows), ("eval", evaluation, None)):
        if part is not None:
            needed = list(range(len(part))) if needed is None else needed
            served = references.precompute(model, part, needed, name, folder, accelerator, engine.head_options)
            accelerator.print(
                f"reference log-probs of {len(needed)} {name} rows {'read again' if served else 'computed'}"
            )
    model.train(training)


def summary(engine: Engine, source: Source, steps: int) -> str:
    """What is about to run, in one line."""
    trained = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in engine.model.parameters())
    processes = engine.accelerator.num_processes
    return (
        f"{engine.algorithm.name}: {trained:,} of {everything:,} weights trained, {len(source):,} rows, {steps} steps "
        f"of {source.window_size} rows ({processes} process{'es' if processes > 1 else ''}, "
        f"{engine.accelerator.device}, {engine.accelerator.mixed_precision} mixed precision)"
    )
