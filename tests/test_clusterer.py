"""The estimator: scikit-learn's contract, kinds of input, reproducibility, quality."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import pickle
import random
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from sklearn_sela import SelfLabelClusterer
from sklearn_sela.metrics import clustering_accuracy

IMAGES = load_digits().images[:200]
FLAT = IMAGES.reshape(200, -1)
BLOBS, GROUPS = make_blobs(200, centers=4, n_features=6, random_state=0)
BLOBS = BLOBS.astype(np.float32).astype(np.float64)  # exact in both


def clusterer(n_clusters=4, **parameters):
    parameters = {"max_epochs": 4, "random_state": 0, "n_neighbors": 5, **parameters}
    return SelfLabelClusterer(n_clusters, **parameters)


def small_backbone():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU())


def dropout_backbone():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.Dropout(0.5))


PAPER = {
    "cluster_sizes": "learned",
    "over_clusters": None,
    "init": "random",
    "soft_targets": False,
    "reg": 0.04,
}


@pytest.fixture(scope="module")
def vectors():
    return clusterer().fit(BLOBS)


@pytest.fixture(scope="module")
def images():
    return clusterer(10).fit(IMAGES)


def assert_same_fit(one, two):
    np.testing.assert_array_equal(one.labels_, two.labels_)
    np.testing.assert_array_equal(one.self_labels_, two.self_labels_)
    weights = zip(one.network_.state_dict().items(), two.network_.state_dict().items(), strict=True)
    for (name, a), (other, b) in weights:
        assert name == other
        assert torch.equal(a, b)


# scikit-learn's contract


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(SelfLabelClusterer(), id="defaults"),
        pytest.param(
            SelfLabelClusterer(n_heads=5, cluster_sizes="balanced", max_epochs=6), id="balanced"
        ),
        pytest.param(SelfLabelClusterer(backbone=small_backbone, max_epochs=6), id="backbone"),
        pytest.param(SelfLabelClusterer(max_epochs=6, **PAPER), id="paper"),
        pytest.param(SelfLabelClusterer(n_clusters="auto", max_epochs=6), id="auto"),
    ],
)
def test_scikit_learn_checks_pass(estimator):
    # Not parametrize_with_checks: its ids hold the address of the backbone, on which the
    # workers of pytest-xdist do not agree.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # toy data of a row or a value
        results = check_estimator(estimator, on_fail=None)
    bad = {r["check_name"]: r["exception"] for r in results if r["status"] in ("failed", "xfail")}
    assert not bad
    assert len(results) > 40


def test_results_are_deterministic_by_tag():
    assert not get_tags(SelfLabelClusterer()).non_deterministic


def test_it_is_a_clusterer_by_tag():
    assert get_tags(SelfLabelClusterer()).estimator_type == "clusterer"


def test_clone_takes_over_every_parameter():
    estimator = clusterer(augment=None, cluster_sizes=[1, 2, 3, 4], verbose=2)
    assert clone(estimator).get_params() == estimator.get_params()


def test_fit_returns_the_estimator_and_keeps_its_parameters():
    estimator = clusterer(max_epochs=2)
    before = estimator.get_params()
    assert estimator.fit(BLOBS) is estimator
    assert estimator.get_params() == before


# What fit leaves behind


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_labels_are_those_of_predict(kind, request):
    estimator, X = request.getfixturevalue(kind), {"vectors": BLOBS, "images": IMAGES}[kind]
    np.testing.assert_array_equal(estimator.labels_, estimator.predict(X))


def test_fit_predict_is_labels(vectors):
    np.testing.assert_array_equal(clusterer().fit_predict(BLOBS), vectors.labels_)


def test_fit_transform_is_transform(vectors):
    np.testing.assert_array_equal(clusterer().fit_transform(BLOBS), vectors.transform(BLOBS))


def test_labels_are_integers_below_n_clusters(images):
    for labels in (images.labels_, images.predict(IMAGES[:7])):
        assert labels.dtype == np.int64
        assert set(labels) <= set(range(10))


def test_probabilities_are_float32_rows_that_sum_to_one(images):
    proba = images.predict_proba(IMAGES[:7])
    assert proba.shape == (7, 10)
    assert proba.dtype == np.float32
    assert (proba >= 0).all()
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)


def test_prediction_is_the_likeliest_cluster(images):
    proba = images.predict_proba(IMAGES)
    np.testing.assert_array_equal(images.predict(IMAGES), proba.argmax(1))


def test_transform_gives_float32_features(images):
    features = images.transform(IMAGES[:7])
    assert features.shape == (7, 128)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


def test_transform_flattens_the_output_of_the_backbone():
    def backbone():
        return nn.Conv2d(1, 2, 3)  # (n, 2, 6, 6)

    estimator = clusterer(backbone=backbone, max_epochs=1, over_clusters=None).fit(IMAGES)
    assert estimator.transform(IMAGES).shape == (200, 72)


def test_feature_names_out_number_the_features(images):
    names = images.get_feature_names_out()
    assert names.tolist() == [f"selflabelclusterer{i}" for i in range(128)]


def test_set_output_makes_data_frames():
    estimator = clusterer(max_epochs=1).set_output(transform="pandas").fit(BLOBS)
    frame = estimator.transform(BLOBS)
    assert frame.columns.tolist() == estimator.get_feature_names_out().tolist()


def test_self_labels_are_one_row_a_head():
    labels = clusterer(n_heads=2, max_epochs=2).fit(BLOBS).self_labels_
    assert labels.shape == (2, 200)
    assert np.issubdtype(labels.dtype, np.integer)
    assert set(labels.ravel()) <= set(range(4))


def test_self_labels_of_the_best_head_are_about_the_labels(vectors):
    assert (vectors.self_labels_[vectors.best_head_] == vectors.labels_).mean() > 0.95


def test_history_has_one_row_an_epoch(images):
    history = images.history_
    assert isinstance(history, pd.DataFrame)
    assert set(history) == {
        "stage",
        "epoch",
        "n_clusters",
        "loss",
        "seconds",
        "solver_iterations",
        "marginal_error",
        "changed",
        "smallest",
        "largest",
    }
    assert history["epoch"].tolist() == [0, 1, 2, 3]
    assert history["stage"].tolist() == ["features"] * 2 + ["clusters"] * 2
    assert (history["n_clusters"][2:] == images.n_clusters_).all()
    assert (history["n_clusters"][:2] > images.n_clusters_).all()


def test_history_without_over_clustering_has_one_stage():
    history = clusterer(over_clusters=None).fit(BLOBS).history_
    assert history["stage"].tolist() == ["clusters"] * 4


def test_n_iter_and_loss_are_those_of_the_history(images):
    assert images.n_iter_ == 4
    assert images.loss_ == images.history_["loss"].iloc[-1]


@pytest.mark.parametrize("max_epochs", [1, 2, 3, 5])
def test_no_more_epochs_are_run_than_asked_for(max_epochs):
    assert clusterer(max_epochs=max_epochs).fit(BLOBS).n_iter_ <= max_epochs


def test_n_features_in_counts_all_values_of_an_image(images):
    assert images.n_features_in_ == 64
    assert images.image_shape_ == (1, 8, 8)


def test_feature_names_in_are_the_columns():
    frame = pd.DataFrame(BLOBS, columns=list("abcdef"))
    assert clusterer(max_epochs=1).fit(frame).feature_names_in_.tolist() == list("abcdef")


def test_feature_names_of_an_earlier_fit_do_not_stay():
    estimator = clusterer(max_epochs=1).fit(pd.DataFrame(BLOBS, columns=list("abcdef")))
    assert not hasattr(estimator.fit(IMAGES), "feature_names_in_")


def test_network_is_a_module_in_eval_mode(vectors):
    assert isinstance(vectors.network_, nn.Module)
    assert not any(module.training for module in vectors.network_.modules())


def test_blobs_are_found(vectors):
    assert clustering_accuracy(GROUPS, vectors.labels_) > 0.95


def test_verbose_prints_a_line_an_epoch(capsys):
    clusterer(verbose=1).fit(BLOBS)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[-1].split()[:3] == ["epoch", "4/4", "clusters"]


def test_verbose_may_be_a_bool(capsys):
    clusterer(verbose=True, max_epochs=1).fit(BLOBS)
    assert capsys.readouterr().out.startswith("epoch")
    clusterer(verbose=False, max_epochs=1).fit(BLOBS)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("soft", [True, False])
def test_soft_targets_may_be_a_bool_of_numpy(soft):
    one, two = (
        clusterer(soft_targets=s, over_clusters=None).fit(BLOBS) for s in (soft, np.bool_(soft))
    )
    assert_same_fit(one, two)


def test_silent_by_default(capsys):
    clusterer().fit(BLOBS)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shares", [[0.3, 0.7], [0.7, 0.3], [7, 3]])
def test_cluster_k_gets_the_share_k(shares):
    X, _ = make_blobs([210, 90], n_features=6, centers=None, random_state=0)
    estimator = clusterer(2, cluster_sizes=shares).fit(X)
    expected = np.array(shares) / np.sum(shares)
    np.testing.assert_allclose(estimator.cluster_sizes_, expected)
    for labels in (estimator.labels_, *estimator.self_labels_):
        np.testing.assert_allclose(np.bincount(labels, minlength=2) / 300, expected, atol=0.02)


@pytest.mark.parametrize("unit", [1e308, 1e-300])
def test_shares_may_be_of_any_unit(unit):
    one = clusterer(cluster_sizes=[1, 1, 1, 1], max_epochs=2).fit(BLOBS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_fit(clusterer(cluster_sizes=[unit] * 4, max_epochs=2).fit(BLOBS), one)


def test_given_shares_hold_against_the_data():
    # The data are four equal blobs: a size must be forced, not found.
    estimator = clusterer(2, cluster_sizes=[0.6, 0.4], max_epochs=10).fit(BLOBS)
    share = (estimator.self_labels_ == 0).mean(1)
    np.testing.assert_allclose(share, 0.6, atol=0.05)


# Kinds of input


@pytest.mark.parametrize("n_clusters", [1, 5])
def test_as_many_rows_as_clusters_can_be_fitted(n_clusters):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = clusterer(n_clusters).fit(BLOBS[:5]).labels_
    assert labels.shape == (5,)


def memmap(X, path, mode="r"):
    np.save(path / "X.npy", X)
    return np.load(path / "X.npy", mmap_mode=mode)


VECTOR_CONTAINERS = {
    "float32": lambda X, _: X.astype(np.float32),
    "list": lambda X, _: X.tolist(),
    "frame": lambda X, _: pd.DataFrame(X, columns=list("abcdef")),
    "tensor": lambda X, _: torch.as_tensor(X),
    "tensor with gradient": lambda X, _: torch.tensor(X, requires_grad=True),
    "fortran": lambda X, _: np.asfortranarray(X),
    "strided": lambda X, _: np.repeat(np.repeat(X, 2, 0), 3, 1)[::2, ::3],
    "reversed": lambda X, _: X[::-1].copy()[::-1],
    "big-endian": lambda X, _: X.astype(">f8"),
    "read-only memmap": memmap,
}


@pytest.mark.parametrize("kind", VECTOR_CONTAINERS)
def test_vectors_of_equal_values_give_equal_results(kind, vectors, tmp_path):
    X = VECTOR_CONTAINERS[kind](BLOBS, tmp_path)
    estimator = clusterer().fit(X)
    assert_same_fit(estimator, vectors)
    np.testing.assert_array_equal(estimator.predict(X), vectors.labels_)


IMAGE_CONTAINERS = {
    "with channel": lambda X, _: X[:, None],
    "uint8": lambda X, _: X.astype(np.uint8),
    "float32": lambda X, _: X.astype(np.float32),
    "tensor": lambda X, _: torch.as_tensor(X),
    "bfloat16 tensor": lambda X, _: torch.as_tensor(X).bfloat16(),  # 0 to 16: exact
    "uint8 tensor, channels last": lambda X, _: (
        torch.as_tensor(X[:, None]).byte().to(memory_format=torch.channels_last)
    ),
    "fortran": lambda X, _: np.asfortranarray(X),
    "transposed view": lambda X, _: X.transpose(2, 1, 0).copy().transpose(2, 1, 0),
    "read-only memmap": memmap,
}


@pytest.mark.parametrize("kind", IMAGE_CONTAINERS)
def test_images_of_equal_values_give_equal_results(kind, images, tmp_path):
    X = IMAGE_CONTAINERS[kind](IMAGES, tmp_path)
    estimator = clusterer(10).fit(X)
    assert_same_fit(estimator, images)
    np.testing.assert_array_equal(estimator.predict(X), images.labels_)


@pytest.mark.parametrize("image_shape", [(8, 8), (1, 8, 8), [8, 8], np.array([8, 8])])
def test_flat_rows_with_image_shape_are_images(images, image_shape):
    assert_same_fit(clusterer(10, image_shape=image_shape).fit(FLAT), images)


def test_flat_rows_of_images_are_recognised(images):
    assert_same_fit(clusterer(10).fit(FLAT), images)


@pytest.mark.parametrize("said", [{"backbone": "mlp"}, {"augment": None}])
def test_flat_rows_are_vectors_where_parameters_say_what_to_do_with_them(said):
    assert clusterer(10, max_epochs=1, **said).fit(FLAT).image_shape_ is None


def test_flat_rows_are_taken_after_fitting_images(images):
    np.testing.assert_array_equal(images.predict(FLAT), images.labels_)


def test_images_are_taken_after_fitting_flat_rows():
    estimator = clusterer(10, image_shape=(8, 8), max_epochs=1).fit(FLAT)
    np.testing.assert_array_equal(estimator.predict(IMAGES), estimator.labels_)


def test_nested_lists_of_images_are_images(images):
    assert_same_fit(clusterer(10).fit(IMAGES.tolist()), images)


def test_colour_images_can_be_fitted():
    X = np.random.default_rng(0).integers(0, 100, (80, 3, 12, 10), dtype=np.uint8)
    X[:40, 0, 3:9] += 100  # half of them with a red bar
    estimator = clusterer(2, max_epochs=20).fit(X)  # 4 are too few for batch norm
    assert estimator.image_shape_ == (3, 12, 10)
    np.testing.assert_array_equal(estimator.predict(X), estimator.labels_)


@pytest.mark.parametrize("X", [BLOBS, IMAGES], ids=["vectors", "images"])
def test_read_only_data_give_no_warning(X):
    X = X.astype(np.float32)  # needs no copy on its way to torch
    X.setflags(write=False)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns once a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clusterer(max_epochs=1).fit(X).predict(X)
    finally:
        torch.set_warn_always(always)


def test_data_are_not_changed():
    X = BLOBS.astype(np.float32)

    def in_place(x):
        return x.mul_(-1)

    clusterer(augment=in_place, max_epochs=2).fit(X)
    np.testing.assert_array_equal(X, BLOBS.astype(np.float32))


def test_backbone_class_is_called():
    class Backbone(nn.Linear):
        def __init__(self):
            super().__init__(6, 5)

    assert clusterer(backbone=Backbone, max_epochs=1).fit(BLOBS).transform(BLOBS).shape[1] == 5


@pytest.mark.parametrize("parameters", [PAPER, {"lr_schedule": "step"}, {"n_solves": 1}])
def test_other_parameters_fit(parameters):
    estimator = clusterer(**{**parameters, "max_epochs": 10}).fit(BLOBS)
    assert len(np.unique(estimator.labels_)) > 1


NUMBERS = {
    "n_clusters": 4,
    "n_heads": 2,
    "over_clusters": 10,
    "n_neighbors": 5,
    "neighbor_probability": 0.5,
    "n_views": 1,
    "label_momentum": 0.5,
    "n_solves": 2,
    "reg": 0.25,
    "max_epochs": 4,
    "n_iter_no_change": 3,
    "tol": 0.125,
    "batch_size": 64,
    "learning_rate": 0.0625,
    "weight_decay": 0.0,
    "random_state": 0,
    "verbose": 0,
}


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_may_be_those_of_numpy(kind, tmp_path):
    own = {k: np.int64(v) if isinstance(v, int) else kind(v) for k, v in NUMBERS.items()}
    plain, numpys = SelfLabelClusterer(**NUMBERS), SelfLabelClusterer(**own)
    assert_same_fit(plain.fit(BLOBS), numpys.set_params(checkpoint_dir=tmp_path).fit(BLOBS))
    assert_same_fit(plain, clone(numpys).fit(BLOBS))  # resumed


class Peak:
    """Highest private memory of the process while in the block, over that at its start.

    Pages of a mapped file do not count: the system can drop them.
    """

    def now(self):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return 1024 * int(line.split()[1])
        raise AssertionError

    def watch(self):
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, self.now())

    def __enter__(self):
        self.start = self.peak = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.rise = self.peak - self.start


class Tiny(nn.Module):
    """16 pixels of an image: features that cost nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        step = x.shape[-1] // 4
        return self.linear(x[:, 0, ::step, ::step].flatten(1))


