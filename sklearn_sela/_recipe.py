"""From rows to a trained network: over-cluster to learn features, then cluster them.

Two rounds of the alternation in ``_training``. The first has more clusters than asked for:
small, pure clusters teach good features whatever the true number. The second has the number
asked for; its heads start from different clusterings of the learned features, share the
backbone while they are refined, and the one whose labels agree best between views is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import ncx2
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from sklearn_sela._data import Geometry
from sklearn_sela._network import SelfLabelNetwork, inference
from sklearn_sela._training import Schedule, SelfLabels, label_pass, self_label

_HEAD_SCALE = 10.0  # logit gap, about, between a row's own centroid and an orthogonal one
_SIZE_PULL = 1.0  # reg_m for learned cluster sizes: nats a row, see docs/recipe.rst
_EQUAL = 0.15  # relative deviation (root mean square) below which sizes pass as equal
_SURE = 0.01  # level of the test for it
_AS_GOOD = 0.03  # difference of kappa that is no reason to prefer a head
_OVER_CLUSTER_ROWS = 8  # fewest rows per cluster of the first round


@dataclass(frozen=True)
class Recipe:
    """What to fit; the estimator's parameters of the same names, resolved."""

    n_clusters: int
    n_heads: int
    over_clusters: int
    init: str
    cluster_sizes: str | np.ndarray
    reg: float
    soft_targets: bool
    label_momentum: float
    schedule: Schedule


@dataclass
class Fitted:
    network: SelfLabelNetwork
    best_head: int
    self_labels: np.ndarray  # (n_heads, n_samples)
    marginal_error: float
    complete: bool


