"""The reads of the score matrix on a CPU, fused by numba: imported only where it is installed.

A row is in the cache when its exponentials, their sum and its share of the column sums are
formed, so that memory is read once and written never. ``exp2`` is a polynomial, as a call to
the library's would keep the compiler from using vector registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray
from torch import Tensor

WIDEST = 1 << 24  # columns, whose numbers are exact in float32
ROWS = 512  # of a block, whose column sums are added up in float32
_LINE = 16  # entries of float32 that come into the cache together
_LONG = 512  # columns of rows that the processor does not fetch ahead well enough by itself
_TOGETHER = 1 << 21  # entries, from which on a second thread is worth waking
_DRIFT = 60.0  # that exponents of two may move before their offsets are found anew
_F = np.float32
_LOW, _HIGH = _F(-3e38), _F(3e38)
_LEAST = _F(-126)  # exponents of two below have no normal float32
_COMPILE: dict[str, Any] = {
    "fastmath": True,  # sums in any order, or nothing would be vectorised; scores are finite
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
}


@intrinsic
def _times_power(context, p, whole):  # type: ignore[no-untyped-def]
    """p * 2 ** whole for 1 <= p < 2: whole is added to the bits of p's exponent."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i32 = ir.IntType(32)
        power = builder.shl(builder.fptosi(args[1], i32), i32(23))
        return builder.bitcast(builder.add(builder.bitcast(args[0], i32), power), ir.FloatType())

    return types.float32(types.float32, types.float32), code


def _extremum(name):  # type: ignore[no-untyped-def]
    @intrinsic
    def extremum(context, x, y):  # type: ignore[no-untyped-def]
        """The compiler's own maximum or minimum: Python's is not vectorised in a reduction."""

        def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
            f32 = ir.FloatType()
            kind = ir.FunctionType(f32, [f32, f32])
            function = builder.module.declare_intrinsic(name, [f32], kind)
            return builder.call(function, args, fastmath=("nnan", "nsz"))

        return types.float32(types.float32, types.float32), code

    return extremum


_max, _min = _extremum("llvm.maxnum"), _extremum("llvm.minnum")


@intrinsic
def _not_finite(context, x):  # type: ignore[no-untyped-def]
    """1.0 for infinity and NaN, which fast arithmetic may not compare; else 0.0."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i32 = ir.IntType(32)
        exponent = builder.and_(builder.bitcast(args[0], i32), i32(0x7F800000))
        return builder.uitofp(builder.icmp_signed("==", exponent, i32(0x7F800000)), ir.FloatType())

    return types.float32(types.float32), code


@intrinsic
def _prefetch(context, s, i, j):  # type: ignore[no-untyped-def]
    """Ask for s[i, j] to be brought into the cache, and go on meanwhile."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i32, i64, pointer = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
        array = make_array(s)(context, builder, args[0])
        address = builder.ptrtoint(array.data, i64)
        for axis in (0, 1):
            stride = builder.extract_value(array.strides, axis)
            address = builder.add(address, builder.mul(args[1 + axis], stride))
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        to_read, keep_near, data = i32(0), i32(3), i32(1)
        builder.call(function, [builder.inttoptr(address, pointer), to_read, keep_near, data])
        return context.get_dummy_value()

    return types.void(s, types.intp, types.intp), code


@njit(inline="always")
def _exp2(t):  # type: ignore[no-untyped-def]
    """2 ** t for t < 128, to 2e-7: the minimax polynomial of the fraction, then the exponent."""
    t = _max(t, _LEAST)
    whole = np.floor(t)
    f = t - whole
    p = _F(1.877576650e-3) * f + _F(8.989340199e-3)
    p = p * f + _F(5.582631791e-2)
    p = p * f + _F(2.401536171e-1)
    p = p * f + _F(6.931530732e-1)
    p = p * f + _F(9.999999251e-1)
    return _times_power(p, whole)


@njit(inline="always")
def _row_of(k, value):  # type: ignore[no-untyped-def]
    """k entries that start at a cache line: vectors that straddle two cost a sixth of a read."""
    room = np.empty(k + _LINE, np.float32)
    start = -room.ctypes.data % (4 * _LINE) // 4
    row = room[start : start + k]
    row[:] = value
    return row


@njit(**_COMPILE)
def scan(s, top, first, step):  # type: ignore[no-untyped-def]
    """Largest entry of each row into top; returns (lowest, highest, widest row, not finite)."""
    n, k = s.shape
    found, bad = np.zeros(4, np.float32), _row_of(k, _F(0))
    found[0], found[1] = _HIGH, _LOW
    for start in range(first * ROWS, n, step * ROWS):
        for i in range(start, min(start + ROWS, n)):
            high, low = _LOW, _HIGH
            for j in range(k):
                x = _F(s[i, j])
                high, low = _max(high, x), _min(low, x)
                bad[j] = _max(bad[j], _not_finite(x))
            top[i] = high
            found[0] = _min(found[0], low)
            found[1] = _max(found[1], high)
            found[2] = _max(found[2], high - low)
    for j in range(k):
        found[3] = _max(found[3], bad[j])
    return found


@njit(**_COMPILE)
def _largest_exponents(s, a, g, base, start, stop):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        high = _LOW
        for j in range(s.shape[1]):
            high = _max(high, _F(s[i, j]) * a + g[j])
        base[i] = high


