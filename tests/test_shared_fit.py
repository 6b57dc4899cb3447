"""Fits over several processes, real ones: the same estimator on all, from rows shared out."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import pytest
import torch.distributed as dist
from numpy.testing import assert_array_equal
from PIL import Image
from processes import WORLDS, by_processes
from sklearn.callback import ScoringMonitor
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from torch import nn
from torch.utils.data import Dataset

from sklearn_sela import SelfLabelClusterer
from sklearn_sela._distributed import launched
from sklearn_sela.metrics import clustering_accuracy

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

N = 301  # that neither two nor three processes can share evenly
GROUP = np.arange(N) % 3
VECTORS = np.random.default_rng(0).normal(size=(N, 12)) + 6 * np.eye(12)[GROUP]
IMAGES = np.kron(np.random.default_rng(0).random((90, 3, 4, 4)), np.ones((4, 4)))
#: Half of the digits, which few epochs tell apart; all ten, longer: benchmarks/processes.py.
DIGITS, DIGIT = load_digits(n_class=5, return_X_y=True)
DIGITS = DIGITS.reshape(-1, 8, 8)


class Items(Dataset):
    """Some rows, as a Dataset of (vector, target)."""

    def __init__(self, X):
        self.X = X

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        return self.X[i].astype(np.float32), 0


class StopAfter:
    """A callback that stops a fit, and keeps what it saw of it."""

    def __init__(self, epochs):
        self.left, self.seen = epochs, []

    def setup(self, estimator, context):
        self.seen.append("setup")

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context, *, fitted_estimator=None):
        if context.task_name == "epoch":
            self.left -= 1
            self.seen.append(fitted_estimator.predict(VECTORS))
        return self.left <= 0

    def teardown(self, estimator, context):
        self.seen.append("teardown")


class PartlyUsed(nn.Module):
    """A backbone with a parameter that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(12, 8), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x).relu()


def clusterer(**parameters):
    return SelfLabelClusterer(**{"n_clusters": 3, "max_epochs": 6, "random_state": 0, **parameters})


def own_part(rank, world):
    """Rows of their own for each process: the last has few."""
    cuts = [0, *(N * np.arange(1, world) / (world - 0.9)).astype(int), N]
    return slice(cuts[rank], cuts[rank + 1])


def own_rows(rank, world):
    return clusterer(distributed="own_rows").fit(VECTORS[own_part(rank, world)])


def no_rows_in_first(rank, world):
    parts = [VECTORS[:0], *np.array_split(VECTORS, world - 1)]
    return clusterer(distributed="own_rows").fit(Items(parts[rank]))


def files(rank, world, folder):
    return clusterer(on_bad_image="skip", image_shape=(16, 16), distributed="auto").fit(folder)


def own_files(rank, world, folder):
    from sklearn_sela import image_paths

    paths = np.array_split(image_paths(folder), world)[rank].tolist()
    return clusterer(on_bad_image="skip", image_shape=(16, 16), distributed="own_rows").fit(paths)


FITS = {
    "vectors": lambda *_: clusterer().fit(VECTORS),
    "one round": lambda *_: clusterer(over_clusters=None, init="random", max_epochs=12).fit(
        VECTORS
    ),
    "given labels": lambda *_: clusterer(over_clusters=None, init=GROUP).fit(VECTORS),
    "hard": lambda *_: clusterer(soft_targets=False, cluster_sizes="balanced").fit(VECTORS),
    "passes": lambda *_: clusterer(n_views=1, label_momentum=0).fit(VECTORS),
    "no neighbours": lambda *_: clusterer(n_neighbors=0).fit(VECTORS),
    "candidates": lambda *_: clusterer(n_clusters=[2, 3, 4]).fit(VECTORS),
    "no training left": lambda *_: clusterer(max_epochs=1).fit(VECTORS),
    "images": lambda *_: clusterer(max_epochs=2, cluster_sizes="balanced").fit(IMAGES),
    "own backbone": lambda *_: clusterer(backbone=PartlyUsed, max_epochs=20).fit(VECTORS),
    "frozen": lambda *_: clusterer(backbone=PartlyUsed(), freeze=True, max_epochs=4).fit(VECTORS),
    "search": lambda *_: (
        GridSearchCV(clusterer(max_epochs=2), {"n_clusters": [2, 3]}, cv=2)
        .fit(VECTORS)
        .best_estimator_
    ),
    "few rows": lambda *_: clusterer(n_clusters=2, over_clusters=None).fit(VECTORS[:2]),
    "own rows": own_rows,
    "no rows in the first": no_rows_in_first,
    "files": files,
    "own files": own_files,
}
#: Of these, what depends on how rows are shared out: two processes fit all, three these.
UNEVEN = ("vectors", "few rows", "own rows", "no rows in the first", "files")
REFUSED = {
    "other X": lambda rank: clusterer().fit(VECTORS + rank),
    "other shapes": lambda rank: clusterer(distributed="own_rows").fit(VECTORS[:, : 12 - rank]),
    "NaN in one": lambda rank: clusterer(distributed="own_rows").fit(
        np.where(rank == 1, np.nan, VECTORS)
    ),
    "nothing": lambda rank: clusterer(distributed="own_rows").fit(VECTORS[:0]),
    "diverges": lambda rank: clusterer(learning_rate=1e18).fit(VECTORS),
    "callback fails": lambda rank: clusterer().set_callbacks(StopAfter("soon")).fit(VECTORS),
}


