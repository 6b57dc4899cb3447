"""What a fit warns of: each warning names what is wrong, and the remedy."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.callback
from sklearn.exceptions import ConvergenceWarning

from sklearn_sela._distributed import Shards
from sklearn_sela._labels import LABEL_TOL
from sklearn_sela._validation import cluster_sizes

_NO_CLUSTERS = 0.05  # best score, below which the number found means little
_NAMED = 10  # files, in a warning
_FAR = 0.1  # share of samples beyond the sizes asked for that is worth a warning
_INSIDE = tuple(str(Path(file).parent) for file in (__file__, sklearn.callback.__file__))


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn in the name of the line that called this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


@contextlib.contextmanager
def warnings_of_first(shards: Shards) -> Iterator[None]:
    """Of processes that fit together only the first warns: the others would say the same."""
    if shards.rank == 0:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def warn_of_duplicates(points: np.ndarray, n_clusters: int) -> None:
    """Of points (m, d) that cannot make as many clusters."""
    distinct = len(np.unique(points, axis=0))
    if distinct < n_clusters:
        warn_caller(
            f"X has, among the {len(points)} rows looked at, only {distinct} distinct rows, "
            f"fewer than n_clusters={n_clusters}: some clusters will split identical "
            "rows or stay empty. Lower n_clusters or look for constant data.",
            ConvergenceWarning,
        )


def warn_of_skipped(names: list[str], n: int) -> None:
    """Of images that could not be read."""
    if names:
        some = ", ".join(names[:_NAMED]) + ", ..." * (len(names) > _NAMED)
        warn_caller(
            f"{len(names)} of {n} images could not be read, and are labelled -1: {some}.",
            UserWarning,
        )


def warn_of_trouble(estimator: Any, interrupted: bool, marginal_error: float) -> None:
    """Of a fit that may not be what was asked for."""
    if interrupted:
        warn_caller(
            f"Training was interrupted; the estimator is as it was after the last complete "
            f"epoch, {estimator.n_iter_} of {estimator.max_epochs}.",
            ConvergenceWarning,
        )
    if marginal_error > 10 * LABEL_TOL:
        warn_caller(
            f"The last label solve stopped at marginal error {marginal_error:.2g}: cluster "
            f"sizes are off by as much. Raise reg={estimator.reg:g}.",
            ConvergenceWarning,
        )
    else:
        _warn_of_sizes(estimator)
    table = estimator.n_clusters_scores_
    if table is not None and table.score.max() < _NO_CLUSTERS:
        warn_caller(
            f"No number of clusters stands out: the best score is {table.score.max():.2g}, of "
            f"n_clusters={estimator.n_clusters_}. The data may have no clusters, or features that "
            "hide them.",
            ConvergenceWarning,
        )
    found = len(np.unique(estimator.labels_[estimator.labels_ >= 0]))
    if found == 1 < estimator.n_clusters_:
        warn_caller(
            "All samples are predicted into one cluster: the network cannot tell them "
            f"apart. Lower learning_rate={estimator.learning_rate:g}, raise max_epochs="
            f"{estimator.max_epochs}, set cluster_sizes='balanced', or scale the features.",
            ConvergenceWarning,
        )


def _warn_of_sizes(estimator: Any) -> None:
    """Of predictions far from the sizes asked for."""
    asked = cluster_sizes(estimator)
    if isinstance(asked, str):
        if asked == "learned":
            return
        asked = np.full(estimator.n_clusters_, 1 / estimator.n_clusters_)
    labels = estimator.labels_[estimator.labels_ >= 0]
    sizes = np.bincount(labels, minlength=estimator.n_clusters_)
    elsewhere = 0.5 * np.abs(sizes / sizes.sum() - asked).sum()
    if elsewhere > _FAR:
        warn_caller(
            f"{elsewhere:.0%} of the samples are predicted into other clusters than "
            f"cluster_sizes={estimator.cluster_sizes!r} asks for: sizes are {sizes.min()} to "
            f"{sizes.max()}. If the data are not like that, use cluster_sizes='learned'; else "
            f"raise max_epochs={estimator.max_epochs}.",
            ConvergenceWarning,
        )
