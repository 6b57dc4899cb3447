"""The choice of the head."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from torch import nn
from torch.nn import functional as F

from sklearn_sela import SelfLabelClusterer
from sklearn_sela._heads import choose_head, view_joint
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._shares import Share
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


def test_joint_counts_the_labels_of_two_views():
    labels = torch.randint(3, (2, 600), generator=torch.Generator().manual_seed(0))
    network = SelfLabelNetwork(nn.Identity(), 3, 1, 3)
    with torch.no_grad():
        network.heads.weight.copy_(40 * torch.eye(3))  # sure of what it is shown
        network.heads.bias.zero_()
    calls = []

    def view(rows):
        calls.append(rows)
        return F.one_hot(labels[(len(calls) + 1) % 2, rows], 3).float()

    expected = np.zeros((3, 3))
    np.add.at(expected, tuple(labels.numpy()), 1 / 600)
    found = view_joint(network, partial(map, view), Share.of_all(600), SCHEDULE)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)


def heads(*tables):
    joint = torch.tensor(tables, dtype=torch.float64)
    return joint / joint.sum((1, 2), keepdim=True)


FINDS = [[0.9, 0.0, 0], [0.0, 0.06, 0], [0, 0, 0.04]]  # a large cluster and two small ones
CUTS = [[0.42, 0.03, 0], [0.03, 0.42, 0], [0, 0, 0.1]]  # the large one cut: more information
MERGES = [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.0]]


@pytest.mark.parametrize("tables", [(FINDS, CUTS), (CUTS, FINDS)])
def test_a_head_that_finds_a_large_cluster_is_preferred_to_one_that_cuts_it(tables):
    assert tables[choose_head(heads(*tables))] is FINDS


def test_of_heads_that_agree_about_as_well_the_most_informative_is_chosen():
    thirds = [[0.33, 0.003, 0], [0.003, 0.33, 0], [0, 0, 0.334]]  # agree a little less
    assert choose_head(heads(MERGES, thirds)) == 1


def test_a_head_that_collapsed_is_never_chosen():
    collapsed = [[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert choose_head(heads(collapsed, CUTS)) == 1


def test_one_cluster_leaves_no_choice():
    assert choose_head(torch.ones(3, 1, 1, dtype=torch.float64)) == 0


@pytest.mark.parametrize("sizes", [[900, 60, 40], [700, 200, 100], [960, 20, 20]])
def test_clusters_of_unequal_sizes_are_found(sizes):
    X, y = make_blobs(sizes, centers=[[0, 0, 0], [8, 0, 0], [0, 8, 0]], random_state=0)
    labels = SelfLabelClusterer(3, random_state=0, max_epochs=20).fit_predict(X)
    assert clustering_accuracy(y, labels) > 0.99
