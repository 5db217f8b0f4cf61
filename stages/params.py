"""Read one section of params.yaml, strictly, into the frozen dataclass of the stage that owns it.

A field's annotation says what it allows: `hidden_dim: Annotated[int, Range(1, 8192)]`. Fields
have no defaults, so params.yaml is the only place that holds a value.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from stages.errors import UserError

# Named after the stages that own them; a section of another name is a slip of the pen.
SECTIONS = ("fetch", "preprocess", "train")

MAX_SIZE = 1 << 16  # bytes of the file, to bound memory and time

_NOUNS = {int: "a whole number ", float: "a number ", str: ""}

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"


class Choice(tuple[str, ...]):
    """The words to choose from."""

    def __str__(self) -> str:
        return " or ".join(self)


def read_params(section: str, params_class: type[T], path: Path = Path("params.yaml")) -> T:
    """Read `section` of the YAML file at `path` into an instance of the dataclass `params_class`.

    Raises `UserError` with the key, its value and what is allowed when a key is missing,
    unknown, there twice, of the wrong type or out of range.
    """
    hints = get_type_hints(params_class, include_extras=True)
    try:
        sections = _known(_load(path.read_bytes()), "", SECTIONS)
        values = _known(sections.get(section, {}), f"{section}.", hints)
        checked = {key: _checked(f"{section}.{key}", values, hint) for key, hint in hints.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run in the folder that holds it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    return params_class(**checked)


def _load(data: bytes) -> Any:
    """Parse YAML, refusing keys that stand twice in the file or in a section of it."""
    if len(data) > MAX_SIZE:
        raise ValueError(f"has {len(data):,} bytes, more than params need; cut it down")
    loader = _Loader(data)
    root = loader.get_single_node()
    _refuse_duplicates(root, "")
    if isinstance(root, yaml.MappingNode):
        for key, section in root.value:
            _refuse_duplicates(section, f"{key.value}.")
    return loader.construct_document(root) if root else None


def _refuse_duplicates(node: yaml.Node | None, prefix: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        line, name = key.start_mark.line + 1, str(key.value)
        if name in lines:
            where = f"lines {lines[name]} and {line}"
            raise ValueError(f"{prefix}{name:.60} stands twice, in {where}; keep one of them")
        lines[name] = line


def _known(mapping: Any, prefix: str, known: Collection[str]) -> dict[str, Any]:
    """`mapping`, if it is one and has none but the `known` keys."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'} must hold {', '.join(known)}")
    for key in mapping:
        if key not in known:
            meant = get_close_matches(str(key), known, 1)
            remedy = f"did you mean {prefix}{meant[0]}?" if meant else f"known: {', '.join(known)}"
            raise ValueError(f"{prefix}{key!s:.60} is unknown; {remedy}")
    return mapping


def _checked(key: str, values: dict[str, Any], hint: Any) -> Any:
    """The value of `key`, if of the annotated type and allowed; an int will do for a float."""
    kind, (allowed,) = hint.__origin__, hint.__metadata__
    expected = f"must be {_NOUNS[kind]}{allowed}"
    name = key.partition(".")[2]
    if name not in values:
        raise ValueError(f"{key} is missing; it {expected}")
    value = values[name]
    right_type = type(value) is kind or (kind is float and type(value) is int)
    if not right_type or value not in allowed:
        remedy = _plain_spelling(value, kind, allowed)
        raise ValueError(f"{key} is {value!r:.60}, {expected}{remedy}")
    return kind(value)


def _plain_spelling(value: Any, kind: type, allowed: Any) -> str:
    """The remedy for a number that stands in quotes."""
    try:
        right = isinstance(value, str) and kind is not str and kind(value) in allowed
    except ValueError:
        right = False
    return f"; write {value}" if right else ""


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, DVC reads and writes 1.2: mend or refuse where they differ.

    1e-05 is text in the one and a number in the other, as which it is taken here; 010 is 8 and 10;
    1:30 is 90 and text. Refuse aliases too, by which a few lines could stand for more values than
    memory holds.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Construct a whole number from decimal digits."""
        _refuse_unless(r"[-+]?(0|[1-9][0-9]*)", node)
        return int(node.value)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Construct a number that is not in base 60."""
        _refuse_unless("[^:]*", node)
        return super().construct_yaml_float(node)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose the next node, if it is no alias."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            line = event.start_mark.line + 1
            raise ValueError(f"line {line}: *{event.anchor} is an alias; write the value itself")
        return super().compose_node(parent, index)


def _refuse_unless(pattern: str, node: yaml.ScalarNode) -> None:
    if not re.fullmatch(pattern, node.value):
        line = node.start_mark.line + 1
        raise ValueError(f"line {line}: {node.value} is no plain decimal number; write one")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
