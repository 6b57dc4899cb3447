"""The training rows: gathered, scaled and moved to the device one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from sklearn_sela._images import Images, read_ahead

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
    of vectors all rows are looked at, for a feature may vary in few of them.

    ``as_imagenet`` scales pixels of 0 to 255 as networks trained on ImageNet expect, whatever X
    is; grey ones by the mean over its channels.
    """

    def __init__(self, X: Any, image_shape: tuple[int, int, int] | None, as_imagenet: bool = False):
        self.image_shape = image_shape
        if as_imagenet:
            moments = 255 * np.array(_IMAGENET)  # (2, 3)
            if image_shape is not None and image_shape[0] == 1:
                moments = moments.mean(1, keepdims=True)
            self.shift, self.scale = moments[..., None, None]
            return
        with np.errstate(over="ignore", invalid="ignore"):
            if image_shape is None:
                self.shift, self.scale, largest = column_moments(X)
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
    """All training rows, by index: ``rows[indices]`` is a scaled batch on the device."""

    def __init__(self, X: np.ndarray | Images, scaler: Scaler, device: torch.device):
        self.X, self.scaler, self.device = X, scaler, device

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()  # type: ignore[assignment]
        return self.scaler(self.X[indices], self.device)

    def read(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """A batch for each part; of files, the next is read ahead."""
        if isinstance(self.X, Images) and self.X.from_files:
            return read_ahead(self.__getitem__, parts)
        return map(self.__getitem__, parts)


def column_moments(X: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and largest magnitude of each column, in parts of the rows.

    In float64. The parts' squared deviations are merged (Chan, Golub, LeVeque 1983): a
    difference of large sums would lose what varies beside a large offset. Counted from the
    first row, a constant column is exactly 0 throughout.
    """
    n, d = X.shape
    first = X[0].astype(np.float64)
    mean, squares, largest = np.zeros(d), np.zeros(d), np.zeros(d)
    size = max(1, _CHUNK // d)
    for start in range(0, n, size):
        x = X[start : start + size].astype(np.float64, order="C")  # one order of summation
        np.maximum(largest, np.abs(x).max(0), out=largest)
        x -= first
        part_mean = x.mean(0)
        delta, weight = part_mean - mean, len(x) / (start + len(x))
        squares += ((x - part_mean) ** 2).sum(0) + delta * (delta * (start * weight))
        mean += delta * weight
    return first + mean, np.sqrt(squares / n), largest


def draw_rows(n: int, n_values: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted indices of at most ``limit`` rows, fewer if they hold more than _SAMPLE values."""
    size = min(n, limit, max(_FEWEST_ROWS, _SAMPLE // n_values))
    return np.arange(n) if size == n else np.sort(rng.choice(n, size, replace=False))


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
    x = X[draw_rows(n, d, 1000, rng)].astype(np.float64)
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
    looked for among them, so that time and memory grow linearly with the rows.
    """

    def __init__(self, rows: Rows, n_values: int, rng: np.random.Generator):
        self.rows, self.n_values = rows, n_values
        n = len(rows)
        sample = draw_rows(n, n_values, REFERENCE_ROWS, rng)
        x = self.flat(sample)
        self.pca = None
        if n_values > _PCA_DIM and len(x) > 1 and np.ptp(x) > 0:
            dim = min(_PCA_DIM, len(x))
            pca = PCA(dim, svd_solver="randomized", random_state=int(rng.integers(2**31)))
            # Arrays inside, whatever transform_output the user has set.
            self.pca = pca.set_output(transform="default").fit(x)
        self.reference = np.sort(rng.permutation(n)[:REFERENCE_ROWS])
        chunks = [self.embed(part) for part in self.parts(self.reference)]
        self.points = np.concatenate(chunks)
        self._search = NearestNeighbors(algorithm="brute").fit(self.points)

    def flat(self, indices: np.ndarray) -> np.ndarray:
        return self.rows[torch.from_numpy(indices)].flatten(1).cpu().numpy()

    def embed(self, indices: np.ndarray) -> np.ndarray:
        return self.project(self.flat(indices))

    def project(self, x: np.ndarray) -> np.ndarray:
        return x if self.pca is None else self.pca.transform(x).astype(np.float32)

    def parts(self, indices: np.ndarray) -> list[np.ndarray]:
        """Indices in parts small enough to embed at a time."""
        size = max(1, _CHUNK // self.n_values)
        return [indices[i : i + size] for i in range(0, len(indices), size)]

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows in parts: (indices, points)."""
        for part in self.parts(np.arange(len(self.rows))):
            yield part, self.embed(part)

    def neighbors(self, k: int) -> np.ndarray:
        """(n, k) indices of each row's nearest reference rows, itself left out."""
        k = min(k, len(self.reference) - 1)
        found = np.empty((len(self.rows), k), dtype=np.int32)
        for part, points in self.chunks():
            near = self.reference[self._search.kneighbors(points, k + 1, return_distance=False)]
            drop = near == part[:, None]
            drop[~drop.any(1), -1] = True  # no reference row, or behind duplicates of it
            found[part] = near[~drop].reshape(-1, k)
        return found

    def mirrors(self, rng: np.random.Generator, probes: int = 500) -> bool:
        """Whether mirrored images look like the data: about as near to a row as rows are."""
        indices = draw_rows(len(self.rows), self.n_values, probes, rng)
        x = self.rows[torch.from_numpy(indices)]
        mirrored = self.project(x.flip(-1).flatten(1).cpu().numpy())
        own = self._search.kneighbors(self.embed(indices), 2)[0][:, -1]
        return bool(np.median(self._search.kneighbors(mirrored, 1)[0]) < _MIRROR * np.median(own))
