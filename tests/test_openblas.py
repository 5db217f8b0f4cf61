"""OpenBLAS multiplies for MLX on Linux, and training is bitwise identical on all CPUs of a kind.

The test on emulated CPUs needs QEMU (Debian's or Ubuntu's qemu-user) and some minutes:
`.venv/bin/python -m pytest -m qemu -s`.
"""

import os
import platform
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from stages.shared.data import save_split
from stages.shared.errors import UserError
from tests.conftest import PACKAGES, ROOT, clone, small_split
from tools import openblas

MACHINE = platform.machine()
AVX2 = MACHINE == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text().split()
linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has a fast BLAS of its own")
one_family = pytest.mark.skipif(
    not (AVX2 or MACHINE == "aarch64"),
    reason="one family of kernels is chosen on x86-64 with AVX2 and on arm64",
)

# These print the digest of a product, the kernels in use, and how many threads OpenBLAS starts.
PRODUCT = """
from hashlib import sha256
import mlx.core as mx

a, b = mx.random.normal((2, 64, 999), key=mx.random.key(0))
print(sha256(bytes(memoryview(a @ b.T))).hexdigest())
"""
KERNELS = """
from ctypes import CDLL, c_char_p
from stages.shared.openblas import LIBRARY

name = CDLL(str(LIBRARY)).scipy_openblas_get_corename
name.restype = c_char_p
print(name().decode())
"""
THREADS = """
import os

before = len(os.listdir("/proc/self/task"))
load_openblas({})
print(len(os.listdir("/proc/self/task")) - before)
"""
IMPORT = "from stages.shared.openblas import load_openblas\n"
LOAD = IMPORT + "load_openblas({})\n"


def output_of(code: str, *emulator: str, cwd: Path = ROOT, **variables: str) -> str:
    """Run `code` in a new process, in which no kernels are chosen yet. Return its output."""
    command = [*emulator, sys.executable, "-c", code]
    inherited = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    environment = {**inherited, **variables}
    return subprocess.check_output(command, cwd=cwd, text=True, env=environment).strip()


@linux
def test_openblas_multiplies_for_mlx() -> None:
    """Compare last bits: OpenBLAS's sums differ from the sums of MLX's own BLAS."""
    without_openblas = output_of(PRODUCT)
    for threads in (1, 2):
        assert output_of(LOAD.format(threads) + PRODUCT) != without_openblas


@linux
def test_no_more_threads_than_requested() -> None:
    for threads in (1, 2, 256):
        *_, started = output_of(IMPORT + THREADS.format(threads)).splitlines()
        assert int(started) == min(threads, os.cpu_count() or 1) - 1


@linux
@pytest.mark.parametrize(
    ("before", "note"),
    [
        ("import sys; sys.prefix = '/nowhere'\n", "OpenBLAS.*`python -m tools.openblas`"),
        ("import mlx.core\n", "MLX was imported before .*`import stages`"),  # as in a notebook
    ],
)
def test_note_if_mlx_multiplies_by_itself(before: str, note: str) -> None:
    line, digest = output_of(before + LOAD.format(1) + PRODUCT).splitlines()
    assert re.match(f"note: .*{note}", line)
    assert digest == output_of(PRODUCT)


@linux
@pytest.mark.parametrize("other_import", ["import numpy", "import mlx.nn", "import tools"])
def test_order_of_imports_after_stages_does_not_matter(other_import: str) -> None:
    code = f"import stages\n{other_import}\nimport mlx.core\n"
    assert output_of(code + LOAD.format(1) + PRODUCT) == output_of(LOAD.format(1) + PRODUCT)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_imports_stages_first(package: str) -> None:
    code = f"import {package}, sys; print('stages' in sys.modules, 'mlx.core' in sys.modules)"
    assert output_of(code) == "True False"


@linux
def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openblas, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^scipy-openblas32: not installed; .*requirements\.txt"):
        openblas.main()


@one_family
def test_one_thread_uses_one_family_of_kernels_unless_overridden() -> None:
    family, other = ("Haswell", "Sandybridge") if AVX2 else ("armv8", "neoversen1")
    one_thread, two_threads = (LOAD.format(threads) + KERNELS for threads in (1, 2))
    assert output_of(one_thread) == family
    assert output_of(one_thread, OPENBLAS_CORETYPE="") == family
    assert output_of(two_threads) == output_of(KERNELS)
    for code in (one_thread, two_threads):
        assert output_of(code, OPENBLAS_CORETYPE=other) == other
    assert f" {family} " in output_of(IMPORT + "print(load_openblas(1))")


CPUS = {
    "x86_64": "Haswell Broadwell Skylake-Client EPYC EPYC-Rome EPYC-Milan max",  # with AVX2
    "aarch64": "cortex-a53 cortex-a57 cortex-a72 cortex-a76 neoverse-n1"
    " cortex-a710 neoverse-n2 neoverse-v1 a64fx max",  # these with SVE
}


@pytest.mark.qemu
@one_family
def test_emulated_cpus_give_the_same_bits(tmp_path: Path) -> None:
    project = clone(tmp_path)
    (project.root / "dvc.lock").unlink()  # it records other data
    for name in ("train", "validation"):
        # As large as MNIST's, because many kernel families differ only in long sums.
        save_split(project.root / f"data/{name}.npz", small_split(500, (28, 28)))
    project.set(batch_size=256, num_epochs=2, device="cpu", threads=1)
    project.set("augment", shift=1, rotation=10, scale=0.1, elastic=1)

    def train(*emulator: str) -> str:
        """Train briefly. Return the digest of the model file."""
        output_of("from stages.train import *; main(Ranks())", *emulator, cwd=project.root)
        return sha256(project.read("data/model.safetensors")).hexdigest()

    native = train()
    print(f"\n{native} natively")
    emulator = f"qemu-{MACHINE}"
    listing = subprocess.run([emulator, "-cpu", "help"], stdout=subprocess.PIPE, check=False)
    known = listing.stdout.decode().split()
    for cpu in CPUS[MACHINE].split():
        if cpu in known:
            emulated = train(emulator, "-cpu", cpu)
            print(f"{emulated} on {cpu}")
            assert emulated == native
