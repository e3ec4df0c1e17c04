"""The row kernels of the Triton backend: one program reads a row of logits, or a piece of one, in float32.

Letters: n rows, c columns of a tile, l a logit = softcap(scale * (z + bias)) / temperature, m a maximum, s, a and q the
sums of `state` (torch_ops.py): of exp(l - m), exp(l - m) (l - m) and exp(l - m)^2.
"""

# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # stands for the maximum of nothing, so that no difference of maxima is NaN
FAR = tl.constexpr(-1.0e30)  # exp(FAR) is 0, and 0 * FAR is not NaN as 0 * -inf is
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """exp of a float32, 0 where that is no normal number: tl.exp takes three instructions more to tell those apart."""
    return tl.exp2(x * LOG2E)


# NaN must come through: tl.maximum and tl.minimum drop it
@triton.jit
def at_least(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def at_most(x, high):
    return tl.where(x > high, high, x)


@triton.jit
def expm1(x):
    """exp(x) - 1 of a float64 without cancellation near 0."""
    return tl.where(tl.abs(x) < 1e-5, x * (1 + x * (0.5 + x / 6)), tl.exp(x) - 1)


@triton.jit
def tanh(u):
    """tanh without cancellation, and exp(-2 |u|), of which its slope 1 - tanh^2 is made."""
    e = tl.exp(-2 * tl.abs(u))
    u2 = u * u
    near = u * (1 - u2 * (1 / 3 - u2 * (2 / 15 - u2 * (17 / 315 - u2 * (62 / 2835)))))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(u) < 0.25, near, tl.where(u < 0, -far, far)), e


