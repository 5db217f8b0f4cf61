"""Read folders of pictures, one folder per class, as splits.

Every picture is read as `tools.predict` reads it, so a model sees the same images in both places.
"""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.shared.data import Split
from stages.shared.dvc_lock import IGNORED_NAMES
from stages.shared.errors import UserError, escape
from stages.shared.pictures import is_supported, read_picture

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}  # the names that published data sets give to the folders of their splits

Example = tuple[Path, str]  # a picture and its class


def read_splits(
    folder: Path, image_shape: tuple[int, ...], held_out: float = 0.1, seed: int = 0
) -> dict[str, Split]:
    """Return the splits "train", "validation" and "test" of the pictures in `folder`.

    `folder` holds one folder per class, or the folders train, validation and test (see `SPLITS`)
    that do. A split without a folder gets the fraction `held_out` of the training pictures of each
    class, drawn with `seed`. Pictures are resized to `image_shape`. Prints a note if the same image
    is in two splits. Raises `UserError` for a file that is not a picture, or another structure.
    """
    if not is_supported(image_shape, "") or len(image_shape) < 2 or min(image_shape) < 1:
        problem = "must be (rows, columns) or (rows, columns, 3), each at least 1"
        raise UserError(f"image shape {image_shape}: {problem}; change it")
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; put one folder of pictures per class there")
    folders = folders_of_splits(folder) or {"train": folder}
    examples = {
        name: list(list_examples(folders[name])) if name in folders else [] for name in SPLITS
    }
    rng = np.random.default_rng(seed)
    for name in ("test", "validation"):
        if not examples[name]:
            examples["train"], examples[name] = hold_out(examples["train"], held_out, rng)
    class_names = tuple(sorted({name for _, name in examples["train"]}))
    if not 1 < len(class_names) <= 256:
        problem = f"has {len(class_names)} folders with pictures, must be 2 to 256"
        raise UserError(f"{folder}: {problem}; put one folder per class directly into it")
    splits = {name: read_split(examples[name], class_names, image_shape) for name in SPLITS}
    report_missing_classes(splits)
    report_duplicates(splits, examples)
    return splits


def visible(folder: Path) -> list[Path]:
    """Return the content of a folder, sorted, without hidden files and file managers' files."""
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name not in IGNORED_NAMES
    )


def folders_of_splits(folder: Path) -> dict[str, Path]:
    """Return the folders train, validation and test by split.

    Return none of them if there is anything else: a class of vehicles may be called train.
    """
    found = {}
    for path in visible(folder):
        for split, names in SPLITS.items():
            if path.name.lower() in names:
                found[split] = path
    is_complete = "train" in found and len(found) == len(visible(folder))
    return found if is_complete else {}


def list_examples(folder: Path) -> Iterator[Example]:
    """Yield the pictures in `folder`/CLASS/. Raises `UserError` for another structure."""
    for class_folder in visible(folder):
        if not class_folder.is_dir():
            problem = "is not in the folder of a class"
            raise UserError(f"{class_folder}: {problem}; move it into one or delete it")
        paths = visible(class_folder)
        if not paths:
            raise UserError(f"{class_folder}: has no pictures; put some there or delete it")
        for path in paths:
            if path.is_dir():
                problem = "is a folder inside the folder of a class"
                raise UserError(f"{path}: {problem}; put one folder per class into {folder}")
            yield path, class_folder.name


def hold_out(
    examples: list[Example], fraction: float, rng: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    """Draw a fraction of the examples of each class. Return the kept and the drawn examples.

    Of a class with at least three examples, at least one is kept and at least one is drawn.
    """
    by_class: dict[str, list[Example]] = {}
    for example in examples:
        by_class.setdefault(example[1], []).append(example)
    kept: list[Example] = []
    drawn: list[Example] = []
    for own in by_class.values():
        count = max(round(fraction * len(own)), 1 if len(own) > 2 else 0)
        permutation = rng.permutation(len(own))
        drawn += [own[index] for index in sorted(permutation[:count])]
        kept += [own[index] for index in sorted(permutation[count:])]
    return kept, drawn


def read_split(
    examples: list[Example], class_names: tuple[str, ...], image_shape: tuple[int, ...]
) -> Split:
    """Read the pictures of a split. Raises `UserError` for a class or a file that does not fit."""
    label_of = {name: label for label, name in enumerate(class_names)}
    images = np.empty((len(examples), *image_shape), np.uint8)
    labels = np.empty(len(examples), np.uint8)
    for index, (path, class_name) in enumerate(examples):
        if class_name not in label_of:
            raise UserError(f"{path.parent}: has no class of this name in training; delete it")
        try:
            with path.open("rb") as file:
                images[index] = read_picture(file, image_shape, "")
        except ValueError as error:
            raise UserError(f"{path}: {error}, or delete it") from None
        labels[index] = label_of[class_name]
    try:
        return Split(images, labels, class_names)
    except ValueError as error:
        raise UserError(f"{examples[0][0].parent.parent}: {error}") from None


def report_missing_classes(splits: dict[str, Split]) -> None:
    """Print a note for each split that has examples, but none of some classes."""
    for name, split in splits.items():
        present = set(split.labels.tolist())
        missing = [
            class_name for label, class_name in enumerate(split.class_names) if label not in present
        ]
        if len(split) and missing:
            print(escape(f"note: the {name} split has no pictures of {', '.join(missing)}"))


def report_duplicates(splits: dict[str, Split], examples: dict[str, list[Example]]) -> None:
    """Print a note if splits share images: then the accuracy is higher than on new pictures."""
    first: dict[bytes, tuple[str, Path]] = {}
    shared = []
    for name, split in splits.items():
        for (path, _), image in zip(examples[name], split.images, strict=True):
            other, other_path = first.setdefault(digest_of(image), (name, path))
            if other != name:
                shared.append(f"{other_path} and {path}")
    if shared:
        print(f"note: {len(shared)} images are in two splits, such as {shared[0]}; delete one")


def digest_of(image: NDArray[np.uint8]) -> bytes:
    """Return the SHA-256 of an image."""
    return sha256(np.ascontiguousarray(image).data).digest()
