"""Pictures of a clustering, in the shape of scikit-learn's Display classes.

Each is made by ``from_estimator`` or from plain arrays, draws itself in ``plot(ax=)``, and keeps
what it drew. matplotlib (the extra ``plots``) is imported when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from sklearn_sela._inputs import rows_of

# Ten that stay apart for the colour-blind (Petroff, arXiv 2107.02270); more clusters share them.
_COLOURS = [
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
]  # fmt: skip
_BLUE, _GREY, _RED = _COLOURS[0], "#b0b0b0", _COLOURS[2]
_PAD = 1 / 12  # of an image's side, between two
_MOST_ROWS = 25  # clusters in a gallery, unless others are asked for
_MAP_ROWS = 2_000  # samples of a map: a few seconds of t-SNE, and dots that do not hide each other


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
            If the estimator was fitted on vectors.
        """
        check_is_fitted(estimator)
        if estimator.image_shape_ is None:
            raise ValueError(
                "A gallery shows images, but the estimator was fitted on vectors. If rows of X are "
                "images, fit with image_shape=(height, width); else see FeatureMapDisplay."
            )
        rows = rows_of(estimator, X, reset=False)
        labels, typicality = estimator.predict(X), estimator.confidence(X)
        make = cls._chosen(labels, typicality, n_images, clusters, estimator.n_clusters_)
        return make(lambda chosen: rows[chosen].reshape(-1, *estimator.image_shape_), ax, cmap)

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
        make = cls._chosen(
            labels, np.asarray(typicality), n_images, clusters, int(labels.max()) + 1
        )
        return make(lambda chosen: channels[chosen], ax, cmap)

    @classmethod
    def _chosen(
        cls,
        labels: NDArray[Any],
        typicality: NDArray[Any],
        n_images: int,
        clusters: Sequence[int] | None,
        n_clusters: int,
    ) -> Any:
        """A function that makes the display, of one that reads the images it needs."""
        sizes = np.bincount(labels[labels >= 0], minlength=n_clusters)
        if clusters is None:
            clusters = np.sort(np.argsort(-sizes, kind="stable")[:_MOST_ROWS]).tolist()
        n_least = n_images // 2
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

        def make(read: Any, ax: Any, cmap: str) -> ClusterGalleryDisplay:
            images = _as_pictures(read(chosen))
            of_rows = [int(sizes[c]) if c < len(sizes) else 0 for c in clusters]
            display = cls(images, shown, n_images, clusters, of_rows, n_clusters)
            return display.plot(ax, cmap=cmap)

        return make

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

        ratio = mosaic.shape[0] / mosaic.shape[1]
        ax = _axes(ax, type(self).__name__, (8.5, 7.2 * ratio + 0.9))
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


