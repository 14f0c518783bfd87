"""Weight standardization in Triton: one layer, or all layers of a model in one launch.

A program takes a tile [FILTERS, BLOCK] of whole filters, which stays in registers between the
two passes; a filter longer than a tile is read twice. One layer's addresses and sizes are kernel
arguments. Many layers' lie in tables: ``sizes`` and ``programs`` are made once for a set of
layers, ``pointers`` each time by a kernel that gets them as arguments, safe under CUDA graphs.

Tensors: weight, dweight, out, dout [filters, K], K = inner * taps elements stored [inner, taps],
or [taps, inner] in channels_last; gain, dgain [filters]; stats (fp32) [2, filters of all layers]:
mean and std, std = sqrt(var + eps), or sqrt(var) with eps outside. sizes (int64) [layers, 6];
programs (int32) [programs, 2]: layer and first filter; pointers (int64) [layers, tensors].
A step of SGD has buffer, of the momentum (fp32) [filters, K] as weight, and lr (fp32), one number.
"""

import triton
import triton.language as tl

from bitkern.backends.triton.kernels.tiles import STAGES, load


@triton.jit
def _addresses(filter, k, K, permuted_dim, PERMUTED: tl.constexpr):
    """Offsets of elements k of the filters, and of the same ones in the other tensor's order.

    Its dimensions are exchanged: element k = major * permuted_dim + rest lies there at
    rest * (K / permuted_dim) + major.
    """
    row = filter.to(tl.int64)[:, None] * K
    own = row + k[None, :]
    if not PERMUTED:
        return own, own
    # Division by a product, exact because k / permuted_dim is small.
    major = ((k + 0.5) * (1.0 / permuted_dim)).to(tl.int32)
    return own, row + ((k - major * permuted_dim) * (K // permuted_dim) + major)[None, :]


@triton.jit
def _forward_tile(
    weight, out, gain, stats, first, filters, K, permuted_dim, first_stat, all_filters, scale, eps,
    EPS_OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, FILTERS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """Store out in its own order. WHOLE: K <= BLOCK. ALIGNED: 8 divides K."""
    if ALIGNED:
        K = K // 8 * 8  # tells the compiler how wide its accesses may be
    n = K * 1.0  # divisions round correctly: what a mean lost is exactly what is left
    filter = first + tl.arange(0, FILTERS)
    valid = filter < filters
    k = tl.arange(0, BLOCK)
    if WHOLE:
        own, other = _addresses(filter, k, K, permuted_dim, PERMUTED)
        mask = valid[:, None] & (k < K)[None, :]
        value = load(weight + other, mask)
        mean = tl.div_rn(tl.sum(value, 1), n)
        centered = tl.where(mask, value - mean[:, None], 0.0)
        # What the mean lost by rounding may be large against the standard deviation.
        rest = tl.div_rn(tl.sum(centered, 1), n)
        centered = tl.where(mask, centered - rest[:, None], 0.0)
        m2 = tl.sum(centered * centered, 1)
    else:
        # Sums of d = value - that of the first tile, then Chan's combination over the block.
        own, other = _addresses(filter, k, K, permuted_dim, PERMUTED)
        origin = load(weight + other, valid[:, None] & (k < K)[None, :])
        sum_d = tl.zeros([FILTERS, BLOCK], tl.float32)
        sum_dd = tl.zeros([FILTERS, BLOCK], tl.float32)
        for i in tl.range(1, tl.cdiv(K, BLOCK), num_stages=STAGES if ALIGNED else 1):
            own, other = _addresses(filter, i * BLOCK + k, K, permuted_dim, PERMUTED)
            mask = valid[:, None] & (i * BLOCK + k < K)[None, :]
            d = tl.where(mask, load(weight + other, mask) - origin, 0.0)
            sum_d += d
            sum_dd += d * d
        count = tl.cdiv(K - k, BLOCK).to(tl.float32)[None, :]
        mean_d = tl.div_rn(sum_d, tl.maximum(count, 1.0))
        mean = tl.div_rn(tl.sum((origin + mean_d) * count, 1), n)
        delta = origin - mean[:, None] + mean_d  # this order keeps its digits
        rest = tl.div_rn(tl.sum(delta * count, 1), n)
        delta -= rest[:, None]
        m2 = tl.sum(sum_dd - sum_d * mean_d + delta * (delta * count), 1)
    var = tl.div_rn(m2, n - UNBIASED)
    if EPS_OUTSIDE:
        std = tl.sqrt_rn(var)
        factor = scale / (std + eps)
    else:
        std = tl.sqrt_rn(var + eps)
        factor = scale / std
    if gain is not None:
        factor *= load(gain + filter, valid)
    tl.store(stats + first_stat + filter, mean, mask=valid)
    tl.store(stats + all_filters + first_stat + filter, std, mask=valid)
    if WHOLE:
        tl.store(out + own, centered * factor[:, None], mask=mask)
    else:
        for i in tl.range(tl.cdiv(K, BLOCK), num_stages=STAGES if ALIGNED else 1):
            own, other = _addresses(filter, i * BLOCK + k, K, permuted_dim, PERMUTED)
            mask = valid[:, None] & (i * BLOCK + k < K)[None, :]
            value = load(weight + other, mask)
            centered = value - mean[:, None] - rest[:, None]
            tl.store(out + own, centered * factor[:, None], mask=mask)


@triton.jit
def _store_or_step(gradient, weight, dweight, buffer, at, mask, sgd, NESTEROV: tl.constexpr):
    """Store a gradient in dweight, or, given a momentum buffer, take a step of PyTorch's SGD."""
    if buffer is None:
        tl.store(dweight + at, gradient, mask=mask)
    else:
        lr, momentum, share, decay = sgd
        before = load(weight + at, mask)
        gradient += before * decay
        mean = load(buffer + at, mask) * momentum + gradient * share
        tl.store(buffer + at, mean, mask=mask)
        if NESTEROV:
            mean = mean * momentum + gradient
        tl.store(weight + at, before - mean * lr, mask=mask)


@triton.jit
def _backward_tile(
    dout, weight, dweight, gain, dgain, buffer, sgd, stats, first, filters, K, permuted_dim,
    first_stat, all_filters, scale, eps, EPS_OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr,
    FILTERS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
    PERMUTED: tl.constexpr, NESTEROV: tl.constexpr = False,
):  # fmt: skip
    """Store dweight, or step weight and buffer. With c = weight - mean, d the denominator:

    dweight = gain * scale / d * (dout - mean(dout) - c * sum(dout * c) / (d * std * (K or K - 1)))
    """
    if ALIGNED:
        K = K // 8 * 8
    n = K * 1.0
    filter = first + tl.arange(0, FILTERS)
    valid = filter < filters
    k = tl.arange(0, BLOCK)
    mean = load(stats + first_stat + filter, valid)[:, None]
    std = tl.load(stats + all_filters + first_stat + filter, mask=valid, other=1.0)
    if WHOLE:
        own, other = _addresses(filter, k, K, permuted_dim, PERMUTED)
        mask = valid[:, None] & (k < K)[None, :]
        g = load(dout + other, mask)
        centered = load(weight + own, mask) - mean
        sum_g = tl.sum(g, 1)
        rest = tl.div_rn(tl.sum(tl.where(mask, centered, 0.0), 1), n)
        centered -= rest[:, None]
        sum_gc = tl.sum(g * centered, 1)
    else:
        sums_g = tl.zeros([FILTERS, BLOCK], tl.float32)
        sums_c = tl.zeros([FILTERS, BLOCK], tl.float32)
        sums_gc = tl.zeros([FILTERS, BLOCK], tl.float32)
        for i in tl.range(tl.cdiv(K, BLOCK), num_stages=STAGES if ALIGNED else 1):
            own, other = _addresses(filter, i * BLOCK + k, K, permuted_dim, PERMUTED)
            mask = valid[:, None] & (i * BLOCK + k < K)[None, :]
            g = load(dout + other, mask)
            centered = tl.where(mask, load(weight + own, mask) - mean, 0.0)
            sums_g += g
            sums_c += centered
            sums_gc += g * centered
        sum_g = tl.sum(sums_g, 1)
        rest = tl.div_rn(tl.sum(sums_c, 1), n)
        sum_gc = tl.sum(sums_gc, 1) - rest * sum_g
    slope = tl.div_rn(sum_gc, n - UNBIASED)
    if EPS_OUTSIDE:
        d = std + eps
        slope = tl.where(std > 0.0, tl.div_rn(tl.div_rn(slope, d), std), 0.0)
    else:
        d = std
        slope = tl.div_rn(tl.div_rn(slope, d), d)
    factor = scale / d
    if gain is not None:
        tl.store(dgain + filter, factor * sum_gc, mask=valid)
        factor *= load(gain + filter, valid)
    constant = tl.div_rn(sum_g, n)[:, None]
    slope = slope[:, None]
    factor = factor[:, None]
    if WHOLE:
        value = (g - constant - centered * slope) * factor
        _store_or_step(value, weight, dweight, buffer, own, mask, sgd, NESTEROV)
    else:
        for i in tl.range(tl.cdiv(K, BLOCK), num_stages=STAGES if ALIGNED else 1):
            own, other = _addresses(filter, i * BLOCK + k, K, permuted_dim, PERMUTED)
            mask = valid[:, None] & (i * BLOCK + k < K)[None, :]
            centered = load(weight + own, mask) - mean - rest[:, None]
            value = load(dout + other, mask) - constant - centered * slope
            _store_or_step(value * factor, weight, dweight, buffer, own, mask, sgd, NESTEROV)


@triton.jit(do_not_specialize=["filters", "K", "permuted_dim"])
def weight_standardize_forward_one(
    weight, out, gain, stats, filters, K, permuted_dim, scale, eps,
    EPS_OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, FILTERS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    _forward_tile(
        weight, out, gain, stats, tl.program_id(0) * FILTERS, filters, K, permuted_dim, 0, filters,
        scale, eps, EPS_OUTSIDE, UNBIASED, FILTERS, BLOCK, WHOLE, ALIGNED, PERMUTED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["filters", "K", "permuted_dim"])
def weight_standardize_backward_one(
    dout, weight, dweight, gain, dgain, stats, filters, K, permuted_dim, scale, eps,
    EPS_OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, FILTERS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    _backward_tile(
        dout, weight, dweight, gain, dgain, None, None, stats, tl.program_id(0) * FILTERS, filters,
        K, permuted_dim, 0, filters, scale, eps, EPS_OUTSIDE, UNBIASED, FILTERS, BLOCK, WHOLE,
        ALIGNED, PERMUTED,
    )  # fmt: skip


@triton.jit
def weight_standardize_store_pointers(table, first, pointers):
    for i in tl.static_range(len(pointers)):
        tl.store(table + first + i, pointers[i])


@triton.jit
def _size(sizes, layer, INDEX: tl.constexpr):
    return tl.load(sizes + layer * 6 + INDEX).to(tl.int32)


@triton.jit
def _layer(sizes, programs):
    """This program's layer and first filter, and what the table has of the layer."""
    layer = tl.load(programs + 2 * tl.program_id(0))
    first = tl.load(programs + 2 * tl.program_id(0) + 1)
    filters, K = _size(sizes, layer, 0), _size(sizes, layer, 1)
    permuted_dim, first_stat = _size(sizes, layer, 2), _size(sizes, layer, 3)
    kind, scale = _size(sizes, layer, 5), _size(sizes, layer, 4).to(tl.float32, bitcast=True)
    return layer, first, filters, K, permuted_dim, first_stat, kind, scale


@triton.jit
def _tensor(
    pointers, layer, INDEX: tl.constexpr, TENSORS: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    pointer = tl.load(pointers + layer * TENSORS + INDEX).to(tl.pointer_type(DTYPE))
    if ALIGNED:  # here: the compiler loses it on what a function is given
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["all_filters"])
def weight_standardize_forward_all(
    sizes, programs, pointers, stats, all_filters, eps, WEIGHT: tl.constexpr, OUT: tl.constexpr,
    HAS_GAIN: tl.constexpr, EPS_OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr,
    PERMUTED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    layer, first, filters, K, permuted_dim, first_stat, kind, scale = _layer(sizes, programs)
    TENSORS: tl.constexpr = 2 + HAS_GAIN
    for i in tl.static_range(len(TILES)):
        if kind == i:
            ALIGNED: tl.constexpr = TILES[i][3]
            weight = _tensor(pointers, layer, 0, TENSORS, WEIGHT, ALIGNED)
            out = _tensor(pointers, layer, 1, TENSORS, OUT, ALIGNED)
            gain = None
            if HAS_GAIN:
                gain = _tensor(pointers, layer, 2, TENSORS, WEIGHT, ALIGNED)
            _forward_tile(
                weight, out, gain, stats, first, filters, K, permuted_dim, first_stat, all_filters,
                scale, eps, EPS_OUTSIDE, UNBIASED, TILES[i][0], TILES[i][1], TILES[i][2], ALIGNED,
                PERMUTED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["all_filters"])
def weight_standardize_backward_all(
    sizes, programs, pointers, stats, all_filters, eps, WEIGHT: tl.constexpr, OUT: tl.constexpr,
    HAS_GAIN: tl.constexpr, EPS_OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr,
    PERMUTED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    layer, first, filters, K, permuted_dim, first_stat, kind, scale = _layer(sizes, programs)
    TENSORS: tl.constexpr = 3 + 2 * HAS_GAIN
    for i in tl.static_range(len(TILES)):
        if kind == i:
            ALIGNED: tl.constexpr = TILES[i][3]
            dout = _tensor(pointers, layer, 0, TENSORS, OUT, ALIGNED)
            weight = _tensor(pointers, layer, 1, TENSORS, WEIGHT, ALIGNED)
            dweight = _tensor(pointers, layer, 2, TENSORS, WEIGHT, ALIGNED)
            gain = None
            dgain = None
            if HAS_GAIN:
                gain = _tensor(pointers, layer, 3, TENSORS, WEIGHT, ALIGNED)
                dgain = _tensor(pointers, layer, 4, TENSORS, WEIGHT, ALIGNED)
            _backward_tile(
                dout, weight, dweight, gain, dgain, None, None, stats, first, filters, K,
                permuted_dim, first_stat, all_filters, scale, eps, EPS_OUTSIDE, UNBIASED,
                TILES[i][0], TILES[i][1], TILES[i][2], ALIGNED, PERMUTED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["all_filters"])
def weight_standardize_sgd_all(
    sizes, programs, pointers, stats, lr, all_filters, eps, momentum, share, decay,
    EPS_OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, PERMUTED: tl.constexpr,
    NESTEROV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    layer, first, filters, K, permuted_dim, first_stat, kind, scale = _layer(sizes, programs)
    sgd = (tl.load(lr), momentum, share, decay)
    for i in tl.static_range(len(TILES)):
        if kind == i:
            ALIGNED: tl.constexpr = TILES[i][3]
            dout = _tensor(pointers, layer, 0, 3, tl.float32, ALIGNED)
            weight = _tensor(pointers, layer, 1, 3, tl.float32, ALIGNED)
            buffer = _tensor(pointers, layer, 2, 3, tl.float32, ALIGNED)
            _backward_tile(
                dout, weight, None, None, None, buffer, sgd, stats, first, filters, K, permuted_dim,
                first_stat, all_filters, scale, eps, EPS_OUTSIDE, UNBIASED, TILES[i][0],
                TILES[i][1], TILES[i][2], ALIGNED, PERMUTED, NESTEROV,
            )  # fmt: skip
