"""Clustering heads: the sizes asked of each, how far their labels agree, which one predicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.stats import ncx2
from torch import Tensor

from sklearn_sela._distributed import Shards
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._shares import Share
from sklearn_sela._training import Schedule, label_pass
from sklearn_sela._views import ViewStream

_SIZE_PULL = 1.0  # reg_m for learned cluster sizes: nats a row, see docs/recipe.rst
_EQUAL = 0.15  # relative deviation (root mean square) below which sizes pass as equal
_SURE = 0.01  # level of the test for it
_AS_GOOD = 0.03  # difference of kappa that is no reason to prefer a head
_SCALE = 10.0  # logit gap, about, between a row's own centroid and an orthogonal one


def start_at_centroids(network: SelfLabelNetwork, features: np.ndarray, labels: np.ndarray) -> None:
    """Start the heads at the mean features (m, d) of the clusters of labels (n_heads, m)."""
    one_hot = np.eye(network.shape[1], dtype=np.float32)[labels]
    counts = one_hot.sum(1)[:, :, None]
    centroids = torch.from_numpy(one_hot.transpose(0, 2, 1) @ features / np.maximum(counts, 1))
    norm = float(np.linalg.norm(features, axis=1).mean())
    network.start_heads(centroids.to(network.heads.weight.device), _SCALE / max(norm, 1e-6))


def target_sizes(
    labels: np.ndarray, k: int, cluster_sizes: str | np.ndarray, shards: Shards | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """(labels, weights (n_heads, k), reg_m) for the second round.

    Labels are (n_heads, n); sizes are those of the rows of all processes.

    Learned sizes are those of the clusterings it starts from, as a prior that pulls; unless
    they are equal for all that the data can tell, when equal sizes, held exactly, sharpen
    the clusters. Given sizes are held exactly, the largest share by the largest cluster.
    """
    counts = np.stack([np.bincount(row, minlength=k) for row in labels])
    if shards is not None:
        counts = shards.sum(counts.astype(np.float64)).astype(np.int64)
    n_heads, n = len(counts), counts[0].sum()
    if isinstance(cluster_sizes, np.ndarray):
        rank = np.argsort(np.argsort(-counts, axis=1, kind="stable"), axis=1)
        by_rank = np.argsort(-cluster_sizes, kind="stable")
        labels = np.take_along_axis(by_rank[rank], labels, axis=1)
        return labels, np.tile(cluster_sizes / cluster_sizes.sum(), (n_heads, 1)), np.inf
    if cluster_sizes == "balanced" or sizes_are_equal(counts[0]):
        return labels, np.full((n_heads, k), 1 / k), np.inf
    return labels, (counts + 1) / (n + k), _SIZE_PULL


def sizes_are_equal(counts: np.ndarray) -> bool:
    """Equivalence test: do the data rule out that sizes differ by 15 % (root mean square)?

    The statistic is 2 n KL(shares | equal), noncentral chi-squared if the true deviation is
    15 %. Few samples rule out nothing: then sizes do not pass as equal.
    """
    n, k = counts.sum(), len(counts)
    if k == 1:
        return True
    shares = counts[counts > 0] / n
    statistic = 2 * n * float((shares * np.log(shares * k)).sum())
    statistic = max(statistic, k - 1)  # its mean for equal sizes: closer is luck, not evidence
    return bool(ncx2.cdf(statistic, k - 1, n * _EQUAL**2) < _SURE)


def view_joint(
    network: SelfLabelNetwork, views: ViewStream, share: Share, schedule: Schedule
) -> Tensor:
    """(n_heads, k, k) joint distribution of the labels of two views of a row."""
    once = replace(schedule, n_views=1)

    def log_p(x: Tensor) -> Tensor:
        return network(x).log_softmax(2)

    one, two = (label_pass(network, log_p, views, len(share), once) for _ in range(2))
    n_heads, k = network.shape
    # In place: whatever outlives a batch may keep its memory from being used for the next.
    joint = torch.zeros(n_heads, k, k, dtype=torch.float64, device=network.heads.weight.device)
    for (_, a), (_, b) in zip(one, two, strict=True):
        joint += a.exp().double().permute(1, 2, 0) @ b.exp().double().transpose(0, 1)
    if not share.shards.alone:
        joint = torch.from_numpy(share.shards.sum(joint.cpu().numpy())).to(joint.device)
    return joint / share.n


def view_agreement(joint: Tensor) -> Tensor:
    """Cohen's kappa of joint distributions (..., k, k): agreement beyond chance, at most 1."""
    chance = (joint.sum(-1) * joint.sum(-2)).sum(-1)
    observed = joint.diagonal(dim1=-2, dim2=-1).sum(-1)
    return cohen_kappa(observed, chance)


def cohen_kappa(observed: Any, chance: Any) -> Any:
    """Agreement beyond chance, elementwise; 0 where all is in one cluster."""
    return (observed - chance) / (1 - chance + 1e-12)


def choose_head(joint: Tensor) -> int:
    """The head whose labels of two views of a row agree best, by their joint distributions.

    Agreement is Cohen's kappa of the soft labels. Of heads that agree about as well, it is the
    one with the most information, since coarse clusters are the easier to agree on.
    Information alone would cut a large cluster in pieces, for the sake of equal sizes.
    """
    one, two = joint.sum(2), joint.sum(1)
    independent = one[:, :, None] * two[:, None, :]
    information = torch.special.xlogy(joint, joint / independent.clamp_min(1e-300)).sum((1, 2))
    kappa = view_agreement(joint)
    return int(information.where(kappa >= kappa.max() - _AS_GOOD, -torch.inf).argmax())


def meaning(labels: np.ndarray, predicted: np.ndarray, k: int) -> sparse.coo_array:
    """(k, k) share of each cluster of a head's labels (n,) that has each predicted label."""
    counts = sparse.coo_array((np.ones(len(labels)), (labels, predicted)), shape=(k, k)).tocsr()
    sizes = np.maximum(counts.sum(1), 1)
    return (counts / sizes[:, None]).tocoo().astype(np.float32)
