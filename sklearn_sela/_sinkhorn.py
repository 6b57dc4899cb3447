"""Scores to labels: entropic optimal transport onto clusters of given sizes.

Needs no estimator; usable with any training loop. This file is the function that people call; the
iteration is ``_descent``, where scores come from ``_scores``, how they are read ``_kernels``,
what the cluster shares should be ``_marginals``, how the solution becomes labels ``_rounding``.
"""

from __future__ import annotations

import math
import warnings
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklearn_sela._descent import in_all, solve
from sklearn_sela._distributed import Shards
from sklearn_sela._kernels import Ask, Reader, as_shares
from sklearn_sela._marginals import Capped, Exact, Relaxed
from sklearn_sela._path import Vector
from sklearn_sela._rounding import read_labels, round_labels, size_limits
from sklearn_sela._scores import Scores, full_precision


class SinkhornResult(NamedTuple):
    """What :func:`sinkhorn_labels` returns; arrays are of the kind that was passed in.

    With several heads, each field has a leading axis of length ``n_heads``.
    """

    labels: Any  #: (n_samples,) int64, one cluster per sample
    potential: Any  #: (n_clusters,) float64, in units of the scores; -inf where the weight is 0
    n_iter: Any  #: int, reads of the score matrix by the solver
    marginal_error: Any  #: float, L1 distance of the cluster shares from what optimality asks
    converged: Any  #: bool, whether ``marginal_error <= tol``
    assignment: Any  #: (n_samples, n_clusters) soft assignment, rows sum to 1; None unless asked
    rounding_cost: Any  #: float, bound on what exact sizes cost; None unless asked


