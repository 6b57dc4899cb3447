"""The iterates of a fixed-point map, and where they lead: Anderson acceleration, level by level.

In functions of arrays that numba, which reads may be fused by, can compile as they are. (What it
has compiled of them is out of date once they change, until ``_reads_numba.py`` does, too.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]  # of one number per cluster

SCALING = 4.0  # factor between two levels of entropic regularisation
_MEMORY = 5  # changes from one iterate to the next that a step combines
_RIDGE = 1e-10  # of the combination, relative to the square of the residual
_ROUNDED = 1e-13  # and relative to the changes' own: less is lost in rounding
_LEAST = float(np.finfo(np.float64).tiny)  # where both are 0
LENGTH, ERROR, LEVEL, READS, BEFORE, _NUMBERS = range(6)  # places of numbers
POINT, RESIDUAL, NEXT = range(3)  # and of vectors


class Path(NamedTuple):
    """The last points of an iteration, changed in place.

    A residual is what a plain step adds to a point. The numbers are the points since the path
    began, or began anew; the error of the last; the level of reg that it is at, counted down to
    0, and to -1 when the last point is the end; the reads made in all, and before this level.
    """

    weight: Vector  # of each cluster, in the norm of residuals
    numbers: Vector
    vectors: NDArray[np.float64]  # the last point, its residual, and the point to try next
    changes: NDArray[np.float64]  # of the weighted residual, from each point to the next
    moves: NDArray[np.float64]  # and of the point plus its residual


def new_path(weight: Vector, level: int = 0) -> Path:
    """A path of no points, to begin at 0."""
    k, numbers = len(weight), np.zeros(_NUMBERS)
    vectors, changes, moves = np.zeros((3, k)), np.zeros((_MEMORY, k)), np.zeros((_MEMORY, k))
    numbers[ERROR], numbers[LEVEL] = math.inf, level
    return Path(weight, numbers, vectors, changes, moves)


def next_level(path: Path) -> None:
    """On, from the point to try next, to the level below, where points are of another map."""
    numbers = path.numbers
    numbers[LEVEL] -= 1
    numbers[LENGTH], numbers[BEFORE] = 0, numbers[READS]


def reg_of(path: Path, reg: float) -> float:
    """Of its level, where that of the last one is ``reg``."""
    return float(reg * SCALING ** path.numbers[LEVEL])


def lengthen(path: Path, v: Vector, residual: Vector, error: float) -> None:
    """The next point, after that of the path."""
    n = int(path.numbers[LENGTH])
    if n > 0:
        change, i = residual - path.vectors[RESIDUAL], (n - 1) % _MEMORY
        np.multiply(path.weight, change, path.changes[i])
        np.add(v - path.vectors[POINT], change, path.moves[i])
    np.positive(v, path.vectors[POINT])  # numba takes seconds to compile a slice's assignment
    np.positive(residual, path.vectors[RESIDUAL])
    path.numbers[LENGTH], path.numbers[ERROR] = n + 1, error


def following(path: Path) -> Vector:
    """Anderson's step (Walker, Ni 2011): where residuals, combined, cancel best.

    The last point and its residual, less the changes of both of which those of the residual
    make most of it.
    """
    v = path.vectors[POINT] + path.vectors[RESIDUAL]
    n = min(int(path.numbers[LENGTH]) - 1, _MEMORY)
    if n < 1:
        return v
    changes, residual = path.changes[:n], path.weight * path.vectors[RESIDUAL]
    system = changes @ changes.T
    # A ridge: residuals that hardly change (starved clusters) call for no giant leap.
    ridge = _RIDGE * (residual @ residual) + _ROUNDED * np.trace(system) + _LEAST
    mix = np.linalg.solve(system + ridge * np.eye(n), changes @ residual)
    return v - mix @ path.moves[:n]
