"""Faults of files, disks, clocks and of other programs: one line that says what to do, and doing it helps.

Kills are in test_pipeline_killed.py, faults of the network in test_ingest_faults.py, hostile bytes in test_fuzz.py.
"""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import projects
import psutil
import pytest
from projects import REGISTERED, REPOSITORY, UP_TO_DATE, Project, built, copy, ran, versions
from ruamel.yaml import YAML
from test_pipeline_killed import unmake

from touchline.core.paths import Paths
from touchline.tracking import runs

EVERY = "TOUCHLINE_FAULTS" in os.environ  # else only those that cost little
Record = Callable[[str, Any], None]

TORN = {
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "text": lambda content: b"no such thing, {[\n" * 3,
    "empty": lambda content: b"",
    "binary": lambda content: bytes(range(256)) * 4,
}
# What each command reads of what another wrote.
READ = {
    "ingest": ("data/ledger.csv",),
    "validate": ("data/photos.csv", "data/ledger.csv"),
    "split": ("data/validated.csv",),
    "features pixels": ("data/validated.csv",),
    "train transfer": ("data/split.csv", "data/features/pooled/*.npy", "data/features/pooled/*.txt"),
    "evaluate": (
        "data/split.csv", "models/cnn.keras", "models/cnn.json", "reports/history/cnn.csv",
    ),
    "register": (
        "reports/metrics.json", "reports/evaluation.json", "models/cnn.json", "data/split.csv",
        "reports/predictions.csv", "reports/per_class.csv", "reports/curves.csv", "reports/gallery.csv",
        "reports/heats.npz",
    ),
    "summary": ("reports/metrics.json", "reports/registration.json", "models/cnn.json"),
    "registry sync": ("reports/metrics.json", "reports/registration.json"),
}  # fmt: skip
# A person's own word, and params: nothing can make them again, so the line says what is wrong.
OWN = {"ingest": "params.yaml", "validate": "data/decisions.csv"}


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return built(tmp_path_factory).project


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy(built(tmp_path_factory).project, tmp_path_factory.mktemp("torn") / "the project")


@pytest.fixture
def project(tmp_path: Path, undisturbed: Project) -> Project:
    """One that a test may do with as it likes."""
    return copy(undisturbed, tmp_path / "the project")


