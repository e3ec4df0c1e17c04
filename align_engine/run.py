"""One training run, from a recipe to a folder with a model: load, check, train, save, report."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
from transformers.trainer_utils import align_special_tokens

from align_engine import inputs
from align_engine import recipe as recipes
from align_engine.algorithms import ALGORITHMS
from align_engine.data.exact import media_columns
from align_engine.data.sources import Origin, cache_errors, load_rows
from align_engine.data.tokenize import check_vocab, describe, has_several_answers, prepare, processes
from align_engine.data.windows import Source, total_steps
from align_engine.errors import BadInput
from align_engine.integrations import hook
from align_engine.models import load
from align_engine.models.modelfiles import check_path
from align_engine.planning import cards
from align_engine.planning.cards import size
from align_engine.planning.fit import fitted
from align_engine.recipe import OnlineEval, OnlineRecipe, Recipe, RmRecipe, RolloutSection, SftLoss, TrainSection
from align_engine.recipe.secrets import masked
from align_engine.recipe.values import NO, YES
from align_engine.reports import benchmarks, card, hub
from align_engine.rollouts import rewards
from align_engine.rollouts.source import Prompts, Rollouts
from align_engine.training import allocator, optimiser, packing, precomputed, ranks, samples, stops, tensor_parallel
from align_engine.training import reference as references
from align_engine.training.algorithm import Algorithm, keywords
from align_engine.training.callbacks import Callbacks, from_recipe
from align_engine.training.checkpoint import RunFolder
from align_engine.training.engine import Engine
from align_engine.training.loop import Training
from align_engine.training.metrics import Journal
from align_engine.training.policy import make_policy


def train(name: str, recipe: Recipe, callbacks: Sequence[Any] = ()) -> RunFolder:
    """Run the algorithm `name` as the recipe says; go on where an earlier call with the same recipe stopped.

    Args:
        callbacks: transformers.TrainerCallback classes or objects, besides those that the recipe names.
    Returns:
        the run's folder, with the trained model in `final`.
    Raises:
        BadInput: before anything is computed. RunFailed: later; the last checkpoint is whole. Stopped: by a signal.
    """
    recipe = recipes.check(recipe)
    inputs.check_outputs(recipe)
    hub.check(recipe.output)
    algorithm = ALGORITHMS[name]
    accelerator = make_accelerator(recipe)
    check_choices(recipe, accelerator)
    tensor_parallel.check(recipe, algorithm.scalar)
    check_loss(algorithm, recipe)
    recipe = settle_memory(name, recipe, accelerator)
    callbacks = [*from_recipe(recipe), *callbacks]
    with open_folder(name, recipe, accelerator) as (folder, finished):
        if not finished:
            fit(algorithm, recipe, accelerator, folder, callbacks)
    publish(folder, recipe, accelerator)
    return folder


def settle_memory(name: str, recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe that fits where `fit` asks for it, what was changed said: it is the run's from here on.

    Raises:
        BadInput: it cannot fit; no such memory; a model in shards.
    """
    if recipe.train.fit is None:
        return recipe
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise BadInput(f"fit = {recipe.train.fit!r} plans for whole models on each device, not for shards of "
                       f"{accelerator.distributed_type}: leave it out")  # fmt: skip
    card = cards.card(recipe.train.fit, "fit")
    if card.gpu != (accelerator.device.type == "cuda"):
        raise BadInput(f"fit = {recipe.train.fit!r} is a GPU, and this run is on {accelerator.device}: give a size, or "
                       f"ask align plan {name} --memory {recipe.train.fit}")  # fmt: skip
    if not card.gpu:  # processes share a machine's memory
        card = card._replace(size=card.size // accelerator.num_processes)
    made = fitted(name, recipe, card)
    accelerator.print(f"fit {recipe.train.fit}: {made.rehearsed.peak.name} takes {size(made.rehearsed.peak.peak)} of "
                      f"{size(card.usable)}")  # fmt: skip
    for change in made.changes:
        accelerator.print(f"  {change}")
    return made.recipe


def fit(
    algorithm: Algorithm, recipe: Recipe, accelerator: Accelerator, folder: RunFolder, callbacks: Sequence[Any]
) -> None:
    """Load, train, save and report, in a folder that is ours."""
    section = recipe.model
    if recipe.train.tune_malloc and accelerator.device.type == "cpu":
        accelerator.print(allocator.tune())
    own = {"trust_remote_code": section.trust_remote_code, "revision": section.model_revision}
    tokenizer = load.load_tokenizer(section.model_name_or_path, algorithm.scalar, **own)
    if algorithm.scalar and tokenizer.pad_token_id == tokenizer.eos_token_id:
        accelerator.print("pad and EOS are one token: transformers' own forward will read scores before the EOS")
    data = recipe.data
    shared, evaluation = (recipe, algorithm, tokenizer, folder, accelerator), None
    source = load_source(data.dataset_name, data.dataset_train_split, data.dataset_config, *shared)
    if (data.eval_dataset_name or data.dataset_test_split) and recipe.eval.eval_strategy != "no":
        where, config = data.eval_dataset_name or data.dataset_name, data.dataset_config
        config = None if data.eval_dataset_name else config
        evaluation = load_source(where, data.dataset_test_split, config, *shared, training=False)
    tasks = benchmarks.in_training(recipe.eval, tokenizer)
    recipe, said = algorithm.settle(source.rows, recipe)
    if said:
        accelerator.print(said)
    steps = total_steps(source, recipe.train.num_train_epochs, recipe.train.max_steps)

    set_seed(recipe.train.seed)
    model = load_policy(recipe, algorithm, tokenizer)
    parts = [part for part in (source, evaluation) if part is not None]
    longest = max(part.longest() for part in parts)
    check_model(model, tokenizer, parts, longest, algorithm)
    check_others(recipe, tokenizer, parts)
    check_room(folder, model, recipe, optimiser.state_per_weight(recipe.train, accelerator.device))
    facts = {"data": source.fingerprint(), "eval data": evaluation and evaluation.fingerprint(), "steps": steps}
    check_extent(folder, recipe, steps)
    set_seed((recipe.train.seed + accelerator.process_index) % 2**32)
    engine = Engine(model, algorithm, recipe, steps, accelerator, longest)
    engine.check_noise()
    asked_before = references.attach(engine) if algorithm.refers(recipe) else None
    packing.settle(engine, *parts)
    begin(folder, recipe, accelerator, inputs.facts(recipe) | facts)
    if asked_before is not None:
        precomputed.precompute_all(engine, asked_before, source, evaluation, steps, folder)
    for part in parts:
        part.start(engine, learns=part is source)
    learn(engine, source, evaluation, tokenizer, folder, steps, callbacks, tasks)


def learn(
    engine: Engine, source: Source, evaluation: Source | None, tokenizer: Any, folder: RunFolder, steps: int,
    callbacks: Sequence[Any], tasks: Callable[[Engine], dict[str, float]] | None,
) -> None:  # fmt: skip
    """Train from where the folder stands to the last step, save and report."""
    recipe, accelerator, name = engine.recipe, engine.accelerator, engine.algorithm.name
    if checkpoints := folder.checkpoints():
        engine.restore(checkpoints[-1], folder)
        accelerator.print(f"going on from {checkpoints[-1]}")
    logged: list[dict[str, Any]] = []
    if accelerator.is_main_process:
        logged = folder.truncate_metrics(engine.progress.step)
        if isinstance(recipe, OnlineRecipe):
            folder.truncate(samples.FILE, engine.progress.step)
    settings = masked(recipes.flat(recipe))
    settings = {key: str(value) for key, value in settings.items()}
    accelerator.init_trackers("align", config=settings, init_kwargs=run_names(recipe.output.run_name))
    accelerator.print(summary(engine, source, steps))
    journal = Journal(folder.metrics, accelerator, steps, engine.progress.step, name)
    with journal.bar:
        around = Callbacks(engine, tokenizer, steps, source.steps_per_epoch, callbacks)
        around.state.log_history += logged
        training = Training(engine, evaluation, folder, journal, around, steps, source, tasks)
        with stops.graceful(journal.say):
            for window in training.windows():
                training.learnt(engine.learn(window, journal.clock))
    if best := training.best():
        accelerator.print(f"the model is that of step {best}, the best evaluation")
        engine.restore(folder.checkpoint(best), folder)
    said = card.card(folder, name, recipe) if accelerator.is_main_process else ""
    engine.save_model(folder, tokenizer, said)
    finish(folder, name, recipe, accelerator)
    for tracker in accelerator.trackers:  # not end_training: the processes stay together for a further run
        tracker.finish()


def run_names(name: str | None) -> dict[str, Any]:
    """What accelerate's trackers take so that they call the run so."""
    known = {
        "wandb": "name",
        "trackio": "name",
        "mlflow": "run_name",
        "swanlab": "experiment_name",
        "clearml": "task_name",
    }
    return {tracker: {keyword: name} for tracker, keyword in known.items()} if name else {}


@contextlib.contextmanager
def open_folder(name: str, recipe: Recipe, accelerator: Accelerator) -> Iterator[tuple[RunFolder, bool]]:
    """The folder of the run, inside the block this run's alone, and whether it holds the run already, finished.

    Raises:
        Stopped: a KeyboardInterrupt ended the block.
    """
    processes, overwrite = accelerator.num_processes, recipe.output.overwrite
    folder = RunFolder(recipe.output.output_dir, {"algorithm": name, **recipes.identity(recipe, processes)})
    if not overwrite:
        check_share(folder, recipe, processes)
        check_resume(folder, recipe.output.resume_from_checkpoint)
    if folder.finished(overwrite):
        accelerator.print(f"{folder.path} holds this run, finished: nothing to do (model in {folder.final})")
        yield folder, True
        return
    with folder.locked() if accelerator.is_main_process else contextlib.nullcontext():
        try:
            yield folder, folder.finished(overwrite)
        except KeyboardInterrupt as error:
            raise stops.Stopped(f"stopped; {folder.standing()}") from error


def check_share(folder: RunFolder, recipe: Recipe, processes: int) -> None:
    """Refuse settings that make other steps of the folder's run than it was begun with.

    Raises:
        BadInput: with the settings that make the same ones.
    """
    identity, train = folder.record()["identity"], recipe.train
    rows, size = identity.get("rows_per_step"), train.per_device_train_batch_size
    now = recipes.rows_per_step(recipe, processes)
    if rows is None or rows == now:
        return
    held = f"output_dir = {str(folder.path)!r} holds a run with {rows} rows per step"
    if rows % processes:
        known = [str(count) for count in range(1, rows + 1) if rows % count == 0]
        raise BadInput(f"{held}, which {processes} processes cannot share: start {' or '.join(known[:8])}")
    fits = max(one for one in range(1, size + 1) if rows // processes % one == 0)
    settings = [f"per_device_train_batch_size = {fits}"] * (fits != size)
    settings.append(f"gradient_accumulation_steps = {(accumulation := rows // processes // fits)}")
    if isinstance(recipe, OnlineRecipe) and (windows := identity.get("steps_per_rollout", 1)) > 1:
        settings.append(f"steps_per_generation = {windows * accumulation}")
    product = f"{size} x {train.gradient_accumulation_steps} x {processes} = {now}"
    raise BadInput(
        f"{held}, and per_device_train_batch_size x gradient_accumulation_steps x processes is {product}: go on with "
        f"{', '.join(settings)}, or give another folder"
    )


def check_resume(folder: RunFolder, wanted: str | None) -> None:
    """Refuse to begin, or to go on, where `resume_from_checkpoint` asks for the other or for another checkpoint.

    Raises:
        BadInput: with the way out.
    """
    if wanted is None:
        return
    held, there, said = folder.record()["identity"], folder.checkpoints(), f"resume_from_checkpoint = {wanted!r}"
    place = f"output_dir = {str(folder.path)!r}"
    if wanted.lower() in NO:
        if held:
            raise BadInput(f"{said}: {place} holds a run: give another folder, or --overwrite to delete that run")
    elif wanted.lower() in YES:
        if not held:
            raise BadInput(f"{said}: {place} holds no run to go on with: leave it out to begin one")
    elif (path := Path(wanted).expanduser().resolve()) not in [one.resolve() for one in there]:
        raise BadInput(f"{said} is no checkpoint of {place}" + (f": there is {there[-1]}" if there else ""))
    elif path != there[-1].resolve():
        later = ", ".join(one.name for one in there if one.name > path.name)
        raise BadInput(f"{said} is not the last one: delete {later}, and the same command goes on from it")


def check_extent(folder: RunFolder, recipe: Recipe, steps: int) -> None:
    """Refuse another number of steps than the folder's run was begun with, where that changes the steps already done.

    Raises:
        BadInput: with the ways to go on.
    """
    identity = folder.record()["identity"]
    before = steps if recipe.output.overwrite else identity.get("steps", steps)
    if before == steps:
        return
    held, train = f"output_dir = {str(folder.path)!r} holds this run with {before} steps", recipe.train
    way = f"start another run from its model (--model_name_or_path {folder.final} --output_dir ANOTHER)"
    checkpoints = folder.checkpoints()
    if not checkpoints:
        raise BadInput(f"{held} and no checkpoint to go on from to {steps}; {way}")
    done = int(checkpoints[-1].name.rpartition("-")[2])
    if done > steps:
        raise BadInput(f"{held}, of which {done} are done already: more than {steps}")
    warmups = {optimiser.warmup(train, number) for number in (before, steps)}
    steady = train.lr_scheduler_type == "constant"
    if not steady and not (train.lr_scheduler_type == "constant_with_warmup" and len(warmups) == 1):
        raise BadInput(
            f"{held}, on which the learning rates of lr_scheduler_type = {train.lr_scheduler_type!r} depend, so they "
            f"cannot become {steps}: {way}. A run with lr_scheduler_type constant can be extended"
        )


def begin(folder: RunFolder, recipe: Recipe, accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Make the folder, or go on in it, with the recipe in it; `facts` are as RunFolder.begin has them."""
    with accelerator.main_process_first():
        folder.begin(facts, recipe.output.overwrite, writes=accelerator.is_main_process)
    if accelerator.is_main_process:
        with folder.written("recipe.yaml") as path:
            recipes.save(recipe, path)


def finish(folder: RunFolder, name: str, recipe: Recipe, accelerator: Accelerator) -> None:
    """Write the report of a run whose model is there."""
    if accelerator.is_main_process:
        from align_engine.reports.report import write_report

        write_report(folder, name, recipe)
        folder.mark(finished=True)
    accelerator.wait_for_everyone()
    accelerator.print(f"model in {folder.final}, curves in {folder.path / 'report.html'}")


def publish(folder: RunFolder, recipe: Recipe, accelerator: Accelerator) -> None:
    """Push a finished run to the hub where that is asked for."""
    if recipe.output.push_to_hub and accelerator.is_main_process:
        accelerator.print(f"on the hub: {hub.push(folder, recipe.output)}")


def check_model(model: Any, tokenizer: Any, parts: Iterable[Source], longest: int, algorithm: Algorithm) -> None:
    """Refuse a model that cannot read the rows, the longest of which has so many tokens, or has no head to fuse."""
    load.check_pad(model, tokenizer)
    check_tokens(parts, load.vocabulary(model))
    load.check_positions(model, longest)
    if not algorithm.scalar:
        hook.check_head(model)
        hook.check_causal(model)


def check_tokens(parts: Iterable[Source], vocab_size: int, model: str = "the model") -> None:
    """Refuse rows with tokens that a model lacks."""
    for part in parts:
        with part.origin.named():
            check_vocab(part.rows, vocab_size, model, part.origin.rows)


def check_others(recipe: Recipe, tokenizer: Any, parts: Iterable[Source]) -> None:
    """Refuse a reference, or a model that the critic starts from, which lacks tokens that it will be shown."""
    parts = list(parts)
    for field, path in recipe.models().items():
        if field != "model_name_or_path":
            held = load.vocab_size(path, recipe.model.trust_remote_code, recipe.revision(field))
            said = f"{field} = {path!r}"
            check_tokens(parts, held, said)
            if recipe.section(RolloutSection) and held < len(tokenizer):  # completions may hold any of them
                raise BadInput(f"{said} has {held} tokens, fewer than the policy's tokenizer ({len(tokenizer)})")


def check_choices(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse names that the kernels or transformers do not know, before anything is loaded."""
    from align_kernels.dispatch import pick

    for field, path in recipe.models().items():
        check_path(path, field, recipe.revision(field))
    on_hub = [path for field, path in recipe.models().items() if "value" not in field and not Path(path).is_dir()]
    if (revision := recipe.model.model_revision) != "main" and not on_hub:
        raise BadInput(f"model_revision = {revision!r} is of a model on the hub, and model_name_or_path = "
                       f"{recipe.model.model_name_or_path!r} is a folder: leave it out")  # fmt: skip
    rollout, evaluation = recipe.section(RolloutSection), recipe.section(OnlineEval)
    asked = {"reward_funcs": rollout, "eval_reward_funcs": evaluation}
    for field, spec in ((name, one) for name, section in asked.items() if section for one in getattr(section, name)):
        if rewards.is_model(spec):
            with rewards.no_model(spec):
                check_path(spec, field)
    check_device(recipe, accelerator.device)
    check_tasks(recipe, accelerator)
    check_schedule(recipe.train)
    optimiser.check(recipe.train, accelerator.device, accelerator.distributed_type == DistributedType.FSDP)
    try:
        if recipe.kernels.impl != "eager":
            pick(recipe.kernels.impl, accelerator.device, torch.float32)
    except ValueError as error:
        raise BadInput(str(error)) from error


def check_tasks(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse benchmarks of a model that no process holds whole, or that writes nothing."""
    if recipe.eval.eval_tasks:
        said = f"eval_tasks = {recipe.eval.eval_tasks}"
        if accelerator.distributed_type == DistributedType.FSDP or load.tensor_parallel_size() > 1:
            raise BadInput(f"{said}: benchmarks need the whole model on each device; ask align eval about checkpoints")
        if isinstance(recipe, RmRecipe):
            raise BadInput(f"{said}: a reward model writes no answers; leave them out")


def check_device(recipe: Recipe, device: torch.device) -> None:
    """Refuse what is for a GPU, on a CPU; and kernels that are not installed."""
    if recipe.train.activation_offloading and device.type == "cpu":
        raise BadInput(
            "activation_offloading = True: this run is on a CPU, where activations lie in its memory already"
        )
    if recipe.model.use_liger_kernel:
        if device.type == "cpu":
            raise BadInput("use_liger_kernel = True: Liger's kernels need a GPU, and this run is on a CPU")
        if importlib.util.find_spec("liger_kernel") is None:
            raise BadInput("use_liger_kernel = True: liger_kernel is not installed (pip install liger-kernel)")


def check_loss(algorithm: Algorithm, recipe: Recipe) -> None:
    """Refuse settings of the loss that do not fit together, by one call of it on two rows made up.

    Raises:
        BadInput: with what the loss says.
    """
    if algorithm.advantages or algorithm.scalar:
        return
    row = {"index": 0, "prompt_ids": [1], "completion_ids": [1], "kl_completion_ids": [2, 1], "label": True,
           "chosen_ids": [1], "rejected_ids": [2, 1], "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0,
           "ref_logps": 0.0}  # fmt: skip
    batch = algorithm.collate([row, row], pad_id=0)
    batch.shared = dict(algorithm.made_up)
    try:
        hidden, head = torch.zeros(*batch.targets.shape, 4), {"weight": torch.zeros(3, 4)}
        algorithm.loss(hidden, **keywords(algorithm.loss, head, batch, recipe, 2.0))
    except ValueError as error:
        raise BadInput(str(error)) from error


def check_schedule(train: TrainSection) -> None:
    """Refuse a schedule of transformers that cannot be built, or not be stepped: some need lr_scheduler_kwargs."""
    from transformers import SchedulerType

    def why_not(train: TrainSection) -> str | None:
        parameter = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([parameter], lr=train.learning_rate)
        try:
            schedule = optimiser.schedule(replace(train, warmup_ratio=0.0, warmup_steps=0.0), optimizer, 2)
            optimizer.step()
            schedule.step()
            schedule.get_last_lr()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, BadInput):
                raise
            return str(error)
        return None

    kind, more = train.lr_scheduler_type, train.lr_scheduler_kwargs
    known = [kind.value for kind in SchedulerType]
    why = f"cannot run: {reason}" if kind in known and (reason := why_not(train)) else None
    if kind not in known:
        why = "is not one of transformers'"
    if why:
        given = f", lr_scheduler_kwargs = {more!r}" if more else ""
        plain = [replace(train, lr_scheduler_type=one, lr_scheduler_kwargs=None) for one in known]
        some = ", ".join(one.lr_scheduler_type for one in plain if not why_not(one))
        raise BadInput(f"lr_scheduler_type = {kind!r}{given} {why}; choose one of {some}")


def quiet_libraries() -> None:
    """Leave the terminal to the run's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft asks by the old name
    datasets.disable_progress_bars()


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Device, precision, processes and trackers.

    Raises:
        BadInput: a tracker that is not installed; more processes than accelerate can join here.
    """
    from accelerate.tracking import get_available_trackers

    available = [str(tracker.value) for tracker in get_available_trackers()]
    if missing := [tracker for tracker in recipe.output.report_to if tracker not in available]:
        here = ", ".join(available) or "none"
        raise BadInput(f"report_to = {missing[0]!r} is not installed or unknown; here: {here}")
    bf16 = recipe.train.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
    ranks.check_launcher()
    ranks.choose_device()
    # an earlier run in this process may have had another precision, and FSDP's settings are only read with the devices
    AcceleratorState._reset_state(reset_partial_state=fsdp)
    options: Any = {"log_with": recipe.output.report_to or None, "project_dir": recipe.output.output_dir}
    kind = tensor_parallel.kind_of_accelerator()
    accelerator = kind(mixed_precision="bf16" if bf16 else "no", **options)
    ranks.check(accelerator)
    if fsdp and accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.FSDP:
        raise BadInput(
            f"FSDP is asked for; accelerate takes {accelerator.distributed_type} on {accelerator.device}: "
            "it is for GPUs; on a CPU launch with torchrun, or with recipes/accelerate/ddp.yaml"
        )
    return accelerator


def load_prepared(
    where: str, split: str | None, config: str | None, kind: Any, recipe: Recipe, tokenizer: Any,
    accelerator: Accelerator,
) -> tuple[Any, Any]:  # fmt: skip
    """Rows from file to token ids, with what was dropped or cut said once: (prepared, as they stand in the file)."""
    names = ("max_length", "max_prompt_length", "overlong", "bad_rows")
    limits = {name: getattr(recipe.data, name) for name in names}
    limits["assistant_only"] = loss.assistant_only_loss if (loss := recipe.section(SftLoss)) else False
    origin = Origin(where, split)
    with accelerator.main_process_first(), cache_errors(where):
        found = load_rows(where, split, config)
        many = processes(len(found), recipe.data.dataset_num_proc)
        if many:
            accelerator.print(f"{where}: {len(found):,} rows are tokenised by {many} processes")
        with origin.named():
            rows, report = prepare(found, tokenizer, kind, num_proc=many or 1, named=origin.rows, **limits)
    accelerator.print(f"{where}: {describe(report, origin.rows)}")
    if kind == "prompt" and (media := media_columns(found)):
        accelerator.print(f"{where}: reward functions get {', '.join(media)} undecoded, as `bytes` and `path`")
    return rows, found


def load_source(
    where: str, split: str | None, config: str | None, recipe: Recipe, algorithm: Algorithm, tokenizer: Any,
    folder: RunFolder, accelerator: Accelerator, training: bool = True,
) -> Source:  # fmt: skip
    """The rows of a file as the algorithm learns from them."""
    train = recipe.train
    rows, found = load_prepared(where, split, config, algorithm.kind, recipe, tokenizer, accelerator)
    if isinstance(recipe, OnlineRecipe):
        source = Rollouts(Prompts(rows, found, tokenizer, recipe, accelerator, folder), recipe)
        source.origin = Origin(where, split)
        return source
    if has_several_answers(rows) and not algorithm.named_pairs:
        why = f"rows have several chosen or rejected answers, and {algorithm.name} learns from one of each"
        raise BadInput(f"{where}: {why}: make a row of each pair")
    with cache_errors(where):
        rows = algorithm.rows(rows, recipe)
    sizes = (train.per_device_train_batch_size, train.gradient_accumulation_steps)
    if not training:
        sizes = (recipe.eval.per_device_eval_batch_size, 1)
    place = (accelerator.process_index, accelerator.num_processes)
    source = Source(rows, algorithm.collate, tokenizer.pad_token_id, *sizes, *place, train.seed)
    source.origin = Origin(where, split)
    return source


def check_room(folder: RunFolder, model: Any, recipe: Recipe, state: float) -> None:
    """Refuse a disk that cannot hold the checkpoints that the run keeps, one being written, and the final model.

    Args:
        state: bytes that the optimiser keeps for each weight of 4 bytes.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    need = (1 + (recipe.output.save_total_limit or 1)) * (1 + state / 4) * weights + weights
    place = next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        said = f"{size(free)} are free, and the checkpoints and the model need about {size(need)}"
        raise BadInput(f"output_dir = {str(folder.path)!r}: {said}; choose another disk, or a lower save_total_limit")


def load_policy(recipe: Recipe, algorithm: Algorithm, tokenizer: Any) -> Any:
    """The model to train, as what it is saved as will be read with this tokenizer."""
    model, said = make_policy(recipe, algorithm, tokenizer.pad_token_id)
    if said:
        PartialState().print(said)
    # what is saved ends where its tokenizer ends, as with transformers' Trainer; further EOS ids stay
    align_special_tokens(hook.causal_model(model), tokenizer)
    return model.train()


def summary(engine: Engine, source: Source, steps: int) -> str:
    """What is about to run, in a line or two."""
    trained = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    everything, processes = sum(p.numel() for p in engine.model.parameters()), engine.accelerator.num_processes
    pure = all(p.dtype == torch.bfloat16 for p in engine.model.parameters() if p.requires_grad)
    warned = (
        "all weights are held and trained in bfloat16, whose 8 bits do not see most steps of a small learning rate: "
        "--dtype float32 (products stay in bfloat16 with --bf16) or --use_peft train them all\n"
    )
    return warned * pure + (
        f"{engine.algorithm.name}: {trained:,} of {everything:,} weights trained, {len(source):,} rows, {steps} steps "
        f"of {source.window_size} rows ({processes} process{'es' if processes > 1 else ''}, "
        f"{engine.accelerator.device}, {engine.accelerator.mixed_precision} mixed precision)"
    )
