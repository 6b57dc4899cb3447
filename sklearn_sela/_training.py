"""The alternation of self-labelling: label all rows by transport, learn from the labels.

Plain torch, usable without scikit-learn. Notation of the paper (Asano et al., ICLR 2020) in
trailing comments.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._sinkhorn import SinkhornResult, sinkhorn_labels

LABEL_TOL = 1e-3  # L1 error of the cluster shares at which a label solve stops
_LABEL_ITER = 200  # most iterations of one solve; the next solve goes on from its potential
_LEAST = 0.5  # of its share that a cluster keeps however weak the pull


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; the estimator's parameters of the same names.

    ``label_rows`` is the batch size of passes that learn nothing, and need no memory for it.
    """

    epochs: int
    batch_size: int
    label_rows: int
    learning_rate: float
    weight_decay: float
    lr_schedule: str
    n_views: int
    n_solves: int | None

    def solve_epochs(self) -> set[int]:
        """Epochs that begin with a label solve: all, or n_solves of them, dense early on.

        Epoch 0 trains on the starting labels, as in the paper.
        """
        if self.n_solves is None:
            return set(range(1, self.epochs))
        at = (self.epochs * (i / (self.n_solves + 1)) ** 2 for i in range(1, self.n_solves + 1))
        return {max(1, math.floor(epoch)) for epoch in at}

    def optimiser(
        self, network: torch.nn.Module, steps: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """SGD with momentum 0.9, and its learning rate over ``steps`` steps."""
        sgd = torch.optim.SGD(
            network.parameters(),
            self.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=self.weight_decay,
            fused=True,  # one pass over the weights
        )
        if self.lr_schedule == "step":
            milestones = [round(steps * share) for share in (0.4, 0.6, 0.8)]
            return sgd, torch.optim.lr_scheduler.MultiStepLR(sgd, milestones, 0.1)
        return sgd, torch.optim.lr_scheduler.OneCycleLR(
            sgd, self.learning_rate, total_steps=max(2, steps), cycle_momentum=False
        )


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

    References
    ----------
    .. [1] Laine, Aila. Temporal ensembling for semi-supervised learning. ICLR 2017.
    """

    def __init__(
        self,
        labels: Tensor,
        weights: Tensor,
        reg: float,
        reg_m: float,
        soft: bool,
        momentum: float,
    ):
        self.labels, self.weights = labels, weights
        self.reg, self.reg_m, self.soft, self.momentum = reg, reg_m, soft, momentum
        self.scores = torch.zeros(*labels.shape, weights.shape[1], device=labels.device)
        self.n_solves = 0
        self.potential: list[Tensor | None] = [None] * len(labels)
        self.n_iter, self.marginal_error, self.changed = 0, 0.0, 0.0

    def see(self, rows: Tensor, log_p: Tensor) -> None:
        """Take log p(y | x_i) of the rows, (n_rows, n_heads, n_clusters), into the scores.

        To be called once for each row before a solve.
        """
        # Counting from the first solve, which has nothing to keep: no start from zero shows.
        keep = min(self.momentum, self.n_solves / (self.n_solves + 1))
        new = log_p.transpose(0, 1)
        self.scores[:, rows] = new if keep == 0 else self.scores[:, rows].lerp(new, 1 - keep)

    def solve(self) -> None:
        """Label all rows afresh from the scores."""
        heads = zip(self.scores, self.weights, self.potential, strict=True)
        results = [self._solve_head(*head, self.reg_m) for head in heads]
        labels = torch.stack([r.labels for r in results])
        self.changed = float((labels != self.labels).double().mean())
        self.labels = labels
        self.n_solves += 1
        self.potential = [r.potential for r in results]
        self.n_iter = sum(r.n_iter for r in results)
        self.marginal_error = max(r.marginal_error for r in results)

    def _solve_head(
        self, scores: Tensor, weights: Tensor, potential: Tensor | None, reg_m: float
    ) -> SinkhornResult:
        result = sinkhorn_labels(
            scores,
            reg=self.reg,
            cluster_weights=weights,
            reg_m=reg_m,
            tol=LABEL_TOL,
            max_iter=_LABEL_ITER,
            potential=potential,
            warn=False,
        )
        shares = result.labels.bincount(minlength=len(weights)) / len(scores)
        if reg_m < math.inf and (shares < _LEAST * weights).any():
            # A pull can lose to a confident network; exact sizes cannot, and end a collapse.
            return self._solve_head(scores, weights, potential, math.inf)
        return result

    def targets(self, rows: Tensor) -> Tensor:
        """q(y | x_i) of the rows, (n_rows, n_heads, n_clusters)."""
        if not (self.n_solves and self.soft):
            return F.one_hot(self.labels[:, rows].T, self.weights.shape[1]).float()
        shift = torch.stack([p.float() for p in self.potential])  # type: ignore[union-attr]
        return ((self.scores[:, rows] + shift[:, None]) / self.reg).softmax(2).transpose(0, 1)


def self_label(
    network: SelfLabelNetwork,
    views: Callable[[Tensor], Tensor],
    labels: SelfLabels,
    schedule: Schedule,
    generator: torch.Generator,
    record: Callable[[dict], None],
) -> bool:
    """Alternate label solves and epochs of learning; False when interrupted by Ctrl-C.

    ``views(rows)`` draws a random view of each row. ``record`` gets one dict an epoch. After
    an interruption the network is as it was after the last complete epoch.
    """
    n = labels.labels.shape[1]
    # Never a batch of one row, from which batch norm could not learn.
    n_batches = max(1, min(round(n / schedule.batch_size), n // 2))
    sgd, rate = schedule.optimiser(network, schedule.epochs * n_batches)
    solve_epochs = schedule.solve_epochs()
    kept = copy.deepcopy(network.state_dict())
    for epoch in range(schedule.epochs):
        start = time.perf_counter()
        try:
            solved = epoch in solve_epochs
            if solved:  # min over Q, eq. (6)
                if schedule.n_views:
                    for rows, log_p in label_pass(network, views, n, schedule):
                        labels.see(rows, log_p)
                labels.solve()
            watch = schedule.n_views == 0 and epoch + 1 in solve_epochs
            loss, order = 0.0, torch.randperm(n, generator=generator, device=generator.device)
            network.train()
            for rows in order.tensor_split(n_batches):  # min over the network, eq. (4)
                log_p = network(views(rows)).log_softmax(2)
                batch_loss = -(labels.targets(rows) * log_p).sum(2).mean()
                sgd.zero_grad()
                batch_loss.backward()
                sgd.step()
                rate.step()
                loss += float(batch_loss.detach()) * len(rows) / n
                if not math.isfinite(loss):
                    raise FloatingPointError(_diverged(f"the loss became {loss}", schedule))
                if watch:
                    labels.see(rows, log_p.detach())
        except KeyboardInterrupt:
            network.load_state_dict(kept)
            return False
        kept = copy.deepcopy(network.state_dict())
        sizes = torch.stack(
            [la.bincount(minlength=labels.weights.shape[1]) for la in labels.labels]
        )
        record(
            {
                "loss": loss,
                "seconds": time.perf_counter() - start,
                "solver_iterations": labels.n_iter if solved else 0,
                "marginal_error": labels.marginal_error,
                "changed": labels.changed if solved else 0.0,
                "smallest": int(sizes.min()),
                "largest": int(sizes.max()),
            }
        )
    return True


@torch.no_grad()
def label_pass(
    network: SelfLabelNetwork, views: Callable[[Tensor], Tensor], n: int, schedule: Schedule
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, log p(y | x_i) averaged over n_views random views) for all n rows."""
    network.eval()
    device = next(network.parameters()).device
    for rows in torch.arange(n, device=device).split(schedule.label_rows):
        seen = [network(views(rows)).log_softmax(2) for _ in range(schedule.n_views)]
        log_p = torch.stack(seen).mean(0)
        if not log_p.isfinite().all():
            raise FloatingPointError(_diverged("predictions are not finite", schedule))
        yield rows, log_p


def _diverged(what: str, schedule: Schedule) -> str:
    return (
        f"Training diverged: {what}. Lower learning_rate={schedule.learning_rate:g}, or look "
        "for extreme values in X."
    )
