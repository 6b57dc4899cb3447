"""The read of the score matrix on a GPU, fused by triton: imported only where it is installed.

One program keeps the column sums of its rows in registers: the scores are read once, and what
is written is two rows of sums a program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sklearn_sela._scores import Scores

WIDEST = 1 << 14  # columns whose sums one program can hold
_NOTHING = -1e30  # power of a cluster that gets nothing
_TILE = 1 << 12  # entries that a program works on at a time
_PER_PROCESSOR = 4  # programs a streaming multiprocessor: enough to hide the memory's latency


@triton.jit
def _column_sums(  # type: ignore[no-untyped-def]
    s, g, weight, parts, n, k, stride, a, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    column = tl.arange(0, COLUMNS)
    inside = column < k
    shift = tl.load(g + column, mask=inside, other=0.0)
    sums, squares = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < n
        here = s + row.to(tl.int64)[:, None] * stride + column[None, :]
        z = tl.load(here, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        z = tl.where(inside[None, :], z * a + shift[None, :], float("-inf"))
        e = tl.exp2(z - tl.max(z, 1)[:, None])
        w = live.to(tl.float32)
        if weight is not None:
            w *= tl.load(weight + row, mask=live, other=0.0)
        q = e / tl.sum(e, 1)[:, None]
        sums += tl.sum(w[:, None] * q, 0)
        squares += tl.sum(w[:, None] * q * q, 0)
    part = parts + tl.program_id(0) * 2 * k + column
    tl.store(part, sums, mask=inside)
    tl.store(part + k, squares, mask=inside)


def column_sums(s: Tensor, a: float, g: Tensor, weight: Tensor | None) -> Tensor:
    """Sums over rows of weight (None: 1) times q and times q ** 2, (2, K) float64.

    q is the softmax of (a * s + g) * log 2; s is (n, K) of any float type, g (K,) and weight
    (n,) float32.
    """
    n, k = s.shape
    s = s if s.stride(1) == 1 else s.contiguous()
    columns = triton.next_power_of_2(k)
    rows = max(1, _TILE // columns)
    programs = min(triton.cdiv(n, rows), _PER_PROCESSOR * _processors(s.device))
    parts = torch.empty(programs, 2, k, device=s.device, dtype=torch.float32)
    warps = 4 if columns < 4096 else max(8, columns // 1024)  # or registers would not do
    sizes = (n, k, s.stride(0), a, columns, rows)
    _column_sums[(programs,)](s, g, weight, parts, *sizes, num_warps=warps)
    return parts.double().sum(0)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # triton's interpreter, in the tests
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class FusedReads:
    """The read that every iteration makes; what is read once or twice is left to torch."""

    def __init__(self, scores: Scores, tie: float):
        self._device = scores.device

    def scan(self, tile: Tensor, head: int) -> None:
        """Left to torch."""

    def column_sums(self, ask: Any, weight: Tensor | None, n: int) -> Callable[..., Tensor]:
        """A read: sums over a tile's rows of weight (None: 1) times q and q ** 2, over n."""
        a = math.log2(math.e) / ask.reg
        powers = np.maximum(ask.v * a, _NOTHING).astype(np.float32)
        g = torch.from_numpy(powers).to(self._device)

        def read(tile: Tensor, rows: slice) -> Tensor:
            w = None if weight is None else weight[rows]
            return column_sums(tile, a, g, w) / n

        return read

    def largest(self, tile: Tensor, ask: Any) -> None:
        """Left to torch."""
