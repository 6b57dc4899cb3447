"""
How many clusters?
==================

Compares numbers of clusters with :class:`~sklearn_sela.SelfLabelClusterer`, with no class
known, and draws the score of each, with its spread over seeds. For your own data, change the
line that loads ``X``: images, (n, height, width) or (n, channels, height, width), or a table.

    python examples/plot_choose_k.py [SEEDS]
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from sklearn.datasets import load_digits

from sklearn_sela import SelfLabelClusterer

X = load_digits().images

PICTURE = "n_clusters.png"
SEEDS = int(sys.argv[1]) if sys.argv[1:] else 3

fits = []
for seed in range(SEEDS):
    fit = SelfLabelClusterer(n_clusters="auto", random_state=seed).fit(X)
    best = fit.n_clusters_scores_.nlargest(3, "support")
    sure = ", ".join(f"{row.n_clusters} ({row.support:.0%})" for row in best.itertuples())
    print(f"seed {seed}: {fit.n_clusters_} clusters; best in resamples of the data: {sure}")
    fits.append(fit)
table = pd.concat([fit.n_clusters_scores_ for fit in fits])
scores = table.groupby("n_clusters").score.agg(["median", "min", "max"])
chosen = sorted(fit.n_clusters_ for fit in fits)
print(f"\n{SEEDS} seeds choose {chosen}; median score by number of clusters:")
print(scores["median"].nlargest(5).round(3).to_string())

# %%
# Above, the score; below, what it is made of. A clear peak is a clear choice; where the curve
# is flat, the data leave one.
figure, (upper, lower) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
upper.fill_between(scores.index, scores["min"], scores["max"], alpha=0.25, lw=0, color="C0")
upper.plot(
    scores.index, scores["median"], "o-", ms=4, color="C0", label="median and range of seeds"
)
for k in set(chosen):
    upper.axvline(k, color="C3", ls=":", lw=1.5)
upper.set_ylabel("score (higher is better)")
choice = ", ".join(f"{k}" for k in chosen)
upper.set_title(f"How many clusters? {len(X):,} samples; {SEEDS} seeds choose K = {choice}")
upper.legend(frameon=False, loc="upper right")
for name in ("silhouette", "view_agreement", "head_agreement"):
    median = table.groupby("n_clusters")[name].median()
    lower.plot(median.index, median, ".-", label=name.replace("_", " "))
lower.set_xlabel("number of clusters K")
lower.set_ylabel("factors of the score")
lower.legend(frameon=False, fontsize=8)
for axes in (upper, lower):
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(PICTURE, dpi=150)
print(f"\ndrawn into {PICTURE}")
