"""The number of clusters: its score, the comparison, searches, and what fits share."""

from __future__ import annotations

import os

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, RandomizedSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_sela import SelfLabelClusterer, _recipe, _selection, metrics
from sklearn_sela._heads import meaning, view_agreement
from sklearn_sela._selection import (
    Candidate,
    combined_score,
    head_agreement,
    silhouettes,
    unit_distances,
)
from sklearn_sela.metrics import clustering_accuracy

X, y = make_blobs(
    [120, 80, 60, 40], n_features=6, centers=None, center_box=(-12, 12), random_state=3
)
FACTORS = ["silhouette", "view_agreement", "head_agreement"]


def clusterer(n_clusters=4, **parameters):
    return SelfLabelClusterer(n_clusters, **{"max_epochs": 12, "random_state": 0, **parameters})


@pytest.fixture(scope="module")
def chosen():
    return clusterer("auto").fit(X)


def test_auto_finds_the_number(chosen):
    assert chosen.n_clusters_ == 4
    assert clustering_accuracy(y, chosen.labels_) > 0.98


def test_auto_says_how_sure_it_is(chosen):
    table = chosen.n_clusters_scores_
    assert list(table) == ["n_clusters", "score", *FACTORS, "support"]
    assert list(table.n_clusters) == list(range(2, 26))
    assert table.n_clusters[table.score.idxmax()] == 4
    assert table.support.sum() == pytest.approx(1)
    assert table.support[2] > 0.9
    expected = combined_score(*(table[name] for name in FACTORS))
    np.testing.assert_allclose(table.score, expected)


def test_what_auto_fits_is_what_the_number_alone_fits(chosen):
    alone = clusterer(4).fit(X)
    assert alone.n_clusters_scores_ is None
    np.testing.assert_array_equal(alone.predict_proba(X), chosen.predict_proba(X))
    pd.testing.assert_frame_equal(
        alone.history_.drop(columns="seconds"), chosen.history_.drop(columns="seconds")
    )


@pytest.mark.parametrize("numbers", [range(3, 6), [5, 3, 4, 4], np.array([3, 4, 5]), (4, 5, 3)])
def test_numbers_to_choose_from(numbers):
    fitted = clusterer(numbers).fit(X)
    assert fitted.n_clusters_ == 4
    assert list(fitted.n_clusters_scores_.n_clusters) == [3, 4, 5]
    assert clone(fitted).n_clusters is not None


def test_one_number_in_a_list_is_that_number():
    assert clusterer([3]).fit(X).n_clusters_ == 3


