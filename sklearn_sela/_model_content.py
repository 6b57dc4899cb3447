"""A trained model as plain values and arrays, and made of them again if they fit together."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, fields
from numbers import Integral
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sklearn_sela import _archive
from sklearn_sela._backbones import OWN_BACKBONES, feature_width, make_backbone
from sklearn_sela._data import Scaler
from sklearn_sela._device import seeded
from sklearn_sela._model import Model
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._torchvision import torchvision_names
from sklearn_sela._training import Schedule
from sklearn_sela._views import ViewSettings

_MOST_ROWS = 1 << 20  # of a batch, that a file may ask for


def content_of(model: Model) -> dict[str, Any]:
    """What :func:`model_of` takes; a backbone or views of the user's own are left out."""
    network, views = model.network, model.views
    return {
        "backbone": model.backbone,
        "small_stem": getattr(network.backbone, "small_stem", False),
        "freeze": network.freeze,
        "shape": network.shape,
        "weights": {
            name: t.detach().cpu().contiguous().numpy() for name, t in network.state_dict().items()
        },
        "best_head": model.best_head,
        "shift": np.asarray(model.scaler.shift),
        "scale": np.asarray(model.scaler.scale),
        "image_shape": model.scaler.image_shape,
        "n_values": model.n_values,
        "n_features": model.n_features,
        "views": {
            field.name: getattr(views, field.name)
            for field in fields(views)
            if _archive.storable(getattr(views, field.name))  # else the parameter, given to load
        },
        "schedule": {**asdict(model.schedule), "precision": _name(model.schedule.precision)},
        "one_thread": model.one_thread,
        "meanings": [{"row": m.row, "col": m.col, "data": m.data} for m in model.meanings],
    }


def model_of(content: dict[str, Any], estimator: Any) -> Model:
    """The model; what is the user's own is the estimator's. Errors of any kind if parts do not fit.

    Whatever sizes the content names, it takes no more memory than its arrays.
    """
    (n_heads, k), image_shape = content["shape"], content["image_shape"]
    n_values, n_features = content["n_values"], content["n_features"]
    insist(all(whole(v, 1) for v in (n_heads, k, n_values, n_features)), "sizes")
    shape = (n_values,) if image_shape is None else image_shape
    insist(isinstance(shape, tuple) and all(whole(s, 1) for s in shape), "image_shape")
    insist(len(shape) in (1, 3) and math.prod(shape) == n_values, "image_shape")
    insist(whole(content["best_head"], 0, n_heads - 1), "best_head")
    scaler = Scaler.__new__(Scaler)
    scaler.image_shape = image_shape
    scaler.shift, scaler.scale = content["shift"], content["scale"]
    moments = (n_values,) if image_shape is None else (shape[0], 1, 1)
    insist(are_numbers(scaler.shift, np.float64, moments), "shift")
    insist(are_numbers(scaler.scale, np.float64, moments) and (scaler.scale > 0).all(), "scale")
    views = ViewSettings(**{"augment": estimator.augment, **content["views"]})
    insist(views.images == (image_shape is not None), "views")
    schedule = content["schedule"]
    insist(whole(schedule["label_rows"], 1, _MOST_ROWS), "label_rows")
    dtypes = {_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    schedule = Schedule(**{**schedule, "precision": dtypes[schedule["precision"]]})
    flags = [content[name] for name in ("one_thread", "freeze", "small_stem")]
    flags += [views.colour, views.mirrors]
    insist(all(isinstance(flag, bool | np.bool_) for flag in flags), "flags")
    insist(len(content["meanings"]) == n_heads, "meanings")
    return Model(
        _network_of(content, estimator.backbone, shape),
        content["best_head"],
        scaler,
        n_values,
        n_features,
        views,
        schedule,
        content["one_thread"],
        content["backbone"],
        [_meaning(**parts, k=k) for parts in content["meanings"]],
    )


def fitted_with(model: Model) -> dict[str, Any]:
    """Parameters of the fit that the model keeps, whatever the estimator's are since."""
    views, schedule = model.views, asdict(model.schedule)
    del schedule["label_rows"]
    epochs = schedule.pop("epochs")
    return {
        **schedule,
        "max_epochs": epochs,
        "precision": _name(model.schedule.precision),
        "augment": views.augment,
        "n_neighbors": views.n_neighbors,
        "neighbor_probability": views.neighbor_probability,
    }


def _network_of(content: dict[str, Any], own: Any, shape: tuple[int, ...]) -> SelfLabelNetwork:
    """Its modules made again, without memory, and the weights put in their places."""
    name, (n_heads, k), n_features = content["backbone"], content["shape"], content["n_features"]
    weights = {key: torch.from_numpy(array) for key, array in content["weights"].items()}
    with seeded(0, torch.device("cpu")):
        if name is None:  # not called: lazy modules take their shapes from the weights
            backbone = copy.deepcopy(own) if isinstance(own, nn.Module) else own()
            backbone.cpu().float()
        else:
            # No others: torchvision fetches weights for some of its networks.
            insist(name in OWN_BACKBONES or name in torchvision_names(), "backbone")
            with torch.device("meta"):
                backbone = make_backbone(name, shape, small_stem=content["small_stem"])
                width = feature_width(backbone, torch.zeros(2, *shape))
            insist(width == n_features, "n_features")
        with torch.device("meta"):
            network = SelfLabelNetwork(backbone, n_features, n_heads, k, content["freeze"])
    state = network.state_dict()  # changed in place: it tells the version of its layout
    insist(
        weights.keys() == state.keys()
        and all(_takes(own, weights[key]) for key, own in state.items()),
        "weights: are they of the same backbone?",
    )
    state.update(weights)
    network.load_state_dict(state, assign=True)
    insist(not any(t.is_meta for t in network.buffers()), "buffers")
    if len(shape) == 3:
        network.backbone.to(memory_format=torch.channels_last)
    return network.eval()


def _takes(own: Tensor, weights: Tensor) -> bool:
    return own.dtype == weights.dtype and (is_lazy(own) or own.shape == weights.shape)


def _meaning(row: np.ndarray, col: np.ndarray, data: np.ndarray, k: int) -> sparse.coo_array:
    insist(are_numbers(data, np.float32, row.shape) and (abs(data - 0.5) <= 0.5001).all(), "shares")
    insist(row.dtype.kind == col.dtype.kind == "i", "meanings")
    return sparse.coo_array((data, (row, col)), (k, k))


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


# What content must be


def are_numbers(value: Any, dtype: Any, shape: tuple[int, ...]) -> bool:
    """Whether it is a finite array of this type and shape."""
    return value.dtype == dtype and value.shape == shape and bool(np.isfinite(value).all())


def whole(value: Any, least: int, most: float = math.inf) -> bool:
    """Whether it is an integer, of NumPy's or not, in a range."""
    number = isinstance(value, Integral) and not isinstance(value, bool)
    return number and least <= int(value) <= most


def insist(right: Any, what: str) -> None:
    if not right:
        raise ValueError(f"wrong {what}")
