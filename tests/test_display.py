"""Pictures: what they draw."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits, make_blobs
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from sklearn_sela import SelfLabelClusterer
from sklearn_sela.display import (
    ClusterGalleryDisplay,
    ClusterSizesDisplay,
    FeatureMapDisplay,
    TrainingCurveDisplay,
)

DIGITS = load_digits().images[:200]
X, _ = make_blobs(200, centers=4, n_features=6, random_state=0)


def fit(X, n_clusters, **parameters):
    parameters = {"max_epochs": 4, "random_state": 0, **parameters}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return SelfLabelClusterer(n_clusters, **parameters).fit(X)


@pytest.fixture(scope="module")
def digits():
    return fit(DIGITS, 10)


@pytest.fixture(scope="module")
def vectors():
    return fit(X, 4)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def drawn(display):
    """The display's figure, drawn, which finds what drawing alone finds."""
    display.figure_.canvas.draw()
    return display


def tile(display, row, column):
    """The pixels drawn at a place of a gallery, from what it says of its layout."""
    height, width = display.images.shape[1:3]
    pad = max(1, round(max(height, width) / 12))
    gap = width // 2 if column >= display.n_most else 0
    top, left = row * (height + pad), column * (width + pad) + gap
    return np.asarray(display.image_.get_array())[top : top + height, left : left + width]


def as_grey(images):
    return (images - images.min()) / (images.max() - images.min())


# The gallery


def test_a_gallery_shows_the_most_and_the_least_typical_images_of_each_cluster(digits):
    display = drawn(ClusterGalleryDisplay.from_estimator(digits, DIGITS, n_images=4))
    labels, confidence = digits.predict(DIGITS), digits.confidence(DIGITS)
    shown, grey = [], []
    for row, cluster in enumerate(display.clusters):
        members = np.flatnonzero(labels == cluster)
        members = members[np.argsort(-confidence[members], kind="stable")]
        assert display.sizes[row] == len(members)
        places = dict(enumerate(members[:4]))
        least = members[max(4, len(members) - 2) :]
        places |= {6 - len(least) + j: i for j, i in enumerate(least)}
        for column in range(6):
            pixels = tile(display, row, column)
            if column in places:
                grey.append(pixels)
                shown.append(DIGITS[places[column]])
            else:
                assert np.ma.getmaskarray(pixels).all() or np.isnan(pixels).all()
    np.testing.assert_allclose(np.stack(grey), as_grey(np.stack(shown)), atol=1e-6)
    assert [t.get_text() for t in display.ax_.get_xticklabels()] == [
        "most typical",
        "least typical",
    ]
    names = [t.get_text() for t in display.ax_.get_yticklabels()]
    assert names == [
        f"{c}: {n}" for c, n in zip(display.clusters, np.bincount(labels), strict=True)
    ]


def test_a_gallery_of_flat_rows_is_that_of_images(digits):
    flat, whole = (
        ClusterGalleryDisplay.from_estimator(digits, data)
        for data in (DIGITS.reshape(200, -1), DIGITS)
    )
    np.testing.assert_array_equal(flat.images, whole.images)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_colours_are_shown_as_they_are(dtype):
    images = np.zeros((6, 3, 4, 4), dtype)
    images[:3, 0] = images[3:, 2] = 255  # red, blue
    display = ClusterGalleryDisplay.from_predictions(images, [0] * 3 + [1] * 3, np.arange(6))
    drawn(display)
    np.testing.assert_array_equal(tile(display, 0, 0), np.broadcast_to([1, 0, 0, 1], (4, 4, 4)))
    np.testing.assert_array_equal(tile(display, 1, 2), np.broadcast_to([0, 0, 1, 1], (4, 4, 4)))
    assert (tile(display, 0, 3)[..., 3] == 0).all()  # nothing there


def test_clusters_may_be_empty_or_small_or_left_out():
    labels = [0, 0, 2, -1]
    display = ClusterGalleryDisplay.from_predictions(np.eye(4)[:, None], labels, [0.1, 0.9, 1, 1])
    drawn(display)
    assert display.clusters == [0, 1, 2]
    assert display.sizes == [2, 0, 1]
    np.testing.assert_array_equal((display.shown >= 0).sum(1), [2, 0, 1])
    assert display.shown[0, 0] == 1  # the more typical first
    assert display.shown[0, 1] == 0


def test_many_clusters_are_limited_to_the_largest_and_it_says_so():
    labels = np.repeat(np.arange(30), np.arange(1, 31))
    images = np.zeros((len(labels), 2, 2))
    display = drawn(ClusterGalleryDisplay.from_predictions(images, labels, labels))
    assert display.clusters == list(range(5, 30))
    assert display.ax_.get_xlabel() == "25 of 30 clusters"
    chosen = ClusterGalleryDisplay.from_predictions(images, labels, labels, clusters=[3, 1])
    assert chosen.sizes == [4, 2]


