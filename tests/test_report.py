"""reports/report.html as a person opens it: from disk, in a browser, on a phone, with whatever text photos bring."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import projects
import pytest

from touchline.core import files, stage
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.models import engines
from touchline.models.classifier import Classifier
from touchline.models.inference import ModelFiles
from touchline.report import page as report
from touchline.sources import imagenet
from touchline.stages import evaluate, train

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

CLASS = "<b>"
TITLE = "<script>alert(1)</script>"
AUTHOR = '"><img src=x onerror=alert(2)>'
PAGE = "https://photos.example/page?a=1&b=2"


class Page(HTMLParser):
    """The elements and the text of a page, as a browser understands them."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._open.append("")
        # Cells and lines of a page stand apart.
        self.text += " " if tag in {"td", "th", "tr", "p", "li", "caption"} else ""

    def handle_data(self, data: str) -> None:
        self.text += "" if self._open and self._open[-1] == "style" else data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> projects.Project:
    """A built project judged anew, with a class, titles and authors that are hostile, and some photos of ImageNet."""
    project = projects.copy(projects.built(tmp_path_factory).project, tmp_path_factory.mktemp("report") / "the project")
    root = project.root
    table = files.read_table(root / "data/split.csv")
    table["class"] = table["class"].replace({"rugby": CLASS})
    table["title"], table["author"], table["landing_page"] = TITLE, AUTHOR, PAGE
    table.loc[table.index % 2 == 0, "landing_page"] = "javascript:alert(3)"
    table.loc[table.index % 3 == 0, ["source", "title", "licence"]] = ["imagenet", "secret", imagenet.TERMS]
    files.write_table(root / "data/split.csv", table)
    for name in ("cnn", "transfer"):
        record = project.json(f"models/{name}.json") | {"classes": [CLASS, "soccer"]}
        record["tags"]["touchline.split_sha256"] = files.sha256(root / "data/split.csv")
        files.write_json(root / f"models/{name}.json", record)
    # No stage before them is named by `evaluate` and `register` in dvc.yaml: what they need is handed on.
    for name in ("data/photos.csv", "data/validated.csv", "data/rejected.csv", "reports/split.json"):
        (root / name).unlink()
    project.change({"classes": [CLASS, "soccer"], "evaluate.gallery": 6})
    project.call("evaluate")
    project.call("register")
    return project


@pytest.fixture(scope="module")
def html(project: projects.Project) -> str:
    return (project.root / "reports/report.html").read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_hostile_titles_and_classes_stay_text(project: projects.Project, page: Page) -> None:
    assert TITLE in page.text and CLASS in page.text and AUTHOR in page.text
    assert not page.all("script", "b", "link", "iframe", "object")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    addresses = {str(attributes["href"]) for attributes in page.all("a")}
    assert PAGE in addresses
    beside = {"validation.html", "../data/croissant.json"}
    assert all(address.startswith(("#", "https://")) or address in beside for address in addresses)
    assert all((project.root / "reports" / name).is_file() for name in beside)


def test_photos_of_imagenet_are_not_shown_unless_they_may_be(project: projects.Project, page: Page) -> None:
    assert "secret" not in page.text and not [image for image in page.all("img") if "secret" in str(image["alt"])]
    split = files.read_table(project.root / "data/split.csv").set_index("path")
    gallery = files.read_table(project.root / "reports/gallery.csv")
    assert set(split.loc[gallery["path"], "source"]) == {"sample"}
    hidden = (split["source"] == "imagenet").sum()
    assert f"{hidden} photos of imagenet may not be shown" in page.text


