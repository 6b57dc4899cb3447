"""The fused reads against the plain ones: sums, labels, and when not to use them."""

import importlib
import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from scipy.special import softmax

from problems import network_scores
from sklearn_sela import _kernels, sinkhorn_labels
from sklearn_sela._kernels import Ask, Reader
from sklearn_sela._scores import Scores

REG = 0.04


def shares(scores, v, reg=REG, weights=None, power=1):
    q = softmax((np.asarray(scores, dtype=np.float64) + v) / reg, axis=1)
    return np.average(q**power, axis=0, weights=weights)


def potential(k, spread=0.3, seed=0):
    return spread * np.random.default_rng(seed).normal(size=k)


def read_shares(reader, v, reg=REG):
    return reader.sums([Ask(0, v, reg)])[0].m


@pytest.fixture
def fused():
    return pytest.importorskip("sklearn_sela._kernels_numba")


@pytest.fixture
def without_fused(monkeypatch):
    for name in ("numba", "triton"):
        monkeypatch.setitem(sys.modules, f"sklearn_sela._kernels_{name}", None)


@pytest.mark.parametrize(
    ("n", "k"), [(262144, 1), (131073, 2), (20001, 17), (4099, 64), (513, 513), (263, 1000)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_fused_column_sums_are_those_of_the_softmax(fused, n, k, dtype, weighted):
    scores = network_scores(n, k).astype(dtype)
    weights = np.random.default_rng(1).uniform(0, 2, n) if weighted else None
    reader = Reader(Scores(scores), weights, REG, 1e-3)
    assert isinstance(reader._fused, fused.FusedReads)
    v = potential(k)
    assert np.abs(read_shares(reader, v) - shares(scores, v, weights=weights)).sum() < 2e-6
    squares = reader.sums([Ask(0, v, REG)])[0].squares
    assert np.abs(squares - shares(scores, v, weights=weights, power=2)).sum() < 2e-6


def test_shares_of_a_large_problem_are_read_like_the_whole(fused):
    half = Scores(np.zeros((_kernels._FUSED_FROM // 20 + 1, 10), dtype=np.float32))
    assert _kernels._fused_reads(half, 1) is None
    assert isinstance(_kernels._fused_reads(half, 2), fused.FusedReads)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gram", [False, True])
def test_plain_sums_and_squares_are_those_of_the_softmax(scale, weighted, gram):
    scores = scale * np.random.default_rng(0).normal(size=(700, 9))
    weights = np.random.default_rng(1).uniform(0, 2, 700) if weighted else None
    v = potential(9, scale)
    sums = Reader(Scores(scores), weights, REG, 1e-3).sums([Ask(0, v, REG, gram)])[0]
    assert np.allclose(sums.m, shares(scores, v, weights=weights), atol=1e-12)
    assert np.allclose(sums.squares, shares(scores, v, weights=weights, power=2), atol=1e-12)
    if gram:
        assert np.allclose(sums.squares, np.diag(sums.gram), atol=1e-12)


def test_fused_sums_stay_right_however_far_the_potential_moves(fused):
    scores = network_scores(3000, 100)
    reader = Reader(Scores(scores), None, REG, 1e-3)
    for spread in (0.0, 0.1, 30.0, 0.5, 300.0):  # exponents of up to 10,000
        v = potential(100, spread)
        assert np.abs(read_shares(reader, v) - shares(scores, v)).sum() < 2e-5
    v = potential(100)
    for reg in (0.04, 4.0, 0.01):
        assert np.abs(read_shares(reader, v, reg) - shares(scores, v, reg)).sum() < 2e-5


def test_fused_reads_know_clusters_that_get_nothing(fused):
    scores = network_scores(3000, 100)
    v = potential(100)
    v[[0, 7]] = -np.inf
    found = read_shares(Reader(Scores(scores), None, REG, 1e-3), v)
    assert np.abs(found - shares(scores, v)).sum() < 2e-6
    assert found[[0, 7]].max() < 1e-15


@pytest.mark.parametrize("height", [4, 8, 100])
def test_a_cluster_that_gets_nothing_may_dominate_the_scores(fused, height):
    scores = network_scores(8192, 40) + height * np.eye(40, dtype=np.float32)[0]
    bounds = np.append(0, np.full(39, 0.05))
    for max_iter in (1, 1000):
        result = sinkhorn_labels(
            scores, max_share=bounds, potential=np.zeros(40), max_iter=max_iter, warn=False
        )
        m = shares(scores[:, 1:], np.asarray(result.potential)[1:])
        v = np.asarray(result.potential)[1:]
        error = np.abs(m - np.where(v < 0, bounds[1:], np.minimum(m, bounds[1:]))).sum()
        assert result.marginal_error == pytest.approx(error, abs=1e-5)


def test_fused_reads_take_columns_and_strides_of_a_larger_array(fused):
    wide = network_scores(3000, 220)
    for scores in (wide[:, ::2], wide[::-1][::-1][:, :110], np.asfortranarray(wide)):
        plain = np.ascontiguousarray(scores)
        assert (sinkhorn_labels(scores).labels == sinkhorn_labels(plain).labels).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_single_entry_that_is_not_finite_is_found_in_a_large_matrix(fused, bad):
    scores = network_scores(3000, 100)
    scores[2999, 99] = bad
    with pytest.raises(ValueError, match="NaN or \\+inf"):
        sinkhorn_labels(scores)


def test_minus_infinity_in_a_large_matrix_is_a_label_of_last_resort(fused):
    scores = network_scores(3000, 100)
    scores[5, :50] = -np.inf
    result = sinkhorn_labels(scores)
    assert result.converged
    assert result.labels[5] >= 50


@pytest.mark.parametrize("options", [{}, {"reg_m": 0.3}, {"max_share": 0.012}])
def test_fused_and_plain_reads_give_the_same_labels(fused, options, request):
    scores = network_scores(6000, 100)
    with_fused = sinkhorn_labels(scores, tol=1e-5, return_assignment=True, **options)
    request.getfixturevalue("without_fused")
    plain = sinkhorn_labels(scores, tol=1e-5, return_assignment=True, **options)
    ranked = np.sort(plain.assignment, axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > 1e-3
    assert (with_fused.labels == plain.labels)[clear].all()
    assert np.abs(with_fused.assignment - plain.assignment).max() < 2e-3
    assert abs(with_fused.n_iter - plain.n_iter) <= 2


@pytest.mark.parametrize("max_iter", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("scale", "options"),
    [
        (1, {}),
        (0.1, {"tol": 1e-4}),
        (6, {"tol": 1e-3}),  # through levels of reg
        (20, {"tol": 1e-2}),  # with steps that overshoot
        (1, {"reg": 1, "cluster_weights": np.arange(1, 101)}),
        (2, {"sample_weight": np.arange(3000) % 7}),
        (3, {"potential": np.linspace(-1, 1, 100), "tol": 1e-3}),
    ],
)
def test_reads_that_follow_by_themselves_are_those_that_would_be_asked_for(
    fused, scale, options, max_iter, monkeypatch
):
    scores = scale * network_scores(3000, 100)
    by_themselves = sinkhorn_labels(scores, max_iter=max_iter, warn=False, **options)
    column_sums, asked = fused.FusedReads.column_sums, []

    def one_at_a_time(self, ask, *rest):
        asked.append(ask)
        return column_sums(self, ask._replace(ahead=None), *rest)

    monkeypatch.setattr(fused.FusedReads, "column_sums", one_at_a_time)
    each = sinkhorn_labels(scores, max_iter=max_iter, warn=False, **options)
    assert by_themselves.n_iter == each.n_iter == len(asked) <= max_iter
    assert by_themselves.converged == each.converged
    assert by_themselves.marginal_error == pytest.approx(each.marginal_error, rel=1e-2, abs=1e-6)
    assert by_themselves.potential == pytest.approx(each.potential, rel=1e-4, abs=1e-5)
    assert (by_themselves.labels == each.labels).mean() > 0.999


def test_fused_reads_that_cannot_be_loaded_are_done_without(fused, monkeypatch):
    def no_cache(name):
        raise RuntimeError("cannot cache function: no locator available")

    scores = network_scores(3000, 100)
    expected = sinkhorn_labels(scores, tol=1e-5)
    monkeypatch.setattr("sklearn_sela._kernels.importlib.import_module", no_cache)
    assert (sinkhorn_labels(scores, tol=1e-5).labels == expected.labels).mean() > 0.999


def test_scores_too_sharp_for_float32_are_read_in_float64(fused):
    scores = 1e6 * network_scores(3000, 100)
    reader = Reader(Scores(scores), None, REG, 1e-3)
    assert reader._fused is None
    assert reader.dtype == torch.float64


def test_reads_of_labels_and_of_sums_may_follow_in_any_order(fused):
    scores, v = network_scores(6000, 100), potential(100)
    reader = Reader(Scores(scores), None, REG, 1e-3)
    expected = (scores + v).argmax(1)
    for _ in range(3):
        (found,) = reader.largest([Ask(0, v, REG)])
        assert (np.asarray(found.labels) == expected).mean() > 0.9999
        assert (found.least, found.most) == (found.labels.min(), found.labels.max())
        assert np.abs(read_shares(reader, v) - shares(scores, v)).sum() < 2e-6
        assert np.abs(read_shares(reader, -v) - shares(scores, -v)).sum() < 2e-6


@pytest.mark.parametrize(("scale", "tol"), [(20, 1e-4), (3, 1e-7)])
def test_what_float32_cannot_tell_is_left_to_fewer_exact_reads(fused, scale, tol, monkeypatch):
    exact, plain_read = [], Reader._plain_read

    def counted(self, *args):
        exact.append(self.dtype)
        return plain_read(self, *args)

    monkeypatch.setattr(Reader, "_plain_read", counted)
    problems = [scale * network_scores(3000, 100, seed=seed) for seed in range(4)]
    for scores in problems:
        result = sinkhorn_labels(scores, tol=tol)
        assert result.converged
        m = shares(scores, result.potential)
        assert np.abs(m - 0.01).sum() == pytest.approx(result.marginal_error, abs=1e-9)
    n_exact = len(exact)
    assert set(exact) == {torch.float64}
    monkeypatch.setattr(_kernels, "_FUSED_FROM", math.inf)
    only_exact = sum(sinkhorn_labels(scores, tol=tol).n_iter for scores in problems)
    assert 0 < n_exact < only_exact


def test_reads_are_counted_over_fast_and_exact_ones(fused):
    scores = 20 * network_scores(3000, 100)
    whole = sinkhorn_labels(scores).n_iter
    for max_iter in (1, 2, whole - 1):
        result = sinkhorn_labels(scores, max_iter=max_iter, warn=False)
        assert result.n_iter <= max_iter
        error = np.abs(shares(scores, result.potential) - 0.01).sum()
        assert result.marginal_error == pytest.approx(error, abs=1e-9)
    assert sinkhorn_labels(scores, max_iter=whole).converged


@pytest.mark.parametrize("flushed", [False, True])
def test_fused_reads_take_tiny_numbers_for_zero_and_leave_the_caller_his_way(threads, flushed):
    tiny = np.array([1e-39], np.float32)
    torch.set_flush_denormal(flushed)
    try:
        assert not threads._flushed(lambda: (tiny * np.float32(1)).any())
        with pytest.raises(ZeroDivisionError):
            threads._flushed(lambda: 1 // 0)
        sinkhorn_labels(network_scores(2000, 150), reg=0.01)  # with squares below 1e-38
        assert (tiny * np.float32(1)).any() != flushed
    finally:
        torch.set_flush_denormal(False)


def test_ties_in_a_large_matrix_are_split_in_proportion(fused):
    scores = np.zeros((50_000, 8), dtype=np.float32)
    scores[30_000:, 4:] = -1e3  # 20,000 rows that only the first four clusters suit
    counts = np.bincount(sinkhorn_labels(scores).labels, minlength=8)
    # The others give each cluster 6,250 by shares of 1/24 and 5/24, of which the largest win.
    assert np.abs(counts - np.repeat([5000, 7500], 4)).max() <= 2


def test_results_do_not_depend_on_the_number_of_threads(fused):
    scores = network_scores(6000, 100)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sinkhorn_labels(scores))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert (other.labels == results[0].labels).all()
        assert (other.potential == results[0].potential).all()


def test_results_do_not_depend_on_when_threads_leave(fused, monkeypatch):
    scores = network_scores(6000, 100)
    expected = sinkhorn_labels(scores)
    monkeypatch.setattr(fused, "STAY", 1)  # others are called for before each read
    for _ in range(5):
        result = sinkhorn_labels(scores)
        assert (result.potential == expected.potential).all()
        assert (result.labels == expected.labels).all()


@pytest.fixture
def threads():
    pytest.importorskip("numba")
    return importlib.import_module("sklearn_sela._threads")


@pytest.mark.parametrize("fails", [False, True])
def test_a_read_ends_when_the_last_thread_has(threads, fails):
    started, finished = threading.Event(), []

    def one_block_each(counts, looks):
        assert threads.take(counts, 2, looks) >= 0
        if threading.current_thread() is not threading.main_thread():
            started.set()
            time.sleep(0.2)  # longer than one looks out for it
            if fails:
                raise ZeroDivisionError
            finished.append(True)
        else:
            assert started.wait(60)
        threads.finish(counts)
        return threads.all_done(counts, 2, looks)

    reads = threads.Threads(one_block_each, 2, 2, 1)
    if fails:
        with pytest.raises(ZeroDivisionError):
            reads.read()
    else:
        reads.read()
        assert finished


def test_threads_stay_for_the_next_read_and_leave_at_the_end(threads):
    seen, left, both = [], threading.Event(), threading.Barrier(2, timeout=60)

    def kernel(asked, counts, looks):
        while threads.take(counts, 2, looks) >= 0:
            seen.append((asked[0], threading.current_thread().name))
            both.wait()  # a block each
            threads.finish(counts)
        if looks:
            left.set()
        return threads.all_done(counts, 2, looks)

    asked = np.zeros(1)
    reads = threads.Threads(kernel, 2, 2, 1 << 62, asked)
    for asked[0] in range(5):
        reads.read()
    assert sorted(number for number, _ in seen) == sorted([*range(5), *range(5)])
    assert len({name for _, name in seen}) == 2
    assert len(reads._others) == 1  # sent once, for all of them
    assert not left.is_set()
    assert not threads.some_left(reads._counts)
    reads.close()
    assert left.wait(60)


def test_reads_ask_for_others_when_those_before_have_left(threads):
    names, both = [], threading.Barrier(2, timeout=60)

    def kernel(counts, looks):
        while threads.take(counts, 2, looks) >= 0:
            names.append(threading.current_thread().name)
            both.wait()  # a block each
            threads.finish(counts)
        return threads.all_done(counts, 2, looks)

    reads = threads.Threads(kernel, 2, 2, 1)
    for n_left in range(1, 4):
        reads.read()
        while reads._counts[threads._LEFT] < n_left:
            time.sleep(0.01)
        assert threads.some_left(reads._counts)
    assert len(names) == 6
    assert names.count(threading.current_thread().name) == 3


def test_a_thread_that_is_late_gets_no_block_of_a_closed_read(threads, monkeypatch):
    counts = np.zeros(threads._COUNTS, np.int64)

    def closed_after_it_looked(counts, which, number):
        free = counts[which]
        counts[threads._NEXT] = -threads._READ
        return free

    def added(counts, which, number):
        counts[which] += number
        return counts[which] - number

    monkeypatch.setattr(threads, "_get", closed_after_it_looked)
    monkeypatch.setattr(threads, "_add", added)
    assert threads.take.py_func(counts, 5, 1) == -1
    assert counts[threads._LEFT] == 1


@pytest.mark.parametrize("n", [260, 1000])
def test_where_fused_reads_make_no_way_exact_ones_do(fused, n):
    scores = 20 * network_scores(n, 1100)  # of fewer rows than clusters, and sharp
    assert sinkhorn_labels(scores, max_share=0.0012).converged


def test_loose_tolerances_keep_fused_reads(fused):
    scores = 300 * network_scores(6000, 100)
    assert Reader(Scores(scores), None, REG, 0.05)._fused is not None
    assert Reader(Scores(scores), None, REG, 1e-4)._fused is None


def test_sums_are_right_however_soon_the_next_are_asked_for(fused):
    scores = network_scores(20_000, 50)
    potentials = [potential(50, seed=seed) for seed in range(20)]
    before = torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            reader = Reader(Scores(scores), None, REG, 1e-3)
            sums.append([read_shares(reader, potentials[i % 20]) for i in range(500)])
    finally:
        torch.set_num_threads(before)
    assert (np.array(sums[0]) == np.array(sums[1])).all()


def test_solving_takes_no_copy_of_the_scores(fused):
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("peak memory is read from /proc")
    code = """
import torch
from pathlib import Path
from sklearn_sela import sinkhorn_labels

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

torch.manual_seed(0)
sinkhorn_labels(torch.randn(6000, 64))  # compiled
scores = torch.randn(400_000, 100)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
assert sinkhorn_labels(scores).converged
print((resident("VmHWM") - before) / scores.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


TRITON = """
import math, torch
import numpy as np
from sklearn_sela import _kernels, _kernels_triton
from sklearn_sela._kernels import Ask, Reader
from sklearn_sela._scores import Scores

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for n, k in [(1, 1), (5, 3), (900, 10), (70, 128), (9, 3000)]:
        scores, v = (3 * torch.randn(n, k)).to(dtype), torch.randn(k)
        q = ((scores.double() + v) / 0.04).softmax(1)
        for weight in (None, torch.rand(n)):
            scale = math.log2(math.e) / 0.04
            sums = _kernels_triton.column_sums(scores, scale, scale * v, weight)
            w = 1 if weight is None else weight[:, None].double()
            for found, expected in zip(sums, ((w * q).sum(0), (w * q**2).sum(0)), strict=True):
                assert (found - expected).abs().max() <= 1e-5 * (w * q).sum(), (dtype, n, k)
wide = torch.randn(20, 64)
assert torch.allclose(
    _kernels_triton.column_sums(wide.T, 1.0, torch.zeros(20), None),
    _kernels_triton.column_sums(wide.T.contiguous(), 1.0, torch.zeros(20), None),
)
_kernels._fused_reads = lambda scores, n_processes: _kernels_triton.FusedReads(scores, 0.0)
scores = torch.randn(300, 6)
reader = Reader(Scores(scores), None, 0.04, 1e-3)
sums = reader.sums([Ask(0, np.zeros(6), 0.04)])[0]
q = (scores.double() / 0.04).softmax(1)
assert torch.allclose(torch.from_numpy(sums.m), q.mean(0), atol=1e-6)
assert torch.allclose(torch.from_numpy(sums.squares), (q**2).mean(0), atol=1e-6)
print("agree")
"""


def test_the_gpu_kernel_agrees_with_the_softmax():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        env={**os.environ, "TRITON_INTERPRET": "1"},  # runs it without a GPU
        capture_output=True,
        text=True,
        check=False,
    )
    assert "agree" in done.stdout, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_and_cpu_give_the_same_labels(dtype):
    scores = torch.from_numpy(network_scores(20_000, 100)).to(dtype)
    cpu, gpu = sinkhorn_labels(scores.float()), sinkhorn_labels(scores.cuda())
    assert gpu.converged
    assert (gpu.labels.cpu() == cpu.labels).double().mean() > 0.995
    assert torch.allclose(gpu.potential.cpu(), cpu.potential, atol=5e-3)


@pytest.mark.parametrize("n", [50, 5000])
def test_exponents_of_some_rows_make_the_solution_of_all_at_them(n):
    scores = network_scores(n, 80)
    reader = Reader(Scores(torch.from_numpy(scores)), None, 0.2, 1e-3)
    ask = Ask(0, np.linspace(-1, 1, 80), 0.2)
    chosen = torch.arange(n) % 7 == 3
    rows, z = (torch.cat(parts) for parts in zip(*reader.exponents_of(ask, chosen), strict=True))
    whole = torch.cat([part for _, part in reader.solution(ask)])
    assert rows.tolist() == torch.nonzero(chosen).flatten().tolist()
    torch.testing.assert_close(z.softmax(1), whole[rows])
    assert not list(reader.exponents_of(ask, torch.zeros(n, dtype=torch.bool)))
