"""What Prefect adds to DVC, with its server running.

    python benchmarks/flows.py

`noop`: `python -m flows.pipeline` with nothing to do against `dvc repro` with nothing to do, whole commands.
`stages`: from the start of the first task to the end of the last, of a forced ingest, validate and split one after the
other, against the seconds of DVC's own processes in the same run.

It works on a little project of its own in a temporary folder. Both are measured in turns; timings on a shared machine
are noisy, so look at the ratio and the difference.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from urllib.request import Request, urlopen

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "tests"))

from boards import free_ports, wait_for  # noqa: E402
from projects import Project, make  # noqa: E402

CHAIN = ("ingest", "validate", "split")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        project = make(Path(folder) / "project")
        project.dvc("repro")
        [port] = free_ports(1)
        environment = project.environment() | {
            "PREFECT_HOME": f"{folder}/prefect",
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        server = subprocess.Popen(
            ["prefect", "server", "start", "--port", str(port)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: urlopen(environment["PREFECT_API_URL"] + "/health").status == 200, 240)
            report("nothing to do, whole command", *noop(project, environment, repeats), per=1)
            report("ingest (forced), validate, split", *stages(project, environment, repeats), per=len(CHAIN))
        finally:
            server.terminate()
            server.wait()


def noop(project: Project, environment: dict[str, str], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of `dvc repro` and of `python -m flows.pipeline`."""
    commands = (["dvc", "repro"], [sys.executable, "-m", "flows.pipeline"])
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for command, seconds in zip(commands, found, strict=True):
            taken = timed(project, command, environment)
            if turn:  # the first of each compiles and caches
                seconds.append(taken)
    return found


def stages(project: Project, environment: dict[str, str], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds that DVC took for the stages of CHAIN, and from their first task's start to their last one's end."""
    alone, tasks = [], []
    for turn in range(repeats):
        # So that all three have something to do.
        project.change({"ingest.sample.seed": 100 + turn, "split.seed": 100 + turn})
        timed(project, [sys.executable, "-m", "flows.ingestion"], environment)
        found = newest_tasks(environment["PREFECT_API_URL"])
        alone.append(sum(float(task["state"]["message"].split()[-2]) for task in found))
        moments = [datetime.fromisoformat(task[end]) for task in found for end in ("start_time", "end_time")]
        tasks.append((max(moments) - min(moments)).total_seconds())
    return alone, tasks


def newest_tasks(api: str) -> list[dict]:
    """The task runs of the newest flow run; each has run its stage."""
    runs = ask(f"{api}/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    tasks = ask(f"{api}/task_runs/filter", {"flow_runs": {"id": {"any_": [runs[0]["id"]]}}})
    assert sorted(task["name"] for task in tasks) == sorted(CHAIN)
    assert {task["state_name"] for task in tasks} == {"Completed"}
    return tasks


def ask(url: str, body: dict[str, object]) -> list[dict]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return json.load(answer)


def timed(project: Project, arguments: list[str], environment: dict[str, str]) -> float:
    began = time.monotonic()
    subprocess.run(
        arguments, cwd=project.root, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.monotonic() - began


def report(what: str, dvc: list[float], prefect: list[float], *, per: int) -> None:
    first, second = statistics.median(dvc), statistics.median(prefect)
    print(
        f"{what}: DVC {first:.2f} s, with Prefect {second:.2f} s, ratio {second / first:.2f}, "
        f"{(second - first) / per:+.2f} s{' a stage' if per > 1 else ''} (medians of {len(dvc)})"
    )


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores")
    main()
