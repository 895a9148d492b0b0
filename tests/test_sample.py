"""The drawn scenes: what they promise to every stage that reads them."""

import hashlib
import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import plain_processor
import pytest
from PIL import Image

from touchline.core.errors import TouchlineError
from touchline.core.params import SampleParams
from touchline.sources import Candidate
from touchline.sources.sample import candidates, sport_of

PARAMS = SampleParams(per_class=20, seed=7)
CLASSES = ["rugby", "soccer"]
BAD = {"truncated.jpg", "empty.jpg", "page.jpg", "flat.png", "thumbnail.jpg", "panorama.jpg"}


def offered(params: SampleParams = PARAMS, classes: list[str] = CLASSES) -> dict[str, Candidate]:
    return {candidate.origin: candidate for candidate in candidates(params, classes)}


def scenes(label: str) -> list[str]:
    return [origin for origin in offered() if origin.startswith(f"{label}/scene-") and origin.count("-") == 1]


@cache
def photo(origin: str) -> bytes:
    return offered()[origin].read()


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def test_every_class_gets_its_scenes_under_names_of_their_own() -> None:
    everything = list(candidates(PARAMS, CLASSES))
    assert len({candidate.origin for candidate in everything}) == len(everything)
    for label in CLASSES:
        assert len(scenes(label)) == PARAMS.per_class
    assert {(c.source, c.licence, c.author, c.group) for c in everything} == {
        ("sample", "CC0-1.0", "Touchline sample", "")
    }
    assert all(candidate.origin.startswith(f"{candidate.label}/") for candidate in everything)


def test_a_scene_is_the_same_whoever_asks_and_in_whatever_order() -> None:
    origins = scenes("rugby")[:8] + scenes("soccer")[:8]
    one_by_one = {origin: offered()[origin].read() for origin in origins}
    with ThreadPoolExecutor(4) as pool:
        backwards = list(pool.map(lambda origin: offered()[origin].read(), reversed(origins)))
    assert backwards == [one_by_one[origin] for origin in reversed(origins)]


# A change of the drawing, or of a library's encoder, changes these: then every project's sample is fetched anew.
DIGESTS = {
    "soccer/scene-0007.png": "8d63852bb2b4562e",
    "rugby/scene-0013.webp": "21aff778ba3a6efe",
    "soccer/burst.jpg": "7b032ce9a0eee4ec",
    "rugby/scene-0003-smaller.jpg": "f5a7496da5bcdcee",
    "chess/scene-0013.webp": "82246bd8e451600e",
    "hockey/scene-0009.jpg": "e9ae170b7895a912",
    "hockey/scene-0005.jpg": "8d8fad9dfa96c16f",
}


def digests() -> dict[str, str]:
    """Of photos that between them show every ball, goal, backdrop, light, weather, lens and file format."""
    everything = offered(classes=["rugby", "soccer", "hockey", "chess"])
    return {origin: hashlib.sha256(everything[origin].read()).hexdigest()[:16] for origin in DIGESTS}


def test_a_scene_has_the_same_bytes_on_every_processor() -> None:
    assert digests() == DIGESTS
    code = "import test_sample; print(test_sample.digests() == test_sample.DIGESTS)"
    plain = os.environ | plain_processor.ENVIRONMENT
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=plain, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_nothing_is_drawn_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError(f"drawn too early in {threading.current_thread().name}")

    monkeypatch.setattr("touchline.sources.sample.draw", refuse)
    candidate = next(candidates(PARAMS, CLASSES))
    with pytest.raises(AssertionError, match="too early"):
        candidate.read()


def test_another_seed_draws_other_scenes() -> None:
    origin = scenes("rugby")[0]
    assert offered()[origin].read() != offered(SampleParams(per_class=20, seed=8))[origin].read()


def test_more_scenes_and_more_classes_leave_the_old_ones_as_they_were() -> None:
    origin = scenes("soccer")[3]
    assert offered()[origin].read() == offered(SampleParams(per_class=60, seed=7), [*CLASSES, "hockey"])[origin].read()


