"""The network: one backbone, several clustering heads, and inference in fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEWEST_ROWS = 2  # that batch norm can learn from
_BATCH_ROWS = 256  # of one inference batch
_LARGE = 1 << 22  # weights of a network that keeps a CPU busy with
_FEW_ROWS = 32  # rows: padding a few to more would take seconds
_BATCH_VALUES = 1 << 21  # input values in memory at a time, without gradients


def filled(x: Tensor) -> Tensor:
    """A batch of at least FEWEST_ROWS rows; those added are zeros."""
    short = FEWEST_ROWS - len(x)
    return x if short <= 0 else torch.cat([x, x.new_zeros(short, *x.shape[1:])])


def rows_at_once(n_values: int, most: int) -> int:
    """Rows of a batch that holds at most _BATCH_VALUES values, n_values a row."""
    return min(max(_BATCH_VALUES // n_values, 1), most)


class SelfLabelNetwork(nn.Module):
    """Backbone and ``n_heads`` linear heads; maps (n, ...) to (n, n_heads, n_clusters) logits.

    With ``freeze`` only the heads learn: the backbone gets no gradient and stays in eval mode,
    or batch norm would still take in statistics.
    """

    def __init__(
        self,
        backbone: nn.Module,
        n_features: int,
        n_heads: int,
        n_clusters: int,
        freeze: bool = False,
    ):
        super().__init__()
        self.backbone = backbone.requires_grad_(False) if freeze else backbone
        self.freeze = freeze
        self.heads = nn.Linear(n_features, n_heads * n_clusters)
        self.shape = (n_heads, n_clusters)

    def train(self, mode: bool = True) -> SelfLabelNetwork:
        super().train(mode)
        if self.freeze:
            self.backbone.eval()
        return self

    def embed(self, x: Tensor) -> Tensor:
        return self.backbone(x).flatten(1).float()  # whatever the backbone computes in

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.embed(x)).float().unflatten(1, self.shape)

    def describe(self, x: Tensor) -> Tensor:
        """Features, and beside them every head's probabilities: (n, d + n_heads * n_clusters)."""
        features = self.embed(x)
        p = self.heads(features).unflatten(1, self.shape).softmax(2)
        return torch.cat([features, p.flatten(1)], 1)

    def start_heads(self, centroids: Tensor, scale: float) -> None:
        """Point each output at a centroid; centroids (n_heads, n_clusters, n_features)."""
        directions = F.normalize(centroids, dim=2)
        directions = directions - directions.mean(1, keepdim=True)
        with torch.no_grad():
            self.heads.weight.copy_(scale * directions.flatten(0, 1))
            self.heads.bias.zero_()


def inference(
    network: nn.Module,
    function: Callable[[Tensor], Tensor],
    batch: Callable[[slice], Tensor],
    n: int,
    n_values: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, function(batch(rows))) over n rows, network in eval mode meanwhile.

    The size of a batch depends on the network and the values per row alone, and the last batch
    is padded to it: kernels choose their order of summation by shape, so only equal shapes give
    a row the same bits in any company.
    """
    training = network.training
    device = next(network.parameters()).device
    large = sum(p.numel() for p in network.parameters()) > _LARGE
    size = rows_at_once(n_values, _FEW_ROWS if large and device.type == "cpu" else _BATCH_ROWS)
    network.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            for start in range(0, n, size):
                rows = slice(start, min(start + size, n))
                x = batch(rows)
                short = size - len(x)
                if short:
                    x = torch.cat([x, x[:1].expand(short, *x.shape[1:])])
                yield rows, function(x)[: size - short]
    finally:
        network.train(training)
