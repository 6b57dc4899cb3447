"""What the package adds to bare torch: training steps, label solves, predictions.

    python benchmarks/throughput.py                 # the default convnet: about two minutes
    python benchmarks/throughput.py --backbone resnet18 --rounds 3    # about ten on two cores

Ours and the bare loop take turns, epoch by epoch, in one process; the table has the median of
their ratios. The bare loop is what one would write by hand for the same step: gather, scale,
augment, forward, cross-entropy of several heads against soft targets, backward, SGD.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from sklearn_sela import SelfLabelClusterer
from sklearn_sela._augment import PhotoAugment
from sklearn_sela._backbones import feature_width, make_backbone
from sklearn_sela._data import Rows, Scaler
from sklearn_sela._labels import SelfLabels
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._training import Schedule, self_label
from sklearn_sela._views import Views

HEADS, CLUSTERS, BATCH, RATE, DECAY = 3, 50, 128, 0.05, 5e-4
SCHEDULE = Schedule(
    epochs=2,
    batch_size=BATCH,
    label_rows=512,
    learning_rate=RATE,
    weight_decay=DECAY,
    lr_schedule="one_cycle",
    n_views=0,
    n_solves=1,
)


def build(X: np.ndarray, backbone: str) -> SelfLabelNetwork:
    torch.manual_seed(0)
    module = make_backbone(backbone, X.shape[1:])
    rows = Rows(X, Scaler(X, X.shape[1:]), torch.device("cpu"))
    width = feature_width(module, rows[slice(0, 2)])
    return SelfLabelNetwork(module, width, HEADS, CLUSTERS)


def ours(X: np.ndarray, backbone: str) -> tuple[float, float]:
    """Seconds of an epoch without a label solve, and of one with it."""
    network, generator = build(X, backbone), torch.Generator().manual_seed(0)
    rows = Rows(X, Scaler(X, X.shape[1:]), torch.device("cpu"))
    neighbors = torch.randint(len(X), (len(X), 10), dtype=torch.int32)
    views = Views(rows, PhotoAugment(generator), neighbors, 0.7, generator)
    start = torch.randint(CLUSTERS, (HEADS, len(X)))
    weights = torch.full((HEADS, CLUSTERS), 1 / CLUSTERS, dtype=torch.float64)
    labels = SelfLabels(start, weights, 0.2, np.inf, True, 0.5)
    first, second = self_label(network, views, labels, SCHEDULE, generator)
    return first[0]["seconds"], second[0]["seconds"]


def bare(X: np.ndarray, backbone: str) -> float:
    """Seconds of the same epoch by hand."""
    network, generator = build(X, backbone), torch.Generator().manual_seed(0)
    augment = PhotoAugment(generator)
    scaler = Scaler(X, X.shape[1:])
    shift, scale = (torch.as_tensor(a, dtype=torch.float32) for a in (scaler.shift, scaler.scale))
    images, targets = torch.from_numpy(X), torch.rand(len(X), HEADS, CLUSTERS).softmax(2)
    sgd = torch.optim.SGD(
        network.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=DECAY, fused=True
    )
    network.train()
    start = time.perf_counter()
    for rows in torch.randperm(len(X)).split(BATCH):
        x = (images[rows].float() - shift) / scale
        x = augment(x.contiguous(memory_format=torch.channels_last))
        loss = -(targets[rows] * network(x).log_softmax(2)).sum(2).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return time.perf_counter() - start


def prediction(X: np.ndarray, backbone: str, rounds: int) -> list[float]:
    """Throughput of ``predict`` over that of the bare forward pass, in turns."""
    quick = {"max_epochs": 1, "over_clusters": None, "n_neighbors": 0, "init": "random"}
    clusterer = SelfLabelClusterer(10, backbone=backbone, random_state=0, **quick).fit(X[:512])
    network, scaler = clusterer.network_, Scaler(X, X.shape[1:])
    shift, scale = (torch.as_tensor(a, dtype=torch.float32) for a in (scaler.shift, scaler.scale))
    images, ratios = torch.from_numpy(X), []
    for _ in range(rounds):
        start = time.perf_counter()
        clusterer.predict(X)
        middle = time.perf_counter()
        with torch.inference_mode():
            for part in images.split(256):
                x = (part.float() - shift) / scale
                network(x.contiguous(memory_format=torch.channels_last)).softmax(2).argmax(2)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=["convnet", "resnet18"], action="append")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"3 x 32 x 32 images, {HEADS} heads of {CLUSTERS}, batches of {BATCH}, CPU")
    print(f"{'backbone':<10} {'ours / bare step':>17} {'label solve':>12} {'predict / bare':>15}")
    for backbone in options.backbone or ["convnet"]:
        n = 5_120 if backbone == "convnet" else 256
        X = np.random.default_rng(0).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        steps, solves = [], []
        ours(X, backbone), bare(X, backbone)  # threads start, memory is found
        for _ in range(options.rounds):
            epoch, solved = ours(X, backbone)
            steps.append(epoch / bare(X, backbone))
            solves.append(solved / epoch - 1)
        predicted = prediction(X, backbone, options.rounds)
        median = [np.median(a) for a in (steps, solves, predicted)]
        print(
            f"{backbone:<10} {median[0]:>17.2f} {median[1]:>12.1%} {median[2]:>15.2f}", flush=True
        )


if __name__ == "__main__":
    main()
