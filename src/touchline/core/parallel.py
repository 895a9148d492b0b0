"""Work on photos, on this machine's cores or on a Dask cluster, with the same results.

Only the last digits of a network's output may differ: the order of its sums depends on the processor, the number of
threads and the batch.

Both use `concurrent.futures` executors: work is submitted a little ahead, results come in order, and pending work is
cancelled when the caller stops reading.
"""

import hashlib
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from touchline.core.errors import ParamsError, TouchlineError, one_line
from touchline.core.params import DASK_ADDRESS, Params
from touchline.core.progress import say

if TYPE_CHECKING:
    from distributed import Client

S = TypeVar("S")
T = TypeVar("T")

_ADDRESS = "DASK_SCHEDULER_ADDRESS"
_SECONDS_TO_CONNECT = 10.0
_SECONDS_BETWEEN_LOOKS = 1.0
# A cluster that grows on demand may take minutes to start a machine.
_SECONDS_WITHOUT_WORKERS = 180.0
# With other versions of these, the same photo may give other results.
_PACKAGES = ("numpy", "opencv-python-headless", "pillow", "imagehash", "tensorflow", "keras", "openvino")

_AT_WORKER: ContextVar[bool] = ContextVar("at_worker", default=False)
_kept: dict[tuple[object, ...], object] = {}
_keeping = Lock()


def scheduler(params: Params) -> str:
    """Address of the Dask scheduler; empty for this machine. The environment overrides params.yaml.

    Raises:
        ParamsError: the environment has no address.
    """
    named = os.environ.get(_ADDRESS) or params.compute.scheduler
    if named and not re.fullmatch(DASK_ADDRESS, named):
        raise ParamsError(f"{_ADDRESS} is {named}; allowed: an address as `dask scheduler` prints it, tcp://host:8786")
    return named


def in_order(work: Callable[[S], T], items: Iterable[S], ahead: int = 64, threads: int = 1) -> Iterator[T]:
    """`work` of each item, in the items' order; at most `ahead` results wait in memory.

    Args:
        threads: for each core; more than one for work that mostly waits, as for a disk.

    Threads, not processes: decoders release Python's lock, and results need no copies. Measured on 400 photos of 59 kB,
    processes take 1.3 times the processor time to read photos at 96 to 384 pixels, and 1.1 times to measure them; in
    seconds, on two cores with nothing else to do, 1.0 times at 96, 1.2 times at 260 and 1.4 times at 384.
    """
    import cv2

    cv2.setNumThreads(1)  # photos already use all cores; splitting each one as well only adds cost
    # A cluster's worker processes one batch per thread already.
    with ThreadPoolExecutor(1 if _AT_WORKER.get() else threads * (os.cpu_count() or 1)) as pool:
        yield from _ordered(pool, work, items, lambda: ahead, Future.result)


def in_process(work: Callable[..., T], *arguments: object) -> T:
    """`work` of some arguments in another process, of which this program starts one for each core, once.

    For work that holds Python's lock, so that threads would take turns; call it from the threads of `in_order`. All of
    it must be picklable.

    Raises:
        TouchlineError: the process was killed.
    """
    try:
        return _processes().submit(work, *arguments).result()
    except BrokenProcessPool:
        raise TouchlineError("a process of this program was killed (often too little memory): run again") from None


@cache
def _processes() -> ProcessPoolExecutor:
    # Not forked: a fork of a program with threads may wait for a lock for ever.
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    """End this process of a pool with the program that started it, however that ends; Ctrl-C is the program's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def spread(
    work: Callable[[Iterable[S]], Iterable[T]],
    items: Iterable[S],
    scheduler: str,
    batch: int,
    reads: Sequence[Path] = (),
) -> Iterator[T]:
    """The results of `work` on `items`, in order: here on all at once, on a cluster in batches of `batch`.

    If a worker is lost, its batch goes to another one. Batches carry paths and the workers read the files: otherwise
    all photos would pass through one machine's disk and network.

    Args:
        work: yields its results in order; for a cluster it must be picklable. An item's result must not depend on
            items outside its batch.
        scheduler: its address, as from `scheduler`; empty for this machine.
        reads: files that the work opens; a worker that lacks one does not share the folder.

    Raises:
        TouchlineError: no scheduler answers, or it is lost; there is no worker for three minutes; a worker has another
            Touchline, other packages or other files; a batch has killed the workers it was given to; or what `work`
            raises.
    """
    if not scheduler:
        yield from work(items)
        return
    items = iter(items)
    batches = iter(lambda: list(islice(items, batch)), [])
    task = partial(_task, work, reads=tuple(reads), made_of=_made_of())
    with _client(scheduler) as client:
        _wait_for_worker(client)
        _look_for_package(client)
        # With `pure`, Dask would return an earlier run's result for a file that has changed since.
        executor = client.get_executor(pure=False)

        def ahead() -> int:
            # One running and one waiting batch per thread of the cluster, which may grow and shrink.
            return max(4, 2 * _threads(client))

        for results in _ordered(executor, task, batches, ahead, partial(_result, client)):
            yield from results


def not_shared(where: str, path: Path) -> TouchlineError:
    """The error for a worker that lacks a file."""
    return TouchlineError(
        f"{where} does not find {path}: all machines need photos and project at the same path in a shared folder"
    )


def at_worker() -> bool:
    """True while a worker of a cluster runs this thread's work."""
    return _AT_WORKER.get()


