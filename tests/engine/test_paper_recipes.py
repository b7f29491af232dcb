"""The recipes of the paper's experiments start: on generated pictures, for a step or two."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bkn_core.data.splits import load_data
from bkn_core.engine.build import build_model
from bkn_core.engine.loop import train
from bkn_core.engine.models import count_parameters
from bkn_core.engine.run_folder import RunFolder
from bkn_core.export.from_run import export_onnx
from bkn_core.recipe import load_recipe

DRAW = np.random.default_rng(0)


def write_tree(root: Path, classes: int, images: int, test: str) -> Path:
    """Write small pictures of ten kinds, so many of each class for training, and one of each for testing."""
    kinds = []
    for _ in range(10):
        file = BytesIO()
        Image.fromarray(DRAW.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "JPEG")
        kinds.append(file.getvalue())
    for split, count in (("train", images), (test, 1)):
        for label in range(classes):
            folder = root / split / f"n{label:04}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.JPEG").write_bytes(kinds[(label + number) % 10])
    return root


def start(name: str, root: Path, out: Path, *words: str) -> RunFolder:
    """Train a recipe on a few pictures of a tree, once over them."""
    few = [f"data.root={root}", "data.test_images=4", "train.epochs=1", "train.device=cpu", "log.plots=false"]
    result = train(load_recipe(name, [*few, *words]), out=out)
    assert all(np.isfinite(measured.loss) for measured in result.metrics.values())
    return RunFolder(out)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("imagenet"), 1000, 1, "val")


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "size"), [("bkn", 4), ("bkn", 2), ("bkn", 1), ("bn", 4), ("bn", 2), ("brn", 2)])
@pytest.mark.parametrize("name", ["imagenet_inception_v2", "imagenet_resnet50", "imagenet_resnet101"])
def test_a_recipe_for_imagenet_starts_and_its_network_exports(
    name: str, norm: str, size: int, imagenet: Path, tmp_path: Path
) -> None:
    # At the rate of 256 images, and in a hundred layers at the share of four, two steps blow a network up: its logits
    # reach 180, those near 0 among them are not decided by float32.
    words = ["batch.gradient=4", "batch.per_device=4", "optim.lr=0.0001"]
    words += [f"batch.statistics={size}", f"norm.kind={norm}"]
    run = start(name, imagenet, tmp_path / "run", *words, "data.image_size=64", "data.train_images=8", "log.every=1")
    assert [row["step"] for row in run.records() if row["kind"] == "step"] == [1, 2]
    assert export_onnx(tmp_path / "model.onnx", run=run.path).path.is_file()  # where it agrees with the model


@pytest.mark.parametrize(
    ("gradient", "size"),
    [(2, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(128, 128), (128, 2), (128, 1), (8, 2)])],
)
def test_a_recipe_for_cifar_starts_at_each_batch(gradient: int, size: int, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "data", 10, 13, "test")
    words = [f"batch.gradient={gradient}", f"batch.statistics={size}", f"data.train_images={gradient}"]
    run = start("paper_cifar10", root, tmp_path / "run", *words)
    assert run.recipe.batch.per_device == gradient and run.status == "finished"


def test_the_widened_network_has_the_parameters_that_learned_transitions_add() -> None:
    splits = load_data("digits", root="", image_size=8, train_images=20, test_images=20, color="RGB")
    words = ["model.name=cifar_plain", "norm.transition=learned", "norm.input_prior=false"]
    recipes = load_recipe("paper_cifar10_wide"), load_recipe("paper_cifar10", words)
    wide, learned = (
        count_parameters(build_model(recipe, splits.preprocess, 10, images=splits.train)) for recipe in recipes
    )
    assert learned <= wide < 1.02 * learned