def test_the_page_holds_the_figures_that_the_stages_wrote(project: projects.Project, page: Page) -> None:
    text = " ".join(page.text.split())
    metrics, outcome = project.json("reports/metrics.json"), project.json("reports/registration.json")
    record = project.json(f"models/{outcome['better_model']}.json")
    assert report.decision(outcome, record["run_name"], projects.REGISTERED) in text
    for name, found in {**metrics["models"], **metrics["baselines"]}.items():
        interval = f"{found['accuracy']:.3f} [{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]"
        assert text.count(interval) >= 2, name  # beside the decision, and in the table
    [test] = metrics["mcnemar"]
    assert f"{test['only_second_right']} only {test['models'][1]}" in text
    for row in files.read_table(project.root / "reports/slices.csv").to_dict("records"):
        interval = f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"
        assert re.search(rf"{re.escape(str(row['slice']))} {row['photos']} .*?{re.escape(interval)}", text), row


def test_counts_by_class_source_and_subset_add_up(project: projects.Project, page: Page) -> None:
    text = " ".join(page.text.split())
    split = files.read_table(project.root / "data/split.csv")
    for (label, source), part in split.groupby(["class", "source"]):
        counts = [(part["subset"] == subset).sum() for subset in ("train", "validation", "test")]
        assert f"{label} {source} {counts[0]} {counts[1]} {counts[2]} {len(part)}" in text


def test_the_run_can_be_done_again_from_what_the_page_says(project: projects.Project, page: Page) -> None:
    text = " ".join(page.text.split())
    for name in ("params.yaml", "data/split.csv", "models/cnn.keras", "models/transfer.keras"):
        digest = hashlib.sha256((project.root / name).read_bytes()).hexdigest()
        assert f"{name} {digest}" in text
    assert f"git checkout {project.git('rev-parse', 'HEAD').strip()}" in text
    # The fixture changed it and committed nothing; dvc.lock is not among the changed files.
    commit = project.git("rev-parse", "HEAD").strip()
    assert "params.yaml" in text.split(commit)[1].partition("dvc.lock")[0]
    cost = json.loads((project.root / ".dvc/tmp/touchline/evaluate.json").read_text())
    assert f"evaluate {cost['seconds']:.1f} {cost['peak_megabytes']:,}" in text


def test_a_committed_tree_is_called_unchanged_whatever_dvc_lock_holds(
    project: projects.Project, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    project.git("clone", "--quiet", str(project.root), str(clone))
    files.write_text(clone / "data/split.csv", "")
    (clone / "dvc.lock").write_text("changed")
    assert stage.code(Paths(clone, clone)) == {"commit": project.git("rev-parse", "HEAD").strip(), "changed": []}
    assert train._tags(Paths(clone, clone))["touchline.git_dirty"] == "false"
    (clone / "a new module.py").write_text("")
    (clone / "params.yaml").write_text("changed")
    assert sorted(stage.code(Paths(clone, clone))["changed"]) == ["a new module.py", "params.yaml"]
    assert train._tags(Paths(clone, clone))["touchline.git_dirty"] == "true"
    shutil.rmtree(clone / ".git")
    assert stage.code(Paths(clone, clone)) == {"commit": "", "changed": []}


def test_each_photo_of_the_gallery_stands_beside_its_heat(project: projects.Project, page: Page) -> None:
    alts = [str(image["alt"]) for image in page.all("img")]
    gallery = files.read_table(project.root / "reports/gallery.csv")
    assert len(gallery) > 0
    for row in gallery.to_dict("records"):
        assert f"Heat map of the same photo: where {row['model']} found {row['predicted']}" in alts
    assert sum(alt.startswith("Heat map") for alt in alts) == len(gallery)
    right = (gallery["class"] == gallery["predicted"]).groupby(gallery["model"]).any()
    labels = [str(each.get("aria-label")) for each in page.all("ul")]
    assert sum(label.startswith("Right answers of") for label in labels) == right.sum() > 0
    with np.load(project.root / "reports/heats.npz") as heats:
        for name, part in gallery.groupby("model"):
            assert heats[name].dtype == np.uint8 and len(heats[name]) == len(part)
            # The heat of a photo is scaled to its largest.
            assert set(heats[name].max(axis=(1, 2))) <= {0, 255} and heats[name].max() == 255


def test_the_better_models_run_has_the_page_in_mlflow(project: projects.Project) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.root}/mlflow/mlflow.db")
    outcome = project.json("reports/registration.json")
    for name, run_id in outcome["run_ids"].items():
        has = "report.html" in [artifact.path for artifact in client.list_artifacts(run_id)]
        assert has == (name == outcome["better_model"])
    kept = Path(client.download_artifacts(outcome["run_ids"][outcome["better_model"]], "report.html"))
    # Links to files beside it, which MLflow does not show with it, are left out.
    own, there = re.findall('href="([^"]*)"', (project.root / "reports/report.html").read_text()), kept.read_text()
    assert re.findall('href="([^"]*)"', there) == [link for link in own if link.startswith(("#", "http"))]
    assert "validation.html" in own


