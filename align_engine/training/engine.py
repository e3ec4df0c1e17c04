"""The verbs of training: learn (forward_backward, step), evaluate, save, restore. Loops over steps call them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align_engine.data.batches import Batch
from align_engine.data.windows import Micro, Source
from align_engine.errors import BadInput, RunFailed
from align_engine.integrations.hook import causal_model, fused_head
from align_engine.models import noise, score_head
from align_engine.models.tree_attention import reading
from align_engine.recipe import LimitSection, Recipe, RolloutSection
from align_engine.training import optimiser, shards, statefile, stops, tensor_parallel
from align_engine.training.algorithm import Algorithm, keywords
from align_engine.training.checkpoint import RunFolder
from align_engine.training.metrics import Sums, with_means
from align_engine.training.offload import Offload
from align_kernels import LossOutput
from align_kernels.head import LogitGradClamp


class Progress:
    """Where a run stands; saved with every checkpoint."""

    def __init__(self) -> None:
        self.step = 0  # optimiser steps done
        self.num_tokens = 0.0  # tokens seen, prompts included
        self.sums = Sums()  # since the last logged step
        self.watched: dict[str, dict[str, Any]] = {}  # what warnings compare with
        self.said: list[str] = []  # warnings that were given
        self.trainer: dict[str, Any] = {}  # what callbacks keep

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "sums": self.sums.totals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        vars(self).update(state, sums=Sums(sums))


class Engine:
    """A policy with its optimiser on accelerate's devices.

    Args:
        model: a causal LM of transformers, bare or with LoRA.
        algorithm: row of the table.
        recipe: its settings.
        total_steps: length of the learning-rate schedule.
        accelerator: device, precision, processes and trackers.
        longest: tokens of the longest row that it will see; what a reference's positions must reach.
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: Algorithm,
        recipe: Recipe,
        total_steps: int,
        accelerator: Accelerator,
        longest: int = 0,
    ) -> None:
        train, self.progress, self.longest = recipe.train, Progress(), longest
        self.algorithm, self.recipe, self.accelerator = algorithm, recipe, accelerator
        self.reference: Callable[[Batch], Tensor] | None = None  # fills ref_logps, where batches do not carry them
        rollout = recipe.section(RolloutSection)
        temperature = 1.0 if rollout is None else rollout.temperature
        self.head_options = {**vars(recipe.kernels), "temperature": temperature}  # keywords of linear_logprobs
        self.limits = gradient_limits(recipe)  # further ones of a fused loss
        self.critic: Any = getattr(causal_model(model), "value_head", None)
        self.aux_coef = router_aux_loss_coef(causal_model(model), train.router_aux_loss_coef)
        optimizer = optimiser.make(model, recipe, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.offload = Offload(self.model, accelerator.device) if train.activation_offloading else None
        self.scheduler = optimiser.schedule(train, optimizer, total_steps)
        # objects with state_dict and load_state_dict that go into checkpoints beside model and optimiser
        self.kept: dict[str, Any] = {"scheduler": self.scheduler, "progress": self.progress}
        self.after_step: Callable[[int], None] | None = None  # of a reference that follows the model
        self.readers: list[nn.Module] = []  # models that read its batches too
        self._sums = Sums()

    def forward(self, batch: Batch, num_items: float) -> LossOutput:
        """One forward pass with the fused loss, or with the loss of the scores where the model has a score head. A
        mixture of experts adds its load-balancing loss, weighed by the batch's share of the units.

        Returns:
            what the algorithm's loss returns: the sum over the batch's units over `num_items`, metrics and counts.
        """
        if self.reference is not None:
            batch.ref_logps = self.reference(batch)
        if self.algorithm.scalar:
            scores = score_head.batch_scores(self.model, batch)
            return self.algorithm.loss(scores, **keywords(self.algorithm.loss, {}, batch, self.recipe, num_items))
        out: Any = None

        def fn(hidden: Tensor, head: dict[str, Any]) -> Tensor:
            nonlocal out
            hidden, loss = batch.predicting(hidden), self.algorithm.loss
            more = {} if self.critic is None else {"values": self.critic(hidden, batch)}
            head |= self.head_options | self.limits
            with self.offload.apart() if self.offload else contextlib.nullcontext():
                out = loss(hidden, **keywords(loss, head, batch, self.recipe, num_items, **more))
            return out.loss

        asked = {"output_router_logits": True} if self.aux_coef else {}
        with fused_head(self.model, fn), reading(self.model, batch) as inputs:
            whole = self.model(**inputs, **asked, use_cache=False)
        if not self.aux_coef:
            return out._replace(loss=whole.logits)
        units = self.algorithm.count(batch, self.recipe)
        loss = whole.logits + self.aux_coef * (units / num_items) * whole.aux_loss
        return with_means(out._replace(loss=loss), {"aux_loss": whole.aux_loss.detach()}, units)

    def check_noise(self) -> None:
        """Refuse a model whose training mode is not its evaluation mode, where the algorithm promises no dropout.

        Raises:
            BadInput: naming the model.
        """

        def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            if self.algorithm.scalar:
                return score_head.values(self.model, **inputs)

            def fn(hidden: Tensor, head: dict[str, Any]) -> Tensor:  # [B, T, D], and the values behind them
                parts = [hidden]
                if self.critic is not None:
                    parts.append(self.critic(hidden, SimpleNamespace(**inputs, trees=None))[..., None].to(hidden.dtype))
                return torch.cat(parts, -1)

            with fused_head(self.model, fn):
                return self.model(**inputs, use_cache=False).logits

        if not self.algorithm.dropout:
            noise.check(self.model, forward, self.accelerator.device)

    def learn(self, window: list[Micro], clock: Callable[[str], contextlib.AbstractContextManager]) -> Sums:
        """One optimiser step on the micro-batches of a window; what `step` returns.

        The window is whole before its first loss is computed, so that its units are counted over all of it.
        """
        with clock("forward_backward"):
            units = self.open(window)
            for i, micro in enumerate(window):
                self.forward_backward(micro, units, last=i == len(window) - 1)
        with clock("step"):
            return self.step()

    def open(self, window: list[Micro]) -> float:
        """Units of the loss in a window over all ranks: the normaliser that makes every split of it one big batch.

        Whatever else a batch must know of its whole window is filled in.
        """
        if self.algorithm.prepare is not None:
            self.algorithm.prepare(self, window)
        units = sum(self.algorithm.count(micro.batch, self.recipe) for micro in window if micro.real)
        return max(self.total(units), 1.0)

    def total(self, mine: float) -> float:
        """The sum of a number over all ranks."""
        summed: Any = self.accelerator.reduce(torch.tensor(float(mine), device=self.accelerator.device), "sum")
        return summed.item()

    def forward_backward(self, micro: Micro, units: float, last: bool) -> None:
        """Add one micro-batch's share to the gradients and to the sums of the step.

        Args:
            micro: this rank's rows.
            units: of the whole window; gradients are averaged over ranks, so each rank divides by units / ranks.
            last: of its window; ranks meet there and not before.
        """
        alone = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        with alone, reading(self.model, micro.batch):
            with self.offload or contextlib.nullcontext():
                loss = self.loss(micro, units, self._sums)
            self.accelerator.backward(loss if micro.real else loss * 0.0)

    def loss(self, micro: Micro, units: float, sums: Sums) -> Tensor:
        """A micro-batch's share of its window's loss, times the number of ranks; it and the metrics go to `sums`."""
        batch, real = micro
        share = units / self.accelerator.num_processes
        out = self.forward(batch.to(self.accelerator.device), share)
        count = self.algorithm.count(batch, self.recipe) * real  # on the CPU: no wait for the device
        sums.add("loss", out.loss * share / max(count, 1), count)
        for name, over in out.counts.items():
            sums.add(name, out.metrics[name], over if real else 0)
        sums.add("num_tokens", float(batch.num_read), real)
        return out.loss

    def step(self) -> Sums:
        """Clip, check and take the optimiser step.

        Returns:
            the sums of the window over all ranks; "num_tokens" and "stop" (ranks that have been told to stop) in them
            are plain sums.
        Raises:
            RunFailed: the loss or the gradient is not finite; the weights have not been touched.
        """
        limit = self.recipe.train.max_grad_norm or math.inf
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        self._sums.add("stop", float(stops.asked()), 1)
        sums, self._sums = self._sums.reduced(self.accelerator), Sums()
        loss, norm = sums.means().get("loss", 0.0), float(norm)  # 0: no row of the window counts
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunFailed(
                f"step {self.progress.step + 1}: the loss is {loss} and the gradient norm {norm}, so the step was not "
                "taken. Lower learning_rate or max_grad_norm, lengthen warmup_ratio, or look for broken rows"
            )
        sums.add("grad_norm", norm, 1)
        sums.add("learning_rate", float(self.scheduler.get_last_lr()[0]), 1)  # torchao's is a tensor
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        if self.after_step is not None:
            self.after_step(self.progress.step)
        return sums

    @torch.no_grad()
    def evaluate(self, source: Source) -> dict[str, float]:
        """Loss and metrics over all rows of a source, named with eval_ in front."""
        sums, training = Sums(), self.model.training
        self.model.eval()
        window = list(source.share(list(range(len(source)))))
        units = self.open(window)
        for micro in window:
            self.loss(micro, units, sums)
        self.model.train(training)
        means = sums.reduced(self.accelerator).means()
        del means["num_tokens"]
        return {f"eval_{name}": value for name, value in means.items()}

    def check_finite(self) -> None:
        """Refuse to save weights that are infinite or not a number.

        Raises:
            RunFailed: on every rank, naming a tensor.
        """
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad and p.numel()]
        shards = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for _, parameter in trained]
        largest = torch.stack(
            [x.detach().abs().max().float() if x.numel() else x.new_zeros(()).float() for x in shards]
        )
        broken: Any = self.accelerator.reduce((~largest.isfinite()).int().to(self.accelerator.device), "sum")
        if broken.any():
            (first, _), count = trained[int(broken.argmax())], int((broken > 0).sum())
            raise RunFailed(
                f"step {self.progress.step}: {count} of {len(trained)} trained tensors are infinite or not a number, "
                f"{first} first: they were not saved. Lower learning_rate or weight_decay; the last checkpoint is whole"
            )

    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint of everything that the next step depends on.

        Raises:
            RunFailed: weights that are not finite; what the disk says.
        """
        self.check_finite()
        accelerator, name = self.accelerator, folder.checkpoint(self.progress.step).name
        rank = accelerator.process_index
        with folder.written(name) if accelerator.is_main_process else contextlib.nullcontext(folder.side(name)) as path:
            accelerator.wait_for_everyone()
            numbers = shards.write(path / "tensors", self.model, self.optimizer.optimizer)
            if accelerator.is_main_process or accelerator.num_processes > 1:  # ranks that are one process draw alike
                statefile.write(path / f"random-{rank}", statefile.random_states())
            state = {name: one.state_dict() for name, one in self.kept.items()}  # on all ranks: shards are put together
            state |= {"optimizer": numbers, "processes": accelerator.num_processes}
            if accelerator.is_main_process:
                statefile.write(path / "state", state)
            accelerator.wait_for_everyone()
        accelerator.wait_for_everyone()

    def restore(self, path: Path, folder: RunFolder) -> None:
        """Go back to a checkpoint of the folder.

        Raises:
            BadInput: something in it is missing or cannot be read.
        """
        folder.check_whole(path)
        if not (path / "tensors").exists():
            raise BadInput(folder.without(path, "was written by an earlier version, whose checkpoints are not read"))
        accelerator = self.accelerator
        try:
            state = statefile.read(path / "state")
            shards.read(path / "tensors", self.model, self.optimizer.optimizer, state["optimizer"])
            for name, one in self.kept.items():
                one.load_state_dict(state[name])
            if (processes := state["processes"]) == accelerator.num_processes:
                statefile.set_random_states(statefile.read(path / f"random-{accelerator.process_index}"))
            else:
                accelerator.print(f"{path.name} is of another number of processes ({processes}): dropout is drawn anew")
                statefile.seed_random_states(self.recipe.train.seed, self.progress.step, accelerator.process_index)
        except Exception as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            raise BadInput(folder.without(path, f"is damaged: {type(error).__name__}: {first_line}")) from error

    def save_model(self, folder: RunFolder, tokenizer: Any, card: str) -> None:
        """Write the trained model (or its adapter), the tokenizer and a model card to `final`, for transformers (or
        peft) to load."""
        self.write_model(partial(folder.written, "final"), tokenizer, card)

    def write_model(
        self, written: Callable[[], contextlib.AbstractContextManager[Path]], tokenizer: Any, card: str | None = None
    ) -> None:
        """The same to what `written` gives: a path, which takes its place at the end of the block.

        Args:
            card: README.md. Default None: none of ours.
        Raises:
            RunFailed: weights that are not finite; what the disk says.
        """
        self.check_finite()
        state: Any = self.accelerator.get_state_dict(self.model)
        state = {name: shards.whole(value) for name, value in state.items() if "value_head." not in name}
        # peft would put the whole embedding into an adapter of the head; the vocabulary never grows here
        options: dict[str, Any] = {}
        model: Any = self.accelerator.unwrap_model(self.model)
        if self.recipe.model.use_peft:
            options = {"save_embedding_layers": False, "selected_adapters": [model.active_adapter]}
        if self.accelerator.is_main_process:
            with written() as path, noise.restored(model), tensor_parallel.saved_whole(model):
                model.save_pretrained(path, state_dict=state, **options)
                tokenizer.save_pretrained(path)
                if card is not None:  # in place of peft's
                    (path / "README.md").write_text(card, encoding="utf-8")
        self.accelerator.wait_for_everyone()


def gradient_limits(recipe: Recipe) -> dict[str, Any]:
    """The section `limits`, where a recipe has it, as keywords of every fused loss."""
    if (limits := recipe.section(LimitSection)) is None:
        return {}
    clamp = limits.grad_clamp
    return {"prob_gate": limits.prob_gate, "grad_clamp": None if clamp is None else LogitGradClamp(clamp)}


def router_aux_loss_coef(causal: Any, asked: float | None) -> float:
    """Weight of a mixture of experts' load-balancing loss: what the recipe asks for, or what the model's config has (as
    TRL); 0 for a model that has none.

    Raises:
        BadInput: asked for of a model that has none.
    """
    config = causal.config.get_text_config()
    served = hasattr(config, "output_router_logits") and causal.get_output_embeddings() is not None
    if asked and not served:
        name = type(causal).__name__
        raise BadInput(f"router_aux_loss_coef = {asked}: {name} has no load-balancing loss of experts")
    held = (getattr(config, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef"))
    own = next((coef for coef in held if coef is not None), 0.0)
    return float(own if asked is None else asked) if served else 0.0
