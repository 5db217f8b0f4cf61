"""The page to draw on, in a real browser: it computes what Python does."""

import base64
import html
import io
import json
import re
import subprocess
from collections.abc import Callable
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
from tests.conftest import ROOT, Project, small_split
from tests.test_plots import BROWSER, browse
from tools.page import PAGE, TEMPLATE, main, make_page
from tools.predict import MODEL, read_image

PARAMS = read_params("model", ModelParams, ROOT / "params.yaml")
NAMES = tuple("0123456789")
METADATA = Metadata(PARAMS, (28, 28), NAMES, "mnist")
THREE = [(80, 90), (100, 60), (140, 50), (180, 65), (190, 100), (165, 130), (130, 140)]
THREE += [(170, 150), (195, 185), (180, 225), (140, 240), (95, 232), (75, 205)]

in_browser = pytest.mark.skipif(not BROWSER, reason="there is no Chromium")


class Mlp(nn.Module):
    """A multi-layer perceptron of any sizes; what somebody makes of model.py plays no part."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
        for layer in self.layers:
            layer.weight = mx.contiguous(3 * layer.weight.T)

    def __call__(self, pixels: mx.array) -> mx.array:
        values = pixels.reshape(len(pixels), -1)
        for number, layer in enumerate(self.layers):
            values = (nn.relu(values) if number else values) @ layer.weight + layer.bias
        return values


Subject = tuple[nn.Module, Metadata, Split]


@pytest.fixture(params=["ours", "other"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """A model and images: that of `make repro` and all the test split, or any weights."""
    if request.param == "ours":
        if not (ROOT / MODEL).exists():
            pytest.skip("this needs the results of `make repro`")
        model, metadata = load_model(ROOT / MODEL)
        try:
            make_page(ROOT / MODEL, model, metadata)
        except UserError as error:
            pytest.skip(str(error))
        return model, metadata, load_split(ROOT / "data/test.npz")
    mx.random.seed(0)
    metadata = Metadata(PARAMS, (9, 7), ("a", "b", "</script>"), "mnist")
    split = small_split(300, metadata.image_shape, metadata.class_names)
    return Mlp(63, 30, 20, 10, 3), metadata, split


def run_in(page: str, script: str, folder: Path) -> Any:
    """What the body of a function returns in the page."""
    path = folder / "page.html"
    result = f"JSON.stringify((() => {{{script}}})())"
    tail = f"<pre id=result></pre><script>\nresult.textContent = {result}</script>"
    path.write_text(f"{page}{tail}")
    found = re.search('<pre id="result">(.*?)</pre>', browse(path, "--dump-dom"), re.DOTALL)
    assert found
    return json.loads(html.unescape(found[1]))


@in_browser
def test_the_network_in_the_page_is_the_network(subject: Subject, tmp_path: Path) -> None:
    """The same class for each image, and the same probabilities to four digits."""
    model, metadata, split = subject
    data = base64.b64encode(split.images.tobytes()).decode()
    size = split.images[0].size
    script = f"""
      const levels = Uint8Array.from(atob("{data}"), c => c.charCodeAt(0)), found = []
      for (let n = 0; n < levels.length; n += {size})
        found.push(predict(levels.subarray(n, n + {size})).map(p => +p.toFixed(6)))
      return found"""
    found = np.array(run_in(make_page(MODEL, model, metadata), script, tmp_path))
    scores = predict(model, split)
    expected = np.array(mx.softmax(mx.array(scores.logits), axis=1))
    assert found.shape == expected.shape
    assert (found.argmax(axis=1) == scores.predicted_labels).all()
    assert abs(found - expected).max() < 1e-4


# What a test does on the page, in the coordinates of its drawing.
HAND = """
  const status = () => document.querySelector('[role=status]').textContent
  const bars = () => [...document.querySelectorAll('progress')].map(bar => bar.value)
  const picture = () => {
    const { width, height } = seen
    const { data } = seen.getContext('2d').getImageData(0, 0, width, height)
    return [...data].filter((_, n) => n % 4 === 0)
  }
  const point = (type, [x, y], more = {}) => {
    const box = paper.getBoundingClientRect()
    const place = { clientX: box.left + paper.clientLeft + x / size * paper.clientWidth,
                    clientY: box.top + paper.clientTop + y / size * paper.clientHeight }
    const how = { ...place, isPrimary: true, buttons: 1, bubbles: true, ...more }
    paper.dispatchEvent(new PointerEvent(type, how))
  }
  const draw = ([first, ...others]) => {
    point('pointerdown', first)
    others.forEach(to => point('pointermove', to))
  }