def test_dvc_plots_show_has_the_figures(project: projects.Project, tmp_path: Path) -> None:
    project.dvc("plots", "show", "--out", str(tmp_path / "plots"))
    shown = (tmp_path / "plots/index.html").read_text()
    for name in ("mistakes.jpg", "random_photos.jpg", "learning_curves.png", "confusion.png", "roc.png"):
        assert name in shown, name


def test_the_page_is_of_a_size_that_can_be_sent(html: str) -> None:
    assert len(html) < 3_000_000


@pytest.mark.parametrize(
    "registered, promoted, before, words",
    [
        (4, True, 3, " and, as version 4 of x, the champion: because."),
        (4, True, 4, " and stays the champion, version 4 of x."),
        (4, False, 3, " and is version 4 of x, but not the champion: because."),
        (None, False, 3, "; because."),
    ],
)
def test_the_decision_is_one_sentence(registered: int | None, promoted: bool, before: int, words: str) -> None:
    outcome = {
        "registered": registered and {"version": registered}, "promoted": promoted, "champion_before": before,
        "why_better": "the only model", "reason": "because",
    }  # fmt: skip
    assert report.decision(outcome, "transfer", "x") == f"transfer is the better model (the only model){words}"


def test_few_mistakes_are_filled_up_with_the_least_sure_right_answers(params_with: Callable[..., Params]) -> None:
    labels = ["rugby", "soccer"] * 10
    test = pd.DataFrame(
        {"path": [f"{n}.jpg" for n in range(20)], "class": labels, "source": "folder", "group": "", "licence": ""}
    )
    confidence = np.linspace(0.55, 0.95, 20)
    answers = np.arange(20) % 2
    answers[[4, 9]] = 1 - answers[[4, 9]]
    probabilities = np.empty((20, 2), np.float32)
    probabilities[np.arange(20), answers], probabilities[np.arange(20), 1 - answers] = confidence, 1 - confidence

    def chosen(gallery: int) -> list[str]:
        rows = evaluate._gallery("cnn", test, probabilities, params_with(evaluate={"gallery": gallery}))
        return [path.removesuffix(".jpg") for path in rows["path"]]

    assert chosen(12) == ["9", "4", "0", "1", "2", "3"]  # the surest mistake first, then the least sure right ones
    assert chosen(3) == ["9", "4", "0"]
    assert chosen(1) == ["9"]
    test["source"] = ["imagenet" if number == 9 else "folder" for number in range(20)]
    assert chosen(2) == ["4", "0"]


