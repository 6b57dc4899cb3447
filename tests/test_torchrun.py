"""Fits that torchrun starts: killed, restarted, resumed; and what their processes start."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch.distributed as dist

from sklearn_sela._distributed import fresh_store, launched

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and hasattr(os, "fork")), reason="needs torch.distributed and POSIX"
)
KILLS = int(os.environ.get("KILLS", "1"))  # more take minutes

TRAIN = """
import os, sys
import numpy as np
from sklearn.datasets import load_digits
from sklearn_sela import SelfLabelClusterer

def shift(x):
    global batches
    batches += 1
    if batches == 40 and os.environ["RANK"] == "1" and os.environ["DIES"] == here():
        os.kill(os.getpid(), 9)
    return x + 0.1

def here():
    return os.environ["TORCHELASTIC_RESTART_COUNT"]

batches, rank = 0, os.environ["RANK"]
open(f"pid{rank}", "w").write(str(os.getpid()))
X = load_digits().images[:300]
clusterer = SelfLabelClusterer(
    10, max_epochs=16, random_state=0, checkpoint_dir="run", augment=shift, verbose=1
)
np.save(f"labels{rank}.npy", clusterer.fit(X).labels_)
if "COMPARE" in os.environ:
    clusterer.set_params(checkpoint_dir=None, verbose=0)
    np.save("undisturbed.npy", clusterer.fit(X).labels_)
"""


def torchrun(script, folder, *options, **environment):
    """A process that has begun to run the script in two, in a folder."""
    (folder / "train.py").write_text(script)
    for old in folder.glob("pid*"):
        old.unlink()
    # A port of its own: two runs on torchrun's usual one would wait for each other's processes.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, *options, "train.py"],
        cwd=folder,
        env={**os.environ, "DIES": "never", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pids(folder, seconds=60):
    """Of both processes, once they have begun."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [folder / f"pid{rank}" for rank in range(2)]
        if all(path.exists() and path.read_text() for path in found):
            return [int(path.read_text()) for path in found]
        time.sleep(0.02)
    raise AssertionError("the processes did not begin")


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_as_if_undisturbed(folder):
    for rank in range(2):
        labels = np.load(folder / f"labels{rank}.npy")
        np.testing.assert_array_equal(labels, np.load(folder / "undisturbed.npy"))


def test_killed_processes_end_the_job_and_the_same_command_resumes(tmp_path):
    draw, resumed = random.Random(0), 0
    for i in range(KILLS):
        while True:  # until a process is killed before the fit has ended
            run, rank = torchrun(TRAIN, tmp_path), draw.randrange(2)
            both = pids(tmp_path)
            time.sleep(draw.uniform(0, 6))
            with contextlib.suppress(ProcessLookupError):
                os.kill(both[rank], signal.SIGKILL)
            out, _ = run.communicate(timeout=60)  # far less than torch's own 30 minutes
            if run.returncode:
                break
            for old in [*tmp_path.glob("run/*"), *tmp_path.glob("labels*")]:
                old.unlink()
        assert f"rank      : {rank} " in out, out
        assert "Signal 9 (SIGKILL)" in out, out
        assert not any(map(is_alive, both))
        resumed += (tmp_path / "run" / "features.pt").exists()
        print(f"kill {i}: of rank {rank}, {out.count('epoch ')} epochs told")
    run = torchrun(TRAIN, tmp_path, COMPARE="yes")
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0, out
    assert out.count("epoch ") == 16  # the first process alone prints
    assert_as_if_undisturbed(tmp_path)
    print(f"{KILLS} kills, {resumed} of them with something to resume")


def test_torchrun_restarts_and_the_run_goes_on(tmp_path):
    run = torchrun(TRAIN, tmp_path, "--max-restarts=1", DIES="0", COMPARE="yes")
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0, out
    assert out.count("epoch ") > 16  # those before the end of the first attempt, twice
    assert_as_if_undisturbed(tmp_path)


def is_alone():
    return launched().alone


def test_a_process_that_one_of_torchruns_starts_is_alone(monkeypatch):
    told = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(is_alone).result(timeout=100)


def joined(store, order):
    """How many are in the part of a store that each process gets, by the order they come in."""
    with ThreadPoolExecutor(len(order)) as pool:
        coming = []
        for rank in order:
            coming.append(pool.submit(fresh_store, store, rank, len(order)))
            time.sleep(0.1)
        return [part.result().add("here", 1) for part in coming]


@pytest.mark.parametrize("order", [(0,), (0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_restarted_process_does_not_meet_those_of_the_attempt_before(order):
    store = dist.HashStore()  # kept over restarts, as torchrun's is
    for _ in range(3):
        assert joined(store, order) == list(range(1, 1 + len(order)))


def test_an_attempt_that_ended_before_all_had_come_is_forgotten():
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.5))
    with pytest.raises(dist.DistStoreError):
        fresh_store(store, 0, 3)
    assert joined(store, (1, 0, 2)) == [1, 2, 3]


def test_a_process_does_not_wait_for_the_first_for_ever():
    store = dist.HashStore()
    joined(store, (0, 1))
    store.set_timeout(datetime.timedelta(seconds=0.3))
    with pytest.raises(TimeoutError, match="rank 1"):
        fresh_store(store, 1, 2)
