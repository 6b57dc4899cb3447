"""
ImageNet scale
==============

The paper's setting for a folder of many images: ResNet-50 or AlexNet, ten heads of 3,000 clusters
held equal, hard labels solved from one pass of views each. Measures a few steps first, and prints
how much time and memory the whole run will take; ``--estimate-only`` stops there.

    python examples/imagenet.py FOLDER --estimate-only
    python examples/imagenet.py FOLDER --checkpoint-dir run

``--checkpoint-dir`` keeps the run after every epoch; the same command resumes it. On several GPUs
it is ``torchrun --nproc-per-node=8 examples/imagenet.py FOLDER --checkpoint-dir run``.
"""

import argparse
import itertools
import os
import time

import joblib
import torch

from sklearn_sela import SelfLabelClusterer, image_paths, torchvision_state_dict

parser = argparse.ArgumentParser(description="Self-labelling of a large folder of images.")
parser.add_argument("folder")
parser.add_argument("--backbone", default="resnet50")
parser.add_argument("--size", type=int, default=224, help="pixels")
parser.add_argument("--n-clusters", type=int, default=3000)
parser.add_argument("--n-heads", type=int, default=10)
parser.add_argument("--epochs", type=int, default=400)
parser.add_argument("--n-solves", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--learning-rate", type=float, default=0.05)
parser.add_argument("--checkpoint-dir")
parser.add_argument("--estimate-only", action="store_true")
parser.add_argument("--output", default="backbone.pt", help="of the trained weights")
options = parser.parse_args()

paths = image_paths(options.folder)
n = len(paths)
first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun, the one that tells


def clusterer(**changes):
    parameters = {
        "n_clusters": options.n_clusters,
        "n_heads": options.n_heads,
        "over_clusters": None,
        "backbone": options.backbone,
        "image_shape": (3, options.size, options.size),
        "on_bad_image": "skip",
        "n_neighbors": 0,
        "init": "random",
        "cluster_sizes": "balanced",
        "soft_targets": False,
        "n_views": 1,
        "label_momentum": 0,
        "n_solves": options.n_solves,
        "reg": 1 / 25,
        "max_epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_schedule": "step",
        "weight_decay": 1e-4,
        "checkpoint_dir": options.checkpoint_dir,
        "random_state": 0,
        "verbose": 1,
    }
    return SelfLabelClusterer(**{**parameters, **changes})


# %%
# A short run on a few batches: an epoch of training, then one more with a label solve before it.
few = list(itertools.islice(itertools.cycle(paths), 4 * options.batch_size))
trial = {"n_clusters": min(options.n_clusters, len(few) // 4), "verbose": 0}
on_gpu = torch.cuda.is_available()
if on_gpu:
    torch.cuda.reset_peak_memory_stats()
start = time.perf_counter()
model = clusterer(max_epochs=2, n_solves=1, checkpoint_dir=None, **trial).fit(few)
if first:
    print(f"{n:,} images; measured on {len(few)} of them in {time.perf_counter() - start:.0f} s")
epoch, with_solve = model.history_.seconds / len(few) * n
start = time.perf_counter()
model.predict(few)  # reads and decodes each file, and looks at it once
reading = (time.perf_counter() - start) / len(few) * n
kept = n * 3 * options.size**2 <= 4 << 30  # decoded once, then read from a temporary file
if not kept:  # by threads, while a GPU learns; a CPU does both
    epoch, with_solve = (
        max(seconds, reading) if on_gpu else seconds + reading for seconds in (epoch, with_solve)
    )
hours = (options.epochs * epoch + options.n_solves * (with_solve - epoch)) / 3600
width = model.network_.heads.in_features
heads = options.n_heads * options.n_clusters
weights = sum(p.numel() for p in model.network_.backbone.parameters()) + (width + 1) * heads
labels = n * (min(heads, width) * 4 + options.n_heads * 8)
checkpoint = weights * 8 + n * options.n_heads * 8  # labels are hard
rows = {
    "reading and decoding all once": f"{reading / 60:,.1f} min",
    "an epoch of training": f"{epoch / 60:,.1f} min",
    "a label pass and solve": f"{max(with_solve - epoch, 0) / 60:,.1f} min",
    f"{options.epochs} epochs, {options.n_solves} solves": f"{hours:,.1f} h",
    "labels and what solves look at": f"{labels / 1e9:,.2f} GB on the device",
    "weights, gradients, momentum": f"{weights * 12 / 1e9:,.2f} GB on the device",
    "a checkpoint on disk": f"{checkpoint / 1e9:,.2f} GB",
}
if on_gpu:
    rows["peak of the trial, on the GPU"] = f"{torch.cuda.max_memory_allocated() / 1e9:,.2f} GB"
for name, value in rows.items() if first else ():
    print(f"{name:<36}{value:>24}")
if options.estimate_only:
    raise SystemExit

fitted = clusterer().fit(paths)
if first:
    torch.save(torchvision_state_dict(fitted, classifier=False), options.output)
    joblib.dump(fitted, f"{options.output}.joblib")
    print(f"The backbone is in {options.output}, the estimator in {options.output}.joblib")
