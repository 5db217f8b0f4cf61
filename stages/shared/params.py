"""Read a section of params.yaml as a frozen `msgspec.Struct`.

A field's annotation defines the allowed values: `hidden_dim: Annotated[int, Meta(ge=1, le=8192)]`.
Fields have no defaults, so params.yaml is the only place that holds a value.

DVC reads params.yaml too, by the rules of YAML 1.2. PyYAML follows YAML 1.1, where `1e-1` is text
and `yes` is true. `Loader` therefore resolves scalars by YAML 1.2 rules, and rejects text that DVC
might read as another value. DVC's own parser, ruamel.yaml, is not used here, because it accepts
aliases, which can expand without limit, and raises many types of errors.
"""

import json
import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
import yaml

from stages.shared.errors import UserError, escape

MAX_SIZE = 16_384  # bytes of the file, to bound memory and time

# Control characters, bytes that are not UTF-8 (decoded to surrogates), and U+0085, U+2028 and
# U+2029, which end a line for PyYAML but not for DVC.
FORBIDDEN = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# The scalars without quotes that are not text. The first pattern that matches defines the type.
# The first four are the core schema of YAML 1.2, except for spellings that DVC reads in another way
# (0x20, 040, 1_000) and numbers of more than 100 digits or with an exponent of more than two, which
# could be infinite as a float. "ambiguous" is everything else that is a number, a date or a special
# key for DVC, YAML 1.1 or YAML 1.2, or looks like one.
SCALARS = {
    "null": "|~|null|Null|NULL",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?(0|[1-9][0-9]{0,99})",
    "float": r"[-+]?((0|[1-9][0-9]{0,99})(\.[0-9]*)?([eE][-+]?[0-9]{1,2})?|\.[0-9]+)",
    "ambiguous": r"[-+]?([._]*[0-9][\s\S]*|\.(?i:inf|nan))|<<|=",
}
TAG = "tag:yaml.org,2002:"  # in front of the names of the types

# Words for a JSON schema's types and limits.
TYPES = {"integer": "a whole number", "boolean": "true or false", "array": "a list"}
LIMITS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
}

T = TypeVar("T", bound=msgspec.Struct)


def read_params(section: str, params_class: type[T], path: Path = Path("params.yaml")) -> T:
    """Return `section` of the YAML file at `path` as an instance of `params_class`.

    Raises `UserError` with the key, its value and the allowed values if a key is missing, unknown,
    of the wrong type or out of range, also for the reasons that `read_sections` raises.
    """
    sections = read_sections(path)
    try:
        if not isinstance(sections, dict):
            raise ValueError(f"must hold sections such as {section}")
        if section not in sections:
            similar = get_close_matches(section, sections, 1)
            remedy = f"rename {_escape(similar[0])}" if similar else "add it"
            raise ValueError(f"the section {section} is missing; {remedy}")
        return check_section(sections[section], section, params_class)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_sections(path: Path = Path("params.yaml")) -> Any:
    """Return the content of the YAML file at `path`: the same values as DVC reads.

    Raises `UserError` with the line if the file is not valid YAML, or if it has anchors, aliases,
    tags, directives, merge keys, duplicate keys, ambiguous scalars or a second document.
    """
    try:
        with path.open("rb") as file:
            return _parse(_decode(file.read(MAX_SIZE + 1)))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run in the folder that holds it") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def check_section(values: object, section: str, params_class: type[T]) -> T:
    """Return the mapping `values` as an instance of `params_class`. An int is allowed for a float.

    Raises `ValueError` with the key, its value and the allowed values.
    """
    types = {field.name: field.type for field in msgspec.structs.fields(params_class)}
    names = ", ".join(types)
    if not isinstance(values, dict):
        raise ValueError(f"{section} must hold {names}")
    for name in values:
        if name not in types:
            similar = get_close_matches(name, types, 1)
            remedy = f"did you mean {section}.{similar[0]}?" if similar else f"known: {names}"
            raise ValueError(f"{section}.{_escape(name)} is unknown; {remedy}")
    for name in types:
        if name not in values:
            raise ValueError(f"{section}.{name} is missing; it must be {_describe(types[name])}")
    checked = {name: _convert(values[name], types[name], f"{section}.{name}") for name in types}
    return params_class(**checked)


