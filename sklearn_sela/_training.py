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
from torch import Tensor

from sklearn_sela._checkpoint import Checkpoint
from sklearn_sela._device import autocast, random_state, reseed, set_random_state
from sklearn_sela._labels import SelfLabels
from sklearn_sela._network import FEWEST_ROWS, SelfLabelNetwork, filled
from sklearn_sela._shares import Share
from sklearn_sela._views import ViewStream


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