"""


def seen_by(png: str, metadata: Metadata) -> NDArray[np.int64]:
    """What Python makes of the picture that the page saves."""
    data = base64.b64decode(png.removeprefix("data:image/png;base64,"))
    return read_image(io.BytesIO(data), metadata).astype(int)


@in_browser
def test_a_drawn_digit_is_what_python_sees(subject: Subject, tmp_path: Path) -> None:
    model, metadata, split = subject
    script = f"""{HAND}
      const saved = []
      HTMLAnchorElement.prototype.click = function() {{ saved.push(this.download, this.href) }}
      const asked = status()
      draw({[list(place) for place in THREE]})
      document.getElementById('save').click()
      const drawn = [status(), bars(), picture()]
      document.getElementById('clear').click()
      return [asked, ...drawn, ...saved, status(), bars(), picture()]"""
    page = make_page(MODEL, model, metadata)
    asked, answer, bars, picture, name, png, cleared, empty, dark = run_in(page, script, tmp_path)
    expected = seen_by(png, metadata)
    assert name == "digit.png"
    assert abs(np.array(picture).reshape(expected.shape) - expected).max() <= 3
    image = expected.astype(np.uint8)[None]
    scores = predict(model, Split(image, np.zeros(1, np.uint8), metadata.class_names))
    probabilities = np.array(mx.softmax(mx.array(scores.logits), axis=1))[0]
    assert bars == pytest.approx(probabilities.tolist(), abs=0.02)
    assert answer == f"This is a {metadata.class_names[np.argmax(bars)]}"
    if len(split) == 10_000:  # of MNIST
        assert answer == "This is a 3"
    assert asked == cleared == "Draw a digit"
    assert set(empty) == set(dark) == {0}


@pytest.fixture(scope="module")
def page() -> str:
    mx.random.seed(0)
    return make_page(MODEL, Mlp(784, 32, 10), METADATA)


@in_browser
def test_the_bars_move_while_one_draws(page: str, tmp_path: Path) -> None:
    script = f"""{HAND}
      const found = [];
      {[list(place) for place in THREE]}.forEach((to, n) => {{
        point(n ? 'pointermove' : 'pointerdown', to)
        found.push(bars())
      }})
      point('pointermove', [20, 20], {{ buttons: 0 }})
      found.push(bars())
      point('pointermove', [20, 260], {{ isPrimary: false }})
      return [...found, bars()]"""
    *moves, unpressed, second_finger = run_in(page, script, tmp_path)
    assert len({tuple(bars) for bars in moves}) == len(THREE)
    assert unpressed == second_finger == moves[-1]


@in_browser
def test_by_keyboard(page: str, tmp_path: Path) -> None:
    script = f"""{HAND}
      const press = (key, shiftKey = false) => paper.dispatchEvent(
        new KeyboardEvent('keydown', {{ key, shiftKey, cancelable: true }}))
      const stops = [...document.querySelectorAll('button, [tabindex]')].map(found => found.id)
      press('ArrowUp', true)
      const moved = status()
      const handled = [press('ArrowDown'), press('Tab')]
      for (let n = 0; n < 9; n++) press('ArrowDown')
      paper.focus()
      return [stops, moved, handled, status(), picture()]"""
    stops, moved, handled, answer, picture = run_in(page, script, tmp_path)
    assert stops == ["paper", "clear", "save"]
    assert moved == "Draw a digit"
    assert handled == [False, True]  # whether the browser may go on with it
    assert answer.startswith("This is a ")
    rows, columns = np.nonzero(np.array(picture).reshape(28, 28))
    assert np.ptp(rows) > 2 * np.ptp(columns)  # a stroke downwards


@in_browser
def test_a_screen_reader_finds_names(page: str, tmp_path: Path) -> None:
    script = """
      const text = found => found.textContent.trim()
      const parts = [...document.querySelectorAll('canvas')].map(found =>
        found.ariaLabel || text(document.getElementById(found.getAttribute('aria-labelledby'))))
      const described = text(document.getElementById(paper.getAttribute('aria-describedby')))
      const names = [...document.querySelectorAll('progress')].map(bar => text(bar.labels[0]))
      return [parts, described, names, document.documentElement.lang, document.title]"""
    parts, described, names, language, title = run_in(page, script, tmp_path)
    assert parts == ["Paper to draw on", "What the network sees"]
    assert "arrow keys" in described
    assert names == list(NAMES)
    assert (language, title) == ("en", "Draw a digit")


@in_browser
@pytest.mark.parametrize(("scheme", "paper"), [(1, 255), (0, 0)])
def test_light_and_dark(scheme: int, paper: int, page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page)
    shot = tmp_path / "page.png"
    colours = f"--blink-settings=preferredColorScheme={scheme}"
    browse(path, colours, f"--screenshot={shot}", "--window-size=800,600")
    levels = np.array(Image.open(shot).convert("L"))
    assert levels[200, 200] == paper
    assert abs(levels[5, 5].astype(int) - paper) < 30


@in_browser
def test_it_fits_a_phone(page: str, tmp_path: Path) -> None:
    script = """
      const frame = document.createElement('iframe')
      frame.style = 'width: 320px; height: 600px; border: 0'
      document.body.append(frame)
      frame.contentDocument.write(document.querySelector('style').outerHTML
        + document.querySelector('main').outerHTML)
      frame.contentDocument.close()
      const root = frame.contentDocument.documentElement
      return [root.scrollWidth, getComputedStyle(paper).touchAction,
        document.querySelector('meta[name=viewport]').content]"""
    width, touch, viewport = run_in(page, script, tmp_path)
    assert width <= 320
    assert touch == "none"  # a finger draws, and does not scroll
    assert viewport.startswith("width=device-width")


def test_it_asks_nobody_for_anything() -> None:
    text = TEMPLATE.read_text()
    assert not re.search(r"https?:|//\w|\bsrc=|@import|url\(|fetch|XMLHttp|import ", text)
    assert len(text.splitlines()) <= 150


def test_the_page_of_the_defaults_is_small() -> None:
    assert len(make_page(MODEL, Mlp(784, 32, 32, 10), METADATA)) < 1_000_000


class Gelu(Mlp):
    """As in the page, but for what comes between the layers."""

    def __call__(self, pixels: mx.array) -> mx.array:
        hidden = nn.gelu(pixels.reshape(len(pixels), -1) @ self.layers[0].weight)
        return hidden @ self.layers[1].weight + self.layers[1].bias


class Scaled(Mlp):
    """One parameter more."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = mx.ones(1)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 10, 28)

    def __call__(self, pixels: mx.array) -> mx.array:
        logits: mx.array = self.convolution(pixels[..., None])
        return logits.reshape(len(pixels), -1)


