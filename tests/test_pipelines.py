"""Beside scikit-learn's own parts: pipelines, searches, frames, metadata; and others' slots."""

from __future__ import annotations

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import make_blobs
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_sela import SelfLabelClusterer

X, Y = make_blobs(200, centers=4, n_features=6, random_state=0)
NAMES = [f"feature {i}" for i in range(6)]
FRAMES = {"pandas": pd.DataFrame(X, columns=NAMES), "polars": pl.DataFrame(X, schema=NAMES)}
OUT = [f"selflabelclusterer{i}" for i in range(128)]


def clusterer(n_clusters=4, **parameters):
    parameters = {"max_epochs": 4, "random_state": 0, "n_neighbors": 5, **parameters}
    return SelfLabelClusterer(n_clusters, **parameters)


@pytest.fixture(scope="module")
def fitted():
    return clusterer().fit(X)


class Net(BaseEstimator):
    """A user's backbone with parameters of its own, in scikit-learn's manner."""

    def __init__(self, width=16, dropout=0.0):
        self.width = width
        self.dropout = dropout

    def __call__(self):
        return nn.Sequential(nn.LazyLinear(self.width), nn.ReLU(), nn.Dropout(self.dropout))


# Frames


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_are_fitted_by_name(kind, fitted):
    estimator = clusterer().fit(FRAMES[kind])
    np.testing.assert_array_equal(estimator.predict_proba(FRAMES[kind]), fitted.predict_proba(X))
    assert list(estimator.feature_names_in_) == NAMES
    other = FRAMES[kind][NAMES[::-1]]
    with pytest.raises(ValueError, match="feature names"):
        estimator.predict(other)


@pytest.mark.parametrize("kind", FRAMES)
def test_features_come_as_the_frame_asked_for(kind):
    estimator = clusterer().set_output(transform=kind)
    features = estimator.fit_transform(FRAMES[kind])
    assert isinstance(features, type(FRAMES[kind]))
    assert list(features.columns) == OUT == list(estimator.get_feature_names_out())
    again = estimator.transform(FRAMES[kind])
    np.testing.assert_array_equal(np.asarray(features), np.asarray(again))


def test_pandas_features_keep_the_index():
    frame = FRAMES["pandas"].set_index(np.arange(200) * 10)
    features = clusterer(max_epochs=2).set_output(transform="pandas").fit_transform(frame)
    assert (features.index == frame.index).all()


def test_dates_in_a_polars_frame_are_refused():
    frame = FRAMES["polars"].with_columns(when=pl.datetime(2020, 1, 1))
    with pytest.raises(TypeError, match="dates"):
        clusterer().fit(frame)


# Pipelines


@pytest.mark.parametrize(
    "classifier", [LogisticRegression(max_iter=1000), KNeighborsClassifier(5)], ids=str
)
def test_features_feed_a_classifier(classifier):
    model = make_pipeline(StandardScaler(), clusterer(), classifier).fit(X, Y)
    assert model.score(X, Y) > 0.95


def test_column_transformer_learns_some_columns():
    columns = ColumnTransformer(
        [("sela", clusterer(), NAMES[:4]), ("rest", "passthrough", NAMES[4:])]
    )
    made = columns.set_output(transform="pandas").fit_transform(FRAMES["pandas"])
    own = clusterer().fit(FRAMES["pandas"][NAMES[:4]])
    np.testing.assert_array_equal(made.iloc[:, :128], own.transform(FRAMES["pandas"][NAMES[:4]]))
    assert list(made.columns[-2:]) == ["rest__feature 4", "rest__feature 5"]
    assert made.columns[0] == "sela__selflabelclusterer0"


def test_feature_union_puts_features_beside_components():
    union = FeatureUnion([("sela", clusterer()), ("pca", PCA(2))]).fit(X)
    made = union.transform(X)
    assert made.shape == (200, 130)
    np.testing.assert_array_equal(made[:, :128], clusterer().fit(X).transform(X))
    assert list(union.get_feature_names_out()[[0, -1]]) == [
        "sela__selflabelclusterer0",
        "pca__pca1",
    ]


