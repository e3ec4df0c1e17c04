"""Tokens drawn from the softmax of an LM head, in the pass that makes its logits.

The vocabulary is cut into blocks. While a tile of logits is in cache its blocks leave their sums of exponentials; the
sums say in which block a row's uniform number falls, and that block alone is read again for the token. There is no
softmax over the vocabulary, and no noise but one number a row.

Letters: N rows, n of a chunk, V vocabulary, D hidden size, R rank of a LoRA, K blocks of at most BLOCK columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from align_kernels import rehearsal
from align_kernels.arguments import check_float, public
from align_kernels.autograd import without_autocast
from align_kernels.backends import state as states
from align_kernels.backends.state import MAX, SUM, SUM_X
from align_kernels.eager import logits_of
from align_kernels.head import Head, Needs, Settings, read_head
from align_kernels.schedules.dense import Keep
from align_kernels.schedules.plan import request_of
from align_kernels.schedules.request import Plan, Request
from align_kernels.schedules.tiles import Chunk, TiledHead
from align_kernels.sums import float_dtype

BLOCK = 2048  # columns; what the row kernels take at a time (csrc/cpu/tile.h)


class Samples(NamedTuple):
    """What was drawn, and how likely it was."""

    tokens: Tensor  # int64
    logp: Tensor  # log-prob of the token, float32 (float64 for float64 input), as entropy
    entropy: Tensor  # of the distribution that it was drawn from, in nats


@public
def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    uniforms: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
    workspace: int | None = None,
) -> Samples:
    """One token of each row, by the inverse of its distribution, with its log-prob.

    The same as, but for memory and speed:

        logits = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        cdf = logits.double().softmax(-1).cumsum(-1)
        tokens = (cdf <= uniforms[..., None] * cdf[..., -1:]).sum(-1)

    which is `torch.multinomial` with one uniform number a row in place of V. Nothing is differentiated.

    Args:
        hidden: [..., D] float; weight: [V, D] float. These and the keywords are those of `linear_logprobs`.
        uniforms: [...] float in [0, 1), the same on every rank of a tp_group; float64 reaches tokens of every
            probability above 1e-16, float32 above 1e-8.

    Returns:
        Samples, each field [...]. A row whose logits are not numbers gets token 0 and the log-prob NaN.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; on a CPU, a uniform outside [0, 1) (a GPU would have to
            wait for that check).
    """
    check_float("uniforms", uniforms)
    targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    if uniforms.shape != targets.shape:
        raise ValueError(
            f"uniforms must have hidden's leading shape {tuple(targets.shape)}, got {tuple(uniforms.shape)}"
        )
    if uniforms.device.type == "cpu" and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        wrong = uniforms[~((uniforms >= 0) & (uniforms < 1))]
        raise ValueError(f"uniforms must lie in [0, 1), got {float(wrong[0])}")
    with torch.no_grad():
        head, settings, needs = read_head(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
            lora=lora, tp_group=tp_group, impl=impl, workspace=workspace,
        )  # fmt: skip
        numbers = uniforms.reshape(-1).double()
        eager = settings.impl == "eager"
        tokens, *floats = (
            sample_eager(head, settings, numbers) if eager else sample_tiled(head, settings, needs, numbers)
        )
    dtype = float_dtype(head.hidden)
    return Samples(tokens.view(targets.shape), *(x.to(dtype).view(targets.shape) for x in floats))


def inverse(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Where uniforms [n] fall among masses [n, k], float64: the index [n] of the first whose running sum exceeds its
    share of the whole, and how far into that mass [n], in [0, 1]. An index never has mass 0."""
    sums = masses.cumsum(1)
    total = sums[:, -1:]
    at = uniforms[:, None] * total
    index = torch.minimum((sums <= at).sum(1), (sums < total).sum(1))[:, None]  # the second where at rounds to total
    mass = masses.gather(1, index)
    inside = (at - sums.gather(1, index) + mass) / mass
    return index[:, 0], inside[:, 0].clamp(0.0, 1.0)


def sample_eager(head: Head, settings: Settings, uniforms: Tensor) -> tuple[Tensor, ...]:
    """The reference: tokens, log-probs and entropies [N] from whole rows of probabilities in float64."""
    log_p = logits_of(head, settings).double().log_softmax(-1)
    p = log_p.exp()
    tokens, _ = inverse(p, uniforms)
    return tokens, log_p.gather(1, tokens[:, None])[:, 0], -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


@without_autocast
def sample_tiled(head: Head, settings: Settings, needs: Needs, uniforms: Tensor) -> tuple[Tensor, ...]:
    """The same, tile by tile."""
    if (rehearsed := rehearsal.acting()) is not None:
        return rehearsed.sample(head, settings, needs, planned, BLOCK)
    rows = torch.arange(len(uniforms))  # on the CPU, where looking at them waits for no device
    tiled = TiledHead(head, settings, needs, rows, lambda tiled: planned(request_of(tiled, None, (), 1)))
    spans = list(tiled.spans(0, len(rows)))
    parts = [sample_chunk(tiled, tiled.chunk(*span), uniforms[slice(*span)]) for span in spans]
    if not parts:
        return uniforms.long(), uniforms, uniforms
    return tuple(torch.cat(fields) for fields in zip(*parts))


