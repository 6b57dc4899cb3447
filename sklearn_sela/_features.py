"""k-means of what lies before learning, and of what a network has learned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
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
    """(n_heads, n) labels to start from: k-means on principal components, random, or given.

    Of the rows of the share.
    """
    share = geometry.share
    if isinstance(init, np.ndarray):
        return init
    if init == "random":  # and balanced, as in the paper
        balanced, rank = np.arange(len(share)) % n_clusters, share.shards.rank
        rngs = [np.random.default_rng([seed, t, rank][: 3 if rank else 2]) for t in range(n_heads)]
        return np.stack([rng.permutation(balanced) for rng in rngs])
    models = share.shards.first(
        lambda: [_k_means(geometry.points, n_clusters, seed + t, n_init=1) for t in range(n_heads)]
    )
    labels = np.empty((n_heads, len(share)), dtype=np.int64)
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
        self.share, self._d = geometry.share, network.heads.in_features
        rows = self.share.rows[geometry.reference]
        n_outputs = self._d + math.prod(network.shape)
        outputs = np.empty((len(rows), n_outputs), np.float32)
        for part, z in self._forward(rows):
            outputs[part] = z
        self._outputs = self.share.joined(outputs)
        self._mass, self._vectors = self.share.shards.first(self._spectrum)

    @property
    def features(self) -> np.ndarray:
        """(m, d) of the reference rows, of all processes."""
        return self._outputs[:, : self._d]

    @property
    def places(self) -> np.ndarray:
        """(m,) of the reference rows, among all rows of the fit."""
        return self.share.joined(self.share.places[self._geometry.reference])

    def of_reference(self, values: np.ndarray) -> np.ndarray:
        """(m, ...) of the reference rows, from (n, ...) of the rows of the share."""
        return self.share.joined(values[self._geometry.reference])

    def numbers(self, sample: np.ndarray) -> np.ndarray:
        """Of a sample of the reference rows, rising, those of the share: numbers in it."""
        sizes = self.share.shards.gather(len(self._geometry.reference))
        own = sample - sum(sizes[: self.share.shards.rank])
        return self._geometry.reference[own[(own >= 0) & (own < len(self._geometry.reference))]]

    def labels(self, k: int, n_heads: int, seed: int) -> np.ndarray:
        """(n_heads, n) labels of the rows of the share."""
        embeddings = self._embeddings(k, n_heads)
        models = self.share.shards.first(lambda: self._models(self._outputs, k, n_heads, seed))
        labels = np.empty((n_heads, len(self.share)), dtype=np.int64)
        for part, z in self._forward(self.share.rows):
            for row, model, embed in zip(labels, models, embeddings, strict=True):
                row[part] = model.predict(embed(z))
        return labels

    def sample_labels(self, k: int, n_heads: int, seed: int, sample: np.ndarray) -> np.ndarray:
        """(n_heads, len(sample)) labels of a sample of the reference rows."""
        models = self._models(self._outputs[sample], k, n_heads, seed)
        return np.stack([model.labels_ for model in models]).astype(np.int64)

    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Roots of the masses of the over-clusters, and the singular vectors on their side."""
        p = self._outputs[:, self._d :].astype(np.float64)
        mass = np.sqrt(np.maximum(p.sum(0), 1e-12))  # a dead cluster's is 0
        return mass, np.linalg.eigh((p / mass).T @ (p / mass))[1][:, ::-1]

    def _models(self, outputs: np.ndarray, k: int, n_heads: int, seed: int) -> list[KMeans]:
        return [
            _k_means(embed(outputs), k, seed + t, n_init=10)
            for t, embed in enumerate(self._embeddings(k, n_heads))
        ]

    def _embeddings(self, k: int, n_heads: int) -> list[Embedding]:
        d, consensus = self._d, self._vectors[:, :k] / self._mass[:, None]
        kinds: list[Embedding] = [
            lambda z: normalize(z[:, :d]),
            lambda z: normalize(z[:, d:] @ consensus).astype(np.float32),
            lambda z: np.sqrt(z[:, d:]),
        ]
        return [kinds[t % len(kinds)] for t in range(n_heads)]

    def _forward(self, indices: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
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
