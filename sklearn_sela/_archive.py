"""A file of plain values and arrays: safetensors, with the values as JSON. No code runs from it.

Values are None, booleans, numbers, text, and lists, tuples, mappings, ranges, paths, devices,
arrays, tensors and DataFrames of them. What is read is what was written, or an error: a digest
covers the whole file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

_KIND = "sklearn_sela estimator, version 1"
_LONGEST = 1 << 20  # range: a few bytes of a file must not become gigabytes


def write(file: Any, content: dict[str, Any]) -> None:
    """Write a mapping of values to a binary file; TypeError for what only code could make."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(_encode(content, arrays))
    file.write(save(arrays, {"kind": _KIND, "content": text, "sha256": _digest(text, arrays)}))


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` has written.

    Raises
    ------
    ValueError
        For another file, or one that has changed since.
    OSError
        For a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is no such file, or damaged ({error})") from error
    if metadata.get("kind") != _KIND:
        raise ValueError(
            f"its kind is {metadata.get('kind')!r:.80}, and this version of sklearn_sela reads "
            f"{_KIND!r}"
        )
    text = metadata.get("content", "")
    if metadata.get("sha256") != _digest(text, arrays):
        raise ValueError("its checksum is wrong: it has been changed, or is damaged")
    content = _decode(json.loads(text), arrays)
    if arrays:
        raise ValueError(f"it holds {len(arrays)} arrays that are of nothing")
    return content


def storable(value: Any) -> bool:
    try:
        _encode(value, {})
    except TypeError:  # also what torch says of tensors that NumPy has no type for
        return False
    return True


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def _encode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """As JSON, in which a list of a name and arguments stands for all that JSON has not."""

    def several(values: Any) -> list[Any]:
        return [_encode(v, arrays) for v in values]

    if isinstance(value, np.generic) and _is_plain(value.dtype):
        return ["scalar", value.dtype.str, _encode(value.item(), arrays)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", *several(value)]
    if isinstance(value, range) and len(value) <= _LONGEST:
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, os.PathLike):
        return ["path", os.fspath(value)]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, pd.DataFrame):
        return ["frame", *((name, several(value[name].tolist())) for name in value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _encode(v, arrays) for key, v in value.items()}
    if isinstance(value, Tensor):
        return ["tensor", _encode(value.detach().cpu().numpy(), arrays)]
    if isinstance(value, np.ndarray) and _is_plain(value.dtype):
        name = str(len(arrays))
        arrays[name] = np.asarray(smallest(value), order="C")
        return ["array", name, value.dtype.str]
    if isinstance(value, np.ndarray) and all(isinstance(v, str) for v in value.flat):
        return ["names", *several(value.tolist())]
    raise TypeError(type(value).__name__)


def _decode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The value; its arrays are taken out: each is one of the file's own, none is there twice."""
    if isinstance(value, dict):
        return {key: _decode(v, arrays) for key, v in value.items()}
    if not isinstance(value, list):
        return value
    kind, *parts = value
    if kind == "array":
        name, dtype = parts
        if name not in arrays:
            raise ValueError(f"it holds no array {name!r:.20}, or that is of something else")
        _plain(arrays[name].dtype)
        return arrays.pop(name).astype(_plain(dtype))
    if kind == "frame":
        return pd.DataFrame({name: [_decode(v, arrays) for v in column] for name, column in parts})
    parts = [_decode(part, arrays) for part in parts]
    makers: dict[Any, Any] = {
        "list": lambda *parts: [*parts],
        "tuple": lambda *parts: parts,
        "range": _range,
        "path": Path,
        "device": torch.device,
        "tensor": torch.from_numpy,
        "names": lambda *names: np.array(names, dtype=object),
        "scalar": lambda dtype, item: _plain(dtype).type(item),
    }
    return makers[kind](*parts)


def _range(*bounds: int) -> range:
    if len(found := range(*bounds)) > _LONGEST:
        raise ValueError(f"{found} is too long")
    return found


def _is_plain(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8


def _plain(dtype: Any) -> np.dtype:
    """A type of numbers, which a few bytes cannot blow up to gigabytes."""
    if not _is_plain(np.dtype(dtype)):
        raise ValueError(f"arrays of {dtype!r:.20} are not known")
    return np.dtype(dtype)


def smallest(array: np.ndarray) -> np.ndarray:
    """Integers in the smallest type that holds them all: labels need no eight bytes."""
    if array.dtype.kind not in "iu" or not array.size:
        return array
    least, most = int(array.min()), int(array.max())
    for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32):
        if np.iinfo(dtype).min <= least and most <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array
