"""Distortions of the training images: their size, unchanged images, and their bits."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from msgspec.structs import asdict, replace
from numpy.typing import NDArray

from stages.shared.augment import (
    AugmentParams,
    augment,
    basis,
    displacements,
    resample,
    sample_distortions,
)
from stages.shared.params import check_section
from tests.conftest import small_split

OFF = AugmentParams(shift=0, rotation=0, scale=0, elastic=0)
ALL = AugmentParams(shift=1, rotation=10, scale=0.1, elastic=1)
SHAPES = [(28, 28), (9, 11), (6, 4, 3), (1, 5), (1, 1, 1)]
Fields = NDArray[np.float64]


def sample(params: AugmentParams, count: int) -> NDArray[np.float32]:
    """Sample distortions with seed 0, (count, 2, GRID + 2, GRID + 2)."""
    return sample_distortions(params, count, np.random.default_rng(0))


def fields_of(params: AugmentParams, rows: int, columns: int) -> Fields:
    """Return random displacement fields of 2000 images, (2000, 2, rows, columns)."""
    fields = displacements(mx.array(sample(params, 2000)), rows, columns)
    return np.array(fields).astype(np.float64)


def fit_affine(fields: Fields, atol: float = 1e-4) -> tuple[Fields, Fields]:
    """Return the linear maps (N, 2, 2) and shifts (N, 2) that make up `fields` within `atol`."""
    count, _, rows, columns = fields.shape
    pixels = np.indices((rows, columns)).reshape(2, -1) - [[(rows - 1) / 2], [(columns - 1) / 2]]
    inputs = np.vstack([pixels, np.ones(rows * columns)]).T
    outputs = fields.reshape(2 * count, -1).T
    solution, *_ = np.linalg.lstsq(inputs, outputs)
    np.testing.assert_allclose(inputs @ solution, outputs, rtol=0, atol=atol)
    affine = solution.T.reshape(count, 2, 3)
    return affine[:, :, :2] + np.eye(2), affine[:, :, 2]


def resample_by_loop(images: NDArray[np.uint8], fields: Fields) -> Fields:
    """Interpolate one pixel after the other: the weight of a pixel falls with its distance."""
    count, rows, columns = images.shape[:3]
    resampled = np.zeros(images.shape)
    for n, row, column in np.ndindex(count, rows, columns):
        down, right = fields[n, :, row, column]
        y_weights = np.maximum(0, 1 - abs(row + down - np.arange(rows)))
        x_weights = np.maximum(0, 1 - abs(column + right - np.arange(columns)))
        resampled[n, row, column] = np.tensordot(np.outer(y_weights, x_weights), images[n])
    return resampled


@pytest.mark.parametrize("size", [0, 0.3, 3, 1e9])
@pytest.mark.parametrize("image_shape", SHAPES)
def test_resampling_is_bilinear_and_zero_outside(image_shape: tuple[int, ...], size: float) -> None:
    images = small_split(5, image_shape).images
    fields = np.random.default_rng(0).normal(0, size, (5, 2, *image_shape[:2])).astype(np.float32)
    resampled = resample(mx.array(images), mx.array(fields))
    assert resampled.dtype == mx.float32
    expected = resample_by_loop(images, fields.astype(np.float64))
    np.testing.assert_allclose(np.array(resampled), expected, rtol=0, atol=0.01)


def test_shift_is_uniform() -> None:
    maps, shifts = fit_affine(fields_of(replace(OFF, shift=3), 9, 11), atol=1e-5)
    np.testing.assert_allclose(maps - np.eye(2), 0, atol=1e-5)
    assert abs(shifts).max() <= 3
    np.testing.assert_allclose(shifts.mean(axis=0), 0, atol=0.15)
    np.testing.assert_allclose(shifts.std(axis=0), 3 / math.sqrt(3), atol=0.1)


@pytest.mark.parametrize("rotation", [10, 180])
def test_rotation_is_uniform_and_about_the_centre(rotation: float) -> None:
    maps, shifts = fit_affine(fields_of(replace(OFF, rotation=rotation), 9, 11))
    np.testing.assert_allclose(shifts, 0, atol=1e-4)
    np.testing.assert_allclose(maps @ maps.swapaxes(1, 2) - np.eye(2), 0, atol=3e-4)
    np.testing.assert_allclose(np.linalg.det(maps), 1, atol=3e-4)  # not a mirror image
    angles = np.degrees(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
    assert abs(angles).max() <= rotation + 0.01
    assert abs(angles.mean()) < rotation / 20
    assert angles.std() == pytest.approx(rotation / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("scale", [0.1, 0.9])
def test_scale_stretches_height_and_width_independently(scale: float) -> None:
    maps, shifts = fit_affine(fields_of(replace(OFF, scale=scale), 9, 11))
    np.testing.assert_allclose(shifts, 0, atol=1e-4)
    np.testing.assert_allclose([maps[:, 0, 1], maps[:, 1, 0]], 0, atol=1e-5)
    heights, widths = maps[:, 0, 0], maps[:, 1, 1]
    for factors in (heights, widths):
        assert abs(factors - 1).max() <= scale + 1e-5
        assert factors.std() == pytest.approx(scale / math.sqrt(3), rel=0.05)
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.1


@pytest.mark.parametrize("shape", [(28, 28), (9, 40), (1, 5)])
def test_elastic_is_the_deviation_of_a_smooth_and_nearly_normal_field(
    shape: tuple[int, int],
) -> None:
    fields = fields_of(replace(OFF, elastic=1.5), *shape)
    np.testing.assert_allclose(fields.mean(axis=0), 0, atol=0.15)
    np.testing.assert_allclose(fields.std(axis=0), 1.5, rtol=0.1)
    assert abs(np.corrcoef(fields[:, 0].ravel(), fields[:, 1].ravel())[0, 1]) < 0.05
    if shape == (28, 28):
        assert np.mean((fields / 1.5) ** 4) == pytest.approx(3, abs=0.3)  # kurtosis
        row, distances = fields[:, 0, 14], np.arange(10)
        correlations = [np.corrcoef(row[:, 10], row[:, 10 + d])[0, 1] for d in distances]
        np.testing.assert_allclose(correlations, np.exp(-((distances / 4) ** 2) / 4), atol=0.1)


def test_distortions_add_up() -> None:
    shift, elastic = (sample(replace(OFF, **{name: 0.5}), 50) for name in ("shift", "elastic"))
    both = sample(replace(OFF, shift=0.5, elastic=0.5), 50)
    np.testing.assert_allclose(both, shift + elastic)


def test_zero_params_change_neither_images_nor_rng() -> None:
    images, rng = mx.array(small_split(3).images), np.random.default_rng(0)
    before = rng.bit_generator.state
    assert augment(images, OFF, rng) is images
    assert rng.bit_generator.state == before


@pytest.mark.parametrize(("name", "value"), asdict(ALL).items())
def test_each_image_is_distorted_differently(name: str, value: float) -> None:
    image = small_split(1, (12, 12)).images
    params = replace(OFF, **{name: value})
    distorted = augment(mx.array(image.repeat(4, axis=0)), params, np.random.default_rng(0))
    assert len(np.unique(np.array(distorted), axis=0)) == 4


@pytest.mark.parametrize("image_shape", SHAPES)
@pytest.mark.parametrize(
    "params", [ALL, replace(OFF, scale=0.9, rotation=180), AugmentParams(100, 180, 0.9, 100)]
)
def test_largest_distortions_give_finite_pixels(
    params: AugmentParams, image_shape: tuple[int, ...]
) -> None:
    images = mx.array(small_split(50, image_shape).images)
    distorted = np.array(augment(images, params, np.random.default_rng(0)))
    assert distorted.shape == images.shape
    assert 0 <= distorted.min() <= distorted.max() <= 255  # false for NaN


LIMITS = {"shift": 100, "rotation": 180, "scale": 0.9, "elastic": 100}


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_params_are_numbers_from_0_to_a_limit(name: str, limit: float) -> None:
    for value in (0, limit):
        check_section({**asdict(ALL), name: value}, "augment", AugmentParams)
    for wrong in (-0.1, limit + 0.1, "1", None):
        with pytest.raises(ValueError, match=rf"augment\.{name}\b"):
            check_section({**asdict(ALL), name: wrong}, "augment", AugmentParams)


@pytest.mark.parametrize("error", [-1e-12, 1e-12])
def test_last_bits_of_libm_do_not_matter(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They differ between machines, but the trained weights must not."""

    def outputs() -> list[Any]:
        bases = [np.array(basis.__wrapped__(size)) for size in (1, 9, 28, 224)]
        return [sample(ALL, 10_000), *bases]

    def inaccurate(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: function(x) * (1 + error * np.random.default_rng(0).random(np.shape(x)))

    expected = outputs()
    for name in ("exp", "cos", "sin"):
        monkeypatch.setattr(np, name, inaccurate(getattr(np, name)))
    assert np.exp(0.0) != 1
    for array, other in zip(outputs(), expected, strict=True):
        assert np.array_equal(array, other)
