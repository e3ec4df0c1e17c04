"""Policy gradients on groups (GRPO)."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align_kernels.arguments import public
from align_kernels.compat.liger.common import reference_logps, refuse
from align_kernels.fused import check_shape, grpo_loss
from align_kernels.losses.grpo import LOSS_TYPES

SERVED = [name for name in LOSS_TYPES if name != "gmpo"]  # Liger's
CLIPPED = {"cispo": "cispo_clip_ratio"}  # the metric of other loss types is clip_ratio/region_mean


class LigerFusedLinearGRPOLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`.

    Args:
        beta: weight of the KL term; unless it is 0 a reference must be passed (with use_ref_model=False Liger takes the
            policy for its own reference: a KL of 0). Default 0.04.
        compiled, chunk_size: accepted; the planner decides.
        use_ref_model: whether a reference is passed to `forward`. Default True.
        epsilon_low, epsilon_high: limits of the ratio below and above 1. Default 0.2.
        loss_type: "dapo" (default), "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo" (with
            importance_sampling_level="sequence": over tokens Liger divides by the padded length), "vespo".
        max_completion_length: needed by "dr_grpo".
        importance_sampling_level: "token" (default) or "sequence".
        temperature: the logits are divided by it. Default 1.0.
        delta: upper limit of the ratio before the minimum. Default None.
        use_bias_correction_kl: multiply the KL by the ratio. Default False.
        sapo_*, vespo_*: hyper-parameters of these two losses.
    """

    @public
    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        del compiled, chunk_size
        if loss_type not in SERVED:
            raise ValueError(f"loss_type={loss_type!r} is not served; one of {', '.join(SERVED)} is")
        if loss_type == "luspo":
            level = (importance_sampling_level, "sequence")
            refuse("luspo takes one ratio per sequence", importance_sampling_level=level)
        self.beta, self.use_ref_model, self.temperature, self.loss_type = beta, use_ref_model, temperature, loss_type
        self.options = {
            "loss_type": loss_type,
            "epsilon": epsilon_low,
            "epsilon_high": epsilon_high,
            "delta": delta,
            "beta": beta,
            "importance_sampling_level": importance_sampling_level,
            "use_bias_correction_kl": use_bias_correction_kl,
            "sapo_temperature_pos": sapo_temperature_pos,
            "sapo_temperature_neg": sapo_temperature_neg,
            "vespo_k_pos": vespo_k_pos,
            "vespo_lambda_pos": vespo_lambda_pos,
            "vespo_k_neg": vespo_k_neg,
            "vespo_lambda_neg": vespo_lambda_neg,
            "max_completion_length": max_completion_length,
        }

    @public
    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and what Liger reports.

        Args:
            _input: [B, T, D]; lin_weight: [V, D]; selected_token_ids: [B, T]; attention_mask: [B, T], 0 where ignored.
            advantages: [B] or [B, T]; bias: [V].
            ref_per_token_logps: [B, T], or ref_input, ref_weight and ref_bias to make them from.
            old_per_token_logps: [B, T]. Default None: the present policy sampled.
            vllm_is_ratio: [B], [B, 1] or [B, T], >= 0, a factor on the policy term. Default None. Refused beside
                "vespo", whose weights it is part of: pass sampling_logps to `grpo_loss`.
            num_items_in_batch: tokens of the whole generation batch over all ranks, for "dapo", "cispo", "vespo".
                Default None: of this call, over all ranks.

        Returns:
            (loss, (KL unless beta is 0, share of clipped tokens: 0 for "sapo" and "vespo")); the loss alone is
            differentiable. A token whose vllm_is_ratio is 0 does not count as clipped.
        """
        check_shape("attention_mask", attention_mask, selected_token_ids.shape)
        targets = selected_token_ids.masked_fill(attention_mask == 0, -100)
        reference = self._reference(ref_per_token_logps, ref_input, ref_weight, ref_bias, targets)
        if vllm_is_ratio is not None:
            if self.loss_type == "vespo":
                raise ValueError("vespo takes sampling log-probs, not vllm_is_ratio: use grpo_loss(sampling_logps=...)")
            rows, length = targets.shape
            check_shape("vllm_is_ratio", vllm_is_ratio, *map(torch.Size, ((rows,), (rows, 1), (rows, length))))
            ratio = vllm_is_ratio[:, None] if vllm_is_ratio.dim() == 1 else vllm_is_ratio
            advantages = ratio * (advantages[:, None] if advantages.dim() == 1 else advantages)
            advantages = advantages.expand(targets.shape)
        by_tokens = LOSS_TYPES[self.loss_type].counts == "tokens"
        out = grpo_loss(
            _input,
            lin_weight,
            targets,
            old_per_token_logps,
            advantages,
            ref_logps=reference,
            num_items=_tokens_per_rank(targets, num_items_in_batch) if by_tokens else None,
            bias=bias,
            temperature=self.temperature,
            **self.options,
        )
        clipped = CLIPPED.get(self.loss_type, "clip_ratio/region_mean")
        reported = [out.metrics["kl"]] if self.beta else []
        return out.loss, (*reported, out.metrics.get(clipped, torch.zeros_like(out.loss)))

    def _reference(
        self,
        given: Tensor | None,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        targets: Tensor,
    ) -> Tensor | None:
        if given is not None and not self.use_ref_model:
            raise ValueError("use_ref_model=False would drop ref_per_token_logps: set it to True or leave them out")
        if given is not None and ref_input is not None:
            warnings.warn("ref_per_token_logps are used, ref_input is not", stacklevel=3)
        if given is not None or not self.beta:
            return given
        head = dict(bias=ref_bias, temperature=self.temperature)
        found = reference_logps(self.use_ref_model, ref_input, ref_weight, targets, **head)
        if found is None:
            raise ValueError(f"beta={self.beta} needs a reference: set use_ref_model=True and pass one, or beta=0.0")
        return found


def _tokens_per_rank(targets: Tensor, num_items: float | Tensor | None) -> Tensor:
    """The window's tokens (default: those of this call on all ranks) over the number of ranks, at least 1."""
    distributed = dist.is_available() and dist.is_initialized()
    if num_items is None:
        tokens = (targets != -100).sum().float()
        if distributed:
            dist.all_reduce(tokens)
    else:
        tokens = torch.as_tensor(num_items, dtype=torch.float32, device=targets.device)
    return (tokens / (dist.get_world_size() if distributed else 1)).clamp(min=1.0)
