"""The quality of a run's priors: numbers, picture, and what cannot have them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_runs import tiny, training

import bkn_core as bkn
from bkn_core.data.batches import normalize
from bkn_core.data.splits import load_test_images
from bkn_core.engine import priors
from bkn_core.engine.build import load_splits
from bkn_core.engine.checkpoint import load_weights, weights_path
from bkn_core.engine.plots import new_figure
from bkn_core.engine.priors import initial_priors
from bkn_core.errors import RecipeError
from bkn_core.priors.quality import PriorError, PriorQuality


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, because evaluating writes into it."""
    return Path(shutil.copytree(straight, tmp_path / "run"))


@pytest.mark.parametrize(("stats", "kind"), [("both", "population"), ("batch", "batch")])
def test_the_report_of_a_run_is_that_of_its_model_on_its_test_images(run: Path, stats: str, kind: str) -> None:
    found = bkn.evaluate(run, stats=stats, device="cpu", priors=True).priors
    weights = load_weights(weights_path(run))
    images, _ = load_test_images("digits", root="", preprocess=weights.preprocess, test_images=40)
    batch = normalize(images.batch(torch.arange(40))[0], weights.preprocess)
    model = weights.model()
    with bkn.statistics(model, kind):  # type: ignore[arg-type]
        expected = bkn.prior_quality(model, batch)
    assert found is not None and (found.statistics, found.images) == (kind, 40)
    for ours, theirs in zip(found.rows, expected, strict=True):
        assert (ours.name, ours.prior) == (theirs.name, theirs.prior)
        assert ours.refined is not None and theirs.refined is not None
        assert ours.refined.summary() == pytest.approx(theirs.refined.summary(), abs=1e-5)
    document = json.loads((run / "priors.json").read_text())
    assert document == found.summary() and len(document["layers"]) == len(expected)
    assert found.files == {"priors": run / "priors.json", "priors_plot": run / "plots" / "priors.png"}


def test_without_being_asked_for_nothing_is_measured_or_written(run: Path) -> None:
    assert bkn.evaluate(run, device="cpu").priors is None
    assert not (run / "priors.json").exists() and not (run / "plots" / "priors.png").exists()


def test_a_checkpoint_file_has_its_report_beside_it(run: Path) -> None:
    found = bkn.evaluate(run / "checkpoints" / "last.safetensors", device="cpu", priors=True).priors
    assert found is not None
    assert [path.name for path in found.files.values()] == ["last.priors.json", "last.priors.png"]
    assert all(path.is_file() for path in found.files.values())


def test_norms_and_files_without_priors_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    run = tmp_path / "bn"
    bkn.train(tiny("norm.kind=bn", "train.epochs=1"), out=run)
    with pytest.raises(RecipeError, match="normalizes by bn, which has no priors"):
        bkn.evaluate(run, device="cpu", priors=True)
    assert not (run / "evaluation.npz").exists()
    with pytest.raises(RecipeError, match="it holds no priors"):
        bkn.evaluate(tmp_path / "model.onnx", priors=True)


def test_priors_before_training_are_those_of_the_model_that_would_be_trained(tmp_path: Path) -> None:
    recipe = tiny()
    splits = load_splits(recipe)
    state = torch.get_rng_state()
    rows = initial_priors(recipe, splits)
    assert torch.equal(torch.get_rng_state(), state)
    start = training().model
    images = normalize(splits.train.batch(torch.arange(36))[0], splits.preprocess)
    with bkn.statistics(start, "batch", recipe.batch.statistics):
        expected = bkn.prior_quality(start, images)
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours.refined is not None and theirs.refined is not None
        assert ours.refined.summary() == pytest.approx(theirs.refined.summary(), abs=1e-4)


@pytest.mark.parametrize("words", ["norm.kind=bn", "model.pretrained=true"])
def test_priors_before_training_need_priors_and_no_foreign_weights(words: str) -> None:
    recipe = tiny(words)
    assert initial_priors(recipe, load_splits(recipe)) == []


def row(name: str, *ratios: float) -> PriorQuality:
    error = PriorError(torch.tensor(ratios).double().abs(), torch.tensor(ratios).double())
    return PriorQuality(name, len(ratios), "input -> conv", "", error, error, error)


def test_the_picture_grows_with_the_layers_and_bears_what_cannot_be_drawn(tmp_path: Path) -> None:
    nothing = PriorQuality("bn9", 2, None, "it was not converted", None, None, None)
    heights = []
    for rows in (
        [row("bn1", 0.5, 0.7)],
        [row("bn1", float("inf"), 0.1), row("bn2", float("nan")), nothing],
        [nothing] * 40,
    ):
        bkn.plot_prior_quality(rows, tmp_path / "priors.png")
        with Image.open(tmp_path / "priors.png") as image:
            assert image.format == "PNG"
            heights.append(image.height)
    assert heights == sorted(set(heights))
    assert [path.name for path in tmp_path.iterdir()] == ["priors.png"]


def test_a_picture_of_far_errors_and_long_reasons_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []

    def keep(**options: Any) -> Any:
        figures.append(new_figure(**options))
        return figures[-1]

    monkeypatch.setattr(priors, "new_figure", keep)
    far = PriorError(torch.linspace(0, 50, 8), torch.linspace(-33, -20, 8))
    rows = [PriorQuality("far", 8, "conv", "", far, far, far)]
    rows += [PriorQuality("none", 8, None, "attention " * 20, None, None, None)]
    bkn.plot_prior_quality(rows, tmp_path / "priors.png")
    variance = figures[0].axes[0]
    (factors,) = variance.child_axes
    assert variance.get_position().width > 0.4
    words = [label.get_window_extent() for label in factors.get_xticklabels()]
    assert len(words) >= 3 and not any(a.overlaps(b) for a, b in itertools.combinations(words, 2))
