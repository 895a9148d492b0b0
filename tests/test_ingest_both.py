"""Open Images and ImageNet in one project: what comes from where, and what may not leave the machine."""

from pathlib import Path

import pandas as pd
import projects
import pytest
from imagenet_files import photo, synset, tar_of
from openimages_files import RUGBY, SOCCER, Shot, publish
from servers import Host

from touchline.core.errors import TouchlineError
from touchline.core.files import read_json, read_table
from touchline.core.params import Params, check
from touchline.core.paths import Paths
from touchline.data import rights
from touchline.sources.imagenet import TERMS
from touchline.stages import ingest as ingestion

SYNSETS = {"rugby": ["n00470966"], "soccer": ["n00478262", "n04254680"]}


@pytest.fixture
def params(shipped: dict, tmp_path: Path) -> Params:
    """Both sources, five photos a class: Open Images has three of rugby and one of soccer, ImageNet enough."""
    tars = tmp_path / "tars"
    tars.mkdir()
    for number, wnid in enumerate(name for names in SYNSETS.values() for name in names):
        (tars / f"{wnid}.tar").write_bytes(tar_of(synset(wnid, range(100 * number, 100 * number + 6))))
    with Host() as host:
        shots = [Shot(f"{number:016x}", {RUGBY: "1"}, author=f"A{number}") for number in range(3)]
        shots.append(Shot(f"{9:016x}", {SOCCER: "1"}, author="B"))
        publish(host, validation=shots)
        for number, shot in enumerate(shots):
            host.put(f"/photos/validation/{shot.image}.jpg", photo(900 + number), content_type="image/jpeg")
        ingest = shipped["ingest"]
        ingest |= {"sources": ["openimages", "imagenet"], "per_class": 5, "min_per_class": 2, "remote": "private"}
        ingest["openimages"] |= {
            "url": host.url, "photos_url": f"{host.url}/photos", "subsets": ["validation"],
            "classes": {"rugby": [RUGBY], "soccer": [SOCCER]}, "exclude": [],
        }  # fmt: skip
        ingest["imagenet"] |= {"accept_terms": True, "origin": "folder", "folder": str(tars), "classes": SYNSETS}
        yield check(shipped)


def test_a_class_is_filled_from_the_sources_in_their_order(paths: Paths, params: Params) -> None:
    ingestion.run(paths, params)
    table = read_table(paths.photos_table)
    assert table.groupby(["class", "source"]).size().to_dict() == {
        ("rugby", "openimages"): 3, ("rugby", "imagenet"): 2, ("soccer", "openimages"): 1, ("soccer", "imagenet"): 4,
    }  # fmt: skip
    assert set(table.loc[table["source"] == "imagenet", "licence"]) == {TERMS}
    assert set(table.loc[table["source"] == "imagenet", "retrieved"]) == {""}
    report = read_json(paths.reports / "ingest.json")
    assert report["photos"] == {"rugby": 5, "soccer": 5}
    assert report["notes"] == ["the source tells something of the class: imagenet gives 80% of soccer and 40% of rugby"]


def test_a_source_is_asked_for_nothing_where_those_before_it_filled_all_classes(paths: Paths, params: Params) -> None:
    values = params.model_dump(mode="json", by_alias=True, exclude_unset=True)
    ingest = values["ingest"]
    ingest |= {"per_class": 1, "min_per_class": 1}
    # The server has no tars there.
    ingest["imagenet"] |= {"origin": "winter21", "url": f"{ingest['openimages']['url']}/whole", "folder": "kept"}
    ingestion.run(paths, check(values))
    assert read_json(paths.reports / "ingest.json")["sources"]["imagenet"] == {"photos": 0}
    assert list(read_table(paths.photos_table)["source"]) == ["openimages", "openimages"]


def test_nothing_is_taken_before_the_terms_are_accepted(paths: Paths, params: Params) -> None:
    values = params.model_dump(mode="json", by_alias=True, exclude_unset=True)
    values["ingest"]["imagenet"]["accept_terms"] = False
    with pytest.raises(TouchlineError, match=r"ingest\.imagenet\.accept_terms"):
        ingestion.run(paths, check(values))
    assert not paths.photos_table.exists()


@pytest.mark.parametrize("share", [False, True])
def test_figures_show_photos_of_imagenet_only_if_they_may_be_passed_on(params: Params, share: bool) -> None:
    values = params.model_dump(mode="json", by_alias=True, exclude_unset=True)
    values["rights"]["show"] = ["CC-BY-2.0", "LicenseRef-ImageNet"] if share else "permitted"
    rows = pd.DataFrame({"path": ["a", "b", "c"], "source": ["openimages", "imagenet", "folder"]})
    rows["licence"] = ["https://creativecommons.org/licenses/by/2.0/", TERMS, ""]
    assert list(rights.shown(rows, check(values))["path"]) == (["a", "b", "c"] if share else ["a", "c"])


def test_dvc_pushes_photos_to_the_remote_that_params_name_and_to_no_other(tmp_path: Path) -> None:
    project = projects.make(tmp_path / "the project", {"ingest.sources": ["folder"], "ingest.remote": "private"})
    for number, label in enumerate(["rugby", "soccer"]):
        (project.root / "data/incoming" / label).mkdir(parents=True)
        (project.root / f"data/incoming/{label}/a.jpg").write_bytes(photo(number))
    project.dvc("remote", "add", "--default", "shared", str(tmp_path / "shared"))
    project.dvc("remote", "add", "private", str(tmp_path / "private"))
    project.dvc("repro", "ingest")
    project.dvc("push")
    photos = {path.read_bytes() for path in (project.root / "data/photos").rglob("*.jpg")}

    def pushed(remote: str) -> set[bytes]:
        return {path.read_bytes() for path in (tmp_path / remote).rglob("*") if path.is_file()}

    assert len(photos) == 2 and photos <= pushed("private")
    # The tables may be shared: they have no pixels.
    assert pushed("shared") and not photos & pushed("shared")
