"""Every command that the README and docs/ show, run as printed, in a project of its own.

Only what a printed line cannot know is put in its place: a free port, a folder of this machine.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boards
import cv2
import projects
import pytest
from boards import Board, free_ports
from PIL import Image
from ruamel.yaml import YAML
from test_export import EXPORT
from test_serve import ASK, ASK_IN_A_FORM, ASK_OF_SEVERAL, MLFLOW_ASK, MLFLOW_SERVE, SERVE

from touchline.core.params import check
from touchline.core.paths import Paths
from touchline.tracking import registry
from touchline.tracking.registry import CHAMPION
from touchline.tracking.runs import open_store

ROOT = projects.REPOSITORY
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_SERVER = (
    "export PREFECT_API_URL=http://prefect.example.org:4200/api",
    "export PREFECT_API_AUTH_STRING=admin:secret",
    "prefect work-pool create touchline --type process",
    "prefect work-pool set-concurrency-limit touchline 1",
    "prefect deploy --all",
    "TOUCHLINE_PROJECT=$PWD prefect worker start --pool touchline",
)
# Run elsewhere.
NOT_HERE = {
    "make test": "it runs this",
    **dict.fromkeys(
        ("dvc exp apply NAME", "dvc repro --force --single-item register"),
        "test_pipeline.py, where there is an experiment",
    ),
    **dict.fromkeys(
        (SERVE, ASK, ASK_IN_A_FORM, ASK_OF_SEVERAL, MLFLOW_SERVE, MLFLOW_ASK),
        "test_serve.py, which compares the answers",
    ),
    **dict.fromkeys(
        ("touchline serve --record", "touchline serve --record-photos"), "test_served.py, which reads what it keeps"
    ),
    **dict.fromkeys(OWN_SERVER, "test_team.py, which has a Prefect server with a password"),
    "touchline predict rtsp://camera.example/live --seconds 60": "test_video.py, which has a camera on loopback",
    EXPORT: "test_export.py, which asks the exported model",
}
# What runs until Ctrl-C: how to give it other ports than the printed ones, and where it then answers.
SERVERS = {
    "make mlflow": ("make mlflow PORT={5000}", "http://127.0.0.1:{5000}/health"),
    "make board": (
        'make board BOARD="--port {4200} --mlflow-port {5000} --reports-port {8080}"',
        "http://127.0.0.1:{4200}/api/health",
    ),
    'make board BOARD="--port 4201"': (
        'make board BOARD="--port {4201} --mlflow-port {5000} --reports-port {8080}"',
        "http://127.0.0.1:{4201}/api/health",
    ),
    "make app": ('make app APP="--port {7860}"', "http://127.0.0.1:{7860}/"),
}
PORTS = ("4200", "4201", "5000", "7860", "8080")


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def lines(block: str) -> list[str]:
    """The commands of an `sh` block, without comments."""
    found = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in found if line]


def blocks_to_run() -> Iterator[tuple[Path, list[str]]]:
    """Each document's commands by block; what an earlier block has shown is left out of a later one."""
    shown = set(NOT_HERE)
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            if new := [line for line in lines(block) if line not in shown]:
                yield document, new
            shown.update(new)


# Commands that train (test_pipeline.py and test_tune.py do), and boards (see the test of `make board`).
SLOW = ("dvc exp run", "touchline tune", "make board")
COMMANDS = [
    pytest.param(
        commands,
        id=f"{document.name}: {commands[0]}",
        marks=pytest.mark.slow if commands[0].startswith(SLOW) else (),
    )
    for document, commands in blocks_to_run()
]
# One command and no more of a shell, that would start TensorFlow or MLflow: this process has them.
HERE = re.compile(r"touchline (?:predict|suggest|drift|export|audit|clean|promote|rollback|registry)\b[^|&;<>$]*")
SETTINGS = [
    pytest.param(block, id=f"{document.name} {number}")
    for document in DOCUMENTS
    for number, block in enumerate(blocks(document, "yaml"))
]


