"""Draw the pictures of the documents from the pipeline's outputs and docs/ladder.csv.

It also puts the graph of the stages, as `dvc dag --md` prints it, into docs/pipeline.md. Run it in
the top folder of the project: `PYTHONPATH=. python docs/pictures/draw.py`.
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
MAX_BYTES = 100_000  # of a picture; the next three limits keep an SVG file below it
MAX_POINTS = 400  # of a curve
MAX_CELLS = 800  # of the confusion matrix: the cells with the highest counts
MAX_CLASSES_WITH_COUNTS = 12  # of more classes, the cells are too small for their counts

DISTORTIONS = AugmentParams(shift=1, rotation=10, scale=0.1, elastic=1)  # as in experiments.md
CARD_SIZE = (408, 400)  # pixels; two fit side by side on GitHub's page, and one on a phone
BLACK, GREY, PURPLE, ORANGE = "#24292f", "#57606a", "#6f42c1", "#c2410c"
AXIS = {"title": None, "domain": False, "ticks": False, "tickCount": 5, "gridColor": "#eaeef2"}
CONFIG = {
    "aria": False,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {**AXIS, "labelColor": GREY, "labelFontSize": 11},
    "text": {"align": "left", "color": GREY, "fontSize": 11},
}
CURVES = {  # the metrics in each plot, with their colours
    "Loss": {"validation_loss": PURPLE, "train_loss": ORANGE},
    "Accuracy": {"validation_accuracy": PURPLE},
}

Row = dict[str, str]
Spec = dict[str, Any]


def to_svg(spec: Spec, left: int, top: int, size: tuple[int, int] = CARD_SIZE) -> bytes:
    """Render Vega-Lite on a white card, to be readable on light and on dark pages.

    `left` and `top` are the position of the first plot in pixels. No position depends on the size
    of rendered text, because fonts differ: equal results have equal coordinates on all machines.
    """
    layout = {"autosize": "none", "padding": {"left": left, "top": top}, "config": CONFIG}
    svg = vl_convert.vegalite_to_svg({**spec, **layout}, vl_version="5.21")
    content = svg[svg.index("<g ") :]  # without its own size and background
    content = re.sub("<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), content)
    width, height = size
    box = f'width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} viewBox="0 0 {width} {height}">'
    return f'{head}<rect {box} rx="8" fill="white"/>{content}\n'.encode()


def mark_layer(mark: str, style: Spec, **channels: Spec) -> Spec:
    """Return a layer that draws the data as marks."""
    return {"mark": {"type": mark, **style}, "encoding": channels}


def text_layer(text: str, x: float, y: float, **style: Any) -> Spec:
    """Return a layer with `text` at a position in pixels."""
    return {"data": {"values": [{}]}, **mark_layer("text", {"text": text, "x": x, "y": y, **style})}


def title_layer(text: str, y: float) -> Spec:
    """Return a layer with the title of a plot."""
    return text_layer(text, 0, y, color=BLACK, fontSize=14, fontWeight="bold")


def quantitative(field: str, **options: Any) -> Spec:
    """Return a channel that shows a field of numbers."""
    return {"field": field, "type": "quantitative", **options}


def nominal(field: str, **options: Any) -> Spec:
    """Return a channel that shows a field of names."""
    return {"field": field, "type": "nominal", **options}


def draw_curves(history: list[Row]) -> bytes:
    """Draw the losses and, if there is a validation split, the accuracy of each epoch."""
    rows = [{name: float(cell) for name, cell in row.items() if cell} for row in history]
    rows = rows[:: -(len(rows) // MAX_POINTS + 1)]  # in reverse, to always have the last epoch
    last = rows[0]
    width, height = 336, 124 if "validation_loss" in last else 308
    scale = {"nice": False, "zero": False, "padding": 8}
    axis = {"tickCount": max(1, min(5, len(history) - 1))}  # only whole epochs
    x = quantitative("epoch", scale=scale, axis=axis)
    plots: list[Spec] = []
    for title, colours in CURVES.items():
        metrics = [metric for metric in colours if metric in last]
        layers = [title_layer(title, -18)]
        for index, metric in enumerate(metrics):
            colour = colours[metric]
            point = {"color": colour, "size": 20} if len(rows) <= 30 else False
            y_axis = {} if title == "Loss" else {"format": ".3f"}
            y = quantitative(metric, title=None, scale={"zero": title == "Loss"}, axis=y_axis)
            layers.append(mark_layer("line", {"color": colour, "point": point}, x=x, y=y))
            label = f"{metric.partition('_')[0]} {last[metric]:.4f}"
            layers.append(text_layer(label, width - 112 * index, -18, align="right", color=colour))
        if metrics:
            plots.append({"width": width, "height": height, "layer": layers})
    plots[-1]["layer"].append(text_layer("epoch", width, height + 30, align="right"))
    spec = {"data": {"values": rows}, "vconcat": plots, "spacing": 60, "bounds": "flush"}
    return to_svg(spec, 50, 46)


def confusion_cells(predictions: list[Row]) -> list[Spec]:
    """Count the pairs of actual and predicted class. Return the MAX_CELLS most frequent pairs.

    The shade of a cell is its share of the actual class. Shades of mistakes are scaled so that the
    largest is 1, because most shares of mistakes are too small to be seen.
    """
    counts = Counter((row["actual"], row["predicted"]) for row in predictions)
    totals = Counter(row["actual"] for row in predictions)
    largest = max((n / totals[a] for (a, p), n in counts.items() if a != p), default=1)
    cells = []
    for (actual, predicted), count in counts.most_common(MAX_CELLS):
        share = count / totals[actual]
        shade = share if actual == predicted else share / largest
        cells.append({"actual": actual, "predicted": predicted, "count": count, "shade": shade})
    return cells


def draw_confusion(predictions: list[Row], metrics: Spec) -> bytes:
    """Draw the number of examples per actual and predicted class, mistakes in another colour."""
    cells = confusion_cells(predictions)
    predicted = {row["predicted"] for row in predictions}
    names = list(dict.fromkeys([*metrics["accuracy_of"], *sorted(predicted)]))
    has_counts = len(names) <= MAX_CLASSES_WITH_COUNTS
    longest = min(12, max(map(len, names)))  # characters
    left, top = 44 + 5 * longest, 78
    width = CARD_SIZE[0] - 20 - left
    is_slanted = 7 * longest > width / len(names)
    height = CARD_SIZE[1] - top - (30 + 5 * longest if is_slanted else 32)

    scale = {"domain": names, "padding": 0.04 if has_counts else 0}
    labels = names[:: 1 + (len(names) - 1) // 20]
    axis = {"grid": False, "labelLimit": 72, "values": labels, "tickCount": len(labels)}
    x = nominal("predicted", scale=scale, axis={**axis, "labelAngle": -45 if is_slanted else 0})
    y = nominal("actual", scale=scale, axis={**axis, "labelAngle": 0})
    correct = {"test": "datum.actual == datum.predicted", "value": PURPLE}
    colour = {"value": ORANGE, "condition": correct}
    shade = quantitative("shade", legend=None, scale={"domain": [0, 1], "range": [0.04, 1]})
    interval = "{accuracy_95_low:.4f} to {accuracy_95_high:.4f}".format_map(metrics)
    layers: list[Spec] = [
        title_layer(f"Accuracy {metrics['accuracy']:.4f}", -50),
        text_layer(f"on {len(predictions):,} test images; 95% interval {interval}", 0, -32),
        text_layer("predicted as", 0, -12),
        text_layer("actual", -7, -12, align="right"),
        mark_layer("rect", {"cornerRadius": 2 * has_counts}, x=x, y=y, color=colour, opacity=shade),
    ]
    if has_counts:
        most_digits = len(str(cells[0]["count"]))
        font_size = min(11, 1.6 * width / len(names) / most_digits)
        style = {"align": "center", "fontSize": font_size}
        ink = {"value": BLACK, "condition": {"test": "datum.shade > 0.8", "value": "white"}}
        layers.append(mark_layer("text", style, x=x, y=y, color=ink, text=nominal("count")))
    spec = {"data": {"values": cells}, "width": width, "height": height, "layer": layers}
    return to_svg(spec, left, top)


def draw_ladder(rungs: list[Row]) -> bytes:
    """Draw the accuracy on the test split, mean and deviation, over the time of training."""
    numbers = ("seconds", "test_accuracy", "test_deviation")
    values = [rung | {name: float(rung[name]) for name in numbers} for rung in rungs]
    x = quantitative("seconds", scale={"zero": True})
    y = quantitative("test_accuracy", title=None, scale={"zero": False})
    # The name of a slow rung is on its left, because there is no space on its right.
    is_slow = f"datum.seconds > {max(float(rung['seconds']) for rung in rungs) / 2}"
    align, dx = {"expr": f"{is_slow} ? 'right' : 'left'"}, {"expr": f"{is_slow} ? -9 : 9"}
    name_style = {"color": BLACK, "align": align, "dx": dx}
    layers = [
        title_layer("Accuracy on the test split", -18),
        text_layer("seconds of training", 450, 330, align="right"),
        mark_layer("errorbar", {"color": PURPLE}, x=x, y=y, yError={"field": "test_deviation"}),
        mark_layer("circle", {"color": PURPLE, "size": 60, "opacity": 1}, x=x, y=y),
        mark_layer("text", name_style, x=x, y=y, text=nominal("name")),
    ]
    spec = {"data": {"values": values}, "width": 450, "height": 300, "layer": layers}
    return to_svg(spec, 50, 46, (520, 392))


def to_png(picture: Image.Image) -> bytes:
    """Encode a picture as PNG with 32 colours, scaled down until it has at most MAX_BYTES."""
    while True:
        file = io.BytesIO()
        palette = picture.convert("RGB").quantize(32, dither=Image.Dither.NONE)
        palette.save(file, "PNG", optimize=True)
        if file.tell() <= MAX_BYTES:
            return file.getvalue()
        picture = picture.resize((picture.width * 4 // 5, picture.height * 4 // 5))


def draw_distorted(train: Split) -> bytes:
    """Draw an image of each of the first five classes, followed by eight distortions of it."""
    rng = np.random.default_rng(0)
    _, first_indices = np.unique(train.labels, return_index=True)
    images = train.images[first_indices[:5]]
    distorted = [np.array(augment(mx.array(images), DISTORTIONS, rng)) for _ in range(8)]
    cells = np.stack([images, *np.round(distorted).astype(np.uint8)], axis=1)
    cells = cells.reshape(*cells.shape[:4], -1)  # (5, 9, rows, columns, channels)
    if cells.shape[4] not in (3, 4):  # not RGB or RGBA: show the first channel
        cells = cells[..., :1].repeat(3, axis=4)
    cells = np.pad(cells, [(0, 0), (0, 0), (0, 2), (0, 2), (0, 0)], constant_values=255)
    height, width = cells.shape[0] * cells.shape[2], cells.shape[1] * cells.shape[3]
    grid = Image.fromarray(cells.swapaxes(1, 2).reshape(height, width, -1)[:-2, :-2])
    return to_png(grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.BOX))


def with_graph(page: str) -> str:
    """Return the text of a page with the current graph of the stages."""
    graph = subprocess.check_output([sys.executable, "-m", "dvc", "dag", "--md"], encoding="utf-8")
    return re.sub("```mermaid\n.*?```", lambda _: graph.strip(), page, flags=re.DOTALL)


def read_bytes(path: str) -> bytes:
    """Return the content of a file. Raises `UserError` if it is missing."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        remedy = "run `make repro` for metrics/, `git checkout` for docs/"
        raise UserError(f"{path}: not found; {remedy}") from None


