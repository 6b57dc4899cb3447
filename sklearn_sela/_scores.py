"""Where scores come from: a matrix, a file or blocks larger than memory, features times heads."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 22  # entries in memory at a time, of a head's scores formed from features
_ON_GPU = 16  # times as many there, of all heads: a read of less takes no longer than its start
_COPIED = 1 << 20  # of a file


class Scores:
    """Rows of scores for one head or several, in blocks; read as often as needed.

    Parameters
    ----------
    source : array-like, tensor, memmap or callable
        Scores of shape (n, K), in memory also (T, n, K) of T heads, or features of shape (n, D)
        when a head is given. A callable returns an iterator over blocks of rows, the same ones
        each time.
    head : (weight, bias), default=None
        Linear heads, weight (K, D) or (T, K, D) and bias (K,), (T, K) or None: the scores are
        ``features @ weight.T + bias``, a block at a time.
    some_elsewhere : bool, default=False
        Whether other processes have rows, too: this one may have none.
    """

    def __init__(
        self, source: Any, head: tuple[Any, Any] | None = None, some_elsewhere: bool = False
    ):
        self._may_be_empty = some_elsewhere
        self.source, self.n = _readable(source), 0  # rows: known once read
        self.of_tensors = isinstance(source, Tensor)  # of a callable: what its blocks are
        self.stack: Tensor | None = None  # the scores of several heads
        if head is None and not callable(self.source) and self.source.ndim == 3:
            if len(self.source) == 0 or isinstance(self.source, np.memmap):
                raise ValueError(
                    "scores (n_heads, n, K) must be in memory, and of at least one head."
                )
            if not isinstance(self.source, Tensor):  # of a layout torch does not take
                self.source = torch.from_numpy(_known(np.array(self.source, order="C")))
            self.stack, self.source = self.source, self.source[0]
        if not callable(self.source):
            self.n = len(self.source) if self.source.ndim else 0
            sizes = self.source.shape[1:] if some_elsewhere else self.source.shape
            if self.source.ndim != 2 or 0 in sizes:
                what = "scores" if head is None else "features"
                shape = tuple(self.source.shape)
                raise ValueError(f"{what} must be a non-empty (n, K) matrix, got shape {shape}.")
        first = next(self._rows(), None)
        if first is None or first.ndim != 2:
            raise ValueError("scores must yield at least one block of rows, each a matrix.")
        self.device, self.dtype, self.width = first.device, first.dtype, first.shape[1]
        self.heads: tuple[Tensor, Tensor] | None = None
        self.n_heads = 1 if self.stack is None else len(self.stack)
        self.k, self.several = self.width, self.stack is not None
        if head is not None:
            if not isinstance(head, tuple | list) or len(head) != 2:
                raise ValueError("head must be (weight, bias), with None for no bias.")
            self.heads, self.several = self._linear(*head)
            self.n_heads, self.k = self.heads[0].shape[:2]
            self.dtype = self.heads[0].dtype

    def whole(self) -> bool:
        """Whether the scores are matrices in memory: one block."""
        return self.heads is None and isinstance(self.source, Tensor)

    def blocks(self, heads: list[int]) -> Iterator[tuple[slice, list[Tensor]]]:
        """(rows, scores of shape (rows, K) for each of the heads), over all rows."""
        start = 0
        for block in self._rows():
            if block.ndim != 2 or block.shape[1] != self.width:
                raise ValueError(
                    f"blocks must be (rows, {self.width}) like the first, got {tuple(block.shape)}."
                )
            n = block.shape[0]
            if n == 0:
                continue
            if 0 < self.n < start + n:  # kernels keep a place for known rows only
                raise self._other_rows(f"{start + n} or more")
            for part in [block] if self.heads is None else block.split(self._formed(len(heads))):
                rows = slice(start, start + part.shape[0])
                start = rows.stop
                yield rows, [self._tile(part, head) for head in heads]
        if start == 0 and not self._may_be_empty:
            raise ValueError("scores hold no rows.")
        if self.n not in (0, start):
            raise self._other_rows(str(start))
        self.n = start

    def _formed(self, n_heads: int) -> int:
        """Rows whose scores are formed at a time."""
        entries = _BLOCK if self.device.type == "cpu" else _ON_GPU * _BLOCK // n_heads
        return max(1, entries // max(self.k, self.width))

    def _other_rows(self, found: str) -> ValueError:
        return ValueError(f"the blocks hold {found} rows, but held {self.n} when first read.")

    def _tile(self, rows: Tensor, head: int) -> Tensor:
        if self.stack is not None:
            return self.stack[head]
        if self.heads is None:
            return rows
        weight, bias = (parameter[head] for parameter in self.heads)
        return torch.addmm(bias, rows.to(weight.dtype), weight.T)

    def _rows(self) -> Iterator[Tensor]:
        """The source's own rows as tensors: all at once where they are in memory."""
        if isinstance(self.source, Tensor):
            yield self.source
        elif callable(self.source):
            for block in self.source():
                self.of_tensors = isinstance(block, Tensor)
                rows = _readable(block)
                yield rows if isinstance(rows, Tensor) else torch.from_numpy(_known(np.array(rows)))
        else:
            # A copy of a block at a time: of pages that can be dropped, in a layout torch takes.
            step = max(1, _COPIED // self.source.shape[1])
            for start in range(0, len(self.source), step):
                block = np.array(self.source[start : start + step], order="C")
                yield torch.from_numpy(_known(block))
                _drop_pages(self.source)

    def _linear(self, weight: Any, bias: Any) -> tuple[tuple[Tensor, Tensor], bool]:
        w = torch.as_tensor(weight).detach().to(self.device)
        if w.ndim not in (2, 3) or w.shape[-1] != self.width or 0 in w.shape:
            raise ValueError(
                f"head's weight must be (K, {self.width}) or (heads, K, {self.width}) for "
                f"features of shape (n, {self.width}), got {tuple(w.shape)}."
            )
        w = w if w.is_floating_point() and w.dtype.itemsize >= 4 else w.float()
        b = w.new_zeros(w.shape[:-1]) if bias is None else torch.as_tensor(bias).detach().to(w)
        if b.shape != w.shape[:-1]:
            raise ValueError(
                f"head's bias must have shape {tuple(w.shape[:-1])}, got {tuple(b.shape)}."
            )
        if not (w.isfinite().all() and b.isfinite().all()):
            raise ValueError("head's weight and bias must be finite.")
        several = w.ndim == 3
        return ((w, b) if several else (w[None], b[None])), several


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products in float32 within: TF32 would stall the solver far from its tolerance."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul: Any = getattr(backend, "matmul", None)
    before = getattr(matmul, "fp32_precision", None)
    each = before is not None  # since torch 2.9, where the old call may raise
    before = before or torch.get_float32_matmul_precision()

    def put(precision: str) -> None:
        if each:
            matmul.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    on = torch.is_autocast_enabled(device.type)  # else not worth its time
    put("ieee" if each else "highest")
    try:
        plain = torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
        with torch.no_grad(), plain:  # blocks are made within by code that is not ours
            yield
    finally:
        put(before)


def _readable(source: Any) -> Tensor | np.ndarray | Callable[[], Iterator[Any]]:
    """A tensor that shares memory where torch allows, else an array to be copied by blocks."""
    if callable(source) and not isinstance(source, Tensor):
        return source
    array = source if isinstance(source, np.ndarray | Tensor) else np.asarray(source)
    if array.dtype.is_complex if isinstance(array, Tensor) else array.dtype.kind == "c":
        raise ValueError(f"scores must be real numbers, got {array.dtype}.")
    if isinstance(array, Tensor):
        return array.detach() if array.requires_grad else array
    mapped = isinstance(array, np.memmap)
    if mapped or not array.flags.writeable or any(step < 0 for step in array.strides):
        return array
    return torch.from_numpy(_known(array))


def _known(array: np.ndarray) -> np.ndarray:
    """The array, as float64 if it is of a type that torch does not know."""
    dtype = array.dtype
    known = dtype.kind in "fiub" and dtype.itemsize <= 8 and dtype.isnative
    return array if known else array.astype(np.float64)


def _drop_pages(array: np.ndarray) -> None:
    """Give back the pages of a file that have been read: the whole of it need not fit."""
    pages = getattr(array, "_mmap", None)
    shared = getattr(array, "mode", "c") in ("r", "r+", "w+")  # private pages hold changes
    if pages is not None and shared and hasattr(pages, "madvise"):
        pages.madvise(mmap.MADV_DONTNEED)
