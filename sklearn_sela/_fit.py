"""What fit does: rows shared out and scaled, a network made, the rounds run."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.utils import check_random_state
from torch import nn

from sklearn_sela._backbones import OWN_BACKBONES, feature_width, make_backbone
from sklearn_sela._checkpoint import checkpoints_of
from sklearn_sela._data import Geometry, Rows, Scaler, draw_rows, has_colour
from sklearn_sela._device import one_thread, resolve_precision, seeded
from sklearn_sela._images import Images
from sklearn_sela._inputs import rows_to_fit
from sklearn_sela._journal import Journal
from sklearn_sela._memory import remember_by
from sklearn_sela._model import Model
from sklearn_sela._network import filled, rows_at_once
from sklearn_sela._recipe import Fitted, Recipe, Rounds
from sklearn_sela._shares import Share, share_out
from sklearn_sela._training import Ended, Schedule
from sklearn_sela._validation import MOST_CLUSTERS, candidates, cluster_sizes, starts
from sklearn_sela._views import ViewSettings
from sklearn_sela._warnings import warn_of_duplicates, warn_of_skipped, warn_of_trouble

_SMALL_BATCH = 1 << 14  # values, up to which a step of our backbones is too short for threads


def fit_estimator(estimator: Any, X: Any, device: torch.device, journal: Journal) -> None:
    """Set what an estimator learns from X."""
    shards = journal.shards
    X = rows_to_fit(estimator, X, shards)
    share, skipped = _usable(X, share_out(X, shards, estimator.distributed == "own_rows"))
    n_values = math.prod(X.shape[1:])
    recipe = _recipe(estimator, share, len(X), device)
    seed = int(check_random_state(estimator.random_state).randint(2**31 - 1))
    seed = shards.first(lambda: seed)
    checkpoints = checkpoints_of(estimator, X, share, seed, device)
    seed = checkpoints.seed if checkpoints else seed
    rng = np.random.default_rng(seed)
    image_shape = estimator.image_shape_
    images = image_shape is not None
    sample = share.joined(X[draw_rows(share, n_values, rng, share.n)]) if images else X
    pretrained = estimator.weights is not None and sample.dtype == np.uint8
    scaler = Scaler(sample, image_shape, pretrained and images, share)
    rows = Rows(X, scaler, device, share)
    geometry = Geometry(rows, n_values, rng)
    warn_of_duplicates(geometry.points, recipe.candidates[0])
    # Steps so short that more than one CPU thread would slow them down.
    backbone_name = _backbone_name(estimator)
    small = backbone_name in OWN_BACKBONES and recipe.schedule.batch_size * n_values <= _SMALL_BATCH
    with seeded(seed, device) as generator, one_thread(small):
        journal.generator, journal.n_rows = generator, len(X)
        backbone = _make_backbone(estimator, n_values).to(device).float()
        n_features = feature_width(backbone, filled(rows.own(slice(2))))  # lazy modules are made
        if images:
            backbone.to(memory_format=torch.channels_last)
        if estimator.compile:
            backbone.compile()
        settings = ViewSettings(
            estimator.augment,
            estimator.n_neighbors,
            estimator.neighbor_probability,
            images,
            images and has_colour(sample, image_shape),
            images and isinstance(estimator.augment, str) and geometry.mirrors(rng),
        )

        def attributes(fitted: Fitted) -> dict[str, Any]:
            """From what the rounds have made."""
            network, best = fitted.network.eval(), fitted.best_head
            network.backbone._compiled_call_impl = None  # predictions, and pickles, do without
            model = Model(
                network,
                best,
                scaler,
                n_values,
                n_features,
                settings,
                recipe.schedule,
                small,
                backbone_name,
            )
            labels = share.whole(model.head_labels(X, share))
            model.understand_heads(labels)
            return {
                **model.attributes(),
                "labels_": labels[:, best].copy(),
                "self_labels_": np.ascontiguousarray(share.whole(fitted.self_labels.T).T),
                "skipped_": skipped,
                "cluster_sizes_": fitted.cluster_sizes[best],
                "n_clusters_": network.shape[1],
                "n_clusters_scores_": fitted.comparison,
                "history_": pd.DataFrame(journal.history),
                "n_iter_": len(journal.history),
                "loss_": float(journal.history[-1]["loss"]),
            }

        fitted = Rounds(
            backbone,
            n_features,
            geometry,
            settings.views(rows, geometry, generator),
            recipe,
            generator,
            seed,
            journal,
            attributes,
            remember_by(estimator, X, share, seed, device, recipe),
            checkpoints,
        ).fit()
    if not journal.history:
        raise KeyboardInterrupt
    estimator.__dict__.update(attributes(fitted))
    warn_of_trouble(estimator, fitted.ended == Ended.INTERRUPTED, fitted.marginal_error)


def _usable(X: np.ndarray | Images, share: Share) -> tuple[Share, list[str]]:
    """The share without images that cannot be read, and the names of those, of all processes."""
    bad: list[int] = []
    with share.shards.agreeing():
        if isinstance(X, Images):
            own = X.take(share.rows)
            own.check()
            bad = sorted(own.bad)
    named = [(int(share.places[i]), own.name(i)) for i in bad]
    of_all = itertools.chain.from_iterable(share.shards.gather(named))
    skipped = [name for _, name in sorted(of_all)]
    warn_of_skipped(skipped, share.n_given)
    return share.without(np.array(bad, dtype=np.int64)), skipped


def _backbone_name(estimator: Any) -> str | None:
    """Of the backbone that is fitted; None for one of the user's own."""
    if not isinstance(estimator.backbone, str):
        return None
    if estimator.backbone == "auto":
        return "mlp" if estimator.image_shape_ is None else "convnet"
    return estimator.backbone


