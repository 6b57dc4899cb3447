"""Exact sizes: that they are, and what they cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from problems import network_scores
from sklearn_sela import sinkhorn_labels
from sklearn_sela._rounding import size_limits


def best_score(scores, sizes):
    """Mean score of the best labels of these sizes, exactly."""
    columns = np.repeat(np.arange(len(sizes)), sizes)
    rows, matched = linear_sum_assignment(scores[:, columns], maximize=True)
    return scores[rows, columns[matched]].mean()


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    n=st.integers(1, 60),
    k=st.integers(1, 9),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_sizes_are_exact_and_the_cost_bounds_what_is_lost(n, k, scale, weighted, seed):
    rng = np.random.default_rng(seed)
    scores = scale * rng.normal(size=(n, k))
    weights = rng.uniform(0.1, 1, k) if weighted else None
    result = sinkhorn_labels(scores, cluster_weights=weights, exact_sizes=True)
    sizes = np.bincount(result.labels, minlength=k)
    ideal = n * (np.full(k, 1 / k) if weights is None else weights / weights.sum())
    assert (np.abs(sizes - ideal) < 1).all()
    if weights is None:
        assert np.ptp(sizes) <= 1
    score = scores[np.arange(n), result.labels].mean()
    best, rounding = best_score(scores, sizes), 1e-6 * (1 + scale)
    assert score <= best + rounding
    assert result.rounding_cost >= 0
    assert score >= best - result.rounding_cost - rounding


def test_the_cost_bounds_what_is_lost_where_all_rows_prefer_one_cluster():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, k = rng.integers(10, 40), rng.integers(2, 7)
        scores = 10 ** rng.uniform(-4, 0) * rng.normal(size=(n, k))
        weights = rng.uniform(0, 1, k) ** 4 + 1e-3
        result = sinkhorn_labels(scores, reg=1.0, cluster_weights=weights, exact_sizes=True)
        sizes = np.bincount(result.labels, minlength=k)
        lost = best_score(scores, sizes) - scores[np.arange(n), result.labels].mean()
        assert -1e-9 <= lost <= result.rounding_cost + 1e-9


def test_the_cost_is_small_beside_the_regularisation():
    scores = network_scores(3000, 50)
    result = sinkhorn_labels(scores, exact_sizes=True)
    score = scores[np.arange(3000), result.labels].mean()
    assert result.rounding_cost < 0.04 / 10
    assert best_score(scores, np.full(50, 60)) - score < 0.04 / 10


def test_labels_that_have_the_sizes_already_stay():
    scores = 10 * np.eye(4)[np.arange(100) % 4]
    result = sinkhorn_labels(scores, exact_sizes=True)
    assert (result.labels == np.arange(100) % 4).all()
    assert result.rounding_cost == 0


def test_only_as_many_rows_move_as_must():
    scores = network_scores(2000, 20)
    plain, exact = sinkhorn_labels(scores), sinkhorn_labels(scores, exact_sizes=True)
    excess = (np.bincount(plain.labels) - 100).clip(0).sum()
    assert (plain.labels != exact.labels).sum() == excess
    assert (plain.potential == exact.potential).all()
    assert plain.rounding_cost is None


def test_sizes_stay_within_upper_bounds():
    scores = network_scores(2000, 20, sharpness=30)
    bounds = np.linspace(0.02, 0.2, 20)
    result = sinkhorn_labels(scores, max_share=bounds, exact_sizes=True)
    assert (np.bincount(result.labels, minlength=20) <= 2000 * bounds + 1e-9).all()


def test_cluster_of_zero_weight_stays_empty():
    result = sinkhorn_labels(network_scores(99, 4), cluster_weights=[1, 0, 1, 1], exact_sizes=True)
    assert np.bincount(result.labels, minlength=4).tolist() == [33, 0, 33, 33]


@pytest.mark.parametrize(
    ("shares", "n", "limits"),
    [
        ([0.25] * 4, 10, [3, 3, 2, 2]),
        ([0.7, 0.2, 0.1], 10, [7, 2, 1]),
        ([0.3, 0.3, 0.4], 10, [3, 3, 4]),
        ([1 / 3] * 3, 3, [1, 1, 1]),
        ([0.5, 0.5, 0.5], 5, [2, 2, 2]),
        ([0.35, 0.35, 0.35], 3, [1, 1, 1]),
        ([1.0, 0.0], 7, [7, 0]),
    ],
)
def test_size_limits_hold_all_rows(shares, n, limits):
    assert size_limits(np.array(shares), n).tolist() == limits


@pytest.mark.parametrize("options", [{"sample_weight": np.ones(20)}, {"reg_m": 1.0}])
def test_exact_sizes_need_rows_that_count_alike_and_sizes_that_are_given(options):
    with pytest.raises(ValueError, match="exact_sizes counts rows"):
        sinkhorn_labels(network_scores(20, 3), exact_sizes=True, **options)
