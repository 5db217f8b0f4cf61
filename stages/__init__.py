"""The stages of the pipeline. Importing this package lets OpenBLAS serve MLX on Linux.

MLX calls `cblas_sgemm`, and the first library in the global symbol scope that defines it serves
the call. With lazy binding, that symbol is looked up at the first matrix product, not when MLX is
imported. So `stages.shared.openblas.load_openblas` can load a faster library after that import.
"""

import os
import sys

MLX_CAME_FIRST = "mlx.core" in sys.modules  # as in a notebook; its symbols are bound already

if sys.platform == "linux":
    sys.setdlopenflags(os.RTLD_LAZY)
