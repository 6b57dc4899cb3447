"""What is told of a fit while it goes: its history, a line an epoch, scikit-learn's callbacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from sklearn_sela._device import random_state, set_random_state
from sklearn_sela._distributed import Shards

T = TypeVar("T")
Attributes = Callable[[], dict[str, Any]]  # of the estimator, if the fit ended here


class Journal:
    """The record of a fit: a :class:`Stage` for each round, a task for each of its epochs.

    Parameters
    ----------
    estimator : estimator
        That is being fitted.
    context : sklearn.callback.CallbackContext
        Of its fit.
    X, y : as fit was given them
        For callbacks. Without a y they are shown the labels that the transport gave, or scores
        that compare with some would not be recorded.
    shards : Shards
        The processes of the fit, of which the first prints and has callbacks; ``context`` is
        None on the others.
    """

    def __init__(self, estimator: Any, context: Any, X: Any, y: Any, shards: Shards):
        self.estimator, self.context, self.X, self.y = estimator, context, X, y
        self.shards = shards
        self.history: list[dict] = []
        self.generator: torch.Generator | None = None
        self.n_rows: int | None = None  # of X, where other processes have more

    def stage(self, name: str, n_tasks: int) -> Stage:
        return Stage(self, name, n_tasks)

    def note(self, row: dict) -> None:
        """Keep the record of an epoch, or of a number of clusters, and print it."""
        if row["stage"] != "n_clusters":
            row = {"epoch": len(self.history), **row}
            self.history.append(row)
        if self.estimator.verbose and self.shards.rank == 0:
            print(_line(row, self.estimator.max_epochs), flush=True)

    def begin(self, context: Any) -> None:
        if context:
            context.call_on_fit_task_begin(estimator=self.estimator, X=self.X, y=self.y)

    def end(self, context: Any, attributes: Attributes | None = None) -> bool:
        """Call the callbacks; whether one of them stops the fit.

        What they draw at random, to make a fitted estimator too, does not change the fit.
        """
        state = random_state(self.generator) if self.generator else None

        def call(ask: Attributes) -> bool:
            made = functools.cache(ask) if attributes else None
            y = self.y if self.y is not None or made is None else lambda: self._labels(made())
            return context.call_on_fit_task_end(
                estimator=self.estimator, X=self.X, y=y, reconstruction_attributes=made
            )

        try:
            return self.shards.led(call, attributes or dict)
        finally:
            if self.generator and state:
                set_random_state(self.generator, state)

    def _labels(self, attributes: dict[str, Any]) -> Any:
        """Of X, by the transport."""
        return attributes["self_labels_"][attributes["best_head_"]][: self.n_rows]


class Stage:
    """A round, or the comparison of candidates: tasks in a row, in the journal's record.

    ``stopped`` tells whether a callback has asked for the end of the fit.
    """

    def __init__(self, journal: Journal, name: str, n_tasks: int):
        self.journal, self.name, self.n_tasks = journal, name, n_tasks
        self.stopped = False
        self._context = self._of(journal.context, name, n_tasks)

    def each(self, tasks: Iterable[T]) -> Iterator[T]:
        """Do the tasks, each of which is begun before it is asked for, until one stops them."""
        doing = iter(tasks)
        for _ in range(self.n_tasks):
            name = "candidate" if self.name == "n_clusters" else "epoch"
            self._task = self._of(self._context, name)
            yield next(doing)
            if self.stopped:
                return

    def done(self, row: dict, attributes: Attributes | None = None) -> None:
        """The task under way has ended with this record."""
        self.journal.note({"stage": self.name, **row})
        self.stopped |= self.journal.end(self._task, attributes)

    def close(self) -> None:
        """The stage is over."""
        self.stopped |= self.journal.end(self._context)

    def _of(self, context: Any, name: str, n_tasks: int = 0) -> Any:
        """A task within another's context, begun."""
        task = context and context.subcontext(task_name=name, max_subtasks=n_tasks)
        self.journal.begin(task)
        return task


def _line(row: dict, max_epochs: int) -> str:
    if row["stage"] == "n_clusters":
        return f"n_clusters {row['n_clusters']:>3}  score {row['score']:.3f}"
    return (
        f"epoch {row['epoch'] + 1:>3}/{max_epochs} {row['stage']:<8}  loss {row['loss']:.3f}  "
        f"changed {row['changed']:.1%}  sizes {row['smallest']}-{row['largest']}  "
        f"{row['seconds']:.2f} s"
    )
