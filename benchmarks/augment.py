"""Views of colour images: ours beside torchvision's and kornia's, images a second.

    python benchmarks/augment.py [--size 32] [--device cpu]

Random resized crop, flip, colour jitter and greyscale, drawn for each image. torchvision's v2
transforms draw once for a batch, so they are called image by image.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import kornia.augmentation as K
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from sklearn_sela._augment import PhotoAugment

AREA, RATIO, JITTER, HUE, GREY = (0.25, 1.0), (3 / 4, 4 / 3), 0.4, 0.1, 0.2


def ways(size: int, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    one = v2.Compose(
        [
            v2.RandomResizedCrop(size, AREA, RATIO, antialias=False),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(JITTER, JITTER, JITTER, HUE),
            v2.RandomGrayscale(GREY),
        ]
    )
    many = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), AREA, RATIO),
        K.RandomHorizontalFlip(),
        K.ColorJitter(JITTER, JITTER, JITTER, HUE),
        K.RandomGrayscale(p=GREY),
    )
    return {
        "ours, a batch": PhotoAugment(torch.Generator(device).manual_seed(0), flip=True),
        "kornia, a batch": many,
        "torchvision v2, image by image": lambda x: torch.stack([one(image) for image in x]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    size, device = options.size, options.device
    torch.manual_seed(0)
    x = torch.rand(options.batch, 3, size, size, device=device)
    seconds: dict[str, list[float]] = {}
    made = ways(size, device)
    for _ in range(options.rounds):  # in turns: the machine may be busy
        for name, way in made.items():
            start = time.perf_counter()
            way(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    best = min(map(np.median, seconds.values()))
    print(f"{options.batch} images of 3 x {size} x {size}, {device}")
    for name, taken in seconds.items():
        median = float(np.median(taken))
        print(f"{name:<32}{math.floor(options.batch / median):>9,} images/s {median / best:>6.1f}x")


if __name__ == "__main__":
    main()
