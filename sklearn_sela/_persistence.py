"""Pickles of estimators that open anywhere: on the CPU, small, with a version."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from sklearn_sela._archive import smallest
from sklearn_sela._device import resolve_device
from sklearn_sela._model import Model
from sklearn_sela._warnings import warn_caller

# What scikit-learn keeps in an estimator while it is being fitted.
_PASSING = ("_callback_fit_ctx", "_skl_callbacks_to_teardown")
_LABELS = ("labels_", "self_labels_")


def packed(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an estimator for a pickle: on the CPU, labels in few bytes, a version."""
    from sklearn_sela import __version__

    state = {name: _on_cpu(value) for name, value in state.items() if name not in _PASSING}
    if "_model" in state:  # the same network in both
        state.update(state["_model"].attributes())
    for name in _LABELS:
        if name in state:
            state[name] = smallest(state[name])
    return {**state, "_sklearn_sela_version": __version__}


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an estimator from a pickle, on its device where that is here."""
    from sklearn_sela import __version__

    state = state.copy()
    version = state.pop("_sklearn_sela_version")
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
        place(state["_model"].network, state["device"])
    return state


def _on_cpu(value: Any) -> Any:
    """The same, or a copy of it, with all of its tensors on the CPU."""
    if isinstance(value, Model):
        views = replace(value.views, augment=_on_cpu(value.views.augment))
        return replace(value, network=_on_cpu(value.network), views=views)
    if isinstance(value, nn.Module):
        tensors = (*value.parameters(), *value.buffers())
        elsewhere = any(t.device.type not in ("cpu", "meta") for t in tensors)
        return copy.deepcopy(value).cpu() if elsewhere else value
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
        return {key: _on_cpu(v) for key, v in value.items()}
    return value


def place(network: nn.Module, device: Any) -> None:
    """Put the network where the estimator's parameter says, if this machine has that."""
    try:
        network.to(resolve_device(device))
    except ValueError:
        network.cpu()
