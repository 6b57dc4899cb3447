"""The reads of the score matrix on a CPU, fused by numba: imported only where it is installed.

A row is in the cache when its exponentials, their sum and its share of the column sums are
formed, so that memory is read once and written never. ``exp2`` is a polynomial, as a call to
the library's would keep the compiler from using vector registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray
from torch import Tensor

from sklearn_sela._lanes import (
    LANES,
    add,
    add_to_exponent,
    fma,
    load,
    load_some,
    maximum,
    mul,
    splat,
    store,
    sub,
    total,
)
from sklearn_sela._scores import Scores
from sklearn_sela._threads import COMPILE, STAY, Threads, finish, take

WIDEST = 1 << 24  # columns, whose numbers are exact in float32
ROWS = 512  # of a block, whose column sums are added up in float32
_AHEAD = 2048  # entries between what is read and what is asked for
_TOGETHER = 1 << 19  # entries, from which on other threads are worth waking
_TOO_FAR = 60.0  # for exponents of two to move between two reads, whose offsets are then no use
_F = np.float32
_LOW, _HIGH = _F(-3e38), _F(3e38)
_LEAST = _F(-126)  # exponents of two below have no normal float32
_ROUNDED = _F(1.5 * 2**23)  # added to a number, it leaves no bits for a fraction
_NOTHING = _F(-1e30)  # power of a cluster that gets nothing


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
    """2 ** t for t < 128, to 2e-7: a minimax polynomial of what rounding t leaves."""
    t = maximum(t, splat(_LEAST))
    shifted = add(t, splat(_ROUNDED))
    f = sub(t, sub(shifted, splat(_ROUNDED)))
    p = fma(f, splat(_F(1.339887440e-3)), splat(_F(9.618437358e-3)))
    p = fma(p, f, splat(_F(5.550332471e-2)))
    p = fma(p, f, splat(_F(2.402264791e-1)))
    p = fma(p, f, splat(_F(6.931472029e-1)))
    p = fma(p, f, splat(_F(1)))
    return add_to_exponent(p, shifted)


@njit(inline="always")
def _rows_of(n, k, value):  # type: ignore[no-untyped-def]
    """n rows of at least k entries, each a number of cache lines of its own.

    Vectors that straddle two lines cost a sixth of a read.
    """
    width = -(-k // LANES) * LANES
    room = np.empty(n * width + LANES, np.float32)
    start = -room.ctypes.data % (4 * LANES) // 4
    rows = room[start : start + n * width].reshape(n, width)
    rows[:] = value
    return rows


@njit(**COMPILE)
def scan(s, top, widest, largest, counts, looks):  # type: ignore[no-untyped-def]
    """Into top the largest entry of each row; of each block the widest row, largest magnitude."""
    n, k = s.shape
    block = take(counts, len(widest), looks)
    while block >= 0:
        wide, bits = _F(0), np.int32(0)
        for i in range(block * ROWS, min((block + 1) * ROWS, n)):
            high, low = _LOW, _HIGH
            for j in range(k):
                x = _F(s[i, j])
                high, low = _max(high, x), _min(low, x)
                bits = max(bits, _magnitude(x))
            top[i] = high
            wide = _max(wide, high - low)
        widest[block], largest[block] = wide, bits
        finish(counts)
        block = take(counts, len(widest), looks)


@njit(**COMPILE)
def _largest_exponents(s, a, g, base, start, stop):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        high = _LOW
        for j in range(s.shape[1]):
            high = _max(high, _F(s[i, j]) * a + g[j])
        base[i] = high


@njit(**COMPILE)
def column_sums(s, ask, weight, copied, base, parts, counts, looks):  # type: ignore[no-untyped-def]
    """Into parts[block]: sums over its rows of weight (None: 1) times q and times q ** 2.

    q is the softmax of (a * s + g) * log 2. ``ask`` holds g, a, and how far exponents may be from
    those of the last read. ``base`` is what is taken off each row's so that they do not overflow:
    the logarithm of their sum, about, from where they were last; made anew where that is too far.
    Rows are taken in twos, which halves the work on the sums; those that are not contiguous
    float32 are ``copied`` first (else None, for which numba compiles a loop without it).
    """
    n, k = s.shape
    e, sums = _rows_of(2, k, _F(0)), _rows_of(2, k, _F(0))
    room, gains = _rows_of(2, k, _F(0)), _rows_of(1, k, _NOTHING)
    over, w = np.empty(2, np.float32), np.empty(2, np.float32)
    of_row = np.empty(ROWS, np.float32)
    ahead, whole = max(2, _AHEAD // k), k // LANES * LANES
    block = take(counts, len(parts), looks)
    while block >= 0:
        start, stop = block * ROWS, min((block + 1) * ROWS, n)
        gains[0, :k], scale, moved = ask[:k], splat(ask[k]), ask[k + 1]
        if moved > _TOO_FAR:
            _largest_exponents(s, ask[k], ask, base, start, stop)
        sums[:] = _F(0)
        for i in range(start, stop, 2):
            for r in range(2):
                row = min(i + r, stop - 1)
                off, summed = splat(base[row]), splat(_F(0))
                w[r] = _F(1)
                if weight is not None:
                    w[r] = weight[row]
                if copied is not None:
                    for j in range(k):
                        room[r, j] = s[row, j]
                for j in range(0, k, LANES):
                    _prefetch(s, i + r + ahead, j)
                    if copied is not None:
                        x = load(room, r, j)
                    elif j < whole:
                        x = load(s, row, j)
                    else:
                        x = load_some(s, row, j, k - j)
                    x = _exp2(sub(fma(x, scale, load(gains, 0, j)), off))
                    store(e, r, j, x)
                    summed = add(summed, x)
                of_row[row - start] = total(summed)
                over[r] = _F(1) / of_row[row - start]
            if i + 1 == stop:
                over[1] = _F(0)  # the last row stands for the one that is not there
            over_0, over_1, w_0, w_1 = splat(over[0]), splat(over[1]), splat(w[0]), splat(w[1])
            for j in range(0, k, LANES):
                q, other = mul(over_0, load(e, 0, j)), mul(over_1, load(e, 1, j))
                wq, w_other = q, other
                if weight is not None:
                    wq, w_other = mul(w_0, q), mul(w_1, other)
                store(sums, 0, j, add(load(sums, 0, j), add(wq, w_other)))
                store(sums, 1, j, fma(w_other, other, fma(wq, q, load(sums, 1, j))))
        for i in range(start, stop):
            base[i] += _F((_magnitude(of_row[i - start]) >> 23) - 127)  # its exponent
        parts[block] = sums[:, :k]
        finish(counts)
        block = take(counts, len(parts), looks)


@njit(**COMPILE)
def labels(s, a, g, index, out, tie, counts, looks):  # type: ignore[no-untyped-def]
    """Into out the largest of a * s + g of each row; -1 less it if another is within tie.

    ``index`` counts the columns as floats, which mix with scores in one vector register.
    """
    n, k = s.shape
    z = np.empty(k, np.float32)
    n_blocks = -(-n // ROWS)
    block = take(counts, n_blocks, looks)
    while block >= 0:
        for i in range(block * ROWS, min((block + 1) * ROWS, n)):
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
        finish(counts)
        block = take(counts, n_blocks, looks)


class FusedReads:
    """The three reads, in as many threads as torch has; their sums do not depend on how many."""

    def __init__(self, scores: Scores):
        self._offsets: list[Any] = [[] for _ in range(scores.n_heads)]  # of each row's exponents
        self._last: list[Any] = [None] * scores.n_heads  # reg and powers that they are right for
        # Of matrices in memory, whose tiles are the same at each read. Threads that stay for one
        # head's next read would not be there for another's.
        self._kept: dict[int, Any] = {}
        self._whole = scores.whole()
        self._stay = STAY if self._whole and scores.n_heads == 1 else 1

    def scan(self, tile: Tensor, head: int) -> tuple[float, float] | None:
        """(widest row, largest magnitude); None if not all scores are finite."""
        top, n_blocks = np.empty(len(tile), np.float32), -(-len(tile) // ROWS)
        widest, bits = np.empty(n_blocks, np.float32), np.empty(n_blocks, np.int32)
        _threads(scan, tile.numpy(), top, widest, bits).read()
        largest = bits.max().view(np.float32)
        if not np.isfinite(largest):
            return None
        self._offsets[head].append(top)
        return float(widest.max()), float(largest)

    def column_sums(self, ask: Any, weight: Tensor | None) -> Callable[[Tensor, slice], Any]:
        """A read: sums over a tile's rows of weight (None: 1) times q and q ** 2, (2, K)."""
        a, g = ask.powers()
        moved = self._moved(ask, a, g)

        def read(tile: Tensor, rows: slice) -> NDArray[np.float64]:
            reading = self._kept.get(ask.head) or self._reading(tile, rows, ask.head, weight)
            threads, asked, parts = reading
            asked[:-2], asked[-2], asked[-1] = g, a, moved
            threads.read()
            return parts.sum(0)

        return read

    def _reading(self, tile: Tensor, rows: slice, head: int, weight: Tensor | None) -> Any:
        """(threads, what they are asked, the sums of each block)"""
        n, k = tile.shape
        asked, parts = np.empty(k + 2, np.float32), np.empty((-(-n // ROWS), 2, k))
        w = None if weight is None else weight[rows].numpy()
        scores = tile.numpy()
        contiguous = scores.dtype == np.float32 and scores.strides[1] == 4
        rest = (asked, w, None if contiguous else True, self._offsets[head][rows], parts)
        reading = _threads(column_sums, scores, *rest, stay=self._stay), asked, parts
        if self._whole:
            self._kept[head] = reading
        return reading

    def largest(self, tile: Tensor, ask: Any, tie: float, out: Tensor) -> bool:
        """Into out the largest entry of each row, -1 less it where there are ties."""
        for threads, *_ in self._kept.values():
            threads.close()
        a, g = ask.powers()
        index, gap = np.arange(len(g), dtype=np.float32), np.float32(tie * math.log2(math.e))
        _threads(labels, tile.numpy(), np.float32(a), g, index, out.numpy(), gap).read()
        return True

    def _moved(self, ask: Any, a: float, g: NDArray[np.float32]) -> float:
        """How far exponents may be from those for which their offsets are right."""
        head = ask.head
        if self._last[head] is None:  # the row maxima of the scan, for a potential of 0
            self._offsets[head] = np.concatenate(self._offsets[head]) * np.float32(a)
            self._last[head] = ask.reg, np.zeros_like(g)
        (reg, before), self._last[head] = self._last[head], (ask.reg, g)
        if reg == ask.reg:
            return float(np.abs(g - before).max())
        # Exponents scale, and with them how far a sum's is from the largest of its terms.
        scale = np.float32(reg / ask.reg)
        self._offsets[head] *= scale
        return float(np.abs(g - scale * before).max() + scale * math.log2(len(g)))


def _threads(kernel: Any, scores: Any, *arguments: Any, stay: int = 1) -> Threads:
    """Over blocks of ROWS of the scores, in as many threads as are worth it."""
    n = torch.get_num_threads() if scores.size >= _TOGETHER else 1
    return Threads(kernel, -(-len(scores) // ROWS), n, stay, scores, *arguments)
