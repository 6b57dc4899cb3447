"""A fitted clusterer as one graph, from raw rows to features and probabilities, for other runtimes.

For image backbones of torchvision's own, ``_export`` gives plain weights instead.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from sklearn_sela._model import Model

_OUTPUTS = ("features", "probabilities")


class _Graph(nn.Module):
    """Scaling, network and predicting head, as :meth:`Model.features` and probabilities do it."""

    shift: Tensor
    scale: Tensor

    def __init__(self, model: Model):
        super().__init__()
        self.network = copy.deepcopy(model.network).cpu().eval().requires_grad_(False)
        self.best_head = model.best_head
        self.register_buffer("shift", torch.as_tensor(model.scaler.shift))
        self.register_buffer("scale", torch.as_tensor(model.scaler.scale))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # In float64, like the scaler: a large offset must not swallow what varies beside it.
        x = ((rows.double() - self.shift) / self.scale).float()
        features = self.network.embed(x)
        logits = self.network.heads(features).unflatten(1, self.network.shape)
        return features, logits[:, self.best_head].softmax(1)


def to_exported_program(clusterer: Any) -> Any:
    """The fitted clusterer as a program of ``torch.export``, which needs none of this package.

    Parameters
    ----------
    clusterer : SelfLabelClusterer
        Fitted. It is not changed.

    Returns
    -------
    torch.export.ExportedProgram
        From raw rows, float32 of shape (n, n_features) or (n, channels, height, width), for any
        n, to (features, probabilities): what ``transform`` and ``predict_proba`` return of
        them, on the CPU. ``torch.export.save`` writes it.

    Raises
    ------
    Exception
        torch's own, for a ``backbone`` of one's own whose code it cannot trace.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from sklearn.datasets import load_iris
    >>> from sklearn_sela import SelfLabelClusterer, to_exported_program
    >>> X = load_iris().data
    >>> clusterer = SelfLabelClusterer(3, max_epochs=4, random_state=0).fit(X)
    >>> features, probabilities = to_exported_program(clusterer).module()(torch.tensor(X).float())
    >>> bool(np.allclose(probabilities.numpy(), clusterer.predict_proba(X), atol=1e-5))
    True
    """
    check_is_fitted(clusterer)
    model: Model = clusterer._model
    shape = model.scaler.image_shape or (model.n_values,)
    # Of one row, n would be taken for a constant.
    rows = torch.zeros(2, *shape, dtype=torch.float32)
    shapes = ({0: torch.export.Dim("n", min=1)},)
    return torch.export.export(_Graph(model), (rows,), dynamic_shapes=shapes, strict=False)


def to_onnx(clusterer: Any, path: Any) -> None:
    """Write the fitted clusterer as an ONNX model, for onnxruntime and other languages.

    Its input is ``rows``, raw, float32 of shape (n, n_features) or (n, channels, height, width),
    for any n; its outputs are ``features`` and ``probabilities``: what ``transform`` and
    ``predict_proba`` return of them.

    Parameters
    ----------
    clusterer : SelfLabelClusterer
        Fitted. It is not changed.
    path : str or Path
        Of the file; weights beyond 2 GB go into another beside it.

    Raises
    ------
    ImportError
        Without the extra ``onnx``.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("to_onnx needs onnxscript: pip install sklearn-sela[onnx].") from error
    check_is_fitted(clusterer)
    program: Any = torch.onnx.export(
        to_exported_program(clusterer),
        dynamo=True,
        input_names=["rows"],
        output_names=list(_OUTPUTS),
        verbose=False,
    )
    program.save(str(path))
