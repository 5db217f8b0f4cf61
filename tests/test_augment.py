"""The distortions of the training images: what they are, what they leave alone, and their bits."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from msgspec.structs import asdict, replace
from numpy.typing import NDArray

from stages.shared.augment import AugmentParams, augment, basis, displacements, draw, resample
from stages.shared.params import check_section
from tests.conftest import small_split

OFF = AugmentParams(shift=0, rotation=0, scale=0, elastic=0)
ALL = AugmentParams(shift=1, rotation=10, scale=0.1, elastic=1)
NAMES = list(asdict(OFF))
SHAPES = [(28, 28), (9, 11), (6, 4, 3), (1, 5), (1, 1, 1)]
Fields = NDArray[np.float64]


def fields_of(params: AugmentParams, rows: int, columns: int, count: int = 2000) -> Fields:
    """The displacements of so many images, (N, 2, rows, columns)."""
    drawn = mx.array(draw(params, count, np.random.default_rng(0)))
    return np.array(displacements(drawn, rows, columns)).astype(np.float64)


def affine_of(fields: Fields) -> tuple[Fields, Fields, Fields]:
    """The linear maps (N, 2, 2) and shifts (N, 2) nearest to fields, and what is left of these."""
    count, _, rows, columns = fields.shape
    places = np.indices((rows, columns)).reshape(2, -1) - [[(rows - 1) / 2], [(columns - 1) / 2]]
    known = np.vstack([places, np.ones(rows * columns)]).T
    found, *_ = np.linalg.lstsq(known, fields.reshape(2 * count, -1).T)
    rest = fields.reshape(2 * count, -1).T - known @ found
    maps = found.T.reshape(count, 2, 3)
    return maps[:, :, :2] + np.eye(2), maps[:, :, 2], rest


def plainly_resampled(images: NDArray[np.uint8], fields: Fields) -> Fields:
    """Pixel by pixel."""
    resampled = np.zeros(images.shape)
    for number, row, column in np.ndindex(*images.shape[:3]):
        down, right = (row, column) + fields[number, :, row, column]
        for y, x in itertools.product(range(images.shape[1]), range(images.shape[2])):
            weight = max(0, 1 - abs(down - y)) * max(0, 1 - abs(right - x))
            resampled[number, row, column] += weight * images[number, y, x]
    return resampled


@pytest.mark.parametrize("size", [0.3, 3, 1000])
@pytest.mark.parametrize("image_shape", SHAPES[1:])
def test_bilinear_between_pixels_and_zero_outside(
    image_shape: tuple[int, ...], size: float
) -> None:
    images = small_split(5, image_shape).images
    fields = np.random.default_rng(0).normal(0, size, (5, 2, *image_shape[:2])).astype(np.float32)
    resampled = resample(mx.array(images), mx.array(fields))
    assert resampled.dtype == mx.float32
    expected = plainly_resampled(images, fields.astype(np.float64))
    np.testing.assert_allclose(np.array(resampled), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("image_shape", SHAPES)
@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, -2), (-3, 0), (0, 40), (-1e9, 1e9)])
def test_whole_pixels_keep_their_values(
    down: float, right: float, image_shape: tuple[int, ...]
) -> None:
    images = small_split(3, image_shape).images
    rows, columns = image_shape[:2]
    fields = mx.broadcast_to(mx.array([down, right]).reshape(2, 1, 1), (3, 2, rows, columns))
    expected = np.zeros_like(images)
    for row, column in np.ndindex(rows, columns):
        y, x = row + int(down), column + int(right)
        if 0 <= y < rows and 0 <= x < columns:
            expected[:, row, column] = images[:, y, x]
    assert np.array_equal(np.array(resample(mx.array(images), fields)), expected)


def test_shift_moves_the_whole_image() -> None:
    maps, shifts, rest = affine_of(fields_of(replace(OFF, shift=3), 9, 11))
    np.testing.assert_allclose(maps - np.eye(2), 0, atol=1e-5)
    np.testing.assert_allclose(rest, 0, atol=1e-5)
    assert abs(shifts).max() <= 3
    np.testing.assert_allclose(shifts.mean(axis=0), 0, atol=0.15)
    np.testing.assert_allclose(shifts.std(axis=0), 3 / math.sqrt(3), atol=0.1)  # uniform


@pytest.mark.parametrize("rotation", [10, 180])
def test_rotation_turns_about_the_centre(rotation: float) -> None:
    maps, shifts, rest = affine_of(fields_of(replace(OFF, rotation=rotation), 9, 11))
    np.testing.assert_allclose(shifts, 0, atol=1e-4)
    np.testing.assert_allclose(rest, 0, atol=1e-4)
    np.testing.assert_allclose(maps @ maps.swapaxes(1, 2) - np.eye(2), 0, atol=3e-4)
    np.testing.assert_allclose(np.linalg.det(maps), 1, atol=3e-4)  # not a mirror image
    angles = np.degrees(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
    assert abs(angles).max() <= rotation + 0.01
    assert abs(angles.mean()) < rotation / 20
    assert angles.std() == pytest.approx(rotation / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("scale", [0.1, 0.9])
def test_scale_stretches_height_and_width(scale: float) -> None:
    maps, shifts, rest = affine_of(fields_of(replace(OFF, scale=scale), 9, 11))
    np.testing.assert_allclose(shifts, 0, atol=1e-4)
    np.testing.assert_allclose(rest, 0, atol=1e-4)
    np.testing.assert_allclose([maps[:, 0, 1], maps[:, 1, 0]], 0, atol=1e-5)
    for factors in (maps[:, 0, 0], maps[:, 1, 1]):
        assert abs(factors - 1).max() <= scale + 1e-5
        assert factors.std() == pytest.approx(scale / math.sqrt(3), rel=0.05)
    assert abs(np.corrcoef(maps[:, 0, 0], maps[:, 1, 1])[0, 1]) < 0.1


def test_a_quarter_turn() -> None:
    images = small_split(4, (12, 12)).images
    drawn = np.zeros_like(draw(OFF, 4, np.random.default_rng(0)))
    drawn[:, 0, -2, -1], drawn[:, 0, -1, -2] = -1, -1  # down is taken from the left, ...
    drawn[:, 1, -2, -1], drawn[:, 1, -1, -2] = 1, -1
    turned = np.array(resample(mx.array(images), displacements(mx.array(drawn), 12, 12)))
    np.testing.assert_allclose(turned, np.rot90(images, -1, axes=(1, 2)), atol=0.01)


@pytest.mark.parametrize("shape", [(28, 28), (9, 40), (1, 5)])
def test_elastic_is_the_deviation_of_a_smooth_nearly_normal_field(shape: tuple[int, int]) -> None:
    fields = fields_of(replace(OFF, elastic=1.5), *shape)
    np.testing.assert_allclose(fields.mean(axis=0), 0, atol=0.15)
    np.testing.assert_allclose(fields.std(axis=0), 1.5, rtol=0.1)
    assert abs(np.corrcoef(fields[:, 0].ravel(), fields[:, 1].ravel())[0, 1]) < 0.05
    if shape == (28, 28):
        assert np.mean((fields / 1.5) ** 4) == pytest.approx(3, abs=0.3)
        first, distances = fields[:, 0, 14, 10], np.arange(10)
        alike = [np.corrcoef(first, fields[:, 0, 14, 10 + d])[0, 1] for d in distances]
        np.testing.assert_allclose(alike, np.exp(-((distances / 4) ** 2) / 4), atol=0.1)


def test_one_field_does_all() -> None:
    """A distortion by all is not that by one: each adds its own."""
    drawn = {
        name: draw(replace(OFF, **{name: 1 / 2}), 50, np.random.default_rng(0)) for name in NAMES
    }
    both = draw(replace(OFF, shift=1 / 2, elastic=1 / 2), 50, np.random.default_rng(0))
    np.testing.assert_allclose(both, drawn["shift"] + drawn["elastic"])
    assert all(array.any() for array in drawn.values())


def test_without_any_all_stays_as_it_is() -> None:
    images, random = mx.array(small_split(3).images), np.random.default_rng(0)
    before = random.bit_generator.state
    assert augment(images, OFF, random) is images
    assert random.bit_generator.state == before


@pytest.mark.parametrize("name", NAMES)
def test_each_image_gets_its_own(name: str) -> None:
    image = small_split(1, (12, 12)).images
    params = replace(OFF, **{name: asdict(ALL)[name]})
    distorted = augment(mx.array(image.repeat(4, axis=0)), params, np.random.default_rng(0))
    assert len({bytes(memoryview(one)) for one in np.array(distorted)}) == 4


@pytest.mark.parametrize("image_shape", SHAPES)
@pytest.mark.parametrize(
    "params",
    [ALL, replace(OFF, scale=0.9, rotation=180), AugmentParams(100, 180, 0.9, 100)],
)
def test_absurd_distortions_of_any_image(
    params: AugmentParams, image_shape: tuple[int, ...]
) -> None:
    images = mx.array(small_split(50, image_shape).images)
    distorted = np.array(augment(images, params, np.random.default_rng(0)))
    assert distorted.shape == images.shape
    assert np.isfinite(distorted).all()
    assert 0 <= distorted.min() <= distorted.max() <= 255


BAD: dict[str, list[object]] = {
    "shift": [-1, 101, "1", None],
    "rotation": [-0.1, 181],
    "scale": [-0.1, 1],
    "elastic": [-1],
}


@pytest.mark.parametrize(("name", "value"), [(name, bad) for name in BAD for bad in BAD[name]])
def test_bad_values_are_one_line(name: str, value: object) -> None:
    with pytest.raises(
        ValueError, match=rf"^augment\.{name} is .*, must be a number from 0\.0 to "
    ):
        check_section({**asdict(ALL), name: value}, "augment", AugmentParams)


@pytest.mark.parametrize("towards", [-np.inf, np.inf])
def test_the_last_bit_of_a_function_of_the_c_library_does_not_count(
    towards: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those differ between machines, by which the weights must not."""
    sizes = [1, 9, 28, 224]
    drawn = draw(ALL, 10_000, np.random.default_rng(0))
    bases = [np.array(basis.__wrapped__(size)) for size in sizes]

    def off_by_one(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: np.nextafter(function(x), towards)

    for name in ("exp", "cos", "sin"):
        monkeypatch.setattr(np, name, off_by_one(getattr(np, name)))
    assert np.exp(0.0) != 1
    assert np.array_equal(draw(ALL, 10_000, np.random.default_rng(0)), drawn)
    for size, expected in zip(sizes, bases, strict=True):
        assert np.array_equal(np.array(basis.__wrapped__(size)), expected)
