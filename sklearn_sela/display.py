"""Pictures of a clustering, in the shape of scikit-learn's Display classes.

Each is made by ``from_estimator`` or from plain arrays, draws itself in ``plot(ax=)``, and keeps
what it drew. matplotlib (the extra ``plots``) is imported when something is drawn.
"""

from sklearn_sela._charts import ClusterSizesDisplay, TrainingCurveDisplay
from sklearn_sela._feature_map import FeatureMapDisplay
from sklearn_sela._gallery import ClusterGalleryDisplay

__all__ = [
    "ClusterGalleryDisplay",
    "ClusterSizesDisplay",
    "FeatureMapDisplay",
    "TrainingCurveDisplay",
]
