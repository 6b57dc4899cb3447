"""Validation: what the estimator accepts, and the errors that name what it does not."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sized
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.utils.validation import check_memory

from sklearn_sela._backbones import OWN_BACKBONES
from sklearn_sela._recipe import OVER_CLUSTER_ROWS
from sklearn_sela._torchvision import closest_names, torchvision_names

MOST_CLUSTERS = 25  # that n_clusters="auto" considers


def check_parameters(estimator: Any) -> None:
    """Raise ValueError or TypeError for the first parameter out of range."""
    _check_n_clusters(estimator)
    whole = {"n_heads": 1, "n_views": 0, "max_epochs": 1, "batch_size": 1}
    for name, low in whole.items():
        _check_number(name, getattr(estimator, name), Integral, low)
    if not isinstance(estimator.verbose, bool | np.bool_):
        _check_number("verbose", estimator.verbose, Integral, 0)
    if estimator.n_solves is not None:
        _check_number("n_solves", estimator.n_solves, Integral, 0)
    if estimator.n_iter_no_change is not None:
        _check_number("n_iter_no_change", estimator.n_iter_no_change, Integral, 1)
    if estimator.over_clusters not in (None, "auto"):
        _check_number("over_clusters", estimator.over_clusters, Integral, 0)
    if estimator.n_neighbors != "auto":
        _check_number("n_neighbors", estimator.n_neighbors, Integral, 0)
    for name in ("reg", "learning_rate"):
        _check_number(name, getattr(estimator, name), Real, 0, strict=True)
    _check_number("weight_decay", estimator.weight_decay, Real, 0)
    _check_number("tol", estimator.tol, Real, 0)
    _check_number("neighbor_probability", estimator.neighbor_probability, Real, 0, high=1)
    _check_number("label_momentum", estimator.label_momentum, Real, 0, high=1)
    try:
        check_memory(estimator.memory)
    except OSError as error:
        raise ValueError(f"memory={estimator.memory!r} cannot be used: {error}") from error
    if estimator.checkpoint_dir is not None:
        _check_folder("checkpoint_dir", estimator.checkpoint_dir)
    if isinstance(estimator.init, str):
        _check_choice("init", estimator.init, ["kmeans", "random"], "or labels")
    _check_choice("on_bad_image", estimator.on_bad_image, ["error", "skip"])
    _check_choice("precision", estimator.precision, ["auto", "float32", "bfloat16"])
    if not isinstance(estimator.compile, bool | np.bool_):
        raise TypeError(f"compile must be a bool, got {estimator.compile!r}.")
    if estimator.distributed is not None:
        _check_choice("distributed", estimator.distributed, ["auto", "own_rows"], "None")
    _check_choice("lr_schedule", estimator.lr_schedule, ["one_cycle", "step"])
    if not isinstance(estimator.soft_targets, bool | np.bool_):
        raise TypeError(f"soft_targets must be a bool, got {estimator.soft_targets!r}.")
    _check_backbone(estimator.backbone)
    _check_weights(estimator.weights, estimator.backbone)
    if not isinstance(estimator.freeze, bool | np.bool_):
        raise TypeError(f"freeze must be a bool, got {estimator.freeze!r}.")
    if isinstance(estimator.augment, str):
        _check_choice("augment", estimator.augment, ["auto"], "None or a callable on a batch")
    elif estimator.augment is not None and not callable(estimator.augment):
        raise TypeError(f"augment must be 'auto', None or a callable, got {estimator.augment!r}.")
    cluster_sizes(estimator)


def _check_backbone(backbone: Any) -> None:
    if not isinstance(backbone, str):
        if not callable(backbone):
            raise TypeError(
                f"backbone must be a name, a torch module or a callable, got {backbone!r}."
            )
    elif backbone not in ("auto", *OWN_BACKBONES) and backbone not in torchvision_names():
        closest = closest_names(backbone)
        raise ValueError(
            f"backbone={backbone!r} is unknown; use one of {['auto', *OWN_BACKBONES, 'alexnet']}, "
            "the name of a classification network of torchvision, such as 'resnet18', or a torch "
            f"module.{f' Did you mean one of {closest}?' if closest else ''}"
        )


def _check_weights(weights: Any, backbone: Any) -> None:
    if weights is None:
        return
    if isinstance(weights, bool) or not isinstance(weights, str | os.PathLike | Mapping):
        raise TypeError(
            f"weights must be a file, a state dict or a name of torchvision's, got {weights!r}."
        )
    if not isinstance(backbone, str):
        raise ValueError("weights are for torchvision's networks: load them into your backbone.")
    if backbone in ("auto", *OWN_BACKBONES):
        raise ValueError(
            f"weights are for torchvision's networks, not for backbone={backbone!r}: name theirs, "
            "as in backbone='resnet18'."
        )


def _check_n_clusters(estimator: Any) -> None:
    asked = estimator.n_clusters
    if isinstance(asked, str):
        _check_choice("n_clusters", asked, ["auto"], "a number or several to choose from")
    elif not np.iterable(asked):
        _check_number("n_clusters", asked, Integral, 1)
    elif not isinstance(asked, Sized) or isinstance(asked, Mapping | bytes):
        raise TypeError(
            f"n_clusters must be an integer, 'auto' or a sequence of integers, got {asked!r}."
        )
    elif len(asked) == 0:
        raise ValueError(f"n_clusters={asked!r} holds no number to choose from.")
    else:
        for k in {asked[0], asked[-1]} if isinstance(asked, range) else asked:
            _check_number("n_clusters", k, Integral, 1)
        if len(asked) == 1:
            return
    if isinstance(asked, Integral):
        return
    if not isinstance(estimator.cluster_sizes, str):
        raise ValueError(
            f"cluster_sizes as shares needs one n_clusters, not {asked!r} to choose from."
        )
    if not estimator.over_clusters:
        raise ValueError(
            f"n_clusters={asked!r} is chosen by the features of the first round, which "
            f"over_clusters={estimator.over_clusters!r} skips; use over_clusters='auto'."
        )


def candidates(estimator: Any, n: int) -> list[int]:
    """Numbers of clusters to choose from for n samples, rising; one where none is a question.

    Raises
    ------
    ValueError
        For fewer samples than clusters, or too few to compare several numbers.
    """
    asked = estimator.n_clusters
    if isinstance(asked, str):
        # The first round has 8 rows a cluster at least, and more clusters than the second.
        several = list(range(2, min(MOST_CLUSTERS, n // OVER_CLUSTER_ROWS - 1) + 1)) or [2]
    else:
        several = sorted({int(k) for k in asked}) if np.iterable(asked) else [int(asked)]
    if n < max(2, several[-1]):
        raise ValueError(
            f"n_samples={n} is too few for n_clusters={several[-1]}: at least one "
            "sample per cluster, and 2 samples in all, are needed."
        )
    over = n if estimator.over_clusters == "auto" else int(estimator.over_clusters or 0)
    if len(several) > 1 and min(over, n // OVER_CLUSTER_ROWS) <= several[0]:
        raise ValueError(
            f"n_samples={n} with over_clusters={estimator.over_clusters!r} is too few to choose "
            f"n_clusters from {several}: the features need at least {several[0] + 1} "
            f"over-clusters of {OVER_CLUSTER_ROWS} samples. Set n_clusters to one number."
        )
    return several


def cluster_sizes(estimator: Any) -> str | np.ndarray:
    """The parameter of this name, resolved: its name, or shares that sum to one."""
    if isinstance(estimator.cluster_sizes, str):
        _check_choice(
            "cluster_sizes", estimator.cluster_sizes, ["learned", "balanced"], "an array of shares"
        )
        return estimator.cluster_sizes
    try:
        sizes = np.asarray(estimator.cluster_sizes, dtype=np.float64)
    except (TypeError, ValueError):
        sizes = np.array(np.nan)
    one = estimator.n_clusters
    one = next(iter(one)) if np.iterable(one) and not isinstance(one, str) else one
    valid = sizes.shape == (one,) and np.isfinite(sizes).all() and sizes.min() > 0
    if valid:
        sizes = sizes / sizes.max()  # first: the sum of large numbers may be infinite
        valid = sizes.min() > 0
    if not valid:
        raise ValueError(
            f"cluster_sizes must be 'learned', 'balanced' or n_clusters={one} "
            f"positive shares, got {estimator.cluster_sizes!r}."
        )
    return sizes / sizes.sum()


def starts(estimator: Any, n: int) -> np.ndarray:
    """(n_heads, n) labels given as ``init``; ValueError for others."""
    init, k = np.asarray(estimator.init), estimator.n_clusters
    heads = estimator.n_heads
    if init.shape not in ((n,), (heads, n)) or init.dtype.kind not in "iu":
        raise ValueError(
            f"init must be 'kmeans', 'random' or integer labels of shape ({n},) or ({heads}, {n}), "
            f"got shape {init.shape} of {init.dtype}."
        )
    if estimator.over_clusters not in (None, 0) or not isinstance(k, Integral):
        raise ValueError("init as labels needs over_clusters=None and one n_clusters.")
    if init.min() < 0 or init.max() >= k:
        raise ValueError(
            f"init holds labels from {init.min()} to {init.max()}; with n_clusters={k} they must "
            f"be 0 to {k - 1}."
        )
    return np.broadcast_to(init, (heads, n)).astype(np.int64)


def _check_number(
    name: str, value: Any, kind: Any, low: float, high: float = math.inf, strict: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        noun = "an integer" if kind is Integral else "a number"
        raise TypeError(f"{name} must be {noun}, got {value!r}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (low < number if strict else low <= number) or not number <= min(high, 1e300):
        bound = f"> {low}" if strict else f">= {low}"
        limit = "finite" if high == math.inf else f"<= {high}"
        raise ValueError(f"{name} must be {bound} and {limit}, got {value!r}.")


def _check_folder(name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a folder's name, got {value!r}.")


def _check_choice(name: str, value: str, known: list[str], also: str = "") -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; use one of {known}{also and ', ' + also}.")