def digests(project: Project) -> dict[str, str]:
    """Of every file that a stage makes or a person wrote."""
    folders = [path for name in ("data", "models", "reports") for path in (project.root / name).rglob("*")]
    files = [*folders, *(project.root / name for name in ("params.yaml", "dvc.lock"))]
    return {
        str(path.relative_to(project.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def inputs(project: Project, command: str) -> dict[str, str]:
    """The same without the reports of a validation, which has written them when it comes to the ledger."""
    found = digests(project)
    return {name: digest for name, digest in found.items() if command != "validate" or not name.startswith("reports/")}


def told(project: Project, command: str, exit_code: int = 1) -> str:
    """The one line in which a command fails."""
    return one_line(project.call(*command.split(), exit_code=exit_code).err)


def one_line(output: str) -> str:
    """The line in which a command failed, out of all that it and DVC printed."""
    assert "Traceback" not in output, output
    [line] = [line for line in output.splitlines() if line.startswith("touchline: ")]
    return line


@pytest.mark.parametrize("command", READ)
def test_a_torn_file_is_one_line_that_names_it_and_nothing_is_overwritten(
    torn: Project, command: str, record_property: Record
) -> None:
    count = 0
    for number, pattern in enumerate(READ[command]):
        path = next(torn.root.glob(pattern))
        whole = path.read_bytes()
        # Each file is torn in one way, the next one in another; `make faults` tears each in every way.
        for kind in TORN if EVERY else [list(TORN)[number % len(TORN)]]:
            path.write_bytes(TORN[kind](whole))
            before = inputs(torn, command)
            line = told(torn, command)
            assert path.name in line or path.parent.name in line, (pattern, kind)
            assert "dvc repro" in line, (pattern, kind)
            assert inputs(torn, command) == before, (pattern, kind)
            count += 1
        path.write_bytes(whole)
    record_property("fault", f"torn file: {count} of `touchline {command}`, one line each, nothing overwritten")


@pytest.mark.parametrize("command", [name for name in READ if name not in ("ingest", "registry sync")])
def test_a_deleted_file_is_one_line_that_says_what_makes_it(torn: Project, command: str) -> None:
    for pattern in READ[command]:
        path = next(torn.root.glob(pattern))
        if path.name == "ledger.csv":  # without it nothing was ever rejected
            continue
        aside = path.rename(torn.root.parent / path.name)
        line = told(torn, command)
        assert path.name in line or path.parent.name in line
        assert "dvc repro" in line
        aside.rename(path)


def test_models_of_another_split_and_records_that_were_not_evaluated_are_refused(torn: Project) -> None:
    split, record = torn.root / "data/split.csv", torn.root / "models/cnn.json"
    for path, old, new, commands in (
        (split, b",test,", b",train,", ("evaluate", "register")),
        (record, b'"description": "', b'"description": "Another. ', ("register",)),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(old, new, 1))
        assert path.read_bytes() != whole
        before = digests(torn)
        for command in commands:
            line = told(torn, command)
            assert str(path) in line and "dvc repro" in line
        assert digests(torn) == before
        path.write_bytes(whole)


@pytest.mark.parametrize(("command", "exit_code"), [("ingest", 2), ("validate", 1)])
def test_what_a_person_wrote_is_never_overwritten(torn: Project, command: str, exit_code: int) -> None:
    path = torn.root / OWN[command]
    whole = path.read_bytes()
    for tear in TORN.values():
        path.write_bytes(tear(whole))
        before = digests(torn)
        line = told(torn, command, exit_code)
        assert line.startswith(f"touchline: {OWN[command]}")
        assert digests(torn) == before
    path.write_bytes(whole)


@pytest.mark.slow
def test_deleting_what_is_torn_and_dvc_repro_bring_all_back(
    project: Project, undisturbed: Project, record_property: Record
) -> None:
    kinds = list(TORN.values())
    names = sorted({path for names in READ.values() for path in names if "*" not in path} - {"data/ledger.csv"})
    for number, name in enumerate(names):
        path = project.root / name
        path.write_bytes(kinds[number % len(kinds)](path.read_bytes()))
        if number % 2:
            path.unlink()  # as the line says; DVC sees what is torn, too
    for pattern in ("data/features/pooled/*.npy", "data/features/pixels/*.txt", "data/photos/*/*"):
        path = next(project.root.glob(pattern))
        path.write_bytes(path.read_bytes()[:-50])
    began = time.monotonic()
    project.dvc("repro")
    seconds = time.monotonic() - began
    assert digests(project) == digests(undisturbed)
    record_property("fault", f"torn file: {len(names) + 3} brought back by one `dvc repro` in {seconds:.0f} s")


@pytest.mark.parametrize("kind", TORN if EVERY else ["text"])
def test_a_torn_dvc_lock_is_told_and_without_it_nothing_is_trained_again(
    project: Project, undisturbed: Project, kind: str, record_property: Record
) -> None:
    file = project.root / "dvc.lock"
    whole = file.read_bytes()
    # Cut between two stages it would be a lock of fewer stages.
    file.write_bytes(whole[: whole.index(b"validate:") + 40] if kind == "truncated" else TORN[kind](whole))
    output = project.dvc("repro", "split", exit_code=None)
    assert "dvc.lock" in output and "Traceback" not in output
    assert ran(output) == []
    file.unlink()
    output = project.dvc("repro")
    # Only what keeps its outputs looks through them; the rest comes out of DVC's run cache.
    assert set(ran(output)) <= {"ingest", "features@pixels", "features@pooled"}
    assert "pooled: 0 computed" in output and digests(project) == digests(undisturbed)
    record_property("fault", f"torn dvc.lock ({kind}): told; `rm dvc.lock; dvc repro` trains nothing again")


def test_a_torn_params_yaml_loses_nothing(project: Project) -> None:
    file = project.root / "params.yaml"
    whole, before = file.read_bytes(), digests(project)
    for tear in TORN.values():
        file.write_bytes(tear(whole))
        output = project.dvc("repro", exit_code=None)
        assert "ERROR" in output and ("params.yaml" in output or "dvc.yaml" in output), output
        assert "Traceback" not in output
    file.write_bytes(whole)
    # Where the half that is left is valid YAML, DVC deletes a stage's outputs before the stage refuses it; they come
    # back without a run.
    assert ran(project.dvc("repro")) == []
    assert digests(project) == before
    assert UP_TO_DATE in project.dvc("repro")


def test_a_lock_file_of_dvcs_that_was_cut_off_is_told_and_may_go(project: Project, record_property: Record) -> None:
    (project.root / ".dvc/tmp").mkdir(exist_ok=True)
    lock = project.root / ".dvc/tmp/rwlock"
    lock.write_text('{"re')
    output = project.dvc("repro", "split", exit_code=None)
    assert ".dvc/tmp/rwlock" in output and "Traceback" not in output
    lock.unlink()
    assert UP_TO_DATE in project.dvc("repro", "split")
    record_property("fault", "torn .dvc/tmp/rwlock: told by DVC, and without it `dvc repro` goes on")


def cached(project: Project, name: str) -> Path:
    """The object in DVC's cache of a file that a stage wrote."""
    stages = YAML(typ="safe").load(project.root / "dvc.lock")["stages"]
    [md5] = [out["md5"] for stage in stages.values() for out in stage["outs"] if out["path"] == name]
    return project.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def test_a_torn_object_of_dvcs_cache_reaches_no_model(
    project: Project, undisturbed: Project, record_property: Record
) -> None:
    torn, table = cached(project, "data/split.csv"), project.root / "data/split.csv"
    torn.chmod(0o644)
    torn.write_bytes(torn.read_bytes()[:500])
    torn.chmod(0o444)  # DVC takes what nobody may write for unchanged
    table.unlink()
    assert ran(project.dvc("repro")) == []
    for command in ("train transfer", "evaluate"):
        line = told(project, command)
        assert str(table) in line and "dvc repro" in line
    # As the line says; forcing one stage is enough.
    table.unlink()
    project.run("chmod", "-R", "u+w", ".dvc/cache")
    project.dvc("repro", "--force", "--single-item", "split")
    assert ran(project.dvc("repro")) == []
    assert digests(project) == digests(undisturbed)
    record_property("fault", "torn object of DVC's cache: no model learns from it, and it can be renewed")


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    try_out = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(try_out, capture_output=True).returncode == 0


mounts = pytest.mark.skipif(not may_mount(), reason="a disk of one's own needs a namespace to be mounted in")


def in_namespace(project: Project, script: str, folder: Path) -> str:
    """Run a shell script in `folder` where it may mount; what it printed."""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=folder,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# The project on a disk that is filled to its last byte before each command, and has room again afterwards.
FULL_DISK = """
set -e
mkdir disk
mount -t tmpfs -o size=400m tmpfs disk
cp -r "{project}/." disk
cd disk
set +e
for command in {commands}; do
    cat /dev/zero > filler 2> /dev/null
    $(echo $command | tr + ' ') > ../said 2>&1
    echo "== $command: exit $?"; cat ../said
    rm filler
done
dvc repro > ../said 2>&1
echo "== with room: exit $?"; cat ../said
rm -rf .git
cp -r . ../kept
"""


@pytest.mark.slow
@mounts
def test_a_full_disk_is_one_line_and_with_more_room_it_goes_on(
    project: Project, undisturbed: Project, tmp_path: Path, record_property: Record
) -> None:
    stages = ("split", "train+transfer", *(("validate", "evaluate", "register") if EVERY else ()))
    commands = [*(f"touchline+{stage}" for stage in stages), "dvc+repro+--force+--single-item+split"]
    output = in_namespace(
        project, FULL_DISK.format(project=project.root, commands=" ".join(commands)), project.root.parent
    )
    parts = dict(part.split("\n", 1) for part in output.split("== ")[1:])
    *failed, (goes_on, _) = parts.items()
    for command, said in failed:
        assert command.endswith("exit 1") or command.startswith("dvc"), command + said
        assert "Traceback" not in said, command + said
        if command.startswith("touchline"):
            assert "full" in one_line(said) or "No space left" in one_line(said), command + said
            assert "make room" in one_line(said), command + said
    assert goes_on.endswith("exit 0"), output
    assert digests(Project(project.root.parent / "kept")) == digests(undisturbed)
    record_property("fault", f"full disk: {len(stages)} stages, one line each; with room `dvc repro` goes on")


# What a library writes to a temporary file without a name of its own.
FULL_TEMPORARY_FOLDER = """
mkdir small
mount -t tmpfs -o size=64k tmpfs small
TMPDIR="$PWD/small" python -c '
import tempfile
from touchline import cli
cli.app = lambda: tempfile.TemporaryFile().write(bytes(10**6))
cli.main()
'
echo "exit $?"
"""


@mounts
def test_a_full_temporary_folder_is_named(tmp_path: Path) -> None:
    said, code = in_namespace(Project(REPOSITORY), FULL_TEMPORARY_FOLDER, tmp_path).splitlines()
    assert code == "exit 1"
    assert str(tmp_path / "small") in said and "make room" in said


READ_ONLY = """
set -e
mount --bind "{folder}" "{folder}"
mount -o remount,ro,bind "{folder}"
set +e
touchline split
[ $? = 1 ]
"""


@mounts
@pytest.mark.parametrize("folder", ["data", pytest.param(".", marks=pytest.mark.slow)])
def test_a_read_only_folder_is_one_line_and_nothing_is_lost(
    project: Project, folder: str, record_property: Record
) -> None:
    before = digests(project)
    said = in_namespace(project, READ_ONLY.format(folder=project.root / folder), project.root)
    assert "Read-only file system" in one_line(said)
    assert digests(project) == before
    project.touchline("split")
    assert digests(project) == before
    record_property("fault", f"read-only {folder}: one line, nothing lost")


def test_a_folder_that_this_user_may_not_write_to_is_one_line(project: Project, record_property: Record) -> None:
    # Root may write everywhere, unless it gives that right away.
    weaker = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may write everywhere, and there is no setpriv to take that away")
    (project.root / "data").chmod(0o555)
    try:
        command = [*(weaker if os.geteuid() == 0 else []), "touchline", "split"]
        said = project.run(*command, exit_code=1)
    finally:
        (project.root / "data").chmod(0o755)
    assert "Permission denied" in one_line(said) and "data" in one_line(said)
    record_property("fault", "no right to write: one line, nothing lost")


HOLDER = """
import sqlite3, sys
store = sqlite3.connect(sys.argv[1], isolation_level=None)
store.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(project: Project) -> Iterator[Callable[[], None]]:
    """The store locked by a process that writes to it; what makes it end."""
    command = [sys.executable, "-c", HOLDER, str(project.root / "mlflow/mlflow.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        yield holder.stdin.close
        holder.stdin.close()


def test_a_store_that_another_program_writes_to_is_waited_for(torn: Project, record_property: Record) -> None:
    store = runs.open_store(Paths(torn.root, torn.root), REGISTERED)
    run_id = runs.start(
        store, "waiting", {}, {}, {"name": "split", "digest": "1", "source": "data/split.csv", "counts": {}}
    )
    with locked(torn) as let_go:
        soon = threading.Timer(3, let_go)
        soon.start()
        runs.log_row(store, run_id, {"epoch": 0, "train/loss": 0.5})
        assert not soon.is_alive()
    assert runs.logged_metrics(store, run_id)["training/loss_train"] == 0.5
    runs.fail(store, run_id, "a test's own")
    record_property("fault", "store locked for 3 s: waited for, nothing lost")


@pytest.mark.slow
def test_a_store_that_stays_locked_is_one_line(torn: Project, record_property: Record) -> None:
    before, began = digests(torn), time.monotonic()
    with locked(torn):
        line = one_line(torn.touchline("registry", "list", exit_code=1))
    assert "mlflow.db" in line and "locked" in line
    assert REGISTERED in torn.touchline("registry", "list") and digests(torn) == before
    record_property("fault", f"store stays locked: one line after {time.monotonic() - began:.0f} s")


@pytest.mark.slow
def test_two_pipelines_started_at_once_end_as_one(
    project: Project, undisturbed: Project, record_property: Record
) -> None:
    unmake(project, "split")
    command, pipe = ["dvc", "--wait-for-lock", "repro"], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    both = [subprocess.Popen(command, cwd=project.root, env=project.environment(), text=True, **pipe) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and not any("Traceback" in text for text in said), said
    # DVC waits for its lock, not for the files of a stage that another one has at work: then it says whose they are.
    refused = [text for code, text in zip(codes, said, strict=True) if code]
    assert all(f"(PID {process.pid})" in text for text in refused for process in both if process.returncode == 0), said
    assert UP_TO_DATE in project.dvc("repro")
    found, expected = digests(project), digests(undisturbed)
    assert found | {"dvc.lock": ""} == expected | {"dvc.lock": ""}  # its stages stand in another order
    how = "both went well" if not refused else "one went well, the other was told who is at work"
    record_property("fault", f"two at once: {how}; the results are those of one")


YEAR = 365 * 86400


@pytest.mark.slow
def test_files_from_the_future_are_up_to_date_and_a_change_in_the_past_is_seen(
    project: Project, undisturbed: Project, record_property: Record
) -> None:
    """The clock was set back since they were written."""
    later = time.time() + YEAR
    for path in project.root.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            os.utime(path, (later, later))
    assert UP_TO_DATE in project.dvc("repro")
    table = project.root / "data/split.csv"
    table.write_bytes(table.read_bytes().replace(b"train", b"test ", 1))
    os.utime(table, (later - 2 * YEAR, later - 2 * YEAR))
    project.dvc("repro")
    assert digests(project) == digests(undisturbed)
    record_property("fault", "clock set back: files of next year are up to date, a change in the past is seen")


def test_a_process_lives_on_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    tags = runs.this_process()
    assert runs.is_alive(tags)
    # Linux tells when a process began by when the machine did, and that by the clock.
    shifted = psutil.boot_time() - 3600
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: shifted)
    assert psutil.boot_time() == shifted
    assert runs.is_alive(tags)
    assert not runs.is_alive({**tags, "touchline.process_started": "1.0"})
    record_property("fault", "clock set back: a living run is not taken for dead")


@pytest.mark.slow
def test_runs_from_the_future_stay_and_the_registry_goes_on(project: Project, record_property: Record) -> None:
    with closing(sqlite3.connect(project.root / "mlflow/mlflow.db")) as store, store:
        store.execute("UPDATE runs SET start_time = start_time + ?1, end_time = end_time + ?1", (1000 * YEAR,))
    before = [(version.number, version.aliases) for version in versions(project)]
    if EVERY:
        project.change({"models.transfer.strengths": [0.01, 0.1]})
        project.dvc("repro")
        decided = project.json("reports/registration.json")
        held = {alias: version.number for version in versions(project) for alias in version.aliases}
        assert held["challenger"] == decided["registered"]["version"] > before[0][0]
        assert held["champion"] == (held["challenger"] if decided["promoted"] else before[0][0])
    assert not projects.runs(project, "attributes.status = 'RUNNING'")
    project.touchline("registry", "sync")
    assert [version.number for version in versions(project)][: len(before)] == [number for number, _ in before]
    record_property("fault", "clock set back: runs of next year stay, and the next pipeline registers as ever")