def test_scenes_are_photos_of_usual_sizes_in_three_formats() -> None:
    for label in CLASSES:
        images = [opened(photo(origin)) for origin in scenes(label)]
        assert {image.format for image in images} == {"JPEG", "PNG", "WEBP"}
        sides = np.array([image.size for image in images])
        assert sides.min() >= 200
        assert sides.max() <= 640
        assert (sides[:, 0] > sides[:, 1]).any()
        assert (sides[:, 0] < sides[:, 1]).any()
        assert all(np.asarray(image.convert("L")).std() > 5 for image in images)


def test_scenes_are_not_near_duplicates_of_each_other() -> None:
    def fingerprint(content: bytes) -> np.ndarray:
        small = opened(content).convert("L").resize((9, 8))
        return np.diff(np.asarray(small, int), axis=1).ravel() > 0

    prints = np.array([fingerprint(photo(origin)) for label in CLASSES for origin in scenes(label)])
    distance = (prints[:, None] != prints[None]).sum(axis=-1)
    assert distance[~np.eye(len(prints), dtype=bool)].min() > 6


def test_the_files_of_real_downloads_are_among_them() -> None:
    content = {origin.split("/")[1]: photo(origin) for origin in offered()}
    assert content["empty.jpg"] == b""
    assert content["page.jpg"].startswith(b"<!DOCTYPE html>")
    with pytest.raises(OSError, match="truncated"):
        opened(content["truncated.jpg"])
    assert np.asarray(opened(content["flat.png"])).std(axis=(0, 1)).max() == 0
    assert opened(content["thumbnail.jpg"]).size == (32, 24)
    width, height = opened(content["panorama.jpg"]).size
    assert width > 4 * height
    assert opened(content["jpeg-inside.png"]).format == "JPEG"
    burst = opened(content["burst.jpg"])
    assert (burst.format, burst.n_frames) == ("MPO", 2)


def test_copies_are_equal_to_the_byte_and_near_copies_are_not() -> None:
    everything = offered()
    for label in CLASSES:
        assert everything[f"{label}/copy-of-scene-0001.jpg"].read() == everything[f"{label}/scene-0001.jpg"].read()
    assert everything["soccer/scene-0004-of-rugby.jpg"].read() == everything["rugby/scene-0004.jpg"].read()
    scene = opened(photo("rugby/scene-0002.jpg"))
    again = opened(photo("rugby/scene-0002-recompressed.jpg"))
    difference = np.abs(np.asarray(scene, float) - np.asarray(again, float)).mean()
    assert 0 < difference < 12
    smaller = opened(photo("rugby/scene-0003-smaller.jpg"))
    assert smaller.size[0] < opened(photo("rugby/scene-0003.jpg")).size[0]


def test_all_but_the_bad_files_can_be_decoded() -> None:
    everything = offered(SampleParams(per_class=10, seed=3))
    for origin, candidate in everything.items():
        if origin.split("/")[1] not in BAD:
            assert cv2.imdecode(np.frombuffer(candidate.read(), np.uint8), cv2.IMREAD_COLOR) is not None, origin


def test_known_names_are_drawn_as_known_wherever_they_stand() -> None:
    assert sport_of("rugby", 0) == sport_of("rugby", 5) == sport_of("Rugby", 1)
    assert sport_of("soccer", 0).goal == "net"
    assert sport_of("rugby", 0).ball == "oval"


def test_unknown_names_get_sports_of_their_own() -> None:
    made_up = [sport_of(f"class {position}", position) for position in range(62)]
    assert len({*made_up, sport_of("rugby", 0), sport_of("soccer", 0)}) == 64
    first = [sport_of("rugby", 0), sport_of("soccer", 1), *made_up[:2]]
    for attribute in ("ball", "goal", "shirt"):
        assert len({getattr(sport, attribute) for sport in first}) == 4
    with pytest.raises(TouchlineError, match=r"\b62\b"):
        sport_of("one too many", 62)


@pytest.mark.parametrize("classes", [["cats", "dogs", "rugby", "owls"], ["naïve name", "日本"]])
def test_any_names_and_any_number_of_classes_can_be_drawn(classes: list[str]) -> None:
    for origin, candidate in offered(SampleParams(per_class=10, seed=1), classes).items():
        content = candidate.read()
        if origin.split("/")[1] not in BAD:
            assert min(opened(content).size) >= 150, origin