class TrainingCurveDisplay:
    """The loss by epoch, beside that of a network that has learned nothing.

    The loss, a cross-entropy, starts near ln K, that of equal probabilities for all K clusters,
    and falls as labels become predictable. A curve that stays at its ln K line has learned
    nothing; one that drops to 0 within an epoch or two has collapsed, or the clusters are too
    easy to tell. In the background, the share of samples whose label a solve changed: near 0
    when the clustering has settled.

    Parameters
    ----------
    history : DataFrame
        With columns epoch, stage, n_clusters, loss and changed: ``history_`` of an estimator.

    Attributes
    ----------
    loss_ : list of matplotlib Line2D
        Of each round.
    ln_k_ : list of matplotlib LineCollection
        The ln K line of each round.
    changed_ : matplotlib container
        Bars of the share of labels changed.
    ax_, changed_ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(self, history: pd.DataFrame):
        self.history = history

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> TrainingCurveDisplay:
        """That of a fitted estimator."""
        check_is_fitted(estimator)
        return cls(estimator.history_).plot(ax)

    def plot(self, ax: Any = None) -> TrainingCurveDisplay:
        """Draw it, into ``ax`` or a new figure."""
        ax = _axes(ax, type(self).__name__, (7, 4))
        behind = ax.twinx()
        ax.set_zorder(behind.get_zorder() + 1)
        ax.patch.set_visible(False)
        epoch = self.history.epoch + 1
        self.changed_ = behind.bar(epoch, self.history.changed, width=1, color="#e4e4e4")
        behind.set_ylim(0, 1)
        behind.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        behind.set_ylabel("labels changed (bars)", color="0.45")
        behind.tick_params(colors="0.45")
        self.loss_, self.ln_k_ = [], []
        highest = max(self.history.loss.max(), math.log(self.history.n_clusters.max()), 0.1)
        for _, part in self.history.groupby("stage", sort=False):
            k, at = int(part.n_clusters.iloc[0]), part.epoch + 1
            ends = at.min() - 0.5, at.max() + 0.5
            self.ln_k_.append(ax.hlines(math.log(k), *ends, colors=_RED, linestyles="dashed"))
            ax.text(ends[0] + 0.2, math.log(k) + 0.02 * highest, f"ln {k}", color=_RED)
            self.loss_ += ax.plot(at, part.loss, color=_BLUE, marker=".", linewidth=2)
            name = {"features": "learning features", "clusters": "clustering"}.get(
                part.stage.iloc[0], part.stage.iloc[0]
            )
            ax.text(np.mean(ends), 1.02, name, transform=ax.get_xaxis_transform(), ha="center")
            if ends[0] > 1:
                ax.axvline(ends[0], color="0.6", linewidth=1)
        ax.set(xlim=(0.5, epoch.max() + 0.5), ylim=(0, 1.12 * highest))
        ax.set(xlabel="epoch", ylabel="loss, in nats (line)")
        ax.xaxis.get_major_locator().set_params(integer=True)
        self.ax_, self.changed_ax_, self.figure_ = ax, behind, ax.figure
        return self


class ClusterSizesDisplay:
    """The size of each cluster, beside the size it was asked to have.

    Parameters
    ----------
    sizes : ndarray of shape (n_clusters,)
        Samples of each cluster.
    asked : ndarray of shape (n_clusters,) or None
        Samples that each should have.
    n_skipped : int, default=0
        Samples without a cluster, which are not shown.

    Attributes
    ----------
    bars_ : matplotlib BarContainer
    asked_ : matplotlib PathCollection or None
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(
        self, sizes: NDArray[np.int64], asked: NDArray[np.float64] | None, n_skipped: int = 0
    ):
        self.sizes, self.asked, self.n_skipped = sizes, asked, n_skipped

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any = None, *, ax: Any = None
    ) -> ClusterSizesDisplay:
        """Sizes of the training samples' clusters, or of those predicted of X."""
        check_is_fitted(estimator)
        labels = estimator.labels_ if X is None else estimator.predict(X)
        return cls.from_predictions(labels, estimator.cluster_sizes_, ax=ax)

    @classmethod
    def from_predictions(
        cls, labels: ArrayLike, cluster_sizes: ArrayLike | None = None, *, ax: Any = None
    ) -> ClusterSizesDisplay:
        """Sizes of any clusters.

        Parameters
        ----------
        labels : array-like of int, shape (n_samples,)
            Cluster of each sample; negative ones are left out, and counted.
        cluster_sizes : array-like of shape (n_clusters,), default=None
            Share that each should have.
        ax : matplotlib Axes, default=None
        """
        labels = np.asarray(labels)
        shares = None if cluster_sizes is None else np.asarray(cluster_sizes, dtype=np.float64)
        known = labels[labels >= 0]
        sizes = np.bincount(known, minlength=0 if shares is None else len(shares))
        if shares is not None and len(sizes) > len(shares):
            raise ValueError(
                f"labels go up to {len(sizes) - 1}, but cluster_sizes holds {len(shares)} shares."
            )
        asked = None if shares is None else len(known) * shares / shares.sum()
        return cls(sizes, asked, len(labels) - len(known)).plot(ax)

    def plot(self, ax: Any = None) -> ClusterSizesDisplay:
        """Draw it, into ``ax`` or a new figure."""
        k = len(self.sizes)
        ax = _axes(ax, type(self).__name__, (max(4.5, min(12, 0.45 * k + 2)), 3.6))
        clusters = np.arange(k)
        self.bars_ = ax.bar(clusters, self.sizes, color=_BLUE, label="predicted")
        self.asked_ = None
        if self.asked is not None:
            style = {"marker": "_", "s": max(30, 9000 / max(k, 8)), "color": "black"}
            self.asked_ = ax.scatter(clusters, self.asked, label="asked for", zorder=3, **style)
        ax.set(xlabel="cluster", ylabel="samples")
        if k <= 30:
            ax.set_xticks(clusters)
        ax.margins(x=0.02)
        ax.spines[["top", "right"]].set_visible(False)
        if self.asked is not None:
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, markerscale=0.5)
        if self.n_skipped:
            ax.set_xlabel(f"cluster ({self.n_skipped:,} samples without one are left out)")
        self.ax_, self.figure_ = ax, ax.figure
        return self


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
    texts_ : dict of int to matplotlib Text
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
        return cls.from_predictions(
            np.asarray(estimator.transform(X)),
            estimator.predict(X),
            reduction=reduction,
            max_samples=max_samples,
            ax=ax,
        )

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
        rng = np.random.default_rng(0)
        rows = np.sort(rng.permutation(known)[:max_samples])
        x = features[rows]
        if isinstance(reduction, str):
            if reduction not in ("tsne", "pca"):
                raise ValueError(
                    f"reduction={reduction!r} is unknown; use 'tsne', 'pca' or a transformer."
                )
            perplexity = min(30, max(1, (len(x) - 1) / 3))
            tsne = TSNE(perplexity=perplexity, init="pca", random_state=0)
            reduction = PCA(2, random_state=0) if reduction == "pca" else tsne
        positions = np.asarray(reduction.fit_transform(x))
        return cls(positions, labels[rows], len(known)).plot(ax)

    def plot(self, ax: Any = None) -> FeatureMapDisplay:
        """Draw it, into ``ax`` or a new figure."""
        ax = _axes(ax, type(self).__name__, (6.4, 6))
        from matplotlib.patheffects import withStroke

        colours = [_COLOURS[label % len(_COLOURS)] for label in self.labels]
        size = float(np.clip(12_000 / len(self.labels), 6, 40))
        self.points_ = ax.scatter(*self.positions.T, c=colours, s=size, linewidths=0, alpha=0.8)
        outline = [withStroke(linewidth=3, foreground="white")]
        clusters = np.unique(self.labels)
        self.texts_ = {
            int(cluster): ax.text(
                *self._middle(cluster),
                str(cluster),
                ha="center",
                va="center",
                fontsize=13 if len(clusters) <= 15 else 9,
                fontweight="bold",
                path_effects=outline,
            )
            for cluster in clusters
        }
        ax.set(xticks=[], yticks=[], title="learned features, by cluster")
        if len(self.labels) < self.n_samples:
            ax.set_xlabel(f"{len(self.labels):,} of {self.n_samples:,} samples")
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _middle(self, cluster: int) -> NDArray[Any]:
        """The sample of a cluster nearest to its median, which may lie between two islands."""
        own = self.positions[self.labels == cluster]
        return own[np.linalg.norm(own - np.median(own, axis=0), axis=1).argmin()]


def _axes(ax: Any, name: str, size: tuple[float, float]) -> Any:
    """Those to draw into, of a new figure unless some are given."""
    check_matplotlib_support(f"{name}.plot")
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def _as_pictures(images: NDArray[Any]) -> NDArray[np.float64]:
    """(n, C, H, W) of any numbers as grey (n, H, W) or colour (n, H, W, 3), from 0 to 1."""
    x = images.astype(np.float64)
    if len(x) and np.ptp(x) > 0:
        low, high = (0, 255) if images.dtype == np.uint8 else (x.min(), x.max())
        x = (x - low) / (high - low)
    return x.transpose(0, 2, 3, 1) if x.shape[1] == 3 else x.mean(1)
