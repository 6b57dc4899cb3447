"""Clusters of unequal sizes: learned and balanced sizes, and the peers, on thinned digits.

    python benchmarks/sizes.py              # three data sets, five seeds: five minutes or so
    python benchmarks/sizes.py fashion --only "learned sizes" --seeds 1

The number of clusters is given to all but HDBSCAN, which finds its own; its noise counts as a
cluster of its own. "confident" is the accuracy of the 80 % of samples with the highest
``confidence``, all of them by the same match of clusters to classes.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.mixture import GaussianMixture

from datasets import named, thinned_digits
from sklearn_sela import SelfLabelClusterer
from sklearn_sela.metrics import clustering_accuracy

DATA = {
    "digits, 10 to 100 %": thinned_digits(np.linspace(1, 0.1, 10)),
    "digits, 10:1 tail": thinned_digits(10.0 ** (-np.arange(10) / 9)),
    "digits": named("digits"),
    "fashion": named("fashion"),
}


def umap_of(X: np.ndarray, seed: int) -> np.ndarray:
    import umap

    reducer = umap.UMAP(n_neighbors=20, min_dist=0, n_components=10, random_state=seed)
    return reducer.fit_transform(X)


def sela(sizes: str) -> Callable:
    def labels(X: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        fitted = SelfLabelClusterer(10, cluster_sizes=sizes, random_state=seed).fit(X)
        return fitted.labels_, fitted.confidence(X)

    return labels


def flat(method: Callable) -> Callable:
    return lambda X, seed: (method(X.reshape(len(X), -1), seed), None)


METHODS = {
    "learned sizes": sela("learned"),
    "balanced sizes": sela("balanced"),
    "KMeans": flat(lambda X, seed: KMeans(10, n_init=10, random_state=seed).fit_predict(X)),
    "UMAP + GMM": flat(
        lambda X, seed: GaussianMixture(10, random_state=seed).fit_predict(umap_of(X, seed))
    ),
    "HDBSCAN": flat(lambda X, seed: HDBSCAN(min_cluster_size=10, copy=True).fit_predict(X)),
    "UMAP + HDBSCAN": flat(
        lambda X, seed: HDBSCAN(min_cluster_size=10, copy=True).fit_predict(umap_of(X, seed))
    ),
}


def right(y: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which samples are in the class that their cluster is matched to."""
    table = contingency_matrix(y, labels)
    classes, clusters = linear_sum_assignment(table, maximize=True)
    match = dict(zip(np.unique(labels)[clusters], np.unique(y)[classes], strict=True))
    return np.array([match.get(label) == true for label, true in zip(labels, y, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", default=[name for name in DATA if name != "fashion"])
    parser.add_argument("--only", choices=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'data':<22}{'method':<16}{'ACC':>6}{'NMI':>6}{'worst':>7}{'confident':>11}{'s':>6}")
    for name in options.data:
        make = DATA[name]
        for method in [options.only] if options.only else METHODS:
            fit, rows = METHODS[method], []
            for seed in range(options.seeds):
                X, y = make(seed)
                start = time.perf_counter()
                labels, confidence = fit(X, seed)
                seconds, sure = time.perf_counter() - start, np.nan
                if confidence is not None:
                    top = np.argsort(-confidence, kind="stable")[: round(0.8 * len(y))]
                    sure = right(y, labels)[top].mean()
                nmi = normalized_mutual_info_score(y, labels)
                rows.append((clustering_accuracy(y, labels), nmi, sure, seconds))
            acc, nmi, sure, seconds = np.median(rows, axis=0)
            worst = min(row[0] for row in rows)
            print(
                f"{name:<22}{method:<16}{acc:>6.3f}{nmi:>6.3f}{worst:>7.3f}{sure:>11.3f}"
                f"{seconds:>6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
