"""Fitted estimators that outlive their process: pickles that open anywhere, files without code."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from sklearn_sela import _archive
from sklearn_sela._backbones import feature_width, make_backbone
from sklearn_sela._checkpoint import replace_file
from sklearn_sela._data import Scaler
from sklearn_sela._device import resolve_device, seeded
from sklearn_sela._model import Model
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._training import Schedule
from sklearn_sela._validation import check_parameters
from sklearn_sela._views import ViewSettings
from sklearn_sela._warnings import warn_caller

# What scikit-learn keeps in an estimator while it is being fitted.
_PASSING = ("_callback_fit_ctx", "_skl_callbacks_to_teardown")
_LABELS = ("labels_", "self_labels_")
_ATTRIBUTES = (  # in a file, beside the model
    *_LABELS,
    "n_features_in_",
    "feature_names_in_",
    "image_shape_",
    "skipped_",
    "cluster_sizes_",
    "n_clusters_",
    "n_clusters_scores_",
    "history_",
    "n_iter_",
    "loss_",
)
_MOST_ROWS = 1 << 20  # of a batch, that a file may ask for


# Pickles


def packed(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an estimator for a pickle: on the CPU, labels in few bytes, a version."""
    from sklearn_sela import __version__

    state = {name: _on_cpu(value) for name, value in state.items() if name not in _PASSING}
    if "_model" in state:  # the same network in both
        state.update(state["_model"].attributes())
    for name in _LABELS:
        if name in state:
            state[name] = _archive.smallest(state[name])
    return {**state, "_sklearn_sela_version": __version__}


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an estimator from a pickle, on its device where that is here."""
    from sklearn_sela import __version__

    state = state.copy()
    version = state.pop("_sklearn_sela_version", "of before 0.1")
    if version != __version__:
        warn_caller(
            f"This estimator was pickled by sklearn_sela {version}, and is loaded by "
            f"{__version__}: it may work otherwise, or not at all. Fit it again, or install "
            f"sklearn-sela=={version}.",
            UserWarning,
        )
    for name in _LABELS:
        if name in state:
            state[name] = state[name].astype(np.int64)
    if "_model" in state:
        _place(state["_model"].network, state["device"])
    return state


def _on_cpu(value: Any) -> Any:
    """The same, or a copy of it, with all of its tensors on the CPU."""
    if isinstance(value, Model):
        network = _on_cpu(value.network)
        return value if network is value.network else replace(value, network=network)
    if isinstance(value, nn.Module):
        tensors = (*value.parameters(), *value.buffers())
        elsewhere = any(t.device.type not in ("cpu", "meta") for t in tensors)
        return copy.deepcopy(value).cpu() if elsewhere else value
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
        return {key: _on_cpu(v) for key, v in value.items()}
    return value


def _place(network: nn.Module, device: Any) -> None:
    """Put the network where the estimator's parameter says, if this machine has that."""
    try:
        network.to(resolve_device(device))
    except ValueError:
        network.cpu()


# Files


def save_estimator(estimator: Any, path: Any) -> None:
    """See ``SelfLabelClusterer.save``."""
    from sklearn_sela import __version__

    check_is_fitted(estimator)
    parameters = estimator.get_params(deep=False)
    kept = {name: value for name, value in parameters.items() if _archive.storable(value)}
    content = {
        "sklearn_sela": __version__,
        "parameters": kept,
        "to_be_given": sorted(parameters.keys() - kept.keys()),
        "attributes": {
            name: getattr(estimator, name) for name in _ATTRIBUTES if hasattr(estimator, name)
        },
        "model": _model_content(estimator._model),
    }
    replace_file(Path(path), lambda file: _archive.write(file, content))


def load_estimator(kind: type, path: Any, given: dict[str, Any]) -> Any:
    """See ``SelfLabelClusterer.load``."""
    path = Path(path)
    try:
        content = _archive.read(path)
        wanted = set(content["to_be_given"])
    except OSError:
        raise
    except Exception as error:  # whatever is made of a file that is not one of ours
        raise _refused(path, error) from error
    for name in given:
        if name not in wanted:
            raise ValueError(
                f"{name}= is not for load: {str(path)!r} holds it. Call set_params after it."
            )
    if missing := sorted(wanted - given.keys()):
        raise ValueError(
            f"{str(path)!r} was saved with {' and '.join(missing)} of one's own, which is code "
            f"that no file of this kind holds: pass the same, as in load(path, {missing[0]}=...)."
        )
    try:
        estimator = kind(**content["parameters"], **given)
        check_parameters(estimator)
        model = _model_of(content["model"], estimator)
        attributes = content["attributes"]
        if unknown := attributes.keys() - set(_ATTRIBUTES):
            raise ValueError(f"unknown attributes {sorted(unknown)}")
        _check_attributes(attributes, model)
    except Exception as error:
        raise _refused(path, error) from error
    vars(estimator).update({**attributes, **model.attributes()})
    _place(model.network, estimator.device)
    return estimator


