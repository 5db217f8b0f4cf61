"""Say so if there is little room on the disk, of which DVC's own line names no place or remedy.

A step of `make repro` after a failure.
"""

import shutil

from stages.shared.cli import run
from tools.verify import LOCK, cache_folder, outputs


def main() -> None:
    size = sum(out.get("size", 0) for out in outputs())
    cache = cache_folder()
    for folder in {cache if cache.exists() else cache.parent, LOCK.absolute().parent}:
        free = shutil.disk_usage(folder).free
        if free < size:
            print(
                f"note: {folder}: its disk has {free / 1e6:,.1f} MB free, and a run may write"
                f" {size / 1e6:,.1f} MB there; make room and rerun"
            )


if __name__ == "__main__":
    run(main)
