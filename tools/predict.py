"""Say what the model sees in pictures: the class, its probability, and the two runners-up.

A picture is anything that Pillow opens, "-" is standard input. One that has the model's own size
goes to it as it is, unless it is transparent; any other is brought to the form that the model file
names. For digits that is MNIST's own (LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE
86, 1998, section III.A, and the page of MNIST): the box around the digit, with its aspect kept, is
scaled to 20 x 20 by averaging, and its centre of mass becomes the centre of 28 x 28 pixels, light
on dark. Other models get the whole picture, scaled.
"""

import io
import json
import sys
import warnings
from argparse import ArgumentParser
from contextlib import redirect_stdout
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from stages.model import Model
from stages.shared import cli
from stages.shared.data import Split
from stages.shared.errors import UserError
from stages.shared.metrics import predict
from stages.shared.model_file import Metadata, load_model
from stages.shared.openblas import load_openblas

MODEL = Path("data/model.safetensors")
BOX = 20 / 28  # of an image's side, that a digit fills
MAX_SIDE = 1000  # pixels, to which larger pictures of digits are scaled first
MIN_CONTRAST = 16  # grey levels of 255 between pen and paper
BLANK = "blank, nothing to be seen; take another"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names for so many channels

Pixels = NDArray[np.uint8]
Ink = NDArray[np.float64]


def open_picture(file: BinaryIO) -> Image.Image:
    """Decode a picture, the first one of an animation, upright. Raises `ValueError`."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            picture = ImageOps.exif_transpose(Image.open(file))
            picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"has more than {limit} pixels; make it smaller") from None
    except Exception as error:  # Pillow has a dozen kinds for damaged bytes
        reason = type(error).__name__
        raise ValueError(f"not a whole picture ({reason}); save it again, as PNG") from None
    if picture.mode.startswith(("I", "F")):  # of which `convert` would cut all above 255
        values = np.nan_to_num(np.asarray(picture, np.float64)).clip(0)
        top = 65535 if picture.mode.startswith("I;16") else max(values.max(), 1)
        picture = Image.fromarray(np.rint(values / top * 255).astype(np.uint8))
    return picture


def on_paper(picture: Image.Image) -> Image.Image:
    """A picture with paper under it, if it is transparent.

    The paper is dark under light ink, light under dark ink, or like the most of the picture.
    """
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    grey, opaque = np.asarray(picture.convert("L")), np.asarray(picture.getchannel("A")) > 127
    typical = int(np.median(grey[opaque])) if opaque.any() else 0
    paper = typical if opaque.mean() > 0.5 else 255 if typical < 128 else 0
    return Image.alpha_composite(Image.new("RGBA", picture.size, (paper,) * 3), picture)


def find_ink(grey: Pixels) -> Ink:
    """How much ink there is in each pixel, from 0 for paper to 1 for pen, (rows, columns).

    Otsu's threshold parts pen from paper; what has the larger part of the border is paper. Raises
    `ValueError` if nothing stands out.
    """
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    apart = below * (below[-1] - below)
    between = (sums[-1] * below / below[-1] - sums) ** 2 / np.where(apart, apart, np.inf)
    dark = grey <= between.argmax()
    border = np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]])
    is_paper, level = (dark, grey) if border.mean() >= 0.5 else (~dark, 255 - grey)
    if is_paper.all():
        raise ValueError(BLANK)
    paper = np.percentile(level[is_paper], 90)  # not the median, so that its noise is no ink
    pen = np.median(level[~is_paper])
    if pen - paper < MIN_CONTRAST:
        raise ValueError(BLANK)
    ink: Ink = ((level - paper) / (pen - paper)).clip(0, 1)
    return ink


def overlaps(size: int, pixels: int, centre: float, step: float) -> Ink:
    """The part that each of `pixels` has in each of `size` steps around `centre`, (size, pixels).

    A product with it averages; where a step is less than a pixel, it interpolates.
    """
    width = max(step, 1.0)
    middles = centre + (np.arange(size)[:, None] + 0.5 - size / 2) * step
    left = np.arange(pixels)
    overlap = np.minimum(middles + width / 2, left + 1) - np.maximum(middles - width / 2, left)
    parts: Ink = overlap.clip(0) / width
    return parts


def centred(ink: Ink, rows: int, columns: int) -> Pixels:
    """Bring a digit to MNIST's form, uint8 (rows, columns); `ink` is 1 somewhere."""
    drawn = ink >= 0.5
    down, right = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    ink = ink[down[0] : down[-1] + 1, right[0] : right[-1] + 1]
    step = max(ink.shape[0] / (BOX * rows), ink.shape[1] / (BOX * columns))
    y, x = (ink.sum(axis=1 - n) @ (np.arange(ink.shape[n]) + 0.5) / ink.sum() for n in (0, 1))
    digit = overlaps(rows, ink.shape[0], y, step) @ ink @ overlaps(columns, ink.shape[1], x, step).T
    levels: Pixels = np.rint(digit / digit.max() * 255).astype(np.uint8)
    return levels


