"""Pictures as the model sees them, and what the tool says of them."""

import csv
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stages.model import ModelParams
from stages.shared.data import load_split
from stages.shared.errors import UserError
from stages.shared.model_file import Metadata, load_model, save_model
from stages.shared.params import read_params
from tests.conftest import ROOT, SMALL, Project, stale
from tools.predict import BLANK, MODEL, answer, check_supported, main, read_image

PARAMS = read_params("model", ModelParams, ROOT / "params.yaml")
DIGITS = Metadata(PARAMS, (28, 28), tuple("0123456789"), "mnist")
ROOT_MODEL = ROOT / MODEL
SIZE = 280, 200  # of the drawings


def drawing(mode: str = "L", paper: object = 255, pen: object = 0, scale: float = 1) -> Image.Image:
    """A figure that is like no other turned or mirrored, of straight strokes."""
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


def seen(picture: Image.Image, kind: str = "PNG", **options: object) -> NDArray[np.int64]:
    """What a model of digits sees of it."""
    return read_image(encoded(picture, kind, **options), DIGITS).astype(int)


EXPECTED = seen(drawing())


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(drawing(paper=200, pen=3)).astype(np.uint16) * 256)


def turned() -> tuple[Image.Image, Image.Exif]:
    """The drawing lying on its side, and the EXIF that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return drawing().transpose(Image.Transpose.ROTATE_90), exif


def faint_photo() -> Image.Image:
    """Grey paper with a shade and noise, a pen that is not black."""
    noise = np.random.default_rng(0).normal(0, 3, SIZE[::-1]) + np.linspace(-8, 8, SIZE[0])
    levels = np.asarray(drawing(paper=170, pen=80)) + noise
    return Image.fromarray(levels.astype(np.uint8))


@pytest.mark.parametrize(
    ("look", "tolerance"),
    [
        (lambda: seen(drawing(paper=0, pen=255)), 0),
        (lambda: seen(drawing(paper=90, pen=140)), 0),
        (lambda: seen(drawing("1", 1, 0)), 0),
        (lambda: seen(drawing().convert("P")), 0),
        (lambda: seen(drawing("RGB", "yellow", "navy")), 0),
        (lambda: seen(drawing("RGBA", (0, 0, 0, 0), "black")), 0),
        (lambda: seen(drawing("RGBA", (255, 255, 255, 0), "white")), 0),
        (lambda: seen(drawing("RGBA", (9, 9, 9, 0), "white")), 0),
        (lambda: seen(drawing("LA", (255, 255), (0, 255))), 0),
        (lambda: seen(drawing("RGBA", (0, 0, 0, 0), "black").quantize(2)), 0),
        (lambda: seen(sixteen_bits()), 0),
        (lambda: seen(Image.fromarray(np.asarray(drawing()).astype(np.int32) * 999), "TIFF"), 0),
        (lambda: seen(Image.fromarray(np.asarray(drawing()) / np.float32(255)), "TIFF"), 0),
        (lambda: seen(turned()[0], exif=turned()[1]), 0),
        (lambda: seen(turned()[0].convert("RGB"), "JPEG", quality=95, exif=turned()[1]), 12),
        (lambda: seen(drawing("RGB", "white", "black"), "JPEG", quality=95), 12),
        (lambda: seen(drawing(), "GIF", save_all=True, append_images=[drawing(pen=255)]), 0),
        (lambda: seen(drawing(scale=2)), 60),
        (lambda: seen(drawing(scale=9)), 60),
        (lambda: seen(faint_photo()), 60),
    ],
)
def test_however_it_is_drawn_it_looks_the_same(
    look: Callable[[], NDArray[np.int64]], tolerance: int
) -> None:
    assert abs(look() - EXPECTED).max() <= tolerance


def test_where_it_is_on_the_paper_plays_no_part() -> None:
    page = Image.new("L", (900, 700), 255)
    page.paste(drawing(), (600, 450))
    assert (seen(page) == EXPECTED).all()


def test_rounded_corners_are_paper() -> None:
    picture = drawing("RGBA", "white", "black")
    picture.paste((0, 0, 0, 0), (0, 0, 12, 12))
    assert (seen(picture) == EXPECTED).all()


@pytest.mark.parametrize("size", [(200, 40), (40, 200), (150, 150), (3, 5)])
def test_the_form_of_mnist(size: tuple[int, int]) -> None:
    """A box of 20 pixels, the aspect kept, the centre of mass in the middle, averaged levels."""
    picture = Image.new("L", (400, 300), 0)
    picture.paste(255, (70, 30, 70 + size[0], 30 + size[1]))
    picture.paste(255, (70, 30, 70 + size[0] // 2, 30 + size[1]))
    image = seen(picture)
    assert image.max() == 255
    total = image.sum()
    for axis, side in ((0, size[1]), (1, size[0])):
        profile = image.sum(axis=axis ^ 1) / image.sum(axis=axis ^ 1).max()
        assert profile.sum() == pytest.approx(20 * side / max(size), abs=0.7)
        middles = np.arange(28) + 0.5
        assert image.sum(axis=axis ^ 1) @ middles / total == pytest.approx(14, abs=0.05)


def test_half_a_pixel_of_ink_is_grey() -> None:
    picture = Image.new("L", (400, 400), 0)
    picture.paste(
        255, (100, 100, 300, 105)
    )  # a twentieth of its box: one line of 20, or two halves
    levels = sorted(seen(picture).max(axis=1))[-2:]
    assert levels == [255, 255]
    picture.paste(255, (100, 295, 105, 300))  # and one that moves the centre of mass
    assert len(np.unique(seen(picture))) > 3


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (28, 28, 3), (32, 20), (32, 20, 4)])
@pytest.mark.parametrize("form", ["", "mnist"])
def test_an_image_of_the_models_own_shape_passes_unchanged(
    shape: tuple[int, ...], form: str
) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    metadata = Metadata(PARAMS, shape, ("a", "b"), form if len(shape) == 2 else "")
    picture = Image.fromarray(image.reshape(shape[:2]) if image.size == 28 * 28 else image)
    assert (read_image(encoded(picture), metadata) == image).all()


def test_a_small_picture_that_is_transparent_is_put_on_paper() -> None:
    picture = Image.new("LA", (28, 28), (0, 0))
    picture.paste((0, 255), (5, 3, 9, 23))
    image = seen(picture)
    assert image[14, 14] == 255
    assert image[0, 0] == 0


@pytest.mark.parametrize(("shape", "mode"), [((28, 28), "L"), ((32, 20, 3), "RGB")])
def test_other_models_get_the_whole_picture_scaled(shape: tuple[int, ...], mode: str) -> None:
    picture = drawing("RGB", "yellow", "navy")
    image = read_image(encoded(picture), Metadata(PARAMS, shape, ("a", "b")))
    expected = picture.convert(mode).resize((shape[1], shape[0]))
    assert (image == np.asarray(expected)).all()


@pytest.mark.parametrize(("pen", "paper"), [("black", "white"), ("white", "black")])
@pytest.mark.parametrize(("shape", "mode"), [((28, 28), "L"), ((32, 20, 3), "RGB")])
def test_other_models_get_paper_for_what_is_transparent(
    pen: str, paper: str, shape: tuple[int, ...], mode: str
) -> None:
    image = read_image(
        encoded(drawing("RGBA", (0, 0, 0, 0), pen)), Metadata(PARAMS, shape, ("a", "b"))
    )
    expected = drawing("RGB", paper, pen).convert(mode).resize((shape[1], shape[0]))
    assert abs(image.astype(int) - np.asarray(expected)).max() <= 1  # of rounding


def test_predictions_are_those_of_evaluate(finished: Project, tmp_path: Path) -> None:
    test = load_split(finished.root / "data/test.npz")
    names = [str(tmp_path / f"{number}.png") for number in range(len(test))]
    for name, image in zip(names, test.images, strict=True):
        Image.fromarray(image).save(name)
    printed = finished.run("python", "-m", "tools.predict", "--json", *names).splitlines()
    answers = [json.loads(line) for line in printed]
    rows = csv.DictReader(finished.read("metrics/confusion.csv").decode().splitlines())
    assert [found["class"] for found in answers] == [row["predicted"] for row in rows]
    assert [found["file"] for found in answers] == names
    for found in answers:
        best = [found, *found["runners_up"]]
        assert {one["class"] for one in best} == set(SMALL["test"].class_names)
        values = [one["probability"] for one in best]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model file with any weights, in a folder of pictures."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("other.safetensors"), DIGITS.build(), DIGITS)
    for name in ("a.png", "a longer name.png"):
        drawing().save(name)
    return Path("other.safetensors")


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that announces so many pixels a side."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0),
        b"IDAT": zlib.compress(bytes(1000)),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def nearly_blank() -> bytes:
    noise = np.random.default_rng(0).normal(240, 2, (100, 100))
    return encoded(Image.fromarray(noise.astype(np.uint8))).read()


BAD: list[tuple[bytes, str]] = [
    (b"", "not a whole picture (UnidentifiedImageError); save it again, as PNG"),
    (b"junk", "not a whole picture (UnidentifiedImageError); save it again, as PNG"),
    (encoded(drawing()).read()[:200], "not a whole picture (OSError); save it again, as PNG"),
    (bomb(50_000), f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"),
    (bomb(10_000), f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"),
    (encoded(Image.new("L", SIZE, 255)).read(), "blank, nothing to be seen; take another"),
    (encoded(Image.new("L", (28, 28), 7)).read(), "blank, nothing to be seen; take another"),
    (encoded(Image.new("RGBA", SIZE, (0, 0, 0, 0))).read(), BLANK),
    (nearly_blank(), BLANK),
]


@pytest.mark.parametrize(("data", "line"), BAD)
def test_a_picture_that_cannot_be_read_is_a_line_and_the_others_are_answered(
    data: bytes, line: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.png").write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        main(["a.png", "bad.png", "a longer name.png"], model, as_json=False)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: bad\.png: .*{re.escape(line)}\n", printed.err)
    assert [text.partition(".png")[0] for text in printed.out.splitlines()] == [
        "a",
        "a longer name",
    ]


def test_names_that_are_not_pictures(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    with pytest.raises(SystemExit):
        main(["no\nsuch", "folder"], model, as_json=True)
    printed = capsys.readouterr()
    assert printed.err == "error: no\\nsuch: not found\nerror: folder: is not a file\n"
    assert printed.out == ""


def test_the_answers_are_aligned(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["a.png", "a longer name.png"], model, as_json=False)
    short, long = capsys.readouterr().out.splitlines()
    network, metadata = load_model(model)
    image = read_image(encoded(drawing()), metadata)
    best = answer(network, metadata, [image])[0][:3]
    expected = "".join(f"  {label}  {value:7.2%}" for label, value in best)
    assert short == f"{'a.png':17}{expected}"
    assert long == f"a longer name.png{expected}"


def test_standard_input(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(encoded(drawing())))
    main(["-", "a.png"], model, as_json=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first.pop("file") == "-"
    assert second.pop("file") == "a.png"
    assert first == second


def test_the_command_line(finished: Project) -> None:
    Image.fromarray(SMALL["test"].images[0]).save(finished.root / "one.png")
    printed = finished.run("python", "-m", "tools.predict", "one.png")
    assert re.fullmatch(r"one\.png(  \w+ +\d+\.\d\d%){3}\n", printed)
    (finished.root / "data/model.safetensors").rename(finished.root / "mailed.safetensors")
    command = ("python", "-m", "tools.predict", "--model", "mailed.safetensors", "one.png")
    assert finished.run(*command) == printed
    printed = finished.run(*command[:3], "one.png", ok=False)
    assert printed == "error: data/model.safetensors: not found; make it with `dvc repro`\n"
    assert finished.run(*command[:3], "one.png", "--help").count("Proceedings of the IEEE") == 1


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "{}: not found; name another file"),
        (b"other", r"{}: damaged \(.*\); name another file"),
    ],
)
def test_another_model_that_cannot_be_read(
    content: bytes | None, line: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        main(["one.png"], path, as_json=False)
    assert re.fullmatch(line.format(path), str(error.value))


@pytest.mark.parametrize(
    ("shape", "form"), [((28, 28), "emnist"), ((28, 28, 3), "mnist"), ((28, 28, 7), "")]
)
def test_a_model_of_unknown_images(shape: tuple[int, ...], form: str) -> None:
    with pytest.raises(UserError) as error:
        check_supported(Path("model"), Metadata(PARAMS, shape, ("a", "b"), form))
    assert str(error.value) == (
        f"model: wants images {shape} of the form {form!r}, which no picture becomes here; extend"
        " tools/predict.py"
    )


def test_digits_of_other_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of scikit-learn, 8 x 8 pixels, from 43 people: docs/predict.md tells how many."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn comes with `make lint`")
    digits = datasets.load_digits()
    names = [str(tmp_path / f"{number}.png") for number in range(len(digits.target))]
    for name, image in zip(names, digits.images, strict=True):
        Image.fromarray((image * (255 / 16)).astype(np.uint8)).save(name)
    if not ROOT_MODEL.exists() or load_model(ROOT_MODEL)[1].preprocessing != "mnist":
        pytest.skip("data/model.safetensors is not there, or no model of digits; see `make repro`")
    main(names, ROOT_MODEL, as_json=True)
    answers = [json.loads(line)["class"] for line in capsys.readouterr().out.splitlines()]
    correct = sum(map(str.__eq__, answers, map(str, digits.target)))
    page = (ROOT / "docs/predict.md").read_text()
    assert f"Of the {len(answers):,} digits in scikit-learn" in page
    if f"the default model reads {correct / len(answers):.4f}" not in page:
        stale(f"docs/predict.md tells another accuracy than {correct / len(answers):.4f}")
