"""One section of params.yaml: right values of the right types, else one line that says why not."""

import importlib
import math
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
from stages.shared.params import MAX_DEPTH, MAX_SIZE, check_section, read_params
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


class Free(Struct, frozen=True):
    """What a section may hold besides."""

    flip: bool = False
    name: str = ""
    rate: float = 0.0
    steps: int = 0
    above: Annotated[float, Meta(gt=0)] = 1.0
    part: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    word: Annotated[str, Meta(min_length=1)] = "a"
    sizes: list[int] = []
    most: Annotated[int, Meta(ge=1)] | None = None
    side: Literal[28, 32] = 28


class Anything(Struct, frozen=True):
    value: Any


def read(text: str | bytes, params_class: type[Struct], folder: Path) -> Any:
    path = folder / "params.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_params("train", params_class, path)


def error_of(text: str | bytes, params_class: type[Struct], folder: Path) -> str:
    """What is wrong with the file."""
    with pytest.raises(UserError) as mistake:
        read(text, params_class, folder)
    line = str(mistake.value)
    assert line.isprintable()
    assert len(line) < 1000
    return line.removeprefix(f"{folder}/")


def test_good_params(tmp_path: Path) -> None:
    assert read(GOOD, Params, tmp_path) == Params(32, 0.1, "cpu")


@pytest.mark.parametrize("text", ["1", "+1", "1.", "1.0", "1e0", "10E-1"])
def test_a_whole_number_is_a_float(text: str, tmp_path: Path) -> None:
    rate = read(GOOD.replace("0.1", text), Params, tmp_path).learning_rate
    assert (rate, type(rate)) == (1.0, float)


def test_a_default_does_not_replace_a_line(tmp_path: Path) -> None:
    line = "params.yaml: train.flip is missing; it must be true or false"
    assert error_of("train: {}", Free, tmp_path) == line


def with_param(name: str, text: str) -> str:
    """GOOD with `text` for the value of the key `name`."""
    return re.sub(f"(?m)^  {name}: .*", lambda _: f"  {name}: {text}", GOOD)


DIM, DIM_MUST = "train.hidden_dim is", "must be a whole number from 1 to 8192"
RATE, RATE_MUST = "train.learning_rate is", "must be a number from 1e-06 to 100.0"
KEYS = "hidden_dim, learning_rate, device"
LONG = "x" * 70


def not_plain(line: int, text: str) -> str:
    return f"line {line}: {text} is not a plain decimal number; write one, or put text in quotes"