def on_disk(path, side, n):
    """n uint8 images, side x side, in a file."""
    X = np.lib.format.open_memmap(path / f"{side}.npy", "w+", np.uint8, (n, side, side))
    block = np.random.default_rng(0).integers(0, 255, (100, side, side), dtype=np.uint8)
    for start in range(0, n, 100):
        X[start : start + 100] = block[: n - start]
    del X
    return np.load(path / f"{side}.npy", mmap_mode="r")


@pytest.fixture(
    scope="module", params=[(64, 100_000), (512, 400)], ids=["many images", "large images"]
)
def large(request, tmp_path_factory):
    return on_disk(tmp_path_factory.mktemp("large"), *request.param)


def large_clusterer(images):
    # The rows seen are the point: no neighbours, no augmentation, one head, one epoch.
    return clusterer(
        3,
        backbone=Tiny,
        augment=None,
        n_neighbors=0,
        n_views=1,
        n_heads=1,
        over_clusters=None,
        init="random",
        max_epochs=1,
        batch_size=32 if images.shape[-1] > 64 else 1024,
    )


def memory_rise(path, method):
    images = np.load(path, mmap_mode="r")
    estimator = large_clusterer(images).fit(images[:20])  # what the first fit loads and caches
    with Peak() as memory:
        getattr(estimator, method)(images)
    return memory.rise


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ("fit", 250e6),  # 200 MB, mostly the rows that scaling is learned from, whatever the data
        ("predict", 100e6),
    ],
)
def test_working_from_disk_takes_little_memory(large, method, limit):
    # In a process of its own: what other tests left to the allocator would count or hide.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(memory_rise, large.filename, method).result() < limit


