"""The labelling step against independent oracles, closed forms and hostile inputs."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.special import logsumexp, softmax
from sklearn.exceptions import ConvergenceWarning

from problems import oracle_plan
from sklearn_sela import sinkhorn_labels
from sklearn_sela._kernels import Ask, Reader
from sklearn_sela._path import following, lengthen, new_path
from sklearn_sela._scores import Scores

SETTINGS = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)


def normalised(weights, size):
    w = np.full(size, 1.0) if weights is None else np.asarray(weights, dtype=float)
    return w / w.sum()


def textbook_sinkhorn(scores, reg, r, c, max_iter=3000, tol=1e-9):
    """Two-sided log-domain Sinkhorn: row and column potentials, falling reg, float64.

    Returns the plan's rows scaled to sum to 1, or None where it has not converged.
    """
    s = scores.astype(np.float64)
    g = np.zeros(s.shape[1])
    level = max(reg, np.ptp(s) / 8)
    while True:
        for iteration in range(max_iter):
            f = level * np.log(r) - level * logsumexp((s + g) / level, axis=1)
            g = level * np.log(c) - level * logsumexp((s + f[:, None]) / level, axis=0)
            if iteration % 10 == 9:
                plan = np.exp((s + f[:, None] + g) / level)
                if np.abs(plan.sum(1) - r).sum() <= (tol if level == reg else 1e-3):
                    break
        else:
            if level == reg:
                return None
        if level == reg:
            return plan / plan.sum(1, keepdims=True)
        level = max(reg, level / 3)


def linear_program(scores, r, m):
    """Value of the transport without entropy, for rows r and cluster shares m."""
    n, k = scores.shape
    equal = np.zeros((n + k, n * k))
    for i in range(n):
        equal[i, i * k : (i + 1) * k] = 1
    for j in range(k):
        equal[n + j, j::k] = 1
    # The last constraint follows from the others; rounding must not make it contradict them.
    solved = linprog(
        -scores.ravel(), A_eq=equal[:-1], b_eq=np.concatenate([r, m])[:-1], method="highs"
    )
    assert solved.status == 0, solved.message
    return -solved.fun


@st.composite
def problems(draw, scales=(1e-3, 1e-1, 1.0, 10.0, 1e2, 1e3, 1e4)):
    n, k = draw(st.integers(1, 60)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    scores = (draw(st.sampled_from(scales)) * rng.normal(size=(n, k))).astype(dtype)
    if draw(st.booleans()):
        scores = torch.from_numpy(scores)
    options = {
        "reg": draw(st.sampled_from([0.01, 0.04, 0.3, 2.0])),
        "cluster_weights": rng.uniform(0.1, 1, k) if draw(st.booleans()) else None,
        "sample_weight": rng.uniform(0.1, 1, n) if draw(st.booleans()) else None,
        "tol": 1e-5 if dtype is np.float32 else 1e-6,
    }
    return scores, options


def shares(result, r):
    return r @ np.asarray(result.assignment, dtype=np.float64)


def one_hot(labels, k):
    return np.eye(k)[np.asarray(labels)]


# --- against oracles -------------------------------------------------------------------------


def test_labels_and_marginals_agree_with_textbook_sinkhorn():
    compared = agreed = solved = drawn = 0

    @SETTINGS
    @given(problems(scales=(1e-3, 1e-1, 1.0, 3.0)))
    def check(problem):
        nonlocal compared, agreed, solved, drawn
        scores, options = problem
        n, k = scores.shape
        r = normalised(options["sample_weight"], n)
        c = normalised(options["cluster_weights"], k)
        result = sinkhorn_labels(scores, return_assignment=True, **options)
        drawn += 1
        assert result.converged
        plan = textbook_sinkhorn(np.asarray(scores), options["reg"], r, c)
        if plan is None:  # judged by the linear program instead, in the test below
            return
        solved += 1
        if k > 1 and len(np.unique(plan.argmax(1))) == 1:
            return  # split in proportion by design: judged by the tests of collapse
        ranked = np.sort(plan, axis=1)
        clear = np.full(n, True) if k == 1 else ranked[:, -1] - ranked[:, -2] > 0.01
        compared += clear.sum()
        agreed += (np.asarray(result.labels) == plan.argmax(1))[clear].sum()

    check()
    assert solved > 0.7 * drawn
    assert compared > 500
    assert agreed >= 0.999 * compared


@SETTINGS
@given(problems())
def test_marginal_error_is_the_true_one_and_within_tol_at_any_scale(problem):
    scores, options = problem
    n, k = scores.shape
    result = sinkhorn_labels(scores, return_assignment=True, **options)
    r = normalised(options["sample_weight"], n)
    c = normalised(options["cluster_weights"], k)
    true_error = np.abs(shares(result, r) - c).sum()
    assert result.converged
    assert result.marginal_error <= options["tol"]
    assert true_error == pytest.approx(result.marginal_error, abs=2e-6)
    assert np.allclose(np.asarray(result.assignment, dtype=float).sum(1), 1, atol=1e-5)


@SETTINGS
@given(problems(scales=(1.0, 10.0, 1e2, 1e3, 1e4)))
def test_transport_value_is_within_the_entropy_of_the_linear_program(problem):
    scores, options = problem
    n, k = scores.shape
    result = sinkhorn_labels(scores, return_assignment=True, **options)
    r = normalised(options["sample_weight"], n)
    s = np.asarray(scores, dtype=np.float64)
    q = np.asarray(result.assignment, dtype=np.float64)
    # Q is the entropic optimum for its own cluster shares, whose entropy given the rows is at
    # most log K: so this bound is exact, whatever tol was.
    best = linear_program(s, r, r @ q)
    value = (r[:, None] * q * s).sum()
    rounding = 1e-6 * (1 + np.abs(s).max())
    assert value >= best - options["reg"] * math.log(k) - rounding
    assert value <= best + rounding


@SETTINGS
@given(problems())
def test_labels_are_the_largest_entries_of_the_assignment(problem):
    scores, options = problem
    result = sinkhorn_labels(scores, return_assignment=True, **options)
    q = np.asarray(result.assignment)
    ranked = np.sort(q, axis=1)
    # Collapsed problems are split on purpose; here only their rows with a clear winner count.
    clear = np.full(len(q), True) if q.shape[1] == 1 else ranked[:, -1] - ranked[:, -2] > 0.5
    if len(np.unique(q.argmax(1))) > 1:
        assert (np.asarray(result.labels) == q.argmax(1))[clear].all()


@SETTINGS
@given(problems())
def test_potential_reproduces_the_assignment_by_a_softmax(problem):
    scores, options = problem
    result = sinkhorn_labels(scores, return_assignment=True, **options)
    s, v = np.asarray(scores, dtype=np.float64), np.asarray(result.potential)
    q = softmax((s - s.max(1, keepdims=True) + v) / options["reg"], axis=1)
    # Rounding of the row maximum moves float32 scores by eps; that, in units of reg, moves q.
    slack = np.finfo(np.asarray(scores).dtype).eps * np.ptp(s) / options["reg"]
    assert np.abs(q - np.asarray(result.assignment)).max() <= 1e-5 + 4 * slack


# --- adversarial -----------------------------------------------------------------------------

KINDS = (
    "constant",
    "constant plus noise",
    "equal rows",
    "one-hot",
    "log of one-hot",
    "one-hot in one cluster",
    "extreme",
    "skewed",
    "sharp float32 log-probabilities",
    "two prototypes",
)


def adversarial(kind, n, k, rng):
    noise = rng.normal(size=(n, k))
    if kind == "constant":
        return np.full((n, k), rng.normal() * 10)
    if kind == "constant plus noise":
        return 3 + 1e-9 * noise
    if kind == "equal rows":
        return np.tile(10 ** rng.uniform(-2, 3) * noise[:1], (n, 1))
    if kind == "one-hot":
        return one_hot(rng.integers(0, k, n), k)
    if kind == "log of one-hot":
        with np.errstate(divide="ignore"):
            return np.log(one_hot(rng.integers(0, k, n), k))
    if kind == "one-hot in one cluster":
        return one_hot(np.zeros(n, dtype=int), k) * 10 ** rng.uniform(-2, 4)
    if kind == "extreme":
        return 1e4 * rng.choice([-1.0, 1.0], size=(n, k))
    if kind == "skewed":
        return noise + 10 ** rng.uniform(0, 4) * np.eye(k)[0]
    if kind == "two prototypes":
        return 5 * noise[rng.integers(0, 2, n) % n]
    z = (noise + 3 * np.eye(k)[0]) * 10 ** rng.uniform(1, 3)
    return (z - logsumexp(z, axis=1, keepdims=True)).astype(np.float32)


@settings(SETTINGS, max_examples=250)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 40),
    k=st.integers(2, 8),
    weights=st.sampled_from(["uniform", "random", "one zero", "one tiny"]),
    zero_samples=st.booleans(),
    reg=st.sampled_from([1e-3, 0.04, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_samples_never_share_one_cluster_where_balance_was_asked_for(
    kind, n, k, weights, zero_samples, reg, seed
):
    rng = np.random.default_rng(seed)
    c = np.ones(k) if weights == "uniform" else rng.dirichlet(np.ones(k))
    if weights.startswith("one"):
        c[-1] = 0.0 if weights == "one zero" else 1e-30
    r = np.ones(n)
    if zero_samples:
        r[rng.random(n) < 0.3] = 0
        r[0] = 1
    result = sinkhorn_labels(
        adversarial(kind, n, k, rng), reg=reg, cluster_weights=c, sample_weight=r
    )
    assert result.converged
    assert ((result.labels >= 0) & (result.labels < k)).all()
    live = result.labels[r > 0]
    if len(live) * (1 - c.max() / c.sum()) >= 1:  # one sample is owed to another cluster
        assert len(np.unique(live)) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adversarial_scores_converge_to_finite_results(kind, dtype):
    scores = adversarial(kind, 30, 4, np.random.default_rng(0)).astype(dtype)
    result = sinkhorn_labels(scores, return_assignment=True)
    assert result.converged
    assert np.isfinite(result.potential).all()
    assert np.isfinite(result.assignment).all()
    assert np.abs(result.assignment.mean(0) - 0.25).sum() <= 1.1e-3


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 2), (10, 5), (12, 12), (1000, 7), (500, 300)])
def test_constant_scores_are_split_in_proportion(n, k):
    counts = np.bincount(sinkhorn_labels(np.full((n, k), -1.0)).labels, minlength=k)
    assert np.abs(counts - n / k).max() <= 2
    assert (counts > 0).sum() > 1


def test_constant_scores_are_split_in_proportion_to_unequal_weights():
    result = sinkhorn_labels(np.zeros((1000, 4)), cluster_weights=[4, 3, 2, 1])
    assert np.abs(np.bincount(result.labels) - [400, 300, 200, 100]).max() <= 3


def test_the_single_sample_owed_to_the_lesser_cluster_goes_there():
    labels = sinkhorn_labels(np.zeros((4, 2)), cluster_weights=[3, 1]).labels
    assert np.bincount(labels, minlength=2).tolist() == [3, 1]


def test_surest_rows_stay_when_all_rows_prefer_one_cluster():
    scores = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.99, 0.0]])
    labels = sinkhorn_labels(scores, reg=1.0, cluster_weights=[0.75, 0.25]).labels
    assert labels.tolist() == [0, 0, 0, 1]


def test_one_cluster_takes_every_sample():
    result = sinkhorn_labels(np.random.default_rng(0).normal(size=(9, 1)))
    assert result.labels.tolist() == [0] * 9
    assert result.converged


def test_one_sample_takes_its_best_cluster_for_its_weight():
    result = sinkhorn_labels([[0.0, 0.0, 0.0]], cluster_weights=[1, 5, 1], return_assignment=True)
    assert result.labels.tolist() == [1]
    assert np.allclose(result.assignment, [[1 / 7, 5 / 7, 1 / 7]], atol=1e-3)


@pytest.mark.parametrize("size", [2, 5, 30])
@pytest.mark.parametrize("height", [1.0, 1e4])
def test_as_many_samples_as_clusters_recovers_the_permutation(size, height):
    rng = np.random.default_rng(size)
    order = rng.permutation(size)
    scores = height * (np.eye(size)[order] + 0.1 * rng.uniform(size=(size, size)))
    assert (sinkhorn_labels(scores).labels == order).all()


def test_fewer_samples_than_clusters_take_distinct_best_clusters():
    scores = np.eye(6)[[4, 1, 3]]
    result = sinkhorn_labels(scores)
    assert result.labels.tolist() == [4, 1, 3]
    assert result.converged


@pytest.mark.parametrize("sharpness", [10, 100, 1000, 10000])
def test_sharp_float32_log_probabilities_keep_the_clusters_balanced(sharpness):
    # exp(lambda * (log p - max)) in float32 underflows here and starves all clusters but one.
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(600, 6)) + 4 * np.eye(6)[0]).float() * sharpness
    result = sinkhorn_labels(logits.log_softmax(1))
    counts = np.bincount(result.labels.numpy(), minlength=6)
    assert result.converged
    assert np.abs(counts - 100).max() <= 6  # K - 1 rows may be shared, the rest are hard


def test_heavy_skew_towards_one_cluster_is_undone():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(200, 4))
    skewed = sinkhorn_labels(scores + 1e4 * np.eye(4)[2], tol=1e-8)
    plain = sinkhorn_labels(scores, tol=1e-8)
    assert (skewed.labels == plain.labels).all()
    assert skewed.potential[2] - plain.potential[2] - (
        skewed.potential[0] - plain.potential[0]
    ) == pytest.approx(-1e4, abs=1e-5)


def test_minus_infinity_is_a_label_of_last_resort():
    scores = np.zeros((8, 2))
    scores[:4, 1] = -np.inf
    assert sinkhorn_labels(scores).labels.tolist() == [0] * 4 + [1] * 4
    scores[:, 1] = -np.inf  # balance leaves no other choice
    assert np.bincount(sinkhorn_labels(scores).labels, minlength=2).min() >= 3


def test_row_of_only_minus_infinity_is_indifferent():
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [-np.inf, -np.inf]])
    result = sinkhorn_labels(scores, return_assignment=True)
    assert np.allclose(result.assignment[2], 0.5, atol=1e-2)


@pytest.mark.parametrize("reg_m", [math.inf, 1.0, 0.0])
def test_cluster_of_zero_weight_gets_nothing(reg_m):
    scores = np.random.default_rng(2).normal(size=(30, 4)) + 5 * np.eye(4)[1]
    result = sinkhorn_labels(
        scores, cluster_weights=[1, 0, 1, 1], reg_m=reg_m, return_assignment=True
    )
    assert result.converged
    assert result.potential[1] == -np.inf
    assert (result.assignment[:, 1] == 0).all()
    assert set(result.labels) == {0, 2, 3}


@pytest.mark.parametrize("tiny", [1e-20, 1e-300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_several_tiny_cluster_weights_stay_solvable(tiny, dtype):
    # Both clusters vanish next to the others in a Newton system, which must stay regular.
    scores = (1000 * np.random.default_rng(0).normal(size=(40, 4))).astype(dtype)
    result = sinkhorn_labels(scores, cluster_weights=[1, 1, tiny, tiny])
    assert result.converged
    assert np.bincount(result.labels, minlength=4).tolist() == [20, 20, 0, 0]


def test_sample_of_zero_weight_is_labelled_but_not_counted():
    scores = np.random.default_rng(3).normal(size=(21, 3))
    weights = np.ones(21)
    weights[5] = 0
    scores[5] = [0, 50, 0]
    without = sinkhorn_labels(np.delete(scores, 5, axis=0), tol=1e-8)
    result = sinkhorn_labels(scores, sample_weight=weights, tol=1e-8)
    assert result.labels[5] == 1
    assert (np.delete(result.labels, 5) == without.labels).all()
    # A potential is free up to a constant.
    assert np.allclose(np.diff(result.potential), np.diff(without.potential), atol=1e-6)


def test_huge_weights_do_not_overflow():
    scores = np.random.default_rng(4).normal(size=(10, 2))
    huge = sinkhorn_labels(scores, cluster_weights=[1e308, 1e308], sample_weight=[1e308] * 10)
    assert (huge.labels == sinkhorn_labels(scores).labels).all()
    assert huge.converged


def test_step_on_a_plateau_of_the_error_does_not_cycle():
    # Of 49 rows in two clusters one must be split. In the wide gap beside it the error is
    # constant to rounding, and a solver that takes any smaller error walks in circles.
    for seed in range(30, 40):
        scores = 36 * np.random.default_rng(seed).normal(size=(49, 2))
        assert sinkhorn_labels(scores).converged


@pytest.mark.parametrize("seed", range(12))
def test_very_sharp_small_problems_converge(seed):
    rng = np.random.default_rng(seed)
    scores = 2000 * rng.normal(size=(55, 3))
    assert sinkhorn_labels(scores, reg=0.01, tol=1e-6).converged


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gram_matrix_leaves_out_only_what_is_nothing(dtype):
    # Most products of a sharp solution's entries have no normal number.
    scores = (40 * np.random.default_rng(0).normal(size=(300, 20))).astype(dtype)
    weights = np.random.default_rng(1).uniform(size=300)
    reader = Reader(Scores(scores), weights, 1.0, 1e-3)
    (sums,) = reader.sums([Ask(0, np.zeros(20), 1.0, gram=True)])
    q = softmax(scores.astype(np.float64), axis=1)
    exact = (q * (weights / weights.sum())[:, None]).T @ q
    assert np.abs(sums.gram - exact).max() < (1e-14 if dtype == np.float64 else 1e-7)
    assert np.abs(np.diag(sums.gram) - sums.squares).max() < 1e-7


@pytest.mark.parametrize(("k", "m"), [(100, 2), (400, 2), (100, 20)])
def test_newton_finishes_what_reads_cannot_in_max_iter(k, m):
    # A few kinds of rows, which have to be split between clusters.
    kinds = np.random.default_rng(0).normal(size=(m, k)).astype(np.float32)
    assert sinkhorn_labels(np.repeat(kinds, 4000 // m, axis=0), max_iter=30).converged


def test_blocks_made_with_a_gradient_keep_none():
    linear, seen = torch.nn.Linear(4, 3), []

    def blocks():
        seen.append(linear(torch.ones(5, 4)).requires_grad)
        yield linear(torch.ones(5, 4))

    sinkhorn_labels(blocks, warn=False, max_iter=5)
    assert not any(seen[1:])  # the first are looked at before the solve


# --- Anderson acceleration -------------------------------------------------------------------


def test_acceleration_solves_a_linear_map_in_as_many_steps_as_it_has_dimensions():
    rng = np.random.default_rng(0)
    a, b = 0.5 * rng.normal(size=(4, 4)) / 2, rng.normal(size=4)
    path, v = new_path(np.ones(4)), np.zeros(4)
    for _ in range(6):
        lengthen(path, v, a @ v + b - v, 1.0)
        v = following(path)
    assert v == pytest.approx(np.linalg.solve(np.eye(4) - a, b), abs=1e-6)


def test_acceleration_of_a_path_that_stands_still_is_the_plain_step():
    path, v = new_path(np.ones(3)), np.arange(3.0)
    for residual in (np.ones(3), np.ones(3), np.zeros(3), np.zeros(3)):
        lengthen(path, v, residual, 1.0)
        assert following(path) == pytest.approx(v + residual, abs=1e-6)


# --- the KL-relaxed marginal -----------------------------------------------------------------


@SETTINGS
@given(problems(scales=(1e-2, 1.0, 10.0, 1e3)), st.sampled_from([1e-2, 0.3, 1.0, 30.0, 1e3]))
def test_relaxed_shares_satisfy_first_order_optimality(problem, reg_m):
    scores, options = problem
    n, k = scores.shape
    result = sinkhorn_labels(scores, reg_m=reg_m, return_assignment=True, **options)
    m = shares(result, normalised(options["sample_weight"], n))
    c = normalised(options["cluster_weights"], k)
    asked = softmax(np.log(c) - np.asarray(result.potential) / reg_m)
    assert result.converged
    error = np.abs(m - asked).sum()
    assert error == pytest.approx(result.marginal_error, abs=2e-6)
    assert error <= options["tol"] + 2e-6


def test_infinite_and_huge_reg_m_give_the_exact_weights():
    scores = np.random.default_rng(5).normal(size=(40, 4))
    weights = [4, 3, 2, 1]
    exact = sinkhorn_labels(scores, cluster_weights=weights, tol=1e-9)
    named = sinkhorn_labels(scores, cluster_weights=weights, reg_m=math.inf, tol=1e-9)
    huge = sinkhorn_labels(scores, cluster_weights=weights, reg_m=1e9, tol=1e-9)
    assert (named.labels == exact.labels).all()
    assert (named.potential == exact.potential).all()
    assert (huge.labels == exact.labels).all()
    assert np.allclose(np.diff(huge.potential), np.diff(exact.potential), atol=1e-6)


def test_zero_reg_m_is_the_plain_softmax():
    scores = np.random.default_rng(6).normal(size=(40, 4))
    result = sinkhorn_labels(scores, reg=0.5, reg_m=0, return_assignment=True)
    assert np.allclose(result.assignment, softmax(scores / 0.5, axis=1))
    assert (result.labels == scores.argmax(1)).all()
    assert (result.potential == 0).all()


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_shares_move_from_free_to_the_weights_as_reg_m_grows(k, scale):
    rng = np.random.default_rng(7)
    scores = scale * (rng.normal(size=(60, k)) + np.eye(k)[0])
    c = normalised(np.arange(1, k + 1), k)
    path = np.array(
        [
            shares(
                sinkhorn_labels(
                    scores, cluster_weights=c, reg_m=reg_m, tol=1e-8, return_assignment=True
                ),
                np.full(60, 1 / 60),
            )
            for reg_m in [0, *np.logspace(-3, 6, 19) * scale, math.inf]
        ]
    )
    assert np.allclose(path[0], softmax(scores / 0.04, axis=1).mean(0))
    assert np.allclose(path[-1], c, atol=1e-7)
    # The penalty falls along the path of a penalised problem, in any number of clusters; with
    # two, that is each share itself.
    divergence = (path * np.log(path / c)).sum(1)
    assert (np.diff(divergence) <= 1e-7).all()
    if k == 2:
        assert (np.diff(path[:, 0]) <= 1e-7).all()


def test_relaxed_solution_agrees_with_damped_textbook_scaling():
    scores = np.random.default_rng(8).normal(size=(30, 4)) + np.eye(4)[0]
    reg, reg_m, c = 0.3, 0.7, np.array([0.4, 0.3, 0.2, 0.1])
    g = np.zeros(4)
    for _ in range(2000):
        f = -np.log(30) * reg - reg * logsumexp((scores + g) / reg, axis=1)
        starved = logsumexp((scores + f[:, None]) / reg, axis=0)
        g = reg_m / (reg_m + reg) * reg * (np.log(c) - starved)
    plan = 30 * np.exp((scores + f[:, None] + g) / reg)
    result = sinkhorn_labels(
        scores, reg=reg, reg_m=reg_m, cluster_weights=c, tol=1e-9, return_assignment=True
    )
    assert np.allclose(result.assignment, plan, atol=1e-7)


# --- upper bounds on sizes -------------------------------------------------------------------


@SETTINGS
@given(problems(scales=(1e-2, 1.0, 10.0, 1e3)), st.floats(1.0, 4.0))
def test_bounded_shares_satisfy_first_order_optimality(problem, room):
    scores, options = problem
    n, k = scores.shape
    options.pop("cluster_weights")
    limit = min(1.0, room / k)
    result = sinkhorn_labels(scores, max_share=limit, return_assignment=True, **options)
    m = shares(result, normalised(options["sample_weight"], n))
    v = np.asarray(result.potential)
    assert result.converged
    slack = 2 * options["tol"] + 2e-6
    assert (m - limit).clip(0).sum() <= slack  # feasible
    assert (v <= 0).all()
    assert np.abs(m - limit)[v < 0].sum() <= slack  # a price only where the bound binds


def test_bounds_that_do_not_bind_are_the_plain_softmax():
    scores = np.random.default_rng(6).normal(size=(40, 4))
    result = sinkhorn_labels(scores, reg=0.5, max_share=1.0, return_assignment=True)
    assert np.allclose(result.assignment, softmax(scores / 0.5, axis=1))
    assert (result.potential == 0).all()


@pytest.mark.parametrize("bounds", [np.inf, [0.5, 0.6, 1e20]])
def test_bounds_beyond_all_samples_are_none(bounds):
    scores = np.random.default_rng(6).normal(size=(100, 3)) - 50 * np.eye(3)[2]
    result = sinkhorn_labels(scores, max_share=bounds, exact_sizes=True)
    assert result.converged
    assert np.bincount(result.labels, minlength=3)[2] == 0


def test_bounds_without_room_are_the_sizes():
    scores = np.random.default_rng(6).normal(size=(40, 4))
    bounds = np.array([0.4, 0.3, 0.2, 0.1])
    bounded = sinkhorn_labels(scores, max_share=bounds, tol=1e-8)
    exact = sinkhorn_labels(scores, cluster_weights=bounds, tol=1e-8)
    assert np.allclose(bounded.potential, exact.potential, atol=1e-6)
    nearly = sinkhorn_labels(scores, max_share=bounds * 1.0001, tol=1e-8)
    assert np.allclose(nearly.potential, exact.potential, atol=1e-2)


def test_bounded_value_is_that_of_the_linear_program():
    rng = np.random.default_rng(11)
    scores = rng.normal(size=(30, 5)) + 2 * np.eye(5)[0]
    limit, n, k = 0.3, 30, 5
    rows = np.kron(np.eye(n), np.ones(k))
    columns = np.tile(np.eye(k), n)
    best = linprog(
        -scores.ravel(), A_eq=rows, b_eq=np.full(n, 1 / n), A_ub=columns, b_ub=np.full(k, limit)
    )
    result = sinkhorn_labels(
        scores, max_share=limit, reg=0.001, tol=1e-7, max_iter=5000, return_assignment=True
    )
    value = (result.assignment * scores).sum() / n
    assert value == pytest.approx(-best.fun, abs=0.001 * math.log(k) + 1e-6)


@pytest.mark.parametrize("bound", [0.2, [0.5, 0.4], [-0.1, 2], [np.nan, 1], [1, 1, 1]])
def test_bounds_that_leave_no_solution_raise(bound):
    with pytest.raises(ValueError, match=r"max_share=.* add up to 1 or more over the 2 clusters"):
        sinkhorn_labels(np.zeros((4, 2)), max_share=bound)


@pytest.mark.parametrize("options", [{"cluster_weights": [1, 1]}, {"reg_m": 1.0}])
def test_bounds_are_for_free_sizes(options):
    with pytest.raises(ValueError, match="leave out cluster_weights and reg_m"):
        sinkhorn_labels(np.zeros((4, 2)), max_share=0.5, **options)


# --- acceleration ----------------------------------------------------------------------------


def plain_reads(scores, reg, c, reg_m=math.inf, capped=False, most=1000, tol=1e-3):
    """Reads that plain Sinkhorn takes, or most."""
    v = np.zeros(scores.shape[1])
    for reads in range(1, most):
        m = np.maximum(softmax((scores + v) / reg, axis=1).mean(0), np.finfo(np.float32).tiny)
        asked = c if math.isinf(reg_m) else softmax(np.log(c) - v / reg_m)
        if capped:
            asked = np.where(v < 0, c, np.minimum(m, c))
        if np.abs(m - asked).sum() <= tol:
            return reads
        v += reg * np.log(c / m)
        if math.isfinite(reg_m):
            v *= reg_m / (reg_m + reg)  # the damped step of unbalanced transport
        if capped:
            v = np.minimum(v - min(v.max(), 0), 0)
    return most


@pytest.mark.parametrize("kind", ["exact", "pulled", "capped"])
def test_acceleration_never_ends_worse_than_plain_sinkhorn(kind):
    rng, ours, theirs = np.random.default_rng(0), [], []
    for trial in range(120):
        n, k, scale = rng.integers(2, 300), rng.integers(2, 12), 10 ** rng.uniform(-2, 2.5)
        scores = scale * rng.normal(size=(n, k))
        if trial % 3 == 0:
            scores[:, 0] += scale * rng.uniform(0, 5)
        c = rng.dirichlet(np.full(k, 3.0)) if trial % 2 else np.full(k, 1 / k)
        reg = [0.01, 0.04, 0.3, 2.0][trial % 4]
        reg_m = scale * 10 ** rng.uniform(-2, 2) if kind == "pulled" else math.inf
        if kind == "capped":
            c = np.full(k, min(1.0, rng.uniform(1.1, 3) / k))
            result = sinkhorn_labels(scores, reg=reg, max_share=c)
        else:
            result = sinkhorn_labels(scores, reg=reg, cluster_weights=c, reg_m=reg_m)
        assert result.converged
        ours.append(result.n_iter)
        theirs.append(plain_reads(scores, reg, c, reg_m, kind == "capped"))
    ours, theirs = np.array(ours), np.array(theirs)
    assert (ours <= theirs + 8).all()  # a read for each level of a sharp problem
    assert ours.mean() < theirs.mean() / 10
    if kind == "exact":
        assert np.median(ours) < np.median(theirs) / 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_iter", [1, 2, 5, 17])
def test_max_iter_bounds_the_reads_of_any_problem(kind, max_iter):
    scores = adversarial(kind, 30, 4, np.random.default_rng(0))
    for options in ({}, {"reg_m": 0.5}, {"max_share": 0.3}, {"potential": np.zeros(4)}):
        result = sinkhorn_labels(scores, max_iter=max_iter, warn=False, **options)
        assert 1 <= result.n_iter <= max_iter
        assert np.isfinite(result.marginal_error)


def test_fine_tolerances_are_reached_from_float32_scores():
    for scores in (np.ones((500, 7)), np.random.default_rng(0).normal(size=(200, 5))):
        result = sinkhorn_labels(scores.astype(np.float32), reg=1e3, tol=1e-9, max_iter=50)
        assert result.converged


def test_newton_steps_between_far_points_come_to_an_end():
    rng = np.random.default_rng(0)
    for lead in np.linspace(0.5, 1.7, 30):  # all rows want one cluster, which may have a fifth
        scores = 0.1 * rng.normal(size=(30, 8))
        scores[:, 0] += lead
        result = sinkhorn_labels(scores, reg=0.01, max_share=0.2, potential=np.zeros(8))
        assert result.converged
        assert result.n_iter < 100


def test_singular_newton_systems_are_damped():
    rng = np.random.default_rng(0)
    for _ in range(200):  # few rows, far apart: most moves of the potential change nothing
        n, k, scale = rng.integers(2, 20), rng.integers(2, 12), 10 ** rng.uniform(0, 3)
        scores = scale * rng.normal(size=(n, k))
        result = sinkhorn_labels(scores, tol=1e-9, potential=np.zeros(k), max_iter=60, warn=False)
        assert np.isfinite(result.marginal_error)


# --- real scores -----------------------------------------------------------------------------


def test_labels_of_a_real_fit_are_those_of_the_oracle(monkeypatch):
    from sklearn.datasets import load_digits

    from sklearn_sela import SelfLabelClusterer
    from sklearn_sela._labels import SelfLabels

    given_to_solver, solve = [], SelfLabels.solve

    def record(self, network):
        given_to_solver.append(self.scores[0].numpy().copy())
        solve(self, network)

    monkeypatch.setattr(SelfLabels, "solve", record)
    SelfLabelClusterer(10, random_state=0).fit(load_digits().images)
    last = len(given_to_solver) - 1
    # Early, in the middle and late in both rounds; the oracle takes ten seconds at less reg.
    cases = [(0, 0.04), (last // 2 + 1, 0.04)]
    cases += [(at, 0.2) for at in (0, last // 4, last // 2, last // 2 + 1, 3 * last // 4, last)]
    for at, reg in cases:
        scores = given_to_solver[at]
        plan = oracle_plan(scores, reg)
        ranked = np.sort(plan, axis=1)
        clear = ranked[:, -1] - ranked[:, -2] > 0.01
        labels = sinkhorn_labels(scores, reg=reg).labels
        assert clear.mean() > 0.8
        assert (labels == plan.argmax(1))[clear].mean() >= 0.999


# --- closed forms and symmetries -------------------------------------------------------------


def test_two_samples_in_two_clusters_have_the_mean_gap_as_potential():
    # sigmoid(a - w) + sigmoid(b - w) = 1 exactly for w = (a + b) / 2
    a, b = 3.0, 1.0
    result = sinkhorn_labels([[a, 0.0], [b, 0.0]], reg=0.5, tol=1e-10)
    assert result.potential[1] - result.potential[0] == pytest.approx((a + b) / 2, abs=1e-8)
    assert result.labels.tolist() == [0, 1]


def test_equal_rows_have_the_log_weights_less_the_scores_as_potential():
    row, c, reg = np.array([2.0, -1.0, 0.5]), np.array([0.5, 0.3, 0.2]), 0.7
    v = sinkhorn_labels(np.tile(row, (10, 1)), reg=reg, cluster_weights=c, tol=1e-10).potential
    known = reg * np.log(c) - row
    assert np.allclose(v - v[0], known - known[0], atol=1e-8)


def dyadic_scores(seed, n=50, k=5):
    """Scores that survive the addition of integers without rounding."""
    return np.round(np.random.default_rng(seed).normal(size=(n, k)) * 1024) / 1024


def test_permuting_the_clusters_permutes_labels_and_potential():
    scores, order = dyadic_scores(9), np.array([3, 0, 4, 1, 2])
    weights = np.array([5.0, 4, 3, 2, 1])
    plain = sinkhorn_labels(scores, cluster_weights=weights, tol=1e-9)
    permuted = sinkhorn_labels(scores[:, order], cluster_weights=weights[order], tol=1e-9)
    assert (order[permuted.labels] == plain.labels).all()
    assert np.allclose(permuted.potential, plain.potential[order], atol=1e-6)


def test_permuting_the_rows_permutes_the_labels():
    scores, order = dyadic_scores(10), np.random.default_rng(0).permutation(50)
    plain = sinkhorn_labels(scores, tol=1e-9)
    permuted = sinkhorn_labels(scores[order], tol=1e-9)
    assert (permuted.labels == plain.labels[order]).all()
    assert np.allclose(permuted.potential, plain.potential, atol=1e-6)


def test_adding_a_constant_to_a_row_changes_nothing():
    scores = dyadic_scores(11)
    shifted = scores + np.random.default_rng(0).integers(-10000, 10000, size=(50, 1))
    plain, moved = sinkhorn_labels(scores), sinkhorn_labels(shifted)
    assert (moved.labels == plain.labels).all()
    assert (moved.potential == plain.potential).all()
    assert moved.n_iter == plain.n_iter


@pytest.mark.parametrize("factor", [2.0**-20, 0.5, 1024.0])
def test_scaling_scores_and_reg_scales_the_potential(factor):
    scores = dyadic_scores(12)
    plain = sinkhorn_labels(scores, reg=0.04)
    scaled = sinkhorn_labels(scores * factor, reg=0.04 * factor)
    assert (scaled.labels == plain.labels).all()
    assert np.allclose(scaled.potential / factor, plain.potential, rtol=1e-9, atol=1e-12)


def test_repeating_a_sample_equals_weighting_it():
    scores = dyadic_scores(13)
    times = np.random.default_rng(0).integers(1, 4, size=50)
    weighted = sinkhorn_labels(scores, sample_weight=times, tol=1e-9)
    repeated = sinkhorn_labels(np.repeat(scores, times, axis=0), tol=1e-9)
    assert np.allclose(weighted.potential, repeated.potential, atol=1e-6)
    assert (np.repeat(weighted.labels, times) == repeated.labels).all()


def test_more_rows_than_one_block_solve_like_one_block(monkeypatch):
    scores = dyadic_scores(14)
    plain = sinkhorn_labels(scores, tol=1e-9, return_assignment=True)
    monkeypatch.setattr("sklearn_sela._kernels._CHUNK", 35)
    blocked = sinkhorn_labels(scores, tol=1e-9, return_assignment=True)
    constant = sinkhorn_labels(np.zeros((100, 2)))
    assert (blocked.labels == plain.labels).all()
    assert np.allclose(blocked.assignment, plain.assignment, atol=1e-7)
    assert np.abs(np.bincount(constant.labels) - 50).max() <= 2


# --- warm starts -----------------------------------------------------------------------------


@SETTINGS
@given(problems(), st.sampled_from([math.inf, 1.0]))
def test_warm_start_from_the_solution_is_done_at_once(problem, reg_m):
    scores, options = problem
    cold = sinkhorn_labels(scores, reg_m=reg_m, **options)
    options["tol"] *= 1.01  # the shift of the potential may round the error across tol
    warm = sinkhorn_labels(scores, reg_m=reg_m, potential=cold.potential, **options)
    assert warm.converged
    assert warm.n_iter <= 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "stale", [[1e4, 0, 0], [1e300, 0, 0], [0, -np.inf, 3], [-np.inf] * 3, [1e300] * 3]
)
def test_stale_potential_still_leads_to_the_solution(dtype, stale):
    scores = np.random.default_rng(15).normal(size=(30, 3)).astype(dtype)
    cold = sinkhorn_labels(scores, tol=1e-5)
    warm = sinkhorn_labels(scores, tol=1e-5, potential=stale)
    assert warm.converged
    assert (warm.labels == cold.labels).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(3))
def test_stale_potential_far_beyond_a_weak_pull_leads_back(seed):
    # Shares that such a potential asks for are too small for any number.
    rng = np.random.default_rng(seed)
    scores, stale = 20 * rng.normal(size=(500, 30)), 20 * rng.normal(size=30)
    warm = sinkhorn_labels(scores, reg=0.2, reg_m=0.1, potential=stale)
    cold = sinkhorn_labels(scores, reg=0.2, reg_m=0.1)
    assert warm.converged
    assert warm.n_iter < 100
    assert (warm.labels == cold.labels).all()


# --- interface -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg": 0}, "reg=0 is out of range"),
        ({"reg": -1.0}, "reg=-1.0 is out of range"),
        ({"reg": math.inf}, "reg=inf is out of range"),
        ({"reg": math.nan}, "reg=nan is out of range"),
        ({"reg_m": -0.5}, "reg_m=-0.5 is out of range"),
        ({"reg_m": math.nan}, "reg_m=nan is out of range"),
        ({"tol": 0}, "tol=0 is out of range"),
        ({"max_iter": 0}, "max_iter=0 is out of range"),
        ({"cluster_weights": [1, 1, 1]}, r"cluster_weights must have shape \(2,\), got \(3,\)"),
        ({"cluster_weights": [1, -1]}, "cluster_weights must be finite, non-negative"),
        ({"cluster_weights": [0, 0]}, "cluster_weights .* not all zero"),
        ({"sample_weight": [[1, 1]]}, r"sample_weight must have shape \(2,\), got \(1, 2\)"),
        ({"sample_weight": [1, math.nan]}, "sample_weight must be finite"),
        ({"sample_weight": [1, math.inf]}, "sample_weight must be finite"),
        ({"potential": [0, 0, 7]}, r"potential must be 2 numbers .* got \[0, 0, 7\]"),
        ({"potential": [0, math.nan]}, r"potential must be 2 numbers .* got \[0, nan\]"),
        ({"potential": [0, math.inf]}, r"potential must be 2 numbers .* got \[0, inf\]"),
    ],
)
def test_option_out_of_range_raises_and_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_labels(np.zeros((2, 2)), **options)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros(3), r"\(n, K\) matrix, got shape \(3,\)"),
        (np.zeros((2, 2, 2, 2)), r"got shape \(2, 2, 2, 2\)"),
        (np.zeros((0, 2, 2)), "at least one head"),
        (np.zeros((2, 0, 2)), r"got shape \(0, 2\)"),
        (np.zeros((0, 2)), r"non-empty .* got shape \(0, 2\)"),
        (np.zeros((2, 0)), r"non-empty .* got shape \(2, 0\)"),
        (np.array([[0.0, np.nan]]), "NaN or \\+inf"),
        (np.array([[0.0, np.inf]]), "NaN or \\+inf"),
        (np.array([[0.0, 1e307], [0.0, 0.0]]), "reg=0.01 is too small for scores .* 1e\\+307"),
    ],
)
def test_unusable_scores_raise_and_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_labels(scores, reg=0.01)


@pytest.mark.parametrize("max_iter", [1, 2, 3, 6])
def test_too_few_iterations_warn_and_still_label(max_iter):
    scores = 1000 * np.random.default_rng(16).normal(size=(40, 4))
    with pytest.warns(ConvergenceWarning, match=f"max_iter={max_iter} with marginal error"):
        result = sinkhorn_labels(scores, max_iter=max_iter)
    assert not result.converged
    assert result.n_iter <= max_iter
    assert result.marginal_error > 1e-3


def test_warning_can_be_silenced():
    scores = 1000 * np.random.default_rng(16).normal(size=(40, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sinkhorn_labels(scores, max_iter=2, warn=False).converged


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64, np.bool_])
def test_array_in_array_out(dtype):
    result = sinkhorn_labels(np.eye(3)[[0, 1, 2, 0, 1, 2]].astype(dtype), return_assignment=True)
    assert isinstance(result.labels, np.ndarray)
    assert result.labels.dtype == np.int64
    assert isinstance(result.potential, np.ndarray)
    assert result.potential.dtype == np.float64
    assert isinstance(result.assignment, np.ndarray)
    assert result.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_tensor_in_tensor_out(dtype):
    scores = torch.eye(3)[[0, 1, 2, 0, 1, 2]].to(dtype)
    result = sinkhorn_labels(scores, return_assignment=True)
    assert isinstance(result.labels, torch.Tensor)
    assert result.labels.dtype == torch.int64
    assert isinstance(result.potential, torch.Tensor)
    assert result.potential.dtype == torch.float64
    assert isinstance(result.assignment, torch.Tensor)
    assert result.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_tensor_that_needs_a_gradient_is_read_without_one():
    scores = torch.eye(3).requires_grad_()
    result = sinkhorn_labels(scores, return_assignment=True)
    assert not result.assignment.requires_grad
    assert result.labels.tolist() == [0, 1, 2]


def test_integer_scores_equal_float_scores():
    scores = np.random.default_rng(17).integers(-5, 5, size=(30, 4))
    as_int, as_float = sinkhorn_labels(scores), sinkhorn_labels(scores.astype(float))
    assert (as_int.labels == as_float.labels).all()
    assert (as_int.potential == as_float.potential).all()


def test_list_and_reversed_and_read_only_arrays_are_accepted():
    scores = dyadic_scores(18)
    plain = sinkhorn_labels(scores)
    frozen = scores.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (sinkhorn_labels(scores[::-1][::-1]).labels == plain.labels).all()
        assert len(sinkhorn_labels(scores[::-1, ::-1]).labels) == 50
        assert (sinkhorn_labels(frozen, sample_weight=frozen[:, 0] ** 0).labels).shape == (50,)
        assert (sinkhorn_labels(frozen).labels == plain.labels).all()
        assert (sinkhorn_labels(scores.tolist()).labels == plain.labels).all()


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inputs_are_not_modified(kind, dtype):
    scores = 100 * np.random.default_rng(19).normal(size=(30, 3)).astype(dtype)
    scores[3, 1] = -np.inf
    inputs = [scores, np.arange(1.0, 4), np.arange(1.0, 31), np.array([5.0, -np.inf, 1.0])]
    if kind == "tensor":
        inputs = [torch.from_numpy(x) for x in inputs]
    before = [np.asarray(x).copy() for x in inputs]
    sinkhorn_labels(
        inputs[0], cluster_weights=inputs[1], sample_weight=inputs[2], potential=inputs[3]
    )
    for was, now in zip(before, inputs, strict=True):
        assert (was == np.asarray(now)).all()


def test_assignment_is_returned_only_when_asked():
    assert sinkhorn_labels(np.eye(2)).assignment is None
    assert sinkhorn_labels(np.eye(2), return_assignment=True).assignment.shape == (2, 2)


def test_same_input_gives_the_same_result():
    scores = np.random.default_rng(20).normal(size=(50, 4))
    first, second = sinkhorn_labels(scores), sinkhorn_labels(scores)
    assert (first.labels == second.labels).all()
    assert (first.potential == second.potential).all()