def sinkhorn_labels(
    scores: Any,
    *,
    head: tuple[Any, Any] | None = None,
    reg: float = 0.04,
    cluster_weights: Any = None,
    sample_weight: Any = None,
    reg_m: float = math.inf,
    max_share: Any = None,
    exact_sizes: bool = False,
    tol: float = 1e-4,
    max_iter: int = 1000,
    potential: Any = None,
    return_assignment: bool = False,
    warn: bool = True,
    group: Any = None,
) -> SinkhornResult:
    r"""Label samples so that clusters get the sizes asked for, at the least cost.

    Solves the labelling step of SeLa [1]_ (eq. 4) with entropic regularisation [2]_,

    .. math::
        \max_Q \; \langle Q, S \rangle + \mathrm{reg}\, H(Q) - G(Q^\top 1)
        \quad \text{subject to} \quad Q 1 = r,

    where S are the scores, r the sample weights, scaled to sum to one, and G says what the
    cluster shares :math:`m = Q^\top 1` should be. With c the cluster weights, scaled to sum
    to one:

    - exact sizes, the default: m = c;
    - ``reg_m``, a pull: :math:`G = \mathrm{reg_m}\, \mathrm{KL}(m \,|\, c)`, unbalanced
      transport [3]_;
    - ``max_share``, upper bounds: :math:`m \le \mathrm{max\_share}`, sizes free below.

    The solution is ``Q[i] = r[i] * softmax((S[i] + potential) / reg)``, so the solver works
    on the potential alone, in the log domain: nothing is exponentiated that could overflow,
    and sharp problems are approached through a falling sequence of ``reg``. Sinkhorn's
    iteration, a read of the scores each, is scaled by the curvature and accelerated [4]_.

    Parameters
    ----------
    scores : array-like, tensor, memmap or callable
        (n_samples, n_clusters) log-probabilities or logits, of any real type; ``-inf`` (the
        log of a probability of zero) marks a label of last resort. In memory also those of
        several heads, (n_heads, n_samples, n_clusters). A ``numpy.memmap`` is read
        a block at a time and need not fit into memory; nor need the blocks of rows over which
        a callable returns an iterator, the same ones whenever it is called. With ``head``,
        features instead, (n_samples, n_features), in any of these forms.
    head : tuple of (weight, bias), default=None
        Linear head: ``scores = features @ weight.T + bias`` are formed a block at a time and
        never held. weight is (n_clusters, n_features), bias (n_clusters,) or None. With a
        weight (n_heads, n_clusters, n_features) and a bias (n_heads, n_clusters), all heads
        are solved in the same passes over the features.
    reg : float, default=0.04
        Entropic regularisation, in units of the scores: 1 / lambda of the paper, whose
        ImageNet value is lambda = 25. Smaller is closer to the linear program.
    cluster_weights : array-like of shape (n_clusters,), default=None
        Share of the samples each cluster gets; any non-negative scale. None is uniform. With
        several heads also (n_heads, n_clusters).
    sample_weight : array-like of shape (n_samples,), default=None
        Mass of each sample; any non-negative scale. None is uniform.
    reg_m : float, default=inf
        How hard the cluster weights pull, in units of the scores: ``inf`` fixes the cluster
        shares, 0 leaves them free (each sample takes its own softmax).
    max_share : float or array-like of shape (n_clusters,), default=None
        Largest share of the samples that a cluster may get, instead of ``cluster_weights``.
    exact_sizes : bool, default=False
        Move as many labels as it takes, the cheapest ones, for cluster sizes that are exactly
        ``n_samples`` times the shares, rounded to whole samples (equal sizes differ by one at
        most); with ``max_share``, sizes within the bounds, rounded up where need be.
        ``rounding_cost`` says at what cost.
    tol : float, default=1e-4
        Stop once the L1 distance of the cluster shares from their optimum is at most this. At
        the default, labels of real scores agree with exact ones in all but 1 row in 1,000.
    max_iter : int, default=1000
        Most reads of the scores over all levels; a ``ConvergenceWarning`` says when they ran
        out, and the best potential seen is kept.
    potential : array-like of shape (n_clusters,), default=None
        Start from the potential of an earlier, similar problem; (n_heads, n_clusters) with
        several heads.
    return_assignment : bool, default=False
        Also return the soft assignment, float32 or, where that is not enough, float64.
    warn : bool, default=True
        Warn when not converged. A training loop that solves again soon, from this
        potential, may prefer to read ``converged``.
    group : torch.distributed.ProcessGroup, default=None
        Processes that have other rows each, any number of them, of the same problem, and call
        this at once with the same parameters. Rows stay where they are: an iteration sums
        2 K numbers over the processes (of the Newton steps that end sharp problems, K ** 2).
        Each gets the labels of its own rows; the rest is the same on all. Not with
        ``exact_sizes``.

    Returns
    -------
    SinkhornResult
        Named tuple ``(labels, potential, n_iter, marginal_error, converged, assignment,
        rounding_cost)``. Labels are the largest entry of each row; exact ties, and problems
        whose largest entries would all fall in one cluster, are split in proportion to the
        solution. ``rounding_cost`` is what a sample loses in ``S + potential``, in the mean,
        by exact sizes: no labels of these sizes have a mean score better by more.

    Raises
    ------
    ValueError
        For scores that are not a finite (or -inf) matrix, and for a head, weights, ``reg``,
        ``reg_m``, ``max_share``, ``tol`` or ``potential`` out of range or of the wrong shape.

    Notes
    -----
    Large problems on a CPU are solved 6 to 30 times as fast where numba is installed (the
    extra ``fast``), on a GPU where triton is. Results do not depend on the number of threads.
    Fast reads are in single precision: where that cannot tell ``tol``, exact ones go on.

    References
    ----------
    .. [1] Asano, Rupprecht, Vedaldi. Self-labelling via simultaneous clustering and
       representation learning. ICLR 2020.
    .. [2] Cuturi. Sinkhorn distances: lightspeed computation of optimal transport. 2013.
    .. [3] Chizat, Peyre, Schmitzer, Vialard. Scaling algorithms for unbalanced optimal
       transport problems. Mathematics of Computation, 2018.
    .. [4] Walker, Ni. Anderson acceleration for fixed-point iterations. SIAM Journal on
       Numerical Analysis, 2011.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_sela import sinkhorn_labels
    >>> scores = np.log([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    >>> sinkhorn_labels(scores).labels
    array([0, 0, 1, 1])

    A head's scores need not be formed:

    >>> features = np.random.default_rng(0).normal(size=(100, 5))
    >>> result = sinkhorn_labels(features, head=(features[:4], None), exact_sizes=True)
    >>> np.bincount(result.labels)
    array([25, 25, 25, 25])
    """
    for name, value, ok in [
        ("reg", reg, 0 < reg < math.inf),
        ("reg_m", reg_m, reg_m >= 0),
        ("tol", tol, tol > 0),
        ("max_iter", max_iter, max_iter >= 1),
    ]:
        if not ok:
            raise ValueError(f"{name}={value!r} is out of range.")
    if not isinstance(max_iter, Integral):
        raise ValueError(f"max_iter must be a whole number, got {max_iter!r}.")
    if exact_sizes and (sample_weight is not None or not math.isinf(reg_m)):
        raise ValueError("exact_sizes counts rows: leave out sample_weight and reg_m.")
    if exact_sizes and group is not None:
        raise ValueError("exact_sizes needs all rows in one process: leave out group.")
    shards = Shards(group)
    with shards.agreeing():
        source = Scores(scores, head, some_elsewhere=not shards.alone)
        marginals = [
            _marginal(source.k, weights, reg_m, max_share)
            for weights in _of_heads(cluster_weights, source)
        ]
    sizes = source.k, source.n_heads
    *most, less, fewer = shards.max(*sizes, *(-size for size in sizes))
    for what, high, low in zip(("clusters", "heads"), most, (-less, -fewer), strict=True):
        if high != low:
            raise ValueError(f"Processes of the group have scores of {low:g} to {high:g} {what}.")
    with full_precision(source.device):
        reader = Reader(source, sample_weight, reg, tol, shards)
        starts = _starts(potential, source, [used for _, used in marginals], reg, reader.spread)
        if reg_m == 0:
            solved = [(np.zeros_like(v), 1, 0.0) for v in starts]
        else:
            warm = potential is not None
            solved = solve(reader, starts, marginals, reg, tol, int(max_iter), warm)
        asks = [
            Ask(t, in_all(v, used), reg)
            for t, ((v, _, _), (_, used)) in enumerate(zip(solved, marginals, strict=True))
        ]
        errors = [error for _, _, error in solved]
        if max(errors) > tol and warn:
            _warn_not_converged(max(errors), tol, max_iter)
        # Exact sizes end a collapse by themselves, at the least cost.
        bound = not exact_sizes and math.isinf(reg_m)
        labels = read_labels(reader, asks, [m.c.max() if bound else 1.0 for m, _ in marginals])
        cost = None
        if exact_sizes:
            cost = []
            for ask, own, (marginal, used) in zip(asks, labels, marginals, strict=True):
                shares = np.zeros(source.k)
                shares[used] = marginal.c
                cost.append(round_labels(reader, ask, own, size_limits(shares, reader.n)))
        assignment = [_assignment(reader, ask) for ask in asks] if return_assignment else None
    iterations, converged = [n for _, n, _ in solved], [error <= tol for error in errors]
    potentials: list[Any] = [ask.v - ask.v.max() for ask in asks]
    if source.device.type != "cpu":
        potentials = [torch.from_numpy(v).to(source.device) for v in potentials]
    fields = (labels, potentials, iterations, errors, converged, assignment, cost)
    return SinkhornResult(*(_as_given(field, source) for field in fields))


