"""That no stage can end in a line that no test has seen."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

TESTS = ROOT / "tests"
# A copy's own stage is checked as soon as it has tests.
CODE = [
    path
    for room in ("stages", "tools")
    for path in (ROOT / room).rglob("*.py")
    if (TESTS / f"test_{path.name}").exists()
]


def texts(tree: ast.AST) -> list[str]:
    """All strings in the code, with "?" for what is put into them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(p.value) if isinstance(p, ast.Constant) else "?" for p in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_every_message_is_in_the_tests_of_its_file(path: Path) -> None:
    known = texts(ast.parse((TESTS / f"test_{path.name}").read_text()))
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            (text,) = texts(node.exc.args[-1])[:1] or [""]
            pattern = ".*".join(map(re.escape, text.removeprefix("?: ").split("?")))
            if not any(re.search(pattern, line) for line in known):
                missing.append(f"{path.name}:{node.lineno}: {text}")
    assert not missing