def _convert(value: object, allowed: Any, key: str) -> Any:
    """Return `value` as the type `allowed`.

    Raises `ValueError` with the allowed values. If `value` is, for example, the text "32" and an
    int is allowed, the error suggests to write 32.
    """
    try:
        return msgspec.convert(value, allowed)
    except ValueError:  # msgspec.ValidationError; UnicodeEncodeError for half a surrogate pair
        problem = f"{key} is {value!r:.60}, must be {_describe(allowed)}"
    with suppress(TypeError, ValueError):  # not allowed in any spelling, or not a JSON type
        spelling = json.dumps(msgspec.convert(value, allowed, strict=False), allow_nan=False)
        if len(spelling) <= 60:
            problem += f"; write {spelling}"
    raise ValueError(problem)


def _describe(allowed: Any) -> str:
    """Return the values that a type allows, such as "a whole number from 1 to 8192"."""
    schema = msgspec.json.schema(allowed)
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    kind = schema.pop("type", "value")
    limits = [f"{LIMITS.get(key, key)} {limit}" for key, limit in schema.items()]
    return " ".join([TYPES.get(kind, f"a {kind}"), *limits])


def _escape(text: str) -> str:
    """Return `text` for a message: escaped to printable characters, at most 60 of them."""
    return f"{escape(text):.60}"


def _decode(data: bytes) -> str:
    """Return `data` as text. Raises `ValueError` if it is too long or has a forbidden character."""
    if len(data) > MAX_SIZE:
        raise ValueError(f"has more than {MAX_SIZE:,} bytes, more than params need; cut it down")
    text = data.decode(errors="surrogateescape")
    if found := FORBIDDEN.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(f"line {line}: has a byte or character that YAML refuses; delete it")
    return text


def _parse(text: str) -> Any:
    """Return the content of a YAML document. Raises `ValueError` with the line of an error."""
    loader = Loader(text)
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or loader.get_mark()).line
        problem = ", ".join(filter(None, [error.context, error.problem]))
    except RecursionError:
        line, problem = loader.line, "has too many levels; write fewer"
    except (ValueError, OverflowError):  # from chr(), such as for \U00110000
        line, problem = loader.line, "has an escape that is not a character; correct it"
    raise ValueError(f"line {line + 1}: {problem}")


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    """Return an error in the line of `mark`."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class Loader(yaml.SafeLoader):
    """PyYAML's loader for plain YAML with the scalars of YAML 1.2."""

    def reject_syntax(self) -> NoReturn:
        """Reject aliases, which can expand without limit, and syntax that changes types."""
        problem = "has an anchor (&), alias (*), tag (!) or directive (%); write plain values"
        raise _error(problem, self.get_mark())

    # PyYAML's scanner calls these where such a token begins.
    fetch_anchor = fetch_alias = fetch_tag = fetch_directive = reject_syntax

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping. Reject a key that is not text or appears twice."""
        lines = dict[str, int]()
        for key_node, _ in node.value:
            key, mark = self.construct_object(key_node, deep=True), key_node.start_mark
            if not isinstance(key, str):
                raise _error(f"the key {key!r:.60} is not text; put it in quotes", mark)
            if key in lines:
                raise _error(f"{_escape(key)} is also in line {lines[key]}; keep one of them", mark)
            lines[key] = mark.line + 1
        return super().construct_mapping(node, deep)

    def reject_scalar(self, node: yaml.ScalarNode) -> NoReturn:
        """Reject a scalar that DVC might read as another value."""
        problem = "is ambiguous or too large; write a plain decimal number, or put text in quotes"
        raise _error(f"{_escape(node.value)} {problem}", node.start_mark)

    # Patterns for scalars with any first character (None), instead of those of YAML 1.1.
    yaml_implicit_resolvers = {  # noqa: RUF012
        None: [(TAG + name, re.compile(rf"({pattern})\Z")) for name, pattern in SCALARS.items()]
    }
    yaml_constructors = yaml.SafeLoader.yaml_constructors | {TAG + "ambiguous": reject_scalar}
