"""Figures and the report of many classes, and of classes with any names."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from touchline.core.params import Params
from touchline.report import html, plots

ODD = [
    "with spaces in it", "it's \"quoted\"", "<b>bold", "\u8db3\u7403", "\u26bd ball", "one_" * 40, "$x^2$",
    "\u017b\u00f3\u0142\u0107",
]  # fmt: skip


def tables(classes: list[str]) -> dict[str, pd.DataFrame]:
    """Of two models, answers to ten photos a class, one in five of them wrong, and all that is drawn from them."""
    random, count = np.random.default_rng(0), len(classes)
    answers, roc = [], []
    for model in ("cnn", "transfer"):
        true = np.arange(count).repeat(10)
        predicted = np.where(np.arange(len(true)) % 5 == 0, (true + 1) % count, true)
        answers.append(
            pd.DataFrame({"path": "x", "class": np.take(classes, true), "model": model,
                          "predicted": np.take(classes, predicted), "confidence": random.random(len(true))})
        )  # fmt: skip
        for number, label in enumerate(classes):
            false, right, _ = roc_curve(true == number, random.random(len(true)) + (true == number))
            roc.append(
                pd.DataFrame(
                    {"model": model, "class": label, "false_positive_rate": false, "true_positive_rate": right}
                )
            )
    curves = pd.DataFrame(
        {"model": "cnn", "subset": ["train", "validation"], "epoch": 0, "strength": np.nan, "accuracy": 0.5,
         "loss": 1.0, "kept": 1}
    )  # fmt: skip
    similarity = pd.DataFrame(
        {"model": "cnn", "subset": ["training"] * 5 + ["test"] * 5, "similarity": np.linspace(0.9, 1, 10)}
    )
    subsets = ["train", "train", "validation", "test"]
    split = pd.DataFrame({"class": np.repeat(classes, 4), "subset": subsets * len(classes)})
    answered = {"predictions": pd.concat(answers), "roc": pd.concat(roc)}
    return {**answered, "curves": curves, "split": split, "similarity": similarity}


def drawn(fill: Callable[[Figure], None], tmp_path: Any) -> Figure:
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots._save(lambda figure: (fill(figure), kept.append(figure)), tmp_path / "figure.png", "png")
    return kept[0]


def test_a_name_that_no_font_can_show_stands_in_words_beneath_the_figure(tmp_path: Any) -> None:
    def beneath(classes: list[str]) -> list[str]:
        figure = drawn(lambda figure: plots._confusion(figure, tables(classes)["predictions"], classes), tmp_path)
        return figure.get_supxlabel().splitlines()

    assert beneath(["rugby \U00012000", "\U00012000x"]) == ["[cuneiform sign a]", "[cuneiform sign a]x"]
    assert len(beneath([f"{chr(0x12000 + number)}" for number in range(12)])) == 9
    assert beneath(["rugby", "b\u00f3ule"]) == []


@pytest.mark.parametrize("classes", [ODD, [f"class {number}" for number in range(100)]], ids=["odd names", "100"])
def test_figures_keep_their_size_and_have_no_more_entries_than_can_be_read(classes: list[str], tmp_path: Any) -> None:
    given = tables(classes)
    for fill in (
        lambda figure: plots._class_counts(figure, given["split"], classes),
        lambda figure: plots._confusion(figure, given["predictions"], classes),
        lambda figure: plots._in_a_row(figure, plots._roc_panels(given["roc"])),
    ):
        figure = drawn(fill, tmp_path)
        assert max(figure.get_size_inches()) < 20
        for axes in figure.axes:
            assert len(axes.get_xticklabels()) <= 60 and len(axes.get_yticklabels()) <= 60
            assert max(len(line) for label in axes.get_yticklabels() for line in label.get_text().split("\n")) <= 24
            if legend := axes.get_legend():
                assert len(legend.get_texts()) <= 8


def test_the_most_confused_pairs_come_with_their_share_of_the_true_class() -> None:
    table = pd.DataFrame({"class": ["a"] * 4 + ["b"] * 2, "predicted": ["a", "b", "b", "c", "b", "c"]})
    assert plots.most_confused(table, 2) == [
        {"class": "a", "predicted": "b", "photos": 2, "share": 0.5},
        {"class": "b", "predicted": "c", "photos": 1, "share": 0.5},
    ]
    assert plots.most_confused(table[table["class"] == table["predicted"]]) == []  # a model without a mistake


def page(params: Params, **changes: Any) -> str:
    """The report of made-up figures."""
    found = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9, "balanced_accuracy": 0.8, "roc_auc": 0.9,
             "log_loss": 0.5, "calibration_error": 0.1}  # fmt: skip
    given = tables(params.classes)
    names = ("cnn", "transfer")
    answers = dict(iter(given["predictions"].groupby("model", sort=False)))
    values = {
        "params": params, "decision": "It is decided.", "better": "cnn", "named": plots.MOST_IN_A_TABLE,
        "titles": [], "cells": lambda _: [],
        "metrics": SimpleNamespace(
            test_photos=10, models=dict.fromkeys(names, SimpleNamespace(**found)), mcnemar=[], unknown={},
            baselines=SimpleNamespace(
                majority_class=SimpleNamespace(**found), colour_histogram=SimpleNamespace(**found),
                size_and_aspect=SimpleNamespace(**found), items=dict,
            ),
        ),
        "speeds": {name: {"milliseconds_a_photo": 1.0} for name in names},
        "records": {
            name: {"run_name": name, "description": name,
                   "metrics": {"validation/accuracy": 0.8, "seconds/train": 1.0}} for name in names
        },
        "photos": 10 * len(params.classes), "groups": 5,
        "counts": [{"class": label, "source": "folder", "train": 6, "validation": 2, "test": 2}
                   for label in params.classes],
        "licences": [{"source": "folder", "licence": "", "size": 10, "nunique": 0}], "attributed": False, "brought": [],
        "random_photos": {},
        "figures": plots.svgs(params, given),
        "confusion": {name: [[(1, 0.5)] * len(params.classes)] * len(params.classes) for name in names},
        "most_confused": {name: plots.most_confused(part) for name, part in answers.items()},
        "per_class": [], "slices": [], "mistakes": dict.fromkeys(names, 1), "galleries": {}, "hidden": [], "costs": [],
        "hardware": "", "code": {"commit": ""}, "digests": {}, "versions": {},
    }  # fmt: skip
    return html.render("report.html", **values | changes)


def test_a_table_of_all_pairs_up_to_eight_classes_and_a_heat_map_above(params_with: Callable[..., Params]) -> None:
    few = page(params_with(classes=ODD))
    many = page(params_with(classes=[f"class {number}" for number in range(63)]))
    assert 'class="confusion"' in few and "mistook" not in few
    assert 'class="confusion"' not in many and many.count("<image ") == 2
    assert many.count("mistook most often</caption>") == 2
    assert many.count('<tr><th scope="row" class="wrap">class') == 40
    assert "<h1>63 classes" in many and "63 classes</title>" in many


def test_a_split_that_the_photos_brought_is_said(params_with: Callable[..., Params]) -> None:
    assert "The target split" in page(params_with())
    brought = page(params_with(), brought=["train", "test"])
    assert "split of their own" in brought and "The target split" not in brought


def test_a_source_without_authors_has_no_table_of_them(params_with: Callable[..., Params]) -> None:
    assert "ATTRIBUTION.csv" not in page(params_with())
    assert "ATTRIBUTION.csv" in page(params_with(), attributed=True)
