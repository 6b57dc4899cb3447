"""What the cluster shares should be: the second marginal of the transport, in the dual.

Each kind says where the shares m of the current potential v are to go (``target``), how the
potential follows (``step``: Sinkhorn's update), and its part of the dual (``value``,
``curvature``). A new kind of marginal is a new class here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exact:
    """Shares equal to c. Dual term -<c, v>."""

    c: Tensor

    def target(self, v: Tensor, m: Tensor) -> Tensor:
        return self.c

    def step(self, v: Tensor, m: Tensor, reg: float) -> Tensor:
        moved = v + reg * (self.c.log() - m.log())
        return moved - self.c @ moved  # a constant shift changes nothing: mean 0

    def value(self, v: Tensor) -> float:
        return -float(self.c @ v)

    def curvature(self, m: Tensor, t: Tensor, reg: float) -> Tensor:
        return torch.outer(m + t, m + t) / reg  # none; but a constant shift is flat: pin it

    def clip(self, v: Tensor) -> Tensor:
        return v

    def moving(self, v: Tensor, m: Tensor) -> Tensor:
        return torch.ones_like(v, dtype=torch.bool)


@dataclass(frozen=True)
class Relaxed(Exact):
    """Shares pulled towards c by reg_m * KL(m | c) (Chizat et al. 2018).

    Dual term reg_m * logsumexp(log c - v / reg_m); Sinkhorn's step is damped.
    """

    reg_m: float

    def _pull(self, v: Tensor) -> Tensor:
        return self.c.log() - v / self.reg_m

    def target(self, v: Tensor, m: Tensor) -> Tensor:
        return self._pull(v).softmax(0)

    def step(self, v: Tensor, m: Tensor, reg: float) -> Tensor:
        moved = self.reg_m / (self.reg_m + reg) * (v + reg * (self.c.log() - m.log()))
        return moved - self.c @ moved

    def value(self, v: Tensor) -> float:
        return self.reg_m * float(self._pull(v).logsumexp(0))

    def curvature(self, m: Tensor, t: Tensor, reg: float) -> Tensor:
        return super().curvature(m, t, reg) + (torch.diag(t) - torch.outer(t, t)) / self.reg_m


@dataclass(frozen=True)
class Capped(Exact):
    """Shares of at most c: v <= 0, and v = 0 where there is room. Dual term -<c, v>."""

    def target(self, v: Tensor, m: Tensor) -> Tensor:
        return torch.where(v < 0, self.c, torch.minimum(m, self.c))

    def step(self, v: Tensor, m: Tensor, reg: float) -> Tensor:
        return self.clip(v + reg * (self.c.log() - m.log()))

    def clip(self, v: Tensor) -> Tensor:
        return (v - v.max().clamp_max(0.0)).clamp_max(0.0)  # some cluster has room

    def moving(self, v: Tensor, m: Tensor) -> Tensor:
        return (v < 0) | (m > self.c)

    def curvature(self, m: Tensor, t: Tensor, reg: float) -> Tensor:
        return torch.zeros(len(m), len(m)).to(m)
