"""Deep clustering by self-labelling, with scikit-learn's API.

What is asked for is imported then: the labeller alone needs no scikit-learn, nor its memory.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sklearn_sela._clusterer import SelfLabelClusterer
    from sklearn_sela._export import torchvision_state_dict, torchvision_transform
    from sklearn_sela._graph import to_exported_program, to_onnx
    from sklearn_sela._images import image_paths
    from sklearn_sela._sinkhorn import SinkhornResult, sinkhorn_labels

__all__ = [
    "SelfLabelClusterer",
    "SinkhornResult",
    "image_paths",
    "sinkhorn_labels",
    "to_exported_program",
    "to_onnx",
    "torchvision_state_dict",
    "torchvision_transform",
]
__version__ = "0.1.0.dev0"

_FILES = {
    "SelfLabelClusterer": "_clusterer",
    "SinkhornResult": "_sinkhorn",
    "image_paths": "_images",
    "sinkhorn_labels": "_sinkhorn",
    "to_exported_program": "_graph",
    "to_onnx": "_graph",
    "torchvision_state_dict": "_export",
    "torchvision_transform": "_export",
}
_MODULES = ("display", "evaluation", "metrics")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_FILES, *_MODULES})
