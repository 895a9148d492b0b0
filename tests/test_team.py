"""Trackers and stores that several people share, on the engines a team has: PostgreSQL, S3 (moto's server), HTTP.

Projects are copies of the one that all tests share; the servers start once.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import psutil
import pytest
from boards import free_ports, wait_for
from projects import UP_TO_DATE, Project, built, copy, ran
from team import Gate, Team, why_not

from touchline.core.paths import Paths
from touchline.models import inference
from touchline.tracking import registry, runs
from touchline.tracking.client import Store
from touchline.tracking.registry import CHALLENGER, CHAMPION
from touchline.tracking.runs import open_store

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
long = pytest.mark.skipif("TOUCHLINE_FAULTS" not in os.environ, reason="takes minutes: `make faults` runs it")


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with Team() as servers:
        servers.start_mlflow()
        yield servers


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose pipeline has run, on a store that was its own; a team's knows nothing of it."""
    return copy(built(tmp_path_factory).project, tmp_path / "a project")


class Seen:
    """What the team's store holds of one experiment and registered model, as one more machine sees it."""

    def __init__(self, team: Team, root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        for key, value in team.environment().items():
            monkeypatch.setenv(key, value)
        root.mkdir()
        self.name = name
        self.store: Store = open_store(Paths(root, root), name)

    @property
    def versions(self) -> list:
        return registry.versions(self.store, self.name)

    @property
    def champion(self) -> Any:
        return registry.alias(self.store, self.name, CHAMPION)

    def has_whole_run(self, record: dict[str, Any]) -> None:
        """The run of a model has all that the project's files say of it, figures, and its model."""
        client, run_id = self.store.client, runs.find(self.store, record)
        assert run_id is not None
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params.items() >= {key: str(value) for key, value in record["params"].items()}.items()
        assert run.data.metrics["training/seconds"] == record["metrics"]["seconds/train"]
        for key in ("accuracy", "loss"):
            assert run.data.metrics[f"training/{key}_validation"] == record["metrics"][f"validation/{key}"]
        assert not math.isnan(run.data.metrics["test/accuracy"])
        if "strength" not in record["history"][0]:
            for key, named in (("train/loss", "loss_train"), ("validation/accuracy", "accuracy_validation")):
                curve = [point.value for point in client.get_metric_history(run_id, f"training/{named}")]
                # One more point stands for the weights that were kept.
                assert curve[:-1] == [row[key] for row in record["history"]]
        assert record["dataset"]["digest"] == run.inputs.dataset_inputs[0].dataset.digest
        assert {"confusion.png", "learning_curves.png", "mistakes.jpg"} <= {
            file.path for file in client.list_artifacts(run_id)
        }
        [model] = run.outputs.model_outputs
        assert client.get_logged_model(model.model_id).status == "READY"

    def has_sound_versions(self, count: int) -> None:
        """So many versions, each of another model; each one's file loads, and each alias stands at one of them."""
        versions = self.versions
        assert len({version.model_sha256 for version in versions}) == len(versions) == count
        for version in versions:
            inference.load_model(registry.model(self.store, version).file)
        assert sorted(alias for version in versions for alias in version.aliases) == [CHALLENGER, CHAMPION]


@pytest.fixture
def see(team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    return lambda name: Seen(team, tmp_path / "one more machine", monkeypatch, name)


def the_line(output: str) -> str:
    """The one line that says what is wrong."""
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("touchline: ")]
    return line


@long
def test_two_clones_at_once_leave_whole_runs_two_versions_and_one_champion(
    team: Team, project: Project, tmp_path: Path, see, record_property
) -> None:
    # What one has pushed, the others pull and do not compute.
    keys = team.environment()
    team.add_remote(project.dvc, "dvc")
    project.commit("the team's remote")
    project.dvc("push", **keys)
    clones = [Project(tmp_path / name) for name in ("clone a", "clone b")]
    for clone in clones:
        project.git("clone", "--quiet", str(project.root), str(clone.root))
        assert "fetched" in clone.dvc("pull", **keys)
        assert UP_TO_DATE in clone.dvc("status")
    assert keys["AWS_SECRET_ACCESS_KEY"] not in (project.root / ".dvc/config").read_text()

    # Other models in each, at once. Where one would not see what the other is about to do, it waits for the other.
    clones[0].change({"models.cnn.seed": 1, "models.transfer.strengths": [0.003, 0.01], "register.name": "at-once"})
    clones[1].change({"models.cnn.seed": 2, "models.transfer.strengths": [0.1, 0.3], "register.name": "at-once"})
    steps = (
        "experiments/create", "runs/log-inputs", "registered-models/create", "model-versions/create",
        "registered-models/alias",
    )  # fmt: skip
    held, met = {step: Barrier(2) for step in steps}, []

    def together(call: str) -> bool:
        for step in [step for step in held if call.endswith(step)]:
            with suppress(BrokenBarrierError):
                held[step].wait(200)
                met.append(step)
            held.pop(step, None)
        return False

    with Gate(team.mlflow_url) as gate, ThreadPoolExecutor(2) as pool:
        gate.before = together
        address = keys | {"MLFLOW_TRACKING_URI": gate.url}
        outputs = list(pool.map(lambda clone: clone.dvc("repro", **address), clones))
    assert sorted(met) == sorted(2 * steps)
    for output, clone in zip(outputs, clones, strict=True):
        assert sorted(ran(output)) == ["evaluate", "register", "train@cnn", "train@transfer"]
        clone.dvc("push", **keys)

    seen = see("at-once")
    records = [clone.json(f"models/{name}.json") for clone in clones for name in ("cnn", "transfer")]
    assert len({record["run_id"] for record in records}) == 5
    for record in records:
        seen.has_whole_run(record)
    seen.has_sound_versions(2)
    said = [clone.json("reports/registration.json") for clone in clones]
    assert {version.model_sha256 for version in seen.versions} == {each["registered"]["model_sha256"] for each in said}
    # The champion is the last one that says it became it; a later one was compared with it.
    promoted = {each["registered"]["version"]: each["champion_before"] for each in said if each["promoted"]}
    assert seen.champion.number in promoted
    replaced = promoted[seen.champion.number]
    assert len(promoted) == 1 or replaced in promoted
    record_property("fault", f"two pipelines at once: 4 runs whole, 2 versions, 1 champion; met at {len(steps)} steps")


@pytest.mark.slow
def test_runs_that_start_at_once_on_the_same_photos_all_have_them(
    see, tmp_path: Path, monkeypatch, record_property
) -> None:
    first = see("starting-at-once").store
    roots = [tmp_path / f"machine {number}" for number in range(4)]
    machines = [open_store(Paths(root, root), "starting-at-once") for root in roots]
    # Set for the whole process while a run is made.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    together = Barrier(4)

    def start(store: Store, number: int) -> str:
        split = {"name": "split", "digest": f"split {number}", "source": "data/split.csv", "counts": {}}
        together.wait(60)
        return runs.start(store, "a run", {}, {}, split)

    # MLflow looks for the dataset for each of them before it has inserted any, more often than not.
    with ThreadPoolExecutor(4) as pool:
        made = [run for number in range(10) for run in pool.map(start, machines, [number] * 4)]
    datasets = [first.client.get_run(run).inputs.dataset_inputs[0].dataset.digest for run in made]
    assert datasets == [f"split {number}" for number in range(10) for _ in range(4)]
    record_property("fault", "four runs started at once, ten times: 40 runs with their dataset, none failed")


@pytest.mark.slow
def test_a_tracking_server_killed_in_the_middle_of_a_training_costs_no_training(
    team: Team, project: Project, see, record_property
) -> None:
    project.change({"models.cnn.seed": 3, "register.name": "killed"})
    batches = []

    def kill_at_the_first_epoch(call: str) -> bool:
        batches.append(call) if call.endswith("log-batch") else None
        # Params and a description come first.
        if len(batches) == 3:
            team.kill("mlflow")
        return False

    with Gate(team.mlflow_url) as gate:
        gate.before = kill_at_the_first_epoch
        try:
            output = project.dvc("repro", exit_code=None, **team.environment() | {"MLFLOW_TRACKING_URI": gate.url})
        finally:
            if len(batches) >= 3:
                team.start_mlflow()
    assert ran(output) == ["train@cnn", "evaluate"]
    assert gate.url in the_line(output)
    record = project.json("models/cnn.json")
    assert len(record["history"]) == 2

    project.run("touchline", "registry", "sync", **team.environment())
    project.dvc("repro", **team.environment())
    seen = see("killed")
    seen.has_whole_run(record)
    seen.has_sound_versions(1)
    # The server gives ids: the one that was lost is a tag of the run in its place.
    known = seen.store.client.get_run
    broken_off, restored = known(record["run_id"]), known(runs.find(seen.store, record))
    assert broken_off.info.status == "KILLED"
    assert restored.data.tags["touchline.restored"] == broken_off.info.run_id
    assert len({run.data.tags["touchline.execution"] for run in (broken_off, restored)}) == 1
    record_property("fault", "tracking server killed in a training: model kept, run logged whole afterwards, 0 lost")


@pytest.mark.slow
def test_a_registry_that_breaks_off_between_version_and_alias_has_one_version_afterwards(
    team: Team, project: Project, see, record_property
) -> None:
    project.change({"register.name": "broken-off"})
    broken: list[str] = []

    def at(step: str):
        def breaks(call: str) -> bool:
            broken.extend([call] * call.endswith(step))
            return call.endswith(step)

        return breaks

    with Gate(team.mlflow_url) as gate:
        address = team.environment() | {"MLFLOW_TRACKING_URI": gate.url}
        # The version is made, and the answer lost.
        gate.after = at("model-versions/create")
        assert gate.url in the_line(project.dvc("repro", "register", exit_code=None, **address))
        seen = see("broken-off")
        assert [version.aliases for version in seen.versions] == [()]
        # The version is there, and no alias can be set.
        gate.after, gate.before = (lambda call: False), at("registered-models/alias")
        assert gate.url in the_line(project.dvc("repro", "register", exit_code=None, **address))
        assert [version.aliases for version in seen.versions] == [()]
        gate.before = lambda call: False
        assert ran(project.dvc("repro", "register", **address)) == ["register"]
    seen.has_sound_versions(1)
    assert seen.champion.model_sha256 == project.json("reports/registration.json")["registered"]["model_sha256"]
    record_property(
        "fault", f"registry broke off between version and alias: {len(broken)} calls, 1 version, 1 champion"
    )


@pytest.mark.slow
def test_a_champion_that_another_machine_makes_meanwhile_is_compared_with(
    team: Team, project: Project, see, record_property
) -> None:
    project.change({"register.name": "meanwhile"})
    seen = see("meanwhile")
    rival = project.json("models/cnn.json")
    done: list[int] = []

    def make_another_champion(call: str) -> bool:
        # That there is no champion is what the stage has seen.
        if call.endswith("model-versions/create") and not done:
            run_id = runs.find(seen.store, rival)
            done.append(
                registry.register(seen.store, "meanwhile", run_id, {"touchline.classes": '["rugby", "soccer"]'}, "")
            )
            registry.promote(seen.store, "meanwhile", done[0])
        return False

    with Gate(team.mlflow_url) as gate:
        gate.before = make_another_champion
        address = team.environment() | {"MLFLOW_TRACKING_URI": gate.url}
        project.run("touchline", "register", **address)
    said = project.json("reports/registration.json")
    assert done == [1] and said["champion_before"] == 1
    assert said["duel"]["photos"] >= 4
    version = seen.versions[-1]
    assert said["promoted"] is ("champion" in version.aliases)
    for text in (version.description, version.tags["touchline.reason"]):
        assert "version 1" in text
    assert version.tags.get("touchline.replaced") == ("1" if said["promoted"] else None)
    record_property("fault", "champion made elsewhere during the comparison: compared again, 1 champion")

    # Who has not seen the champion does not replace it; who is at it elsewhere is waited for, unless it died long ago.
    loser = 3 - seen.champion.number
    untouched = seen.versions
    assert not registry.replace(seen.store, "meanwhile", None, loser)
    assert seen.versions == untouched
    at_it, now = seen.champion.number, datetime.now(UTC)
    registry.set_version_tags(seen.store, "meanwhile", at_it, {"touchline.promoting": now.isoformat()})
    with ThreadPoolExecutor(1) as pool:
        promoted = pool.submit(registry.replace, seen.store, "meanwhile", seen.champion, loser)
        time.sleep(3)
        assert not promoted.done() and seen.champion.number == at_it
        long_ago = now - timedelta(minutes=2)
        registry.set_version_tags(seen.store, "meanwhile", at_it, {"touchline.promoting": long_ago.isoformat()})
        assert promoted.result(60) and seen.champion.number == loser
    assert seen.champion.tags["touchline.replaced"] == str(at_it)
    assert "touchline.promoting" not in seen.champion.tags


@pytest.mark.slow
def test_who_did_not_see_the_champion_does_not_replace_it(team: Team, project: Project, see) -> None:
    project.change({"register.name": "unseen"})
    project.run("touchline", "registry", "sync", **team.environment())
    seen = see("unseen")
    first = seen.champion
    second = registry.register(seen.store, "unseen", first.run_id, {}, "the same again")
    assert not registry.replace(seen.store, "unseen", None, second)
    assert seen.champion.number == first.number
    assert "touchline.replaced" not in seen.versions[-1].tags
    assert registry.replace(seen.store, "unseen", first, second)
    assert seen.champion.number == second and seen.champion.tags["touchline.replaced"] == str(first.number)


@pytest.mark.slow
def test_a_password_of_the_tracking_server_is_nowhere(team: Team, project: Project, see, record_property) -> None:
    project.change({"register.name": "behind-a-password"})
    # With an @ in it, so that what is hidden must reach to the last one.
    secret = "hush@hush-47d1"
    with Gate(team.mlflow_url, "someone", secret) as gate:
        keys = team.environment()
        named = keys | {"MLFLOW_TRACKING_URI": gate.url}
        by_variables = named | {"MLFLOW_TRACKING_USERNAME": "someone", "MLFLOW_TRACKING_PASSWORD": secret}
        outputs = [project.dvc("repro", **by_variables)]
        assert ran(outputs[0]) == ["register"]
        in_the_address = keys | {"MLFLOW_TRACKING_URI": gate.url.replace("//", f"//someone:{secret}@")}
        outputs.append(project.run("touchline", "registry", "list", **in_the_address))
        assert "champion" in outputs[-1]
        outputs.append(project.run("touchline", "mlflow", exit_code=1, **in_the_address))
        wrong = in_the_address["MLFLOW_TRACKING_URI"].replace("someone", "nobody")
        outputs.append(project.run("touchline", "registry", "list", exit_code=1, MLFLOW_TRACKING_URI=wrong))
        assert "***@" in the_line(outputs[-1])
    outputs.append(project.run("touchline", "registry", "list", exit_code=1, **in_the_address))
    assert "***@" in the_line(outputs[-1])

    seen = see("behind-a-password")
    logged = seen.store.client.search_runs([seen.store.experiment_id])
    written = [path for path in project.root.rglob("*") if path.is_file()]
    texts = [path.read_bytes() for path in written] + [repr(run.to_dictionary()).encode() for run in logged]
    texts += [repr(seen.versions).encode(), team.log("mlflow").encode(), *(output.encode() for output in outputs)]
    assert len(logged) == 2 and (project.root / "dvc.lock") in written
    for text in texts:
        assert not any(each.encode() in text for each in ("hush", keys["AWS_SECRET_ACCESS_KEY"]))
    record_property("fault", f"password of the tracking server: in none of {len(texts)} files, runs and outputs")


@pytest.mark.slow
def test_a_database_s_password_is_not_among_the_options_of_the_ui(team: Team, project: Project) -> None:
    [port] = free_ports(1)
    uri = team.database("mlflow", "psycopg2")
    server = subprocess.Popen(
        [sys.executable, "-m", "touchline.cli", "mlflow", "--port", str(port)],
        cwd=project.root,
        env=project.environment() | {"MLFLOW_TRACKING_URI": uri},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    tree: list[psutil.Process] = []
    try:
        wait_for(lambda: _serves(port), 120)
        tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert "of-postgresql" in uri
        assert not [each for each in tree if "of-postgresql" in " ".join(each.cmdline())]
    finally:
        for each in tree or [psutil.Process(server.pid)]:
            with suppress(psutil.NoSuchProcess):
                each.terminate()
        server.wait(30)


@long
def test_a_deployment_runs_on_a_prefect_server_with_postgresql(
    team: Team, project: Project, tmp_path: Path, record_property
) -> None:
    team.start_prefect()
    person = team.environment() | {"PREFECT_HOME": str(tmp_path / "prefect")}

    def prefect(*words: str) -> str:
        return project.run(sys.executable, "-m", "prefect", "--no-prompt", *words, **person)

    prefect("work-pool", "create", "touchline", "--type", "process")
    prefect("deploy", "--all")
    prefect("deployment", "run", "ingestion/ingestion")
    once = ("worker", "start", "--pool", "touchline", "--type", "process", "--run-once", "--install-policy", "never")
    output = project.run(
        sys.executable, "-m", "prefect", "--no-prompt", *once, **person | {"TOUCHLINE_PROJECT": str(project.root)}
    )
    states = team.rows("prefect", "SELECT state_type, count(*) FROM flow_run GROUP BY state_type")
    assert dict(states).get("COMPLETED") == 1, output
    assert len(team.rows("prefect", "SELECT name FROM deployment")) == 5
    record_property("fault", "no fault, Prefect on PostgreSQL: 1 flow run completed by a worker, 5 deployments")


def _serves(port: int) -> bool:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
        return answer.status == 200
