"""Croissant 1.1 metadata of the photos, with its vocabulary for responsible AI, in JSON-LD.

https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html and croissant-rai-spec.html. Photos are described by
the table that lists them with their SHA-256, not one by one: there may be a million.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline import sources
from touchline.core.files import sha256
from touchline.core.params import SUBSETS, Params
from touchline.core.paths import Paths
from touchline.data import rights

if TYPE_CHECKING:
    import pandas as pd

_CROISSANT = "http://mlcommons.org/croissant/"
_TERMS = (
    "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileProperty",
    "fileObject", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5", "parentField",
    "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator", "source",
    "subField", "transform",
)  # fmt: skip
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": _CROISSANT,
    "rai": f"{_CROISSANT}RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    **{term: f"cr:{term}" for term in _TERMS},
}
# Descriptions of the columns of data/split.csv.
_FIELDS = {
    "path": "Where the photo lies; its file is named by the beginning of its SHA-256",
    "class": "What the photo shows",
    "subset": "train, validation or test",
    "group": "Photos of one group, such as an author's, are in one subset",
    "sha256": "SHA-256 of the photo's file",
    "source": "Where the photo comes from",
    "origin": "What the source calls it",
    "licence": "As the source states it; empty where it does not",
    "author": "Empty where unknown",
}
# As docs/data-card.md has them.
_BIASES = (
    "The source reveals the class: size, compression and style may differ between sources, and a model can learn the "
    "source instead where one gives more of one class than of another.",
    "Authors: where a few people took many of the photos, their style can stand for the class.",
    "The people in the photos: countries, levels, genders, ages, skin colours and disability sport were not measured. "
    "No source is a fair sample of the people who play.",
    "Easy photos: verified labels may favour photos in which the class is obvious. Not measured.",
    "Other sports are left out, so a model has never seen one.",
)
_PERSONAL = (
    "Photos show people, some of them children, and most were not asked. Files are kept as they came, with any time "
    "and place in their EXIF data. Authors are named where the source names them."
)
_LIMITATIONS = (
    "How many labels are wrong was not measured; `touchline audit` lists likely ones. Photos without a group may not "
    "be independent of each other.",
)


def place(paths: Paths) -> Path:
    """The file that the pipeline writes: beside the table that it describes, since it has the relative path of that."""
    return paths.split_table.with_name("croissant.json")


def metadata(paths: Paths, params: Params, split: "pd.DataFrame") -> dict[str, Any]:
    """The metadata, as JSON-LD.

    Args:
        split: data/split.csv.
    """
    names = sorted(set(split["source"]))
    of_sources = [found for name in names if (found := sources.named(name))]
    digest = sha256(paths.split_table)
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": [f"{_CROISSANT}1.1", f"{_CROISSANT}RAI/1.0"],
        "name": "-".join(params.classes),
        "description": f"{len(split):,} photos of {len(params.classes)} classes, divided for training and testing: "
        f"{', '.join(params.classes)}. By source: {_counts(split['source'])}. Files are not part of this description.",
        "version": f"1.0.0+{digest[:16]}",
        "license": [_address(name) for name in rights.counted(split)],
        "keywords": [*params.classes, "image classification"],
        "isLiveDataset": False,
        "distribution": [
            {
                "@type": "cr:FileObject", "@id": "table", "name": "table", "contentUrl": paths.split_table.name,
                "encodingFormat": "text/csv", "sha256": digest,
            },
            {
                "@type": "cr:FileSet", "@id": "photos", "name": "photos", "encodingFormat": ["image/*"],
                "includes": "photos/*/*",
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet", "@id": "subsets", "name": "subsets", "dataType": "cr:Split",
                "key": {"@id": "subsets/name"},
                "field": [_field("subsets/name", "", "sc:Text"), _field("subsets/url", "", "sc:URL")],
                "data": [{"subsets/name": name, "subsets/url": _SPLITS[name]} for name in SUBSETS],
            },
            {
                "@type": "cr:RecordSet", "@id": "classes", "name": "classes", "dataType": "sc:Enumeration",
                "key": {"@id": "classes/name"}, "field": [_field("classes/name", "", "sc:Text")],
                "data": [{"classes/name": name} for name in params.classes],
            },
            _photos(),
        ],
        "rai:dataCollection": " ".join(f"{each.name}: {each.collected}" for each in of_sources if each.collected),
        "rai:dataAnnotationProtocol": [f"{each.name}: {each.labelled}" for each in of_sources if each.labelled],
        "rai:dataPreprocessingProtocol": [
            "Photos that do not decode in full, are too small, too narrow, too large or of one flat colour, or that "
            "are the same bytes as another, were rejected; near-duplicates and photos of one group are in one subset.",
        ],
        "rai:dataUseCases": ["Training and testing image classifiers."],
        "rai:dataBiases": [*_BIASES, *_leaning(split)],
        "rai:dataLimitations": [*_LIMITATIONS],
        "rai:personalSensitiveInformation": [_PERSONAL],
    }  # fmt: skip


_SPLITS = {
    "train": f"{_CROISSANT}TrainingSplit", "validation": f"{_CROISSANT}ValidationSplit",
    "test": f"{_CROISSANT}TestSplit",
}  # fmt: skip


def _field(name: str, description: str, kind: str, **more: Any) -> dict[str, Any]:
    found = {"@type": "cr:Field", "@id": name, "name": name, "description": description, "dataType": kind} | more
    return {key: value for key, value in found.items() if value != ""}


def _photos() -> dict[str, Any]:
    """The rows of data/split.csv; subset and class refer to the record sets that list their values."""
    lists = {"subset": "subsets/name", "class": "classes/name"}
    fields = [
        _field(
            f"rows/{column}", description, "sc:Text",
            source={"fileObject": {"@id": "table"}, "extract": {"column": column}},
        )
        | ({"references": {"field": {"@id": lists[column]}}} if column in lists else {})
        for column, description in _FIELDS.items()
    ]  # fmt: skip
    return {"@type": "cr:RecordSet", "@id": "rows", "name": "rows", "key": {"@id": "rows/path"}, "field": fields}


def _counts(values: "pd.Series") -> str:
    return ", ".join(f"{name} {count:,}" for name, count in values.value_counts().items())


def _leaning(used: "pd.DataFrame") -> list[str]:
    """The share of each class that each source supplies; empty if there is one source."""
    if used["source"].nunique() < 2:
        return []
    shares = used.groupby("class")["source"].value_counts(normalize=True)
    found = [f"{source} gives {share:.0%} of {label}" for (label, source), share in shares.items()]
    return [f"Measured: {'; '.join(found)}."]


def _address(licence: str) -> str:
    """The address of a licence on the SPDX list; another licence as it is stated."""
    known = rights.licence(licence, "")
    return f"https://spdx.org/licenses/{known.name}.html" if known.use else licence