MISTAKES: list[tuple[str | bytes, str]] = [
    # the sections
    ("", "must hold sections such as train"),
    ("# nothing", "must hold sections such as train"),
    ("- train", "must hold sections such as train"),
    ("other: {}", "the section train is missing; add it"),
    (GOOD.replace("train:", "trian:"), "the section train is missing; rename trian"),
    (GOOD.replace("train:", '"tr\\ea\\nn":'), r"the section train is missing; rename tr\x1ba\nn"),
    ("train:", f"train must hold {KEYS}"),
    ("train: 3", f"train must hold {KEYS}"),
    # the keys
    (
        GOOD.replace("hidden", "hiden"),
        "train.hiden_dim is unknown; did you mean train.hidden_dim?",
    ),
    (GOOD + "  x: 1", f"train.x is unknown; known: {KEYS}"),
    (GOOD + '  "x\\e[31m\\u2028": 1', rf"train.x\x1b[31m\u2028 is unknown; known: {KEYS}"),
    (GOOD + f"  {LONG}: 1", f"train.{LONG[:60]} is unknown; known: {KEYS}"),
    (
        GOOD.replace("  hidden_dim: 32\n", ""),
        "train.hidden_dim is missing; it must be a whole number from 1 to 8192",
    ),
    (
        GOOD.replace("  learning_rate: 0.1\n", ""),
        "train.learning_rate is missing; it must be a number from 1e-06 to 100.0",
    ),
    (GOOD.replace("  device: cpu", ""), "train.device is missing; it must be cpu or gpu"),
    (GOOD + "  device: gpu", "train.device appears twice, in lines 6 and 7; keep one of them"),
    (GOOD + "other: {}", "other appears twice, in lines 1 and 7; keep one of them"),
    (
        with_param("device", "[1, {a: 1, a: 2}]"),
        "train.device.1.a appears twice, in lines 6 and 6; keep one of them",
    ),
    ('"a\\n": 1\n"a\\n": 2', r"a\n appears twice, in lines 1 and 2; keep one of them"),
    (GOOD + "3: 1", "line 7: the key 3 is not text; put it in quotes"),
    (GOOD + "?\n: 1", "line 7: the key None is not text; put it in quotes"),
    (GOOD + "? [a]\n: 1", "line 7: the key ['a'] is not text; put it in quotes"),
    (GOOD + f"? [{LONG}]\n: 1", f"line 7: the key ['{LONG[:58]} is not text; put it in quotes"),
    # a whole number
    (with_param("hidden_dim", "'32'"), f"{DIM} '32', {DIM_MUST}; write 32"),
    (with_param("hidden_dim", "32.0"), f"{DIM} 32.0, {DIM_MUST}; write 32"),
    (with_param("hidden_dim", "32.5"), f"{DIM} 32.5, {DIM_MUST}"),
    (with_param("hidden_dim", "'0'"), f"{DIM} '0', {DIM_MUST}"),
    (with_param("hidden_dim", "'٣٢'"), f"{DIM} '٣٢', {DIM_MUST}"),
    (with_param("hidden_dim", "٣٢"), f"{DIM} '٣٢', {DIM_MUST}"),
    (with_param("hidden_dim", "true"), f"{DIM} True, {DIM_MUST}"),
    (with_param("hidden_dim", "yes"), f"{DIM} 'yes', {DIM_MUST}"),
    (with_param("hidden_dim", ""), f"{DIM} None, {DIM_MUST}"),
    (with_param("hidden_dim", "[32]"), f"{DIM} [32], {DIM_MUST}"),
    (with_param("hidden_dim", "{a: 1}"), f"{DIM} {{'a': 1}}, {DIM_MUST}"),
    (with_param("hidden_dim", "0"), f"{DIM} 0, {DIM_MUST}"),
    (with_param("hidden_dim", "8193"), f"{DIM} 8193, {DIM_MUST}"),
    (with_param("hidden_dim", "-" + "9" * 100), f"{DIM} -{'9' * 59}, {DIM_MUST}"),
    (with_param("hidden_dim", "|\n    32"), f"{DIM} '32\\n', {DIM_MUST}"),
    (with_param("hidden_dim", LONG), f"{DIM} '{LONG[:59]}, {DIM_MUST}"),
    (with_param("hidden_dim", '"\\e\\ud800"'), rf"{DIM} '\x1b\ud800', {DIM_MUST}"),
    # a number
    (with_param("learning_rate", "1e-7"), f"{RATE} 1e-07, {RATE_MUST}"),
    (with_param("learning_rate", "-0.1"), f"{RATE} -0.1, {RATE_MUST}"),
    (with_param("learning_rate", "101"), f"{RATE} 101, {RATE_MUST}"),
    (with_param("learning_rate", "'0.2'"), f"{RATE} '0.2', {RATE_MUST}; write 0.2"),
    (with_param("learning_rate", ".5e1"), not_plain(5, ".5e1")),
    (with_param("learning_rate", "'+.5'"), f"{RATE} '+.5', {RATE_MUST}"),
    (with_param("learning_rate", "high"), f"{RATE} 'high', {RATE_MUST}"),
    (with_param("learning_rate", "nan"), f"{RATE} 'nan', {RATE_MUST}"),
    (with_param("learning_rate", "true"), f"{RATE} True, {RATE_MUST}"),
    # a word
    (with_param("device", "tpu"), "train.device is 'tpu', must be cpu or gpu"),
    (with_param("device", "1"), "train.device is 1, must be cpu or gpu"),
    (with_param("device", "[cpu]"), "train.device is ['cpu'], must be cpu or gpu"),
    (with_param("device", '"\\ud800"'), r"train.device is '\ud800', must be cpu or gpu"),
    # what is a number or a date to some
    *[
        (with_param("hidden_dim", text), not_plain(4, text))
        for text in (
            *("040", "-010", "00", "0x20", "0b11", "0o40", "1_000", "1_000.5", "._5", "+.5e1"),
            *("1:30", "12:30:45", "1.2.3", "3d", "2020-01", "0x", "0o8", "1,5", "1e5x", "1.5e"),
            *(".nan", "-.inf", "+.INF", "2020-01-02", "2020-13-45", "2020-01-02 03:04:05"),
        )
    ],
    (with_param("device", "2020-01-02 \n\n    x"), not_plain(6, r"2020-01-02\nx")),
    (
        with_param("hidden_dim", "9" * 5000),
        f"line 4: {'9' * 60} is too large a number; write a smaller one",
    ),
    (
        with_param("learning_rate", "1e999"),
        "line 5: 1e999 is too large a number; write a smaller one",
    ),
    # what is more than plain YAML
    ("a: &a [x]\nb: *a", "line 2: *a is an alias; write the value itself"),
    (f"a: *{LONG}", f"line 1: *{LONG[:60]} is an alias; write the value itself"),
    ("a: &a {x: 1}\nb: {<<: *a}", "line 2: << merges mappings; write the keys themselves"),
    (GOOD + "  <<: {device: gpu}", "line 7: << merges mappings; write the keys themselves"),
    *[
        (with_param("device", text), "line 6: has a tag (!); write the value without it")
        for text in (
            *(
                "!!bool abc",
                "!!timestamp abc",
                "!!float abc",
                "!!int '3'",
                "! 3",
                "!cpu",
                "!!set {}",
            ),
            "!!python/object/apply:os.mkdir [executed]",
        )
    ],
    ("!!str a: 1", "line 1: has a tag (!); write the value without it"),
    ("%YAML 1.1\n---\n" + GOOD, "line 1: has a directive (%); remove it"),
    ("%TAG ! !\n---\n" + GOOD, "line 1: has a directive (%); remove it"),
    (f"{GOOD}---\n{GOOD}", "line 7: begins a second document; keep one"),
    ("[" * 9999, f"line 1: has more than {MAX_DEPTH} levels; write fewer"),
    ("a:\n - " + "- " * 9999, f"line 2: has more than {MAX_DEPTH} levels; write fewer"),
    ("? " * 9999, f"line 1: has more than {MAX_DEPTH} levels; write fewer"),
    # what is no YAML
    ("\na: [", "line 2: expected the node content, but found '<stream end>'"),
    ("a: {x{, \n", "line 1: expected ',' or '}', but got '{'"),
    ("a: 1\n\tb: 2", "line 2: found character '\\t' that cannot start any token"),
    ('a: "\\U00110000"', "line 1: has a number too large for YAML; write a smaller one"),
    ('\na: "\\Uffffffff"', "line 2: has a number too large for YAML; write a smaller one"),
    ("a: 1\nb: \0", "line 2: has a byte or character that YAML refuses; delete it"),
    (b"a: 1\nb: \xff", "line 2: has a byte or character that YAML refuses; delete it"),
    ("a: 1 # \x1b", "line 1: has a byte or character that YAML refuses; delete it"),
    ("# \u2028a: 1", "line 1: has a byte or character that YAML refuses; delete it"),
    ("# \x85a: 1", "line 1: has a byte or character that YAML refuses; delete it"),
    (GOOD.encode("utf-16"), "line 1: has a byte or character that YAML refuses; delete it"),
    (
        "#" * (MAX_SIZE + 1),
        f"has more than {MAX_SIZE:,} bytes, more than params need; cut it down",
    ),
]


