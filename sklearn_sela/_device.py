"""Where and how to compute, with randomness that leaves the rest of the process alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_SEEDED = threading.RLock()  # torch's global generator is one per process


def resolve_device(device: str | torch.device, own: int | None = None) -> torch.device:
    """The torch device of a name; ``"auto"`` takes CUDA where there is one, else the CPU.

    "cuda" without a number is the ``own`` GPU of this process, if it has one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved == torch.device("cuda") and own is not None:
        device = resolved = torch.device("cuda", own)
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r} was asked for, but torch finds "
            f"{torch.cuda.device_count() or 'no'} CUDA device(s) here; use device='auto' or 'cpu'."
        )
    return resolved


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; ``"auto"`` takes bfloat16 on GPUs that have it."""
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """A generator for our draws, and torch's global one seeded within, restored after.

    The global generator is what users' modules draw from (initial weights, dropout); being
    one per process, it is held by one fit at a time. Other devices' are not touched.
    Within, torch computes gradients and in float32, whatever the caller's modes.
    """
    cuda = [device] if device.type == "cuda" else []
    with _SEEDED, torch.random.fork_rng(devices=cuda), plain_modes(device):
        generator = torch.Generator(device=device)
        reseed(generator, seed)
        yield generator


def reseed(generator: torch.Generator, seed: int) -> None:
    """Start our generator afresh, and torch's global ones for its device."""
    generator.manual_seed(seed)
    torch.default_generator.manual_seed(seed)
    if generator.device.type == "cuda":
        with torch.cuda.device(generator.device):
            torch.cuda.manual_seed(seed)


def random_state(generator: torch.Generator) -> list[Tensor]:
    """Where our generator is, and torch's global ones for its device."""
    state = [generator.get_state(), torch.get_rng_state()]
    if generator.device.type == "cuda":
        state.append(torch.cuda.get_rng_state(generator.device))
    return state


def set_random_state(generator: torch.Generator, state: list[Tensor]) -> None:
    """Bring them back to where they were."""
    generator.set_state(state[0])
    torch.set_rng_state(state[1])
    if generator.device.type == "cuda":
        torch.cuda.set_rng_state(state[2], generator.device)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Within, products in this precision, where torch deems it safe; float32 is no change."""
    # No cache: torch empties it when the outermost context ends, which ``plain_modes`` makes that
    # of the whole fit; every step would see the weights of the first.
    lower = precision != torch.float32
    return torch.autocast(device.type, precision, enabled=lower, cache_enabled=False)


@contextlib.contextmanager
def plain_modes(device: torch.device) -> Iterator[None]:
    """float32 for all that is made within, gradients, no autocast; the caller's modes after."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """One CPU thread for torch within, if wanted: threads with too little to do only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
