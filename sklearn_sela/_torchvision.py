"""torchvision's classification networks as backbones: what is changed in them, and undone again.

torchvision is imported when one is asked for: it takes seconds, and tables do without.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

SMALL_IMAGE = 64  # pixels, up to which a ResNet's stem does not reduce images
# Left out: classifiers that are not one linear layer with a bias, and several in training.
_OTHERWISE = ("squeezenet", "maxvit", "googlenet", "inception")
_SIDES = (16, 32, 64, 128, 224)  # pixels, tried when images are too small
_NAMED = 5  # keys of weights that an error lists


class TorchvisionBackbone(nn.Module):
    """A classification network of torchvision without its last layer, for images.

    ``network`` is torchvision's own class with the layer ``last`` an identity, but for two
    changes that :meth:`plain_state_dict` undoes:

    - ResNets learn images of at most 64 pixels through a 3 x 3 convolution of stride 1, without
      the max-pooling that follows (He et al., CVPR 2016, on CIFAR): they would keep 2 x 2
      pixels of 64. Not with ``weights``, which are torchvision's stem's.
    - AlexNet has batch norm after each convolution, as in the paper (Asano et al., ICLR 2020).

    Grey images are shown as colour images of three equal channels, so that the weights are
    those of a network for colour images, whatever it learned from.

    Parameters
    ----------
    name : str
        Of :func:`torchvision_names`.
    image_shape : tuple of int
        (channels, height, width).
    weights : str, path, mapping of str to Tensor, or None
        To start from: see :func:`read_weights`.
    small_stem : bool, default=True
        Whether a ResNet without weights may have another stem for small images.

    Raises
    ------
    ValueError
        For images that the network cannot take, or weights that are not its own.
    """

    def __init__(
        self,
        name: str,
        image_shape: tuple[int, int, int],
        weights: Any = None,
        small_stem: bool = True,
    ):
        super().__init__()
        from torchvision.models import ResNet

        channels, height, width = image_shape
        if channels not in (1, 3):
            raise ValueError(
                f"backbone={name!r} takes images of 1 or 3 channels, not {channels}: use "
                "backbone='convnet', or a torch module of your own."
            )
        network = _network(name, height)
        if network is None or not _takes(network, height, width):
            enough = [side for side in _SIDES if _side_is_enough(name, side)]
            larger = [side for side in enough if side >= min(height, width)] or enough[-1:]
            raise ValueError(
                f"backbone={name!r} cannot take images of {height} x {width} pixels; it takes "
                f"{larger[0]} x {larger[0]}. Resize them (files: image_shape=({larger[0]}, "
                f"{larger[0]})), or use backbone='convnet'."
            )
        self.name = name
        self.last = [key for key, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
        network.set_submodule(self.last, nn.Identity())
        self.small_stem = False
        if weights is not None:
            _load(network, self.last, read_weights(name, weights), name)
        elif isinstance(network, ResNet) and max(height, width) <= SMALL_IMAGE and small_stem:
            self.small_stem = True
            network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        if name == "alexnet":
            features: Any = network.features
            for i, layer in enumerate(features):
                if isinstance(layer, nn.Conv2d):  # together in its place: numbers stay the same
                    features[i] = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.expand(-1, 3, -1, -1))

    def plain_state_dict(self) -> dict[str, Tensor]:
        """Weights as torchvision's own class has them, on the CPU, but for the last layer's.

        AlexNet's batch norm is folded into its convolutions. The 3 x 3 kernels of a small stem
        are the middle of 7 x 7 ones, the rest of them zeros.
        """
        network: Any = copy.deepcopy(self.network).cpu().eval()
        conv: Any
        norm: Any
        if self.name == "alexnet":
            for i, layer in enumerate(network.features):
                if isinstance(layer, nn.Sequential):
                    conv, norm = layer
                    network.features[i] = fuse_conv_bn_eval(conv, norm)
        state = network.state_dict()  # changed in place: it tells the version of its layout
        if self.small_stem:
            state["conv1.weight"] = F.pad(state["conv1.weight"], (2, 2, 2, 2))
        state.update({key: value.contiguous() for key, value in state.items()})
        return state


def torchvision_names() -> list[str]:
    """Names of torchvision's classification networks, of those that end in a linear layer."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not name.startswith(_OTHERWISE)]


