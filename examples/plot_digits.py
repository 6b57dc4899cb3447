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
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from sklearn_sela import SelfLabelClusterer
from sklearn_sela.display import ClusterGalleryDisplay
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
# One row a cluster: its most typical images, then, set apart, its least typical ones.
display = ClusterGalleryDisplay.from_estimator(clusterer, digits.images, cmap="gray_r")
display.ax_.set_title("Handwritten digits, clustered without labels", fontsize=11)
display.figure_.savefig(PICTURE, dpi=150)
print(f"\nThe clusters are drawn in {PICTURE}")
