"""Distort the training images at random, so that the network never sees the same image twice.

Shift, rotation, scale and elastic distortion add up to one displacement field per image: for each
pixel, the offset of the position that its new value is taken from. So each image is resampled once.

The method is that of Simard, Steinkraus and Platt (2003), "Best practices for convolutional neural
networks applied to visual document analysis", except for the elastic distortion. They blur noise
that has a value at each pixel. Here the noise is a coarse grid, interpolated with Gaussians, which
takes two small matrix products.

libm results differ in the last bit between machines, so they are rounded before use.
"""

import math
from functools import cache
from typing import Annotated

import mlx.core as mx
import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import astuple
from numpy.typing import NDArray

GRID = 8  # points of the noise along each axis; on the 28 pixels of MNIST they are 4 pixels apart
NUMBERS_PER_IMAGE = 5 + 2 * GRID**2  # an angle, two factors, two shifts and two grids of noise


class AugmentParams(Struct, frozen=True):
    """The section `augment` of params.yaml."""

    shift: Annotated[float, Meta(ge=0.0, le=100.0)]
    rotation: Annotated[float, Meta(ge=0.0, le=180.0)]
    scale: Annotated[float, Meta(ge=0.0, le=0.9)]
    elastic: Annotated[float, Meta(ge=0.0, le=100.0)]


@cache
def basis(size: int) -> mx.array:
    """Return the basis functions along an axis of `size` pixels, float32 (size, GRID + 2).

    The first GRID columns are Gaussians around the grid points, as wide as the points are apart.
    At each pixel they are scaled so that their squares sum to 1. The last two columns are the
    constant 1 and the distance from the centre in pixels.
    """
    pixels = np.arange(size) + 0.5
    distances = pixels[:, None] * ((GRID - 1) / size) - np.arange(GRID)
    gaussians = np.exp(-(distances**2) / 2)
    gaussians /= np.sqrt((gaussians**2).sum(axis=1, keepdims=True))
    columns = [gaussians, np.ones((size, 1)), pixels[:, None] - size / 2]
    return mx.array(np.concatenate(columns, axis=1).astype(np.float32))


def sample_distortions(
    params: AugmentParams, count: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Sample random distortions of `count` images, as coefficients of their displacement fields.

    The coefficients are float32 (count, 2, GRID + 2, GRID + 2). Axis 1 is the direction of the
    displacement: down, then right. The last two axes [i, j] belong to the product of basis function
    i along the columns and basis function j along the rows.

    Each image takes the next NUMBERS_PER_IMAGE numbers of `rng`. So its distortion depends on how
    many images were sampled before it, but not on `count`.
    """
    uniform = 2 * rng.random((count, NUMBERS_PER_IMAGE)) - 1
    angle, scale, shift, noise = np.split(uniform, [1, 3, 5], axis=1)
    angles = math.radians(params.rotation) * angle[:, 0]
    cos, sin = np.round([np.cos(angles), np.sin(angles)], 4)
    factors = 1 + params.scale * scale  # of height and width
    # Uniform noise with a variance of 1. At each pixel about a dozen numbers add up, so the
    # displacements have nearly a normal distribution.
    noise = params.elastic * math.sqrt(3) * noise
    coefficients = np.zeros((count, 2, GRID + 2, GRID + 2), np.float32)
    coefficients[:, :, :GRID, :GRID] = noise.reshape(count, 2, GRID, GRID)
    coefficients[:, :, GRID, GRID] = params.shift * shift
    # The identity is subtracted, because these are displacements.
    coefficients[:, :, GRID, GRID + 1] = factors * np.stack([cos, sin], axis=1) - [1, 0]
    coefficients[:, :, GRID + 1, GRID] = factors * np.stack([-sin, cos], axis=1) - [0, 1]
    return coefficients


def displacements(coefficients: mx.array, rows: int, columns: int) -> mx.array:
    """Return the displacement fields of `coefficients`, float32 (N, 2, rows, columns), in pixels.

    Each pixel gets the value that is so far below it and to its right.
    """
    # One small product per image, below OpenBLAS's threading threshold, so it does not compete with
    # the training step.
    return basis(rows) @ (basis(columns) @ coefficients).swapaxes(2, 3)


def resample(images: mx.array, fields: mx.array) -> mx.array:
    """Return `images` displaced by `fields`, float32 of the same shape, from 0 to 255.

    `images` are uint8 (N, rows, columns, ...), `fields` are float32 (N, 2, rows, columns) in
    pixels. Values between pixels are interpolated bilinearly. Outside of the image they are 0.
    """
    count, rows, columns, *channels = images.shape
    # Pad with zeros, twice at the end: positions are clipped to the first of these two, and
    # interpolation also reads the pixel after a position.
    margins = [(0, 0), (1, 2), (1, 2), *[(0, 0)] * len(channels)]
    width = columns + 3
    padded = mx.pad(images.astype(mx.float32), margins).reshape(count, (rows + 3) * width, -1)
    y = mx.clip(fields[:, 0] + mx.arange(1, rows + 1)[:, None], 0, rows + 1)
    x = mx.clip(fields[:, 1] + mx.arange(1, columns + 1), 0, columns + 1)
    top, left = y.astype(mx.int32), x.astype(mx.int32)
    top_left = (top * width + left).reshape(count, -1, 1)  # indices into `padded`
    y_weights, x_weights = (y - top).reshape(top_left.shape), (x - left).reshape(top_left.shape)

    def between(start: mx.array) -> mx.array:
        """Interpolate between the pixels at the indices `start` and the pixels to their right."""
        value = mx.take_along_axis(padded, start, axis=1)
        next_value = mx.take_along_axis(padded, start + 1, axis=1)
        return value + (next_value - value) * x_weights

    upper, lower = between(top_left), between(top_left + width)
    return (upper + (lower - upper) * y_weights).reshape(images.shape)


def augment(images: mx.array, params: AugmentParams, rng: np.random.Generator) -> mx.array:
    """Distort each of `images`, uint8 (N, rows, columns, ...), differently.

    Return float32 of the same shape, from 0 to 255. If all params are 0, return `images` unchanged
    and take no numbers from `rng`.
    """
    if not any(astuple(params)):
        return images
    coefficients = mx.array(sample_distortions(params, len(images), rng))
    return resample(images, displacements(coefficients, *images.shape[1:3]))
