"""params.yaml is read as typed values, the same as for DVC, or rejected with one line."""

import importlib
import re
import tracemalloc
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from dvc.utils.serialize import load_yaml
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from stages.shared.errors import UserError
from stages.shared.params import MAX_SIZE, check_section, read_params, read_sections
from tests.conftest import ROOT, STAGES
from tests.faults.hostile import JSON, damaged, refused

GOOD = """\
other:
  seed: 7
train:
  hidden_dim: 32
  learning_rate: 0.1
  device: cpu
"""


class Params(Struct, frozen=True):
    hidden_dim: Annotated[int, Meta(ge=1, le=8192)]
    learning_rate: Annotated[float, Meta(ge=1e-6, le=100.0)]
    device: Literal["cpu", "gpu"]


class OtherParams(Struct, frozen=True):
    """Types that the project does not use, but a copy of it may."""

    flip: bool = False
    name: str = ""
    rate: float = 0.0
    steps: int = 0
    above: Annotated[float, Meta(gt=0)] = 1.0
    part: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    word: Annotated[str, Meta(min_length=1)] = "a"
    sizes: list[int] = []
    tags: set[int] = set()
    most: Annotated[int, Meta(ge=1)] | None = None
    side: Literal[28, 32] = 28


class Anything(Struct, frozen=True):
    value: Any


def read(text: str | bytes, params_class: type[Struct], folder: Path) -> Any:
    path = folder / "params.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_params("train", params_class, path)


def check_message(message: str, expected: str) -> None:
    """Check that `message` is one short, printable line that has the parts of `expected`.

    The parts are separated by "..." and have this order.
    """
    assert message.isprintable()
    assert len(message) < 400
    assert re.search(".*".join(map(re.escape, expected.split("..."))), message)


def check_rejected(text: str | bytes, expected: str, folder: Path) -> str:
    """Check that the section `train` of `text` is rejected as `expected`; return the message."""
    with pytest.raises(UserError) as error:
        read(text, Params, folder)
    check_message(str(error.value), f"{folder}/params.yaml: {expected}")
    return str(error.value)


def with_value(name: str, text: str) -> str:
    """Return GOOD with `text` as the value of the key `name` of `train`."""
    return re.sub(f"(?m)^  {name}: .*", lambda _: f"  {name}: {text}", GOOD)


def test_good_params(tmp_path: Path) -> None:
    assert read(GOOD, Params, tmp_path) == Params(32, 0.1, "cpu")


@pytest.mark.parametrize("text", ["1", "+1", "1.", "1.0", "1e0", "10E-1"])
def test_whole_number_is_converted_to_float(text: str, tmp_path: Path) -> None:
    rate = read(with_value("learning_rate", text), Params, tmp_path).learning_rate
    assert (rate, type(rate)) == (1.0, float)


def test_default_of_a_field_does_not_replace_a_missing_key() -> None:
    with pytest.raises(ValueError, match=r"train\.flip is missing.*true or false"):
        check_section({}, "train", OtherParams)


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^params\.yaml: not found; .*folder"):
        read_params("train", Params)


KEYS = "hidden_dim...learning_rate...device"
LONG = "x" * 70

SECTIONS_AND_KEYS = [
    ("", "...train"),
    ("# nothing", "...train"),
    ("- train", "...train"),
    ("other: {}", "...train is missing...add"),
    (GOOD.replace("train:", "trian:"), "...train is missing...rename trian"),
    (GOOD.replace("train:", '"tr\\ea\\nn":'), r"...train is missing...rename tr\x1ba\nn"),
    ("train:", f"train must hold {KEYS}"),
    ("train: 3", f"train must hold {KEYS}"),
    (GOOD.replace("hidden", "hiden"), "train.hiden_dim is unknown...train.hidden_dim?"),
    (GOOD + "  x: 1", f"train.x is unknown...{KEYS}"),
    (GOOD + '  "x\\e[31m\\u2028": 1', rf"train.x\x1b[31m\u2028 is unknown...{KEYS}"),
    (GOOD + f"  {LONG}: 1", f"train.{LONG[:60]} is unknown...{KEYS}"),
]


@pytest.mark.parametrize(("text", "expected"), SECTIONS_AND_KEYS)
def test_wrong_section_or_key(text: str, expected: str, tmp_path: Path) -> None:
    check_rejected(text, expected, tmp_path)


