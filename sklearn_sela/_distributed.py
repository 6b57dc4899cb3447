"""Rows shared out among processes: what they add up, over torch.distributed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class Shards:
    """The processes of a group, each with rows of its own; without a group, this one alone.

    Whatever is added up is the same on all of them, bit for bit, so that what they compute from
    it is, too. ``n_bytes`` counts what this process has given into sums.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or None
    """

    def __init__(self, group: Any = None):
        self.group, self.n_bytes = group, 0
        self.alone = group is None

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
                "Another process of the group was given scores or parameters that it refused: see "
                "its own error."
            )

    def _reduce(self, numbers: NDArray[np.float64], how: str) -> NDArray[np.float64]:
        if self.alone:
            return numbers
        import torch.distributed as dist

        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        tensor = torch.from_numpy(numbers.copy()).to(device)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=self.group)
        self.n_bytes += numbers.nbytes
        return tensor.cpu().numpy()
