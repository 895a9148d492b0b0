"""What the pipeline itself costs: a repro with nothing to do, start-up, memory as photos grow, training a head again.

    python benchmarks/pipeline.py noop       against a bare DVC project of as many stages
    python benchmarks/pipeline.py memory     peak memory and seconds of each stage at 1,000 and 10,000 photos
    python benchmarks/pipeline.py retrain    a transfer head again after a changed param, at 2,448 training photos

Each works in a copy of the project under a temporary folder. Timings on a shared machine are noisy: what is compared is
measured in turns, in one run.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from touchline.core import stage
from touchline.core.paths import Paths

PROJECT = Path(__file__).resolve().parent.parent
COPIED = (
    "dvc.yaml",
    "params.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/plots",
    "src",
    "data/incoming",
    "data/feedback",
    "data/decisions.csv",
    "data/forgotten.csv",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["noop", "memory", "retrain"])
    parser.add_argument("--photos", type=int, nargs="+", default=[1000, 10000], help="for memory: how many photos")
    arguments = parser.parse_args()
    # DVC finds `touchline` on PATH, where this Python's environment may not be.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "noop":
            noop(Path(folder))
        elif arguments.what == "memory":
            memory(Path(folder), arguments.photos)
        else:
            retrain(Path(folder))


def noop(folder: Path, turns: int = 7) -> None:
    """`dvc repro` with nothing to do, ours against a bare project; and start-up of the command line."""
    ours = project(folder / "ours", {"ingest.sample.per_class": 30, "validate.min_per_class": 5, **QUICK})
    dvc(ours, "repro", "-q")
    stages = sum(1 for line in dvc(ours, "stage", "list").splitlines() if line.strip())
    bare = bare_project(folder / "bare", stages)
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(turns):
        for name, root in (("ours", ours), ("bare", bare)):
            seconds[name].append(timed([sys.executable, "-m", "dvc", "repro", "-q"], root))
    ratio = statistics.median(seconds["ours"]) / statistics.median(seconds["bare"])
    for name, values in seconds.items():
        print(f"dvc repro, nothing to do, {stages} stages, {name}: median {statistics.median(values):.2f} s of {turns}")
    print(f"ratio {ratio:.2f} (goal: at most 1.3)")
    starts = [timed([shutil.which("touchline") or "touchline", "--help"], ours) for _ in range(turns)]
    print(f"touchline --help: median {statistics.median(starts):.2f} s (goal: under 0.5)")
    heavy = "tensorflow", "keras", "mlflow", "great_expectations"
    code = f"import sys; import touchline.stages.split; print([name for name in {heavy} if name in sys.modules])"
    print("heavy packages that `split` imports:", run([sys.executable, "-c", code], ours).strip())


def memory(folder: Path, sizes: Sequence[int]) -> None:
    """Seconds and peak memory of each stage as photos grow."""
    costs: dict[int, dict[str, dict[str, float]]] = {}
    for photos in sizes:
        root = project(folder / str(photos), {**drawn(photos // 2), **QUICK})
        dvc(root, "repro", "-q")
        costs[photos] = stage.costs(Paths(root, root))
    print(f"{'stage':18}" + "".join(f"{f'{photos:,} photos':>24}" for photos in sizes))
    for name in costs[sizes[0]]:
        cells = (
            f"{costs[photos][name]['seconds']:.0f} s, {costs[photos][name]['peak_megabytes']:.0f} MB"
            for photos in sizes
        )
        print(f"{name:18}" + "".join(f"{cell:>24}" for cell in cells))


def retrain(folder: Path) -> None:
    """A transfer head trained again after one of its params changed; the features are kept."""
    # Near 63 % of the sample's photos come to train.
    root = project(folder / "retrain", {**drawn(1950), "models.cnn.epochs": 1, "models.cnn.patience": 1})
    dvc(root, "repro", "-q", "train@transfer")
    change(root, {"models.transfer.balance": "class"})
    seconds = timed([sys.executable, "-m", "dvc", "repro", "train@transfer"], root)
    train = sum(",train," in line for line in (root / "data/split.csv").read_text().splitlines())
    print(f"head trained again at {train:,} training photos: {seconds:.1f} s, start-up included (goal: under 30)")


def drawn(scenes: int) -> dict[str, int]:
    """Params for so many scenes of each class, which ingest takes all."""
    return {"ingest.sample.per_class": scenes, "ingest.per_class": scenes}


# Epochs change neither memory nor what is compared.
QUICK = {"models.cnn.epochs": 2}


def project(root: Path, changes: dict[str, Any]) -> Path:
    """A copy of this project with other params, without git."""
    for name in COPIED:
        source, target = PROJECT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    dvc(root, "config", "--local", "core.no_scm", "true")
    change(root, changes)
    return root


def change(root: Path, changes: dict[str, Any]) -> None:
    yaml = YAML()
    content = yaml.load(root / "params.yaml")
    for key, value in changes.items():
        *sections, last = key.split(".")
        inner = content
        for section in sections:
            inner = inner[section]
        inner[last] = value
    yaml.dump(content, root / "params.yaml")


def bare_project(root: Path, stages: int) -> Path:
    """A DVC project whose stages copy one small file, each after the one before."""
    root.mkdir(parents=True)
    run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], root)
    (root / "0.txt").write_text("0\n")
    entries = {
        f"stage{number}": {
            "cmd": f"cp {number}.txt {number + 1}.txt",
            "deps": [f"{number}.txt"],
            "outs": [f"{number + 1}.txt"],
        }
        for number in range(stages)
    }
    YAML().dump({"stages": entries}, root / "dvc.yaml")
    dvc(root, "repro", "-q")
    return root


def dvc(root: Path, *arguments: str) -> str:
    return run([sys.executable, "-m", "dvc", *arguments], root)


def run(command: Sequence[str], root: Path) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def timed(command: Sequence[str], root: Path) -> float:
    began = time.perf_counter()
    run(command, root)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
