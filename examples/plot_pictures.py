"""
Pictures of a clustering
========================

Four displays of the digits' clusters, in one figure.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sklearn.datasets import load_digits

from sklearn_sela import SelfLabelClusterer
from sklearn_sela.display import (
    ClusterGalleryDisplay,
    ClusterSizesDisplay,
    FeatureMapDisplay,
    TrainingCurveDisplay,
)

PICTURE = "digits_pictures.png"
X = load_digits().images
clusterer = SelfLabelClusterer(n_clusters=10, random_state=0, verbose=1).fit(X)

figure, axes = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")
ClusterGalleryDisplay.from_estimator(clusterer, X, cmap="gray_r", ax=axes[0, 0])
TrainingCurveDisplay.from_estimator(clusterer, ax=axes[0, 1])
ClusterSizesDisplay.from_estimator(clusterer, ax=axes[1, 0])
FeatureMapDisplay.from_estimator(clusterer, X, ax=axes[1, 1])
figure.savefig(PICTURE, dpi=100)
print(f"The pictures are in {PICTURE}")
