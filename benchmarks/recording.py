"""What `touchline serve --record` costs under full load: photos a second with and without it, in turns.

    python benchmarks/recording.py --project DIR --photos DIR [--rounds 4] [--seconds 6] [--option=--record]

DIR of `--project` has a champion (`make run` makes one); its record in data/served is written to. 32 clients ask again
as soon as they were answered, from this process, so both share the processor. Where it is not quiet, look at the
medians.
"""

import argparse
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median

from engine import TOUCHLINE, free_port

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from load import Clients


def photos_a_second(project: Path, contents: list[bytes], seconds: float, *options: str) -> float:
    port = free_port()
    command = [*TOUCHLINE, "serve", "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
        clients = Clients(port, contents)
        clients.capacity(1)
        return clients.capacity(seconds)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--option", default="--record", help="or --record-photos")
    options = parser.parse_args()
    found = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    contents = [path.read_bytes() for path in found[:200]]
    rates: dict[str, list[float]] = {"": [], options.option: []}
    for number in range(options.rounds):
        for option in rates if number % 2 else reversed(rates):
            given = [option] if option else []
            rates[option].append(photos_a_second(options.project.resolve(), contents, options.seconds, *given))
            print(f"{option or 'without':16s} {rates[option][-1]:6.1f} photos/s", flush=True)
    without, with_it = (median(each) for each in rates.values())
    print(
        f"medians: {without:.1f} without, {with_it:.1f} with {options.option}: "
        f"{100 * (1 - with_it / without):+.1f} % slower"
    )


if __name__ == "__main__":
    main()
