"""Scores of a clustering against brute force and closed forms."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sklearn_sela.metrics import clustering_accuracy, information_score

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=12)


@SETTINGS
@given(pairs=PAIRS)
def test_accuracy_is_the_best_over_all_one_to_one_matches(pairs):
    true, found = np.array(pairs).T
    # Five slots: every injective match of 5 clusters to at most 5 (partly empty) classes.
    best = max((np.array(p)[found] == true).mean() for p in permutations(range(5)))
    assert clustering_accuracy(true, found) == pytest.approx(best)


def test_accuracy_takes_names_as_labels():
    assert clustering_accuracy(["a", "a", "b"], [7, 7, -1]) == 1.0


def test_accuracy_counts_rows_of_surplus_clusters_as_wrong():
    assert clustering_accuracy([0, 0, 0, 0], [0, 0, 1, 2]) == 0.5


def test_accuracy_of_one_cluster_is_the_largest_class():
    assert clustering_accuracy([0, 0, 0, 1], [0, 0, 0, 0]) == 0.75


def test_accuracy_refuses_labels_of_different_lengths():
    with pytest.raises(ValueError, match=r"."):
        clustering_accuracy([0, 1, 1], [0, 1])


def test_information_of_sure_equal_clusters_is_one():
    assert information_score(np.tile(np.eye(3), (4, 1))) == pytest.approx(1.0)


def test_information_of_rows_all_alike_is_zero():
    assert information_score(np.tile([0.7, 0.2, 0.1], (5, 1))) == pytest.approx(0.0, abs=1e-12)


def test_information_of_one_cluster_is_zero():
    assert information_score(np.ones((4, 1))) == 0.0


def test_information_of_sure_unequal_clusters_is_the_entropy_of_their_sizes():
    shares = np.array([0.75, 0.25])
    expected = -(shares * np.log(shares)).sum() / np.log(2)
    assert information_score(np.eye(2)[[0, 0, 0, 1]]) == pytest.approx(expected)


@SETTINGS
@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), k=st.integers(2, 5))
def test_information_lies_between_zero_and_one(seed, n, k):
    p = np.random.default_rng(seed).dirichlet(np.full(k, 0.3), n)
    assert 0 <= information_score(p) <= 1


def test_information_ignores_the_names_of_clusters():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 20)
    assert information_score(p[:, ::-1]) == pytest.approx(information_score(p))
