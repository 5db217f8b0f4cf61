"""Reading a picture of any kind as an image for a model."""

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stages.shared import pictures
from stages.shared.pictures import MAX_PIXELS, read_picture

SIZE = (280, 200)  # of the drawings, in pixels


def drawing(mode: str = "L", paper: object = 255, pen: object = 0, scale: float = 1) -> Image.Image:
    """Draw straight strokes, which look different when they are rotated or mirrored."""
    picture = Image.new(mode, tuple(round(side * scale) for side in SIZE), paper)  # type: ignore[arg-type]
    path = [(60, 40), (60, 160), (100, 160), (100, 90), (130, 60)]
    points = [(round(x * scale), round(y * scale)) for x, y in path]
    ImageDraw.Draw(picture).line(points, pen, round(16 * scale))  # type: ignore[arg-type]
    return picture


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return file


def digit(picture: Image.Image) -> NDArray[np.int64]:
    """Return the image of a picture for a model of digits."""
    return read_picture(encoded(picture), (28, 28), "mnist").astype(int)


EXPECTED = digit(drawing())


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(drawing(paper=200, pen=3)).astype(np.uint16) * 256)


def rotated() -> tuple[Image.Image, Image.Exif]:
    """Return the rotated drawing, and the EXIF data that describe the rotation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return drawing().transpose(Image.Transpose.ROTATE_90), exif


def faint_photo() -> Image.Image:
    """Draw on grey paper with shade and noise, with a pen that is not black."""
    noise = np.random.default_rng(0).normal(0, 3, SIZE[::-1]) + np.linspace(-8, 8, SIZE[0])
    levels = np.asarray(drawing(paper=170, pen=80)) + noise
    return Image.fromarray(levels.astype(np.uint8))


@pytest.mark.parametrize(
    ("file", "tolerance"),
    [
        (encoded(drawing(paper=0, pen=255)), 0),
        (encoded(drawing(paper=90, pen=140)), 0),
        (encoded(drawing("1", 1, 0)), 0),
        (encoded(drawing().convert("P")), 0),
        (encoded(drawing("RGB", "yellow", "navy")), 0),
        (encoded(drawing("RGBA", (0, 0, 0, 0), "black")), 0),
        (encoded(drawing("RGBA", (255, 255, 255, 0), "white")), 0),
        (encoded(drawing("RGBA", (9, 9, 9, 0), "white")), 0),
        (encoded(drawing("LA", (255, 255), (0, 255))), 0),
        (encoded(drawing("RGBA", (0, 0, 0, 0), "black").quantize(2)), 0),
        (encoded(sixteen_bits()), 0),
        (encoded(Image.fromarray(np.asarray(drawing()).astype(np.int32) * 999), "TIFF"), 0),
        (encoded(Image.fromarray(np.asarray(drawing()) / np.float32(255)), "TIFF"), 0),
        (encoded(rotated()[0], exif=rotated()[1]), 0),
        (encoded(rotated()[0].convert("RGB"), "JPEG", quality=95, exif=rotated()[1]), 12),
        (encoded(drawing("RGB", "white", "black"), "JPEG", quality=95), 12),
        (encoded(drawing(), "GIF", save_all=True, append_images=[drawing(pen=255)]), 0),
        (encoded(drawing(scale=2)), 60),
        (encoded(drawing(scale=9)), 60),
        (encoded(faint_photo()), 60),
    ],
)
def test_formats_colours_and_sizes_give_the_same_image(file: io.BytesIO, tolerance: int) -> None:
    image = read_picture(file, (28, 28), "mnist").astype(int)
    assert abs(image - EXPECTED).max() <= tolerance


def test_position_of_the_digit_does_not_matter() -> None:
    page = Image.new("L", (900, 700), 255)
    page.paste(drawing(), (600, 450))
    assert (digit(page) == EXPECTED).all()


def test_transparent_corner_is_background() -> None:
    picture = drawing("RGBA", "white", "black")
    picture.paste((0, 0, 0, 0), (0, 0, 12, 12))
    assert (digit(picture) == EXPECTED).all()


@pytest.mark.parametrize(("width", "height"), [(200, 40), (40, 200), (150, 150), (3, 5)])
def test_digit_fills_20_pixels_around_its_centre_of_mass(width: int, height: int) -> None:
    picture = Image.new("L", (400, 300), 0)
    picture.paste(255, (70, 30, 70 + width, 30 + height))
    image = digit(picture)
    assert image.max() == 255
    for axis, side in ((0, height), (1, width)):
        profile = image.sum(axis=1 - axis)
        expected = 20 * side / max(width, height)
        assert profile.sum() / profile.max() == pytest.approx(expected, abs=0.7)
        assert profile @ (np.arange(28) + 0.5) / profile.sum() == pytest.approx(14, abs=0.05)


def test_resampling_averages() -> None:
    picture = Image.new("L", (400, 400), 0)
    picture.paste(255, (100, 100, 300, 105))  # half a pixel high in the image
    assert sorted(digit(picture).max(axis=1))[-2:] == [255, 255]  # spread over two rows
    picture.paste(255, (100, 295, 105, 300))  # this moves the centre of mass
    assert len(np.unique(digit(picture))) > 3


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (28, 28, 3), (32, 20), (32, 20, 4)])
@pytest.mark.parametrize("preprocessing", ["", "mnist"])
def test_picture_of_the_image_shape_is_not_changed(
    shape: tuple[int, ...], preprocessing: str
) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    picture = Image.fromarray(image.reshape(shape[:2]) if image.size == 28 * 28 else image)
    preprocessing = preprocessing if len(shape) == 2 else ""
    assert (read_picture(encoded(picture), shape, preprocessing) == image).all()


def test_transparent_picture_of_the_image_shape_is_prepared() -> None:
    picture = Image.new("LA", (28, 28), (0, 0))
    picture.paste((0, 255), (5, 3, 9, 23))
    image = digit(picture)
    assert image[14, 14] == 255
    assert image[0, 0] == 0


@pytest.mark.parametrize(
    ("picture", "opaque", "tolerance"),
    [
        (drawing("RGB", "yellow", "navy"), drawing("RGB", "yellow", "navy"), 0),
        (drawing("RGBA", (0, 0, 0, 0), "black"), drawing("RGB", "white", "black"), 1),
        (drawing("RGBA", (0, 0, 0, 0), "white"), drawing("RGB", "black", "white"), 1),
    ],
)
@pytest.mark.parametrize(("shape", "mode"), [((28, 28), "L"), ((32, 20, 3), "RGB")])
def test_without_preprocessing_the_whole_picture_is_resized(
    picture: Image.Image, opaque: Image.Image, tolerance: int, shape: tuple[int, ...], mode: str
) -> None:
    image = read_picture(encoded(picture), shape, "").astype(int)
    expected = np.asarray(opaque.convert(mode).resize((shape[1], shape[0])))
    assert abs(image - expected).max() <= tolerance


def decompression_bomb(side: int) -> bytes:
    """Return a small PNG file whose header claims `side` x `side` pixels."""
    data = bytearray(encoded(drawing()).read())
    data[16:24] = struct.pack(">2I", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def noise_only() -> Image.Image:
    noise = np.random.default_rng(0).normal(240, 2, (100, 100))
    return Image.fromarray(noise.astype(np.uint8))


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"", r"decoded.*UnidentifiedImageError.*PNG"),
        (b"junk", r"decoded.*UnidentifiedImageError.*PNG"),
        (encoded(drawing()).read()[:200], r"decoded.*OSError.*PNG"),
        (decompression_bomb(50_000), f"more than {MAX_PIXELS:,} pixels"),
        (decompression_bomb(10_000), f"more than {MAX_PIXELS:,} pixels"),
        (encoded(Image.new("L", SIZE, 255)).read(), "blank"),
        (encoded(Image.new("L", (28, 28), 7)).read(), "blank"),
        (encoded(Image.new("RGBA", SIZE, (0, 0, 0, 0))).read(), "blank"),
        (encoded(noise_only()).read(), "blank"),
    ],
)
def test_unreadable_picture_is_an_error(data: bytes, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as error:
        read_picture(io.BytesIO(data), (28, 28), "mnist")
    assert len(str(error.value).splitlines()) == 1


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF"])
def test_raster_formats_are_read(kind: str) -> None:
    assert read_picture(encoded(drawing(), kind), (28, 28), "mnist").shape == (28, 28)


def test_postscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would run Ghostscript for such a file, whatever its name is."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("ran a program"))
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_picture(io.BytesIO(EPS), (28, 28), "mnist")


@pytest.mark.parametrize(
    ("mode", "dtype"), [("I;16", np.uint16), ("I", np.int32), ("F", np.float32), ("L", np.uint8)]
)
def test_size_is_limited_before_decoding(
    mode: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = encoded(Image.fromarray(np.zeros((6, 9), dtype)), "TIFF")
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", lambda _: pytest.fail("decoded"))
    name = "MAX_PIXELS" if mode == "L" else "MAX_DEEP_PIXELS"
    monkeypatch.setattr(pictures, name, 53)
    with pytest.raises(ValueError, match="more than 53 pixels; shrink"):
        read_picture(file, (28, 28), "")


def test_image_of_one_pixel_is_not_blank() -> None:
    assert read_picture(encoded(drawing()), (1, 1), "").shape == (1, 1)
