"""From the solution of the transport to labels: ties, collapse, and exact sizes."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklearn_sela._kernels import Ask, Reader, ends

_GOLDEN = 0.6180339887498949  # its multiples modulo 1 fill [0, 1) evenly


def read_labels(reader: Reader, asks: list[Ask], limits: list[float]) -> list[Tensor]:
    """The largest entry of each row of each head's solution, ties split in proportion.

    ``limits`` has the largest share that a cluster of each head may get, 1 if any will do.
    """
    heads, of_heads = [], []
    for ask, (labels, least, most) in zip(asks, reader.largest(asks), strict=True):
        if least < 0:
            _split_ties(reader, ask, labels)
        if least < 0 or not reader.uniform:
            least, most = ends(labels if reader.uniform else labels[reader.r > 0])
        heads.append(labels)
        of_heads.append((-least, most))
    n = reader.n if reader.uniform else reader.shards.total(int((reader.r > 0).sum()))
    of_all = reader.shards.max(*itertools.chain(*of_heads))
    for ask, labels, limit, negative, top in zip(
        asks, heads, limits, of_all[::2], of_all[1::2], strict=True
    ):
        if -negative == top and n * (1 - limit) > 1 - 1e-9:  # owed to others
            _split_collapse(reader, ask, labels, int(top))
    return heads


def _split_ties(reader: Reader, ask: Ask, labels: Tensor) -> None:
    """Rows with several largest entries draw among them by a low-discrepancy sequence.

    Any group of like rows is so divided in proportion to its solution.
    """
    turn = 0
    for rows, z in reader.exponents_of(ask, labels < 0):
        q = z.softmax(1)
        near = q * (q >= q.amax(1, keepdim=True) * (1 - 1e-6))
        order = torch.arange(turn, turn + len(rows), device=q.device, dtype=torch.float64)
        labels[rows] = _draw(near, (0.5 + order * _GOLDEN) % 1.0)
        turn += len(rows)


def _split_collapse(reader: Reader, ask: Ask, labels: Tensor, top: int) -> None:
    """Every row prefers one cluster by a hair (all rows alike, say): no label would inform.

    So the proportions of the solution decide. The surest rows stay; the least sure of them
    leaves, as its share of top is at most the cluster's.
    """
    live = torch.nonzero(reader.r > 0).flatten()
    if not len(live):  # all are elsewhere
        return
    sure = torch.cat([q[:, top].clone() for _, q in reader.solution(ask)])[live]
    u = torch.zeros_like(reader.r)
    ranks = (torch.arange(len(live), device=u.device).to(u) + 0.5) / len(live)
    u[live[sure.argsort(descending=True)]] = ranks
    for rows, q in reader.solution(ask):
        drawn = (_draw(q.roll(-top, 1), u[rows]) + top) % q.shape[1]
        labels[rows] = torch.where(reader.r[rows] > 0, drawn, labels[rows])


def _draw(q: Tensor, u: Tensor) -> Tensor:
    """The entry of each row of q (proportions) in which the fraction u of the row falls."""
    cumulative = q.double().cumsum(1)
    return torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]


def size_limits(shares: NDArray[np.float64], n: int) -> Tensor:
    """Rows that each cluster may get: n * shares, rounded down where n rows still fit.

    Else as many as are missing are rounded up, those with the largest remainders first.
    """
    ideal = shares * n
    limits = np.floor(ideal * (1 + 1e-12)).astype(np.int64)  # whole numbers, for all rounding
    short = max(0, n - int(limits.sum()))
    limits[np.argsort(limits - ideal, kind="stable")[:short]] += 1
    return torch.from_numpy(limits)


def round_labels(reader: Reader, ask: Ask, labels: Tensor, limits: Tensor) -> float:
    """Move rows, in place, out of clusters over their limits; returns the mean cost of a row.

    The cost of a move is what the row loses in ``s + v``, its score at the prices v. Each round
    ranks the rows of overfull clusters by what their best move into a cluster with room would
    cost, and makes the cheapest moves for which there is need and room. One read a round; a
    round fills a cluster or is the last.
    """
    k, cost = len(limits), 0.0
    limits = limits.to(labels.device)
    while True:
        room = limits - labels.bincount(minlength=k)
        if (room >= 0).all():
            return cost / len(labels)
        need = (-room).clamp_min(0)
        rows, to, loss = _best_moves(reader, ask, labels, room)
        origin = labels[rows]
        ranked = loss.argsort(stable=True)
        ranked = ranked[_rank_in_group(origin[ranked]) < need[origin[ranked]]]
        chosen = ranked[_rank_in_group(to[ranked]) < room[to[ranked]]]
        labels[rows[chosen]] = to[chosen]
        cost += float(loss[chosen].double().sum())


def _best_moves(
    reader: Reader, ask: Ask, labels: Tensor, room: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, cluster with room that costs it least, the cost), for rows of overfull clusters."""
    found, full = [], room <= 0
    for rows, z in reader.exponents_of(ask, (room < 0)[labels]):
        own = z.gather(1, labels[rows, None])[:, 0]
        best, to = z.masked_fill_(full, -torch.inf).max(1)
        found.append((rows, to, (own - best).clamp_min(0) * ask.reg))
    rows, to, loss = (torch.cat(columns) for columns in zip(*found, strict=True))
    return rows, to, loss


def _rank_in_group(group: Tensor) -> Tensor:
    """How many earlier entries are of the same group, for each entry."""
    order = group.argsort(stable=True)
    counts = group.bincount()
    first = (counts.cumsum(0) - counts)[group[order]]
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - first
    return rank
