"""Problems whose answer is known, and an oracle, for the tests of the label solver."""

import numpy as np
from scipy.special import logsumexp


def log_softmax(z):
    return z - logsumexp(z, axis=1, keepdims=True)


def network_scores(n, k, sharpness=10.0, seed=0):
    """(n, k) float32 log-probabilities of a linear head on clustered features."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(10, k // 2), 32))
    features = centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, 32))
    head = rng.normal(size=(k, 32))
    cosines = (features / np.linalg.norm(features, axis=1, keepdims=True)) @ (
        head / np.linalg.norm(head, axis=1, keepdims=True)
    ).T
    return log_softmax(sharpness * cosines).astype(np.float32)


def oracle_plan(scores, reg, max_iter=20_000, tol=1e-6):
    """Two-sided log-domain Sinkhorn in float64, balanced, through a falling reg; rows sum to 1."""
    s, (n, k) = scores.astype(np.float64), scores.shape
    g, level = np.zeros(k), max(reg, np.ptp(s) / 8)
    while True:
        for _ in range(max_iter):
            f = -level * (np.log(n) + logsumexp((s + g) / level, axis=1))
            new = -level * (np.log(k) + logsumexp((s + f[:, None]) / level, axis=0))
            error = np.abs(np.exp((g - new) / level) - 1).mean()  # of the column shares
            g = new
            if error <= (tol if level == reg else 1e-3):
                break
        if level == reg:
            return np.exp((s + f[:, None] + g) / level) * n
        level = max(reg, level / 3)
