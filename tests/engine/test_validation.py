"""Images held out to choose by: which they are, what is measured on them, and that the test images wait for the end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import CPU, FULL, STEPS, assert_same_run, status, stop_at, tiny, train_in_parts
from torch import nn

import bkn_core as bkn
from bkn_core.data.splits import DataSplits, ImageSet, LazyImageSet, load_data
from bkn_core.engine import training as engine_training
from bkn_core.engine.build import load_splits
from bkn_core.engine.checkpoint import check_recipe, deciding_keys, load_state, load_weights, save_state
from bkn_core.engine.evaluation import measure_model
from bkn_core.engine.events import EpochEnded, Event, Started
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.tasks.classification import Classification
from bkn_core.engine.training import Training
from bkn_core.errors import InputError, InterruptedRun, RecipeError

HELD_OUT = "data.validation=0.02"  # 29 of the 1437 digits to train on


def digits(**options: Any) -> DataSplits:
    return load_data("digits", root="unused", image_size=8, **options)


def pictures(images: ImageSet | LazyImageSet | None) -> list[bytes]:
    assert images is not None
    return [image.numpy().tobytes() for image in images.batch(torch.arange(len(images)))[0]]


def write_folders(root: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3), ("held", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 256, (5, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation images that was never stopped."""
    folder = tmp_path_factory.mktemp("held_out") / "run"
    train(tiny(*FULL, HELD_OUT), out=folder)
    return folder


def test_a_share_and_the_rest_are_all_the_training_images() -> None:
    whole, splits = digits(), digits(validation=0.2)
    assert splits.validation is not None
    assert (len(splits.validation), len(splits.train)) == (287, 1150)
    assert sorted(pictures(splits.train) + pictures(splits.validation)) == sorted(pictures(whole.train))
    assert pictures(splits.test) == pictures(whole.test)


