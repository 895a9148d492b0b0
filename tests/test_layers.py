"""The folders of src/touchline are layers: each imports only those below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src/touchline"
FLOWS = Path(__file__).parents[1] / "flows"

# From the ground up. Folders of one layer do not import each other.
LAYERS = (
    {"core"}, {"data", "tracking"}, {"sources", "models"}, {"report"}, {"stages"}, {"commands"}, {"cli"},
)  # fmt: skip
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}


def imported_rooms(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and folder (or module, for `cli`) of each import of this package, inside functions too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                found = [f"{module}.{alias.name}" for alias in names]
            case _:
                continue
        yield from ((node.lineno, name.split(".")[1]) for name in found if name.startswith("touchline."))


def upward(code: str, room: str) -> list[tuple[int, str]]:
    """The imports in the code of a module of `room` that its layer does not allow."""
    return [
        (line, other)
        for line, other in imported_rooms(ast.parse(code))
        if other != room and HEIGHT[other] >= HEIGHT[room]
    ]


def test_every_module_lies_in_a_layer() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms - {"__init__"} == set(HEIGHT)


def test_no_import_runs_upward() -> None:
    wrong = {
        path.relative_to(PACKAGE).as_posix(): found
        for path in PACKAGE.rglob("*.py")
        if path.parent != PACKAGE or path.stem != "__init__"
        if (found := upward(path.read_text(), path.relative_to(PACKAGE).parts[0].removesuffix(".py")))
    }
    assert wrong == {}


def test_flows_use_stages_and_what_lies_below() -> None:
    wrong = {
        path.name: found
        for path in FLOWS.glob("*.py")
        if (found := [(line, room) for line, room in imported_rooms(ast.parse(path.read_text())) if HEIGHT[room] > 4])
    }
    assert wrong == {}


def test_an_import_that_runs_upward_is_found() -> None:
    code = (
        "from touchline.core import files\ndef later():\n    from touchline.stages.split import run\n"
        "import touchline.models.heads\n"
    )
    assert sorted(upward(code, "data")) == sorted(upward(code, "sources")) == [(3, "stages"), (4, "models")]
    assert upward(code, "stages") == []