def _refused(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{str(path)!r} is not loaded: {type(error).__name__}: {error}. It must be a file of "
        "SelfLabelClusterer.save, as it was written; nothing of it has been run."
    )


def _model_content(model: Model) -> dict[str, Any]:
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
        "schedule": {**asdict(model.schedule), "precision": str(model.schedule.precision)},
        "one_thread": model.one_thread,
        "meanings": [{"row": m.row, "col": m.col, "data": m.data} for m in model.meanings],
    }


def _model_of(content: dict[str, Any], estimator: Any) -> Model:
    """The model, of the parts that fit together."""
    (n_heads, k), image_shape = content["shape"], content["image_shape"]
    n_values, n_features = content["n_values"], content["n_features"]
    _insist(all(_whole(v, 1) for v in (n_heads, k, n_values, n_features)), "sizes")
    shape = (n_values,) if image_shape is None else image_shape
    _insist(math.prod(shape) == n_values and all(_whole(s, 1) for s in shape), "image_shape")
    _insist(_whole(content["best_head"], 0, n_heads - 1), "best_head")
    network = _network_of(content, estimator.backbone, shape)
    scaler = Scaler.__new__(Scaler)
    scaler.image_shape = image_shape
    scaler.shift, scaler.scale = content["shift"], content["scale"]
    moments = (n_values,) if image_shape is None else (shape[0], 1, 1)
    for array in (scaler.shift, scaler.scale):
        _insist(array.shape == moments and array.dtype == np.float64, "scaling")
    views = ViewSettings(**{"augment": estimator.augment, **content["views"]})
    schedule = content["schedule"]
    _insist(_whole(schedule["label_rows"], 1, _MOST_ROWS), "label_rows")
    dtypes = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    schedule = Schedule(**{**schedule, "precision": dtypes[schedule["precision"]]})
    meanings = [
        sparse.coo_array((m["data"], (m["row"], m["col"])), (k, k)) for m in content["meanings"]
    ]
    _insist(len(meanings) == n_heads, "meanings")
    return Model(
        network,
        content["best_head"],
        scaler,
        n_values,
        n_features,
        views,
        schedule,
        bool(content["one_thread"]),
        content["backbone"],
        meanings,
    )


def _network_of(content: dict[str, Any], own: Any, shape: tuple[int, ...]) -> SelfLabelNetwork:
    """Its modules made again, without memory, and the weights put in their places."""
    name, (n_heads, k) = content["backbone"], content["shape"]
    weights = {key: torch.from_numpy(array) for key, array in content["weights"].items()}
    with seeded(0, torch.device("cpu")):
        if name is None:
            backbone = copy.deepcopy(own) if isinstance(own, nn.Module) else own()
            x = torch.zeros(2, *shape)
            width = feature_width(backbone.cpu().float(), x)  # lazy modules are made here
        else:
            with torch.device("meta"):
                backbone = make_backbone(name, shape, small_stem=content["small_stem"])
                width = feature_width(backbone, torch.zeros(2, *shape))
        _insist(width == content["n_features"], "n_features")
        with torch.device("meta"):
            network = SelfLabelNetwork(backbone, width, n_heads, k, content["freeze"])
    state = network.state_dict()  # changed in place: it tells the version of its layout
    same = weights.keys() == state.keys() and all(
        (weights[key].shape, weights[key].dtype) == (t.shape, t.dtype) for key, t in state.items()
    )
    _insist(same, "weights: are they of the same backbone?")
    state.update(weights)
    network.load_state_dict(state, assign=True)
    _insist(not any(t.is_meta for t in network.buffers()), "buffers")
    if len(shape) == 3:
        network.backbone.to(memory_format=torch.channels_last)
    return network.eval()


def _check_attributes(attributes: dict[str, Any], model: Model) -> None:
    """That they are of the model."""
    n_heads, k = model.network.shape
    labels, self_labels = attributes["labels_"], attributes["self_labels_"]
    _insist(labels.ndim == 1 and self_labels.shape == (n_heads, len(labels)), "labels")
    for array in (labels, self_labels):
        _insist(array.dtype == np.int64 and ((array >= -1) & (array < k)).all(), "labels")
    _insist(attributes["n_clusters_"] == k == len(attributes["cluster_sizes_"]), "n_clusters_")
    _insist(attributes["image_shape_"] == model.scaler.image_shape, "image_shape_")
    _insist(attributes["n_features_in_"] == model.n_values, "n_features_in_")
    _insist(len(attributes["history_"]) == attributes["n_iter_"], "history_")
    missing = set(_ATTRIBUTES) - {"feature_names_in_"} - attributes.keys()
    _insist(not missing, f"attributes {sorted(missing)}")


def _whole(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _insist(right: Any, what: str) -> None:
    if not right:
        raise ValueError(f"wrong {what}")
