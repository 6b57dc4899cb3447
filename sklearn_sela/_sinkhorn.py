"""Scores to labels: entropic optimal transport onto clusters of given sizes.

Torch only; usable with any training loop. The whole solver is one potential per cluster:
the row constraint is kept exactly by a softmax, so one iteration reads the scores once.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 20  # entries of the score matrix in work at a time: bounds temporary memory
_PATIENCE = 4  # Sinkhorn iterations between two looks at how fast they are
_NEWTON_STEPS = 4  # that finish a solve, about
_NEWTON_MAX = 1024  # clusters; beyond, its K x K systems cost more than they save
_SCALING = 4.0  # factor between two levels of entropic regularisation
_GOLDEN = 0.6180339887498949  # its multiples modulo 1 fill [0, 1) evenly


class SinkhornResult(NamedTuple):
    """What :func:`sinkhorn_labels` returns; arrays are of the kind that was passed in."""

    labels: Any  #: (n_samples,) int64, one cluster per sample
    potential: Any  #: (n_clusters,) float64, in units of the scores; -inf where the weight is 0
    n_iter: int  #: reads of the score matrix by the solver
    marginal_error: float  #: L1 distance of the cluster shares from what optimality asks
    converged: bool  #: whether ``marginal_error <= tol``
    assignment: Any  #: (n_samples, n_clusters) soft assignment, rows sum to 1; None unless asked


def sinkhorn_labels(
    scores: Any,
    *,
    reg: float = 0.04,
    cluster_weights: Any = None,
    sample_weight: Any = None,
    reg_m: float = math.inf,
    tol: float = 1e-3,
    max_iter: int = 1000,
    potential: Any = None,
    return_assignment: bool = False,
    warn: bool = True,
) -> SinkhornResult:
    r"""Label samples so that clusters get the sizes asked for, at the least cost.

    Solves the labelling step of SeLa [1]_ (eq. 4) with entropic regularisation [2]_,

    .. math::
        \max_Q \; \langle Q, S \rangle + \mathrm{reg}\, H(Q) - \mathrm{reg_m}\,
        \mathrm{KL}(Q^\top 1 \,|\, c) \quad \text{subject to} \quad Q 1 = r,

    where S are the scores, r the sample weights and c the cluster weights, both scaled to
    sum to one. With ``reg_m=inf`` the cluster shares equal c exactly [1]_; a finite value
    only pulls them towards c (unbalanced transport [3]_).

    The solution is ``Q[i] = r[i] * softmax((S[i] + potential) / reg)``, so the solver works
    on the potential alone, in the log domain: nothing is exponentiated that could overflow,
    and sharp problems are approached through a falling sequence of ``reg``.

    Parameters
    ----------
    scores : array-like or tensor of shape (n_samples, n_clusters)
        Log-probabilities or logits; float32 or float64. ``-inf`` (the log of a probability
        of zero) marks a label of last resort.
    reg : float, default=0.04
        Entropic regularisation, in units of the scores: 1 / lambda of the paper, whose
        ImageNet value is lambda = 25. Smaller is closer to the linear program.
    cluster_weights : array-like of shape (n_clusters,), default=None
        Share of the samples each cluster gets; any non-negative scale. None is uniform.
    sample_weight : array-like of shape (n_samples,), default=None
        Mass of each sample; any non-negative scale. None is uniform.
    reg_m : float, default=inf
        How hard the cluster weights pull, in units of the scores: ``inf`` fixes the cluster
        shares, 0 leaves them free (each sample takes its own softmax).
    tol : float, default=1e-3
        Stop once the L1 distance of the cluster shares from their optimum is at most this.
    max_iter : int, default=1000
        Most iterations over all levels; a ``ConvergenceWarning`` says when they ran out.
    potential : array-like of shape (n_clusters,), default=None
        Start from the potential of an earlier, similar problem.
    return_assignment : bool, default=False
        Also return the soft assignment.
    warn : bool, default=True
        Warn when not converged. A training loop that solves again soon, from this
        potential, may prefer to read ``converged``.

    Returns
    -------
    SinkhornResult
        Named tuple ``(labels, potential, n_iter, marginal_error, converged, assignment)``.
        Labels are the largest entry of each row; exact ties, and problems whose largest
        entries would all fall in one cluster, are split in proportion to the solution.

    Raises
    ------
    ValueError
        For scores that are not a finite (or -inf) matrix, and for weights, ``reg``,
        ``reg_m``, ``tol`` or ``potential`` out of range or of the wrong shape.

    References
    ----------
    .. [1] Asano, Rupprecht, Vedaldi. Self-labelling via simultaneous clustering and
       representation learning. ICLR 2020.
    .. [2] Cuturi. Sinkhorn distances: lightspeed computation of optimal transport. 2013.
    .. [3] Chizat, Peyre, Schmitzer, Vialard. Scaling algorithms for unbalanced optimal
       transport problems. Mathematics of Computation, 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_sela import sinkhorn_labels
    >>> scores = np.log([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    >>> sinkhorn_labels(scores).labels
    array([0, 0, 1, 1])
    """
    for name, value, ok in [
        ("reg", reg, 0 < reg < math.inf),
        ("reg_m", reg_m, reg_m >= 0),
        ("tol", tol, tol > 0),
        ("max_iter", max_iter, max_iter >= 1),
    ]:
        if not ok:
            raise ValueError(f"{name}={value!r} is out of range.")
    s = _finite_scores(scores, reg, tol)
    n, k = s.shape
    r = _weights(sample_weight, n, "sample_weight", s.device)
    c = _weights(cluster_weights, k, "cluster_weights", s.device)
    spread = -float(s.min()) / reg
    if potential is None:
        # Far below this spread one level is enough; above it, plain iterations could crawl.
        levels = max(0, math.ceil(math.log(max(spread, 1.0) / 16, _SCALING)))
        levels = min(levels, max_iter - 1)  # one iteration each, at least
        v = torch.where(c > 0, 0.0, -math.inf).double()
    else:
        levels = 0
        v = _tensor(potential).to(s.device, torch.float64)
        if v.shape != (k,) or v.isnan().any() or (v == math.inf).any():
            raise ValueError(f"potential must be {k} numbers below +inf, got {potential!r}.")
        v = torch.where(v == -math.inf, 0.0, v)
        v = (v - v[c > 0].max()).clamp_min(-reg * (spread + 1e3))  # no solution lies further out
        v = torch.where(c > 0, v, -math.inf)

    # A level need not be exact, but where single rows weigh much it must place them too.
    coarse = max(tol, 0.05 if n > 1000 else 0.01)
    n_iter, error = 0, math.inf
    for level in reversed(range(levels + 1)):
        last = level == 0
        budget = max_iter - n_iter if last else min(100, max_iter - n_iter - level)
        v, used, error = _sinkhorn(
            s, v, r, c, reg * _SCALING**level, reg_m, tol if last else coarse, budget
        )
        n_iter += used
    if not error <= tol and warn:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"sinkhorn_labels stopped at max_iter={max_iter} with marginal error "
            f"{error:.2g} > tol={tol:g}: raise max_iter, reg or tol.",
            ConvergenceWarning,
            stacklevel=2,
        )
    labels, assignment = _read_off(s, v, r, c, reg, math.isinf(reg_m), return_assignment)
    out = (labels, v, assignment)
    if not isinstance(scores, Tensor):
        out = tuple(None if t is None else t.cpu().numpy() for t in out)  # type: ignore[assignment]
    return SinkhornResult(out[0], out[1], n_iter, error, error <= tol, out[2])


class _Point(NamedTuple):
    """The semi-dual at one potential: value, L1 error, shares m, their target t, Q'RQ."""

    v: Tensor
    value: float
    error: float
    m: Tensor
    t: Tensor
    gram: Tensor | None


def _sinkhorn(
    s: Tensor, v: Tensor, r: Tensor, c: Tensor, reg: float, reg_m: float, tol: float, max_iter: int
) -> tuple[Tensor, int, float]:
    """Iterate the potential v; returns it with the iterations used and the L1 error.

    v minimises the convex semi-dual

        F(v) = reg * sum_i r_i logsumexp((s_i + v) / reg) + reg_m * logsumexp(log c - v / reg_m)

    (last term -<c, v> at reg_m = inf) with gradient m - t, the shares of the current
    solution less their target. Sinkhorn's step, v += reg * log(c / m) damped by
    reg_m / (reg_m + reg) for the KL term [3], sees far but crawls on sharp problems, where
    rows change cluster one at a time. There, Newton steps with Levenberg-Marquardt damping
    take over; they are kept only when they improve.
    """
    if reg_m == 0:
        return torch.where(c > 0, 0.0, -math.inf).double(), 1, 0.0
    exact = math.isinf(reg_m)
    damping = 1.0 if exact else reg_m / (reg_m + reg)
    log_c = c.log()

    def at(v: Tensor, newton: bool) -> _Point:
        value, m, gram = _semidual(s, v, r, reg, newton)
        used = c > 0
        pull = torch.where(used, log_c - v / reg_m, -math.inf)
        target = c if exact else pull.softmax(0)
        last = -(c * v)[used].sum() if exact else reg_m * pull.logsumexp(0)
        return _Point(v, value + float(last), float((m - target).abs().sum()), m, target, gram)

    here, mu, newton = at(v, False), 1e-3, False
    newton_cost = _NEWTON_STEPS * (2 + len(v) / 32)  # in reads: Q'RQ takes the longer the wider
    check = here.error
    for iteration in range(1, max_iter + 1):
        if here.error <= tol or iteration == max_iter:
            break
        if not newton and iteration % _PATIENCE == 0 and len(v) <= _NEWTON_MAX:
            rate = math.log(check / here.error) / _PATIENCE
            newton = math.log(here.error / tol) > rate * newton_cost
            check = here.error
            if newton:
                here = at(here.v, True)
        if newton:
            step = _newton_step(here, c, reg, reg_m, mu)
            there = at(here.v + step, True)
            # The value does not resolve small steps. A slope that still falls does, and so does
            # half the error (any smaller error would let rounding walk in circles).
            falls = float(((there.m - there.t) * step).sum()) < 0
            if there.value < here.value or falls or there.error < 0.5 * here.error:
                here, mu = there, mu / 10
            else:
                mu *= 10
        else:
            v = damping * (here.v + reg * (log_c - here.m.log()))
            here = at(v - v.max(), False)  # a constant shift changes nothing
    return here.v, iteration, here.error


def _newton_step(p: _Point, c: Tensor, reg: float, reg_m: float, mu: float) -> Tensor:
    """Solve (Hessian + mu * scale) step = -gradient, for clusters of positive weight."""
    used = c > 0
    m, t = p.m[used], p.t[used]
    hessian = (torch.diag(m) - p.gram[used][:, used]) / reg  # type: ignore[index]
    if not math.isinf(reg_m):
        hessian += (torch.diag(t) - torch.outer(t, t)) / reg_m
    d = (m + t).sqrt()  # in this scale neither tiny clusters nor constant shifts are singular
    hessian = hessian / torch.outer(d, d) + torch.outer(d, d) / reg
    hessian += torch.diag(torch.full_like(d, mu / reg))
    step = torch.zeros_like(p.v)
    step[used] = torch.linalg.solve(hessian, (t - m) / d) / d
    return step


def _semidual(
    s: Tensor, v: Tensor, r: Tensor, reg: float, gram: bool
) -> tuple[float, Tensor, Tensor | None]:
    """reg * sum_i r_i logsumexp_i, the shares and, if asked, Q'RQ: one read of the scores."""
    value, m = 0.0, torch.zeros_like(v)
    g = torch.zeros(len(v), len(v), dtype=v.dtype, device=v.device) if gram else None
    for rows, z in _blocks(s, v, reg):
        q = z.softmax(1)
        rq = r[rows, None].to(q.dtype) * q
        m += rq.sum(0).double()
        if g is not None:
            g += (rq.T @ q).double()
            value += float((r[rows] * z.logsumexp(1).double()).sum())
    return reg * value, m.clamp_min(torch.finfo(s.dtype).tiny), g  # log of a starved m is finite


def _blocks(s: Tensor, v: Tensor, reg: float) -> Any:
    """Rows of (s + v) / reg, whose softmax is the solution, a block at a time."""
    step = max(1, _BLOCK // s.shape[1])
    shift = (v / reg).to(s.dtype)
    for start in range(0, len(s), step):
        rows = slice(start, start + step)
        yield rows, s[rows] / reg + shift


def _read_off(
    s: Tensor, v: Tensor, r: Tensor, c: Tensor, reg: float, exact: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Labels (and the soft assignment) of the solution, ties split in proportion."""
    labels = torch.empty(len(s), dtype=torch.int64, device=s.device)
    assignment = torch.empty_like(s) if keep else None
    turn = 0
    for rows, z in _blocks(s, v, reg):
        q = z.softmax(1)
        labels[rows], turn = _split_ties(q, q.amax(1, keepdim=True) * (1 - 1e-6), turn)
        if assignment is not None:
            assignment[rows] = q
    live = torch.nonzero(r > 0).flatten()
    top = int(labels[live[0]])
    elsewhere = len(live) * (1 - float(c.max()))  # samples owed to all but the largest cluster
    if exact and elsewhere > 1 - 1e-9 and (labels[live] == top).all():
        # Every row prefers one cluster by a hair (all rows alike, say): no label would carry
        # information, so let the proportions of the solution decide. The surest rows stay;
        # the least sure of them leaves, as its share of top is at most the cluster's.
        sure = torch.cat([z.softmax(1)[:, top] for _, z in _blocks(s, v, reg)])[live]
        u = torch.zeros_like(r)
        u[live[sure.argsort(descending=True)]] = (torch.arange(len(live)).to(r) + 0.5) / len(live)
        for rows, z in _blocks(s, v, reg):
            drawn = (_draw(z.softmax(1).roll(-top, 1), u[rows]) + top) % len(c)
            labels[rows] = torch.where(r[rows] > 0, drawn, labels[rows])
    return labels, assignment


def _draw(q: Tensor, u: Tensor) -> Tensor:
    """The entry of each row of q (proportions) in which the fraction u of the row falls."""
    cumulative = q.double().cumsum(1)
    return torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]


def _split_ties(q: Tensor, threshold: Tensor, turn: int) -> tuple[Tensor, int]:
    """Row-wise argmax; rows with several entries above threshold share them out.

    Such rows draw from their tied entries by a low-discrepancy sequence, so that any group
    of like rows is divided in proportion to its solution.
    """
    labels = q.argmax(1)
    tied = q >= threshold
    rows = torch.nonzero(tied.sum(1) > 1).flatten()
    if len(rows):
        order = torch.arange(turn, turn + len(rows), device=q.device, dtype=torch.float64)
        u = (0.5 + order * _GOLDEN) % 1.0
        labels[rows] = _draw(q[rows] * tied[rows], u)
    return labels, turn + len(rows)


def _tensor(x: Any) -> Tensor:
    """As a tensor; arrays that torch does not take (reversed, read-only) are copied."""
    return x.detach() if isinstance(x, Tensor) else torch.as_tensor(np.require(x, None, ["C", "W"]))


def _finite_scores(scores: Any, reg: float, tol: float) -> Tensor:
    """Scores as a float matrix with row maximum 0, in the precision the spread needs."""
    s = _tensor(scores)
    if s.ndim != 2 or 0 in s.shape:
        raise ValueError(f"scores must be a non-empty (n, K) matrix, got shape {tuple(s.shape)}.")
    if not s.is_floating_point():
        s = s.double()
    elif s.dtype not in (torch.float32, torch.float64):
        s = s.float()
    if s.isnan().any() or (s == math.inf).any():
        raise ValueError("scores contain NaN or +inf; they must be finite or -inf.")
    top = s.amax(1, keepdim=True)
    s = torch.where(top == -math.inf, torch.zeros_like(s), s - top)
    barred = s == -math.inf
    lowest = float(s.masked_fill(barred, 0.0).min())
    if not math.isfinite(lowest / reg):
        raise ValueError(f"reg={reg!r} is too small for scores that spread over {-lowest:g}.")
    s = s.masked_fill(barred, lowest - 100 * reg)
    if float(s.min()) / reg < -1e7 * tol:  # rounding in float32 would move shares by tol
        s = s.double()
    return s


def _weights(weights: Any, size: int, name: str, device: torch.device) -> Tensor:
    if weights is None:
        return torch.full((size,), 1.0 / size, dtype=torch.float64, device=device)
    w = _tensor(weights).to(device, torch.float64)
    if w.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(w.shape)}.")
    if not w.isfinite().all() or (w < 0).any() or w.max() <= 0:
        raise ValueError(f"{name} must be finite, non-negative and not all zero.")
    w = w / w.max()  # the sum of huge weights would overflow
    return w / w.sum()
