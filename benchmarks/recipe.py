"""The default recipe beside KMeans and UMAP + GMM: quality and time, every fit a fresh process.

    python benchmarks/recipe.py                      # everything: about half an hour
    python benchmarks/recipe.py digits --seeds 2     # one data set
    python benchmarks/recipe.py digits --only sela --set n_views=4   # one change, measured

A fresh process is what a user's first fit is: UMAP compiles itself in it, torch starts up in
it. The column "again" is the time of a second fit in the same process, without either.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings

import numpy as np

DATASETS = {"digits": 5, "fashion": 3, "wine": 5, "iris": 5, "breast_cancer": 5}  # and seeds
METHODS = ("kmeans", "umap", "sela")


def build(method: str, k: int, seed: int, n_features: int, settings: dict):
    """An object with fit_predict; peers as in the literature's own recommendations."""
    if method == "sela":
        from sklearn_sela import SelfLabelClusterer

        return SelfLabelClusterer(k, random_state=seed, **settings)
    if method == "kmeans":
        from sklearn.cluster import KMeans

        return KMeans(k, n_init=10, random_state=seed)
    import umap
    from sklearn.mixture import GaussianMixture
    from sklearn.pipeline import make_pipeline

    d = min(10, n_features)
    reducer = umap.UMAP(n_neighbors=20, min_dist=0, n_components=d, random_state=seed)
    return make_pipeline(reducer, GaussianMixture(k, random_state=seed))


def measure(method: str, dataset: str, seed: int, settings: dict) -> dict:
    """Fit once (twice on digits, for the warm time) and score."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    from datasets import fashion_mnist, load
    from sklearn_sela.metrics import clustering_accuracy

    warnings.simplefilter("ignore")
    X, y = load(dataset)
    if method != "sela":
        X = X.reshape(len(X), -1)
    model = build(method, len(np.unique(y)), seed, np.prod(X.shape[1:]), settings)
    start = time.perf_counter()
    labels = model.fit_predict(X)
    out = {
        "seconds": time.perf_counter() - start,
        "acc": clustering_accuracy(y, labels),
        "nmi": normalized_mutual_info_score(y, labels),
        "ari": adjusted_rand_score(y, labels),
    }
    if dataset == "fashion" and method != "umap":
        X_test, y_test = fashion_mnist("test")
        X_test = X_test if method == "sela" else X_test.reshape(len(X_test), -1)
        out["test_acc"] = clustering_accuracy(y_test, model.predict(X_test))
    if dataset == "digits":
        start = time.perf_counter()
        model.fit_predict(X)
        out["again"] = time.perf_counter() - start
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="*", default=list(DATASETS))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--only", choices=METHODS)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = {}
    for item in options.set:
        name, _, value = item.partition("=")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    if options.one:
        method, dataset, seed = options.one
        print(json.dumps(measure(method, dataset, int(seed), settings)))
        return
    for dataset in options.datasets:
        for method in [options.only] if options.only else METHODS:
            runs = []
            for seed in range(options.seeds or DATASETS[dataset]):
                command = [sys.executable, __file__, "--one", method, dataset, str(seed)]
                command += ["--set", *options.set] if options.set and method == "sela" else []
                environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
                done = subprocess.run(
                    command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                )
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            values = {key: np.array([run[key] for run in runs]) for key in runs[0]}
            summary = "  ".join(f"{key} {np.median(v):.3f}" for key, v in values.items())
            every = " ".join(f"{a:.3f}" for a in values["acc"])
            print(f"{dataset:<14}{method:<7} {summary}  |  acc by seed {every}", flush=True)


if __name__ == "__main__":
    main()