def load(path: str) -> Any:
    """Load a CSV file as a list of rows, JSON, a split, or an image."""
    if path.endswith(".npz"):
        return load_split(Path(path))
    data = read_bytes(path)
    if path.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    return json.loads(data) if path.endswith(".json") else Image.open(io.BytesIO(data))


# The function that draws each picture, and the files that it shows.
PICTURES: dict[str, tuple[Callable[..., bytes], tuple[str, ...]]] = {
    "curves.svg": (draw_curves, ("metrics/history.csv",)),
    "confusion.svg": (draw_confusion, ("metrics/confusion.csv", "metrics/accuracy.json")),
    "mistakes.png": (to_png, ("metrics/misclassified.png",)),
    "distorted.png": (draw_distorted, ("data/train.npz",)),
    "ladder.svg": (draw_ladder, ("docs/ladder.csv",)),
}


def draw(name: str) -> bytes:
    """Draw one of `PICTURES`. Raises `UserError` if a file that it shows is missing."""
    function, paths = PICTURES[name]
    return function(*map(load, paths))


def main() -> None:
    mx.set_default_device(mx.cpu)  # the same pictures everywhere
    files = {f"docs/pictures/{name}": draw(name) for name in PICTURES}
    files[PAGE] = with_graph(read_bytes(PAGE).decode()).encode()
    for path, data in files.items():
        with atomic_write(Path(path)) as file:
            file.write(data)


if __name__ == "__main__":
    run(main)
