"""Licences and photos' own words about machine learning, and what follows from them."""

import io
import json
from typing import Any

import boards
import numpy as np
import projects
import pytest
from mlflow import MlflowClient
from PIL import Image

from touchline.core import licences, params
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import read_json, read_table, sha256, write_json
from touchline.core.licences import Licence
from touchline.core.paths import Paths
from touchline.data import opt_outs, rights
from touchline.stages import ingest
from touchline.tracking.runs import LICENCES

PLUS = "http://ns.useplus.org/ldf/xmp/1.0/"
PROHIBITED = "http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING"


def xmp(inside: str = "", attributes: str = "") -> bytes:
    """A packet as programs write it."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:plus="{PLUS}" {attributes}>{inside}</rdf:Description>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def data_mining(value: str) -> bytes:
    return xmp(f"<plus:DataMining>{value}</plus:DataMining>")


def with_xmp(packet: bytes, form: str = "JPEG", number: int = 0) -> bytes:
    """A photo of noise that holds a packet."""
    pixels = np.random.default_rng(number).integers(0, 255, (80, 100, 3), np.uint8)
    out = io.BytesIO()
    if form == "TIFF":
        Image.fromarray(pixels).save(out, form, tiffinfo={700: packet})
    elif form == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode(), zip=True)
        Image.fromarray(pixels).save(out, form, pnginfo=info)
    elif form == "GIF":
        Image.fromarray(pixels).save(out, form)
        end = bytes(range(255, -1, -1)) + b"\0"
        return out.getvalue()[:-1] + b"\x21\xff\x0bXMP DataXMP" + packet + b"\1" + end + b"\x3b"
    else:
        Image.fromarray(pixels).save(out, form, xmp=packet)
    return out.getvalue()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("https://creativecommons.org/licenses/by/2.0/", Licence("CC-BY-2.0", "product")),
        ("CC BY 4.0", Licence("CC-BY-4.0", "product")),
        ("cc-by-nc-sa-2.0", Licence("CC-BY-NC-SA-2.0", "research")),
        ("http://creativecommons.org/licenses/by-nd/3.0/de/deed", Licence("CC-BY-ND-3.0", "internal")),
        ("CC0", Licence("CC0-1.0", "product")),
        ("https://creativecommons.org/publicdomain/zero/1.0/", Licence("CC0-1.0", "product")),
        ("https://creativecommons.org/publicdomain/mark/1.0/", Licence("CC-PDM-1.0", "product")),
        ("mit", Licence("MIT", "product")),
        ("LicenseRef-Club", Licence("LicenseRef-Club")),
        ("", Licence("")),
        ("CC BY", Licence("")),
        ("ask Ann", Licence("")),
    ],
)
def test_the_words_of_sources_are_mapped_to_spdx_names(words: str, expected: Licence) -> None:
    assert licences.named(words) == expected


def test_a_source_says_what_its_own_words_mean() -> None:
    assert rights.licence("ImageNet terms: ...", "imagenet").name == "LicenseRef-ImageNet"
    assert rights.licence("given by the person at the page", "feedback").use == "internal"
    assert rights.licence("", "folder") == Licence("")


@pytest.mark.parametrize("value", ["all", [], ["CC BY"], [7], ["CC0-1.0", "ask Ann"], None])
def test_a_licence_that_is_not_known_is_an_error_in_params(shipped: dict[str, Any], value: Any) -> None:
    shipped["rights"]["train"] = value
    with pytest.raises(ParamsError, match=r"rights\.train"):
        params.check(shipped)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF"])
def test_the_data_mining_field_is_read_from_each_format(form: str) -> None:
    assert "DMI-PROHIBITED-AIMLTRAINING" in opt_outs.read(with_xmp(data_mining(PROHIBITED), form)).forbids
    assert opt_outs.read(with_xmp(xmp(), form)) == opt_outs.Statement()


@pytest.mark.parametrize(
    ("value", "forbids"),
    [
        ("DMI-UNSPECIFIED", False),
        ("DMI-ALLOWED", False),
        # A classifier generates nothing.
        ("DMI-PROHIBITED-GENAIMLTRAINING", False),
        ("DMI-PROHIBITED", True),
        ("DMI-PROHIBITED-AIMLTRAINING", True),
        ("DMI-PROHIBITED-EXCEPTSEARCHENGINEINDEXING", True),
        ("DMI-PROHIBITED-SEECONSTRAINT", True),
        ("a value of next year", True),
    ],
)
def test_what_the_values_of_the_field_forbid(value: str, forbids: bool) -> None:
    for name in (value, f"http://ns.useplus.org/ldf/vocab/{value}"):
        for packet in (
            data_mining(name),
            xmp(attributes=f'plus:DataMining="{name}"'),
            xmp(f'<plus:DataMining rdf:resource="{name}"/>'),
        ):
            assert bool(opt_outs.read(with_xmp(packet)).forbids) is forbids


def test_xmp_that_a_jpeg_cuts_into_segments_is_read_whole() -> None:
    packet = xmp(f"<plus:DataMining>{PROHIBITED}</plus:DataMining>" + "<!-- long -->" * 8000)
    plain = with_xmp(xmp())
    parts = [packet[at : at + 40_000] for at in range(0, len(packet), 40_000)]
    at, segments = 0, b""
    for part in parts:
        head = b"http://ns.adobe.com/xmp/extension/\0" + b"A" * 32 + len(packet).to_bytes(4) + at.to_bytes(4)
        segments += b"\xff\xe1" + (2 + len(head) + len(part)).to_bytes(2) + head + part
        at += len(part)
    assert len(parts) > 2 and opt_outs.read(plain[:2] + segments + plain[2:]).forbids


HOSTILE = {
    "a megabyte": xmp("<!--" + "x" * 2**20 + "-->"),
    "entities": b'<x:xmpmeta xmlns:x="a"><!DOCTYPE a [<!ENTITY b "c">]>&b;</x:xmpmeta>',
    "an entity without a declaration": xmp("&b;"),
    "no end": b"<x:xmpmeta " * 50_000,
    "not XML": b"<x:xmpmeta ></a></x:xmpmeta>",
    "a prefix that is not declared": b"<x:xmpmeta ></x:xmpmeta>",
    "not UTF-8": b'<x:xmpmeta xmlns:x="a">\xff\xfe</x:xmpmeta>',
    "many": b'<x:RDF xmlns:x="a"></x:RDF>' * 100,
    "deep": xmp("<plus:a>" * 60_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_xmp_is_not_readable(name: str) -> None:
    found = opt_outs.read(with_xmp(b"", number=1) + HOSTILE[name])
    assert found.unreadable and not found.forbids and "\n" not in found.unreadable
    # Another packet in the file is read all the same.
    if name not in {"no end", "many"}:
        assert opt_outs.read(HOSTILE[name] + data_mining(PROHIBITED)).forbids


def signed(label: str, use: str) -> bytes:
    """A photo with a C2PA manifest, signed by a key of its own."""
    c2pa = pytest.importorskip("c2pa")
    from datetime import UTC, datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "T")])
        for name in ("leaf", "root")
    ]
    chain = b""
    for place, is_root in enumerate([False, True]):
        made = (
            x509.CertificateBuilder().subject_name(names[place]).issuer_name(names[1]).serial_number(place + 1)
            .public_key(keys[place].public_key())
            .not_valid_before(datetime(2025, 1, 1, tzinfo=UTC)).not_valid_after(datetime(2125, 1, 1, tzinfo=UTC))
            .add_extension(x509.BasicConstraints(is_root, None), True)
            .add_extension(x509.KeyUsage(not is_root, *[False] * 4, is_root, *[False] * 3), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[place].public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[1].public_key()), False)
        )  # fmt: skip
        if not is_root:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        chain += made.sign(keys[1], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    private = keys[0].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    kind = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
    manifest = {
        "claim_generator_info": [{"name": "test", "version": "1"}], "format": "image/jpeg", "title": "a photo",
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": kind}]}},
            {"label": label, "data": {"entries": {f"{label.partition('.')[0]}.ai_training": {"use": use}}}},
        ],
    }  # fmt: skip
    out = io.BytesIO()
    with c2pa.Signer.from_info(c2pa.C2paSignerInfo(b"es256", chain, private, None)) as signer:
        c2pa.Builder(manifest).sign(signer, "image/jpeg", io.BytesIO(with_xmp(b"", number=2)), out)
    return out.getvalue()


@pytest.mark.parametrize("label", ["c2pa.training-mining", "cawg.training-mining"])
def test_the_c2pa_assertion_is_read(label: str) -> None:
    assert opt_outs.read(signed(label, "notAllowed")).forbids
    allowed = signed(label, "allowed")
    assert opt_outs.read(allowed) == opt_outs.Statement()
    start = allowed.index(b"jumdc2pa") + 40
    damaged = opt_outs.read(allowed[:start] + b"\0" * 2000 + allowed[start + 2000 :])
    assert damaged.unreadable and not damaged.forbids


def test_without_the_extra_c2pa_data_count_as_not_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt_outs, "_c2pa_context", lambda: None)
    found = opt_outs.read(with_xmp(xmp()) + b"jumdc2pa\0\x11\0\x10")
    assert not found.forbids and "c2pa" in found.unreadable
    assert opt_outs.read(with_xmp(data_mining(PROHIBITED)) + b"jumdc2pa\0\x11\0\x10").forbids


PHOTOS = {
    "rugby/free.jpg": ("CC0", with_xmp(xmp(), number=1)),
    "rugby/no commerce.jpg": ("CC BY-NC 2.0", with_xmp(xmp(), number=2)),
    "rugby/bare.jpg": ("", with_xmp(xmp(), number=3)),
    "rugby/no machines.jpg": ("CC0", with_xmp(data_mining(PROHIBITED), number=4)),
    "rugby/odd.jpg": ("CC0", with_xmp(b"", number=5) + HOSTILE["not XML"]),
    "soccer/free.jpg": ("CC0", with_xmp(xmp(), number=6)),
    "soccer/club.jpg": ("LicenseRef-Club", with_xmp(xmp(), number=7)),
}


@pytest.fixture
def taken(paths: Paths, shipped: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Any:
    """Fills a folder, ingests it, and gives the origins that were taken."""
    for name, (_, content) in PHOTOS.items():
        file = paths.project / "data/incoming" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    rows = [f"{name},{licence}" for name, (licence, _) in PHOTOS.items()]
    (paths.project / "data/incoming/manifest.csv").write_text("\n".join(["file,licence", *rows]))

    def run(per_class: int | None = None, **changes: Any) -> set[str]:
        values = json.loads(json.dumps(shipped))
        values["ingest"] |= {"sources": ["folder"], "per_class": per_class}
        values["rights"] |= changes
        ingest.run(paths, params.check(values))
        return set(read_table(paths.photos_table)["origin"])

    return run


def test_as_shipped_only_what_forbids_it_is_left_out(taken: Any, paths: Paths) -> None:
    assert taken() == set(PHOTOS) - {"rugby/no machines.jpg"}
    report = read_json(paths.reports / "rights.json")
    assert report["opt_outs"] == {"photos": 1, "rule": "honour"} and sum(report["left_out"].values()) == 1
    assert report["not_readable"] == {"photos": 1, "rule": "allow"}
    assert read_json(paths.reports / "ingest.json")["sources"]["folder"]["left_out"] == report["left_out"]
    assert len(list(paths.photos.glob("*/*"))) == len(PHOTOS) - 1


def test_opt_outs_may_be_ignored_and_are_counted_all_the_same(taken: Any, paths: Paths) -> None:
    assert taken(opt_outs="ignore") == set(PHOTOS)
    assert read_json(paths.reports / "rights.json")["opt_outs"] == {"photos": 1, "rule": "ignore"}


def test_only_named_licences_are_learned_from(taken: Any, paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    named = ["CC0-1.0", "LicenseRef-Club"]
    assert taken(train=named, push=named, unknown="refuse") == {
        "rugby/free.jpg", "soccer/free.jpg", "soccer/club.jpg",
    }  # fmt: skip
    report = read_json(paths.reports / "rights.json")
    assert report["left_out"]["licence: CC-BY-NC-2.0"] == 1 and report["left_out"]["licence: no licence"] == 1
    assert report["not_readable"] == {"photos": 1, "rule": "refuse"}
    assert "CC-BY-NC-2.0" in capsys.readouterr().out
    # Not known, and so allowed.
    assert "rugby/bare.jpg" in taken(train=["CC0-1.0"])


def test_the_place_of_a_photo_that_forbids_it_goes_to_another(taken: Any) -> None:
    # In the order of their names, `no machines` is the fourth and `odd` the fifth.
    assert {name for name in taken(per_class=4) if name.startswith("rugby")} == {
        "rugby/free.jpg", "rugby/no commerce.jpg", "rugby/bare.jpg", "rugby/odd.jpg",
    }  # fmt: skip


def test_a_set_of_which_nothing_is_allowed_names_the_section(taken: Any, paths: Paths) -> None:
    with pytest.raises(TouchlineError, match="rights"):
        taken(train=["CC-BY-2.0"], unknown="refuse")
    assert not paths.photos_table.exists()


def test_what_may_not_be_pushed_needs_a_remote_of_your_own(taken: Any, paths: Paths, shipped: dict[str, Any]) -> None:
    with pytest.raises(TouchlineError, match=r"CC-BY-NC-2\.0.*ingest\.remote"):
        taken(push=["CC0-1.0", "LicenseRef-Club"])
    assert not paths.photos_table.exists()
    shipped["ingest"]["remote"] = "private"
    assert taken(push=["CC0-1.0"])


def test_only_what_may_be_shown_is_shown(taken: Any, paths: Paths, shipped: dict[str, Any]) -> None:
    taken()

    def seen(**changes: Any) -> int:
        values = json.loads(json.dumps(shipped))
        values["rights"] |= changes
        return len(rights.files(paths, params.check(values)))

    assert seen() == seen(show="any") == len(PHOTOS) - 1
    assert seen(unknown="refuse") == len(PHOTOS) - 3
    assert seen(show=["CC0-1.0"], unknown="refuse") == 3


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> projects.Project:
    return projects.built(tmp_path_factory).project


@pytest.fixture(scope="module")
def restricted(built: projects.Project, tmp_path_factory: pytest.TempPathFactory) -> projects.Project:
    """A copy, in which a training photo is not for commerce."""
    made = projects.copy(built, tmp_path_factory.mktemp("restricted") / "the project")
    table = read_table(made.root / "data/split.csv")
    table.loc[table.index[table["subset"] == "train"][0], "licence"] = "CC BY-NC 2.0"
    table.to_csv(made.root / "data/split.csv", index=False)
    # `register` refuses models of another split.
    evaluated = made.json("reports/evaluation.json")
    for file in (made.root / "models").glob("*.json"):
        record = read_json(file)
        record["tags"]["touchline.split_sha256"] = sha256(made.root / "data/split.csv")
        write_json(file, record)
        evaluated[file.stem]["record_sha256"] = sha256(file)
    write_json(made.root / "reports/evaluation.json", evaluated)
    return made


def test_each_version_carries_the_licences_and_authors_of_what_it_learned_from(built: projects.Project) -> None:
    [version] = projects.versions(built)
    table = read_table(built.root / "reports/licences.csv")
    record = built.json(f"models/{built.json('reports/registration.json')['better_model']}.json")
    assert json.loads(version.tags[LICENCES]) == {"CC0-1.0": len(record["training_photos"])}
    assert table[["licence", "spdx", "use", "author", "photos"]].to_dict("records") == [
        {
            "licence": "CC0-1.0", "spdx": "CC0-1.0", "use": "product", "author": "Touchline sample",
            "photos": len(record["training_photos"]),
        }
    ]  # fmt: skip
    artifacts = MlflowClient(f"sqlite:///{built.root}/mlflow/mlflow.db").list_artifacts(version.run_id)
    assert {"licences.csv", "report.html", "model-card.md"} <= {artifact.path for artifact in artifacts}


@pytest.mark.parametrize("use", ["internal", "product"])
def test_a_version_is_refused_for_a_use_that_a_photo_does_not_allow(restricted: projects.Project, use: str) -> None:
    before = projects.aliases(restricted)
    restricted.change({"register.use": use})
    said = restricted.call("register", exit_code=1).err
    assert "1 under CC-BY-NC-2.0" in said and "data/photos/" in said and said.count("\n") == 1
    assert projects.aliases(restricted) == before and len(projects.versions(restricted)) == 1


def test_a_model_is_not_served_where_its_licences_do_not_allow_it(restricted: projects.Project) -> None:
    restricted.change({"rights.serve": ["CC-BY-2.0"]})
    # A version says what it learned from; a model of params.yaml is looked up in the table of photos.
    [port] = boards.free_ports(1)
    assert "CC0-1.0" in restricted.touchline("serve", "--port", str(port), exit_code=1)
    restricted.change({"rights.serve": ["CC0-1.0"]})
    said = restricted.touchline("serve", "--model", "cnn", "--port", str(port), exit_code=1)
    assert "CC-BY-NC-2.0" in said and "CC0-1.0" not in said
