"""What is read off the features of the first round."""

import numpy as np
import torch
from torch import nn

from sklearn_sela._data import Geometry, Rows, Scaler
from sklearn_sela._features import LearnedFeatures
from sklearn_sela._network import SelfLabelNetwork


def test_a_cluster_that_no_row_is_in_leaves_the_clusterings_finite():
    X = np.random.default_rng(0).normal(size=(60, 4))
    rows = Rows(X, Scaler(X, None), torch.device("cpu"))
    network = SelfLabelNetwork(nn.Identity(), 4, 3, 8)
    with torch.no_grad():
        network.heads.bias[::8] = -1e4  # probability 0 in float32
    learned = LearnedFeatures(network, Geometry(rows, 4, np.random.default_rng(0)))
    labels = learned.labels(3, n_heads=3, seed=0)  # k-means refuses what is not finite
    assert [len(np.unique(row)) for row in labels] == [3, 3, 3]
