"""The stages of the pipeline. Importing this package prepares the import of MLX.

On Linux, OpenBLAS can then multiply for MLX. One line explains why MLX's CUDA build cannot start.

MLX calls `cblas_sgemm`, and the first library in the global symbol scope that defines it serves
the call. With lazy binding, that symbol is looked up at the first matrix product, not when MLX is
imported. So `stages.shared.openblas.load_openblas` can load a faster library after that import.
"""

import os
import sys
from pathlib import Path
from types import TracebackType

MLX_CAME_FIRST = "mlx.core" in sys.modules  # as in a notebook; its symbols are bound already

if sys.platform == "linux":
    sys.setdlopenflags(os.RTLD_LAZY)


def explain_import_error(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print one line if the user can fix the import, else the usual traceback.

    The environment may not be activated. Without a driver or a GPU, MLX's CUDA build cannot be
    imported. Both errors occur at the top of a stage or a tool, outside of any `try`.
    """
    in_environment = sys.prefix != sys.base_prefix
    if isinstance(error, ModuleNotFoundError) and Path(".venv").is_dir() and not in_environment:
        sys.stderr.write(
            f"error: {error.name}: not installed in this Python; run `source .venv/bin/activate`\n"
        )
    elif isinstance(error, ImportError) and str(error).startswith(("libcuda.so", "cuda")):
        sys.stderr.write(
            f"error: MLX: {error}; the CUDA build needs an NVIDIA GPU with driver 580 or newer,"
            " also for train.device cpu; install the CPU build with `make setup GPU=`\n"
        )
    else:
        show_traceback(kind, error, traceback)


show_traceback = sys.excepthook
sys.excepthook = explain_import_error


def file_stats(path: Path) -> tuple[int, int, int]:
    """Return size in bytes, time of the last change in nanoseconds, and inode of a file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


# The stats of each code file before Python imports it, so that `stages.shared.inputs` finds edits.
CODE_STATS = {
    path: file_stats(path)
    for path in Path(__file__).resolve().parent.rglob("*.py")
    if path.is_file()  # not an editor's dangling link
}
