"""`touchline app`: which models it asks and what it shows of them; and the whole page, in a real browser."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boards
import httpx
import projects
import pytest
from PIL import Image
from test_predict import CLASSES, COLOURS, SIDE, planted

from touchline import tracking
from touchline.commands import app
from touchline.commands.predict import Answer
from touchline.core import files
from touchline.core.errors import TouchlineError
from touchline.core.paths import Paths

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no Chromium with chromedriver here: apt-get install chromium-driver"
)
NAME = "rugby-soccer"
TOO_MUCH = 20 * 2**20 + 1


def colour(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 40), COLOURS[name]).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Paths, tracking.Store]:
    """Two versions, the second with red and blue the other way round, and a model in a file, which has no opinion."""
    root = tmp_path_factory.mktemp("machine") / "a project; $(id)"
    (root / "models").mkdir(parents=True)
    paths = Paths(root, root)
    store = tracking.open_store(paths, NAME)
    for turned in (False, True):
        planted(turned=turned).save(root / "model.keras")
        run = store.start("transfer", {}, {}, {"name": "split", "digest": "0", "source": "-", "counts": {}})
        store.finish(
            run, model_path=root / "model.keras", image_size=SIDE, classes=CLASSES, training_photos=[], metrics={}
        )
        store.register(NAME, run, {"touchline.model": "transfer"}, "")
    planted(steepness=0.0).save(root / "models/cnn.keras")
    files.write_json(root / "models/cnn.json", {"classes": CLASSES})
    return paths, store


@pytest.fixture
def models(store: tuple[Paths, tracking.Store], params_with: Any) -> app.Models:
    paths, registry = store
    registry.promote(NAME, 1)
    registry.set_alias(NAME, "challenger", 2)
    return app.Models(paths, params_with())


def test_the_champion_is_asked_first_and_the_challenger_beside_it(models: app.Models) -> None:
    assert models.choices() == {
        "1": "transfer (version 1, champion)",
        "2": "transfer (version 2, challenger)",
        "cnn": "cnn (models/cnn.keras)",
    }


def test_where_the_challenger_became_champion_a_model_of_another_name_stands_beside_it(
    models: app.Models, store: tuple[Paths, tracking.Store]
) -> None:
    store[1].promote(NAME, 2)
    assert list(models.choices()) == ["2", "cnn", "1"]


def test_the_model_that_was_named_is_asked_first(store: tuple[Paths, tracking.Store], params_with: Any) -> None:
    assert next(iter(app.Models(store[0], params_with(), "cnn").choices())) == "cnn"


def test_each_model_answers_for_itself_and_shows_where_it_looked(models: app.Models) -> None:
    models.choices()
    first, second, unsure = (models.ask(each, colour("red")) for each in ("1", "2", "cnn"))
    assert (first.model, first.answer.label) == ("rugby-soccer version 1", "red")
    assert (second.model, second.answer.label) == ("rugby-soccer version 2", "blue")
    assert (unsure.model, unsure.answer.label) == ("models/cnn.keras", "unsure")
    assert first.picture


def test_what_training_wrote_anew_is_asked_anew(
    models: app.Models, store: tuple[Paths, tracking.Store], tmp_path: Path
) -> None:
    models.choices()
    file = store[0].models / "cnn.keras"
    before = file.read_bytes()
    assert models.ask("cnn", colour("red")).answer.label == "unsure"
    planted().save(tmp_path / "new.keras")
    files.write_bytes(file, (tmp_path / "new.keras").read_bytes())
    assert models.ask("cnn", colour("red")).answer.label == "red"
    files.write_bytes(file, before)


def test_a_model_that_was_not_offered_is_not_opened(models: app.Models, store: tuple[Paths, tracking.Store]) -> None:
    models.choices()
    with pytest.raises(TouchlineError):
        models.ask(str(store[0].models / "cnn.keras"), colour("red"))


@pytest.mark.parametrize(
    "content", [b"", b"<!doctype html><p>gone", colour("red")[:300]], ids=["empty", "a web page", "cut off"]
)
def test_a_file_that_is_no_photo_is_one_line(models: app.Models, content: bytes) -> None:
    models.choices()
    with pytest.raises(TouchlineError) as refused:
        models.ask("1", content)
    assert "\n" not in str(refused.value)


def test_without_a_champion_nothing_is_served(params_with: Any, paths: Paths) -> None:
    with pytest.raises(TouchlineError, match=r"rugby-soccer.*`make run`"):
        app.run(paths, params_with(), "", "127.0.0.1", 7860)


def test_without_gradio_there_is_a_line_that_says_what_to_install(
    params_with: Any, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(TouchlineError, match=r"pip install 'touchline\[app\]'"):
        app.run(paths, params_with(), "", "127.0.0.1", 7860)


def test_a_class_that_looks_like_markup_stays_text() -> None:
    hostile = '<img src=x onerror="alert(1)">'
    card = app._card(app.Said("a & b", Answer(hostile, hostile, 0.9, {hostile: 0.9, "other": 0.1}), ""))
    assert "<img" not in card and card.count("&lt;img src=x onerror=") == 2
    assert "a &amp; b" in card


@dataclass(frozen=True)
class Page:
    """A page that is served, from outside.

    Attributes:
        scratch: where its process puts temporary files.
    """

    project: projects.Project
    process: subprocess.Popen[str]
    url: str
    scratch: Path

    def queue(self) -> list[str]:
        return sorted(path.name for path in (self.project.root / "data/feedback").iterdir())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    root = tmp_path_factory.mktemp("page") / "the project"
    project = projects.copy(projects.built(tmp_path_factory).untouched, root)
    scratch = tmp_path_factory.mktemp("scratch")
    [port] = boards.free_ports(1)
    command = ["touchline", "app", "--port", str(port)]
    # A proxy that answers nobody: the page must not need the network to find itself.
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    with subprocess.Popen(
        command, cwd=root, env=project.environment() | proxy | {"TMPDIR": str(scratch)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            line = process.stdout.readline()
            at = re.fullmatch(r"Try the models: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", line)
            assert at, line + process.stdout.read()
            yield Page(project, process, at[1], scratch)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--window-size=1280,1000", f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def found(browser: Any, selector: str, words: str = "") -> Any:
    """The first element that `selector` picks and that shows `words`, once it is there."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def look(driver: Any) -> Any:
        elements = driver.find_elements(By.CSS_SELECTOR, selector)
        return next((element for element in elements if words in element.text), None)

    return WebDriverWait(browser, 120, ignored_exceptions=[StaleElementReferenceException]).until(
        look, f"no {selector} with {words!r}"
    )