def test_few_samples_leave_auto_no_choice():
    assert clusterer("auto", max_epochs=2).fit(X[:20]).n_clusters_ == 2
    with pytest.raises(ValueError, match="n_samples=1"):
        clusterer("auto").fit(X[:1])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_clusters": "many"}, "n_clusters='many'"),
        ({"n_clusters": []}, "holds no number"),
        ({"n_clusters": [0, 2]}, "n_clusters must be >= 1"),
        ({"n_clusters": range(2, 400)}, "n_samples=300 is too few for n_clusters=399"),
        ({"n_clusters": [60, 70]}, "too few to choose"),
        ({"n_clusters": [6, 7], "over_clusters": 5}, "over_clusters=5"),
        ({"n_clusters": "auto", "over_clusters": None}, "over_clusters=None"),
        ({"n_clusters": [2, 3], "cluster_sizes": [0.5, 0.5]}, "one n_clusters"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        clusterer(**parameters).fit(X)


@pytest.mark.parametrize("numbers", [iter([2, 3]), {2: 3}, b"23", [2, "3"], None])
def test_what_holds_no_numbers_is_refused(numbers):
    with pytest.raises(TypeError, match="n_clusters must be an integer"):
        clusterer(numbers).fit(X)


@pytest.mark.parametrize("number", [10**400, range(2, 10**7)])
def test_numbers_beyond_all_samples_are_refused(number):
    with pytest.raises(ValueError, match="n_clusters"):
        clusterer(number).fit(X)


def test_one_number_needs_no_choice():
    fitted = clusterer([2], over_clusters=None, cluster_sizes=[0.7, 0.3], max_epochs=1)
    assert fitted.fit(X).n_clusters_ == 2


def test_numbers_that_are_not_integers_are_refused():
    with pytest.raises(TypeError, match=r"n_clusters must be an integer, got 2\.5"):
        clusterer([2, 2.5]).fit(X)


def test_verbose_prints_each_number(capsys):
    clusterer([3, 4], verbose=1, max_epochs=2).fit(X)
    assert "n_clusters   3  score" in capsys.readouterr().out


# The score


def test_score_is_highest_for_the_true_number():
    scores = {k: clusterer(k).fit(X).score(X) for k in (2, 3, 4, 5, 7)}
    assert max(scores, key=scores.get) == 4


def test_score_is_a_float_always_the_same_that_ignores_y(chosen):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    scores = [chosen.score(X), chosen.score(X, y), chosen.score(X, np.zeros(len(X)))]
    assert type(scores[0]) is float
    assert len(set(scores)) == 1
    assert 0 < scores[0] <= 1
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


def test_score_is_the_product_of_its_criteria(chosen):
    found = chosen.criteria(X)
    assert chosen.score(X) == combined_score(*(found[name] for name in FACTORS))
    proba = chosen.predict_proba(X)
    assert found["information"] == pytest.approx(metrics.information_score(proba), abs=1e-6)
    own = silhouettes(unit_distances(chosen.transform(X)), chosen.labels_).mean()
    assert found["silhouette"] == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40])
def test_few_rows_have_a_score(chosen, rows):
    assert np.isfinite(chosen.score(X[:rows]))


def test_rows_of_one_cluster_score_0(chosen):
    assert chosen.score(X[chosen.labels_ == 1]) == 0


def test_one_cluster_scores_0():
    assert clusterer(1, max_epochs=2).fit(X).score(X) == 0


def test_more_rows_than_are_looked_at(chosen):
    many = np.random.default_rng(0).permutation(np.repeat(X, 20, axis=0))
    assert chosen.score(many) == pytest.approx(chosen.score(X), abs=0.1)


def test_one_head_agrees_with_itself():
    assert clusterer(n_heads=1).fit(X).criteria(X)["head_agreement"] == 1


@pytest.mark.parametrize("name", ["silhouette", "view_agreement", "head_agreement", "information"])
def test_each_criterion_is_a_scorer(chosen, name):
    scorer = getattr(metrics, f"{name}_scorer")
    assert scorer(chosen, X, y) == chosen.criteria(X)[name]
    pipeline = make_pipeline(StandardScaler(), clusterer()).fit(X)
    scaled = StandardScaler().fit_transform(X)
    assert scorer(pipeline, X) == pipeline[-1].criteria(scaled)[name]
    assert scorer(make_pipeline(chosen), X) == chosen.criteria(X)[name]


def test_silhouettes_of_one_cluster_or_single_rows_are_0():
    points = np.random.default_rng(0).normal(size=(5, 3))
    for labels in (np.zeros(5, int), np.arange(5)):
        np.testing.assert_array_equal(silhouettes(unit_distances(points), labels), 0)


def test_head_agreement_is_adjusted_for_chance():
    rng = np.random.default_rng(0)
    one = rng.integers(4, size=2000)
    assert head_agreement(np.stack([one, 3 - one]), 0) == pytest.approx(1)
    assert abs(head_agreement(rng.integers(20, size=(3, 2000)), 2)) < 0.01


def test_head_agreement_is_that_of_the_head_that_predicts():
    one, two = np.repeat([0, 1], 50), np.tile([0, 1], 50)
    labels = np.stack([one, two, one])
    assert head_agreement(labels, 0) == pytest.approx(0.5, abs=0.02)
    assert head_agreement(labels, 1) == pytest.approx(0, abs=0.02)


