"""The reference: whole logits, plain torch, autograd. Runs everywhere, and every test measures against it."""

from __future__ import annotations

import torch
from torch import Tensor

from align_kernels.head import Head, LogitGradClamp, Settings, check_rows


class ClampLogitGrad(torch.autograd.Function):
    """Identity on log-probabilities' logits whose backward is `LogitGradClamp` applied to g (1[v = y] - p)."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, clamp: LogitGradClamp) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.clamp = clamp
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, targets = ctx.saved_tensors
        p = logits.softmax(-1)
        r = torch.zeros_like(p).scatter_(1, targets[:, None], 1.0) - p
        # grad = g r in exact arithmetic: recover g from the entry with the largest residual
        index = r.abs().argmax(1, keepdim=True)
        largest = r.gather(1, index)
        g = torch.where(largest == 0, 0.0, grad.gather(1, index) / torch.where(largest == 0, 1.0, largest))
        limit, above, units = ctx.clamp
        clipped = g * r.clamp(-limit, limit) if units == "residual" else (g * r).clamp(-limit, limit)
        return torch.where(p > above, clipped, grad) if above else clipped, None, None


def logits_of(head: Head, settings: Settings) -> Tensor:
    """softcap(logit_scale * (hidden @ weight.T + bias)) / temperature, [N, V], in float32 at least."""
    dtype = torch.promote_types(head.hidden.dtype, head.weight.dtype)
    hidden = head.hidden.to(dtype)
    z = torch.nn.functional.linear(hidden, head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))
    if head.lora_A is not None and head.lora_B is not None:
        z = z + (hidden @ head.lora_A.to(dtype).T) @ head.lora_B.to(dtype).T * settings.lora_scaling
    t = settings.transform
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * t.logit_scale
    if t.softcap is not None:
        z = t.softcap * torch.tanh(z / t.softcap)
    return z / (t.temperature if head.temperature is None else head.temperature[:, None])


def logprobs_eager(head: Head, settings: Settings) -> tuple[Tensor, ...]:
    """logp, entropy, lse, log_sum_sq_probs, mean_logit, correct, each [N], ignored rows 0."""
    size, kept = len(head.targets), (head.targets != settings.ignore_index).nonzero()[:, 0]
    t = head.temperature
    head = head._replace(
        hidden=head.hidden[kept], targets=head.targets[kept], temperature=None if t is None else t[kept]
    )
    check_rows(head.targets, head.temperature, head.weight.shape[0])
    fields = logprobs_of(logits_of(head, settings), head.targets, settings)
    dtype = torch.promote_types(head.hidden.dtype, torch.float32)
    values = [x.new_zeros(size).index_copy(0, kept, x) for x in fields]
    return *(x.to(dtype) for x in values[:-1]), values[-1]


def logprobs_of(logits: Tensor, targets: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """The same from logits [N, V]; the targets are checked."""
    mask = targets != settings.ignore_index
    labels = targets.masked_fill(~mask, 0)
    vocab = logits.shape[1]
    log_p = logits.log_softmax(-1)
    source = log_p if settings.clamp is None else ClampLogitGrad.apply(logits, labels, settings.clamp).log_softmax(-1)
    logp = source.gather(1, labels[:, None])[:, 0]
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    raw = logits.detach()
    columns = torch.arange(vocab, device=logits.device)
    first = torch.where(raw == raw.amax(-1, keepdim=True), columns, vocab).amin(-1)
    fields = (
        logp,
        entropy,
        raw.logsumexp(-1),
        (2 * log_p.detach()).logsumexp(-1),
        raw.mean(-1),
    )
    return *(x.masked_fill(~mask, 0.0) for x in fields), (first == labels) & mask
