"""The arithmetic of PTX: for each opcode the types of its sources, and a function of them.

Values are bits, in unsigned NumPy arrays; ``decode`` and ``encode`` give them a type. Where PTX
promises an approximation the result is drawn at random inside the documented error, a function of
the argument and of ``SEED``, as hardware gives the same result each time.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.backends.triton.ptx.parser import SIZES

SEED = int(os.environ.get("BITKERN_PTX_SEED", "0"))
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
DTYPES = {
    name: np.dtype(f"{_KINDS[name[0]]}{size}")
    for name, size in SIZES.items()
    if re.fullmatch(r"[busf]\d+", name)
}
# Of the result, relative; PTX gives some of them in units of the last place.
ERRORS = {
    "ex2.approx": 2**-22.5, "rcp.approx": 2**-23, "rsqrt.approx": 2**-22.9, "sqrt.approx": 2**-23,
    "div.full": 2**-22, "tanh.approx": 2**-11,
}  # fmt: skip


class UnknownOpcode(Exception):
    pass


class Arithmetic(NamedTuple):
    sources: tuple[str, ...]  # types
    function: Callable[..., np.ndarray]  # of bits, to bits


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Decode bits; bf16 and f16 become float64, where their sums and products are exact."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return bits if kind == "pred" else bits.view(DTYPES[kind])


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Encode values, rounded once, to nearest even."""
    if kind == "bf16":
        return _round_to_bf16(values)
    if kind == "pred":
        return values
    return np.ascontiguousarray(values, DTYPES[kind]).view(UNSIGNED[SIZES[kind]])


def _round_to_bf16(values: np.ndarray) -> np.ndarray:
    single = np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    if values.dtype == np.float64:
        # To odd first: what the rounding to float32 left over must not decide as a tie.
        inexact = (single.astype(np.float64) != values) & np.isfinite(single)
        larger = np.abs(single.astype(np.float64)) > np.abs(values)
        bits = np.where(inexact, (bits - larger.astype(np.uint32)) | 1, bits).astype(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(single), 0x7FFF, rounded).astype(np.uint16)


def _typed(function, *kinds):
    """Wrap a function for bits; ``kinds`` are the types of the sources and, last, the result."""
    *sources, result = kinds

    def run(*bits):
        values = [decode(b, kind) for b, kind in zip(bits, sources, strict=True)]
        return encode(function(*values), result)

    return Arithmetic(tuple(sources), run)


def _packed(function, kind, arity):
    """Wrap a function for two numbers in each register; a comparison has two results."""
    part = UNSIGNED[SIZES[kind]]

    def run(*bits):
        values = [decode(b.view(part).reshape(-1, 2), kind) for b in bits]
        result = function(*values)
        if result.dtype == np.bool_:
            return result[:, 0], result[:, 1]
        out = encode(result, kind)
        return np.ascontiguousarray(out).view(UNSIGNED[2 * SIZES[kind]])[:, 0]

    return Arithmetic((f"b{16 * SIZES[kind]}",) * arity, run)


