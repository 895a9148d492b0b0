"""What a Dask cluster of 1, 2 and 4 workers brings on this machine, beside this machine's own threads.

    python benchmarks/compute.py --photos DIR [--count 640] [--turns 2]

Photos a second of `validate`'s measures (decoding in full, contrast, perceptual hash), of pixels, and of features
(decoding and the backbone of params.yaml). Scheduler and workers are processes on loopback, a worker has one thread;
each has done a first batch before it is timed, so start-up is not in it. The local way and the clusters take turns, and
the best turn counts. More workers than cores bring nothing here: workers of other machines would bring cores.

Below stands the processor time a photo of all processes together, which other programs on the machine hardly change:
what it grows by is what the cluster costs.
"""

import argparse
import os
import platform
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from touchline.core import parallel, params
from touchline.core.tensorflow import import_tensorflow
from touchline.data import photos
from touchline.models import backbones, inference
from touchline.stages import features, validate

PROJECT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--count", type=int, default=640)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    there = [path.resolve() for path in sorted(options.photos.rglob("*")) if path.is_file()]
    found: list[Any] = [path for path in there if photos.header(path.read_bytes()).extension]
    random.Random(0).shuffle(found)
    found = found[: options.count]
    megabytes = sum(path.stat().st_size for path in found) / 1e6
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, {len(found)} photos of {1000 * megabytes / len(found):.0f} kB"
    )
    values = params.load(PROJECT / "params.yaml")
    import_tensorflow()
    works: dict[str, tuple[Callable[..., Iterable[Any]], int]] = {
        "measures": (partial(validate._measured, workspace=Path("/"), max_megapixels=60), 64)
    }
    for name, chosen in values.features.items():
        weights = backbones.identity(chosen, PROJECT) if isinstance(chosen, params.BackboneFeatures) else ""
        works[name] = (
            partial(features._rows, features=chosen, project=PROJECT, weights=weights, engine="openvino"),
            inference.BATCH,
        )
    ways = {"local": 0, **{f"{count} workers": count for count in options.workers}}
    best = {(work, way): float("inf") for work in works for way in ways}
    processor = dict.fromkeys(best, float("inf"))
    rows: dict[str, list[Any]] = {}
    for _ in range(options.turns):
        for way, workers in ways.items():
            with cluster(workers) as address:
                for name, (work, batch) in works.items():
                    items = [str(path) for path in found] if name == "measures" else found
                    warm = items[: batch * max(1, 4 * workers)]
                    list(parallel.spread(work, warm, address, batch))
                    began, used = time.perf_counter(), processor_seconds()
                    made = list(parallel.spread(work, items, address, batch))
                    best[name, way] = min(best[name, way], time.perf_counter() - began)
                    processor[name, way] = min(processor[name, way], processor_seconds() - used)
                    assert same(rows.setdefault(name, made), made), f"{name}: {way} gives other results"
    head = "".join(f"{way:>18}" for way in ways)
    for title, values_of in (
        ("photos/s", lambda cell: len(found) / best[cell]),
        ("processor ms a photo", lambda cell: 1000 * processor[cell] / len(found)),
    ):
        print(f"{title:22}{head}")
        for name in works:
            cells = [values_of((name, way)) for way in ways]
            print(f"{name:22}" + "".join(f"{cell:>11.1f} ({cell / cells[0]:.2f})" for cell in cells))
    print(
        "bytes a photo:", ", ".join(f"{name} {made[0].nbytes:,}" for name, made in rows.items() if name != "measures")
    )


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def processor_seconds() -> float:
    """Of this process and all that it started and that still run."""
    mine = psutil.Process()
    times = [each.cpu_times() for each in (mine, *mine.children(recursive=True))]
    return sum(each.user + each.system for each in times)


@contextmanager
def cluster(workers: int) -> Iterator[str]:
    """The address of a scheduler with so many workers; empty for none."""
    if not workers:
        yield ""
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dask = [sys.executable, "-m", "dask"]
    options = ["--host", "127.0.0.1", "--no-dashboard"]
    commands = [[*dask, "scheduler", "--port", str(port), *options]]
    commands += [[*dask, "worker", address, "--nthreads", "1", "--memory-limit", "0", "--no-nanny", *options]] * workers
    started = [subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for each in commands]
    try:
        from distributed import Client

        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)
        yield address
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