def with_settings(values: dict[str, Any], block: str) -> dict[str, Any]:
    """params.yaml's values with those that a document's block shows."""

    def merge(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        return {**old, **{key: merge(old.get(key), value) for key, value in new.items()}}

    return merge(values, YAML(typ="safe").load(block))


def as_cloned(project: projects.Project) -> projects.Project:
    """The project with what a clone has and `projects` leaves out; its `.venv` is the environment of these tests."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "README.md"):
        shutil.copyfile(ROOT / name, project.root / name)
    venv = project.root / ".venv"
    venv.mkdir()
    for there in Path(sys.prefix).iterdir():
        if there.name != ".installed":
            (venv / there.name).symlink_to(there)
    (venv / ".installed").touch()
    project.commit("as cloned")
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> projects.Project:
    """A project that has run, with two versions in its store, an album beside its photos, and a clip."""
    root = tmp_path_factory.mktemp("readme") / "the project"
    made = as_cloned(projects.copy(projects.built(tmp_path_factory).project, root))
    store = open_store(Paths(root, root), projects.REGISTERED)
    first = registry.alias(store, projects.REGISTERED, CHAMPION)
    registry.promote(
        store,
        projects.REGISTERED,
        registry.register(store, projects.REGISTERED, first.run_id, first.tags, "the same again"),
    )
    album = root / "album"
    album.mkdir()
    for photo in [path for path in projects.accepted(made, "rugby") if path.suffix == ".jpg"][:3]:
        shutil.copyfile(photo, album / photo.name)
        shutil.copyfile(photo, root / "photo.jpg")
    clip = cv2.VideoWriter(str(root / "match.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 2, (96, 96))
    for _ in range(4):
        clip.write(cv2.resize(cv2.imread(str(root / "photo.jpg")), (96, 96)))
    clip.release()
    # One that has no label yet.
    Image.effect_noise((200, 150), 90).convert("RGB").save(album / "new.jpg")
    return made


@contextmanager
def running(project: projects.Project, command: str, address: str) -> Iterator[None]:
    """A program that runs until Ctrl-C, from when it answers."""
    with subprocess.Popen(
        ["bash", "-c", command], cwd=project.root, env=project.environment(), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            for _ in range(300):
                assert process.poll() is None, process.stdout.read()
                try:
                    urllib.request.urlopen(address, timeout=10).close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                raise AssertionError(f"{address} does not answer")
            yield
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=120)
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=10)


@pytest.mark.parametrize("commands", COMMANDS)
def test_the_commands_work_as_printed(commands, project):
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    here = {
        **{f"127.0.0.1:{printed}": f"127.0.0.1:{free}" for printed, free in ports.items()},
        "/path/or/s3://bucket": f"'{project.root.parent}/remote'",
        # What `make setup` makes is there: these tests run in it.
        "make setup": f"ln -s '{project.root}/.venv' .venv",
    }
    with ExitStack() as servers:
        for line in commands:
            if line in SERVERS:
                command, address = (re.sub(r"\{(\d+)\}", lambda found: ports[found[1]], each) for each in SERVERS[line])
                # The one before has ended: of a block only the last is asked by the lines that follow.
                servers.close()
                servers.enter_context(running(project, command, address))
                continue
            for printed, ours in here.items():
                line = line.replace(printed, ours)  # noqa: PLW2901 - what stays of it is what is printed
            if HERE.fullmatch(line):
                project.call(*shlex.split(line)[1:])
            else:
                project.run("bash", "-ec", line)


def test_make_board_is_what_the_tests_of_the_board_start(project):
    board = Board(project)
    options = shlex.join(boards.options(board.ports))
    *_, sync, command = project.run(
        "make", "--dry-run", "--no-print-directory", "board", f"BOARD={options}"
    ).splitlines()
    assert shlex.split(command) == ["python", *board.command()[1:]]
    # Which `make mlflow` runs here for real.
    assert sync in project.run("make", "--dry-run", "--no-print-directory", "mlflow").splitlines()


def test_what_is_run_elsewhere_is_printed_there():
    printed = {line for document in DOCUMENTS for block in blocks(document, "sh") for line in lines(block)}
    assert set(NOT_HERE) <= printed


def test_the_champion_loads_as_printed(project):
    block = next(block for block in blocks(ROOT / "README.md", "python") if "load_model" in block)
    *lines, last = block.strip().splitlines()
    # -S leaves out site-packages' .pth files, by which an editable install would bring touchline in.
    there = [path for path in sys.path if path.endswith("site-packages")]
    without = (
        f"import sys; sys.path += {there!r}\nfrom importlib import util\nassert util.find_spec('touchline') is None"
    )
    script = "\n".join([without, *lines, f"print(({last.partition('#')[0]}).shape)"])
    said = project.run(sys.executable, "-S", "-c", script, PYTHONPATH="")
    assert said.splitlines()[-1] == "(1, 2)"


@pytest.mark.parametrize("block", SETTINGS)
def test_the_settings_are_accepted(block, shipped):
    check(with_settings(shipped, block))


@pytest.mark.slow
def test_classes_of_ones_own_are_told_apart_as_the_readme_says(tmp_path, project):
    own = projects.make(tmp_path / "own")
    for name, drawn in (("cat", "rugby"), ("dog", "soccer")):
        shutil.copytree(project.root / "data/photos" / drawn, own.root / "data/incoming" / name)
    file = own.root / "params.yaml"
    settings = next(block for block in blocks(ROOT / "README.md", "yaml") if "cat" in block)
    with file.open("w") as out:
        YAML().dump(with_settings(YAML(typ="safe").load(projects.REPOSITORY / "params.yaml"), settings), out)
    own.change(projects.SMALL)
    own.dvc("repro")
    assert own.json("models/transfer.json")["classes"] == ["cat", "dog"]
    [first] = registry.versions(open_store(Paths(own.root, own.root), "cat-dog"), "cat-dog")
    assert CHAMPION in first.aliases
