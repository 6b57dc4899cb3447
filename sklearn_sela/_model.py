"""A trained network at work on new rows: labels, features, confidence, and how good they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from sklearn_sela._data import Geometry, Rows, Scaler
from sklearn_sela._device import one_thread, seeded
from sklearn_sela._heads import meaning, view_agreement, view_joint
from sklearn_sela._images import Images
from sklearn_sela._network import SelfLabelNetwork, inference
from sklearn_sela._selection import (
    SAMPLED_ROWS,
    SCORED_ROWS,
    head_agreement,
    silhouettes,
    unit_distances,
)
from sklearn_sela._shares import Share
from sklearn_sela._training import Schedule
from sklearn_sela._views import ViewSettings
from sklearn_sela.metrics import information_score


@dataclass
class Model:
    """The network, and what of the fit it takes to use it; X are rows as ``rows_of`` makes them.

    Of images that cannot be read, what is returned is NaN, or -1 for labels.
    """

    network: SelfLabelNetwork
    best_head: int  # that predicts
    scaler: Scaler
    n_values: int  # of a row
    n_features: int  # that the backbone makes of them
    views: ViewSettings
    schedule: Schedule
    one_thread: bool
    backbone: str | None  # the name that it was made by
    meanings: list[sparse.coo_array] = field(default_factory=list)  # of each head's clusters

    @property
    def device(self) -> torch.device:
        return self.network.heads.weight.device

    def attributes(self) -> dict[str, Any]:
        """Of an estimator that has this model."""
        return {
            "network_": self.network,
            "best_head_": self.best_head,
            "_n_features_out": self.n_features,
            "_model": self,
        }

    def understand_heads(self, labels: NDArray[np.int64]) -> None:
        """Learn what clusters of the heads mean from labels (n_samples, n_heads) of a fit."""
        labels = labels[labels[:, 0] >= 0]
        own, k = labels[:, self.best_head], self.network.shape[1]
        self.meanings = [meaning(row, own, k) for row in labels.T]

    def labels(self, X: np.ndarray | Images) -> NDArray[np.int64]:
        """(n,) cluster of each row."""

        def labels(x: Tensor) -> Tensor:
            return self.network(x)[:, [self.best_head]].softmax(2).argmax(2)

        return self._infer(X, labels, 1, np.int64, -1)[:, 0]

    def head_labels(self, X: np.ndarray | Images, share: Share) -> NDArray[np.int64]:
        """(n, n_heads) cluster of each row of a share by each head."""

        def labels(x: Tensor) -> Tensor:
            return self.network(x).softmax(2).argmax(2)

        return self._infer(X, labels, self.network.shape[0], np.int64, share=share)

    def probabilities(self, X: np.ndarray | Images) -> NDArray[np.float32]:
        """(n, n_clusters)"""

        def probabilities(x: Tensor) -> Tensor:
            return self.network(x)[:, self.best_head].softmax(1)

        return self._infer(X, probabilities, self.network.shape[1])

    def features(self, X: np.ndarray | Images) -> NDArray[np.float32]:
        """(n, n_features)"""
        return self._infer(X, self.network.embed, self.n_features)

    def confidence(self, X: np.ndarray | Images) -> NDArray[np.float32]:
        """(n,) mean over heads of the probability that each gives to the label."""
        meanings = [
            torch.sparse_coo_tensor(
                torch.from_numpy(np.stack([m.col, m.row])),
                torch.from_numpy(m.data),
                m.shape,
                check_invariants=False,
            ).to(self.device)
            for m in self.meanings
        ]

        def confidence(x: Tensor) -> Tensor:
            p = self.network(x).softmax(2)
            label = p[:, self.best_head].argmax(1, keepdim=True)
            heads = [(m @ p[:, t].T).T.gather(1, label) for t, m in enumerate(meanings)]
            return torch.cat(heads, 1).mean(1, keepdim=True)

        return self._infer(X, confidence, 1)[:, 0].clip(0, 1)

    def criteria(self, X: np.ndarray | Images) -> dict[str, float]:
        """What tells a good clustering without classes, of a sample of the rows."""
        rng = np.random.default_rng(0)  # of the score, which draws the same each time
        if len(X) > SAMPLED_ROWS:
            sample = np.sort(rng.permutation(len(X))[:SAMPLED_ROWS])
            X = X.take(sample) if isinstance(X, Images) else X[sample]
        if isinstance(X, Images):
            X = X.take(X.check())
        n, (n_heads, k) = len(X), self.network.shape

        out = self._infer(X, self.network.describe, self.n_features + n_heads * k)
        features, p = np.split(out, [self.n_features], axis=1)
        p = p.reshape(n, n_heads, k)
        labels = p.argmax(2)
        scored = np.sort(rng.permutation(n)[:SCORED_ROWS])
        own = labels[:, self.best_head]
        return {
            "silhouette": float(silhouettes(unit_distances(features[scored]), own[scored]).mean()),
            "view_agreement": self._view_agreement(X, rng),
            "head_agreement": head_agreement(labels[scored].T, self.best_head),
            "information": information_score(p[:, self.best_head]),
        }

    def _view_agreement(self, X: np.ndarray | Images, rng: np.random.Generator) -> float:
        if len(X) < 2:  # no neighbour to be seen as
            return 0.0
        with seeded(0, self.device) as generator, one_thread(self.one_thread):
            rows = Rows(X, self.scaler, self.device)
            views = self.views.views(rows, Geometry(rows, self.n_values, rng), generator)
            try:
                joint = view_joint(self.network, views, rows.share, self.schedule)
            except FloatingPointError as error:
                raise ValueError("X holds values too large, far outside those of fit.") from error
        return float(view_agreement(joint)[self.best_head])

    def _infer(
        self,
        X: np.ndarray | Images,
        function: Callable[[Tensor], Tensor],
        width: int,
        dtype: Any = np.float32,
        missing: Any = np.nan,
        share: Share | None = None,
    ) -> NDArray[Any]:
        rows = Rows(X, self.scaler, self.device, share)
        out = np.empty((len(rows), width), dtype=dtype)
        n = len(rows)
        for part, values in inference(self.network, function, rows.own, n, self.n_values):
            out[part] = values.cpu().numpy()
        if share is None and isinstance(X, Images) and X.bad:
            out[list(X.bad)] = missing
        return out
