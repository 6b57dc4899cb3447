"""Threads that read blocks of rows by a compiled kernel, and stay for the next read.

Blocks are given out by counting, to whoever comes, so that nobody is waited for who has none. What
threads share are three counts, changed by single operations of the processor: the block that is
given out next, with the number of the read above it; the blocks of the read that are done; and
the threads that have left. A fourth, of those that others were sent for, is the main thread's.
"""

from __future__ import annotations

import functools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

COMPILE: dict[str, Any] = {
    "fastmath": True,  # sums in any order, or nothing would be vectorised; scores are finite
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
}
STAY = 1_000_000  # looks, some .5 ms: longer than what a solver does between two reads
_LOOKS, _PAUSE = 400_000, 2e-4  # at how far the others are, and seconds before it looks again
_NEXT, _DONE, _LEFT, _REPLACED, _COUNTS = 0, 8, 16, 24, 32  # places: each has a line of the cache
_READ = 1 << 32
_SUBNORMAL = np.float32(1e-39)


def _atomic(operation):  # type: ignore[no-untyped-def]
    """operation(builder, address), of counts[which]."""

    @intrinsic
    def run(context, counts, which, number):  # type: ignore[no-untyped-def]
        def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
            place = builder.gep(make_array(counts)(context, builder, args[0]).data, [args[1]])
            return operation(builder, place, args[2])

        return types.int64(counts, types.intp, types.int64), code

    return run


def _stored(builder, place, number):  # type: ignore[no-untyped-def]
    builder.store_atomic(number, place, "release", 8)
    return number


_add = _atomic(lambda builder, place, number: builder.atomic_rmw("add", place, number, "acq_rel"))
_get = _atomic(lambda builder, place, _: builder.load_atomic(place, "acquire", 8))
_set = _atomic(_stored)


@njit(**COMPILE)
def open_read(counts):  # type: ignore[no-untyped-def]
    """Free all blocks, for the next read; all of the last are done."""
    _set(counts, _DONE, 0)
    _set(counts, _NEXT, (_get(counts, _NEXT, 0) // _READ + 1) * _READ)


@njit(**COMPILE)
def take(counts, n_blocks, looks):  # type: ignore[no-untyped-def]
    """The next block that is free, or -1 when the thread is to leave.

    The one that opens reads does not look out for others, and is not counted: ``looks`` is 0.
    """
    for _ in range(looks + 1):
        free = _get(counts, _NEXT, 0)
        if free < 0:  # no read will follow
            break
        if free % _READ < n_blocks:
            taken = _add(counts, _NEXT, 1)
            if taken >= 0 and taken % _READ < n_blocks:  # it may have been closed meanwhile
                return taken % _READ
    if looks:
        _add(counts, _LEFT, 1)
    return -1


@njit(**COMPILE)
def finish(counts):  # type: ignore[no-untyped-def]
    """What this thread wrote for a block is there for all."""
    _add(counts, _DONE, 1)


@njit(**COMPILE)
def all_done(counts, n_blocks, looks=0):  # type: ignore[no-untyped-def]
    """Whether all blocks are, which the one that opened the read looks out for a while."""
    left = 0 if looks else _LOOKS
    while left > 0 and _get(counts, _DONE, 0) < n_blocks:
        left -= 1
    return left > 0


@njit(**COMPILE)
def some_left(counts):  # type: ignore[no-untyped-def]
    """Whether threads have left for which no others were sent yet."""
    return _get(counts, _LEFT, 0) > counts[_REPLACED]


@njit(**COMPILE)
def close(counts):  # type: ignore[no-untyped-def]
    """Send those away who look out for another read; those of an open one are done first."""
    _set(counts, _NEXT, -_READ)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Theirs alone, so that they need not put it back (see _flushed).
    return ThreadPoolExecutor(threads, initializer=partial(torch.set_flush_denormal, True))


class Threads:
    """Reads by ``kernel(*arguments, counts, looks)``, which takes blocks until it is to leave.

    It returns whether they were ``all_done``.

    This thread starts at once and looks out for the end itself: to be woken by another takes as
    long as a few blocks. Others come in when they can, and look ``stay`` times for another read
    before they leave. What arguments hold may change between reads: a kernel may look only
    once it has a block of the read.
    """

    def __init__(self, kernel: Any, n_blocks: int, n: int, stay: int, *arguments: Any):
        self._kernel, self._n_blocks, self._stay = kernel, n_blocks, stay
        self._counts = np.zeros(_COUNTS, np.int64)
        self._counts[_NEXT] = n_blocks  # none is free yet
        self._arguments = *arguments, self._counts
        self._n_others, self._n_sent = n - 1, 0
        self._others: list[Future[None]] = []

    def read(self, lead: Any = None) -> int:
        """A read of all blocks.

        ``lead`` is what this thread does in it instead of the kernel, with the same arguments;
        it may open others, and returns a number, 0 where not all blocks of the last are done.
        """
        open_read(self._counts)
        # They count themselves out: to be done, a future waits for this thread to pause.
        if missing := self._n_others - self._n_sent + int(self._counts[_LEFT]):
            self._others = [other for other in self._others if not other.done()]
            pool, work = _pool(self._n_others), partial(self._kernel, *self._arguments)
            self._others += [pool.submit(work, self._stay) for _ in range(missing)]
            self._n_sent += missing
            self._counts[_REPLACED] = self._n_sent - self._n_others
        return self.go_on(lead)

    def go_on(self, lead: Any = None) -> int:
        """What this thread does in a read that is open, and wait until all blocks are done."""
        went = done = _flushed(lead or self._kernel, *self._arguments, 0)
        while not done:
            for other in self._others:
                if other.done():
                    other.result()  # its error
            time.sleep(_PAUSE)
            done = all_done(self._counts, self._n_blocks)
        return int(went)

    def close(self) -> None:
        """No read follows: threads are free for something else."""
        close(self._counts)


def _flushed(function: Any, *arguments: Any) -> Any:
    """function(*arguments), tiny numbers being 0 meanwhile.

    Squares of small probabilities have no normal float32, at which some processors stop to think:
    a read takes them seven times as long.
    """
    before = bool(_SUBNORMAL * np.float32(1) == 0)
    torch.set_flush_denormal(True)
    try:
        return function(*arguments)
    finally:
        torch.set_flush_denormal(before)
