"""The reads of a matrix of scores on a CPU, and the steps between them, compiled by numba.

A row is in the cache when its exponentials, their sum and its share of the column sums are
formed, so that memory is read once and written never. ``exp2`` is a polynomial, as a call to
the library's would keep the compiler from using vector registers.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from sklearn_sela._lanes import (
    LANES,
    add,
    add_to_exponent,
    at_least,
    fma,
    kept,
    largest,
    load,
    load_some,
    maximum,
    mul,
    splat,
    store,
    sub,
    total,
)
from sklearn_sela._marginals import STARVED, centred, step
from sklearn_sela._path import (
    ERROR,
    LENGTH,
    LEVEL,
    NEXT,
    READS,
    following,
    lengthen,
    next_level,
    reg_of,
)
from sklearn_sela._threads import (
    COMPILE,
    all_done,
    close,
    finish,
    open_read,
    some_left,
    take,
)

ROWS = 512  # whose column sums are added up in float32
_MOST_BLOCKS = 1024  # of as many times ROWS as it takes
_FAR, _NEAR = 8192, 512  # entries between what is read and what is asked for
_TOO_FAR = 60.0  # for exponents of two to move between two reads, whose offsets are then no use
LOG2E = math.log2(math.e)
_F = np.float32
_LOW, _HIGH = _F(-3e38), _F(3e38)
_LEAST = _F(-126)  # exponents of two below have no normal float32
_ROUNDED = _F(1.5 * 2**23)  # added to a number, it leaves no bits for a fraction
_C0, _C1, _C2 = _F(1), _F(6.931472029e-1), _F(2.402264791e-1)  # of 2 ** f, |f| <= 1/2
_C3, _C4, _C5 = _F(5.550332471e-2), _F(9.618437358e-3), _F(1.339887440e-3)
SCAN, SUMS, LABELS = 0, 1, 2  # what a read is for
WHAT, A, A_THEN, OFF_THEN, TIE, READ = range(6)  # of how it is made, see read
LATE, ENDED, ALONE = 0, 1, 2  # how reads that follow each other went
NOTHING = _F(-1e30)  # power of a cluster that gets nothing


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


def _prefetch(near):  # type: ignore[no-untyped-def]
    @intrinsic
    def prefetch(context, s, i, j):  # type: ignore[no-untyped-def]
        """Ask for s[i, j] to be brought into a cache, and go on meanwhile."""

        def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
            i32, i64, pointer = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
            array = make_array(s)(context, builder, args[0])
            address = builder.ptrtoint(array.data, i64)
            for axis in (0, 1):
                stride = builder.extract_value(array.strides, axis)
                address = builder.add(address, builder.mul(args[1 + axis], stride))
            kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
            to_read, how_near, data = i32(0), i32(near), i32(1)
            builder.call(function, [builder.inttoptr(address, pointer), to_read, how_near, data])
            return context.get_dummy_value()

        return types.void(s, types.intp, types.intp), code

    return prefetch


# From memory to a larger cache, of which the nearest takes too few at a time; from there to it.
_prefetch_far, _prefetch_near = _prefetch(1), _prefetch(3)


@njit(inline="always")
def _prefetch_row(s, i):  # type: ignore[no-untyped-def]
    for j in range(0, s.shape[1], LANES):
        _prefetch_far(s, i, j)


@njit(inline="always")
def _copy_row(s, i, row):  # type: ignore[no-untyped-def]
    for j in range(s.shape[1]):
        row[j] = s[i, j]


@njit(inline="always")
def _load(s, i, j, copied, room, r):  # type: ignore[no-untyped-def]
    """Entries of row i from j on, or of its copy in room[r]; 0 behind its end."""
    if copied is not None:
        x = load(room, r, j)
    elif j + LANES <= s.shape[1]:
        x = load(s, i, j)
    else:
        x = load_some(s, i, j, s.shape[1] - j)
    return x


@njit(inline="always")
def _constants():  # type: ignore[no-untyped-def]
    """Those of _exp2, in registers."""
    c0, c1, c2 = splat(kept(_C0)), splat(kept(_C1)), splat(kept(_C2))
    c3, c4, c5 = splat(kept(_C3)), splat(kept(_C4)), splat(kept(_C5))
    return splat(kept(_LEAST)), splat(kept(_ROUNDED)), c0, c1, c2, c3, c4, c5


@njit(inline="always")
def _exp2(t, constants):  # type: ignore[no-untyped-def]
    """2 ** t for t < 128, to 2e-7: a minimax polynomial of what rounding t leaves."""
    least, rounded, c0, c1, c2, c3, c4, c5 = constants
    t = maximum(t, least)
    shifted = add(t, rounded)
    f = sub(t, sub(shifted, rounded))
    p = fma(f, fma(f, fma(f, fma(f, fma(f, c5, c4), c3), c2), c1), c0)
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
def _scan(s, start, stop, tops, found):  # type: ignore[no-untyped-def]
    """Into tops the largest entry of each row; the widest row, and the largest magnitude's bits."""
    wide, bits, k = _F(0), np.int32(0), s.shape[1]
    for i in range(start, stop):
        _prefetch_row(s, i + max(2, _FAR // k))
        if k < _NEAR:  # of long rows, what is next in them is found without being asked for
            for j in range(0, k, LANES):
                _prefetch_near(s, i + _NEAR // k, j)
        high, low = _LOW, _HIGH
        for j in range(k):
            x = _F(s[i, j])
            high, low = _max(high, x), _min(low, x)
            bits = max(bits, _magnitude(x))
        tops[i] = high
        wide = _max(wide, high - low)
    found[0, 0], found[1, 0] = wide, bits


@njit(**COMPILE)
def _largest_exponents(s, start, stop, g, a, offsets):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        high = _LOW
        for j in range(s.shape[1]):
            high = _max(high, _F(s[i, j]) * a + g[j])
        offsets[i] = high


@njit(**COMPILE)
def _column_sums(  # type: ignore[no-untyped-def]
    s, start, stop, a, weight, offsets, found, copied, scratch
):
    """Add sums over the rows of weight (none: 1) times q and q ** 2, q ~ 2 ** (a * s + gains).

    ``offsets`` are what is taken off a row's exponents so that they do not overflow: the logarithm
    of their sum, about, from where they were last. Rows are taken in twos, which halves the work
    on the sums; those that are not contiguous float32 are ``copied`` first (else None, for which
    numba compiles a loop without it).
    """
    k = s.shape[1]
    e, sums, room, gains, of_row, over = scratch
    sums[:], scale, constants = _F(0), splat(a), _constants()
    far, near = max(4, _FAR // k), max(2, _NEAR // k)
    weighted = len(weight) > 0
    for i in range(start, stop, 2):
        for r in range(2):
            row = min(i + r, stop - 1)
            off, summed = splat(offsets[row]), splat(_F(0))
            if copied is not None:
                _copy_row(s, row, room[r])
            for j in range(0, k, LANES):
                _prefetch_far(s, i + r + far, j)
                _prefetch_near(s, i + r + near, j)
                x = fma(_load(s, row, j, copied, room, r), scale, load(gains, 0, j))
                x = _exp2(sub(x, off), constants)
                store(e, r, j, x)
                summed = add(summed, x)
            of_row[row - start] = total(summed)
            over[r] = over[2 + r] = _F(1) / of_row[row - start]
            if weighted:
                over[r] *= weight[row]
                over[2 + r] *= np.sqrt(weight[row])
        if i + 1 == stop:
            over[1] = over[3] = _F(0)  # the last row stands for the one that is not there
        over_0, over_1 = splat(over[0]), splat(over[1])
        root_0, root_1 = splat(over[2]), splat(over[3])
        for j in range(0, k, LANES):
            e_0, e_1 = load(e, 0, j), load(e, 1, j)
            store(sums, 0, j, fma(over_1, e_1, fma(over_0, e_0, load(sums, 0, j))))
            q_0, q_1 = mul(root_0, e_0), mul(root_1, e_1)
            store(sums, 1, j, fma(q_1, q_1, fma(q_0, q_0, load(sums, 1, j))))
    for i in range(start, stop):
        offsets[i] += _F((_magnitude(of_row[i - start]) >> 23) - 127)  # its exponent
    for j in range(k):  # a slice would take 2 s more to compile
        found[0, j] += sums[0, j]
        found[1, j] += sums[1, j]


@njit(**COMPILE)
def _labels(s, start, stop, a, tie, labels, found, copied, scratch):  # type: ignore[no-untyped-def]
    """The largest of a * s + gains of each row; -1 less it if another is within tie.

    Found are the greatest, and of their negatives.
    """
    k = s.shape[1]
    z, index, room, gains, _, _ = scratch
    for j in range(k):
        index[0, j] = j  # as floats, which mix with scores in one vector register
    scale, zero = splat(a), splat(_F(0))
    for i in range(start, stop):
        _prefetch_row(s, i + max(2, _FAR // k))
        if copied is not None:
            _copy_row(s, i, room[0])
        highest = splat(_LOW)
        for j in range(0, k, LANES):
            x = fma(_load(s, i, j, copied, room, 0), scale, load(gains, 0, j))
            store(z, 0, j, x)
            highest = maximum(highest, x)
        least, close, which = splat(largest(highest) - tie), zero, zero
        for j in range(0, k, LANES):
            near = at_least(load(z, 0, j), least)
            close = add(close, near)
            which = fma(near, load(index, 0, j), which)  # the largest, if it is alone
        labels[i] = np.int64(total(which))
        if total(close) > _F(1):
            labels[i] = -1 - np.argmax(z[0, :k])
    found[0, 0], found[1, 0] = -labels[start:stop].min(), labels[start:stop].max()


@njit(**COMPILE)
def rows_of_block(n):  # type: ignore[no-untyped-def]
    """Of n rows."""
    return ROWS * max(1, -(-n // (ROWS * _MOST_BLOCKS)))


@njit(**COMPILE)
def read(  # type: ignore[no-untyped-def]
    s, v, how, weight, offsets, found, labels, copied, counts, looks
):
    """Blocks of rows as they are free: into found[block] or, of each row, labels.

    ``v`` holds the potential and that of the last read that left offsets; ``how`` what this one
    is for, a now and then, how far offsets may have been off then, what is a tie, and whether a
    read has been made but not used yet.
    """
    k = s.shape[1]
    e, sums, room = _rows_of(2, k, _F(0)), _rows_of(2, k, _F(0)), _rows_of(2, k, _F(0))
    gains = _rows_of(1, k, NOTHING)
    of_row, over = np.empty(ROWS, np.float32), np.empty(4, np.float32)
    n_rows = rows_of_block(len(s))
    block = take(counts, len(found), looks)
    while block >= 0:
        start, stop = block * n_rows, min((block + 1) * n_rows, len(s))
        what, a, scaled = how[WHAT], how[A], _F(how[A] / how[A_THEN])
        moved, most = 0.0 if scaled == _F(1) else scaled * how[OFF_THEN], 0.0
        for j in range(k):
            power, before = max(v[0, j] * a, NOTHING), max(v[1, j] * a, NOTHING)
            gains[0, j], most = power, max(most, abs(power - before))
        a, scratch = _F(a), (e, sums, room, gains, of_row, over)
        if what == SCAN:
            _scan(s, start, stop, offsets, found[block])
        elif what == LABELS:
            _labels(s, start, stop, a, _F(how[TIE]), labels, found[block], copied, scratch)
        else:
            if moved + most > _TOO_FAR:
                _largest_exponents(s, start, stop, gains[0], a, offsets)
            elif scaled != _F(1):
                for i in range(start, stop):
                    offsets[i] *= scaled
            for j in range(k):
                found[block, 0, j] = found[block, 1, j] = 0.0
            for i in range(start, stop, ROWS):
                end = min(i + ROWS, stop)
                _column_sums(s, i, end, a, weight, offsets, found[block], copied, scratch)
        finish(counts)
        block = take(counts, len(found), looks)
    if looks == 0 and how[WHAT] == LABELS:  # of these rows, which all threads have by now
        close(counts)
    return all_done(counts, len(found), looks)


@njit(**COMPILE)
def mean(found, n, out):  # type: ignore[no-untyped-def]
    """Sum of the blocks' over n."""
    for i in range(2):
        for j in range(found.shape[2]):
            out[i, j] = 0.0
    for block in range(len(found)):
        for i in range(2):
            for j in range(found.shape[2]):
                out[i, j] += found[block, i, j]
    for i in range(2):
        for j in range(found.shape[2]):
            out[i, j] /= n


_EXACTLY = {**COMPILE, "fastmath": False}  # infinity is a number here
_step, _centred = njit(**_EXACTLY)(step), njit(**_EXACTLY)(centred)
_lengthen, _following = njit(**_EXACTLY)(lengthen), njit(**_EXACTLY)(following)
_next_level, _reg_of = njit(**_EXACTLY)(next_level), njit(**_EXACTLY)(reg_of)


@njit(**_EXACTLY)
def prepare(v, how, what, point, a):  # type: ignore[no-untyped-def]
    """Put down what the next read is for, and which one it was that left offsets."""
    if how[WHAT] != LABELS:
        np.positive(v[0], v[1])
        how[A_THEN], how[OFF_THEN] = how[A], (0.0 if how[WHAT] == SCAN else np.log2(v.shape[1]))
    np.maximum(point, NOTHING, v[0])  # infinity is no number to compiled code
    how[WHAT], how[A] = what, a


@njit(**_EXACTLY)
def lead(  # type: ignore[no-untyped-def]
    s, v, how, weight, offsets, found, labels, copied, counts, looks, n, sums, ahead
):
    """A read and those that follow, as far as ``Ahead`` goes: ``_descent._descend``, compiled.

    Between two reads of a small matrix, which push it out of the cache, Python takes as long as
    a read. Steps that overshoot, Newton's and the end are left to it. It also comes back to have
    a thread that is late waited for, or others sent for those that left, but makes the next step
    itself: one made elsewhere would differ in the last bit.
    """
    c, reg, aims, most, path = ahead
    numbers = path.numbers
    while True:
        if not how[READ]:
            how[READ] = 1.0
            if not read(s, v, how, weight, offsets, found, labels, copied, counts, looks):
                return LATE
        how[READ] = 0.0
        if how[WHAT] == LABELS:
            return ENDED
        mean(found, n, sums)
        m, point = np.maximum(sums[0], STARVED), path.vectors[NEXT].copy()
        error, level = np.abs(m - c).sum(), int(numbers[LEVEL])
        done = error <= aims[level]
        overshot = numbers[LENGTH] > 0 and not error <= numbers[ERROR]
        if done and level == 0:
            _lengthen(path, point, point, error)  # no step follows
        elif numbers[READS] >= most or overshot:
            return ENDED
        else:
            g = _centred(point + _step(m, c, sums[1], _reg_of(path, reg), np.inf), c) - point
            _lengthen(path, point, g, error)
            np.positive(_centred(_following(path), c), path.vectors[NEXT])
        numbers[READS] += 1
        if done:
            _next_level(path)
        if numbers[LEVEL] < 0:
            prepare(v, how, LABELS, point, how[A])
        else:
            prepare(v, how, SUMS, path.vectors[NEXT], LOG2E / _reg_of(path, reg))
        if some_left(counts):
            return ALONE
        open_read(counts)
