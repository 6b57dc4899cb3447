"""Fitted clusterers as graphs: what another runtime makes of raw rows."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from torch import nn

from sklearn_sela import SelfLabelClusterer, to_exported_program, to_onnx

VECTORS = make_blobs(300, centers=4, n_features=6, random_state=0)[0].astype(np.float32)
VECTORS[:, 0] += 1e4  # a large offset, beside which the rest must not vanish
DIGITS = load_digits().images[:300].astype(np.float32)
COLOUR = np.random.default_rng(0).integers(0, 255, (300, 3, 12, 12), dtype=np.uint8)
COLOUR[::2, :, 3:9] = 200


def own():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh())


FITS = {
    "vectors": (VECTORS, {}),
    "grey images": (DIGITS, {"n_clusters": 10}),
    "colour images": (COLOUR, {}),
    "resnet": (COLOUR, {"backbone": "resnet18", "max_epochs": 1, "over_clusters": None}),
    "own": (VECTORS, {"backbone": own}),
}


@pytest.fixture(scope="module", params=FITS)
def fitted(request):
    X, parameters = FITS[request.param]
    parameters = {"n_clusters": 4, "max_epochs": 2, "random_state": 0, **parameters}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return SelfLabelClusterer(**parameters).fit(X), X


def as_rows(X):
    return (X if X.ndim != 3 else X[:, None]).astype(np.float32)


def assert_right(estimator, X, found):
    features, probabilities = (np.asarray(part) for part in found)
    scale = np.abs(estimator.transform(X)).max()
    np.testing.assert_allclose(features, estimator.transform(X), atol=1e-5 * scale)
    np.testing.assert_allclose(probabilities, estimator.predict_proba(X), atol=1e-5)


@pytest.mark.parametrize("n", [1, 300])
def test_exported_program_predicts_the_same(fitted, n):
    estimator, X = fitted
    program = to_exported_program(estimator).module()
    assert_right(estimator, X[:n], program(torch.from_numpy(as_rows(X[:n]))))


def test_onnx_model_predicts_the_same(fitted, tmp_path):
    estimator, X = fitted
    before = {name: w.clone() for name, w in estimator.network_.state_dict().items()}
    to_onnx(estimator, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [i.name for i in session.get_inputs()] == ["rows"]
    assert [o.name for o in session.get_outputs()] == ["features", "probabilities"]
    for n in (1, 7, 300):
        assert_right(estimator, X[:n], session.run(None, {"rows": as_rows(X[:n])}))
    for name, weights in estimator.network_.state_dict().items():
        assert torch.equal(weights, before[name])


def test_exported_program_is_float32_whatever_the_default():
    estimator = SelfLabelClusterer(4, max_epochs=2, random_state=0).fit(VECTORS)
    torch.set_default_dtype(torch.float64)
    try:
        program = to_exported_program(estimator).module()
        assert_right(estimator, VECTORS, program(torch.from_numpy(VECTORS)))
    finally:
        torch.set_default_dtype(torch.float32)


def test_exported_program_needs_none_of_this_package(tmp_path):
    X = VECTORS
    estimator = SelfLabelClusterer(4, backbone=own, max_epochs=2, random_state=0).fit(X)
    torch.export.save(to_exported_program(estimator), tmp_path / "program.pt2")
    np.save(tmp_path / "rows.npy", as_rows(X[:5]))
    script = f"""
import sys, numpy, torch
program = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
rows = torch.from_numpy(numpy.load({str(tmp_path / "rows.npy")!r}))
numpy.save({str(tmp_path / "p.npy")!r}, program(rows)[1].numpy())
assert "sklearn_sela" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    found = np.load(tmp_path / "p.npy")
    np.testing.assert_allclose(found, estimator.predict_proba(X[:5]), atol=1e-5)


@pytest.mark.parametrize("export", [to_exported_program, lambda e: to_onnx(e, "no")])
def test_unfitted_clusterers_are_not_exported(export):
    with pytest.raises(NotFittedError):
        export(SelfLabelClusterer())


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"sklearn-sela\[onnx\]"):
        to_onnx(SelfLabelClusterer(), "no")
