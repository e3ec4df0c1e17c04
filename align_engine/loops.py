"""The loop, and what stands around each of its steps: accumulation, log, evaluation, checkpoints, callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from align_engine.callbacks import Callbacks
from align_engine.checkpoint import RunFolder
from align_engine.engine import Engine
from align_engine.experience import Rollouts
from align_engine.metrics import Journal, Sums
from align_engine.source import Micro, Source
from align_engine.watch import warnings


@dataclass
class Training:
    """A run under way. The loop asks it for steps and hands it windows of micro-batches to learn from."""

    engine: Engine
    evaluation: Source | None
    folder: RunFolder
    journal: Journal
    callbacks: Callbacks
    total: int  # optimiser steps
    steps_per_epoch: int

    def steps(self) -> Iterator[int]:
        """Numbers (from 0) of the steps still to do. Ends with the last step, or where a callback stops the run."""
        progress, callbacks = self.engine.progress, self.callbacks
        self.engine.model.train()
        callbacks.call("on_train_begin")
        while progress.step < self.total and not callbacks.control.should_training_stop:
            if progress.step % self.steps_per_epoch == 0:
                callbacks.call("on_epoch_begin")
            control = callbacks.control
            control.should_log = control.should_evaluate = control.should_save = False
            callbacks.call("on_step_begin")
            yield progress.step
        callbacks.call("on_train_end")

    def learn(self, window: list[Micro]) -> None:
        """One optimiser step on the micro-batches of a window, and all that follows it.

        The window is whole before its first loss is computed, so that its units are counted over all of it.
        """
        engine, clock = self.engine, self.journal.clock
        with clock("forward_backward"):
            units = engine.open(window)
            for i, micro in enumerate(window):
                engine.forward_backward(micro, units, last=i == len(window) - 1)
        with clock("step"):
            sums = engine.step()
        tokens, _ = sums.totals.pop("num_tokens")
        engine.progress.num_tokens += tokens
        engine.progress.sums.merge(sums)
        self.journal.advance(tokens)
        self._after()

    def _after(self) -> None:
        options, progress, callbacks = self.engine.recipe, self.engine.progress, self.callbacks
        callbacks.call("on_step_end")
        if progress.step % self.steps_per_epoch == 0:
            callbacks.call("on_epoch_end")

        def due(every: int | None, wish: bool) -> bool:
            last = progress.step == self.total or callbacks.control.should_training_stop
            return last or wish or bool(every and progress.step % every == 0)

        found, best = {}, False
        if self.evaluation and due(options.eval.eval_steps, callbacks.control.should_evaluate):
            with self.journal.clock("eval"):
                if isinstance(self.evaluation, Rollouts):
                    found = self.evaluation.evaluate()
                else:
                    found = self.engine.evaluate(self.evaluation)
            best = callbacks.evaluated(found)
        if due(options.output.logging_steps, callbacks.control.should_log):
            means, progress.sums = progress.sums.means(), Sums()
            for text in warnings(progress.watched, progress.said, means):
                self.journal.warn(progress.step, text)
            self._log({**means, "num_tokens": progress.num_tokens, **self.journal.throughput()})
        if found:
            self._log(found)
        if best or due(options.output.save_steps, callbacks.control.should_save):
            with self.journal.clock("save"):
                self.engine.save(self.folder)
                if self.engine.accelerator.is_main_process:
                    self.folder.keep(options.output.save_total_limit, self.best())
            callbacks.call("on_save")

    def _log(self, numbers: dict[str, float]) -> None:
        record = {**numbers, "epoch": self.engine.progress.step / self.steps_per_epoch}
        self.journal.write(self.engine.progress.step, record)
        self.callbacks.state.log_history.append({**record, "step": self.engine.progress.step})
        self.callbacks.call("on_log", logs=record)

    def best(self) -> int | None:
        """The step of the best evaluation, where the recipe asks for it."""
        return self.callbacks.state.best_global_step if self.engine.recipe.eval.load_best_model_at_end else None


def loop(training: Training, source: Source) -> None:
    """Train from where the engine stands to the last step. A source whose rows the policy writes has a new rollout
    wherever the last one has served all its steps."""
    for step in training.steps():
        source.prepare(step, training.journal.clock)
        with training.journal.clock("data"):
            window = source.window(step)
        training.learn(window)
