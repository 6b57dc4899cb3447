"""k-means of what lies before learning, and of what a network has learned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits
from torch import Tensor

from sklearn_sela._data import Geometry
from sklearn_sela._network import SelfLabelNetwork, inference

Embedding = Callable[[np.ndarray], np.ndarray]


def starting_labels(
    geometry: Geometry, n_clusters: int, n_heads: int, init: str | np.ndarray, seed: int
) -> np.ndarray:
    """(n_heads, n) labels to start from: k-means on principal components, random, or given."""
    n = len(geometry.rows)
    if isinstance(init, np.ndarray):
        return init
    if init == "random":  # and balanced, as in the paper
        balanced = np.arange(n) % n_clusters
        return np.stack(
            [np.random.default_rng([seed, t]).permutation(balanced) for t in range(n_heads)]
        )
    models = [_k_means(geometry.points, n_clusters, seed + t, n_init=1) for t in range(n_heads)]
    labels = np.empty((n_heads, n), dtype=np.int64)
    for part, points in geometry.chunks():
        for row, model in zip(labels, models, strict=True):
            row[part] = model.predict(points)
    return labels


class LearnedFeatures:
    """What an over-clustered network knows of the reference rows, and clusterings of it.

    k-means in three embeddings, in turn over the heads: the features, the consensus of the
    network's heads (the leading singular vectors of samples x over-clusters, as in bipartite
    spectral clustering: Dhillon, KDD 2001), and the square roots of its probabilities
    (Hellinger distance). They differ where the number of clusters leaves a choice; which is
    best is seen after refinement.
    """

    def __init__(self, network: SelfLabelNetwork, geometry: Geometry):
        self.network, self._geometry = network, geometry
        self._d = network.heads.in_features
        rows = torch.from_numpy(geometry.reference)
        self._outputs = np.concatenate([z for _, z in self._forward(rows)])
        p = self._outputs[:, self._d :].astype(np.float64)
        self._mass = np.sqrt(np.maximum(p.sum(0), 1e-12))  # a dead cluster's is 0
        self._vectors = np.linalg.eigh((p / self._mass).T @ (p / self._mass))[1][:, ::-1]

    @property
    def reference(self) -> np.ndarray:
        """(m,) indices of the reference rows."""
        return self._geometry.reference

    @property
    def features(self) -> np.ndarray:
        """(m, d) of the reference rows."""
        return self._outputs[:, : self._d]

    def labels(self, k: int, n_heads: int, seed: int) -> np.ndarray:
        """(n_heads, n) labels of all rows."""
        embeddings = self._embeddings(k, n_heads)
        models = [
            _k_means(embed(self._outputs), k, seed + t, n_init=10)
            for t, embed in enumerate(embeddings)
        ]
        n = len(self._geometry.rows)
        labels = np.empty((n_heads, n), dtype=np.int64)
        for part, z in self._forward(torch.arange(n)):
            for row, model, embed in zip(labels, models, embeddings, strict=True):
                row[part] = model.predict(embed(z))
        return labels

    def sample_labels(self, k: int, n_heads: int, seed: int, sample: np.ndarray) -> np.ndarray:
        """(n_heads, len(sample)) labels of a sample of the reference rows."""
        z = self._outputs[sample]
        models = [
            _k_means(embed(z), k, seed + t, n_init=10)
            for t, embed in enumerate(self._embeddings(k, n_heads))
        ]
        return np.stack([model.labels_ for model in models]).astype(np.int64)

    def _embeddings(self, k: int, n_heads: int) -> list[Embedding]:
        d, consensus = self._d, self._vectors[:, :k] / self._mass[:, None]
        kinds: list[Embedding] = [
            lambda z: normalize(z[:, :d]),
            lambda z: normalize(z[:, d:] @ consensus).astype(np.float32),
            lambda z: np.sqrt(z[:, d:]),
        ]
        return [kinds[t % len(kinds)] for t in range(n_heads)]

    def _forward(self, indices: Tensor) -> Iterator[tuple[slice, np.ndarray]]:
        network, rows = self.network, self._geometry.rows

        def batch(part: slice) -> Tensor:
            return rows[indices[part]]

        n_values = self._geometry.n_values
        for part, out in inference(network, network.describe, batch, len(indices), n_values):
            yield part, out.cpu().numpy()


def _k_means(points: np.ndarray, k: int, seed: int, n_init: int) -> KMeans:
    # One OpenMP thread: more would add up the centroids in the order they finish, and the
    # same seed would no longer give the same bits.
    with threadpool_limits(1, "openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicates: told once, by fit
        return KMeans(k, n_init=n_init, random_state=seed).fit(points)
