"""The second tab of `touchline app`: doubtful photos one by one, each decided with a click or a key.

Decisions about photos of the project become lines of data/decisions.csv. Photos without a label, which `touchline
suggest` chose, go into the queue of `touchline.sources.feedback` with the class that the person chose.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from time import localtime, strftime
from typing import TYPE_CHECKING, Any, Protocol

from touchline.commands import audit
from touchline.core.errors import TouchlineError
from touchline.core.files import read_json, read_table
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.data import decisions, forgotten, rights
from touchline.data.photos import content_of
from touchline.data.thumbnails import jpeg, thumbnail
from touchline.models.classifier import UNKNOWN, UNSURE
from touchline.report import html
from touchline.sources import feedback

if TYPE_CHECKING:
    import pandas as pd

CORRECTED, DOUBTFUL, NEXT = "corrected", "doubtful", "next"
LISTS = {
    audit.WRONG_LABEL: "Likely wrong labels",
    audit.NEAR_DUPLICATE: "Near-duplicates",
    audit.OUTLIER: "Outliers",
    DOUBTFUL: "Unsure or unknown",
    CORRECTED: "Corrected by people",
    NEXT: "To label next",
}
SUGGESTED = "suggested.csv"
# Photos in the grid; pixels of the longer side of each, and of the chosen photo.
_GRID, _SMALL, _LARGE = 24, 128, 480
_LONGEST_NAME = 80

# Each button has its action, and the key for it, in data attributes.
SCRIPT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (button) trigger('submit', {...button.dataset});
});
document.addEventListener('keydown', (event) => {
  if (!element.offsetParent || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches('textarea, input:not([type=radio])')) return;
  const button = element.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (button) { event.preventDefault(); button.click(); }
});
"""
STYLE = """
#lists .wrap { flex-wrap: wrap }
.review { display: grid; grid-template-columns: minmax(9rem, 1fr) 2.6fr; gap: 1.2rem; align-items: start }
.review .left { grid-column: 1 / -1; margin: 0 }
.review .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); gap: .5rem }
.review .grid button { padding: .2rem; border: 2px solid transparent; border-radius: .4rem; text-align: left;
  font-size: .75rem; line-height: 1.25 }
.review .grid button[aria-current=true] { border-color: #0072b2 }
.review .grid img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: .3rem }
.review .acts { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin: .6rem 0 }
.review .acts button { margin: 0; padding: .45rem .8rem; border-radius: .4rem;
  border: 1px solid var(--border-color-primary) }
.review .acts button:hover { border-color: #0072b2 }
.review kbd { font-size: .75rem; opacity: .75; border: 1px solid; border-radius: .2rem; padding: 0 .3rem;
  margin-right: .3rem }
.review figure { margin: 0 }
.review .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem }
.review .pair img { width: 100%; max-height: 24rem; object-fit: contain; border-radius: .3rem }
.review .similar { display: flex; gap: .5rem; margin: .3rem 0 .8rem }
.review .similar img { height: 5.5rem; border-radius: .3rem }
.review figcaption, .review .aside { font-size: .875rem; opacity: .85; margin: .3rem 0 }
@media (max-width: 40rem) { .review { display: block } .review .grid { grid-template-columns: repeat(4, 1fr) } }
"""


@dataclass(frozen=True)
class Item:
    """A photo to decide about.

    Attributes:
        photo: its name in decisions: its path under data/photos, or the first digits of its digest.
        label: its class; empty where it has none yet.
        suggested: the class it looks like; may be empty.
        doubt: 0 to 1.
        why: why it is listed, in a few words.
        near: the other photo of a pair.
    """

    photo: str
    sha256: str
    file: Path
    label: str
    suggested: str
    doubt: float
    why: str
    near: Path | None = None


class Look(Protocol):
    """Gives a model's view of a photo: its answer in words, a heat map, and similar training photos by class.

    Pictures are JPEGs in base64.
    """

    def __call__(self, content: bytes, without: str) -> tuple[str, str, dict[str, list[str]]]:
        """Look at a photo; `without` is the digest of a photo not to show as similar."""


