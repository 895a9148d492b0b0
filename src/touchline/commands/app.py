"""`touchline app`: a page to try the models on photos, two side by side, and to say where they are wrong. A second tab
is for doubtful photos: see `touchline.commands.review`.

A photo's own bytes go through `classifier.pixels` and the forward pass of `predict`, so the page and the command line
have one answer. Uploads lie in a temporary folder for an hour at most; only what a person sends as a correction stays,
in the queue of `touchline.sources.feedback`.
"""

import hashlib
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from touchline.commands import review
from touchline.core import guard, ports
from touchline.core.errors import TouchlineError
from touchline.core.files import read_table
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.data import forgotten, rights
from touchline.data.thumbnails import jpeg, thumbnail
from touchline.models import explain
from touchline.models.classifier import Answer, Classifier, pixels, resolve_to_serve
from touchline.models.engines import Explain
from touchline.report import html
from touchline.sources import feedback

if TYPE_CHECKING:
    import gradio
    import pandas as pd

_MAX_MEGABYTES = 20
# Pixels of the longer side of what is shown of a photo.
_SIDE, _SMALL = 480, 160
# Models in memory, photos of each class to try, requests that wait, sessions (each remembers its last photo).
_LOADED, _EXAMPLES, _WAITING, _SESSIONS = 4, 3, 16, 32
# Seconds: how often uploads are looked through, how old they grow, and how long one may take.
_SWEEP, _KEPT, _UPLOAD = 600, 3600, 120
# Uploads kept at most, in files and in bytes, and bytes on their way at most.
_UPLOADS, _UPLOADED, _UPLOADING = 100, 256 * 2**20, 128 * 2**20
_NONE = ""
_INTRO = "<p>Give a photo, and see a model's answer and what it looked at.</p>"
_WRONG = """<h2>Wrong?</h2><p>Say what it is. Only then is the photo kept, in <code>data/feedback</code>: to be learned
from, and it may be seen in reports. Leave photos of anything else.</p>"""
_EMPTY = '<p class="aside">Its answer comes here.</p>'

_STYLE = """
.gradio-container { width: 100%; max-width: 76rem !important; margin: 0 auto; overflow-wrap: anywhere }
.gradio-container .html-container { padding: 0 }
.gradio-container h1 { font-size: 1.6rem; font-weight: 700; margin: .5rem 0 }
.gradio-container h2 { font-size: 1.2rem; font-weight: 700; margin: .5rem 0 }
#photo img { object-fit: contain }
.gallery { max-width: 17.5rem }
.gallery-item img { width: 5rem; height: 5rem; object-fit: cover }
@media (max-width: 40rem) {
  #photo { height: 15rem !important }
  .gallery { max-width: none; flex-wrap: nowrap }
  .gallery-item img { width: 100%; height: auto; aspect-ratio: 1 }
}
#keep { width: fit-content; flex: none }
.answer .label { font-size: 1.9rem; font-weight: 700; line-height: 1.2; margin: .25rem 0 .5rem }
.answer .label.unsure { color: #b45309 }
.dark .answer .label.unsure { color: #fbbf24 }
.answer .similar { display: flex; gap: .5rem; margin: .4rem 0 1rem }
.answer .similar figure { flex: 1; max-width: 10rem }
.answer .similar img { height: 6rem; object-fit: cover }
.answer .label small { font-size: 1rem; font-weight: 400 }
.answer dl { margin: 0 0 1rem }
.answer dl > div { margin: .4rem 0 }
.answer dt, .answer dd { margin: 0 }
.answer .best dt { font-weight: 600 }
.answer dd { display: flex; align-items: center; gap: .75rem }
.answer .bar { flex: 1; height: .6rem; border-radius: .3rem; background: var(--border-color-primary); overflow: hidden }
.answer .bar span { display: block; height: 100%; background: #64748b }
.answer .best .bar span { background: #0072b2 }
.dark .answer .best .bar span { background: #56b4e9 }
.answer output { min-width: 4.2rem; text-align: right; font-variant-numeric: tabular-nums }
.answer figure { margin: 0 }
.answer img { width: 100%; border-radius: var(--radius-md) }
.answer figcaption, .aside { font-size: .875rem; opacity: .8; margin: .4rem 0 }
.aside a { text-decoration: underline }
.refusal { border-left: .3rem solid #dc2626; padding: .5rem .8rem; background: #dc262614; border-radius: .2rem }
"""


