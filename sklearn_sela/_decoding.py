"""Image files, and items of datasets, to pixels of one shape."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sklearn_sela._device import seeded

_SIDE = 64  # pixels, of images from files unless told otherwise
_MEASURED = 100  # images looked at for their size
_NAMED = 10  # bad images that an error lists
_DRAFT = 2  # times the size asked for, that a JPEG is decoded at: the rest is filtered
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's
_ORIENTATION = 0x0112  # EXIF's tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_SIDE = [_UPRIGHT[value] for value in (5, 6, 7, 8)]  # height and width swapped
_UNDECODABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises


class Files:
    """Image files by number, as (C, H, W) uint8."""

    dtype = np.dtype(np.uint8)
    unreadable: tuple[type[Exception], ...] = (Exception,)  # damaged files raise anything

    def __init__(self, paths: list[str], image_shape: tuple[int, ...] | None):
        self.paths = paths
        self.threads = torch.get_num_threads()
        self.shape = _asked(image_shape, 3) or (3, *[self._side()] * 2)
        _mode(self.shape[0])

    def __reduce__(self) -> tuple:  # as many threads as the process that it is sent to has
        return Files, (self.paths, self.shape)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray:
        with _opened(self.paths[i]) as image:
            side = _DRAFT * max(self.shape[1:])
            image.draft(None, (side, side))
            image.load()
            try:
                turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
            except Exception:  # the EXIF data are damaged, the pixels are not
                turn = None
            return pixels(image, self.shape, turn)

    def name(self, i: int) -> str:
        return self.paths[i]

    def _side(self) -> int:
        sides, bad = [], []
        for i in spread(len(self), _MEASURED):
            try:
                with _opened(self.paths[i]) as image:
                    sides.append(min(image.size))
            except Exception as error:
                bad.append((self.paths[i], reason_of(error)))
        if not sides:
            raise ValueError(complaint(bad))
        return min(_SIDE, int(np.median(sides)))


class Items:
    """Items of a Dataset or a list by number, as (C, H, W) or (d,), of one dtype."""

    threads = 1  # datasets may share a file or a generator

    def __init__(self, items: Any, image_shape: tuple[int, ...] | None, skip: bool):
        if len(items) == 0:
            raise ValueError(f"X is a {type(items).__name__} without items.")
        self.items = items
        self.unreadable: tuple[type[Exception], ...] = _UNDECODABLE if skip else ()
        first = self._first()
        if isinstance(first, Image.Image):
            self.dtype = np.dtype(np.uint8)
            channels = 1 if _is_grey(first) else 3
            self.shape: tuple[int, ...] = (channels, first.height, first.width)
        else:
            self.dtype, self.shape = first.dtype, first.shape
        if len(self.shape) == 3:
            self.shape = _asked(image_shape, self.shape[0]) or self.shape

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> np.ndarray:
        with self._noting(i):
            item = self._item(i)
            if isinstance(item, Image.Image):
                item = pixels(item, self.shape) if len(self.shape) == 3 else np.asarray(item)
            if item.dtype != self.dtype or item.ndim != len(self.shape):
                raise ValueError(
                    f"{self.name(i)} has {item.ndim} dimensions and dtype {item.dtype}, unlike the "
                    f"first, with {len(self.shape)} and {self.dtype}."
                )
            return item if item.shape == self.shape else _resized(item, self.shape)

    def name(self, i: int) -> str:
        return f"item {i}"

    @contextlib.contextmanager
    def _noting(self, i: int) -> Iterator[None]:
        """What is raised within tells of the item."""
        try:
            yield
        except Exception as error:
            error.add_note(f"Raised by {self.name(i)} of X.")
            raise

    def _first(self) -> Any:
        bad = []
        with seeded(0, torch.device("cpu")):  # a look at the data, not a draw of the caller's
            for i in range(min(len(self), _MEASURED)):
                try:
                    with self._noting(i):
                        return self._item(i)
                except self.unreadable as error:
                    bad.append((self.name(i), reason_of(error)))
        raise ValueError(complaint(bad))

    def _item(self, i: int) -> Any:
        """A PIL image, or an array with channels first."""
        x = self.items[i]
        if isinstance(x, tuple | list) and x:
            x = x[0]
        if isinstance(x, Image.Image):
            return x
        if isinstance(x, Tensor):
            x = x.detach().cpu()
            x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
        elif not isinstance(x, np.ndarray):
            raise TypeError(
                f"{self.name(i)} of X is of type {type(x).__name__}; expected a PIL image, an "
                "array or a tensor, or a tuple that starts with one."
            )
        elif channels_last(x):
            if x.dtype == np.uint8 and x.shape[2] == 4:
                return Image.fromarray(x)
            x = x.transpose(2, 0, 1)
        if x.dtype.kind not in "buif" or x.ndim not in (1, 2, 3) or not x.size:
            raise ValueError(
                f"{self.name(i)} of X has shape {x.shape} and dtype {x.dtype}; expected numbers, "
                "(d,), (H, W) or (C, H, W)."
            )
        if not np.isfinite(x).all():
            raise ValueError(f"{self.name(i)} of X holds NaN or infinity.")
        return x[None] if x.ndim == 2 else x


def as_image(shape: Any) -> tuple[int, int, int]:
    """(channels, height, width) of an image_shape; (height, width) are grey."""
    sizes = tuple(shape) if np.iterable(shape) else ()
    whole = all(isinstance(size, Integral) and int(size) > 0 for size in sizes)
    if len(sizes) not in (2, 3) or not whole:
        raise ValueError(
            f"image_shape={shape!r} must be (height, width) or (channels, height, width)."
        )
    c, h, w = (1, *sizes) if len(sizes) == 2 else sizes
    return int(c), int(h), int(w)


def _asked(image_shape: tuple[int, ...] | None, channels: int) -> tuple[int, int, int] | None:
    """(C, H, W) of an image_shape that may leave the channels open."""
    if image_shape is None:
        return None
    c, h, w = as_image(image_shape)
    return channels if len(image_shape) == 2 else c, h, w


def _mode(channels: int) -> str:
    if channels not in (1, 3):
        raise ValueError(f"image_shape has {channels} channels; images are decoded to 1 or 3.")
    return "L" if channels == 1 else "RGB"


def _opened(path: str) -> Image.Image:
    Image.init()
    try:
        # All formats that Pillow knows but the one that would run a program, Ghostscript.
        return Image.open(path, formats=[name for name in Image.ID if name != "EPS"])
    except UnidentifiedImageError:
        raise OSError(f"{'not' if os.path.getsize(path) else 'empty: not'} an image") from None


def pixels(image: Image.Image, shape: tuple[int, ...], turn: Any = None) -> np.ndarray:
    """(C, H, W) uint8 of a PIL image, turned, scaled to cover H x W and cut around the centre."""
    c, h, w = shape
    lies = turn is not None and turn in _ON_SIDE
    image = ImageOps.fit(_plain(image), (h, w) if lies else (w, h), Image.Resampling.BILINEAR)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    x = np.asarray(image.convert(_mode(c)))
    return x[None] if c == 1 else x.transpose(2, 0, 1)


def _plain(image: Image.Image) -> Image.Image:
    """As L, RGB or RGBA, which Pillow scales well: RGBA weighted by its opacity."""
    if image.mode[0] in "IF":  # Pillow would clip more than 8 bits
        x = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        whites = (1, 255, 65535) if image.mode == "F" else (65535,)
        white = next((white for white in whites if x.max() <= white), x.max())
        return Image.fromarray((x.clip(0) * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if _is_grey(image) else "RGB")


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode[0] == "I"


def _resized(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(C, H, W) numbers as another shape, like a picture."""
    if len(shape) != 3 or (len(x), shape[0]) not in ((1, 3), (3, 1), (shape[0], shape[0])):
        raise ValueError(f"An item of shape {x.shape} cannot be made {shape}.")
    dtype = x.dtype
    if len(x) > shape[0]:
        x = np.tensordot(_LUMA, x, 1)[None]
    if x.shape[1:] != shape[1:]:
        size = shape[2], shape[1]
        planes = [Image.fromarray(plane.astype(np.float32)) for plane in x]
        planes = [ImageOps.fit(plane, size, Image.Resampling.BILINEAR) for plane in planes]
        x = np.stack([np.asarray(plane) for plane in planes])
    x = x if dtype.kind == "f" else x.round()
    return np.broadcast_to(x.astype(dtype), shape)


def channels_last(x: np.ndarray) -> bool:
    """Whether it must be (height, width, channels): a picture is higher than 4 pixels."""
    return x.ndim == 3 and x.shape[2] in (1, 3, 4) and x.shape[0] > 4


def spread(n: int, most: int) -> np.ndarray:
    """At most so many of n rows, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int))


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def complaint(bad: list[tuple[str, str]]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in bad[:_NAMED]]
    more = [f"  and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else []
    start = f"{len(bad)} image{'s' * (len(bad) > 1)} of X cannot be read:"
    return "\n".join([start, *lines, *more, "on_bad_image='skip' leaves such images out."])
