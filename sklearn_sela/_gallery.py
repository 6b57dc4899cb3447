"""A gallery: what the images of each cluster look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from sklearn_sela._charts import axes_for
from sklearn_sela._inputs import rows_of

_PAD = 1 / 12  # of an image's side, between two
_SIDE = 0.6  # inches of an image, at most
_MOST_ROWS = 25  # clusters in a gallery, unless others are asked for


class ClusterGalleryDisplay:
    """A row of images for each cluster: its most typical ones, and, apart, its least typical.

    Left, what a cluster is; right, where it may be wrong.

    Parameters
    ----------
    images : ndarray of shape (n_shown, height, width) or (n_shown, height, width, 3)
        The images that are shown.
    shown : ndarray of int, shape (n_rows, n_columns)
        Which of them, by place; -1 for none.
    n_most : int
        Columns of the most typical ones; the others hold the least typical.
    clusters : sequence of int
        Cluster of each row.
    sizes : sequence of int
        Samples of each.
    n_clusters : int
        How many there are, if not all are shown.

    Attributes
    ----------
    image_ : matplotlib AxesImage
        Of all images, side by side.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(
        self,
        images: NDArray[Any],
        shown: NDArray[np.int64],
        n_most: int,
        clusters: Sequence[int],
        sizes: Sequence[int],
        n_clusters: int,
    ):
        self.images, self.shown, self.n_most = images, shown, n_most
        self.clusters, self.sizes, self.n_clusters = clusters, sizes, n_clusters

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        n_images: int = 10,
        clusters: Sequence[int] | None = None,
        cmap: str = "gray",
        ax: Any = None,
    ) -> ClusterGalleryDisplay:
        """The clusters that a fitted estimator predicts.

        Parameters
        ----------
        estimator : SelfLabelClusterer
            Fitted on images.
        X : as ``predict`` takes it
            Arrays, files or a Dataset. Of files, what is shown is read twice: once to predict.
        n_images : int, default=10
            Most typical images of each cluster; half as many least typical ones. Typical is
            what has a high ``confidence``: heads that started differently agree on it.
        clusters : sequence of int, default=None
            Which to show; None is all, or the 25 largest.
        cmap : str, default="gray"
            Of grey images; "gray_r" shows ink on paper.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Raises
        ------
        ValueError
            If the estimator was fitted on vectors, and for clusters that it has not.
        """
        check_is_fitted(estimator)
        if estimator.image_shape_ is None:
            raise ValueError(
                "A gallery shows images, but the estimator was fitted on vectors. If rows of X are "
                "images, fit with image_shape=(height, width); else see FeatureMapDisplay."
            )
        rows, model = rows_of(estimator, X, reset=False), estimator._model
        labels, typicality = model.labels(rows), model.confidence(rows)

        def read(chosen: NDArray[np.int64]) -> NDArray[Any]:
            return rows[chosen].reshape(-1, *estimator.image_shape_)

        of = labels, typicality, estimator.n_clusters_, n_images, clusters
        return cls._of(read, *of).plot(ax, cmap=cmap)

    @classmethod
    def from_predictions(
        cls,
        images: ArrayLike,
        labels: ArrayLike,
        typicality: ArrayLike,
        *,
        n_images: int = 10,
        clusters: Sequence[int] | None = None,
        cmap: str = "gray",
        ax: Any = None,
    ) -> ClusterGalleryDisplay:
        """Any clusters of images.

        Parameters
        ----------
        images : array-like of shape (n_samples, height, width) or (n_samples, channels, h, w)
        labels : array-like of int, shape (n_samples,)
            Cluster of each; negative ones are left out.
        typicality : array-like of shape (n_samples,)
            How typical of its cluster each is: probabilities, say, or minus distances.
        n_images, clusters, cmap, ax
            See :meth:`from_estimator`.

        Raises
        ------
        ValueError
            For arrays of other shapes, or of lengths that differ.
        """
        check_consistent_length(images, labels, typicality)
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim not in (3, 4):
            raise ValueError(
                f"images must be (n, height, width) or (n, channels, height, width), got shape "
                f"{images.shape}."
            )
        channels = images if images.ndim == 4 else images[:, None]
        of = labels, np.asarray(typicality), int(labels.max()) + 1, n_images, clusters
        return cls._of(lambda chosen: channels[chosen], *of).plot(ax, cmap=cmap)

    @classmethod
    def _of(
        cls,
        read: Callable[[NDArray[np.int64]], NDArray[Any]],
        labels: NDArray[Any],
        typicality: NDArray[Any],
        n_clusters: int,
        n_images: int,
        clusters: Sequence[int] | None,
    ) -> ClusterGalleryDisplay:
        """The display, of the images that ``read(indices)`` gives, (n, channels, height, width)."""
        if n_images < 1:
            raise ValueError(f"n_images must be 1 or more, got {n_images!r}.")
        if not (labels >= 0).any():
            raise ValueError("labels hold no cluster: all of them are negative.")
        sizes = np.bincount(labels[labels >= 0], minlength=n_clusters)
        if clusters is None:
            clusters = np.sort(np.argsort(-sizes, kind="stable")[:_MOST_ROWS]).tolist()
        if unknown := [c for c in clusters if not 0 <= c < n_clusters]:
            raise ValueError(f"clusters={unknown} are unknown; there are 0 to {n_clusters - 1}.")
        n_least = min(n_images // 2, max(0, int(sizes[clusters].max()) - n_images))
        places = np.full((len(clusters), n_images + n_least), -1)
        for row, cluster in zip(places, clusters, strict=True):
            members = np.flatnonzero(labels == cluster)
            members = members[np.argsort(-typicality[members], kind="stable")]
            most = members[:n_images]
            least = members[max(n_images, len(members) - n_least) :]
            row[: len(most)] = most
            row[len(row) - len(least) :] = least
        chosen = np.unique(places[places >= 0])
        shown = np.where(places < 0, -1, np.searchsorted(chosen, places))
        images, of_rows = _as_pictures(read(chosen)), sizes[clusters].tolist()
        return cls(images, shown, n_images, clusters, of_rows, n_clusters)

    def plot(self, ax: Any = None, *, cmap: str = "gray") -> ClusterGalleryDisplay:
        """Draw it, into ``ax`` or a new figure; ``cmap`` is that of grey images."""
        n_rows, n_columns = self.shown.shape
        height, width = self.images.shape[1:3]
        pad = max(1, round(_PAD * max(height, width)))
        gap = width // 2 if n_columns > self.n_most else 0  # between the most and the least typical
        high, wide = height + pad, width + pad
        lefts = np.array([j * wide + gap * (j >= self.n_most) for j in range(n_columns)])
        mosaic = np.full((n_rows * high - pad, lefts[-1] + width, *self.images.shape[3:]), np.nan)
        for i, j in zip(*np.nonzero(self.shown >= 0), strict=True):
            place = np.s_[i * high : i * high + height, lefts[j] : lefts[j] + width]
            mosaic[place] = self.images[self.shown[i, j]]
        if mosaic.ndim == 3:  # nothing, in colour, is transparent
            opaque = np.isfinite(mosaic[..., :1]).astype(float)
            mosaic = np.concatenate([np.nan_to_num(mosaic), opaque], 2)

        scale = min(7.2 / mosaic.shape[1], _SIDE / max(height, width))  # inches of a pixel
        size = max(3.5, 1.3 + scale * mosaic.shape[1]), 0.9 + scale * mosaic.shape[0]
        ax = axes_for(ax, type(self).__name__, size)
        self.image_ = ax.imshow(mosaic, cmap=cmap, interpolation="nearest")
        names = [f"{c}: {n:,}" for c, n in zip(self.clusters, self.sizes, strict=True)]
        ax.set_yticks([i * high + (height - 1) / 2 for i in range(n_rows)], names)
        ax.set_ylabel("cluster: samples")
        ax.xaxis.tick_top()
        halves = [lefts[: self.n_most], lefts[self.n_most :]]
        labels = ["most typical", "least typical"]
        ax.set_xticks(
            [half.mean() + width / 2 for half in halves if len(half)], labels[: 1 + (gap > 0)]
        )
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        if len(self.clusters) < self.n_clusters:
            ax.set_xlabel(f"{len(self.clusters)} of {self.n_clusters} clusters")
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _as_pictures(images: NDArray[Any]) -> NDArray[np.float64]:
    """(n, C, H, W) of any numbers as grey (n, H, W) or colour (n, H, W, 3), from 0 to 1."""
    x = images.astype(np.float64)
    if len(x) and np.ptp(x) > 0:
        low, high = (0, 255) if images.dtype == np.uint8 else (x.min(), x.max())
        x = (x - low) / (high - low)
    return x.transpose(0, 2, 3, 1) if x.shape[1] == 3 else x.mean(1)
