"""A map of the learned features in two dimensions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from sklearn_sela._charts import COLOURS, axes_for
from sklearn_sela._images import Images
from sklearn_sela._inputs import rows_of

_FEW = 12  # dots of a map that a number would hide
_MAP_ROWS = 2_000  # samples of a map: a few seconds of t-SNE, and dots that do not hide each other


class FeatureMapDisplay:
    """A map of the learned features in two dimensions, coloured by cluster.

    Clusters that are islands are well apart in the features; what lies between them is
    doubtful. Distances between islands mean little in a t-SNE.

    Parameters
    ----------
    positions : ndarray of shape (n_shown, 2)
    labels : ndarray of int, shape (n_shown,)
    n_samples : int
        How many there are, if not all are shown.

    Attributes
    ----------
    points_ : matplotlib PathCollection
    texts_ : dict of int to matplotlib Annotation
        The number of each cluster, at the sample nearest to its median.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(self, positions: NDArray[Any], labels: NDArray[Any], n_samples: int):
        self.positions, self.labels, self.n_samples = positions, labels, n_samples

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        reduction: Any = "tsne",
        max_samples: int = _MAP_ROWS,
        ax: Any = None,
    ) -> FeatureMapDisplay:
        """``transform`` and ``predict`` of a fitted estimator; see :meth:`from_predictions`."""
        check_is_fitted(estimator)
        rows, model = rows_of(estimator, X, reset=False), estimator._model
        n, drawn = len(rows), _draw(np.arange(len(rows)), max_samples)
        rows = rows.take(drawn) if isinstance(rows, Images) else rows[drawn]
        features, labels = model.features(rows), model.labels(rows)
        known = labels >= 0
        return cls(_reduced(features[known], reduction), labels[known], n).plot(ax)

    @classmethod
    def from_predictions(
        cls,
        features: ArrayLike,
        labels: ArrayLike,
        *,
        reduction: Any = "tsne",
        max_samples: int = _MAP_ROWS,
        ax: Any = None,
    ) -> FeatureMapDisplay:
        """Any features and clusters.

        Parameters
        ----------
        features : array-like of shape (n_samples, n_features)
        labels : array-like of int, shape (n_samples,)
            Negative ones are left out.
        reduction : {"tsne", "pca"} or transformer, default="tsne"
            To two dimensions. t-SNE shows neighbourhoods, PCA distances; a transformer is one
            by its ``fit_transform``, such as UMAP.
        max_samples : int, default=2000
            Of more, as many are drawn at random, the same each time.
        ax : matplotlib Axes, default=None
        """
        check_consistent_length(features, labels)
        features, labels = np.asarray(features), np.asarray(labels)
        known = np.flatnonzero(labels >= 0)
        rows = _draw(known, max_samples)
        positions = _reduced(features[rows], reduction)
        return cls(positions, labels[rows], len(known)).plot(ax)

    def plot(self, ax: Any = None) -> FeatureMapDisplay:
        """Draw it, into ``ax`` or a new figure."""
        ax = axes_for(ax, type(self).__name__, (6.4, 6))
        from matplotlib.patheffects import withStroke

        colours = self._colours()
        size = float(np.clip(12_000 / len(self.labels), 6, 40))
        self.points_ = ax.scatter(
            *self.positions.T, c=[colours[c] for c in self.labels], s=size, linewidths=0, alpha=0.8
        )
        outline = [withStroke(linewidth=3, foreground="white")]
        clusters, counts = np.unique(self.labels, return_counts=True)
        self.texts_ = {
            int(cluster): ax.annotate(
                str(cluster),
                self._middle(cluster),
                xytext=(0, 0 if count >= _FEW else 9),  # beside a few dots, or it would hide them
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=13 if len(clusters) <= 15 else 9,
                fontweight="bold",
                path_effects=outline,
            )
            for cluster, count in zip(clusters, counts, strict=True)
        }
        ax.set(xticks=[], yticks=[], title="learned features, by cluster")
        if len(self.labels) < self.n_samples:
            ax.set_xlabel(f"{len(self.labels):,} of {self.n_samples:,} samples")
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _colours(self) -> dict[int, str]:
        """Of each cluster; beyond ten, that of the clusters that are farthest from it."""
        chosen: dict[int, str] = {}
        middles = {int(c): self._middle(c) for c in np.unique(self.labels)}
        for cluster, middle in middles.items():

            def distance(colour: str, middle: NDArray[Any] = middle) -> float:
                alike = [middles[c] for c, other in chosen.items() if other == colour]
                return min((float(np.linalg.norm(m - middle)) for m in alike), default=math.inf)

            chosen[cluster] = max(COLOURS, key=distance)
        return chosen

    def _middle(self, cluster: int) -> NDArray[Any]:
        """The sample of a cluster nearest to its median, which may lie between two islands."""
        own = self.positions[self.labels == cluster]
        return own[np.linalg.norm(own - np.median(own, axis=0), axis=1).argmin()]


def _draw(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of the rows, in order; the same each time."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:most])


def _reduced(x: NDArray[Any], reduction: Any) -> NDArray[Any]:
    """(n, 2) positions of features (n, d)."""
    if not isinstance(reduction, str):
        reduction = clone(reduction, safe=False)
    elif reduction == "pca":
        reduction = PCA(2, random_state=0)
    elif reduction == "tsne":
        perplexity = min(30, max(1, (len(x) - 1) / 3))
        reduction = TSNE(perplexity=perplexity, init="pca", random_state=0)
    else:
        raise ValueError(f"reduction={reduction!r} is unknown; use 'tsne', 'pca' or a transformer.")
    positions = np.asarray(reduction.fit_transform(x))
    if positions.shape != (len(x), 2):
        raise ValueError(
            f"reduction must give two dimensions, got shape {positions.shape} of {len(x)} samples."
        )
    return positions
