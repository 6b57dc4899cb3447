"""Where to compute, and randomness that leaves the rest of the process alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_SEEDED = threading.RLock()  # torch's global generator is one per process


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; ``"auto"`` takes CUDA, then Apple's MPS, then the CPU."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device={device!r} is unknown; use 'auto', 'cpu', 'cuda', 'cuda:0', ... or 'mps'."
        ) from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r} was asked for, but torch finds no CUDA device here; "
            "use device='auto' or device='cpu'."
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r} was asked for, but there are only "
            f"{torch.cuda.device_count()} CUDA devices."
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"device={device!r} was asked for, but torch finds no MPS device here; "
            "use device='auto' or device='cpu'."
        )
    return resolved


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """A generator for our draws, and torch's global one seeded within, restored after.

    The global generator is what users' modules draw from (initial weights, dropout); being
    one per process, it is held by one fit at a time.
    """
    cuda = [device] if device.type == "cuda" else []
    with _SEEDED, torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield torch.Generator(device=device).manual_seed(seed)