def test_halves_that_nobody_fills_are_left_out():
    display = ClusterGalleryDisplay.from_predictions(
        np.zeros((6, 2, 2)), [0] * 4 + [1] * 2, range(6)
    )
    assert display.shown.shape == (2, 10)
    drawn(display)
    assert [t.get_text() for t in display.ax_.get_xticklabels()] == ["most typical"]


@pytest.mark.parametrize(("n_images", "n_clusters"), [(1, 50), (2, 5), (10, 3), (40, 20)])
def test_galleries_are_of_a_size_to_look_at(n_images, n_clusters):
    labels = np.repeat(np.arange(n_clusters), 60)
    images = np.zeros((len(labels), 8, 8))
    display = ClusterGalleryDisplay.from_predictions(
        images, labels, labels, n_images=n_images, clusters=range(n_clusters)
    )
    width, height = display.figure_.get_size_inches()
    assert 3 <= width <= 9
    assert height <= 1 + 0.7 * n_clusters


@pytest.mark.parametrize(
    ("labels", "parameters", "message"),
    [
        ([0, 1, 2], {"clusters": [7]}, r"clusters=\[7\] are unknown; there are 0 to 2"),
        ([0, 1, 2], {"clusters": [-1]}, r"clusters=\[-1\] are unknown"),
        ([0, 1, 2], {"n_images": 0}, "n_images must be 1 or more"),
        ([-1, -1, -1], {}, "no cluster"),
    ],
)
def test_what_cannot_be_shown_is_named(labels, parameters, message):
    with pytest.raises(ValueError, match=message):
        ClusterGalleryDisplay.from_predictions(np.zeros((3, 2, 2)), labels, range(3), **parameters)


def test_files_are_shown(tmp_path):
    for i, image in enumerate(DIGITS[:60]):
        Image.fromarray((16 * image).clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i:02}.png")
    estimator = fit(str(tmp_path), 3, image_shape=(8, 8))
    display = drawn(ClusterGalleryDisplay.from_estimator(estimator, str(tmp_path)))
    assert display.images.shape[1:] == (8, 8, 3)  # files are shown in colour
    assert sum(display.sizes) == 60


def test_a_gallery_of_vectors_names_what_to_do(vectors):
    with pytest.raises(ValueError, match=r"fitted on vectors.*image_shape"):
        ClusterGalleryDisplay.from_estimator(vectors, X)


def test_images_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="got shape"):
        ClusterGalleryDisplay.from_predictions(np.zeros((3, 4)), [0, 0, 1], [1, 2, 3])
    with pytest.raises(ValueError, match="inconsistent"):
        ClusterGalleryDisplay.from_predictions(np.zeros((3, 4, 4)), [0, 0], [1, 2, 3])


# Training


def test_the_loss_is_beside_the_ln_k_of_its_round(digits):
    display = drawn(TrainingCurveDisplay.from_estimator(digits))
    history = digits.history_
    for line, ln_k, (_, part) in zip(
        display.loss_, display.ln_k_, history.groupby("stage", sort=False), strict=True
    ):
        np.testing.assert_array_equal(line.get_xdata(), part.epoch + 1)
        np.testing.assert_array_equal(line.get_ydata(), part.loss)
        (segment,) = ln_k.get_segments()
        np.testing.assert_allclose(segment[:, 1], math.log(part.n_clusters.iloc[0]))
        np.testing.assert_allclose(segment[:, 0], [part.epoch.min() + 0.5, part.epoch.max() + 1.5])
    solved = history[history.solver_iterations > 0]
    assert 0 < len(solved) < len(history)  # the first epoch of a round has no solve
    assert [bar.get_height() for bar in display.changed_] == list(solved.changed)
    low, high = display.ax_.get_ylim()
    assert low == 0
    assert high > max(history.loss.max(), math.log(history.n_clusters.max()))


def test_one_round_of_one_epoch_is_drawn():
    row = {"epoch": 0, "stage": "clusters", "n_clusters": 1, "loss": 0.0, "changed": 0.0}
    row["solver_iterations"] = 0
    display = drawn(TrainingCurveDisplay(pd.DataFrame([row])).plot())
    assert len(display.loss_) == 1


# Sizes


def test_sizes_are_beside_those_asked_for(vectors):
    display = drawn(ClusterSizesDisplay.from_estimator(vectors))
    sizes = np.bincount(vectors.labels_, minlength=4)
    assert [bar.get_height() for bar in display.bars_] == list(sizes)
    asked = display.asked_.get_offsets()
    np.testing.assert_allclose(asked[:, 1], 200 * vectors.cluster_sizes_)
    np.testing.assert_array_equal(asked[:, 0], np.arange(4))


def test_sizes_of_other_data_are_those_predicted(vectors):
    display = ClusterSizesDisplay.from_estimator(vectors, X[:50])
    np.testing.assert_array_equal(display.sizes, np.bincount(vectors.predict(X[:50]), minlength=4))
    np.testing.assert_allclose(display.asked.sum(), 50)