@pytest.mark.parametrize(
    "build", [lambda: Gelu(784, 32, 10), lambda: Scaled(784, 32, 10), Convolution]
)
def test_a_model_that_is_another_network(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(UserError) as error:
        make_page(Path("model"), build(), METADATA)
    assert str(error.value) == (
        "model: is not the multi-layer perceptron that the page can run; use"
        " `python -m tools.predict`"
    )


@pytest.mark.parametrize(("shape", "form"), [((28, 28), ""), ((28, 28, 1), "mnist")])
def test_a_model_of_other_images(shape: tuple[int, ...], form: str) -> None:
    with pytest.raises(UserError) as error:
        make_page(Path("model"), Mlp(784, 10), Metadata(PARAMS, shape, NAMES, form))
    assert str(error.value) == (
        "model: is not a model of digits, which the page draws; use `python -m tools.predict`"
    )


def test_the_command(finished: Project) -> None:
    """Its data are not digits."""
    printed = finished.run("python", "-m", "tools.page", ok=False)
    assert printed.startswith("error: data/model.safetensors: is not a model of digits")
    assert not (finished.root / PAGE).exists()
    assert subprocess.check_output(["git", "check-ignore", PAGE], cwd=ROOT, text=True)


def test_main(subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tools.page.load_model", lambda _: subject[:2])
    main()
    assert PAGE.read_text() == make_page(MODEL, *subject[:2])
