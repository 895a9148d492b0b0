"""params.yaml as typed, checked values.

An unknown key, a missing one, a wrong type or an impossible number is one line that names the key, what was found and
what is allowed.
"""

import re
from math import inf
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from touchline.core.errors import ParamsError, one_line

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

# A few lines of aliases of aliases would take gigabytes in full.
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 20, 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


def _whole_number_as_float(value: object) -> object:
    # A bool is an int to Python, but no number to a person.
    return float(value) if type(value) is int else value


def _between(low: float, high: float, low_included: bool, high_included: bool) -> AfterValidator:
    """Refuses a float out of a range, with a message that states the whole range."""

    def check(value: float) -> float:
        if not (low <= value <= high) or (value == low and not low_included) or (value == high and not high_included):
            at_least = "at least" if low_included else "greater than"
            at_most = "at most" if high_included else "less than"
            bounds = [f"{at_least} {low:g}"] + ([f"{at_most} {high:g}"] if high != inf else [])
            raise PydanticCustomError("range", "a number {bounds}", {"bounds": " and ".join(bounds)})
        return value

    return AfterValidator(check)


# YAML writes `4` where a person means `4.0`; strict mode would refuse it.
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
            raise PydanticCustomError("distinct", "each name once ('{name}' stands twice)", {"name": name})
    return names


def _ascending(numbers: list[float]) -> list[float]:
    if numbers != sorted(set(numbers)):
        raise PydanticCustomError("options", "numbers from the smallest to the largest, each once")
    return numbers


