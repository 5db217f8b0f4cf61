"""What runs on which device. MLX's default is the GPU, where it has one."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from stages.shared.checkpoint import backend
from tests import fake_gpu
from tests.conftest import Project
from tests.test_page import METADATA, Mlp
from tools import page

CPU, GPU = mx.Device(mx.cpu), mx.Device(mx.gpu)


class FusedMlp(Mlp):
    """A multi-layer perceptron that adds the bias in the kernel of the product."""

    def __call__(self, pixels: mx.array) -> mx.array:
        activations = pixels.reshape(len(pixels), -1)
        for number, layer in enumerate(self.layers):
            if number > 0:
                activations = mx.maximum(activations, 0)
            activations = mx.addmm(layer.bias, activations, layer.weight)
        return activations


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch.setattr)


def test_tests_run_on_the_cpu() -> None:
    assert mx.default_device() == CPU


@pytest.mark.usefixtures("gpu")
def test_fake_gpu_rounds_products() -> None:
    a = mx.random.normal((9, 99), key=mx.random.key(0))
    on_gpu = np.array(a @ a.T)
    mx.set_default_device(mx.cpu)
    on_cpu = np.array(a @ a.T)
    assert 1e-4 < abs(on_gpu - on_cpu).max() < 0.1


@pytest.mark.usefixtures("gpu")
def test_page_is_made_where_products_are_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compares the page's network with the model's."""
    monkeypatch.chdir(tmp_path)
    mx.random.seed(0)
    model = FusedMlp(784, 30, 20, 10)
    monkeypatch.setattr(page, "load_model", lambda _: (model, METADATA))
    page.main()
    assert page.PAGE.exists()


def test_checkpoint_of_another_chip_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without OpenBLAS, the chip decides the last bits."""
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M1"})
    before = backend()
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M5"})
    assert backend() != before


@pytest.mark.skipif(not mx.is_available(GPU), reason="MLX sees no GPU here")
def test_training_on_a_gpu(finished: Project) -> None:
    before = json.loads(finished.read("metrics/accuracy.json"))
    finished.set(device="gpu")
    assert finished.repro() == ["train", "evaluate"]
    after = json.loads(finished.read("metrics/accuracy.json"))
    assert after["accuracy"] == pytest.approx(before["accuracy"], abs=0.05)
