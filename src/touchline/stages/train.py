"""The `train` stage: one model of params.yaml, trained on the training photos and followed on the validation photos.

The test photos are not looked at here.
"""

import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core import parallel, stage
from touchline.core.errors import Diverged, TouchlineError, one_line
from touchline.core.files import read_table, replacing, sha256, write_json, write_table
from touchline.core.params import BackboneFeatures, FeaturesParams, HeadParams, ModelParams, Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.core.tensorflow import import_tensorflow
from touchline.data import photos
from touchline.data.feature_store import Arrays
from touchline.models import architectures, engines, training
from touchline.models.architectures import train as fit
from touchline.models.reference import SUFFIX, Reference, drawn
from touchline.models.training import Labelled, Trained

if TYPE_CHECKING:
    import pandas as pd

    from touchline.tracking.client import Store

# Training photos on which OpenVINO is compared with Keras.
_COMPARED = 32


def run(paths: Paths, params: Params, name: str) -> str:
    """Write `models/<name>.*`: keras, openvino, reference.npz and json; and the history; and log the run.

    Returns:
        The validation accuracy, and how long the training took.
    """
    import pandas as pd

    from touchline.tracking import runs

    _refuse_more_machines()
    import_tensorflow()
    _refuse_absent_gpus()
    began = time.monotonic()
    started = _now()
    chosen, features = params.models[name], params.features[params.models[name].input]
    split = read_table(paths.split_table)
    train, validation = (
        Labelled.of(split, subset, params.classes, paths.workspace) for subset in ("train", "validation")
    )
    record = facts(paths, params, name, split) | {"started": started}
    store = runs.open_store(paths, params.register_.name)
    record["tags"] |= runs.execution()
    run_id = runs.start(store, record["run_name"], record["tags"], record["params"], record["dataset"])
    logged = _Logged(store, run_id, name)
    logged.log(runs.expect_test)
    logged.log(runs.describe, record["description"])
    try:
        stored, devices = Arrays(paths.features / chosen.input), params.compute.devices
        on_epoch = partial(_report, logged)
        trained = fit(chosen, features, stored, train, validation, paths.project, on_epoch, devices)
        path = paths.models / f"{name}.keras"
        record |= _write(trained, path, params.classes)
        record |= _results(trained, time.monotonic() - began)
        forecaster = trained.forecast()
        record["forecast"] = asdict(forecaster) if forecaster else None
        record["description"] += f"\n\n{_kept(trained.history, trained.kept)}"
        logged.log(runs.describe, record["description"])
        record["ended"] = _now()
        results = {key: record[key] for key in ("image_size", "classes", "training_photos", "metrics", "history")}
        logged.log(runs.finish, model_path=path, **results)
    except BaseException as error:
        logged.log(runs.fail, one_line(error, 1000))
        raise
    history = pd.DataFrame(trained.history)
    history["kept"] = (history["epoch"] == trained.kept).astype(int)
    write_table(paths.reports / "history" / f"{name}.csv", history)
    write_json(paths.models / f"{name}.json", {"run_id": run_id, "experiment_id": store.experiment_id, **record})
    best, metrics = trained.history[trained.kept], record["metrics"]
    steps = f"strength {best['strength']:g}" if "strength" in best else f"{metrics['epochs']} epochs"
    return f"validation accuracy {best['validation/accuracy']:.3f}, {steps}, {metrics['seconds/train']:.0f} s"


@dataclass
class _Logged:
    """The run of a training in the store, for as long as the store answers.

    Hours of training are not lost with a store that went away: all that is logged is in models/ as well, and `evaluate`
    and `touchline registry sync` log a run that the store lacks.
    """

    store: "Store"
    run_id: str
    name: str
    answers: bool = True

    def log(self, ask: Callable[..., None], *arguments: Any, **options: Any) -> None:
        from touchline.tracking import runs
        from touchline.tracking.client import StoreError

        if not self.answers:
            return
        try:
            ask(self.store, self.run_id, *arguments, **options)
        except StoreError as error:
            self.answers = False
            say(f"{self.name}: {error}; the training goes on, and `evaluate` will log it from models/{self.name}.json")
            with suppress(StoreError):
                runs.fail(self.store, self.run_id, str(error))


