"""The examples, as people run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.models import get_model

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, folder, *options):
    command = [sys.executable, EXAMPLES / name, *map(str, options)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A folder of 40 images of two kinds."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        pixels = noise(i, 24, 30, 3) // 4 + np.uint8(150) * (i % 2)
        Image.fromarray(pixels).save(images / f"{i:02d}.png")
    return images


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("plot_*.py")), ids=lambda e: e.name)
def test_examples_draw_their_picture(example, tmp_path):
    run(example.name, tmp_path, *[1] * (example.name == "plot_choose_k.py"))  # of 3 seeds
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000


def test_own_folder_gives_a_table_and_a_picture(folder, tmp_path):
    (folder / "broken.jpg").write_bytes(b"no image")
    printed = run("image_folder.py", tmp_path, folder, "--n-clusters", 2, "--epochs", 4)
    assert "broken.jpg" in printed
    table = pd.read_csv(tmp_path / "image_clusters.csv")
    assert len(table) == 40
    assert set(table.cluster) <= {0, 1}
    assert table.probability.between(0.5, 1).all()
    assert (tmp_path / "image_clusters.png").stat().st_size > 10_000


def test_large_folder_tells_time_and_memory_then_trains(folder, tmp_path):
    small = ["--backbone", "resnet18", "--size", 16, "--n-clusters", 4, "--n-heads", 2]
    small += ["--epochs", 2, "--n-solves", 1, "--batch-size", 8]
    estimate = run("imagenet.py", tmp_path, folder, *small, "--estimate-only")
    for row in ("an epoch of training", "2 epochs, 1 solves", "GB on the device", "checkpoint"):
        assert row in estimate
    assert not list(tmp_path.glob("*.pt"))
    run("imagenet.py", tmp_path, folder, *small, "--checkpoint-dir", "run")
    assert (tmp_path / "run/clusters.pt").exists()
    weights = torch.load(tmp_path / "backbone.pt", weights_only=True)
    body = get_model("resnet18")
    body.fc = torch.nn.Identity()
    body.load_state_dict(weights, strict=True)


def test_cifar10_prints_probes_beside_pixels_and_random_weights(tmp_path):
    package = tmp_path / "data/package"
    package.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        Image.fromarray(noise(i, 20, 1024, 3)).save(package / f"{name}.png")
    for split, n in (("train", 100), ("test", 20)):
        labels = (np.arange(n) % 10).tolist()
        (package / f"{split}_lables.json").write_text(json.dumps(labels))
    small = ["--images", 90, "--epochs", 2, "--over-clusters", 11]
    printed = run("cifar10.py", tmp_path, "--data", "data", *small)
    for row in ("raw pixels", "random weights, seed 0", "SelfLabelClusterer, seed 0"):
        assert row in printed