def test_pipelines_cache_the_fit(tmp_path):
    memory = joblib.Memory(tmp_path, verbose=0)

    def fit(classifier):
        steps = [("sela", clusterer()), ("classifier", classifier)]
        return Pipeline(steps, memory=memory).fit(X, Y)

    one, two = fit(LogisticRegression(max_iter=1000)), fit(KNeighborsClassifier())
    assert len([*tmp_path.rglob("output.pkl")]) == 1
    np.testing.assert_array_equal(one[0].labels_, two[0].labels_)
    assert two.score(X, Y) > 0.95


# Model selection


def test_cross_val_predict_gives_the_labels_of_held_out_rows():
    labels = cross_val_predict(clusterer(), X, cv=2)
    half = clusterer().fit(X[100:])
    np.testing.assert_array_equal(labels[:100], half.predict(X[:100]))


def test_cross_validate_scores_with_and_without_classes():
    scores = cross_validate(
        clusterer(),
        X,
        Y,
        cv=2,
        scoring={"ari": "adjusted_rand_score", "own": lambda e, X, y: e.score(X)},
        return_estimator=True,
    )
    assert (scores["test_ari"] > 0.8).all()
    expected = scores["estimator"][0].score(X[:100])
    assert scores["test_own"][0] == pytest.approx(expected)


def test_search_over_the_parameters_of_a_backbone():
    search = GridSearchCV(clusterer(backbone=Net()), {"backbone__width": [4, 24]}, cv=2).fit(X)
    assert len(search.cv_results_["params"]) == 2
    assert search.best_estimator_.transform(X).shape[1] == search.best_params_["backbone__width"]


def test_parameters_of_a_backbone_are_nested():
    estimator = clusterer(backbone=Net())
    copy = clone(estimator).set_params(backbone__width=8, backbone__dropout=0.5)
    assert (estimator.backbone.width, copy.backbone.width) == (16, 8)
    assert copy.get_params()["backbone__dropout"] == 0.5
    assert copy.fit(X).transform(X).shape == (200, 8)


def test_a_clone_fits_the_same(fitted):
    copy = clone(fitted)
    assert not hasattr(copy, "labels_")
    np.testing.assert_array_equal(copy.fit(X).labels_, fitted.labels_)


# Metadata


def routed():
    """Models to fit with metadata routing on, by name, and what to pass them."""
    weighted = LogisticRegression(max_iter=1000).set_fit_request(sample_weight=True)
    return {
        "last": (make_pipeline(StandardScaler(), clusterer()), {}),
        "search": (GridSearchCV(clusterer(), {"n_clusters": [3, 4]}, cv=2), {}),
        "transformer": (make_pipeline(clusterer(), weighted), {"sample_weight": np.ones(200)}),
    }


@pytest.mark.parametrize("name", ["last", "search", "transformer"])
def test_metadata_routing_may_be_on(name):
    with config_context(enable_metadata_routing=True):
        model, metadata = routed()[name]
        labels = model.fit(X, Y, **metadata).predict(X)
    assert adjusted_rand_score(Y, labels) > 0.9


def test_sample_weight_is_refused_by_name():
    # Weighting rows is not repeating them for a network that learns by random batches.
    with pytest.raises(TypeError, match="sample_weight"):
        clusterer().fit(X, sample_weight=np.ones(200))


# Other people's slots for a clusterer


class TopicModel:
    """How BERTopic uses the clusterer it is given, on embeddings that were reduced before."""

    def __init__(self, hdbscan_model):
        self.hdbscan_model = hdbscan_model

    def fit_transform(self, embeddings, y=None):
        try:
            self.hdbscan_model.fit(embeddings, y=y)
        except TypeError:
            self.hdbscan_model.fit(embeddings)
        return [int(topic) for topic in self.hdbscan_model.labels_]

    def transform(self, embeddings):
        return [int(topic) for topic in self.hdbscan_model.predict(embeddings)]


def test_topics_are_clusters(fitted):
    model = TopicModel(clusterer())
    embeddings = X.astype(np.float32)
    topics = model.fit_transform(embeddings)
    assert adjusted_rand_score(Y, topics) > 0.9
    assert model.transform(embeddings) == topics
