"""What stands around the steps of a run: their windows, log, evaluation, checkpoints, callbacks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from align_engine.data.windows import Micro, Source
from align_engine.recipe import RolloutSection
from align_engine.training import samples, stops
from align_engine.training.callbacks import Callbacks
from align_engine.training.checkpoint import RunFolder
from align_engine.training.engine import Engine
from align_engine.training.health import Health
from align_engine.training.metrics import Journal, Sums
from align_engine.training.ranks import launched


@dataclass
class Training:
    """A run under way: the windows of its steps, and what follows each of them."""

    engine: Engine
    evaluation: Source | None
    folder: RunFolder
    journal: Journal
    callbacks: Callbacks
    total: int  # optimiser steps
    source: Source
    benchmarks: Callable[[Engine], dict[str, float]] | None = None  # what evaluations measure besides
    stopping: bool = False  # a rank has been told to stop

    def __post_init__(self) -> None:
        self.health = Health(self.engine.recipe, self.engine.progress)

    def windows(self) -> Iterator[list[Micro]]:
        """The micro-batches of each step still to do. Ends with the last step, or where a callback stops the run. A
        source whose rows the policy writes has a new rollout wherever the last one has served all its steps.

        Raises:
            Stopped: the process has been told to stop; a checkpoint is written.
        """
        progress, callbacks, clock = self.engine.progress, self.callbacks, self.journal.clock
        alone = launched() == 1  # several processes agree at the end of a step
        self.engine.model.train()
        callbacks.call("on_train_begin")
        while progress.step < self.total and not callbacks.control.should_training_stop:
            if self.stopping:
                raise stops.Stopped(f"stopped after step {progress.step}; {self.folder.standing()}")
            if progress.step % self.source.steps_per_epoch == 0:
                callbacks.call("on_epoch_begin")
            control = callbacks.control
            control.should_log = control.should_evaluate = control.should_save = False
            callbacks.call("on_step_begin")
            try:
                with stops.breakable() if alone else contextlib.nullcontext():
                    stops.pause()
                    self.source.prepare(progress.step, clock)
            except stops.StopNow:
                self.stop_before()
                continue
            with clock("data"):
                window = self.source.window(progress.step)
            yield window
        callbacks.call("on_train_end")

    def learnt(self, sums: Sums) -> None:
        """All that follows a step, which has left these sums."""
        options, progress, callbacks = self.engine.recipe, self.engine.progress, self.callbacks
        tokens, _ = sums.totals.pop("num_tokens")
        self.stopping = sums.totals.pop("stop")[0] > 0
        progress.num_tokens += tokens
        progress.sums.merge(sums)
        self.health.step(sums)
        self.journal.advance(tokens)
        callbacks.call("on_step_end")
        said = []
        if progress.step % self.source.steps_per_epoch == 0:
            callbacks.call("on_epoch_end")
            said += self.health.epoch()

        def due(strategy: str | None, every: int | None, wish: bool) -> bool:
            last = progress.step == self.total or callbacks.control.should_training_stop
            if strategy == "epoch":
                every = self.source.steps_per_epoch
            return wish or (strategy not in ("no", "best") and (last or bool(every and progress.step % every == 0)))

        found, best = {}, False
        strategy, output = options.eval.eval_strategy, options.output
        every = options.eval.eval_steps or (output.logging_steps if strategy == "steps" else None)
        measured = self.evaluation or self.benchmarks
        if measured and due(strategy, every, callbacks.control.should_evaluate):
            with self.journal.clock("eval"):
                found = self.evaluation.evaluate(self.engine) if self.evaluation else {}
                found |= self.benchmarks(self.engine) if self.benchmarks else {}
            best = callbacks.evaluated(found)
            said += self.health.evaluation(found)
        first = output.logging_first_step and progress.step == 1
        if due(output.logging_strategy, output.logging_steps, callbacks.control.should_log or first):
            means, progress.sums = {"loss": 0.0} | progress.sums.means(), Sums()
            said += self.health.log(means)
            self._log({**means, "num_tokens": progress.num_tokens, **self.journal.throughput()})
            self._samples(self.source.samples)
        if found:
            self._log(found)
            self._samples([row | {"eval": True} for row in (self.evaluation.samples if self.evaluation else ())])
        for text in said:
            self.journal.warn(progress.step, text)
        if best or due(output.save_strategy, output.save_steps, callbacks.control.should_save or self.stopping):
            self.save()

    def save(self) -> None:
        """Write a checkpoint, and delete those over the limit."""
        with self.journal.clock("save"):
            self.engine.save(self.folder)
            if self.engine.accelerator.is_main_process:
                self.folder.keep(self.engine.recipe.output.save_total_limit, self.best())
        self.callbacks.call("on_save")

    def stop_before(self) -> None:
        """End between two steps: the checkpoint of the last one is written, if it is not there."""
        if self.engine.progress.step and not self.folder.checkpoint(self.engine.progress.step).exists():
            self.save()
        self.stopping = True

    def _log(self, numbers: dict[str, float]) -> None:
        record = {**numbers, "epoch": self.engine.progress.step / self.source.steps_per_epoch}
        self.journal.write(self.engine.progress.step, record)
        self.callbacks.state.log_history.append({**record, "step": self.engine.progress.step})
        self.callbacks.call("on_log", logs=record)

    def _samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write completions of this step, and show them where the recipe asks for it."""
        rollout = self.engine.recipe.section(RolloutSection)
        asked = rollout is not None and rollout.log_completions
        shown = samples.some(rows, rollout.num_completions_to_print) if rollout and asked else []
        self.journal.add_samples(self.engine.progress.step, rows, shown)

    def best(self) -> int | None:
        """The step of the best evaluation, where the recipe asks for it."""
        return self.callbacks.state.best_global_step if self.engine.recipe.eval.load_best_model_at_end else None
