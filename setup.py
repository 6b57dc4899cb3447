"""Name, version, dependencies and extras; build system and tools' settings: pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "sklearn_sela/__init__.py").read_text())[1]

plots = ["matplotlib>=3.8"]  # the demo's picture
progress = ["rich>=13"]  # the demo's progress bar
onnx = ["onnx>=1.16", "onnxscript>=0.2"]  # models for other runtimes
fast = ["numba>=0.61"]  # label solves at the speed of memory on a CPU
setup(
    name="sklearn-sela",
    version=version,
    description="Deep clustering by self-labelling (SeLa) with scikit-learn's API",
    long_description=(here / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    license="BSD-3-Clause",
    python_requires=">=3.11",
    packages=["sklearn_sela"],
    package_data={"sklearn_sela": ["py.typed", "documentation.html"]},
    install_requires=[
        "scikit-learn>=1.9",  # the API we implement, its callbacks; k-means, PCA, neighbours
        "torch>=2.6",  # networks, automatic differentiation, devices
        "torchvision>=0.21",  # image backbones
        "safetensors>=0.4",  # fitted estimators in files from which no code can run
        "pillow>=10.1",  # image files of all formats; torchvision's own dependency
        "numpy>=1.26",  # arrays in and out
        "scipy>=1.11",  # assignment for accuracy, the test for equal sizes
        "joblib>=1.3",  # parallel searches and persistence, as scikit-learn's users expect
        "pandas>=2.1",  # history_ and DataFrames in
        "threadpoolctl>=3.5",  # one OpenMP thread where the order of sums decides bits
    ],
    extras_require={
        "plots": plots,
        "progress": progress,
        "fast": fast,
        "onnx": onnx,
        "benchmark": [  # the peers measured in the same run
            *fast,
            "umap-learn>=0.5.7",
            "POT>=0.9.5",
            "kornia>=0.8",
        ],
        "test": [
            *plots,
            *progress,
            *fast,
            *onnx,
            "onnxruntime>=1.18",  # reads what is exported
            "polars>=1",  # frames other than pandas'
            "distributed>=2024.1",  # Dask, where searches may run
            "pytest>=8",
            "hypothesis>=6.100",  # properties of the solver
            "pytest-xdist>=3.5",  # both cores
            "filelock>=3.12",  # what one of them has made, for the other; torch has it too
        ],
        "lint": ["ruff>=0.9", "codespell>=2.3", "mypy>=1.14", "pandas-stubs"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