@pytest.mark.parametrize(("text", "line"), MISTAKES, ids=[line for _, line in MISTAKES])
def test_mistake(text: str | bytes, line: str, tmp_path: Path) -> None:
    assert error_of(text, Params, tmp_path) == f"params.yaml: {line}"


def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as mistake:
        read_params("train", Params)
    assert str(mistake.value) == "params.yaml: not found; run in the folder that holds it"


OTHER_MISTAKES = [
    ({"flip": 1}, "train.flip is 1, must be true or false; write true"),
    ({"flip": "true"}, "train.flip is 'true', must be true or false; write true"),
    ({"flip": "yes"}, "train.flip is 'yes', must be true or false"),
    ({"name": 3}, "train.name is 3, must be text"),
    ({"rate": "nan"}, "train.rate is 'nan', must be a number"),
    ({"rate": math.nan}, "train.rate is nan, must be a number"),
    ({"rate": -math.inf}, "train.rate is -inf, must be a number"),
    ({"rate": 10**400}, f"train.rate is 1{'0' * 59}, must be a number"),
    ({"steps": "1e2"}, "train.steps is '1e2', must be a whole number; write 100"),
    ({"steps": "9" * 70}, f"train.steps is '{'9' * 59}, must be a whole number"),
    ({"above": 0}, "train.above is 0, must be a number above 0"),
    ({"part": 1}, "train.part is 1, must be a number from 0 below 1"),
    ({"word": ""}, "train.word is '', must be text min_length 1"),
    ({"sizes": [1, "2"]}, "train.sizes is [1, '2'], must be list[int]; write [1,2]"),
    ({"side": 30}, "train.side is 30, must be 28 or 32"),
]


