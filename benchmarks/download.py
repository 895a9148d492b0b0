"""What downloads cost: many photos against other downloaders, also with failing answers, and the filter of label files.

    python benchmarks/download.py photos    photos a second at 50 ms latency, each with as many connections
    python benchmarks/download.py faults    5 % of first answers fail: which photos each downloader ends with
    python benchmarks/download.py labels    our filter of a label file against pyarrow reading the same bytes

The server is a process of its own on loopback, where a new connection costs nothing and bandwidth is that of memory: it
shows what the clients themselves cost. The other downloaders are installed into a temporary environment, since their
pins conflict with ours. Timings on a shared machine are noisy: what is compared is measured in turns, in one run.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import cv2
import numpy as np
import pyarrow
from pyarrow import csv as arrow_csv

from touchline.core import params
from touchline.sources import Candidate, fetch, http, openimages

PROJECT = Path(__file__).resolve().parent.parent
OTHERS = ("img2dataset==1.47.0", "boto3==1.44.5")
FAULTS = ("500", "429", "cut", "stall")
STALL_SECONDS = 120.0
Figures = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["photos", "faults", "labels"])
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--repeats", type=int, default=3, help="for photos and labels; the median counts")
    parser.add_argument("--megabytes", type=int, default=400, help="for labels: size of the file")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "labels":
            figures = labels(Path(folder), arguments.megabytes, arguments.repeats)
        else:
            python = other_environment(Path(folder))
            with server(arguments.latency, faulty=arguments.what == "faults") as url:
                contest = Contest(url, arguments.photos, arguments.connections, arguments.latency, python, Path(folder))
                figures = faults(contest) if arguments.what == "faults" else photos(contest, arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def ours(urls: Sequence[str], folder: Path, connections: int) -> int:
    """Download into `folder`; the number of photos that came."""
    settings = shipped().ingest.download.model_copy(update={"connections": connections})
    candidates = (Candidate(label="photo", source="openimages", origin=url.rsplit("/")[-1], url=url) for url in urls)
    with fetch.Journal(folder / "fetched.jsonl") as journal:
        room, spare = {"photo": len(urls)}, folder / "spare"
        outcome = fetch.fill(candidates, room, lambda _: folder, set(), spare, journal, settings)
    return outcome.fetched


@dataclass(frozen=True)
class Contest:
    """One server and what is asked of it; `python` is an interpreter that has the other downloaders."""

    url: str
    photos: int
    connections: int
    latency: float
    python: Path
    folder: Path

    def path(self, number: int) -> str:
        return f"train/{number:016x}.jpg"

    def contestants(self) -> dict[str, Callable[[Path], object]]:
        """Each downloads all photos into the folder it is given, in a process of its own."""
        urls = [f"{self.url}/open-images-dataset/{self.path(number)}" for number in range(self.photos)]

        def in_child(folder: Path) -> None:
            child = multiprocessing.get_context("spawn").Process(target=ours, args=(urls, folder, self.connections))
            child.start()
            child.join()
            if child.exitcode:
                print(f"ours ended with exit code {child.exitcode}", file=sys.stderr)

        def img2dataset(folder: Path) -> None:
            url_list = folder.with_suffix(".txt")
            url_list.write_text("".join(f"{url}\n" for url in urls))
            processes = min(2, self.connections)
            options = {
                "url_list": url_list,
                "output_folder": folder,
                "output_format": "files",
                "processes_count": processes,
                "thread_count": self.connections // processes,
                # A process takes a whole shard, so there must be one for each.
                "number_sample_per_shard": math.ceil(self.photos / processes),
                "resize_mode": "no",
                "disable_all_reencoding": True,
            }
            self.run(["-m", "img2dataset.main", *(f"--{name}={value}" for name, value in options.items())])

        def official(threads: int) -> Callable[[Path], None]:
            paths = "\n".join(self.path(number) for number in range(self.photos))
            return lambda folder: self.run(["-c", OFFICIAL, self.url, str(folder), str(threads)], paths)

        return {
            "ours": in_child,
            "img2dataset": img2dataset,
            "official, 5 threads": official(5),
            f"official, {self.connections} threads": official(self.connections),
        }

    def run(self, arguments: Sequence[str], standard_input: str = "") -> None:
        """A downloader's own exit code and words are part of its answer: photos are counted either way."""
        environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
        done = subprocess.run(
            [self.python, *arguments], input=standard_input, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            print(f"{arguments[0]} {arguments[1][:20].strip()}... exits {done.returncode}: {last}", file=sys.stderr)

    def timed(self, name: str, turn: int) -> dict[str, Any]:
        """One run in an empty folder: what came, and how fast."""
        folder = self.folder / f"{name} {turn}".replace(" ", "-").replace(",", "")
        folder.mkdir()
        self.ask("new")
        began = time.time()
        self.contestants()[name](folder)
        seconds = time.time() - began
        seen = self.ask("new")
        outcome = came(folder, self.photos)
        # From the first request to the newest photo: start-up of a program is told apart from its speed.
        busy = outcome.pop("newest") - seen["first"]
        return outcome | {
            "photos_a_second": outcome["whole"] / busy if outcome["whole"] else 0.0,
            "seconds": seconds,
            "connections": seen["most"],
        }

    def ask(self, what: str) -> dict[str, Any]:
        with urlopen(f"{self.url}/-/{what}", timeout=60) as answer:
            return json.load(answer)


# The logic of downloader.py of github.com/openimages/dataset: a pool of threads over boto3, unsigned, with boto3's
# retries; a photo that cannot be had makes it exit with an error once the others are done.
OFFICIAL = """
import sys
from concurrent import futures
from pathlib import Path
import boto3, botocore
from botocore.config import Config

url, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
config = Config(signature_version=botocore.UNSIGNED, max_pool_connections=max(10, threads),
                s3={"addressing_style": "path"})
bucket = boto3.resource("s3", endpoint_url=url, region_name="us-east-1", config=config).Bucket("open-images-dataset")

def one(path):
    try:
        bucket.download_file(path, str(folder / path.split("/")[1]))
    except botocore.exceptions.ClientError as error:
        sys.exit(f"ERROR when downloading image {path}: {error}")

with futures.ThreadPoolExecutor(threads) as pool:
    for future in futures.as_completed([pool.submit(one, path) for path in sys.stdin.read().split()]):
        future.result()
"""


def photos(contest: Contest, repeats: int) -> Figures:
    names = list(contest.contestants())
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        # Another one goes first each time.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name].append(contest.timed(name, turn))
    figures = {
        name: {key: statistics.median(run[key] for run in of_name) for key in of_name[0] if key != "by_fault"}
        | {"runs": [round(run["photos_a_second"], 1) for run in of_name]}
        for name, of_name in runs.items()
    }
    bound = contest.connections / contest.latency
    ours_a_second = figures["ours"]["photos_a_second"]
    print(
        f"{contest.photos:,} photos of {len(photo(0)) / 1000:.0f} KB, {contest.latency * 1000:.0f} ms latency, "
        f"{contest.connections} connections: at most {bound:.0f} photos/s; medians of {repeats}"
    )
    print(f"{'':24}{'photos/s':>10}{'of bound':>10}{'ours/theirs':>13}{'whole':>8}{'at once':>9}{'seconds':>9}")
    for name, figure in figures.items():
        rate = figure["photos_a_second"]
        figure |= {"share_of_bound": rate / bound, "ours_over_theirs": ours_a_second / rate if rate else math.nan}
        print(
            f"{name:24}{rate:10.1f}{figure['share_of_bound']:10.0%}{figure['ours_over_theirs']:13.2f}"
            f"{figure['whole']:8,.0f}{figure['connections']:9.0f}{figure['seconds']:9.1f}"
        )
    print("photos/s: first request to newest photo on disk; seconds: the whole command, start-up included")
    return figures


def faults(contest: Contest) -> Figures:
    failing = sum(fault_of(number) is not None for number in range(contest.photos))
    figures = {name: contest.timed(name, 0) for name in contest.contestants()}
    print(
        f"{contest.photos:,} photos; the first answer of {failing} fails: {', '.join(FAULTS)} in turn "
        f"(429 with Retry-After of 1 s, a stall of {STALL_SECONDS:.0f} s); {contest.connections} connections"
    )
    print(f"{'':24}{'whole':>8}{'lost':>8}{'broken':>8}{'seconds':>9}  lost or broken of each fault")
    for name, figure in figures.items():
        by_fault = ", ".join(f"{fault} {count}" for fault, count in figure["by_fault"].items())
        print(
            f"{name:24}{figure['whole']:8,}{figure['lost']:8,}{figure['broken']:8,}{figure['seconds']:9.1f}  {by_fault}"
        )
    print("broken: kept on disk under a photo's name with bytes that are not the photo's")
    return figures


def came(folder: Path, count: int) -> dict[str, Any]:
    """How many photos under `folder` are whole, lost, or kept with other bytes; when the newest was written."""
    whole, broken, newest = set(), 0, 0.0
    for path in folder.rglob("*.jpg"):
        content = path.read_bytes()
        newest = max(newest, path.stat().st_mtime)
        found = re.match(rb"\xff\xd8\xff\xfe..photo (\d+)\n", content, re.DOTALL)
        if found and content == photo(int(found[1])):
            whole.add(int(found[1]))
        else:
            broken += 1
    missing = [number for number in range(count) if number not in whole]
    return {
        "whole": len(whole),
        "broken": broken,
        "lost": len(missing) - broken,
        "by_fault": {fault: sum(fault_of(number) == fault for number in missing) for fault in FAULTS},
        "newest": newest,
    }


def other_environment(folder: Path) -> Path:
    """An interpreter with the other downloaders."""
    python = folder / "others" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for command in (
        ["uv", "venv", "--quiet", "--python", sys.executable, str(folder / "others")],
        ["uv", "pip", "install", "--quiet", "--python", str(python), *OTHERS],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return python


def photo(number: int) -> bytes:
    """A JPEG of about 300 KB whose comment holds its number: no two are the same."""
    comment = f"photo {number}\n".encode()
    body = noise(number % 8)
    return body[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + body[2:]


@cache
def noise(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (683, 1024, 3), dtype=np.uint8)
    # Blurred as far as makes a photo of Open Images' mean size.
    blurred = cv2.GaussianBlur(pixels, (0, 0), 1.0)
    return cv2.imencode(".jpg", blurred, [cv2.IMWRITE_JPEG_QUALITY, 91])[1].tobytes()


def fault_of(number: int) -> str | None:
    """What goes wrong with the first answer for every 20th photo."""
    return FAULTS[number // 20 % len(FAULTS)] if number % 20 == 10 else None


@contextmanager
def server(latency: float, faulty: bool = False, file: Path | None = None) -> Iterator[str]:
    """A server in a process of its own; yields its URL."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(sending, latency, faulty, file), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{receiving.recv()}"
    finally:
        process.terminate()
        process.join()


def serve(sending: Connection, latency: float, faulty: bool, file: Path | None) -> None:
    async def forever() -> None:
        state = State(latency, faulty, file)
        listening = await asyncio.get_running_loop().create_server(lambda: Answers(state), "127.0.0.1", backlog=1024)
        sending.send(listening.sockets[0].getsockname()[1])
        await listening.serve_forever()

    for seed in range(8):
        noise(seed)
    asyncio.run(forever())


@dataclass
class State:
    latency: float
    faulty: bool
    file: Path | None
    first: float = 0.0
    waiting: int = 0
    most: int = 0
    failed: set[int] = field(default_factory=set)

    def new(self) -> bytes:
        """What was seen since the last call: time of the first request for a photo, most requests at once."""
        seen = json.dumps({"first": self.first, "most": self.most}).encode()
        self.first, self.most = 0.0, 0
        self.failed.clear()
        return seen


class Answers(asyncio.Protocol):
    """HTTP/1.1 as far as these clients speak it, by hand: the server must not be what is measured."""

    def __init__(self, state: State):
        self.state = state
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
            is_last = b"connection: close" in head.lower()
            loop = asyncio.get_running_loop()
            if path == "/-/new":
                self.send(method, "200 OK", self.state.new(), is_last)
            elif path == "/labels.csv" and self.state.file is not None:
                self.task = loop.create_task(self.send_file(self.state.file))
            else:
                state = self.state
                state.first = state.first or time.time()
                state.waiting += 1
                state.most = max(state.most, state.waiting)
                loop.call_later(state.latency, self.answer, method, int(Path(path).stem, 16), is_last)

    def answer(self, method: str, number: int, is_last: bool) -> None:
        self.state.waiting -= 1
        if self.transport.is_closing():
            return
        body = photo(number)
        fault = fault_of(number) if self.state.faulty and method == "GET" and number not in self.state.failed else None
        if fault is None:
            self.send(method, "200 OK", body, is_last)
            return
        self.state.failed.add(number)
        if fault == "500":
            self.send(method, "500 Internal Server Error", b"", is_last)
        elif fault == "429":
            self.send(method, "429 Too Many Requests", b"", is_last, "Retry-After: 1\r\n")
        else:
            self.transport.write(self.head("200 OK", body) + body[: len(body) // 2])
            if fault == "cut":
                self.transport.close()
            else:
                asyncio.get_running_loop().call_later(STALL_SECONDS, self.transport.abort)

    def send(self, method: str, status: str, body: bytes, is_last: bool, more: str = "") -> None:
        self.transport.write(self.head(status, body, more) + (b"" if method == "HEAD" else body))
        if is_last:
            self.transport.close()

    def head(self, status: str, body: bytes, more: str = "") -> bytes:
        # The number is within the first bytes, so these tell photos apart.
        etag = f'"{len(body)}-{hash(body[:64]):x}"'
        return (
            f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nContent-Type: image/jpeg\r\nETag: {etag}\r\n"
            f"Last-Modified: Tue, 01 Sep 2020 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n{more}\r\n"
        ).encode()

    async def send_file(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = f'HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nContent-Type: text/csv\r\nETag: "{size}"\r\n\r\n'
            self.transport.write(head.encode())
            await asyncio.get_running_loop().sendfile(self.transport, file)


def labels(folder: Path, megabytes: int, repeats: int) -> Figures:
    """Seconds and peak memory of pyarrow reading a label file and of our filter, from disk and over HTTP."""
    figures: Figures = {}
    sizes = (megabytes, 4 * megabytes)
    for size in sizes:
        path = folder / "labels.csv"
        rows = write_labels(path, size)
        print(f"label file of {path.stat().st_size / 1e6:,.0f} MB, {rows:,} rows")
        with server(0.0, file=path) as url:
            # Memory needs one run; what is compared in seconds is measured in turns.
            for turn in range(repeats if size == megabytes else 1):
                names = list(READERS)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    where = f"{url}/labels.csv" if name.endswith("HTTP") else str(path)
                    figure = figures.setdefault(name, {}).setdefault(str(size), {"seconds": [], "megabytes": []})
                    seconds, peak, found = measured(name, where)
                    figure["seconds"].append(seconds)
                    figure["megabytes"].append(peak)
                    figure["rows"] = found
    alone = statistics.median(figures["pyarrow open_csv"][str(megabytes)]["seconds"])
    print(
        f"{'':24}{'seconds':>9}{'MB/s':>8}{'to open_csv':>13}{'rows':>14}"
        + "".join(f"{f'peak, {s:,} MB':>16}" for s in sizes)
    )
    for name, by_size in figures.items():
        figure = by_size[str(megabytes)]
        seconds = statistics.median(figure["seconds"])
        figure["ratio"] = seconds / alone
        peaks = "".join(f"{max(by_size[str(size)]['megabytes']):13,.0f} MB" for size in sizes)
        print(f"{name:24}{seconds:9.2f}{megabytes / seconds:8.0f}{figure['ratio']:13.2f}{figure['rows']:14,}{peaks}")
    print(f"seconds: median of {repeats}, imports left out; peak: of the process, imports included")
    return figures


def open_csv(where: str) -> int:
    with arrow_csv.open_csv(where) as batches:
        return sum(batch.num_rows for batch in batches)


def open_csv_in_our_blocks(where: str) -> int:
    with arrow_csv.open_csv(where, arrow_csv.ReadOptions(block_size=openimages.BLOCK)) as batches:
        return sum(batch.num_rows for batch in batches)


def read_csv(where: str) -> int:
    return arrow_csv.read_csv(where).num_rows


def filter_from_disk(where: str) -> int:
    with Path(where).open("rb") as file:
        return filtered(file, where)


def filter_over_http(where: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.csv"
        http.to_file(where, path, shipped().ingest.download)
        return filter_from_disk(str(path))


def filtered(file: Any, where: str) -> int:
    """The one place that calls our filter, with the shipped classes."""
    chosen = shipped().ingest.openimages
    mids = [mid for of_class in chosen.classes.values() for mid in of_class]
    rows = openimages.rows_where(file, "LabelName", mids, ("ImageID", "LabelName", "Confidence"), where)
    return sum(1 for _ in rows)


READERS: dict[str, Callable[[str], int]] = {
    "pyarrow open_csv": open_csv,
    "open_csv, our blocks": open_csv_in_our_blocks,
    "pyarrow read_csv": read_csv,
    "ours, from disk": filter_from_disk,
    "ours, over HTTP": filter_over_http,
}


def measured(name: str, where: str) -> tuple[float, float, int]:
    """Seconds, peak megabytes and rows of one reader in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=measure, args=(sending, name, where))
    child.start()
    # Without this end of ours closed, a child that dies would be waited for for ever.
    sending.close()
    with closing(receiving):
        result = receiving.recv()
    child.join()
    return result


def measure(sending: Connection, name: str, where: str) -> None:
    began = time.perf_counter()
    found = READERS[name](where)
    seconds = time.perf_counter() - began
    sending.send((seconds, peak_megabytes(), found))


def peak_megabytes() -> float:
    if sys.platform == "linux":
        # `ru_maxrss` of a new process begins with what its parent held.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def write_labels(path: Path, megabytes: int) -> int:
    """A file as the human-verified labels of Open Images are: sorted by image, dense at its top; the number of rows.

    196 rows an image where the ids are smallest, near 4 from there on, of 20,931 classes; one row in 1,000 is of a
    class that is wanted.
    """
    generator = np.random.default_rng(0)
    chosen = shipped().ingest.openimages
    wanted = [mid for of_class in chosen.classes.values() for mid in of_class]
    digits = np.array(list("0123456789bcdfghjklmnpqrstvwxyz_"))
    others = ["/m/0" + "".join(generator.choice(digits, length)) for length in generator.integers(4, 7, 20931)]
    names = pyarrow.array(wanted + others)
    sources = pyarrow.array(["verification", "crowdsource-verification"])
    schema = pyarrow.schema(
        [
            ("ImageID", pyarrow.string()),
            ("Source", pyarrow.string()),
            ("LabelName", pyarrow.string()),
            ("Confidence", pyarrow.int8()),
        ]
    )
    # The header would stand once more at each block.
    options = arrow_csv.WriteOptions(include_header=False, quoting_style="none")
    blocks = math.ceil(megabytes / 10)
    rows = 0
    with path.open("wb") as file:
        file.write(b"ImageID,Source,LabelName,Confidence\n")
        for block in range(blocks):
            dense = block < max(1, blocks // 40)
            of_image = generator.poisson(195 if dense else 3, 1180 if dense else 58000) + 1
            ids = np.sort(
                generator.integers(
                    block * 2**64 // blocks, (block + 1) * 2**64 // blocks, len(of_image), dtype=np.uint64
                )
            )
            images = pyarrow.array([f"{number:016x}" for number in ids.tolist()])
            count = int(of_image.sum())
            is_wanted = generator.random(count) < 0.001
            classes = np.where(
                is_wanted, generator.integers(0, len(wanted), count), generator.integers(len(wanted), len(names), count)
            )
            table = pyarrow.table(
                [
                    images.take(pyarrow.array(np.repeat(np.arange(len(of_image)), of_image))),
                    sources.take(pyarrow.array((generator.random(count) < 0.1).astype(np.int8))),
                    names.take(pyarrow.array(classes)),
                    pyarrow.array((generator.random(count) < 0.36).astype(np.int8)),
                ],
                schema=schema,
            )
            with arrow_csv.CSVWriter(file, schema, write_options=options) as writer:
                writer.write_table(table)
            rows += count
    return rows


def shipped() -> params.Params:
    return params.load(PROJECT / "params.yaml")


if __name__ == "__main__":
    main()
