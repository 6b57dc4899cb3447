"""The choice of the head."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.metrics import cohen_kappa_score
from torch import nn
from torch.nn import functional as F

from sklearn_sela import SelfLabelClusterer
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._recipe import view_agreement
from sklearn_sela._training import Schedule
from sklearn_sela.metrics import clustering_accuracy

SCHEDULE = Schedule(
    epochs=1,
    batch_size=32,
    learning_rate=0.1,
    weight_decay=0,
    lr_schedule="one_cycle",
    n_views=0,
    n_solves=None,
    label_rows=256,
)


def agreement(*views):
    """view_agreement of heads whose labels in the two views are given, (n_heads, n) each."""
    first, second = (torch.as_tensor(v) for v in views)
    n_heads, n = first.shape
    k = int(max(first.max(), second.max())) + 1
    network = SelfLabelNetwork(nn.Identity(), n_heads * k, n_heads, k)
    with torch.no_grad():
        network.heads.weight.copy_(torch.eye(n_heads * k))
        network.heads.bias.zero_()
    turns = itertools.cycle([first, second])

    def view(rows):
        return 40 * F.one_hot(next(turns)[:, rows].T, k).float().flatten(1)  # sure

    return view_agreement(network, view, n, SCHEDULE).numpy()


def test_agreement_of_sure_heads_is_cohens_kappa():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 3, (4, 512))
    second = np.where(rng.random((4, 512)) < [[0.0], [0.1], [0.5], [1.0]], 0, first)
    expected = [cohen_kappa_score(a, b) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(agreement(first, second), expected, atol=1e-6)


def test_a_head_that_collapsed_agrees_no_more_than_by_chance():
    first = np.stack([np.zeros(512, int), np.arange(512) % 2])
    second = np.where(np.arange(512) < 100, 1 - first, first)
    second[0] = 0
    collapsed, noisy = agreement(first, second)
    assert collapsed == pytest.approx(0, abs=1e-3)
    assert noisy > 0.5


def test_a_head_that_cuts_a_large_cluster_agrees_less_than_one_that_finds_it():
    rng = np.random.default_rng(0)
    large = rng.random(512) < 0.9
    halves = np.where(large, rng.integers(0, 2, 512), 2)  # more information, less agreement
    first = np.stack([large.astype(int), halves])
    second = first.copy()
    wrong = large & (rng.random(512) < 0.1)
    second[1, wrong] = 1 - second[1, wrong]
    assert agreement(first, second).argmax() == 0


@pytest.mark.parametrize("sizes", [[900, 60, 40], [700, 200, 100], [960, 20, 20]])
def test_clusters_of_unequal_sizes_are_found(sizes):
    X, y = make_blobs(sizes, centers=[[0, 0, 0], [8, 0, 0], [0, 8, 0]], random_state=0)
    labels = SelfLabelClusterer(3, random_state=0, max_epochs=20).fit_predict(X)
    assert clustering_accuracy(y, labels) > 0.99
