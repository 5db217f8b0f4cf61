"""Classify pictures: print the class of each, its probability and the two runners-up.

A picture is a PNG, JPEG, GIF, BMP, TIFF, WebP, AVIF, JPEG 2000 or PPM file. "-" is standard input.
If it has the size of the model's images, the model gets it as it is, unless it is transparent.
Otherwise it is prepared in the way that the model file names. Digits are prepared as in MNIST
(LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 86, 1998, section III.A): the bounding
box of the digit is scaled by averaging to 20 x 20 pixels, aspect ratio kept, and its centre of mass
is moved to the centre of 28 x 28 pixels, light on dark. Other models get the whole picture,
resized.
"""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from stages.model import Model
from stages.shared.cli import argument_parser, run
from stages.shared.data import Split
from stages.shared.errors import UserError, escape
from stages.shared.metrics import predict
from stages.shared.model_file import Metadata, load_model
from stages.shared.openblas import load_openblas
from stages.shared.pictures import Pixels, is_supported, read_picture

MODEL = Path("data/model.safetensors")

Ranking = list[tuple[str, float]]  # classes with their probabilities, the most probable first


def load(path: Path) -> tuple[Model, Metadata]:
    """Load a model for pictures. Raises `UserError` if it cannot be loaded or is not supported."""
    try:
        model, metadata = load_model(path)
    except UserError as error:
        if path == MODEL:
            raise
        problem, _, _ = str(error).rpartition(";")  # without the remedy: DVC makes only MODEL
        raise UserError(f"{problem}; name another file") from None
    shape, preprocessing = metadata.image_shape, metadata.preprocessing
    if not is_supported(shape, preprocessing):
        problem = f"images {shape} with preprocessing {preprocessing!r:.60} are not supported"
        raise UserError(f"{path}: {problem}; extend stages/shared/pictures.py")
    return model, metadata


def open_file(name: str) -> BinaryIO:
    """Open a file, or standard input for "-"."""
    return io.BytesIO(sys.stdin.buffer.read()) if name == "-" else Path(name).open("rb")


def read_images(names: list[str], metadata: Metadata) -> dict[str, Pixels]:
    """Read pictures as images, uint8 (*image_shape). Print an error for each unreadable one."""
    images = {}
    for name in names:
        try:
            with open_file(name) as file:
                images[name] = read_picture(file, metadata.image_shape, metadata.preprocessing)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"error: {escape(name)}: {reason}", file=sys.stderr)
    return images


def rank_classes(model: Model, metadata: Metadata, images: list[Pixels]) -> list[Ranking]:
    """Rank the three most probable classes for each image. There is at least one image."""
    names = metadata.class_names
    unused_labels = np.zeros(len(images), np.uint8)
    logits = predict(model, Split(np.stack(images), unused_labels, names)).logits
    if not np.isfinite(logits).all():
        raise UserError("the model's results are not finite numbers; train it again")
    probabilities = np.array(mx.softmax(mx.array(logits), axis=1))
    rankings = []
    for row, indices in zip(probabilities, np.argsort(-logits, kind="stable"), strict=True):
        rankings.append([(names[index], float(row[index])) for index in indices[:3]])
    return rankings


def print_json(rankings: dict[str, Ranking]) -> None:
    """Print a line of JSON per picture."""
    for name, ranking in rankings.items():
        first, *runners_up = [{"class": label, "probability": p} for label, p in ranking]
        print(json.dumps({"file": name, **first, "runners_up": runners_up}))


def print_table(rankings: dict[str, Ranking]) -> None:
    """Print a row per picture, in aligned columns."""
    rows = []
    for name, ranking in rankings.items():
        rows.append([escape(name)])
        for label, probability in ranking:
            rows[-1] += [escape(label), f"{probability:7.2%}"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def main(files: list[str], model: Path, as_json: bool) -> None:
    mx.set_default_device(mx.cpu)
    with redirect_stdout(sys.stderr):  # standard output is for predictions only
        load_openblas(1)
    network, metadata = load(model)
    images = read_images(files, metadata)
    if images:
        rankings = rank_classes(network, metadata, list(images.values()))
        print_rankings = print_json if as_json else print_table
        print_rankings(dict(zip(images, rankings, strict=True)))
    if len(images) < len(set(files)):
        sys.exit(1)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("files", metavar="IMAGE", nargs="+", help='"-" is standard input')
    parser.add_argument("--model", metavar="FILE", type=Path, default=MODEL, help="another model")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON lines")
    run(main, parser)