def facts(estimator):
    """All that a fit has learned, for comparison."""
    weights = {name: w.numpy() for name, w in estimator.network_.state_dict().items()}
    names = ["labels_", "self_labels_", "cluster_sizes_", "best_head_", "n_clusters_", "skipped_"]
    known = {name: getattr(estimator, name) for name in names}
    meanings = [m.toarray() for m in estimator._model.meanings]
    tables = [estimator.history_, estimator.n_clusters_scores_]
    return {**known, **weights, "meanings": meanings, "tables": tables}


def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def told(rank):
    """(lines printed, warnings, what callbacks saw, epochs) of a fit."""
    monitor, stop = ScoringMonitor(scoring={"acc": accuracy}), StopAfter(2)
    lines = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(lines):
        warnings.simplefilter("always")
        watched = clusterer(verbose=1, memory="unused").set_callbacks(stop, monitor).fit(VECTORS)
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    scores = None
    if rank == 0:
        log = monitor.get_logs().data_as_pandas
        scores = log[log.task_name == "epoch"].acc.tolist()
    return lines.getvalue(), texts, stop.seen, watched.n_iter_, scores


def accuracy_on_digits(seed):
    digits = SelfLabelClusterer(5, max_epochs=20, random_state=seed).fit(DIGITS)
    return clustering_accuracy(DIGIT, digits.labels_)


def accuracy(estimator, X, y):
    return clustering_accuracy(y, estimator.predict(X))


def resumed(rank, folder):
    """Of runs cut short after two epochs, and the same without a cut."""
    whole = clusterer(checkpoint_dir=f"{folder}/whole").fit(VECTORS)
    callback = [StopAfter(2)] if rank == 0 else []
    cut = clusterer(checkpoint_dir=f"{folder}/cut")
    cut.set_callbacks(*callback).fit(VECTORS)
    again = clusterer(checkpoint_dir=f"{folder}/cut").fit(VECTORS)
    alone = clusterer(checkpoint_dir=f"{folder}/alone").fit(VECTORS)  # of one process, cut short
    return facts(whole), facts(again), facts(alone)


def work(rank, world, folder):
    """What a process has to say, by name."""
    folder = images_and_a_run(folder / f"of{world}") if rank == 0 else None
    folder = launched().first(lambda: folder)
    made = {}
    for name in FITS if world == 2 else UNEVEN:
        fit = FITS[name]
        arguments = (rank, world, folder / "images") if "files" in name else (rank, world)
        made[name] = facts(fit(*arguments))
    accuracies = []
    if world == 2:
        accuracies = [accuracy_on_digits(seed) for seed in range(3)]
    return {
        "made": made,
        "alone": clusterer(distributed=None).fit(VECTORS).labels_,
        "refused": {name: message(lambda f=fit: f(rank)) for name, fit in REFUSED.items()},
        "told": told(rank),
        "resumed": resumed(rank, folder),
        "accuracies": accuracies,
    }


def images_and_a_run(folder):
    """A folder with a folder of images, two of them bad, and a run of one process cut short."""
    (folder / "images").mkdir(parents=True)
    for i, image in enumerate(IMAGES):
        pixels = (255 * image).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / "images" / f"{i:03}.png")
    for name in ("007.png", "050.png"):
        (folder / "images" / name).write_text("no image")
    alone = clusterer(checkpoint_dir=folder / "alone", distributed=None)
    alone.set_callbacks(StopAfter(4)).fit(VECTORS)
    return folder


