"""Scaling, sampling and neighbours, against brute force."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import ConvergenceWarning

from sklearn_sela import SelfLabelClusterer, _data
from sklearn_sela._data import Geometry, Rows, Scaler, draw_rows, has_colour, square_images
from sklearn_sela._shares import Share

CPU = torch.device("cpu")


def rng(seed=0):
    return np.random.default_rng(seed)


def vectors(n=120, d=6, seed=0):
    return rng(seed).normal(size=(n, d)) * np.arange(1, d + 1) + 3


def geometry(X, image_shape=None, seed=0):
    rows = Rows(X, Scaler(X, image_shape), CPU)
    return Geometry(rows, int(np.prod(X.shape[1:])), rng(seed))


def brute_neighbors(points, reference, k):
    distance = cdist(points, points[reference])
    distance[reference, np.arange(len(reference))] = np.inf
    return reference[np.argsort(distance, axis=1)[:, :k]]


def test_scaler_gives_vectors_mean_zero_and_variance_one():
    x = Scaler(vectors(), None)(vectors(), CPU)
    torch.testing.assert_close(x.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e30, 1e-30, 0.1])
def test_scaler_maps_a_constant_feature_to_zero(value):
    X = vectors()
    X[:, 2] = value
    x = Scaler(X, None)(X, CPU)
    # Relative to the value: rounding of the mean is all that may be left.
    assert x[:, 2].abs().max() <= 1e-6 * max(1.0, abs(value))


def test_scaler_maps_a_new_value_of_a_constant_feature_to_something_finite():
    X = vectors()
    X[:, 2] = 1.0
    new = X.copy()
    new[:, 2] = 2.0
    assert Scaler(X, None)(new, CPU)[:, 2].tolist() == pytest.approx([1.0] * len(X))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15])
def test_scaler_undoes_any_unit_of_measurement(scale):
    one, other = vectors(), vectors() * scale
    torch.testing.assert_close(
        Scaler(other, None)(other, CPU), Scaler(one, None)(one, CPU), atol=1e-4, rtol=1e-4
    )


def test_scaler_keeps_what_float64_resolves_beside_a_large_offset():
    # Seconds since 1970, say: float32 steps by 128 there, so the offset must go first.
    X = vectors() + 1.7e9
    expected = (X - X.mean(0)) / X.std(0)
    np.testing.assert_allclose(Scaler(X, None)(X, CPU).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("offset", [0, 1.7e9])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_scaler_of_parts_is_that_of_the_whole(monkeypatch, rows, offset):
    monkeypatch.setattr(_data, "_CHUNK", 6 * rows)
    X = vectors() + offset
    scaler = Scaler(X, None)
    np.testing.assert_allclose(scaler.shift, X.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scaler.scale, X.std(0), rtol=1e-6)


def test_scaler_sees_a_feature_that_varies_in_few_of_many_rows(tmp_path):
    X = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", np.float32, (12_000, 700))
    X[:2, 0] = 1e6
    expected = X[:, 0].std(dtype=np.float64)
    estimator = SelfLabelClusterer(
        2, over_clusters=None, n_neighbors=0, max_epochs=1, augment=None, init="random"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(X)
    assert estimator._model.scaler.scale[0] == pytest.approx(expected)


def test_scaler_of_a_constant_feature_does_not_add_up_rounding():
    X = np.full((1_000_000, 2), 0.1)
    X[:, 1] = rng().normal(size=len(X))
    scaler = Scaler(X, None)
    assert (scaler.shift[0], scaler.scale[0]) == (0.1, 1.0)


def test_scaler_gives_each_channel_unit_standard_deviation():
    X = rng().normal(size=(50, 3, 8, 8)) * np.array([1, 10, 100])[:, None, None]
    x = Scaler(X, (3, 8, 8))(X, CPU)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_scaler_maps_the_usual_border_value_of_each_channel_to_zero():
    X = np.full((20, 2, 8, 8), 7.0)
    X[:, 1] = -2.0
    X[:, :, 2:6, 2:6] += rng().normal(size=(20, 2, 4, 4))
    x = Scaler(X, (2, 8, 8))(X, CPU)
    assert x[:, :, 0].abs().max() < 1e-6


def test_scaler_of_constant_images_is_finite():
    X = np.full((5, 1, 4, 4), 9.0)
    assert not Scaler(X, (1, 4, 4))(X, CPU).any()


def test_scaler_reads_flat_rows_as_images():
    X = rng().normal(size=(30, 2, 4, 5)).astype(np.float32)
    flat = X.reshape(30, -1)
    scaler = Scaler(flat, (2, 4, 5))
    assert torch.equal(scaler(flat, CPU), Scaler(X, (2, 4, 5))(X, CPU))


@pytest.mark.parametrize("dtype", ["u1", "i2", "f2", "f4", "f8", ">f4", "?"])
def test_scaler_takes_any_number_format(dtype):
    X = rng().integers(0, 2, (40, 5)).astype(dtype)
    expected = Scaler(X.astype(float), None)(X.astype(float), CPU)
    torch.testing.assert_close(Scaler(X, None)(X, CPU), expected)


def test_scaler_never_writes_to_the_data():
    X = vectors().astype(np.float32)
    before = X.copy()
    Scaler(X, None)(X, CPU).zero_()
    np.testing.assert_array_equal(X, before)


def test_rows_are_the_scaled_rows_asked_for():
    X = vectors()
    rows = Rows(X, Scaler(X, None), CPU)
    whole = rows[slice(0, len(X))]
    assert torch.equal(rows[torch.tensor([7, 3, 3])], whole[[7, 3, 3]])
    assert len(rows) == len(X)


def test_draw_rows_takes_all_of_a_small_data_set():
    np.testing.assert_array_equal(draw_rows(Share.of_all(10), 5, rng(), 100), np.arange(10))


def test_draw_rows_are_distinct_sorted_and_limited():
    drawn = draw_rows(Share.of_all(1000), 5, rng(), 100)
    assert len(drawn) == 100
    assert (np.diff(drawn) > 0).all()


def test_draw_rows_takes_fewer_rows_if_they_are_long():
    assert len(draw_rows(Share.of_all(10**6), 1 << 14, rng(), 10**6)) == 256


def test_neighbors_are_those_of_brute_force():
    g = geometry(vectors())
    expected = brute_neighbors(g.points.astype(float), np.arange(120), 7)
    np.testing.assert_array_equal(np.sort(g.neighbors(7)), np.sort(expected))


@pytest.mark.parametrize("d", [6, 80])  # 80: in principal components
def test_neighbors_never_contain_the_row(d):
    found = geometry(vectors(d=d)).neighbors(9)
    assert not (found == np.arange(120)[:, None]).any()


def test_neighbors_among_reference_rows_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr(_data, "REFERENCE_ROWS", 40)
    X = vectors()
    g = geometry(X)
    assert len(g.reference) == len(g.points) == 40
    points = g.flat(np.arange(120)).astype(float)
    expected = brute_neighbors(points, g.reference, 5)
    np.testing.assert_array_equal(np.sort(g.neighbors(5)), np.sort(expected))


def test_neighbors_do_not_depend_on_the_size_of_the_parts(monkeypatch):
    whole = geometry(vectors()).neighbors(5)
    monkeypatch.setattr(_data, "_CHUNK", 50)
    np.testing.assert_array_equal(geometry(vectors()).neighbors(5), whole)


def test_neighbors_are_at_most_all_other_rows():
    found = geometry(vectors(n=4)).neighbors(20)
    assert [sorted(row) for row in found] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_neighbors_of_duplicates_are_duplicates():
    X = np.repeat(vectors(n=5), 12, axis=0)
    found = geometry(X).neighbors(4)
    assert (found // 12 == np.arange(60)[:, None] // 12).all()


def test_principal_components_keep_distances_of_low_rank_data():
    X = vectors(n=150, d=5) @ rng(1).normal(size=(5, 90))
    g = geometry(X)
    scaled = g.flat(np.arange(150))
    assert g.points.shape == (150, 50)
    np.testing.assert_allclose(cdist(g.points, g.points), cdist(scaled, scaled), atol=1e-2)


def test_same_generator_gives_the_same_geometry():
    X = vectors(d=80)
    np.testing.assert_array_equal(geometry(X).points, geometry(X).points)


def test_digits_are_not_mirrored():
    X = load_digits().images
    assert not geometry(X, (1, 8, 8)).mirrors(rng())


def test_images_that_come_in_mirrored_pairs_are_mirrored():
    X = load_digits().images[:200]
    assert geometry(np.concatenate([X, X[..., ::-1]]), (1, 8, 8)).mirrors(rng())


@pytest.mark.parametrize("change", [lambda X: X, lambda X: X / 16, lambda X: X[:40], np.float32])
def test_flat_rows_of_square_images_are_recognised(change):
    assert square_images(change(load_digits().data)) == (1, 8, 8)


def test_shuffled_pixels_are_no_images():
    X = load_digits().data
    assert square_images(X[:, rng().permutation(64)]) is None


TABLES = {
    "noise": lambda r: r.normal(size=(100, 64)),
    "few rows": lambda r: r.normal(size=(3, 64)),
    "blobs": lambda r: make_blobs(300, 64, centers=5, random_state=int(r.integers(1000)))[0],
    "one factor": lambda r: r.normal(size=(100, 1)) @ r.normal(size=(1, 100)),
    "all alike": lambda r: r.normal(size=(100, 1)) + 0.5 * r.normal(size=(100, 64)),
    "walks": lambda r: r.normal(size=(100, 64)).cumsum(1),
    "waves": lambda r: np.sin(
        np.linspace(0, r.uniform(2, 30), 64) * r.uniform(0.5, 1.5, (100, 1))
        + r.normal(size=(100, 1))
    ),
    "constant": lambda r: np.ones((20, 64)),
    "not square": lambda r: load_digits().data[:, :56],
    "small": lambda r: load_digits().images[:, :7, :7].reshape(-1, 49),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_and_signals_are_no_images(name):
    assert [square_images(TABLES[name](rng(seed))) for seed in range(20)] == [None] * 20


@pytest.mark.parametrize("noise", [0, 1])
def test_grey_images_stored_as_colour_are_told_from_photographs(noise):
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 200, (50, 1, 8, 8)), 3, axis=1)
    grey = (grey + rng.integers(0, noise + 1, grey.shape)).astype(np.uint8)  # JPEG's rounding
    colour = rng.integers(0, 200, (50, 3, 8, 8), dtype=np.uint8)
    assert not has_colour(grey, (3, 8, 8))
    assert has_colour(colour, (3, 8, 8))
    assert has_colour(colour.reshape(50, -1), (3, 8, 8))
    assert not has_colour(colour[:, :1], (1, 8, 8))
    assert not has_colour(np.full((5, 3, 8, 8), 7.0), (3, 8, 8))
