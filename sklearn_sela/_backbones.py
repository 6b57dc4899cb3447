"""Backbones: functions that return a module mapping a batch to features, and their names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sklearn_sela._torchvision import TorchvisionBackbone

OWN_BACKBONES = ("mlp", "convnet")
FEATURES = 128  # width of the learned features, as in the clustering heads' input


def make_backbone(
    name: str, shape: tuple[int, ...], weights: Any = None, small_stem: bool = True
) -> nn.Module:
    """The backbone of a name, for rows of a shape; weights are drawn from torch's generator.

    Parameters
    ----------
    name : str
        "mlp", "convnet", or a classification network of torchvision, "resnet18" say; its
        "alexnet" is given batch norm. Of theirs, all but the last layer: see
        :class:`TorchvisionBackbone`.
    shape : tuple of int
        (n_features,), or (channels, height, width) of images.
    weights : str, path or mapping, default=None
        To start from, of torchvision's networks: see ``read_weights`` in ``_torchvision.py``.
    small_stem : bool, default=True
        Whether a ResNet may have another stem for small images.

    Returns
    -------
    torch.nn.Module
        Maps (n, *shape) to (n, width); :func:`feature_width` tells the width.

    Raises
    ------
    ValueError
        For vectors where images are needed, images too small, or weights that do not fit.
    """
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), mlp(math.prod(shape)))
    if len(shape) != 3:
        raise ValueError(
            f"backbone={name!r} needs images: pass X as (n_samples, channels, height, width), or "
            "flat rows with image_shape=(height, width)."
        )
    if name == "convnet":
        return convnet(shape)
    return TorchvisionBackbone(name, shape, weights, small_stem)


def mlp(n_inputs: int) -> nn.Module:
    """Two hidden layers with batch norm, for vectors."""
    return nn.Sequential(*_dense(n_inputs, 512), *_dense(512, 512), *_dense(512, FEATURES))


def convnet(image_shape: tuple[int, int, int]) -> nn.Module:
    """3 x 3 convolutions with batch norm, halving until the short side is 4 pixels or less.

    8 x 8 pixels make one stage of 32 channels, 28 x 28 and 32 x 32 three of 16, 32 and 64.
    """
    channels, height, width = image_shape
    layers: list[nn.Module] = []
    out = 16 if min(height, width) > 8 else 32
    while not layers or min(height, width) > 4:
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]
        if min(height, width) > 4:
            layers.append(nn.MaxPool2d(2))  # the largest, cut off at 0: a quarter of the cutting
            height, width = height // 2, width // 2
        layers.append(nn.ReLU(inplace=True))
        channels, out = out, min(2 * out, 256)
    layers += [nn.Flatten(), *_dense(channels * height * width, FEATURES)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def feature_width(backbone: nn.Module, x: Tensor) -> int:
    """Features per row that the backbone makes of a batch x; TypeError or ValueError if none."""
    backbone.eval()
    with torch.no_grad():
        made = backbone(x)
    if not isinstance(made, Tensor):
        raise TypeError(f"backbone must return a tensor of features, got {type(made).__name__}.")
    if made.shape[:1] != x.shape[:1] or not made.numel():
        raise ValueError(
            f"backbone must return features for each row: it made shape {tuple(made.shape)} of a "
            f"batch of shape {tuple(x.shape)}."
        )
    return made.flatten(1).shape[1]


def _dense(n_inputs: int, n_outputs: int) -> list[nn.Module]:
    return [
        nn.Linear(n_inputs, n_outputs, bias=False),
        nn.BatchNorm1d(n_outputs),
        nn.ReLU(inplace=True),
    ]