def test_samples_without_a_cluster_are_counted_apart():
    display = drawn(ClusterSizesDisplay.from_predictions([0, -1, 2, 2, -1]))
    assert [bar.get_height() for bar in display.bars_] == [1, 0, 2]
    assert display.asked_ is None
    assert "2 samples without one are left out" in display.ax_.get_xlabel()


def test_fewer_shares_than_clusters_are_refused():
    with pytest.raises(ValueError, match="labels go up to 4, but cluster_sizes holds 2"):
        ClusterSizesDisplay.from_predictions([0, 4], [0.5, 0.5])


# The map


def test_a_map_has_a_dot_for_each_sample_in_the_colour_of_its_cluster(vectors):
    display = drawn(FeatureMapDisplay.from_estimator(vectors, X, reduction="pca"))
    expected = PCA(2, random_state=0).fit_transform(vectors.transform(X))
    np.testing.assert_allclose(display.points_.get_offsets(), expected, rtol=1e-5, atol=1e-5)
    colours = display.points_.get_facecolors()
    labels = vectors.predict(X)
    for a in range(4):
        assert len(np.unique(colours[labels == a], axis=0)) == 1
    assert len(np.unique(colours, axis=0)) == 4
    for cluster, text in display.texts_.items():
        assert text.get_text() == str(cluster)
        own = expected[labels == cluster]
        assert np.abs(own - text.xy).sum(1).min() < 1e-4  # at one of its samples


def test_large_maps_are_sampled_alike_each_time_and_say_so():
    features = np.random.default_rng(0).normal(size=(300, 2))
    labels = np.arange(300) % 12
    labels[0] = -1
    one, two = (
        drawn(
            FeatureMapDisplay.from_predictions(features, labels, max_samples=100, reduction="pca")
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.positions, two.positions)
    assert len(one.labels) == 100
    assert one.ax_.get_xlabel() == "100 of 299 samples"
    assert set(one.texts_) == set(range(12))


class Swap:
    def fit_transform(self, X):
        return X[:, ::-1]


def test_colours_that_clusters_share_are_far_apart():
    positions = np.repeat(np.arange(12.0), 20)[:, None] * [1, 0]
    labels = np.repeat(np.arange(12), 20)
    display = FeatureMapDisplay(positions, labels, 240).plot()
    colours = display.points_.get_facecolors()[::20]
    assert len(np.unique(colours, axis=0)) == 10
    for a in range(12):
        for b in range(a):
            assert (colours[a] != colours[b]).any() or a - b >= 9


def test_large_data_are_drawn_from_before_they_are_read(vectors):
    display = FeatureMapDisplay.from_estimator(vectors, X, reduction="pca", max_samples=50)
    assert len(display.labels) == 50
    assert display.n_samples == 200


@pytest.mark.parametrize("n", [4, 60])
def test_maps_reduce_by_tsne_or_any_transformer(n):
    features = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    labels = np.arange(n) % 2
    display = FeatureMapDisplay.from_predictions(features, labels)
    assert display.positions.shape == (n, 2)
    display = FeatureMapDisplay.from_predictions(features, labels, reduction=Swap())
    np.testing.assert_array_equal(display.positions, features[:, ::-1])
    with pytest.raises(ValueError, match="reduction='mds' is unknown"):
        FeatureMapDisplay.from_predictions(features, labels, reduction="mds")
    with pytest.raises(ValueError, match="two dimensions"):
        FeatureMapDisplay.from_predictions(features, labels, reduction=PCA(1))


def test_a_transformer_is_not_fitted_in_place():
    pca = PCA(2)
    FeatureMapDisplay.from_predictions(np.eye(9), np.arange(9) % 2, reduction=pca)
    assert not hasattr(pca, "components_")


# All


def test_all_draw_into_axes_of_others(digits):
    figure, axes = plt.subplots(2, 2)
    displays = [
        ClusterGalleryDisplay.from_estimator(digits, DIGITS, ax=axes[0, 0]),
        TrainingCurveDisplay.from_estimator(digits, ax=axes[0, 1]),
        ClusterSizesDisplay.from_estimator(digits, ax=axes[1, 0]),
        FeatureMapDisplay.from_estimator(digits, DIGITS, reduction="pca", ax=axes[1, 1]),
    ]
    for display, ax in zip(displays, axes.flat, strict=True):
        assert display.ax_ is ax
        assert display.figure_ is figure
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()


@pytest.mark.parametrize(
    "display",
    [ClusterGalleryDisplay, ClusterSizesDisplay, FeatureMapDisplay, TrainingCurveDisplay],
)
def test_unfitted_estimators_are_not_drawn(display):
    data = () if display is TrainingCurveDisplay else (X,)
    with pytest.raises(NotFittedError):
        display.from_estimator(SelfLabelClusterer(), *data)


def test_matplotlib_is_imported_only_to_draw():
    script = "import sys, sklearn_sela.display; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
