"""The label solver beside the published loop and POT, and beside the machine's memory.

    python benchmarks/sinkhorn.py                # the table, four sizes: about five minutes
    python benchmarks/sinkhorn.py 50000x128      # one size
    python benchmarks/sinkhorn.py --linear       # time per entry from 10^6 to 2 * 10^8 entries
    python benchmarks/sinkhorn.py --memmap 8     # a file of 8 GB, and the memory it takes
    python benchmarks/sinkhorn.py --oracle       # labels of real fits against a float64 oracle
    python benchmarks/sinkhorn.py --update       # reads of Sinkhorn, over-relaxed, ours, Newton

Each size is a process of its own, and every ratio is of times taken in it. The scores are
log-softmax of features times a head: (a mixture of Gaussians, 64 dimensions, unit length) times
(random unit vectors) times 10, about as sharp as a network's in the middle of its training.
The warm start is the potential of the same scores before 2 % noise. "memory" is the peak over the
scores themselves, them included; "GB/s" the speed of reading them, "used" how much of it an
iteration reaches. On a GPU the table has the paper's own size too, in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

SIZES = ["50000x10", "50000x128", "20000x3000", "200000x1000"]
GPU_SIZES = [*SIZES, "1281167x3000", "1281167x3000:bfloat16"]
REG, TOL = 0.04, 1e-3  # lambda = 25, the paper's; L1 error of the cluster shares
PEER_ENTRIES = 10_000_000  # POT is measured up to here: beyond, it takes many minutes


COLUMNS = [  # of the table, and their widths
    ("n x K", 23),
    ("cold ms (reads)", 17),
    ("warm ms (reads)", 17),
    ("memory", 8),
    ("GB/s", 6),
    ("used", 6),
    ("published s (its)", 19),
    ("/cold", 7),
    ("/warm", 7),
    ("POT log s, /cold", 18),
    ("POT stab. s, /cold", 20),
]


def line(cells: list[str]) -> str:
    return "".join(f"{cell:<{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=False))


def network_scores(n: int, k: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """(n, k) float32 log-probabilities, formed a block at a time: nothing else as large."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    centres, head = normal(max(10, k // 2), 64), normal(k, 64)
    head /= head.norm(dim=1, keepdim=True)
    out = torch.empty(n, k, device=device)
    for rows in torch.arange(n, device=device).split(max(1, (1 << 22) // k)):
        which = torch.randint(len(centres), (len(rows),), generator=g, device=device)
        features = centres[which] + normal(len(rows), 64)
        features /= features.norm(dim=1, keepdim=True)
        out[rows] = (10 * features @ head.T).log_softmax(1)
    return out


def changed(scores: torch.Tensor) -> torch.Tensor:
    """The scores after their head has changed by 2 %: noise of that relative size."""
    g = torch.Generator(scores.device).manual_seed(1)
    out = torch.empty_like(scores)
    for part, new in zip(scores.split(10_000), out.split(10_000), strict=True):
        noise = torch.randn(part.shape, generator=g, device=part.device)
        new.copy_((part + 0.02 * part.float().std() * noise).log_softmax(1))
    return out


def published_loop(log_p: np.ndarray) -> tuple[int, float]:
    """(iterations, seconds) of the authors' loop as published, in float64 on P ** lambda.

    It reads the matrix twice an iteration and stops when no row scaling changes any more, by
    0.1 in the sum over rows, looked at every tenth iteration.
    """
    start = time.perf_counter()
    p = np.exp(log_p.astype(np.float64)) ** (1 / REG)
    n, k = p.shape
    rows, error, iteration = np.full(n, 1 / n), np.inf, 0
    while error > 0.1:
        columns = (1 / k) / (rows @ p)
        new = (1 / n) / (p @ columns)
        if iteration % 10 == 0:
            error = np.nansum(np.abs(rows / new - 1))
        rows, iteration = new, iteration + 1
    return iteration, time.perf_counter() - start


def timed(function: Callable, repeats: int = 5, device: str = "cpu") -> tuple[float, object]:
    """Median seconds of several calls, and what the last returned."""
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), result


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since the last reset."""
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(size: str) -> None:
    """One row of the table."""
    from sklearn_sela import sinkhorn_labels
    from sklearn_sela._kernels import Ask, Reader
    from sklearn_sela._scores import Scores

    shape, _, dtype = size.partition(":")
    n, k = map(int, shape.split("x"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Compiled, and libraries' code of these shapes in memory, before we look.
    warm_up = network_scores(max(6000, -(-(1 << 18) // k)), k, device=device)
    sinkhorn_labels(warm_up, reg=REG, tol=TOL)
    scores = network_scores(n, k, device=device)
    scores = scores.to(getattr(torch, dtype or "float32"))
    nbytes = scores.nbytes
    if device == "cpu":
        reset_peak()
        before = resident()
        sinkhorn_labels(scores, reg=REG, tol=TOL)
        memory = 1 + (resident(peak=True) - before) / nbytes
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sinkhorn_labels(scores, reg=REG, tol=TOL)
        memory = 1 + (torch.cuda.max_memory_allocated() - before) / nbytes
    repeats = 15 if n * k < 1e7 else 5
    cold, result = timed(lambda: sinkhorn_labels(scores, reg=REG, tol=TOL), repeats, device)
    after = changed(scores)
    warm, rewarmed = timed(
        lambda: sinkhorn_labels(after, reg=REG, tol=TOL, potential=result.potential),
        repeats,
        device,
    )
    reader = Reader(Scores(scores), None, REG, TOL)
    ask = Ask(0, result.potential.cpu().numpy(), REG)
    reader.sums([ask])
    # In turn, so that both see the same machine; reading is a sum, copying on a GPU.
    ratios, bandwidths = [], []
    other = torch.empty_like(scores) if device == "cuda" else None
    for _ in range(repeats):
        read, _ = timed(lambda: scores.sum() if other is None else other.copy_(scores), 3, device)
        once, _ = timed(lambda: reader.sums([ask]), 3, device)
        moved = nbytes if other is None else 2 * nbytes
        bandwidths.append(moved / read)
        ratios.append((nbytes / once) / (moved / read))
    row = [
        size,
        f"{1e3 * cold:.1f} ({result.n_iter})",
        f"{1e3 * warm:.1f} ({rewarmed.n_iter})",
        f"{memory:.2f}",
        f"{np.median(bandwidths) / 1e9:.0f}",
        f"{np.median(ratios):.0%}",
    ]
    if device == "cpu":
        iterations, seconds = published_loop(scores.numpy())
        row += [f"{seconds:.2f} ({iterations})", f"{seconds / cold:.0f}", f"{seconds / warm:.0f}"]
        row += against_pot(scores.numpy(), cold) if n * k <= PEER_ENTRIES else ["-", "-"]
    print(line(row), flush=True)


def against_pot(log_p: np.ndarray, cold: float) -> list[str]:
    """Seconds of POT's solvers and over ours, to the same error: theirs is its L2 norm."""
    import ot

    n, k = log_p.shape
    cost, out = -log_p.astype(np.float64), []
    for name in ("sinkhorn_log", "sinkhorn_stabilized"):
        start = time.perf_counter()
        getattr(ot.bregman, name)(
            np.full(n, 1 / n), np.full(k, 1 / k), cost, REG, stopThr=TOL / k**0.5, warn=False
        )
        seconds = time.perf_counter() - start
        out.append(f"{seconds:.1f} / {seconds / cold:.0f}")
    return out


def linear(k: int) -> None:
    """Time per entry of cold solves with K clusters, sizes taking turns; exact sizes beside it.

    Each turn has scores of its own, so that no problem that takes a read less or more decides, and
    solves each size for about as long. "At first" are the solves right after those of other sizes,
    which have pushed all else out of the caches.
    """
    from sklearn_sela import sinkhorn_labels

    def solve(scores: torch.Tensor, exact_sizes: bool = False) -> Callable:
        return lambda: sinkhorn_labels(scores, reg=REG, tol=TOL, exact_sizes=exact_sizes)

    sizes = [entries // k for entries in (10**6, 10**7, 10**8, 2 * 10**8)]
    turns = []
    for seed in range(7):
        problems, turn = [network_scores(n, k, seed) for n in sizes], []
        for scores in problems:
            solve(scores)()  # memory and compiled code are made
        for scores in problems:
            first, _ = timed(solve(scores), 1)
            seconds, result = timed(solve(scores), 1 + 10**8 // scores.numel())
            turn.append(np.array([first, seconds]) * 1e9 / scores.numel())
            print(f"{turn[-1][1]:.2f} ns ({result.n_iter} reads)  ", end="", flush=True)
        turns.append(turn)
        print()
    at_first, each = np.moveaxis(turns, 2, 0)
    for i, scores in enumerate(problems):
        exact, rounded = timed(solve(scores, exact_sizes=True), 1)
        print(
            f"{len(scores):>9} x {k}: {np.median(each[:, i]):.2f} ns an entry, "
            f"{np.median(at_first[:, i]):.2f} at first; with exact sizes "
            f"{1e9 * exact / scores.numel():.2f}, at {rounded.rounding_cost:.1e} a sample",
            flush=True,
        )
    for name, times in (("", each), (" at first", at_first)):
        ratios = times.max(1) / times.min(1)
        middle = f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"
        print(f"longest over shortest{name}: {middle}")


def memmap(gigabytes: float) -> None:
    """A file of scores that is solved without holding it, by a process that does nothing else."""
    k, n = 1000, int(gigabytes * 1e9 / 4000)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        path = Path(folder) / "scores.npy"
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, k))
        part = network_scores(20_000, k).numpy()
        for start in range(0, n, len(part)):
            rows = file[start : start + len(part)]
            rows[:] = np.roll(part, start // len(part), axis=1)[: len(rows)]
        file.flush()
        subprocess.run([sys.executable, __file__, "--file", path], check=True)


def solve_file(path: str) -> None:
    from sklearn_sela import sinkhorn_labels

    scores = np.load(path, mmap_mode="r")
    before, start = resident(), time.perf_counter()
    result = sinkhorn_labels(scores, reg=REG, tol=TOL)
    print(
        f"{len(scores)} x {scores.shape[1]}, {scores.nbytes / 1e9:.1f} GB on disk: "
        f"{time.perf_counter() - start:.1f} s, {result.n_iter} reads, error "
        f"{result.marginal_error:.1e}, {before / 1e6:.0f} MB resident before, "
        f"{resident(peak=True) / 1e6:.0f} MB at most"
    )


def real_scores(dataset: str) -> dict[str, np.ndarray]:
    """What the solver was given early, in the middle and late in each round of a default fit."""
    from datasets import load
    from sklearn_sela import SelfLabelClusterer
    from sklearn_sela._labels import SelfLabels
    from sklearn_sela._network import SelfLabelNetwork

    given: list[np.ndarray] = []
    solve = SelfLabels.solve

    def record(self: SelfLabels, network: SelfLabelNetwork) -> None:
        given.append(self.scores[0].numpy().copy())
        solve(self, network)

    SelfLabels.solve = record
    try:
        SelfLabelClusterer(10, random_state=0).fit(load(dataset)[0])
    finally:
        SelfLabels.solve = solve
    half = len(given) // 2
    at = {"early": 0, "middle": half // 2, "late": half - 1}
    rounds = {"features": given[:half], "clusters": given[half:]}
    return {f"{r}, {name}": solves[i] for r, solves in rounds.items() for name, i in at.items()}


def oracle_plan(scores: np.ndarray, reg: float) -> np.ndarray:
    """Two-sided log-domain Sinkhorn in float64 to an L1 error of 1e-6, through a falling reg."""
    from scipy.special import logsumexp

    s, (n, k) = scores.astype(np.float64), scores.shape
    g, level = np.zeros(k), max(reg, np.ptp(s) / 8)
    while True:
        for _ in range(20_000):
            f = -level * (np.log(n) + logsumexp((s + g) / level, axis=1))
            new = -level * (np.log(k) + logsumexp((s + f[:, None]) / level, axis=0))
            error = np.abs(np.exp((g - new) / level) - 1).mean()  # of the column shares
            g = new
            if error <= (1e-6 if level == reg else 1e-3):
                break
        if level == reg:
            return np.exp((s + f[:, None] + g) / level) * n
        level = max(reg, level / 3)


def oracle() -> None:
    """Labels against the oracle's on real scores, away from ties."""
    from sklearn_sela import sinkhorn_labels

    for dataset in ("digits", "fashion"):
        for name, scores in real_scores(dataset).items():
            for reg in (0.2, 0.04):
                plan = oracle_plan(scores, reg)
                labels = sinkhorn_labels(scores, reg=reg).labels
                ranked = np.sort(plan, axis=1)
                clear = ranked[:, -1] - ranked[:, -2] > 0.01
                same = (labels == plan.argmax(1))[clear].mean()
                print(
                    f"{dataset:<8} {name:<17} {scores.shape[0]} x {scores.shape[1]}  reg {reg:<5}"
                    f" {same:.4%} of {clear.mean():.1%} of the rows agree",
                    flush=True,
                )


def update() -> None:
    """Reads of the scores until the L1 error is 1e-3, by update."""
    from sklearn_sela import _descent
    from sklearn_sela._kernels import Ask, Reader
    from sklearn_sela._scores import Scores

    def reads(scores: torch.Tensor, method: str) -> int | None:
        reader, k = Reader(Scores(scores), None, REG, TOL), scores.shape[1]
        marginal, used = _descent.Exact(np.full(k, 1 / k)), np.ones(k, dtype=bool)
        problem = _descent._Problem(marginal, used, math.inf, False)
        start = Ask(0, np.zeros(k), REG)
        if method == "Newton":
            solver = _descent._newton(start, problem, TOL, 1000)
        elif method == "ours":
            solver = _descent._descend(start, problem, np.array([TOL]), 1000)
        else:
            factor = {"Sinkhorn": 1.0, "over-relaxed by 1.5": 1.5}[method]
            for n in range(1, 1001):
                m = reader.sums([start])[0].m
                if np.abs(m - marginal.c).sum() <= TOL:
                    return n
                step = REG * np.log(marginal.c / m)
                start = start._replace(v=start.v + factor * step)
            return None
        ask = next(solver)
        while True:
            try:
                ask = solver.send(reader.sums([ask])[0])
            except StopIteration as stop:
                return stop.value[1]

    methods = ("Sinkhorn", "over-relaxed by 1.5", "ours", "Newton")
    print(f"{'':<30}" + "".join(f"{method:>22}" for method in methods))
    problems = {size: network_scores(*map(int, size.split("x"))) for size in SIZES[:3]}
    for size in SIZES[:2]:
        n, k = map(int, size.split("x"))
        problems[f"{size} sharp"] = (5 * torch.randn(n, k)).log_softmax(1)
    for name, scores in problems.items():
        wide = scores.shape[1] > 1024
        counts = [None if wide and m == "Newton" else reads(scores, m) for m in methods]
        print(f"{name:<30}" + "".join(f"{c if c else '-':>22}" for c in counts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*")
    parser.add_argument("--linear", type=int, nargs="?", const=100, metavar="K")
    parser.add_argument("--memmap", type=float, metavar="GB")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one)
    elif options.file:
        solve_file(options.file)
    elif options.linear:
        linear(options.linear)
    elif options.memmap:
        memmap(options.memmap)
    elif options.oracle:
        oracle()
    elif options.update:
        update()
    else:
        if torch.cuda.is_available():
            print(torch.cuda.get_device_name())
        print(line([name for name, _ in COLUMNS]), flush=True)
        for size in options.sizes or (GPU_SIZES if torch.cuda.is_available() else SIZES):
            subprocess.run([sys.executable, __file__, "--one", size], check=True)


if __name__ == "__main__":
    main()
