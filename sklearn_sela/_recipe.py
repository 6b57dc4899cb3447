"""From rows to a trained network: over-cluster to learn features, then cluster them.

Two rounds of the alternation in ``_training``. The first has more clusters than asked for:
small, pure clusters teach good features whatever the true number. The second has the number
asked for, or the best of several; its heads start from different clusterings of the learned
features, share the backbone while they are refined, and the one whose labels agree best
between views is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import nn

from sklearn_sela._augment import Views
from sklearn_sela._checkpoint import Checkpoints
from sklearn_sela._data import Geometry
from sklearn_sela._device import reseed
from sklearn_sela._features import LearnedFeatures, starting_labels
from sklearn_sela._heads import choose_head, start_at_centroids, target_sizes, view_joint
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._selection import compare_n_clusters, train_candidates
from sklearn_sela._training import FeatureLabels, Schedule, SelfLabels, self_label

T = TypeVar("T")
OVER_CLUSTER_ROWS = 8  # fewest rows per cluster of the first round


@dataclass(frozen=True)
class Recipe:
    """What to fit; the estimator's parameters of the same names, resolved."""

    candidates: list[int]  # numbers of clusters, rising, of which the best is fitted
    n_heads: int
    over_clusters: int
    init: str | np.ndarray
    cluster_sizes: str | np.ndarray
    few_neighbors: bool  # in the second round, at most half as many as a cluster has rows
    reg: float
    soft_targets: bool
    label_momentum: float
    freeze: bool
    schedule: Schedule


@dataclass
class Fitted:
    network: SelfLabelNetwork
    best_head: int
    self_labels: np.ndarray  # (n_heads, n_samples)
    cluster_sizes: np.ndarray  # (n_heads, n_clusters) shares asked for
    comparison: pd.DataFrame | None  # of the candidates, where there are several
    marginal_error: float
    complete: bool


class FitInterruptedError(Exception):
    """Ctrl-C in the first round, so that nobody remembers half of it."""


def insist(step: Callable[[], T]) -> tuple[T, bool]:
    """``step()``, once more if Ctrl-C interrupts it, and whether it did not.

    For what is soon done, and without which the first round would be lost.
    """
    try:
        return step(), True
    except KeyboardInterrupt:
        return step(), False


Round = tuple[dict[str, np.ndarray], list[dict]]  # weights, and the record of each epoch