def fit_network(
    backbone: nn.Module,
    n_features: int,
    geometry: Geometry,
    views: Callable[[Tensor], Tensor],
    recipe: Recipe,
    generator: torch.Generator,
    seed: int,
    record: Callable[[dict], None],
) -> Fitted:
    """Run both rounds; ``record`` gets a dict an epoch, with the round under ``stage``."""
    rows, schedule = geometry.rows, recipe.schedule

    def network_of(n_clusters: int) -> SelfLabelNetwork:
        network = SelfLabelNetwork(backbone, n_features, recipe.n_heads, n_clusters)
        return network.to(rows.device)

    def train(
        stage: str, labels: np.ndarray, weights: np.ndarray, pull: float, schedule: Schedule
    ) -> tuple[SelfLabels, bool]:
        first, shares = (torch.as_tensor(a, device=rows.device) for a in (labels, weights))
        state = SelfLabels(
            first, shares, recipe.reg, pull, recipe.soft_targets, recipe.label_momentum
        )
        done = self_label(
            network, views, state, schedule, generator, lambda row: record({"stage": stage, **row})
        )
        return state, done

    many = min(recipe.over_clusters, len(rows) // _OVER_CLUSTER_ROWS)
    over_cluster = many > recipe.n_clusters
    complete = True
    if over_cluster:
        network = network_of(many)
        labels = starting_labels(geometry, many, recipe.n_heads, recipe.init, seed)
        equal = np.full((recipe.n_heads, many), 1 / many)
        half = replace(schedule, epochs=(schedule.epochs + 1) // 2)
        _, complete = train("features", labels, equal, np.inf, half)
        try:
            labels, features = cluster_features(network, geometry, recipe.n_clusters, seed)
        except KeyboardInterrupt:  # without this step the first round is lost: once more
            complete = False
            labels, features = cluster_features(network, geometry, recipe.n_clusters, seed)
        # After Ctrl-C there is no second round: its heads stay where they start.
        schedule = replace(schedule, epochs=schedule.epochs // 2 if complete else 0)
    else:
        labels = starting_labels(geometry, recipe.n_clusters, recipe.n_heads, recipe.init, seed)
    labels, weights, pull = target_sizes(labels, recipe.n_clusters, recipe.cluster_sizes)
    network = network_of(recipe.n_clusters)
    if over_cluster:
        centroids = mean_features(features, labels[:, geometry.reference], recipe.n_clusters)
        norm = float(np.linalg.norm(features, axis=1).mean())
        network.start_heads(centroids.to(rows.device), _HEAD_SCALE / max(norm, 1e-6))
    state, done = train("clusters", labels, weights, pull, schedule)
    best_head = 0
    try:
        best_head = choose_head(view_joint(network, views, len(rows), recipe.schedule))
    except KeyboardInterrupt:  # the training stands; only the choice of the head is lost
        done = False
    return Fitted(
        network, best_head, state.labels.cpu().numpy(), state.marginal_error, complete and done
    )


def starting_labels(
    geometry: Geometry, n_clusters: int, n_heads: int, init: str, seed: int
) -> np.ndarray:
    """(n_heads, n) labels to start from: k-means on principal components, or random (paper)."""
    n = len(geometry.rows)
    if init == "random":
        balanced = np.arange(n) % n_clusters
        return np.stack(
            [np.random.default_rng([seed, t]).permutation(balanced) for t in range(n_heads)]
        )
    models = [_k_means(geometry.points, n_clusters, seed + t, n_init=1) for t in range(n_heads)]
    labels = np.empty((n_heads, n), dtype=np.int64)
    for part, points in geometry.chunks():
        for row, model in zip(labels, models, strict=True):
            row[part] = model.predict(points)
    return labels


def cluster_features(
    network: SelfLabelNetwork, geometry: Geometry, k: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """k-means in three views of what the over-clustered network learned.

    Returns the labels, (n_heads, n), and the features of the reference rows.

    In turn over the heads: its features, the consensus of its heads (the leading singular
    vectors of samples x over-clusters, as in bipartite spectral clustering: Dhillon, KDD
    2001), and the square roots of its probabilities (Hellinger distance). They differ where
    the number of clusters leaves a choice; which is best is seen after refinement.
    """
    d, n = network.heads.in_features, len(geometry.rows)

    def forward(x: Tensor) -> Tensor:
        features = network.embed(x)
        p = network.heads(features).unflatten(1, network.shape).softmax(2)
        return torch.cat([features, p.flatten(1)], 1)

    def reference(part: slice) -> Tensor:
        return geometry.rows[torch.from_numpy(geometry.reference[part])]

    m = len(geometry.reference)
    batches = inference(network, forward, reference, m, geometry.n_values)
    sample = np.concatenate([out.cpu().numpy() for _, out in batches])
    p = sample[:, d:].astype(np.float64)
    mass = np.sqrt(p.sum(0))
    _, vectors = np.linalg.eigh((p / mass).T @ (p / mass))
    consensus = vectors[:, ::-1][:, :k] / mass[:, None]
    embeddings: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda z: normalize(z[:, :d]),
        lambda z: normalize(z[:, d:] @ consensus).astype(np.float32),
        lambda z: np.sqrt(z[:, d:]),
    ]
    chosen = [embeddings[t % len(embeddings)] for t in range(network.shape[0])]
    models = [_k_means(e(sample), k, seed + t, n_init=10) for t, e in enumerate(chosen)]
    labels = np.empty((len(models), n), dtype=np.int64)
    for part, out in inference(network, forward, geometry.rows.__getitem__, n, geometry.n_values):
        z = out.cpu().numpy()
        for row, model, embed in zip(labels, models, chosen, strict=True):
            row[part] = model.predict(embed(z))
    return labels, sample[:, :d]


def mean_features(features: np.ndarray, labels: np.ndarray, k: int) -> Tensor:
    """(n_heads, k, d) mean of the features (m, d) of each cluster of labels (n_heads, m)."""
    one_hot = np.eye(k, dtype=np.float32)[labels]
    counts = one_hot.sum(1)[:, :, None]
    return torch.from_numpy(one_hot.transpose(0, 2, 1) @ features / np.maximum(counts, 1))


def target_sizes(
    labels: np.ndarray, k: int, cluster_sizes: str | np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """(labels, weights (n_heads, k), reg_m) for the second round.

    Learned sizes are those of the clusterings it starts from, as a prior that pulls; unless
    they are equal for all that the data can tell, when equal sizes, held exactly, sharpen
    the clusters. Given sizes are held exactly, the largest share by the largest cluster.
    """
    n_heads, n = labels.shape
    counts = np.stack([np.bincount(row, minlength=k) for row in labels])
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
    network: SelfLabelNetwork, views: Callable[[Tensor], Tensor], n: int, schedule: Schedule
) -> Tensor:
    """(n_heads, k, k) joint distribution of the labels of two views of a row."""
    once = replace(schedule, n_views=1)
    one, two = (label_pass(network, views, n, once) for _ in range(2))
    batches = [
        a.exp().double().permute(1, 2, 0) @ b.exp().double().transpose(0, 1)
        for (_, a), (_, b) in zip(one, two, strict=True)
    ]
    return torch.stack(batches).sum(0) / n


def choose_head(joint: Tensor) -> int:
    """The head whose labels of two views of a row agree best, by their joint distributions.

    Agreement is Cohen's kappa of the soft labels. Of heads that agree about as well, it is the
    one with the most information, since coarse clusters are the easier to agree on.
    Information alone would cut a large cluster in pieces, for the sake of equal sizes.
    """
    one, two = joint.sum(2), joint.sum(1)
    chance = (one * two).sum(1)
    observed = joint.diagonal(dim1=1, dim2=2).sum(1)
    kappa = (observed - chance) / (1 - chance).clamp_min(1e-12)  # all in one cluster: 0
    independent = one[:, :, None] * two[:, None, :]
    information = torch.special.xlogy(joint, joint / independent.clamp_min(1e-300)).sum((1, 2))
    return int(information.where(kappa >= kappa.max() - _AS_GOOD, -torch.inf).argmax())


def _k_means(points: np.ndarray, k: int, seed: int, n_init: int) -> KMeans:
    # One OpenMP thread: more would add up the centroids in the order they finish, and the
    # same seed would no longer give the same bits.
    with threadpool_limits(1, "openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicates: told once, by fit
        return KMeans(k, n_init=n_init, random_state=seed).fit(points)
