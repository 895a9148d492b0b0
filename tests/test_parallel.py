"""The same work on this machine and on a Dask cluster of real processes: same results, whoever dies meanwhile."""

import csv
import io
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boards
import numpy as np
import psutil
import pytest
from distributed import Client
from PIL import Image

from touchline.commands import predict
from touchline.core import files, parallel, params
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.stages import features, validate

TESTS = Path(__file__).parent
SIDE = 32
WITHOUT_PACKAGE = "import sys; sys.modules['touchline'] = None"


class Cluster:
    """A scheduler and its workers on loopback, each a process; a worker is one thread, and ended stays ended."""

    def __init__(self, folder: Path, workers: int = 0, *scheduler_options: str, **environment: str) -> None:
        self._folder = folder
        known = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(known)} | environment
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{port}"
        self.workers: list[subprocess.Popen] = []
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", str(port), *scheduler_options)
        for _ in range(workers):
            self.add_worker()
        # A slow start is not what these tests are about; and a worker that joins in the middle of one would take other
        # batches than it counts on.
        try:
            with Client(self.address, timeout=120, set_as_default=False) as client:
                if workers:
                    client.wait_for_workers(workers, 120)
        except BaseException:
            self.stop()
            raise

    def add_worker(self, *options: str) -> None:
        limits = ("--nthreads", "1", "--no-nanny", "--memory-limit", "0")
        self.workers.append(self._start("worker", self.address, "--host", "127.0.0.1", *limits, *options))

    def _start(self, *command: str) -> subprocess.Popen:
        with (self._folder / "dask.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *command, "--no-dashboard"],
                cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers that nobody kills."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 2)
    yield cluster
    cluster.stop()


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes a cluster of a test's own."""
    made: list[Cluster] = []

    def make(workers: int = 0, *options: str, **environment: str) -> Cluster:
        made.append(Cluster(tmp_path, workers, *options, **environment))
        return made[-1]

    yield make
    for each in made:
        each.stop()


# What workers run is found by its name.
def told(numbers: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Of each number itself, how many came with it, and in which process."""
    numbers = list(numbers)
    for number in numbers:
        yield number, len(numbers), os.getpid()


def slow(numbers: Iterable[int], trace: Path, pause: float = 0.05) -> Iterator[int]:
    for number in numbers:
        time.sleep(pause)
        (trace / f"{number}").touch()
        yield number


def held_up(numbers: Iterable[int], trace: Path) -> Iterator[int]:
    """All but the first two batches of four wait for the file `go`, once those two have begun: in whichever order the
    scheduler hands batches out, the first two are not stuck behind others.
    """
    for number in numbers:
        (trace / f"{number}").touch()
        while number >= 8 and (trace / "4").exists() and not (trace / "go").exists():
            time.sleep(0.01)
        yield number


def known(dask_scheduler: Any) -> list[str]:
    return list(dask_scheduler.tasks)


def not_begun(dask_worker: Any) -> list[str]:
    return [task.key for task in dask_worker.state.tasks.values() if task.state == "ready"]


def failing(numbers: Iterable[int]) -> Iterator[int]:
    for number in numbers:
        if number == 33:
            raise TouchlineError("photo 33 does not decode")
        yield number


def deadly(_: Iterable[int]) -> Iterator[int]:
    os._exit(1)


def threads(numbers: Iterable[int]) -> Iterator[str]:
    for _ in numbers:
        yield os.environ["TF_NUM_INTRAOP_THREADS"]


def counted(made: Path) -> float:
    with made.open("a") as file:
        file.write(".")
    return 0.5


def keeping(numbers: Iterable[int], made: Path) -> Iterator[float]:
    for number in numbers:
        yield number + parallel.kept(counted, made)


def test_a_crowd_at_work_answers_in_order() -> None:
    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number * number

    assert list(parallel.in_order(work, range(20), ahead=4)) == [number * number for number in range(20)]


def test_an_error_at_work_comes_out_at_its_place() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise TouchlineError("photo 3 does not decode")
        return number

    found = []
    with pytest.raises(TouchlineError, match="photo 3"):
        found.extend(parallel.in_order(work, range(100), ahead=8))
    results = parallel.in_order(work, range(100), ahead=8)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]


def test_no_more_is_read_ahead_than_allowed() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            asked.append(number)
            yield number

    results = parallel.in_order(lambda number: number, items(), ahead=5)
    next(results)
    results.close()
    assert len(asked) == 5


def test_who_stops_early_leaves_no_thread_at_work() -> None:
    before = threading.active_count()
    results = parallel.in_order(lambda number: number, range(1000), ahead=8)
    next(results)
    results.close()
    assert threading.active_count() == before


def test_who_stops_early_has_what_waits_cancelled() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.05)
        done.append(number)

    ahead = 5 * (os.cpu_count() or 1)
    results = parallel.in_order(work, range(1000), ahead)
    next(results)
    results.close()
    assert len(done) < ahead


def test_without_a_cluster_the_work_sees_all_items_here_and_dask_is_not_imported() -> None:
    assert list(parallel.spread(told, range(5), "", 2)) == [(number, 5, os.getpid()) for number in range(5)]
    code = "import touchline.stages.features, touchline.commands.predict; from touchline.core import parallel"
    code += "; print(list(parallel.spread(iter, [1, 2], '', 2)), end=' ')"
    code += "; import sys; print([name for name in ('dask', 'distributed') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1, 2] []\n"


def test_the_environment_names_a_cluster_before_params_do(
    params_with: Callable[..., Params], shipped: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = params_with(compute={"scheduler": "tcp://host:8786"})
    assert (parallel.scheduler(params_with()), parallel.scheduler(named)) == ("", "tcp://host:8786")
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tls://other:1")
    assert parallel.scheduler(params_with()) == parallel.scheduler(named) == "tls://other:1"
    shipped["compute"]["scheduler"] = "host:8786"
    with pytest.raises(ParamsError, match=r"compute\.scheduler is 'host:8786'; allowed: "):
        params.check(shipped)


def test_a_cluster_answers_in_order_from_batches_of_one_size(cluster: Cluster) -> None:
    found = list(parallel.spread(told, iter(range(105)), cluster.address, 10))
    assert [number for number, _, _ in found] == list(range(105))
    assert [together for _, together, _ in found] == [10] * 100 + [5] * 5
    assert os.getpid() not in {process for _, _, process in found}
    assert list(parallel.spread(told, [], cluster.address, 10)) == []


def test_an_error_on_a_worker_comes_out_as_it_is(cluster: Cluster) -> None:
    found = []
    with pytest.raises(TouchlineError, match=r"^photo 33 does not decode$"):
        found.extend(parallel.spread(failing, range(100), cluster.address, 10))
    assert list(itertools.islice(parallel.spread(failing, range(100), cluster.address, 10), 30)) == list(range(30))


def test_who_stops_early_leaves_no_work_behind(cluster: Cluster, tmp_path: Path) -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10_000):
            asked.append(number)
            yield number

    results = parallel.spread(partial(held_up, trace=tmp_path), items(), cluster.address, 4)
    assert list(itertools.islice(results, 5)) == [0, 1, 2, 3, 4]
    # Two workers, each with a batch in hand and one waiting; and the batch that is being looked at.
    assert len(asked) == 20
    results.close()
    with Client(cluster.address, set_as_default=False) as client:
        # The word that it is not wanted any more travels from here to the scheduler, and from there to the workers.
        boards.wait_for(lambda: not client.run_on_scheduler(known) and not any(client.run(not_begun).values()), 60)
    begun = {int(path.name) // 4 for path in tmp_path.iterdir()}
    (tmp_path / "go").touch()
    # What is in hand is finished, what waits is not begun; and the workers are free for the next.
    assert len(list(parallel.spread(told, range(40), cluster.address, 4))) == 40
    assert {int(path.name) // 4 for path in tmp_path.iterdir() if path.name != "go"} == begun


def test_what_a_worker_made_is_kept_for_the_next_batch_and_here_it_is_not(cluster: Cluster, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert list(parallel.spread(partial(keeping, made=made), range(40), cluster.address, 2)) == [
        number + 0.5 for number in range(40)
    ]
    assert 1 <= len(made.read_text()) <= 2
    assert (parallel.kept(counted, made), parallel.kept(counted, made)) == (0.5, 0.5)
    assert len(made.read_text()) >= 3


def test_workers_of_one_machine_share_its_cores(cluster: Cluster) -> None:
    assert set(parallel.spread(threads, range(8), cluster.address, 2)) == {"1"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Photos of two classes, a torn one and one that is none; and a model that has learned nothing."""
    root = tmp_path_factory.mktemp("shared") / "a project; $(id)"
    rows = []
    random = np.random.default_rng(0)
    for number in range(150):
        label = ("rugby", "soccer")[number % 2]
        path = root / f"data/photos/{label}/{number:016x}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((80 + number, 300 - number), Image.Resampling.BICUBIC).save(path, quality=90)
        if number == 70:
            path.write_bytes(path.read_bytes()[:-900])
        if number == 71:
            path.write_text("no photo")
        rows.append({"path": path.relative_to(root).as_posix(), "class": label, "sha256": f"{number:064x}"})
    with (root / "data/photos.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, validate.COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(
            {"source": "folder", "bytes": 1, "width": 1, "height": 1, "origin": row["path"], **row} for row in rows
        )
    return Paths(root, root)


def settings(params_with: Callable[..., Params]) -> Params:
    return params_with(
        features={
            "pixels": {"image_size": SIDE},
            "pooled": {"image_size": 64, "backbone": "efficientnet_lite0", "views": 1},
        },
        validate={"max_rejected_share": 0.5, "min_per_class": 5},
    )


def results(paths: Paths) -> dict[str, np.ndarray | str]:
    """What the stages wrote about photos: tables and arrays."""
    arrays = {paths.relative(path): np.load(path) for path in sorted(paths.features.rglob("*.npy"))}
    others = [paths.validated_table, paths.rejected_table, *sorted(paths.features.rglob("*.[tj]*"))]
    return arrays | {paths.relative(path): path.read_text() for path in others}


def test_a_cluster_validates_and_computes_features_like_one_machine(
    cluster: Cluster, project: Paths, params_with: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(params_with)
    found = []
    for address in ("", cluster.address):
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)
        validate.run(project, chosen)
        for name in chosen.features:
            features.run(project, chosen, name)
        found.append(results(project))
        for path in project.features.rglob("*.*"):
            path.unlink()
    here, there = found
    assert sum(name.endswith(".npy") for name in here) == 2
    assert here.keys() == there.keys()
    for name, expected in here.items():
        if "/pooled/" in name and name.endswith(".npy"):
            # TensorFlow picks its kernels by processor, threads and batch: sums come in another order.
            np.testing.assert_allclose(there[name], expected, rtol=1e-4, atol=1e-4, strict=True)
        else:
            np.testing.assert_array_equal(there[name], expected, name)
    rejected = here["data/rejected.csv"]
    assert "0000000000000046" in rejected and "0000000000000047" in rejected


def planted(path: Path) -> None:
    import keras

    photo = keras.Input((SIDE, SIDE, 3), dtype="uint8")
    x = keras.layers.Conv2D(8, 3, kernel_initializer=keras.initializers.GlorotUniform(1))(
        keras.layers.Rescaling(1 / 255)(photo)
    )
    x = keras.layers.GlobalAveragePooling2D()(x)
    dense = keras.layers.Dense(2, activation="softmax", kernel_initializer=keras.initializers.GlorotUniform(2))
    path.parent.mkdir(parents=True)
    keras.Model(photo, dense(x)).save(path)
    files.write_json(path.with_suffix(".json"), {"classes": ["rugby", "soccer"]})


def test_a_cluster_predicts_the_same_of_names_that_hang_on_this_folder(
    cluster: Cluster,
    project: Paths,
    params_with: Callable[..., Params],
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    planted(project.models / "cnn.keras")
    monkeypatch.chdir(project.workspace / "data")
    found = []
    for address in ("", cluster.address):
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)
        with pytest.raises(TouchlineError, match="2 failed, named above"):
            predict.run(project, params_with(), ["photos"], str(project.models / "cnn.keras"), "csv", explain=False)
        found.append(capfdbinary.readouterr())
    _, there = found
    rows, others = (list(csv.DictReader(io.StringIO(each.out.decode()))) for each in found)
    assert len(rows) == 148
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            if key == "confidence" or key.startswith("probability"):
                # Written with three digits; what is computed in another order may be rounded the other way.
                assert float(other[key]) == pytest.approx(float(row[key]), abs=0.0011)
            else:
                assert other[key] == row[key]
    assert b"0000000000000046.jpg: cut off" in there.err and b"0000000000000047.jpg: not an image" in there.err
    assert [path.name for path in project.locks.glob("*.keras")] == []


def test_workers_killed_in_the_middle_lose_nothing(
    doomed: Callable[..., Cluster], project: Paths, params_with: Callable[..., Params]
) -> None:
    work = partial(
        features._rows,
        features=settings(params_with).features["pixels"],
        project=project.project,
        weights="",
        engine="",
    )
    photos = [path for path in sorted(project.photos.rglob("*.*")) if path.stem[-2:] not in {"46", "47"}]
    here = list(work(photos))
    cluster = doomed(2)
    rows = parallel.spread(work, photos, cluster.address, 4)
    there = list(itertools.islice(rows, 10))
    cluster.workers[0].kill()
    there += itertools.islice(rows, 40)
    # The one that is left goes as well, and another one comes.
    cluster.workers[1].kill()
    cluster.add_worker()
    there += rows
    np.testing.assert_array_equal(np.stack(there), np.stack(here), strict=True)


def error_of(items: Iterable[object]) -> str:
    with pytest.raises(TouchlineError) as raised:
        list(items)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_where_no_scheduler_answers_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_SECONDS_TO_CONNECT", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    says = error_of(parallel.spread(told, range(3), address, 2))
    assert says.startswith(f"no Dask scheduler answers at {address} (") and "`dask scheduler`" in says
    assert "compute.scheduler in params.yaml and DASK_SCHEDULER_ADDRESS" in says
    assert error_of(parallel.spread(told, range(3), "nonsense://x:1", 2)).startswith(
        "no Dask scheduler answers at nonsense"
    )


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "pip install 'touchline[dask]'" in error_of(parallel.spread(told, range(3), "tcp://127.0.0.1:1", 2))


def test_a_cluster_whose_workers_are_gone_for_good_is_given_up(
    doomed: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = doomed(1)
    rows = parallel.spread(partial(slow, trace=tmp_path), range(1000), cluster.address, 4)
    assert next(rows) == 0
    monkeypatch.setattr(parallel, "_SECONDS_WITHOUT_WORKERS", 2)
    cluster.workers[0].kill()
    assert re.search(rf"the Dask cluster at {cluster.address} has had no worker for 2 s: start some", error_of(rows))
    assert "has no worker: waiting for one" in capsys.readouterr().out


def test_a_scheduler_lost_in_the_middle_is_one_line(
    doomed: Callable[..., Cluster], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster = doomed(1)
    rows = parallel.spread(partial(slow, trace=tmp_path), range(1000), cluster.address, 4)
    assert next(rows) == 0
    cluster.scheduler.kill()
    says = error_of(rows)
    assert "scheduler" in says and cluster.address in says
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_has_given_up_its_scheduler_still_names_it(cluster: Cluster) -> None:
    with parallel._client(cluster.address) as client:
        pass
    assert cluster.address in str(parallel._lost(client))


def test_photos_that_kill_their_workers_are_given_up(doomed: Callable[..., Cluster]) -> None:
    cluster = doomed(2, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1")
    says = error_of(parallel.spread(deadly, range(3), cluster.address, 4))
    assert re.match(r"2 .*tcp://127\.0\.0\.1:\d+", says)


def test_workers_that_are_not_like_this_machine_are_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = tmp_path / "elsewhere"
    says = error_of(parallel.spread(told, range(3), cluster.address, 2, [tmp_path, missing]))
    assert re.search(rf"worker tcp://127\.0\.0\.1:\d+ .*{missing}\b", says)
    here = parallel._made_of()
    monkeypatch.setattr(parallel, "_made_of", lambda: here | {"pillow": "1.0", "Touchline of code": "abc"})
    says = error_of(parallel.spread(told, range(3), cluster.address, 2))
    assert re.match(r"Dask worker tcp://127\.0\.0\.1:\d+ has Touchline of code \w{12} and not abc, pillow ", says)


@pytest.mark.parametrize("who", ["scheduler", "worker"])
def test_a_process_without_this_package_is_named(doomed: Callable[..., Cluster], who: str) -> None:
    without = ("--preload", WITHOUT_PACKAGE)
    cluster = doomed(0, *(without if who == "scheduler" else ()))
    cluster.add_worker(*(without if who == "worker" else ()))
    says = error_of(parallel.spread(told, range(3), cluster.address, 2))
    assert re.match(rf"Dask {who} tcp://127\.0\.0\.1:\d+.*Touchline", says)


def test_processes_end_with_the_program_that_is_killed() -> None:
    code = "import os, time; from touchline.core import parallel; "
    code += "print(parallel.in_process(os.getpid), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        worker = psutil.Process(int(program.stdout.readline()))
        assert worker.pid != program.pid
        assert worker.is_running()
        program.kill()
    worker.wait(10)


def test_a_process_that_is_killed_is_one_line() -> None:
    code = "import os; from touchline.core import parallel, errors\n"
    code += "try: parallel.in_process(os._exit, 3)\nexcept errors.TouchlineError: print('told')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "told\n"
