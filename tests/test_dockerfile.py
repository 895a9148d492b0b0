"""The Dockerfile, which nothing here builds: what it copies and runs exists, what is private stays out."""

import json
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import typer

from touchline.cli import app

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs/housekeeping.md"


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in lines) if name]


def arguments(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file out: the last pattern that names it, or a folder above it, decides."""
    ignored = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, kept = line.removeprefix("!"), line.startswith("!")
        parts = path.split("/")
        heads = ["/".join(parts[: length + 1]) for length in range(len(parts))]
        if pattern.startswith("**/"):
            matches = any(fnmatchcase(part, pattern.removeprefix("**/")) for part in parts)
        else:
            matches = any(head.count("/") == pattern.count("/") and fnmatchcase(head, pattern) for head in heads)
        if matches:
            ignored = not kept
    return ignored


def copied() -> list[str]:
    return [word for rest in arguments("COPY") for word in rest.split()[:-1] if not word.startswith("--")]


def shipped_files(source: str) -> list[str]:
    """Files of a COPY source that reach the builder."""
    place = REPOSITORY / source
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    names = [path.relative_to(REPOSITORY).as_posix() for path in files]
    return [name for name in names if not is_ignored(name)]


@pytest.mark.parametrize("source", copied())
def test_what_is_copied_is_there_and_is_not_ignored(source: str) -> None:
    assert (REPOSITORY / source).exists()
    assert shipped_files(source)


def test_the_image_gets_all_that_the_pipeline_reads() -> None:
    there = {file for source in copied() for file in shipped_files(source)}
    code = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "src/touchline").rglob("*.[phy]*[yl]")}
    needed = {
        "Makefile", "pyproject.toml", "requirements.lock", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md",
        "dvc.yaml", "params.yaml", "prefect.yaml", ".dvcignore", ".dvc/config", ".dvc/plots/roc.json",
        "data/README.md", "data/decisions.csv", "data/forgotten.csv", "data/incoming/README.md", "mlflow/README.md",
        "flows/pipeline.py",
        "src/touchline/report/templates/report.html", "src/touchline/commands/presets/fast.yaml",
    }  # fmt: skip
    assert needed <= there
    assert {file for file in code if "__pycache__" not in file} <= there


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".venv/bin/python", ".env", "kaggle.json", ".dvc/cache/files/md5/ab/cdef", ".dvc/config.local",
        ".dvc/tmp/lock", "data/photos/rugby/0123.jpg", "data/photos.csv", "data/incoming/rugby/mine.jpg",
        "data/imagenet/n00470966.tar", "data/openimages/labels.csv", "data/feedback/0123.jpg", "data/features/x/0.npy",
        "mlflow/mlflow.db", "mlflow/artifacts/1/model.keras", "models/cnn.keras", "reports/report.html",
        ".prefect/prefect.db", "src/touchline/__pycache__/cli.pyc", "src/.partial-1-0", "flows/__pycache__/a.pyc",
    ],
)  # fmt: skip
def test_photos_stores_caches_and_secrets_stay_out(path: str) -> None:
    assert is_ignored(path)


def test_what_it_runs_exists() -> None:
    shell = [rest for rest in arguments("RUN") if not rest.startswith("[")]
    run = [json.loads(rest) for rest in arguments("CMD")]
    run += [json.loads(rest.partition("CMD ")[2]) for rest in arguments("HEALTHCHECK")]
    run += [shlex.split(command) for rest in shell for command in rest.split("&&")]
    text = DOCS.read_text()
    run += [shlex.split(line) for line in re.findall(r"^(touchline .*?)(?:  #.*)?$", text, flags=re.MULTILINE)]
    run += [quoted.split() for quoted in re.findall(r"`(make \w+)`", text)]
    assert [command for command in run if command[0] == "touchline"]
    check_exists(run)


def check_exists(run: list[list[str]]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    known = typer.main.get_command(app).commands
    for command in run:
        if command[0] == "make":
            assert set(command[1:]) <= targets
        if command[0] == "touchline":
            options = {option for param in known[command[1]].params for option in param.opts}
            assert {word for word in command[2:] if word.startswith("--")} <= options


def test_a_command_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(AssertionError):
        check_exists([["make", "coffee"]])
    with pytest.raises(KeyError):
        check_exists([["touchline", "coffee"]])


def test_packages_are_installed_as_the_makefile_installs_them() -> None:
    installs = [
        command for command in " && ".join(arguments("RUN")).split("&&") if re.search(r"pip (install|sync)", command)
    ]
    assert installs and all("--require-hashes" in command for command in installs)
    makefile = (REPOSITORY / "Makefile").read_text()
    taken = re.search(r"sed -n '(.*?)' requirements\.lock", arguments("RUN")[1])[1]
    assert taken.replace("$", "$$") in makefile


def test_it_is_nobody_s_root_and_holds_no_secret() -> None:
    names = [name for name, _ in instructions()]
    assert arguments("USER") and "root" not in arguments("USER")
    # Nothing is run or copied after it as root again.
    assert names.index("USER") < names.index("COPY")
    # Not even as an argument: those stay in the image's history.
    assert arguments("ARG") == ["BASE=python:3.11-slim"]
    assert not re.search(r"(?i)(token|password|secret_?key|api_?key)\s*=", (REPOSITORY / "Dockerfile").read_text())


def test_it_begins_from_the_python_of_this_project_and_serve_has_a_health_check() -> None:
    # The digest of the base is for the person who builds to give, and the documentation says how.
    assert arguments("FROM") == ["${BASE} AS installed", "installed AS serve", "installed AS run"]
    assert re.search(r"--build-arg BASE=python:3\.11-slim@sha256:", DOCS.read_text())
    parts = (REPOSITORY / "Dockerfile").read_text().split("\nFROM ")
    (serve,) = [part for part in parts if part.startswith("installed AS serve")]
    assert "HEALTHCHECK" in serve and "/ping" in serve and '"0.0.0.0"' in serve
    # `docker build .` without a target makes the pipeline.
    assert json.loads(arguments("CMD")[-1]) == ["make", "run"]


def test_what_is_to_be_kept_is_a_volume() -> None:
    (volumes,) = [json.loads(rest) for rest in arguments("VOLUME")]
    assert {"/touchline/data", "/touchline/mlflow", "/touchline/.dvc/cache"} <= set(volumes)
    mounted = re.findall(r"-v [\w-]+:(\S+)", DOCS.read_text())
    assert set(mounted) == set(volumes)