def _marginal(
    k: int, cluster_weights: Any, reg_m: float, max_share: Any
) -> tuple[Exact, NDArray[np.bool_]]:
    """What the shares should be, on the clusters that may get any, and which those are."""
    if max_share is None:
        c = as_shares(cluster_weights, k, "cluster_weights")
        used = c > 0
        return (Exact(c[used]) if math.isinf(reg_m) else Relaxed(c[used], reg_m)), used
    if cluster_weights is not None or not math.isinf(reg_m):
        raise ValueError("max_share limits free sizes: leave out cluster_weights and reg_m.")
    limit = np.minimum(_array(max_share), 1.0)  # none gets more than all
    limit = np.full(k, limit) if limit.ndim == 0 else limit
    if limit.shape != (k,) or not (limit >= 0).all() or limit.sum() < 1 - 1e-9:
        raise ValueError(
            f"max_share={max_share!r} must be a share, or one for each cluster, that add up to 1 "
            f"or more over the {k} clusters."
        )
    used = limit > 0
    tight = float(limit.sum()) <= 1 + 1e-9  # no room: the limits are the sizes
    return (Exact(limit[used] / limit.sum()) if tight else Capped(limit[used])), used


def _of_heads(cluster_weights: Any, source: Scores) -> list[Any]:
    """The cluster weights of each head, which may be the same for all."""
    if source.several and np.ndim(cluster_weights) == 2:
        if len(cluster_weights) != source.n_heads:
            raise ValueError(
                f"cluster_weights are of {len(cluster_weights)} heads, scores of {source.n_heads}."
            )
        return list(cluster_weights)
    return [cluster_weights] * source.n_heads


def _starts(
    potential: Any, source: Scores, used: list[NDArray[np.bool_]], reg: float, spread: float
) -> list[Vector]:
    """The potential to start from, of each head, on the clusters that it uses."""
    shape = (source.n_heads, source.k)
    if potential is None:
        return [np.zeros(np.count_nonzero(of_head)) for of_head in used]
    v = _array(potential)
    if v.shape != (shape if source.several else shape[1:]) or not (v < math.inf).all():
        each = f" for each of {shape[0]} heads" if source.several else ""
        raise ValueError(
            f"potential must be {shape[1]} numbers below +inf{each}, got {potential!r}."
        )
    starts = [
        row[of_head]
        for row, of_head in zip(np.where(v == -math.inf, 0.0, v).reshape(shape), used, strict=True)
    ]
    # No solution lies further out.
    return [np.maximum(start - start.max(), -(spread + 1e3 * reg)) for start in starts]


def _array(x: Any) -> NDArray[np.float64]:
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)


def _assignment(reader: Reader, ask: Ask) -> Tensor:
    out = torch.empty(reader.n_rows, reader.k, dtype=reader.dtype, device=reader.device)
    for rows, q in reader.solution(ask):
        out[rows] = q
    return out


def _as_given(heads: list[Any] | None, source: Scores) -> Any:
    """A field of the result, from one entry a head: as tensors or arrays, like the scores."""
    if heads is None:
        return None
    if isinstance(heads[0], Tensor):
        tensor = torch.stack(heads) if source.several else heads[0]
        return tensor if source.of_tensors else tensor.cpu().numpy()
    field = np.array(heads) if source.several else heads[0]
    of_array = source.of_tensors and isinstance(field, np.ndarray)
    return torch.from_numpy(field) if of_array else field


def _warn_not_converged(error: float, tol: float, max_iter: int) -> None:
    from sklearn.exceptions import ConvergenceWarning

    warnings.warn(
        f"sinkhorn_labels stopped at max_iter={max_iter} with marginal error "
        f"{error:.2g} > tol={tol:g}: raise max_iter, reg or tol.",
        ConvergenceWarning,
        stacklevel=3,
    )
