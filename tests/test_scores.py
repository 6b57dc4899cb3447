"""Where scores come from: files, blocks, and features times heads."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from problems import network_scores
from sklearn_sela import sinkhorn_labels

SCORES = network_scores(5000, 60)


def same(one, two):
    return (np.asarray(one.labels) == np.asarray(two.labels)).all()


@pytest.fixture(scope="module")
def plain():
    return sinkhorn_labels(SCORES)


@pytest.fixture
def file(tmp_path):
    np.save(tmp_path / "scores.npy", SCORES)
    return tmp_path / "scores.npy"


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memmap_solves_like_the_matrix(file, plain, mode):
    scores = np.load(file, mmap_mode=mode)
    result = sinkhorn_labels(scores)
    assert same(result, plain)
    assert isinstance(result.labels, np.ndarray)
    assert same(sinkhorn_labels(scores[100:4000, 5:]), sinkhorn_labels(SCORES[100:4000, 5:]))


def test_changes_to_a_private_memmap_are_seen_and_kept(file):
    scores = np.load(file, mmap_mode="c")
    scores[:] = -scores
    result = sinkhorn_labels(scores)
    assert same(result, sinkhorn_labels(-SCORES))
    assert (scores == -SCORES).all()


def test_a_file_larger_than_the_memory_it_takes(tmp_path):
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("peak memory is read from /proc")
    code = f"""
import numpy as np
from pathlib import Path
from sklearn_sela import sinkhorn_labels

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

rng = np.random.default_rng(0)
path = {str(tmp_path / "scores.npy")!r}
file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(800_000, 100))
for start in range(0, 800_000, 20_000):
    file[start : start + 20_000] = rng.normal(size=(20_000, 100))
