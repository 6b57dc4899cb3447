"""Which rows of a fit this process works on, and what becomes of the rows of all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray

from sklearn_sela._decoding import spread
from sklearn_sela._device import seeded
from sklearn_sela._distributed import Shards
from sklearn_sela._images import Images

_LOOKED_AT = 64  # rows that tell X from another


@dataclass(frozen=True)
class Share:
    """The rows that this process works on, of all that the processes of a fit have.

    A row is known here by its number among these, in X by ``rows``, and among those of all
    processes, in the order of ``labels_``, by ``places``.
    """

    shards: Shards
    rows: NDArray[np.int64]  # (n_own,)
    n: int  # that all processes work on
    n_given: int  # and those left out
    offset: int = 0  # of the first row of X
    within_reach: bool = True  # whether X also has the rows of the others

    @classmethod
    def of_all(cls, n: int) -> Share:
        """All n rows, of a process alone."""
        return cls(Shards(), np.arange(n), n, n)

    @property
    def places(self) -> NDArray[np.int64]:
        """(n_own,)"""
        return self.rows + self.offset

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, bad: NDArray[np.int64]) -> Share:
        """The same but for some of these rows."""
        good = np.delete(np.arange(len(self)), bad)
        n = round(self.shards.total(len(good)))
        return replace(self, rows=self.rows[good], n=n)

    def part_of(self, limit: int) -> int:
        """How many of ``limit`` rows drawn from all should be of these."""
        return math.ceil(min(limit, self.n) * len(self) / self.n) if len(self) else 0

    def joined(self, values: NDArray[Any]) -> NDArray[Any]:
        """What each process has of some of its rows, one after the other, on all."""
        return values if self.shards.alone else np.concatenate(self.shards.gather(values))

    def whole(self, values: NDArray[Any], first: bool = False) -> NDArray[Any]:
        """(n_given, ...) of all rows, from (n_own, ...); -1 for those left out.

        With ``first``, on the first process alone, and what the others get means nothing.
        """
        if self.shards.alone and len(self) == self.n_given:
            return values
        gather = self.shards.gather_first if first else self.shards.gather
        parts = gather((self.places, values))
        if not parts:
            return values
        out = np.full((self.n_given, *values.shape[1:]), -1, values.dtype)
        for places, part in parts:
            out[places] = part
        return out

    def own(self, whole: NDArray[Any] | None) -> NDArray[Any]:
        """(n_own, ...), from (n_given, ...) that the first process has."""
        places = self.shards.gather_first(self.places)
        return self.shards.scatter([whole[p] for p in places])  # type: ignore[index]


def share_out(X: np.ndarray | Images, shards: Shards, own_rows: bool) -> Share:
    """The share of this process: of rows that all have, dealt out at random; or its X.

    Raises
    ------
    ValueError
        If all should have the same X, and do not.
    """
    n = len(X)
    if shards.alone:
        return Share.of_all(n)
    if own_rows:
        sizes = shards.gather(n)
        offset = sum(sizes[: shards.rank])
        return Share(shards, np.arange(n), sum(sizes), sum(sizes), offset, False)
    if isinstance(X, Images):  # unread: bad ones are looked for, and named, together
        names = [X.name(i) for i in spread(n, _LOOKED_AT)]
        looks = shards.gather(str((X.shape, X.dtype, names)))
    else:
        looks = shards.gather(fingerprint(X))
    if len(set(looks)) > 1:
        raise ValueError(
            "X differs between the processes of this fit: give all of them the same X; or, if each "
            "has rows of its own, set distributed='own_rows'; or, if each is to fit alone, "
            "distributed=None."
        )
    # At random: rows are often in an order, and each process should see all kinds.
    dealt = np.random.default_rng(0).permutation(n)[shards.rank :: shards.size]
    return Share(shards, np.sort(dealt), n, n)


def fingerprint(X: np.ndarray | Images, share: Share | None = None) -> str:
    """Cheap identity of the rows of all: a hash of shape, dtype and at most 64 of them.

    The same however they are shared out. Randomness that items draw from torch's global
    generator is the same each time.
    """
    share = Share.of_all(len(X)) if share is None else share
    looked_at = spread(share.n_given, _LOOKED_AT) - share.offset
    with seeded(0, torch.device("cpu")):
        rows = np.ascontiguousarray(X[looked_at[(looked_at >= 0) & (looked_at < len(X))]])
    rows = rows if share.within_reach else share.joined(rows)
    return joblib.hash(((share.n_given, *X.shape[1:]), str(X.dtype), rows))