ALLOWED = {
    "hidden_dim": "a whole number from 1 to 8192",
    "learning_rate": "a number from 1e-06 to 100.0",
    "device": "cpu or gpu",
}


@pytest.mark.parametrize("name", ALLOWED)
def test_missing_key(name: str, tmp_path: Path) -> None:
    text = re.sub(f"(?m)^  {name}: .*\n", "", GOOD)
    check_rejected(text, f"train.{name} is missing...{ALLOWED[name]}", tmp_path)


VALUES = [
    ("hidden_dim", "32.5", "32.5"),
    ("hidden_dim", "'0'", "'0'"),
    ("hidden_dim", "'٣٢'", "'٣٢'"),
    ("hidden_dim", "٣٢", "'٣٢'"),
    ("hidden_dim", "true", "True"),
    ("hidden_dim", "yes", "'yes'"),
    ("hidden_dim", "", "None"),
    ("hidden_dim", "{a: 1}", "{'a': 1}"),
    ("hidden_dim", "0", "0"),
    ("hidden_dim", "8193", "8193"),
    ("hidden_dim", "-" + "9" * 100, "-999"),
    ("hidden_dim", "|\n    32", r"'32\n'"),
    ("hidden_dim", '"\\e\\ud800"', r"'\x1b\ud800'"),
    ("learning_rate", "1e-7", "1e-07"),
    ("learning_rate", "-0.1", "-0.1"),
    ("learning_rate", "'+.5'", "'+.5'"),
    ("learning_rate", "high", "'high'"),
    ("learning_rate", "nan", "'nan'"),
    ("learning_rate", "true", "True"),
    ("device", "tpu", "'tpu'"),
    ("device", "[cpu]", "['cpu']"),
    ("device", '"\\ud800"', r"'\ud800'"),
]


@pytest.mark.parametrize(("name", "text", "shown"), VALUES)
def test_value_that_is_not_allowed(name: str, text: str, shown: str, tmp_path: Path) -> None:
    expected = f"train.{name} is {shown}...{ALLOWED[name]}"
    assert "write" not in check_rejected(with_value(name, text), expected, tmp_path)


SPELLINGS = [
    ("hidden_dim", "'32'", "32"),
    ("hidden_dim", "32.0", "32"),
    ("learning_rate", "'0.2'", "0.2"),
]


@pytest.mark.parametrize(("name", "text", "suggested"), SPELLINGS)
def test_other_spelling_is_suggested(name: str, text: str, suggested: str, tmp_path: Path) -> None:
    expected = f"train.{name} is {text}...{ALLOWED[name]}...write {suggested}"
    check_rejected(with_value(name, text), expected, tmp_path)


OTHER_VALUES = [
    ("flip", 1, "1...true or false...write true"),
    ("flip", "true", "'true'...true or false...write true"),
    ("flip", "yes", "'yes'...true or false"),
    ("name", 3, "3...a string"),
    ("rate", "nan", "'nan'...a number"),
    ("rate", 10**400, "1000...a number"),
    ("steps", "1e2", "'1e2'...a whole number...write 100"),
    ("steps", "9" * 70, "'999...a whole number"),
    ("above", 0, "0...a number above 0"),
    ("part", 1, "1...a number from 0 below 1"),
    ("word", "", "''...string...1"),
    ("sizes", [1, "2"], "[1, '2']...a list...integer...write [1, 2]"),
    ("tags", ["1"], "['1']...a list...integer"),
    ("most", 0, "0...integer...minimum...1...null"),
    ("side", 30, "30...28 or 32"),
]


@pytest.mark.parametrize(("name", "value", "expected"), OTHER_VALUES)
def test_value_of_another_type(name: str, value: object, expected: str) -> None:
    good = {field: getattr(OtherParams(), field) for field in OtherParams.__struct_fields__}
    assert check_section(good, "train", OtherParams) == OtherParams()
    with pytest.raises(ValueError) as error:
        check_section(good | {name: value}, "train", OtherParams)
    check_message(str(error.value), f"train.{name} is {expected}")
    assert ("write" in str(error.value)) == ("write" in expected)