ClassName = Annotated[str, AfterValidator(_usable_class)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SampleParams(_Section):
    per_class: Annotated[int, Field(ge=10)]
    seed: Seed


class DownloadParams(_Section):
    connections: Annotated[int, Field(ge=1, le=1000)]
    tries: Count
    connect_timeout: Positive
    read_timeout: Positive
    total_timeout: Positive
    max_megabytes: Positive
    absent_days: NotNegative = 7.0


class OpenImagesParams(_Section):
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


class ImageNetParams(_Section):
    accept_terms: bool
    share: bool
    origin: Literal["winter21", "ilsvrc2012", "folder", "kaggle", "huggingface"]
    url: Url
    archive: Annotated[Text, AfterValidator(_without_password)]
    folder: Text
    classes: dict[str, Annotated[list[Synset], Field(min_length=1)]]


class IngestParams(_Section):
    sources: Annotated[
        list[Literal["sample", "folder", "openimages", "imagenet", "feedback"]],
        Field(min_length=1),
        AfterValidator(_distinct),
    ]
    per_class: Count | None
    min_per_class: Count
    remote: str
    folder: Text
    follow_links: bool = False
    sample: SampleParams
    download: DownloadParams
    openimages: OpenImagesParams
    imagenet: ImageNetParams

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

    @model_validator(mode="after")
    def _terms_are_kept(self) -> "IngestParams":
        if "imagenet" in self.sources and not self.remote and not self.imagenet.share:
            raise PydanticCustomError(
                "options",
                "imagenet, whose photos may not be passed on, only with a DVC remote of your own named in `remote` "
                "(`dvc remote add private /a/folder`), or with `imagenet.share: true`",
            )
        return self


class ValidateParams(_Section):
    min_side: Count
    max_aspect: Ratio
    max_megapixels: Positive
    min_contrast: NotNegative
    min_per_class: Count
    max_class_ratio: Ratio
    max_rejected_share: Fraction


class SplitParams(_Section):
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


class PixelFeatures(_Section):
    image_size: Annotated[int, Field(ge=32, le=1024)]


class BackboneFeatures(_Section):
    image_size: Annotated[int, Field(ge=32, le=1024)]
    # A name stands for a list of one.
    backbone: Annotated[
        list[Name],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(min_length=1),
        AfterValidator(_distinct),
    ]
    views: Literal[1, 2]
    alpha: Positive | None = None
    weights: str | None = None
    weights_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> "BackboneFeatures":
        if len(self.backbone) > 1 and (self.alpha, self.weights, self.weights_sha256) != (None, None, None):
            raise PydanticCustomError("options", "`alpha` and `weights` only with one backbone")
        return self


class AugmentationParams(_Section):
    rotation: Degrees
    zoom: DropoutRate
    shift: DropoutRate
    flip: bool


# What layers compute in; weights, and the finished model, are float32 in any case.
Precision = Literal["float32", "mixed_float16", "mixed_bfloat16"]


class _Training(_Section):
    input: Name
    dropout: DropoutRate
    learning_rate: Positive
    batch_size: Count
    epochs: Count
    patience: Annotated[int, Field(ge=0)]
    seed: Seed
    precision: Precision = "float32"


class CnnParams(_Training):
    architecture: Literal["cnn"]
    # Each width is a halving of the side: five leave one pixel of the smallest photos.
    filters: Annotated[list[Count], Field(min_length=1, max_length=5)]
    weight_decay: NotNegative
    augmentation: AugmentationParams


class ArticleParams(_Training):
    architecture: Literal["article"]
    dense_units: Count
    augmentation: AugmentationParams


class FineTuneParams(_Section):
    blocks: Annotated[int, Field(ge=0)]
    learning_rate: Positive
    batch_size: Count
    epochs: Count
    patience: Count


class HeadParams(_Section):
    architecture: Literal["head"]
    input: Name
    strengths: Annotated[list[Positive], Field(min_length=1), AfterValidator(_ascending)]
    folds: Annotated[int, Field(ge=2, le=20)]
    balance: Literal["none", "class", "group"]
    seed: Seed
    fine_tune: FineTuneParams


class EvaluateParams(_Section):
    calibration_bins: Annotated[int, Field(ge=2, le=100)]
    gallery: Annotated[int, Field(ge=0, le=200)]
    baselines_seed: Seed


class RegisterParams(_Section):
    name: Annotated[str, StringConstraints(pattern=r"^[^/:.\"'%\s]+$")]
    min_accuracy: Fraction
    min_shared_photos: Count
    significance: Share


class ComputeParams(_Section):
    scheduler: Annotated[str, StringConstraints(pattern=r"^$|^(tcp|tls|ws|wss)://\S+:\d+$")]
    devices: Literal["one", "all"]
    engine: Literal["auto", "openvino", "tensorflow"]


class PredictParams(_Section):
    min_confidence: Fraction


class DriftParams(_Section):
    folder: str
    significance: Share
    threshold: Fraction
    train: bool


def _kind_of_features(value: object) -> str:
    names_one = isinstance(value, dict) and "backbone" in value
    return "backbone" if isinstance(value, BackboneFeatures) or names_one else "pixels"


FeaturesParams = Annotated[
    Annotated[PixelFeatures, Tag("pixels")] | Annotated[BackboneFeatures, Tag("backbone")],
    Discriminator(_kind_of_features),
]
ModelParams = Annotated[CnnParams | ArticleParams | HeadParams, Field(discriminator="architecture")]


class Params(_Section):
    """The whole of params.yaml."""

    classes: Annotated[list[ClassName], Field(min_length=2), AfterValidator(_distinct)]
    ingest: IngestParams
    validate_: Annotated[ValidateParams, Field(alias="validate")]
    split: SplitParams
    features: Annotated[dict[Name, FeaturesParams], Field(min_length=1)]
    models: Annotated[dict[Name, ModelParams], Field(min_length=1)]
    evaluate: EvaluateParams
    register_: Annotated[RegisterParams, Field(alias="register")]
    predict: PredictParams
    compute: ComputeParams
    drift: DriftParams

    @model_validator(mode="after")
    def _inputs_exist(self) -> "Params":
        for name, model in self.models.items():
            kind = BackboneFeatures if isinstance(model, HeadParams) else PixelFeatures
            fitting = [key for key, features in self.features.items() if isinstance(features, kind)]
            if model.input not in fitting:
                raise PydanticCustomError(
                    "input",
                    "models.{name}.input is '{found}'; allowed for {architecture}: one of `features` ({allowed})",
                    {
                        "name": name,
                        "found": model.input,
                        "architecture": model.architecture,
                        "allowed": ", ".join(fitting) or "there is none that fits",
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
        ParamsError: the file is missing, not YAML, or holds what is not allowed.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(path.read_text())
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing: restore it from version control") from None
    except RecursionError:
        raise ParamsError(f"{path.name} is not readable YAML: it is nested too deep") from None
    except (YAMLError, ValueError) as error:  # a date or a number that is none is a ValueError
        raise ParamsError(f"{path.name} is not readable YAML: {one_line(error, 500)}") from None
    return check(content, path.name)


def check(content: object, where: str = "params.yaml") -> Params:
    """Typed params from a plain mapping.

    Raises:
        ParamsError: the first thing that is not allowed, in one line, and how many more there are.
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
            return f"{key}{'.architecture' if error['type'] != 'missing' else ''} is missing"
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
        case "string_pattern_mismatch":
            return f"{key} is {found}; allowed: what matches {error['ctx']['pattern']}"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"{key} is {found}; allowed: keys with their values"
        case _:
            return f"{key} is {found}; allowed: {error['msg'].removeprefix('Input should be ')}"


def _location(parts: tuple[int | str, ...]) -> list[str]:
    # A name that cannot be printed would break the line.
    location = [str(part) if str(part).isprintable() else repr(part) for part in parts]
    # pydantic puts the kind of a `features` or `models` entry behind its name, and marks names; the file holds neither.
    if len(location) > 2 and location[0] in {"features", "models"}:
        del location[2]
    return location
