"""Views: drawn per sample, from their own generator, and only by changes that were asked for."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sklearn_sela._augment import ImageAugment, Jitter, PhotoAugment
from sklearn_sela._shares import Share
from sklearn_sela._views import Views


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def left_bright(n=64, channels=1, side=16):
    """Images whose left half is 1 and right half 0: a flip is easily seen."""
    x = torch.zeros(n, channels, side, side)
    x[..., : side // 2] = 1
    return x


def test_jitter_draws_noise_of_the_given_size_per_sample():
    x = torch.zeros(4000, 5)
    out = Jitter(generator(), std=0.1)(x)
    assert out.std(0) == pytest.approx(0.1, rel=0.1)
    assert len(out.unique(dim=0)) == len(out)


def test_jitter_leaves_its_input_alone():
    x = torch.zeros(4, 5)
    Jitter(generator())(x)
    assert not x.any()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_image_augment_keeps_shape_and_dtype(channels):
    out = ImageAugment(generator())(left_bright(5, channels))
    assert out.shape == (5, channels, 16, 16)
    assert out.dtype == torch.float32


def test_image_augment_draws_per_sample():
    out = ImageAugment(generator())(left_bright())
    assert len(out.unique(dim=0)) == len(out)


def test_image_augment_flips_only_if_asked():
    out = ImageAugment(generator(), flip=False)(left_bright(500))
    assert (out[..., :8].sum((1, 2, 3)) > out[..., 8:].sum((1, 2, 3))).all()


def test_image_augment_flips_about_half_of_the_samples_if_asked():
    out = ImageAugment(generator(), flip=True)(left_bright(400))
    flipped = out[..., :8].sum((1, 2, 3)) < out[..., 8:].sum((1, 2, 3))
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.1)


def test_image_augment_moves_in_zeros():
    # The scaler maps typical background to zero, so this is more background.
    out = ImageAugment(generator())(torch.full((50, 1, 16, 16), 5.0))
    assert float(out.min()) == pytest.approx(0, abs=1e-6)
    assert float(out.max()) == pytest.approx(5, abs=1e-4)


def test_image_augment_shifts_by_at_most_an_eighth_of_the_side():
    side = 33
    axis = torch.arange(side, dtype=torch.float32) - side // 2
    spot = torch.exp(-(axis[:, None] ** 2 + axis**2) / 8).expand(300, 1, side, side)
    out = ImageAugment(generator())(spot)[:, 0]
    mass = out.sum((1, 2))
    moved = torch.stack([(out.sum(1) * axis).sum(1), (out.sum(2) * axis).sum(1)], 1) / mass[:, None]
    # Scale and shear of the map stretch the shift; 1.5 bounds their inverse.
    assert moved.norm(dim=1).max() < 1.5 * 2**0.5 * side / 8
    assert moved.norm(dim=1).max() > 0.5 * side / 8


def ramp(n=300, side=32):
    """(n, 3, side, side): red tells the column, green the row, from -1 to 1; blue is 1."""
    axis = torch.linspace(-1, 1, side)
    red, green = axis.expand(side, side), axis[:, None].expand(side, side)
    return torch.stack([red, green, torch.ones(side, side)]).expand(n, 3, side, side)


def test_crops_are_within_the_image_and_of_the_areas_and_ratios_asked_for():
    out = PhotoAugment(generator())._crop(ramp())
    width = (out[:, 0, 16, -1] - out[:, 0, 16, 0]) / 2 * 32 / 31
    height = (out[:, 1, -1, 16] - out[:, 1, 0, 16]) / 2 * 32 / 31
    area, ratio = width * height, width / height
    assert area.min() > 0.2
    assert area.max() < 1.05
    assert area.mean() == pytest.approx(0.625, abs=0.03)
    assert ratio.min() > 0.7
    assert ratio.max() < 1.42
    torch.testing.assert_close(out[:, 2], torch.ones(300, 32, 32))  # nothing from beyond the edges


def test_photos_are_flipped_about_half_the_time_and_only_if_asked():
    for flip, share in ((True, 0.5), (False, 0)):
        out = PhotoAugment(generator(), flip)._crop(ramp())
        flipped = out[:, 0, 16, 0] > out[:, 0, 16, -1]
        assert flipped.float().mean() == pytest.approx(share, abs=0.1 * flip)


def test_colours_change_by_one_linear_map_an_image():
    x = torch.randn(50, 3, 6, 6, generator=generator())
    out = PhotoAugment(generator())._recolour(x)
    ones = torch.ones(50, 36, 1)
    pixels = torch.cat([x.flatten(2).mT, ones], 2)
    fit = pixels @ torch.linalg.lstsq(pixels, out.flatten(2).mT).solution
    torch.testing.assert_close(fit, out.flatten(2).mT, atol=1e-4, rtol=1e-4)


def test_one_photo_in_five_becomes_grey():
    out = PhotoAugment(generator())._recolour(torch.randn(1000, 3, 4, 4, generator=generator()))
    grey = out.std(1).amax((1, 2)) < 1e-5
    assert grey.float().mean() == pytest.approx(0.2, abs=0.05)


def test_grey_pixels_of_photos_stay_grey():
    x = torch.randn(50, 1, 6, 6, generator=generator()).expand(50, 3, 6, 6)
    out = PhotoAugment(generator())._recolour(x)
    assert out.std(1).max() < 1e-5


def test_contrast_and_brightness_are_within_their_limits():
    x = torch.randn(500, 1, 8, 8, generator=generator()).expand(500, 3, 8, 8)
    out = PhotoAugment(generator())._recolour(x)
    contrast = out.std((1, 2, 3)) / x.std((1, 2, 3))
    moved = (out - x).mean((1, 2, 3))
    for values, low, high in ((contrast, 0.6, 1.4), (moved, -0.4, 0.4)):
        assert values.min() == pytest.approx(low, abs=0.02)
        assert values.max() == pytest.approx(high, abs=0.02)


def test_photos_keep_the_layout_that_convolutions_like():
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert PhotoAugment(generator(), True)(x).is_contiguous(memory_format=torch.channels_last)


def test_grey_images_keep_their_brightness():
    assert not ImageAugment(generator())(torch.zeros(20, 1, 8, 8)).any()


@pytest.mark.parametrize("make", [Jitter, ImageAugment, PhotoAugment])
def test_same_generator_seed_gives_the_same_views(make):
    x = left_bright(6, channels=3)
    assert torch.equal(make(generator(3))(x), make(generator(3))(x))


@pytest.mark.parametrize("make", [Jitter, ImageAugment, PhotoAugment])
def test_draws_leave_the_global_generator_alone(make):
    before = torch.random.get_rng_state()
    make(generator())(left_bright(6, channels=3))
    assert torch.equal(torch.random.get_rng_state(), before)


def indexed_views(probability, augment=None, neighbors=None, n=1000):
    """Rows are their own index, so a view tells which row it was made of."""
    rows = torch.arange(n, dtype=torch.float32)[:, None]
    views = Views(
        SimpleNamespace(read=partial(map, rows.__getitem__), share=Share.of_all(n)),
        augment,
        neighbors,
        probability,
        generator(),
    )
    return lambda indices: next(views([indices]))


def chain(n=1000):
    """Neighbours of row i: i + 1 and i + 2."""
    i = torch.arange(n)
    return torch.stack([(i + 1) % n, (i + 2) % n], 1).int()


def test_views_without_neighbors_are_the_rows():
    rows = torch.tensor([5, 3, 3])
    assert indexed_views(0.7)(rows).flatten().tolist() == [5, 3, 3]


def test_views_at_probability_zero_are_the_rows():
    rows = torch.arange(1000)
    assert torch.equal(indexed_views(0.0, neighbors=chain())(rows)[:, 0].long(), rows)


def test_views_at_probability_one_are_all_neighbors_each_drawn():
    step = (
        indexed_views(1.0, neighbors=chain())(torch.arange(1000))[:, 0] - torch.arange(1000)
    ) % (1000)
    assert set(step.tolist()) == {1, 2}


def test_views_swap_rows_with_the_given_probability_per_sample():
    view = indexed_views(0.7, neighbors=chain())(torch.arange(1000))[:, 0]
    assert (view != torch.arange(1000)).float().mean() == pytest.approx(0.7, abs=0.05)


def test_views_augment_the_neighbor_not_the_row():
    view = indexed_views(1.0, lambda x: -x, chain())(torch.arange(10))
    assert (view[:, 0] < -torch.arange(10)).all()