NOT_PLAIN = [
    (GOOD + "  device: gpu", "line 7: device...line 6...keep one"),
    (GOOD + "other: {}", "line 7: other...line 1...keep one"),
    (with_value("device", "[1, {a: 1, a: 2}]"), "line 6: a...line 6...keep one"),
    (with_value("device", "2020-01-02 \n\n    x"), r"line 6: 2020-01-02\nx...quotes"),
    ('"a\\n": 1\n"a\\n": 2', r"line 2: a\n...line 1...keep one"),
    (GOOD + "3: 1", "line 7: ...key 3...quotes"),
    (GOOD + "?\n: 1", "line 7: ...key None...quotes"),
    (GOOD + "? [a]\n: 1", "line 7: ...key ['a']...quotes"),
    (GOOD + "? {a: 1}\n: 1", "line 7: ...key {'a': 1}...quotes"),
    (GOOD + f"? [{LONG * 9}]\n: 1", f"line 7: ...key ['{LONG[:50]}...quotes"),
    (GOOD + "  <<: {device: gpu}", "line 7: <<...quotes"),
    (f"{GOOD}---\n{GOOD}", "line 7: ...single document...another"),
    ("[" * 9999, "line 1: ...levels...fewer"),
    ("{a: " * 3000, "line 1: ...levels...fewer"),
    ("? " * 5000, "line 1: ...levels...fewer"),
    ("a:\n - " + "- " * 5000, "line 2: ...levels...fewer"),
    ("\na: [", "line 2: ...node content...end"),
    ("a: {x{, \n", "line 1: ...expected ',' or '}'...'{'"),
    ("a: 1\n\tb: 2", r"line 2: ...'\t'"),
    ('a: "\\U00110000"', "line 1: ...escape...correct"),
    ('\na: "\\Uffffffff"', "line 2: ...escape...correct"),
    ("a: 1\nb: \0", "line 2: ...character...delete"),
    (b"a: 1\nb: \xff", "line 2: ...byte...delete"),
    ("a: 1 # \x1b", "line 1: ...character...delete"),
    ("# \u2028a: 1", "line 1: ...character...delete"),
    ("# \x85a: 1", "line 1: ...character...delete"),
    (GOOD.encode("utf-16"), "line 1: ...byte...delete"),
    ("#" * (MAX_SIZE + 1), f"...{MAX_SIZE:,} bytes...cut"),
]


@pytest.mark.parametrize(("text", "expected"), NOT_PLAIN)
def test_text_that_is_not_plain_yaml(text: str | bytes, expected: str, tmp_path: Path) -> None:
    check_rejected(text, expected, tmp_path)


# Numbers, dates and merge keys for some readers of YAML, and similar text.
AMBIGUOUS = [
    *("040", "-010", "00", "0x20", "0b11", "0o40", "1_000", "1_000.5", "._5", "+.5e1", ".5e1"),
    *("1:30", "12:30:45", "1.2.3", "3d", "2020-01", "0x", "0o8", "1,5", "1e5x", "1.5e", "<<", "="),
    *(".nan", "-.inf", "+.INF", "2020-01-02", "2020-13-45", "2020-01-02 03:04:05"),
    *("9" * 5000, "9" * 101, "1e999", "1e100"),
]


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_ambiguous_scalar(text: str, tmp_path: Path) -> None:
    expected = f"line 4: {text[:60]}...decimal number...quotes"
    check_rejected(with_value("hidden_dim", text), expected, tmp_path)
    quoted = f"train:\n  value: ['{text}', \"{text}\"]"
    assert read(quoted, Anything, tmp_path).value == [text, text]


NODES = [
    *("&a cpu", "&a", "&a:b 1", "*a", f"*{LONG}", "! 3", "!cpu", f"!{LONG * 50}!y 1"),
    *("!!bool abc", "!!timestamp abc", "!!float abc", "!!int '3'", "!!set {}"),
    "!!python/object/apply:os.mkdir [executed]",
]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        *((with_value("device", node), 6) for node in NODES),
        ("a: &a {x: 1}\nb: {<<: *a}", 1),
        (GOOD + "&a b: 1", 7),
        ("!!str a: 1", 1),
        ("%YAML 1.1\n---\n" + GOOD, 1),
        ("%TAG ! !\n---\n" + GOOD, 1),
    ],
)
def test_anchor_alias_tag_or_directive(text: str, line: int, tmp_path: Path) -> None:
    check_rejected(text, f"line {line}: ...anchor...alias...tag...directive...plain", tmp_path)


