"""Rows that keep few columns each: their choice, and products over those columns alone.

The products go over tiles of W that stay in cache, and gather nothing: a row of dX is the sum of its own columns' rows
of W, a row of dW that of the hidden states that kept its column. No sum depends on the number of threads.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from align_kernels.backends.arguments import Clamp, Lists, Transform, address, clamped
from align_kernels.backends.cpu import arguments
from align_kernels.backends.cpu.arguments import CODES, checks, logits


def reads(w: Tensor) -> bool:
    """Whether `pull` takes a weight as it lies."""
    return w.dtype in CODES and w.stride(1) == 1


def survey(
    z: Tensor,  # (n, c) float32 | bfloat16
    state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (n,) int64
    rows: Tensor,  # (m,) int64, of the n
    sums: Tensor,  # (m, levels + 2, 3) float64, added to
    *,
    first: int,
    every: int,
    drop_mass: float,
    steps: int,
    sample: Tensor | None = None,
    **transform: Unpack[Transform],
) -> None:
    """Add what every so many-th run of columns tells of some rows, by level: their number, sum of p and of -p log p.

    A column of level j is kept from p >= drop_mass / 2^(j / steps) on, of the last level never. Between the first and
    the last level p is the level's mean; those of the first one are not summed. `first` is the tile's first column on
    this rank.

    Raises:
        ValueError: as in `forward`, a row outside [0, n), or a sample, which lists have no use for.
    """
    if sample is not None:
        raise ValueError("sample must be None: each row has columns of its own here")
    tile = logits(z, targets, **transform)
    checks.state(state, len(z))
    checks.tensor("rows", rows, torch.int64, (rows.numel(),))
    checks.tensor("sums", sums, torch.float64, (len(rows), sums.shape[1], 3))
    arguments._C.survey(
        tile, state.data_ptr(), rows.data_ptr(), len(rows), first, every, drop_mass, steps, sums.shape[1] - 2,
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def keep(
    z: Tensor,  # (n, c) float32
    state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (n,) int64
    rows: Tensor,  # (m,) int64, of the n
    floors: Tensor,  # (m,) float32
    into: Lists,
    found: Tensor,  # (m,) int64, added to
    *,
    first: int,
    **transform: Unpack[Transform],
) -> None:
    """Append a tile's columns, and their z, whose log-prob reaches the row's floor, and the target.

    `first` is the tile's first column on this rank. What a row's room, `into.begins` .. `into.ends`, does not hold is
    counted in `found` and not written.

    Raises:
        ValueError: as in `forward`, or a row outside [0, n).
    """
    tile = logits(z, targets, **transform)
    checks.state(state, len(z))
    m, rooms = len(rows), into.ends - into.begins
    checks.tensor("rows", rows, torch.int64, (m,))
    checks.tensor("floors", floors, torch.float32, (m,))
    checks.tensor("found", found, torch.int64, (m,))
    _check(into, m)
    arguments._C.keep(
        tile, state.data_ptr(), rows.data_ptr(), m, first, floors.data_ptr(), into.begins.data_ptr(), rooms.data_ptr(),
        found.data_ptr(), into.columns.data_ptr(), into.z.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def forward(lists: Lists, columns: int, state: Tensor, targets: Tensor, **transform: Unpack[Transform]) -> None:
    """`forward` of a tile of all `columns` of this rank in which the others are -inf; their bias is whole.

    Raises: as that one.
    """
    logits = _logits(lists, columns, targets, **transform)
    checks.state(state, len(lists.begins))
    if len(lists.z):
        arguments._C.forward(logits, _lists(lists), state.data_ptr(), torch.get_num_threads())


def backward(
    lists: Lists,
    columns: int,
    state: Tensor,  # (m, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (m,) int64
    g_logp: Tensor,  # (m,) float32
    g_entropy: Tensor | None,  # (m,) float32
    *,
    clamp: Clamp | None,
    out: Tensor,  # (K,) float32, may be lists.z
    **transform: Unpack[Transform],
) -> None:
    """Write dL/dz of the entries: `backward` of a tile of all `columns` of this rank.

    Raises: as that one.
    """
    logits = _logits(lists, columns, targets, **transform)
    checks.state(state, len(lists.begins))
    checks.coefficients(len(lists.begins), g_logp, g_entropy)
    checks.tensor("out", out, torch.float32, lists.z.shape)
    if len(lists.z):
        arguments._C.backward(
            logits, _lists(lists), state.data_ptr(), g_logp.data_ptr(), address(g_entropy), *clamped(clamp),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


def pull(
    out: Tensor,  # (m, D) float32, added to
    lists: Lists,
    values: Tensor,  # (K,) float32
    w: Tensor,  # (c, D) float32 | bfloat16
    first: int,
) -> None:
    """out[t] += the sum over the columns v of row t of their value times w[v - first], for columns first .. first + c.

    torch counts its products (`torch.utils.flop_counter`), as those of `push`.

    Raises:
        ValueError: a tensor of the wrong dtype, shape or layout.
    """
    torch.ops.align_kernels.pull_(out, lists.begins, lists.ends, lists.columns, values, w, first)


def push(
    out: Tensor,  # (V, D) float32
    lists: Lists,
    values: Tensor,  # (K,) float32
    x: Tensor,  # (m, D) float32 | bfloat16
    add: bool,
) -> None:
    """out[v] (+)= the sum over the rows t that keep column v of their value times x[t].

    Raises:
        ValueError: a tensor of the wrong dtype, shape or layout.
    """
    torch.ops.align_kernels.push_(out, lists.begins, lists.ends, lists.columns, values, x, add)


# -- what C++ takes -----------------------------------------------------------------------------------------------
def _check(lists: Lists, m: int) -> None:
    checks.tensor("begins", lists.begins, torch.int64, (m,))
    checks.tensor("ends", lists.ends, torch.int64, (m,))
    checks.tensor("columns", lists.columns, torch.int32, (len(lists.z),))
    checks.tensor("values", lists.z, torch.float32, (len(lists.z),))
    if m and (int(lists.begins.min()) < 0 or int(lists.ends.max()) > len(lists.z)):
        raise ValueError(f"entries must lie in [0, {len(lists.z)})")


def _lists(lists: Lists) -> arguments._C.Lists:
    return arguments._C.Lists(
        len(lists.begins), lists.begins.data_ptr(), lists.ends.data_ptr(), lists.columns.data_ptr()
    )


def _logits(lists: Lists, columns: int, targets: Tensor, **transform: Unpack[Transform]) -> arguments._C.Logits:
    m, t = len(lists.begins), transform
    _check(lists, m)
    temperature, rows = checks.transform((m, columns), targets, t)
    return arguments._C.Logits(
        lists.z.data_ptr(), CODES[lists.z.dtype], m, columns, columns, targets.data_ptr(), t["offset"], t["vocab"],
        address(t["bias"]), t["scale"], t["softcap"] or 0.0, temperature, address(rows),
    )  # fmt: skip


def _matrices(out: Tensor, name: str, x: Tensor) -> int:
    """The code of x, which has as many columns as `out`."""
    checks.tensor("out", out, torch.float32, (out.shape[0], x.shape[1]))
    return checks.tile(name, x)


_LIBRARY = torch.library.Library("align_kernels", "FRAGMENT")
_ENTRIES = "Tensor begins, Tensor ends, Tensor columns, Tensor values"
_LIBRARY.define(f"pull_(Tensor(a!) out, {_ENTRIES}, Tensor w, int first) -> ()")
_LIBRARY.define(f"push_(Tensor(a!) out, {_ENTRIES}, Tensor x, bool add) -> ()")


@torch.library.impl(_LIBRARY, "pull_", "CPU")
def _pull(out: Tensor, begins: Tensor, ends: Tensor, columns: Tensor, values: Tensor, w: Tensor, first: int) -> None:
    lists, code = Lists(begins, ends, columns, values), _matrices(out, "w", w)
    _check(lists, len(out))
    if len(values):
        arguments._C.pull(
            _lists(lists), values.data_ptr(), w.data_ptr(), code, w.stride(0), w.shape[1], first, len(w),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


@torch.library.impl(_LIBRARY, "push_", "CPU")
def _push(out: Tensor, begins: Tensor, ends: Tensor, columns: Tensor, values: Tensor, x: Tensor, add: bool) -> None:
    lists, code = Lists(begins, ends, columns, values), _matrices(out, "x", x)
    _check(lists, len(x))
    if len(values):
        arguments._C.push(
            _lists(lists), values.data_ptr(), x.data_ptr(), code, x.stride(0), x.shape[1], len(out), out.data_ptr(),
            add, torch.get_num_threads(),
        )  # fmt: skip
    elif not add:
        out.zero_()


@register_flop_formula(torch.ops.align_kernels.pull_, get_raw=True)
def _pull_flops(
    out: Tensor, begins: Tensor, ends: Tensor, columns: Tensor, values: Tensor, w: Tensor, first: int, **_: Any
) -> int:
    """A product and a sum for each number of the rows of w that are taken."""
    rows = (columns[begin:end] for begin, end in zip(begins.tolist(), ends.tolist()))
    return 2 * w.shape[1] * sum(int(((row >= first) & (row < first + len(w))).sum()) for row in rows)


@register_flop_formula(torch.ops.align_kernels.push_, get_raw=True)
def _push_flops(out: Tensor, begins: Tensor, ends: Tensor, *_: Any, **__: Any) -> int:
    """The same of the rows of `out`."""
    return 2 * out.shape[1] * int((ends - begins).sum())
