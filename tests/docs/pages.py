"""Read the pages of the documentation, and do what they show."""

import ast
import os
import re
import shutil
import textwrap
from pathlib import Path

from tests.conftest import ROOT, SAME_BITS, Project

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]


# `make docs` sets this: the tests then write what they would otherwise compare.
IS_UPDATE = "UPDATE_DOCS" in os.environ


def check_or_update(page: Path, text: str) -> None:
    """Check that the page has this text. With `make docs`, write it instead."""
    if IS_UPDATE and page.read_text() != text:
        page.write_text(text)
    assert page.read_text() == text


def introduction(page: Path) -> str:
    """Return the text above the first section."""
    return page.read_text().partition("\n## ")[0]


def section(page: Path, title: str) -> str:
    """Return the text below the heading `title`, up to the next heading of its level."""
    pattern = rf"^(#+ ){re.escape(title)}\n(.*?)(?=^\1|\Z)"
    found = re.search(pattern, page.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {title}"
    return found[2]


def blocks(text: str, language: str) -> list[str]:
    """Return the content of each code block in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def extract(file: str, name: str) -> str:
    """Return the source of a function or a class without its docstring."""
    source = (ROOT / file).read_text()
    (node,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
    ]
    lines = source.splitlines()
    assert node.end_lineno
    kept = set(range(node.lineno, node.end_lineno + 1))
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
            docstring = inner.body[0]
            last = docstring.end_lineno or docstring.lineno
            is_followed_by_empty_line = not lines[last].strip()
            kept -= set(range(docstring.lineno, last + 1 + is_followed_by_empty_line))
    return textwrap.dedent("".join(f"{lines[number - 1]}\n" for number in sorted(kept)))


def with_extracts(text: str) -> str:
    """Return the text of a page with the current code below each `<!-- extract: FILE NAME -->`."""

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}{extract(found[2], found[3])}```\n"

    pattern = r"(<!-- extract: (\S+) (\S+) -->\n+```python\n)(?:.*?\n)??```\n"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


def check_states(text: str, *parts: str) -> None:
    """Check that whole words or numbers occur in this order, wherever lines break."""
    pattern = r"\b.*\b".join(re.escape(part).replace(r"\ ", r"\s+") for part in parts)
    assert re.search(rf"\b{pattern}\b", text, re.DOTALL), parts


def visible_lines(output: str) -> list[str]:
    """Return the lines without progress bars, without empty lines and with single spaces."""
    lines = [" ".join(line.rpartition("\r")[2].split()) for line in output.splitlines()]
    return [line for line in lines if line]


def line_pattern(line: str) -> str:
    """Return a regular expression for a line of a page, in which "..." stands for any text."""
    pattern = re.escape(line).replace(r"\.\.\.", ".*")
    return pattern if SAME_BITS else re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", pattern)


def pasted(command: str) -> tuple[str, ...]:
    """Return what runs a command as if it was pasted into zsh, the shell of macOS, or into bash.

    An interactive zsh takes "#" for a word, and a pattern without a match for an error.
    """
    if shutil.which("zsh"):
        paste = 'printf "%s\\n" "$1" | PS1= zsh -f -i +o prompt_sp'
        return "sh", "-c", paste, "sh", command
    return "bash", "-c", command


def check_consoles(project: Project, text: str) -> None:
    """Run the commands of the `console` blocks. Check that each prints the lines below it.

    A line "..." stands for any lines. Lines may have another order, because the order of files in
    `dvc metrics diff` is random.
    """
    consoles = "".join(blocks(text, "console"))
    commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", consoles, re.MULTILINE)
    assert commands
    for command, output in commands:
        if command == "source .venv/bin/activate":
            continue  # done for all commands
        printed, shown = visible_lines(project.run(*pasted(command))), visible_lines(output)
        for line in shown:
            pattern = line_pattern(line)
            assert line == "..." or any(re.fullmatch(pattern, other) for other in printed), (
                f"{line!r} is missing in {printed}"
            )
        assert "..." in shown or len(printed) == len(shown), printed
        if command.startswith("dvc queue start"):
            project.wait_for_queue()


def follow(project: Project, text: str, before: str = "") -> None:
    """Do what the code blocks of a recipe show, in their order.

    Shell commands are run, and diffs are applied. Python code is saved if its first line is a
    comment with a file name, and else run after the lines `before`.
    """
    pattern = r"^```(sh|diff|python)\n(.*?)^```$"
    for language, content in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
        file = re.match(r"# (\w+/\w+\.py)\n", content)
        if language == "sh":
            project.run("bash", "-euc", content)
        elif language == "diff":
            (project.root / ".git/recipe.diff").write_text(content)
            project.run("git", "apply", ".git/recipe.diff")
        elif file:
            (project.root / file[1]).write_text(content)
        else:
            project.run("python", "-c", before + content)