def opened(browser: Any, page: Page) -> None:
    browser.get(page.url)
    found(browser, "#photo input[type=file]")


def give(browser: Any, photo: Path) -> None:
    found(browser, "#photo input[type=file]").send_keys(str(photo))


def keep(browser: Any, label: str, words: str) -> None:
    found(browser, f"#label input[value={label}]").click()
    found(browser, "#keep").click()
    found(browser, "#outcome", words)


def picture(browser: Any, name: str) -> None:
    """Keep a picture of the page, if SCREENSHOTS names a folder for it."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder, f"app {name}.png")))


def requested(browser: Any, page: Page) -> set[str]:
    """The addresses that the page has asked for since this was last called; not those of the browser's own pages."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return {each["request"]["url"] for each in asked if each["documentURL"].startswith(page.url)}


@pytest.fixture(scope="module")
def photos(page: Page) -> dict[str, Path]:
    """A test photo of each class, under a name that a shell would tear apart."""
    split = files.read_table(page.project.root / "data/split.csv")
    test = split[split["subset"] == "test"].drop_duplicates("class", keep="last").set_index("class")["path"]
    beside = page.project.root.parent / "some photos"
    beside.mkdir()
    return {
        label: Path(shutil.copy(page.project.root / path, beside / f"{label}; x.jpg")) for label, path in test.items()
    }


@in_a_browser
def test_what_the_page_shows_is_what_predict_says(page: Page, photos: dict[str, Path], browser: Any) -> None:
    from selenium.webdriver.common.by import By

    opened(browser, page)
    assert found(browser, "h1").text == "Rugby or soccer?"
    picture(browser, "empty")
    photo = photos["soccer"]
    give(browser, photo)
    other = "cnn" if page.project.json("reports/registration.json")["better_model"] == "transfer" else "transfer"
    champion, beside = (
        json.loads(page.project.call("predict", str(photo), "--format", "json", *model).out)
        for model in ((), ("--model", other))
    )
    names = {"first": "rugby-soccer version 1", "second": f"models/{other}.keras"}
    for place, said in {"first": champion, "second": beside}.items():
        card = found(browser, f"#{place}", f"Answered by {names[place]}")
        assert card.find_element(By.CSS_SELECTOR, ".label").text.split()[0] == said["label"]
        bars = [bar.text.split("\n") for bar in card.find_elements(By.CSS_SELECTOR, "dl > div")]
        assert [label for label, _ in bars] == list(said["probabilities"])
        # The page has one digit of a percentage.
        shown = [float(value.removesuffix(" %")) / 100 for _, value in bars]
        assert shown == pytest.approx(list(said["probabilities"].values()), abs=0.00051)
        heat = card.find_element(By.CSS_SELECTOR, "img")
        assert heat.get_property("naturalWidth") > 100 and said["guess"] in heat.get_attribute("alt")
    picture(browser, "answered")
    asked = requested(browser, page)
    assert asked and not {url for url in asked if not url.startswith((page.url, "data:", "blob:"))}


