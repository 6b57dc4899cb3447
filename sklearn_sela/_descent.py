"""The iteration: Sinkhorn's, scaled and accelerated, then Newton's; one potential per cluster.

The row constraint is kept exactly by a softmax, so one iteration reads the scores once. All
that is done between two reads is on vectors of one number per cluster.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from sklearn_sela._kernels import Ask, Reader, Sums
from sklearn_sela._marginals import Exact, Vector

_MEMORY = 5  # earlier iterates that an accelerated step combines
_RIDGE = 1e-5  # of the combination, relative to the residual
_PATIENCE = 8  # reads between two looks at how fast the error falls
_DAMPING = 1e-10  # least of a Newton step, below which its system may be singular
_NEWTON_STEPS = 4  # that finish a solve, about
_NEWTON_MAX = 1024  # clusters; beyond, its K x K systems cost more than they save
_SCALING = 4.0  # factor between two levels of entropic regularisation
_SPREAD = 64.0  # of the scores, in units of reg, that one level can do with
_LEVEL_ITER = 100  # most reads of a level but the last, and before exact ones

Solver = Generator[Ask, Sums, tuple[Vector, int, float]]


def solve(
    reader: Reader,
    starts: list[Vector],
    marginals: list[tuple[Exact, NDArray[np.bool_]]],
    reg: float,
    tol: float,
    max_iter: int,
    warm: bool,
) -> list[tuple[Vector, int, float]]:
    """(potential on the used clusters, reads, L1 error) of each head, from its start.

    ``marginals`` has what the shares of each head should be, and which clusters it uses. Where
    fast reads are less exact than ``tol``, they go as far as they can see; exact ones go on,
    and are those of the reader from then on.
    """
    budgets = [max_iter] * len(starts)
    if reader.noise > tol:
        if max_iter > 1:
            # Where they make no way, exact ones still can.
            far = [min(max_iter - 1, _LEVEL_ITER)] * len(starts)
            rough = _solve(reader, starts, marginals, reg, reader.noise, far, warm)
            starts, warm = [v for v, _, _ in rough], True
            budgets = [max_iter - n for _, n, _ in rough]
        reader.read_exactly()
    solved = _solve(reader, starts, marginals, reg, tol, budgets, warm)
    return [
        (v, max_iter - budget + n, error)
        for (v, n, error), budget in zip(solved, budgets, strict=True)
    ]


def _solve(
    reader: Reader,
    starts: list[Vector],
    marginals: list[tuple[Exact, NDArray[np.bool_]]],
    reg: float,
    tol: float,
    budgets: list[int],
    warm: bool,
) -> list[tuple[Vector, int, float]]:
    """The heads' solvers run side by side: each round of asks is one read of the scores."""
    levels = 0 if warm else _levels(reader.spread / reg, min(budgets))
    # A level need not be exact, but where single rows weigh much it must place them too.
    coarse = max(tol, 0.05 if reader.n > 1000 else 0.01)
    solvers = [
        _anneal(Ask(t, v, reg), *marginal, levels, coarse, tol, budget)
        for t, (v, marginal, budget) in enumerate(zip(starts, marginals, budgets, strict=True))
    ]
    asks = {t: next(solver) for t, solver in enumerate(solvers)}
    solved: dict[int, tuple[Vector, int, float]] = {}
    while asks:
        for t, sums in zip(list(asks), reader.sums(list(asks.values())), strict=True):
            try:
                asks[t] = solvers[t].send(sums)
            except StopIteration as stop:
                solved[t] = stop.value
                del asks[t]
    return [solved[t] for t in range(len(solvers))]


def _anneal(
    start: Ask,
    marginal: Exact,
    used: NDArray[np.bool_],
    levels: int,
    coarse: float,
    tol: float,
    max_iter: int,
) -> Solver:
    """Approach a sharp problem through a falling sequence of reg; plain ones have one level."""
    v, n_iter, error = start.v, 0, math.inf
    for level in reversed(range(levels + 1)):
        last = level == 0
        budget = max_iter - n_iter if last else min(_LEVEL_ITER, max_iter - n_iter - level)
        here = start._replace(v=v, reg=start.reg * _SCALING**level)
        v, n, error = yield from _descend(here, marginal, used, tol if last else coarse, budget)
        n_iter += n
    return v, n_iter, error


