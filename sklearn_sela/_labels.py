"""The current labels of all rows, as transport gives them, and the targets that they make."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._shares import Share
from sklearn_sela._sinkhorn import SinkhornResult, sinkhorn_labels

LABEL_TOL = 1e-3  # L1 error of the cluster shares at which a label solve stops
_LABEL_ITER = 200  # most iterations of one solve; the next solve goes on from its potential
_LEAST = 0.5  # of its share that a cluster keeps however weak the pull


class SelfLabels:
    """The current labels of all rows, one set per head.

    Kept as the scores and the potential of the last solve, from which soft targets are
    formed a batch at a time; before the first solve, as the labels to start from. The scores
    are a running mean of log p(y | x_i) over random views [1]_.

    Parameters
    ----------
    labels : int tensor of shape (n_heads, n_samples)
        Labels to start from.
    weights : tensor of shape (n_heads, n_clusters)
        Share of the rows that each cluster of each head should get.
    reg, reg_m : float
        See :func:`sklearn_sela.sinkhorn_labels`.
    soft : bool
        Train on the soft assignment or on its labels.
    momentum : float
        Share of the last solve's scores that the next one keeps.
    share : Share, default=None
        The rows of this process, where others have more. None: there are no others.

    References
    ----------
    .. [1] Laine, Aila. Temporal ensembling for semi-supervised learning. ICLR 2017.
    """

    _BY_ROW: tuple[tuple[str, int], ...] = (("labels", 1), ("scores", 1))  # axis of the rows
    _CHANGES: tuple[str, ...] = ("n_solves", "potential", "n_iter", "marginal_error", "changed")

    def __init__(
        self,
        labels: Tensor,
        weights: Tensor,
        reg: float,
        reg_m: float,
        soft: bool,
        momentum: float = 0.0,
        share: Share | None = None,
    ):
        self.labels, self.weights = labels, weights
        self.share = Share.of_all(labels.shape[1]) if share is None else share
        self.reg, self.reg_m, self.soft, self.momentum = reg, reg_m, soft, momentum
        self._make_room()
        self.n_solves = 0
        self.potential: Tensor | None = None
        self.n_iter, self.marginal_error, self.changed = 0, 0.0, 0.0

    def _make_room(self) -> None:
        """For what is seen of the rows."""
        shape = *self.labels.shape, self.weights.shape[1]
        self.scores = torch.zeros(shape, device=self.labels.device)

    def look(self, network: SelfLabelNetwork, x: Tensor) -> Tensor:
        """log p(y | x_i) of a batch, (n_rows, n_heads, n_clusters): what ``see`` takes."""
        return network(x).log_softmax(2)

    def see(self, rows: Tensor, log_p: Tensor) -> None:
        """Take log p(y | x_i) of the rows into the scores, once for each row before a solve."""
        # Counting from the first solve, which has nothing to keep: no start from zero shows.
        keep = min(self.momentum, self.n_solves / (self.n_solves + 1))
        new = log_p.transpose(0, 1)
        self.scores[:, rows] = new if keep == 0 else self.scores[:, rows].lerp(new, 1 - keep)

    def solve(self, network: SelfLabelNetwork) -> None:
        """Label all rows afresh from what was seen of them."""
        found = self._solve_heads(slice(None), self.reg_m)
        if self.reg_m < math.inf and (starved := self._starved(found.labels)):
            # A pull can lose to a confident network; exact sizes cannot, and end a collapse.
            for field, anew in zip(found[:4], self._solve_heads(starved, math.inf), strict=False):
                field[starved] = anew
        changed = self.share.shards.total(float((found.labels != self.labels).sum()))
        self.changed = changed / (len(self.labels) * self.share.n)
        self.labels, self.potential = found.labels, found.potential
        self.n_solves += 1
        self.n_iter = int(found.n_iter.sum())
        self.marginal_error = float(found.marginal_error.max())

    def sizes(self) -> NDArray[np.float64]:
        """(n_heads, n_clusters) rows of all processes that have each label."""
        return self._sizes_of(self.labels)

    def _sizes_of(self, labels: Tensor) -> NDArray[np.float64]:
        own = [head.bincount(minlength=self.weights.shape[1]) for head in labels]
        return self.share.shards.sum(torch.stack(own).double().cpu().numpy())

    def state_dict(self) -> dict:
        """What solves change, for :meth:`load_state_dict`; of all processes, on the first."""
        state = {name: getattr(self, name) for name in self._CHANGES}
        for name, axis in self._BY_ROW:
            own = getattr(self, name).transpose(0, axis).cpu().numpy()
            state[name] = torch.from_numpy(self.share.whole(own, first=True)).transpose(0, axis)
        return state

    def load_state_dict(self, state: dict | None) -> None:
        """From what the first process has."""
        device, known = self.labels.device, state or {}
        changes = self.share.shards.first(lambda: {name: known[name] for name in self._CHANGES})
        for name, value in changes.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)
        for name, axis in self._BY_ROW:
            whole = known[name].transpose(0, axis).numpy() if known else None
            own = torch.from_numpy(self.share.own(whole)).transpose(0, axis)
            setattr(self, name, own.to(device))

    def _solve_heads(self, heads: slice | list[int], reg_m: float) -> SinkhornResult:
        scores, head = self._source(heads)
        return sinkhorn_labels(
            scores,
            head=head,
            reg=self.reg,
            cluster_weights=self.weights[heads],
            reg_m=reg_m,
            tol=LABEL_TOL,
            max_iter=_LABEL_ITER,
            potential=None if self.potential is None else self.potential[heads],
            warn=False,
            group=self.share.shards.group,
        )

    def _starved(self, labels: Tensor) -> list[int]:
        """Heads of which a cluster is left with too few of all rows."""
        least = _LEAST * self.weights.cpu().numpy() * self.share.n
        return np.flatnonzero((self._sizes_of(labels) < least).any(1)).tolist()

    def _source(self, heads: slice | list[int]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Scores of heads, or features and the heads, as the solver takes them."""
        return self.scores[heads], None

    def _scores_of(self, rows: Tensor) -> Tensor:
        return self.scores[:, rows]

    def targets(self, rows: Tensor) -> Tensor:
        """q(y | x_i) of the rows, (n_rows, n_heads, n_clusters)."""
        if not (self.n_solves and self.soft):
            return F.one_hot(self.labels[:, rows].T, self.weights.shape[1]).float()
        shift = self.potential.float()  # type: ignore[union-attr]
        scores = self._scores_of(rows)
        return ((scores + shift[:, None]) / self.reg).softmax(2).transpose(0, 1)


