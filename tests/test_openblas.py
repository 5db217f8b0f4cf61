"""OpenBLAS multiplies for MLX on Linux, and training is bitwise identical on all CPUs of a kind.

The latter test needs QEMU (Debian's or Ubuntu's qemu-user) and some minutes:
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
from tests.conftest import ROOT, clone, small_split
from tools import openblas

MACHINE = platform.machine()
AVX2 = MACHINE == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text().split()
linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has a fast BLAS of its own")
held = pytest.mark.skipif(
    not (AVX2 or MACHINE == "aarch64"),
    reason="OpenBLAS is held to one kernel family on x86-64 with AVX2 and on arm64",
)

PRODUCT = """
from hashlib import sha256
import mlx.core as mx

a, b = mx.random.normal((2, 64, 999), key=mx.random.key(0))
print(sha256(bytes(memoryview(a @ b.T))).hexdigest())
"""
IMPORT = "from stages.shared.openblas import load_openblas\n"
USE = IMPORT + "load_openblas({})\n"
CORE = """
from ctypes import CDLL, c_char_p
from stages.shared.openblas import LIBRARY

name = CDLL(str(LIBRARY)).scipy_openblas_get_corename
name.restype = c_char_p
print(name().decode())
"""
THREADS = """
import os

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
load_openblas({})
print(threads() - before)
"""
NO_LIBRARY = "import sys; sys.prefix = '/nowhere'\n"


def printed(code: str, *emulator: str, cwd: Path = ROOT, **environment: str) -> str:
    """What `code` prints, run by a Python of its own, in which no kernels are chosen yet."""
    command = [*emulator, sys.executable, "-c", code]
    inherited = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    environment = {**inherited, **environment}
    return subprocess.check_output(command, cwd=cwd, text=True, env=environment).strip()


@linux
def test_openblas_multiplies_for_mlx() -> None:
    """The last bits of its sums differ from those of MLX's own BLAS."""
    own = printed(PRODUCT)
    assert printed(USE.format(1) + PRODUCT) != own
    assert printed(USE.format(2) + PRODUCT) != own


@linux
def test_no_more_threads_than_requested() -> None:
    for threads in (1, 2, 256):
        *_, started = printed(IMPORT + THREADS.format(threads)).splitlines()
        assert int(started) == min(threads, os.cpu_count() or 1) - 1


@linux
def test_missing_library_is_a_note() -> None:
    own = printed(PRODUCT)
    code = NO_LIBRARY + USE.format(1) + PRODUCT
    note, digest = printed(code).splitlines()
    assert re.match("note: .*OpenBLAS.*`python -m tools.openblas`", note)
    assert digest == own


@linux
@pytest.mark.parametrize("other_import", ["import numpy", "import mlx.nn", "import tools"])
def test_order_of_imports_after_stages_does_not_matter(other_import: str) -> None:
    code = f"import stages\n{other_import}\nimport mlx.core\n"
    assert printed(code + USE.format(1) + PRODUCT) == printed(USE.format(1) + PRODUCT)


@linux
def test_mlx_imported_before_stages_is_a_note() -> None:
    """As in a notebook. MLX then multiplies with its own BLAS."""
    note, digest = printed("import mlx.core\n" + USE.format(1) + PRODUCT).splitlines()
    assert re.match("note: MLX was imported before .*`import stages`", note)
    assert digest == printed(PRODUCT)


@pytest.mark.parametrize("package", ["tools", "tests", "bench"])
def test_every_package_imports_stages_first(package: str) -> None:
    code = f"import {package}, sys; print('stages' in sys.modules, 'mlx.core' in sys.modules)"
    assert printed(code) == "True False"


@linux
def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openblas, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^scipy-openblas32: not installed; .*requirements\.txt"):
        openblas.main()


@held
def test_one_thread_uses_one_family_of_kernels_unless_overridden() -> None:
    family, other = ("Haswell", "Sandybridge") if AVX2 else ("armv8", "neoversen1")
    assert printed(USE.format(1) + CORE) == family
    assert printed(USE.format(1) + CORE, OPENBLAS_CORETYPE="") == family
    assert printed(USE.format(2) + CORE) == printed(CORE)
    for threads in (1, 2):
        assert printed(USE.format(threads) + CORE, OPENBLAS_CORETYPE=other) == other
    assert f" {family} " in printed(IMPORT + "print(load_openblas(1))")


MODELS = {
    "x86_64": "Haswell Broadwell Skylake-Client EPYC EPYC-Rome EPYC-Milan max",  # with AVX2
    "aarch64": "cortex-a53 cortex-a57 cortex-a72 cortex-a76 neoverse-n1"
    " cortex-a710 neoverse-n2 neoverse-v1 a64fx max",  # these with SVE
}


@pytest.mark.qemu
@held
def test_emulated_cpus_give_the_same_bits(tmp_path: Path) -> None:
    project = clone(tmp_path)
    (project.root / "dvc.lock").unlink()  # it records other data
    for name in ("train", "validation"):
        # As large as those of MNIST: many kernel families differ only in where they cut long sums.
        save_split(project.root / f"data/{name}.npz", small_split(500, (28, 28)))
    project.set(batch_size=256, num_epochs=2, device="cpu", threads=1)
    project.set("augment", shift=1, rotation=10, scale=0.1, elastic=1)

    def weights(*emulator: str) -> str:
        """The digest of what a short training writes."""
        printed("from stages.train import *; main(Ranks())", *emulator, cwd=project.root)
        return sha256(project.read("data/model.safetensors")).hexdigest()

    native = weights()
    print(f"\n{native} natively")
    emulator = f"qemu-{MACHINE}"
    listing = subprocess.run([emulator, "-cpu", "help"], stdout=subprocess.PIPE, check=False)
    known = listing.stdout.decode().split()
    for model in filter(known.__contains__, MODELS[MACHINE].split()):
        emulated = weights(emulator, "-cpu", model)
        print(f"{emulated} on {model}")
        assert emulated == native
