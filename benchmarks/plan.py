"""How long ImageNet, and a billion images, would take on 1, 8 and 64 devices.

    python benchmarks/plan.py                     # measures this machine's device: five minutes
    python benchmarks/plan.py --train 2500 --look 8000 --solve 4e13      # a device told of

Measures on one device: images a second of training and of a label pass (the paper's setting: a
ResNet-50, ten heads of 3,000 clusters), and operations a second of the label solve from features.
Derives, from these, from the bytes that processes exchange, and from the links' bandwidth, what
an epoch takes and where it goes. docs/distributed.rst has the tables and explains them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import pandas as pd
import torch

from sklearn_sela import sinkhorn_labels
from sklearn_sela._backbones import make_backbone
from sklearn_sela._network import SelfLabelNetwork

HEADS, CLUSTERS, WIDTH, SIDE = 10, 3_000, 2_048, 224
WEIGHTS = 23_508_032 + (WIDTH + 1) * HEADS * CLUSTERS  # of ResNet-50 without its last layer, heads
READS = 8  # of the scores by a solve that starts from the last potential
LATENCY = 2e-3  # seconds of a sum of 2 K numbers over processes, gloo between two
SIZES = {"ImageNet": 1_281_167, "a billion": 1_000_000_000}
DEVICES = (1, 8, 64)


def rate(step: Callable[[], object], amount: float, seconds: float) -> float:
    """Amount a second of a step, repeated for about so many seconds."""
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        done += 1
    return amount * done / (time.perf_counter() - start)


def measured() -> dict[str, float]:
    """Images a second learned and looked at; operations a second of a solve."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    batch, rows = (256, 200_000) if on_gpu else (16, 4_000)
    backbone = make_backbone("resnet50", (3, SIDE, SIDE))
    network = SelfLabelNetwork(backbone, WIDTH, HEADS, CLUSTERS).to(device)
    network.to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, fused=True)
    x = torch.randn(batch, 3, SIDE, SIDE, device=device).to(memory_format=torch.channels_last)
    precision = torch.bfloat16 if on_gpu else torch.float32

    def learn() -> None:
        with torch.autocast(device.type, precision, enabled=on_gpu):
            loss = network(x).log_softmax(2)[:, :, 0].mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()

    @torch.no_grad()
    def look() -> None:
        with torch.autocast(device.type, precision, enabled=on_gpu):
            network.embed(x)

    found = {"train": rate(learn, batch, 30)}
    network.eval()
    found["look"] = rate(look, batch, 30)
    features = torch.randn(rows, WIDTH, device=device)
    head = torch.randn(CLUSTERS, WIDTH, device=device) / WIDTH**0.5, None
    reads = sinkhorn_labels(features, head=head, warn=False).n_iter + 1  # and one for the labels
    operations = 2.0 * rows * WIDTH * CLUSTERS * reads
    found["solve"] = rate(lambda: sinkhorn_labels(features, head=head, warn=False), operations, 30)
    return found


def plan(
    n: int, devices: int, speed: dict[str, float], batch: int, links: float, disk: float
) -> dict:
    """Of an epoch with a label solve before it; sizes are of one device, or process."""
    own = n / devices
    steps = n / (batch * devices)
    # A ring sends and receives each gradient twice, but for its own part.
    traffic = 2 * (devices - 1) / devices * 4 * WEIGHTS
    # Hard labels, weights and momentum: the first process writes them while the others wait.
    checkpoint = n * HEADS * 8 + 8 * WEIGHTS
    sums = (READS + 1) * HEADS * LATENCY if devices > 1 else 0.0
    minutes = {
        "train": own / speed["train"] / 60,
        "gradients": steps * traffic / links / 60,
        "look": own / speed["look"] / 60,
        "solve": 2 * own * WIDTH * CLUSTERS * HEADS * (READS + 1) / speed["solve"] / 60,
        "sums": sums / 60,
        "checkpoint": checkpoint / disk / 60,
    }
    total = sum(minutes.values())
    shared = minutes["train"] + minutes["look"] + minutes["solve"]
    alone = shared * devices + minutes["checkpoint"]
    return {
        **{f"{name}, min": f"{value:,.2f}" for name, value in minutes.items()},
        "epoch, h": f"{total / 60:,.2f}",
        "efficiency": f"{alone / (total * devices):.0%}",
        "features, GB": f"{own * WIDTH * 4 / 1e9:,.1f}",
        "labels of all, GB": f"{n * HEADS * 8 / 1e9:,.1f}",
        "checkpoint, GB": f"{checkpoint / 1e9:,.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=float, help="images a second, instead of measuring")
    parser.add_argument("--look", type=float, help="images a second of a label pass")
    parser.add_argument("--solve", type=float, help="operations a second of the label solve")
    parser.add_argument("--batch", type=int, default=256, help="images a device and step")
    parser.add_argument("--links", type=float, default=40e9, help="bytes a second of a device")
    parser.add_argument("--disk", type=float, default=1e9, help="bytes a second of checkpoints")
    options = parser.parse_args()
    told = {name: getattr(options, name) for name in ("train", "look", "solve")}
    speed = told if all(told.values()) else measured()
    for name, value in speed.items():
        print(f"{name:<6} {value:.3g} {'operations' if name == 'solve' else 'images'} a second")
    for name, n in SIZES.items():
        table = {p: plan(n, p, speed, options.batch, options.links, options.disk) for p in DEVICES}
        print(f"\n{name}, devices:\n{pd.DataFrame(table).to_string()}")


if __name__ == "__main__":
    main()
