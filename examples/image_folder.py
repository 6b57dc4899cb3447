"""
Your own images
===============

Clusters the images of a folder, whatever their formats and sizes; writes the cluster of each file
to a table, and draws the most typical images of each cluster.

    python examples/image_folder.py FOLDER --n-clusters 10

Files that cannot be read are left out and listed.
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

from sklearn_sela import SelfLabelClusterer, image_paths

parser = argparse.ArgumentParser(description="Cluster the images of a folder.")
parser.add_argument("folder")
parser.add_argument("--n-clusters", type=int, default=10)
parser.add_argument("--size", type=int, default=32, help="pixels that images are scaled to")
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--checkpoint-dir", help="keeps the run, and resumes it")
parser.add_argument("--table", default="image_clusters.csv")
parser.add_argument("--picture", default="image_clusters.png")
options = parser.parse_args()

paths = image_paths(options.folder)
clusterer = SelfLabelClusterer(
    options.n_clusters,
    image_shape=(3, options.size, options.size),
    max_epochs=options.epochs,
    on_bad_image="skip",
    checkpoint_dir=options.checkpoint_dir,
    random_state=0,
    verbose=1,
).fit(paths)
for path in clusterer.skipped_:
    print(f"left out, as it cannot be read: {path}")

good = clusterer.labels_ >= 0
table = pd.DataFrame({"path": paths})[good]
proba = clusterer.predict_proba(table.path)
table["cluster"] = clusterer.labels_[good]
table["probability"] = proba.max(1).round(4)
table.to_csv(options.table, index=False)

# %%
# One row a cluster: its most certain images.
columns = 12
figure, axes = plt.subplots(
    options.n_clusters, columns, figsize=(columns * 0.8, options.n_clusters * 0.8), squeeze=False
)
for cluster, line in enumerate(axes):
    members = np.flatnonzero(table.cluster == cluster)
    members = members[np.argsort(-proba[members, cluster], kind="stable")]
    line[0].set_ylabel(
        f"cluster {cluster}\n{len(members)} images", rotation=0, ha="right", va="center", fontsize=8
    )
    for column, ax in enumerate(line):
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
        if column < len(members):
            with Image.open(table.path.iloc[members[column]]) as image:
                image.thumbnail((96, 96))
                ax.imshow(image.convert("RGB"))
figure.subplots_adjust(left=0.14, right=0.99, top=0.99, bottom=0.01, hspace=0.1)
figure.savefig(options.picture, dpi=150)
print(f"The clusters are in {options.table}, and drawn in {options.picture}")