def memory_rise_of_many_rows(n_clusters):
    X = np.random.default_rng(0).normal(size=(1_000_000, 64)).astype(np.float32)
    estimator = clusterer(n_clusters, backbone=nn.Linear(64, 16), over_clusters=None, max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(X[:1000]).predict(X[:1000])
    with Peak() as memory:
        labels = estimator.predict(X)
    return memory.rise - labels.nbytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_predicting_a_million_rows_takes_little_memory():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rise = pool.submit(memory_rise_of_many_rows, 100).result()
    print(f"{rise / 1e6:.0f} MB over the input and the output")
    assert rise < 200e6


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n", [12, 20, 60])
@pytest.mark.parametrize("centers", [[[0, 0], [20, 0]], [[0, 0], [20, 0], [0, 20]]], ids=len)
def test_blobs_of_few_rows_are_found(centers, n, seed):
    k = len(centers)
    X, y = make_blobs([n // k] * k, centers=centers, random_state=seed)
    assert clustering_accuracy(y, SelfLabelClusterer(k, random_state=0).fit_predict(X)) == 1


def test_wide_frames_fit_without_a_warning_whatever_the_output_set():
    X = np.random.default_rng(0).normal(size=(100, 60))
    plain = clusterer(max_epochs=2).fit(X)
    with config_context(transform_output="pandas"), warnings.catch_warnings():
        warnings.simplefilter("error")
        framed = clusterer(max_epochs=2).fit(pd.DataFrame(X).add_prefix("x"))
    assert_same_fit(framed, plain)


# Modes of torch


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_modes_of_torch_change_no_bit(kind, mode, request):
    estimator = request.getfixturevalue(kind)
    X, k = {"vectors": (BLOBS, 4), "images": (IMAGES, 10)}[kind]
    expected = estimator.predict_proba(X)
    with MODES[mode]():
        dtype = torch.get_default_dtype()
        again = clusterer(k).fit(X)
        found = again.predict_proba(X), again.transform(X)
        assert torch.get_default_dtype() == dtype
    assert_same_fit(again, estimator)
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(found[1], estimator.transform(X))


class Double(nn.Linear):
    """A backbone whose features are of its own precision."""

    def forward(self, x):
        return super().forward(x).double()


@pytest.mark.parametrize(
    "backbone", [nn.Linear(6, 8).double(), nn.Linear(6, 8).half(), Double(6, 8)]
)
def test_backbones_of_other_precision_are_fitted_in_float32(backbone):
    estimator = clusterer(backbone=backbone).fit(BLOBS)
    assert {p.dtype for p in estimator.network_.parameters()} == {torch.float32}
    assert estimator.transform(BLOBS).dtype == np.float32


def test_views_of_other_precision_are_converted(vectors):
    plain = clusterer(augment=lambda x: x).fit(BLOBS)
    assert_same_fit(clusterer(augment=lambda x: x.double()).fit(BLOBS), plain)


# Reproducibility


@pytest.mark.parametrize(
    "parameters",
    [{}, {"backbone": dropout_backbone}, PAPER, {"over_clusters": 12, "n_heads": 4}],
    ids=["defaults", "dropout", "paper", "over-clustering"],
)
@pytest.mark.parametrize("X", [BLOBS, IMAGES], ids=["vectors", "images"])
def test_same_seed_gives_the_same_bits(X, parameters):
    one, two = (clusterer(**parameters).fit(X) for _ in range(2))
    assert_same_fit(one, two)
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    assert one.history_["loss"].tolist() == two.history_["loss"].tolist()


def test_refitting_gives_the_same_bits(vectors):
    estimator = clusterer().fit(IMAGES)
    assert_same_fit(estimator.fit(BLOBS), vectors)


def test_other_seeds_give_other_weights():
    one, two = (clusterer(random_state=s, max_epochs=1).fit(BLOBS) for s in (0, 1))
    assert not np.array_equal(one.predict_proba(BLOBS), two.predict_proba(BLOBS))


def test_no_seed_gives_other_weights_each_time():
    one, two = (clusterer(random_state=None, max_epochs=1).fit(BLOBS) for _ in range(2))
    assert not np.array_equal(one.predict_proba(BLOBS), two.predict_proba(BLOBS))


def test_random_state_instance_is_drawn_from():
    state = np.random.RandomState(5)
    one, two = (clusterer(random_state=state, max_epochs=1).fit(BLOBS) for _ in range(2))
    again = clusterer(random_state=np.random.RandomState(5), max_epochs=1).fit(BLOBS)
    assert_same_fit(one, again)
    assert not np.array_equal(one.predict_proba(BLOBS), two.predict_proba(BLOBS))


@pytest.mark.parametrize("X", [BLOBS, IMAGES], ids=["vectors", "images"])
def test_global_generators_do_not_decide(X):
    torch.manual_seed(1)
    one = clusterer(backbone=dropout_backbone).fit(X)
    torch.manual_seed(2)
    assert_same_fit(one, clusterer(backbone=dropout_backbone).fit(X))


@pytest.mark.parametrize("X", [BLOBS, IMAGES], ids=["vectors", "images"])
def test_global_generators_are_left_alone(X):
    def states():
        return torch.random.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = states()
    estimator = clusterer(backbone=dropout_backbone, max_epochs=2).fit(X)
    estimator.predict(X)
    assert states() == before


@pytest.mark.parametrize("X", [BLOBS, IMAGES.repeat(4, 1).repeat(4, 2)], ids=["small", "large"])
def test_number_of_threads_is_as_before_after_a_fit(X):
    before = torch.get_num_threads()
    within = []

    def augment(x):
        within.append(torch.get_num_threads())
        return x

    clusterer(augment=augment, max_epochs=1).fit(X)
    assert torch.get_num_threads() == before
    assert set(within) == {1 if X is BLOBS else before}


def test_a_fit_on_the_cpu_leaves_the_generators_of_gpus_alone(monkeypatch):
    # torch.manual_seed seeds all devices, and fork_rng restores only those it is given.
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    clusterer(device="cpu", max_epochs=1).fit(BLOBS)
    assert not seeded


def test_backbone_module_is_not_modified():
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1))
    before = copy.deepcopy(module.state_dict())
    estimator = clusterer(backbone=module).fit(BLOBS)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert module.training
    assert estimator.network_.backbone is not module


def test_backbone_module_gives_the_weights_to_start_from():
    module = nn.Linear(6, 16)
    estimator = clusterer(backbone=module, max_epochs=1, learning_rate=1e-12).fit(BLOBS)
    torch.testing.assert_close(estimator.network_.backbone.weight, module.weight)


@pytest.mark.parametrize("method", ["predict_proba", "transform"])
@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_a_row_gets_the_same_bits_in_any_company(kind, method, request):
    estimator, X = request.getfixturevalue(kind), {"vectors": BLOBS, "images": IMAGES}[kind]
    X = np.concatenate([X, X[:150] + 1])  # more than one batch of inference
    infer = getattr(estimator, method)
    whole = infer(X)
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_array_equal(infer(X[order]), whole[order])
    np.testing.assert_array_equal(infer(X[:1]), whole[:1])
    np.testing.assert_array_equal(np.concatenate([infer(X[:33]), infer(X[33:])]), whole)


def test_predicting_does_not_change_the_estimator():
    estimator = clusterer(max_epochs=2).fit(IMAGES)
    before = copy.deepcopy(estimator.network_.state_dict())
    estimator.network_.train()  # say, to go on training it
    estimator.predict(IMAGES)
    assert estimator.network_.training
    for name, value in estimator.network_.state_dict().items():
        assert torch.equal(value, before[name])


# With the rest of scikit-learn


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_pickled_estimator_predicts_the_same(kind, request):
    estimator, X = request.getfixturevalue(kind), {"vectors": BLOBS, "images": IMAGES}[kind]
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(again.predict_proba(X), estimator.predict_proba(X))


def test_dumped_estimator_predicts_the_same(vectors, tmp_path):
    joblib.dump(vectors, tmp_path / "fitted")
    again = joblib.load(tmp_path / "fitted")
    np.testing.assert_array_equal(again.predict_proba(BLOBS), vectors.predict_proba(BLOBS))


def test_pipeline_ends_in_the_clusterer():
    pipeline = make_pipeline(StandardScaler(), clusterer())
    labels = pipeline.fit_predict(BLOBS)
    np.testing.assert_array_equal(pipeline.predict(BLOBS), labels)
    assert clustering_accuracy(GROUPS, labels) > 0.95


def test_pipeline_classifies_by_the_features():
    pipeline = make_pipeline(clusterer(), LogisticRegression())
    assert pipeline.fit(BLOBS, GROUPS).score(BLOBS, GROUPS) > 0.95


def test_grid_search_over_the_number_of_clusters():
    search = GridSearchCV(
        SelfLabelClusterer(max_epochs=4), {"n_clusters": [2, 4]}, cv=2, error_score="raise"
    )
    search.fit(BLOBS)
    assert search.best_params_["n_clusters"] in (2, 4)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.predict(BLOBS).shape == (200,)


def test_grid_search_over_images():
    search = GridSearchCV(
        clusterer(5, max_epochs=1), {"n_clusters": [2, 3]}, cv=2, error_score="raise"
    )
    assert search.fit(IMAGES).predict(IMAGES).shape == (200,)


def test_fits_in_two_threads_do_not_mix_their_draws(vectors):
    found = [None, None]

    def fit(i):
        found[i] = clusterer().fit(BLOBS)

    threads = [threading.Thread(target=fit, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for estimator in found:
        assert_same_fit(estimator, vectors)


@pytest.mark.slow
def test_digits_are_clustered_at_defaults():
    X, y = load_digits(return_X_y=True)
    X = X.reshape(-1, 8, 8)
    found = []
    for seed in range(2):
        start = time.perf_counter()
        labels = SelfLabelClusterer(10, random_state=seed).fit_predict(X)
        found.append(clustering_accuracy(y, labels))
        print(f"seed {seed}: ACC {found[-1]:.4f}, {time.perf_counter() - start:.1f} s")
    assert min(found) >= 0.94