def _report(logged: _Logged, row: dict[str, float]) -> None:
    """Log a row of the history, and print it."""
    from touchline.tracking import runs

    logged.log(runs.log_row, row)
    shown = ", ".join(f"{metric} {value:.3f}" for metric, value in row.items() if metric != "epoch")
    say(f"{logged.name}: {shown}" if "strength" in row else f"{logged.name}: epoch {row['epoch']:.0f}, {shown}")


def _results(trained: Trained, seconds: float) -> dict[str, Any]:
    """What is known of a run once it has trained, under the names of `models/<name>.json`."""
    best = trained.history[trained.kept]
    metrics = {"seconds/train": round(seconds, 2), **{key: value for key, value in best.items() if key != "epoch"}}
    if "strength" not in best:
        metrics["epochs"] = sum("strength" not in row for row in trained.history)
    return {
        "training_photos": sorted(trained.learned_from.digests),
        "history": trained.history,
        "metrics": metrics,
    }


def _write(trained: Trained, path: Path, classes: Sequence[str]) -> dict[str, str]:
    """Write a model's files, and return their digests under the names of `models/<name>.json`.

    Raises:
        TouchlineError: OpenVINO answers otherwise than Keras on the first photos that the model learned from.
        Diverged: what the last layer is given of these holds NaN or infinity.
    """
    # The saved model is what is judged from here on, by the validation photos as well.
    with replacing(path, ".keras") as temporary:
        trained.model.save(temporary)
    openvino = path.with_suffix(engines.SUFFIX)
    with replacing(openvino, engines.SUFFIX) as temporary:
        if made := trained.for_openvino():
            engines.write(made, temporary)
        else:
            engines.convert(trained.model, temporary)
        side = trained.model.input_shape[1]
        images = np.stack([photos.read(file, side) for file in trained.learned_from.files[:_COMPARED]])
        network = engines.with_openvino(temporary)
        by_keras = engines.with_tensorflow(trained.model).forward(images)
        difference = float(np.abs(by_keras - network.forward(images)).max())
        # Written so that NaN is refused too.
        if not difference <= engines.TOLERANCE:
            raise TouchlineError(
                f"{path.stem}: OpenVINO's probabilities differ from Keras's by {difference:.2g} on {len(images)} "
                f"training photos, and {engines.TOLERANCE:g} is allowed: another precision or architecture may help"
            )
    learned_from, chosen = trained.learned_from, drawn(len(trained.learned_from.files))
    if trained.seen:
        seen = trained.seen(network, chosen)
    else:
        read = partial(photos.read, size=network.side)
        seen = training.seen(network, parallel.in_order(read, training.pick(learned_from.files, chosen)))
    if not np.isfinite(seen).all():
        raise Diverged(f"{path.stem}: what its last layer is given of the training photos holds NaN or infinity")
    labels = [classes[learned_from.labels[number]] for number in chosen]
    reference = path.with_suffix(SUFFIX)
    Reference.of(seen, labels, training.pick(learned_from.digests, chosen), trained.imagenet()).save(reference)
    files = {"model": path, "openvino": openvino, "reference": reference}
    return {f"{name}_sha256": sha256(file) for name, file in files.items()}


def facts(paths: Paths, params: Params, name: str, split: "pd.DataFrame") -> dict[str, Any]:
    """What is known of a run before it trains, under the names of `models/<name>.json`."""
    chosen, features = params.models[name], params.features[params.models[name].input]
    return {
        "model": name,
        "run_name": _run_name(name, features),
        "image_size": features.image_size,
        "classes": list(params.classes),
        "description": _description(chosen, features, split, params.classes),
        "params": _flat_params(chosen, features, params),
        "tags": {**_tags(paths), "mlflow.source.name": f"touchline train {name}", "mlflow.source.type": "LOCAL"},
        "dataset": _dataset_facts(paths, split),
    }


def _refuse_more_machines() -> None:
    """Raise TouchlineError if TF_CONFIG makes this one of several workers: Keras's `fit` fails on them."""
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
        tasks = sum(len(addresses) for addresses in cluster.values())
    except (ValueError, AttributeError, TypeError):
        raise TouchlineError("TF_CONFIG is not what TensorFlow expects: unset it") from None
    if tasks > 1:
        raise TouchlineError(
            f"TF_CONFIG names {tasks} tasks, but a model is trained on one machine: unset it; compute.devices: all "
            "takes all GPUs of this one, and docs/scale.md says what several machines are for"
        )


