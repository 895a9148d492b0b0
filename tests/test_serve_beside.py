"""A challenger beside the champion: what it is asked, what it costs the champion's answers, and how the two compare."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import boards
import numpy as np
import pandas as pd
import pytest
from conftest import names
from test_serve import Model, Served, classifier, form, jpeg

from touchline.commands import compare
from touchline.commands.serve import Limits
from touchline.commands.serve_beside import Beside
from touchline.core.errors import ParamsError
from touchline.core.files import write_table
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.data import served
from touchline.data.served import CANARY, CHAMPION, SHADOW, Asked, Recorder
from touchline.models.inference import ModelFiles
from touchline.sources import feedback
from touchline.tracking import runs

CHAMPIONS = ("a model version 1", "1" * 64)
CHALLENGERS = ("a model version 2", "2" * 64)


@pytest.fixture
def serve(params_with: Callable[..., Params], tmp_path: Path) -> Iterator[Callable[..., tuple[Served, Model]]]:
    """A server with a challenger beside its model, which answers the contrary; both are recorded."""
    with ExitStack() as started:

        def start(**options: Any) -> tuple[Served, Model]:
            params, challenger = params_with(), Model()
            files = ModelFiles(Path("challenger.keras"), CHALLENGERS[1])
            contrary = replace(
                classifier(lambda images: challenger.forward(images)[:, ::-1]), name=CHALLENGERS[0], files=files
            )
            recorder = started.enter_context(Recorder(tmp_path, params.monitor, *CHAMPIONS, keep_photos=True))
            beside = Beside(contrary, **options)
            one = Served(params, Model(), Limits(), recorder=recorder, beside=beside)
            started.callback(one.end)
            started.callback(challenger.may_answer.set)
            return one, challenger

        yield start


def rows_of(folder: Path, count: int, **values: str) -> list[dict[str, Any]]:
    def rows() -> list[dict[str, Any]]:
        table = served.read(folder)
        return table[(table[list(values)] == list(values.values())).all(axis=1)].to_dict("records")

    boards.wait_for(lambda: len(rows()) >= count, 30)
    return rows()


def metric(server: Served, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return float(next((line.rpartition(" ")[2] for line in lines if line.startswith(name)), 0))


def different(count: int) -> list[bytes]:
    return [jpeg((200, 3 * number, 10)) for number in range(count)]


def test_a_shadow_is_asked_too_and_its_answers_are_only_recorded(serve: Callable, tmp_path: Path) -> None:
    server, _ = serve()
    said = [server.predict(photo)[1] for photo in different(3)]
    assert {(each["label"], each["model"]) for each in said} == {("red", "a planted model")}
    of_shadow = rows_of(tmp_path, 3, role=SHADOW)
    of_champion = rows_of(tmp_path, 3, role=CHAMPION)
    assert {row["photo"] for row in of_shadow} == {row["photo"] for row in of_champion}
    assert {(row["guess"], row["model"], row["model_sha256"]) for row in of_shadow} == {("blue", *CHALLENGERS)}
    assert metric(server, 'touchline_shadow_total{outcome="answered"}') == 3


def test_a_shadow_that_hangs_delays_no_answer_and_what_finds_no_room_is_counted(serve: Callable) -> None:
    server, challenger = serve()
    challenger.may_answer.clear()
    for photo in different(70):
        assert server.predict(photo)[1]["label"] == "red"
    # One is being asked about at most, and 64 wait.
    assert metric(server, 'touchline_shadow_total{outcome="dropped"}') >= 5
    server.end()


def test_a_shadow_that_fails_is_one_line_and_the_answers_go_on(
    serve: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server, challenger = serve()
    challenger.fault = RuntimeError("out of memory\nat once")
    for photo in different(3):
        assert server.predict(photo)[1]["label"] == "red"
    assert all("out of memory" in row["error"] for row in rows_of(tmp_path, 3, role=SHADOW))
    [line] = [line for line in capfd.readouterr().err.splitlines() if "shadow" in line]
    assert names(line, CHALLENGERS[0]) and "out of memory" in line
    challenger.fault = None
    server.predict(jpeg())
    boards.wait_for(lambda: metric(server, 'touchline_shadow_total{outcome="answered"}') == 1, 30)


def test_a_canary_answers_a_share_of_the_photos_and_the_same_ones_each_time(serve: Callable, tmp_path: Path) -> None:
    server, _ = serve(canary_share=0.5, is_shadow=False)
    photos = different(40)
    said = [server.predict(photo)[1] for photo in photos]
    by_challenger = [each["model"] == CHALLENGERS[0] for each in said]
    # Forty tosses of a coin: outside of these once in ten thousand.
    assert 8 <= sum(by_challenger) <= 32
    assert [each["label"] for each in said] == ["blue" if each else "red" for each in by_challenger]
    assert [server.predict(photo)[1]["model"] for photo in photos] == [each["model"] for each in said]
    rows = rows_of(tmp_path, 2 * sum(by_challenger), role=CANARY)
    assert {row["model"] for row in rows} == {CHALLENGERS[0]}
    _, several, _ = server.predict(**form(*((f"{number}.jpg", photo) for number, photo in enumerate(photos[:8]))))
    assert [each["model"] for each in several] == [each["model"] for each in said[:8]]


def test_where_a_canary_fails_the_champion_answers(serve: Callable, tmp_path: Path) -> None:
    server, challenger = serve(canary_share=1.0, is_shadow=False)
    challenger.fault = RuntimeError("out of memory")
    status, said, _ = server.predict(jpeg())
    assert (status, said["label"], said["model"]) == (200, "red", "a planted model")
    [failed] = rows_of(tmp_path, 1, role=CANARY)
    assert failed["error"] and len(rows_of(tmp_path, 1, role=CHAMPION)) == 1


def answer(guess: str, confidence: float) -> dict[str, Any]:
    other = {"red": "blue", "blue": "red"}[guess]
    probabilities = {guess: confidence, other: 1 - confidence}
    return {
        "label": guess, "guess": guess, "confidence": confidence, "similarity": None,
        "probabilities": dict(sorted(probabilities.items())),
    }  # fmt: skip


@pytest.fixture
def registered(paths: Paths, params_with: Callable[..., Params]) -> Params:
    """Two registered versions."""
    params = params_with()
    name = params.register_.name
    store = runs.open_store(paths, name)
    store.client.create_registered_model(name)
    for number, (_, digest) in enumerate((CHAMPIONS, CHALLENGERS), 1):
        store.client.create_model_version(name, f"file:///{number}", tags={runs.MODEL_SHA256: digest})
    store.client.set_registered_model_alias(name, "challenger", "2")
    return params


def recorded(paths: Paths, params: Params) -> list[str]:
    """Digests of photos that both versions answered."""
    photos = [jpeg((200, 3 * number, 10)) for number in range(8)]
    with Recorder(paths.served, params.monitor, *CHAMPIONS, keep_photos=True) as recorder:
        kept = [recorder.asked(photo, np.full((32, 32, 3), 200, np.uint8)) for photo in photos]
        for number, photo in enumerate(kept):
            recorder.add(photo, answer("blue", 0.99))  # an earlier answer: the last one counts
            recorder.add(photo, answer("red", 0.9))
            said = answer("blue", 0.6 + 0.1 * number) if number < 2 else answer("red", 0.8)
            recorder.add(photo, said, role=SHADOW, model=CHALLENGERS)
        recorder.add(Asked("f" * 64, 1), answer("red", 0.9))  # only one answered this
        recorder.add(Asked("e" * 64, 1), "cut off", role=SHADOW, model=CHALLENGERS)
    for photo in photos[:4]:
        feedback.remember(paths.feedback, photo, "red", [])
    return [photo.photo for photo in kept]


def test_versions_are_compared_on_what_both_were_asked(
    paths: Paths, registered: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = recorded(paths, registered)
    capsys.readouterr()
    compare.run(paths, registered, "1", "challenger")
    said = capsys.readouterr().out
    found = json.loads((paths.reports / "compare.json").read_text())
    assert found["versions"] == [1, 2]
    assert (found["agreement"]["count"], found["agreement"]["photos"]) == (6, 8)
    assert found["agreement"]["low"] < 0.75 < found["agreement"]["high"]
    # The one on which both are more confident comes first.
    assert [each["photo"] for each in found["differing"]] == [photos[1], photos[0]]
    assert [(each["count"], each["photos"]) for each in found["accuracy"]] == [(4, 4), (2, 4)]
    assert found["mcnemar"]["only_first_right"] == 2
    assert photos[0][:16] in said and names(said, "0.750", "1.000", "0.500")
    page = (paths.reports / "compare.html").read_text()
    assert page.count("data:image/jpeg") == 2 and photos[1][:16] in page
    # One of the project's own, which may not be shown.
    row = {"path": "data/photos/red/a.jpg", "class": "red", "sha256": photos[1], "source": "imagenet", "licence": ""}
    write_table(paths.photos_table, pd.DataFrame([row]))
    compare.run(paths, registered, "1", "challenger")
    page = (paths.reports / "compare.html").read_text()
    assert page.count("data:image/jpeg") == 1 and photos[1][:16] in page


def test_versions_that_no_photo_was_asked_of_are_one_line(
    paths: Paths, registered: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    compare.run(paths, registered, "1", "2")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "--shadow 2" in said
    assert not (paths.reports / "compare.html").exists()
    for wanted in ("3", "champion"):
        with pytest.raises(ParamsError) as error:
            compare.run(paths, registered, "1", wanted)
        assert names(str(error.value), wanted)
    with pytest.raises(ParamsError):
        compare.run(paths, registered, "2", "challenger")
