"""Resident memory of a fit to image files, by their number.

    python benchmarks/files.py                 # 1,000 and 100,000 paths: about five minutes
    python benchmarks/files.py 1000 10000

Each fit and its predictions run in a process of their own; the files, a thousand JPEGs of
96 x 72 pixels, are used again and again. Linux: peaks are read from /proc.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

FILES = 1000


def write(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(FILES):
        small = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 72), Image.Resampling.BICUBIC).save(
            folder / f"{i:04d}.jpg"
        )


def resident() -> float:
    """MB that this process holds in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def fit(folder: str, n: int) -> tuple[float, float]:
    """(peak MB, seconds) of a fit to n paths and of their predictions."""
    from sklearn_sela import SelfLabelClusterer, image_paths

    warnings.simplefilter("ignore")
    paths = (image_paths(folder) * (n // FILES + 1))[:n]
    peak, stop, start = [0.0], threading.Event(), time.perf_counter()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = SelfLabelClusterer(
        10, n_heads=1, max_epochs=1, over_clusters=None, image_shape=(3, 16, 16), random_state=0
    )
    assert len(model.fit(paths).predict(paths)) == n
    stop.set()
    watcher.join()
    return peak[0], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=int, default=[1_000, 100_000])
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of a process of its own
    options = parser.parse_args()
    if options.folder:
        print(*fit(options.folder, options.paths[0]))
        return
    print(f"{'paths':>8} {'peak MB':>8} {'seconds':>8}")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for n in options.paths:
            command = [sys.executable, __file__, str(n), "--folder", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peak, seconds = map(float, done.stdout.split())
            print(f"{n:>8,} {peak:>8.0f} {seconds:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
