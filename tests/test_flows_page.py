"""What a person does in Prefect's UI, in a real browser: log in, start a flow, see it end, look at what came of it."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import boards
import projects
import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium or chromedriver here: apt-get install chromium chromium-driver"
    ),
    pytest.mark.xdist_group("board"),
]


@pytest.fixture(scope="module")
def board(shared_board: boards.Board) -> boards.Board:
    """A board of a project in which everything has run."""
    shared_board.up()
    return shared_board


@pytest.fixture(scope="module")
def browser(board: boards.Board, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A browser in which a person has logged in, once, on the page that the board's address opens."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}", "--window-size=1400,1000",
    ):  # fmt: skip
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(board.url)
        password = until(driver, lambda: driver.find_element(By.CSS_SELECTOR, "input[type=password]"))
        password.send_keys(board.auth_string, Keys.ENTER)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def flow_run(board: boards.Board, browser: webdriver.Chrome) -> str:
    """The id of a run that the person started there, once it has ended: it found everything up to date."""
    press(browser, "//a[normalize-space()='Deployments']")
    press(browser, "//a[normalize-space()='pipeline' and contains(@href, '/deployment/')]")
    press(browser, "//button[normalize-space()='Run']")
    press(browser, "//*[@role='menuitem' and normalize-space()='Quick run']")
    press(browser, "//a[normalize-space()='View run']")
    run = until(browser, lambda: re.search("/flow-run/([^?/]+)", browser.current_url)).group(1)
    board.finished(run)
    until(browser, lambda: "Completed" in browser.find_element(By.TAG_NAME, "body").text)
    return run


def until(driver: webdriver.Chrome, condition: Callable[[], Any], seconds: int = 60) -> Any:
    # A page that is still drawing takes away, moves or covers what it has just shown.
    wait = WebDriverWait(driver, seconds, ignored_exceptions=[WebDriverException])
    return wait.until(lambda _: condition(), f"what was waited for did not come to {driver.current_url}")


def press(driver: webdriver.Chrome, path: str) -> None:
    until(driver, lambda: driver.find_element(By.XPATH, path).click() or True)


def look(driver: webdriver.Chrome, address: str, words: list[str], name: str, tmp_path: Path) -> str:
    """The page once it has all the words; a picture of it is kept."""
    driver.get(address)
    until(driver, lambda: all(word in unescape(driver.page_source) for word in words))
    pictures = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    pictures.mkdir(parents=True, exist_ok=True)
    assert driver.save_screenshot(str(pictures / f"{name}.png"))
    return unescape(driver.page_source)


def test_a_person_logs_in_once_starts_a_flow_and_sees_it_end(board, browser, flow_run):
    assert board.state(flow_run)["type"] == "COMPLETED"
    assert not browser.find_elements(By.CSS_SELECTOR, "input[type=password]")


def test_the_page_of_a_run_draws_its_graph_and_tells_of_every_stage_that_it_was_cached(
    board, browser, flow_run, tmp_path
):
    words = ["<canvas", "Completed", *projects.STAGES, "Finished in state Completed"]
    page = look(browser, f"{board.url}/runs/flow-run/{flow_run}", words, "flow run", tmp_path)
    assert page.count("Cached(") == len(projects.STAGES)


@pytest.mark.parametrize(
    "key, words",
    [
        pytest.param("photos", ["Photos by class, source and subset", "rugby", "validation"], marks=pytest.mark.slow),
        pytest.param("validation", ["Validation passed", "What was rejected"], marks=pytest.mark.slow),
        pytest.param(
            "learning-curves", ["Accuracy and loss by epoch", "The curves", "transfer"], marks=pytest.mark.slow
        ),
        ("decision", ["The models side by side", "the champion", "McNemar", "The whole report"]),
    ],
)
def test_each_result_has_a_page(board, browser, flow_run, tmp_path, key, words):
    wanted = {"artifacts": {"flow_run_id": {"any_": [flow_run]}, "key": {"any_": [key]}}}
    [artifact] = board.ask("POST", "/artifacts/filter", wanted)
    look(browser, f"{board.url}/artifacts/artifact/{artifact['id']}", words, key, tmp_path)
