"""Deep clustering by self-labelling, with scikit-learn's API."""

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
