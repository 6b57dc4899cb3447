"""Images from files and datasets: what every format decodes to, and what happens to bad ones."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from joblib.externals.loky import ProcessPoolExecutor
from PIL import Image, ImageOps
from sklearn.utils import _safe_indexing
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import datasets, transforms

from sklearn_sela import _images
from sklearn_sela._images import image_paths, open_images, read_ahead
from sklearn_sela._shares import fingerprint

COLOR = (200, 100, 40)
LUMA = 123  # of it


def rng(seed=0):
    return np.random.default_rng(seed)


def plain(mode, color, size=(24, 16)):
    return Image.new(mode, size, color)


def photo(seed=0, size=(24, 16)):
    """Smooth colours, as JPEG likes them."""
    small = rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def photos(folder, n, suffix=".png", size=(24, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{i:04d}{suffix}") for i in range(n)]
    for i, path in enumerate(paths):
        photo(i, size).save(path)
    return paths


def means(images):
    return np.asarray(images, dtype=float).mean((2, 3))


def png16(path, values):
    """A PNG of (H, W) or (H, W, 3) 16-bit values, which Pillow does not write in colour."""
    h, w = values.shape[:2]

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", w, h, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def palette(transparent):
    image = plain("P", 1)
    image.putpalette([255, 0, 0, *COLOR])
    image.paste(0, (0, 0, 12, 16))
    if transparent:
        image.info["transparency"] = 0  # the red half
    return image


def half_clear(mode, color):
    """The left half transparent, of a colour that must not be seen."""
    image = plain(mode, color)
    image.paste((*(255 - np.array(color[:-1])).tolist(), 0), (0, 0, 12, 16))
    return image


def save_gif(path):
    frames = [plain("RGB", COLOR), plain("RGB", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def save_webp(path):
    frames = [plain("RGB", COLOR), plain("RGB", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)


def levels(dtype, scale):
    return np.full((16, 24), 100 * scale, dtype=dtype)


WHITE = (255, 255, 255)
HALF = tuple((255 + c) / 2 for c in COLOR)  # one half shows white
FORMATS = {
    "rgb.jpg": (lambda p: plain("RGB", COLOR).save(p, quality=95), COLOR),
    "grey.jpg": (lambda p: plain("L", 90).save(p), (90,) * 3),
    # Of CMYK, 255 is full ink; Pillow writes as Adobe does, inverted.
    "cmyk.jpg": (lambda p: plain("RGB", COLOR).convert("CMYK").save(p, quality=95), COLOR),
    "rgb.png": (lambda p: plain("RGB", COLOR).save(p), COLOR),
    "grey.png": (lambda p: plain("L", 90).save(p), (90,) * 3),
    "rgba.png": (lambda p: half_clear("RGBA", (*COLOR, 255)).save(p), HALF),
    "veil.png": (
        lambda p: plain("RGBA", (*COLOR, 51)).save(p),
        [255 - (255 - c) / 5 for c in COLOR],
    ),
    "la.png": (lambda p: half_clear("LA", (90, 255)).save(p), ((255 + 90) / 2,) * 3),
    "clear.png": (lambda p: plain("RGBA", (9, 9, 9, 0)).save(p), WHITE),
    "palette.png": (
        lambda p: palette(False).save(p),
        [(a + b) / 2 for a, b in zip((255, 0, 0), COLOR, strict=True)],
    ),
    "palette-clear.png": (lambda p: palette(True).save(p, transparency=0), HALF),
    "rgb-key.png": (lambda p: plain("RGB", COLOR).save(p, transparency=COLOR), WHITE),
    "bits.png": (lambda p: plain("1", 1).save(p), WHITE),
    "grey16.png": (lambda p: png16(p, levels("u2", 257)), (100,) * 3),
    "rgb16.png": (lambda p: png16(p, np.full((16, 24, 3), COLOR) * 257), COLOR),
    "lossless.webp": (lambda p: plain("RGB", COLOR).save(p, lossless=True), COLOR),
    "alpha.webp": (lambda p: half_clear("RGBA", (*COLOR, 255)).save(p, lossless=True), HALF),
    "animated.webp": (save_webp, COLOR),
    "animated.gif": (save_gif, COLOR),
    "rgb.tif": (lambda p: plain("RGB", COLOR).save(p, compression="tiff_lzw"), COLOR),
    "cmyk.tif": (lambda p: plain("RGB", COLOR).convert("CMYK").save(p), COLOR),
    "grey16.tif": (lambda p: Image.fromarray(levels("u2", 257)).save(p), (100,) * 3),
    "grey16big.tif": (lambda p: Image.fromarray(levels(">u2", 257)).save(p), (100,) * 3),
    "grey32.tif": (lambda p: Image.fromarray(levels("i4", 257)).save(p), (100,) * 3),
    "float1.tif": (lambda p: Image.fromarray(levels("f4", 1 / 255)).save(p), (100,) * 3),
    "float255.tif": (lambda p: Image.fromarray(levels("f4", 1)).save(p), (100,) * 3),
    "float65535.tif": (lambda p: Image.fromarray(levels("f4", 257)).save(p), (100,) * 3),
    "fax.tif": (lambda p: plain("1", 0).save(p, compression="group4"), (0,) * 3),
    "rgb.bmp": (lambda p: plain("RGB", COLOR).save(p), COLOR),
    "rgb.ppm": (lambda p: plain("RGB", COLOR).save(p), COLOR),
    "grey16.pgm": (lambda p: Image.fromarray(levels("i4", 257)).save(p), (100,) * 3),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_to_its_colours(tmp_path, name):
    save, expected = FORMATS[name]
    save(tmp_path / name)
    images = open_images(tmp_path)
    assert images.shape == (1, 3, 16, 16)
    np.testing.assert_allclose(means(images[:])[0], expected, atol=2.5)
    grey = open_images(tmp_path, (1, 16, 16))[:]
    assert grey.shape == (1, 1, 16, 16)
    np.testing.assert_allclose(means(grey)[0], np.dot([0.299, 0.587, 0.114], expected), atol=2.5)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(tmp_path, suffix, orientation):
    image = photo(size=(96, 96))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = dict(zip(range(2, 9), (0, 3, 1, 5, 2, 6, 4), strict=True))  # the inverse
    lying = image.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else image
    path = tmp_path / f"a{suffix}"
    lying.save(path, exif=exif, **({} if suffix in (".png", ".tif") else {"quality": 98}))
    decoded = open_images([path], (3, 20, 28))[0].transpose(1, 2, 0)
    expected = np.asarray(ImageOps.fit(image, (28, 20), Image.Resampling.BILINEAR))
    assert np.abs(decoded.astype(int) - expected).mean() < 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_do_not_matter(tmp_path):
    photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x00")
    assert open_images(tmp_path)[:].any()


def test_images_are_scaled_to_cover_and_cut_around_the_centre(tmp_path):
    image = plain("RGB", "red", (90, 30))
    image.paste("lime", (30, 0, 60, 30))
    image.save(tmp_path / "wide.png")
    image.rotate(90, expand=True).save(tmp_path / "tall.png")
    for decoded in open_images(tmp_path, (3, 10, 10))[:]:
        inside = decoded[:, 1:-1, 1:-1]  # the rim is filtered with what is cut off
        np.testing.assert_array_equal(inside.reshape(3, -1).T, np.tile([0, 255, 0], (64, 1)))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_scaling_down_does_not_alias(tmp_path, suffix):
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide
    Image.fromarray(stripes).save(tmp_path / f"a{suffix}", quality=95)
    decoded = open_images(tmp_path, (3, 32, 32))[0,]
    assert np.abs(decoded.astype(int) - 127).max() < 12


def test_the_size_is_the_median_short_side_at_most_64(tmp_path):
    for i, size in enumerate([(20, 90), (30, 22), (300, 200)]):
        photo(i, size).save(tmp_path / f"{i}.png")
    assert open_images(tmp_path).shape == (3, 3, 22, 22)
    photo(5, (300, 200)).save(tmp_path / "5.png")
    photo(6, (300, 200)).save(tmp_path / "6.png")
    assert open_images(tmp_path).shape == (5, 3, 64, 64)
    assert open_images(tmp_path, (30, 40)).shape == (5, 3, 30, 40)
    assert open_images(tmp_path, (1, 30, 40)).shape == (5, 1, 30, 40)
    with pytest.raises(ValueError, match="4 channels; images are decoded to 1 or 3"):
        open_images(tmp_path, (4, 30, 40))


def test_a_folder_is_searched_below_sorted_and_without_hidden_files(tmp_path):
    names = ["b/2.PNG", "b/ü ñ/1 2.jpg", "a.JPeG", "c.webp"]
    for name in [*names, ".hidden.png", ".git/a.png", "b/._1.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo().save(path)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # a circle
    assert image_paths(tmp_path) == sorted(str(tmp_path / name) for name in names)
    assert open_images(str(tmp_path))[:].shape == (4, 3, 16, 16)


def test_a_folder_that_is_none_or_has_no_images_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"No images in .*no file ends in \.jpg"):
        image_paths(tmp_path)
    with pytest.raises(ValueError, match=r"a\.txt' is a file, not a folder; pass .* list"):
        open_images(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="There is no folder"):
        open_images("nowhere")


WAYS = {
    "list": list,
    "tuple": tuple,
    "ndarray": np.array,
    "ndarray of object": lambda paths: np.array(paths, dtype=object),
    "column": lambda paths: np.array(paths)[:, None],
    "series": pd.Series,
    "series of other index": lambda paths: pd.Series(paths, index=range(5, 9)),
    "series of object": lambda paths: pd.Series(paths, dtype=object),
    "category": lambda paths: pd.Series(paths, dtype="category"),
    "index": pd.Index,
    "frame": lambda paths: pd.DataFrame({"path": paths}),
}
if hasattr(np.dtypes, "StringDType"):  # NumPy 2
    WAYS["numpy strings"] = lambda paths: np.array(paths, dtype=np.dtypes.StringDType())


@pytest.mark.parametrize("kind", [str, os.fspath, Path])
@pytest.mark.parametrize("way", WAYS)
def test_paths_come_in_any_sequence(tmp_path, way, kind):
    paths = photos(tmp_path / "ü b", 4)
    expected = open_images(paths)[:]
    np.testing.assert_array_equal(open_images(WAYS[way](paths))[:], expected)


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA, 3])
def test_something_else_among_paths_is_named_by_position(tmp_path, missing):
    paths = photos(tmp_path, 3)
    with pytest.raises(ValueError, match=r"X holds .* at position 2, among paths"):
        open_images([*paths[:2], missing, paths[2]])
    with pytest.raises(ValueError, match="position 2"):
        open_images(pd.Series([*paths[:2], missing], dtype=object))


NOT_IMAGES = {
    "array": np.ones((3, 4)),
    "images": np.ones((3, 8, 8)),
    "objects": np.ones((3, 4), dtype=object),
    "frame": pd.DataFrame(np.ones((3, 4))),
    "one column": pd.DataFrame(np.ones((3, 1))),
    "strings": np.array([["a", "b"], ["c", "d"]]),
    "tensor": torch.ones(3, 4),
    "nested": [[1, 2], [3, 4]],
    "nested tuples": [(1.0, 2.0), (3.0, 4.0)],
    "arrays": [np.ones(3), np.ones(3)],
    "tuples of arrays": [(np.ones(3), np.ones(3))] * 2,
    "tensors": [torch.ones(1, 8, 8)] * 2,
    "numbers": [1, 2, 3],
    "empty": [],
    "scalar": np.array("a", dtype=object),
    "nothing": None,
    "number": 3,
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_arrays_and_tables_are_left_alone(name):
    assert open_images(NOT_IMAGES[name]) is None


def broken(folder):
    """Paths of images, every other one bad, and what should be said of the bad."""
    good = photos(folder, 5, ".jpg", (64, 48))
    data = Path(good[0]).read_bytes()
    Image.fromarray(rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "n.png")
    noise = (folder / "n.png").read_bytes()
    files = {
        "truncated.jpg": (data[: len(data) * 9 // 10], "file is truncated"),
        "empty.png": (b"", "empty: not an image"),
        "text.jpg": (b"hello", "not an image"),
        "half.png": (noise[: len(noise) // 2], "file is truncated"),
        "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    bad = [str(folder / name) for name in files] + [str(folder / "missing.jpg"), str(folder)]
    reasons = [reason for _, reason in files.values()] + ["No such file", "Is a directory"]
    paths = [p for pair in zip(bad, [*good, *good[:2]], strict=True) for p in pair]
    return paths, dict(zip(range(0, 14, 2), reasons, strict=True))


def test_bad_images_raise_an_error_that_names_them(tmp_path):
    paths, reasons = broken(tmp_path)
    images = open_images(paths)
    assert images[[1, 3, 5]].any((1, 2, 3)).all()
    for read in (lambda: images[:], images.check):
        with pytest.raises(ValueError, match=r"^7 images of X cannot be read:") as caught:
            read()
        for i, reason in reasons.items():
            (line,) = (x for x in str(caught.value).splitlines() if x.startswith(f"  {paths[i]}: "))
            assert reason in line
        assert "on_bad_image='skip'" in str(caught.value)
    with pytest.raises(ValueError, match=r"^1 image of X cannot be read:\n.*empty\.png"):
        images[2]


def test_an_error_names_ten_and_counts_all(tmp_path):
    paths = photos(tmp_path, 3) + [str(tmp_path / f"no{i}.png") for i in range(25)]
    with pytest.raises(ValueError, match="25 images of X") as caught:
        open_images(paths).check()
    assert str(caught.value).count("No such file") == 10
    assert "and 15 more" in str(caught.value)


def test_bad_images_are_zeros_and_recorded_if_skipped(tmp_path):
    paths, reasons = broken(tmp_path)
    images = open_images(paths, on_bad_image="skip")
    assert images.bad == {}
    assert not images[0].any()
    assert list(images.bad) == [0]
    assert images.check() == list(range(1, 14, 2))
    assert list(images.bad) == list(reasons)
    for i, reason in reasons.items():
        assert reason in images.bad[i]
    np.testing.assert_array_equal(images[:].any((1, 2, 3)), [False, True] * 7)
    kept = images.take([3, 2, 1])
    assert list(kept.bad) == [1]
    assert kept.name(1) == paths[2]
    assert kept.take([0, 2]).check() == [0, 1]


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_nothing_that_can_be_read_is_an_error(tmp_path, on_bad_image):
    with pytest.raises(ValueError, match="2 images of X cannot be read"):
        open_images([tmp_path / "a.png", tmp_path / "b.png"], None, on_bad_image)


def test_a_decompression_bomb_is_a_bad_image(tmp_path, monkeypatch):
    paths = photos(tmp_path, 3)
    photo(0, (200, 200)).save(paths[1])
    images = open_images(paths, (16, 16), "skip")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert images.check() == [0, 2]
    assert "decompression bomb" in images.bad[1]


def test_too_many_open_files_are_not_blamed_on_an_image(tmp_path, monkeypatch):
    images = open_images(photos(tmp_path, 3), None, "skip")

    def fail(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many"):
        images.check()
    assert not images.bad


def test_rows_are_those_of_an_array(tmp_path):
    images = open_images(photos(tmp_path, 7))
    whole = images[:]
    assert (images.shape, images.ndim, images.dtype) == (whole.shape, 4, whole.dtype)
    for index in (
        slice(5, 1, -2),
        [3, 3, 0],
        np.array([-1, 2]),
        4,
        np.int64(6),
        whole[:, 0, 0, 0] > 99,
    ):
        np.testing.assert_array_equal(images[index], whole[index])
    np.testing.assert_array_equal(images.take([6, 1]).take(np.array([1, 0]))[:], whole[[1, 6]])
    assert images[[]].shape == (0, 3, 16, 16)
    with pytest.raises(IndexError):
        images[7]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_what_is_read(tmp_path, threads, monkeypatch):
    paths = photos(tmp_path, 40, ".jpg")
    expected = open_images(paths)[:]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    np.testing.assert_array_equal(open_images(paths)[:], expected)
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_checked_images_are_not_decoded_again(tmp_path):
    paths = photos(tmp_path, 30, ".jpg")
    images = open_images(paths)
    taken = images.take([4, 2])
    expected = images[:]
    assert images.check() == list(range(30))
    for path in paths:
        os.remove(path)
    np.testing.assert_array_equal(images[:], expected)
    np.testing.assert_array_equal(taken[:], expected[[4, 2]])
    for other in (copy.deepcopy(images), pickle.loads(pickle.dumps(images))):
        with pytest.raises(ValueError, match="30 images"):
            other[:]


def test_a_part_that_is_checked_is_kept(tmp_path):
    paths = photos(tmp_path, 10)
    images = open_images(paths)
    images.take([7, 3]).check()
    expected = open_images(paths)[:]
    os.remove(paths[7])
    np.testing.assert_array_equal(images[:], expected)


def test_a_part_that_fits_does_not_make_room_for_the_whole(tmp_path, monkeypatch):
    paths = photos(tmp_path, 10)
    images = open_images(paths)
    monkeypatch.setattr(_images, "_KEPT", 5 * images[0].nbytes)
    images.take([7, 3]).check()
    images.take([7, 3]).check()
    assert images._kept._file is not None
    images.check()
    assert images._kept._file is None


def without_room(monkeypatch):
    monkeypatch.setattr(_images, "_KEPT", 0)


def without_temporary_folder(monkeypatch):
    def fail(*args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(_images.tempfile, "TemporaryFile", fail)


def with_full_disk(monkeypatch):
    written = []

    def pwrite(file, data, offset):
        written.append(offset)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("change", [without_room, without_temporary_folder, with_full_disk])
def test_without_room_on_disk_images_are_decoded_each_time(tmp_path, monkeypatch, change):
    paths = photos(tmp_path, 10)
    expected = open_images(paths)[:]
    change(monkeypatch)
    images = open_images(paths)
    assert images.check() == list(range(10))
    np.testing.assert_array_equal(images[:], expected)


def test_what_is_kept_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(_images.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    open_images(photos(tmp_path / "images", 5)).check()
    assert not list((tmp_path / "tmp").iterdir())


def test_a_worker_reads_the_same_with_its_own_threads(tmp_path):
    images = open_images(photos(tmp_path, 20, ".jpg"))
    images.check()
    with ProcessPoolExecutor(max_workers=1) as worker:
        part = worker.submit(images.take, range(5, 9)).result()  # there and back
        np.testing.assert_array_equal(part[:], images[5:9])
        np.testing.assert_allclose(worker.submit(means, part).result(), means(images[5:9]))


MEMORY = """
import sys, threading
import torch
torch.set_num_threads(2)
from sklearn_sela._images import open_images

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

