"""Read one section of params.yaml, strictly, into the frozen `msgspec.Struct` that owns it.

A field's annotation says what it allows: `hidden_dim: Annotated[int, Meta(ge=1, le=8192)]`. Fields
have no defaults, so params.yaml is the only place that holds a value.
"""

import math
import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
import yaml
from msgspec import UNSET

from stages.shared.errors import UserError

MAX_SIZE = 1 << 16  # bytes of the file, to bound memory and time
MAX_DEPTH = 8  # mappings and lists in one another, to bound recursion

_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_LIMITS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
# Whatever might be a number or a date to DVC, and of that what is the same number to Python.
_NUMBER = re.compile(r"(?is)[-+]?([._]*[0-9].*|\.inf|\.nan)")
_DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.[0-9]+)")
# Not text, or the end of a line to PyYAML alone; a byte that is not UTF-8 becomes a surrogate.
_CONTROL = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

T = TypeVar("T", bound=msgspec.Struct)


def read_params(section: str, params_class: type[T], path: Path = Path("params.yaml")) -> T:
    """Read `section` of the YAML file at `path` into an instance of `params_class`.

    Raises `UserError` with the key, its value and what is allowed when a key is missing, unknown,
    of the wrong type or out of range, and as `read_sections` does.
    """
    sections = read_sections(path)
    try:
        if not isinstance(sections, dict):
            raise ValueError(f"must hold sections such as {section}")
        if section not in sections:
            meant = get_close_matches(section, sections, 1)
            remedy = f"rename {_bare(meant[0])}" if meant else "add it"
            raise ValueError(f"the section {section} is missing; {remedy}")
        return check_section(sections[section], section, params_class)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_sections(path: Path = Path("params.yaml")) -> Any:
    """Read a YAML file as DVC does. Raises `UserError` with the line when it is not plain YAML."""
    try:
        with path.open("rb") as file:
            return _load(file.read(MAX_SIZE + 1))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run in the folder that holds it") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def check_section(values: object, section: str, params_class: type[T]) -> T:
    """Make an instance of `params_class` of the mapping `values`; an int will do for a float.

    Raises `ValueError` with the key, its value and what is allowed.
    """
    kinds = {field.name: field.type for field in msgspec.structs.fields(params_class)}
    known = ", ".join(kinds)
    if not isinstance(values, dict):
        raise ValueError(f"{section} must hold {known}")
    for name in values:
        if name not in kinds:
            meant = get_close_matches(name, kinds, 1)
            remedy = f"did you mean {section}.{meant[0]}?" if meant else f"known: {known}"
            raise ValueError(f"{section}.{_bare(name)} is unknown; {remedy}")
    checked = {}
    for name, kind in kinds.items():
        key, must_be = f"{section}.{name}", f"must be {_allowed(kind)}"
        if name not in values:
            raise ValueError(f"{key} is missing; it {must_be}")
        checked[name] = _converted(values[name], kind)
        if checked[name] is UNSET:
            meant = _converted(values[name], kind, strict=False)  # by "32", for example
            spelling = "" if meant is UNSET else msgspec.json.encode(meant).decode()
            remedy = f"; write {spelling}" if 0 < len(spelling) <= 60 else ""
            raise ValueError(f"{key} is {values[name]!r:.60}, {must_be}{remedy}")
    return params_class(**checked)


def _converted(value: object, kind: Any, strict: bool = True) -> Any:
    """`value` as `kind` has it, or UNSET if that does not allow it."""
    try:
        converted = msgspec.convert(value, kind, strict=strict)
    except (msgspec.ValidationError, UnicodeEncodeError):  # the latter for a lone surrogate
        return UNSET
    finite = not isinstance(converted, float) or math.isfinite(converted)
    return converted if finite else UNSET


