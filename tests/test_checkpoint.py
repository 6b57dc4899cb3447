"""Runs killed, interrupted and resumed; checkpoints damaged, foreign or impossible to write."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sklearn_sela import SelfLabelClusterer

DIGITS = load_digits().images[:600]
FEW = DIGITS[:300]


def clusterer(folder=None, **parameters):
    defaults = {"n_clusters": 10, "max_epochs": 6, "random_state": 0}
    return SelfLabelClusterer(checkpoint_dir=folder, **{**defaults, **parameters})


def assert_same_fit(one, two):
    assert_array_equal(one.labels_, two.labels_)
    assert_array_equal(one.self_labels_, two.self_labels_)
    for a, b in zip(
        one.network_.state_dict().values(), two.network_.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    columns = ["epoch", "stage", "loss", "changed"]
    assert one.history_[columns].equals(two.history_[columns])


class StopAt:
    """Augmentation that presses Ctrl-C in the n-th batch, and counts them."""

    def __init__(self, at=None):
        self.at, self.calls = at, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return x + 0.1 * torch.randn(x.shape)  # torch's global generator is kept as well


# In processes of their own ---------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
# With what torch's optimisers import at first: seconds that each process would take anew.
PROCESSES.set_forkserver_preload(["sklearn_sela", "sklearn.datasets", "torch._dynamo"])
EPOCHS = 6


def fit_digits(folder, started=None):
    torch.set_num_threads(1)
    if started is not None:
        started.set()
    fitted = clusterer(folder, max_epochs=EPOCHS).fit(DIGITS)
    np.savez(os.path.join(folder, "result.npz"), labels=fitted.labels_)


def run_process(target, *args, kill_after=None):
    started = PROCESSES.Event()
    process = PROCESSES.Process(target=target, args=(*args, started))
    process.start()
    started.wait(60)
    begin = time.perf_counter()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join(120)
    return process.exitcode, time.perf_counter() - begin


def test_killed_at_twenty_random_moments_resumes_to_the_same_labels(tmp_path):
    whole = tmp_path / "whole"
    code, seconds = run_process(fit_digits, whole)
    assert code == 0
    expected = np.load(whole / "result.npz")["labels"]
    rng, killed, epochs = np.random.default_rng(), 0, []
    for i, moment in enumerate(rng.uniform(0, seconds, 20)):
        folder = tmp_path / str(i)
        code, _ = run_process(fit_digits, folder, kill_after=moment)
        killed += code == -signal.SIGKILL
        epochs.append([p.name for p in folder.glob("*.pt")])
        code, _ = run_process(fit_digits, folder)
        assert code == 0
        assert_array_equal(np.load(folder / "result.npz")["labels"], expected)
    assert killed >= 10  # the others were done before: the machine is faster at times
    assert any(epochs), "no kill came after the first epoch"


def fit_with_little_space(folder, started):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, as of a full disk, not a signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    started.set()
    try:
        clusterer(folder).fit(FEW)
    except OSError as error:
        os._exit(7 if "cannot be written" in str(error) and "checkpoint_dir" in str(error) else 1)
    os._exit(0)


def test_full_disk_is_an_error_and_harms_nothing(tmp_path):
    folder = tmp_path / "run"
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        clusterer(folder, augment=StopAt(12)).fit(FEW)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == {"run.json", "features.pt"}
    code, _ = run_process(fit_with_little_space, tmp_path / "full")
    assert code == 7
    # The run of the other folder goes on where it was.
    assert_same_fit(
        clusterer(folder, augment=StopAt()).fit(FEW), clusterer(augment=StopAt()).fit(FEW)
    )


def test_folder_that_cannot_be_made_is_an_error_before_training(tmp_path):
    (tmp_path / "file").touch()
    augment = StopAt()
    with pytest.raises(OSError, match=r"checkpoint_dir=.*file.* cannot be written"):
        clusterer(tmp_path / "file" / "run", augment=augment).fit(FEW)
    assert augment.calls == 0


# Interrupted -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 5, 26, 40, 50])
def test_interrupted_run_is_resumed(tmp_path, at):
    augment = StopAt(at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            clusterer(tmp_path, augment=augment).fit(FEW)
        except KeyboardInterrupt:
            assert at < 10  # before the end of the first epoch
    whole, rest = StopAt(), StopAt()
    resumed = clusterer(tmp_path, augment=rest).fit(FEW)
    assert_same_fit(resumed, clusterer(augment=whole).fit(FEW))
    batches = round(300 / 37)
    assert rest.calls <= whole.calls - (at - 1) // batches * batches


def test_finished_run_is_not_trained_again(tmp_path):
    first = clusterer(tmp_path).fit(FEW)
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = clusterer(tmp_path).fit(FEW)
    assert_same_fit(first, again)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == times
    assert again.history_.equals(first.history_)  # the seconds, too


@pytest.mark.filterwarnings("ignore:No number of clusters")
@pytest.mark.parametrize(
    "parameters",
    [
        {"n_clusters": [5, 10, 12]},
        {"over_clusters": None, "n_views": 1, "n_solves": 2, "soft_targets": False},
        {"lr_schedule": "step", "label_momentum": 0, "n_views": 2},
        {"label_momentum": 0, "n_views": 1, "soft_targets": False, "n_heads": 20},
        {"backbone": "mlp", "random_state": None},
    ],
)
def test_resumes_under_other_parameters(tmp_path, parameters):
    whole = clusterer(tmp_path / "whole", **parameters).fit(FEW)
    os.makedirs(tmp_path / "part")
    for name in ("run.json", "features.pt"):  # as if killed in the second round
        if (tmp_path / "whole" / name).exists():
            shutil.copy(tmp_path / "whole" / name, tmp_path / "part")
    assert_same_fit(whole, clusterer(tmp_path / "part", **parameters).fit(FEW))


def test_run_without_random_state_keeps_the_seed_it_began_with(tmp_path):
    first = clusterer(tmp_path, random_state=None).fit(FEW)
    assert_same_fit(first, clusterer(tmp_path, random_state=None).fit(FEW))


def test_own_backbone_with_dropout_is_resumed(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2))
    whole = clusterer(tmp_path / "whole", backbone=net).fit(FEW)
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        clusterer(tmp_path / "part", backbone=net, augment=StopAt(20)).fit(FEW)
    resumed = clusterer(tmp_path / "part", backbone=net, augment=StopAt()).fit(FEW)
    alone = clusterer(backbone=net, augment=StopAt()).fit(FEW)
    assert_same_fit(resumed, alone)
    assert whole.n_iter_ == resumed.n_iter_


def test_what_does_not_change_the_outcome_may_change(tmp_path, capsys):
    first = clusterer(tmp_path).fit(FEW)
    again = clusterer(str(tmp_path), verbose=1, device="cpu").fit(FEW)
    assert_same_fit(first, again)
    assert len(capsys.readouterr().out.splitlines()) == 6  # of epochs that were done before


# Other runs, damage ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    clusterer(folder).fit(FEW)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"n_clusters": 9}, "n_clusters=10; this one has n_clusters=9"),
        ({"random_state": 1}, "random_state=0"),
        ({"max_epochs": 7}, "max_epochs=6"),
        ({"cluster_sizes": np.arange(1, 11)}, r"cluster_sizes='learned'.*\[1, 2, 3"),
        ({"backbone": nn.Flatten()}, "backbone='auto'.*backbone=Flatten"),
        ({"augment": StopAt()}, "augment='auto'.*augment=StopAt"),
    ],
)
def test_folder_of_another_run_is_refused(run, parameters, named):
    with pytest.raises(ValueError, match=named):
        clusterer(run, **parameters).fit(FEW)


def test_folder_of_other_data_is_refused(run):
    with pytest.raises(ValueError, match="holds another run, with X="):
        clusterer(run).fit(FEW + 1)


def test_folder_of_another_version_is_refused(run):
    what = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**what, "sklearn_sela": "0.0.1"}))
    with pytest.raises(ValueError, match=r"sklearn_sela=0\.0\.1"):
        clusterer(run).fit(FEW)


def test_file_of_another_run_is_refused(run, tmp_path):
    clusterer(tmp_path / "other", random_state=1).fit(FEW)
    shutil.copy(tmp_path / "other" / "clusters.pt", run)
    with pytest.raises(ValueError, match="belongs to another run"):
        clusterer(run).fit(FEW)


@pytest.mark.parametrize("name", ["run.json", "features.pt", "clusters.pt"])
@pytest.mark.parametrize("left", [0, 1, 100, 0.5, 0.99])
def test_truncated_file_is_an_error_that_names_it(run, name, left):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: left if left >= 1 else int(left * len(whole))])
    with pytest.raises(ValueError, match=rf"{name} is damaged.*Delete the folder"):
        clusterer(run).fit(FEW)


def test_file_left_half_written_is_no_matter(run, finished):
    (run / "clusters.pt").unlink()
    (run / "clusters.pt.part").write_bytes(b"half")
    assert_same_fit(clusterer(run).fit(FEW), clusterer(finished).fit(FEW))


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.path.join(os.environ["HOSTILE"], "code-ran"),)


@pytest.mark.parametrize("write", [torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))])
def test_no_code_runs_from_a_checkpoint(run, tmp_path, monkeypatch, write):
    monkeypatch.setenv("HOSTILE", str(tmp_path))
    write({"run": Hostile()}, run / "features.pt")
    with pytest.raises(ValueError, match=r"features\.pt is damaged"):
        clusterer(run).fit(FEW)
    assert not (tmp_path / "code-ran").exists()


def test_error_of_a_checkpoint_leaves_the_estimator_as_it_was(run):
    fitted = clusterer().fit(FEW)
    labels = fitted.labels_
    fitted.set_params(checkpoint_dir=run, max_epochs=9)
    with pytest.raises(ValueError, match="another run"):
        fitted.fit(FEW)
    assert fitted.labels_ is labels


def test_clone_keeps_the_folder(tmp_path):
    assert clone(clusterer(tmp_path)).checkpoint_dir == tmp_path
