"""The page to draw on: in a browser, it computes the same as Python."""

import base64
import html
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages.model import ModelParams
from stages.shared.data import Split, load_split
from stages.shared.errors import UserError
from stages.shared.metrics import predict
from stages.shared.model_file import Metadata, load_model
from stages.shared.params import read_params
from stages.shared.pictures import read_picture
from tests.conftest import ROOT, Project, small_split
from tests.test_plots import BROWSER, browse
from tools.page import PAGE, TEMPLATE, main, make_page
from tools.predict import MODEL

PARAMS = read_params("model", ModelParams, ROOT / "params.yaml")
NAMES = tuple("0123456789")
METADATA = Metadata(PARAMS, (28, 28), NAMES, "mnist")
# A drawn 3: the positions of the pointer, in pixels of the drawing.
THREE = [[80, 90], [100, 60], [140, 50], [180, 65], [190, 100], [165, 130], [130, 140]]
THREE += [[170, 150], [195, 185], [180, 225], [140, 240], [95, 232], [75, 205]]

in_browser = pytest.mark.skipif(not BROWSER, reason="there is no Chromium")


class Mlp(nn.Module):
    """A multi-layer perceptron of any sizes, independent of stages/model.py."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
        for layer in self.layers:
            layer.weight = mx.contiguous(3 * layer.weight.T)

    def __call__(self, pixels: mx.array) -> mx.array:
        activations = pixels.reshape(len(pixels), -1)
        for layer in self.layers[:-1]:
            activations = mx.maximum(activations @ layer.weight + layer.bias, 0)
        return activations @ self.layers[-1].weight + self.layers[-1].bias


Example = tuple[nn.Module, Metadata, Split]


@pytest.fixture(params=["trained", "random"])
def example(request: pytest.FixtureRequest) -> Example:
    """The model of `make repro` with the test split, or a random model with random images."""
    if request.param == "trained":
        if not (ROOT / MODEL).exists():
            pytest.skip("this needs the results of `make repro`")
        model, metadata = load_model(ROOT / MODEL)
        try:
            make_page(ROOT / MODEL, model, metadata)
        except UserError as error:
            pytest.skip(str(error))
        return model, metadata, load_split(ROOT / "data/test.npz")
    mx.random.seed(0)
    metadata = Metadata(PARAMS, (9, 7), ("a", "b", "a & b"), "mnist")
    split = small_split(300, metadata.image_shape, metadata.class_names)
    return Mlp(63, 30, 20, 10, 3), metadata, split


def run_in(page: str, script: str, folder: Path) -> Any:
    """Run `script`, the body of a JavaScript function, in the page. Return its result."""
    path = folder / "page.html"
    result = f"JSON.stringify((() => {{{script}}})())"
    path.write_text(f"{page}<pre id=result></pre><script>result.textContent = {result}</script>")
    found = re.search('<pre id="result">(.*?)</pre>', browse(path, "--dump-dom"), re.DOTALL)
    assert found
    return json.loads(html.unescape(found[1]))


def expected_probabilities(model: nn.Module, split: Split) -> NDArray[np.float32]:
    """Return the probabilities of all classes, float32 (N, classes)."""
    return np.array(mx.softmax(mx.array(predict(model, split).logits), axis=1))


def test_class_name_cannot_end_the_script() -> None:
    """A model file with such a name is refused, but the page does not rely on that."""
    pages = []
    for name in ("c", "</script>"):
        metadata = Metadata(PARAMS, (9, 7), ("a", "b", name), "mnist")
        pages.append(make_page(MODEL, Mlp(63, 30, 20, 10, 3), metadata))
    assert pages[0].count("</script>") == pages[1].count("</script>")


@in_browser
def test_predictions_of_the_page_are_those_of_the_model(example: Example, tmp_path: Path) -> None:
    model, metadata, split = example
    data = base64.b64encode(split.images.tobytes()).decode()
    size = split.images[0].size
    script = f"""
      const levels = Uint8Array.from(atob("{data}"), c => c.charCodeAt(0)), probabilities = []
      for (let n = 0; n < levels.length; n += {size})
        probabilities.push(predict(levels.subarray(n, n + {size})).map(p => +p.toFixed(6)))
      return probabilities"""
    probabilities = np.array(run_in(make_page(MODEL, model, metadata), script, tmp_path))
    expected = expected_probabilities(model, split)
    assert probabilities.shape == expected.shape
    assert (probabilities.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert abs(probabilities - expected).max() < 1e-4


# Functions to draw on the page, and to read what it shows.
HELPERS = """
  const status = () => document.querySelector('[role=status]').textContent
  const bars = () => [...document.querySelectorAll('progress')].map(bar => bar.value)
  const image = () => {
    const { width, height } = preview
    const { data } = preview.getContext('2d').getImageData(0, 0, width, height)
    return [...data].filter((_, n) => n % 4 === 0)
  }
  const point = (type, [x, y], more = {}) => {
    const box = drawing.getBoundingClientRect()
    const position = { clientX: box.left + drawing.clientLeft + x / size * drawing.clientWidth,
                       clientY: box.top + drawing.clientTop + y / size * drawing.clientHeight }
    const options = { ...position, isPrimary: true, buttons: 1, bubbles: true, ...more }
    drawing.dispatchEvent(new PointerEvent(type, options))
  }
  const draw = ([first, ...others]) => {
    point('pointerdown', first)
    others.forEach(position => point('pointermove', position))
  }
