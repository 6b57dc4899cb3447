"""Criteria for the number of clusters: which K each would choose, and how near the true one.

    python benchmarks/n_clusters.py                   # everything: about half an hour
    python benchmarks/n_clusters.py digits --seeds 1  # one data set
    python benchmarks/n_clusters.py digits iris --refined  # by score() of a fit for each K

Every criterion but the last two sees the same clusterings, those that n_clusters="auto" compares,
K = 2 to 25: heads on features of the first round. The last two are what people do without.
--refined is what a grid search without folds does: both rounds for each K, then ``score``.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Callable, Iterable
from typing import NoReturn

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs, make_moons
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_mutual_info_score,
    calinski_harabasz_score,
    cohen_kappa_score,
    davies_bouldin_score,
    mutual_info_score,
    silhouette_score,
)
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import cross_val_predict
from sklearn.preprocessing import StandardScaler, normalize

from datasets import load, named, thinned_digits
from heads import entropy
from sklearn_sela import SelfLabelClusterer, _recipe
from sklearn_sela._selection import Candidate
from sklearn_sela.metrics import information_score

NUMBERS = range(2, 26)


def blobs(sizes: Iterable[int], d: int, apart: float = 5.0) -> Callable:
    """Gaussians of variance 1 with centres drawn at random, at least ``apart`` apart."""

    def make(seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng, box = np.random.default_rng(seed), 10 if d < 4 else 6
        centers = rng.uniform(-box, box, (1, d))
        while len(centers) < len(list(sizes)):
            drawn = rng.uniform(-box, box, d)
            if np.linalg.norm(centers - drawn, axis=1).min() >= apart:
                centers = np.vstack([centers, drawn])
        return make_blobs(list(sizes), centers=centers, random_state=seed)

    return make


def classes(name: str, kept: list[int]) -> Callable:
    def make(seed: int) -> tuple[np.ndarray, np.ndarray]:
        X, y = load(name)
        rows = np.isin(y, kept)
        return X[rows], y[rows]

    return make


STUDIED = {  # what the score was chosen on
    "blobs 2": blobs([300, 700], 10),
    "blobs 3": blobs([500, 300, 100], 2),
    "blobs 4": blobs([400, 300, 200, 50], 5),
    "blobs 5": blobs([200] * 5, 2),
    "blobs 8": blobs([300, 250, 200, 150, 100, 80, 60, 40], 2, apart=4.5),
    "blobs 12": blobs([100] * 12, 10),
    "blobs 16": blobs(range(40, 200, 10), 8),
    "blobs 20": blobs(range(30, 230, 10), 15),
    "digits": named("digits"),
    "fashion": named("fashion"),
    "iris": named("iris"),
    "wine": named("wine"),
    "breast_cancer": named("breast_cancer"),
}
OTHERS = {  # looked at once it was
    "digits 0 to 4": classes("digits", [0, 1, 2, 3, 4]),
    "digits 6, 8, 9": classes("digits", [6, 8, 9]),
    "digits, 10 to 100 %": thinned_digits(np.linspace(1, 0.1, 10)),
    "digits, 10:1 tail": thinned_digits(10.0 ** (-np.arange(10) / 9)),
    "fashion 1, 5, 8, 9": classes("fashion", [1, 5, 8, 9]),
    "close blobs 6": blobs([300, 200, 200, 100, 100, 100], 6, apart=3.5),
    "close blobs 10": blobs([150] * 10, 4, apart=4.0),
    "moons": lambda seed: make_moons(1000, noise=0.07, random_state=seed),
}


def net_information(one: np.ndarray, two: np.ndarray) -> float:
    """Mutual information of two views' labels, less twice what they do not share."""
    shared = mutual_info_score(one, two)
    entropies = [entropy(np.bincount(labels) / len(labels)) for labels in (one, two)]
    return float(shared - 2 * (np.mean(entropies) - shared))


def prediction_strength(features: np.ndarray, k: int) -> float:
    """Least share of pairs of a cluster of one half that clusters of the other keep together.

    Tibshirani, Walther, J. Comput. Graph. Stat. 2005.
    """
    one, two = features[::2], features[1::2]
    other = KMeans(k, n_init=3, random_state=0).fit(one).predict(two)
    own = KMeans(k, n_init=3, random_state=0).fit(two).labels_
    counts = np.stack([np.bincount(other[own == c], minlength=k) for c in range(k)])
    sizes = counts.sum(1)
    pairs = (counts * (counts - 1)).sum(1)[sizes > 1] / (sizes * (sizes - 1))[sizes > 1]
    return float(pairs.min())


def probe(features: np.ndarray, labels: np.ndarray) -> float:
    """Agreement, beyond chance, of labels and their cross-validated linear prediction.

    After TURTLE (Gadetsky, Jiang, Brbic, ICML 2024), which chooses labels by it.
    """
    model = LogisticRegression(max_iter=100)
    return float(cohen_kappa_score(labels, cross_val_predict(model, features, labels, cv=3)))