def test_a_share_has_the_proportions_of_the_classes(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    images = np.random.default_rng(0).integers(0, 256, (100, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    splits = load_data("npz", root=tmp_path / "a.npz", image_size=None, validation=0.2)
    assert splits.validation is not None
    assert splits.validation.labels.bincount().tolist() == [12, 6, 2]


def test_a_share_is_the_same_whatever_the_seed() -> None:
    first, second = (load_splits(tiny(HELD_OUT, f"train.seed={seed}")) for seed in (0, 1))
    assert pictures(first.validation) == pictures(second.validation)


def test_the_limit_counts_the_images_that_are_left() -> None:
    splits = digits(validation=0.2, train_images=100)
    assert pictures(splits.validation) == pictures(digits(validation=0.2).validation)
    assert len(splits.train) == 100
    assert not {*pictures(splits.train)} & {*pictures(splits.validation)}
    with pytest.raises(RecipeError, match=r"is 1151, but digits has 1150 training images beside those of data\.valid"):
        digits(validation=0.2, train_images=1151)


def test_mean_and_deviation_are_those_of_the_images_trained_on() -> None:
    splits = digits(validation=0.5)
    assert isinstance(splits.train, ImageSet)
    pixels = splits.train.images.double() / 255
    assert splits.preprocess.mean == (round(pixels.mean().item(), 4),) != digits().preprocess.mean


@pytest.mark.parametrize(("share", "count"), [(0.0001, 0), (0.9999, 1437)])
def test_a_share_of_none_or_all_is_refused_with_the_numbers(share: float, count: int) -> None:
    with pytest.raises(RecipeError, match=f"is {share}: of the 1437 training images of digits these are {count}\n"):
        digits(validation=share)


def test_a_folder_beside_the_others_is_read(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    splits = load_data("imagefolder", root=root, image_size=None, validation=str(root / "held"))
    assert splits.validation is not None
    assert len(splits.train) == 12
    assert splits.validation.labels.tolist() == [0, 0, 1, 1]
    first = np.asarray(Image.open(root / "held" / "cat" / "0.png"))
    assert torch.equal(splits.validation.batch(torch.tensor([0]))[0][0], torch.tensor(first).permute(2, 0, 1))


def test_the_folder_val_may_be_chosen_by_where_test_is_there(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    (root / "held").rename(root / "val")
    splits = load_data("imagefolder", root=root, image_size=None, validation=str(root / "val"))
    assert splits.validation is not None
    assert (len(splits.validation), len(splits.test)) == (4, 6)


@pytest.mark.parametrize("split", ["train", "test", "val"])
def test_the_folder_of_training_or_test_images_is_refused(tmp_path: Path, split: str) -> None:
    root = write_folders(tmp_path)
    if split == "val":
        (root / "test").rename(root / "val")
    purpose = "training" if split == "train" else "test"
    with pytest.raises(InputError, match=f"{split} holds the {purpose} images themselves\n"):
        load_data("imagefolder", root=root, image_size=None, validation=str(root / "held" / ".." / split))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: shutil.rmtree(held), "held is no folder"),
        (lambda held: shutil.rmtree(held / "dog"), "held: class 'dog' is in train but not there"),
        (lambda held: (held / "eel").mkdir(), "held: class 'eel' is not in train"),
        (lambda held: [path.unlink() for path in held.glob("cat/*")], "held/cat holds no images"),
        (lambda held: (held / "cat" / "0.png").write_bytes(b""), "held/cat/0.png cannot be decoded"),
    ],
    ids=["missing", "class missing", "class unknown", "class empty", "image damaged"],
)
def test_a_faulty_folder_is_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    root = write_folders(tmp_path)
    change(root / "held")
    with pytest.raises(InputError, match=message):
        load_data("imagefolder", root=root, image_size=None, validation=str(root / "held"))


def test_a_folder_is_refused_for_data_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is '.*', a folder, but data\.name is digits; only imagefolder takes one"):
        digits(validation=str(tmp_path))


def test_priors_see_no_image_that_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    build = engine_training.build_model
    monkeypatch.setattr(engine_training, "build_model", lambda *a, **k: (seen.append(k["images"]), build(*a, **k))[1])
    splits = Training(tiny("data.validation=0.5", "data.train_images=null"), CPU).splits
    assert not {*pictures(seen[0])} & {*pictures(splits.validation)}


def test_epochs_are_recorded_under_the_name_of_validation(held_out: Path) -> None:
    first, second = (row for row in RunFolder.open(held_out).records() if row["kind"] == "epoch")
    for row in (first, second):
        measured = {key for key in row if key.endswith(("top1", "top5")) or "_loss" in key} - {"train_loss"}
        names = ("top1", "loss", "top5")
        assert measured == {f"validation_{kind}_{name}" for kind in ("population", "batch") for name in names}
    assert "validation_population_top1" in (held_out / "metrics.csv").read_text().splitlines()[0]


def test_best_is_best_on_the_validation_images(held_out: Path) -> None:
    weights, splits = load_weights(held_out / "checkpoints" / "best.safetensors"), load_splits(tiny(*FULL, HELD_OUT))
    assert splits.validation is not None
    rows = [row for row in RunFolder.open(held_out).records() if row["kind"] == "epoch"]
    best = max(rows, key=lambda row: row["validation_population_top1"])
    how = {"task": Classification(), "kind": "population", "device": torch.device("cpu")}
    found = measure_model(weights.model(), splits.validation, weights.preprocess, **how)
    assert found.top1 == best["validation_population_top1"]
    assert status(held_out)["best"] == {"top1": found.top1, "epoch": best["epoch"]}


def test_results_are_those_of_the_last_weights_on_the_test_images(held_out: Path) -> None:
    found = bkn.evaluate(held_out / "checkpoints" / "last.safetensors", device="cpu")
    results = status(held_out)["results"]
    for kind, metrics in found.metrics.items():
        assert (results[kind]["top1"], results[kind]["images"]) == (metrics.top1, 40)
        assert results[kind]["loss"] == pytest.approx(metrics.loss, rel=1e-6)
    with np.load(held_out / "predictions.npz") as mine, np.load(found.predictions) as its:
        assert np.array_equal(mine["population_predictions"], its["population_predictions"])


def test_the_test_images_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = engine_training.measure_model

    def counted(model: nn.Module, images: ImageSet | LazyImageSet, *arguments: Any, **options: Any) -> Any:
        measured.append(len(images))
        return measure(model, images, *arguments, **options)

    monkeypatch.setattr(engine_training, "measure_model", counted)
    train(tiny(HELD_OUT), out=tmp_path / "run")
    assert measured == [29, 29, 40]


def test_events_say_what_was_measured(tmp_path: Path) -> None:
    events: list[Event] = []
    train(tiny(HELD_OUT, "train.epochs=1"), out=tmp_path / "run", on_event=events.append)
    assert [e.validation_images for e in events if isinstance(e, Started)] == [29]
    assert [e.images for e in events if isinstance(e, EpochEnded)] == ["validation"]


# Asked after each of three steps, then before two batches by two kinds of statistics, twice, then before four of test.
@pytest.mark.parametrize("stops", [(3,), (5, 7), (14, 2), (16,)], ids=lambda stops: " then ".join(map(str, stops)))
def test_a_run_in_parts_equals_the_run_that_never_stopped(
    held_out: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    result = train_in_parts(tiny(*FULL, HELD_OUT), tmp_path / "run", stops)
    assert result.steps == STEPS
    assert_same_run(tmp_path / "run", held_out)
    assert status(tmp_path / "run")["results"] == status(held_out)["results"]


def test_a_run_that_stops_before_its_end_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        train(tiny(HELD_OUT), out=tmp_path / "run", should_stop=stop_at(7))
    assert status(tmp_path / "run")["results"] == {}
    assert not (tmp_path / "run" / "predictions.npz").exists()


def test_another_share_does_not_go_on(held_out: Path) -> None:
    state = load_state(RunFolder.open(held_out).state)
    with pytest.raises(InputError, match=r"does not fit the recipe: data\.validation changed"):
        check_recipe(state["recipe"], tiny(*FULL, "data.validation=0.03"))


def test_a_folder_may_lie_elsewhere_when_the_run_goes_on() -> None:
    check_recipe(deciding_keys(tiny("data.validation=here")), tiny("data.validation=there"))
    with pytest.raises(InputError, match=r"data\.validation changed"):
        check_recipe(deciding_keys(tiny("data.validation=here")), tiny())


def test_a_state_from_before_there_was_validation_goes_on(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        train(tiny(*FULL), out=tmp_path / "run", should_stop=stop_at(2))
    path = RunFolder.open(tmp_path / "run").state
    state = load_state(path)
    del state["recipe"]["data"]["validation"]
    save_state(path, state)
    train(tiny(*FULL), resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)
