"""Distort the training images at random, so that the network sees none of them twice.

Shift, rotation, scale and elastic distortion make one displacement field of each image, by which it
is resampled once. After Simard, Steinkraus and Platt (2003), "Best practices for convolutional
neural networks applied to visual document analysis", but for their noise at every pixel and blur: a
coarse grid of noise between Gaussians takes two small matrix products.

No last bit of a function of the C library counts, for machines differ in these: what comes of one
is rounded further than that.
"""

import math
from functools import cache
from typing import Annotated

import mlx.core as mx
import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import astuple
from numpy.typing import NDArray

GRID = 8  # numbers along each axis; on the 28 pixels of MNIST they are 4 apart
DRAWN = 5 + 2 * GRID**2  # numbers for each image


class AugmentParams(Struct, frozen=True):
    """The section `augment` of params.yaml."""

    shift: Annotated[float, Meta(ge=0.0, le=100.0)]
    rotation: Annotated[float, Meta(ge=0.0, le=180.0)]
    scale: Annotated[float, Meta(ge=0.0, le=0.9)]
    elastic: Annotated[float, Meta(ge=0.0, le=100.0)]


@cache
def basis(size: int) -> mx.array:
    """What a field is made of along an axis of `size` pixels, float32 (size, GRID + 2).

    At each pixel: the Gaussian around each of the GRID points, which is as wide as they are apart,
    scaled so that their squares sum to 1; a one; the pixel's distance from the centre.
    """
    pixels = np.arange(size) + 0.5
    distances = pixels[:, None] * ((GRID - 1) / size) - np.arange(GRID)
    gaussians = np.exp(-(distances**2) / 2)
    gaussians /= np.sqrt((gaussians**2).sum(axis=1, keepdims=True))
    columns = [gaussians, np.ones((size, 1)), pixels[:, None] - size / 2]
    return mx.array(np.concatenate(columns, axis=1).astype(np.float32))


def draw(params: AugmentParams, count: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Draw the distortions of the next `count` images, float32 (count, 2, GRID + 2, GRID + 2).

    They weigh the products of the bases of the columns and of the rows in the displacements down
    and to the right. Each image takes DRAWN numbers of `random` in turn, so they depend on its
    place alone, however many are drawn at once.
    """
    uniform = 2 * random.random((count, DRAWN)) - 1
    angles = math.radians(params.rotation) * uniform[:, 0]
    cos, sin = np.round([np.cos(angles), np.sin(angles)], 4)
    factors = 1 + params.scale * uniform[:, 1:3]  # of height and width
    drawn = np.zeros((count, 2, GRID + 2, GRID + 2), np.float32)
    # Uniform numbers of variance 1; a dozen of them weigh in at each pixel, nearly a normal one.
    noise = params.elastic * math.sqrt(3) * uniform[:, 5:]
    drawn[:, :, :GRID, :GRID] = noise.reshape(count, 2, GRID, GRID)
    drawn[:, :, GRID, GRID] = params.shift * uniform[:, 3:5]
    drawn[:, :, GRID, GRID + 1] = factors * np.stack([cos, sin], axis=1) - [1, 0]
    drawn[:, :, GRID + 1, GRID] = factors * np.stack([-sin, cos], axis=1) - [0, 1]
    return drawn


def displacements(drawn: mx.array, rows: int, columns: int) -> mx.array:
    """The fields of what `draw` gives: float32 (N, 2, rows, columns), in pixels.

    They say for each pixel how far below and right of it the image is taken from.
    """
    # A product an image: too small for OpenBLAS to wait for its threads, which the step may have.
    return basis(rows) @ (basis(columns) @ drawn).swapaxes(2, 3)


def resample(images: mx.array, fields: mx.array) -> mx.array:
    """Take each pixel from where `fields`, float32 (N, 2, rows, columns), displace it to.

    `images` are uint8 (N, rows, columns, ...), the result is float32 of the same shape, from 0 to
    255: bilinear between pixels, zero outside.
    """
    count, rows, columns, *channels = images.shape
    # Zeros around it, at the end twice: for the last place to clip to, and the pixel after.
    margins = [(0, 0), (1, 2), (1, 2), *[(0, 0)] * len(channels)]
    width = columns + 3
    padded = mx.pad(images.astype(mx.float32), margins).reshape(count, (rows + 3) * width, -1)
    down = mx.clip(fields[:, 0] + mx.arange(1, rows + 1)[:, None], 0, rows + 1)
    right = mx.clip(fields[:, 1] + mx.arange(1, columns + 1), 0, columns + 1)
    top, left = down.astype(mx.int32), right.astype(mx.int32)
    first = (top * width + left).reshape(count, -1, 1)
    below, beside = (down - top).reshape(first.shape), (right - left).reshape(first.shape)

    def between(start: mx.array) -> mx.array:
        """The values between the pixels at `start` and those right of them."""
        value = mx.take_along_axis(padded, start, axis=1)
        next_value = mx.take_along_axis(padded, start + 1, axis=1)
        return value + (next_value - value) * beside

    upper = between(first)
    return (upper + (between(first + width) - upper) * below).reshape(images.shape)


def augment(images: mx.array, params: AugmentParams, random: np.random.Generator) -> mx.array:
    """Distort `images`, uint8 (N, rows, columns, ...), each anew: float32 from 0 to 255.

    Without any distortion they are returned as they are.
    """
    if not any(astuple(params)):
        return images
    drawn = mx.array(draw(params, len(images), random))
    return resample(images, displacements(drawn, *images.shape[1:3]))
