"""Rules to choose the head that predicts, by the accuracy of the head that each would choose.

    python benchmarks/heads.py                  # all data but Fashion-MNIST: about five minutes
    python benchmarks/heads.py digits fashion   # these

A rule sees what the estimator's own does: for each head, the joint distribution of the labels of
two random views of a row. Unequal sizes are where rules differ.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import torch

from datasets import blobs, named, thinned_digits
from sklearn_sela import SelfLabelClusterer, _recipe
from sklearn_sela._selection import silhouettes, unit_distances
from sklearn_sela.metrics import clustering_accuracy

_CORNERS = {"centers": [[0, 0, 0], [8, 0, 0], [0, 8, 0]]}
_WIDE = {"center_box": (-6, 6)}  # with cluster_std: blobs that overlap
DATA = {
    "digits": (named("digits"), 5),
    "fashion": (named("fashion"), 3),
    "wine": (named("wine"), 20),
    "iris": (named("iris"), 20),
    "breast_cancer": (named("breast_cancer"), 5),
    "digits, 100 % to 10 %": (thinned_digits(np.linspace(1, 0.1, 10)), 3),
    "digits, 10:1 tail": (thinned_digits(10.0 ** (-np.arange(10) / 9)), 3),
    "blobs 900/60/40": (blobs([900, 60, 40], **_CORNERS), 3),
    "blobs 700/200/100": (blobs([700, 200, 100], **_CORNERS), 3),
    "blobs 960/20/20": (blobs([960, 20, 20], **_CORNERS), 3),
    "blobs 1000 to 25, 10-d": (blobs([1000, 250, 100, 50, 25], n_features=10), 3),
    "blobs, equal": (blobs([333, 333, 334], **_CORNERS), 3),
    "overlapping 600/150/50": (blobs([600, 150, 50], n_features=5, cluster_std=3, **_WIDE), 6),
    "overlapping 500 to 50": (
        blobs([500, 200, 100, 50, 50], n_features=10, cluster_std=4, **_WIDE),
        6,
    ),
    "overlapping, 8 clusters": (
        blobs([300, 200, 100, 100, 50, 50, 30, 20], n_features=6, cluster_std=2, **_WIDE),
        6,
    ),
    "overlapping 900/100": (blobs([900, 100], n_features=4, cluster_std=3, **_WIDE), 6),
    "overlapping, equal": (blobs([200] * 5, n_features=5, cluster_std=3, **_WIDE), 6),
}


def entropy(p: np.ndarray) -> float:
    return float(-np.sum(p * np.log(np.where(p > 0, p, 1))))


def information(joint: np.ndarray) -> float:
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)


def normalised_information(joint: np.ndarray) -> float:
    return 2 * information(joint) / (entropy(joint.sum(0)) + entropy(joint.sum(1)))


def rand_index(joint: np.ndarray) -> float:
    """Adjusted for chance (Hubert, Arabie 1985), of a large sample."""
    both, one, two = (np.sum(p**2) for p in (joint, joint.sum(0), joint.sum(1)))
    return float((both - one * two) / ((one + two) / 2 - one * two))


def kappa(joint: np.ndarray) -> float:
    chance = float(joint.sum(0) @ joint.sum(1))
    return (np.trace(joint) - chance) / (1 - chance)


RULES = {
    "MI": information,
    "NMI": normalised_information,
    "ARI": rand_index,
    "kappa": kappa,
}


def main() -> None:
    warnings.simplefilter("ignore")
    joints: list[np.ndarray] = []
    choose = _recipe.choose_head

    def record(joint: torch.Tensor) -> int:
        joints.append(joint.numpy())
        return choose(joint)

    _recipe.choose_head = record
    rules = [*RULES, "S V^2", "ours", "best"]  # the silhouette times kappa squared
    print(f"{'data (fits)':<30}" + "".join(f"{rule:>8}" for rule in rules))
    regrets = []
    for name in sys.argv[1:] or [name for name in DATA if name != "fashion"]:
        make, seeds = DATA[name]
        rows = []
        for seed in range(seeds):
            X, y = make(seed)
            fitted = SelfLabelClusterer(len(np.unique(y)), random_state=seed).fit(X)
            ours, accuracies, separation = fitted.best_head_, [], []
            some = np.random.default_rng(0).permutation(len(X))[:2000]
            distances = unit_distances(fitted.transform(X[some]))
            for head in range(fitted.n_heads):
                fitted.best_head_ = head
                labels = fitted.predict(X)
                accuracies.append(clustering_accuracy(y, labels))
                separation.append(silhouettes(distances, labels[some]).mean())
            chosen = [
                int(np.argmax([rule(joint) for joint in joints[-1]])) for rule in RULES.values()
            ]
            agreement = np.array([kappa(joint) for joint in joints[-1]])
            chosen.append(int(np.argmax(separation * np.maximum(agreement, 0) ** 2)))
            rows.append([accuracies[head] for head in [*chosen, ours]] + [max(accuracies)])
        regrets += [[row[-1] - value for value in row] for row in rows]
        cells = "".join(f"{value:>8.3f}" for value in np.mean(rows, axis=0))
        print(f"{f'{name} ({seeds})':<30}{cells}", flush=True)
    print(f"{'mean regret':<30}" + "".join(f"{r:>8.3f}" for r in np.mean(regrets, axis=0)))


if __name__ == "__main__":
    main()
