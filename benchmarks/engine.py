"""What looking at photos costs: the table of one run, on this machine, with the champion of a project.

    python benchmarks/engine.py --project DIR --photos DIR [--only predict,many,files,...] [--rounds 3] [--count 1205]
        [--drawn 1000 3000] [--rows 10000 100000]

DIR of `--project` has a champion (`make run` makes one). Every row uses the command line alone, so the same file
measures older versions of the code: put that version's `src` first on PYTHONPATH. Seconds are those of the clock;
processor seconds and memory are what the system counted for the process and those it started.

- predict: `touchline predict` of one photo, the whole command.
- many: the same of `--count` links to the photos.
- files: `--count` links to the photos beside Keras's own pipeline with the same network: benchmarks/predict.py.
- serve: `touchline serve` beside MLflow's own server, from its start to its first answer, its memory after it, and
  seconds of an answer with one and with eight clients.
- features: `touchline features pooled` of all photos of the project, in a copy of its folder, twice: with nothing
  stored, and once more after the stored rows were deleted.
- run: `dvc repro` from nothing in a copy of the project's folder, what `make run` does after installation.
- stages: each stage at `--drawn` photos: benchmarks/pipeline.py.
- head: a head on `--rows` rows, 1,000,000 of which take 5 GB of disk: benchmarks/head.py.
- engines: the champion exported to other formats and run in one process, in turns, on the same photos, 32 at a time.
"""

import argparse
import base64
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from touchline.core import stage
from touchline.core.paths import Paths

TOUCHLINE = [sys.executable, "-m", "touchline.cli"]
ROWS = ("predict", "many", "files", "serve", "features", "run", "stages", "head", "engines")
BATCH = 32
ANSWERS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1205)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drawn", nargs="+", default=["1000", "3000"])
    parser.add_argument("--rows", nargs="+", default=["10000", "100000"])
    parser.add_argument("--only", default=",".join(ROWS), help="some of these rows, separated by commas")
    options = parser.parse_args()
    project = options.project.resolve()
    # DVC finds `touchline` on PATH, where this Python's environment may not be.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = sorted(path.resolve() for path in options.photos.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    print(f"{platform.node()}: {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}", flush=True)
    for row in options.only.split(","):
        MEASURE[row](project, found, options)


def run(command: list[str], project: Path) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak megabytes of a command."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        errors.seek(0)
        assert process.returncode == 0, errors.read().decode()[-2000:]
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def say(what: str, runs: list[tuple[float, float, float]]) -> None:
    seconds, processor, peak = (median(values) for values in zip(*runs, strict=True))
    print(f"{what}: {seconds:.2f} s, {processor:.2f} s of processor time, {peak:.0f} MB", flush=True)


def predict(project: Path, found: list[Path], options: argparse.Namespace) -> None:
    command = [*TOUCHLINE, "predict", str(found[0])]
    run(command, project)  # brings the programs from the disk
    say("predict, one photo", [run(command, project) for _ in range(options.rounds)])


def many(project: Path, found: list[Path], options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.count):
            Path(folder, f"{number:06}.jpg").symlink_to(found[number % len(found)])
        command = [*TOUCHLINE, "predict", "--format", "csv", folder]
        say(f"predict, {options.count:,} photos", [run(command, project) for _ in range(options.rounds)])


def beside(script: str, *arguments: str) -> None:
    """Another file of this folder, whose lines are a part of the table."""
    subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *arguments], check=True)


def files(project: Path, _: object, options: argparse.Namespace) -> None:
    model = str(project / "models/transfer.keras")
    beside("predict.py", "--photos", str(options.photos), "--model", model, "--count", str(options.count))


def stages(*given: Any) -> None:
    beside("pipeline.py", "memory", "--photos", *given[-1].drawn)


def head(*given: Any) -> None:
    beside("head.py", "--rows", *given[-1].rows)