def test_data_without_clusters_are_told():
    noise = np.random.default_rng(0).normal(size=(300, 10))
    with pytest.warns(ConvergenceWarning, match="No number of clusters stands out"):
        clusterer("auto").fit(noise)


def test_score_is_of_the_fit_whatever_is_set_later(chosen):
    before = chosen.score(X)
    later = clone(chosen, safe=False)
    later.__dict__.update(chosen.__dict__)
    later.set_params(n_neighbors=3, augment=None, neighbor_probability=0.1, batch_size=7)
    assert later.score(X) == before


def test_rows_far_outside_those_of_fit_are_refused(chosen):
    with pytest.raises(ValueError, match="values too large"):
        chosen.score(X * 1e38)


def test_scorers_follow_a_search_and_refuse_others(chosen):
    search = GridSearchCV(clusterer(max_epochs=2), {"n_clusters": [3, 4]}, cv=2).fit(X)
    assert 0 <= metrics.silhouette_scorer(search, X) <= 1
    with pytest.raises(TypeError, match="not StandardScaler"):
        metrics.silhouette_scorer(StandardScaler().fit(X), X)


def test_overlap_earns_nothing():
    assert combined_score(-0.05, 1.0, 1.0) == combined_score(-0.05, 0.1, 0.1) == 0


def test_agreement_worse_than_chance_earns_nothing():
    assert combined_score(0.5, -0.3, 1.0) == 0
    assert combined_score(0.5, 1.0, -0.1) == 0
    assert combined_score(0.5, 0.5, 1.0) == 0.125


def test_weighted_view_agreement_is_kappa_of_the_joint_distribution():
    rng = np.random.default_rng(0)
    own, one, two = rng.dirichlet(np.ones(3), size=(3, 2, 60))
    features = rng.normal(size=(60, 4))
    distances = unit_distances(features)
    candidate = Candidate(3, np.arange(60), features, distances, own, one, two, best=1)
    equal = np.full(60, 1 / 60)
    joint = torch.from_numpy(one[1].T @ two[1] / 60)
    assert candidate.view_agreement(equal)[1] == pytest.approx(float(view_agreement(joint)))
    twice = np.repeat([2 / 60, 0], 30)  # a resample: the first half, twice
    joint = torch.from_numpy(one[1, :30].T @ two[1, :30] / 30)
    assert candidate.view_agreement(twice)[1] == pytest.approx(float(view_agreement(joint)))


# Interruption


class Stopping:
    """An augmentation that raises KeyboardInterrupt, as Ctrl-C does, at some calls."""

    def __init__(self, *at):
        self.at, self.calls = at, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls in self.at:
            raise KeyboardInterrupt
        return x


def interrupted_while_comparing(monkeypatch, *at):
    train, calls = _selection.self_label, []

    def training(*args):
        calls.append(1)
        if len(calls) in at:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(_selection, "self_label", training)
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        fitted = clusterer(range(3, 9)).fit(X)
    return fitted, len(calls)


def test_an_interrupted_comparison_stops_with_what_it_has(monkeypatch):
    fitted, calls = interrupted_while_comparing(monkeypatch, 4)
    assert calls == 4
    assert list(fitted.n_clusters_scores_.n_clusters) == [3, 4, 5]
    assert fitted.n_clusters_scores_.support.sum() == pytest.approx(1)
    assert fitted.n_clusters_ == 4
    assert set(fitted.history_.stage) == {"features"}


def test_a_comparison_interrupted_at_once_leaves_the_first_number(monkeypatch):
    fitted, calls = interrupted_while_comparing(monkeypatch, 1)
    assert calls == 1
    assert fitted.n_clusters_scores_ is None
    assert fitted.n_clusters_ == 3


def test_nothing_is_compared_after_an_interrupted_first_round():
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        fitted = clusterer("auto", augment=Stopping(20)).fit(X)
    assert fitted.n_clusters_scores_ is None
    assert fitted.predict(X).max() <= 1


# Searches