@dataclass(frozen=True)
class _Loaded:
    classifier: Classifier
    explainer: Explain | None


@dataclass(frozen=True)
class Said:
    """What a model said of a photo.

    Attributes:
        model: what people call it.
        picture: what it looked at, a JPEG in base64; empty for a model that cannot be explained.
        similar: the training photos that it resembles most, each a JPEG in base64, and their classes.
    """

    model: str
    answer: Answer
    picture: str
    similar: Sequence[tuple[str, str]] = ()


class Models:
    """The models there are to ask; those asked last stay in memory.

    Args:
        wanted: the first to ask, see `classifier.resolve`; empty for the champion.
    """

    def __init__(self, paths: Paths, params: Params, wanted: str = "") -> None:
        self._paths, self._params, self._wanted = paths, params, wanted
        self._load = lru_cache(maxsize=_LOADED)(self._load_now)
        self._offered: dict[str, str] = {}

    def choices(self) -> dict[str, str]:
        """What `classifier.resolve` takes, to what people read: the one to ask first, then the one to put beside it.

        Raises:
            TouchlineError: no model was named, and there is no champion.
        """
        from touchline.tracking import registered
        from touchline.tracking.registry import CHALLENGER, CHAMPION

        name = self._params.register_.name
        known = registered.versions(self._paths, name)
        versions = {str(found.number): found for found in known}
        alias = {each: number for number, found in versions.items() for each in found.aliases}
        first = self._wanted or alias.get(CHAMPION)
        if not first:
            raise registered.no_champion(name, known, option=True)
        model_of = {number: found.tags.get("touchline.model", "") for number, found in versions.items()}
        words = {first: first} | {
            number: f"{model_of[number]} (version {number}{_standing(found.aliases)})".strip()
            for number, found in reversed(versions.items())
        }
        words |= {
            each: f"{each} (models/{each}.keras)"
            for each in self._params.models
            if (self._paths.models / f"{each}.keras").is_file()
        }
        # Beside the first stands the challenger, or else what the last run trained under another name.
        other = [each for each in words if each in self._params.models and each != model_of.get(first, first)]
        order = dict.fromkeys([first, alias.get(CHALLENGER, first), *other, *words])
        offered = {each: words[each] for each in order}
        self._offered.update(offered)
        return offered

    def ask(self, wanted: str, content: bytes) -> Said:
        """What the model says of the photo in these bytes.

        Args:
            wanted: a key of what `choices` gave: a browser may send any text, and `resolve` opens files.

        Raises:
            TouchlineError: there is no such model, or the bytes are not an image that can be judged.
        """
        if wanted not in self._offered:
            raise TouchlineError("there is no such model: load the page again")
        classifier, row, answer, picture = self._judged(wanted, content)
        files = rights.files(self._paths, self._params)
        similar = [(jpeg(thumbnail(files[each.sha256], _SMALL)), each.label) for each in classifier.nearest(row, files)]
        return Said(classifier.name, answer, picture, similar)

    def look(self, content: bytes, without: str) -> tuple[str, str, dict[str, list[str]]]:
        """The first model's view of a photo; see `review.Look`.

        Raises:
            TouchlineError: as `ask`.
        """
        classifier, row, answer, picture = self._judged(next(iter(self.choices())), content)
        files, similar = rights.files(self._paths, self._params), {}
        if classifier.reference:
            labels = dict(zip(classifier.reference.digests, classifier.reference.labels, strict=True))
            for label in classifier.classes:
                among = {each for each in files if labels.get(each) == label and each != without}
                nearest = classifier.nearest(row, among)
                similar[label] = [jpeg(thumbnail(files[each.sha256], _SMALL)) for each in nearest]
        perhaps = "" if answer.label == answer.guess else f" (perhaps {answer.guess})"
        return f"{classifier.name} answers {answer.label}{perhaps}, {answer.confidence:.0%}", picture, similar

    def _judged(self, wanted: str, content: bytes) -> tuple[Classifier, np.ndarray, Answer, str]:
        """The model, what it makes of a photo, its answer, and the heat map."""
        loaded = self._loaded(wanted)
        classifier = loaded.classifier
        try:
            photo = pixels(content, classifier.side, self._params.validate_.max_megapixels)[None]
        except TouchlineError as error:
            raise TouchlineError(f"this file cannot be judged: {str(error).removeprefix('photo ')}") from None
        row = classifier.forward(photo)[0]
        [similarity] = classifier.similarities(row[None])
        answer, picture = classifier.answer(row, similarity, self._params.predict), ""
        if loaded.explainer:
            heat = loaded.explainer(photo, np.array([classifier.classes.index(answer.guess)]))[0]
            picture = _picture(content, heat)
        return classifier, row, answer, picture

    def warm(self) -> None:
        """Load the first model, so that what is wrong with it is said before a page is there."""
        self._loaded(next(iter(self.choices())))

    def _loaded(self, wanted: str) -> _Loaded:
        # What training wrote anew is another model.
        file = self._paths.models / f"{wanted}.keras"
        return self._load(wanted, file.stat().st_mtime_ns if file.is_file() else 0)

    def _load_now(self, wanted: str, _: int) -> _Loaded:
        classifier = resolve_to_serve(self._paths, self._params, wanted)
        try:
            explainer = classifier.explainer()
        except TouchlineError:
            explainer = None  # and the page says so
        return _Loaded(classifier, explainer)