def _fma(a, b, c):
    """Multiply and add with one rounding, except for the few sums that are a tie in 53 bits."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _quotient(a, b):
    """Divide toward zero. PTX leaves division by zero open: -1 here, as in hardware."""
    a, b = a.astype(np.int64), b.astype(np.int64)
    magnitude = np.abs(a) // np.maximum(np.abs(b), 1)
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -magnitude, magnitude))


def _remainder(a, b):
    return a.astype(np.int64) - _quotient(a, b) * b


def _shift_left(a, n):
    bits = 8 * a.dtype.itemsize
    shifted = a << np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, 0, shifted).astype(a.dtype)


def _shift_right(a, n):
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return np.where((n >= bits) & (a.dtype.kind == "u"), 0, shifted).astype(a.dtype)


def _extract(a, first, length):
    """Extract the bits of a field; a signed type extends their sign."""
    spare = np.int64(64) - length
    field = (a.astype(np.int64) >> first) << spare
    if a.dtype.kind == "u":
        field = field.astype(np.uint64)
        return np.where(length == 0, 0, field >> np.minimum(spare, 63).astype(np.uint64))
    return np.where(length == 0, 0, field >> np.minimum(spare, 63))


def _permute(a, b, selectors):
    """Select bytes of a and b; the highest bit of a selector replicates the sign."""
    a, b, selectors = np.broadcast_arrays(a, b, selectors)
    both = np.ascontiguousarray(np.stack([a, b], 1)).view(np.uint8)
    out = np.empty((len(a), 4), np.uint8)
    for i in range(4):
        selector = selectors >> (4 * i) & 0xF
        byte = np.take_along_axis(both, (selector & 7).astype(np.int64)[:, None], 1)[:, 0]
        out[:, i] = np.where(selector & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    return out.view(np.uint32)[:, 0]


def _approximate(exact: np.ndarray, error: float, *arguments: np.ndarray) -> np.ndarray:
    """Return float32 within a relative error of ``exact``; 0, 1 and nonfinite values stay."""
    hashed = np.full(exact.shape, 0x9E3779B97F4A7C15 + SEED, np.uint64)
    for argument in arguments:
        hashed = (hashed ^ argument.view(np.uint32)) * np.uint64(0xBF58476D1CE4E5B9)
        hashed ^= hashed >> np.uint64(29)
    draw = (hashed >> np.uint64(11)).astype(np.float64) / 2**52 - 1
    return (exact * (1 + error * draw)).astype(np.float32)


_EXACT = {
    "ex2": np.exp2, "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x), "sqrt": np.sqrt,
    "tanh": np.tanh, "div": np.divide,
}  # fmt: skip


def _flush(x):
    """Flush subnormal numbers to zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _special(name, rounding, flushes):
    error = ERRORS.get(f"{name}.{rounding}", 0.0)

    def run(*arguments):
        if flushes:
            arguments = [_flush(a) for a in arguments]
        result = _approximate(
            _EXACT[name](*(a.astype(np.float64) for a in arguments)), error, *arguments
        )
        return _flush(result) if flushes else result

    return _typed(run, *["f32"] * (3 if name == "div" else 2))


def _flushed(function):
    return lambda *arguments: _flush(function(*map(_flush, arguments)))


def _to_integer(kind):
    limits = np.iinfo(DTYPES[kind])

    def run(x):
        whole = np.nan_to_num(np.trunc(x.astype(np.float64)))
        inside = np.clip(whole, limits.min, limits.max)
        return np.where(whole >= limits.max, limits.max, inside.astype(DTYPES[kind]))

    return run


# NaN: max and min give the other one, max.NaN and min.NaN give NaN.
_FLOAT = {
    "add": (np.add, 2), "sub": (np.subtract, 2), "mul": (np.multiply, 2), "fma.rn": (_fma, 3),
    "neg": (np.negative, 1), "abs": (np.abs, 1), "max": (np.fmax, 2), "min": (np.fmin, 2),
    "max.NaN": (np.maximum, 2), "min.NaN": (np.minimum, 2),
    "copysign": (lambda sign, x: np.copysign(x, sign), 2),
}  # fmt: skip
_INTEGER = {
    "add": (np.add, 2), "sub": (np.subtract, 2), "mul.lo": (np.multiply, 2),
    "mad.lo": (lambda a, b, c: a * b + c, 3), "neg": (np.negative, 1), "abs": (np.abs, 1),
    "max": (np.maximum, 2), "min": (np.minimum, 2), "div": (_quotient, 2), "rem": (_remainder, 2),
}  # fmt: skip
_LOGIC = {
    "and": (np.bitwise_and, 2), "or": (np.bitwise_or, 2), "xor": (np.bitwise_xor, 2),
    "not": (np.bitwise_not, 1),
}  # fmt: skip
_COMPARE = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    # True where a number is NaN.
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: (a != a) | (b != b), "num": lambda a, b: (a == a) & (b == b),
}  # fmt: skip


