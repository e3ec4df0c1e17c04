"""TRL's releases before `add_fused_lm_head`: their trainers read log-probs and entropies from whole logits.

Here a model gives `Logits` in their place: hidden states and the head, of which the trainer takes slices. The two
functions of `trl.trainer.utils` that read logits, `selective_log_softmax` and `entropy_from_logits`, ask them for
log-probs and entropies; what else a trainer does with logits is made from what one pass of the fused operator leaves,
or, where it is nothing of these, from logits made whole.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from align_engine.errors import BadInput
from align_engine.integrations.hook import hooked_head
from align_engine.integrations.trl_forward import ReplacedForward
from align_kernels import linear_logprobs
from align_kernels.api import LogProbs

READERS = ("selective_log_softmax", "entropy_from_logits")


class Logits:
    """Logits [..., V] that nobody has made.

    Args:
        hidden: [..., D]; head: keywords of linear_logprobs.
        kept: bool [...]: the positions whose next token counts. Default None: all.
        temperature: the logits are divided by it. Default 1.0.
        targets: [...], and fields: of them, where one pass has found them already.
    """

    def __init__(
        self, hidden: Tensor, head: dict[str, Any], kept: Tensor | None = None, temperature: float = 1.0,
        targets: Tensor | None = None, fields: LogProbs | None = None,
    ) -> None:  # fmt: skip
        self.hidden, self.head, self.kept, self.temperature = hidden, head, kept, temperature
        self.targets, self.fields = targets, fields

    # what trainers ask

    def score(self, targets: Tensor) -> LogProbs:
        """Everything about each position's softmax; 0 where `kept` says that it does not count."""
        if self.fields is None:
            counts = targets if self.kept is None else targets.masked_fill(~self.kept, -100)
            self.targets = targets
            self.fields = linear_logprobs(self.hidden, targets=counts, temperature=self.temperature, **self.head)
        return self.fields

    def entropy(self) -> Tensor:
        """In nats, [...]."""
        found = self.score(torch.zeros(self.hidden.shape[:-1], dtype=torch.int64, device=self.device)).entropy
        return found if torch.is_grad_enabled() else found.detach()

    def mean(self, dim: int) -> Any:
        return self.whole().mean(dim) if self.fields is None or dim != -1 else self.fields.mean_logit

    def argmax(self, dim: int) -> Tensor:
        """-1 where it is not the target: to be compared with the targets."""
        if self.fields is None or self.targets is None or dim != -1:
            return self.whole().argmax(dim)
        return self.targets.where(self.fields.correct.bool(), -1)

    def nansum(self) -> Tensor:
        """The sum of all, over all positions."""
        if self.head.get("softcap") is not None or self.head.get("lora") is not None:
            rows = [Logits(row, self.head).whole().nansum() for row in self.hidden]
            return torch.stack(rows).sum() / self.temperature
        hidden, weight, bias = self.hidden.detach(), self.head["weight"].detach(), self.head.get("bias")
        total = hidden.reshape(-1, hidden.shape[-1]).sum(0, dtype=torch.float32) @ weight.sum(0, dtype=torch.float32)
        if bias is not None:
            total = total + bias.detach().sum() * hidden[..., 0].numel()
        return total * (self.head.get("logit_scale", 1.0) / self.temperature)

    def div_(self, temperature: float) -> Logits:
        self.temperature, self.fields = self.temperature * temperature, None
        return self

    # parts

    def __getitem__(self, key: Any) -> Any:
        parts = key if isinstance(key, tuple) else (key,)
        masked = isinstance(key, Tensor) and key.dtype == torch.bool
        if (not masked and parts[-1] != slice(None)) or (len(parts) < 3 and not masked):
            return self.whole()[key]
        rows = key if masked else parts[:-1]
        return self._part(lambda x: x[rows], lambda x: x[key])

    def detach(self) -> Logits:
        head = {name: value.detach() if isinstance(value, Tensor) else value for name, value in self.head.items()}
        found = self._part(Tensor.detach, Tensor.detach)
        found.head = head
        return found

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Logits, ...]:
        return tuple(
            self._part(lambda x, i=i: x.chunk(chunks, dim)[i], lambda x, i=i: x.chunk(chunks, dim)[i])
            for i in range(len(self.hidden.chunk(chunks, dim)))
        )

    def index_select(self, dim: int, index: Tensor) -> Logits:
        return self._part(lambda x: x.index_select(dim, index), lambda x: x.index_select(dim, index))

    def _part(self, of_rows: Any, of_hidden: Any) -> Logits:
        """The same for some of the positions: `of_rows` takes them from [...], `of_hidden` from [..., D]."""
        optional = [None if x is None else of_rows(x) for x in (self.kept, self.targets)]
        fields = None if self.fields is None else LogProbs(*map(of_rows, self.fields))
        return Logits(of_hidden(self.hidden), self.head, optional[0], self.temperature, optional[1], fields)

    # as a tensor

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head["weight"].shape[0]))

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    def __len__(self) -> int:
        return len(self.hidden)

    def whole(self) -> Tensor:
        """The logits, as large as they are."""
        head = dict(self.head)
        weight, bias, lora = head["weight"], head.get("bias"), head.get("lora")
        logits = torch.nn.functional.linear(self.hidden, weight, bias)
        if lora is not None:
            logits = logits + self.hidden @ lora[0].T @ lora[1].T * lora[2]
        logits = logits * head.get("logit_scale", 1.0)
        if cap := head.get("softcap"):
            logits = cap * torch.tanh(logits / cap)
        return logits / self.temperature

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch's functions get the logits whole."""
        made = [one.whole() if isinstance(one, Logits) else one for one in args]
        return function(*made, **{key: x.whole() if isinstance(x, Logits) else x for key, x in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)


def reader(name: str, theirs: Any) -> Any:
    """`selective_log_softmax` or `entropy_from_logits`, which take `Logits` as well."""

    @functools.wraps(theirs)
    def read(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, Logits):
            return theirs(logits, *args, **kwargs)
        if name == "entropy_from_logits":
            return logits.entropy()
        (index,) = (*args, *kwargs.values())
        if index.dim() != logits.ndim - 1:
            return theirs(logits.whole(), index)
        return logits.score(index).logp.clone()  # trainers write zeros into it

    return read


class LogitsForward(ReplacedForward):
    """The forward of a model that gives `Logits`, but where it generates.

    Args:
        kind: of the model; own: what others put in place of its forward, None for nothing.
        chunked: TRL's output of the SFT trainer's chunked loss, where that trainer uses it.
    """

    def __init__(self, kind: type, own: Any, chunked: type | None) -> None:
        super().__init__(kind, own)
        self.chunked = chunked

    def __call__(
        self,
        model: Any,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            given = dict(labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
            return self.plain(model, *args, **{name: x for name, x in given.items() if x is not None}, **kwargs)
        out, logits = self._run(model, *args, **kwargs | {"use_cache": False})
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and mask.shape == logits.hidden.shape[:2]:
            logits.kept = torch.nn.functional.pad(mask[:, 1:], (0, 1)).bool()
        targets = shift_labels
        if targets is None and labels is not None:
            targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if targets is None:
            out.logits = logits
            return out
        return self._scored(model, out, logits, targets, num_items_in_batch)

    def _run(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Logits]:
        heads: list[dict[str, Any]] = []

        def keep(hidden: Tensor, head: dict[str, Any]) -> Tensor:
            heads.append(head)
            return hidden

        with hooked_head(model, keep) as results:
            out = self.plain(model, *args, **kwargs)
        (hidden,), (head,) = results, heads
        weight = head["weight"]
        if isinstance(weight, DTensor) or not weight.numel():
            raise BadInput("this release of TRL reads logits outside of the model, where a head in shards is not "
                           "whole: fuse takes FSDP2 with TRL 1.15 and later")  # fmt: skip
        return out, Logits(hidden, head)

    def _scored(self, model: Any, out: Any, logits: Logits, targets: Tensor, num_items: Tensor | int | None) -> Any:
        """With the loss that the model would have made of the labels."""
        targets = targets.to(logits.device)
        logits.kept, mask = None, targets != -100
        fields = logits.score(targets)
        loss = -fields.logp.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        aux_loss = getattr(out, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        if self.chunked is None:
            out.loss, out.logits = loss, logits
            return out
        made = dict(num_correct_tokens=(fields.correct & mask).sum().float(), num_valid_tokens=mask.sum(),
                    entropy_sum=(fields.entropy * mask).sum().detach(), aux_loss=aux_loss)  # fmt: skip
        return self.chunked(loss=loss, **made)
