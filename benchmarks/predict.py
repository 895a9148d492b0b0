"""What `touchline predict` costs beside Keras's own way, and how often it says `unsure`.

    python benchmarks/predict.py --photos DIR --model FILE.keras [--count 2000] [--megapixels 12] [--held DIR]
        [--others DIR]

Speed: both read the same folder of `--count` hard links to the photos of DIR and write a CSV, each in a process of its
own. Keras's way is `load_model`, `image_dataset_from_directory` and `predict`; it reads neither WebP nor files with a
wrong ending, so those are links to PNG copies for it, made before and not counted. The rate without start-up is taken
from the difference to a run on 32 photos. With `--megapixels`, the photos are JPEG copies enlarged to that size, like
those of cameras; small photos take a network most of the time, large ones their decoding.

Unsure: on `--held`, photos of the classes that the model was not trained on, and on `--others`, photos of neither.
Without `--others` these are 100 scenes drawn by the program, of sports that it makes up: not photos, and so only a try.
"""

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from touchline.core import parallel
from touchline.data import photos
from touchline.models.classifier import UNSURE
from touchline.models.inference import BATCH

PROJECT = Path(__file__).resolve().parent.parent
KERAS_WAY = """
import sys
import keras
model = keras.models.load_model(sys.argv[2], compile=False)
side = model.input_shape[1]
photos = keras.utils.image_dataset_from_directory(
    sys.argv[1], labels=None, shuffle=False, image_size=(side, side), batch_size=32, verbose=False
)
found = model.predict(photos.prefetch(2), verbose=0)
for name, row in zip(photos.file_paths, found):
    print(name, *row, sep=",")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a .keras file with its .json beside it")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--megapixels", type=float, help="enlarge the photos to this size first")
    parser.add_argument("--held", type=Path, help="a folder, or a text file with a name a line")
    parser.add_argument("--others", type=Path, help="likewise")
    options = parser.parse_args()
    model = str(Path(options.model).resolve())
    ours = [sys.executable, "-m", "touchline.cli", "predict", "--format", "csv", "--model", model]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        there = [path for path in sorted(options.photos.rglob("*")) if path.is_file()]
        found = [path for path in there if photos.header(path.read_bytes()).extension]
        if options.megapixels:
            found = enlarged(found[: options.count], folder / "enlarged", options.megapixels)
        ways = {
            "touchline": (ours, linked(found, folder / "ours", options.count, readable=False)),
            "keras": ([sys.executable, "-c", KERAS_WAY], linked(found, folder / "keras", options.count, readable=True)),
        }
        print(f"{options.count:,} links to {len(found):,} photos, {os.cpu_count()} cores")
        print(f"{'':10}{'seconds':>10}{'processor':>10}{'start-up':>10}{'photos/s':>10}{'peak MB':>10}")
        took: dict[str, tuple[float, float]] = {}
        for name, (command, many) in ways.items():
            few = folder / f"{name} few"
            few.mkdir()
            for path in sorted(many.iterdir())[:BATCH]:
                os.link(path, few / path.name)
            # The first run also brings the programs from the disk.
            _, (short, *_), (long, processor, peak, rows) = (
                timed([*command, str(each), *([model] if name == "keras" else [])]) for each in (few, few, many)
            )
            assert rows >= options.count, f"{name} answered {rows} of {options.count}"
            assert long > short, f"{name}: 32 photos took longer than {options.count}"
            rate = (options.count - BATCH) / (long - short)
            took[name] = (long, long - short)
            print(f"{name:10}{long:>10.1f}{processor:>10.1f}{short:>10.1f}{rate:>10.1f}{peak:>10.0f}", flush=True)
        whole, alone = (keras / ours for ours, keras in zip(took["touchline"], took["keras"], strict=True))
        print(f"Keras's way takes {whole:.1f} times the seconds, {alone:.1f} times without start-up", flush=True)
        others = options.others or drawn(folder / "others")
        what = "photos of neither class" if options.others else "drawn scenes of neither sport"
        for told, place in (("held-out photos", options.held), (what, others)):
            if place:
                unsure(told, ours, place)


def linked(found: list[Path], folder: Path, count: int, *, readable: bool) -> Path:
    """`count` files in `folder`, each a link to a photo, or to a PNG copy where TensorFlow would not read it."""
    folder.mkdir()
    originals: list[Path] = []
    (folder.parent / f"{folder.name} originals").mkdir()
    for number, path in enumerate(found[:count]):
        content = path.read_bytes()
        extension = photos.header(content).extension
        target = folder.parent / f"{folder.name} originals" / f"{number}.{extension}"
        if readable and extension not in {"jpg", "png"}:
            target = target.with_suffix(".png")
            cv2.imwrite(str(target), cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR))
        else:
            shutil.copyfile(path, target)
        originals.append(target)
    for number in range(count):
        original = originals[number % len(originals)]
        os.link(original, folder / f"{number:06}{original.suffix}")
    return folder


def enlarged(found: list[Path], folder: Path, megapixels: float) -> list[Path]:
    """JPEG copies of photos, of so many megapixels, in their shape."""
    folder.mkdir()

    def enlarge(path: Path) -> Path:
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        factor = np.sqrt(1e6 * megapixels / (image.shape[0] * image.shape[1]))
        target = folder / f"{path.stem}.jpg"
        cv2.imwrite(str(target), cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC))
        return target

    return list(parallel.in_order(enlarge, found))


def timed(command: list[str]) -> tuple[float, float, float, int]:
    """Seconds, processor seconds, peak megabytes and lines of output."""
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        assert os.waitstatus_to_exitcode(status) in {0, 1}, command
        output.seek(0)
        return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, sum(1 for _ in output)


def drawn(folder: Path, count: int = 100) -> Path:
    """Scenes of made-up sports, none of which is rugby or soccer."""
    from touchline.sources.sample import sport_of
    from touchline.sources.scenes import draw

    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        scene = draw(sport_of("neither", number % 60), random)
        cv2.imwrite(str(folder / f"{number}.jpg"), cv2.cvtColor(scene, cv2.COLOR_RGB2BGR))
    return folder


def unsure(told: str, command: list[str], place: Path) -> None:
    text = place.read_text() if place.is_file() else ""
    done = subprocess.run([*command, "-" if text else str(place.resolve())], cwd=PROJECT, input=text, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    labels = [row["label"] for row in csv.DictReader(io.StringIO(done.stdout))]
    print(f"{told}: {labels.count(UNSURE)} of {len(labels):,} unsure ({labels.count(UNSURE) / len(labels):.1%})")


if __name__ == "__main__":
    main()
