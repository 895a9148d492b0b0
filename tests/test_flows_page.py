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
def flow_run(tmp_path_factory):
    """The address of a flow run's page; the run has found everything up to date."""
    root = tmp_path_factory.mktemp("page") / "the project"
    project = projects.copy(projects.built(tmp_path_factory).untouched, root)
    project.touchline("registry", "sync")
    board = boards.Board(project)
    try:
        board.up()
        run = board.start_run("pipeline")
        assert board.finished(run)["type"] == "COMPLETED"
        yield f"{board.url}/runs/flow-run/{run}"
    finally:
        board.down()


def look(address: str, name: str, tmp_path: Path) -> str:
    """The page as text once its scripts have run; a picture of it is kept."""
    pictures = Path(os.environ.get("TOUCHLINE_SCREENSHOTS") or tmp_path)
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


def test_the_page_of_a_run_names_every_stage_and_that_it_was_cached(flow_run, tmp_path):
    page = look(f"{flow_run}?tab=TaskRuns", "task runs", tmp_path)
    for stage in projects.STAGES:
        assert stage in page, stage
    assert page.count("Cached") >= len(projects.STAGES)


@pytest.mark.parametrize("words", [["photos", "validation", "learning-curves", "decision"]])
def test_the_artifacts_of_a_run_are_on_its_page(flow_run, tmp_path, words):
    page = look(f"{flow_run}?tab=Artifacts", "artifacts", tmp_path)
    for word in words:
        assert word in page, word


def test_the_graph_of_a_run_is_drawn_with_its_state(flow_run, tmp_path):
    page = look(flow_run, "graph", tmp_path)
    assert "Completed" in page and "<canvas" in page