def run(
    paths: Paths, params: Params, wanted: str, host: str, port: int, allowed_hosts: Sequence[str] = (), who: str = ""
) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        allowed_hosts: see `guard.Guard`.
        who: the name that decisions are signed with, unless the page is given another.

    Raises:
        TouchlineError: Gradio is not installed, the port is not free, or see `Models.choices` and `resolve_to_serve`.
        ParamsError: see `guard.check_allowed`.
    """
    guard.check_allowed(allowed_hosts)  # the guard itself is made when Gradio's server has started
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio asks its own server whether it is up, and a proxy of the network would not know it.
    proxied_not = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, [proxied_not, "127.0.0.1", "localhost", host]))
    models = Models(paths, params, wanted)
    with _temporary_folder() as folder:
        # Before Gradio is imported: some of its modules read it once.
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        try:
            import gradio
        except ModuleNotFoundError:
            raise TouchlineError("`touchline app` needs Gradio: pip install 'touchline[app]'") from None
        models.warm()
        built, uploads = page(paths, params, models, who), _Uploads(folder)

        @asynccontextmanager
        async def guarded(server: "gradio.routes.App") -> AsyncIterator[None]:
            # Around all of Gradio: its own middleware lets pages of this machine's other ports ask.
            starlette = server.middleware_stack
            assert starlette is not None  # Starlette has built it by now
            limited = guard.Bodies(_Routes(starlette, uploads), (_MAX_MEGABYTES + 1) * 2**20, _UPLOADING, _UPLOAD)
            server.middleware_stack = guard.Guard(limited, host, allowed_hosts)
            yield

        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ports.bound(host, port).close()  # another program may have taken it meanwhile
        built.launch(
            server_name=f"[{host}]" if ":" in host else host, server_port=port, share=False,
            prevent_thread_lock=True, quiet=True,
            max_file_size=f"{_MAX_MEGABYTES}mb", footer_links=[], run_history=False, ssr_mode=False,
            enable_monitoring=False, mcp_server=False, pwa=False, inbrowser=False, num_workers=0,
            state_session_capacity=_SESSIONS, app_kwargs={"lifespan": guarded}, css=_STYLE + review.STYLE,
            theme=gradio.themes.Default(
                primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"],
                font_mono=["ui-monospace", "monospace"],
            ),
        )  # fmt: skip
        print(f"Try the models: {ports.url(host, port)}/ (Ctrl-C ends it)", flush=True)
        try:
            while not ended.wait(_SWEEP):
                uploads.sweep()
        finally:
            built.close(verbose=False)


# Of Gradio's routes those that the page uses. Among the others are some that write files where they are not swept, that
# fetch an address for their client, or that change state on a GET, which other pages can link to.
_ROUTES = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|(assets|static)/.*"
    r"|gradio_api/(startup-events|upload|upload_progress|file=/.*|heartbeat/\w+|run/predict|queue/(join|data)))?"
)


class _Routes:
    """ASGI middleware: the routes that the page uses, and room for what is uploaded."""

    def __init__(self, app: ASGIApp, uploads: "_Uploads") -> None:
        self._app, self._uploads = app, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 404 or pass the request on."""
        if scope["type"] == "http" and not _ROUTES.fullmatch(scope["path"]):
            await JSONResponse({"detail": "the page does not use this"}, 404)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"].endswith("/upload"):
            await run_in_threadpool(self._uploads.sweep)
        await self._app(scope, receive, send)


