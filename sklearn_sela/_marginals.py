"""What the cluster shares should be: the second marginal of the transport, in the dual.

Each kind says where the shares m of the current potential v are to go (``target``, t), where the
potential may go (``clip``, ``moving``), and its part of the dual (``value``, ``curvature``); how
the potential follows (``step``) is the same for all. A new kind of marginal is a new class here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from sklearn_sela._path import Vector

STARVED = float(np.finfo(np.float32).tiny)  # least share, whose log is finite
_SETTLED = 0.9  # of a share, at most: no step is longer than 10 of Sinkhorn's


def step(m: Vector, t: Vector, squares: Vector, reg: float, reg_m: float) -> Vector:
    """Sinkhorn's step, reg * log(t / m), longer where less of a share is loose.

    Sinkhorn's is Newton's for a Hessian diag(m) / reg, as m * log(t / m) is t - m, to first
    order. The true one, (diag(m) - Q'RQ) / reg, has the diagonal d / reg, d = m - squares,
    which is far less where rows are sure of their clusters, and rows that sum to zero. With
    -u_j u_l / reg for its other entries, Newton's step divides by d + u ** 2: about
    d / (1 - d / sum(d)), and just that for two clusters and for like ones. A pull adds
    m / reg_m.
    """
    d = m - np.minimum(squares, _SETTLED * m)
    d /= 1 - np.minimum(d / d.sum(), 0.5)  # no entry is beyond the sum of the others
    return np.log(t / m) / (d / m / reg + 1 / reg_m)


def centred(v: Vector, c: Vector) -> Vector:
    """v with mean 0: a constant shift changes nothing."""
    return v - c @ v


@dataclass(frozen=True)
class Exact:
    """Shares equal to c. Dual term -<c, v>."""

    c: Vector
    reg_m: float = math.inf  # how hard the shares are pulled towards c

    def target(self, v: Vector, m: Vector) -> Vector:
        return self.c

    def step(self, v: Vector, m: Vector, t: Vector, squares: Vector, reg: float) -> Vector:
        return self.clip(v + step(m, t, squares, reg, self.reg_m))

    def value(self, v: Vector) -> float:
        return -float(self.c @ v)

    def curvature(self, m: Vector, t: Vector, reg: float) -> Vector:
        return np.outer(m + t, m + t) / reg  # none; but a constant shift is flat: pin it

    def clip(self, v: Vector) -> Vector:
        return centred(v, self.c)

    def moving(self, v: Vector, m: Vector) -> NDArray[np.bool_]:
        return np.ones(len(v), dtype=bool)


@dataclass(frozen=True)
class Relaxed(Exact):
    """Shares pulled towards c by reg_m * KL(m | c) (Chizat et al. 2018).

    Dual term reg_m * logsumexp(log c - v / reg_m).
    """

    def _pull(self, v: Vector) -> Vector:
        return np.log(self.c) - v / self.reg_m

    def target(self, v: Vector, m: Vector) -> Vector:
        return np.maximum(softmax(self._pull(v)), STARVED)

    def value(self, v: Vector) -> float:
        return self.reg_m * float(logsumexp(self._pull(v)))

    def curvature(self, m: Vector, t: Vector, reg: float) -> Vector:
        return super().curvature(m, t, reg) + (np.diag(t) - np.outer(t, t)) / self.reg_m


@dataclass(frozen=True)
class Capped(Exact):
    """Shares of at most c: v <= 0, and v = 0 where there is room. Dual term -<c, v>."""

    def target(self, v: Vector, m: Vector) -> Vector:
        return np.where(v < 0, self.c, np.minimum(m, self.c))

    def clip(self, v: Vector) -> Vector:
        return np.minimum(v - min(v.max(), 0.0), 0.0)  # some cluster has room

    def moving(self, v: Vector, m: Vector) -> NDArray[np.bool_]:
        return (v < 0) | (m > self.c)

    def curvature(self, m: Vector, t: Vector, reg: float) -> Vector:
        return np.zeros((len(m), len(m)))
