"""What a person sees of the runs in MLflow's UI, in a real browser: a list, a comparison, a registered model."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import projects
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium or chromedriver here: apt-get install chromium chromium-driver"
)
MODELS = ("cnn", "transfer")
CHARTS = "input[placeholder='Search metric charts']"


@dataclass(frozen=True)
class Page:
    """MLflow's UI on a project's store, as `touchline mlflow` opens it, in a window of 1500 by 950.

    Attributes:
        opened: the address that the command prints.
        pictures: where pictures are kept.
    """

    driver: webdriver.Chrome
    opened: str
    project: projects.Project
    pictures: Path

    def open(self, place: str) -> None:
        # From one place behind the # to another the page would not be loaded anew, and keep what was chosen on it.
        self.driver.get("about:blank")
        self.driver.get(self.opened.partition("/#")[0] + place)

    @property
    def place(self) -> str:
        """The page that the command opens."""
        return "/#" + self.opened.partition("/#")[2]

    @property
    def experiment(self) -> str:
        return re.search(r"/experiments/(\d+)/runs", self.opened).group(1)

    def until(self, condition: Callable[[webdriver.Chrome], Any], what: str = "") -> Any:
        wait = WebDriverWait(self.driver, 60, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(condition, what or "what was waited for did not come")

    def text(self, *awaited: str) -> str:
        """All text of the page once it has each of `awaited`."""

        def shown(driver: webdriver.Chrome) -> str:
            text = driver.execute_script("return document.body.innerText").replace("\N{NO-BREAK SPACE}", " ")
            return text if all(word in text for word in awaited) else ""

        try:
            return self.until(shown)
        except WebDriverException:
            text = self.driver.execute_script("return document.body.innerText")
            raise AssertionError(f"not all of {awaited} on the page:\n{text}") from None

    def click(self, css: str) -> None:
        self.until(lambda driver: driver.find_element(By.CSS_SELECTOR, css), f"no {css}").click()

    def press(self, label: str) -> None:
        # A button that is not yet enabled takes a click, and does nothing.
        path = f"//button[normalize-space()='{label}' and not(@disabled)]"
        self.until(lambda driver: driver.find_element(By.XPATH, path), f"no button {label}").click()

    def picture(self, name: str) -> None:
        self.pictures.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(self.pictures / f"mlflow {name}.png"))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    """The UI on the project that all tests share; it is looked at, and nothing is changed."""
    project = projects.built(tmp_path_factory).project
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1500,1037",
    ):  # fmt: skip
        options.add_argument(argument)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ["touchline", "mlflow", "--port", str(port)],
        cwd=project.root,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        opened = re.search(r"http://\S+", server.stdout.readline()).group()
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            pictures = Path(os.environ.get("SCREENSHOTS") or folder)
            page = Page(driver, opened, project, pictures)
            page.until(lambda _: answers(port), "MLflow's UI does not answer")
            yield page
        finally:
            driver.quit()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=60)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def run_ids(page) -> dict[str, str]:
    """The run of each model."""
    return {model: page.project.json(f"models/{model}.json")["run_id"] for model in MODELS}


def rows(page: Page) -> dict[str, list[str]]:
    """The params and tags on the page that compares runs: of each its value in each run."""
    cells = page.driver.execute_script(
        "return [...document.querySelectorAll('tr')].map(row => [...row.children].map(cell => cell.innerText.trim()))"
    )
    return {name: values for name, *values in cells if not name.endswith(":")}


def metrics(page: Page) -> dict[str, list[str]]:
    """The metrics on the page that compares runs. Only the rows near those that are seen are in the document."""
    row = """
        const [names, values] = document.querySelectorAll("[role=grid][aria-label=grid]");
        const height = 45, [top, count] = [height * arguments[0], values.firstChild.offsetHeight / height];
        if (arguments[0] >= count) return [];
        values.scrollTop = top;
        const cells = [...names.firstChild.children, ...values.firstChild.children]
            .filter(cell => cell.style.top === `${top}px`);
        return cells.length === 3 && cells.map(cell => cell.innerText.trim());
    """
    found: dict[str, list[str]] = {}
    while read := page.until(
        lambda driver: (got := driver.execute_script(row, len(found))) is not False and (got or "end"), "no metrics"
    ):
        if read == "end":
            break
        found[read[0]] = read[1:]
    return found


def on_the_first_screen(page: Page) -> str:
    """The text that is seen without scrolling, SVG included."""
    return page.driver.execute_script("""
        const words = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const range = document.createRange();
            range.selectNode(walker.currentNode);
            const box = range.getBoundingClientRect();
            const inside = box.top >= 0 && box.left >= 0 && box.bottom <= innerHeight && box.right <= innerWidth;
            if (box.width && box.height && inside)
                words.push(walker.currentNode.textContent.trim());
        }
        return words.join("\\n");
    """)


def test_the_first_screen_of_a_new_browser_names_both_models_and_their_test_accuracies(page, run_ids):
    models = page.project.json("reports/metrics.json")["models"]
    names = {model: page.project.json(f"models/{model}.json")["run_name"] for model in MODELS}
    page.driver.get(page.opened)
    # Of the bars in the chart of test/accuracy, which have two digits, and in words above.
    wanted = [*names.values(), *(f"{models[model]['accuracy']:.2f}" for model in MODELS)]
    try:
        page.until(lambda _: set(wanted) <= set(on_the_first_screen(page).splitlines()))
    finally:
        page.picture("runs")
    seen = on_the_first_screen(page)
    for model, name in names.items():
        assert f"{name} {models[model]['accuracy']:.3f}" in seen
    assert f"the champion is {names[page.project.json('reports/registration.json')['better_model']]}" in seen
    assert "shared view" not in seen.lower()
    assert shown_runs(page) == set(run_ids.values())


def shown_runs(page: Page) -> set[str]:
    script = "return [...document.querySelectorAll('.ag-row')].map(row => row.getAttribute('row-id'))"
    return set(page.driver.execute_script(script))


def as_rounded(shown: list[str], wanted: list[float]) -> bool:
    """The page shows three digits, and need not round a half as Python does."""
    return [float(text) for text in shown] == pytest.approx(wanted, abs=0.00051)


def test_runs_of_both_models_are_compared(page, run_ids):
    page.open(page.place)
    for model in MODELS:
        page.click(f"[row-id='{run_ids[model]}'] .ag-selection-checkbox input")
    page.picture("selected")
    page.press("Compare")

    # The first chart: what the models are, and what they reached.
    page.text("Comparing 2 Runs from 1 Experiment", "image_size", "confusion.png", "touchline.split_sha256")
    chosen = page.driver.find_elements(
        By.CSS_SELECTOR, ".du-bois-light-select-selection-item, [class*=select-selection-item-content]"
    )
    assert {"architecture", "augmentation", "backbone", "test/accuracy"} <= {item.text for item in chosen}
    page.picture("compared")
    order = page.driver.current_url
    models = sorted(MODELS, key=lambda model: order.index(run_ids[model]))
    shown, judged = metrics(page), page.project.json("reports/metrics.json")["models"]
    for key in judged["cnn"].keys() - {"accuracy_low", "accuracy_high"}:
        assert as_rounded(shown[f"test/{key}"], [judged[model][key] for model in models]), key
    kept = [page.project.json(f"models/{model}.json")["metrics"] for model in models]
    for subset, key in itertools.product(("train", "validation"), ("accuracy", "loss")):
        assert as_rounded(shown[f"training/{key}_{subset}"], [found[f"{subset}/{key}"] for found in kept]), key
    assert as_rounded(shown["training/seconds"], [found["seconds/train"] for found in kept])

    params = rows(page)
    assert params["image_size"] == [{"cnn": "32", "transfer": "128"}[model] for model in models]
    assert not [value for values in params.values() for value in values if set(value) & set("{[")]
    # What a head has to say of fine-tuning, where there is none, is that there is none.
    assert [key for key in params if key.startswith("fine_tune")] == ["fine_tune.blocks"]
    digests = {page.project.json(f"models/{model}.json")["tags"]["touchline.split_sha256"] for model in models}
    assert set(params["touchline.split_sha256"]) == digests and len(digests) == 1
    assert not {"touchline.pid", "touchline.host"} & params.keys()


def test_the_curves_of_train_and_validation_are_side_by_side_for_one_run_and_for_two(page, run_ids):
    curves = ["accuracy_train", "accuracy_validation", "loss_train", "loss_validation"]
    of_one = f"/#/experiments/{page.experiment}/runs/{run_ids['cnn']}/model-metrics"
    for name, place, prefix in (("one", of_one, ""), ("two", page.place, "training/")):
        page.open(place)
        page.until(lambda driver: driver.find_element(By.CSS_SELECTOR, CHARTS)).send_keys("training/")
        text = page.text(*(prefix + curve for curve in curves))
        page.picture(f"curves of {name}")
        places = [text.index(f"\n{prefix}{curve}\n") for curve in curves]
        assert places == sorted(places)


def test_the_page_of_a_run_describes_it(page, run_ids):
    page.open(f"/#/experiments/{page.experiment}/runs/{run_ids['transfer']}")
    test = page.project.json("reports/metrics.json")["models"]["transfer"]
    outcome = page.project.json("reports/registration.json")
    assert outcome["better_model"] == "transfer"
    decision = outcome["decision"]

    page.text(
        "transfer efficientnet_lite0", f"Decision: {decision}", "Regularised logistic regression",
        "for training", "Kept: strength", f"On the test photos: accuracy {test['accuracy']:.3f}", "touchline train",
    )  # fmt: skip
    page.picture("run")


def test_the_page_of_the_registered_model_leads_to_a_version_that_says_why_it_is_champion(page):
    registered = page.project.json("reports/registration.json")
    reason, name = registered["reason"], projects.REGISTERED
    page.open(f"/#/models/{name}")
    page.text(f"models:/{name}@champion", "Version 1", "@ champion", "@ challenger", "Became champion")
    page.picture("registered model")

    page.driver.find_element(By.LINK_TEXT, "Version 1").click()

    models = page.project.json("reports/metrics.json")["models"]
    page.text(
        f"Became champion when it was registered: {reason}.", "for training", "@ champion",
        *(f"{models[model]['accuracy']:.3f} [" for model in MODELS),
    )  # fmt: skip
    page.picture("version")
