"""scikit-learn's callbacks: what they are told, what they may do, and what they must not change."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.callback import ScoringMonitor
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV

from sklearn_sela import SelfLabelClusterer, _labels, _recipe, metrics

X, Y = make_blobs(200, centers=4, n_features=6, random_state=0)
FEATURES, CLUSTERS = ["features"] * 2, ["clusters"] * 2


def clusterer(n_clusters=4, **parameters):
    parameters = {"max_epochs": 4, "random_state": 0, "n_neighbors": 5, **parameters}
    return SelfLabelClusterer(n_clusters, **parameters)


class Watch:
    """A callback that notes what it is told, and stops at the ``stop_at``-th task of a name."""

    def __init__(self, stop_at=None, task="epoch"):
        self.stop_at, self.task, self.seen, self.tasks = stop_at, task, [], 0

    def setup(self, estimator, context):
        self.seen.append(("setup", context.task_name))

    def teardown(self, estimator, context):
        self.seen.append(("teardown", context.task_name))

    def on_fit_task_begin(self, estimator, context):
        self.seen.append(("begin", context.task_name))

    def on_fit_task_end(self, estimator, context):
        self.seen.append(("end", context.task_name))
        self.tasks += context.task_name == self.task
        return context.task_name == self.task and self.tasks == self.stop_at


class Look(Watch):
    """One that looks at all there is to see; ``looks`` holds a dict for each epoch."""

    looks: list

    def on_fit_task_end(self, estimator, context, *, X=None, y=None, fitted_estimator=None):
        self.looks = [*getattr(self, "looks", []), (context.task_name, X, y, fitted_estimator)]
        return super().on_fit_task_end(estimator, context)

    def epochs(self):
        return [look for look in self.looks if look[0] == "epoch"]


def test_each_round_and_epoch_begins_and_ends():
    watch = Watch()
    clusterer().set_callbacks(watch).fit(X)
    epoch = [("begin", "epoch"), ("end", "epoch")]

    def stage(name):
        return [("begin", name), *epoch, *epoch, ("end", name)]

    assert watch.seen == [
        ("setup", "fit"),
        ("begin", "fit"),
        *stage("features"),
        *stage("clusters"),
        ("end", "fit"),
        ("teardown", "fit"),
    ]


def test_each_number_of_clusters_compared_is_a_task():
    watch = Watch()
    clusterer([3, 4, 5]).set_callbacks(watch).fit(X)
    at = watch.seen.index(("begin", "n_clusters"))
    candidate = [("begin", "candidate"), ("end", "candidate")]
    assert watch.seen[at + 1 : at + 8] == [*candidate * 3, ("end", "n_clusters")]


def test_callbacks_are_torn_down_after_an_error():
    watch = Watch()
    with pytest.raises(ValueError, match="NaN"):
        clusterer().set_callbacks(watch).fit(np.full((50, 6), np.nan))
    assert watch.seen[-1] == ("teardown", "fit")


@pytest.mark.parametrize(
    ("stop_at", "stages"),
    [
        (1, FEATURES[:1]),
        (2, FEATURES),
        (3, FEATURES + CLUSTERS[:1]),
        (4, FEATURES + CLUSTERS),
        (None, FEATURES + CLUSTERS),
    ],
)
def test_a_callback_stops_the_fit_at_its_epoch(stop_at, stages):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # it is as it was asked for
        fitted = clusterer().set_callbacks(Watch(stop_at)).fit(X)
    whole = clusterer().fit(X)
    assert list(fitted.history_.stage) == stages
    assert list(fitted.history_.loss) == list(whole.history_.loss[: len(stages)])
    assert fitted.n_clusters_ == 4
    assert fitted.predict_proba(X).shape == (200, 4)
    np.testing.assert_array_equal(fitted.predict(X), fitted.labels_)
    assert not fitted.network_.training


def test_a_callback_stops_the_comparison_with_what_it_has():
    fitted = clusterer([3, 4, 5]).set_callbacks(Watch(2, "candidate")).fit(X)
    assert list(fitted.n_clusters_scores_.n_clusters) == [3, 4]
    assert set(fitted.history_.stage) == {"features"}


def test_a_stopped_first_round_is_not_remembered(tmp_path):
    clusterer(memory=str(tmp_path)).set_callbacks(Watch(1)).fit(X)
    fitted = clusterer(memory=str(tmp_path)).fit(X)
    assert list(fitted.history_.stage) == FEATURES + CLUSTERS


def test_a_remembered_round_is_told_again(tmp_path):
    one, two = Look(), Look()
    fit = partial(clusterer, memory=str(tmp_path))
    fit().set_callbacks(one).fit(X)
    fitted = fit().set_callbacks(two).fit(X)
    assert one.seen == two.seen
    assert list(fitted.history_.stage) == FEATURES + CLUSTERS
    before, last = (look[3] for look in two.epochs()[:2])
    assert before is None  # nobody knows what the network was then
    np.testing.assert_array_equal(last.predict(X), one.epochs()[1][3].predict(X))


def test_a_stopped_run_goes_on_from_its_checkpoint(tmp_path):
    run = partial(clusterer, checkpoint_dir=tmp_path)
    run().set_callbacks(Watch(3)).fit(X)
    watch = Watch()
    resumed, whole = run().set_callbacks(watch).fit(X), clusterer().fit(X)
    np.testing.assert_array_equal(resumed.predict_proba(X), whole.predict_proba(X))
    assert watch.tasks == 4  # those of the first run are told again


def test_looking_does_not_change_the_fit():
    class Draws(Look):
        def on_fit_task_end(self, estimator, context, *, X=None, y=None, fitted_estimator=None):
            torch.rand(3)
            fitted_estimator and fitted_estimator.score(X)

    one, two = clusterer().set_callbacks(Draws()).fit(X), clusterer().fit(X)
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    assert one.best_head_ == two.best_head_


def test_fitted_estimator_is_what_fit_gives_if_it_stops_there():
    look = Look()
    clusterer().set_callbacks(look).fit(X)
    for stop_at, (_, _, _, seen) in enumerate(look.epochs(), 1):
        stopped = clusterer().set_callbacks(Watch(stop_at)).fit(X)
        np.testing.assert_array_equal(seen.predict_proba(X), stopped.predict_proba(X))
        np.testing.assert_array_equal(seen.labels_, stopped.labels_)
        assert seen.n_iter_ == stop_at
        assert seen.best_head_ == stopped.best_head_
        assert not seen.network_.training


def test_fitted_estimator_stays_as_it_is_while_training_goes_on():
    class Keep(Look):
        def on_fit_task_end(self, estimator, context, *, X=None, y=None, fitted_estimator=None):
            if context.task_name == "epoch":
                self.seen.append((fitted_estimator, fitted_estimator.predict_proba(X)))

    keep = Keep()
    clusterer().set_callbacks(keep).fit(X)
    for fitted, proba in keep.seen:
        if not isinstance(fitted, str):
            np.testing.assert_array_equal(fitted.predict_proba(X), proba)


@pytest.mark.parametrize(("call", "n_epochs"), [(1, 1), (3, 3)])
def test_ctrl_c_while_a_callback_looks_ends_the_fit(call, n_epochs, monkeypatch):
    choose, calls = _recipe.choose_head, []

    def interrupted(joint):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return choose(joint)

    monkeypatch.setattr(_recipe, "choose_head", interrupted)
    with pytest.warns(ConvergenceWarning, match=f"last complete epoch, {n_epochs} of 4"):
        fitted = clusterer().set_callbacks(Look()).fit(X)
    assert fitted.n_iter_ == n_epochs


def test_callbacks_see_x_and_y_as_given():
    frame = pd.DataFrame(X)
    look = Look()
    clusterer().set_callbacks(look).fit(frame, Y)
    assert all(seen is frame and y is Y for _, seen, y, _ in look.epochs())


def test_without_y_callbacks_see_the_labels_of_the_transport():
    look = Look()
    clusterer().set_callbacks(look).fit(X)
    for _, _, y, fitted in look.epochs():
        np.testing.assert_array_equal(y, fitted.self_labels_[fitted.best_head_])


@pytest.mark.parametrize("method", ["fit", "fit_predict"])
def test_scores_are_monitored_by_epoch(method):
    monitor = ScoringMonitor(scoring="adjusted_rand_score")
    estimator = clusterer().set_callbacks(monitor)
    getattr(estimator, method)(X, Y)
    log = monitor.get_logs().data_as_pandas
    epochs = log[log.task_name == "epoch"]
    assert len(epochs) == 4
    expected = adjusted_rand_score(Y, estimator.labels_)
    assert epochs.adjusted_rand_score.iloc[-1] == pytest.approx(expected)
    assert log[log.task_name == "fit"].adjusted_rand_score.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "scoring", ["adjusted_rand_score", {"information": metrics.information_scorer}]
)
def test_scores_are_monitored_without_y(scoring):
    monitor = ScoringMonitor(scoring=scoring)
    clusterer().set_callbacks(monitor).fit(X)
    log = monitor.get_logs().data_as_pandas
    scores = log[log.task_name == "epoch"].iloc[:, -1]
    assert len(scores) == 4
    assert scores.notna().all()


def test_scores_are_monitored_within_a_search():
    monitor = ScoringMonitor(scoring="adjusted_rand_score")
    search = GridSearchCV(clusterer().set_callbacks(monitor), {"n_clusters": [3, 4]}, cv=2)
    search.fit(X, Y)
    log = monitor.get_logs().data_as_pandas
    assert len(log[log.task_name == "epoch"]) == (2 * 2 + 1) * 4


def test_a_plateau_ends_a_round():
    fixed = {"max_epochs": 30, "learning_rate": 1e-9}  # nothing is learned
    whole = clusterer(**fixed).fit(X).history_
    early = clusterer(**fixed, n_iter_no_change=2).fit(X).history_
    assert len(whole) == 30
    for _, losses in early.groupby("stage").loss:
        assert len(losses) < 15
        assert losses[-2:].min() > losses[:-2].min() - 1e-3
    assert set(early.stage) == {"features", "clusters"}
    first = early[early.stage == "features"].loss
    assert list(first) == list(whole.loss[: len(first)])


def test_rounds_that_learn_do_not_end_early():
    assert clusterer(n_iter_no_change=2, tol=0, max_epochs=8).fit(X).n_iter_ == 8


def test_a_plateau_ends_a_resumed_round_where_it_would_have(tmp_path, monkeypatch):
    fixed = {"max_epochs": 30, "learning_rate": 1e-9, "n_iter_no_change": 3}
    run = clusterer(**fixed, checkpoint_dir=tmp_path)
    run.set_callbacks(Watch(2)).fit(X)
    resumed, whole = run.set_callbacks().fit(X), clusterer(**fixed).fit(X)
    assert list(resumed.history_.loss) == list(whole.history_.loss)
    np.testing.assert_array_equal(resumed.predict_proba(X), whole.predict_proba(X))
    calls = []
    monkeypatch.setattr(_labels.SelfLabels, "solve", lambda *_: calls.append(1))
    run.fit(X)
    assert calls == []  # both rounds were over


SEARCH = """
from sklearn.callback import ProgressBar
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn_sela import SelfLabelClusterer

