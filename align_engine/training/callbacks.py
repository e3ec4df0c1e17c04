"""transformers' TrainerCallbacks over this engine's loops, early stopping and the best checkpoint among them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

from align_engine import recipe as recipes
from align_engine.errors import BadInput, RunFailed
from align_engine.training.importing import foreign, load_object
from align_engine.training.optimiser import keywords

if TYPE_CHECKING:
    from align_engine.recipe import Recipe
    from align_engine.training.engine import Engine


class Callbacks:
    """What a Trainer would hand its callbacks, kept up to date; their wishes in `control`.

    Args:
        engine: its model, optimizer and scheduler are handed on; `engine.progress.trainer` keeps the state.
        tokenizer: handed on as `processing_class`.
        total: steps of the run.
        steps_per_epoch: for the state's epoch.
        callbacks: TrainerCallback objects or classes.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, total: int, steps_per_epoch: int, callbacks: Sequence[Any]
    ) -> None:
        from transformers import TrainerControl, TrainerState
        from transformers.trainer_callback import ExportableState

        self.engine, self.steps_per_epoch = engine, steps_per_epoch
        self.args, self.control = arguments(engine.recipe, total), TrainerControl()
        main = engine.accelerator.is_main_process
        self.state = TrainerState(max_steps=total, is_world_process_zero=main, is_local_process_zero=main)
        self.callbacks = [made(one) for one in callbacks]
        self.stateful = [one for one in self.callbacks if isinstance(one, ExportableState)]
        self.things = {"model": engine.model, "processing_class": tokenizer, "optimizer": engine.optimizer,
                       "lr_scheduler": engine.scheduler, "train_dataloader": None, "eval_dataloader": None}  # fmt: skip
        if kept := engine.progress.trainer:
            vars(self.state).update(kept["state"])
            for callback, attributes in zip(self.stateful, kept["callbacks"]):
                vars(callback).update(attributes)
            self.control.should_training_stop = kept["stopped"] and engine.progress.step < total

    def call(self, event: str, **more: Any) -> None:
        """Run one of transformers' events: on_train_begin, on_step_end, on_log, ... Callbacks share a copy of `more`.

        Raises:
            RunFailed: a callback raises anything (SystemExit too): with its name, and file and line.
        """
        from transformers import TrainerControl

        step = self.engine.progress.step
        self.state.global_step, self.state.epoch = step, step / self.steps_per_epoch
        more = copy.deepcopy(more)
        for callback in self.callbacks:
            with foreign(f"callback {type(callback).__name__}.{event}", RunFailed):
                wish = getattr(callback, event)(self.args, self.state, self.control, **self.things, **more)
            if not isinstance(wish, (TrainerControl, NoneType)):
                gave = f"callback {type(callback).__name__}.{event} gave {wish!r:.100}"
                raise RunFailed(f"{gave}: it must give `control`, or nothing")
            self.control = wish or self.control
        self._keep()

    def _keep(self) -> None:
        """What must outlive the process goes where checkpoints find it."""
        state = {name: getattr(self.state, name) for name in ("best_metric", "best_global_step")}
        attributes = [callback.state()["attributes"] for callback in self.stateful]
        stopped = self.control.should_training_stop
        self.engine.progress.trainer = {"state": state, "callbacks": attributes, "stopped": stopped}

    def evaluated(self, found: dict[str, float]) -> bool:
        """`on_evaluate`, and whether this is the best evaluation so far; never where the recipe asks for no best.

        Raises:
            RunFailed: metric_for_best_model is not among `found`.
        """
        self.call("on_evaluate", metrics=found)
        if self.args.metric_for_best_model is None:
            return False
        wanted = self.args.metric_for_best_model
        name = f"eval_{wanted.removeprefix('eval_')}"
        if name not in found:
            known = ", ".join(sorted(metric.removeprefix("eval_") for metric in found))
            raise RunFailed(f"metric_for_best_model = {wanted!r} is not measured; known: {known}")
        best, now = self.state.best_metric, found[name]
        better = best is None or (now > best if self.args.greater_is_better else now < best)
        if better:
            self.state.best_metric, self.state.best_global_step = now, self.engine.progress.step
            self._keep()
        return better


def arguments(recipe: Recipe, total: int) -> Any:
    """The recipe as transformers' TrainingArguments, for callbacks to read."""
    from transformers import TrainingArguments

    class Arguments(TrainingArguments):
        def __post_init__(self) -> None:
            """Devices and processes are accelerate's here: nothing is set up."""

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    values = {name: value for name, value in recipes.flat(recipe).items() if name in known}
    wanted = recipe.eval.load_best_model_at_end or recipe.eval.early_stopping_patience
    wanted = wanted or recipe.output.save_strategy == "best"
    values["lr_scheduler_kwargs"] = keywords(recipe.train.lr_scheduler_kwargs, "lr_scheduler_kwargs")
    metric = (recipe.eval.metric_for_best_model or "loss") if wanted else None
    if values["greater_is_better"] is None:
        values["greater_is_better"] = not (metric or "loss").endswith("loss")
    values |= {"max_steps": total, "metric_for_best_model": metric, "eval_strategy": "steps", "save_strategy": "steps"}
    return Arguments(**values)


def from_recipe(recipe: Recipe) -> list[Any]:
    """Early stopping where it is asked for, and the callbacks that the recipe names.

    Raises:
        BadInput: a name that is no TrainerCallback.
    """
    from transformers import EarlyStoppingCallback, TrainerCallback

    options = recipe.eval
    found: list[Any] = []
    if options.early_stopping_patience:
        found.append(EarlyStoppingCallback(options.early_stopping_patience, options.early_stopping_threshold))
    for name in recipe.output.callbacks:
        callback = made(load_object(name, "callbacks"))
        if not isinstance(callback, TrainerCallback):
            raise BadInput(f"callbacks: {name!r} is no transformers.TrainerCallback")
        found.append(callback)
    return found


def made(callback: Any) -> Any:
    """A callback from its class, or as it is. Raises BadInput where the class cannot be made without arguments."""
    if not isinstance(callback, type):
        return callback
    with foreign(f"callbacks: cannot make {callback.__name__}", BadInput):
        return callback()