def closest_names(name: str) -> list[str]:
    """Of those, the ones spelt most like it."""
    return difflib.get_close_matches(name.lower(), torchvision_names(), n=3)


def read_weights(name: str, weights: Any) -> dict[str, Tensor]:
    """The state dict that the parameter ``weights`` of a network stands for.

    Parameters
    ----------
    name : str
        Of the network.
    weights : str, path or mapping of str to Tensor
        File of a state dict, read without running code; torchvision's name of weights, such as
        "DEFAULT", that torch's cache has already; or a state dict.

    Raises
    ------
    ValueError
        For a file that is not there, or that holds no state dict; names the remedy.
    """
    from torchvision.models import get_model, get_model_weights

    if isinstance(weights, Mapping):
        state: Any = weights
    elif isinstance(weights, str) and weights in (known := get_model_weights(name).__members__):
        file = Path(urlparse(known[weights].url).path).name
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        if not (cache / file).exists():  # a fit does not go to the network
            raise ValueError(
                f"weights={weights!r} of {name!r} are not on this machine: put {file} into "
                f"{str(cache)!r}, or call torchvision.models.get_model({name!r}, "
                f"weights={weights!r}) once, which downloads it."
            )
        state = get_model(name, weights=known[weights]).state_dict()
    else:
        path = os.fsdecode(weights)
        if not os.path.isfile(path):
            raise ValueError(
                f"weights={path!r} is neither a file nor one of torchvision's "
                f"{list(get_model_weights(name).__members__)}."
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch makes of a file that is not one of its own
            what = (str(error).splitlines() or ["empty"])[0]
            raise ValueError(
                f"weights={path!r} holds no state dict ({type(error).__name__}: {what}). Save one "
                "with torch.save(network.state_dict(), path)."
            ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("weights must hold a state dict: tensors by name, nothing else.")
    return dict(state)


def _load(network: nn.Module, last: str, state: dict[str, Tensor], name: str) -> None:
    """Weights of all but the last layer; ValueError names the keys that do not fit."""
    own = network.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith(f"{last}.")}
    counters = {key for key in own if key.endswith(".num_batches_tracked")}  # old files have none
    wrong = {
        "missing": sorted(own.keys() - state.keys() - counters),
        "unexpected": sorted(state.keys() - own.keys()),
        "of other shape": [
            f"{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ],
    }
    found = [
        f"{what}: {', '.join(keys[:_NAMED])}{', ...' * (len(keys) > _NAMED)}"
        for what, keys in wrong.items()
        if keys
    ]
    if found:
        raise ValueError(
            f"weights do not fit backbone={name!r} ({'; '.join(found)}). Use a state dict of "
            f"torchvision.models.{name}; of its keys, only those of {last!r} may be missing."
        )
    own.update(state)
    network.load_state_dict(own)


def _network(name: str, side: int) -> nn.Module | None:
    """torchvision's network; None if it is made for one size of images, and cannot be this."""
    from torchvision.models import get_model

    if not name.startswith("vit_"):
        return get_model(name)
    try:
        return get_model(name, image_size=side)
    except AssertionError:  # of patches that do not fill the image
        return None


def _takes(network: nn.Module, height: int, width: int) -> bool:
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError):  # nothing is left between poolings; not square
        return False
    finally:
        network.train()
    return True


def _side_is_enough(name: str, side: int) -> bool:
    with torch.device("meta"):  # shapes without numbers
        network = _network(name, side)
        return network is not None and _takes(network, side, side)
