"""Augmentation: random changes of a batch that should not change clusters, drawn per sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Augment = Callable[[Tensor], Tensor]


class Jitter:
    """Gaussian noise on standardised features."""

    def __init__(self, generator: torch.Generator, std: float = 0.1):
        self.generator, self.std = generator, std

    def __call__(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator, device=x.device)
        return x + self.std * noise


class ImageAugment:
    """Affine maps, and flips where the data allow: views of grey images.

    Each image draws its own rotation (15 degrees), scale (15 %), shear (0.2) and shift (an
    eighth of the side), uniformly up to the limits in brackets.
    """

    def __init__(self, generator: torch.Generator, flip: bool = False):
        self.generator, self.flip = generator, flip

    def __call__(self, x: Tensor) -> Tensor:
        n = len(x)

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(n, *shape, generator=self.generator, device=x.device) - 1

        angle, scale, shear = uniform() * math.radians(15), 1 + 0.15 * uniform(), 0.2 * uniform()
        shift = 0.25 * uniform(2)  # of half a side
        cos, sin = scale * angle.cos(), scale * angle.sin()
        mirror = torch.ones(n, device=x.device)
        if self.flip:
            coin = torch.rand(n, generator=self.generator, device=x.device)
            mirror = (coin < 0.5) * 2.0 - 1.0
        theta = torch.stack([cos * mirror, shear - sin, sin * mirror, cos], 1).view(n, 2, 2)
        return _warp(x, torch.cat([theta, shift[:, :, None]], 2))


class PhotoAugment:
    """Random resized crops, flips, colour jitter and greyscale: views of colour images [1]_.

    Each image draws its own: the share of its area (a quarter to all) and the aspect ratio
    (3/4 to 4/3) of the crop; brightness, contrast and saturation (40 % each) and hue (36
    degrees), all of them one linear map of the colours; one image in five loses them.

    References
    ----------
    .. [1] Chen, Kornblith, Norouzi, Hinton. A simple framework for contrastive learning of
       visual representations. ICML 2020, appendix A.
    """

    def __init__(self, generator: torch.Generator, flip: bool = False):
        self.generator, self.flip = generator, flip
        self._luma = torch.tensor([0.299, 0.587, 0.114], device=generator.device).expand(3, 3)
        # Generator of rotations about the grey axis, (1, 1, 1).
        turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=generator.device)
        self._turn = turn / math.sqrt(3)

    def __call__(self, x: Tensor) -> Tensor:
        return self._recolour(self._crop(x))

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        g = self.generator
        return low + (high - low) * torch.rand(shape, generator=g, device=g.device)

    def _crop(self, x: Tensor) -> Tensor:
        n = len(x)
        area, ratio = self._uniform(0.25, 1, n), self._uniform(-1, 1, n).mul(math.log(4 / 3)).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        mirror = self._uniform(-1, 1, n).sign() if self.flip else torch.ones_like(width)
        across, down = (self._uniform(-1, 1, n) * (1 - side) for side in (width, height))
        none = torch.zeros_like(width)
        theta = torch.stack([width * mirror, none, across, none, height, down], 1)
        return _warp(x, theta.view(n, 2, 3), "border")

    def _recolour(self, x: Tensor) -> Tensor:
        n, pixels = len(x), x.permute(0, 2, 3, 1).flatten(1, 2)  # (n, H * W, 3)
        contrast, saturation = self._uniform(0.6, 1.4, n, 1, 1), self._uniform(0.6, 1.4, n, 1, 1)
        saturation = saturation * (self._uniform(0, 1, n, 1, 1) >= 0.2)
        angle = self._uniform(-1, 1, n, 1, 1) * math.radians(36)
        one = torch.eye(3, device=x.device)
        hue = one + angle.sin() * self._turn + (1 - angle.cos()) * (self._turn @ self._turn)
        colours = contrast * (self._luma + saturation * (one - self._luma)) @ hue
        mean = pixels.mean((1, 2), keepdim=True)
        offset = (1 - contrast) * mean + self._uniform(-0.4, 0.4, n, 1, 1)
        pixels = torch.baddbmm(offset, pixels, colours.mT)
        return pixels.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _warp(x: Tensor, theta: Tensor, beyond: str = "zeros") -> Tensor:
    """Images sampled at affine maps (n, 2, 3) of their coordinates; ``beyond`` their edges."""
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode=beyond, align_corners=False)
