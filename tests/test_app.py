"""`touchline app`: which models it asks and what it shows of them; and the whole page, in a real browser."""

import csv
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
from types import SimpleNamespace
from typing import Any

import boards
import httpx
import projects
import pytest
from PIL import Image
from test_predict import CLASSES, COLOURS, SIDE, planted

from touchline.commands import app
from touchline.core import files
from touchline.core.errors import TouchlineError
from touchline.core.paths import Paths
from touchline.data import forgotten
from touchline.data.forgotten import Forgotten
from touchline.models.classifier import Answer
from touchline.sources import feedback
from touchline.tracking import registry, runs
from touchline.tracking.client import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no Chromium with chromedriver here: apt-get install chromium-driver"
)
NAME = "rugby-soccer"
TOO_MUCH = 20 * 2**20 + 1  # bytes of a photo
TOO_LARGE = 22 * 2**20  # bytes of any request
ENDED = 4_194_305  # no process has this number, which is higher than Linux gives


def colour(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 40), COLOURS[name]).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Paths, Store]:
    """Two versions, the second with red and blue the other way round, and a model in a file, which has no opinion."""
    root = tmp_path_factory.mktemp("machine") / "a project; $(id)"
    (root / "models").mkdir(parents=True)
    paths = Paths(root, root)
    store = runs.open_store(paths, NAME)
    for turned in (False, True):
        planted(turned=turned).save(root / "model.keras")
        run = runs.start(store, "transfer", {}, {}, {"name": "split", "digest": "0", "source": "-", "counts": {}})
        runs.finish(
            store,
            run,
            model_path=root / "model.keras",
            image_size=SIDE,
            classes=CLASSES,
            training_photos=[],
            metrics={},
        )
        registry.register(store, NAME, run, {"touchline.model": "transfer"}, "")
    planted(steepness=0.0).save(root / "models/cnn.keras")
    files.write_json(root / "models/cnn.json", {"classes": CLASSES})
    return paths, store


@pytest.fixture
def models(store: tuple[Paths, Store], params_with: Any) -> app.Models:
    registry.promote(store[1], NAME, 1)
    registry.set_alias(store[1], NAME, "challenger", 2)
    return app.Models(store[0], params_with())


def test_the_champion_is_asked_first_and_the_challenger_beside_it(models: app.Models) -> None:
    assert models.choices() == {
        "1": "transfer (version 1, champion)",
        "2": "transfer (version 2, challenger)",
        "cnn": "cnn (models/cnn.keras)",
    }


def test_where_the_challenger_became_champion_a_model_of_another_name_stands_beside_it(
    models: app.Models, store: tuple[Paths, Store]
) -> None:
    registry.promote(store[1], NAME, 2)
    assert list(models.choices()) == ["2", "cnn", "1"]


def test_the_model_that_was_named_is_asked_first(store: tuple[Paths, Store], params_with: Any) -> None:
    assert next(iter(app.Models(store[0], params_with(), "cnn").choices())) == "cnn"


def test_each_model_answers_for_itself_and_shows_where_it_looked(models: app.Models) -> None:
    models.choices()
    first, second, unsure = (models.ask(each, colour("red")) for each in ("1", "2", "cnn"))
    assert (first.model, first.answer.label) == ("rugby-soccer version 1", "red")
    assert (second.model, second.answer.label) == ("rugby-soccer version 2", "blue")
    assert (unsure.model, unsure.answer.label) == ("models/cnn.keras", "unsure")
    assert first.picture


def test_what_training_wrote_anew_is_asked_anew(models: app.Models, store: tuple[Paths, Store], tmp_path: Path) -> None:
    models.choices()
    file = store[0].models / "cnn.keras"
    before = file.read_bytes()
    assert models.ask("cnn", colour("red")).answer.label == "unsure"
    planted().save(tmp_path / "new.keras")
    files.write_bytes(file, (tmp_path / "new.keras").read_bytes())
    assert models.ask("cnn", colour("red")).answer.label == "red"
    files.write_bytes(file, before)


def test_a_model_that_was_not_offered_is_not_opened(models: app.Models, store: tuple[Paths, Store]) -> None:
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
    project = projects.copy(projects.built(tmp_path_factory).project, root)
    scratch = tmp_path_factory.mktemp("scratch")
    for owner in (ENDED, os.getpid()):
        (scratch / f"touchline-app-{owner}-left" / "0123").mkdir(parents=True)
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
    """The addresses that the page has asked for since this was last called; not those of the browser's own pages.

    None of them may have been refused: `app._ROUTES` has to have all that the page uses.
    """
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    answers = [each["params"]["response"] for each in messages if each["method"] == "Network.responseReceived"]
    assert not [each["url"] for each in answers if each["status"] >= 400]
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
    page.project.call("ingest")
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
    picture(browser, "not an image")
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
    assert requested(browser, page)