@triton.jit
def logits(z, bias, scale, cap, inverse, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logits of raw logits z, and d(logits)/dz; `inverse` is 1 / temperature."""
    l = z.to(tl.float32)
    if BIAS:
        l += bias
    if SOFTCAP:
        t, e = tanh(l * (scale / cap))
        l, chain = t * (cap * inverse), (scale * inverse) * (4 * e / ((1 + e) * (1 + e)))
    else:
        l, chain = l * (scale * inverse), scale * inverse
    return l, chain


@triton.jit
def inverse_temperature(inverse, temperature_ptr, rows, inside, ROW_TEMPERATURE: tl.constexpr):
    if ROW_TEMPERATURE:
        inverse = 1.0 / tl.load(temperature_ptr + rows, mask=inside, other=1.0)
    return inverse


@triton.jit
def fold(state_ptr, some, peak, arg, s, a, q, total, target, here):
    """Fold the sums of some columns into the float64 state of a row, or of a block of rows."""
    old_m, old_s = tl.load(state_ptr, mask=some, other=0.0), tl.load(state_ptr + 1, mask=some, other=0.0)
    old_a, old_q = tl.load(state_ptr + 2, mask=some, other=0.0), tl.load(state_ptr + 3, mask=some, other=0.0)
    old_arg = tl.load(state_ptr + 6, mask=some, other=0.0)
    m = tl.where(old_m > peak, old_m, peak)
    old_shift, shift = tl.where(old_s == 0, 0.0, old_m - m), tl.where(s == 0, 0.0, peak - m)
    # the larger side's factor is exactly 1, and the other's error is lost beside it
    old_f, f = tl.exp(old_shift.to(tl.float32)).to(tl.float64), tl.exp(shift.to(tl.float32)).to(tl.float64)
    new_s = old_f * old_s + f * s
    tl.store(state_ptr, tl.where(new_s != new_s, new_s, m), mask=some)
    tl.store(state_ptr + 1, new_s, mask=some)
    tl.store(state_ptr + 2, old_f * (old_a + old_s * old_shift) + f * (a + s * shift), mask=some)
    tl.store(state_ptr + 3, old_f * old_f * old_q + f * f * q, mask=some)
    tl.store(state_ptr + 4, tl.load(state_ptr + 4, mask=some, other=0.0) + total, mask=some)
    tl.store(state_ptr + 5, target, mask=some & here)
    newer = (peak > old_m) | (old_arg < 0) | ((peak == old_m) & (arg < old_arg))
    tl.store(state_ptr + 6, arg, mask=some & newer)


@triton.jit
def forward_kernel(
    z_ptr,  # (n, c)
    state_ptr,  # (n, 8) float64
    target_ptr,  # (n,) int64
    bias_ptr,  # (c,) float32
    temperature_ptr,  # (n,) float32
    stride,
    c,
    offset,
    scale,
    cap,
    inverse,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program folds one row. Every lane keeps sums over its own columns, so that nothing is reduced in the loop.

    A lane's largest term, exp(0) = 1, is no part of its sums: beside 1 the rest of a confident row would vanish.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    state_ptr += row * 8
    inverse = inverse_temperature(inverse, temperature_ptr, row, True, ROW_TEMPERATURE)
    lane = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s, a, q = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    total, first = tl.zeros((BLOCK,), tl.float32), lane
    for begin in range(0, c, BLOCK):
        columns = begin + lane
        inside = columns < c
        z = tl.load(z_ptr + columns, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0) if BIAS else 0.0
        l, _ = logits(z, bias, scale, cap, inverse, BIAS, SOFTCAP)
        total += tl.where(inside, l, 0.0)
        l = tl.where(inside, l, -float("inf"))
        up = l > m
        t = at_least(tl.where(up, m - l, l - m), FAR)
        d = tl.exp(t)
        a = tl.where(up, d * (a + s * t), a) + d * t
        s = tl.where(up, s * d, s) + d
        q = tl.where(up, q * (d * d), q) + d * d
        first = tl.where(up, columns, first)
        m = tl.where(up, l, m)
    peak = tl.max(m, 0)
    arg = tl.min(tl.where(m == peak, first, 2147483647), 0)
    t = at_least(m - peak, FAR)
    f = tl.exp(t)
    one = tl.where((m == LOWEST) | ((m == peak) & (first == arg)), 0.0, f)
    a = tl.sum((f * (a + s * t) + one * t).to(tl.float64), 0)
    s = tl.sum((f * s + one).to(tl.float64), 0)
    q = tl.sum((f * f * q + one * f).to(tl.float64), 0)
    seen = tl.where(peak == LOWEST, 0.0, 1.0 + (peak - peak))  # an infinite peak makes NaN
    peak = tl.where(peak == LOWEST, -float("inf"), peak)
    target = tl.load(target_ptr + row) - offset
    here = (target >= 0) & (target < c)
    bias = tl.load(bias_ptr + target, mask=here, other=0.0) if BIAS else 0.0
    l, _ = logits(tl.load(z_ptr + target, mask=here, other=0.0), bias, scale, cap, inverse, BIAS, SOFTCAP)
    total = tl.sum(total.to(tl.float64), 0)
    where = (arg + offset).to(tl.float64)
    fold(state_ptr, True, peak.to(tl.float64), where, s + seen, a, q + seen, total, l.to(tl.float64), here)


@triton.jit
def block_of_exponentials(
    z_ptr, out_ptr, bias_ptr, begin, c, scale, inverse, reference, target, s, a, q, total, m, before,
    FULL: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """One step of `sweep`. FULL: every column lies inside, so that rows which begin at multiples of 16 bytes are read
    and written 16 bytes at a time whatever c is."""
    columns = begin + tl.arange(0, BLOCK)[:, None] * U + tl.arange(0, U)[None, :]
    inside = columns < c
    if FULL:
        z = tl.load(z_ptr + columns)
        bias = tl.load(bias_ptr + columns) if BIAS else 0.0
    else:
        z = tl.load(z_ptr + columns, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0) if BIAS else 0.0
    l, _ = logits(z, bias, scale, 1.0, inverse, BIAS, False)
    total += tl.sum(l, 1)  # 0 outside
    if not FULL:
        l = tl.where(inside, l, LOWEST)
    t = tl.maximum(l - reference, FAR, propagate_nan=tl.PropagateNan.ALL)
    if (target >= begin) & (target < begin + BLOCK * U):
        earlier = tl.max(tl.where(columns < target, l, LOWEST), 1)
        before = tl.max(tl.maximum(m, earlier), 0)
        t = tl.where(columns == target, FAR, t)
    m = tl.maximum(m, tl.max(l, 1))
    e = exp(t)
    if FULL:
        tl.store(out_ptr + columns, e.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptr + columns, e.to(out_ptr.dtype.element_ty), mask=inside)
    return s + tl.sum(e, 1), a + tl.sum(e * t, 1), q + tl.sum(e * e, 1), total, m, before


@triton.jit
def sweep(
    z_ptr, out_ptr, bias_ptr, c, scale, inverse, reference, target,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Write exp(l - reference) of a row, and sum it without its target.

    Returns the sums s, a, q of exp(l - reference), of all l, and of l the maximum and the one before the target.
    """
    s, a, q = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    total, m = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), LOWEST, tl.float32)
    before = tl.max(m, 0)
    whole = c // (BLOCK * U) * (BLOCK * U)
    for begin in range(0, whole, BLOCK * U):
        s, a, q, total, m, before = block_of_exponentials(
            z_ptr, out_ptr, bias_ptr, begin, c, scale, inverse, reference, target, s, a, q, total, m, before,
            True, BIAS, BLOCK, U,
        )  # fmt: skip
    if whole < c:
        s, a, q, total, m, before = block_of_exponentials(
            z_ptr, out_ptr, bias_ptr, whole, c, scale, inverse, reference, target, s, a, q, total, m, before,
            False, BIAS, BLOCK, U,
        )  # fmt: skip
    s, a, q = tl.sum(s.to(tl.float64), 0), tl.sum(a.to(tl.float64), 0), tl.sum(q.to(tl.float64), 0)
    return s, a, q, tl.sum(total.to(tl.float64), 0), tl.max(m, 0), before


