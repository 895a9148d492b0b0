"""params.yaml as typed, checked values.

An unknown or missing key, a wrong type or an impossible number is a one-line error that names the key, the value and
what is allowed.
"""

import re
from functools import cache
from math import inf
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    SerializeAsAny,
    StringConstraints,
    Tag,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from touchline.core import extensions, licences
from touchline.core.errors import ParamsError, one_line
from touchline.core.licences import Licence, Use

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, StringConstraints(min_length=1)]


def _address(url: str) -> str:
    url = url.rstrip("/")
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", url):
        raise PydanticCustomError(
            "address", "an address that begins with https:// or http://, without password, ? or #"
        )
    return url


# Without a password: params go into dvc.lock and MLflow.
Url = Annotated[str, AfterValidator(_address)]
Synset = Annotated[str, StringConstraints(pattern=r"^n[0-9]{8}$")]

# The parts that the split cuts the photos into.
SUBSETS = ("train", "validation", "test")

# Printed in full, a few lines of nested aliases would take gigabytes.
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 20, 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


def _whole_number_as_float(value: object) -> object:
    # In Python a bool is an int, but users do not mean a number by it.
    return float(value) if type(value) is int else value


def _between(low: float, high: float, low_included: bool, high_included: bool) -> AfterValidator:
    """Rejects a float outside a range, with a message that states the whole range."""

    def check(value: float) -> float:
        if not (low <= value <= high) or (value == low and not low_included) or (value == high and not high_included):
            at_least = "at least" if low_included else "greater than"
            at_most = "at most" if high_included else "less than"
            bounds = [f"{at_least} {low:g}"] + ([f"{at_most} {high:g}"] if high != inf else [])
            raise PydanticCustomError("range", "a number {bounds}", {"bounds": " and ".join(bounds)})
        return value

    return AfterValidator(check)


# People write `4` for `4.0`; strict mode would reject it.
_Number = Annotated[float, BeforeValidator(_whole_number_as_float)]
Share = Annotated[_Number, _between(0, 1, low_included=False, high_included=False)]
Fraction = Annotated[_Number, _between(0, 1, low_included=True, high_included=True)]
DropoutRate = Annotated[_Number, _between(0, 1, low_included=True, high_included=False)]
Positive = Annotated[_Number, _between(0, inf, low_included=False, high_included=False)]
NotNegative = Annotated[_Number, _between(0, inf, low_included=True, high_included=False)]
Ratio = Annotated[_Number, _between(1, inf, low_included=True, high_included=False)]
Degrees = Annotated[_Number, _between(0, 180, low_included=True, high_included=True)]


def _usable_class(name: str) -> str:
    # A class is a folder of data/photos, so its name must be a plain one on every file system.
    if name != name.strip() or name in {"", ".", ".."} or name.startswith(".") or set(name) & set("/\\\0\n\r"):
        raise PydanticCustomError("class_name", "a name without slashes, line breaks, a leading dot or outer spaces")
    return name


def _distinct(names: list[str]) -> list[str]:
    folded = [name.casefold() for name in names]
    for name in names:
        if folded.count(name.casefold()) > 1:
            raise PydanticCustomError("distinct", "each name once ('{name}' appears twice)", {"name": name})
    return names


def _ascending(numbers: list[float]) -> list[float]:
    if numbers != sorted(set(numbers)):
        raise PydanticCustomError("options", "numbers from the smallest to the largest, each once")
    return numbers


ClassName = Annotated[str, AfterValidator(_usable_class)]