def _convert(rounding, to, source):
    if to in ("bf16x2", "f16x2"):  # the first source is the upper half
        half = to[:-2]

        def run(upper, lower):
            halves = [encode(decode(b, source), half) for b in (lower, upper)]
            pair = np.stack(np.broadcast_arrays(*halves), 1)
            return np.ascontiguousarray(pair).view(np.uint32)[:, 0]

        return Arithmetic((source, source), run)
    floats = "f" in to, "f" in source
    if floats == (False, True):
        if rounding != "rzi":
            raise UnknownOpcode(f"cvt.{rounding}")
        return _typed(_to_integer(to), source, to)
    if rounding not in (None, "rn") or (floats == (False, False)) != (rounding is None):
        widens = floats == (True, True) and SIZES[to] > SIZES[source]
        if rounding is not None or not widens:
            raise UnknownOpcode(f"cvt.{rounding}.{to}.{source}")
    # Integers wrap around.
    return _typed(lambda x: x if to == "bf16" else x.astype(DTYPES[to]), source, to)


_PATTERNS = [
    (r"(add|sub|mul)(?:\.rn)?\.(f32|f16|bf16)", lambda op, t: _simple(_FLOAT, op, t)),
    (r"(neg|abs|max|min|max\.NaN|min\.NaN|fma\.rn|copysign)\.(f32|f16|bf16)",
     lambda op, t: _simple(_FLOAT, op, t)),
    (r"(add|mul|abs|fma\.rn)(?:\.rn)?\.ftz\.(f32)",
     lambda op, t: _typed(_flushed(_FLOAT[op][0]), *[t] * (_FLOAT[op][1] + 1))),
    (r"(add|sub|mul|neg|abs|max|min|max\.NaN|min\.NaN|fma\.rn)(?:\.rn)?\.(f32|f16|bf16)x2",
     lambda op, t: _packed(_FLOAT[op][0], t, _FLOAT[op][1])),
    (r"(add|sub|mul\.lo|mad\.lo|neg|abs|max|min|div|rem)\.([su](?:16|32|64))",
     lambda op, t: _simple(_INTEGER, op, t)),
    (r"cvta\.to\.global\.(u64)", lambda t: _typed(lambda address: address, t, t)),
    (r"(and|or|xor|not)\.(pred|b16|b32|b64)", lambda op, t: _simple(_LOGIC, op, t)),
    (r"mul\.wide\.([su])(16|32)", lambda k, n: _typed(
        lambda a, b: a.astype(DTYPES[f"{k}{2 * int(n)}"]) * b, k + n, k + n, f"{k}{2 * int(n)}")),
    (r"mad\.wide\.([su])(16|32)", lambda k, n: _typed(
        lambda a, b, c: a.astype(DTYPES[f"{k}{2 * int(n)}"]) * b + c,
        k + n, k + n, f"{k}{2 * int(n)}", f"{k}{2 * int(n)}")),
    (r"shl\.(b(?:16|32|64))", lambda t: _typed(_shift_left, t, "u32", t)),
    (r"shr\.([bsu](?:16|32|64))", lambda t: _typed(_shift_right, t, "u32", t)),
    (r"bfe\.([su]32)", lambda t: _typed(_extract, t, "s32", "s32", t)),
    (r"prmt\.(b32)", lambda t: _typed(_permute, t, t, t, t)),
    (r"selp\.([busf](?:16|32|64))",
     lambda t: Arithmetic((t, t, "pred"), lambda a, b, p: np.where(p, a, b))),
    (r"setp\.(\w+)\.(bf16|[busf](?:16|32|64))", lambda op, t: _typed(_COMPARE[op], t, t, "pred")),
    (r"setp\.(\w+)\.(f16|bf16)x2", lambda op, t: _packed(_COMPARE[op], t, 2)),
    (r"(ex2|rsqrt|rcp|sqrt|tanh)\.(approx)(\.ftz)?\.f32", _special),
    (r"(rcp|sqrt|div)\.(rn)()\.f32", _special),
    (r"(div)\.(full)(\.ftz)?\.f32", _special),
    (r"cvt(?:\.(rn|rzi))?\.(bf16x2|f16x2|bf16|[suf]\d+)\.(bf16|[suf]\d+)", _convert),
]  # fmt: skip


def _simple(table, name, kind):
    function, arity = table[name]
    return _typed(function, *[kind] * (arity + 1))


def arithmetic(opcode: str) -> Arithmetic:
    for pattern, make in _PATTERNS:
        found = re.fullmatch(pattern, opcode)
        if found:
            return make(*found.groups())
    raise UnknownOpcode(opcode)
