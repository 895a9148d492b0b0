"""What a person sees of a flow run in Prefect's UI, in a real browser: the graph of stages and the results."""

import os
import shutil
import signal
import subprocess
from html import unescape
from pathlib import Path

import boards
import projects
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A board, and a flow run that has found everything up to date."""
    root = tmp_path_factory.mktemp("page") / "the project"
    project = projects.copy(projects.built(tmp_path_factory).untouched, root)
    project.touchline("registry", "sync")
    board = boards.Board(project)
    try:
        board.up()
        run = board.start_run("pipeline")
        assert board.finished(run)["type"] == "COMPLETED"
        yield board, run
    finally:
        board.down()


def look(address: str, name: str, tmp_path: Path) -> str:
    """The page as text once its scripts have run; a picture of it is kept."""
    pictures = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    pictures.mkdir(parents=True, exist_ok=True)
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=15000", "--window-size=1400,1000",
    ]  # fmt: skip
    picture = pictures / f"{name}.png"
    page = browse([*options, f"--screenshot={picture}", address]) and browse([*options, "--dump-dom", address])
    assert picture.stat().st_size > 20_000
    return unescape(page)


def browse(options: list[str]) -> str:
    with subprocess.Popen(
        [CHROMIUM, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as browser:
        try:
            return browser.communicate(timeout=120)[0] or " "
        finally:
            if browser.poll() is None:
                os.killpg(browser.pid, signal.SIGKILL)


def test_the_page_of_a_run_draws_its_graph_and_tells_of_every_stage_that_it_was_cached(seen, tmp_path):
    board, flow_run = seen
    page = look(f"{board.url}/runs/flow-run/{flow_run}", "flow run", tmp_path)
    assert "<canvas" in page and "Completed" in page
    for stage in projects.STAGES:
        assert stage in page, stage
    assert page.count("Cached(") == len(projects.STAGES)


@pytest.mark.parametrize(
    "key, words",
    [
        ("photos", ["Photos by class, source and subset", "rugby", "validation"]),
        ("validation", ["Validation passed", "What was rejected"]),
        ("learning-curves", ["Accuracy and loss by epoch", "data:image/png;base64,"]),
        ("decision", ["The models side by side", "the champion", "McNemar", "The whole report"]),
    ],
)
def test_each_result_has_a_page(seen, tmp_path, key, words):
    board, flow_run = seen
    wanted = {"artifacts": {"flow_run_id": {"any_": [flow_run]}, "key": {"any_": [key]}}}
    [artifact] = board.ask("POST", "/artifacts/filter", wanted)
    page = look(f"{board.url}/artifacts/artifact/{artifact['id']}", key, tmp_path)
    for word in words:
        assert word in page, word
