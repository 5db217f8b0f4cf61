"""Read the pages of the documentation, and do what they show."""

import ast
import json
import os
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, SAME_BITS, Project

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
METRICS: dict[str, Any] = json.loads((ROOT / "metrics/accuracy.json").read_text())


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


def with_metrics(text: str) -> str:
    """Return the text of a page with the current metrics below each `<!-- metrics: TEMPLATE -->`.

    The template is a format string for a paragraph or a code block.
    """
    accuracies = METRICS["accuracy_of"]
    worst = min(accuracies, key=accuracies.get)
    values = METRICS | {"worst_class": worst, "worst_accuracy": accuracies[worst]}
    return re.sub(
        r"(<!-- metrics: (.*?) -->\n(?:```\n)?).+?\n(?=```\n|\n|\Z)",
        lambda found: f"{found[1]}{found[2].format(**values)}\n",
        text,
        flags=re.DOTALL,
    )


def output_lines(output: str) -> list[str]:
    """Return the lines without progress bars."""
    return [line.rpartition("\r")[2].rstrip() for line in output.splitlines()]


def visible_lines(output: str) -> list[str]:
    """Return the lines without progress bars, without empty lines and with single spaces."""
    lines = [" ".join(line.split()) for line in output_lines(output)]
    return [line for line in lines if line]


def updated_output(shown: str, output: str) -> str:
    """Return what a page should show of an output: all of it, or the lines that differ in numbers.

    Lines are left out only where the page shows "..." so far.
    """
    printed = output_lines(output)
    if "..." not in shown.splitlines():
        return "\n".join(printed).strip("\n") + "\n" if output.strip() else ""
    lines = []
    for line in shown.splitlines():
        pattern = line_pattern(" ".join(line.split()))
        is_current = any(re.fullmatch(pattern, " ".join(other.split())) for other in printed)
        similar = [other for other in printed if without_numbers(other) == without_numbers(line)]
        if not (line in ("", "...") or is_current) and similar:
            line = similar[0]
            printed.remove(line)
        lines.append(f"{line}\n")
    return "".join(lines)


def without_numbers(line: str) -> str:
    """Return a line with single spaces and with 0 in place of each number."""
    return re.sub(r"[-+]?\d[\d.,]*", "0", " ".join(line.split()))


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


def check_consoles(project: Project, text: str, page: Path | None = None) -> None:
    """Run the commands of the `console` blocks. Check that each prints the lines below it.

    A line "..." stands for any lines. Lines may have another order, because the order of files in
    `dvc metrics diff` is random. With `make docs`, first write what is printed into the page.
    """
    consoles = "".join(blocks(text, "console"))
    commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n|\n)*)", consoles, re.MULTILINE)
    assert commands
    for command, shown in commands:
        if command == "source .venv/bin/activate":
            continue  # done for all commands
        output = project.run(*pasted(command))
        if IS_UPDATE and page and difference(shown, output):
            old, shown = shown, updated_output(shown, output)
            text = page.read_text().replace(f"$ {command}\n{old}", f"$ {command}\n{shown}", 1)
            page.write_text(text)
        problem = difference(shown, output)
        assert problem is None, problem
        if command.startswith("dvc queue start"):
            project.wait_for_queue()


def difference(shown: str, output: str) -> str | None:
    """Say which shown line is not printed, or that more is printed and no line is "..."."""
    lines, printed = visible_lines(shown), visible_lines(output)
    for line in lines:
        pattern = line_pattern(line)
        if line != "..." and not any(re.fullmatch(pattern, other) for other in printed):
            return f"{line!r} is missing in {printed}"
    if "..." not in lines and len(printed) != len(lines):
        return f"more is printed: {printed}"
    return None


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