class FeatureLabels(SelfLabels):
    """The same, kept as the features that the network had of the rows, and its heads then.

    ``n_features`` numbers a row instead of n_heads x n_clusters, of which the paper's ImageNet
    fits have 30,000. Scores are formed a batch, or a tile of the solver's, at a time; that they
    are not normalised makes no difference to a solution, whose rows are. There is no running
    mean of what heads said that have changed since: momentum is 0.
    """

    _BY_ROW: tuple[tuple[str, int], ...] = (("labels", 1), ("features", 0))
    _CHANGES = (*SelfLabels._CHANGES, "head")

    def __init__(self, *fixed: Any, n_features: int, share: Share | None = None):
        self.n_features = n_features
        super().__init__(*fixed, 0.0, share)  # type: ignore[call-arg]
        if not self.soft:  # until the next pass, which sees all rows anew, only the labels are used
            self._BY_ROW = self._BY_ROW[:1]
        self.head: list[Tensor] = []

    def _make_room(self) -> None:
        shape = self.labels.shape[1], self.n_features
        self.features = torch.zeros(shape, device=self.labels.device)

    def look(self, network: SelfLabelNetwork, x: Tensor) -> Tensor:
        """Features of a batch, (n_rows, n_features)."""
        return network.embed(x)

    def see(self, rows: Tensor, features: Tensor) -> None:
        self.features[rows] = features

    def solve(self, network: SelfLabelNetwork) -> None:
        w, b = network.heads.weight.detach(), network.heads.bias.detach()
        self.head = [p.clone().unflatten(0, network.shape) for p in (w, b)]
        super().solve(network)

    def _source(self, heads: slice | list[int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.features, (self.head[0][heads], self.head[1][heads])

    def _scores_of(self, rows: Tensor) -> Tensor:
        w, b = self.head
        return torch.einsum("nf,tkf->tnk", self.features[rows], w) + b[:, None]