def test_a_model_that_cannot_be_explained_has_a_gallery_without_heat(
    paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    import cv2
    import keras

    photo = keras.Input((8, 8, 3), dtype="uint8")
    vector = keras.layers.Reshape((192,))(keras.layers.Rescaling(1 / 255)(photo))
    model = keras.Model(photo, keras.layers.Dense(2, activation="softmax")(vector))
    cv2.imwrite(str(paths.workspace / "a.png"), np.zeros((9, 9, 3), np.uint8))
    gallery = pd.DataFrame({"path": ["a.png"], "predicted": ["soccer"]})
    model.save(paths.workspace / "model.keras")
    network = engines.with_tensorflow(model)
    asked = Classifier(network, ["rugby", "soccer"], "model", ModelFiles.at(paths.workspace / "model.keras"))
    assert evaluate._heats(asked, gallery, paths.workspace).shape == (1, 0, 0)
    assert "no heat maps: model" in capsys.readouterr().out


@pytest.fixture(scope="module")
def browser() -> Iterator["WebDriver"]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium with chromedriver here: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    ):  # fmt: skip
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def look(browser: "WebDriver", project: projects.Project, width: int = 1200, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get((project.root / "reports/report.html").as_uri())


def test_nothing_is_asked_of_anybody_and_nothing_is_refused(browser: "WebDriver", project: projects.Project) -> None:
    browser.get_log("performance"), browser.get_log("browser")
    look(browser, project)
    assert browser.execute_script("return document.readyState") == "complete"
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    own = (project.root / "reports/report.html").as_uri()
    assert own in asked and all(url == own or url.startswith("data:") for url in asked)
    assert browser.get_log("browser") == []


def test_every_picture_is_there_and_is_described(browser: "WebDriver", project: projects.Project) -> None:
    look(browser, project)
    images = browser.execute_script(
        "return [...document.images].map(i => [i.alt, i.naturalWidth, i.naturalHeight, i.clientWidth])"
    )
    assert len(images) > 12
    assert [image for image in images if not (image[0].strip() and min(image[1:]) > 0)] == []
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => [s.parentElement.getAttribute('role'),"
        " s.parentElement.getAttribute('aria-label'), s.clientWidth, s.querySelectorAll('text').length])"
    )
    assert len(drawn) >= 6
    assert [svg for svg in drawn if not (svg[0] == "img" and svg[1] and svg[2] > 200 and svg[3] > 5)] == []
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_the_contents_lead_to_their_parts_and_tables_can_be_scrolled_with_keys(
    browser: "WebDriver", project: projects.Project
) -> None:
    look(browser, project)
    broken = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].map(a => a.hash).filter(h => !document.querySelector('h2' + h))"
    )
    assert broken == []
    assert browser.execute_script("return [...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)")
    assert browser.execute_script("return [...document.querySelectorAll('table')].every(t => t.caption?.innerText)")


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_the_page_never_scrolls_sideways(browser: "WebDriver", project: projects.Project, width: int) -> None:
    look(browser, project, width)
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    cut = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('.scroll, pre, svg')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []


CONTRASTS = """
function rgba(text) { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; }
function over(top, under) { return [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])); }
function behind(element) {
  if (!element) return [255, 255, 255];
  const own = rgba(getComputedStyle(element).backgroundColor);
  return own[3] === 1 ? own : over(own, behind(element.parentElement));
}
function light(colour) {
  const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
return [...document.body.querySelectorAll('*')]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.getClientRects().length)
  .map(e => {
    const style = getComputedStyle(e), under = behind(e);
    const text = over(rgba(e.closest('svg') ? style.fill : style.color), under);
    const [high, low] = [light(text), light(under)].sort((a, b) => b - a);
    return [(high + 0.05) / (low + 0.05), e.outerHTML.slice(0, 80)];
  });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_stands_out_from_what_is_behind_it(
    browser: "WebDriver", project: projects.Project, scheme: str
) -> None:
    look(browser, project, scheme=scheme)
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")
    found = browser.execute_script(CONTRASTS)
    assert len(found) > 100
    # WCAG 2.2, 1.4.3: text of usual size.
    assert [each for each in found if each[0] < 4.5] == []


def test_it_prints_on_a_few_pages(browser: "WebDriver", project: projects.Project) -> None:
    import base64

    look(browser, project)
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert 3 <= len(re.findall(rb"/Type /Page\b", printed)) <= 10