@pytest.fixture
def suspects(page: Page) -> list[str]:
    """Three photos of rugby that the audit takes for soccer, as it would write them."""
    table = files.read_table(page.project.root / "data/validated.csv")
    chosen = table[table["class"] == "rugby"].head(3)[["path", "sha256", "class"]]
    found = chosen.assign(problem="wrong label", score=[0.9, 0.8, 0.7], suggested="soccer", near_to="")
    files.write_table(page.project.root / "reports/audit.csv", found)
    files.write_text(page.project.root / "data/decisions.csv", "photo,decision,label,who,why\n")
    return list(chosen["path"])


def decided(page: Page) -> list[list[str]]:
    text = (page.project.root / "data/decisions.csv").read_text()
    return [row[:4] for row in list(csv.reader(io.StringIO(text)))[1:]]


def to_review(browser: Any, page: Page) -> None:
    opened(browser, page)
    found(browser, "#to-review-button").click()


@in_a_browser
def test_the_audit_runs_from_the_page(page: Page, browser: Any) -> None:
    (page.project.root / "reports/audit.csv").unlink(missing_ok=True)
    to_review(browser, page)
    found(browser, "#review .aside", "Look for suspects")
    found(browser, "#audit").click()
    found(browser, "#made", "the audit ran on")
    assert (page.project.root / "reports/audit.csv").is_file()


@in_a_browser
def test_suspects_are_settled_with_a_mouse(page: Page, browser: Any, suspects: list[str]) -> None:
    to_review(browser, page)
    assert len(found(browser, ".review .grid").find_elements("css selector", "img")) == 3
    found(browser, f"article[data-shown='{suspects[0]}']")
    # Beside it: what the model looked at, and the most similar photos of each class.
    assert len(found(browser, ".review .pair").find_elements("css selector", "img")) == 2
    assert all(found(browser, ".review .aside", f"photos of {label}") for label in ("rugby", "soccer"))
    picture(browser, "review")
    name = found(browser, "#who textarea, #who input")
    name.clear()
    name.send_keys("Ann d12")  # keys that mean nothing here
    found(browser, ".acts [data-label=soccer]").click()
    found(browser, f"article[data-shown='{suspects[1]}']")
    found(browser, f".grid [data-photo='{suspects[2]}']").click()
    found(browser, f"article[data-shown='{suspects[2]}']")
    found(browser, ".acts [data-act=drop]").click()
    found(browser, ".review .left", "1 left, 2 done")
    found(browser, ".acts [data-act=keep]").click()
    found(browser, ".review .left", "0 left, 3 done")
    assert "dvc repro" in found(browser, ".review").text
    assert decided(page) == [
        [suspects[0], "relabel", "soccer", "Ann d12"], [suspects[2], "drop", "", "Ann d12"],
        [suspects[1], "keep", "", "Ann d12"],
    ]  # fmt: skip
    found(browser, ".acts [data-act=undo]").click()
    found(browser, ".review .left", "1 left, 2 done")
    assert len(decided(page)) == 2
    assert requested(browser, page)