def _refuse_absent_gpus() -> None:
    """Raise TouchlineError if CUDA_VISIBLE_DEVICES names more GPUs than TensorFlow finds, which would take the CPU."""
    import tensorflow as tf

    variable = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # -1 hides itself and what comes after it, as CUDA has it.
    named = list(itertools.takewhile(lambda name: name not in {"", "-1", "NoDevFiles"}, variable.split(",")))
    found = len(tf.config.list_physical_devices("GPU"))
    if found < len(named):
        raise TouchlineError(
            f"CUDA_VISIBLE_DEVICES is {variable!r}, but TensorFlow finds {found} GPUs: name those that `nvidia-smi -L` "
            "lists, install `tensorflow[and-cuda]`, or set it to -1 for the CPU"
        )


def _flat_params(model: ModelParams, features: FeaturesParams, params: Params) -> dict[str, Any]:
    """The params that people compare between runs: each value once, without names of files and values without effect.

    The first chart of a comparison in MLflow shows the first three that differ: architecture, augmentation, backbone.
    """
    flat: dict[str, Any] = {}
    chosen = model.model_dump(exclude={"input"})
    if isinstance(model, HeadParams) and not model.fine_tune.blocks:
        chosen["fine_tune"] = {"blocks": 0}
    changes = chosen.pop("augmentation", {})
    for key, value in (features.model_dump(exclude_none=True, exclude={"weights"}) | chosen).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            flat[key] = value
    flat = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in flat.items()}
    shared = {
        "augmentation": ", ".join(f"{key} {value}" for key, value in changes.items() if value) or "none",
        "backbone": "none",
    }
    return shared | flat | {"split.seed": params.split.seed}


def _description(model: ModelParams, features: FeaturesParams, split: "pd.DataFrame", classes: Sequence[str]) -> str:
    """What a run trains, and on what, for a reader of its page."""
    what = architectures.of(model).described(features)
    if isinstance(model, HeadParams) and model.fine_tune.blocks:
        what += f" (its last blocks, {model.fine_tune.blocks}, are trained too, at a low rate)"
    side = f"{features.image_size} x {features.image_size} pixels"
    counts = split.groupby(["subset", "class"]).size()
    learned = ", ".join(f"{counts.get(('train', label), 0):,} {label}" for label in classes)
    sizes = split.groupby("subset").size()
    return (
        f"{what} of {side}.\n\n**Photos**: {sizes.get('train', 0):,} for training ({learned}), "
        f"{sizes.get('validation', 0):,} for validation, {sizes.get('test', 0):,} for the test."
    )


def _kept(history: Sequence[dict[str, float]], kept: int) -> str:
    best = history[kept]
    if "strength" in best:
        tried = sum("strength" in row for row in history)
        which = f"strength {best['strength']:g}, the best of {tried} in cross-validation"
    else:
        first = next(row["epoch"] for row in history if "strength" not in row)
        which = f"the weights of epoch {kept}, of epochs {first} to {len(history) - 1}"
    return (
        f"**Kept**: {which}; validation accuracy {best['validation/accuracy']:.3f}, loss {best['validation/loss']:.3f}."
    )


def _run_name(name: str, features: FeaturesParams) -> str:
    return f"{name} {'+'.join(features.backbone)}" if isinstance(features, BackboneFeatures) else name


def _tags(paths: Paths) -> dict[str, str]:
    """Which code, which data, which pipeline run, which machine."""
    tags = {
        "touchline.split_sha256": sha256(paths.split_table),
        "touchline.hardware": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
    }
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["touchline.dvc_experiment"] = experiment
    if flow_run := os.environ.get("TOUCHLINE_FLOW_RUN"):
        tags["touchline.prefect_flow_run"] = flow_run
    code = stage.code(paths)
    if code["commit"]:
        tags["mlflow.source.git.commit"] = code["commit"]
        tags["touchline.git_dirty"] = str(bool(code["changed"])).lower()
    return tags


def _dataset_facts(paths: Paths, split: "pd.DataFrame") -> dict[str, Any]:
    counts = split.groupby(["subset", "class"]).size()
    return {
        "name": "split",
        "digest": sha256(paths.split_table)[:16],
        "source": "data/split.csv",
        "counts": {f"{subset}/{label}": int(count) for (subset, label), count in counts.items()},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