paths = sys.argv[1:] * 10_000
images = open_images(paths, (3, 128, 128))
images[:200]  # what threads and Pillow need once
peak, before = [0], resident()
stop = threading.Event()

def watch():
    while not stop.wait(0.005):
        peak[0] = max(peak[0], resident())

watcher = threading.Thread(target=watch)
watcher.start()
images.take(slice(0, {rows})).check()
for start in range(0, {rows}, 100):
    images[start : start + 100]
stop.set()
watcher.join()
assert len(images) == 100_000
print(peak[0] - before)
"""


def test_memory_is_flat_with_many_files(tmp_path):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("peak memory is read from /proc")
    paths = photos(tmp_path, 10, ".jpg", (64, 64))
    code = MEMORY.replace("{rows}", "2500")  # 123 MB decoded
    command = [sys.executable, "-c", code, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40  # 16 MB at a time, and that of threads


class Pictures(Dataset):
    """Items made by a function."""

    def __init__(self, make, n=6):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)


def hwc(i):
    return np.asarray(photo(i))


def chw(i):
    return hwc(i).transpose(2, 0, 1).copy()


ITEMS = {
    "PIL": lambda i: photo(i),
    "PIL and target": lambda i: (photo(i), i % 2),
    "list of PIL and more": lambda i: [photo(i), i % 2, "more"],
    "array": hwc,
    "array and target": lambda i: (hwc(i), i),
    "channels first": chw,
    "tensor": lambda i: torch.from_numpy(chw(i)),
    "tensor and target": lambda i: (torch.from_numpy(chw(i)), i),
    "one tensor": lambda i: (torch.from_numpy(chw(i)),),
    "RGBA array": lambda i: np.asarray(photo(i).convert("RGBA")),
    "palette": lambda i: photo(i).quantize(250),
}


@pytest.mark.parametrize("name", ITEMS)
def test_items_of_a_dataset_are_images(name):
    images = open_images(Pictures(ITEMS[name]))
    assert (images.shape, images.dtype) == ((6, 3, 16, 24), np.uint8)
    assert not images.from_files
    expected = np.stack([chw(i) for i in range(6)]).astype(int)
    assert np.abs(images[:] - expected).mean() < (3 if name == "palette" else 1e-9)
    assert images.name(4) == "item 4"
    assert images.check() == list(range(6))
    part = open_images(Subset(Pictures(ITEMS[name]), [4, 1]))
    np.testing.assert_array_equal(part[:], images[[4, 1]])


@pytest.mark.parametrize("name", ITEMS)
def test_a_dataset_cut_by_scikit_learn_is_the_same_images(name):
    data = Pictures(ITEMS[name])
    cut = _safe_indexing(data, np.array([5, 2]))
    assert isinstance(cut, list)
    images = open_images(cut)
    if images is None:  # bare arrays with channels first: an array already
        images = np.asarray(cut)
    np.testing.assert_array_equal(images[:], open_images(data)[[5, 2]])


@pytest.mark.parametrize(
    ("make", "shape", "dtype"),
    [
        (lambda i: photo(i).convert("L"), (1, 16, 24), "u1"),
        (lambda i: plain("I;16", 257 * i), (1, 16, 24), "u1"),
        (lambda i: plain("1", 1), (1, 16, 24), "u1"),
        (lambda i: hwc(i)[..., 0], (1, 16, 24), "u1"),
        (lambda i: hwc(i)[..., :1], (1, 16, 24), "u1"),
        (lambda i: torch.rand(5, 9, 9), (5, 9, 9), "f4"),
        (lambda i: torch.rand(9, 9, dtype=torch.float64), (1, 9, 9), "f8"),
        (lambda i: torch.rand(3, 9, 9).bfloat16(), (3, 9, 9), "f4"),
        (lambda i: rng(i).normal(size=(20, 20, 3)), (3, 20, 20), "f8"),
        (lambda i: rng(i).normal(size=12).astype("f4"), (12,), "f4"),
        (lambda i: (torch.arange(4), 1), (4,), "i8"),
    ],
)
def test_shape_and_dtype_are_those_of_the_first_item(make, shape, dtype):
    images = open_images(Pictures(make))
    assert (images.shape, images.dtype) == ((6, *shape), np.dtype(dtype))
    assert images.ndim == len(images.shape) == images[:].ndim


def test_16_bit_items_are_scaled():
    images = open_images(Pictures(lambda i: plain("I;16", 257 * i)))
    np.testing.assert_array_equal(images[:].max((1, 2, 3)), range(6))


@pytest.mark.parametrize(
    "kind", [lambda x: x, np.asarray, lambda x: np.asarray(x) / np.float32(255)]
)
def test_items_of_other_sizes_are_scaled_and_cut(kind):
    images = open_images(Pictures(lambda i: kind(photo(i, (24 + 12 * i, 16)))))
    assert images.shape == (6, 3, 16, 24)
    scale = 1 if images.dtype == np.uint8 else 255
    expected = np.asarray(ImageOps.fit(photo(3, (60, 16)), (24, 16), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(scale * images[3].transpose(1, 2, 0), expected, atol=1)


@pytest.mark.parametrize(
    "kind", [lambda x: x, np.asarray, lambda x: np.asarray(x) / np.float32(255)]
)
def test_items_get_the_shape_asked_for(kind):
    data = Pictures(lambda i: kind(photo(i)))
    assert open_images(data, (8, 8))[:].shape == (6, 3, 8, 8)
    grey = open_images(data, (1, 16, 24))
    scale = 1 if grey.dtype == np.uint8 else 255
    expected = np.stack([np.asarray(photo(i).convert("L"))[None] for i in range(6)])
    np.testing.assert_allclose(scale * grey[:], expected, atol=1)
    one = Pictures(lambda i: kind(photo(i).convert("L")))
    np.testing.assert_allclose(scale * open_images(one, (3, 16, 24))[:][:, 2:], expected, atol=1)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda i: {"image": photo(i)}, TypeError, "item 0 of X is of type dict"),
        (lambda i: 3, TypeError, "item 0 of X is of type int"),
        (lambda i: torch.tensor(1.0), ValueError, r"item 0 of X has shape \(\)"),
        (lambda i: np.array(["a"]), ValueError, "dtype <U1"),
        (lambda i: np.full(3, np.nan), ValueError, "item 0 of X holds NaN"),
        (lambda i: np.ones(3 + i // 4), ValueError, r"shape \(4,\) cannot be made \(3,\)"),
        (lambda i: torch.ones(2 + i // 4, 9, 9), ValueError, r"shape \(3, 9, 9\) cannot be made"),
        (lambda i: photo(i) if i < 4 else hwc(i) / 255, ValueError, "item 4 has .* dtype float64"),
        (lambda i: np.ones(3) if i < 4 else photo(i), ValueError, "item 4 has 3 dimensions"),
    ],
)
def test_items_that_do_not_fit_are_named(make, error, match):
    with pytest.raises(error, match=match):
        open_images(Pictures(make), on_bad_image="skip").check()


def test_errors_of_a_dataset_are_raised_with_the_item(tmp_path):
    def fail(i):
        return photo(i) if i != 3 else {}["no such key"]

    for on_bad_image in ("error", "skip"):
        images = open_images(Pictures(fail), None, on_bad_image)
        with pytest.raises(KeyError, match="no such key") as caught:
            images[2:5]
        assert caught.value.__notes__ == ["Raised by item 3 of X."]
    with pytest.raises(KeyError) as caught:
        open_images(Subset(Pictures(fail), [3]))
    assert caught.value.__notes__ == ["Raised by item 0 of X."]


def test_items_that_cannot_be_decoded_are_skipped(tmp_path):
    paths = photos(tmp_path, 6, ".jpg", (64, 64))
    for i in (0, 4):
        data = Path(paths[i]).read_bytes()
        Path(paths[i]).write_bytes(data[: len(data) * 9 // 10])
    os.remove(paths[2])
    images = open_images(Pictures(lambda i: (Image.open(paths[i]), 0)), None, "skip")
    assert images.check() == [1, 3, 5]
    assert [reason.split()[0] for reason in images.bad.values()] == ["image", "No", "image"]
    images = open_images(Pictures(lambda i: (Image.open(paths[i]), 0)))
    with pytest.raises(OSError, match="truncated") as caught:
        images[:]
    assert caught.value.__notes__ == ["Raised by item 0 of X."]


def test_a_dataset_is_read_in_the_thread_of_the_caller():
    seen = set()
    images = open_images(Pictures(lambda i: (seen.add(threading.get_ident()), photo(i))[1]))
    images[:]
    assert seen == {threading.get_ident()}


def test_opening_a_dataset_draws_nothing_from_the_global_generator():
    data = Pictures(lambda i: torch.rand(3, 8, 8))
    before = torch.get_rng_state()
    images = open_images(data)
    assert fingerprint(images) == fingerprint(images)
    assert torch.equal(torch.get_rng_state(), before)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([photo()])


class Endless(Dataset):
    def __getitem__(self, i):
        return photo(i)


@pytest.mark.parametrize("X", [Stream(), Endless(), DataLoader(Pictures(photo))])
def test_streams_are_refused_with_a_remedy(X):
    with pytest.raises(TypeError, match=f"X is a torch {type(X).__name__}, .*; pass an array"):
        open_images(X)


def test_a_dataset_without_items_is_an_error():
    with pytest.raises(ValueError, match="Pictures without items"):
        open_images(Pictures(photo, 0))


def test_datasets_of_torch_and_torchvision(tmp_path):
    x = torch.rand(5, 7)
    np.testing.assert_array_equal(open_images(TensorDataset(x, torch.arange(5)))[:], x.numpy())
    photos(tmp_path / "folder" / "cat", 2, ".png")
    photos(tmp_path / "folder" / "dog", 3, ".jpg")
    folder = datasets.ImageFolder(tmp_path / "folder")
    files = open_images(tmp_path / "folder", (16, 24))
    np.testing.assert_array_equal(open_images(folder)[:2], files[:2])
    fake = datasets.FakeData(4, (3, 20, 30), transform=transforms.ToTensor())
    assert open_images(fake)[:].shape == (4, 3, 20, 30)
    assert open_images(fake).dtype == np.float32


def test_cifar_in_its_own_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = rng().integers(0, 256, (50, 3072), dtype=np.uint8)
    for i in range(5):
        part = {"data": data[10 * i : 10 * i + 10], "labels": [0] * 10}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(part))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"] * 10}))
    images = open_images(datasets.CIFAR10(tmp_path))
    np.testing.assert_array_equal(images[:], data.reshape(-1, 3, 32, 32))


def test_svhn_in_its_own_file(tmp_path, monkeypatch):
    from scipy.io import savemat

    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    X = rng().integers(0, 256, (32, 32, 3, 8), dtype=np.uint8)
    savemat(tmp_path / "train_32x32.mat", {"X": X, "y": np.ones((8, 1), np.uint8)})
    images = open_images(datasets.SVHN(tmp_path))
    np.testing.assert_array_equal(images[:], X.transpose(3, 2, 0, 1))


def test_a_fingerprint_tells_data_apart(tmp_path):
    paths = photos(tmp_path, 9)
    images = open_images(paths)
    whole = images[:]
    assert fingerprint(images) == fingerprint(open_images(paths)) == fingerprint(whole)
    assert fingerprint(np.asfortranarray(whole)) == fingerprint(whole)
    np.save(tmp_path / "X.npy", whole)
    assert fingerprint(np.load(tmp_path / "X.npy", mmap_mode="r")) == fingerprint(whole)
    others = [whole[:8], whole[::-1], whole.astype(float), whole.reshape(9, 3, -1), whole ^ 1]
    assert len({fingerprint(x) for x in [whole, *others]}) == 6


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith("read_ahead")]


def test_read_ahead_reads_the_next_part_while_the_caller_works():
    started = [threading.Event() for _ in range(4)]

    def read(i):
        started[i].set()
        return i

    for i in read_ahead(read, range(4)):
        assert i == 3 or started[i + 1].wait(10)


def test_read_ahead_draws_parts_in_the_thread_of_the_caller_in_order():
    here, random, seen = threading.get_ident(), rng(), []

    def parts():
        for _ in range(50):
            seen.append(threading.get_ident())
            yield random.integers(100)

    read = list(read_ahead(lambda part: (part, threading.get_ident()), parts()))
    assert [part for part, _ in read] == rng().integers(100, size=50).tolist()
    assert set(seen) == {here}
    assert here not in {ident for _, ident in read}
    assert list(read_ahead(str, [])) == []
    assert not reading_threads()


def leave(done):
    for i in read_ahead(lambda i: done.append(i), range(100)):  # noqa: B007
        break


def interrupt(done):
    for _ in read_ahead(lambda i: done.append(i), range(100)):
        raise KeyboardInterrupt


def fail_in_parts(done):
    def parts():
        yield 1
        raise KeyboardInterrupt

    list(read_ahead(done.append, parts()))


def fail_in_read(done):
    def read(i):
        done.append(i)
        if i == 3:
            raise KeyboardInterrupt
        time.sleep(0.001)

    list(read_ahead(read, range(100)))


@pytest.mark.parametrize("end", [leave, interrupt, fail_in_parts, fail_in_read])
def test_read_ahead_leaves_no_thread_behind(end):
    done = []
    if end is leave:
        end(done)
    else:
        with pytest.raises(KeyboardInterrupt):
            end(done)
    assert not reading_threads()
    assert len(done) < 7
