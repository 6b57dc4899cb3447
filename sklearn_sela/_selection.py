"""How many clusters: what makes a clustering a good one, and the number that makes the best.

No class is seen. A good clustering is separated in the features, found again in another view
of each row, and found by the other heads, which started differently. Each alone fails: the
silhouette favours small clusters, agreement few. docs/n_clusters.rst compares their product
with other criteria.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import adjusted_mutual_info_score, euclidean_distances, silhouette_samples
from sklearn.preprocessing import normalize
from torch import nn

from sklearn_sela._features import LearnedFeatures
from sklearn_sela._heads import choose_head, cohen_kappa, start_at_centroids, target_sizes
from sklearn_sela._journal import Stage
from sklearn_sela._labels import SelfLabels
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._training import Ended, Schedule, self_label
from sklearn_sela._views import FrozenViews, ViewStream

SCORED_ROWS = 2_000  # of those below: their silhouettes need the distances of all pairs
SAMPLED_ROWS = 5_000  # that stand for all in a score, and in the comparison of candidates
_VIEWS = 4  # of each row, that the heads of a candidate learn from
_EPOCHS = 10  # in which they do
_TRIALS = 500  # for the support of a candidate


def combined_score(silhouette: Any, view_agreement: Any, head_agreement: Any) -> Any:
    """The score of a clustering from what speaks for it, elementwise; higher is better."""
    factors = (
        np.maximum(silhouette, 0),
        np.maximum(view_agreement, 0),
        np.maximum(head_agreement, 0),
    )
    return factors[0] * factors[1] ** 2 * factors[2]


def unit_distances(features: np.ndarray) -> np.ndarray:
    """(n, n) Euclidean distances of features (n, d) brought to unit length."""
    return euclidean_distances(normalize(features))


def silhouettes(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) silhouettes (Rousseeuw, J. Comput. Appl. Math. 1987) from distances (n, n).

    0 where all labels are the same, or all differ.
    """
    if not 1 < len(np.unique(labels)) < len(labels):
        return np.zeros(len(labels))
    return silhouette_samples(distances, labels, metric="precomputed")


def head_agreement(labels: np.ndarray, best: int) -> float:
    """Adjusted mutual information of the best head's labels with each other's, mean; or 1.

    labels is (n_heads, n). Adjusted for chance (Vinh, Epps, Bailey, JMLR 2010), by which many
    clusters agree more.
    """
    others = np.delete(labels, best, axis=0)
    if not len(others):
        return 1.0
    return float(np.mean([adjusted_mutual_info_score(labels[best], other) for other in others]))


@dataclass
class Candidate:
    """Heads of one number of clusters k, and what they say of the n scored rows.

    Rows and features are there for who studies other criteria (benchmarks/n_clusters.py).
    """

    k: int
    rows: np.ndarray  # (n,) where they are among those of the fit
    features: np.ndarray  # (n, d)
    distances: np.ndarray  # (n, n) between them
    own: np.ndarray  # (n_heads, n, k) probabilities,
    one: np.ndarray  # those of a view of each row,
    two: np.ndarray  # and of another
    best: int  # the head that would predict

    def __post_init__(self) -> None:
        labels = self.own.argmax(2)
        self.silhouettes = np.stack([silhouettes(self.distances, head) for head in labels])
        self.head_agreement = head_agreement(labels, self.best)

    def silhouette(self, weights: np.ndarray) -> np.ndarray:
        """(n_heads, ...) mean silhouettes under weights of the rows (..., n) that sum to one."""
        return self.silhouettes @ weights.T

    def view_agreement(self, weights: np.ndarray) -> np.ndarray:
        """(n_heads, ...) Cohen's kappa of the labels of two views, likewise."""
        observed = (self.one * self.two).sum(2) @ weights.T
        return cohen_kappa(observed, ((weights @ self.one) * (weights @ self.two)).sum(-1))

    def score(self, weights: np.ndarray) -> np.ndarray:
        """(n_heads, ...) likewise."""
        found = self.silhouette(weights), self.view_agreement(weights), self.head_agreement
        return combined_score(*found)


