"""Images that are not in memory, as an array of rows: decoded when asked for."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sklearn_sela._decoding import Files, Items, channels_last, complaint, reason_of

_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)
_CHUNK = 1 << 24  # bytes decoded at a time, of all
_KEPT = 4 << 30  # bytes on disk for decoded images: 350,000 of 3 x 64 x 64
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's fault, not the image's

P = TypeVar("P")
R = TypeVar("R")


class Images:
    """Images of files or of a Dataset, as an array that decodes the rows asked for.

    Made by :func:`open_images`. Like an array, it has ``shape`` (n, C, H, W), or (n, d) for a
    Dataset of vectors, ``ndim``, ``dtype`` and a length; ``images[rows]`` takes what an array
    takes, and returns one. A copy or a pickle starts without what ``check`` kept on disk.

    Attributes
    ----------
    from_files : bool
        Whether threads may read, and reading twice gives the same. Of a Dataset neither is
        known: it is read in the caller's thread, each time anew.
    """

    def __init__(self, source: Files | Items, skip: bool):
        self._source, self._skip = source, skip
        self._rows = np.arange(len(source))  # of the source
        self._reasons: dict[int, str] = {}  # why rows of the source are bad
        self.dtype = source.dtype
        self.from_files = isinstance(source, Files)
        self._kept = _Kept(source.shape, len(source))

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self._source.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Rows as an array; bad ones are zeros if skipped.

        Raises
        ------
        ValueError
            If images cannot be read and are not skipped; names them.
        """
        rows = self._rows[index]
        out, bad = self._read(np.atleast_1d(rows))
        if bad and not self._skip:
            raise ValueError(complaint(self._named(bad)))
        return out if np.ndim(rows) else out[0]

    def take(self, indices: Any) -> Images:
        """Some of the images; what is kept on disk, and known to be bad, is shared."""
        taken = object.__new__(type(self))
        taken.__dict__.update(self.__dict__, _rows=self._rows[indices])
        return taken

    @property
    def bad(self) -> dict[int, str]:
        """Row and reason of the images that could not be read so far."""
        reasons = self._reasons
        return {i: reasons[r] for i, r in enumerate(self._rows.tolist()) if r in reasons}

    def name(self, i: int) -> str:
        """The path, or "item 7" of what was opened."""
        return self._source.name(int(self._rows[i]))

    def check(self) -> list[int]:
        """Decode all once, so that all bad ones are known; returns the indices of the good.

        Decoded files are kept, in a temporary file without a name, if there is room. Items of
        a Dataset are looked at only to be skipped: they may be augmented anew each time.

        Raises
        ------
        ValueError
            If images cannot be read and are not skipped; names them.
        """
        if self.from_files:
            self._kept.open(self._rows)
        if self.from_files or self._skip:
            bad: dict[int, str] = {}
            size = max(1, _CHUNK // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
            for start in range(0, len(self), size):
                bad |= self._read(self._rows[start : start + size])[1]
            if bad and not self._skip:
                raise ValueError(complaint(self._named(bad)))
        known = self.bad if self._skip else {}
        return [i for i in range(len(self)) if i not in known]

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Rows of the source, zeros where bad, and the reasons."""
        out = np.zeros((len(rows), *self._source.shape), self.dtype)
        bad: dict[int, str] = {}
        todo = []
        for i, row in enumerate(rows.tolist()):
            if self._skip and row in self._reasons:
                bad[row] = self._reasons[row]
            elif not self._kept.get(row, out[i]):
                todo.append((i, row))

        def load(place: tuple[int, int]) -> None:
            i, row = place
            try:
                out[i] = self._source[row]
                self._kept.put(row, out[i])
            except self._source.unreadable as error:
                if isinstance(error, MemoryError) or getattr(error, "errno", 0) in _EXHAUSTED:
                    raise
                bad[row] = reason_of(error)

        _in_threads(load, todo, self._source.threads)
        self._reasons |= bad
        return out, bad

    def _named(self, bad: dict[int, str]) -> list[tuple[str, str]]:
        return [(self._source.name(row), reason) for row, reason in sorted(bad.items())]


def open_images(
    X: Any, image_shape: tuple[int, ...] | None = None, on_bad_image: str = "error"
) -> Images | None:
    """X as ``Images`` if it is files or items to be decoded; None if it is an array or a table.

    Parameters
    ----------
    X : path of a folder, sequence of paths or of items, or map-style torch Dataset
        A sequence of paths may be a list, an array, a Series, an Index or a DataFrame of one
        column. Items, or the first of each (item, target), are PIL images, arrays or tensors
        of (H, W) or (C, H, W), arrays of (H, W, C), or vectors. They are taken as they are,
        files turned upright as their EXIF data say. Other sizes than the first, or the one
        asked for, are scaled to cover it and cut around the centre; transparent pixels are
        white. Pixels are uint8, except of arrays and tensors.
    image_shape : tuple of int, default=None
        (C, H, W), or (H, W) of as many channels as there are. None is 3 channels for files, and
        a square as high as their median short side, 64 at most; for items, what the first has.
    on_bad_image : {"error", "skip"}, default="error"
        Whether what cannot be read raises an error that names it, or is zeros and recorded.

    Raises
    ------
    ValueError
        For a folder without images, something else among paths, or if nothing can be read.
    TypeError
        For a stream of samples, or items that are no images.
    """
    stream = isinstance(X, IterableDataset | DataLoader)
    if stream or (isinstance(X, Dataset) and not hasattr(X, "__len__")):
        raise TypeError(
            f"X is a torch {type(X).__name__}, a stream of samples; pass an array, paths of images "
            "or a Dataset with a length, whose items have numbers (of a DataLoader: its .dataset)."
        )
    skip = on_bad_image == "skip"
    if isinstance(X, str | os.PathLike):
        return Images(Files(image_paths(X), image_shape), skip)
    if isinstance(X, Dataset):
        return Images(Items(X, image_shape, skip), skip)
    items = _listed(X)
    if any(isinstance(x, str | os.PathLike) for x in items):
        return Images(Files(_paths(items), image_shape), skip)
    return Images(Items(items, image_shape, skip), skip) if items and _is_item(items[0]) else None


def image_paths(folder: str | os.PathLike) -> list[str]:
    """Paths of all image files in a folder and below it, sorted; hidden ones are left out.

    Parameters
    ----------
    folder : str or path-like
        Files count by their extension: JPEG, PNG, WebP, TIFF, BMP, GIF, PNM, JPEG 2000, AVIF.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If it is not a folder, or there are none.
    """
    folder = os.fsdecode(folder)
    if os.path.isfile(folder):
        raise ValueError(f"{folder!r} is a file, not a folder; pass files as a list of paths.")
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {folder!r} (from {os.getcwd()!r}).")
    found, visited = [], set()
    for here, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = sorted(f for f in folders if real not in visited and f[0] != ".")
        if real not in visited:  # links may lead back
            images = [f for f in files if f[0] != "." and f.lower().endswith(_EXTENSIONS)]
            found += [os.path.join(here, f) for f in images]
        visited.add(real)
    if not found:
        raise ValueError(f"No images in {folder!r}: no file ends in {', '.join(_EXTENSIONS)}.")
    return sorted(found)


def read_ahead(read: Callable[[P], R], parts: Iterable[P]) -> Iterator[R]:
    """``read(part)`` of each part, the next one in a thread while the caller uses the last.

    Parts are drawn in the caller's thread, in order: they may depend on a random generator,
    though one is drawn before its forerunner is used. The thread ends with the generator.
    """
    pool = ThreadPoolExecutor(1, "read_ahead")
    last: Future[R] | None = None
    try:
        for part in parts:
            last, before = pool.submit(read, part), last
            if before is not None:
                yield before.result()
        if last is not None:
            yield last.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Kept:
    """Decoded rows in a temporary file without a name, once opened and while the disk has room.

    Read by position, not mapped: mapped pages would count as memory. Pickles are empty.
    """

    def __init__(self, shape: tuple[int, ...], n: int):
        self._shape, self._n = shape, n
        self._bytes = math.prod(shape)
        self._file: Any = None
        self._there = np.zeros(0, dtype=bool)

    def __reduce__(self) -> tuple:
        return _Kept, (self._shape, self._n)

    def open(self, rows: np.ndarray) -> None:
        """Make room for rows; what is too much is not kept, nor is anything from then on."""
        if not hasattr(os, "pread"):
            return
        there = np.zeros(self._n, dtype=bool) if self._file is None else self._there
        more = np.count_nonzero(~there[rows]) * self._bytes
        kept = np.count_nonzero(there) * self._bytes
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(tempfile.gettempdir()).free
            if kept + more > _KEPT or more > free // 2:  # half: others need some, too
                self._file = None
            elif self._file is None:
                self._there = there
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115

    def get(self, row: int, out: np.ndarray) -> bool:
        """Whether the row is there; if so, it is put into out."""
        file = self._file  # not closed by another thread while it is held here
        if file is None or not self._there[row]:
            return False
        data = os.pread(file.fileno(), self._bytes, row * self._bytes)
        out[...] = np.frombuffer(data, np.uint8).reshape(self._shape)
        return True

    def put(self, row: int, values: np.ndarray) -> None:
        file = self._file
        if file is None:
            return
        try:
            written = os.pwrite(file.fileno(), values.tobytes(), row * self._bytes)
        except OSError:
            written = 0
        if written == self._bytes:
            self._there[row] = True
        else:
            self._file = None  # the disk is full: leave it to others


def _in_threads(function: Callable[[P], None], parts: list[P], threads: int) -> None:
    if min(threads, len(parts)) < 2:
        for part in parts:
            function(part)
    else:  # of their own: nothing to pickle, to share or to leave behind
        with ThreadPoolExecutor(min(threads, len(parts)), "decode") as pool:
            for _ in pool.map(function, parts):
                pass


def _listed(X: Any) -> Sequence[Any]:
    """What may be paths or items, one by one; empty if X is anything else."""
    if isinstance(X, pd.DataFrame):
        X = X.iloc[:, 0] if X.shape[1] == 1 else None
    if isinstance(X, pd.Series | pd.Index | np.ndarray):
        if X.dtype.kind not in "OUT" or X.size != (X.shape or (0,))[0]:  # numbers, or a table
            return []
        X = np.ravel(np.asarray(X, dtype=object)).tolist()
    return X if isinstance(X, list | tuple) else []


def _is_item(x: Any) -> bool:
    """Whether a list of such is one of pictures: not if it may be nested numbers."""
    first = x[0] if isinstance(x, tuple | list) and len(x) else x
    if isinstance(first, Image.Image):
        return True
    if isinstance(x, np.ndarray):
        return channels_last(x)
    pair = isinstance(x, tuple) and isinstance(first, np.ndarray | Tensor) and first.ndim > 0
    return pair and (len(x) == 1 or np.shape(x[1]) != np.shape(first))


def _paths(values: Sequence[Any]) -> list[str]:
    for i, value in enumerate(values):
        if not isinstance(value, str | os.PathLike):
            raise ValueError(f"X holds {value!r} at position {i}, among paths of images.")
    return [os.fsdecode(value) for value in values]


def _raise(error: OSError) -> None:
    raise error
