"""First rounds that fits share: what one learned is kept for others that would learn the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import joblib
import numpy as np
import torch
from sklearn.utils.validation import check_memory

from sklearn_sela._checkpoint import text_of
from sklearn_sela._images import Images
from sklearn_sela._recipe import Recipe, Round
from sklearn_sela._shares import Share
from sklearn_sela._torchvision import read_weights
from sklearn_sela._warnings import warn_caller

# Parameters that do not change the first round; the seed and the device are looked at as such.
_LATER = (
    "n_clusters", "cluster_sizes", "random_state", "memory", "checkpoint_dir", "verbose", "device",
    "distributed",
)  # fmt: skip


def remember_by(
    estimator: Any,
    X: np.ndarray | Images,
    share: Share,
    seed: int,
    device: torch.device,
    recipe: Recipe,
) -> Callable[[Callable[[], Round]], Round]:
    """``remember(learn)``: what the estimator's ``memory`` has of this first round, or learn()."""
    from sklearn_sela import __version__

    if estimator.memory is None:
        return lambda learn: learn()
    if not share.shards.alone:
        warn_caller(
            "memory is not used by a fit over several processes: the first round is learned each "
            "time.",
            UserWarning,
        )
        return lambda learn: learn()
    if not isinstance(estimator.backbone, str) or not isinstance(estimator.augment, str | None):
        warn_caller(
            "memory is not used: whether a backbone or an augment of your own is still the "
            "same cannot be told, so the first round is learned each time.",
            UserWarning,
        )
        return lambda learn: learn()
    if isinstance(X, Images):
        warn_caller(
            "memory is not used: whether files or a Dataset still hold the same cannot be told, so "
            "the first round is learned each time.",
            UserWarning,
        )
        return lambda learn: learn()
    decides = {k: v for k, v in estimator.get_params(deep=False).items() if k not in _LATER}
    decides |= {"over_clusters": recipe.over_clusters, "image_shape": estimator.image_shape_}
    if estimator.weights is not None:  # what a file holds, wherever it is
        decides["weights"] = text_of(read_weights(estimator.backbone, estimator.weights))
    where = (__version__, torch.__version__, str(device), torch.get_num_threads())
    cached = check_memory(estimator.memory).cache(_first_round, ignore=["learn"])
    return partial(cached, joblib.hash(X), seed, decides, where)


def _first_round(
    X_hash: str, seed: int, decides: dict, where: tuple, learn: Callable[[], Round]
) -> Round:
    """``learn()``; the other arguments are what decides its outcome, for joblib to compare."""
    return learn()