@pytest.mark.parametrize(
    ("value", "line"), OTHER_MISTAKES, ids=[line for _, line in OTHER_MISTAKES]
)
def test_mistake_of_another_type(value: dict[str, Any], line: str) -> None:
    good = {field: getattr(Free(), field) for field in Free.__struct_fields__}
    assert check_section(good, "train", Free) == Free()
    with pytest.raises(ValueError) as mistake:
        check_section(good | value, "train", Free)
    assert str(mistake.value) == line


# To YAML 1.1 half of these are something else.
SAME_AS_DVC = [
    *("yes", "No", "on", "OFF", "y", "true", "True", "TRUE", "false", "False", "FALSE", "tRue"),
    *("", "~", "null", "Null", "NULL", "nULL", "none", "0", "-0", "+1", "12", "1e5", "1E-5"),
    *("1e-05", "+1e+5", "1.", "1.e5", "0.5", ".5", "-.5", "+.5", "5.0e-1", "e5", ".e5"),
    *("nan", "inf", "x1", "a-1", "v1.2"),
    *(".", "..", "_", "+", "<", "a b", "a#b", "a #b", "a:b", "٣٢", "½"),
    *(
        "'1'",
        '"1"',
        '"\\x41\\/\\n"',
        "'it''s'",
        "|\n    1\n",
        ">-\n    a\n    b\n",
        "a\n    b",
        "a\r\n    b",
    ),
    *("[]", "[1, 1.0, a]", "[[1], {a: 1}]", "{a: 1, b: {c: 2}}", "\n    - 1\n    - a: b\n", "&a 1"),
    *('{"a":1}', "{a:1}", "{a}", "[a: 1]", "'<<'", "\xa0", "\ufeff"),
]


@pytest.mark.parametrize("text", SAME_AS_DVC)
def test_the_same_value_as_for_dvc(text: str, tmp_path: Path) -> None:
    ours = read(f"train:\n  value: {text}\n", Anything, tmp_path).value
    assert repr(ours) == repr(load_yaml(tmp_path / "params.yaml")["train"]["value"])


WORD = st.text("0012459.__eE+-xobXOBfFtTzZ:inaINA ")
# No &: PyYAML ends the name of an anchor in front of a character that DVC counts to it.
YAML = st.text("ab:-*!#[]{},?|>'\"%@` \n\r\t0159._eE+~<=\\/\x85\u2028\xa0")


@given(text=st.builds("train:\n  value: {}".format, WORD | YAML) | YAML.map("train: {}".format))
def test_the_same_value_as_for_dvc_or_none(folder: Path, text: str) -> None:
    with refused():
        ours = read(text, Anything, folder).value
        try:
            theirs = load_yaml(folder / "params.yaml")
        except Exception:  # of several kinds, with which DVC ends before it runs a stage
            return
        assert repr(ours) == repr(theirs["train"]["value"])


BOMB = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{f'*{old},' * 9}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@given(data=st.binary() | YAML.map(str.encode) | damaged(GOOD.encode()))
@example(BOMB.encode())
@example(b"train: !!python/object/apply:os.mkdir [executed]")
@example(b"[" * 60_000)
@example(b"a: [" + b"1," * 32_000 + b"]")
@example(b"a: 0x" + b"f" * 60_000)
@example(b"a: " + b"9_" * 30_000 + b"x")
@example(b"\n".join(b"key%d: 1" % number for number in range(5000)))
def test_hostile_bytes(folder: Path, data: bytes) -> None:
    with refused():
        params = read(data, Params, folder)
        assert type(params.hidden_dim) is int
        assert 1 <= params.hidden_dim <= 8192
        assert type(params.learning_rate) is float
        assert 1e-6 <= params.learning_rate <= 100
        assert params.device in ("cpu", "gpu")
    assert not Path("executed").exists()


def test_of_a_huge_file_little_is_read(tmp_path: Path) -> None:
    with (tmp_path / "params.yaml").open("wb") as file:
        file.truncate(100_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="bytes, more than params need"):
        read_params("train", Params, tmp_path / "params.yaml")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@given(values=JSON | st.fixed_dictionaries(dict.fromkeys(Params.__struct_fields__, JSON)))
def test_any_values(values: Any) -> None:
    with refused(ValueError):
        params = check_section(values, "train", Params)
        assert params == Params(**values)


@pytest.mark.parametrize(
    ("stage", "section"),
    [(stage, section) for stage in STAGES for section in STAGES[stage].get("params", ())],
)
def test_the_params_of_this_project(stage: str, section: str) -> None:
    (name,) = re.findall(r"-m (stages\.\w+)", STAGES[stage]["cmd"])
    module = importlib.import_module(name)
    params_class = vars(module)[f"{section.title()}Params"]
    assert isinstance(read_params(section, params_class, ROOT / "params.yaml"), params_class)