def planned(request: Request) -> Plan:
    """Chunks of as many rows as whole rows of logits fit into the workspace."""
    return Keep.sized(request, max(request.room, 1), 1, "one block a row is read twice")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Columns cut into tiles of whole blocks; what is left of the vocabulary is a tile, and a block, of its own."""

    vocab: int
    width: int  # of every tile but the last ones
    whole: int  # columns in whole blocks

    @classmethod
    def about(cls, vocab: int, columns: int) -> Tiles:
        """Tiles of about so many columns."""
        return cls(vocab, max(columns // BLOCK, 1) * BLOCK, vocab // BLOCK * BLOCK)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First column and end of each."""
        for begin in range(0, self.whole, self.width):
            yield begin, min(begin + self.width, self.whole)
        if self.whole < self.vocab:
            yield self.whole, self.vocab

    def of(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """First column and end [n] of the tiles in which columns [n] lie."""
        begin = first // self.width * self.width
        end = (begin + self.width).clamp(max=self.whole)
        left = first >= self.whole
        return begin.masked_fill(left, self.whole), end.masked_fill(left, self.vocab)


def sample_chunk(tiled: TiledHead, chunk: Chunk, uniforms: Tensor) -> tuple[Tensor, ...]:
    """Tokens, log-probs and entropies [n] of a chunk."""
    n, vocab = len(uniforms), len(tiled.head.weight)
    store = tiled.empty(n * vocab, dtype=tiled.logits_dtype)  # tile after tile, each row after row
    tiles, found = Tiles.about(vocab, tiled.plan.tile_cols), []
    for v0, v1 in tiles:
        z = store[n * v0 : n * v1].view(n, v1 - v0)
        tiled.logits(chunk, tiled.weight(slice(v0, v1)), v0, v1, z)
        if tiled.bias is not None:
            z += tiled.bias[v0:v1]
        blocks = z.view(-1, min(v1 - v0, BLOCK))
        found.append(block_states(tiled, chunk, blocks).view(n, -1, states.COLUMNS))
    state, mine = of_all_ranks(tiled, torch.cat(found, 1))  # [n, K, 8]
    m, sums = state[:, :, MAX], state[:, :, SUM]
    peak = m.amax(1, keepdim=True)
    shift = torch.where(sums > 0, m - peak, 0.0)
    masses = shift.exp() * sums
    log_mass = masses.sum(1).log()
    entropy = log_mass - (shift.exp() * (state[:, :, SUM_X] + sums * shift)).sum(1) / masses.sum(1)
    block, inside = inverse(masses, uniforms)
    here = (block >= mine) & (block < mine + -(-vocab // BLOCK))
    first = (block - mine).where(here, 0) * BLOCK
    logits = block_logits(tiled, chunk, store, tiles, first)
    at, _ = inverse((logits - logits.amax(1, keepdim=True)).exp(), inside)
    drawn = torch.stack(((tiled.offset + first + at).double(), logits.gather(1, at[:, None])[:, 0]))
    if tiled.group is not None:  # of the rank that holds the block
        drawn = drawn.where(here, 0.0)
        dist.all_reduce(drawn, group=tiled.group)
    return drawn[0].long(), drawn[1] - peak[:, 0] - log_mass, entropy


def of_all_ranks(tiled: TiledHead, state: Tensor) -> tuple[Tensor, int]:
    """The states [n, K, 8] of all blocks in the order of the ranks, from those of this one; where these begin."""
    if tiled.group is None:
        return state, 0
    n, most = len(state), -(-tiled.widest // BLOCK)
    padded = tiled.new_state(n * most).view(n, most, states.COLUMNS)  # blocks without a column have no mass
    padded[:, : state.shape[1]] = state
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(tiled.group))]
    dist.all_gather(parts, padded, group=tiled.group)
    return torch.cat(parts, 1), most * dist.get_rank(tiled.group)


def block_states(tiled: TiledHead, chunk: Chunk, z: Tensor) -> Tensor:
    """The softmax state [m, 8] of each of m = n k blocks of logits, which hold their bias."""
    each, t = len(z) // len(chunk.targets), chunk.temperature
    state = tiled.new_state(len(z))
    tiled.backend.forward(
        z, state, chunk.targets.repeat_interleave(each), offset=0, vocab=z.shape[1], bias=None,
        scale=tiled.settings.transform.logit_scale, softcap=tiled.settings.transform.softcap,
        temperature=t.repeat_interleave(each) if isinstance(t, Tensor) else t,
    )  # fmt: skip
    return state


def block_logits(tiled: TiledHead, chunk: Chunk, store: Tensor, tiles: Tiles, first: Tensor) -> Tensor:
    """Logits [n, BLOCK] from the column `first` [n] of each row on, float64, -inf behind the end of its block."""
    n, device, t = len(first), first.device, tiled.settings.transform
    begin, end = tiles.of(first)
    row = n * begin + torch.arange(n, device=device) * (end - begin)
    columns = torch.arange(BLOCK, device=device)
    index = (row + first - begin)[:, None] + columns
    z = store.take(index.clamp(max=len(store) - 1)).double() * t.logit_scale
    if t.softcap is not None:
        z = t.softcap * torch.tanh(z / t.softcap)
    z = z / (chunk.temperature[:, None] if isinstance(chunk.temperature, Tensor) else chunk.temperature)
    return z.masked_fill(first[:, None] + columns >= tiles.vocab, -torch.inf)