"""


@in_browser
def test_drawing_is_read_as_python_reads_the_saved_picture(
    example: Example, tmp_path: Path
) -> None:
    model, metadata, split = example
    script = f"""{HELPERS}
      const saved = []
      HTMLAnchorElement.prototype.click = function() {{ saved.push(this.download, this.href) }}
      const before = status()
      draw({THREE})
      document.getElementById('save').click()
      const drawn = [status(), bars(), image()]
      document.getElementById('clear').click()
      return [before, ...drawn, ...saved, status(), bars(), image()]"""
    page = make_page(MODEL, model, metadata)
    before, answer, bars, image, name, png, cleared, empty, dark = run_in(page, script, tmp_path)
    data = base64.b64decode(png.removeprefix("data:image/png;base64,"))
    expected = read_picture(io.BytesIO(data), metadata.image_shape, metadata.preprocessing)
    assert name == "digit.png"
    assert abs(np.array(image).reshape(expected.shape) - expected.astype(int)).max() <= 3
    one = Split(expected[None], np.zeros(1, np.uint8), metadata.class_names)
    assert bars == pytest.approx(expected_probabilities(model, one)[0].tolist(), abs=0.02)
    assert answer == f"This is a {metadata.class_names[np.argmax(bars)]}"
    if len(split) == 10_000:  # of MNIST
        assert answer == "This is a 3"
    assert before == cleared == "Draw a digit"
    assert set(empty) == set(dark) == {0}


@pytest.fixture(scope="module")
def page() -> str:
    mx.random.seed(0)
    return make_page(MODEL, Mlp(784, 32, 10), METADATA)


@in_browser
def test_bars_change_with_each_stroke(page: str, tmp_path: Path) -> None:
    script = f"""{HELPERS}
      const found = [], positions = {THREE}
      positions.forEach((position, n) => {{
        point(n ? 'pointermove' : 'pointerdown', position)
        found.push(bars())
      }})
      point('pointermove', [20, 20], {{ buttons: 0 }})
      found.push(bars())
      point('pointermove', [20, 260], {{ isPrimary: false }})
      return [...found, bars()]"""
    *strokes, not_pressed, second_finger = run_in(page, script, tmp_path)
    assert len({tuple(bars) for bars in strokes}) == len(THREE)
    assert not_pressed == second_finger == strokes[-1]


@in_browser
def test_arrow_keys_draw(page: str, tmp_path: Path) -> None:
    script = f"""{HELPERS}
      const press = (key, shiftKey = false) => drawing.dispatchEvent(
        new KeyboardEvent('keydown', {{ key, shiftKey, cancelable: true }}))
      const stops = [...document.querySelectorAll('button, [tabindex]')].map(stop => stop.id)
      press('ArrowUp', true)
      const moved = status()
      const isDefault = [press('ArrowDown'), press('Tab')]
      for (let n = 0; n < 9; n++) press('ArrowDown')
      return [stops, moved, isDefault, status(), image()]"""
    stops, moved, is_default, answer, image = run_in(page, script, tmp_path)
    assert stops == ["drawing", "clear", "save"]
    assert moved == "Draw a digit"
    assert is_default == [False, True]  # the browser handles only the key that is not an arrow
    assert answer.startswith("This is a ")
    rows, columns = np.nonzero(np.array(image).reshape(28, 28))
    assert np.ptp(rows) > 2 * np.ptp(columns)  # a vertical stroke


@in_browser
def test_screen_reader_finds_names(page: str, tmp_path: Path) -> None:
    script = """
      const text = element => element.textContent.trim()
      const textOf = id => text(document.getElementById(id))
      const canvases = [...document.querySelectorAll('canvas')].map(canvas =>
        canvas.ariaLabel || textOf(canvas.getAttribute('aria-labelledby')))
      const help = textOf(drawing.getAttribute('aria-describedby'))
      const names = [...document.querySelectorAll('progress')].map(bar => text(bar.labels[0]))
      return [canvases, help, names, document.documentElement.lang, document.title]"""
    canvases, help_text, names, language, title = run_in(page, script, tmp_path)
    assert canvases == ["Paper to draw on", "What the network sees"]
    assert "arrow keys" in help_text
    assert names == list(NAMES)
    assert (language, title) == ("en", "Draw a digit")


@in_browser
@pytest.mark.parametrize(("scheme", "background"), [(1, 255), (0, 0)])
def test_light_and_dark_scheme(scheme: int, background: int, page: str, tmp_path: Path) -> None:
    path, screenshot = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(page)
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    browse(path, setting, f"--screenshot={screenshot}", "--window-size=800,600")
    levels = np.array(Image.open(screenshot).convert("L")).astype(int)
    assert levels[200, 200] == background
    assert abs(levels[5, 5] - background) < 30


@in_browser
def test_page_fits_a_phone(page: str, tmp_path: Path) -> None:
    script = """
      const frame = document.createElement('iframe')
      frame.style = 'width: 320px; height: 600px; border: 0'
      document.body.append(frame)
      frame.contentDocument.write(document.querySelector('style').outerHTML
        + document.querySelector('main').outerHTML)
      frame.contentDocument.close()
      const root = frame.contentDocument.documentElement
      return [root.scrollWidth, getComputedStyle(drawing).touchAction,
        document.querySelector('meta[name=viewport]').content]"""
    width, touch, viewport = run_in(page, script, tmp_path)
    assert width <= 320
    assert touch == "none"  # a finger draws, and does not scroll
    assert viewport.startswith("width=device-width")


def test_page_loads_nothing_else() -> None:
    text = TEMPLATE.read_text()
    assert not re.search(r"https?:|//\w|\bsrc=|@import|url\(|fetch|XMLHttp|import ", text)


def test_page_of_the_default_model_is_small() -> None:
    assert len(make_page(MODEL, Mlp(784, 32, 32, 10), METADATA)) < 1_000_000


class Gelu(Mlp):
    """The layers of the page with another activation function."""

    def __call__(self, pixels: mx.array) -> mx.array:
        hidden = nn.gelu(pixels.reshape(len(pixels), -1) @ self.layers[0].weight)
        return hidden @ self.layers[1].weight + self.layers[1].bias


WITH_SCALE = Mlp(784, 32, 10)
WITH_SCALE.scale = mx.ones(1)  # an additional parameter


@pytest.mark.parametrize(
    "model",
    [
        Gelu(784, 32, 10),
        WITH_SCALE,
        nn.Linear(28, 10),  # other names
        nn.Sequential(nn.Linear(28, 10)),  # other shapes
    ],
)
def test_another_network_is_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"^model: .*multi-layer perceptron.*; .*tools\.predict"):
        make_page(Path("model"), model, METADATA)


@pytest.mark.parametrize(("shape", "preprocessing"), [((28, 28), ""), ((28, 28, 1), "mnist")])
def test_model_of_other_images_is_refused(shape: tuple[int, ...], preprocessing: str) -> None:
    with pytest.raises(UserError, match=r"^model: .*digits; .*tools\.predict"):
        make_page(Path("model"), Mlp(784, 10), Metadata(PARAMS, shape, NAMES, preprocessing))


def test_command_refuses_data_that_are_not_digits(finished: Project) -> None:
    printed = finished.run("python", "-m", "tools.page", ok=False)
    assert re.match(r"error: data/model\.safetensors: .*digits", printed)
    assert not (finished.root / PAGE).exists()


def test_main_writes_the_page(
    example: Example, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tools.page.load_model", lambda _: example[:2])
    main()
    assert PAGE.read_text() == make_page(MODEL, *example[:2])
