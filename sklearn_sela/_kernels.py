"""Reads of the scores: what a solver asks of all rows at once, in one pass over memory.

The plain torch path is the reference. Where numba (CPU) or triton (GPU) is installed, large
problems take the fused reads of ``_kernels_numba`` and ``_kernels_triton`` instead.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sklearn_sela._distributed import Shards
from sklearn_sela._path import Path
from sklearn_sela._scores import Scores

_CHUNK = 1 << 20  # entries that the torch path works on at a time: bounds temporary memory
_ON_GPU = 16  # times as many there, where to start on a chunk takes as long as to read it
_FUSED_FROM = 1 << 18  # entries; below, fused reads are not worth their import
_ROUNDING = 1e7  # largest exponent over the L1 error of shares that float32 makes of it, at most
_FUSED_GAIN = 20  # plain reads take as many times as long as fused ones, about
_LEAST_NOISE, _MOST_NOISE = 1e-5, 0.01  # that any sums make; that are of no use
_ALONE = Shards()
_NEGLIGIBLE = 1e-15  # of a row, in products that take 100 times as long where they are subnormal
_TIE = 1e-6  # entries of the solution closer than this, relatively, are tied


class Ahead(NamedTuple):
    """How a solver goes on by itself, so that reads may save it the questions.

    As long as the L1 error of the shares is no more than that of the path's last point, it takes
    the point into the path, and asks for the next one: on the level of reg below, where the error
    is no more than ``aims`` has for this one. On the last it is done then, and labels are what it
    asks for next. It may stop sooner, and asks for no more once it has ``most`` reads.
    """

    c: NDArray[np.float64]  # the shares that it wants, (K,)
    reg: float  # of the last level
    aims: NDArray[np.float64]  # L1 errors, of the last level first
    most: int
    path: Path


class Ask(NamedTuple):
    """A point at which a solver wants to know the sums over all rows, or of a later one ahead."""

    head: int
    v: NDArray[np.float64]  # potential, (K,); -inf for clusters that get nothing
    reg: float
    gram: bool = False
    ahead: Ahead | None = None


class Sums(NamedTuple):
    """With q_i = softmax((s_i + v) / reg) and weights r_i that sum to one."""

    m: NDArray[np.float64]  # cluster shares, sum_i r_i q_i: (K,)
    squares: NDArray[np.float64]  # sum_i r_i q_i ** 2, the diagonal of the Gram matrix: (K,)
    value: float = 0.0  # reg * sum_i r_i logsumexp((s_i + v) / reg), if gram was asked for
    gram: NDArray[np.float64] | None = None  # sum_i r_i q_i q_i': (K, K)


class Largest(NamedTuple):
    """The largest entry of each row, of one head."""

    labels: Tensor  # (n_rows,) int64
    least: float  # of them
    most: float


def ends(labels: Tensor) -> tuple[float, float]:
    """Least and greatest label; of none, beyond those of any others."""
    if not len(labels):
        return math.inf, -math.inf
    least, most = torch.aminmax(labels)
    return float(least), float(most)


class Reader:
    """Reads scores for a solver: once to know them, then once for each round of asks.

    Parameters
    ----------
    scores : Scores
    sample_weight : array-like of shape (n_samples,) or None
    reg, tol : float
        Of the solve: they decide what precision plain reads need.
    shards : Shards
        The processes that have the other rows.

    Raises
    ------
    ValueError
        For scores that are not finite or -inf, or too spread out for ``reg``.
    """

    def __init__(
        self, scores: Scores, sample_weight: Any, reg: float, tol: float, shards: Shards = _ALONE
    ):
        self.scores, self.k, self.device, self.shards = scores, scores.k, scores.device, shards
        at_once = _CHUNK if self.device.type == "cpu" else _ON_GPU * _CHUNK
        self._step = max(1, at_once // self.k)  # rows of a chunk
        self._fused = _fused_reads(scores, shards.size)
        found, weights, problem = (0.0, 0.0, False), None, None
        try:
            found = self._scan()
            if sample_weight is not None:
                weights = _weights(sample_weight, scores.n, "sample_weight", self.device)
        except ValueError as error:
            problem = error
        shards.agree(problem)
        self.n_rows = scores.n
        self.n = int(shards.total(self.n_rows))
        fused = self._fused is not None and self.n_rows > 0
        negative, largest, barred, some_fused = shards.max(-found[0], *found[1:], fused)
        lowest, self._barred = -negative, bool(barred)
        if not math.isfinite(lowest / reg):
            raise ValueError(f"reg={reg!r} is too small for scores that spread over {-lowest:g}.")
        self._floor = lowest - 100 * reg  # stands for -inf: a label of last resort
        self.spread = -(self._floor if self._barred else lowest)
        noise = max(largest / (_ROUNDING * reg), _LEAST_NOISE)
        useful = bool(some_fused) and not self._barred and noise <= max(tol, _MOST_NOISE)
        if not (fused and useful):
            self._fused = None
        #: L1 error that the shares may have by fused reads, of any process; 0 if there are none.
        self.noise = noise if useful else 0.0
        exact = scores.dtype == torch.float64 or not scores.dtype.is_floating_point
        sharp, fine = self.spread > _ROUNDING * tol * reg, tol < _LEAST_NOISE
        self.dtype = torch.float64 if exact or sharp or fine else torch.float32
        self.uniform, self._w = weights is None, None
        if weights is not None:
            self.r = _scaled(weights, "sample_weight", shards)
            self._w = (self.r * self.n).float()
        self._kept: list[Tensor] = []
        if self._fused is None:
            self._keep()

    def _keep(self) -> None:
        """Small matrices are cleaned once, large ones a chunk at a time in each read."""
        heads = list(range(self.scores.n_heads))
        if self.scores.whole() and 0 < self.n_rows * self.k * len(heads) <= _CHUNK:
            ((_, tiles),) = self.scores.blocks(heads)
            self._kept = [self._clean(tile) for tile in tiles]

    def read_exactly(self) -> None:
        """By plain reads from here on."""
        if self._fused is not None:
            self._fused = None
            self._keep()
        self.noise = 0.0

    @property
    def gram_cost(self) -> float:
        """Reads that one with the Gram matrix, which is always plain, takes as long as, about."""
        return (2 + self.k / 32) * (_FUSED_GAIN if self.noise else 1)

    @cached_property
    def r(self) -> Tensor:
        """Weights of the rows, (n_rows,) float64: those of all processes sum to one."""
        each = torch.full((1,), 1.0 / self.n, dtype=torch.float64, device=self.device)
        return each.expand(self.n_rows)

    def sums(self, asks: list[Ask]) -> list[Sums]:
        """What is asked for, several heads in one pass over the source."""
        reads = [self._read(ask) for ask in asks]
        found: list[tuple[Any, ...]] = [()] * len(asks)
        for rows, tiles in self._tiles(asks):
            for i, (read, tile) in enumerate(zip(reads, tiles, strict=True)):
                of_tile = read(tile, rows)
                found[i] = tuple(map(operator.add, found[i], of_tile)) if found[i] else of_tile
        if not self.shards.alone:
            found = self._of_all(asks, found)
        return [_as_sums(ask, *parts) for ask, parts in zip(asks, found, strict=True)]

    def _of_all(self, asks: list[Ask], found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The sums over the rows of all processes, in one reduction."""
        shapes = [[(2, self.k), *([(), (self.k, self.k)] if ask.gram else [])] for ask in asks]
        flat = [
            np.asarray(part.cpu() if isinstance(part, Tensor) else part, np.float64).ravel()
            for parts, of in zip(found, shapes, strict=True)
            for part in parts or map(np.zeros, of)  # of no rows
        ]
        total, start, summed = self.shards.sum(np.concatenate(flat)), 0, []
        for of in shapes:
            parts = []
            for shape in of:
                stop = start + math.prod(shape)
                parts.append(total[start:stop].reshape(shape))
                start = stop
            summed.append(tuple(parts))
        return summed

    def _read(self, ask: Ask) -> Callable[[Tensor, slice], tuple[Any, ...]]:
        """What a tile adds: ([shares, squares],), and (value, Gram matrix) if asked for."""
        if self._fused is None or ask.gram:
            return partial(self._plain_read, ask)
        column_sums = self._fused.column_sums(ask, self._w, self.n)
        return lambda tile, rows: (column_sums(tile, rows),)

    def _plain_read(self, ask: Ask, tile: Tensor, rows: slice) -> tuple[Any, ...]:
        sums, value = torch.zeros(2, self.k, dtype=torch.float64, device=self.device), 0.0
        gram = sums.new_zeros(self.k, self.k) if ask.gram else None
        for part, z in self._exponents(tile, rows, ask):
            q, r = z.softmax(1), self.r[part]
            weight = r[:, None].to(q.dtype)
            rq = weight * q
            sums += torch.stack([rq.sum(0), (rq * q).sum(0)])
            if gram is not None:
                some = F.threshold(q, _NEGLIGIBLE, 0.0)
                gram += (some.T @ (weight * some)).double()
                value += float((r * z.logsumexp(1).double()).sum())
        return (sums,) if gram is None else (sums, value, gram)

    def solution(self, ask: Ask) -> Iterator[tuple[slice, Tensor]]:
        """(rows, q), a chunk at a time."""
        for rows, (tile,) in self._tiles([ask]):
            for part, z in self._exponents(tile, rows, ask):
                yield part, z.softmax(1)

    def exponents_of(self, ask: Ask, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, (s + v) / reg less a number per row) of rows chosen by a mask, (n_rows,)."""
        for rows, (tile,) in self._tiles([ask]):
            for own in torch.nonzero(chosen[rows]).flatten().split(self._step):
                if len(own):
                    yield own + rows.start, self._shifted(self._clean(tile[own]), ask)

    def largest(self, asks: list[Ask]) -> list[Largest]:
        """For each head the largest entry of each row of q; -1 less it where there are ties."""
        found: list[list[Largest]] = [[] for _ in asks]
        for rows, tiles in self._tiles(asks):
            for parts, ask, tile in zip(found, asks, tiles, strict=True):
                fused = None if self._fused is None else self._fused.largest(tile, ask)
                parts.append(Largest(*(fused or self._largest(ask, tile, rows))))
        return [parts[0] if len(parts) == 1 else self._joined(parts) for parts in found]

    def _largest(self, ask: Ask, tile: Tensor, rows: slice) -> tuple[Tensor, float, float]:
        labels = torch.empty(len(tile), dtype=torch.int64, device=self.device)
        for part, z in self._exponents(tile, rows, ask):
            top, best = z.max(1)
            tied = (z >= top[:, None] - _TIE).sum(1) > 1
            labels[part.start - rows.start : part.stop - rows.start] = best.where(~tied, -1 - best)
        return labels, *ends(labels)

    def _joined(self, parts: list[Largest]) -> Largest:
        """Of all rows, of which there may be none."""
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        labels, least, most = zip((none, *ends(none)), *parts, strict=True)
        return Largest(torch.cat(labels), min(least), max(most))

    def _tiles(self, asks: list[Ask]) -> Iterator[tuple[slice, list[Tensor]]]:
        return self.scores.blocks([ask.head for ask in asks])

    def _scan(self) -> tuple[float, float, bool]:
        """(lowest entry below its row's maximum, largest magnitude, whether -inf occurs)."""
        heads = list(range(self.scores.n_heads))
        lowest, largest, barred = 0.0, 0.0, False
        for _, tiles in self.scores.blocks(heads):
            for head, tile in zip(heads, tiles, strict=True):
                fused = None if self._fused is None else self._fused.scan(tile, head)
                found = _scan_tile(tile, self._step) if fused is None else (*fused, False)
                spread, magnitude, bars = found
                lowest, largest = min(lowest, -spread), max(largest, magnitude)
                barred |= bars
        return lowest, largest, barred

    def _clean(self, tile: Tensor) -> Tensor:
        """Scores in the precision that the solve needs, row maximum 0, -inf replaced."""
        x = tile.to(self.dtype)
        top = x.amax(1, keepdim=True)
        if not self._barred:
            return x - top
        return (x - top.where(top > -math.inf, torch.zeros_like(top))).clamp_min_(self._floor)

    def _exponents(self, tile: Tensor, rows: slice, ask: Ask) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (s + v) / reg), whose softmax is the solution, a chunk at a time."""
        for start in range(0, len(tile), self._step):
            stop = min(start + self._step, len(tile))
            part = slice(rows.start + start, rows.start + stop)
            if self._kept:
                yield part, self._shifted(self._kept[ask.head][part].clone(), ask)
            else:
                yield part, self._shifted(self._clean(tile[start:stop]), ask)

    def _shifted(self, clean: Tensor, ask: Ask) -> Tensor:
        """(s + v) / reg, in place of clean scores s."""
        shift = torch.from_numpy(ask.v / ask.reg).to(self.device, self.dtype)
        return clean.div_(ask.reg).add_(shift)


def _as_sums(ask: Ask, sums: Any, value: Any = 0.0, gram: Any = None) -> Sums:
    m, squares = sums if isinstance(sums, np.ndarray) else sums.cpu().numpy()
    gram = gram.cpu().numpy() if isinstance(gram, Tensor) else gram
    return Sums(m, squares, ask.reg * float(value), gram)


def as_shares(weights: Any, size: int, name: str) -> NDArray[np.float64]:
    """Non-negative weights scaled to sum to one; None is uniform."""
    if weights is None:
        return np.full(size, 1.0 / size)
    return _scaled(_weights(weights, size, name), name, _ALONE).cpu().numpy()


def _scaled(weights: Tensor, name: str, shards: Shards) -> Tensor:
    """Weights that sum to one over those of all processes."""
    (largest,) = shards.max(float(weights.max()) if len(weights) else 0.0)
    if largest <= 0:
        raise ValueError(f"{name} must be finite, non-negative and not all zero.")
    weights = weights / largest  # the sum of huge weights would overflow
    return weights / shards.total(float(weights.sum()))


def _weights(weights: Any, size: int, name: str, device: torch.device | None = None) -> Tensor:
    w = weights.detach() if isinstance(weights, Tensor) else torch.as_tensor(np.array(weights))
    w = w.to(device, torch.float64)
    if w.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(w.shape)}.")
    if not w.isfinite().all() or (w < 0).any():
        raise ValueError(f"{name} must be finite, non-negative and not all zero.")
    return w


def _scan_tile(tile: Tensor, step: int) -> tuple[float, float, bool]:
    """(widest row, largest magnitude, whether -inf occurs), of finite entries."""
    widest, largest, barred = 0.0, 0.0, False
    for part in tile.split(step):
        if not part.is_floating_point():
            part = part.double()
        elif part.dtype.itemsize < 4:
            part = part.float()
        low, top = torch.aminmax(part, dim=1)
        if low.isnan().any() or (top == math.inf).any():
            raise ValueError("scores contain NaN or +inf; they must be finite or -inf.")
        if (low == -math.inf).any():
            barred = True
            low = part.masked_fill(part == -math.inf, math.inf).amin(1)
            some = low < math.inf
            low, top = (
                low.where(some, torch.zeros_like(low)),
                top.where(some, torch.zeros_like(top)),
            )
        widest = max(widest, float((top - low).max()))
        largest = max(largest, float(low.abs().max()), float(top.abs().max()))
    return widest, largest, barred


def _fused_reads(scores: Scores, n_processes: int) -> Any:
    """Fused reads for these scores where they are worth it and can be had, or None.

    Each of several processes has about as many rows: they read as one with all rows would.
    """
    name, dtypes = {
        "cuda": ("triton", (torch.float32, torch.bfloat16, torch.float16)),
        "cpu": ("numba", (torch.float32, torch.float64)),
    }.get(scores.device.type, ("", ()))
    if scores.dtype not in dtypes or 0 < scores.n * scores.k * n_processes < _FUSED_FROM:
        return None
    try:
        module = importlib.import_module(f"sklearn_sela._kernels_{name}")
    except (ImportError, RuntimeError):  # not installed, or no folder for numba to cache in
        return None
    return module.FusedReads(scores, _TIE) if scores.k <= module.WIDEST else None