def test_grid_search_finds_the_number():
    search = GridSearchCV(clusterer(), {"n_clusters": range(2, 7)}, cv=2).fit(X)
    assert search.best_params_ == {"n_clusters": 4}
    assert search.predict(X).max() == 3


class Threads(nn.Module):
    """An identity that leaves a file with the threads it is computed with, by process."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def forward(self, x):
        (self.folder / str(os.getpid())).write_text(str(torch.get_num_threads()))
        return x


def test_grid_search_in_a_pipeline_by_two_processes(tmp_path):
    model = make_pipeline(StandardScaler(), clusterer(backbone=Threads(tmp_path), max_epochs=2))
    grid = {"selflabelclusterer__n_clusters": [3, 4]}
    with joblib.parallel_config("loky"):
        search = GridSearchCV(model, grid, cv=2, n_jobs=2, refit=False).fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    threads = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert threads
    assert str(os.getpid()) not in [file.name for file in tmp_path.iterdir()]
    assert max(threads) <= max(1, os.cpu_count() // 2)


def test_searches_elsewhere_give_the_results_of_serial_ones():
    distributed = pytest.importorskip("distributed", reason="dask is not here")

    def scores(n_jobs):
        grid = {"n_clusters": [3, 4], "n_heads": [2, 3]}
        search = GridSearchCV(clusterer(max_epochs=2), grid, cv=2, n_jobs=n_jobs, refit=False)
        results = search.fit(X).cv_results_
        return {name: value for name, value in results.items() if "time" not in name}

    serial = scores(None)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, worker_dashboard_address=None
    )
    with joblib.parallel_config("loky"):
        found = {"loky": scores(2)}
    with cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        found["dask"] = scores(-1)
    for where, results in found.items():
        assert results.keys() == serial.keys()
        for name, values in serial.items():
            np.testing.assert_array_equal(results[name], values, f"{name} by {where}")


@pytest.mark.parametrize("kind", [HalvingGridSearchCV, RandomizedSearchCV])
def test_other_searches(kind):
    options = {"n_iter": 3} if kind is RandomizedSearchCV else {"min_resources": 100}
    search = kind(clusterer(), {"n_clusters": [2, 4, 7]}, cv=2, random_state=0, **options).fit(X)
    assert search.best_params_ == {"n_clusters": 4}


def test_scorers_in_a_search():
    scoring = {"information": metrics.information_scorer, "heads": metrics.head_agreement_scorer}
    search = GridSearchCV(clusterer(max_epochs=2), {"n_clusters": [3, 4]}, cv=2, scoring=scoring,
                          refit="heads").fit(X)  # fmt: skip
    assert np.isfinite(search.cv_results_["mean_test_information"]).all()


# What fits share


@pytest.fixture
def rounds(monkeypatch):
    """Counts the rounds that are trained."""
    counted, train = [], _recipe.self_label
    monkeypatch.setattr(_recipe, "self_label", lambda *a: counted.append(1) or train(*a))
    return counted


def test_first_round_is_remembered_and_changes_nothing(tmp_path, rounds):
    without = [clusterer(k).fit(X) for k in (3, 4)]
    assert len(rounds) == 4
    within = [clusterer(k, memory=str(tmp_path)).fit(X) for k in (3, 4)]
    assert len(rounds) == 7
    for one, two in zip(without, within, strict=True):
        np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
        assert list(one.history_.loss) == list(two.history_.loss)
    clusterer([3, 4], memory=joblib.Memory(str(tmp_path), verbose=0)).fit(X)
    assert len(rounds) == 8


def test_numbers_are_compared_alike_whether_or_not_it_is_remembered(tmp_path):
    memory = str(tmp_path)
    tables = [
        clusterer([3, 4, 5], memory=m).fit(X).n_clusters_scores_ for m in (None, memory, memory)
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"random_state": 1},
        {"max_epochs": 10},
        {"over_clusters": 20},
        {"augment": None},
        {"reg": 0.3},
        {"n_clusters": 30},
    ],
)
def test_another_first_round_is_not_taken_for_it(tmp_path, rounds, changed):
    clusterer(memory=str(tmp_path)).fit(X)
    clusterer(**{"memory": str(tmp_path), **changed}).fit(X)
    assert len(rounds) == 4


def test_nor_are_other_data(tmp_path, rounds):
    for data in (X, X, X + 1, X.astype(np.float32)):
        clusterer(memory=str(tmp_path), max_epochs=2).fit(data)
    assert len(rounds) == 7


@pytest.mark.parametrize("own", [{"backbone": nn.Linear(6, 5)}, {"augment": lambda x: x}])
def test_what_cannot_be_compared_is_not_remembered(tmp_path, rounds, own):
    for _ in range(2):
        with pytest.warns(UserWarning, match="memory is not used"):
            clusterer(memory=str(tmp_path), max_epochs=2, **own).fit(X)
    assert len(rounds) == 4


def test_training_data_are_not_kept(tmp_path):
    secret = X.copy()
    secret[0, 0] = 12.345678
    clusterer(memory=str(tmp_path), max_epochs=2).fit(secret)
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert not any(b"12.345678" in k or secret[0].tobytes() in k for k in kept)


def test_memory_may_map_its_files(tmp_path):
    memory = joblib.Memory(str(tmp_path), mmap_mode="r", verbose=0)
    one, two = (clusterer(memory=memory).fit(X) for _ in range(2))
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))


def test_an_interrupted_first_round_is_not_remembered(tmp_path, monkeypatch, rounds):
    train = _recipe.self_label

    def interrupted(network, views, labels, schedule, *rest):
        for epoch in train(network, views, labels, schedule, *rest):
            yield epoch
            if labels.weights.shape[1] != 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(_recipe, "self_label", interrupted)
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        clusterer(memory=str(tmp_path)).fit(X)
    monkeypatch.setattr(_recipe, "self_label", train)
    before = len(rounds)
    clusterer(memory=str(tmp_path)).fit(X)
    assert len(rounds) == before + 2


# How far to trust a label


def overlapping(seed=0):
    return make_blobs([200] * 3, n_features=4, cluster_std=2.5, center_box=(-5, 5),
                      random_state=seed)  # fmt: skip


def test_confident_labels_are_more_accurate():
    points, classes = overlapping()
    fitted = clusterer(3, max_epochs=20).fit(points)
    confidence = fitted.confidence(points)
    assert confidence.shape == (600,)
    assert confidence.dtype == np.float32
    assert 0 <= confidence.min() < 0.6
    assert confidence.max() <= 1
    top = np.argsort(-confidence)[:480]
    sure = clustering_accuracy(classes[top], fitted.labels_[top])
    assert sure > clustering_accuracy(classes, fitted.labels_) + 0.03


def test_confidence_of_one_head_is_its_probability():
    fitted = clusterer(n_heads=1).fit(X)
    np.testing.assert_allclose(fitted.confidence(X), fitted.predict_proba(X).max(1), rtol=1e-6)


def test_confidence_does_not_depend_on_the_company(chosen):
    confidence = chosen.confidence(X)
    np.testing.assert_array_equal(chosen.confidence(X[7:9]), confidence[7:9])
    np.testing.assert_array_equal(chosen.confidence(X[::-1]), confidence[::-1])


def test_meaning_of_another_heads_clusters():
    labels, predicted = np.array([0, 0, 0, 0, 2, 2]), np.array([1, 1, 1, 0, 2, 2])
    expected = [[0.25, 0.75, 0], [0, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(meaning(labels, predicted, 3).toarray(), expected)


# Sizes that were asked for


def test_predictions_far_from_the_sizes_asked_for_are_told():
    with pytest.warns(ConvergenceWarning, match=r"cluster_sizes=.* asks for: sizes are \d+"):
        clusterer(2, cluster_sizes=[0.5, 0.5], max_epochs=20).fit(X[y < 2][:130])
