"""The stages of the pipeline. Importing this package lets OpenBLAS serve MLX on Linux.

MLX calls `cblas_sgemm`, and the first library in the global symbol scope that defines it serves
the call. With lazy binding, that symbol is looked up at the first matrix product, not when MLX is
imported. So `stages.shared.openblas.load_openblas` can load a faster library after that import.
"""

import os
import sys
from pathlib import Path

MLX_CAME_FIRST = "mlx.core" in sys.modules  # as in a notebook; its symbols are bound already

if sys.platform == "linux":
    sys.setdlopenflags(os.RTLD_LAZY)


def file_stats(path: Path) -> tuple[int, int, int]:
    """Return size in bytes, time of the last change in nanoseconds, and inode of a file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


# Of each code file before Python imports it, so that `stages.shared.inputs` notices an edit.
CODE_STATS = {
    path: file_stats(path)
    for path in Path(__file__).resolve().parent.rglob("*.py")
    if path.is_file()  # not an editor's dangling link
}
