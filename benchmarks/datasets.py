"""The data sets of the benchmarks; Fashion-MNIST comes from Debian's package archive."""

from __future__ import annotations

import gzip
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine, make_blobs
from sklearn.preprocessing import StandardScaler

_CACHE = Path(__file__).parent.parent / "data"
_PACKAGE = "dataset-fashion-mnist"


def fashion_mnist(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8 and classes: 10,000 fixed training images, or all test images.

    Raises
    ------
    RuntimeError
        Where the package cannot be had (no apt-get, no network).
    """
    folder = _CACHE / "usr/share/datasets/fashion-mnist"
    if not folder.exists():
        _CACHE.mkdir(exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", _PACKAGE], cwd=_CACHE, check=True)
            package = next(_CACHE.glob(f"{_PACKAGE}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", package, _CACHE], check=True)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise RuntimeError(
                f"Fashion-MNIST needs Debian's package {_PACKAGE}: {error}"
            ) from error
    prefix = {"train": "train", "test": "t10k"}[split]

    def read(name: str, header: int) -> np.ndarray:
        packed = (folder / f"{prefix}-{name}-ubyte.gz").read_bytes()
        return np.frombuffer(gzip.decompress(packed), np.uint8, offset=header)

    X, y = read("images-idx3", 16).reshape(-1, 28, 28), read("labels-idx1", 8)
    if split == "test":
        return X, y
    chosen = np.random.RandomState(0).permutation(len(X))[:10_000]
    return X[chosen], y[chosen]


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """One of digits, fashion, wine, iris, breast_cancer; tables are standardised."""
    if name == "digits":
        digits = load_digits()
        return digits.images, digits.target
    if name == "fashion":
        return fashion_mnist()
    tables = {"wine": load_wine, "iris": load_iris, "breast_cancer": load_breast_cancer}
    X, y = tables[name](return_X_y=True)
    return StandardScaler().fit_transform(X), y


def thinned_digits(shares: np.ndarray) -> Callable:
    """Digits of which each class keeps a share, classes in random order."""

    def make(seed: int) -> tuple[np.ndarray, np.ndarray]:
        X, y = load("digits")
        rng = np.random.default_rng(seed)
        order, rows = rng.permutation(10), []
        for share, digit in zip(shares, order, strict=True):
            own = rng.permutation(np.flatnonzero(y == digit))
            rows.append(own[: round(share * len(own))])
        chosen = rng.permutation(np.concatenate(rows))
        return X[chosen], y[chosen]

    return make


def blobs(sizes: list[int], **options: object) -> Callable:
    """Gaussian blobs, drawn by seed."""
    return lambda seed: make_blobs(sizes, random_state=seed, **options)


def named(name: str) -> Callable:
    """A data set that is the same for every seed."""
    return lambda seed: load(name)
