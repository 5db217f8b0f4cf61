"""Turn a picture of any format and size into an image for a model.

There are two kinds of preprocessing:

- "mnist" finds the one digit in the picture and prepares it as MNIST's authors did (LeCun, Bottou,
  Bengio and Haffner, "Gradient-based learning applied to document recognition", Proceedings of the
  IEEE 86, 1998, section III.A, and MNIST's web page): its bounding box is scaled by averaging to
  20 x 20 pixels, aspect ratio kept, and its centre of mass is moved to the centre of 28 x 28
  pixels, light on dark.
- "" resizes the whole picture.

A picture that already has the size and the channels of the image is not changed.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

# Pillow's mode for each supported preprocessing and image_shape[2:], which is the channels.
MODES = {("mnist", ()): "L", ("", ()): "L", ("", (1,)): "L", ("", (3,)): "RGB", ("", (4,)): "RGBA"}
# Raster formats only: for EPS, Pillow would run Ghostscript, whatever the file is called.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 50_000_000  # of 8 bits per channel, for up to 1 GB of memory
MAX_DEEP_PIXELS = 20_000_000  # of more bits, which take more memory
MAX_SIDE = 1000  # pixels; larger pictures of digits are scaled down first, to save time
BOX_FRACTION = 20 / 28  # side of a digit's bounding box / side of the image
MIN_CONTRAST = 16  # grey levels between ink and background, of 255
BLANK = "is blank; take another picture"

Pixels = NDArray[np.uint8]
Ink = NDArray[np.float64]


@contextmanager
def decoding() -> Iterator[None]:
    """Raise `ValueError` for any error of Pillow in the block."""
    try:
        yield
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {MAX_PIXELS:,} pixels; shrink it") from None
    except Exception as error:  # Pillow raises a dozen types for damaged bytes
        raise ValueError(f"cannot be decoded ({type(error).__name__}); save it as PNG") from None


def decode(file: BinaryIO) -> Image.Image:
    """Decode a picture, upright, the first frame of an animation, with 8 bits per channel.

    Raises `ValueError` if the file is damaged, not a picture or too large.
    """
    # Pillow warns about some sizes that are checked below.
    with (
        warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
        decoding(),
    ):
        picture: Image.Image = Image.open(file, formats=FORMATS)
    is_deep = picture.mode.startswith(("I", "F"))
    limit = MAX_DEEP_PIXELS if is_deep else MAX_PIXELS
    if math.prod(picture.size) > limit:
        raise ValueError(f"has more than {limit:,} pixels; shrink it")
    with decoding():
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    return to_8_bits(picture) if is_deep else picture


def to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale grey levels of 16 bits, 32 bits or floats to 0 to 255.

    Levels of 16 bits are divided by their range, others by the largest level in the picture.
    Pillow's `convert` would clip them at 255 instead.
    """
    levels = np.asarray(picture)
    if picture.mode == "F":
        levels = np.nan_to_num(levels)
    levels = levels.clip(0)
    white = 65535 if picture.mode.startswith("I;16") else max(levels.max(), 1)
    scaled = np.multiply(levels, 255 / white, dtype=np.float32)
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))


def background_level(picture: Image.Image) -> int:
    """Return the grey level that contrasts with the ink of a transparent picture, of mode RGBA.

    The opaque pixels are ink, unless they are more than half. Then the background is like them.
    """
    is_opaque = np.asarray(picture.getchannel("A")) > 127
    if not is_opaque.any():
        return 255
    opaque_level = int(np.median(np.asarray(picture.convert("L"))[is_opaque]))
    if is_opaque.mean() > 0.5:
        return opaque_level
    return 255 if opaque_level < 128 else 0


def to_pixels(picture: Image.Image, mode: str) -> Pixels:
    """Convert a picture to pixels of `mode`, uint8 (rows, columns) or (rows, columns, channels).

    It already has this mode, or it is transparent, of mode RGBA. Then it is composited onto a
    background of one grey level.
    """
    if picture.mode != mode:
        level = background_level(picture)
        background = Image.new("RGBA", picture.size, (level, level, level))
        picture = Image.alpha_composite(background, picture).convert(mode)
    return np.asarray(picture)


