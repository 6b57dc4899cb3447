"""The iteration: Sinkhorn's, scaled and accelerated, then Newton's; one potential per cluster.

The row constraint is kept exactly by a softmax, so one iteration reads the scores once. All
that is done between two reads is on vectors of one number per cluster.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklearn_sela._kernels import Ahead, Ask, Reader, Sums
from sklearn_sela._marginals import STARVED, Exact
from sklearn_sela._path import (
    BEFORE,
    ERROR,
    LENGTH,
    LEVEL,
    NEXT,
    POINT,
    READS,
    SCALING,
    Path,
    Vector,
    following,
    lengthen,
    new_path,
    next_level,
    reg_of,
)

_PATIENCE = 8  # reads between two looks at how fast the error falls
_DAMPING = 1e-10  # least of a Newton step, below which its system may be singular
_RESOLVED = 1e-5  # of a value, relative to the potential: about what rounding leaves of it
_NEWTON_STEPS = 4  # that finish a solve, about, each a read with the Gram matrix
_NEWTON_MAX = 1024  # clusters; beyond, its K x K systems cost more than they save
_SPREAD = 128.0  # of the scores, in units of reg, that one level can do with
_FIRST, _COARSE, _FINE = 0.5, 0.1, 0.01  # L1 errors at which levels but the last are done with
_FEW, _FEW_EACH = 1000, 4  # rows, in all or a cluster: of no more, single ones matter: _FINE
_LEVEL_ITER = 100  # most reads of a level but the last, and before exact ones

Solver = Generator[Ask, Sums, tuple[Vector, int, float]]


class _Problem(NamedTuple):
    """Of one head."""

    marginal: Exact  # what the shares of the clusters used should be
    used: NDArray[np.bool_]
    newton: float  # reads that Newton steps to the end take as long as, about
    alone: bool  # whether nothing waits for its reads to be read along


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
    newton = _NEWTON_STEPS * reader.gram_cost if reader.k <= _NEWTON_MAX else math.inf
    alone = len(starts) == 1 and reader.shards.alone
    few = reader.n <= max(_FEW, _FEW_EACH * reader.k)
    aims = np.array([tol, *[_FINE if few else _COARSE] * (levels - 1), *[_FIRST] * (levels > 0)])
    aims = np.maximum(aims, tol)
    solvers = [
        _descend(Ask(t, v, reg), _Problem(*marginal, newton, alone), aims, budget)
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


def _descend(start: Ask, problem: _Problem, aims: Vector, max_iter: int) -> Solver:
    """Minimise the convex semi-dual

        F(v) = reg * sum_i r_i logsumexp((s_i + v) / reg) + (the marginal's part),

    whose gradient is m - t: the shares of the current solution less their target. Sinkhorn's
    step, v += reg * log(c / m) for exact sizes, scaled by the diagonal of the Hessian, is a
    fixed-point map (``marginal.step``); Anderson acceleration (Walker, Ni 2011) combines the last
    few iterates so that their residuals cancel best. It is kept only while the error falls: after
    a failure the plain step follows, from the last point trusted. Where even that crawls (sharp
    problems, in which rows change cluster one at a time), damped Newton steps finish.

    ``aims`` are the L1 errors to reach: the tolerance, and before it those of the levels of a
    falling reg through which a sharp problem is approached, the first one last. Such a level is
    left for the point that it would try next.

    A generator: yields where it wants to know the sums over the rows, and is sent them. Ends at
    the best point seen.
    """
    marginal, used, newton, alone = problem
    level = len(aims) - 1
    path = new_path(np.sqrt(marginal.c), level)
    numbers, best_v, best, checked = path.numbers, start.v, math.inf, math.inf
    path.vectors[NEXT] = start.v
    compiled = alone and type(marginal) is Exact and len(start.v) == len(used)
    while True:
        n, ahead = int(numbers[READS]), None
        if compiled:  # up to the read that is to be decided on here
            look = min(_last(path, max_iter), n + _PATIENCE - n % _PATIENCE)
            ahead = Ahead(marginal.c, start.reg, aims, look - 1, path)
        v = in_all(path.vectors[NEXT].copy(), used)
        sums = yield start._replace(v=v, reg=reg_of(path, start.reg), ahead=ahead)
        if numbers[LEVEL] < 0:
            return path.vectors[POINT], int(numbers[READS]), float(numbers[ERROR])
        numbers[READS] += 1
        n, v, reg = int(numbers[READS]), path.vectors[NEXT].copy(), reg_of(path, start.reg)
        if numbers[LEVEL] < level:
            level, best, checked = int(numbers[LEVEL]), math.inf, math.inf
        if numbers[LENGTH] > 0 and numbers[ERROR] < best:  # of a point that was taken by itself
            best_v, best = path.vectors[POINT].copy(), float(numbers[ERROR])
        m = np.maximum(sums.m[used], STARVED)
        target = marginal.target(v, m)
        error = float(np.abs(m - target).sum())
        if error < best:
            best_v, best = v, error
        aim, left = aims[level], _last(path, max_iter) - n
        if n % _PATIENCE == 0 and newton < math.inf and best > aim and left:
            rate = math.log(checked / best) / _PATIENCE
            if math.log(best / aim) > rate * min(newton, left):
                here = start._replace(v=best_v, reg=reg)
                better, extra, error = yield from _newton(here, problem, aim, left)
                numbers[READS] = n = n + extra
                if error < best:
                    best_v, best = better, error
                if not level:
                    return best_v, n, best
                path.vectors[NEXT] = best_v
                next_level(path)
                continue
            checked = best
        done = best <= aim or not left
        if done and not level:
            return best_v, n, best
        if error <= numbers[ERROR] or numbers[LENGTH] <= 1:
            lengthen(path, v, marginal.step(v, m, target, sums.squares[used], reg) - v, error)
        else:  # the acceleration overshot: on from the last point trusted, anew
            numbers[LENGTH] = 1
        path.vectors[NEXT] = marginal.clip(following(path))
        if done:
            next_level(path)


def _last(path: Path, max_iter: int) -> int:
    """The read, of all, that ends the level at the latest; each that follows has one, at least."""
    level, before = int(path.numbers[LEVEL]), int(path.numbers[BEFORE])
    return min(before + _LEVEL_ITER, max_iter - level) if level else max_iter


class _Point(NamedTuple):
    """The semi-dual at v: shares m, their target t, L1 error, value and Q'RQ."""

    v: Vector
    m: Vector
    t: Vector
    error: float
    value: float
    gram: NDArray[np.float64]


def _newton(start: Ask, problem: _Problem, tol: float, max_iter: int) -> Solver:
    """Newton steps with Levenberg-Marquardt damping, kept only when they improve."""
    marginal, used, *_ = problem

    def at(v: Vector) -> Generator[Ask, Sums, _Point]:
        sums = yield start._replace(v=in_all(v, used), gram=True)
        assert sums.gram is not None
        m, value = np.maximum(sums.m[used], STARVED), sums.value + marginal.value(v)
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
        # half the error (any smaller error would let rounding walk in circles), of points that
        # the value cannot tell apart: of others, far ones, it would walk in circles, too.
        falls = float((there.m - there.t) @ step) < 0
        apart = _RESOLVED * (start.reg + np.abs(here.v).max() + np.abs(there.v).max())
        halved = there.error < 0.5 * here.error and there.value < here.value + apart
        if there.value < here.value or falls or halved:
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
    levels = max(0, math.ceil(math.log(max(spread, 1.0) / _SPREAD, SCALING)))
    return min(levels, max_iter - 1)  # one iteration each, at least
