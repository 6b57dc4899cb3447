"""What X may be: arrays, frames, tensors, files or Datasets, made rows of one shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data
from torch import Tensor

from sklearn_sela._data import square_images
from sklearn_sela._decoding import as_image
from sklearn_sela._distributed import Shards
from sklearn_sela._images import Images, open_images

_OF_SHAPE = ("n_features_in_", "image_shape_", "feature_names_in_")  # what fit learns of it
CHANNELS_FIRST = "Put channels first: images.transpose(0, 3, 1, 2)."


def rows_of(estimator: Any, X: Any, reset: bool) -> np.ndarray | Images:
    """X as an array of rows, uncopied where it is one, or as images read when they are needed.

    Sets what fit learns of their shape (``reset``), or compares with what it learned.
    """
    shape = estimator.image_shape if reset else estimator.image_shape_
    images = open_images(X, shape, estimator.on_bad_image)
    X = _array_of(estimator, X, reset) if images is None else images
    if reset:
        if images is not None or X.ndim > 2:  # these have none; an earlier fit may have had
            estimator.__dict__.pop("feature_names_in_", None)
        estimator.n_features_in_ = math.prod(X.shape[1:])
        shaped = images is not None and X.ndim > 2  # as asked for already
        estimator.image_shape_ = X.shape[1:] if shaped else image_shape_of(X, estimator.image_shape)
        if X.ndim == 2 and estimator.image_shape is None and _reads_data(estimator):
            estimator.image_shape_ = square_images(X)
    else:
        _check_shape(estimator, X.shape)
    return X


def rows_to_fit(estimator: Any, X: Any, shards: Shards) -> np.ndarray | Images:
    """The same for fit, over several processes; of those that have rows each, some may have none.

    Raises
    ------
    ValueError
        If their rows are of different shapes; and for what another process has refused.
    """
    own_rows = estimator.distributed == "own_rows" and not shards.alone
    empty = own_rows and hasattr(X, "__len__") and not isinstance(X, str) and len(X) == 0
    rows: Any = None
    with shards.agreeing():
        rows = None if empty else rows_of(estimator, X, reset=True)
    if not own_rows:
        return rows
    learned = {name: getattr(estimator, name, None) for name in _OF_SHAPE}
    found = None if empty else (len(rows), rows.shape[1:], rows.dtype, learned)
    all_found = [f for f in shards.gather(found) if f]
    shapes = {f[1] for f in all_found}
    if len(shapes) != 1:
        raise ValueError(
            f"X has rows of shapes {sorted(shapes)} in the processes of this fit: they must be the "
            "same. For images of other sizes set image_shape."
            if shapes
            else "X is empty in all processes of this fit."
        )
    _, shape, dtype, learned = max(all_found, key=lambda f: f[0])  # what most rows look like
    for name, value in learned.items():
        if value is None and name == "feature_names_in_":
            estimator.__dict__.pop(name, None)
        else:
            setattr(estimator, name, value)
    return np.empty((0, *shape), dtype) if empty else rows


def _array_of(estimator: Any, X: Any, reset: bool) -> np.ndarray:
    if isinstance(X, Tensor):
        X = X.detach().cpu()
        X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()
    elif isinstance(X, list | tuple):
        X = np.asarray(X)
    check_no_times(X)
    if getattr(X, "ndim", 2) <= 2:
        return validate_data(estimator, X, reset=reset, dtype="numeric")
    X = check_array(X, allow_nd=True, dtype="numeric", estimator=estimator, input_name="X")
    if X.ndim > 4:
        raise ValueError(
            f"X has {X.ndim} dimensions, {X.shape}; expected (n_samples, n_features), "
            "(n_samples, height, width) or (n_samples, channels, height, width)."
        )
    return X


def _check_shape(estimator: Any, shape: tuple[int, ...]) -> None:
    """That rows are like those of fit."""
    fitted, name = estimator.image_shape_, type(estimator).__name__
    if len(shape) == 2:
        if shape[1] != estimator.n_features_in_:
            raise ValueError(
                f"X has {shape[1]} features, but {name} is expecting {estimator.n_features_in_} "
                "features as input."
            )
    elif fitted is None or as_image(shape[1:]) != fitted:
        before = "vectors" if fitted is None else f"images of shape {fitted}"
        channels_last = fitted is not None and shape[1:] == (*fitted[1:], fitted[0])
        raise ValueError(
            f"X holds images of shape {as_image(shape[1:])}, but {name} was fitted on {before} "
            f"({estimator.n_features_in_} features).{channels_last * f' {CHANNELS_FIRST}'}"
        )


def _reads_data(estimator: Any) -> bool:
    """Whether nothing was said of the kind of data: strings, as modules may compare oddly."""
    said = (estimator.backbone, estimator.augment)
    return all(isinstance(p, str) and p == "auto" for p in said)


def image_shape_of(
    X: np.ndarray, image_shape: tuple[int, ...] | None
) -> tuple[int, int, int] | None:
    """(channels, height, width) of the rows of X, or None for vectors."""
    asked = None if image_shape is None else as_image(image_shape)
    shape = asked if X.ndim == 2 else as_image(X.shape[1:])
    if shape is None:
        return None
    if math.prod(shape) != math.prod(X.shape[1:]):
        raise ValueError(
            f"image_shape={image_shape} holds {math.prod(shape)} values, but the rows of X have "
            f"{X.shape[1]}."
        )
    if asked is not None and asked != shape:
        raise ValueError(f"image_shape={image_shape} does not match images of shape {shape} in X.")
    told = asked is not None and X.ndim > 2
    if shape[2] in (1, 3, 4) and min(shape[:2]) > 4 and not told:
        raise ValueError(
            f"Images of shape {shape} read as {shape[0]} channels of {shape[1]} x {shape[2]} "
            f"pixels. {CHANNELS_FIRST} If they are, pass X as (n_samples, *image_shape) with "
            f"image_shape={shape}."
        )
    return shape


def check_no_times(X: Any) -> None:
    """Raise TypeError for dates or durations, in an array or in a column of a DataFrame."""
    dtypes: Any = getattr(X, "dtypes", getattr(X, "dtype", None))  # a frame's, an array's
    for dtype in np.ravel(dtypes):
        temporal = getattr(dtype, "is_temporal", bool)()  # a polars dtype's
        if temporal or getattr(dtype, "kind", None) in ("m", "M"):
            raise TypeError(
                f"X has dtype {dtype}, but features must be numbers: turn dates and durations "
                "into some, such as seconds since the first, or the hour of the day."
            )
