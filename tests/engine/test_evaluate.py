"""The verb `evaluate` on run folders and checkpoint files."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import stop_at, tiny
from torch.nn import functional as F

import bkn_core as bkn
from bkn_core.data.batches import epoch_order, normalize
from bkn_core.data.pictures import resize
from bkn_core.data.splits import load_test_images
from bkn_core.engine.checkpoint import load_weights, save_weights, weights_path
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder, newest_run
from bkn_core.errors import BknError, DeviceError, InputError, InterruptedRun, RecipeError
from bkn_core.export.sessions import open_session
from bkn_core.kinds import KINDS, check_statistics

# A run of few images asks for as few where it is measured.
ALL = ("data.train_images=null", "data.test_images=null")


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, because evaluating writes into it."""
    return Path(shutil.copytree(straight, tmp_path / "run"))


def write_images(path: Path, classes: list[str], images: int = 30) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        f"{split}_{name}": values
        for split in ("train", "test")
        for name, values in {
            "images": draw.integers(0, 256, (images, 9, 9), dtype=np.uint8),
            "labels": np.arange(images) % len(classes),
        }.items()
    }
    np.savez(path, **arrays, classes=np.array(classes))


def test_a_run_is_measured_as_its_last_epoch_was(run: Path) -> None:
    found = bkn.evaluate(run, device="cpu")
    rows = [row for row in RunFolder.open(run).records() if row["kind"] == "epoch"]
    last = rows[-1]
    for kind in ("population", "batch"):
        assert found.metrics[kind].top1 == last[f"{kind}_top1"]
        assert found.metrics[kind].topk == {5: last[f"{kind}_top5"]}
        assert found.metrics[kind].loss == pytest.approx(last[f"{kind}_loss"], rel=1e-6)
    assert (found.target, found.provider, found.warnings) == (run, "PyTorch on cpu", ())
    assert found.predictions == run / "evaluation.npz"
    with np.load(found.predictions) as arrays:
        assert (arrays["population_predictions"] == arrays["labels"]).mean() == found.metrics["population"].top1


def test_a_checkpoint_file_is_measured_and_its_predictions_lie_beside_it(run: Path) -> None:
    path = run / "checkpoints" / "last.safetensors"
    before = (run / "predictions.npz").read_bytes()
    found = bkn.evaluate(path, stats="population", device="cpu", batch_size=7)
    last = [row for row in RunFolder.open(run).records() if row["kind"] == "epoch"][-1]
    assert found.metrics["population"].top1 == last["population_top1"]
    assert found.predictions == run / "checkpoints" / "last.predictions.npz"
    assert found.predictions.is_file() and (run / "predictions.npz").read_bytes() == before


def test_measuring_agrees_with_the_model_that_load_run_gives(run: Path) -> None:
    found = bkn.evaluate(run, stats="population", device="cpu").metrics["population"]
    preprocess = load_weights(weights_path(run)).preprocess
    images, _ = load_test_images("digits", root="data", preprocess=preprocess, test_images=40)
    with torch.no_grad():
        logits = bkn.load_run(run)(normalize(images.batch(torch.arange(40))[0], preprocess))
    assert logits.argmax(1).tolist() == found.predictions.tolist()


@pytest.mark.parametrize("stats", ["population", "batch"])
def test_only_the_kind_that_was_asked_for_is_measured(run: Path, stats: str) -> None:
    assert list(bkn.evaluate(run, stats=stats, device="cpu").metrics) == [stats]


def test_mixtures_measure_groups_of_the_trainings_size(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny("norm.kind=bn", "batch.statistics=4"), out=run)
    found = bkn.evaluate(run, stats="mixtures", device="cpu", batch_size=7)
    mixtures = ["population_mean_group_variance", "group_mean_population_variance", "group"]
    assert list(found.metrics) == ["population", *mixtures] and found.statistics_batch_size == 4
    losses = [metrics.loss for metrics in found.metrics.values()]
    assert len(set(losses)) == 4 and np.isfinite(losses).all()
    alone = bkn.evaluate(run, stats="population", device="cpu")
    torch.testing.assert_close(found.metrics["population"].losses, alone.metrics["population"].losses)
    assert list(found.classes) == ["population"] and alone.statistics_batch_size is None
    weights = load_weights(weights_path(run))
    images, _ = load_test_images("digits", root="", preprocess=weights.preprocess, test_images=40)
    order = epoch_order(40, 0, 0)
    with bkn.statistics(model := weights.model(), "batch", 4), torch.no_grad():
        logits = model(normalize(images.batch(order)[0], weights.preprocess))
    expected = F.cross_entropy(logits, images.labels[order], reduction="none")
    torch.testing.assert_close(found.metrics["group"].losses[order], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bn", "bkn")])
def test_only_layers_that_have_both_kinds_of_statistics_mix_them(kind: str) -> None:
    with pytest.raises(RecipeError, match=f"stats is mixtures, but norm.kind is {kind}, whose layers") as caught:
        check_statistics(kind, "mixtures", asked="stats")
    assert "norm.kind bn or bkn" in caught.value.hint


def test_without_a_target_the_newest_finished_run_is_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no finished run"):
        bkn.evaluate()
    shutil.move(run, tmp_path / "runs" / "finished")
    with pytest.raises(InterruptedRun):
        bkn.train(tiny(), should_stop=stop_at(1))
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "summary.json").write_text("[1")
    assert newest_run() == Path("runs/finished")
    assert bkn.evaluate(stats="population", device="cpu").target == Path("runs/finished")


def test_other_test_images_are_measured_where_their_classes_agree(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "other.npz", list("0123456789"))
    found = bkn.evaluate(run, device="cpu", overrides=[f"data.root={tmp_path}/other.npz", *ALL])
    assert found.metrics["population"].images == 30
    fewer = bkn.evaluate(run, device="cpu", overrides=["data.test_images=20"])
    assert fewer.metrics["population"].images == 20


