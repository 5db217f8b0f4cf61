"""Draw docs/pictures/ from docs/ladder.csv and what the pipeline has made, and its graph.

The graph of the stages is what `dvc dag --md` prints; it goes into docs/pipeline.md.
"""

import csv
import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import vl_convert
from PIL import Image

from stages.shared.augment import AugmentParams, augment
from stages.shared.cli import run
from stages.shared.data import Split, load_split
from stages.shared.errors import UserError
from stages.shared.files import atomic_write

PAGE = "docs/pipeline.md"
MAX_SIZE = 100_000  # bytes of a picture, which the next three hold down
MAX_EPOCHS = 400  # on a curve
MAX_CELLS = 800  # of the confusion matrix, the most frequent
MAX_WRITTEN = 12  # classes, up to which the cells show their figures

DISTORTIONS = AugmentParams(shift=1, rotation=10, scale=0.1, elastic=1)  # docs/experiments.md
CARD = (408, 400)  # pixels; two of these fit side by side on GitHub's page, and one on a phone
INK, GREY, GOOD, BAD = "#24292f", "#57606a", "#6f42c1", "#c2410c"
AXIS = {"title": None, "domain": False, "ticks": False, "tickCount": 5, "gridColor": "#eaeef2"}
STYLE = {
    "aria": False,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {**AXIS, "labelColor": GREY, "labelFontSize": 11},
    "text": {"align": "left", "color": GREY, "fontSize": 11},
}

Row = dict[str, str]
Spec = dict[str, Any]


def to_svg(spec: Spec, left: int, top: int, size: tuple[int, int] = CARD) -> bytes:
    """Render Vega-Lite on a white card, to be read on light and on dark pages.

    Nothing is placed by what the fonts of this machine measure, so that the same results have the
    same coordinates everywhere.
    """
    layout = {"autosize": "none", "padding": {"left": left, "top": top}, "config": STYLE}
    svg = vl_convert.vegalite_to_svg({**spec, **layout}, vl_version="5.21")
    drawn = svg[svg.index("<g ") :]  # without the size and background of its own
    drawn = re.sub("<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), drawn)
    box = 'width="{}" height="{}"'.format(*size)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} viewBox="0 0 {size[0]} {size[1]}">'
    return f'{head}<rect {box} rx="8" fill="white"/>{drawn}\n'.encode()


def layer(mark: str, style: Spec, **channels: Spec) -> Spec:
    """A layer that draws the data by marks."""
    return {"mark": {"type": mark, **style}, "encoding": channels}


def write(text: str, x: float, y: float, **style: Any) -> Spec:
    """A layer with `text` at a place in pixels."""
    return {"data": {"values": [{}]}, **layer("text", {"text": text, "x": x, "y": y, **style})}


def write_title(text: str, y: float) -> Spec:
    """A layer with the title of a plot."""
    return write(text, 0, y, color=INK, fontSize=14, fontWeight="bold")


def number(field: str, **more: Any) -> Spec:
    """A channel that shows a number."""
    return {"field": field, "type": "quantitative", **more}


