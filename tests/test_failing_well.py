"""Bad input, bad parameters, trouble while fitting: a clear word, and no damage."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from torch import nn

from sklearn_sela import SelfLabelClusterer, _data, _features, _labels

IMAGES = load_digits().images[:200]
FLAT = IMAGES.reshape(200, -1)
BLOBS = make_blobs(200, centers=4, n_features=6, random_state=0)[0]


def clusterer(n_clusters=4, **parameters):
    parameters = {"max_epochs": 4, "random_state": 0, "n_neighbors": 5, **parameters}
    return SelfLabelClusterer(n_clusters, **parameters)


@pytest.fixture(scope="module")
def fitted_images():
    return clusterer(10).fit(IMAGES)


@pytest.fixture(scope="module")
def fitted_vectors():
    return clusterer().fit(BLOBS)


# Input


@pytest.mark.parametrize("X", [BLOBS, IMAGES], ids=["vectors", "images"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused_at_fit(X, value):
    X = X.copy()
    X[(3, *[2] * (X.ndim - 1))] = value
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        clusterer().fit(X)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_are_refused_at_predict(fitted_vectors, value):
    X = BLOBS.copy()
    X[3, 2] = value
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        fitted_vectors.predict(X)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_beyond_float32_are_refused_in_words_about_the_data():
    # They pass as finite float64; NearestNeighbors' hint at NaN would puzzle.
    with pytest.raises(ValueError, match=r"float32|too large"):
        clusterer().fit(BLOBS * 1e300)


def test_fewer_samples_than_clusters_names_both_numbers():
    with pytest.raises(ValueError, match=r"n_samples=7\b.*n_clusters=9\b"):
        clusterer(9).fit(BLOBS[:7])


def test_one_sample_is_too_few():
    with pytest.raises(ValueError, match="n_samples=1"):
        clusterer(1).fit(BLOBS[:1])


def test_no_samples_are_too_few():
    with pytest.raises(ValueError, match="0 sample"):
        clusterer().fit(BLOBS[:0])


def test_predict_before_fit_is_refused():
    with pytest.raises(NotFittedError):
        clusterer().predict(BLOBS)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "transform"])
def test_wrong_number_of_features_names_both_numbers(fitted_vectors, method):
    with pytest.raises(ValueError, match=r"X has 5 features.*expecting 6 features"):
        getattr(fitted_vectors, method)(BLOBS[:, :5])


def test_wrong_image_shape_names_both_shapes(fitted_images):
    with pytest.raises(ValueError, match=r"\(1, 8, 7\).*\(1, 8, 8\)"):
        fitted_images.predict(IMAGES[:, :, :7])


def test_image_of_other_shape_but_equal_size_is_refused(fitted_images):
    with pytest.raises(ValueError, match=r"\(1, 4, 16\).*\(1, 8, 8\)"):
        fitted_images.predict(IMAGES.reshape(-1, 4, 16))


def test_wrong_number_of_flat_features_after_images_is_refused(fitted_images):
    with pytest.raises(ValueError, match=r"X has 63 features.*expecting 64 features"):
        fitted_images.predict(FLAT[:, :63])


def test_images_after_fitting_vectors_are_refused(fitted_vectors):
    with pytest.raises(ValueError, match=r"\(1, 2, 3\).*fitted on vectors"):
        fitted_vectors.predict(BLOBS.reshape(-1, 2, 3))


def test_image_shape_that_flat_rows_do_not_fill_names_both_sizes():
    with pytest.raises(ValueError, match=r"image_shape=\(8, 9\) holds 72 values.*64"):
        clusterer(image_shape=(8, 9)).fit(FLAT)


def test_image_shape_that_images_contradict_names_both_shapes():
    with pytest.raises(ValueError, match=r"image_shape=\(4, 16\).*\(1, 8, 8\)"):
        clusterer(image_shape=(4, 16)).fit(IMAGES)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_last_images_get_a_hint(channels):
    with pytest.raises(ValueError, match=r"transpose\(0, 3, 1, 2\)"):
        clusterer().fit(np.repeat(IMAGES[..., None], channels, axis=3))


def test_channels_last_image_shape_of_flat_rows_gets_a_hint():
    with pytest.raises(ValueError, match=r"channels first"):
        clusterer(image_shape=(8, 8, 1)).fit(FLAT)


@pytest.mark.parametrize("width", [1, 3, 4])
def test_narrow_images_are_taken_where_image_shape_says_that_channels_are_first(width):
    X = np.random.default_rng(0).normal(size=(40, 6, 8, width))
    with pytest.raises(ValueError, match=rf"image_shape=\(6, 8, {width}\)"):
        clusterer(2).fit(X)
    estimator = clusterer(2, image_shape=(6, 8, width), max_epochs=1).fit(X)
    assert estimator.predict(X).shape == (40,)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_last_images_get_a_hint_at_predict(channels):
    X = np.repeat(IMAGES[:40, None], channels, axis=1)
    estimator = clusterer(2, max_epochs=1).fit(X)
    with pytest.raises(ValueError, match=r"transpose\(0, 3, 1, 2\)"):
        estimator.predict(X.transpose(0, 2, 3, 1))


TIMES = np.arange(80).reshape(40, 2)


@pytest.mark.parametrize(
    "X",
    [
        TIMES.astype("datetime64[s]"),
        TIMES.astype("timedelta64[s]"),
        TIMES.reshape(40, 2, 1).astype("datetime64[s]"),
        TIMES.astype("datetime64[s]").tolist(),
        pd.DataFrame({"a": TIMES[:, 0], "b": pd.to_datetime(TIMES[:, 1])}),
        pd.DataFrame({"a": pd.to_timedelta(TIMES[:, 0]), "b": pd.to_timedelta(TIMES[:, 1])}),
        pd.DataFrame({"a": pd.to_datetime(TIMES[:, 0], utc=True)}),
    ],
    ids=["dates", "durations", "images", "list", "frame", "frame of durations", "time zone"],
)
def test_dates_and_durations_are_refused_with_advice(X, fitted_vectors):
    for call in (clusterer(2).fit, fitted_vectors.predict):
        with pytest.raises(TypeError, match=r"dates|datetime"):
            call(X)


@pytest.mark.parametrize(
    "image_shape", [64, (64,), (1, 1, 8, 8), (0, 64), (-8, -8), (8.0, 8), "88"]
)
def test_malformed_image_shape_is_refused_by_name(image_shape):
    with pytest.raises((ValueError, TypeError), match="image_shape"):
        clusterer(image_shape=image_shape).fit(FLAT)


def test_torch_loaders_are_refused_with_advice():
    with pytest.raises(TypeError, match="DataLoader"):
        clusterer().fit(torch.utils.data.DataLoader(torch.as_tensor(BLOBS)))


def test_five_dimensions_are_refused():
    with pytest.raises(ValueError, match="5 dimensions"):
        clusterer().fit(np.zeros((9, 1, 2, 2, 2)))


def test_one_dimension_is_refused():
    with pytest.raises(ValueError, match="Expected 2D array"):
        clusterer().fit(BLOBS[:, 0])


@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.coo_array])
def test_sparse_data_are_refused(make):
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        clusterer().fit(make(BLOBS))


def test_text_is_refused():
    with pytest.raises(ValueError, match="strings"):
        clusterer().fit(np.array([["a", "b"]] * 9))


@pytest.mark.parametrize(
    "X", [np.ones((50, 6)), np.full((50, 8, 8), 7.0)], ids=["vectors", "images"]
)
def test_constant_data_fit_with_a_warning(X):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)  # a collapse, too, is warned of
        labels = clusterer().fit(X).labels_
    assert "only 1 distinct rows, fewer than n_clusters=4" in str(caught[0].message)
    assert labels.shape == (50,)


def test_distinct_rows_are_those_of_the_rows_looked_at(monkeypatch):
    monkeypatch.setattr(_data, "REFERENCE_ROWS", 30)
    with pytest.warns(ConvergenceWarning, match="among the 30 rows looked at, only"):
        clusterer().fit(np.repeat(BLOBS[:3], 50, axis=0))


def test_rows_of_fewer_kinds_than_clusters_fit_with_a_warning():
    with pytest.warns(ConvergenceWarning, match=r"only 2 distinct rows.*n_clusters=4"):
        labels = clusterer().fit(np.repeat(BLOBS[:2], 30, axis=0)).labels_
    assert len(np.unique(labels[:30])) == len(np.unique(labels[30:])) == 1


# Parameters


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("backbone", ["auto", "mlp", "convnet", "torch module"]),
        ("init", ["kmeans", "random"]),
        ("augment", ["auto", "None", "callable"]),
        ("lr_schedule", ["one_cycle", "step"]),
        ("cluster_sizes", ["learned", "balanced", "array"]),
        ("device", ["auto", "cpu", "cuda"]),
        ("precision", ["auto", "float32", "bfloat16"]),
        ("on_bad_image", ["error", "skip"]),
    ],
)
def test_unknown_name_is_refused_and_the_known_listed(name, known):
    with pytest.raises(ValueError, match=f"{name}='bogus'") as error:
        clusterer(**{name: "bogus"}).fit(BLOBS)
    for word in known:
        assert word in str(error.value)


BAD = {
    "n_clusters": [0, -1, 2.0, "4", None, True],
    "n_heads": [0, 1.5, None],
    "over_clusters": [-1, 2.5, "many", True],
    "backbone": [3, None],
    "weights": [3, True, "resnet.pt", {}],  # of a backbone that has none
    "freeze": ["no", None, 1],
    "augment": [3, True],
    "n_neighbors": [-1, 2.0, None],
    "neighbor_probability": [-0.1, 1.1, np.nan, "half", None],
    "init": [None, 3, ["kmeans"], np.zeros(7, int), np.zeros(len(BLOBS)), [9] * len(BLOBS)],
    "soft_targets": ["no", None, 3],
    "n_views": [-1, 1.5],
    "label_momentum": [-0.1, 1.5, "a"],
    "n_solves": [-1, 2.5],
    "n_iter_no_change": [0, 1.5, "a"],
    "tol": [-1e-9, np.nan, None],
    "cluster_sizes": [
        None,
        [0.5, 0.5],
        [1, 1, 1, 0],
        [1, 1, 1, -1],
        [1, 1, 1, np.nan],
        [1, 1, 1, np.inf],
        [1e-300, 1e300, 1, 1],
        ["a"] * 4,
        np.ones((4, 1)),
    ],
    "reg": [0, -1, np.nan, np.inf, "0.2", None],
    "max_epochs": [0, -3, 1.5, None],
    "batch_size": [0, 2.5],
    "learning_rate": [0, -1, np.nan, np.inf, None],
    "lr_schedule": [None, 3],
    "weight_decay": [-1e-9, np.nan, np.inf, None],
    "device": [None, 1.5, "meta"],
    "on_bad_image": ["ignore", None],
    "precision": ["float16", None],
    "compile": [1, None, "yes"],
    "distributed": ["all", True, 2],
    "checkpoint_dir": [3, 1.5],
    "random_state": ["seed", -1, 1.5],
    "memory": [3, 1.5],
    "verbose": [-1, "loud"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(n, v, id=f"{n}-{i}") for n, values in BAD.items() for i, v in enumerate(values)],
)
def test_bad_parameter_is_refused_by_name_and_nothing_is_fitted(name, value):
    estimator = clusterer(**{name: value})
    # For a bad seed the message is scikit-learn's or numpy's.
    word = "[Ss]eed" if name == "random_state" else name
    with pytest.raises((ValueError, TypeError), match=word):
        estimator.fit(BLOBS)
    assert not [a for a in vars(estimator) if a.endswith("_")]


def test_every_parameter_has_a_bad_value_tested():
    assert set(SelfLabelClusterer().get_params()) == {*BAD, "image_shape"}


def test_parameters_are_checked_at_fit_not_before():
    SelfLabelClusterer(n_clusters=-1, backbone="bogus", device="bogus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_cuda_without_a_device_is_refused(device):
    with pytest.raises(ValueError, match="no CUDA device"):
        clusterer(device=device).fit(BLOBS)


def test_convnet_on_vectors_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"backbone='convnet' needs images.*image_shape"):
        clusterer(backbone="convnet").fit(BLOBS)


def test_backbone_that_returns_no_module_is_refused():
    with pytest.raises(TypeError, match="backbone returned int, not a torch module"):
        clusterer(backbone=lambda: 3).fit(BLOBS)


class Makes(nn.Module):
    """A backbone that makes what it is told to."""

    def __init__(self, make):
        super().__init__()
        self.make, self.linear = make, nn.Linear(6, 8)

    def forward(self, x):
        return self.make(self.linear(x))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda x: (x, x), "tuple"),
        (lambda x: x.detach().numpy(), "ndarray"),
        (lambda x: x.sum(), r"\(\)"),
        (lambda x: x[:1], r"\(1, 8\).*\(2, 6\)"),
        (lambda x: x.flatten(), r"\(16,\)"),
        (lambda x: x[:, :0], r"\(2, 0\)"),
    ],
)
def test_backbone_that_makes_no_features_is_refused(make, word):
    with pytest.raises((TypeError, ValueError), match=f"backbone must return.*{word}"):
        clusterer(backbone=Makes(make)).fit(BLOBS)


@pytest.mark.parametrize(
    ("augment", "word"),
    [
        (lambda x: (x, x), "tuple"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: None, "NoneType"),
        (lambda x: x.sum(), r"\(\)"),
        (lambda x: x[1:], "rows"),
        (lambda x: torch.cat([x, x]), "rows"),
    ],
)
def test_augment_that_makes_no_views_is_refused(augment, word):
    with pytest.raises((TypeError, ValueError), match=f"augment must return.*{word}"):
        clusterer(augment=augment).fit(BLOBS)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # 3 rows: collapse
def test_batches_too_short_for_batch_norm_are_avoided():
    # 3 rows in batches of 2 leave one row over, on which batch norm cannot train.
    clusterer(2, batch_size=2).fit(BLOBS[:3])


# Trouble while fitting


class Fails(nn.Module):
    """Features that turn to NaN in the at-th training batch."""

    def __init__(self, at):
        super().__init__()
        self.linear, self.at, self.calls = nn.Linear(6, 8), at, 0

    def forward(self, x):
        self.calls += self.training
        return self.linear(x) * (np.nan if self.calls >= self.at else 1.0)


@pytest.mark.parametrize("at", [1, 8, 20], ids=["first batch", "stage one", "stage two"])
def test_non_finite_loss_raises_with_advice(at):
    with pytest.raises(FloatingPointError, match=r"loss became nan.*learning_rate=0\.1"):
        clusterer(backbone=Fails(at)).fit(BLOBS)


def test_divergence_in_the_last_step_raises():
    # One batch, one epoch: the loss is finite, the weights it leaves behind are not.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        with pytest.raises(FloatingPointError, match="learning_rate"):
            clusterer(max_epochs=1, over_clusters=None, learning_rate=1e30).fit(BLOBS[:30])


def test_divergence_seen_by_a_label_solve_raises_with_advice():
    # One batch an epoch: the solve of the second epoch meets the NaN first.
    with pytest.raises(FloatingPointError, match="learning_rate"):
        clusterer(over_clusters=None, learning_rate=1e30).fit(BLOBS[:30])


def state_of(estimator):
    return {name: value for name, value in vars(estimator).items() if name.endswith("_")}


def assert_untouched(estimator, state, proba):
    assert state_of(estimator).keys() == state.keys()
    assert all(vars(estimator)[name] is value for name, value in state.items())
    np.testing.assert_array_equal(estimator.predict_proba(BLOBS), proba)


@pytest.mark.parametrize(
    ("X", "parameters", "error"),
    [
        (BLOBS[::2], {"backbone": Fails(4)}, FloatingPointError),
        (BLOBS * np.nan, {}, ValueError),
        (BLOBS, {"reg": -1}, ValueError),
        (BLOBS[:3], {}, ValueError),
        (IMAGES, {"image_shape": (3, 3)}, ValueError),
        (pd.DataFrame(BLOBS, columns=list("abcdef")), {"backbone": lambda: 3}, TypeError),
    ],
    ids=["loss", "data", "parameter", "few rows", "image_shape", "backbone"],
)
def test_failed_refit_leaves_the_fitted_estimator_as_it_was(X, parameters, error):
    estimator = clusterer(max_epochs=2).fit(BLOBS)
    state, proba = state_of(estimator), estimator.predict_proba(BLOBS)
    estimator.set_params(**parameters)
    with pytest.raises(error):
        estimator.fit(X)
    assert_untouched(estimator, state, proba)


def test_failed_first_fit_leaves_the_estimator_unfitted():
    estimator = clusterer(backbone=Fails(8))
    with pytest.raises(FloatingPointError):
        estimator.fit(BLOBS)
    with pytest.raises(NotFittedError):
        estimator.predict(BLOBS)


# Ctrl-C. 200 rows make 10 batches of 20. With 4 epochs the augmentation is called
#   1-10 and 11-22 in the two epochs of stage one (the second starts with a solve: 2 views),
#   23-32 and 33-44 in those of stage two, and 45-46 to choose the head.


class CtrlC:
    """An augmentation that is interrupted in its at-th call."""

    def __init__(self, at=0):
        self.at, self.calls = at, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return x


def stoppable(at=0):
    return clusterer(augment=CtrlC(at), batch_size=20, n_views=2)


def interrupted(at):
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        return stoppable(at).fit(BLOBS)


def assert_same_weights(one, two):
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_calls_that_the_next_tests_interrupt_are_those_they_mean():
    assert stoppable().fit(BLOBS).augment.calls == 46


def test_an_interrupted_clustering_of_the_features_is_made_up_for(monkeypatch):
    real, calls = _features._k_means, []

    def k_means(points, k, seed, n_init):
        calls.append(n_init)
        if calls.count(10) == 2:  # the second head's, between the stages
            raise KeyboardInterrupt
        return real(points, k, seed, n_init)

    monkeypatch.setattr(_features, "_k_means", k_means)
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        estimator = clusterer().fit(BLOBS)
    assert list(estimator.history_.stage) == ["features"] * 2
    assert len(np.unique(estimator.labels_)) == 4


@pytest.mark.parametrize(
    ("at", "stages"),
    [
        (11, ["features"]),
        (18, ["features"]),
        (23, ["features"] * 2),
        (30, ["features"] * 2),
        (33, ["features"] * 2 + ["clusters"]),
        (44, ["features"] * 2 + ["clusters"]),
    ],
)
def test_interruption_keeps_the_complete_epochs(at, stages):
    estimator = interrupted(at)
    whole = stoppable().fit(BLOBS)
    assert estimator.history_["stage"].tolist() == stages
    assert estimator.n_iter_ == len(stages)
    assert estimator.history_["loss"].tolist() == whole.history_["loss"][: len(stages)].tolist()


@pytest.mark.parametrize(("early", "late"), [(11, 22), (23, 32), (33, 44)])
def test_interruption_discards_the_epoch_under_way(early, late):
    assert_same_weights(interrupted(early).network_, interrupted(late).network_)


@pytest.mark.parametrize("at", [18, 30, 40])
def test_interrupted_estimator_is_complete(at):
    estimator = interrupted(at)
    proba = estimator.predict_proba(BLOBS)
    assert proba.shape == (200, 4)
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(estimator.labels_, estimator.predict(BLOBS))
    assert estimator.self_labels_.shape == (3, 200)
    assert not estimator.network_.training


def test_interruption_warns_of_the_epoch_it_went_back_to():
    with pytest.warns(ConvergenceWarning, match="last complete epoch, 3 of 4"):
        stoppable(40).fit(BLOBS)


def test_interruption_while_the_head_is_chosen_keeps_the_training():
    # All epochs are complete: losing them to the last two passes would be a pity.
    estimator = stoppable(46)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            estimator.fit(BLOBS)
        except KeyboardInterrupt:  # would end the whole test run
            pytest.fail("the finished training is lost")
    assert estimator.n_iter_ == 4


@pytest.mark.parametrize("at", [1, 10])
def test_interruption_before_an_epoch_is_complete_is_passed_on(at):
    estimator = stoppable(at)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(BLOBS)
    assert not state_of(estimator)


def test_interruption_before_an_epoch_is_complete_keeps_the_previous_fit():
    estimator = clusterer(max_epochs=2).fit(BLOBS)
    state, proba = state_of(estimator), estimator.predict_proba(BLOBS)
    estimator.set_params(augment=CtrlC(3))
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(BLOBS[:100])
    assert_untouched(estimator, state, proba)


def test_interruption_restores_the_global_generators():
    before = torch.random.get_rng_state()
    interrupted(18)
    assert torch.equal(torch.random.get_rng_state(), before)


# Results that are no good


class Blind(nn.Module):
    """Features that say nothing of the row."""

    def forward(self, x):
        return torch.ones(len(x), 3)


def test_collapse_to_one_cluster_warns_with_advice():
    with pytest.warns(ConvergenceWarning, match=r"one cluster.*learning_rate.*max_epochs"):
        clusterer(backbone=Blind).fit(BLOBS)


def test_one_cluster_that_was_asked_for_is_no_collapse():
    assert not clusterer(1).fit(BLOBS).labels_.any()


def test_label_solve_that_does_not_converge_warns_with_advice(monkeypatch):
    monkeypatch.setattr(_labels, "_LABEL_ITER", 1)
    shares = [0.91, 0.03, 0.03, 0.03]  # far from the blobs', which are equal
    with pytest.warns(ConvergenceWarning, match=r"marginal error.*Raise reg=0\.2"):
        clusterer(over_clusters=None, cluster_sizes=shares).fit(BLOBS)


def test_warnings_name_the_line_that_called_fit():
    with pytest.warns(ConvergenceWarning) as caught:
        clusterer().fit(np.ones((50, 6)))
    assert {w.filename for w in caught} == {__file__}
