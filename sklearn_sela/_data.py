"""The training rows: gathered, scaled and moved to the device one batch at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from sklearn_sela._images import Images, read_ahead
from sklearn_sela._shares import Share

REFERENCE_ROWS = 20_000  # rows that stand for all in neighbours and k-means
_SAMPLE = 1 << 22  # values of X looked at for scaling and principal components: 32 MB
_FEWEST_ROWS = 16  # of it, however large they are
_SCALED = 1 << 18  # values of a batch scaled at a time: float64 costs little memory
_CHUNK = 1 << 21  # values of X embedded, or averaged, at a time
_MIRROR = 1.3  # digits 1.7, Fashion-MNIST 1.1
_PCA_DIM = 50  # in which neighbours are searched: less noise, less time
_SMALLEST_SIDE = 8  # pixels, of square images recognised in flat rows
_ALIKE = 0.15  # by how much neighbouring pixels are more correlated than distant ones
_SHUFFLES = 20  # of the features, against which a correlation must stand out
_GREY = 0.02  # by how much the channels of grey images differ, in deviations: JPEG's rounding
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of pixels in [0, 1]
_TOO_LARGE = "X holds values too large: their spread is not a finite number."


class Scaler:
    """Shift and scale learned from X.

    Vectors: each feature to mean 0 and variance 1. Images: each channel divided by its
    standard deviation, after subtracting its typical border value, so that the zeros that
    geometric augmentation moves in look like more background. A sample of images will do;
    of vectors all rows are looked at, for a feature may vary in few of them: those of the
    share, and of the other processes theirs.

    ``as_imagenet`` scales pixels of 0 to 255 as networks trained on ImageNet expect, whatever X
    is; grey ones by the mean over its channels.
    """

    def __init__(
        self,
        X: Any,
        image_shape: tuple[int, int, int] | None,
        as_imagenet: bool = False,
        share: Share | None = None,
    ):
        self.image_shape = image_shape
        if as_imagenet:
            moments = 255 * np.array(_IMAGENET)  # (2, 3)
            if image_shape is not None and image_shape[0] == 1:
                moments = moments.mean(1, keepdims=True)
            self.shift, self.scale = moments[..., None, None]
            return
        with np.errstate(over="ignore", invalid="ignore"):
            if image_shape is None:
                self.shift, self.scale, largest = column_moments(X, share)
            else:
                x = X.reshape(len(X), *image_shape).astype(np.float64)
                rim = [x[:, :, [0, -1], :], x[..., [0, -1]].swapaxes(2, 3)]
                values = np.concatenate([r.reshape(*x.shape[:2], -1) for r in rim], 2)
                self.shift = np.median(values, axis=(0, 2))[:, None, None]
                self.scale = x.std((0, 2, 3), keepdims=True)[0]
                largest = np.abs(x).max((0, 2, 3), keepdims=True)[0]
        noise = 1e-12 * largest  # rounding of the mean
        self.scale[self.scale <= noise] = 1.0  # constant: nothing to learn, nothing to blow up
        if not np.isfinite(self.scale).all():
            raise ValueError(_TOO_LARGE)

    def __call__(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """Rows of any dtype and layout, as (n, d) or (n, C, H, W) float32 on the device.

        Raises
        ------
        ValueError
            For values so large that they are not finite once scaled.
        """
        shape = (len(rows), *(self.image_shape or rows.shape[1:]))
        # In float64: a large offset (a time stamp) must not swallow what varies beside it.
        step = max(1, _SCALED * len(rows) // max(math.prod(shape), 1))
        if rows.dtype == np.uint8 and self.image_shape is not None:  # the same, where it is faster
            pixels = torch.tensor(rows.reshape(shape), device=device)
            shift, scale = (torch.as_tensor(a, device=device) for a in (self.shift, self.scale))
            x = torch.empty(shape, device=device, memory_format=torch.channels_last)
            for part, out in zip(pixels.split(step), x.split(step), strict=True):
                out.copy_(part.double().sub_(shift).div_(scale))
            return x
        scaled = np.empty(shape, dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(rows), step):
                values = rows[start : start + step].reshape(-1, *shape[1:])
                scaled[start : start + step] = (values - self.shift) / self.scale
        x = torch.from_numpy(scaled).to(device)
        if not x.isfinite().all():
            raise ValueError(_TOO_LARGE)
        return x if self.image_shape is None else x.contiguous(memory_format=torch.channels_last)


class Rows:
    """The rows of X, by index: ``rows[indices]`` is a scaled batch on the device.

    ``share`` are those that this process works on, all of them by default.
    """

    def __init__(
        self,
        X: np.ndarray | Images,
        scaler: Scaler,
        device: torch.device,
        share: Share | None = None,
    ):
        self.X, self.scaler, self.device = X, scaler, device
        self.share = Share.of_all(len(X)) if share is None else share

    def __len__(self) -> int:
        return len(self.share)

    def own(self, part: slice) -> Tensor:
        """A batch of the share, by number."""
        return self[self.share.rows[part]]

    def __getitem__(self, indices: Tensor | np.ndarray) -> Tensor:
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        return self.scaler(self.X[indices], self.device)

    def read(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """A batch for each part; of files, the next is read ahead."""
        if isinstance(self.X, Images) and self.X.from_files:
            return read_ahead(self.__getitem__, parts)
        return map(self.__getitem__, parts)


def column_moments(
    X: np.ndarray, share: Share | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and largest magnitude of each column, in parts of the rows.

    In float64. The parts' squared deviations are merged (Chan, Golub, LeVeque 1983): a
    difference of large sums would lose what varies beside a large offset. Counted from the
    first row, a constant column is exactly 0 throughout.
    """
    share, d = Share.of_all(len(X)) if share is None else share, X.shape[1]
    first = X[share.rows[0]].astype(np.float64) if len(share) else np.zeros(d)
    largest = np.zeros(d)
    moments = 0, np.zeros(d), np.zeros(d)
    size = max(1, _CHUNK // d)
    for start in range(0, len(share), size):
        rows = share.rows[start : start + size]
        x = X[rows].astype(np.float64, order="C")  # one order of summation
        np.maximum(largest, np.abs(x).max(0), out=largest)
        x -= first
        mean = x.mean(0)
        moments = _merged(moments, (len(x), mean, ((x - mean) ** 2).sum(0)))
    n, mean, squares = moments
    if not share.shards.alone:
        parts = share.shards.gather((n, first + mean, squares, largest))
        first, largest = np.zeros(d), np.max([part[3] for part in parts], axis=0)
        n, mean, squares = functools.reduce(_merged, (part[:3] for part in parts if part[0]))
    return first + mean, np.sqrt(squares / n), largest


Moments = tuple[int, np.ndarray, np.ndarray]  # of rows: how many, mean, sum of squared deviations


def _merged(one: Moments, two: Moments) -> Moments:
    """Of the rows of both."""
    n = one[0] + two[0]
    delta, weight = two[1] - one[1], two[0] / n
    squares = one[2] + (two[2] + delta * (delta * (one[0] * weight)))
    return n, one[1] + delta * weight, squares


def draw_rows(share: Share, n_values: int, rng: np.random.Generator, limit: int) -> np.ndarray:
    """Sorted indices of rows of the share: its part of at most ``limit`` of all.

    Fewer if they hold more than _SAMPLE values.
    """
    size = share.part_of(min(limit, max(_FEWEST_ROWS, _SAMPLE // n_values)))
    drawn = size < len(share)
    return np.sort(rng.choice(share.rows, size, replace=False)) if drawn else share.rows


def square_images(X: np.ndarray) -> tuple[int, int, int] | None:
    """(1, side, side) if the features look like the pixels of square grey images, else None.

    In images, pixels next to each other and pixels one above the other are correlated, more
    than pixels half a row apart. That is rare in tables, where the order of features means
    little, and in signals, where correlation falls with distance, unless they repeat themselves.
    """
    n, d = X.shape
    side = math.isqrt(d)
    if side * side != d or side < _SMALLEST_SIDE:
        return None
    rng = np.random.default_rng(0)  # a test of the data, not a draw of the fit
    x = X[draw_rows(Share.of_all(n), d, rng, 1000)].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        x = (x - x.mean(0)) / x.std(0)  # not a number where constant

    def correlation(lag: int, order: np.ndarray) -> float:
        pairs = (x[:, order[lag:]] * x[:, order[:-lag]]).mean(0)
        return float(pairs[np.isfinite(pairs)].mean()) if np.isfinite(pairs).any() else 0.0

    order = np.arange(d)
    near = min(correlation(1, order), correlation(side, order))
    shuffled = [correlation(1, rng.permutation(d)) for _ in range(_SHUFFLES)]
    far = max(correlation(side // 2, order), float(np.mean(shuffled)))
    return (1, side, side) if near - far > max(_ALIKE, 5 * float(np.std(shuffled))) else None


def has_colour(X: np.ndarray, image_shape: tuple[int, int, int]) -> bool:
    """Whether images of three channels show colours, not grey stored as colour."""
    if image_shape[0] != 3:
        return False
    x = X.reshape(len(X), *image_shape).astype(np.float64)
    return bool(np.abs(np.diff(x, axis=1)).mean() > _GREY * x.std())


class Geometry:
    """Where the rows lie before anything is learned: principal components and neighbours.

    Up to REFERENCE_ROWS rows, all of a small data set, stand for the whole: neighbours are
    looked for among them, so that time and memory grow linearly with the rows. Of several
    processes each has its part of them, and where it cannot reach those of the others it looks
    for neighbours among as many rows of its own.

    Attributes
    ----------
    reference : int array
        Rows of the share that are reference rows, by number.
    points : array of shape (n_reference, n_components)
        Of the reference rows of all processes.
    """

    def __init__(self, rows: Rows, n_values: int, rng: np.random.Generator):
        self.rows, self.share, self.n_values = rows, rows.share, n_values
        share = self.share
        x = share.joined(self.flat(draw_rows(share, n_values, rng, REFERENCE_ROWS)))
        seed = int(rng.integers(2**31)) if n_values > _PCA_DIM else 0
        self.pca = share.shards.first(lambda: _principal_components(x, seed))
        order = rng.permutation(len(share))
        self.reference = np.sort(order[: share.part_of(REFERENCE_ROWS)])
        near = share.rows[self.reference]
        self.points = share.joined(self.embed(near))
        if share.within_reach:
            self._near, points = share.joined(near), self.points
        else:
            self._near = share.rows[np.sort(order[:REFERENCE_ROWS])]
            points = self.embed(self._near)
        self._search = NearestNeighbors(algorithm="brute")
        if len(points):
            self._search.fit(points)

    def flat(self, indices: np.ndarray) -> np.ndarray:
        return self.rows[indices].flatten(1).cpu().numpy()

    def embed(self, indices: np.ndarray) -> np.ndarray:
        """(n, n_components) points of rows of X."""
        parts = np.split(indices, range(self._step, len(indices), self._step))
        return np.concatenate([self.project(self.flat(part)) for part in parts])

    def project(self, x: np.ndarray) -> np.ndarray:
        if self.pca is None or not len(x):
            return x if self.pca is None else np.empty((0, self.pca.n_components_), np.float32)
        return self.pca.transform(x).astype(np.float32)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows of the share in parts: (numbers, points)."""
        for start in range(0, len(self.share), self._step):
            part = slice(start, start + self._step)
            yield part, self.embed(self.share.rows[part])

    @property
    def _step(self) -> int:
        """Rows embedded at a time."""
        return max(1, _CHUNK // self.n_values)

    def neighbors(self, k: int) -> np.ndarray:
        """(n, k) indices into X of the reference rows nearest to each of the share, but itself."""
        k = max(0, min(k, len(self._near) - 1))
        found = np.empty((len(self.share), k), dtype=np.int32)
        for part, points in self.chunks():
            near = self._near[self._search.kneighbors(points, k + 1, return_distance=False)]
            drop = near == self.share.rows[part, None]
            drop[~drop.any(1), -1] = True  # no reference row, or behind duplicates of it
            found[part] = near[~drop].reshape(-1, k)
        return found

    def mirrors(self, rng: np.random.Generator, probes: int = 500) -> bool:
        """Whether mirrored images look like the data: about as near to a row as rows are."""
        indices = draw_rows(self.share, self.n_values, rng, probes)
        alike = len(indices) > 1 and self._like_mirrored(indices)
        for_it, all_votes = self.share.shards.sum(len(indices) * np.array([alike, 1.0]))
        return bool(for_it > all_votes / 2)

    def _like_mirrored(self, indices: np.ndarray) -> bool:
        mirrored = self.project(self.rows[indices].flip(-1).flatten(1).cpu().numpy())
        own = self._search.kneighbors(self.embed(indices), 2)[0][:, -1]
        return bool(np.median(self._search.kneighbors(mirrored, 1)[0]) < _MIRROR * np.median(own))


def _principal_components(x: np.ndarray, seed: int) -> PCA | None:
    """Of rows (n, d), if these are more than it takes."""
    if x.shape[1] <= _PCA_DIM or len(x) < 2 or np.ptp(x) == 0:
        return None
    pca = PCA(min(_PCA_DIM, len(x)), svd_solver="randomized", random_state=seed)
    # Arrays inside, whatever transform_output the user has set.
    return pca.set_output(transform="default").fit(x)