def draw_curves(history: list[Row]) -> bytes:
    """Draw the losses and, where there is a validation split, the accuracy of each epoch."""
    rows = [{name: float(cell) for name, cell in row.items() if cell} for row in history]
    rows = rows[:: -(len(rows) // MAX_EPOCHS + 1)]  # the last one first
    plots = {
        "Loss": {"validation_loss": GOOD, "train_loss": BAD},
        "Accuracy": {"validation_accuracy": GOOD},
    }
    width, height = 336, 124 if "validation_loss" in rows[0] else 308
    scale = {"nice": False, "zero": False, "padding": 8}
    whole = {"tickCount": max(1, min(5, len(history) - 1))}  # no half epochs
    x = number("epoch", scale=scale, axis=whole)
    drawn: list[Spec] = []
    for title, figures in plots.items():
        known = {figure: colour for figure, colour in figures.items() if figure in rows[0]}
        layers = [write_title(title, -18)]
        for place, (figure, colour) in enumerate(known.items()):
            point = len(rows) <= 30 and {"color": colour, "size": 20}
            look = {} if title == "Loss" else {"format": ".3f"}
            y = number(figure, title=None, scale={"zero": title == "Loss"}, axis=look)
            label = f"{figure.partition('_')[0]} {rows[0][figure]:.4f}"
            layers += [
                layer("line", {"color": colour, "point": point}, x=x, y=y),
                write(label, width - 112 * place, -18, align="right", color=colour),
            ]
        if known:
            drawn.append({"width": width, "height": height, "layer": layers})
    drawn[-1]["layer"].append(write("epoch", width, height + 30, align="right"))
    spec = {"data": {"values": rows}, "vconcat": drawn, "spacing": 60, "bounds": "flush"}
    return to_svg(spec, 50, 46)


def draw_confusion(pairs: list[Row], classes: Spec, accuracy: dict[str, float]) -> bytes:
    """Draw how often each class was predicted as which, the mistakes in a hue of their own.

    The shade of a cell is its share of the class, that of mistakes in proportion to the largest.
    """
    counts = Counter((pair["actual"], pair["predicted"]) for pair in pairs)
    totals = Counter(pair["actual"] for pair in pairs)
    names = list(dict.fromkeys([*classes["accuracy_of"], *sorted(p for _, p in counts)]))
    most = max((n / totals[a] for (a, p), n in counts.items() if a != p), default=1)
    cells = [
        {"actual": a, "predicted": p, "count": n, "shade": n / totals[a] / (1 if a == p else most)}
        for (a, p), n in counts.most_common(MAX_CELLS)
    ]
    written = len(names) <= MAX_WRITTEN
    longest = min(12, max(map(len, names)))
    left, top = 44 + 5 * longest, 78
    width = CARD[0] - 20 - left
    slanted = 7 * longest > width / len(names)
    height = CARD[1] - top - (30 + 5 * longest if slanted else 32)
    scale = {"domain": names, "padding": 0.04 if written else 0}
    named = names[:: 1 + (len(names) - 1) // 20]
    look = {"grid": False, "labelLimit": 72, "values": named, "tickCount": len(named)}
    x, y = (
        {"field": field, "type": "nominal", "scale": scale, "axis": {**look, "labelAngle": angle}}
        for field, angle in (("predicted", -45 if slanted else 0), ("actual", 0))
    )
    hue = {"value": BAD, "condition": {"test": "datum.actual == datum.predicted", "value": GOOD}}
    shade = number("shade", legend=None, scale={"domain": [0, 1], "range": [0.04, 1]})
    low, high = accuracy["accuracy_95_low"], accuracy["accuracy_95_high"]
    layers: list[Spec] = [
        write_title(f"Accuracy {accuracy['accuracy']:.4f}", -50),
        write(f"on {len(pairs):,} test images; 95% interval {low:.4f} to {high:.4f}", 0, -32),
        write("predicted as", 0, -12),
        write("actual", -7, -12, align="right"),
        layer("rect", {"cornerRadius": 2 * written}, x=x, y=y, color=hue, opacity=shade),
    ]
    if written:
        size = min(11, 1.6 * width / len(names) / len(str(max(counts.values()))))
        ink = {"value": INK, "condition": {"test": "datum.shade > 0.8", "value": "white"}}
        figure = {"field": "count", "type": "nominal"}
        style = {"align": "center", "fontSize": size}
        layers.append(layer("text", style, x=x, y=y, color=ink, text=figure))
    spec = {"data": {"values": cells}, "width": width, "height": height, "layer": layers}
    return to_svg(spec, left, top)


def draw_ladder(rungs: list[Row]) -> bytes:
    """Draw the accuracy on the test split, mean and deviation, against the time of training."""
    figures = ("seconds", "test_accuracy", "test_deviation")
    values = [rung | {figure: float(rung[figure]) for figure in figures} for rung in rungs]
    middle = max(float(rung["seconds"]) for rung in rungs) / 2
    x = number("seconds", scale={"zero": True})
    y = number("test_accuracy", title=None, scale={"zero": False})
    name = {"field": "name", "type": "nominal"}
    late = f"datum.seconds > {middle}"  # whose names have no room on the right
    style = {"align": {"expr": f"{late} ? 'right' : 'left'"}, "dx": {"expr": f"{late} ? -9 : 9"}}
    layers = [
        write_title("Accuracy on the test split", -18),
        write("seconds of training", 450, 330, align="right"),
        layer("errorbar", {"color": GOOD}, x=x, y=y, yError={"field": "test_deviation"}),
        layer("circle", {"color": GOOD, "size": 60, "opacity": 1}, x=x, y=y),
        layer("text", {"color": INK, **style}, x=x, y=y, text=name),
    ]
    spec = {"data": {"values": values}, "width": 450, "height": 300, "layer": layers}
    return to_svg(spec, 50, 46, (520, 392))


def to_png(page: Image.Image) -> bytes:
    """Save an image in few colours, and smaller if need be."""
    while True:
        file = io.BytesIO()
        page.convert("RGB").quantize(32, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= MAX_SIZE:
            return file.getvalue()
        page = page.resize((page.width * 4 // 5, page.height * 4 // 5))


def draw_distorted(train: Split) -> bytes:
    """Draw an image of each of the first five classes, each followed by eight distortions of it."""
    random = np.random.default_rng(0)
    images = train.images[np.unique(train.labels, return_index=True)[1][:5]]
    distorted = [np.array(augment(mx.array(images), DISTORTIONS, random)) for _ in range(8)]
    cells = np.stack([images, *np.round(distorted).astype(np.uint8)], axis=1)
    cells = cells.reshape(*cells.shape[:4], -1)
    if cells.shape[4] not in (3, 4):  # neither RGB nor RGBA
        cells = cells[..., :1].repeat(3, axis=4)
    framed = np.pad(cells, [(0, 0), (0, 0), (0, 2), (0, 2), (0, 0)], constant_values=255)
    height, width = (framed.shape[axis] * framed.shape[axis + 2] for axis in (0, 1))
    page = Image.fromarray(framed.swapaxes(1, 2).reshape(height, width, -1)[:-2, :-2])
    return to_png(page.resize((2 * page.width, 2 * page.height), Image.Resampling.BOX))


def with_graph(page: str) -> str:
    """The text of a page with the graph of the stages as `dvc dag --md` prints it now."""
    graph = subprocess.check_output([sys.executable, "-m", "dvc", "dag", "--md"], text=True)
    return re.sub("```mermaid\n.*?```", lambda _: graph.strip(), page, flags=re.DOTALL)


def load(path: str) -> bytes:
    """The bytes of a file. Raises `UserError` if it is missing."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        remedy = "`make repro` makes those in metrics/, Git has the others"
        raise UserError(f"{path}: not found; {remedy}") from None


def read(path: str) -> Any:
    """The rows of a table, the values of a JSON file, a split, or an image."""
    if path.endswith(".npz"):
        return load_split(Path(path))
    data = load(path)
    if path.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    return json.loads(data) if path.endswith(".json") else Image.open(io.BytesIO(data))


# What draws each picture, and from which files.
PICTURES: dict[str, tuple[Callable[..., bytes], tuple[str, ...]]] = {
    "curves.svg": (draw_curves, ("metrics/history.csv",)),
    "confusion.svg": (
        draw_confusion,
        ("metrics/confusion.csv", "metrics/classes.json", "metrics/accuracy.json"),
    ),
    "mistakes.png": (to_png, ("metrics/misclassified.png",)),
    "distorted.png": (draw_distorted, ("data/train.npz",)),
    "ladder.svg": (draw_ladder, ("docs/ladder.csv",)),
}


def draw(name: str) -> bytes:
    """Draw one of `PICTURES`. Raises `UserError` if a file that it shows is missing."""
    function, paths = PICTURES[name]
    return function(*map(read, paths))


def main() -> None:
    drawn = {f"docs/pictures/{name}": draw(name) for name in PICTURES}
    drawn[PAGE] = with_graph(load(PAGE).decode()).encode()
    for path, data in drawn.items():
        with atomic_write(Path(path)) as file:
            file.write(data)


if __name__ == "__main__":
    run(main)
