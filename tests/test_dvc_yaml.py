"""dvc.yaml against the code: a stage depends on what makes its result, on nothing else, and says what it does."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from dvc.stage import PipelineStage
from ruamel.yaml import YAML

from touchline.cli import STAGES, app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/touchline"
# What runs a stage, but makes none of its result.
PLUMBING = ("cli", "core", "tracking")


@pytest.fixture(scope="module")
def stages() -> dict[str, PipelineStage]:
    """The stages as DVC resolves them: `${...}` filled in, `foreach` spelled out."""
    with Repo(str(ROOT), config={"core": {"no_scm": True}}) as repo:
        return {stage.addressing: stage for stage in repo.index.stages}


def syntax(module: str) -> ast.Module:
    """The module of this package called `photos`, `sources` or `sources.folder`."""
    path = PACKAGE / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that `tree` imports, at its top or inside its functions."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                full = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                full = [module, *(f"{module}.{alias.name}" for alias in names)]
            case ast.ImportFrom():
                raise AssertionError(f"line {node.lineno}: imports here are absolute")
            case _:
                continue
        for name in full:
            inside = name.removeprefix("touchline.")
            path = PACKAGE / inside.replace(".", "/")
            if inside != name and (path.is_dir() or path.with_suffix(".py").is_file()):
                yield inside


def reached(module: str) -> set[str]:
    """`module` and what it imports from this package, whatever lies between."""
    found, waiting = set(), {module}
    while waiting:
        found.add(name := waiting.pop())
        waiting |= set(imported(syntax(name))) - found
    return found


def templates(module: str) -> set[str]:
    """The templates that `module` names."""
    texts = {node.value for node in ast.walk(syntax(module)) if isinstance(node, ast.Constant)}
    return {path.name for path in (PACKAGE / "report/templates").iterdir() if path.name in texts}


def made_of(module: str) -> set[str]:
    """Paths of the code that makes the result of a stage."""
    modules = {name for name in reached(module) if name.split(".")[0] not in PLUMBING}
    # Any source may give a photo; the `__init__.py` of the other folders holds nothing but a sentence.
    paths = {
        "sources" if name.split(".")[0] == "sources" else f"{name.replace('.', '/')}.py"
        for name in modules
        if name == "sources" or not (PACKAGE / name.replace(".", "/")).is_dir()
    }
    paths |= {f"report/templates/{template}" for name in modules for template in templates(name)}
    return {f"src/touchline/{path}" for path in paths}


def stage_modules() -> dict[str, str]:
    """The module that each command of the command line runs as a stage: `{"split": "splitting", ...}`."""
    return {stage: module.removeprefix("touchline.") for stage, module in STAGES.items()}


def command(stage: PipelineStage) -> list[str]:
    program, *words = stage.cmd.split()
    assert program == "touchline", f"dvc.yaml: {stage.addressing} runs '{program}', not touchline"
    return words


def test_imports_are_found_wherever_they_stand() -> None:
    tree = ast.parse(
        "import numpy\nfrom touchline.data import photos\nimport touchline.data.feature_store\n"
        "def later():\n    from touchline.core import errors\n    from touchline.sources.folder import candidates\n"
    )
    assert set(imported(tree)) == {
        "data", "data.photos", "data.feature_store", "core", "core.errors", "sources.folder",
    }  # fmt: skip


def test_a_stage_depends_on_the_code_that_makes_its_result_and_on_no_other(stages: dict[str, PipelineStage]) -> None:
    modules = stage_modules()
    differences = []
    for name, stage in stages.items():
        needed = made_of(modules[command(stage)[0]])
        named = {path for dep in stage.deps if (path := Path(dep.def_path).as_posix()).startswith("src/")}
        differences += [f"{name}: missing {path}" for path in sorted(needed - named)]
        differences += [f"{name}: too many {path}" for path in sorted(named - needed)]
    assert not differences, "deps in dvc.yaml differ from the imports:\n  " + "\n  ".join(differences)


# Which sides of a character of a drawing are joined.
SIDES = {
    "─": "lr", "│": "ud", "┌": "rd", "┐": "ld", "└": "ru", "┘": "lu", "├": "rud", "┤": "lud", "┬": "lrd", "┴": "lru",
    "┼": "lrud", "▶": "l", "▲": "d", "▼": "u",
}  # fmt: skip
STEPS = {"l": (0, -1), "r": (0, 1), "u": (-1, 0), "d": (1, 0)}
BACK = {"l": "r", "r": "l", "u": "d", "d": "u"}
POINTS_AT = {"▶": (0, 2), "▲": (-1, 0), "▼": (1, 0)}


def drawn(picture: str) -> set[tuple[str, str]]:
    """The arrows of a picture, from and to: a line leaves a name at its right, and may end at several."""
    lines = picture.splitlines()
    characters = {(row, column): sign for row, line in enumerate(lines) for column, sign in enumerate(line)}
    words = [(row, word) for row, line in enumerate(lines) for word in re.finditer(r"[\w@]+", line)]
    word_at = {(row, column): word[0] for row, word in words for column in range(*word.span())}
    arrows = set()
    for row, word in words:
        seen, waiting = set(), {(row, word.end() + 1)}
        while waiting:
            seen.add(place := waiting.pop())
            sign = characters.get(place, " ")
            if sign in POINTS_AT:
                down, right = POINTS_AT[sign]
                arrows.add((word[0], word_at[place[0] + down, place[1] + right]))
            for side in SIDES.get(sign, ""):
                beside = (place[0] + STEPS[side][0], place[1] + STEPS[side][1])
                if BACK[side] in SIDES.get(characters.get(beside, " "), "") and beside not in seen:
                    waiting.add(beside)
    return arrows


def test_a_picture_is_followed_along_its_lines() -> None:
    picture = """
    a ─┬▶ b ─┐
       │     ├▶ d
       └▶ c ─┤
             ▼
             e
    """
    assert drawn(picture) == {("a", "b"), ("a", "c"), ("b", "d"), ("b", "e"), ("c", "d"), ("c", "e")}


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_the_picture_of_the_stages_is_dvcs_graph(stages: dict[str, PipelineStage], document: str) -> None:
    [picture] = [block for block in (ROOT / document).read_text().split("```") if "▶ register" in block]
    graph = stages["register"].repo.index.graph
    # DVC's edges lead from a stage to what it needs.
    assert drawn(picture) == {(needed.addressing, stage.addressing) for stage, needed in graph.edges}


def test_a_change_to_what_may_be_shown_draws_the_figures_anew(stages: dict[str, PipelineStage]) -> None:
    for name in ("validate", "evaluate", "register"):
        used = {key for dep in stages[name].deps if isinstance(dep, ParamsDependency) for key in dep.params}
        assert {"rights.show", "rights.unknown"} <= used, f"params of {name} in dvc.yaml"


def test_every_stage_says_what_it_does(stages: dict[str, PipelineStage]) -> None:
    assert [name for name, stage in stages.items() if not stage.desc] == []


def test_every_stage_runs_a_command_that_exists(stages: dict[str, PipelineStage]) -> None:
    known = typer.main.get_command(app).commands
    for name, stage in stages.items():
        verb, *arguments = command(stage)
        assert verb in known, f"{name}: there is no `touchline {verb}`"
        takes = [parameter for parameter in known[verb].params if parameter.param_type_name == "argument"]
        assert len(arguments) == len(takes), f"{name}: `{stage.cmd}` takes {len(takes)} words"


def test_every_param_is_a_dependency_of_some_stage_but_those_that_change_no_result(
    stages: dict[str, PipelineStage],
) -> None:
    used = {
        key
        for stage in stages.values()
        for dep in stage.deps
        if isinstance(dep, ParamsDependency)
        for key in dep.params
    }

    def keys(value: object, prefix: str = "") -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from keys(inner, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix

    shipped = list(keys(YAML(typ="safe").load((ROOT / "params.yaml").read_text())))
    parts = {key: {".".join(key.split(".")[:length]) for length in range(1, key.count(".") + 2)} for key in shipped}
    # What is said of photos after all stages, and where the work is done, must make none of them run again.
    loose = {key.split(".")[0] for key in shipped if not parts[key] & used}
    loose_sections = {"predict", "drift", "monitor", "compute", "rights"}
    assert loose == loose_sections, "sections of params.yaml with a key that no stage depends on"
    assert used - set().union(*parts.values()) == set(), "params in dvc.yaml that params.yaml has not"


def test_the_folder_mlflow_does_not_shadow_the_package() -> None:
    assert list((ROOT / "mlflow").rglob("*.py")) == []
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    script = "import sys, mlflow; print('' in sys.path, mlflow.__file__)"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    root_on_path, _, where = run.stdout.strip().partition(" ")
    assert (run.returncode, root_on_path) == (0, "True"), run.stderr
    assert Path(where).parent.parent.name == "site-packages"
