"""What TRL's async GRPO needs of a server and a GPU, on this machine: fixed rollouts, no weight transfer, attention."""

from __future__ import annotations

import importlib
import queue
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

GROUP = 4


class Rollouts:
    """A rollout worker whose samples were written beforehand: (prompt, answer), a group by a group of one prompt."""

    def __init__(self, samples: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        rng = np.random.default_rng(7)
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        for i, (prompt, answer) in enumerate(samples):
            mask = np.repeat([0, 1], [len(prompt), len(answer)])
            self.rollout_buffer.put(
                RolloutSample(
                    prompt=[], completion=[], input_ids=np.concatenate([prompt, answer]), completion_mask=mask,
                    old_log_probs=np.where(mask, -4.5 + rng.normal(0, 1, len(mask)), 0).astype(np.float32),
                    advantage=float(rng.normal()), model_version=0, group_id=i // GROUP, metrics={"reward": i % 3},
                )
            )  # fmt: skip

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("no rollouts are left")


class Weights:
    """A weight transfer that reads what it is sent: names and finite numbers."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []

    def send_weights(self, iterator: Any) -> None:
        names = []
        for name, weight in iterator:
            assert weight.isfinite().all()
            names.append(name)
        self.sent.append(names)

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
                     softmax_scale: float, causal: bool, window_size: tuple[int, int]) -> Tensor:  # fmt: skip
    """FlashAttention's function of this name, on any device: the last query of a segment sees all of its keys."""
    assert causal and window_size == (-1, -1)
    out = []
    for i in range(len(cu_q) - 1):
        one, keys, values = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        seen = torch.ones(len(one), len(keys), dtype=torch.bool).tril(len(keys) - len(one))
        heads = [x.transpose(0, 1)[None] for x in (one, keys, values)]
        found = scaled_dot_product_attention(*heads, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


def short(count: int, vocab: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Samples of many lengths, some of whose prompts begin alike."""
    rng = np.random.default_rng(8)
    for i in range(count):
        yield np.arange(2, 4 + i // GROUP % 5) + i // GROUP % 7, rng.integers(2, vocab, rng.integers(2, 7))


def without_server(samples: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Arguments with which `AsyncGRPOTrainer` asks nothing of a server; what it asks of a GPU is done on the CPU from
    here on."""
    packing = importlib.import_module("trl.experimental.async_grpo.packing")
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    module = importlib.import_module("trl.experimental.async_grpo.async_grpo_trainer")
    module.VLLMClient = module.get_peak_flops_per_device = lambda *_: None
    return dict(rollout_worker=Rollouts(samples), weight_transfer=Weights())
