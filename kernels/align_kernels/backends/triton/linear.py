"""The forward whose logits never leave the chip: a GEMM with the softmax's statistics in its epilogue, and a merge.

A program multiplies BN rows of x by BV rows of w and leaves, per row and PART columns, five numbers: the maximum m of
the logits, and the sums of exp(l - m), exp(l - m) (l - m), exp(l - m)^2 and l. The program whose columns hold a row's
target leaves the target's logit and the largest one before it in its part: with the maxima they tell whether the target
is the first of the row's largest logits, and no place of a maximum is carried along.
"""

# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from align_kernels.backends.triton.rows import FAR, LOG2E, LOWEST, at_least, fold, inverse_temperature, logits

PART = tl.constexpr(128)


@triton.jit
def tile_of(program, n_tiles, v_tiles, GROUP: tl.constexpr):
    """(row tile, column tile), ordered so that GROUP row tiles share a tile of w while it is in the L2 cache."""
    group = program // (GROUP * v_tiles)
    size = tl.minimum(n_tiles - group * GROUP, GROUP)
    within = program % (GROUP * v_tiles)
    return group * GROUP + within % size, within // size


@triton.jit
def statistics(
    acc, first, rows, some, unit, target, bias_ptr, parts_ptr, picked_ptr, n, V, scale, cap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Write the numbers of PART columns from `first` on, in an order in which nothing spills.

    r is a logit over its row's `unit` > 0, which the sums meet once and not each logit. ZEROS: the columns beyond V
    hold zeros. Only the last part has such columns, and few parts have targets: what is theirs alone stands behind a
    branch that whole programs take or leave.
    """
    place = tl.arange(0, PART)
    bias = tl.load(bias_ptr + first + place, mask=first + place < V, other=0.0)[None, :] if BIAS else 0.0
    if SOFTCAP:
        r, _ = logits(acc, bias, scale, cap, 1.0, BIAS, True)
    else:
        r, _ = logits(acc, bias, -1.0 if NEGATIVE else 1.0, cap, 1.0, BIAS, False)
    here = some & (target >= first) & (target < tl.minimum(first + PART, V))
    if tl.max(here.to(tl.int32), 0) > 0:
        column = (target - first).to(tl.int32)[:, None]
        before = tl.max(tl.where(place[None, :] < column, r, -float("inf")), 1) * unit
        tl.store(picked_ptr + rows, tl.sum(tl.where(place[None, :] == column, r, 0.0), 1) * unit, mask=here)
        tl.store(picked_ptr + n + rows, before, mask=here)
    some = some & (first < V)
    at = parts_ptr + (first // PART).to(tl.int64) * n + rows
    step = tl.cdiv(V, PART).to(tl.int64) * n
    # not at all where every column is inside: an `if` would become a choice for every logit of every part. With a bias
    # it may: there the loop's registers spill on sm_100
    outside = (first + place >= V)[None, :]
    if not ZEROS:
        for _ in tl.range(V, first + PART, PART, num_stages=1):
            r = tl.where(outside, 0.0, r)
    tl.store(at + 4 * step, tl.sum(r, 1) * unit, mask=some)
    # FAR stands for -inf, so that differences times the unit stay finite
    if BIAS:
        r = tl.where(outside, FAR, r)
    else:
        for _ in tl.range(V, first + PART, PART, num_stages=1):
            r = tl.where(outside, FAR, r)
    r = tl.maximum(r, FAR, propagate_nan=tl.PropagateNan.ALL)
    m = tl.max(r, 1)
    tl.store(at, tl.where(m == FAR, LOWEST, m * unit), mask=some)
    t = (r - m[:, None]) * (unit * LOG2E)[:, None]  # the difference first: the largest term is exactly 1
    e = tl.exp2(t)
    tl.store(at + step, tl.sum(e, 1), mask=some)
    tl.store(at + 2 * step, tl.sum(e * t, 1) / LOG2E, mask=some)
    tl.store(at + 3 * step, tl.sum(e * e, 1), mask=some)


# one binary whatever the sizes: nothing but strides and D decides how fast it loads
@triton.jit(do_not_specialize=["n", "V", "offset"])
def statistics_kernel(
    x_ptr,  # (n, D), or its descriptor
    w_ptr,  # (V, D), or its descriptor
    parts_ptr,  # (5, parts of V, n) float32
    picked_ptr,  # (2, n) float32: the target's logit, and the largest one before it in its part
    target_ptr,  # (n,) int64
    bias_ptr,  # (V,) float32
    temperature_ptr,  # (n,) float32
    n,
    V,
    D,
    x_stride,
    w_stride,
    offset,
    scale,
    cap,
    inverse,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,  # the scale
    ROW_TEMPERATURE: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,  # D is a multiple of BD
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    v_tiles = tl.cdiv(V, BV)
    i, j = tile_of(tl.program_id(0), tl.cdiv(n, BN), v_tiles, GROUP)
    rows, columns = i * BN + tl.arange(0, BN), j * BV + tl.arange(0, BV)
    some = rows < n
    acc = tl.zeros((BN, BV), tl.float32)
    if TMA:
        for k in range(0, D, BD):
            acc = tl.dot(x_ptr.load([i * BN, k]), w_ptr.load([j * BV, k]).T, acc)
    else:
        d = tl.arange(0, BD)
        # rows beyond the end read the last one: a mask of columns alone keeps the copies asynchronous
        x_at = x_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * x_stride + d[None, :]
        w_at = w_ptr + tl.minimum(columns, V - 1).to(tl.int64)[:, None] * w_stride + d[None, :]
        for k in range(0, D, BD):
            if EVEN:
                x, w = tl.load(x_at), tl.load(w_at)
            else:
                inside = d[None, :] < D - k
                x, w = tl.load(x_at, mask=inside, other=0.0), tl.load(w_at, mask=inside, other=0.0)
            acc = tl.dot(x, w.T, acc)
            x_at += BD
            w_at += BD

    unit = tl.zeros((BN,), tl.float32) + inverse_temperature(inverse, temperature_ptr, rows, some, ROW_TEMPERATURE)
    if not SOFTCAP:
        unit *= tl.abs(scale)
    target = tl.load(target_ptr + rows, mask=some, other=-1) - offset
    first = j * BV
    if BV == PART:
        statistics(
            acc, first, rows, some, unit, target, bias_ptr, parts_ptr, picked_ptr, n, V, scale, cap,
            BIAS, SOFTCAP, NEGATIVE, TMA,
        )  # fmt: skip
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BN, 2, PART)), (0, 2, 1)))
        statistics(
            left, first, rows, some, unit, target, bias_ptr, parts_ptr, picked_ptr, n, V, scale, cap,
            BIAS, SOFTCAP, NEGATIVE, TMA,
        )  # fmt: skip
        statistics(
            right, first + PART, rows, some, unit, target, bias_ptr, parts_ptr, picked_ptr, n, V, scale, cap,
            BIAS, SOFTCAP, NEGATIVE, TMA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "V", "offset"])
def merge_kernel(
    parts_ptr,  # (5, parts, n) float32
    picked_ptr,  # (2, n) float32
    state_ptr,  # (n, 8) float64
    target_ptr,  # (n,) int64
    n,
    V,
    offset,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """Fold the numbers of all parts into the states of BN rows."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    some = rows < n
    parts = tl.cdiv(V, PART)
    step = parts.to(tl.int64) * n
    part = tl.arange(0, BP)
    at = parts_ptr + part[:, None].to(tl.int64) * n + rows[None, :]
    peak = tl.full((BP, BN), LOWEST, tl.float32)
    for begin in range(0, parts, BP):
        both = (begin + part < parts)[:, None] & some[None, :]
        peak = tl.maximum(peak, tl.load(at + tl.cast(begin, tl.int64) * n, mask=both, other=LOWEST))
    peak = tl.max(peak, 0)
    s, a, q = tl.zeros((BP, BN), tl.float64), tl.zeros((BP, BN), tl.float64), tl.zeros((BP, BN), tl.float64)
    total, first = tl.zeros((BP, BN), tl.float64), tl.full((BP, BN), 2147483647, tl.int32)
    for begin in range(0, parts, BP):
        both = (begin + part < parts)[:, None] & some[None, :]
        here = at + tl.cast(begin, tl.int64) * n
        m = tl.load(here, mask=both, other=LOWEST)
        t = at_least(m - peak[None, :], FAR)
        f = tl.where(m == LOWEST, 0.0, tl.exp(t))
        si = tl.load(here + step, mask=both, other=0.0)
        s += (f * si).to(tl.float64)
        a += (f * (tl.load(here + 2 * step, mask=both, other=0.0) + si * t)).to(tl.float64)
        q += (f * f * tl.load(here + 3 * step, mask=both, other=0.0)).to(tl.float64)
        total += tl.load(here + 4 * step, mask=both, other=0.0).to(tl.float64)
        first = tl.minimum(first, tl.where(both & (m == peak[None, :]), (begin + part)[:, None], 2147483647))
    target = tl.load(target_ptr + rows, mask=some, other=-1) - offset
    here = (target >= 0) & (target < V)
    picked = tl.load(picked_ptr + rows, mask=some & here, other=0.0)
    before = tl.load(picked_ptr + n + rows, mask=some & here, other=0.0)
    first = tl.min(first, 0)
    top = here & (first == target // PART) & (at_least(picked, LOWEST) == peak) & (before < peak)
    # a part that begins with the target has its maximum elsewhere, where that is not the target
    column = first.to(tl.int64) * PART
    column = tl.where(top, target, column + (here & (column == target)).to(tl.int64))
    where = (column + offset).to(tl.float64)
    peak = tl.where(peak == LOWEST, -float("inf"), peak).to(tl.float64)
    state_ptr += rows.to(tl.int64) * 8
    fold(
        state_ptr, some, peak, where, tl.sum(s, 0), tl.sum(a, 0), tl.sum(q, 0), tl.sum(total, 0),
        picked.to(tl.float64), here,
    )  # fmt: skip