@pytest.fixture(scope="module", params=WORLDS)
def processes(request, tmp_path_factory):
    """What each process has to say, by name."""
    return by_processes(work, tmp_path_factory)[request.param]


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name == "tables":
            for a, b in zip(value, two[name], strict=True):
                assert a is b is None or a.equals(b)
        elif name == "meanings":
            assert_array_equal(np.stack(value), np.stack(two[name]))
        else:
            assert_array_equal(value, two[name])


def test_all_processes_have_the_same_estimator(processes):
    first, *others = (of_rank["made"] for of_rank in processes)
    for other in others:
        for name, made in first.items():
            assert_same(made, other[name])


def test_clusters_are_those_that_are_there(processes):
    for name, made in processes[0]["made"].items():
        if name not in ("images", "files", "own files", "few rows", "frozen"):
            few = made["n_clusters_"] == 2  # a search may find that
            assert len(made["labels_"]) == N
            assert clustering_accuracy(GROUP, made["labels_"]) > (0.6 if few else 0.9), name


def test_rows_of_their_own_are_labelled_in_the_order_of_processes(processes):
    world = len(processes)
    one = processes[0]["made"]
    assert clustering_accuracy(GROUP, one["own rows"]["labels_"]) > 0.9
    assert_array_equal(np.concatenate([GROUP[own_part(r, world)] for r in range(world)]), GROUP)
    assert clustering_accuracy(GROUP, one["no rows in the first"]["labels_"]) > 0.9


def test_fewer_rows_than_processes_are_fitted(processes):
    assert len(processes[0]["made"]["few rows"]["labels_"]) == 2


@pytest.mark.parametrize("name", ["files", "own files"])
def test_files_that_cannot_be_read_are_known_to_all(processes, name):
    for of_rank in processes:
        made = of_rank["made"].get(name) or of_rank["made"]["files"]
        assert [path[-7:] for path in made["skipped_"]] == ["007.png", "050.png"]
        assert_array_equal(np.flatnonzero(made["labels_"] < 0), [7, 50])
        assert_array_equal(made["self_labels_"][:, [7, 50]], -1)


def test_a_process_may_fit_alone(processes):
    expected = clusterer().fit(VECTORS).labels_
    for of_rank in processes:
        assert_array_equal(of_rank["alone"], expected)


def test_what_is_wrong_in_one_process_is_raised_on_all(processes):
    first, second, *_ = (of_rank["refused"] for of_rank in processes)
    for refused in (first, second):
        assert "own_rows" in refused["other X"]
        assert "image_shape" in refused["other shapes"]
        assert "empty" in refused["nothing"]
        assert "FloatingPointError: Training diverged" in refused["diverges"]
    assert "NaN" in second["NaN in one"]
    assert "Another process" in first["NaN in one"]
    assert "TypeError" in first["callback fails"]
    assert "The first process failed: TypeError" in second["callback fails"]


def test_the_first_process_tells_of_the_fit(processes):
    (lines, texts, seen, epochs, logs), *others = (of_rank["told"] for of_rank in processes)
    assert lines.count("epoch") == epochs == 2
    assert len(texts) == 1
    assert "memory is not used" in texts[0]
    assert len(logs) == 2
    assert min(logs) > 0.5
    assert (seen[0], seen[-1], len(seen)) == ("setup", "teardown", 4)
    for lines, texts, seen, epochs, _ in others:
        assert (lines, texts, seen, epochs) == ("", [], [], 2)


def test_a_run_that_was_cut_short_ends_as_without_the_cut(processes):
    for of_rank in processes:
        whole, again, _ = of_rank["resumed"]
        for facts_of in (whole, again):
            for table in facts_of["tables"][:1]:
                table["seconds"] = 0.0
        assert_same(whole, again)


def test_a_run_goes_on_with_another_number_of_processes(processes):
    for of_rank in processes:
        _, _, resumed = of_rank["resumed"]
        assert len(resumed["tables"][0]) == 6
        assert clustering_accuracy(GROUP, resumed["labels_"]) > 0.9


def test_quality_is_that_of_one_process(processes):
    accuracies = processes[0]["accuracies"]
    if not accuracies:
        pytest.skip("measured once, with two processes")
    alone = [accuracy_on_digits(seed) for seed in range(3)]
    print(f"two processes {accuracies}, one {alone}")
    assert np.median(accuracies) > np.median(alone) - 0.02
