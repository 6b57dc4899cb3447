"""What the cluster shares should be: the second marginal of the transport, in the dual.

Each kind says where the shares m of the current potential v are to go (``target``), how the
potential follows (``step``: Sinkhorn's update), and its part of the dual (``value``,
``curvature``). A new kind of marginal is a new class here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

Vector = NDArray[np.float64]  # of one number per cluster


@dataclass(frozen=True)
class Exact:
    """Shares equal to c. Dual term -<c, v>."""

    c: Vector

    def target(self, v: Vector, m: Vector) -> Vector:
        return self.c

    def step(self, v: Vector, m: Vector, reg: float) -> Vector:
        moved = v + reg * np.log(self.c / m)
        return moved - self.c @ moved  # a constant shift changes nothing: mean 0

    def value(self, v: Vector) -> float:
        return -float(self.c @ v)

    def curvature(self, m: Vector, t: Vector, reg: float) -> Vector:
        return np.outer(m + t, m + t) / reg  # none; but a constant shift is flat: pin it

    def clip(self, v: Vector) -> Vector:
        return v

    def moving(self, v: Vector, m: Vector) -> NDArray[np.bool_]:
        return np.ones(len(v), dtype=bool)


@dataclass(frozen=True)
class Relaxed(Exact):
    """Shares pulled towards c by reg_m * KL(m | c) (Chizat et al. 2018).

    Dual term reg_m * logsumexp(log c - v / reg_m); Sinkhorn's step is damped.
    """

    reg_m: float

    def _pull(self, v: Vector) -> Vector:
        return np.log(self.c) - v / self.reg_m

    def target(self, v: Vector, m: Vector) -> Vector:
        return softmax(self._pull(v))

    def step(self, v: Vector, m: Vector, reg: float) -> Vector:
        moved = self.reg_m / (self.reg_m + reg) * (v + reg * np.log(self.c / m))
        return moved - self.c @ moved

    def value(self, v: Vector) -> float:
        return self.reg_m * float(logsumexp(self._pull(v)))

    def curvature(self, m: Vector, t: Vector, reg: float) -> Vector:
        return super().curvature(m, t, reg) + (np.diag(t) - np.outer(t, t)) / self.reg_m


@dataclass(frozen=True)
class Capped(Exact):
    """Shares of at most c: v <= 0, and v = 0 where there is room. Dual term -<c, v>."""

    def target(self, v: Vector, m: Vector) -> Vector:
        return np.where(v < 0, self.c, np.minimum(m, self.c))

    def step(self, v: Vector, m: Vector, reg: float) -> Vector:
        return self.clip(v + reg * np.log(self.c / m))

    def clip(self, v: Vector) -> Vector:
        return np.minimum(v - min(v.max(), 0.0), 0.0)  # some cluster has room

    def moving(self, v: Vector, m: Vector) -> NDArray[np.bool_]:
        return (v < 0) | (m > self.c)

    def curvature(self, m: Vector, t: Vector, reg: float) -> Vector:
        return np.zeros((len(m), len(m)))