@pytest.mark.parametrize("classes", [list("012"), list("0123456798"), list("abcdefghij")])
def test_images_of_other_classes_are_refused(run: Path, tmp_path: Path, classes: list[str]) -> None:
    write_images(tmp_path / "other.npz", classes)
    with pytest.raises(InputError, match=rf"have {len(classes)} classes .* the model 10"):
        bkn.evaluate(run, device="cpu", overrides=["data.name=npz", f"data.root={tmp_path}/other.npz", *ALL])


@pytest.mark.parametrize("name", ["ähre", "a b", "🐟 fish", "it's: [1]", '"quoted"', "#7"])
def test_data_in_a_folder_of_any_name_is_found_again(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / f"{name}.npz", list("01"), images=10)
    words = ["data.name=npz", "train.epochs=1", "data.train_images=4", "data.test_images=4"]
    recipe = tiny(*words)
    data = recipe.data.model_copy(update={"root": str(tmp_path / f"{name}.npz")})
    bkn.train(recipe.model_copy(update={"data": data}), out=tmp_path / "run")
    assert bkn.evaluate(tmp_path / "run", device="cpu").metrics["population"].images == 4


def rewritten(run: Path, **data: object) -> Path:
    """A checkpoint of the run's weights whose recipe names other data."""
    path = run / "checkpoints" / "last.safetensors"
    weights = load_weights(path)
    known = weights.recipe.data.model_copy(update=data)
    recipe = weights.recipe.model_copy(update={"data": known})
    save_weights(path, weights.model(), recipe, weights.classes, weights.preprocess)
    return path


@pytest.mark.parametrize("root", ["{}/other.npz", "../other.npz", "inside/../../other.npz", "~/other.npz", "~nobody/x"])
def test_a_file_does_not_choose_data_outside_the_working_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    write_images(tmp_path / "other.npz", list("0123456789"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run)
    (run / "inside").mkdir()
    root = root.format(tmp_path)
    path = rewritten(run, name="npz", root=root, test_images=None, train_images=None)
    for target in (path, run):
        with pytest.raises(InputError, match="outside the working folder") as caught:
            bkn.evaluate(target, device="cpu")
        assert f"data.root={shlex.quote(root)}" in caught.value.hint
    if "nobody" not in root:
        assert bkn.evaluate(path, device="cpu", overrides=[f"data.root={root}"]).data == f"npz in {root}"


def test_a_file_may_name_data_behind_a_link_in_the_working_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "other.npz", list("0123456789"))
    (run / "data.npz").symlink_to(tmp_path / "other.npz")
    monkeypatch.chdir(run)
    path = rewritten(run, name="npz", root="data.npz", test_images=None, train_images=None)
    assert bkn.evaluate(path, device="cpu").data == "npz in data.npz"


def test_a_file_does_not_choose_to_download(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    path = rewritten(run, name="MNIST", root="new", download=True)
    with pytest.raises(InputError, match="new"):
        bkn.evaluate(path, device="cpu")
    assert not (run / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"stats": "moving"}, RecipeError, "stats is 'moving'"),
        ({"batch_size": 0}, RecipeError, "batch_size is 0"),
        ({"device": "cuda:77"}, DeviceError, "cuda:77"),
        ({"device": "abacus"}, RecipeError, "abacus"),
        ({"overrides": ["norm.kind=bn"]}, RecipeError, "norm.kind=bn"),
        ({"overrides": ["data.resize=pad"]}, RecipeError, "data.resize cannot change for a trained model"),
        ({"overrides": ["data.image_size=32"]}, RecipeError, "data.image_size cannot change for a trained model"),
        ({"overrides": ["data.nonsense=1"]}, RecipeError, "nonsense"),
        ({"overrides": ["data.name=npz", "data.root=nowhere.npz"]}, InputError, "nowhere"),
        ({"overrides": ["data.test_images=9999"]}, RecipeError, "9999"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said(
    run: Path, arguments: dict[str, object], error: type[BknError], match: str
) -> None:
    before = (run / "predictions.npz").read_bytes()
    with pytest.raises(error, match=match):
        bkn.evaluate(run, **arguments)
    assert (run / "predictions.npz").read_bytes() == before


def test_a_target_that_is_missing_or_damaged_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        bkn.evaluate(tmp_path / "nowhere")
    path = run / "checkpoints" / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"last\.safetensors is damaged"):
        bkn.evaluate(run)


@pytest.mark.parametrize("fit", ["crop", pytest.param("pad", marks=pytest.mark.slow)])
def test_a_run_and_its_exported_file_fit_pictures_as_training_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("a.npz"), ["a", "b"])
    words = ("data.name=npz", "data.root=a.npz", f"data.resize={fit}", "data.image_size=[8, 5]", "train.epochs=1", *ALL)
    trained = train(tiny(*words), out="run").metrics["population"]
    bkn.export_onnx("model.onnx", run="run")
    assert open_session("model.onnx", device="cpu").preprocess.resize == fit
    with np.load("a.npz") as arrays:
        pixels = torch.from_numpy(arrays["test_images"]).unsqueeze(1)
    own = load_weights(weights_path(Path("run")))
    logits = own.model()(normalize(resize(pixels, (8, 5), fit), own.preprocess))
    for target in ("run", "model.onnx"):
        found = bkn.evaluate(target, device="cpu").metrics["population"]
        assert torch.equal(found.predictions, trained.predictions)
        torch.testing.assert_close(found.losses, F.cross_entropy(logits, torch.arange(30) % 2, reduction="none"))