@in_a_browser
def test_suspects_are_settled_with_keys(page: Page, browser: Any, suspects: list[str]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    def press(key: str, left: int, done: int) -> None:
        ActionChains(browser).send_keys(key).perform()
        found(browser, ".review .left", f"{left} left, {done} done")

    to_review(browser, page)
    found(browser, f"article[data-shown='{suspects[0]}']")
    for key, left, done in (("2", 2, 1), ("d", 1, 2), ("u", 2, 1), ("k", 1, 2), ("1", 0, 3)):
        press(key, left, done)
    assert [row[:3] for row in decided(page)] == [
        [suspects[0], "relabel", "soccer"], [suspects[1], "keep", ""], [suspects[2], "keep", ""],
    ]  # fmt: skip
    # The tab that is hidden does not listen.
    opened(browser, page)
    ActionChains(browser).send_keys("u").perform()
    assert len(decided(page)) == 3


@pytest.fixture
def client(page: Page) -> Iterator[httpx.Client]:
    """A program that speaks to the page's server as its browser would."""
    with httpx.Client(base_url=page.url, trust_env=False, timeout=60) as client:
        yield client


def functions(client: httpx.Client) -> dict[str, int]:
    return {each["api_name"]: each["id"] for each in client.get("config").json()["dependencies"]}


def called(client: httpx.Client, function: str, data: list[Any], session: str = "test", **headers: str) -> dict:
    """What became of a call of one of the page's functions."""
    asked = {"data": data, "fn_index": functions(client)[function], "session_hash": session}
    client.post("gradio_api/queue/join", json=asked, headers=headers).raise_for_status()
    with client.stream("GET", f"gradio_api/queue/data?session_hash={session}", headers=headers) as lines:
        [done] = [json.loads(line[6:]) for line in lines.iter_lines() if "process_completed" in line]
    return done


def uploaded(client: httpx.Client, content: bytes, name: str = "a.jpg", **headers: str) -> Path:
    answer = client.post("gradio_api/upload", files={"files": (name, content)}, headers=headers)
    [path] = answer.raise_for_status().json()
    return Path(path)


def to_try(client: httpx.Client) -> set[Path]:
    """The test photos that the page shows."""
    paths = re.findall(r'"path": ?"([^"]+\.jpg)"', client.get("config").text)
    assert paths
    return set(map(Path, paths))


def lies_in(page: Page) -> list[Path]:
    """Files of the page's temporary folder."""
    folder = page.scratch / next(path.name for path in page.scratch.iterdir() if f"-{page.process.pid}-" in path.name)
    return [path for path in folder.rglob("*") if path.is_file()]


def test_no_file_of_the_machine_is_served_and_too_large_a_body_is_refused(page: Page, client: httpx.Client) -> None:
    inside = page.project.root / "params.yaml"
    for name in ("/etc/passwd", str(inside), "params.yaml", "file:///etc/passwd"):
        assert client.get(f"gradio_api/file={name}").status_code in (403, 404)
        photo = {"path": name, "meta": {"_type": "gradio.FileData"}}
        assert called(client, "answer", [photo, "1", ""])["success"] is False
    assert client.post("gradio_api/upload", files={"files": ("a.jpg", bytes(TOO_MUCH))}).status_code == 413


@pytest.mark.parametrize("foreign", ["rebound", "other origin", "null", "other port", "embedded"])
def test_a_foreign_page_reads_nothing_and_changes_nothing(page: Page, client: httpx.Client, foreign: str) -> None:
    evil = f"evil.example:{client.base_url.port}"
    headers = {
        "rebound": {"Host": evil, "Origin": f"http://{evil}"},
        "other origin": {"Origin": "http://evil.example"},
        "null": {"Origin": "null"},
        "other port": {"Origin": "http://127.0.0.1:3000"},
        "embedded": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    }[foreign]
    shown = next(iter(to_try(client)))
    ids, queue, files = functions(client), page.queue(), lies_in(page)
    event = {"data": ["", "rugby"], "fn_index": ids["correct"], "session_hash": "foreign"}
    for method, path, body in (
        ("GET", "", {}), ("GET", "config", {}), ("GET", f"gradio_api/file={shown}", {}), ("GET", "gradio_api/info", {}),
        ("GET", "gradio_api/heartbeat/foreign", {}), ("GET", "gradio_api/queue/data?session_hash=foreign", {}),
        ("GET", "gradio_api/deep_link?session_hash=test", {}), ("GET", "gradio_api/startup-events", {}),
        ("POST", "gradio_api/upload", {"files": {"files": ("a.jpg", colour("red"))}}),
        ("POST", "gradio_api/process_recording", {"files": {"video": ("a.mp4", b"a")}}),
        ("POST", "gradio_api/queue/join", {"json": event}), ("POST", "gradio_api/run/predict", {"json": event}),
        ("POST", "gradio_api/component_server", {"json": event}), ("POST", "login", {"data": {"username": "a"}}),
    ):  # fmt: skip
        answer = client.request(method, path, headers=headers, **body)
        assert answer.status_code == 403, path
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert not [name for name in answer.headers if name.startswith("access-control")]
    asked = {"Access-Control-Request-Method": "POST"}
    assert client.options("gradio_api/upload", headers=headers | asked).status_code == 403
    assert page.queue() == queue and lies_in(page) == files


def test_no_web_socket_is_opened(client: httpx.Client) -> None:
    wanted = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
              "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw=="}  # fmt: skip
    for path in ("", "gradio_api/queue/join", "gradio_api/heartbeat/x"):
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            assert client.get(path, headers=wanted | headers).status_code == 403


def test_the_users_own_page_is_answered_under_each_name(page: Page, client: httpx.Client) -> None:
    for name in ("localhost", "127.0.0.1", "[::1]"):
        own = f"{name}:{client.base_url.port}"
        path = uploaded(client, colour("red"), Host=own, Origin=f"http://{own}")
        photo = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        done = called(client, "answer", [photo, "1", ""], f"at{name[1:-1]}", Host=own, Origin=f"http://{own}")
        assert done["success"] and "Answered by" in done["output"]["data"][0]


