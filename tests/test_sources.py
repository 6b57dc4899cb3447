"""Fits to images that are not in memory: folders, paths, Datasets, through scikit-learn's tools."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from torch.utils.data import TensorDataset
from torchvision import datasets, transforms

from sklearn_sela import SelfLabelClusterer, image_paths

BENCHMARK = Path(__file__).parent.parent / "benchmarks/files.py"
KINDS = 3  # of pictures below, told apart by colour and by the way their stripes run


def picture(i, size=(20, 16)):
    """Stripes of kind i % KINDS, in colours that vary, as an array (H, W, 3)."""
    rng, kind = np.random.default_rng(i), i % KINDS
    rows, columns = np.mgrid[: size[1], : size[0]]
    wave = np.sin((rows, columns, rows + columns)[kind] * 1.5 + rng.uniform(0, 6))
    colour = np.eye(3)[kind] * 150 + rng.uniform(0, 40, 3)
    return (colour * (0.6 + 0.4 * wave[..., None]) + rng.uniform(0, 20)).astype(np.uint8)


def save(i, folder):
    """One of the formats that people have, in turn; returns its path."""
    image = Image.fromarray(picture(i))
    name = f"{i:05d}"
    match i % 9:
        case 0:
            path = folder / f"{name}.jpg"
            image.save(path, quality=90)
        case 1:
            path = folder / f"{name}.png"
            image.save(path)
        case 2:
            path = folder / f"{name}.webp"
            image.save(path, lossless=True)
        case 3:
            path = folder / f"{name}.tif"
            image.save(path)
        case 4:
            path = folder / f"{name}-grey.png"
            image.convert("L").save(path)
        case 5:
            path = folder / f"{name}-alpha.png"
            image.convert("RGBA").save(path)
        case 6:
            path = folder / f"{name}-palette.png"
            image.quantize(64).save(path)
        case 7:
            path = folder / f"{name}-16bit.png"
            Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
        case _:
            path = folder / f"{name}-turned.jpg"  # stored on its side, upright by its EXIF data
            exif = Image.Exif()
            exif[0x0112] = 6
            image.rotate(90, expand=True).save(path, quality=90, exif=exif)
    return str(path)


def arrays(n):
    """The pictures as fit gets them from files: (n, 3, 16, 16) uint8."""
    return np.stack([picture(i)[:, 2:18] for i in range(n)]).transpose(0, 3, 1, 2)


def write(folder, n):
    folder.mkdir(parents=True, exist_ok=True)
    return [save(i, folder) for i in range(n)]


def plain(folder, n, start=0):
    """PNG files, the same pictures whatever decodes them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{i:04d}.png") for i in range(start, start + n)]
    for i, path in enumerate(paths, start):
        Image.fromarray(picture(i)).save(path)
    return paths