def _descend(
    start: Ask, marginal: Exact, used: NDArray[np.bool_], tol: float, max_iter: int
) -> Solver:
    """Minimise the convex semi-dual

        F(v) = reg * sum_i r_i logsumexp((s_i + v) / reg) + (the marginal's part),

    whose gradient is m - t: the shares of the current solution less their target. Sinkhorn's
    step, v += reg * log(c / m) for exact sizes, scaled by the diagonal of the Hessian, is a
    fixed-point map (``marginal.step``); Anderson acceleration (Walker, Ni 2011) combines the last
    few iterates so that their residuals cancel best. It is kept only while the error falls: after
    a failure the plain step follows, from the last point trusted. Where even that crawls (sharp
    problems, in which rows change cluster one at a time), damped Newton steps finish.

    A generator: yields where it wants to know the sums over the rows, and is sent them.
    """
    reg, v, weight = start.reg, start.v, np.sqrt(marginal.c)
    memory: deque[tuple[Vector, Vector]] = deque(maxlen=_MEMORY + 1)
    best_v, best, trusted, plain = v, math.inf, math.inf, True
    checked = math.inf
    for n in range(1, max_iter + 1):
        sums = yield start._replace(v=in_all(v, used))
        m = sums.m[used]
        target = marginal.target(v, m)
        error = float(np.abs(m - target).sum())
        if error < best:
            best_v, best = v, error
        if best <= tol or n == max_iter:
            break
        if n % _PATIENCE == 0 and len(v) <= _NEWTON_MAX:
            rate = math.log(checked / best) / _PATIENCE
            if math.log(best / tol) > rate * _NEWTON_STEPS * (2 + len(v) / 32):
                here = start._replace(v=best_v)
                v, extra, error = yield from _newton(here, marginal, used, tol, max_iter - n)
                return (v, n + extra, error) if error < best else (best_v, n + extra, best)
            checked = best
        if error <= trusted or plain:
            trusted = error
            memory.append((v, marginal.step(v, m, target, sums.squares[used], reg) - v))
        else:  # the acceleration overshot: on from the last point trusted
            last = memory.pop()
            memory.clear()
            memory.append(last)
        v, plain = _accelerated(memory, weight), len(memory) == 1
        v = marginal.clip(v)
    return best_v, n, best


def _accelerated(memory: deque[tuple[Vector, Vector]], weight: Vector) -> Vector:
    """Anderson's combination of (point, residual) pairs, the last plus its residual if alone."""
    v, g = memory[-1]
    if len(memory) == 1:
        return v + g
    points, residuals = (np.array(vectors) for vectors in zip(*memory, strict=True))
    dv, dg = points[1:] - points[:-1], residuals[1:] - residuals[:-1]
    # A ridge: residuals that hardly change (starved clusters) call for no giant leap.
    n, b = len(dg), weight * g
    system = np.concatenate([(weight * dg).T, _RIDGE * math.sqrt(b @ b) * np.eye(n)])
    _, mix, _ = lapack.dgels(system, np.concatenate([b, np.zeros(n)]))
    return v + g - mix[:n] @ (dv + dg)


class _Point(NamedTuple):
    """The semi-dual at v: shares m, their target t, L1 error, value and Q'RQ."""

    v: Vector
    m: Vector
    t: Vector
    error: float
    value: float
    gram: NDArray[np.float64]


def _newton(
    start: Ask, marginal: Exact, used: NDArray[np.bool_], tol: float, max_iter: int
) -> Solver:
    """Newton steps with Levenberg-Marquardt damping, kept only when they improve."""

    def at(v: Vector) -> Generator[Ask, Sums, _Point]:
        sums = yield start._replace(v=in_all(v, used), gram=True)
        assert sums.gram is not None
        m, value = sums.m[used], sums.value + marginal.value(v)
        t = marginal.target(v, m)
        gram = sums.gram[np.ix_(used, used)]
        return _Point(v, m, t, float(np.abs(m - t).sum()), value, gram)

    here = best = yield from at(start.v)
    mu, n = 1e-4, 1
    while best.error > tol and n < max_iter:
        step = _newton_step(here, marginal, start.reg, mu)
        there = yield from at(marginal.clip(here.v + step))
        n += 1
        # The value does not resolve small steps. A slope that still falls does, and so does
        # half the error (any smaller error would let rounding walk in circles).
        falls = float((there.m - there.t) @ step) < 0
        if there.value < here.value or falls or there.error < 0.5 * here.error:
            here, mu = there, max(mu / 10, _DAMPING)
        else:
            mu *= 10
        best = min(best, there, key=lambda point: point.error)
    return best.v, n, best.error


def _newton_step(p: _Point, marginal: Exact, reg: float, mu: float) -> Vector:
    """Solve (Hessian + mu * scale) step = -gradient, for the clusters that may move."""
    d = np.sqrt(p.m + p.t)  # in this scale tiny clusters are not singular
    hessian = (np.diag(p.m) - p.gram) / reg + marginal.curvature(p.m, p.t, reg)
    hessian = hessian / np.outer(d, d) + mu / reg * np.eye(len(d))
    moves = marginal.moving(p.v, p.m)
    step = np.zeros_like(p.v)
    slope = ((p.t - p.m) / d)[moves]
    step[moves] = np.linalg.solve(hessian[np.ix_(moves, moves)], slope) / d[moves]
    return step


def in_all(v: Vector, used: NDArray[np.bool_]) -> Vector:
    """The potential of all clusters: -inf for those that get nothing."""
    if len(v) == len(used):
        return v
    full = np.full(len(used), -math.inf)
    full[used] = v
    return full


def _levels(spread: float, max_iter: int) -> int:
    """Levels of reg above the last: none, unless it is far below the spread of the scores."""
    levels = max(0, math.ceil(math.log(max(spread, 1.0) / _SPREAD, _SCALING)))
    return min(levels, max_iter - 1)  # one iteration each, at least