def test_only_the_routes_that_the_page_uses_are_there(page: Page, client: httpx.Client) -> None:
    before = lies_in(page), sorted(page.scratch.iterdir())
    called(client, "refresh", [], "linked")
    for method, path in (
        ("GET", "gradio_api/deep_link?session_hash=linked"), ("GET", "gradio_api/file=http://127.0.0.1:9/a.jpg"),
        ("GET", "gradio_api/proxy=http://127.0.0.1:9/a.jpg"), ("GET", "monitoring"), ("GET", "gradio_api/vibe-code"),
        ("GET", "docs"), ("GET", "openapi.json"), ("POST", "gradio_api/process_recording"), ("POST", "login"),
        ("POST", "gradio_api/component_server"), ("POST", "gradio_api/call/correct"), ("POST", "gradio_api/cancel"),
    ):  # fmt: skip
        files = {"video": ("a.mp4", b"a")} if "recording" in path else None
        assert client.request(method, path, files=files).status_code == 404
    assert (lies_in(page), sorted(page.scratch.iterdir())) == before
    # What goes through the queue does not go past it.
    ids = functions(client)
    for function in ("answer", "correct"):
        asked = {"data": [None, "rugby"], "fn_index": ids[function], "session_hash": "test"}
        assert client.post("gradio_api/run/predict", json=asked).status_code == 404


def test_a_photo_is_taken_and_not_fetched(params_with: Any, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    import gradio

    fetched = []
    monkeypatch.setattr(
        gradio.processing_utils, "async_ssrf_protected_download", lambda *asked, **_: fetched.append(asked)
    )
    photo = gradio.Image()
    app._take_bytes(photo)
    with pytest.raises(gradio.Error):
        asyncio.run(photo.async_move_resource_to_block_cache("https://example.com/large.jpg"))
    assert not fetched


def test_a_photo_that_was_forgotten_is_not_kept_again(paths: Paths, params_with: Any) -> None:
    models = SimpleNamespace(choices=lambda: {"cnn": "cnn"}, look=None)
    built = app.page(paths, params_with(), models)
    [correct] = [each.fn for each in built.fns.values() if each.name == "correct"]
    photo, other = colour("red"), colour("blue")
    forgotten.add(paths.forgotten, Forgotten(frozenset({hashlib.sha256(photo).hexdigest()})))
    for content, kept in ((photo, 0), (other, 1)):
        correct((content, []), "rugby")
        assert len(feedback.entries(paths.feedback)) == kept


def test_uploads_are_limited_in_size_together(client: httpx.Client) -> None:
    large = {f"{number}.jpg": bytes(5 * 2**20) for number in range(5)}
    answer = client.post("gradio_api/upload", files=[("files", each) for each in large.items()])
    assert answer.status_code == 413
    # A field of a form is held in memory: it is no way round the limit.
    assert client.post("gradio_api/upload", files={"a": (None, bytes(TOO_LARGE))}).status_code == 413
    assert client.post("gradio_api/queue/join", content=iter([bytes(2**20)] * (TOO_LARGE // 2**20))).status_code == 413


def test_uploads_are_limited_in_number_and_old_ones_are_swept(page: Page, client: httpx.Client) -> None:
    before = len(lies_in(page))
    for number in range(3):
        many = [("files", (f"{number} {each}.jpg", os.urandom(9))) for each in range(app._UPLOADS)]
        client.post("gradio_api/upload", files=many).raise_for_status()
        assert len(lies_in(page)) <= before + 2 * app._UPLOADS
    last = uploaded(client, colour("red"))
    assert last.exists() and len(lies_in(page)) <= before + app._UPLOADS
    # What is there to be tried stays, and what broke off goes as what arrived.
    assert to_try(client) <= set(lies_in(page))
    broken = last.parent.parent / "tmpbroken"
    broken.write_bytes(b"a")
    for path in (last, broken):
        os.utime(path, (1, 1))
    uploaded(client, colour("blue"))
    assert not last.exists() and not broken.exists()


def test_what_killed_apps_left_is_deleted_and_what_others_have_is_not(page: Page) -> None:
    left = {path.name for path in page.scratch.glob("touchline-app-*-left")}
    assert left == {f"touchline-app-{os.getpid()}-left"}


def test_a_port_in_use_is_one_line(page: Page) -> None:
    port = page.url.rstrip("/").rpartition(":")[2]
    said = page.project.touchline("app", "--port", port, exit_code=1)
    assert f"127.0.0.1:{port}" in said and "--port" in said and said.count("\n") == 1


def test_when_it_is_ended_no_upload_is_left(page: Page, client: httpx.Client) -> None:
    assert uploaded(client, colour("red")).exists()
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(60) == 0
    assert not list(page.scratch.glob(f"touchline-app-{page.process.pid}-*")) and not list(page.scratch.rglob("*.jpg"))
