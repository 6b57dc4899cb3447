"""Views: what a row may look like without changing its cluster; and which views data get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sklearn_sela._augment import Augment, ImageAugment, Jitter, PhotoAugment
from sklearn_sela._data import Geometry, Rows
from sklearn_sela._shares import Share

_SHARE = 8  # neighbours of a row are at most this part of the rows
#: From parts of the rows (numbers in the share) to a random view of each row, part by part.
ViewStream = Callable[[Iterable[Tensor]], Iterator[Tensor]]


@dataclass(frozen=True)
class ViewSettings:
    """How rows are seen: the estimator's parameters, and what the training data say of "auto"."""

    augment: Any  # "auto", None or a callable
    n_neighbors: int | str
    neighbor_probability: float
    images: bool
    colour: bool
    mirrors: bool  # mirrored images look like the data

    def views(self, rows: Rows, geometry: Geometry, generator: torch.Generator) -> Views:
        """Those of these rows."""
        neighbors = None
        if k := self._how_many(rows.share.n):
            neighbors = torch.from_numpy(geometry.neighbors(k)).to(generator.device)
        augment = self._augment(generator)
        return Views(rows, augment, neighbors, self.neighbor_probability, generator)

    def _augment(self, generator: torch.Generator) -> Augment | None:
        if not isinstance(self.augment, str):
            return self.augment
        if not self.images:
            return Jitter(generator)
        kind = PhotoAugment if self.colour else ImageAugment
        return kind(generator, flip=self.mirrors)

    def _how_many(self, n: int) -> int:
        """Neighbours of each of n rows."""
        if not isinstance(self.n_neighbors, str):
            return int(self.n_neighbors)
        # Vectors have no augmentation to speak of: more neighbours make up for it. Near in
        # pixels, photographs show different things (docs/images.rst). The number must not
        # depend on n_clusters: neither do the features, nor a score.
        most = 20 if not self.images else 0 if self.colour else 10
        return min(most, max(1, n // _SHARE))


class Views:
    """``views(parts)``: random views of rows, by augmentation or by a neighbour."""

    def __init__(
        self,
        rows: Rows,
        augment: Augment | None,
        neighbors: Tensor | None,
        probability: float,
        generator: torch.Generator,
    ):
        self.rows, self.augment = rows, augment
        self.neighbors = neighbors  # (n, k) indices into X; k may be 0
        self.probability, self.generator = probability, generator
        self._own = torch.from_numpy(rows.share.rows).to(generator.device)

    def __call__(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        for x in self.rows.read(map(self._pick, parts)):
            yield self._change(x)

    def nearest(self, k: int) -> Views:
        """The same with at most k neighbours of each row."""
        near = None if self.neighbors is None else self.neighbors[:, :k]
        return Views(self.rows, self.augment, near, self.probability, self.generator)

    def _pick(self, numbers: Tensor) -> Tensor:
        """Indices into X of the rows, or of neighbours of theirs."""
        indices = self._own[numbers]
        if self.neighbors is None or not self.neighbors.shape[1]:
            return indices
        n, k = len(indices), self.neighbors.shape[1]
        device = self.generator.device
        pick = torch.randint(k, (n,), generator=self.generator, device=device)
        swap = torch.rand(n, generator=self.generator, device=device) < self.probability
        return torch.where(swap, self.neighbors[numbers, pick].long(), indices)

    def _change(self, x: Tensor) -> Tensor:
        if self.augment is None or not len(x):
            return x
        view = self.augment(x)
        if not isinstance(view, Tensor):
            raise TypeError(f"augment must return a tensor, got {type(view).__name__}.")
        if view.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"augment must return a view of each row: it made shape {tuple(view.shape)} of "
                f"{len(x)} rows."
            )
        return view.float()


class FrozenViews:
    """``views(parts)``: features of one of a few views of each row, drawn once for all.

    ``features`` is (n_views, n, d), of the rows' views as ``embed`` sees them; rows are of the
    share, and those of the other processes follow or go before.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        views: ViewStream,
        rows: Tensor,
        share: Share,
        n_views: int,
        batch_rows: int,
        generator: torch.Generator,
    ):
        self.generator = generator
        parts = rows.split(batch_rows)
        with torch.no_grad():
            seen = [torch.cat([*map(embed, views(parts))]) for _ in range(n_views)]
        own = torch.stack(seen, 1).cpu().numpy()
        self.features = torch.from_numpy(share.joined(own)).to(generator.device).transpose(0, 1)

    def __call__(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        device = self.generator.device
        for indices in parts:
            size = (len(indices),)
            pick = torch.randint(len(self.features), size, generator=self.generator, device=device)
            yield self.features[pick, indices]
