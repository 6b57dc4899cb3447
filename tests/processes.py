"""Work that real processes do once, two of them and then three, for many tests to look at."""

from __future__ import annotations

import datetime
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock

WORLDS = (2, 3)
_TIMEOUT = datetime.timedelta(seconds=300)  # the third process waits while two are at work


def by_processes(
    work: Callable[[int, int, Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[Any]]:
    """What ``work(rank, world, folder)`` gives on each process, for each number of them.

    Processes of pytest's own share what the first of them has had made.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / work.__module__
    results = folder / "results"
    with FileLock(f"{folder}.lock"):
        if not results.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            mp.spawn(_process, (work, folder), nprocs=max(WORLDS))
            found = {
                world: [
                    pickle.loads(_told(folder, world, rank).read_bytes()) for rank in range(world)
                ]
                for world in WORLDS
            }
            results.write_bytes(pickle.dumps(found))
        return pickle.loads(results.read_bytes())


def _process(rank: int, work: Callable[[int, int, Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for world in WORLDS:
        if rank < world:
            store = f"file://{folder}/store{world}"
            dist.init_process_group("gloo", store, _TIMEOUT, world, rank)
            _told(folder, world, rank).write_bytes(pickle.dumps(work(rank, world, folder)))
            dist.destroy_process_group()


def _told(folder: Path, world: int, rank: int) -> Path:
    return folder / f"{world}-{rank}"