@triton.jit
def exponentials_kernel(
    z_ptr,  # (n, c)
    out_ptr,  # (n, c), may be z_ptr
    state_ptr,  # (n, 8) float64
    target_ptr,  # (n,) int64
    reference_ptr,  # (n,) float32
    bias_ptr,  # (c,) float32
    temperature_ptr,  # (n,) float32
    stride,
    out_stride,
    c,
    look,  # columns among which a row without a reference finds its own, all of them where out is z
    offset,
    scale,
    inverse,
    headroom,  # how far, in nats, a row's maximum may lie above its reference
    BIAS: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    U: tl.constexpr,
):
    """One program folds one row and writes its exponentials in one pass; a row that rose too far above its reference
    is done again, over its maximum.

    The target's own term is no part of the sums: beside it the rest of a confident row would vanish.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    out_ptr += row * out_stride
    inverse = inverse_temperature(inverse, temperature_ptr, row, True, ROW_TEMPERATURE)
    target = tl.load(target_ptr + row) - offset
    here = (target >= 0) & (target < c)
    shift = tl.load(bias_ptr + target, mask=here, other=0.0) if BIAS else 0.0
    picked, _ = logits(tl.load(z_ptr + target, mask=here, other=0.0), shift, scale, 1.0, inverse, BIAS, False)

    reference = tl.load(reference_ptr + row)
    none = reference == -float("inf")
    lane = tl.arange(0, BLOCK * U)
    top = tl.full((BLOCK * U,), LOWEST, tl.float32)
    for begin in range(0, tl.where(none | (look == c), look, 0), BLOCK * U):
        columns = begin + lane
        inside = columns < look
        z = tl.load(z_ptr + columns, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0) if BIAS else 0.0
        l, _ = logits(z, bias, scale, 1.0, inverse, BIAS, False)
        top = tl.maximum(top, tl.where(inside, l, LOWEST))
    top = tl.max(top, 0)
    top = tl.where(none & here, tl.maximum(top, picked), top)
    reference = tl.where(none | (top > reference + headroom), tl.where(top == LOWEST, 0.0, top), reference)
    s, a, q, total, peak, before = sweep(
        z_ptr, out_ptr, bias_ptr, c, scale, inverse, reference, target, BIAS, BLOCK, U
    )  # fmt: skip
    if peak > reference + headroom:
        reference = peak
        s, a, q, total, peak, before = sweep(
            z_ptr, out_ptr, bias_ptr, c, scale, inverse, reference, target, BIAS, BLOCK, U
        )  # fmt: skip
    tl.store(reference_ptr + row, reference)

    # the first column stands for any other than the target; it is the target only where there is a larger one
    arg = tl.where(here & (before < peak) & (picked == peak), target, (target == 0).to(tl.int64)) + offset
    rise = tl.where(peak == LOWEST, 0.0, reference - peak).to(tl.float64)
    own = tl.where(here & (peak != LOWEST), at_least(picked - peak, FAR), FAR).to(tl.float64)
    f, e = tl.exp(rise), tl.exp(own)
    a = f * (a + s * rise) + e * own
    s, q = f * s + e, f * f * q + e * e
    peak = tl.where(peak == LOWEST, -float("inf"), peak).to(tl.float64)
    fold(state_ptr + row * 8, True, peak, arg.to(tl.float64), s, a, q, total, picked.to(tl.float64), here)


@triton.jit
def backward_kernel(
    z_ptr,  # (n, c)
    out_ptr,  # (m, c), may be z_ptr where all its rows are taken
    rows_ptr,  # (m,) int64: the rows of z that are taken
    state_ptr,  # (m, 8) float64
    target_ptr,  # (m,) int64
    g_ptr,  # (m,) float32
    h_ptr,  # (m,) float32
    bias_ptr,  # (c,) float32
    temperature_ptr,  # (m,) float32
    stride,
    out_stride,
    c,
    offset,
    scale,
    cap,
    inverse,
    limit,
    above,  # below 0: every entry is clamped
    ROWS: tl.constexpr,
    ENTROPY: tl.constexpr,
    CLAMP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < c
    place = tl.load(rows_ptr + row) if ROWS else row
    z = tl.load(z_ptr + place * stride + columns, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0) if BIAS else 0.0
    inverse = inverse_temperature(inverse, temperature_ptr, row, True, ROW_TEMPERATURE)
    l, chain = logits(z, bias, scale, cap, inverse, BIAS, SOFTCAP)

    state_ptr += row * 8
    m, s = tl.load(state_ptr), tl.load(state_ptr + 1)
    log_s = tl.log(s)
    g = tl.load(g_ptr + row)
    target = tl.load(target_ptr + row) - offset
    # 1 - p of the target without cancellation, from the state's precision
    residual = -expm1(tl.load(state_ptr + 5) - m - log_s).to(tl.float32)
    log_p = (l - m.to(tl.float32)) - log_s.to(tl.float32)
    p = tl.exp(log_p)
    d = g * tl.where(columns == target, residual, -p)
    if CLAMP:
        most = tl.abs(g) * limit if RESIDUAL else limit
        d = tl.where(p > above, at_most(at_least(d, -most), most), d)
    if ENTROPY:
        entropy = log_s - tl.load(state_ptr + 2) / s
        d -= tl.load(h_ptr + row) * p * (at_least(log_p, FAR) + entropy.to(tl.float32))
    d *= chain
    tl.store(out_ptr + row * out_stride + columns, d.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def peaks_kernel(
    z_ptr,  # (n, c)
    out_ptr,  # (c,) float32
    state_ptr,  # (n, 8) float64
    rows_ptr,  # (count,) int64
    bias_ptr,  # (c,) float32
    temperature_ptr,  # (n,) float32
    stride,
    c,
    count,
    scale,
    cap,
    inverse,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes BLOCK columns over all `count` rows."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < c
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :] if BIAS else 0.0
    best = tl.full((ROWS, BLOCK), -float("inf"), tl.float32)
    for begin in range(0, count, ROWS):
        place = begin + tl.arange(0, ROWS)
        some = place < count
        row = tl.load(rows_ptr + place, mask=some, other=0)
        both = some[:, None] & inside[None, :]
        z = tl.load(z_ptr + row[:, None] * stride + columns[None, :], mask=both, other=0.0)
        k = inverse_temperature(inverse, temperature_ptr, row, some, ROW_TEMPERATURE)
        k = k[:, None] if ROW_TEMPERATURE else k
        l, _ = logits(z, bias, scale, cap, k, BIAS, SOFTCAP)
        m, s = (
            tl.load(state_ptr + row * 8, mask=some, other=0.0),
            tl.load(state_ptr + row * 8 + 1, mask=some, other=1.0),
        )
        lse = (m + tl.log(s)).to(tl.float32)
        best = tl.maximum(best, tl.where(both, l - lse[:, None], -float("inf")))
    tl.store(out_ptr + columns, tl.max(best, 0), mask=inside)


@triton.jit
def survey_kernel(
    z_ptr,  # (n, c)
    sums_ptr,  # (m, levels + 2, 3) float64
    sample_ptr,  # (m, S) uint8
    state_ptr,  # (n, 8) float64
    rows_ptr,  # (m,) int64
    bias_ptr,  # (c,) float32
    temperature_ptr,  # (n,) float32
    stride,
    sample_stride,
    S,
    lead,  # the first column that is looked at
    apart,  # columns from one run to the next
    levels,
    top,  # log2 of drop_mass
    steps,
    scale,
    cap,
    inverse,
    SAMPLE: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    RUN: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program looks at some runs of columns of one row."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    z_ptr += row * stride
    inverse = inverse_temperature(inverse, temperature_ptr, row, True, ROW_TEMPERATURE)
    lse = (tl.load(state_ptr + row * 8) + tl.log(tl.load(state_ptr + row * 8 + 1))).to(tl.float32)
    counts = tl.zeros((BINS,), tl.int32)
    p_below, minus_below = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, S, BLOCK):
        some = begin + tl.arange(0, BLOCK)
        inside = some < S
        columns = lead + some // RUN * apart + some % RUN
        z = tl.load(z_ptr + columns, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0) if BIAS else 0.0
        l, _ = logits(z, bias, scale, cap, inverse, BIAS, SOFTCAP)
        minus = at_most((lse - l) * LOG2E, -FAR)  # -log2 p
        level = at_most(at_least(tl.ceil((minus + top) * steps), 0.0), levels + 1.0).to(tl.int32)
        if SAMPLE:
            tl.store(sample_ptr + place * sample_stride + some, level.to(tl.uint8), mask=inside)
        counts += tl.histogram(tl.where(inside, level, BINS - 1), BINS)
        p = tl.where(inside & (level > levels), tl.exp2(-minus), 0.0)
        p_below += p
        minus_below += p * minus
    bins = tl.arange(0, BINS)
    middle = (bins.to(tl.float32) - 0.5) / steps - top  # -log2 p
    number = counts.to(tl.float32)
    p = tl.where(bins == 0, 0.0, number * tl.exp2(-middle))
    last = bins == levels + 1
    minus = tl.where(last, tl.sum(minus_below, 0), p * middle) / LOG2E
    p = tl.where(last, tl.sum(p_below, 0), p)
    at, known = sums_ptr + (place * (levels + 2) + bins) * 3, bins < levels + 2
    tl.store(at, tl.load(at, mask=known, other=0.0) + number, mask=known)
    tl.store(at + 1, tl.load(at + 1, mask=known, other=0.0) + p, mask=known)
    tl.store(at + 2, tl.load(at + 2, mask=known, other=0.0) + minus, mask=known)


@triton.jit
def multiply_kernel(
    x_ptr,  # (n,)
    factor_ptr,  # () float32
    n,
    BLOCK: tl.constexpr,
):
    """The programs take the blocks of x in turn."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        lane = tl.arange(0, BLOCK)
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            begin = tl.cast(block, tl.int64) * BLOCK
            at, inside = x_ptr + begin + lane, lane < n - begin
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(at, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_rows_kernel(
    sums_ptr,  # (V, D) float32
    reached_ptr,  # (V,) uint8
    rows_ptr,  # (K,) int64
    values_ptr,  # (K, D) float32
    D,
    BLOCK: tl.constexpr,
):
    """One program adds one row to the sums, or writes it where it is the first."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    reached = tl.load(reached_ptr + row) != 0
    sums_ptr += row * D
    values_ptr += place * D
    for begin in range(0, D, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < D
        x = tl.load(values_ptr + columns, mask=inside, other=0.0)
        x += tl.load(sums_ptr + columns, mask=inside & reached, other=0.0)
        tl.store(sums_ptr + columns, x, mask=inside)
    tl.debug_barrier()  # a warp that comes late would read what another has marked
    tl.store(reached_ptr + row, 1)


@triton.jit
def finish_rows_kernel(
    sums_ptr,  # (V, D) float32
    out_ptr,  # (V, D), may be sums_ptr
    reached_ptr,  # (V,) uint8
    D,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes one row: its sums, or zeros where nothing reached it. SAME: sums stand where they belong."""
    row = tl.program_id(0).to(tl.int64)
    reached = tl.load(reached_ptr + row) != 0
    sums_ptr += row * D
    out_ptr += row * D
    for begin in range(0, D, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < D
        if SAME:
            tl.store(out_ptr + columns, tl.zeros((BLOCK,), tl.float32), mask=inside & (reached == 0))
        else:
            x = tl.load(sums_ptr + columns, mask=inside & reached, other=0.0)
            tl.store(out_ptr + columns, x.to(out_ptr.dtype.element_ty), mask=inside)
