"""Charts of a fit: its training curve, and the sizes of its clusters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted

# Ten that stay apart for the colour-blind (Petroff, arXiv 2107.02270); more clusters share them.
COLOURS = [
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
]  # fmt: skip
_BLUE, _RED = COLOURS[0], COLOURS[2]


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
        With columns epoch, stage, n_clusters, loss, changed and solver_iterations: ``history_`` of
        an estimator.

    Attributes
    ----------
    loss_ : list of matplotlib Line2D
        Of each round.
    ln_k_ : list of matplotlib LineCollection
        The ln K line of each round.
    changed_ : matplotlib container
        Bars of the share of labels changed, for epochs that began with a solve.
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
        ax = axes_for(ax, type(self).__name__, (7, 4))
        behind = ax.twinx()
        ax.set_zorder(behind.get_zorder() + 1)
        ax.patch.set_visible(False)
        epoch = self.history.epoch + 1
        solved = self.history.solver_iterations > 0  # others have no change to tell of
        bars = self.history[solved]
        self.changed_ = behind.bar(bars.epoch + 1, bars.changed, width=1, color="#e4e4e4")
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
        ax = axes_for(ax, type(self).__name__, (max(4.5, min(12, 0.45 * k + 2)), 3.6))
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


def axes_for(ax: Any, name: str, size: tuple[float, float]) -> Any:
    """Those to draw into, of a new figure unless some are given."""
    check_matplotlib_support(f"{name}.plot")
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]