class Session:
    """The state of one person's review. (Not a dataclass, which Gradio would convert to a dict.)

    Attributes:
        at: the photo that is shown; empty for the first of the list.
        done: for each action, a function that undoes it, and its photo; the latest is last.
        skipped: photos without a label that should not be shown again.
    """

    def __init__(self) -> None:
        self.at = ""
        self.done: list[tuple[Callable[[], bool], str]] = []
        self.skipped: set[str] = set()


class Review:
    """The photos to decide about, and what a decision does."""

    def __init__(self, paths: Paths, params: Params, look: Look) -> None:
        self._paths, self._params = paths, params
        self._look = lru_cache(maxsize=64)(lambda file, digest, _: look(content_of(file), digest))
        self._small = lru_cache(maxsize=1024)(lambda file, _: jpeg(thumbnail(file, _SMALL)))
        self._large = lru_cache(maxsize=64)(lambda file, _: jpeg(thumbnail(file, _LARGE)))

    def items(self, name: str) -> list[Item]:
        """Photos of one of the LISTS that have no decision yet, the most doubtful first.

        Raises:
            TouchlineError: a file that the list is made from cannot be read.
        """
        found = {CORRECTED: self._corrected, DOUBTFUL: self._doubtful, NEXT: self._next}.get(name)
        items = list(found() if found else self._audited(name))
        known = decisions.read(self._paths.decisions, self._params.classes)
        decided = tuple(each.digest for each in known)
        # If the other photo of a pair is dropped, there is nothing left to decide.
        dropped = tuple(each.digest for each in known if each.kind == "drop")
        left = {
            each.photo: each
            for each in reversed(items)
            if not each.sha256.startswith(decided) and not (each.near and each.near.stem.startswith(dropped))
        }
        return sorted(left.values(), key=lambda each: (-each.doubt, each.photo))

    def act(self, session: Session, name: str, photo: str, act: str, label: str, who: str) -> str:
        """Carry out the action of a button.

        Args:
            photo: of the item that the button belongs to; a browser may send anything here.
            act: show, next, keep, drop, relabel or undo.

        Returns:
            A message for the person, or an empty string.

        Raises:
            TouchlineError: it cannot be done.
        """
        if act == "undo":
            if not session.done:
                return "Nothing to undo."
            take_back, session.at = session.done.pop()
            return "" if take_back() else "Cannot be undone: the line or photo has been changed or removed since."
        items = [each for each in self.items(name) if each.photo not in session.skipped]
        places = [place for place, each in enumerate(items) if each.photo == photo]
        if not places:
            return "There is already a decision about that photo."
        item, after = items[places[0]], items[(places[0] + 1) % len(items)].photo
        session.at = photo if act == "show" else after
        if act in ("show", "next"):
            return ""
        if act not in decisions.KINDS or (act == "relabel" and label not in self._params.classes):
            raise TouchlineError(f"unknown action {act} {label}: load the page again")
        if act == "relabel" and label == item.label:
            act = "keep"
        if name == NEXT:
            undo = self._label(session, item, item.suggested if act == "keep" else label if act == "relabel" else "")
        else:
            known = label if act == "relabel" else ""
            line = decisions.add(
                self._paths, self._params.classes, photo, act, known, who[:_LONGEST_NAME], item.why
            )  # fmt: skip
            if not line:
                return ""
            undo = partial(decisions.take_back, self._paths, line)
        session.done.append((undo, photo))
        return ""

    def _label(self, session: Session, item: Item, label: str) -> Callable[[], bool]:
        """Give a photo a label, or skip it if the label is empty; returns a function that undoes it."""
        if not label:
            session.skipped.add(item.photo)
            return partial(_unskip, session, item.photo)
        feedback.remember(self._paths.feedback, item.file.read_bytes(), label, [])
        return partial(feedback.forget, self._paths.feedback, item.sha256)

    def page(self, session: Session, name: str, message: str = "") -> str:
        """The list and the chosen photo, as HTML."""
        try:
            items = [each for each in self.items(name) if each.photo not in session.skipped]
            current = next((each for each in items if each.photo == session.at), items[0] if items else None)
            at = items.index(current) if current else 0
            window = items[max(0, min(at - _GRID // 2, len(items) - _GRID)) :][:_GRID]
            seen = self._seen(current) if current else {}
        except (TouchlineError, OSError) as error:
            items, current, window, seen, message = [], None, [], {}, f"{message} {error}".strip()
        return html.render(
            "review.html",
            message=message, left=len(items), done=len(session.done), current=current,
            grid=[(each, self._small(each.file, each.file.stat().st_mtime_ns)) for each in window],
            classes=self._params.classes, seen=seen, unlabelled=name == NEXT, empty=self._empty(name),
            queue=name in (NEXT, CORRECTED) and "feedback" not in self._params.ingest.sources,
        )  # fmt: skip

    def last_audit(self) -> str:
        """When the audit last ran, in words."""
        file = self._paths.reports / "audit.csv"
        if not file.is_file():
            return "the audit has not run yet"
        when = strftime("%Y-%m-%d %H:%M", localtime(file.stat().st_mtime))
        table = self._paths.validated_table
        changed = table.is_file() and table.stat().st_mtime > file.stat().st_mtime
        return f"the audit ran on {when}" + (", and photos have changed since" if changed else "")

    def _seen(self, item: Item) -> dict[str, Any]:
        when = item.file.stat().st_mtime_ns
        said, heat, similar = self._look(item.file, item.sha256, when)
        near = self._large(item.near, item.near.stat().st_mtime_ns) if item.near else ""
        return {"photo": self._large(item.file, when), "said": said, "heat": heat, "similar": similar, "near": near}

    def _empty(self, name: str) -> str:
        if name == NEXT:
            return "Empty: `touchline suggest FOLDER` chooses photos whose labels would teach the model most."
        if name == CORRECTED:
            return "Empty: no answer was corrected on the first tab, or all corrections are decided."
        looked = name == DOUBTFUL or (self._paths.reports / "audit.csv").is_file()
        return "None left." if looked else 'Press "Look for suspects" to find some.'

    def _audited(self, problem: str) -> Iterator[Item]:
        file = self._paths.reports / "audit.csv"
        if not file.is_file():
            return
        files, table = (
            rights.files(self._paths, self._params),
            read_table(file, dtype={"suggested": str, "near_to": str}),
        )
        labels = dict(self._validated()[["path", "class"]].itertuples(index=False))
        for row in table[table["problem"] == problem].to_dict("records"):
            # The audit is out of date for photos that are gone or have another class.
            if row["sha256"] in files and labels.get(row["path"]) == row["class"]:
                near = self._paths.workspace / row["near_to"] if row["near_to"] else None
                why = f"looks like {row['suggested']}" if row["suggested"] else problem
                why = f"near-duplicate of {row['near_to']}" if near else why
                yield Item(
                    row["path"], row["sha256"], files[row["sha256"]], row["class"], row["suggested"], row["score"], why,
                    near if near in files.values() else None,
                )  # fmt: skip

    def _doubtful(self) -> Iterator[Item]:
        """Test photos for which the better model of the last run answers unsure or unknown."""
        reports, params = self._paths.reports, self._params.predict
        if not (reports / "registration.json").is_file():
            return
        better = read_json(reports / "registration.json")["better_model"]
        unknown = read_json(reports / "metrics.json").get("unknown", {}).get(better, {}).get("threshold", -1.0)
        table, similar = (read_table(reports / f"{each}.csv") for each in ("predictions", "similarity"))
        table, similar = (each[each["model"] == better] for each in (table, similar))
        table = table.merge(similar[similar["subset"] == "test"][["path", "similarity"]], on="path", how="left")
        table = table.merge(self._validated()[["path", "sha256"]], on="path")
        files = rights.files(self._paths, self._params)
        for row in table.to_dict("records"):
            said = (
                UNKNOWN if row["similarity"] < unknown else UNSURE if row["confidence"] < params.min_confidence else ""
            )
            if said and row["sha256"] in files:
                doubt = 1 - (row["similarity"] if said == UNKNOWN else row["confidence"])
                why = f"{said}, perhaps {row['predicted']}"
                yield Item(
                    row["path"], row["sha256"], files[row["sha256"]], row["class"], row["predicted"], doubt, why
                )  # fmt: skip

    def _corrected(self) -> Iterator[Item]:
        if not self._params.rights.allows("show", rights.licence(feedback.LICENCE, "feedback")):
            return
        hidden = rights.hidden(self._paths, self._params)
        for each in feedback.entries(self._paths.feedback):
            if each.sha256 in hidden:
                continue
            contradicted = each.confidence if each.guess != each.label else 0.0
            why = f"the model answered {each.guess}" if each.guess else "given a label"
            yield Item(each.sha256[:16], each.sha256, each.photo, each.label, each.guess, contradicted, why)

    def _next(self) -> Iterator[Item]:
        file = self._paths.reports / SUGGESTED
        if not file.is_file():
            return
        labelled = {each.sha256 for each in feedback.entries(self._paths.feedback)}
        labelled |= forgotten.read(self._paths.forgotten).photos
        for row in read_table(file).to_dict("records"):
            photo = Path(row["photo"])
            if row["sha256"] not in labelled and photo.is_file():
                yield Item(row["sha256"][:16], row["sha256"], photo, "", row["guess"], row["doubt"], row["label"])

    def _validated(self) -> "pd.DataFrame":
        return read_table(self._paths.validated_table)


def _unskip(session: Session, photo: str) -> bool:
    session.skipped.discard(photo)
    return True


def tab(paths: Paths, params: Params, look: Look, who: str, options: dict[str, Any]) -> None:
    """Add the tab to the Gradio page that is being built.

    Args:
        who: the initial name of the reviewer.
        options: Gradio's options for every event that runs a model.
    """
    import gradio

    review = Review(paths, params, look)
    first = audit.WRONG_LABEL

    def opened(name: str, session: Session) -> tuple[str, Session]:
        session.at = ""
        return review.page(session, name), session

    def acted(event: gradio.EventData, name: str, who: str, session: Session) -> tuple[str, Session]:
        asked = {key: str((event._data or {}).get(key, "")) for key in ("photo", "act", "label")}
        try:
            message = review.act(session, name, **asked, who=who)
        except (TouchlineError, OSError) as error:
            message = f"Not saved: {error}"
        return review.page(session, name, message), session

    def looked(name: str, who: str, session: Session) -> Iterator[tuple[str, str, Session]]:
        yield "Auditing the photos: this takes seconds to minutes.", gradio.skip(), session
        message = ""
        try:
            audit.run(paths, params, 24, who)
        except TouchlineError as error:
            message = str(error)
        yield review.last_audit(), review.page(session, name, message), session

    with gradio.Tab("Review", id="review", elem_id="to-review") as opening:
        with gradio.Row(equal_height=False):
            lists = gradio.Radio(
                [(words, key) for key, words in LISTS.items()], value=first, label="Photos", elem_id="lists", scale=4
            )
            name = gradio.Textbox(
                who, label="Your name", max_length=_LONGEST_NAME, elem_id="who", scale=1, min_width=140
            )
            with gradio.Column(scale=1, min_width=160):
                button = gradio.Button("Look for suspects", elem_id="audit")
                made = gradio.HTML(review.last_audit, js_on_load=None, elem_id="made")
        page = gradio.HTML(js_on_load=SCRIPT, elem_id="review")
        session = gradio.State(Session)
    options |= {"show_progress": "hidden"}
    opening.select(opened, [lists, session], [page, session], **options)
    lists.input(opened, [lists, session], [page, session], **options)
    page.submit(acted, [lists, name, session], [page, session], **options)
    # Its own queue, so that other people's clicks do not wait for it.
    button.click(looked, [lists, name, session], [made, page, session], **options | {"concurrency_id": "audit"})
