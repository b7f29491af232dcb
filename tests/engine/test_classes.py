"""What each class is taken for, against scikit-learn, in tables and a picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bkn_core.data.splits import ImageSet, LazyImageSet, load_data
from bkn_core.engine.classes import report_classes
from bkn_core.engine.evaluation import save_predictions
from bkn_core.engine.tasks.classification import Metrics, measure

FILES = {"classes": "classes.csv", "confusion": "confusion.csv", "confusion_plot": "confusion.png"}


def named(labels: torch.Tensor, *classes: str) -> ImageSet:
    return ImageSet(torch.zeros(len(labels), 1, 1, 1), labels, classes)


def measured(logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
    numbered = ImageSet(torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None], labels, ())
    return measure(lambda x: logits[x.flatten().long()], numbered, batch_size=50)


def test_matrix_precision_and_recall_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    logits, labels = torch.randn(60, 4), torch.arange(60) % 3  # no image of class 3
    logits[:, 1] = -9  # nothing is taken for class 1
    files = {name: tmp_path / file for name, file in FILES.items()}
    metrics = measured(logits, labels)
    found = report_classes("population", metrics, named(labels, "a", "b", "c, or $x", "d"), files)
    truth, taken = labels.numpy(), logits.argmax(1).numpy()
    np.testing.assert_array_equal(found.confusion, confusion_matrix(truth, taken, labels=range(4)))
    precision, recall, _, support = precision_recall_fscore_support(truth, taken, labels=range(4), zero_division=np.nan)
    for ours, theirs in (("precision", precision), ("recall", recall), ("support", support)):
        values = [getattr(row, ours) for row in found.rows]
        np.testing.assert_allclose([math.nan if value is None else value for value in values], theirs)
    with open(files["confusion"], newline="") as file:
        (_, *names), *lines = csv.reader(file)
    assert names == ["a", "b", "c, or $x", "d"]
    np.testing.assert_array_equal([[int(text) for text in line[1:]] for line in lines], found.confusion)
    with open(files["classes"], newline="") as file:
        assert [row["support"] for row in csv.DictReader(file)] == ["20", "20", "20", "0"]
    with Image.open(files["confusion_plot"]) as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(2**24)) > 50


def test_an_image_without_a_finite_loss_is_found_in_no_class(tmp_path: Path) -> None:
    logits, labels = 9 * torch.eye(3), torch.arange(3)
    logits[0] = math.nan
    files = {name: tmp_path / file for name, file in FILES.items()}
    found = report_classes(
        "population",
        measured(logits, labels),
        ImageSet(torch.zeros(len(labels), 1, 1, 1), labels, ("a", "b", "c")),
        files,
    )
    assert found.confusion.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert [row.recall for row in found.rows] == [0, 1, 1]


def test_predictions_name_the_file_of_each_image(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / name / f"{name}.png")
    test = load_data("imagefolder", root=tmp_path, image_size=None).test
    assert isinstance(test, ImageSet)
    save_predictions(tmp_path / "found.npz", test, {"population": measured(torch.eye(2), torch.arange(2))})
    with np.load(tmp_path / "found.npz") as arrays:
        assert arrays["names"].tolist() == [f"{tmp_path}/test/{name}/{name}.png" for name in ("cat", "dog")]
    digits = load_data("digits", root="", image_size=8, test_images=20).test
    assert isinstance(digits, ImageSet | LazyImageSet) and digits.names == ()