class Section(BaseModel):
    """Keys of params.yaml; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SampleParams(Section):
    per_class: Annotated[int, Field(ge=10)]
    seed: Seed


class DownloadParams(Section):
    connections: Annotated[int, Field(ge=1, le=1000)]
    tries: Count
    connect_timeout: Positive
    read_timeout: Positive
    total_timeout: Positive
    max_megabytes: Positive
    absent_days: NotNegative = 7.0


class OpenImagesParams(Section):
    url: Url
    photos_url: Url
    subsets: Annotated[list[Literal["validation", "test", "train"]], Field(min_length=1), AfterValidator(_distinct)]
    classes: dict[str, Annotated[list[Text], Field(min_length=1)]]
    exclude: list[Text]
    max_per_author: Count
    leave_out_drawings: Annotated[list[Literal["validation", "test", "train"]], AfterValidator(_distinct)]
    keep_label_files: bool


def _without_password(place: str) -> str:
    if re.match(r"[a-z]+://[^/]*@", place, re.IGNORECASE):
        raise PydanticCustomError("password", "an address without a user's name and password")
    return place


class ImageNetParams(Section):
    accept_terms: bool
    origin: Literal["winter21", "ilsvrc2012", "folder", "kaggle", "huggingface"]
    url: Url
    archive: Annotated[Text, AfterValidator(_without_password)]
    folder: Text
    classes: dict[str, Annotated[list[Synset], Field(min_length=1)]]


def _known_source(name: str) -> str:
    if extensions.source(name) is None:
        raise PydanticCustomError("source", "one of {known}", {"known": ", ".join(extensions.sources())})
    return name


class IngestParams(Section):
    sources: Annotated[
        list[Annotated[str, AfterValidator(_known_source)]], Field(min_length=1), AfterValidator(_distinct)
    ]
    per_class: Count | None
    min_per_class: Count
    remote: str
    folder: Text
    follow_links: bool = False
    download: DownloadParams
    # These three are stated here, so that no other command than `ingest` has to import their sources.
    sample: SampleParams
    openimages: OpenImagesParams
    imagenet: ImageNetParams

    @model_validator(mode="wrap")
    @classmethod
    def _with_sections(cls, content: Any, handler: ModelWrapValidatorHandler["IngestParams"]) -> "IngestParams":
        """With the sections that other sources have: those of the sources in use, and those that the file has."""
        if not isinstance(content, dict):
            return handler(content)
        named = content.get("sources")
        names = [*content, *(named if isinstance(named, list) else [])]
        others = {name for name in names if isinstance(name, str)} - cls.model_fields.keys()
        found = [(name, source.params) for name in sorted(others) if (source := extensions.source(name))]
        sections = tuple((name, section) for name, section in found if section)
        return _ingest_with(sections).model_validate(content) if sections else handler(content)

    @model_validator(mode="after")
    def _enough_can_come(self) -> "IngestParams":
        # The other sources may give more than per_class, or are not held to min_per_class.
        sources, remote = {*self.sources}, {"openimages", "imagenet"}
        held = sources & remote and sources <= {*remote, "sample"}
        if held and self.per_class and self.per_class < self.min_per_class:
            raise PydanticCustomError(
                "options",
                f"no `per_class` ({self.per_class}) below `min_per_class` ({self.min_per_class}), which could "
                "never be reached: raise the one or lower the other",
            )
        return self


@cache
def _ingest_with(sections: tuple[tuple[str, type[Section]], ...]) -> type[IngestParams]:
    fields: dict[str, Any] = {name: (section, ...) for name, section in sections}
    return create_model("IngestParams", __base__=IngestParams, **fields)


def _licences(*words: str) -> PlainValidator:
    """Takes one of some words or a list of licences, which comes back as a list of their SPDX names."""

    def check(value: object) -> str | list[str]:
        if isinstance(value, list) and value:
            names = [licences.named(each).name if isinstance(each, str) else "" for each in value]
            if all(names):
                return names
        elif isinstance(value, str) and value in words:
            return value
        allowed = " or ".join(words)
        raise PydanticCustomError(
            "licences", f"{allowed}, or a list of SPDX names ([CC0-1.0, CC-BY-2.0], LicenseRef-...)"
        )

    return PlainValidator(check)


# What is done with photos.
Kind = Literal["train", "show", "push", "serve"]


class RightsParams(Section):
    train: Annotated[str | list[str], _licences("any")]
    show: Annotated[str | list[str], _licences("permitted", "any")]
    push: Annotated[str | list[str], _licences("permitted", "any")]
    serve: Annotated[str | list[str], _licences("any")]
    unknown: Literal["allow", "refuse"]
    opt_outs: Literal["honour", "ignore"]

    def allows(self, kind: Kind, licence: Licence) -> bool:
        """Whether something may be done with photos under a licence."""
        setting = getattr(self, kind)
        if isinstance(setting, list) and licence.name:
            return licence.name in setting
        if licence.use is None:
            return self.unknown == "allow"
        return setting == "any" or (setting == "permitted" and licence.share)


class ValidateParams(Section):
    min_side: Count
    max_aspect: Ratio
    max_megapixels: Positive
    min_contrast: NotNegative
    min_per_class: Count
    max_class_ratio: Ratio
    max_rejected_share: Fraction


class SplitParams(Section):
    seed: Seed
    test_share: Share
    validation_share: Share
    by_group: bool
    validation_by_group: bool
    method: Literal["hash", "stratified"]
    exact: bool
    test_groups: Annotated[list[str], AfterValidator(_distinct)]
    near_duplicate_bits: Annotated[int, Field(ge=0, le=32)]

    @model_validator(mode="after")
    def _options_fit(self) -> "SplitParams":
        if self.exact and self.method != "hash":
            raise PydanticCustomError("options", "`exact: true` only with `method: hash`")
        if self.test_groups and not self.by_group:
            raise PydanticCustomError("options", "`test_groups` only with `by_group: true`")
        return self


class PixelFeatures(Section):
    image_size: Annotated[int, Field(ge=32, le=1024)]


class BackboneFeatures(Section):
    image_size: Annotated[int, Field(ge=32, le=1024)]
    # A name stands for a list of one.
    backbone: Annotated[
        list[Name],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(min_length=1),
        AfterValidator(_distinct),
    ]
    views: Literal[1, 2, 4]
    imagenet_classes: bool = False
    alpha: Positive | None = None
    weights: str | None = None
    weights_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> "BackboneFeatures":
        if len(self.backbone) > 1 and (self.alpha, self.weights, self.weights_sha256) != (None, None, None):
            raise PydanticCustomError("options", "`alpha` and `weights` only with one backbone")
        if self.imagenet_classes and not all(name.startswith("efficientnet_lite") for name in self.backbone):
            # The weights of keras.applications come without ImageNet's last layer.
            raise PydanticCustomError("options", "`imagenet_classes: true` only with efficientnet_lite backbones")
        return self


class AugmentationParams(Section):
    rotation: Degrees
    zoom: DropoutRate
    shift: DropoutRate
    flip: bool


# The type that layers compute in; weights and the finished model are always float32.
Precision = Literal["float32", "mixed_float16", "mixed_bfloat16"]


class ModelParams(Section):
    """An entry of `models`.

    Attributes:
        takes: the kind of features that it learns from.
    """

    takes: ClassVar[type[Section]] = PixelFeatures
    architecture: str
    input: Name
    seed: Seed


class NetworkParams(ModelParams):
    """A network that is trained on photos from scratch."""

    dropout: DropoutRate
    augmentation: AugmentationParams
    learning_rate: Positive
    batch_size: Count
    epochs: Count
    patience: Annotated[int, Field(ge=0)]
    precision: Precision = "float32"


class CnnParams(NetworkParams):
    architecture: Literal["cnn"]
    # Each width is a halving of the side: five leave one pixel of the smallest photos.
    filters: Annotated[list[Count], Field(min_length=1, max_length=5)]
    convolutions: Count = 2
    weight_decay: NotNegative


class ArticleParams(NetworkParams):
    architecture: Literal["article"]
    dense_units: Count


class FineTuneParams(Section):
    blocks: Annotated[int, Field(ge=0)]
    learning_rate: Positive
    batch_size: Count
    epochs: Count
    patience: Count


class HeadParams(ModelParams):
    takes: ClassVar[type[Section]] = BackboneFeatures
    architecture: Literal["head"]
    strengths: Annotated[list[Positive], Field(min_length=1), AfterValidator(_ascending)]
    folds: Annotated[int, Field(ge=2, le=20)]
    balance: Literal["none", "class", "group"]
    fine_tune: FineTuneParams


class EvaluateParams(Section):
    calibration_bins: Annotated[int, Field(ge=2, le=100)]
    gallery: Annotated[int, Field(ge=0, le=200)]
    unknown_folder: str
    baselines_seed: Seed


class RegisterParams(Section):
    name: Annotated[str, StringConstraints(pattern=r"^[^/:.\"'%\s]+$")]
    min_accuracy: Fraction
    min_shared_photos: Count
    significance: Share
    min_slice_accuracy: Fraction | None
    min_slice_photos: Count
    max_unknown_share: Fraction | None
    max_slowdown: Ratio | None
    use: Use = "research"


# Of a Dask scheduler, as Dask prints it.
DASK_ADDRESS = r"(tcp|tls|ws|wss)://\S+:\d+"


class ComputeParams(Section):
    scheduler: Annotated[str, StringConstraints(pattern=rf"^$|^{DASK_ADDRESS}$")]
    devices: Literal["one", "all"]
    engine: Literal["auto", "openvino", "tensorflow"]
    slowdown: Ratio


class PredictParams(Section):
    min_confidence: Fraction
    unknown_share: Share | None


class DriftParams(Section):
    folder: str
    significance: Share
    threshold: Fraction
    train: bool


class MonitorParams(Section):
    keep_days: Count
    keep_megabytes: Count
    days: Count
    recent_days: Count
    max_unknown_ratio: Ratio | None
    max_age_days: Count | None
    max_milliseconds: Positive | None
    max_errors: Fraction | None


def _kind_of_features(value: object) -> str:
    names_one = isinstance(value, dict) and "backbone" in value
    return "backbone" if isinstance(value, BackboneFeatures) or names_one else "pixels"


FeaturesParams = Annotated[
    Annotated[PixelFeatures, Tag("pixels")] | Annotated[BackboneFeatures, Tag("backbone")],
    Discriminator(_kind_of_features),
]
# As with the sources: no other command has to import the architectures.
_MODELS: dict[str, type[ModelParams]] = {"cnn": CnnParams, "article": ArticleParams, "head": HeadParams}


def _model(content: object) -> ModelParams:
    """An entry of `models`, of the kind that its architecture has."""
    if isinstance(content, ModelParams):
        return content
    if not isinstance(content, dict):
        raise PydanticCustomError("dict_type", "keys with their values")
    if "architecture" not in content:
        raise PydanticCustomError("union_tag_not_found", "an architecture")
    name = content["architecture"]
    kind = _MODELS.get(name) if isinstance(name, str) else None
    if isinstance(name, str) and kind is None and (other := extensions.architecture(name)):
        kind = other.params
    if kind is None:
        allowed = ", ".join(map(repr, [*_MODELS, *(set(extensions.architectures()) - set(_MODELS))]))
        raise PydanticCustomError("union_tag_invalid", "of {expected_tags}", {"tag": name, "expected_tags": allowed})
    return kind.model_validate(content)


AnyModel = Annotated[SerializeAsAny[ModelParams], PlainValidator(_model)]


class Params(Section):
    """The whole of params.yaml."""

    classes: Annotated[list[ClassName], Field(min_length=2), AfterValidator(_distinct)]
    # With the sections of whatever sources it has.
    ingest: SerializeAsAny[IngestParams]
    rights: RightsParams
    validate_: Annotated[ValidateParams, Field(alias="validate")]
    split: SplitParams
    features: Annotated[dict[Name, FeaturesParams], Field(min_length=1)]
    models: Annotated[dict[Name, AnyModel], Field(min_length=1)]
    evaluate: EvaluateParams
    register_: Annotated[RegisterParams, Field(alias="register")]
    predict: PredictParams
    compute: ComputeParams
    drift: DriftParams
    monitor: MonitorParams

    @model_validator(mode="after")
    def _terms_are_kept(self) -> "Params":
        for name in self.ingest.sources if not self.ingest.remote else ():
            if (
                (source := extensions.source(name))
                and source.licence
                and not self.rights.allows("push", source.licence)
            ):
                raise PydanticCustomError(
                    "input",
                    "ingest allows {name}, whose photos may not be passed on, only with a DVC remote of your own in "
                    "`remote` (`dvc remote add private /a/folder`), or {licence} in `rights.push`",
                    {"name": name, "licence": source.licence.name},
                )
        return self

    @model_validator(mode="after")
    def _inputs_exist(self) -> "Params":
        for name, model in self.models.items():
            fitting = [key for key, features in self.features.items() if isinstance(features, model.takes)]
            if model.input not in fitting:
                raise PydanticCustomError(
                    "input",
                    "models.{name}.input is '{found}'; allowed for {architecture}: one of `features` ({allowed})",
                    {
                        "name": name,
                        "found": model.input,
                        "architecture": model.architecture,
                        "allowed": ", ".join(fitting) or "none fits",
                    },
                )
            given = self.features[model.input]
            if (
                isinstance(model, HeadParams)
                and model.fine_tune.blocks
                and isinstance(given, BackboneFeatures)
                and len(given.backbone) > 1
            ):
                raise PydanticCustomError(
                    "input", "models.{name}.fine_tune.blocks is above 0; allowed: with one backbone", {"name": name}
                )
        return self


def load(path: Path) -> Params:
    """Read and check `path`.

    Raises:
        ParamsError: the file is missing, not YAML, or has invalid content.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(path.read_text())
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing: restore it from version control") from None
    except RecursionError:
        raise ParamsError(f"{path.name} is not readable YAML: it is nested too deeply") from None
    except (YAMLError, ValueError) as error:  # an invalid date or number is a ValueError
        raise ParamsError(f"{path.name} is not readable YAML: {one_line(error, 500)}") from None
    return check(content, path.name)


