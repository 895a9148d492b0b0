"""What the documents point at is there: links, headings, files, and tests by their names."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from touchline.core.params import SplitParams

ROOT = Path(__file__).parents[1]


def named(*patterns: str) -> list[str]:
    """Files of the repository by their patterns, without those in hidden folders."""
    found = (path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


DOCUMENTS = named("**/*.md")
# Of the folders that hold what the repository ships; what the stages make need not exist.
PATHS = re.compile(r"(?<![\w./-])(?:src|flows|tests|docs|benchmarks)/[\w./-]*\w(?![\w/]*<)")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", without_code(document.read_text()), flags=re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        before = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in found)
        found.append(f"{anchor}-{before}" if before else anchor)
    return set(found)


def links(document: Path) -> Iterator[str]:
    """Where a document's links lead that stay in the repository."""
    text = without_code(document.read_text())
    for target in re.findall(r"\]\(<?([^)>\s]+)>?[^)]*\)|^\[[^]]+\]: *<?([^>\s]+)", text, flags=re.MULTILINE):
        if not re.match(r"[a-z]+:", link := next(filter(None, target))):
            yield link


@cache
def functions_of_tests() -> dict[str, set[str]]:
    """The functions of each module of tests, by its file's name."""
    return {
        path.name: {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        for path in (ROOT / "tests").glob("*.py")
    }


def wrong_links(document: Path) -> list[str]:
    wrong = []
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / unquote(path)).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def wrong_names(text: str) -> list[str]:
    """Files and tests that `text` names and that do not exist."""
    modules = functions_of_tests()
    known = {*modules, *(name.removesuffix(".py") for name in modules)}.union(*modules.values())
    known |= set(SplitParams.model_fields)  # some begin like a test
    pairs = re.findall(r"(\w+\.py)::(test_\w+)", text)
    return [
        *(path for path in PATHS.findall(text) if not (ROOT / path).exists()),
        *(f"{file}::{test}" for file, test in pairs if test not in modules.get(file, ())),
        *(name for name in re.findall(r"\btest_\w+(?:\.py)?", text) if name not in known),
    ]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    assert wrong_links(ROOT / name) == []


@pytest.mark.parametrize("name", [*DOCUMENTS, *named("*.yaml", "*.toml", "Makefile", "Dockerfile")])
def test_every_file_and_every_test_that_is_named_exists(name: str) -> None:
    assert wrong_names((ROOT / name).read_text()) == []


def test_what_leads_nowhere_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "# The `one` & *only*: part\n## Twice\n## Twice\n"
        "[a](#the-one--only-part) [b](#twice-1) [c](a.md#twice) [d](https://example.com/x.md#y)\n"
        "[e](b.md) [f](#twice-2)\n\n```sh\n[g](gone.md)\n```\n[h]: gone.md\n"
    )
    assert wrong_links(document) == ["b.md", "#twice-2", "gone.md"]
    gone = ["src/touchline/gone.py", "test_documents.py::test_gone", "test_gone", "test_no_more"]
    text = "`src/touchline/gone.py`, tests/test_documents.py::test_gone, test_split.py, flows/ and test_no_more"
    assert wrong_names(text) == gone
