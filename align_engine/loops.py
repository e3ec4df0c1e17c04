"""The offline loop, and all that stands before and after it."""

from __future__ import annotations

from align_engine.checkpoint import RunFolder
from align_engine.engine import Engine
from align_engine.metrics import Journal, Sums
from align_engine.source import Source


def offline(
    engine: Engine, source: Source, evaluation: Source | None, folder: RunFolder, journal: Journal, total: int
) -> None:
    """Train from where the engine stands to step `total` on fixed rows.

    A window of micro-batches is fetched whole, so that its units are counted before the first loss is computed.
    """
    options, progress = engine.recipe, engine.progress
    engine.model.train()
    while progress.step < total:
        window = source.window(progress.step)
        units = engine.units(window)
        for i, micro in enumerate(window):
            engine.forward_backward(micro, units, last=i == len(window) - 1)
        sums = engine.step()
        tokens, _ = sums.totals.pop("num_tokens")
        progress.num_tokens += tokens
        progress.sums.merge(sums)
        journal.advance(tokens)
        at_end = progress.step == total
        epoch = {"epoch": progress.step / source.steps_per_epoch}
        if at_end or progress.step % options.output.logging_steps == 0:
            numbers = {"num_tokens": progress.num_tokens, **journal.throughput(), **epoch}
            journal.write(progress.step, {**progress.sums.means(), **numbers})
            progress.sums = Sums()
        if evaluation and (at_end or (options.eval.eval_steps and progress.step % options.eval.eval_steps == 0)):
            journal.write(progress.step, {**engine.evaluate(evaluation), **epoch})
        if at_end or progress.step % options.output.save_steps == 0:
            engine.save(folder)
            if engine.accelerator.is_main_process:
                folder.keep(options.output.save_total_limit)
