"""Processes that work on rows each, over torch.distributed: what they add up, and agree on."""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

T = TypeVar("T")

_POLL = 0.05  # seconds


class Shards:
    """The processes of a group, each with rows of its own; without a group, this one alone.

    Whatever is added up is the same on all of them, bit for bit, so that what they compute from
    it is, too. All call the same methods in the same order. ``n_bytes`` counts what this process
    has given into sums.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or None
    """

    def __init__(self, group: Any = None):
        self.group, self.n_bytes = group, 0
        self.alone = group is None
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)
        #: Number of this process on its machine, as torchrun tells, which is that of its GPU.
        self.local_rank = None if self.alone else _whole(os.environ.get("LOCAL_RANK"))
        #: What to catch for Ctrl-C: of several processes, one cannot go on by itself.
        self.interrupts: Any = KeyboardInterrupt if self.alone else ()

    def sum(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Elementwise, over the processes."""
        return self._reduce(numbers, "SUM")

    def total(self, number: float) -> float:
        """The sum of one number."""
        return float(self.sum(np.array([number], dtype=np.float64))[0])

    def max(self, *numbers: float) -> list[float]:
        """Elementwise, over the processes."""
        return self._reduce(np.array(numbers, dtype=np.float64), "MAX").tolist()

    def agree(self, error: Exception | None) -> None:
        """Raise on all processes what has gone wrong on one: others would wait for it in vain."""
        (failed,) = self.max(error is not None)
        if error is not None:
            raise error
        if failed:
            raise ValueError(
                "Another process of the group was given data or parameters that it refused: see "
                "its own error."
            )

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """What goes wrong within on one process is raised on all."""
        problem = None
        try:
            yield
        except Exception as error:
            problem = error
        self.agree(problem)

    def gather(self, part: T) -> list[T]:
        """The parts of all processes, in order, on all."""
        parts: list[Any] = [part] * self.size
        if not self.alone:
            dist.all_gather_object(parts, part, self.group)
        return parts

    def gather_first(self, part: T) -> list[T]:
        """The parts of all processes, in order, on the first; nothing on the others."""
        if self.alone:
            return [part]
        parts: Any = [None] * self.size if self.rank == 0 else None
        dist.gather_object(part, parts, self._first(), self.group)
        return parts or []

    def scatter(self, parts: list[T]) -> T:
        """One of the parts that the first process has for each."""
        if self.alone:
            return parts[0]
        own: list[Any] = [None]
        dist.scatter_object_list(own, parts if self.rank == 0 else None, self._first(), self.group)
        return own[0]

    def first(self, make: Callable[[], T]) -> T:
        """``make()`` of the first process, on all."""
        return self.led(lambda _: make(), lambda: None)

    def led(self, lead: Callable[[Callable[[], Any]], T], together: Callable[[], Any]) -> T:
        """``lead(ask)`` of the first process, on all: whenever it asks, all do ``together()``.

        Raises
        ------
        RuntimeError
            On the others, for an error of the first.
        """
        if self.alone:
            return lead(together)
        if self.rank == 0:

            def ask() -> Any:
                self._tell("together", None)
                return together()

            try:
                made = lead(ask)
            except Exception as error:
                self._tell("failed", f"{type(error).__name__}: {error}")
                raise
            self._tell("made", made)
            return made
        while True:
            what, told = self._tell()
            if what == "together":
                together()
            elif what == "failed":
                raise RuntimeError(f"The first process failed: {told}")
            else:
                return told

    def learner(self, network: nn.Module) -> nn.Module:
        """The network, whose gradients are from now on the mean over the processes.

        The graph must be the same in each step; parameters that it does not use are no trouble.
        """
        if self.alone:
            return network
        kind = nn.parallel.DistributedDataParallel
        # Not before each step: ``average_buffers`` does it at the end of an epoch. Torch 2.13 has
        # another name for it.
        names = inspect.signature(kind).parameters
        off = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {off: False, "static_graph": True, "process_group": self.group}
        return kind(network, **options)

    @torch.no_grad()
    def average_buffers(self, network: nn.Module, weight: float) -> None:
        """Make running statistics the mean over the processes, by their weights."""
        if self.alone:
            return
        # In float64, so that what is equal stays equal to the bit.
        buffers = [b for b in network.buffers() if b.is_floating_point() and b.numel()]
        flat = [b.double().flatten().cpu().numpy() for b in buffers]
        total = self.sum(weight * np.concatenate([*flat, [1.0]]))
        for mean, b in zip(
            np.split(total / total[-1], np.cumsum([f.size for f in flat])), buffers, strict=False
        ):
            b.copy_(torch.from_numpy(mean).view_as(b))

    def _tell(self, what: str = "", told: Any = None) -> tuple[str, Any]:
        """Of the first process to all; on the others, what it tells."""
        box = [what, told]
        dist.broadcast_object_list(box, self._first(), self.group)
        return box[0], box[1]

    def _first(self) -> int:
        return dist.get_global_rank(self.group, 0)

    def _reduce(self, numbers: NDArray[np.float64], how: str) -> NDArray[np.float64]:
        if self.alone:
            return numbers
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        tensor = torch.from_numpy(numbers.copy()).to(device)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=self.group)
        self.n_bytes += numbers.nbytes
        return tensor.cpu().numpy()


def fresh_store(store: Any, rank: int, size: int) -> Any:
    """A part of a store that holds nothing yet, the same for all processes of this attempt.

    torchrun keeps one store over restarts: a process would find addresses there of those that
    were killed before, and wait for them. Counts of restarts differ between machines. So the
    first process names the attempt, the others tell it that they are there, and it lists them:
    a list of an earlier attempt, which may be all that is there yet, does not have them.

    Raises
    ------
    TimeoutError
        When the others have not come by the time that the store allows.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + store.timeout.total_seconds()
    others = range(1, size)
    if rank == 0:
        store.set("attempt", own)
        store.wait([f"{own}/{other}" for other in others])
        seen = [store.get(f"{own}/{other}") for other in others]
        store.set(f"{own}/seen", b" ".join(seen))
        return dist.PrefixStore(own, store)
    while time.monotonic() < end:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{rank}", own)
        if store.check([f"{attempt}/seen"]) and own.encode() in store.get(f"{attempt}/seen"):
            return dist.PrefixStore(attempt, store)
        time.sleep(_POLL)
    raise TimeoutError(f"The first process of {size} has not joined this one, of rank {rank}.")


def _leave() -> None:
    """Leave the group in good order at the end: gloo's threads may abort a process otherwise.

    After an error the others may no longer be there, and NCCL would wait for them.
    """
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        gc.collect()  # fits that are over hold the group, in circles
        dist.destroy_process_group()


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def launched() -> Shards:
    """The processes that this one was started with, by torchrun or in a group made since.

    A process that one of torchrun's has started itself, a worker of joblib's, is alone.
    """
    if not dist.is_available():
        return Shards()
    child = multiprocessing.current_process().name != "MainProcess"
    if not dist.is_initialized() and dist.is_torchelastic_launched() and not child:
        kept, rank, size = next(dist.rendezvous("env://"))
        store = fresh_store(kept, rank, size)
        dist.init_process_group(store=store, rank=rank, world_size=size)  # gloo; NCCL on GPUs
        atexit.register(_leave)
    several = dist.is_initialized() and dist.get_world_size() > 1
    return Shards(dist.group.WORLD if several else None)