# Half of these have another value by the rules of YAML 1.1.
SAME_AS_DVC = [
    *("yes", "No", "on", "OFF", "y", "true", "True", "TRUE", "false", "False", "FALSE", "tRue"),
    *("", "~", "null", "Null", "NULL", "nULL", "none", "0", "-0", "+1", "12", "1e5", "1E-5"),
    *("1e-05", "+1e+5", "1.", "1.e5", "0.5", ".5", "-.5", "+.5", "5.0e-1", "e5", ".e5", "-0.0"),
    *("nan", "inf", ".info", "x1", "a-1", "v1.2", "9" * 100, f"{'9' * 100}e99", "1e-99"),
    *(".", "..", "_", "+", "<", "a b", "a#b", "a #b", "a:b", "٣٢", "½", "\xa0", "\ufeff"),
    *("'1'", '"1"', '"\\x41\\/\\n"', "'it''s'", "|\n    1\n", ">-\n    a\n    b\n"),
    *("a\n    b", "a\r\n    b"),
    *("[]", "[1, 1.0, a]", "[[1], {a: 1}]", "{a: 1, b: {c: 2}}", "\n    - 1\n    - a: b\n"),
    *('{"a":1}', "{a:1}", "{a}", "[a: 1]", "'<<'", "{'1': {'<<': 1}}"),
]


@pytest.mark.parametrize("text", SAME_AS_DVC)
def test_same_value_as_dvc(text: str, tmp_path: Path) -> None:
    ours = read(f"train:\n  value: {text}\n", Anything, tmp_path).value
    assert repr(ours) == repr(load_yaml(tmp_path / "params.yaml")["train"]["value"])


WORD = st.text("0012459.__eE+-xobXOBfFtTzZ:inaINA ")
YAML = st.text("ab:-*&!#[]{},?|>'\"%@` \n\r\t0159._eE+~<=\\/\x85\u2028\xa0")


@given(
    text=st.builds("train:\n  value: {}".format, WORD | YAML) | YAML.map("train: {}".format) | YAML
)
def test_same_content_as_dvc_or_rejected(folder: Path, text: str) -> None:
    path = folder / "params.yaml"
    path.write_bytes(text.encode())
    with refused():
        ours = read_sections(path)
        try:
            theirs = load_yaml(path)
        except Exception:  # of several kinds; DVC then stops before it runs a stage
            return
        if isinstance(theirs, dict):  # a file that is a single text has no params
            assert repr(ours or {}) == repr(theirs)


BOMB = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{f'*{old},' * 9}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@given(data=st.binary() | YAML.map(str.encode) | damaged(GOOD.encode()))
@example(BOMB.encode())
@example(b"train: !!python/object/apply:os.mkdir [executed]")
@example(b"[" * MAX_SIZE)
@example(b"[" + b"?," * (MAX_SIZE // 2 - 1) + b"]")
@example(b"a: [" + b"1," * (MAX_SIZE // 2 - 3) + b"]")
@example(b"a: 0x" + b"f" * (MAX_SIZE - 5))
@example(b"a: " + b"9_" * (MAX_SIZE // 2 - 2) + b"x")
@example(b"\n".join(b"key%d: 1" % number for number in range(MAX_SIZE // 12)))
def test_hostile_bytes(folder: Path, data: bytes) -> None:
    with refused():
        params = read(data, Params, folder)
        assert type(params.hidden_dim) is int
        assert 1 <= params.hidden_dim <= 8192
        assert type(params.learning_rate) is float
        assert 1e-6 <= params.learning_rate <= 100
        assert params.device in ("cpu", "gpu")
    assert not Path("executed").exists()


def test_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="bytes"):
        read_params("train", Params, path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@given(values=JSON | st.fixed_dictionaries(dict.fromkeys(Params.__struct_fields__, JSON)))
def test_any_values_are_converted_or_rejected(values: Any) -> None:
    with refused(ValueError):
        params = check_section(values, "train", Params)
        assert params == Params(**values)


@pytest.mark.parametrize(
    ("stage", "section"),
    [(stage, section) for stage in STAGES for section in STAGES[stage].get("params", ())],
)
def test_params_of_this_project(stage: str, section: str) -> None:
    (name,) = re.findall(r"-m (stages\.\w+)", STAGES[stage]["cmd"])
    module = importlib.import_module(name)
    params_class = vars(module)[f"{section.title()}Params"]
    assert isinstance(read_params(section, params_class, ROOT / "params.yaml"), params_class)