class _Uploads:
    """The folder of uploads. What lies in it at the beginning, photos to try, stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stay = set(self._files())

    def sweep(self) -> None:
        """Delete what is too old or too much, oldest first; uploads too that broke off, which Gradio forgets."""
        uploads = {path: stat for path, stat in self._files().items() if path not in self._stay}
        files, size = len(uploads), sum(stat.st_size for stat in uploads.values())
        for path, stat in sorted(uploads.items(), key=lambda item: item[1].st_mtime):
            if files < _UPLOADS and size < _UPLOADED and time.time() - stat.st_mtime < _KEPT:
                return
            path.unlink(missing_ok=True)
            with suppress(OSError):  # each lies in a folder of its own
                path.parent.rmdir()
            files, size = files - 1, size - stat.st_size

    def _files(self) -> dict[Path, os.stat_result]:
        found = {}
        for path in self._folder.rglob("*"):
            with suppress(FileNotFoundError):
                found[path] = path.stat()
        return {path: stat for path, stat in found.items() if S_ISREG(stat.st_mode)}


def page(paths: Paths, params: Params, models: Models, who: str = "") -> "gradio.Blocks":
    """The page, to be launched."""
    import gradio

    learns = "feedback" in params.ingest.sources

    def choices() -> tuple[dict[str, Any], dict[str, Any]]:
        """Choices and value of the two lists of models, as they are now."""
        offered = [(words, key) for key, words in models.choices().items()]
        first, second = ([key for _, key in offered] + [_NONE])[:2]
        return {"choices": offered, "value": first}, {"choices": [*offered, ("none", _NONE)], "value": second}

    def refresh() -> list[gradio.Dropdown]:
        return [gradio.Dropdown(**each) for each in choices()]

    def answer(photo: str | None, *wanted: str) -> tuple[Any, ...]:
        said, cards = [], []
        content = Path(photo).read_bytes() if photo else b""
        for each in wanted:
            card = _EMPTY if each else ""
            if photo and each:
                try:
                    said.append(models.ask(each, content))
                    card = _card(said[-1])
                except TouchlineError as error:
                    card = html.render("answer.html", error=error)
            cards.append(card)
        kept = (content, [{"model": each.model, **vars(each.answer)} for each in said]) if said else None
        return *cards, kept, gradio.Column(visible=bool(said)), gradio.Radio(value=None), ""

    def correct(kept: tuple[bytes, list[dict[str, Any]]] | None, label: str | None) -> str:
        if not kept:
            return "There is no answer to correct: give a photo first."
        if label not in params.classes:
            return "Choose what it is first."
        try:
            if hashlib.sha256(kept[0]).hexdigest() in forgotten.read(paths.forgotten).photos:
                return "This photo was removed for good, and is not kept."
            new = feedback.remember(paths.feedback, kept[0], label, kept[1])
        except (TouchlineError, OSError) as error:
            return Markup("It could not be kept: {}").format(error)
        learned = "the next run learns from it" if learns else (
            "no run learns from it until ingest.sources in params.yaml names feedback"
        )  # fmt: skip
        return Markup("{} as <strong>{}</strong>; {}.").format("Kept" if new else "Kept before", label, learned)

    with gradio.Blocks(title=_title(params), analytics_enabled=False) as built:
        gradio.HTML(Markup("<h1>{}</h1>").format(_title(params)), js_on_load=None)
        with gradio.Tab("Try", id="try"):
            gradio.HTML(_INTRO, js_on_load=None)
            kept = gradio.State(time_to_live=_KEPT)
            with gradio.Row(equal_height=False):
                with gradio.Column(min_width=300):
                    photo = gradio.Image(
                        label="Photo", type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"],
                        webcam_options=gradio.WebcamOptions(mirror=False), buttons=[], height=320, elem_id="photo",
                        placeholder="# Drop a photo here\nor click to choose one",
                    )  # fmt: skip
                    _take_bytes(photo)
                    examples = _examples(paths, params)
                    if len(examples):
                        gradio.Examples(
                            [[str(paths.workspace / path)] for path in examples["path"]], photo,
                            label="Or a test photo", api_visibility="private",
                        )  # fmt: skip
                        known = examples[["title", "author", "licence", "landing_page"]].drop_duplicates()
                        if known.ne("").any(axis=None):
                            gradio.HTML(html.render("credits.html", credits=known.to_dict("records")), js_on_load=None)
                with gradio.Column(min_width=300):
                    first = gradio.Dropdown(label="Model", filterable=False, **choices()[0])
                    first_card = gradio.HTML(_EMPTY, js_on_load=None, elem_id="first")
                with gradio.Column(min_width=300):
                    second = gradio.Dropdown(label="Beside it", filterable=False, **choices()[1])
                    second_card = gradio.HTML(_EMPTY if second.value else "", js_on_load=None, elem_id="second")
            with gradio.Column(visible=False, elem_id="wrong") as wrong:
                gradio.HTML(_WRONG, js_on_load=None)
                label = gradio.Radio(params.classes, label="It is", elem_id="label")
                button = gradio.Button("Keep the correction", variant="primary", elem_id="keep")
                outcome = gradio.HTML(js_on_load=None, elem_id="outcome")
        options: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "models", "concurrency_limit": 1}
        gradio.on(
            [photo.change, first.input, second.input], answer, [photo, first, second],
            [first_card, second_card, kept, wrong, label, outcome], show_progress_on=[first_card, second_card],
            **options,
        )  # fmt: skip
        built.load(refresh, None, [first, second], show_progress="hidden", **options)
        button.click(correct, [kept, label], outcome, show_progress="hidden", **options)
        review.tab(paths, params, models.look, who, options)
        built.queue(max_size=_WAITING, api_open=False)
    return built


def _take_bytes(photo: "gradio.Image") -> None:
    """Have an image component give the path of what was uploaded, and take nothing but uploads."""
    import gradio

    # Gradio would open it, and fail without a word on what is not an image; its bytes are what counts.
    photo.preprocess = lambda upload: upload.path if upload else None  # type: ignore[method-assign,assignment]  # it has no option for it
    cached = photo.async_move_resource_to_block_cache

    async def uploaded(path: str | None) -> str | None:
        # Gradio would fetch it, however large it is.
        if path and "://" in path:
            raise gradio.Error("Give the photo itself, not its address.")
        return await cached(path)

    photo.async_move_resource_to_block_cache = uploaded  # type: ignore[method-assign,assignment]  # likewise


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder of this process's own while the block runs; those of processes that were killed are deleted."""
    import psutil

    place, name = Path(tempfile.gettempdir()), "touchline-app-"
    for left in place.glob(f"{name}*"):
        owner = left.name.removeprefix(name).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)  # another user's cannot be deleted, and links are not followed
    with tempfile.TemporaryDirectory(prefix=f"{name}{os.getpid()}-") as folder:
        yield Path(folder)