def _allowed(kind: Any) -> str:
    """What a value may be, in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    base, *metas = get_args(kind) if get_origin(kind) is Annotated else [kind]
    limits = [f"{_LIMITS.get(key, key)} {n}" for meta in metas for key, n in meta.__rich_repr__()]
    return " ".join([_NOUNS.get(base, str(base)), *limits])


def _bare(text: str) -> str:
    """`text` for a message: without quotes, what does not print escaped, and not long."""
    return f"{repr(text)[1:-1]:.60}"


def _load(data: bytes) -> Any:
    """Read YAML 1.2 as DVC does, of which PyYAML knows the events, but not what words stand for.

    Raises `ValueError` where they might differ, and for aliases, by which a few lines could stand
    for more values than memory holds.
    """
    if len(data) > MAX_SIZE:
        raise ValueError(f"has more than {MAX_SIZE:,} bytes, more than params need; cut it down")
    text = data.decode(errors="surrogateescape")
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(f"line {line}: has a byte or character that YAML refuses; delete it")
    events = _events(text)
    next(events)  # the start of the stream
    start = next(events)
    if isinstance(start, yaml.StreamEndEvent):
        return None
    if start.version or start.tags:
        raise ValueError(f"line {start.start_mark.line + 1}: has a directive (%); remove it")
    value = _value(next(events), events)
    next(events)  # the end of the document
    if not isinstance(more := next(events), yaml.StreamEndEvent):
        raise ValueError(f"line {more.start_mark.line + 1}: begins a second document; keep one")
    return value


def _events(text: str) -> Iterator[Any]:
    loader = yaml.SafeLoader(text)
    try:
        yield from iter(loader.get_event, None)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or loader).line + 1
        raise ValueError(f"line {line}: {error.problem}") from None
    except (ValueError, OverflowError):  # from the code of a character, such as \U00110000
        problem = "has a number too large for YAML; write a smaller one"
        raise ValueError(f"line {loader.line + 1}: {problem}") from None


def _value(event: Any, events: Iterator[Any], path: tuple[str, ...] = ()) -> Any:
    """What begins with `event` and goes on with `events`; its place is the key `path`."""
    line = event.start_mark.line + 1
    if isinstance(event, yaml.AliasEvent):
        raise ValueError(f"line {line}: *{event.anchor:.60} is an alias; write the value itself")
    if event.tag:
        raise ValueError(f"line {line}: has a tag (!); write the value without it")
    if isinstance(event, yaml.ScalarEvent):
        return _plain(event.value, line) if event.implicit[0] else event.value
    if len(path) == MAX_DEPTH:
        raise ValueError(f"line {line}: has more than {MAX_DEPTH} levels; write fewer")
    inside = takewhile(lambda event: not isinstance(event, yaml.CollectionEndEvent), events)
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(item, events, (*path, str(n))) for n, item in enumerate(inside)]
    values, lines = {}, dict[str, int]()
    for key in inside:
        name, line = _value(key, events, (*path, "")), key.start_mark.line + 1
        if not isinstance(name, str):
            raise ValueError(f"line {line}: the key {name!r:.60} is not text; put it in quotes")
        if name in lines:
            key, where = ".".join(map(_bare, (*path, name))), f"lines {lines[name]} and {line}"
            raise ValueError(f"{key} appears twice, in {where}; keep one of them")
        lines[name] = line
        values[name] = _value(next(events), events, (*path, name))
    return values


def _plain(text: str, line: int) -> Any:
    """What `text` stands for, which is not in quotes."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if text == "<<":
        raise ValueError(f"line {line}: << merges mappings; write the keys themselves")
    if not _NUMBER.fullmatch(text):
        return text
    if not _DECIMAL.fullmatch(text):
        remedy = "write one, or put text in quotes"
        raise ValueError(f"line {line}: {_bare(text)} is not a plain decimal number; {remedy}")
    if math.isinf(float(text)):
        raise ValueError(f"line {line}: {text:.60} is too large a number; write a smaller one")
    return float(text) if set(text) & set(".eE") else int(text)