@dataclass
class Rounds:
    """What both rounds of a fit work with, and the rounds.

    ``record`` gets a dict an epoch, with the round under ``stage``, and one for each number of
    clusters compared. ``remember(learn)`` returns ``learn()``, or what it returned to an
    earlier fit with the same first round. ``checkpoints`` resume rounds that were cut short.
    """

    backbone: nn.Module
    n_features: int
    geometry: Geometry
    views: Views
    recipe: Recipe
    generator: torch.Generator
    seed: int
    record: Callable[[dict], None]
    remember: Callable[[Callable[[], Round]], Round]
    checkpoints: Checkpoints | None

    def fit(self) -> Fitted:
        recipe, n, k = self.recipe, len(self.geometry.rows), self.recipe.candidates[0]
        many = min(recipe.over_clusters, n // OVER_CLUSTER_ROWS)
        epochs, complete, comparison, features = recipe.schedule.epochs, True, None, None
        if many > k:
            epochs = (epochs + 1) // 2
            first, complete = self.learn_features(many, epochs)
            # From here on the same, whether or not the first round was remembered,
            reseed(self.generator, self.seed + 1)
            learned, undisturbed = insist(lambda: LearnedFeatures(first, self.geometry))
            complete = complete and undisturbed
            if complete and len(recipe.candidates) > 1:
                comparison, complete = self.compare(learned)
                if comparison is not None:
                    k = int(comparison.n_clusters[comparison.score.argmax()])
            features = learned.features
            labels, undisturbed = insist(lambda: learned.labels(k, recipe.n_heads, self.seed))
            complete = complete and undisturbed
            # After Ctrl-C there is no second round: its heads stay where they start.
            epochs = recipe.schedule.epochs - epochs if complete else 0
            reseed(self.generator, self.seed + 2)  # and from here on, whether k was compared
        else:
            labels = starting_labels(self.geometry, k, recipe.n_heads, recipe.init, self.seed)
        labels, weights, pull = target_sizes(labels, k, recipe.cluster_sizes)
        network = self._network(k)
        state = self._labels(labels, weights, pull, recipe.schedule.n_views)
        if features is not None:
            start_at_centroids(network, features, labels[:, self.geometry.reference])
        near = self.views.nearest(max(1, n // (2 * k))) if recipe.few_neighbors else self.views
        done = self._train("clusters", network, near, state, epochs, self.record)
        best_head = 0
        try:
            best_head = choose_head(view_joint(network, near, n, recipe.schedule))
        except KeyboardInterrupt:  # the training stands; only the choice of the head is lost
            done = False
        return Fitted(
            network,
            best_head,
            state.labels.cpu().numpy(),
            weights,
            comparison,
            state.marginal_error,
            complete and done,
        )

    def learn_features(self, many: int, epochs: int) -> tuple[SelfLabelNetwork, bool]:
        """The first round: a network of ``many`` clusters, and whether it ran to its end."""
        network, live = self._network(many), []

        def note(row: dict) -> None:
            live.append(row)
            self.record(row)

        def learn() -> Round:
            n_heads = self.recipe.n_heads
            labels = starting_labels(self.geometry, many, n_heads, self.recipe.init, self.seed)
            weights = np.full((n_heads, many), 1 / many)
            state = self._labels(labels, weights, np.inf, self.recipe.schedule.n_views)
            if not self._train("features", network, self.views, state, epochs, note):
                raise FitInterruptedError
            return {name: w.cpu().numpy() for name, w in network.state_dict().items()}, live

        try:
            weights, records = self.remember(learn)
        except FitInterruptedError:
            return network, False
        if not live:  # learned by an earlier fit
            network.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
            for row in records:
                self.record(row)
        return network, True

    def compare(self, learned: LearnedFeatures) -> tuple[pd.DataFrame | None, bool]:
        """Compare the candidates; see :func:`compare_n_clusters`."""
        candidates = train_candidates(
            learned,
            self.views,
            self.recipe.candidates,
            self._labels,
            self.recipe.schedule,
            self.generator,
            self.seed,
        )
        return compare_n_clusters(candidates, self.record, self.seed)

    def _network(self, n_clusters: int) -> SelfLabelNetwork:
        r = self.recipe
        network = SelfLabelNetwork(self.backbone, self.n_features, r.n_heads, n_clusters, r.freeze)
        return network.to(self.generator.device)

    def _labels(
        self, labels: np.ndarray, weights: np.ndarray, pull: float, n_views: int
    ) -> SelfLabels:
        r, device = self.recipe, self.generator.device
        first, shares = (torch.as_tensor(a, device=device) for a in (labels, weights))
        fixed = first, shares, r.reg, pull, r.soft_targets
        apart = n_views > 0 and r.label_momentum == 0  # passes that start afresh
        if apart and self.n_features < weights.size:
            return FeatureLabels(*fixed, n_features=self.n_features)
        return SelfLabels(*fixed, r.label_momentum)

    def _train(
        self,
        stage: str,
        network: SelfLabelNetwork,
        views: Views,
        labels: SelfLabels,
        epochs: int,
        record: Callable[[dict], None],
    ) -> bool:
        schedule = replace(self.recipe.schedule, epochs=epochs)

        checkpoint = self.checkpoints.of(stage) if self.checkpoints else None

        def staged(row: dict) -> None:
            record({"stage": stage, "n_clusters": network.shape[1], **row})

        return self_label(network, views, labels, schedule, self.generator, staged, checkpoint)