def _make_backbone(estimator: Any, n_values: int) -> nn.Module:
    if name := _backbone_name(estimator):
        return make_backbone(name, estimator.image_shape_ or (n_values,), estimator.weights)
    own = estimator.backbone
    made = copy.deepcopy(own) if isinstance(own, nn.Module) else own()
    if not isinstance(made, nn.Module):
        raise TypeError(f"backbone returned {type(made).__name__}, not a torch module.")
    return made


def _recipe(estimator: Any, share: Share, n_rows: int, device: torch.device) -> Recipe:
    """Its parameters, resolved for a share of n_rows."""
    numbers = candidates(estimator, share.n)
    over = estimator.over_clusters
    if over == "auto":
        # In steps, so that searches over n_clusters share the first round.
        over = 50 * 2 ** max(0, math.ceil(math.log2(numbers[-1] / MOST_CLUSTERS)))
    given = not isinstance(estimator.init, str)
    # Numbers may be NumPy's, of a search say: torch takes plain ones, and so do checkpoints.
    return Recipe(
        candidates=numbers,
        n_heads=int(estimator.n_heads),
        over_clusters=int(over or 0),
        init=starts(estimator, n_rows)[:, share.rows] if given else estimator.init,
        cluster_sizes=cluster_sizes(estimator),
        few_neighbors=estimator.n_neighbors == "auto",
        reg=float(estimator.reg),
        soft_targets=bool(estimator.soft_targets),
        label_momentum=float(estimator.label_momentum),
        freeze=bool(estimator.freeze),
        schedule=Schedule(
            epochs=int(estimator.max_epochs),
            # Small data: shorter batches, or an epoch would be a step or two.
            batch_size=min(int(estimator.batch_size), max(32, share.n // 8)),
            label_rows=rows_at_once(estimator.n_features_in_, 1024),
            learning_rate=float(estimator.learning_rate),
            weight_decay=float(estimator.weight_decay),
            lr_schedule=estimator.lr_schedule,
            n_views=int(estimator.n_views),
            n_solves=None if estimator.n_solves is None else int(estimator.n_solves),
            n_iter_no_change=estimator.n_iter_no_change and int(estimator.n_iter_no_change),
            tol=float(estimator.tol),
            precision=resolve_precision(estimator.precision, device),
        ),
    )