def kept(make: Callable[..., T], *key: object) -> T:
    """`make(*key)`; a cluster's worker keeps its last result for the following batches."""
    if not at_worker():
        return make(*key)
    with _keeping:
        if (make, *key) not in _kept:
            _kept.clear()  # a worker lives long, and a network takes much memory
            _kept[make, *key] = make(*key)
        return _kept[make, *key]  # type: ignore[return-value]  # the dictionary holds what any `make` made


def _ordered(
    executor: Executor,
    work: Callable[[S], T],
    items: Iterable[S],
    ahead: Callable[[], int],
    result: Callable[["Future[T]"], T],
) -> Iterator[T]:
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(work, item))
            while len(waiting) >= ahead():
                yield result(waiting.popleft())
        while waiting:
            yield result(waiting.popleft())
    finally:
        for future in waiting:
            future.cancel()


def _task(
    work: Callable[[Iterable[S]], Iterable[T]], batch: list[S], *, reads: Sequence[Path], made_of: dict[str, str]
) -> list[T]:
    """A batch, on a worker."""
    from distributed import get_worker

    worker = get_worker()
    where = f"Dask worker {worker.address}"
    if differing := {name: found for name, found in _made_of().items() if found != made_of.get(name)}:
        differences = ", ".join(f"{name} {found} and not {made_of.get(name)}" for name, found in differing.items())
        raise TouchlineError(f"{where} has {differences}: install the same packages as here, and restart it")
    for path in reads:
        if not path.exists():
            raise not_shared(where, path)
    # Otherwise TensorFlow would use all cores of the machine, which other workers share.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(worker.state.nthreads))
    token = _AT_WORKER.set(True)
    try:
        return list(work(batch))
    finally:
        _AT_WORKER.reset(token)


@cache
def _made_of() -> dict[str, str]:
    """What results depend on besides photos and params: this package's code and the versions of its libraries."""
    from importlib.metadata import PackageNotFoundError, version

    code = hashlib.sha256()
    folder = Path(__file__).parents[1]  # the whole package
    for path in sorted(folder.rglob("*.py")):
        code.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    found = {"Touchline of code": code.hexdigest()[:12]}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "(none)"
    return found


@contextmanager
def _client(address: str) -> Iterator["Client"]:
    try:
        from distributed import Client
    except ImportError:
        raise TouchlineError(
            f"the Dask cluster {address} needs the package distributed: run `pip install 'touchline[dask]'`"
        ) from None
    # We report errors ourselves, in one line.
    for name in ("distributed.client", "distributed.core", "distributed.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False, name="touchline")
    except (OSError, ValueError) as error:
        raise TouchlineError(
            f"no Dask scheduler answers at {address} ({one_line(error)}): start it (`dask scheduler`), or clear "
            f"compute.scheduler in params.yaml and {_ADDRESS} to work on this machine"
        ) from None
    with client:
        yield client


def _threads(client: "Client") -> int:
    try:
        return sum(client.nthreads().values())
    except OSError:
        raise _lost(client) from None


def _wait_for_worker(client: "Client") -> None:
    began = None
    while not _threads(client):
        if began is None:
            began = time.monotonic()
            say(f"the Dask cluster at {_address(client)} has no worker: waiting for one")
        if time.monotonic() - began > _SECONDS_WITHOUT_WORKERS:
            raise TouchlineError(
                f"the Dask cluster at {_address(client)} has had no worker for {_SECONDS_WITHOUT_WORKERS:.0f} s: start "
                f"some (`dask worker {_address(client)}`), then run again"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _look_for_package(client: "Client") -> None:
    # A worker that cannot import its work dies without telling us why, and so does the next one that gets it.
    try:
        client.run_on_scheduler(import_module, __name__)
    except ImportError:
        raise _without_package(f"Dask scheduler {_address(client)}") from None
    for worker, found in client.run(import_module, __name__, on_error="return").items():
        if isinstance(found, ImportError):
            raise _without_package(f"Dask worker {worker}")


def _without_package(where: str) -> TouchlineError:
    return TouchlineError(f"{where} cannot import this Touchline: install the same packages as here, and restart it")


def _result(client: "Client", future: "Future[T]") -> T:
    from distributed import KilledWorker

    while not wait([future], _SECONDS_BETWEEN_LOOKS).done:
        _wait_for_worker(client)
    try:
        return future.result()
    except CancelledError:
        raise _lost(client) from None
    except KilledWorker as error:
        raise TouchlineError(
            f"{error.allowed_failures + 1} Dask workers crashed on the same photos, the last one "
            f"{error.last_worker.address}: see its log (often too little memory)"
        ) from None


def _lost(client: "Client") -> TouchlineError:
    return TouchlineError(
        f"lost the Dask scheduler at {_address(client)}: restart it, or clear compute.scheduler, then run again"
    )


def _address(client: "Client") -> str:
    # As the user named it: a client without a connection knows no other address.
    return str(client._start_arg)
