"""A fitted clusterer as plain torchvision: a state dict, and the transform that goes before."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from PIL import Image
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from sklearn_sela._decoding import Files, pixels
from sklearn_sela._torchvision import TorchvisionBackbone


def torchvision_state_dict(clusterer: Any, classifier: bool = True) -> dict[str, Tensor]:
    """Trained weights of a backbone of torchvision's, as torchvision's own class takes them.

    With the predicting head as its last layer, the network predicts the clusters. Batch norm of
    ``backbone="alexnet"`` is folded into the convolutions, which changes nothing it predicts.

    Parameters
    ----------
    clusterer : SelfLabelClusterer
        Fitted, with a ``backbone`` of torchvision's by name.
    classifier : bool, default=True
        Whether the last layer is among them; the body of a detection network has none.

    Returns
    -------
    dict of str to Tensor
        On the CPU. ``load_state_dict`` takes it with ``strict=True``, of
        ``torchvision.models.get_model(name, num_classes=clusterer.n_clusters_)``, for "vit_..."
        with the ``image_size`` of the fit too.

    Raises
    ------
    ValueError
        If the backbone is another.

    Warns
    -----
    UserWarning
        With ``classifier``, for a ResNet that learned images of at most 64 pixels: it predicts
        the clusters after ``network.conv1.stride = 1, 1; network.maxpool = torch.nn.Identity()``
        as its stem did not reduce them.

    Examples
    --------
    >>> import torch, torchvision
    >>> from sklearn_sela import SelfLabelClusterer, torchvision_state_dict, torchvision_transform
    >>> X = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    >>> X[::2, :, 8:24] = 200  # stripes
    >>> quick = {"n_clusters": 2, "freeze": True, "max_epochs": 4, "random_state": 0}
    >>> clusterer = SelfLabelClusterer(backbone="mnasnet0_5", **quick).fit(X)
    >>> network = torchvision.models.mnasnet0_5(num_classes=2).eval()
    >>> network.load_state_dict(torchvision_state_dict(clusterer), strict=True)
    <All keys matched successfully>
    >>> with torch.no_grad():
    ...     labels = network(torchvision_transform(clusterer)(X)).argmax(1)
    >>> bool((labels.numpy() == clusterer.labels_).all())
    True
    """
    check_is_fitted(clusterer)
    network = clusterer.network_
    backbone = network.backbone
    if not isinstance(backbone, TorchvisionBackbone):
        raise ValueError(
            f"backbone={clusterer.backbone!r} is not torchvision's: use one of its names, as in "
            "backbone='resnet18', or network_.state_dict() as it is."
        )
    state = backbone.plain_state_dict()
    if classifier:
        for name, of_heads in network.heads.state_dict().items():
            head = of_heads.unflatten(0, network.shape)[clusterer.best_head_]
            state[f"{backbone.last}.{name}"] = head.cpu().clone()
        if backbone.small_stem:
            warnings.warn(
                "The images were small, and the network did not reduce them in its stem: set "
                "network.conv1.stride = 1, 1 and network.maxpool = torch.nn.Identity(), or it "
                "predicts something else.",
                UserWarning,
                stacklevel=2,
            )
    return state


def torchvision_transform(clusterer: Any) -> nn.Module:
    """What ``predict`` does to an image before its network sees it, as a transform.

    Goes where torchvision's transforms go: into a ``Dataset``, or ``v2.Compose``.

    Parameters
    ----------
    clusterer : SelfLabelClusterer
        Fitted to images.

    Returns
    -------
    torch.nn.Module
        Maps a PIL image, a path (turned upright as its EXIF data say), or a tensor (C, H, W) or
        (n, C, H, W) to a float32 tensor of (..., 3, height, width) for networks of torchvision's,
        else of as many channels as X had. Resized to cover that and cut around the centre where
        it has another size. Values must be in the range of X's: 0 to 255 if they were uint8.

    Raises
    ------
    ValueError
        If the clusterer was fitted to vectors.
    """
    check_is_fitted(clusterer)
    if clusterer.image_shape_ is None:
        raise ValueError("clusterer was fitted to vectors: there is no image to transform.")
    scaler, shape = clusterer._model.scaler, clusterer.image_shape_
    colour = isinstance(clusterer.network_.backbone, TorchvisionBackbone)
    return _Transform(scaler.shift, scaler.scale, shape, 3 if colour else shape[0])


class _Transform(nn.Module):
    """To C x H x W pixels, scaled, then to ``channels``."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Any, scale: Any, shape: tuple[int, int, int], channels: int):
        super().__init__()
        # float64, as a fit computes with values of other types than uint8
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float64))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))
        self.shape, self.channels = shape, channels

    def forward(self, image: Any) -> Tensor:
        if isinstance(image, str | os.PathLike):
            image = torch.tensor(Files([os.fsdecode(image)], self.shape)[0])
        elif isinstance(image, Image.Image):
            image = torch.tensor(pixels(image, self.shape))
        elif not isinstance(image, Tensor) or image.shape[-3:-2] != self.shape[:1]:
            raise ValueError(
                f"Expected a PIL image, a path or a tensor of (..., {self.shape[0]}, height, "
                f"width), got {tuple(getattr(image, 'shape', ())) or type(image).__name__}."
            )
        x = _covering(image, self.shape[1:])
        x = ((x.to(self.shift) - self.shift) / self.scale).float()
        return x.expand(*x.shape[:-3], self.channels, -1, -1)

    def extra_repr(self) -> str:
        return f"to {self.channels} x {self.shape[1]} x {self.shape[2]}"


def _covering(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Images resized so that they cover the size, and cut around the centre."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    from torchvision.transforms.v2 import functional as v2

    (height, width), (h, w) = x.shape[-2:], size
    ratio = max(h / height, w / width)
    larger = [max(h, round(height * ratio)), max(w, round(width * ratio))]
    return v2.center_crop(v2.resize(x, larger, antialias=True), list(size))