if __name__ == "__main__":
    X = load_digits().images[:200]
    clusterer = SelfLabelClusterer(max_epochs=8, random_state=0)
    search = GridSearchCV(clusterer, {"n_clusters": [4, 5]}, cv=2, n_jobs=2, refit=False)
    search.set_callbacks(ProgressBar()).fit(X)
    pipeline = make_pipeline(FunctionTransformer(), clusterer.set_params(n_clusters=4))
    pipeline.set_callbacks(ProgressBar()).fit(X)
"""


def in_a_terminal(script, path):
    """What a program writes to a terminal of 120 columns, of which it is told."""
    path.write_text(script)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, str(path)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the program has ended
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())


def test_progress_bars_of_searches_and_pipelines_are_nested(tmp_path):
    pytest.importorskip("rich")
    written = in_a_terminal(SEARCH, tmp_path / "search.py")
    bar = "[\u2501\u2578\u257a ]+"
    name = "((?:GridSearchCV|Pipeline|SelfLabelClusterer) - [^\u2501\u2578\u257a]*?)"
    searching, piping = (
        re.findall(rf"( *){name} +{bar} (\d+)%", part)
        for part in re.split("(?=Pipeline)", written, maxsplit=1)
    )
    merged = "GridSearchCV - candidate-split-evaluation | SelfLabelClusterer - fit"
    fits = [("    ", f"{merged} #{i}", "100") for i in range(4)]
    names = ("features #0", "clusters #1")
    rounds = [("      ", f"SelfLabelClusterer - {name}", "100") for name in names]
    search, last = searching[-14:-12], searching[-12:]
    assert search == [("", "GridSearchCV - fit", "100"), ("  ", "GridSearchCV - search #0", "100")]
    assert set(last[::3]) == set(fits)  # in the order in which they began
    assert last[1::3] + last[2::3] == [rounds[0]] * 4 + [rounds[1]] * 4
    assert any(rounds[0][:2] == bar[:2] and 0 < int(bar[2]) < 100 for bar in searching)
    assert piping[-4:] == [
        ("", "Pipeline - fit", "100"),
        ("  ", "Pipeline - fit-final-estimator | SelfLabelClusterer - fit #1", "100"),
        *(("    ", bar, "100") for _, bar, _ in rounds),
    ]