def check(content: object, where: str = "params.yaml") -> Params:
    """Typed params from a plain mapping.

    Raises:
        ParamsError: one line with the first error and the number of further ones.
    """
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        first, *more = error.errors()
        rest = f" (and {len(more)} more)" if more else ""
        raise ParamsError(f"{where}: {_one_line(first)}{rest}") from None


def _one_line(error: ErrorDetails) -> str:
    key = ".".join(_location(error["loc"])) or "the file"
    found = re.sub(r"//[^/@\s]+@", "//***@", _SHORT.repr(error["input"]))
    found = found if len(found) <= 60 else found[:57] + "..."
    match error["type"]:
        case "missing" | "union_tag_not_found":
            whole = f"{key}{'.architecture' if error['type'] != 'missing' else ''}"
            return f"{whole} is missing: add it, as the params.yaml that came with this version has it"
        case "extra_forbidden":
            return f"{key} is not a known key"
        case "union_tag_invalid":
            return f"{key}.architecture is {error['ctx']['tag']!r}; allowed: {error['ctx']['expected_tags']}"
        case "options":
            return f"{key} allows {error['msg']}"
        case "input":
            return str(error["msg"])
        case "too_short":
            return f"{key} is {found}; allowed: at least {error['ctx']['min_length']} of them"
        case "too_long":
            return f"{key} is {found}; allowed: at most {error['ctx']['max_length']} of them"
        case "string_type":
            # YAML reads 0, null and true, and dates, as something else than text.
            return f"{key} is {found}; allowed: text, so put it in quotes"
        case "string_pattern_mismatch":
            return f"{key} is {found}; allowed: what matches {error['ctx']['pattern']}"
        case "list_type" | "tuple_type":
            return f"{key} is {found}; allowed: a list, for example [a, b]"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"{key} is {found}; allowed: keys with their values"
        case _:
            return f"{key} is {found}; allowed: {error['msg'].removeprefix('Input should be ')}"


def _location(parts: tuple[int | str, ...]) -> list[str]:
    # An unprintable name would break the line.
    location = [str(part) if str(part).isprintable() else repr(part) for part in parts]
    # pydantic adds the kind of a `features` entry after its name, and marks names; the file has neither.
    if (len(location) > 2 and location[0] == "features") or location[2:] == ["[key]"]:
        del location[2]
    return location