def criteria(c: Candidate, points: np.ndarray) -> dict[str, float]:
    """All criteria of one clustering; higher is better."""
    features, k = normalize(c.features), c.k
    own, one, two = (p[c.best] for p in (c.own, c.one, c.two))
    labels, *views = own.argmax(1), one.argmax(1), two.argmax(1)
    several = len(np.unique(labels)) > 1
    equal = np.full(len(labels), 1 / len(labels))
    silhouette, agreement = c.silhouette(equal)[c.best], c.view_agreement(equal)[c.best]
    return {
        "score: S V^2 H": c.score(equal)[c.best],
        "S V^2": silhouette * agreement**2,
        "S V": silhouette * agreement,
        "S V H": silhouette * agreement * c.head_agreement,
        "S I": silhouette * information_score(own),
        "silhouette S": silhouette,
        "view agreement V": agreement,
        "head agreement H": c.head_agreement,
        "information I": information_score(own),
        "mean top probability": float(own.max(1).mean()),
        "AMI of views": adjusted_mutual_info_score(*views),
        "net information": net_information(*views),
        "prediction strength": prediction_strength(features, k),
        "linear probe": probe(features, labels) if several else 0.0,
        "Calinski-Harabasz": calinski_harabasz_score(features, labels) if several else 0.0,
        "Davies-Bouldin": -davies_bouldin_score(features, labels) if several else -np.inf,
        "S in PCA": silhouette_score(points[c.rows], labels) if several else 0.0,
    }


def without(points: np.ndarray) -> dict[str, dict[int, float]]:
    """The usual ways, in principal components."""
    some = points[np.random.default_rng(0).permutation(len(points))[:2000]]
    silhouettes, evidence = {}, {}
    for k in NUMBERS:
        labels = KMeans(k, n_init=3, random_state=0).fit_predict(some)
        silhouettes[k] = silhouette_score(some, labels)
        model = GaussianMixture(k, covariance_type="diag", random_state=0)
        evidence[k] = -model.fit(some).bic(some)
    return {"KMeans, silhouette": silhouettes, "Gaussian mixture, BIC": evidence}


class Compared(Exception):  # noqa: N818
    """Ends a fit once its candidates are known: the second round is not looked at."""


def compare(X: np.ndarray, seed: int) -> dict[str, int]:
    """The number that each criterion chooses."""
    flat = StandardScaler().fit_transform(X.reshape(len(X), -1)) if X.ndim == 2 else None
    flat = X.reshape(len(X), -1).astype(float) if flat is None else flat
    points = PCA(min(50, *flat.shape), random_state=0).fit_transform(flat)
    kept: list[Candidate] = []

    def keep(candidates: Iterable[Candidate], stage: object, seed: int) -> NoReturn:
        kept.extend(candidates)
        raise Compared

    _recipe.compare_n_clusters = keep
    with contextlib.suppress(Compared):
        SelfLabelClusterer("auto", random_state=seed).fit(X)
    table = pd.DataFrame([criteria(c, points) for c in kept], index=[c.k for c in kept])
    return {
        **table.idxmax().to_dict(),
        **{name: max(found, key=found.get) for name, found in without(points).items()},
    }


def refined(X: np.ndarray, seed: int, numbers: Iterable[int]) -> dict[str, int]:
    scores = {
        k: SelfLabelClusterer(k, random_state=seed).fit(X).score(X)
        for k in numbers
        if k < len(X) // 8
    }
    print("   ", {k: round(score, 3) for k, score in scores.items()}, flush=True)
    return {"score after refinement": max(scores, key=scores.get)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", default=[*STUDIED, *OTHERS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--refined", action="store_true")
    parser.add_argument("--from", dest="low", type=int, default=NUMBERS[0])
    parser.add_argument("--to", dest="high", type=int, default=NUMBERS[-1])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in options.data:
        make = {**STUDIED, **OTHERS}[name]
        start = time.perf_counter()
        for seed in range(options.seeds):
            X, y = make(seed)
            if options.refined:
                chosen = refined(X, seed, range(options.low, options.high + 1))
            else:
                chosen = compare(X, seed)
            true = len(np.unique(y))
            rows += [(name, true, seed, rule, k) for rule, k in chosen.items()]
        ours = " ".join(str(row[4]) for row in rows if row[0] == name and row[3][:5] == "score")
        seconds = time.perf_counter() - start
        print(f"{name:<22}true {true:>2}  by score {ours}  ({seconds:.0f} s)", flush=True)
    table = pd.DataFrame(rows, columns=["data", "true", "seed", "rule", "k"])
    table["off"] = (table.k - table.true).abs()
    for part, names in (("studied", STUDIED), ("others", OTHERS)):
        some = table[table.data.isin(names)]
        if some.empty:
            continue
        medians = some.pivot_table(index="rule", columns="data", values="k", aggfunc="median")
        medians = medians[[name for name in names if name in medians]].astype(int)
        off = some.groupby("rule").off
        for limit in (0, 1, 2):
            medians[f"<={limit}"] = off.apply(lambda o, limit=limit: (o <= limit).mean()).round(2)
        true = some.groupby("data").true.first()
        print(f"\n{part}: median K over seeds; share of fits within 0, 1, 2 of the true one")
        print(pd.concat([true.to_frame("true K").T, medians]).loc[["true K", *chosen]].to_string())


if __name__ == "__main__":
    main()
