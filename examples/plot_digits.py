"""
Clusters of handwritten digits
==============================

Fits :class:`~sklearn_sela.SelfLabelClusterer` to the 1,797 digits that ship with
scikit-learn, beside KMeans, and draws the most typical images of each cluster. The classes
serve only to judge the result.
"""

import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from sklearn_sela import SelfLabelClusterer
from sklearn_sela.metrics import clustering_accuracy

PICTURE = "digits_clusters.png"
digits = load_digits()


def row(name, model, X):
    """Fit, and describe the result in one line."""
    start = time.perf_counter()
    labels = model.fit(X).labels_
    seconds = time.perf_counter() - start
    y = digits.target
    return (
        f"{name:<20}{clustering_accuracy(y, labels):>10.3f}"
        f"{normalized_mutual_info_score(y, labels):>8.3f}"
        f"{adjusted_rand_score(y, labels):>8.3f}{seconds:>9.1f}"
    )


clusterer = SelfLabelClusterer(n_clusters=10, random_state=0, verbose=1)
rows = [
    row("SelfLabelClusterer", clusterer, digits.images),
    row("KMeans", KMeans(n_clusters=10, n_init=10, random_state=0), digits.data),
]
print(f"\n{'digits (1,797 x 8 x 8)':<23}{'accuracy':>7}{'NMI':>8}{'ARI':>8}{'seconds':>9}")
print("\n".join(rows))

# %%
# One row a cluster: its most certain images, then, set apart, its least certain ones.
proba = clusterer.predict_proba(digits.images)
labels = clusterer.labels_
columns = [*range(10), None, *range(-5, 0)]
figure, axes = plt.subplots(10, len(columns), figsize=(8.5, 6.4))
for cluster, line in enumerate(axes):
    members = np.flatnonzero(labels == cluster)
    members = members[np.argsort(-proba[members, cluster], kind="stable")]
    line[0].set_ylabel(
        f"cluster {cluster}\n{len(members)} images", rotation=0, ha="right", va="center", fontsize=8
    )
    for ax, column in zip(line, columns, strict=True):
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
        if column is not None and len(members) > abs(column):
            ax.imshow(digits.images[members[column]], cmap="gray_r")
axes[0, 0].set_title("most certain", loc="left", fontsize=9)
axes[0, 11].set_title("least certain", loc="left", fontsize=9)
figure.suptitle("Handwritten digits, clustered without labels", fontsize=11)
figure.subplots_adjust(left=0.14, right=0.99, top=0.9, bottom=0.01, hspace=0.1)
figure.savefig(PICTURE, dpi=150)
print(f"\nThe clusters are drawn in {PICTURE}")
