from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import assert_same_run, train_in_parts

from bkn_core.compare.matrix import compare
from bkn_core.engine.checkpoint import load_run
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.tasks.pixels import dice_losses, pixel_losses
from bkn_core.engine.tasks.segmentation import PixelMetrics
from bkn_core.errors import RecipeError
from bkn_core.evaluate import evaluate
from bkn_core.export.from_run import export_onnx
from bkn_core.predict import predict
from bkn_core.recipe import Recipe, load_recipe

WORDS = (
    "model.args={width: 4, depth: 3}",
    "data.train_images=10",
    "data.test_images=6",
    "data.image_size=32",
    "data.scale=[0.5, 1.5]",
    "data.jitter=0.2",
    "train.loss=cross_entropy_dice",
    "train.epochs=2",
    "train.device=cpu",
    "log.plots=false",
    "log.every=2",
    "eval.stats=both",
)


def tiny(*words: str) -> Recipe:
    return load_recipe("scenes_micro", [*WORDS, *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmentation") / "run"
    train(tiny(), out=folder)
    return folder


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    train_in_parts(tiny(), tmp_path / "run", (2, 9))
    assert_same_run(tmp_path / "run", run)


def test_what_is_evaluated_is_what_the_run_reports(run: Path) -> None:
    found, told = evaluate(run), RunFolder.open(run).summary()["results"]
    assert set(found.metrics) == {"population", "batch"}
    for kind, measured in found.metrics.items():
        assert measured.summary() == told[kind]
        assert {"mean_iou", "iou", "dice", "pixel_accuracy", "loss"} <= set(told[kind])
    matrix = found.classes["population"].confusion
    assert matrix.sum() == 6 * 64 * 64
    for name in ("confusion_plot", "examples"):
        with Image.open(found.classes["batch"].files[name]) as picture:
            assert picture.width > 300


def test_images_of_any_size_have_logits_of_their_own(run: Path) -> None:
    with torch.no_grad():
        assert load_run(run)(torch.randn(1, 3, 45, 71)).shape == (1, 4, 45, 71)


def test_iou_and_dice_are_those_counted_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 3, 500), rng.integers(0, 3, 500)
    pairs = zip(truth.tolist(), found.tolist(), strict=True)
    counts = torch.zeros(4, 4, dtype=torch.int64)
    for one, other in pairs:
        counts[one, other] += 1
    metrics = PixelMetrics(counts, 0.0, torch.zeros(1), 1, ("a", "b", "c", "never"))
    for number, name in enumerate("abc"):
        one, other = truth == number, found == number
        assert metrics.iou[name] == pytest.approx((one & other).sum() / (one | other).sum())
        assert metrics.dice[name] == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))
    assert metrics.iou["never"] is None and metrics.dice["never"] is None
    assert metrics.figure == pytest.approx(np.mean([metrics.iou[name] for name in "abc"]))
    assert metrics.pixel_accuracy == (truth == found).mean()


def test_losses_are_those_counted_pixel_by_pixel() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5))
    masks[0, 0], masks[1] = 255, 255
    shares = logits.softmax(1)
    pixels = [*itertools.product(range(1, 4), range(5))]
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    expected = -sum(weights[masks[0, i, j]] * shares[0, masks[0, i, j], i, j].log() for i, j in pixels) / len(pixels)
    torch.testing.assert_close(pixel_losses(logits, masks, weights), torch.stack([expected, expected * 0]))
    dice = []
    for number in range(3):
        both = sum(shares[0, number, i, j] * (masks[0, i, j] == number) for i, j in pixels)
        either = sum(shares[0, number, i, j] + (masks[0, i, j] == number) for i, j in pixels)
        dice.append((2 * both + 1) / (either + 1))
    torch.testing.assert_close(dice_losses(logits, masks)[0], 1 - sum(dice) / 3)
    assert dice_losses(logits, masks)[1] == 0  # nothing asked, nothing lost


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data.mixup=1.0",), "data.mixup is 1.0, but masks cannot follow it"),
        (("model.name=cifar_plain", "model.args={}"), r"not 4 logits for each of 32 x 32 pixels"),
        (("data.name=digits",), "data.name is 'digits', which has no masks"),
        (("task=classification", "data.scale=null"), "data.name is scenes, which has masks"),
        (("data.root=cells",), "data.root is 'cells', but data.name is scenes, which is built in"),
        (("train.class_weights=[1, 2]",), "train.class_weights holds 2 numbers, but there are 4 classes"),
        (("model.args={up: sideways}",), "model.args.up is 'sideways'"),
    ],
)
def test_what_does_not_fit_masks_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        train(tiny(*words), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_verbs_for_classifiers_alone_say_so(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="task is segmentation: files are of classifiers only"):
        export_onnx(tmp_path / "model.onnx", run=run)
    for source in ([run], tiny()):
        with pytest.raises(RecipeError, match="task is segmentation: only classifiers are compared"):
            compare(source, out=tmp_path / "compared")
    assert not (tmp_path / "compared").exists()
    picture = tmp_path / "picture.png"
    Image.new("RGB", (32, 32)).save(picture)
    with pytest.raises(RecipeError, match="was trained for segmentation; pictures are predicted by classifiers only"):
        predict(run, [picture])
