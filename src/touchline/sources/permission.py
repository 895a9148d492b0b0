"""Leaves out photos that may not be used for training, by their licences and by statements in their files."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline.core import parallel
from touchline.core.progress import say
from touchline.data import opt_outs, rights
from touchline.sources import Candidate, Source
from touchline.sources.received import shown

if TYPE_CHECKING:
    from touchline.core.licences import Licence
    from touchline.core.params import Params, RightsParams
    from touchline.core.paths import Paths

# Class, source and origin of a photo.
Identity = tuple[str, str, str]


@dataclass
class Permissions:
    """Applies `rights` in params.yaml to a run of `ingest`, and notes what was left out.

    Attributes:
        refused: why each photo was left out.
        forbidding: the statement in each photo's file that forbids machine learning, honoured or not.
        unreadable: why the statement in a photo's file could not be read.
    """

    rules: "RightsParams"
    refused: dict[Identity, str] = field(default_factory=dict)
    forbidding: dict[Identity, str] = field(default_factory=dict)
    unreadable: dict[Identity, str] = field(default_factory=dict)

    def filtered(self, source: Source) -> Source:
        """The source without the offers whose licences are not allowed; files are checked later by `check_files`."""

        def offers(paths: "Paths", params: "Params") -> Iterator[Candidate]:
            known: dict[str, Licence] = {}
            for candidate in source.offers(paths, params):
                identity = candidate.label, candidate.source, candidate.origin
                if (words := candidate.licence) not in known:
                    known[words] = rights.licence(words, source.name)
                found = known[words]
                if not self.rules.allows("train", found):
                    self.refused[identity] = f"licence: {rights.in_words(found, words)}"
                if identity not in self.refused:
                    yield candidate

        return replace(source, offers=offers)

    def check_files(self, photos: Sequence[tuple[Identity, Path]]) -> set[Identity]:
        """Check the statements in photos' files. Returns the photos that they exclude, which are noted as refused."""
        found = parallel.in_order(lambda photo: opt_outs.read(photo[1].read_bytes()), photos)
        refused: dict[Identity, str] = {}
        for (identity, _), statement in zip(photos, found, strict=True):
            if statement.forbids:
                self.forbidding[identity] = statement.forbids
                if self.rules.opt_outs == "honour":
                    refused[identity] = f"forbids machine learning: {statement.forbids}"
            elif statement.unreadable:
                self.unreadable[identity] = statement.unreadable
                if self.rules.unknown == "refuse":
                    refused[identity] = f"not readable: {statement.unreadable}"
        self.refused |= refused
        return set(refused)

    def left_out(self, source: str | None = None) -> dict[str, int]:
        """How many photos, of one source or of all, were left out, by reason, the most frequent first."""
        reasons = (why for (_, name, _), why in self.refused.items() if source in {None, name})
        return dict(Counter(reasons).most_common())

    def report(self) -> dict[str, Any]:
        """The content of reports/rights.json."""
        return {
            "left_out": self.left_out(),
            "opt_outs": {"photos": len(self.forbidding), "rule": self.rules.opt_outs},
            "not_readable": {"photos": len(self.unreadable), "rule": self.rules.unknown},
        }

    def tell(self) -> None:
        """Print what was left out, and which files forbid machine learning."""
        if counts := self.left_out():
            say("rights: left out: " + ", ".join(f"{count:,} ({reason})" for reason, count in counts.items()))
        for what, found in (
            ("forbid machine learning", self.forbidding),
            ("may forbid machine learning, but the statement cannot be read", self.unreadable),
        ):
            if found:
                (_, source, origin), why = next(iter(found.items()))
                taken = len(found.keys() - self.refused.keys())
                say(
                    f"rights: {len(found):,} photos {what}; {taken:,} of them are used; the first: {source} "
                    f"{shown(origin)} ({why})"
                )