def train_candidates(
    learned: LearnedFeatures,
    views: ViewStream,
    numbers: list[int],
    label: Callable[[np.ndarray, np.ndarray, float, int], SelfLabels],
    schedule: Schedule,
    generator: torch.Generator,
    seed: int,
) -> Iterator[Candidate]:
    """Heads for each number of clusters, trained on the learned features, held fixed.

    ``label(labels, weights, pull, n_views)`` makes the labels that the heads learn.
    """
    n_heads, device = learned.network.shape[0], generator.device
    rng = np.random.default_rng(seed)
    features = learned.features
    sample = np.sort(rng.permutation(len(features))[:SAMPLED_ROWS])
    scored = np.sort(rng.permutation(len(sample))[:SCORED_ROWS])
    rows = torch.from_numpy(learned.numbers(sample)).to(device)
    features = features[sample]
    embed, n_views = learned.network.eval().embed, _VIEWS + 2
    share, batch_rows = learned.share, schedule.label_rows
    frozen = FrozenViews(embed, views, rows, share, n_views, batch_rows, generator)
    seen = [frozen.features[v, scored] for v in (-1, -2)]
    frozen.features = frozen.features[:-2]  # a view that taught would flatter
    seen.append(torch.from_numpy(features[scored]).to(device))
    schedule = replace(schedule, epochs=_EPOCHS, n_views=0, n_solves=None)
    scored_rows, scored_features = learned.places[sample[scored]], features[scored]
    distances = unit_distances(scored_features)
    for k in numbers:
        generator.manual_seed(seed)  # a candidate's score does not depend on the others
        labels = learned.sample_labels(k, n_heads, seed, sample)
        labels, weights, pull = target_sizes(labels, k, "learned")
        heads = SelfLabelNetwork(nn.Identity(), features.shape[1], n_heads, k).to(device)
        start_at_centroids(heads, features, labels)
        state = label(labels, weights, pull, 0)
        for _ in self_label(heads, frozen, state, schedule, generator):
            pass  # nobody needs to know how these epochs went
        with torch.no_grad():
            p = [heads.eval()(x).double().softmax(2).transpose(0, 1) for x in seen]
        best = choose_head(p[0].transpose(1, 2) @ p[1] / len(scored))
        one, two, own = (x.cpu().numpy() for x in p)
        yield Candidate(k, scored_rows, scored_features, distances, own, one, two, best)


def compare_n_clusters(
    candidates: Iterator[Candidate], stage: Stage, seed: int
) -> tuple[pd.DataFrame | None, Ended]:
    """A row per candidate: n_clusters, score, its three factors, and support.

    The score is the predicting head's. Support is the share of trials in which the candidate
    scores best, on a resample of the rows (bootstrap: Efron, Ann. Stat. 1979) and by any head
    of each: heads differ where another start would. Cut short, the table is of those compared
    until then, None if there are none.
    """
    table: list[dict] = []
    trials: list[np.ndarray] = []
    rng = np.random.default_rng(seed)
    ended = Ended.COMPLETE
    try:
        for candidate in stage.each(candidates):
            n_heads, n = candidate.own.shape[:2]
            if not trials:
                equal = np.full(n, 1 / n)
                resamples = rng.multinomial(n, equal, size=_TRIALS) / n
            any_head = rng.integers(n_heads, size=_TRIALS)
            trial = candidate.score(resamples)[any_head, np.arange(_TRIALS)]
            best = candidate.best
            row = {
                "n_clusters": candidate.k,
                "score": float(candidate.score(equal)[best]),
                "silhouette": float(candidate.silhouette(equal)[best]),
                "view_agreement": float(candidate.view_agreement(equal)[best]),
                "head_agreement": candidate.head_agreement,
            }
            trials.append(trial)
            table.append(row)
            stage.done(row)
        stage.close()
    except stage.journal.shards.interrupts:
        ended = Ended.INTERRUPTED
    if not table:
        return None, ended
    wins = np.bincount(np.argmax(trials[: len(table)], axis=0), minlength=len(table))
    ended = max(ended, Ended(stage.stopped))
    return pd.DataFrame(table).assign(support=wins / _TRIALS), ended
