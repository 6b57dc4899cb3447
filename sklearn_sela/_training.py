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
from enum import IntEnum
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sklearn_sela._checkpoint import Checkpoint
from sklearn_sela._device import autocast, random_state, reseed, set_random_state
from sklearn_sela._network import FEWEST_ROWS, SelfLabelNetwork, filled
from sklearn_sela._shares import Share
from sklearn_sela._sinkhorn import SinkhornResult, sinkhorn_labels
from sklearn_sela._views import ViewStream

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
    n_iter_no_change: int | None = None
    tol: float = 1e-3
    precision: torch.dtype = torch.float32

    def batches(self, share: Share) -> int:
        """Gradient steps of an epoch over the rows of all processes."""
        # Never a batch of one row, from which batch norm could not learn.
        most = share.n // (FEWEST_ROWS * share.shards.size)
        return max(1, min(round(share.n / self.batch_size), most))

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
            [p for p in network.parameters() if p.requires_grad],
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
        results = [self._solve_head(t, self.reg_m) for t in range(len(self.labels))]
        labels = torch.stack([r.labels for r in results])
        changed = self.share.shards.total(float((labels != self.labels).sum()))
        self.changed = changed / (len(labels) * self.share.n)
        self.labels = labels
        self.n_solves += 1
        self.potential = torch.stack([r.potential for r in results])
        self.n_iter = sum(r.n_iter for r in results)
        self.marginal_error = max(r.marginal_error for r in results)

    def sizes(self) -> NDArray[np.float64]:
        """(n_heads, n_clusters) rows of all processes that have each label."""
        own = [head.bincount(minlength=self.weights.shape[1]) for head in self.labels]
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

    def _solve_head(self, t: int, reg_m: float) -> SinkhornResult:
        scores, head = self._source(t)
        result = sinkhorn_labels(
            scores,
            head=head,
            reg=self.reg,
            cluster_weights=self.weights[t],
            reg_m=reg_m,
            tol=LABEL_TOL,
            max_iter=_LABEL_ITER,
            potential=None if self.potential is None else self.potential[t],
            warn=False,
            group=self.share.shards.group,
        )
        if reg_m < math.inf and self._starves(t, result.labels):
            # A pull can lose to a confident network; exact sizes cannot, and end a collapse.
            return self._solve_head(t, math.inf)
        return result

    def _starves(self, t: int, labels: Tensor) -> bool:
        """Whether a cluster of a head is left with too few of all rows."""
        least = _LEAST * self.weights[t].cpu().numpy() * self.share.n
        sizes = labels.bincount(minlength=len(least)).double().cpu().numpy()
        return bool((self.share.shards.sum(sizes) < least).any())

    def _source(self, t: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Scores of a head, or features and the head, as the solver takes them."""
        return self.scores[t], None

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

    def _source(self, t: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.features, (self.head[0][t], self.head[1][t])

    def _scores_of(self, rows: Tensor) -> Tensor:
        w, b = self.head
        return torch.einsum("nf,tkf->tnk", self.features[rows], w) + b[:, None]


class Ended(IntEnum):
    """How training ended; of several rounds, the largest."""

    COMPLETE = 0
    STOPPED = 1  # a callback said so
    INTERRUPTED = 2  # Ctrl-C


def self_label(
    network: SelfLabelNetwork,
    views: ViewStream,
    labels: SelfLabels,
    schedule: Schedule,
    generator: torch.Generator,
    checkpoint: Checkpoint | None = None,
) -> Iterator[tuple[dict, bool]]:
    """Alternate label solves and epochs of learning: a generator, one epoch each.

    ``views(parts)`` draws a random view of each row, part by part. Yields (record, whether it is
    of the state that all is in now) after each epoch: those that a checkpoint has are not done
    again. Whoever stops asking has the network as it was after the last one; Ctrl-C leaves it
    so, too, and is passed on.
    """
    share, shards, n = labels.share, labels.share.shards, labels.labels.shape[1]
    n_batches = schedule.batches(share)
    own_rows = n // n_batches + (np.arange(n_batches) < n % n_batches)  # as tensor_split does
    batch_rows = shards.sum(own_rows.astype(np.float64)).tolist()
    sgd, rate = schedule.optimiser(network, schedule.epochs * n_batches)
    solve_epochs = schedule.solve_epochs()
    run = _Run(network, labels, sgd, rate, generator, checkpoint)
    done = len(run.records)
    yield from ((row, i == done) for i, row in enumerate(run.records.copy(), 1))
    kept = copy.deepcopy(network.state_dict())
    for epoch in range(done, schedule.epochs):
        start = time.perf_counter()
        try:
            solved = epoch in solve_epochs
            if solved:  # min over Q, eq. (6)
                if schedule.n_views:
                    look = partial(labels.look, network)
                    for rows, seen in label_pass(network, look, views, n, schedule):
                        labels.see(rows, seen)
                labels.solve(network)
            watch = schedule.n_views == 0 and epoch + 1 in solve_epochs
            loss = torch.zeros((), dtype=torch.float64, device=generator.device)
            order = torch.randperm(n, generator=generator, device=generator.device)
            batches = order.tensor_split(n_batches)
            network.train()
            # Made anew: it sums in another order once it has seen a step, to the last bit, and an
            # epoch that is resumed should be the same.
            learner = shards.learner(network)
            for rows, x, of_all in zip(batches, views(batches), batch_rows, strict=True):
                with autocast(generator.device, schedule.precision):
                    logits = learner(filled(x))[: len(rows)]
                log_p = logits.log_softmax(2)  # min over the network, eq. (4)
                own = -(labels.targets(rows) * log_p).sum()
                batch_loss = own / (len(labels.labels) * of_all / shards.size)
                sgd.zero_grad()
                batch_loss.backward()  # to the mean over the processes: that over all rows
                sgd.step()
                rate.step()
                loss += batch_loss.detach().double() * of_all / share.n
                if watch:
                    labels.see(rows, log_p.detach())
            mean_loss = shards.total(float(loss)) / shards.size
            if not math.isfinite(mean_loss):
                raise FloatingPointError(_diverged(f"the loss became {mean_loss}", schedule))
        except shards.interrupts:
            network.load_state_dict(kept)
            raise
        shards.average_buffers(network, n)
        kept = copy.deepcopy(network.state_dict())
        sizes = labels.sizes()
        row = {
            "loss": mean_loss,
            "seconds": time.perf_counter() - start,
            "solver_iterations": labels.n_iter if solved else 0,
            "marginal_error": labels.marginal_error,
            "changed": labels.changed if solved else 0.0,
            "smallest": int(sizes.min()),
            "largest": int(sizes.max()),
        }
        yield run.keep(row), True


def stalled(losses: list[float], patience: int | None, tol: float) -> bool:
    """Whether the last ``patience`` epochs have not brought the loss down by more than tol."""
    if patience is None or len(losses) <= patience:
        return False
    return min(losses[-patience:]) > min(losses[:-patience]) - tol


class _Run:
    """All that epochs change, as a checkpoint keeps it, and the record of those done.

    The first process reads and writes; that of another number of processes will do.
    """

    def __init__(
        self,
        network: SelfLabelNetwork,
        labels: SelfLabels,
        sgd: torch.optim.Optimizer,
        rate: torch.optim.lr_scheduler.LRScheduler,
        generator: torch.Generator,
        checkpoint: Checkpoint | None,
    ):
        self.parts: dict[str, Any] = {
            "network": network,
            "labels": labels,
            "sgd": sgd,
            "rate": rate,
        }
        self.generator, self.checkpoint = generator, checkpoint
        self.share = labels.share
        self.records: list[dict] = []
        if checkpoint:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Checkpoint) -> None:
        shards, whole = self.share.shards, {}

        def read() -> dict:
            """All but the labels, of which each process gets those of its own rows."""
            whole.update(checkpoint.load(torch.device("cpu")) or {})
            return {name: part for name, part in whole.items() if name != "labels"}

        state = shards.first(read)
        if not state:
            return
        self.parts["labels"].load_state_dict(whole.get("labels"))
        for name in ("network", "sgd", "rate"):
            self.parts[name].load_state_dict(state[name])
        self.records = state["records"]
        if len(state["random"]) == shards.size:
            set_random_state(self.generator, state["random"][shards.rank])
        else:  # of another number of processes: as good as any
            reseed(self.generator, self.generator.initial_seed() + 1 + len(self.records))

    def keep(self, row: dict) -> dict:
        """The record of an epoch, which the first process has measured."""
        row = self.share.shards.first(lambda: row)
        self.records.append(row)
        if checkpoint := self.checkpoint:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            random = self.share.shards.gather_first(random_state(self.generator))
            whole = {**state, "random": random, "records": self.records}
            self.share.shards.first(lambda: checkpoint.save(whole))
        return row


@torch.no_grad()
def label_pass(
    network: SelfLabelNetwork,
    look: Callable[[Tensor], Tensor],
    views: ViewStream,
    n: int,
    schedule: Schedule,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, look(x) averaged over n_views random views x) for all n rows."""
    network.eval()
    device = next(network.parameters()).device
    parts = torch.arange(n, device=device).split(schedule.label_rows) if n else ()
    repeated = (rows for rows in parts for _ in range(schedule.n_views))
    stream = views(repeated)
    for rows in parts:
        with autocast(device, schedule.precision):
            seen = torch.stack([look(x) for x in islice(stream, schedule.n_views)]).mean(0)
        if not seen.isfinite().all():
            raise FloatingPointError(_diverged("predictions are not finite", schedule))
        yield rows, seen


def _diverged(what: str, schedule: Schedule) -> str:
    return (
        f"Training diverged: {what}. Lower learning_rate={schedule.learning_rate:g}, or look "
        "for extreme values in X."
    )
