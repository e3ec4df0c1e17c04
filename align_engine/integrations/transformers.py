"""transformers.Trainer for causal language models, without logits.

    from align_engine.integrations.transformers import FusedTrainer

    trainer = FusedTrainer(model=model, args=args, train_dataset=dataset, data_collator=collator)  # instead of Trainer

The same loss and gradients as `Trainer`, gradient accumulation (`num_items_in_batch`) and several processes included,
from hidden states: 6NVD FLOPs of the head on the labelled positions alone, 4NVD where it is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from align_engine.errors import BadInput
from align_engine.integrations.hook import causal_model, fused_head, head_module, head_weights, logit_transform
from align_engine.integrations.logits import innermost
from align_kernels import sft_loss


def _labelled(inputs: dict[str, Any]) -> bool:
    return inputs.get("labels") is not None or inputs.get("shift_labels") is not None


class FusedLossMixin:
    """Cross-entropy from hidden states, for a subclass of transformers.Trainer: `class Mine(FusedLossMixin, Trainer)`.

    Training and evaluation make no logits. Where logits are asked for, by `compute_metrics` or by
    `compute_loss(..., return_outputs=True)`, the model's own forward makes them, as in `Trainer`.

    Raises:
        BadInput: when it is built, with an option that needs logits in training (`compute_loss_func`,
            `label_smoothing_factor`), a model whose loss is not the usual one of causal LMs, or whose head
            `linear_logprobs` does not compute.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        refused = {
            "compute_loss_func takes logits": trainer.compute_loss_func is not None,
            f"label_smoothing_factor = {trainer.args.label_smoothing_factor} takes logits": trainer.label_smoother,
            f"n_gpu = {trainer.args.n_gpu}: nn.DataParallel; start one process per GPU": trainer.args.n_gpu > 1,
        }
        for what, present in refused.items():
            if present:
                raise BadInput(f"FusedTrainer: {what}")
        causal = causal_model(trainer.model)
        logit_transform(causal)
        if "loss_function" not in innermost(causal.forward).__code__.co_names or causal.loss_type != "ForCausalLM":
            raise BadInput(f"{type(causal).__name__} has a loss of its own, not transformers' ForCausalLMLoss")
        head = head_module(causal)
        training = head.training
        head_weights(head.train())  # as it will be: dropout counts
        head.train(training)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss []; with `return_outputs` also the model's outputs, logits included."""
        trainer: Any = self
        if return_outputs or not _labelled(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # pyright: ignore
        targets = inputs.get("shift_labels")
        if targets is None:
            targets = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        inputs = {name: x for name, x in inputs.items() if name not in ("labels", "shift_labels")}

        def fn(hidden: Tensor, head: dict[str, Any]) -> Tensor:
            return sft_loss(hidden, targets=targets, num_items=num_items_in_batch, **head).loss

        with fused_head(model, fn):
            out: Any = model(**inputs)
        items = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        # a mean over no targets: transformers gives NaN, and no gradient
        loss = out.logits + torch.where(torch.as_tensor(items, device=out.logits.device) == 0, torch.nan, 0.0)
        if getattr(out, "aux_loss", None) is not None:  # experts out of balance
            loss = loss + causal_model(model).router_aux_loss_coef * out.aux_loss
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """As `Trainer`'s; without logits where only the loss is asked for."""
        trainer: Any = self
        if not prediction_loss_only or not _labelled(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # pyright: ignore
        inputs = trainer._prepare_inputs(inputs)
        items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs, num_items_in_batch=items).detach(), None, None


class FusedTrainer(FusedLossMixin, Trainer):
    """transformers.Trainer with `FusedLossMixin`."""
