"""`touchline predict` of videos that OpenCV made, on the planted model: what is watched, written and named."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import cv2
import numpy as np
import pytest
import test_predict
from conftest import names
from PIL import Image
from test_predict import CLASSES, COLOURS, Ask, draw

from touchline.commands import predict, video
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.params import load
from touchline.core.paths import Paths
from touchline.models import explain

# With the tests of photos: starting TensorFlow is most of what both cost.
pytestmark = pytest.mark.xdist_group("test_predict")
# pytest finds fixtures by their names here, and the tests take them as arguments.
ask, project, somewhere = test_predict.ask, test_predict.project, test_predict.somewhere
RATE = 10
# Ten seconds: red until 4, blue until 7, then red again; one stray blue frame at 2.
COURSE = ["red"] * 40 + ["blue"] * 30 + ["red"] * 30


def film(path: Path, colours: list[str] = COURSE, code: str = "MJPG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), RATE, (64, 48))
    assert writer.isOpened()
    for colour in colours:
        writer.write(np.full((48, 64, 3), COLOURS[colour][::-1], np.uint8))
    writer.release()
    return path


class Watched:
    """What one run wrote, and what it raised."""

    def __init__(self, project: Paths, wanted: list[str], form: str, capfd: Any, **options: Any) -> None:
        sampling = video.Sampling(options.pop("every", 1.0), options.pop("window", 5), options.pop("seconds", None))
        options = {"frames": False, "explain": False} | options
        self.error: TouchlineError | None = None
        capfd.readouterr()
        try:
            video.run(
                project, load(project.workspace / "params.yaml"), video.find(wanted), "cnn", form, sampling, **options
            )
        except TouchlineError as error:
            self.error = error
        self.out, self.notes = capfd.readouterr()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def passages(self) -> list[tuple[float, float, str]]:
        return [(row["from"], row["to"], row["label"]) for row in self.rows]


@pytest.fixture
def watch(project: Paths, capfd: Any) -> Any:
    def watched(*wanted: object, form: str = "json", **options: Any) -> Watched:
        return Watched(project, [str(each) for each in wanted], form, capfd, **options)

    return watched


@pytest.mark.parametrize(("name", "code"), [("match.mp4", "mp4v"), ("match.avi", "MJPG"), ("match.mkv", "MJPG")])
def test_a_clip_gives_its_passages(watch: Any, somewhere: Path, name: str, code: str) -> None:
    said = watch(film(somewhere / name, code=code), window=1)
    assert said.error is None
    assert said.passages == [(0, 4, "red"), (4, 7, "blue"), (7, 10, "red")]
    assert [row["frames"] for row in said.rows] == [4, 3, 3]
    assert all(row["clip"] == str(somewhere / name) and row["confidence"] > 0.9 for row in said.rows)
    assert names(said.notes, "models/cnn.keras", "red 7", "blue 3")


def test_a_stray_frame_is_smoothed_away_by_the_window(watch: Any, somewhere: Path) -> None:
    course = ["red"] * 20 + ["blue"] + ["red"] * 19
    clip = film(somewhere / "stray.avi", course)
    assert watch(clip, every=0.1, window=1).passages == [(0, 2, "red"), (2, 2.1, "blue"), (2.1, 4, "red")]
    assert watch(clip, every=0.1).passages == [(0, 4, "red")]


def test_a_frame_has_the_answer_of_a_photo(watch: Any, ask: Ask, somewhere: Path) -> None:
    clip = film(somewhere / "match.avi", ["red", "neither", "blue"])
    capture = cv2.VideoCapture(str(clip))
    for number in range(3):
        cv2.imwrite(str(somewhere / f"{number}.png"), capture.read()[1])
    photos = ask(*(f"{number}.png" for number in range(3))).rows
    frames = watch(clip, every=0.1, window=1, frames=True).rows
    assert [row["seconds"] for row in frames] == [0, 0.1, 0.2]
    assert [row["label"] for row in frames] == ["red", "unsure", "blue"]
    for frame, photo in zip(frames, photos, strict=True):
        assert {key: frame[key] for key in photo if key != "photo"} == {
            key: photo[key] for key in photo if key != "photo"
        }
    # The mean of three, as far as there are three.
    [first, *_] = watch(clip, every=0.1, window=3, frames=True).rows
    expected = np.mean([row["probabilities"]["red"] for row in photos[:2]])
    assert first["probabilities"]["red"] == pytest.approx(expected, abs=2e-6)


def test_a_table_and_csv_agree_with_json(watch: Any, somewhere: Path) -> None:
    clip = film(somewhere / "=match.avi")
    for frames in (False, True):
        rows = list(csv.DictReader(io.StringIO(watch("=match.avi", form="csv", frames=frames).out)))
        expected = watch("=match.avi", frames=frames).rows
        assert [row["label"] for row in rows] == [row["label"] for row in expected]
        assert [float(row["confidence"]) for row in rows] == [row["confidence"] for row in expected]
        assert rows[0]["clip"] == "'=match.avi"
        table = watch("=match.avi", form="table", frames=frames).out
        assert all(name in table for name in ("clip", "label", "confidence", "=match.avi", "0:04.0"))
    assert {f"probability:{name}" for name in CLASSES} <= set(rows[0])
    assert clip.exists()


def test_what_cannot_be_watched_is_named_and_the_rest_is_done(watch: Any, somewhere: Path) -> None:
    clips = somewhere / "clips"
    whole, film_of = film(clips / "whole.avi"), film(somewhere / "whole.mp4", code="mp4v")
    content = whole.read_bytes()
    (clips / "broken.avi").write_bytes(content[: len(content) // 2])
    (clips / "codec.avi").write_bytes(content.replace(b"MJPG", b"ZZZZ"))
    (clips / "cut.mp4").write_bytes(film_of.read_bytes()[:2000])
    (clips / "empty.mkv").touch()
    # A list of other places to look at is not followed, and what is no clip is left out.
    (clips / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{somewhere / 'whole.mp4'}\nhttp://127.0.0.1:9/a.ts\n")
    (clips / "notes.txt").write_text("of the match")
    film(clips / "none.avi", [])
    said = watch(clips, "missing.mp4", window=1)
    by_clip = {Path(row["clip"]).name: row for row in said.rows}
    assert list(by_clip) == ["broken.avi", "whole.avi"] and by_clip["broken.avi"]["to"] < 6
    reasons = dict(re.findall(r"^touchline: (?:.*/)?(.+?): (.+)$", said.notes, flags=re.MULTILINE))
    assert list(reasons) == ["broken.avi", "codec.avi", "cut.mp4", "empty.mkv", "list.mp4", "none.avi", "missing.mp4"]
    assert names(reasons["broken.avi"], "10.0")
    assert said.error.exit_code == 1 and names(str(said.error), "7")


def test_names_mean_videos_or_photos(somewhere: Path) -> None:
    film(somewhere / "clips/b.MP4", ["red"], code="mp4v")
    film(somewhere / "clips/below/a.avi", ["red"])
    (somewhere / "clips/readme").write_text("no photo")
    assert [clip.source for clip in video.find(["clips"])] == ["clips/b.MP4", "clips/below/a.avi"]
    assert [clip.source for clip in video.find(["clips/**/*.avi", "0", "rtsp://a/b"])] == [
        "clips/below/a.avi", "0", "rtsp://a/b",
    ]  # fmt: skip
    draw(somewhere / "0", "red", form="JPEG")
    assert video.find(["0"]) == video.find(["-"]) == video.find(["nothing.jpg"]) == []
    with pytest.raises(ParamsError, match=r"nothing\.jpg"):
        video.find(["clips", "nothing.jpg"])
    # Beside photos, whatever they are called, a folder's clips are other files.
    draw(somewhere / "clips/below/a photo", "red", form="JPEG")
    assert video.find(["clips"]) == []


def test_a_password_in_an_address_is_not_shown() -> None:
    clip = video.Clip("rtsp://user:secret@camera.example:554/live?a=b")
    assert clip.name == "rtsp://camera.example:554/live?a=b" and "secret" not in str(clip.strip)


def test_a_film_strip_lies_beside_the_clip(watch: Any, somewhere: Path) -> None:
    clip = film(somewhere / "match.avi")
    target = somewhere / "match.avi.touchline.jpg"
    said = watch(clip, explain=True, window=1)
    assert said.error is None and explain.is_overlay(target.read_bytes())
    with Image.open(target) as strip:
        assert strip.width > 2.5 * strip.height  # three passages in a row
    assert [found.path.name for found in predict.find([str(somewhere)])] == ["match.avi"]
    assert [found.source for found in video.find([f"{somewhere}/*"])] == [str(clip)]
    assert [found.source for found in video.find([str(clip), str(target)])] == [str(clip)]
    target.write_bytes(b"somebody's")
    said = watch(clip, explain=True)
    assert target.read_bytes() == b"somebody's" and names(said.notes, target.name) and len(said.rows) == 3
    # Of very many passages the longest are drawn.
    many = film(somewhere / "many.avi", (["red", "blue"] * 40 + ["red"] * 30))
    said = watch(many, every=0.1, window=1, explain=True)
    assert len(said.rows) == 81 and said.error is None


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Camera(BaseHTTPRequestHandler):
    """A web camera: JPEGs one after the other, as long as somebody looks."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        image = cv2.imencode(".jpg", np.full((48, 64, 3), COLOURS["red"][::-1], np.uint8))[1].tobytes()
        head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(image)
        try:
            while True:
                self.wfile.write(head + image + b"\r\n")
                time.sleep(0.02)
        except OSError:
            pass


