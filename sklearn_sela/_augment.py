"""Views of a batch: random changes that should not change the cluster, drawn per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sklearn_sela._data import Rows

Augment = Callable[[Tensor], Tensor]
#: From parts of the rows (indices) to a random view of each row, part by part.
ViewStream = Callable[[Iterable[Tensor]], Iterator[Tensor]]


class Jitter:
    """Gaussian noise on standardised features."""

    def __init__(self, generator: torch.Generator, std: float = 0.1):
        self.generator, self.std = generator, std

    def __call__(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator, device=x.device)
        return x + self.std * noise


class ImageAugment:
    """Affine maps, flips where the data allow, brightness and contrast for colour images.

    Each image draws its own rotation (15 degrees), scale (15 %), shear (0.2) and shift (an
    eighth of the side), uniformly up to the limits in brackets at strength 1.
    """

    def __init__(self, generator: torch.Generator, strength: float = 1.0, flip: bool = False):
        self.generator, self.strength, self.flip = generator, strength, flip

    def __call__(self, x: Tensor) -> Tensor:
        n, s = len(x), self.strength

        def uniform(*shape: int) -> Tensor:
            u = torch.rand(n, *shape, generator=self.generator, device=x.device)
            return s * (2 * u - 1)

        angle, scale, shear = uniform() * math.radians(15), 1 + 0.15 * uniform(), 0.2 * uniform()
        shift = 0.25 * uniform(2)  # of half a side
        cos, sin = scale * angle.cos(), scale * angle.sin()
        mirror = torch.ones(n, device=x.device)
        if self.flip:
            coin = torch.rand(n, generator=self.generator, device=x.device)
            mirror = (coin < 0.5) * 2.0 - 1.0
        theta = torch.stack([cos * mirror, shear - sin, sin * mirror, cos], 1).view(n, 2, 2)
        theta = torch.cat([theta, shift[:, :, None]], 2)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        if x.shape[1] == 3:
            gain, offset = 1 + 0.4 * uniform(1, 1, 1), 0.4 * uniform(1, 1, 1)
            x = gain * x + offset
        return x


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
        self.rows, self.augment, self.neighbors = rows, augment, neighbors
        self.probability, self.generator = probability, generator

    def __call__(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        for x in self.rows.read(map(self._pick, parts)):
            yield self._change(x)

    def nearest(self, k: int) -> Views:
        """The same with at most k neighbours of each row."""
        near = None if self.neighbors is None else self.neighbors[:, :k]
        return Views(self.rows, self.augment, near, self.probability, self.generator)

    def _pick(self, indices: Tensor) -> Tensor:
        """The rows, or neighbours of theirs."""
        if self.neighbors is None:
            return indices
        n, k = len(indices), self.neighbors.shape[1]
        device = self.generator.device
        pick = torch.randint(k, (n,), generator=self.generator, device=device)
        swap = torch.rand(n, generator=self.generator, device=device) < self.probability
        return torch.where(swap, self.neighbors[indices, pick].long(), indices)

    def _change(self, x: Tensor) -> Tensor:
        if self.augment is None:
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

    ``features`` is (n_views, n, d), of the rows' views as ``embed`` sees them.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        views: ViewStream,
        rows: Tensor,
        n_views: int,
        batch_rows: int,
        generator: torch.Generator,
    ):
        self.generator = generator
        parts = rows.split(batch_rows)
        with torch.no_grad():
            seen = [torch.cat([*map(embed, views(parts))]) for _ in range(n_views)]
        self.features = torch.stack(seen)

    def __call__(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        device = self.generator.device
        for indices in parts:
            size = (len(indices),)
            pick = torch.randint(len(self.features), size, generator=self.generator, device=device)
            yield self.features[pick, indices]