def serve(project: Path, found: list[Path], options: argparse.Namespace) -> None:
    contents = [path.read_bytes() for path in found[:ANSWERS]]
    for name, server in SERVERS.items():
        starts, memory = [], []
        waits: dict[int, list[float]] = {1: [], 8: []}
        for _ in range(options.rounds):
            port = free_port()
            ask = partial(asked, port, server.path, server.headers)
            bodies = [server.body(content) for content in contents]
            began = time.perf_counter()
            # In a session of its own: MLflow's server starts others, and ends without them.
            process = subprocess.Popen(
                [*server.command(port)], cwd=project, env=os.environ | server.environment, start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                while True:
                    try:
                        ask(bodies[0])
                        break
                    except OSError:
                        assert process.poll() is None, "the server ended"
                        time.sleep(0.02)
                starts.append(time.perf_counter() - began)
                for clients, seconds in waits.items():
                    with ThreadPoolExecutor(clients) as pool:
                        seconds.extend(pool.map(ask, bodies))
                started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                memory.append(sum(each.memory_info().rss for each in started) / 2**20)
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        print(f"{name}: {median(starts):.2f} s from its start to its first answer, {median(memory):.0f} MB")
        for clients, seconds in waits.items():
            p50, p99 = (1000 * float(np.quantile(seconds, share)) for share in (0.5, 0.99))
            several = "s" if clients > 1 else ""
            print(f"{name}, {clients} client{several}: p50 {p50:.0f} ms, p99 {p99:.0f} ms", flush=True)


def asked(port: int, path: str, headers: dict[str, str], body: bytes) -> float:
    """Seconds of an answer."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, answer.status
    connection.close()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Server:
    """How a server of a model is started and asked."""

    command: Callable[[int], list[str]]
    path: str
    body: Callable[[bytes], bytes]
    headers: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


SERVERS = {
    "touchline serve": Server(
        lambda port: [*TOUCHLINE, "serve", "--port", str(port)], "/predict", lambda content: content
    ),
    "mlflow models serve": Server(
        lambda port: [
            sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/rugby-soccer@champion",
            "--env-manager", "local", "--port", str(port),
        ],
        "/invocations",
        lambda content: json.dumps({"inputs": [base64.b64encode(content).decode()]}).encode(),
        {"Content-Type": "application/json"},
        {"MLFLOW_TRACKING_URI": "sqlite:///mlflow/mlflow.db"},
    ),
}  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def copied(project: Path, folder: str, *left_out: str) -> Path:
    copy = Path(folder, "project")
    wanted = shutil.ignore_patterns(".git", "cache", "mlflow", "features", "models", "reports", ".venv", *left_out)
    shutil.copytree(project, copy, ignore=wanted, symlinks=True)
    return copy


def features(project: Path, *_: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(project, folder)
        for what in ("first", "second"):
            shutil.rmtree(copy / "data/features", ignore_errors=True)
            say(f"features pooled, {what} run", [run([*TOUCHLINE, "features", "pooled"], copy)])


def make_run(project: Path, *_: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(project, folder, "photos", "*.csv", "dvc.lock", "tmp")
        for name in ("decisions", "forgotten"):
            shutil.copy(project / f"data/{name}.csv", copy / "data")
        # The package keeps models and reports under names that are left out above.
        shutil.copytree(project / "src", copy / "src", dirs_exist_ok=True)
        dvc = [sys.executable, "-m", "dvc"]
        run([*dvc, "config", "--local", "core.no_scm", "true"], copy)
        say("dvc repro", [run([*dvc, "repro"], copy)])
        costs = stage.costs(Paths(copy, copy))
        for name, cost in costs.items():
            print(f"    {name}: {cost['seconds']:.1f} s, {cost['peak_megabytes']:.0f} MB", flush=True)


def engines(project: Path, found: list[Path], options: argparse.Namespace) -> None:
    import onnxruntime
    import openvino
    import tensorflow as tf

    from touchline.data import photos

    with tempfile.TemporaryDirectory() as folder:
        for form in ("saved_model", "tflite", "onnx"):
            run([*TOUCHLINE, "export", "--format", form, "--output", str(Path(folder, form))], project)
        loaded = tf.saved_model.load(str(Path(folder, "saved_model")))
        side = loaded.serve.input_signature[0].shape[1]
        interpreter = tf.lite.Interpreter(str(Path(folder, "tflite")), num_threads=os.cpu_count())
        asked = interpreter.get_signature_runner()
        [photo] = asked.get_input_details()
        session = onnxruntime.InferenceSession(Path(folder, "onnx"), providers=["CPUExecutionProvider"])
        core = openvino.Core()
        network = core.read_model(str(Path(folder, "saved_model")))
        compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        streams = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "THROUGHPUT"}
        requests = openvino.AsyncInferQueue(core.compile_model(network, "CPU", streams))
        found_rows: dict[int, np.ndarray] = {}
        requests.set_callback(
            lambda request, number: found_rows.update({number: request.get_output_tensor(0).data.copy()})
        )

        def a_photo_a_request(images: np.ndarray) -> np.ndarray:
            for number in range(len(images)):
                requests.start_async({0: images[number : number + 1]}, number)
            requests.wait_all()
            return np.concatenate([found_rows.pop(number) for number in range(len(images))])

        ways = {
            "TensorFlow": lambda images: loaded.serve(tf.constant(images)).numpy(),
            "OpenVINO, a batch a request": lambda images: compiled(images)[0],
            "OpenVINO, a photo a request": a_photo_a_request,
            "ONNX Runtime": lambda images: session.run(None, {session.get_inputs()[0].name: images})[0],
            "TFLite": lambda images: next(iter(asked(**{photo: images}).values())),
        }
        images = np.stack([photos.read(path, side) for path in found[:BATCH]])
        expected = ways["TensorFlow"](images)
        took: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, ask in ways.items():
                began, processor = time.perf_counter(), time.process_time()
                answers = ask(images)
                if turn:  # the first gets them ready
                    took[name].append((time.perf_counter() - began, time.process_time() - processor))
                assert np.abs(answers - expected).max() < 1e-4, name
        for name, seconds in took.items():
            wall, processor = (median(each) for each in zip(*seconds, strict=True))
            difference = np.abs(ways[name](images) - expected).max()
            print(
                f"{name}: {len(images) / wall:.1f} photos/s, {1000 * processor / len(images):.1f} ms of processor time "
                f"a photo, largest difference {difference:.1e}"
            )


MEASURE = {
    "predict": predict, "many": many, "files": files, "serve": serve, "features": features, "run": make_run,
    "stages": stages, "head": head, "engines": engines,
}  # fmt: skip

if __name__ == "__main__":
    main()