@pytest.fixture
def served(somewhere: Path) -> Iterator[Any]:
    """Serves the folder, or a camera, on loopback."""
    servers = []

    def serve(handler: Any) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_clip_is_watched_over_http(watch: Any, somewhere: Path, served: Any) -> None:
    film(somewhere / "match.avi")
    address = served(partial(Quiet, directory=somewhere))
    said = watch(f"{address}/match.avi", window=1, seconds=8)
    assert said.error is None and said.passages == [(0, 4, "red"), (4, 7, "blue"), (7, 8, "red")]
    said = watch(f"{address}/gone.avi")
    assert names(said.notes, f"{address}/gone.avi") and said.error.exit_code == 1


def test_a_stream_is_watched_for_as_long_as_asked_and_camera_that_is_not_there_is_named(
    watch: Any,
    served: Any,
    somewhere: Path,
) -> None:
    address = served(Camera)
    said = watch(address, "97", every=0.1, seconds=0.5, explain=True)
    assert [row["label"] for row in said.rows] == ["red"] and said.rows[0]["clip"] == address
    assert said.rows[0]["to"] == 0.5 and names(said.notes, "camera 97") and names(str(said.error), "1")
    [strip] = somewhere.glob("*.touchline.jpg")
    assert explain.is_overlay(strip.read_bytes())


def test_ctrl_c_ends_a_stream_and_what_was_seen_is_written(project: Paths, served: Any, somewhere: Path) -> None:
    broken = film(somewhere / "broken.avi")
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    command = [
        sys.executable, "-c", "from touchline.cli import main; main()", "predict", str(broken), served(Camera),
        "--model", "cnn", "--every", "0.05", "--format", "json", "--frames", "--window", "1",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=project.workspace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        try:
            assert "broken.avi" in process.stdout.readline()
            while "broken.avi" in process.stdout.readline():
                pass
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1, err
    # FFmpeg prints nothing of its own; the clip that breaks off is named, and all is counted.
    about = [line.partition(" ")[0] for line in err.splitlines() if "reference" not in line and "frames:" not in line]
    assert about == ["touchline:", "models/cnn.keras:", "touchline:"], err
    assert all(json.loads(line)["label"] == "red" for line in out.splitlines())


def test_a_window_has_a_middle(watch: Any, somewhere: Path) -> None:
    said = watch(film(somewhere / "a.avi", ["red"]), window=4)
    assert isinstance(said.error, ParamsError) and names(str(said.error), "--window", "4") and not said.out
