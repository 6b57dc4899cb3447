"""The reads of scores on a CPU, fused by numba: imported only where it is installed."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklearn_sela._reads_numba import (
    A_THEN,
    ENDED,
    LABELS,
    LATE,
    LOG2E,
    NOTHING,
    READ,
    SCAN,
    SUMS,
    TIE,
    WHAT,
    A,
    lead,
    mean,
    prepare,
    read,
    rows_of_block,
)
from sklearn_sela._scores import Scores
from sklearn_sela._threads import STAY, Threads

WIDEST = 1 << 24  # columns, whose numbers are exact in float32
_TOGETHER = 1 << 19  # entries from which on other threads are worth waking; half if they stay


class _Last(NamedTuple):
    """The last read that left offsets: at first the scan, whose row maxima are of scores."""

    v: Any = 0.0
    a: float = 1.0
    off: float = 0.0  # how far offsets are from the largest exponents, at most


class _Rows:
    """Rows of scores in memory, read in as many threads as torch has and as are worth it."""

    def __init__(
        self,
        tile: Tensor,
        weight: Tensor | None,
        offsets: Any,
        tie: float,
        stay: int,
        last: _Last | None = None,
    ):
        scores, (n, k) = tile.numpy(), tile.shape
        n_blocks = -(-n // rows_of_block.py_func(n))
        self._v, self._how = np.zeros((2, k)), np.array([SCAN, 1.0, 1.0, 0.0, tie, 0.0])
        if last is not None:
            np.maximum(last.v, NOTHING, out=self._v[1])
            self._how[:READ] = LABELS, 1.0, last.a, last.off, tie
        self._found, self.labels = np.empty((n_blocks, 2, k)), np.empty(n, np.int64)
        self.weighted = weight is not None
        w = np.empty(0, np.float32) if weight is None else weight.numpy()
        contiguous = scores.dtype == np.float32 and scores.strides[1] == 4
        together = n * k >= (_TOGETHER // 2 if stay == STAY else _TOGETHER)
        n_threads = torch.get_num_threads() if together else 1
        rest = w, offsets, self._found, self.labels, None if contiguous else True
        self._threads = Threads(read, n_blocks, n_threads, stay, scores, self._v, self._how, *rest)

    def scan(self) -> None:
        """The first read, if any."""
        self._threads.read()

    def read(self, what: int, v: Any, a: float, n: int = 1, ahead: Any = None) -> Any:
        """Sums over n, at v, or at the last point that ``ahead`` has asked for."""
        prepare(self._v, self._how, what, v, a)
        sums = np.empty(self._v.shape)
        if ahead is None:
            self._threads.read()
            if what == SUMS:
                mean(self._found, n, sums)
            return sums
        threads, main = self._threads, lambda *given: lead(*given, n, sums, ahead)
        went = threads.read(main)
        while went != ENDED:
            went = threads.go_on(main) if went == LATE else threads.read(main)
        return sums

    @property
    def last(self) -> _Last:
        """Once labels were read."""
        return _Last(self._v[1], *self._how[A_THEN:TIE].tolist())

    def labelled(self, v: Any, a: float) -> bool:
        """Whether ``labels`` are those at v."""
        return self._how[WHAT] == LABELS and self._how[A] == a and bool((self._v[0] == v).all())

    def most(self) -> tuple[float, float]:
        """The greatest of the two numbers that a scan, or labels, found in each block."""
        first, second = self._found[:, :, 0].T.tolist()
        return max(first), max(second)

    def close(self) -> None:
        self._threads.close()


class FusedReads:
    """The three reads, in as many threads as torch has; their sums do not depend on how many."""

    def __init__(self, scores: Scores, tie: float):
        self._tie = tie * LOG2E  # largest entries of a row that are as close are tied
        self._offsets: list[Any] = [[] for _ in range(scores.n_heads)]  # of each row's exponents
        self._last = [_Last()] * scores.n_heads
        self._kept: dict[int, _Rows] = {}  # of matrices in memory, the same at each read
        self._whole = scores.whole()
        # Threads that stay for one head's next read would not be there for another's.
        self._stay = STAY if self._whole and scores.n_heads == 1 else 1

    def scan(self, tile: Tensor, head: int) -> tuple[float, float] | None:
        """(widest row, largest magnitude); None if not all scores are finite."""
        tops = np.empty(len(tile), np.float32)
        self._offsets[head].append(tops)
        rows = self._rows(tile, head, None, tops, None)
        rows.scan()
        wide, bits = rows.most()
        (largest,) = struct.unpack("f", struct.pack("i", int(bits)))
        return (wide, largest) if math.isfinite(largest) else None

    def column_sums(self, ask: Any, weight: Tensor | None, n: int) -> Callable[..., Any]:
        """A read: sums over a tile's rows of weight (None: 1) times q and q ** 2, over n."""
        offsets, last, a = self._offsets[ask.head], self._last[ask.head], LOG2E / ask.reg
        if isinstance(offsets, list):  # scanned, and not read before
            offsets = np.concatenate(offsets) if len(offsets) > 1 else offsets[0]
            self._offsets[ask.head] = offsets
        if not self._whole:
            self._last[ask.head] = _Last(ask.v, a, math.log2(len(ask.v)))

        def read(tile: Tensor, of: slice) -> NDArray[np.float64]:
            w = None if weight is None else weight[of]
            rows = self._rows(tile, ask.head, w, offsets[of], last)
            return rows.read(SUMS, ask.v, a, n, ask.ahead if self._whole else None)

        return read

    def largest(self, tile: Tensor, ask: Any) -> tuple[Tensor, float, float]:
        """The largest entry of each row, -1 less it where there are ties; least and greatest."""
        rows, a = self._kept.pop(ask.head, None), LOG2E / ask.reg
        if rows is None:
            rows = _Rows(tile, None, np.empty(0, np.float32), self._tie, 1, self._last[ask.head])
        if not rows.labelled(ask.v, a):
            rows.read(LABELS, ask.v, a)
        self._last[ask.head], (negative, most) = rows.last, rows.most()
        return torch.from_numpy(rows.labels), -negative, most

    def _rows(
        self, tile: Tensor, head: int, weight: Tensor | None, offsets: Any, last: _Last | None
    ) -> _Rows:
        known = self._kept.get(head)
        if known is not None:
            if weight is None or known.weighted:
                return known
            known.close()  # scanned before weights were known
        rows = _Rows(tile, weight, offsets, self._tie, self._stay, last)
        if self._whole:
            self._kept[head] = rows
        return rows
