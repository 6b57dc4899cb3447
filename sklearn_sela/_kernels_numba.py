"""The reads of the score matrix on a CPU, fused by numba: imported only where it is installed.

A row is in the cache when its exponentials, their sum and its share of the column sums are
formed, so that memory is read once and written never. ``exp2`` is a polynomial, as a call to
the library's would keep the compiler from using vector registers.
"""

from __future__ import annotations

import functools
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
_TOGETHER = 1 << 19  # entries, from which on other threads are worth waking
_DRIFT = 60.0  # that exponents of two may move before their offsets are found anew
_F = np.float32
_LOW, _HIGH = _F(-3e38), _F(3e38)
_SUBNORMAL = _F(1e-39)
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
def _magnitude(context, x):  # type: ignore[no-untyped-def]
    """The bits of abs(x), which compare as abs(x) does; infinity and NaN are above all others."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i32 = ir.IntType(32)
        return builder.and_(builder.bitcast(args[0], i32), i32(0x7FFFFFFF))

    return types.int32(types.float32), code


@intrinsic
def _take(context, taken):  # type: ignore[no-untyped-def]
    """The number of the next block that no thread has taken yet; ``taken[0]`` counts them."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = make_array(taken)(context, builder, args[0]).data
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(taken), code


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
def scan(s, top, taken):  # type: ignore[no-untyped-def]
    """Largest entry of each row into top; returns (widest row, largest magnitude)."""
    n, k = s.shape
    widest, largest = _F(0), np.int32(0)
    start = ROWS * _take(taken)
    while start < n:
        for i in range(start, min(start + ROWS, n)):
            high, low = _LOW, _HIGH
            for j in range(k):
                x = _F(s[i, j])
                high, low = _max(high, x), _min(low, x)
                largest = max(largest, _magnitude(x))
            top[i] = high
            widest = _max(widest, high - low)
        start = ROWS * _take(taken)
    return widest, largest


@njit(**_COMPILE)
def _largest_exponents(s, a, g, base, start, stop):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        high = _LOW
        for j in range(s.shape[1]):
            high = _max(high, _F(s[i, j]) * a + g[j])
        base[i] = high


@njit(**_COMPILE)
def column_sums(s, a, g, weight, ahead, base, refresh, parts, taken):  # type: ignore[no-untyped-def]
    """Into parts[block]: sums over its rows of weight (None: 1) times q and times q ** 2.

    q is the softmax of (a * s + g) * log 2. ``base`` holds what is taken off the exponents of
    each row so that they do not overflow: about their maximum, which ``refresh`` finds anew.
    ``ahead`` (else None, for which numba compiles a faster loop without it) asks for the row
    after the one that is read.
    """
    n, k = s.shape
    e, sums, squares, g = _row_of(k, _F(0)), _row_of(k, _F(0)), _row_of(k, _F(0)), _row_of(k, g)
    block = _take(taken)
    while block < len(parts):
        start, stop = block * ROWS, min((block + 1) * ROWS, n)
        if refresh:
            _largest_exponents(s, a, g, base, start, stop)
        sums[:], squares[:] = _F(0), _F(0)
        for i in range(start, stop):
            if ahead is not None and i + 1 < n:  # or the processor would wait for each long row
                for j in range(0, k, _LINE):
                    _prefetch(s, i + 1, j)
            off, total = base[i], _F(0)
            for j in range(k):
                x = _exp2(_F(s[i, j]) * a + (g[j] - off))
                e[j] = x
                total += x
            over, w = _F(1) / total, _F(1)
            if weight is not None:
                w = weight[i]
            for j in range(k):
                q = over * e[j]
                sums[j] += w * q
                squares[j] += w * q * q
        parts[block, 0], parts[block, 1] = sums, squares
        block = _take(taken)


@njit(**_COMPILE)
def labels(s, a, g, index, out, tie, taken):  # type: ignore[no-untyped-def]
    """Into out the largest of a * s + g of each row; -1 less it if another is within tie.

    ``index`` counts the columns as floats, which mix with scores in one vector register.
    """
    n, k = s.shape
    z, g, index = _row_of(k, _F(0)), _row_of(k, g), _row_of(k, index)
    start = ROWS * _take(taken)
    while start < n:
        for i in range(start, min(start + ROWS, n)):
            high = _LOW
            for j in range(k):
                x = _F(s[i, j]) * a + g[j]
                z[j] = x
                high = _max(high, x)
            least, close, which = high - tie, _F(0), _F(0)
            for j in range(k):
                near = _F(1) if z[j] >= least else _F(0)
                close += near
                which += near * index[j]  # the largest, if it is alone
            out[i] = np.int64(which)
            if close > _F(1):
                out[i] = -1 - np.argmax(z)
        start = ROWS * _take(taken)


def _flushed(function: Any, *arguments: Any) -> Any:
    """function(*arguments), tiny numbers being 0 meanwhile.

    Squares of small probabilities have no normal float32, at which some processors stop to think:
    a read takes them seven times as long.
    """
    before = bool(_SUBNORMAL * _F(1) == 0)
    torch.set_flush_denormal(True)
    try:
        return function(*arguments)
    finally:
        torch.set_flush_denormal(before)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


class FusedReads:
    """The three reads, in as many threads as torch has; their sums do not depend on how many."""

    def __init__(self, n_heads: int):
        self._threads = torch.get_num_threads()
        self._offsets: list[Any] = [[] for _ in range(n_heads)]  # of each row's exponents
        self._right_at: list[Any] = [None] * n_heads  # the reg and powers they were found at

    def scan(self, tile: Tensor, head: int) -> tuple[float, float] | None:
        """(widest row, largest magnitude); None if not all scores are finite."""
        top = np.empty(len(tile), np.float32)
        found = self._in_threads(scan, tile.numpy(), top)
        largest = np.int32(max(bits for _, bits in found)).view(np.float32)
        if not np.isfinite(largest):
            return None
        self._offsets[head].append(top)
        return max(widest for widest, _ in found), float(largest)

    def column_sums(self, ask: Any, weight: Tensor | None) -> Callable[[Tensor, slice], Any]:
        """A read: sums over a tile's rows of weight (None: 1) times q and q ** 2, (2, K)."""
        a, g = ask.powers()
        refresh = self._drifted(ask, a, g)
        ahead = True if len(g) >= _LONG else None
        offsets = self._offsets[ask.head]

        def read(tile: Tensor, rows: slice) -> NDArray[np.float64]:
            parts = np.empty((-(-len(tile) // ROWS), 2, len(g)))
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
        """What function(*arguments, taken) returned in each thread that took part.

        A thread takes a block of rows after another until none is left. This one starts at once
        and waits for no other that has not started: one that wakes late costs next to nothing.
        """
        work = partial(_flushed, function, *arguments, np.zeros(1, np.int64))
        n = self._threads if arguments[0].size >= _TOGETHER else 1
        others = [_pool(n).submit(work) for _ in range(1, n)]
        return [work(), *(other.result() for other in others if not other.cancel())]
