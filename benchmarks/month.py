"""A simulated month in use, to look at the page of `touchline monitor`: all is well, and in the last week it is not.

    python benchmarks/month.py --project DIR

DIR has run once (`make run`). The record and corrections go to its data/served and data/feedback, so give a copy. Each
day some 200 photos are asked about; an earlier version answers for ten days. The answers are the champion's own on the
test photos. In the last week a third of the photos are of something else (less similar, unsure), answers take longer,
and people correct more.
"""

import argparse
import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

import numpy as np

from touchline.commands import drift, monitor
from touchline.core.files import write_json
from touchline.core.params import Params, load
from touchline.core.paths import Paths
from touchline.data.served import Asked, Recorder
from touchline.models.classifier import UNKNOWN

DAYS, BEFORE, BAD = 30, 10, 7


@dataclass
class Answers:
    """Draws answers as the champion gives them, and as it gives them of photos of something else."""

    paths: Paths
    params: Params

    def __post_init__(self) -> None:
        champion = drift.find_champion(self.paths, self.params)
        self.model = champion.classifier.name, champion.classifier.files.model_sha256
        self.classes = champion.classifier.classes
        found = monitor._test_photos(self.paths, self.params, champion.classifier, champion.learned_from)
        assert found is not None
        self.test, self.random = found, np.random.default_rng(1)

    def draw(self, foreign: bool) -> dict[str, object]:
        row = self.test.iloc[int(self.random.integers(len(self.test)))].to_dict()
        confidence, label, similarity = row["confidence"], row["label"], row["similarity"]
        if foreign:
            confidence, label = round(float(self.random.uniform(0.5, 1)), 6), UNKNOWN
            similarity = round(similarity - float(self.random.uniform(0.1, 0.3)), 4)
        rest = (1 - confidence) / (len(self.classes) - 1)
        probabilities = {name: confidence if name == row["guess"] else rest for name in self.classes}
        return {"label": label, "guess": row["guess"], "confidence": confidence, "similarity": similarity,
                "probabilities": probabilities, "class": row["class"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    root = parser.parse_args().project.resolve()
    paths, params = Paths(root, root), load(root / "params.yaml")
    answers, random, now = Answers(paths, params), np.random.default_rng(2), datetime.now(UTC)
    for ago in range(DAYS - 1, -1, -1):
        day, bad = now - timedelta(days=ago), ago < BAD
        model = (f"{params.register_.name} version 0", "0" * 64) if ago >= DAYS - BEFORE else answers.model
        with ExitStack() as stack:
            stack.enter_context(patch("touchline.data.served._today", lambda day=day: f"{day:%Y-%m-%d}"))
            clock = stack.enter_context(patch("touchline.data.served.time.time"))
            clock.return_value = day.timestamp()
            recorder = stack.enter_context(Recorder(paths.served, params.monitor, *model))
            for _ in range(int(random.normal(120 if day.weekday() > 4 else 220, 15))):
                asked = Asked(hashlib.sha256(random.bytes(8)).hexdigest(), int(random.lognormal(11, 0.6)))
                if random.random() < 0.01:
                    recorder.add(asked, "cut off", float(random.lognormal(1.5, 0.4)), wait=True)
                    continue
                said = answers.draw(foreign=bad and random.random() < 1 / 3)
                recorder.add(asked, said, float(random.lognormal(4.3 if bad else 3.3, 0.5)), wait=True)
                if random.random() < (0.1 if bad else 0.03) and model == answers.model:
                    wrong = bad and random.random() < 0.4
                    other = next(name for name in answers.classes if name != said["class"])
                    entry = {"photo": f"{asked.photo}.jpg", "label": other if wrong else said["class"]}
                    write_json(paths.feedback / f"{asked.photo}.json", entry)
    print(monitor.run(paths, params))


if __name__ == "__main__":
    main()