def _standing(aliases: Sequence[str]) -> str:
    """The alias that says most; the champion was a challenger before."""
    from touchline.tracking.registry import CHAMPION

    return "".join(f", {each}" for each in sorted(aliases, key=lambda each: each != CHAMPION)[:1])


def _picture(content: bytes, heat: np.ndarray) -> str:
    """A photo with the heat over it, as a JPEG in base64."""
    return jpeg(explain.warmed(thumbnail(content, _SIDE), heat))


def _card(said: Said) -> str:
    return html.render(
        "answer.html", error="", name=said.model, answer=said.answer, picture=said.picture,
        similar=said.similar,
    )  # fmt: skip


def _title(params: Params) -> str:
    *most, last = params.classes
    return f"{', '.join(most).capitalize()} or {last}?"


def _examples(paths: Paths, params: Params) -> "pd.DataFrame":
    """Photos of the test subset that may be shown, some of each class, with what is known of their authors."""
    import pandas as pd

    if not paths.split_table.is_file():
        return pd.DataFrame()
    split = read_table(paths.split_table)
    test = split[split["subset"] == "test"]
    there = test["path"].map(lambda path: (paths.workspace / path).is_file())
    return rights.shown(test[there], params).sort_values("sha256").groupby("class").head(_EXAMPLES)
