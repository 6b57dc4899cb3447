"""From rows to a trained network: over-cluster to learn features, then cluster them.

Two rounds of the alternation in ``_training``. The first has more clusters than asked for:
small, pure clusters teach good features whatever the true number. The second has the number
asked for, or the best of several; its heads start from different clusterings of the learned
features, share the backbone while they are refined, and the one whose labels agree best
between views is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import nn

from sklearn_sela._checkpoint import Checkpoints
from sklearn_sela._data import Geometry
from sklearn_sela._device import reseed
from sklearn_sela._features import LearnedFeatures, starting_labels
from sklearn_sela._heads import choose_head, start_at_centroids, target_sizes, view_joint
from sklearn_sela._journal import Attributes, Journal, Stage
from sklearn_sela._labels import FeatureLabels, SelfLabels
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._selection import compare_n_clusters, train_candidates
from sklearn_sela._shares import Share
from sklearn_sela._training import (
    Ended,
    Schedule,
    self_label,
    stalled,
)
from sklearn_sela._views import Views

T = TypeVar("T")
_SEEDS = 1_000_003  # between those of processes
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
    """What a fit leaves, and how it ended."""

    network: SelfLabelNetwork
    best_head: int
    self_labels: np.ndarray  # (n_heads, n_samples)
    cluster_sizes: np.ndarray  # (n_heads, n_clusters) shares asked for
    comparison: pd.DataFrame | None  # of the candidates, where there are several
    marginal_error: float
    ended: Ended


class CutShortError(Exception):
    """The first round did not run to its end, and nobody should remember half of it."""

    def __init__(self, ended: Ended):
        self.ended = ended


Round = tuple[dict[str, np.ndarray], list[dict]]  # weights, and the record of each epoch


@dataclass
class Rounds:
    """What both rounds of a fit work with, and the rounds.

    ``remember(learn)`` returns ``learn()``, or what it returned to an earlier fit with the same
    first round. ``checkpoints`` resume rounds that were cut short. ``attributes(fitted)`` are
    the estimator's, for callbacks that ask what it would be if the fit ended here.
    """

    backbone: nn.Module
    n_features: int
    geometry: Geometry
    views: Views
    recipe: Recipe
    generator: torch.Generator
    seed: int
    journal: Journal
    attributes: Callable[[Fitted], dict[str, Any]]
    remember: Callable[[Callable[[], Round]], Round]
    checkpoints: Checkpoints | None

    @property
    def share(self) -> Share:
        return self.geometry.share

    def fit(self) -> Fitted:
        recipe, n, k = self.recipe, self.share.n, self.recipe.candidates[0]
        many, epochs = min(recipe.over_clusters, n // OVER_CLUSTER_ROWS), recipe.schedule.epochs
        if many > k:
            first, ended = self.learn_features(many, (epochs + 1) // 2)
            return self.cluster_features(first, ended, epochs // 2)
        labels = starting_labels(self.geometry, k, recipe.n_heads, recipe.init, self.seed)
        start = target_sizes(labels, k, recipe.cluster_sizes, self.share.shards)
        return self.refine(self._network(k), start, epochs)

    def learn_features(self, many: int, epochs: int) -> tuple[SelfLabelNetwork, Ended]:
        """The first round: a network of ``many`` clusters, and how its training ended."""
        network = self._network(many)

        def as_if_ended() -> dict[str, Any]:
            first = copy.deepcopy(network)
            rounds = replace(self, backbone=first.backbone)
            return self._seen(rounds.cluster_features(first, Ended.STOPPED, 0))

        def learn() -> Round:
            n_heads = self.recipe.n_heads
            labels = starting_labels(self.geometry, many, n_heads, self.recipe.init, self.seed)
            weights = np.full((n_heads, many), 1 / many)
            views = self.recipe.schedule.n_views
            state = self._labels(labels, weights, np.inf, views, self.share)
            stage = self.journal.stage("features", epochs)
            ended = self._train(stage, network, self.views, state, as_if_ended)
            if ended:
                raise CutShortError(ended)
            learned = {name: w.cpu().numpy() for name, w in network.state_dict().items()}
            return learned, self.journal.history.copy()

        try:
            learned, records = self.remember(learn)
        except CutShortError as error:
            return network, error.ended
        ended = Ended.COMPLETE
        if not self.journal.history:  # learned by an earlier fit
            network.load_state_dict({name: torch.tensor(w) for name, w in learned.items()})
            told = ((row, i == len(records)) for i, row in enumerate(records, 1))
            ended = self._follow(self.journal.stage("features", len(records)), told, as_if_ended)
        return network, ended

    def cluster_features(self, first: SelfLabelNetwork, ended: Ended, epochs: int) -> Fitted:
        """The second round, from the features of the first; none if that was cut short."""
        recipe, k, comparison = self.recipe, self.recipe.candidates[0], None
        # From here on the same, whether or not the first round was remembered,
        reseed(self.generator, self.seed + 1)
        learned, undisturbed = self.insist(lambda: LearnedFeatures(first, self.geometry))
        ended = max(ended, undisturbed)
        if not ended and len(recipe.candidates) > 1:
            comparison, ended = self.compare(learned)
            if comparison is not None:
                k = int(comparison.n_clusters[comparison.score.argmax()])
        labels, undisturbed = self.insist(lambda: learned.labels(k, recipe.n_heads, self.seed))
        ended = max(ended, undisturbed)
        reseed(self.generator, self.seed + 2)  # and from here on, whether k was compared
        start = target_sizes(labels, k, recipe.cluster_sizes, self.share.shards)
        network = self._network(k)
        start_at_centroids(network, learned.features, learned.of_reference(start[0].T).T)
        return self.refine(network, start, 0 if ended else epochs, comparison, ended)

    def compare(self, learned: LearnedFeatures) -> tuple[pd.DataFrame | None, Ended]:
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
        stage = self.journal.stage("n_clusters", len(self.recipe.candidates))
        # Each process does the same; where rounding differs, the first decides.
        compared = compare_n_clusters(candidates, stage, self.seed)
        return self.share.shards.first(lambda: compared)

    def refine(
        self,
        network: SelfLabelNetwork,
        start: tuple[np.ndarray, np.ndarray, float],
        epochs: int,
        comparison: pd.DataFrame | None = None,
        ended: Ended = Ended.COMPLETE,
    ) -> Fitted:
        """Train the clusters asked for, from labels, weights and pull; choose the head."""
        labels, weights, pull = start
        few = max(1, self.share.n // (2 * network.shape[1]))
        near = self.views.nearest(few) if self.recipe.few_neighbors else self.views
        state = self._labels(labels, weights, pull, self.recipe.schedule.n_views, self.share)

        def fitted(network: SelfLabelNetwork, ended: Ended) -> Fitted:
            best_head = 0
            try:
                joint = view_joint(network, near, self.share, self.recipe.schedule)
                best_head = choose_head(joint)
            except self.share.shards.interrupts:  # only the choice of the head is lost
                ended = Ended.INTERRUPTED
            own, error = state.labels.cpu().numpy(), state.marginal_error
            return Fitted(network, best_head, own, weights, comparison, error, ended)

        def as_if_ended() -> dict[str, Any]:
            return self._seen(fitted(copy.deepcopy(network), Ended.STOPPED))

        if epochs:
            stage = self.journal.stage("clusters", epochs)
            ended = self._train(stage, network, near, state, as_if_ended)
        return fitted(network, ended)

    def insist(self, step: Callable[[], T]) -> tuple[T, Ended]:
        """``step()``, once more if Ctrl-C interrupts it, and whether it did.

        For what is soon done, and without which the first round would be lost.
        """
        try:
            return step(), Ended.COMPLETE
        except self.share.shards.interrupts:
            return step(), Ended.INTERRUPTED

    def _seen(self, fitted: Fitted) -> dict[str, Any]:
        """The attributes of what callbacks look at; Ctrl-C meanwhile is for the fit."""
        if fitted.ended == Ended.INTERRUPTED:
            raise KeyboardInterrupt
        return self.attributes(fitted)

    def _network(self, n_clusters: int) -> SelfLabelNetwork:
        r = self.recipe
        network = SelfLabelNetwork(self.backbone, self.n_features, r.n_heads, n_clusters, r.freeze)
        return network.to(self.generator.device)

    def _labels(
        self,
        labels: np.ndarray,
        weights: np.ndarray,
        pull: float,
        n_views: int,
        share: Share | None = None,
    ) -> SelfLabels:
        r, device = self.recipe, self.generator.device
        first, shares = (torch.as_tensor(a, device=device) for a in (labels, weights))
        fixed = first, shares, r.reg, pull, r.soft_targets
        apart = n_views > 0 and r.label_momentum == 0  # passes that start afresh
        if apart and self.n_features < weights.size:
            return FeatureLabels(*fixed, n_features=self.n_features, share=share)
        return SelfLabels(*fixed, r.label_momentum, share)

    def _train(
        self,
        stage: Stage,
        network: SelfLabelNetwork,
        views: Views,
        labels: SelfLabels,
        as_if_ended: Attributes,
    ) -> Ended:
        schedule = replace(self.recipe.schedule, epochs=stage.n_tasks)
        checkpoint = self.checkpoints.of(stage.name) if self.checkpoints else None
        if rank := self.share.shards.rank:  # other rows, other views
            reseed(self.generator, self.seed + _SEEDS * rank)
        epochs = self_label(network, views, labels, schedule, self.generator, checkpoint)
        told = (({"n_clusters": network.shape[1], **row}, current) for row, current in epochs)
        return self._follow(stage, told, as_if_ended)

    def _follow(
        self, stage: Stage, epochs: Iterator[tuple[dict, bool]], as_if_ended: Attributes
    ) -> Ended:
        """Run the epochs to their end, a plateau, a callback's stop or Ctrl-C."""
        schedule, losses = self.recipe.schedule, []
        try:
            for row, current in stage.each(epochs):
                losses.append(row["loss"])
                stage.done(row, as_if_ended if current else None)
                stage.stopped &= current  # an epoch of an earlier run cannot be the last
                if stalled(losses, schedule.n_iter_no_change, schedule.tol):
                    break
            stage.close()
        except self.share.shards.interrupts:
            return Ended.INTERRUPTED
        return Ended(stage.stopped)