def clusterer(n_clusters=KINDS, **parameters):
    quick = {"image_shape": (3, 16, 16), "max_epochs": 4, "random_state": 0, "device": "cpu"}
    return SelfLabelClusterer(n_clusters, **{**quick, **parameters})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of 2,000 files, of which three are broken; returns it and the broken ones."""
    folder = tmp_path_factory.mktemp("mixed")
    paths = write(folder, 2000)
    broken = [paths[7], paths[900], paths[1999]]
    with open(broken[0], "r+b") as file:
        file.truncate(40)
    with open(broken[1], "wb") as file:
        file.write(b"not an image at all")
    with open(broken[2], "wb"):
        pass
    return str(folder), broken


def test_folder_of_mixed_files_names_the_broken_ones(mixed):
    folder, broken = mixed
    with pytest.raises(ValueError, match="3 images of X cannot be read") as error:
        clusterer().fit(folder)
    for path in broken:
        assert path in str(error.value)


def test_folder_of_mixed_files_fits_and_predicts_without_the_broken_ones(mixed):
    folder, broken = mixed
    paths = image_paths(folder)
    with pytest.warns(UserWarning, match="3 of 2,?000"):
        fitted = clusterer(on_bad_image="skip", max_epochs=10).fit(folder)
    assert fitted.skipped_ == sorted(broken)
    bad = np.isin(paths, broken)
    np.testing.assert_array_equal(fitted.labels_ == -1, bad)
    assert (fitted.self_labels_ == -1).all(0).tolist() == bad.tolist()
    with pytest.warns(UserWarning, match="3 of 2,?000"):
        labels = fitted.predict(folder)
    np.testing.assert_array_equal(labels, fitted.labels_)
    with pytest.warns(UserWarning, match="3 of 2,?000"):
        assert np.isnan(fitted.predict_proba(paths)[bad]).all()
    with pytest.warns(UserWarning, match="3 of 2,?000"):
        assert np.isnan(fitted.transform(paths)).any(1).tolist() == bad.tolist()
    strict = fitted.set_params(on_bad_image="error")
    with pytest.raises(ValueError, match=os.path.basename(broken[0])):
        strict.predict(paths)


@pytest.mark.parametrize(
    "kind", ["folder", "list", "array", "column", "frame", "Path", "dataset", "pairs"]
)
def test_sources_of_the_same_images_fit_alike(tmp_path, kind):
    paths = plain(tmp_path, 60)
    tensors = torch.from_numpy(arrays(60).copy())
    X = {
        "folder": str(tmp_path),
        "list": paths,
        "array": np.array(paths),
        "column": pd.Series(paths, index=range(60, 0, -1)),
        "frame": pd.DataFrame({"path": paths}),
        "Path": list(map(type(tmp_path), paths)),
        "dataset": TensorDataset(tensors),
        "pairs": TensorDataset(tensors, torch.arange(60)),
    }[kind]
    # Files are read ahead, which reorders random draws: arrays are like Datasets, not like files.
    like = arrays(60) if isinstance(X, TensorDataset) else paths
    expected = clusterer().fit(like)
    fitted = clusterer().fit(X)
    assert fitted.image_shape_ == (3, 16, 16)
    np.testing.assert_array_equal(fitted.labels_, expected.labels_)
    np.testing.assert_array_equal(fitted.transform(X), expected.transform(like))
    assert fitted.score(X) == expected.score(like)


def test_paths_in_a_pipeline_and_a_search(tmp_path):
    paths, kinds = plain(tmp_path, 120), np.arange(120) % KINDS
    pipeline = make_pipeline(clusterer(max_epochs=8), KNeighborsClassifier())
    assert pipeline.fit(paths[:90], kinds[:90]).score(paths[90:], kinds[90:]) > 0.8
    search = GridSearchCV(clusterer(), {"n_clusters": [2, 3]}, cv=2, error_score="raise")
    search.fit(pd.Series(paths))
    assert search.predict(paths[:5]).shape == (5,)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_search_over_paths_by_two_processes_equals_a_serial_one(tmp_path):
    paths, (half, rest) = plain(tmp_path, 60), np.arange(60).reshape(2, 30)
    searches = [
        GridSearchCV(
            clusterer(),
            {"n_clusters": [3, 4]},
            cv=[(half, rest)],
            n_jobs=n,
            refit=False,
            error_score="raise",
        ).fit(paths)
        for n in (1, 2)
    ]
    first, second = (search.cv_results_["mean_test_score"] for search in searches)
    np.testing.assert_allclose(first, second, rtol=0.01)  # other numbers of threads


def test_torchvision_folders_fit_with_their_transforms(tmp_path):
    for kind in range(KINDS):
        for i in range(kind, 60, KINDS):
            plain(tmp_path / f"kind{kind}", 1, i)
    crop = transforms.Compose([transforms.CenterCrop(16), transforms.ToTensor()])
    data = datasets.ImageFolder(str(tmp_path), transform=crop)
    fitted = clusterer(image_shape=None).fit(data)
    assert fitted.image_shape_ == (3, 16, 16)
    np.testing.assert_array_equal(fitted.predict(data), fitted.labels_)


def test_other_files_than_those_of_fit_are_brought_to_its_shape(tmp_path):
    fitted = clusterer().fit(plain(tmp_path / "small", 40))
    large = tmp_path / "large.jpg"
    Image.fromarray(picture(0, (300, 200))).save(large)
    assert fitted.predict([str(large)]).shape == (1,)


def test_missing_file_is_named_before_training(tmp_path):
    paths = [*plain(tmp_path, 20), str(tmp_path / "gone.png")]
    with pytest.raises(ValueError, match=r"gone\.png"):
        clusterer().fit(paths)


def test_estimator_of_files_is_cloned_and_refitted_to_arrays(tmp_path):
    fitted = clusterer().fit(plain(tmp_path, 30))
    again = clone(fitted).set_params(image_shape=None)
    assert again.fit(np.random.default_rng(0).normal(size=(40, 5))).image_shape_ is None


def test_label_transfer_trains_another_network_on_the_labels(tmp_path):
    X = arrays(120)
    teacher = clusterer(max_epochs=8).fit(X)
    student = clusterer(
        init=teacher.self_labels_, over_clusters=None, n_solves=0, max_epochs=8
    ).fit(X)
    np.testing.assert_array_equal(student.self_labels_, teacher.self_labels_)
    assert (student.history_.solver_iterations == 0).all()
    agree = student.labels_ == teacher.self_labels_[student.best_head_]
    assert agree.mean() > 0.9


def test_bfloat16_learns_what_float32_does():
    X = arrays(240)
    fitted = clusterer(precision="bfloat16", max_epochs=12).fit(X)
    assert all(p.dtype == torch.float32 for p in fitted.network_.parameters())
    assert fitted.predict_proba(X).dtype == np.float32
    own = [np.bincount(fitted.labels_[kind::KINDS]).max() for kind in range(KINDS)]
    assert sum(own) > 0.9 * len(X)


def test_compiled_backbone_learns_and_pickles_without_its_compiler(tmp_path):
    probe = torch.compile(torch.nn.Linear(2, 2))
    try:
        probe(torch.zeros(1, 2))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    import pickle

    X = arrays(60)
    fitted = clusterer(backbone="mlp", compile=True).fit(X)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(X), fitted.labels_)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_files():
    command = [sys.executable, str(BENCHMARK), "1000", "5000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = (float(line.split()[1]) for line in done.stdout.splitlines()[1:])
    assert many - few < 200  # MB; for 100,000 see docs/images.rst


def test_cache_of_first_rounds_is_left_alone_with_a_warning(tmp_path):
    paths = plain(tmp_path / "images", 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        with pytest.warns(UserWarning, match="memory"):
            clusterer(memory=str(tmp_path / "cache")).fit(paths)
