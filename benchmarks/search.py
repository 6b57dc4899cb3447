"""What comparing eight numbers of clusters costs, in fits of digits.

    python benchmarks/search.py

All in one process, after a first fit that is not counted. The grid searches have one split, of
all samples to fit and the same to score, and no refit: eight fits, as cross-validation has eight
a fold.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import numpy as np
from sklearn.model_selection import GridSearchCV

from datasets import load
from sklearn_sela import SelfLabelClusterer

NUMBERS = list(range(6, 14))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    X, _ = load("digits")
    every = [(np.arange(len(X)), np.arange(len(X)))]

    def grid(memory: str | None) -> GridSearchCV:
        estimator = SelfLabelClusterer(random_state=0, memory=memory)
        return GridSearchCV(estimator, {"n_clusters": NUMBERS}, cv=every, refit=False).fit(X)

    def one() -> object:
        return SelfLabelClusterer(10, random_state=0).fit(X)

    one()
    fits = [seconds(one) for _ in range(2)]
    path = seconds(lambda: SelfLabelClusterer(NUMBERS, random_state=0).fit(X))
    auto = seconds(lambda: SelfLabelClusterer("auto", random_state=0).fit(X))
    with tempfile.TemporaryDirectory() as folder:
        shared = seconds(lambda: grid(folder))
    alone = seconds(lambda: grid(None))
    fits.append(seconds(one))
    fit = float(np.median(fits))
    print(f"one fit, K = 10                          {fit:5.1f} s")
    for name, took in {
        "n_clusters=range(6, 14)": path,
        'n_clusters="auto", 24 numbers': auto,
        "GridSearchCV over 8, with memory": shared,
        "GridSearchCV over 8": alone,
    }.items():
        print(f"{name:<40} {took:5.1f} s  {took / fit:4.1f} fits")


if __name__ == "__main__":
    main()
