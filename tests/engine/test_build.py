"""What a recipe and its data say to each other before a model is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import tiny
from torch import nn

import bkn_core as bkn
from bkn_core.engine.build import load_splits
from bkn_core.engine.loop import train
from bkn_core.errors import RecipeError, StatisticsError
from bkn_core.kinds import GROUPLESS, KINDS, POPULATION_ONLY
from bkn_core.population import statistics


@pytest.mark.parametrize(
    ("gradient", "group", "kind", "note"),
    [
        (36, 36, "bn", None),
        (32, 4, "bn", None),  # the last step has four
        (32, 8, "gn", None),  # which has no groups
        (32, 8, "bkn", "the last step of each epoch has 4 images, fewer than batch.statistics (8): they are one group"),
        (64, 2, "bkn", "batch.gradient is 64: each epoch is one step with all 36 training images"),
        (
            64,
            64,
            "bkn",
            "batch.gradient is 64: each epoch is one step with all 36 training images, fewer than batch.statistics "
            "(64): they are one group",
        ),
    ],
)
def test_batches_that_the_images_do_not_fill_are_said(gradient: int, group: int, kind: str, note: str | None) -> None:
    words = (f"batch.gradient={gradient}", f"batch.statistics={group}", "batch.per_device=null", f"norm.kind={kind}")
    assert load_splits(tiny(*words)).notes == (() if note is None else (note,))


def test_kinds_that_know_population_statistics_alone() -> None:
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    same: set[str] = set()
    moving: set[str] = set()
    for kind in KINDS:
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
        model = bkn.convert(plain, images, kind=kind, input_prior=images)
        model(3 * images + 1)
        logits = {}
        for stats in ("population", "batch"):
            with statistics(model.eval(), stats, 1), torch.no_grad():  # type: ignore[arg-type]
                logits[stats] = model(images)
        same |= {kind} if torch.equal(logits["population"], logits["batch"]) else set()
        model.train()(10 * images + 5)
        moving |= set() if torch.allclose(model.eval()(images), logits["population"]) else {kind}
    assert same == POPULATION_ONLY | GROUPLESS
    assert same & moving == POPULATION_ONLY - {"fixed", "frozen", "reference", "normprop"}  # whose constants stay


def test_what_has_no_statistics_of_single_images_is_not_measured_by_them(tmp_path: Path) -> None:
    recipe = tiny("norm.kind=mabn", "batch.statistics=1", "train.epochs=1", "data.train_images=16")
    assert list(train(recipe, out=tmp_path / "run").metrics) == ["population"]
    message = "is batch, but norm.kind is mabn, whose layers know no statistics of a single image"
    with pytest.raises(RecipeError, match=message):
        train(tiny("norm.kind=mabn", "eval.stats=batch"), out=tmp_path / "other")
    with pytest.raises(RecipeError, match=message):
        bkn.evaluate(tmp_path / "run", stats="batch", device="cpu")
    with pytest.raises(RecipeError, match=message):
        bkn.export_onnx(tmp_path / "model.onnx", run=tmp_path / "run", stats="batch")
    assert not (tmp_path / "model.onnx").exists() and not (tmp_path / "other").exists()


def test_a_norm_that_leaves_nothing_of_an_image_is_refused() -> None:
    words = ("model.name=cifar_resnet8", "data.image_size=4")
    recipe = tiny("norm.kind=in", *words)
    preprocess = load_splits(recipe).preprocess
    message = "norm.kind is in, but of images of 4 x 4 a layer of cifar_resnet8 sees one value in each of its 64 groups"
    with pytest.raises(StatisticsError, match=message):
        bkn.build_model(recipe, preprocess, 10)
    model = bkn.build_model(tiny("norm.kind=gn", *words), preprocess, 10).eval()
    assert not torch.equal(*model(torch.randn(2, 1, 4, 4)))
