"""The solver over several processes, real ones, beside one that has all rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import WORLDS, by_processes

from sklearn_sela import _sinkhorn, sinkhorn_labels
from sklearn_sela._distributed import Shards

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def scores_of(n, k, sharpness=5.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(n, k, generator=g)).log_softmax(1)


def features_of(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


LARGE = scores_of(3001, 100)  # fused reads, and rows that three processes cannot share evenly
HEADS = (features_of(3 * 8, 6, 1).reshape(3, 8, 6), features_of(3, 8, 2))
PROBLEMS = {
    "large": (LARGE, {"reg": 0.2}),
    "small": (scores_of(200, 7), {}),
    "sharp": (scores_of(400, 12, 40.0), {"tol": 1e-7}),  # ends in Newton's steps
    "sizes": (scores_of(300, 4), {"cluster_weights": [0.4, 0.3, 0.2, 0.1]}),
    "sample_weight": (scores_of(300, 4), {"sample_weight": np.arange(300) % 5}),
    "pull": (scores_of(300, 6), {"reg_m": 0.5}),
    "bounds": (scores_of(300, 6), {"max_share": 0.2}),
    "free": (scores_of(300, 6), {"reg_m": 0.0}),
    "barred": (scores_of(300, 6).where(torch.arange(1800).view(300, 6) % 7 > 0, -np.inf), {}),
    "heads": (features_of(500, 6), {"head": HEADS}),
    "arrays": (scores_of(120, 5).numpy(), {}),
    "fewer rows than processes": (scores_of(2, 2), {}),
    "warm": (LARGE, {"reg": 0.2, "potential": np.linspace(-1, 1, 100)}),
}
ALIKE = torch.zeros(90, 3)  # every row prefers the same cluster
REFUSED = {
    "NaN in one": (scores_of(90, 3).where(torch.arange(90)[:, None] != 80, torch.nan), {}),
    "exact sizes": (scores_of(90, 3), {"exact_sizes": True}),
}


def share(n, rank, world):
    """The rows of a process, of which the last one has fewest."""
    cuts = np.ceil(np.linspace(0, n, world + 1)).astype(int)
    return slice(cuts[rank], cuts[rank + 1])


def solve(scores, parameters, rank, world, group):
    rows = share(len(scores), rank, world)
    parameters = dict(parameters)
    if "sample_weight" in parameters:
        parameters["sample_weight"] = parameters["sample_weight"][rows]
    return sinkhorn_labels(scores[rows], **parameters, group=group)


def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def bytes_sent(n, k):
    """(reads, bytes that this process has given into sums) of a solve of n rows here."""
    made = []

    def noted(group):
        made.append(Shards(group))
        return made[-1]

    kept, _sinkhorn.Shards = _sinkhorn.Shards, noted
    try:
        result = sinkhorn_labels(scores_of(n, k), reg=0.2, group=dist.group.WORLD)
    finally:
        _sinkhorn.Shards = kept
    return result.n_iter, made[0].n_bytes


def work(rank, world, folder):
    """(results, refused, sent) of a process."""
    group = dist.group.WORLD
    results = {name: solve(*problem, rank, world, group) for name, problem in PROBLEMS.items()}
    # All rows but those of the last process, which has none.
    mine = LARGE[share(3001, rank, world - 1)] if rank < world - 1 else LARGE[:0]
    results["none here"] = sinkhorn_labels(mine, reg=0.2, group=group)
    results["alike"] = solve(ALIKE, {}, rank, world, group)
    refused = {
        name: message(lambda p=problem: solve(*p, rank, world, group))
        for name, problem in REFUSED.items()
    }
    refused["other shapes"] = message(lambda: sinkhorn_labels(scores_of(50, 3 + rank), group=group))
    refused["other heads"] = message(
        lambda: sinkhorn_labels(torch.zeros(2 + rank, 50, 3), group=group)
    )
    refused["no matrix in one"] = message(
        lambda: sinkhorn_labels(scores_of(50, 3)[0] if rank == 0 else scores_of(50, 3), group=group)
    )
    sent = {n: bytes_sent(n, 50) for n in (100, 1000, 10_000)}
    return results, refused, sent


@pytest.fixture(scope="module", params=WORLDS)
def processes(request, tmp_path_factory):
    """(results, refused, sent) of each process."""
    return by_processes(work, tmp_path_factory)[request.param]


def labels_of_all(processes, name):
    labels = [np.asarray(results[name].labels) for results, _, _ in processes]
    return np.concatenate(labels, axis=-1)


@pytest.mark.parametrize("name", PROBLEMS)
def test_labels_are_those_of_one_process(processes, name):
    scores, parameters = PROBLEMS[name]
    one = sinkhorn_labels(scores, **parameters)
    labels = labels_of_all(processes, name)
    assert (labels == np.asarray(one.labels)).mean() >= 0.9999
    for results, _, _ in processes:
        own = results[name]
        assert np.asarray(own.converged).all()
        assert np.asarray(one.converged).all()
        np.testing.assert_allclose(own.potential, one.potential, atol=2e-4)


def test_a_process_may_have_no_rows(processes):
    labels = labels_of_all(processes, "none here")
    expected = sinkhorn_labels(LARGE, reg=0.2).labels.numpy()
    assert (labels == expected).mean() >= 0.9999


@pytest.mark.parametrize("name", [*PROBLEMS, "none here", "alike"])
def test_all_processes_have_the_same_potential_to_the_bit(processes, name):
    first, *others = (results[name] for results, _, _ in processes)
    for other in others:
        np.testing.assert_array_equal(np.asarray(other.potential), np.asarray(first.potential))
        np.testing.assert_array_equal(np.asarray(other.n_iter), np.asarray(first.n_iter))


def test_rows_alike_are_split_over_the_clusters(processes):
    sizes = np.bincount(labels_of_all(processes, "alike"), minlength=3)
    assert sizes.min() >= 28


def test_what_one_process_refuses_ends_all(processes):
    refused = [refused for _, refused, _ in processes]
    *others, last = (of_rank["NaN in one"] for of_rank in refused)
    assert "NaN" in last
    assert all("Another process of the group" in other for other in others)
    for of_rank in refused:
        assert "exact_sizes" in of_rank["exact sizes"]
        assert "scores of 3 to" in of_rank["other shapes"]
        assert "scores of 2 to" in of_rank["other heads"]
        assert "heads" in of_rank["other heads"]
    first, *others = (of_rank["no matrix in one"] for of_rank in refused)
    assert "matrix" in first
    assert all("Another process of the group" in other for other in others)


def test_bytes_of_an_iteration_do_not_depend_on_the_rows(processes):
    k, before = 50, None
    for _, _, sent in processes:
        per_read = {n: (n_bytes - 80) / reads for n, (reads, n_bytes) in sent.items()}
        print({n: f"{b:.0f} bytes a read of {n} rows a process" for n, b in per_read.items()})
        for found in per_read.values():
            assert found <= 2 * k * 8 + 64
        before = before or sent
        assert sent == before


def test_one_process_sends_nothing():
    shards = Shards()
    numbers = np.arange(3.0)
    assert shards.sum(numbers) is numbers
    assert shards.n_bytes == 0
