"""Licences of photos by their SPDX names (https://spdx.org/licenses), and what each allows.

Sources state licences in their own words: an address, `CC BY 2.0`, a sentence. As in SPDX, a licence that is not on its
list has a name that begins with `LicenseRef-`.
"""

import re
from dataclasses import dataclass
from typing import Literal

Use = Literal["research", "internal", "product"]
# Each is wider than the one before it.
USES: tuple[Use, ...] = ("research", "internal", "product")


@dataclass(frozen=True)
class Licence:
    """What is known of a licence.

    Attributes:
        name: by SPDX; empty if no licence is stated, or it is not recognised.
        use: the widest of `USES` that it allows for a model; None if unknown.
        share: photos under it may be shown and passed on.
    """

    name: str
    use: Use | None = None
    share: bool = True


_OPEN = {
    name.casefold(): name
    for name in ("MIT", "Apache-2.0", "BSD-3-Clause", "CDLA-Permissive-2.0", "ODbL-1.0", "OGL-UK-3.0", "Unlicense")
}
# An address, or a name with its version. Versions for one country's law (`/by/2.0/de`) allow the same.
_CREATIVE_COMMONS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?creativecommons\.org/licenses/|cc-?|creative-commons-)"
    r"(by(?:-(?:nc|nd|sa)){0,2})[-/](?:v|version-)?([1-4]\.[05])(?:/.*|-[a-z]{2,9})?"
)
_WAIVED = re.compile(r"(?:https?://)?(?:www\.)?creativecommons\.org/publicdomain/zero/1\.0(?:/.*)?|cc-?0(?:-1\.0)?")
_NO_COPYRIGHT = re.compile(
    r"(?:https?://)?(?:www\.)?creativecommons\.org/publicdomain/mark/1\.0(?:/.*)?|(?:cc-)?(?:pdm|public-domain-mark)-1\.0"
)
_OTHER = re.compile(r"LicenseRef-[A-Za-z0-9.-]+")


def named(words: str) -> Licence:
    """The licence that a source states in `words`."""
    words = words.strip()
    folded = re.sub(r"[\s_]+", "-", words.casefold())
    if found := _CREATIVE_COMMONS.fullmatch(folded):
        terms, version = found.group(1).upper(), found.group(2)
        # NC: not for commerce. ND: no derivatives; whether a model that is passed on is one has not been decided.
        use: Use = "research" if "NC" in terms else "internal" if "ND" in terms else "product"
        return Licence(f"CC-{terms}-{version}", use)
    if _WAIVED.fullmatch(folded):
        return Licence("CC0-1.0", "product")
    if _NO_COPYRIGHT.fullmatch(folded):
        return Licence("CC-PDM-1.0", "product")
    if folded in _OPEN:
        return Licence(_OPEN[folded], "product")
    return Licence(words if _OTHER.fullmatch(words) else "")
