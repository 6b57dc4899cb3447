"""The paper's protocol: what learned features are worth, told by simple classifiers on them."""

from __future__ import annotations

from functools import partial

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler


def knn_probe(
    n_neighbors: int = 10, sigma: float = 0.1, n_components: int | None = None
) -> Pipeline:
    """Weighted nearest neighbours of features, a scikit-learn classifier.

    A neighbour of cosine similarity c votes with weight ``exp(c / sigma)`` [1]_.

    Parameters
    ----------
    n_neighbors : int, default=10
        Neighbours that vote: the paper's number for CIFAR and SVHN [2]_.
    sigma : float, default=0.1
        Temperature of the weights, the paper's.
    n_components : int, default=None
        Principal components to compare in; the paper's 128 save time and memory where features
        are many. None compares the features.

    Returns
    -------
    Pipeline
        To ``fit`` on ``transform`` features of training data with their classes; ``score``
        with those of test data is the accuracy that the paper calls kNN.

    References
    ----------
    .. [1] Wu, Xiong, Yu, Lin. Unsupervised feature learning via non-parametric instance
       discrimination. CVPR 2018, section 3.4.
    .. [2] Asano, Rupprecht, Vedaldi. Self-labelling via simultaneous clustering and
       representation learning. ICLR 2020, section 4.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_sela.evaluation import knn_probe
    >>> X, y = load_digits(return_X_y=True)
    >>> round(knn_probe().fit(X[:1000], y[:1000]).score(X[1000:], y[1000:]), 2)
    0.96
    """
    reduced = [] if n_components is None else [PCA(n_components, random_state=0)]
    votes = partial(_votes, sigma=sigma)
    neighbors = KNeighborsClassifier(n_neighbors, weights=votes, algorithm="brute")
    return make_pipeline(*reduced, Normalizer(), neighbors)


def linear_probe(C: float = 1.0) -> Pipeline:
    """Logistic regression on standardised features, a scikit-learn classifier.

    The convex problem that the paper's linear classifiers approach by gradient steps, solved:
    no learning rate to tune.

    Parameters
    ----------
    C : float, default=1.0
        Inverse strength of the L2 penalty, as in ``LogisticRegression``.

    Returns
    -------
    Pipeline
        See :func:`knn_probe`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_sela.evaluation import linear_probe
    >>> X, y = load_digits(return_X_y=True)
    >>> linear_probe().fit(X[:1000], y[:1000]).score(X[1000:], y[1000:]) > 0.9
    True
    """
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))


def _votes(distances: np.ndarray, sigma: float) -> np.ndarray:
    """Weights of neighbours at these Euclidean distances on the unit sphere."""
    # d ** 2 = 2 - 2 c; a common factor changes no vote.
    return np.exp(-(distances**2) / (2 * sigma))
