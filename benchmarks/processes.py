"""What more processes bring: throughput and quality of one fit over 1, 2 and 3 of them.

    python benchmarks/processes.py              # about seven minutes on two cores

The script starts itself anew under torchrun for each line, with one thread a process; the lines
take turns. Throughput is that of epochs: rows, over the median seconds of training and a solve.
Two fits at once that know nothing of each other show how much of two processes the machine gives.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from sklearn_sela import SelfLabelClusterer
from sklearn_sela.metrics import clustering_accuracy

ROWS, SIDE, EPOCHS, BATCH = 6_000, 28, 8, 512
SEEDS = 3


def images() -> np.ndarray:
    """(ROWS, SIDE, SIDE) images: digits enlarged and repeated, with noise of their own."""
    rng = np.random.default_rng(0)
    x = np.kron(load_digits().images, np.ones((4, 4)))[:, 2:-2, 2:-2]
    return (x[np.arange(ROWS) % len(x)] + rng.normal(size=(ROWS, SIDE, SIDE))).astype(np.float32)


def throughput() -> float:
    """Rows a second, of the epochs of a fit that have a label solve."""
    clusterer = SelfLabelClusterer(
        10, max_epochs=EPOCHS, batch_size=BATCH, random_state=0, n_neighbors=0
    )
    history = clusterer.fit(images()).history_
    return ROWS / history[history.solver_iterations > 0].seconds.median()


def accuracies() -> list[float]:
    digits = load_digits()
    clusterers = [SelfLabelClusterer(10, random_state=seed) for seed in range(SEEDS)]
    return [clustering_accuracy(digits.target, c.fit_predict(digits.images)) for c in clusterers]


def started(what: str, n: int, fits: int = 1) -> list[Any]:
    """The results of ``what`` in n processes of one thread each; of several such at once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*command, f"--nproc-per-node={n}"] if n > 1 else [sys.executable]
        outs = [Path(folder) / f"{fit}.json" for fit in range(fits)]
        running = [
            subprocess.Popen(
                [*command, __file__, "--what", what, "--out", str(out)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for out in outs
        ]
        assert not any(list(map(subprocess.Popen.wait, running)))
        return [json.loads(out.read_text()) for out in outs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=["throughput", "accuracies"])
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what:
        torch.set_num_threads(1)
        result = throughput() if arguments.what == "throughput" else accuracies()
        if os.environ.get("RANK", "0") == "0":
            Path(arguments.out).write_text(json.dumps(result))
        return
    ratios = []
    for _ in range(arguments.rounds):
        one, two, apart = (
            sum(started("throughput", n, fits)) for n, fits in ((1, 1), (2, 1), (1, 2))
        )
        ratios.append((two / one, apart / one))
        print(
            f"rows a second: one process {one:.0f}, two {two:.0f} ({two / one:.2f} times), two "
            f"fits apart {apart:.0f} ({apart / one:.2f} times)",
            flush=True,
        )
    two, apart = np.median(ratios, axis=0)
    print(f"medians: two processes {two:.2f} times one, two fits apart {apart:.2f}")
    for n in (1, 2, 3):
        (found,) = started("accuracies", n)
        listed = ", ".join(f"{accuracy:.3f}" for accuracy in found)
        print(f"digits, {n} process{'es' * (n > 1)}: ACC {listed}; median {np.median(found):.3f}")


if __name__ == "__main__":
    main()