file.flush()
sinkhorn_labels(file[:10_000])  # compiled
del file
scores = np.load(path, mmap_mode="r")
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
assert sinkhorn_labels(scores).converged
print((resident("VmHWM") - before) / scores.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.35  # of 320 MB: a block, its copy, and the labels


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_blocks_solve_like_the_matrix(plain, kind):
    def blocks():
        return (kind(SCORES[start : start + 777]) for start in range(0, 5000, 777))

    result = sinkhorn_labels(blocks)
    assert same(result, plain)
    assert isinstance(result.labels, torch.Tensor) == (kind is torch.tensor)
    exact = sinkhorn_labels(blocks, exact_sizes=True, return_assignment=True)
    assert np.ptp(np.bincount(np.asarray(exact.labels))) <= 1
    assert exact.assignment.shape == (5000, 60)


def test_blocks_of_few_rows_solve_like_the_matrix():
    scores = SCORES[:40, :5]
    result = sinkhorn_labels(lambda: iter(np.array_split(scores, 60)))  # some have none
    assert same(result, sinkhorn_labels(scores))


def test_blocks_must_be_alike_and_come_again():
    halves = [SCORES[:10], SCORES[10:20, :50]]
    with pytest.raises(ValueError, match=r"blocks must be \(rows, 60\) .* got \(10, 50\)"):
        sinkhorn_labels(lambda: iter(halves))
    with pytest.raises(ValueError, match="at least one block"):
        sinkhorn_labels(lambda: iter([]))
    with pytest.raises(ValueError, match="hold no rows"):
        sinkhorn_labels(lambda: iter([SCORES[:0]]))
    calls = []

    def fewer_each_time():
        calls.append(1)
        return iter([SCORES[: 100 - len(calls)]])

    with pytest.raises(ValueError, match=r"blocks hold \d+ rows, but held \d+ when"):
        sinkhorn_labels(fewer_each_time)


@pytest.mark.parametrize("calls", [3, 4, 5])
def test_blocks_that_grow_are_refused_before_their_rows_are_kept(calls):
    count = []

    def growing():
        count.append(1)
        yield SCORES[:4500]
        if len(count) > calls:
            yield SCORES[4500:]

    with pytest.raises(ValueError, match="hold 5000 or more rows, but held 4500 when"):
        sinkhorn_labels(growing)


def test_errors_in_blocks_are_those_of_the_matrix():
    bad = SCORES[:20].copy()
    bad[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        sinkhorn_labels(lambda: iter([SCORES[:10], bad]))
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(20,\)"):
        sinkhorn_labels(lambda: iter([SCORES[:10], SCORES[10:20]]), sample_weight=np.ones(7))


# --- features times heads ---------------------------------------------------------------------

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(6000, 20)).astype(np.float32)
WEIGHT = RNG.normal(size=(3, 50, 20)).astype(np.float32)
BIAS = RNG.normal(size=(3, 50)).astype(np.float32)


def test_a_head_solves_like_its_scores():
    result = sinkhorn_labels(FEATURES, head=(WEIGHT[0], BIAS[0]), reg=0.5)
    explicit = sinkhorn_labels(FEATURES @ WEIGHT[0].T + BIAS[0], reg=0.5)
    assert (result.labels == explicit.labels).mean() > 0.9995
    assert result.potential == pytest.approx(explicit.potential, abs=1e-3)
    without_bias = sinkhorn_labels(FEATURES, head=(WEIGHT[0], None), reg=0.5)
    explicit = sinkhorn_labels(FEATURES @ WEIGHT[0].T, reg=0.5)
    assert (without_bias.labels == explicit.labels).mean() > 0.9995


def test_heads_are_solved_together_each_as_if_alone():
    options = {"reg": 0.5, "exact_sizes": True, "return_assignment": True}
    together = sinkhorn_labels(FEATURES, head=(WEIGHT, BIAS), **options)
    assert together.labels.shape == (3, 6000)
    assert together.potential.shape == (3, 50)
    assert together.assignment.shape == (3, 6000, 50)
    assert together.converged.all()
    for t in range(3):
        alone = sinkhorn_labels(FEATURES, head=(WEIGHT[t], BIAS[t]), **options)
        for field, one in zip(together, alone, strict=True):
            assert np.array_equal(field[t], one)


@pytest.mark.parametrize("n", [300, 6000])  # 6,000 rows of 50 clusters are read fused
def test_scores_of_several_heads_are_solved_together_each_as_if_alone(n):
    scores = np.stack([network_scores(n, 50, seed=seed) for seed in range(3)])
    sizes = np.random.default_rng(0).uniform(0.5, 1, size=(3, 50))
    sizes[1, 7] = 0
    options = {"tol": 5e-5, "return_assignment": True}  # which fused reads can tell
    together = sinkhorn_labels(scores, cluster_weights=sizes, **options)
    for t in range(3):
        alone = sinkhorn_labels(scores[t], cluster_weights=sizes[t], **options)
        assert (together.labels[t] == alone.labels).all()
        assert np.abs(together.assignment[t] - alone.assignment).max() < 1e-4
        assert together.n_iter[t] == alone.n_iter
    assert not (together.labels[1] == 7).any()
    again = sinkhorn_labels(
        torch.tensor(scores), cluster_weights=sizes, potential=together.potential, **options
    )
    assert (again.n_iter == 1).all()
    assert isinstance(again.labels, torch.Tensor)


def test_exact_sizes_of_several_heads_are_each_head_s_own():
    scores = np.stack([network_scores(60, 3, seed=seed) for seed in range(2)])
    result = sinkhorn_labels(scores, cluster_weights=[[1, 2, 3], [3, 2, 1]], exact_sizes=True)
    counts = [np.bincount(labels, minlength=3).tolist() for labels in result.labels]
    assert counts == [[10, 20, 30], [30, 20, 10]]


def test_a_head_whose_rows_are_all_alike_is_split_and_others_are_not():
    alike = np.tile(np.log([0.4, 0.3, 0.2, 0.1]), (40, 1))
    labels = sinkhorn_labels(np.stack([alike, 3.0 * np.eye(4)[np.arange(40) % 4]])).labels
    assert np.bincount(labels[0]).max() < 30
    assert (labels[1] == np.arange(40) % 4).all()


def test_scores_of_several_heads_that_cannot_be_written_to_or_run_backwards():
    scores = np.stack([network_scores(90, 5, seed=seed) for seed in range(2)])
    expected = sinkhorn_labels(scores).labels
    assert (sinkhorn_labels(scores[:, ::-1]).labels == expected[:, ::-1]).all()
    scores.setflags(write=False)
    assert (sinkhorn_labels(scores).labels == expected).all()


def test_scores_of_several_heads_in_a_file_are_refused(tmp_path):
    file = np.lib.format.open_memmap(tmp_path / "s.npy", mode="w+", shape=(2, 9, 4))
    with pytest.raises(ValueError, match="must be in memory"):
        sinkhorn_labels(file)


def test_weights_of_other_heads_than_there_are_scores_of():
    with pytest.raises(ValueError, match="of 3 heads, scores of 2"):
        sinkhorn_labels(np.zeros((2, 9, 4)), cluster_weights=np.ones((3, 4)))


def test_all_heads_are_solved_in_one_pass_over_the_features_an_iteration():
    passes = []

    def blocks():
        passes.append(1)
        return iter(np.array_split(FEATURES, 3))

    passes_of = []
    for heads in (slice(0, 1), slice(0, 3)):
        passes.clear()
        result = sinkhorn_labels(blocks, head=(WEIGHT[heads], BIAS[heads]), reg=0.5)
        passes_of.append(len(passes) - result.n_iter.max())
    assert passes_of[0] == passes_of[1]


def test_heads_start_from_potentials_of_their_own():
    cold = sinkhorn_labels(FEATURES, head=(WEIGHT, BIAS), reg=0.5)
    warm = sinkhorn_labels(FEATURES, head=(WEIGHT, BIAS), reg=0.5, potential=cold.potential)
    assert (warm.n_iter == 1).all()
    with pytest.raises(ValueError, match="50 numbers below \\+inf for each of 3 heads"):
        sinkhorn_labels(FEATURES, head=(WEIGHT, BIAS), potential=cold.potential[0])


def test_features_of_a_file_and_of_float16():
    head = (torch.tensor(WEIGHT[0]), torch.tensor(BIAS[0]))
    half = sinkhorn_labels(torch.tensor(FEATURES).half(), head=head, reg=0.5)
    full = sinkhorn_labels(torch.tensor(FEATURES).half().float(), head=head, reg=0.5)
    assert isinstance(half.labels, torch.Tensor)
    assert torch.equal(half.labels, full.labels)


def test_features_with_gradients_and_parameters_are_read_without():
    linear = torch.nn.Linear(20, 50)
    features = torch.tensor(FEATURES, requires_grad=True)
    result = sinkhorn_labels(features, head=(linear.weight, linear.bias), return_assignment=True)
    assert not result.assignment.requires_grad


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ((WEIGHT[0, :, :7], None), r"weight must be \(K, 20\) .* got \(50, 7\)"),
        ((WEIGHT[0], BIAS[0, :7]), r"bias must have shape \(50,\), got \(7,\)"),
        ((WEIGHT[0, 0], None), r"weight must be \(K, 20\) .* got \(20,\)"),
        ((np.full((50, 20), np.nan), None), "must be finite"),
    ],
)
def test_unusable_head_raises_and_is_named(head, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_labels(FEATURES, head=head)


def test_precision_set_by_backend_is_no_obstacle():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one precision for all")
    code = """
import torch
from sklearn_sela import sinkhorn_labels
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
assert sinkhorn_labels(torch.randn(50, 4)).converged
assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_complex_scores_raise(kind):
    with pytest.raises(ValueError, match="real numbers"):
        sinkhorn_labels(kind([[1j, 2], [3, 4]]))


def test_products_are_in_full_precision_and_the_setting_is_restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 products, TF32 on a GPU
    try:
        medium = sinkhorn_labels(FEATURES, head=(WEIGHT[0], BIAS[0]))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    highest = sinkhorn_labels(FEATURES, head=(WEIGHT[0], BIAS[0]))
    assert (medium.potential == highest.potential).all()


def test_results_are_the_same_in_any_of_torchs_modes():
    features = torch.tensor(FEATURES)
    head = (torch.tensor(WEIGHT), torch.tensor(BIAS))
    plain = sinkhorn_labels(features, head=head, reg=0.5)
    assert plain.marginal_error.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = sinkhorn_labels(features, head=head, reg=0.5)
    with torch.inference_mode():
        inference = sinkhorn_labels(features, head=head, reg=0.5)
    torch.set_default_dtype(torch.float64)
    try:
        double = sinkhorn_labels(features, head=head, reg=0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (autocast, inference, double):
        assert torch.equal(other.labels, plain.labels)
        assert torch.equal(other.potential, plain.potential)


# --- what arrays may be ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble, object])
def test_arrays_that_torch_does_not_know_are_converted(plain, dtype):
    assert same(sinkhorn_labels(SCORES.astype(dtype)), plain)


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_arrays_that_are_no_numbers_raise():
    with pytest.raises((ValueError, TypeError)):
        sinkhorn_labels(np.array([["a", "b"], ["c", "d"]]))