def read_image(file: BinaryIO, metadata: Metadata) -> Pixels:
    """Make an image for the model, uint8 (*image_shape), of a picture. Raises `ValueError`."""
    rows, columns, *channels = metadata.image_shape
    mode = MODES[channels[0] if channels else 1]
    picture = open_picture(file)
    own_size = picture.size == (columns, rows)
    picture = picture.convert("RGBA" if picture.has_transparency_data else mode)
    if metadata.preprocessing == "mnist" and not (own_size and picture.mode == mode):
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        grey = np.asarray(on_paper(picture).convert("L"))
        image = centred(find_ink(grey), rows, columns)
    else:
        if not own_size:
            picture = picture.resize((columns, rows))
        image = np.asarray(picture if picture.mode == mode else on_paper(picture).convert(mode))
    if image.min() == image.max():
        raise ValueError(BLANK)
    return image.reshape(metadata.image_shape)


def check_supported(path: Path, metadata: Metadata) -> None:
    """Raise `UserError` for a model whose images no picture can become here."""
    form, channels = metadata.preprocessing, metadata.image_shape[2:]
    if form not in ("", "mnist") or (channels and (form or channels[0] not in MODES)):
        raise UserError(
            f"{path}: wants images {metadata.image_shape} of the form {form!r:.60}, which no"
            " picture becomes here; extend tools/predict.py"
        )


def answer(model: Model, metadata: Metadata, images: list[Pixels]) -> list[list[tuple[str, float]]]:
    """The classes with their probabilities for each image, the most probable first."""
    labels = np.zeros(len(images), np.uint8)  # which play no part
    logits = predict(model, Split(np.stack(images), labels, metadata.class_names)).logits
    probabilities = np.array(mx.softmax(mx.array(logits), axis=1))
    return [
        [(metadata.class_names[label], float(row[label])) for label in order]
        for row, order in zip(probabilities, np.argsort(-logits, kind="stable"), strict=True)
    ]


def shown(name: str) -> str:
    """The name of a file or class in a line, what does not print escaped."""
    return repr(name)[1:-1]


def to_line(name: str, classes: list[tuple[str, float]]) -> str:
    """One answer as JSON."""
    first, *others = ({"class": label, "probability": value} for label, value in classes)
    return json.dumps({"file": name, **first, "runners_up": others})


def main(files: list[str], model: Path, as_json: bool) -> None:
    mx.set_default_device(mx.cpu)
    with redirect_stdout(sys.stderr):  # for its notes
        load_openblas(1)
    try:
        network, metadata = load_model(model)
    except UserError as error:
        if model == MODEL:
            raise
        problem, *_ = str(error).rpartition(";")  # for DVC does not make this one
        raise UserError(f"{problem}; name another file") from None
    check_supported(model, metadata)
    images = {}
    for name in files:
        try:
            if name != "-" and not Path(name).is_file():
                raise ValueError("is not a file" if Path(name).exists() else "not found")
            with (
                io.BytesIO(sys.stdin.buffer.read())
                if name == "-"
                else Path(name).open("rb") as file
            ):
                images[name] = read_image(file, metadata)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"error: {shown(name)}: {reason}", file=sys.stderr)
    answers = answer(network, metadata, list(images.values())) if images else []
    best = {name: classes[:3] for name, classes in zip(images, answers, strict=True)}
    if as_json:
        for item in best.items():
            print(to_line(*item))
    elif best:
        rows = [
            [shown(name), *(cell for label, p in classes for cell in (shown(label), f"{p:7.2%}"))]
            for name, classes in best.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells))
    if len(images) < len(set(files)):
        sys.exit(1)


def argument_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.argument_parser(__doc__)
    parser.add_argument("files", metavar="IMAGE", nargs="+", help='"-" is standard input')
    parser.add_argument(
        "--model", metavar="FILE", type=Path, default=MODEL, help=f"instead of {MODEL}"
    )
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print one JSON object per line"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, argument_parser())