@njit(**_COMPILE)
def column_sums(s, a, g, weight, ahead, base, refresh, parts, first, step):  # type: ignore[no-untyped-def]
    """Into parts, by block: sum over rows of weight (None: 1) * softmax of (a * s + g) * log 2.

    ``base`` holds what is taken off the exponents of each row so that they do not overflow:
    about their maximum, which ``refresh`` finds anew. A row is added to the sums in the loop
    that reads its successor: by then the total of its exponentials is known. ``ahead`` (else
    None, for which numba compiles a faster loop without it) asks for that row's successor.
    """
    n, k = s.shape
    e, sums, g = _row_of(k, _F(0)), _row_of(k, _F(0)), _row_of(k, g)
    for block in range(first, len(parts), step):
        start, stop = block * ROWS, min((block + 1) * ROWS, n)
        if refresh:
            _largest_exponents(s, a, g, base, start, stop)
        e[:], sums[:], w = _F(0), _F(0), _F(0)
        for i in range(start, stop):
            if ahead is not None and i + 1 < n:  # or the processor would wait for each long row
                for j in range(0, k, _LINE):
                    _prefetch(s, i + 1, j)
            off, total = base[i], _F(0)
            for j in range(k):
                sums[j] += w * e[j]
                x = _exp2(_F(s[i, j]) * a + (g[j] - off))
                e[j] = x
                total += x
            w = _F(1)
            if weight is not None:
                w = weight[i]
            w /= total
        for j in range(k):
            parts[block, j] = sums[j] + w * e[j]


@njit(**_COMPILE)
def labels(s, a, g, index, out, tie, first, step):  # type: ignore[no-untyped-def]
    """Into out the first largest of a * s + g of each row; -1 less it if another is within tie.

    ``index`` counts the columns as floats, which mix with scores in one vector register. A row's
    label is found in the loop that reads its successor: by then its largest entry is known.
    """
    n, k = s.shape
    z, g, index = _row_of(k, _F(0)), _row_of(k, g), _row_of(k, index)
    for start in range(first * ROWS, n, step * ROWS):
        stop, least = min(start + ROWS, n), _HIGH
        for i in range(start, stop + 1):
            row = min(i, stop - 1)
            high, best, close = _LOW, _HIGH, _F(0)
            for j in range(k):
                near = z[j] >= least
                best = _min(best, index[j] if near else _HIGH)
                close += _F(1) if near else _F(0)
                x = _F(s[row, j]) * a + g[j]
                z[j] = x
                high = _max(high, x)
            if i > start:
                out[i - 1] = -1 - np.int64(best) if close > _F(1) else np.int64(best)
            least = high - tie


class FusedReads:
    """The three reads, in as many threads as torch has; their sums do not depend on how many."""

    def __init__(self, n_heads: int):
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1))  # idle until used
        self._offsets: list[Any] = [[] for _ in range(n_heads)]  # of each row's exponents
        self._right_at: list[Any] = [None] * n_heads  # the reg and powers they were found at

    def scan(self, tile: Tensor, head: int) -> tuple[float, float] | None:
        """(widest row, largest magnitude); None if not all scores are finite."""
        top = np.empty(len(tile), np.float32)
        found = np.stack(self._in_threads(scan, tile.numpy(), top))
        if found[:, 3].any():
            return None
        self._offsets[head].append(top)
        largest = max(-found[:, 0].min(), found[:, 1].max())
        return float(found[:, 2].max()), float(largest)

    def column_sums(self, ask: Any, weight: Tensor | None) -> Callable[[Tensor, slice], Any]:
        """A read: sum over a tile's rows of weight (None: 1) * softmax at the ask, (K,)."""
        a, g = ask.powers()
        refresh = self._drifted(ask, a, g)
        ahead = True if len(g) >= _LONG else None
        offsets = self._offsets[ask.head]

        def read(tile: Tensor, rows: slice) -> NDArray[np.float64]:
            parts = np.empty((-(-len(tile) // ROWS), len(g)))
            w = None if weight is None else weight[rows].numpy()
            rest = (g, w, ahead, offsets[rows], refresh, parts)
            self._in_threads(column_sums, tile.numpy(), np.float32(a), *rest)
            return parts.sum(0)

        return read

    def largest(self, tile: Tensor, ask: Any, tie: float, out: Tensor) -> bool:
        """Into out the largest entry of each row, -1 less it where there are ties."""
        a, g = ask.powers()
        index, gap = np.arange(len(g), dtype=np.float32), np.float32(tie * math.log2(math.e))
        self._in_threads(labels, tile.numpy(), np.float32(a), g, index, out.numpy(), gap)
        return True

    def _drifted(self, ask: Any, a: float, g: NDArray[np.float32]) -> bool:
        """Whether exponents may have moved too far since their offsets were right."""
        head = ask.head
        if self._right_at[head] is None:  # the row maxima of the scan, for a potential of 0
            self._offsets[head] = np.concatenate(self._offsets[head]) * np.float32(a)
            self._right_at[head] = ask.reg, np.zeros_like(g)
        reg, before = self._right_at[head]
        # A cluster that gets nothing has a power of -1e30: one more or less of them is far, too.
        if ask.reg == reg and np.abs(g - before).max() <= _DRIFT:
            return False
        self._right_at[head] = ask.reg, g
        return True

    def _in_threads(self, function: Any, *arguments: Any) -> list[Any]:
        """function(*arguments, i, n) in n threads; each takes every n-th block of rows."""
        n = self._threads if arguments[0].size >= _TOGETHER else 1
        others = [self._pool.submit(partial(function, *arguments, i, n)) for i in range(1, n)]
        return [function(*arguments, 0, n), *(other.result() for other in others)]