@in_a_browser
def test_a_correction_is_kept_when_the_button_is_pressed_and_ingest_takes_it(
    page: Page, browser: Any, tmp_path: Path
) -> None:
    # A photo that the project does not have.
    photo = tmp_path / "new.jpg"
    Image.effect_noise((200, 150), 90).convert("RGB").save(photo)
    digest = hashlib.sha256(photo.read_bytes()).hexdigest()
    opened(browser, page)
    give(browser, photo)
    found(browser, "#second", "Answered by")
    assert page.queue() == ["README.md"]
    assert "data/feedback" not in page.project.dvc("status", "ingest")

    keep(browser, "rugby", "Kept as rugby; no run learns from it until ingest.sources in params.yaml names feedback.")
    assert page.queue() == sorted([f"{digest}.jpg", f"{digest}.json", "README.md"])
    assert (page.project.root / f"data/feedback/{digest}.jpg").read_bytes() == photo.read_bytes()
    found(browser, "#keep").click()
    found(browser, "#outcome", "Kept before as rugby")
    keep(browser, "soccer", "Kept as soccer")
    picture(browser, "corrected")
    entry = page.project.json(f"data/feedback/{digest}.json")
    assert entry["label"] == "soccer" and len(page.queue()) == 3
    assert entry["answers"][0]["model"] == "rugby-soccer version 1"
    assert set(entry["answers"][0]["probabilities"]) == {"rugby", "soccer"}

    assert "data/feedback" in page.project.dvc("status", "ingest")
    page.project.change({"ingest.sources": ["sample", "feedback"]})
    page.project.touchline("ingest")
    table = files.read_table(page.project.root / "data/photos.csv").set_index("sha256")
    row = table.loc[digest]
    assert (row["class"], row["source"]) == ("soccer", "feedback")
    assert (page.project.root / row["path"]).read_bytes() == photo.read_bytes()


@in_a_browser
def test_what_is_no_photo_or_too_large_is_refused_in_a_line(page: Page, browser: Any, tmp_path: Path) -> None:
    before = page.queue()
    broken, text, large = (tmp_path / name for name in ("page.jpg", "notes.txt", "large.jpg"))
    broken.write_text("<!doctype html><title>gone</title>")
    text.write_text("no photo")
    large.write_bytes(b"\xff\xd8\xff" + bytes(TOO_MUCH))
    opened(browser, page)
    give(browser, broken)
    found(browser, "#first .refusal", "This file cannot be judged: a web page.")
    assert not found(browser, "body").find_elements("css selector", "#wrong h2")
    picture(browser, "no photo")
    for file, words in ((text, "Invalid file type: notes.txt"), (large, "maximum allowed size of 20")):
        opened(browser, page)
        give(browser, file)
        found(browser, ".toast-wrap", words)
    assert page.queue() == before


@in_a_browser
def test_on_a_phone_nothing_runs_out_of_the_page(page: Page, photos: dict[str, Path], browser: Any) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        opened(browser, page)
        give(browser, photos["rugby"])
        found(browser, "#second", "Answered by")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert browser.execute_script("return document.body.classList.contains('dark')")
        picture(browser, "phone")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@in_a_browser
def test_a_test_photo_can_be_tried_and_its_author_is_named(page: Page, browser: Any) -> None:
    opened(browser, page)
    found(browser, ".aside", "Photos by Touchline sample (CC0-1.0)")
    found(browser, ".gallery-item").click()
    found(browser, "#first", "Answered by")


def test_no_file_of_the_machine_is_served_and_too_large_a_body_is_refused(page: Page) -> None:
    with httpx.Client(base_url=page.url, trust_env=False, timeout=60) as client:
        inside = page.project.root / "params.yaml"
        for name in ("/etc/passwd", str(inside), "params.yaml"):
            assert client.get(f"gradio_api/file={name}").status_code == 403
        large = client.post("gradio_api/upload", files={"files": ("a.jpg", bytes(TOO_MUCH))})
        assert large.status_code == 413
        functions = {each["api_name"]: each["id"] for each in client.get("config").json()["dependencies"]}
        photo = {"path": str(inside), "meta": {"_type": "gradio.FileData"}}
        asked = {"data": [photo, "1", ""], "fn_index": functions["answer"], "session_hash": "test"}
        client.post("gradio_api/queue/join", json=asked).raise_for_status()
        with client.stream("GET", "gradio_api/queue/data?session_hash=test") as lines:
            [done] = [json.loads(line[6:]) for line in lines.iter_lines() if "process_completed" in line]
        assert done["success"] is False


def test_a_port_in_use_is_one_line(page: Page) -> None:
    port = page.url.rstrip("/").rpartition(":")[2]
    said = page.project.touchline("app", "--port", port, exit_code=1)
    assert f"127.0.0.1:{port}" in said and "--port" in said and said.count("\n") == 1


def test_when_it_is_ended_no_upload_is_left(page: Page) -> None:
    with httpx.Client(base_url=page.url, trust_env=False, timeout=60) as client:
        client.post("gradio_api/upload", files={"files": ("a.jpg", colour("red"))}).raise_for_status()
    assert list(page.scratch.rglob("a.jpg"))
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(60) == 0
    assert not list(page.scratch.glob("touchline-app-*")) and not list(page.scratch.rglob("*.jpg"))
