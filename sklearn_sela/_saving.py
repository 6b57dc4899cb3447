"""Fitted estimators to and from files without code: what is in one, and what it must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.utils.validation import check_is_fitted

from sklearn_sela import _archive
from sklearn_sela._checkpoint import replace_file
from sklearn_sela._decoding import as_image
from sklearn_sela._model import Model
from sklearn_sela._model_content import (
    are_numbers,
    content_of,
    fitted_with,
    insist,
    model_of,
    whole,
)
from sklearn_sela._persistence import place
from sklearn_sela._validation import check_parameters

_FRAMES = (None, "default", "pandas", "polars")
Check = Callable[[Any, Model, dict[str, Any]], Any]
# The attributes in a file, beside the model: what each must be, given the model and all of them.
_ATTRIBUTES: dict[str, Check] = {
    "labels_": lambda v, m, _: _are_labels(v, m, (v.size,)),
    "self_labels_": lambda v, m, a: _are_labels(v, m, (m.network.shape[0], len(a["labels_"]))),
    "n_features_in_": lambda v, m, _: whole(v, 1) and v == m.n_values,
    "image_shape_": lambda v, m, _: v == m.scaler.image_shape,
    "skipped_": lambda v, *_: isinstance(v, list) and all(isinstance(name, str) for name in v),
    "cluster_sizes_": lambda v, m, _: are_numbers(v, np.float64, m.network.shape[1:]),
    "n_clusters_": lambda v, m, _: whole(v, 1) and v == m.network.shape[1],
    "n_clusters_scores_": lambda v, *_: v is None or isinstance(v, pd.DataFrame),
    "history_": lambda v, *_: isinstance(v, pd.DataFrame),
    "n_iter_": lambda v, _, a: whole(v, 1) and v == len(a["history_"]),
    "loss_": lambda v, _, a: isinstance(v, float) and v == a["history_"]["loss"].iloc[-1],
}
_NOT_ALWAYS: dict[str, Check] = {
    "feature_names_in_": lambda v, m, _: v.dtype == object and v.shape == (m.n_values,),
    "_sklearn_output_config": lambda v, *_: all(frame in _FRAMES for frame in v.values()),
}


def save_estimator(estimator: Any, path: Any) -> None:
    """See ``SelfLabelClusterer.save``."""
    from sklearn_sela import __version__

    check_is_fitted(estimator)
    parameters, model = estimator.get_params(deep=False), estimator._model
    _made(type(estimator), parameters)  # or it could not be loaded
    code = {name for name, value in parameters.items() if not _archive.storable(value)}
    # What was fitted may be code although the parameter has been set to something else since.
    code |= set() if model.backbone else {"backbone"}
    code |= set() if _archive.storable(model.views.augment) else {"augment"}
    content = {
        "sklearn_sela": __version__,
        "parameters": {name: v for name, v in parameters.items() if name not in code},
        "to_be_given": sorted(code),
        "attributes": {
            name: getattr(estimator, name)
            for name in (*_ATTRIBUTES, *_NOT_ALWAYS)
            if name in vars(estimator)
        },
        "model": content_of(model),
    }
    replace_file(Path(path), lambda file: _archive.write(file, content))


def load_estimator(kind: type, path: Any, given: dict[str, Any]) -> Any:
    """See ``SelfLabelClusterer.load``."""
    path, version = Path(path), None
    try:
        content = _archive.read(path)
        version, kept = content["sklearn_sela"], dict(content["parameters"])
        wanted = set(content["to_be_given"])
    except OSError:
        raise
    except Exception as error:  # whatever is made of a file that is not one of ours
        raise _refused(path, error, version) from error
    _check_given(kind, path, given, kept, wanted)
    try:
        parameters = {**kept, **given}
        estimator = _made(kind, parameters)
        model = model_of(content["model"], estimator)
        _made(kind, {**parameters, **fitted_with(model)})
        attributes = content["attributes"]
        _check_attributes(attributes, model)
    except Exception as error:
        raise _refused(path, error, version) from error
    vars(estimator).update({**attributes, **model.attributes()})
    place(model.network, estimator.device)
    return estimator


def _check_given(
    kind: type, path: Path, given: dict[str, Any], kept: dict[str, Any], wanted: set[str]
) -> None:
    """That the parameters given to load are those that the file does not hold."""
    for name in given:
        if name in kept:
            raise ValueError(
                f"{name}= is not for load: {str(path)!r} holds it. Call set_params after it."
            )
        if name not in wanted:
            raise ValueError(f"{name}= is no parameter of {kind.__name__}.")
    if missing := sorted(wanted - given.keys()):
        raise ValueError(
            f"{str(path)!r} was saved with {' and '.join(missing)} of one's own, which is code "
            f"that no file of this kind holds: pass the same, as in load(path, {missing[0]}=...)."
        )


def _refused(path: Path, error: Exception, version: Any) -> ValueError:
    from sklearn_sela import __version__

    what = f"{type(error).__name__}: {str(error).rstrip('.')}"
    other = f" It says it is by sklearn_sela {version!s:.20}; this is {__version__}."
    return ValueError(
        f"{str(path)!r} is not loaded: {what}. It must be a file of SelfLabelClusterer.save, as it "
        f"was written; nothing of it has been run.{other * (version not in (None, __version__))}"
    )


def _made(kind: type, parameters: dict[str, Any]) -> Any:
    """An estimator with these parameters; an error for such as ``fit`` would refuse."""
    names = ("memory", "device", "init", "image_shape")
    memory, device, init, image_shape = (parameters[name] for name in names)
    harmless = None if isinstance(memory, str) else memory  # checking a folder's name makes it
    check_parameters(kind(**{**parameters, "memory": harmless}))
    insist(device == "auto" or torch.device(device).type in ("cpu", "cuda"), "device")
    labels = np.asarray(init)
    insist(isinstance(init, str) or (labels.dtype.kind in "iu" and labels.ndim), "init")
    insist(image_shape is None or as_image(image_shape), "image_shape")
    return kind(**parameters)


def _check_attributes(attributes: dict[str, Any], model: Model) -> None:
    """That they are all there, and of the model."""
    insist(_ATTRIBUTES.keys() <= attributes.keys(), "attributes: some are missing")
    for name, value in attributes.items():
        insist(name in _ATTRIBUTES or name in _NOT_ALWAYS, f"attribute {name!r:.40}")
        insist({**_ATTRIBUTES, **_NOT_ALWAYS}[name](value, model, attributes), name)


def _are_labels(value: np.ndarray, model: Model, shape: tuple[int, ...]) -> bool:
    right = value.shape == shape and value.dtype == np.int64
    return right and bool(((value >= -1) & (value < model.network.shape[1])).all())
