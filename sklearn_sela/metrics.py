"""Scores of a clustering, with and without the true classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
)
from sklearn.metrics.cluster import contingency_matrix
from sklearn.pipeline import Pipeline


def clustering_accuracy(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    """Share of samples in the right class under the best one-to-one match of clusters.

    Parameters
    ----------
    labels_true : array-like of shape (n_samples,)
        Classes.
    labels_pred : array-like of shape (n_samples,)
        Clusters; a cluster beyond the number of classes matches none.

    Returns
    -------
    float
        Between 0 and 1 (ACC in the literature; Hungarian matching: Kuhn 1955).

    Examples
    --------
    >>> from sklearn_sela.metrics import clustering_accuracy
    >>> clustering_accuracy([0, 0, 1, 1], [1, 1, 0, 2])
    0.75
    """
    table = contingency_matrix(labels_true, labels_pred)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / table.sum())


def clustering_report(labels_true: ArrayLike, labels_pred: ArrayLike) -> dict[str, float]:
    """What the papers print of a clustering whose classes are known.

    Parameters
    ----------
    labels_true, labels_pred : array-like of shape (n_samples,)
        Classes and clusters.

    Returns
    -------
    dict of str to float
        ``ACC``, :func:`clustering_accuracy`; ``NMI``, normalised mutual information; ``aNMI``,
        adjusted for chance; ``ARI``, the adjusted Rand index: the last three by scikit-learn.

    Examples
    --------
    >>> from sklearn_sela.metrics import clustering_report
    >>> clustering_report([0, 0, 1, 1], [1, 1, 0, 0])
    {'ACC': 1.0, 'NMI': 1.0, 'aNMI': 1.0, 'ARI': 1.0}
    """
    scores = {
        "ACC": clustering_accuracy,
        "NMI": normalized_mutual_info_score,
        "aNMI": adjusted_mutual_info_score,
        "ARI": adjusted_rand_score,
    }
    return {name: float(score(labels_true, labels_pred)) for name, score in scores.items()}


def information_score(proba: ArrayLike) -> float:
    """Information that cluster probabilities carry about the samples, over its maximum.

    ``(H(mean of p) - mean of H(p)) / log K``: 1 for K equal clusters of which every sample is
    sure, 0 if all samples get the same probabilities (or K = 1).

    Parameters
    ----------
    proba : array-like of shape (n_samples, n_clusters)
        Rows that sum to one, as from ``predict_proba``.

    Returns
    -------
    float
        Between 0 and 1. The quantity that SeLa's equal sizes maximise (Asano et al., ICLR
        2020; Bridle et al., NeurIPS 1991).
    """
    p = np.asarray(proba, dtype=np.float64)
    if p.shape[1] == 1:
        return 0.0

    def entropy(q: np.ndarray) -> np.ndarray:
        return -np.sum(q * np.log(np.where(q > 0, q, 1.0)), axis=-1)

    information = entropy(p.mean(0)) - entropy(p).mean()
    return float(np.clip(information / np.log(p.shape[1]), 0.0, 1.0))


def silhouette_scorer(estimator: Any, X: Any, y: Any = None) -> float:
    """Mean silhouette of the clusters in the learned features, as ``scoring=`` of a search.

    Parameters
    ----------
    estimator : SelfLabelClusterer or Pipeline that ends in one
        Fitted.
    X : array-like
        What its ``predict`` takes.
    y : Ignored

    Returns
    -------
    float
        At most 1; see :meth:`sklearn_sela.SelfLabelClusterer.criteria`. This, and those that
        follow, find the number of clusters less often than the estimator's own ``score``,
        which combines them.
    """
    return _criterion(estimator, X, "silhouette")


def view_agreement_scorer(estimator: Any, X: Any, y: Any = None) -> float:
    """Cohen's kappa between the labels of two views: see :func:`silhouette_scorer`."""
    return _criterion(estimator, X, "view_agreement")


def head_agreement_scorer(estimator: Any, X: Any, y: Any = None) -> float:
    """Adjusted mutual information between heads: see :func:`silhouette_scorer`."""
    return _criterion(estimator, X, "head_agreement")


def information_scorer(estimator: Any, X: Any, y: Any = None) -> float:
    """:func:`information_score` of the predictions: see :func:`silhouette_scorer`."""
    return _criterion(estimator, X, "information")


def _criterion(estimator: Any, X: Any, name: str) -> float:
    estimator = getattr(estimator, "best_estimator_", estimator)  # of a search
    if isinstance(estimator, Pipeline):
        if len(estimator) > 1:
            X = estimator[:-1].transform(X)
        estimator = estimator[-1]
    if not hasattr(estimator, "criteria"):
        raise TypeError(
            f"The scorer needs a SelfLabelClusterer or a Pipeline that ends in one, not "
            f"{type(estimator).__name__}."
        )
    return float(estimator.criteria(X)[name])