def otsu_threshold(grey: Pixels) -> int:
    """Return the grey level that best separates dark pixels, up to this level, from light ones.

    It maximizes the variance between the two classes of pixels. Source: Otsu, "A threshold
    selection method from gray-level histograms", IEEE Transactions on Systems, Man, and Cybernetics
    9, 1979.
    """
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    dark_counts = counts.cumsum()
    dark_sums = (counts * np.arange(256)).cumsum()
    count, total = dark_counts[-1], dark_sums[-1]
    products = dark_counts * (count - dark_counts)
    products[products == 0] = np.inf  # one class is empty: no variance between them
    variances = (total * dark_counts / count - dark_sums) ** 2 / products
    return int(variances.argmax())


def find_ink(grey: Pixels) -> Ink:
    """Return how much ink each pixel has, from 0 for background to 1, float64 (rows, columns).

    Otsu's threshold separates ink from background. The background is the class with the larger
    part of the border. Raises `ValueError` if the picture is blank.
    """
    is_background = grey <= otsu_threshold(grey)
    border = [is_background[0], is_background[-1], is_background[:, 0], is_background[:, -1]]
    if np.concatenate(border).mean() < 0.5:  # dark ink on a light background: invert
        is_background, grey = ~is_background, 255 - grey
    if is_background.all():
        raise ValueError(BLANK)
    # A high percentile instead of the median, so that the noise of the background is not ink.
    background = np.percentile(grey[is_background], 90)
    contrast = np.median(grey[~is_background]) - background
    if contrast < MIN_CONTRAST:
        raise ValueError(BLANK)
    return ((grey - background) / contrast).clip(0, 1)


def centre_digit(ink: Ink, rows: int, columns: int) -> Pixels:
    """Scale and centre a digit as in MNIST, uint8 (rows, columns), light on dark.

    `ink` is float64 of any two-dimensional shape, and at least 0.5 somewhere.
    """
    bounding_box = Image.fromarray(ink >= 0.5).getbbox()
    assert bounding_box
    left, top, right, bottom = bounding_box
    ink = ink[top:bottom, left:right]
    height, width = ink.shape
    step = max(height / (BOX_FRACTION * rows), width / (BOX_FRACTION * columns))
    row_weights = resampling_weights(rows, ink.sum(axis=1), step)
    column_weights = resampling_weights(columns, ink.sum(axis=0), step)
    digit = row_weights @ ink @ column_weights.T
    return np.rint(digit / digit.max() * 255).astype(np.uint8)


def resampling_weights(size: int, ink: Ink, step: float) -> Ink:
    """Return the weights that resample an axis to `size` pixels, float64 (size, len(ink)).

    `ink` is the ink of each old pixel. The new pixels are `step` old pixels apart, and the middle
    is the centre of mass. Each is the mean over an interval of `step` old pixels. If `step` is less
    than 1, the interval is one old pixel, which gives linear interpolation.
    """
    starts = np.arange(len(ink))
    centre = ink @ (starts + 0.5) / ink.sum()
    middles = centre + (np.arange(size)[:, None] + 0.5 - size / 2) * step
    width = max(step, 1.0)
    overlaps = np.minimum(middles + width / 2, starts + 1) - np.maximum(middles - width / 2, starts)
    return overlaps.clip(0) / width


def is_supported(image_shape: tuple[int, ...], preprocessing: str) -> bool:
    """Return whether `read_picture` can make such images."""
    return (preprocessing, image_shape[2:]) in MODES


def read_picture(file: BinaryIO, image_shape: tuple[int, ...], preprocessing: str) -> Pixels:
    """Read a picture as an image, uint8 (*image_shape).

    `image_shape` is (rows, columns) or (rows, columns, channels), and is supported with this
    `preprocessing`. Raises `ValueError` if the file is damaged, not a picture, too large or blank.
    """
    rows, columns = image_shape[:2]
    mode = MODES[preprocessing, image_shape[2:]]
    picture = decode(file)
    # Transparency is kept until the picture has its final size.
    picture = picture.convert("RGBA" if picture.has_transparency_data else mode)
    is_image = picture.size == (columns, rows) and picture.mode == mode
    if preprocessing == "mnist" and not is_image:
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        image = centre_digit(find_ink(to_pixels(picture, mode)), rows, columns)
    else:
        image = to_pixels(picture.resize((columns, rows)), mode)
    if image.min() == image.max() and rows * columns > 1:
        raise ValueError(BLANK)
    return image.reshape(image_shape)
