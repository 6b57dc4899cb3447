"""Runs that survive being killed: what training needs to go on, on disk after every epoch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from torch import Tensor, nn

from sklearn_sela._images import Images
from sklearn_sela._shares import Share, fingerprint
from sklearn_sela._torchvision import read_weights

_RUN = "run.json"
# To what a fit ends in; over how many processes, only to the bits.
_IMMATERIAL = ("device", "memory", "checkpoint_dir", "verbose", "distributed")
_LONG = 80  # characters of a list, beyond which its hash stands for it


class Checkpoints:
    """A folder that holds one run: what it is, and a file for each round of training.

    Files are replaced whole, never changed: whenever the process dies, the last complete one
    is there. They hold tensors, numbers and text, and are loaded as such; no code runs.

    Parameters
    ----------
    folder : str or Path
        Made if it is not there.
    run : dict of str to str
        What decides the outcome, by name. The folder of another run is refused.
    seed : int
        Of a new run; one that is resumed keeps its own, in ``seed``.

    Raises
    ------
    ValueError
        For the folder of another run, or a file that is damaged.
    OSError
        For a folder that cannot be written.
    """

    def __init__(self, folder: Any, run: dict[str, str], seed: int):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = (self.folder / _RUN).exists()
        except OSError as error:
            raise self._unwritable(error) from error
        if known:
            self.seed = self._same_run(run)
        else:
            self.seed = seed
            text = json.dumps({"seed": seed, **run}, indent=1)
            self.replace(_RUN, lambda file: file.write(text.encode()))
        self.id = joblib.hash((self.seed, run))

    def of(self, stage: str) -> Checkpoint:
        """That of a round."""
        return Checkpoint(self, f"{stage}.pt")

    def _same_run(self, run: dict[str, str]) -> int:
        path = self.folder / _RUN
        try:
            found = json.loads(path.read_text())
            seed = int(found.pop("seed"))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise damaged(path, error) from error
        differ = [name for name in run | found if run.get(name) != found.get(name)]
        if differ:
            there = ", ".join(f"{name}={found.get(name)}" for name in differ)
            here = ", ".join(f"{name}={run.get(name)}" for name in differ)
            raise ValueError(
                f"checkpoint_dir={str(self.folder)!r} holds another run, with {there}; this one "
                f"has {here}. Use another folder, or delete this one to start anew."
            )
        return seed

    def replace(self, name: str, write: Callable[[Any], Any]) -> None:
        try:
            replace_file(self.folder / name, write)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into RuntimeError
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> OSError:
        return OSError(
            f"checkpoint_dir={str(self.folder)!r} cannot be written: {error}. What it holds stays "
            "as it was: mend this and call fit again to go on from there."
        )


@dataclass(frozen=True)
class Checkpoint:
    """The file of a round."""

    run: Checkpoints
    name: str

    def save(self, state: dict) -> None:
        """Keep this state in place of the last."""
        whole = {"run": self.run.id, **state}
        self.run.replace(self.name, lambda file: torch.save(whole, file))

    def load(self, device: torch.device) -> dict | None:
        """The last state that was saved, or None."""
        path = self.run.folder / self.name
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever torch makes of a file that is not one of its own
            raise damaged(path, error) from error
        if not isinstance(state, dict) or state.pop("run", None) != self.run.id:
            raise ValueError(
                f"{path} belongs to another run than {self.run.folder / _RUN}. Delete the folder "
                "to start anew."
            )
        return state


def replace_file(path: Path, write: Callable[[Any], Any]) -> None:
    """Let ``write(file)`` make a file, which is there whole or, on any error, as it was before."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the data
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def damaged(path: Path, error: Exception) -> ValueError:
    what = (str(error).splitlines() or ["empty"])[0]
    return ValueError(
        f"{path} is damaged, or not a checkpoint ({type(error).__name__}: {what}). Delete the "
        "folder to start anew."
    )


def checkpoints_of(
    estimator: Any, X: np.ndarray | Images, share: Share, seed: int, device: torch.device
) -> Checkpoints | None:
    """Those of an estimator's ``checkpoint_dir`` for this X, if it has one."""
    from sklearn_sela import __version__

    if estimator.checkpoint_dir is None:
        return None
    of_data = fingerprint(X, share)

    def checkpoints() -> Checkpoints:
        parameters = estimator.get_params(deep=False).items()
        run = {name: text_of(value) for name, value in parameters if name not in _IMMATERIAL}
        if estimator.weights is not None:  # what a file holds, wherever it is
            run["weights"] = text_of(read_weights(estimator.backbone, estimator.weights))
        run |= {"device": device.type, "X": of_data, "sklearn_sela": __version__}
        return Checkpoints(estimator.checkpoint_dir, run, seed)

    return share.shards.first(checkpoints)


def text_of(value: Any) -> str:
    """Text that is the same for the same value, in another process too."""
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {text_of(value.state_dict())}"
    if isinstance(value, Mapping):
        return joblib.hash([(str(key), text_of(part)) for key, part in value.items()])
    if isinstance(value, Tensor):
        return joblib.hash(value.detach().cpu().double().numpy())
    if hasattr(value, "__array__") or isinstance(value, list | tuple):
        text = repr(np.asarray(value).tolist())
        return text if len(text) < _LONG else joblib.hash(text)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
